"""The shape of the package and of its tests: what imports what, and what stands where."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import eventbus
from tests.faults.campaign.page import scenarios

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eventbus"

LEVELS = """
_errors server
_patterns _messages _sequences
_events _index _settings _beats _acl
_codec _router
_envelope
_handlers transports.base
_lanes _reports transports.memory
_dispatch _gaps _publisher _targets transports._endpoint transports._link
_receiver transports._outbox _pulse
_routes transports._inbox
_run transports._liveness
transports.redis
transports
_bus
__init__
"""
"""A module imports only from lines above its own. Leafs (doors without an underscore that are not
named here) import public names only. A new module of the engine must be entered."""

LEVEL = {name: level for level, line in enumerate(LEVELS.split("\n")) for name in line.split()}
PURE = """
_errors _patterns _events _messages _codec _envelope _handlers _index _router _sequences _beats _acl
""".split()
MAY_PRINT = {"cli", "demo", "server"}
MAX_LINES, MAX_LEAF_LINES = 450, 350


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """`transports.base` for transports/base.py, `transports` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
LEAFS = [
    name
    for name in MODULES
    if name not in LEVEL and (name == "__main__" or not name.startswith("_"))
]
NO_TESTS = {"typing", "campaign"}  # programs to read, and a measurement by the clock
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.parent.name not in NO_TESTS)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every import, at whatever depth and for whom: the line, and the full name of the module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("eventbus.") in MODULES
                yield node.lineno, full if is_module else str(node.module)


def own_imports(name: str) -> Iterator[tuple[int, str]]:
    """The imports of this package's modules, without the package's name."""
    for line, full in imports(MODULES[name]):
        if full == "eventbus":
            yield line, "__init__"
        elif full.startswith("eventbus."):
            yield line, full.removeprefix("eventbus.")


def test_every_module_has_its_level() -> None:
    """The table names the modules of the engine, each once, and nothing that is gone."""
    assert len(LEVELS.split()) == len(LEVEL)
    assert set(LEVEL) <= set(MODULES)
    assert [name for name in MODULES if name not in LEVEL and name not in LEAFS] == []


@pytest.mark.parametrize("name", LEVEL)
def test_imports_point_down(name: str) -> None:
    """A module of the engine imports only modules of a lower level, never one beside it."""
    wrong = [
        f"line {line}: {other}"
        for line, other in own_imports(name)
        if LEVEL.get(other, len(LEVEL)) >= LEVEL[name]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", LEAFS)
def test_leafs_use_public_names(name: str) -> None:
    """A leaf imports `eventbus` and open doors, nothing private."""
    wrong = [
        f"line {line}: {other}"
        for line, other in own_imports(name)
        if other != "__init__" and any(part.startswith("_") for part in other.split("."))
    ]
    assert wrong == []


@pytest.mark.parametrize("name", PURE)
def test_the_core_is_pure(name: str) -> None:
    """What decides neither waits nor imports anything that does."""
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert [
        node.lineno for node in ast.walk(tree(MODULES[name])) if isinstance(node, waiting)
    ] == []
    banned = {"asyncio", "anyio", "redis", "hiredis", "socket", "threading", "time"}
    assert [full for _, full in imports(MODULES[name]) if full.split(".")[0] in banned] == []


@pytest.mark.parametrize("name", ["_errors", "server"])
def test_the_bottom_is_the_standard_library(name: str) -> None:
    """The lowest modules import the standard library alone, but for packages looked for inside."""
    outside = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree(MODULES[name]).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {str(full).split(".")[0] for full in outside} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_readable(name: str) -> None:
    """A module says what it is, and neither asserts, prints nor hides."""
    path = MODULES[name]
    text = path.read_text()
    assert ast.get_docstring(tree(path))
    assert "pragma: no" not in text
    nodes = list(ast.walk(tree(path)))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []
    prints = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert name in MAY_PRINT or prints == []


def test_every_module_fits_in_the_head() -> None:
    """No module is longer than the limit."""
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    most = {name: MAX_LEAF_LINES if name in LEAFS else MAX_LINES for name in sizes}
    assert {name: size for name, size in sizes.items() if size > most[name]} == {}


def test_all_is_what_is_public() -> None:
    """`__all__` is sorted, and lists what a type checker is told of, no more and no less; each name
    is found there when it is asked for, and `dir` shows it before."""
    listed = eventbus.__all__
    assert listed == sorted(listed)
    told = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree(PACKAGE / "__init__.py"))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("eventbus.")
        for alias in node.names
    }
    assert sorted(told) == listed
    for name, module in told.items():
        assert getattr(eventbus, name) is getattr(sys.modules[str(module)], name)
    assert set(dir(eventbus)) >= {*listed, "__version__"}
    with pytest.raises(AttributeError, match="module 'eventbus' has no attribute 'Evnt'"):
        eventbus.Evnt  # type: ignore[attr-defined]  # noqa: B018


def printed(code: str) -> list[str]:
    """The lines that a fresh Python prints for this code."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.splitlines()


def test_redis_is_imported_when_it_is_needed() -> None:
    """Making a memory bus imports neither redis nor hiredis."""
    code = (
        "import sys, eventbus; eventbus.EventBus('memory://x');"
        "print([name for name in sys.modules if name.split('.')[0] in ('redis', 'hiredis')])"
    )
    assert printed(code) == ["[]"]


def test_help_imports_what_it_needs() -> None:
    """`eventbus --help` imports typer, and no more: no pydantic, no asyncio, nothing of the bus."""
    code = (
        "import sys; sys.argv[1:] = ['--help']; from eventbus.cli import main; main();"
        "heavy = 'asyncio', 'pydantic', 'orjson', 'redis', 'rich', 'eventbus._bus';"
        "print([name for name in heavy if name in sys.modules])"
    )
    *shown, loaded = printed(code)
    assert any("doctor" in line for line in shown)
    assert loaded == "[]"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_says_what_must_be_true(path: Path) -> None:
    """Each test has a sentence, and none waits by the clock."""
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert not node.name.startswith("test_") or ast.get_docstring(node), where
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func).split(".")[-1] != "sleep", where


def test_every_test_has_a_limit() -> None:
    """A test that hangs is ended, and no line is spared the coverage report by a comment."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert float(config["pytest"]["timeout"]) <= 60
    assert not any("pragma" in line for line in config["coverage"]["report"]["exclude_lines"])


# -- The catalogue of faults -----------------------------------------------------------------------


def test_every_scenario_of_the_catalogue_has_a_test() -> None:
    """Each of the forty fault scenarios but 20 (Redis Cluster) is carried by a test."""
    carried = scenarios(ROOT / "tests")
    assert sorted(set(range(1, 41)) - {20} - set(carried)) == []
    assert set(carried) <= set(range(1, 41))
