"""Every program that users read is run: the examples, and the Python on every page."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from subprocess import PIPE

import pytest

from eventbus.server import Server, main

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```python.*?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

PRINTED: dict[str, list[str]] = json.loads((ROOT / "tests" / "pages.json").read_text("utf-8"))
"""What the program of a page prints; what is new each time is `…`."""
VARYING = re.compile(r"[0-9a-f]{16}|\d{4}-\d\d-\d\d[ T][\d:.]+(Z|\+00:00)?")

# The blocks of a page are one program, in one namespace and one loop; `await` may stand alone.
RUNNER = """
import ast, asyncio, inspect, json, sys, types
page = sys.modules["page"] = types.ModuleType("page")  # frameworks look a handler's module up
names = vars(page)
with asyncio.Runner() as runner:
    for where, source in json.load(sys.stdin):
        code = compile(source, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(code, names))
        else:
            exec(code, names)
"""


def run(*words: str, given: str = "", **environment: str) -> str:
    """What a Python program prints, when it ends well and says nothing on stderr."""
    known = {key: value for key, value in os.environ.items() if key != "EVENTBUS_URL"}
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        input=given,
        env=known | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def promised(example: Path) -> str:
    """What an example says that it prints, at the end of its docstring."""
    text = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    return textwrap.dedent(text.partition("It prints:\n\n")[2])


def blocks(page: Path) -> list[tuple[str, str]]:
    """The Python on a page, with where it stands. Snippets are examples, which are run as such."""
    text = page.read_text(encoding="utf-8")
    return [
        (f"{page.name}:{text.count(chr(10), 0, match.start()) + 2}", textwrap.dedent(match[2]))
        for match in BLOCK.finditer(text)
        if "--8<--" not in match[2]
    ]


@pytest.mark.timeout(40)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_in_memory(example: Path) -> None:
    """An example prints what it says, with nothing configured (two handlers may swap lines)."""
    assert sorted(run(str(example)).splitlines()) == sorted(promised(example).splitlines())


@pytest.mark.timeout(40)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_a_server(example: Path, valkey: Server) -> None:
    """An example prints the same on a real server, which EVENTBUS_URL names."""
    shown = run(str(example), EVENTBUS_URL=valkey.url)
    assert sorted(shown.splitlines()) == sorted(promised(example).splitlines())


@pytest.mark.timeout(40)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page(page: Path, valkey: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python on a page runs from its first block to its last, on a real server."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # for pages that use embedded://
    found = blocks(page)
    try:
        shown = run("-c", RUNNER, given=json.dumps(found), EVENTBUS_URL=valkey.url)
    finally:
        main(["stop"])
    name = page.relative_to(ROOT).as_posix()
    proves = any("assert " in source for _, source in found)
    assert not found or proves or PRINTED.get(name), f"{name} proves nothing"
    if name in PRINTED:  # in any order: two handlers may swap lines
        assert sorted(VARYING.sub("…", shown).splitlines()) == sorted(PRINTED[name])


@pytest.mark.timeout(40)
def test_two_processes(tmp_path: Path) -> None:
    """The program that the quick start runs twice shows in each what both say (here for longer, so
    that they meet on a busy machine too)."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    program = page.partition('title="chat.py"\n')[2].partition("```")[0]
    assert "range(5)" in program
    (tmp_path / "chat.py").write_text(program.replace("range(5)", "range(500)"), encoding="utf-8")
    known = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    alice, bob = (
        subprocess.Popen(
            [sys.executable, "chat.py", user], cwd=tmp_path, env=known, stdout=PIPE, text=True
        )
        for user in ("alice", "bob")
    )
    try:
        for process in (alice, bob):
            assert process.stdout is not None
            said: set[str] = set()
            for line in process.stdout:
                said.add(re.sub(r" hi \d+\n", "", line))
                if said == {"[lobby] alice:", "[lobby] bob:"}:
                    break
            assert said == {"[lobby] alice:", "[lobby] bob:"}
    finally:
        for process in (alice, bob):
            with process:
                process.kill()
        run("-m", "eventbus.server", "stop", XDG_RUNTIME_DIR=str(tmp_path))


def test_no_block_is_overlooked() -> None:
    """Every fence that opens a Python block is found, also inside lists and admonitions; what is a
    file instead has its name, and is run by a test of its own."""
    files: list[tuple[str, str]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```python") == len(list(BLOCK.finditer(text))), page.name
        files += [(page.name, rest) for rest in re.findall(r"```py\b(.*)", text)]
    assert files == [
        ("quickstart.md", ' title="chat.py"'),
        ("testing.md", ' title="shop.py"'),
        ("testing.md", ' title="conftest.py"'),
        ("testing.md", ' title="test_shop.py"'),
    ]


def test_readme_begins_with_the_two_commands() -> None:
    """The README opens with `make demo` and `make test`, and the uv forms beside them."""
    opening = (ROOT / "README.md").read_text(encoding="utf-8")[:700]
    for command in ("make demo", "make test", "uv run python -m eventbus.demo", "uv run pytest"):
        assert command in opening
