"""What machines read of the site: docs/llms.txt is complete and true, and the pictures are
self-contained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from eventbus.server import Server
from tests.test_examples import RUNNER, blocks, run

DOCS = Path(__file__).parents[1] / "docs"
LLMS = DOCS / "llms.txt"
SVG = "{http://www.w3.org/2000/svg}"
PICTURES = sorted((DOCS / "img").glob("*.svg"))
ENTRY = re.compile(r"^- \[[^\]]+\]\(([^)]*)\): \S.*$", re.MULTILINE)


def page_of(link: str) -> Path:
    """The file behind a path of the site: `howto/flask/` is docs/howto/flask.md."""
    return DOCS / "index.md" if link == "./" else DOCS / f"{link.removesuffix('/')}.md"


def test_llms_has_every_page() -> None:
    """Every page is listed in llms.txt, once, with a line that says what it is for."""
    listed = [page_of(link) for link in ENTRY.findall(LLMS.read_text(encoding="utf-8"))]
    assert sorted(listed) == sorted(DOCS.rglob("*.md"))


def test_llms_has_no_dead_link() -> None:
    """Every link in llms.txt is a path of the site with a page behind it."""
    links = re.findall(r"\]\(([^)]*)\)", LLMS.read_text(encoding="utf-8"))
    assert [link for link in links if not (link.endswith("/") and page_of(link).is_file())] == []


def test_llms_begins_as_the_convention_says() -> None:
    """The file begins with the name and a quoted summary, and has headings of one level."""
    lines = LLMS.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# eventbus"
    assert lines[2].startswith("> ")
    assert not [line for line in lines if line.startswith("###")]


@pytest.mark.timeout(40)
def test_llms_crib_runs(valkey: Server) -> None:
    """The short form of the API in llms.txt runs on a real server, without an error."""
    shown = run("-c", RUNNER, given=json.dumps(blocks(LLMS)), EVENTBUS_URL=valkey.url)
    assert "chat:lobby" in shown  # its handler was called


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_self_contained(picture: Path) -> None:
    """A picture has a title and a description for who cannot see it, colours for a dark page, and
    loads nothing."""
    text = picture.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    named = {part.tag: (part.get("id"), (part.text or "").strip()) for part in root[:2]}

    assert named[f"{SVG}title"][1]
    assert named[f"{SVG}desc"][1]
    assert root.get("aria-labelledby") == "title desc"
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\(|@import|<script", text)


def test_a_picture_is_shown_somewhere() -> None:
    """No picture lies unused, and every picture that a page shows is there, with other words for
    it."""
    shown: set[Path] = set()
    for page in DOCS.rglob("*.md"):
        for words, link in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", page.read_text("utf-8")):
            assert words, f"{page.name}: {link}"
            assert (page.parent / link).resolve().is_file(), f"{page.name}: {link}"
            shown.add((page.parent / link).resolve())
    assert [path.name for path in PICTURES if path not in shown] == []
