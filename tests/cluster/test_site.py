"""The documentation as a reader gets it: built, served on loopback, and opened in a real browser.

`mkdocs build --strict` (in `make check`) looks at the Markdown. This looks at what came out of it:
the links and anchors of the HTML, scripts that fail, requests that leave the machine, the search,
and the width of a phone.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
LIMIT = 60_000
"""Milliseconds that the browser waits for what must become true."""
PHONE = (390, 844)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *_: object) -> None:
        return


class Site(NamedTuple):
    """Where the files are, and where they are served."""

    folder: Path
    url: str

    def pages(self) -> dict[str, Path]:
        """The address of every page, with its file; the page for what is not found is none."""
        return {
            urljoin(self.url, path.parent.relative_to(self.folder).as_posix() + "/"): path
            for path in sorted(self.folder.rglob("index.html"))
        }


class Links(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[name] or "" for name in ("id", "name") if name in found}
        self.links += [found[name] or "" for name in ("href", "src") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The documentation of this tree, built and served."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
async def wrong(browser: Browser, site: Site) -> AsyncIterator[tuple[Page, list[str]]]:
    """A page of the width of a phone, and what went wrong in it."""
    viewport = {"width": PHONE[0], "height": PHONE[1]}
    context = await browser.new_context(viewport=viewport, locale="en-GB")
    context.set_default_timeout(LIMIT)
    page, said = await context.new_page(), list[str]()
    page.on("pageerror", lambda error: said.append(f"{page.url}: {error}"))
    page.on(
        "console",
        lambda line: said.append(f"{page.url}: {line.text}") if line.type == "error" else None,
    )
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((site.url, "data:", "blob:"))
            else said.append(f"{page.url}: asks {request.url}")
        ),
    )
    page.on(
        "response",
        lambda answer: said.append(f"{answer.url}: {answer.status}") if answer.status > 399 else 0,
    )
    yield page, said
    await context.close()


def test_no_link_is_dead(site: Site) -> None:
    """Every link of every page, also those to an anchor, leads to something that is there."""
    pages = {address: Links(path) for address, path in site.pages().items()}
    dead = []
    for address, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(address, link))
            if not target.geturl().startswith(site.url):
                continue  # a link to elsewhere, which nobody follows here
            bare = target._replace(fragment="", query="").geturl()
            there = site.folder / unquote(target.path.lstrip("/"))
            if bare in pages and unquote(target.fragment) in pages[bare].anchors:
                continue
            if not (there.is_file() and not target.fragment):
                dead.append(f"{address}: {link}")

    assert dead == []
    assert len(pages) > 20


def test_llms_is_served_and_leads_to_pages(site: Site) -> None:
    """The list for machines is part of the site, and each of its links is a page of it."""
    text = (site.folder / "llms.txt").read_text(encoding="utf-8")
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert [link for link in links if urljoin(site.url, link) not in site.pages()] == []
    assert links


async def test_pages_are_quiet_and_fit_a_phone(site: Site, wrong: tuple[Page, list[str]]) -> None:
    """Every page opens without an error of a script, without a request to another host, without a
    missing file, and is not wider than a phone."""
    page, said = wrong
    wide = []
    for address in site.pages():
        await page.goto(address, wait_until="load")
        if await page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            wide.append(address)

    assert said == []
    assert wide == []


async def test_pictures_are_seen(site: Site, wrong: tuple[Page, list[str]]) -> None:
    """Every picture of the explanations has loaded, and is drawn as wide as the text allows."""
    page, said = wrong
    seen = 0
    for address in site.pages():
        if "/explanation/" not in address:
            continue
        await page.goto(address, wait_until="load")
        widths = await page.evaluate(
            "[...document.querySelectorAll('article img')].map(i => i.complete && i.clientWidth)"
        )
        assert all(width > 300 for width in widths), address
        seen += len(widths)

    assert seen >= 9
    assert said == []


async def test_search_finds_a_word(site: Site, wrong: tuple[Page, list[str]]) -> None:
    """Who types PSUBSCRIBE into the search is led to a page that speaks of it."""
    page, said = wrong
    await page.set_viewport_size({"width": 1200, "height": 800})
    await page.goto(site.url, wait_until="load")
    await page.click(".md-search__input")
    await page.keyboard.type("PSUBSCRIBE")
    result = page.locator(".md-search-result__link").first
    await result.wait_for(state="visible")
    await result.click()
    await page.wait_for_url(lambda url: url != site.url)

    assert "psubscribe" in (await page.locator("article").inner_text()).casefold()
    assert said == []
