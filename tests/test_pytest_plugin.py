"""The pytest plugin, as pytest users meet it: files in a folder of their own, run by pytest.

Plugins are named and not loaded by their entry points, so that a run is the same wherever it is.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
PLUGINS = ["-p", "anyio.pytest_plugin", "-p", "eventbus.pytest_plugin", "-p", "no:cacheprovider"]

APP = """
from eventbus import Event, EventBus, Router

class OrderPlaced(Event, channel="order:{number}"):
    number: int

class DiscountGranted(Event, channel="discount:{number}"):
    number: int

bus = EventBus("redis://127.0.0.1:1")
router = Router()

@bus.on(OrderPlaced)
@router.on(OrderPlaced)
async def grant(event: OrderPlaced, bus: EventBus) -> None:
    await bus.publish(DiscountGranted(number=event.number))
"""

CONFTEST = """
import pytest
import shop

@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

@pytest.fixture
def eventbus_app():
    return shop.{app}
"""

TEST = """
from shop import DiscountGranted, OrderPlaced

async def test_discount(bus, recorder):
    await bus.publish(OrderPlaced(number=8))
    granted = await recorder.expect(DiscountGranted, channel="discount:8")
    assert granted.event.number == 8
    assert {place!r} in repr(bus)
"""


def test_pytest_finds_the_plugin() -> None:
    """Where the package is installed its plugin has an entry point, under the module's own name, so
    that a conftest.py may name it too."""
    (found,) = entry_points(group="pytest11", name="eventbus.pytest_plugin")
    assert found.value == "eventbus.pytest_plugin"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with an application, and its tests not written yet."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(shop=APP)
    pytester.makeconftest(CONFTEST.format(app="bus"))
    pytester.makeini("[pytest]\nanyio_mode = auto\nfilterwarnings = error\n")
    monkeypatch.syspath_prepend(pytester.path)
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    """The run of the project's tests."""
    return project.runpytest_inprocess(*PLUGINS, *words)


@pytest.mark.parametrize("app", ["bus", "router"])
def test_five_lines(project: pytest.Pytester, app: str) -> None:
    """A test of a handler is five lines, with the application's bus or its router, without a server
    and without a sleep."""
    project.makeconftest(CONFTEST.format(app=app))
    project.makepyfile(TEST.format(place="memory://"))
    run(project).assert_outcomes(passed=1)


def test_the_page(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that docs/testing.md shows pass as they stand there."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.syspath_prepend(pytester.path)
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    names = ("shop.py", "conftest.py", "test_shop.py", "pytest.toml")
    for name in names:
        _, found, rest = page.partition(f'title="{name}"\n')
        assert found, name
        (pytester.path / name).write_text(rest.partition("```")[0], encoding="utf-8")
    pytester.runpytest_inprocess(*PLUGINS).assert_outcomes(passed=3)


@pytest.mark.parametrize("how", ["option", "ini"])
def test_on_a_server(project: pytest.Pytester, how: str) -> None:
    """With one option, or one line of the configuration, the same test runs on the embedded server,
    where `away` works without another word."""
    project.makepyfile(
        TEST.format(place="unix://")
        + "    from eventbus.testing import away\n"
        + "    async with away(bus):\n"
        + "        assert not bus.health()\n"
        + "    assert bus.health()\n"
    )
    ini = "[pytest]\nanyio_mode = auto\nfilterwarnings = error\n"
    project.makeini(ini + "eventbus = server\n" if how == "ini" else ini)
    run(project, *(["--eventbus=server"] if how == "option" else [])).assert_outcomes(passed=1)


def test_redis_bus(project: pytest.Pytester) -> None:
    """`redis_bus` is on the embedded server, which lives for the session; without an application
    each test has a namespace of its own."""
    project.makeconftest(CONFTEST.partition("@pytest.fixture\ndef eventbus_app")[0])
    project.makepyfile("""
        seen = []

        async def test_one(redis_bus, eventbus_server):
            assert await redis_bus.redis().ping()
            seen.append((redis_bus.namespace, eventbus_server.pid))

        async def test_two(redis_bus, bus, eventbus_server):
            seen.append((redis_bus.namespace, eventbus_server.pid))
            assert seen[0][0] != seen[1][0]
            assert seen[0][1] == seen[1][1]
            assert (await bus.publish_raw("a", b"")).receivers == 0
    """)
    run(project).assert_outcomes(passed=2)


def test_without_a_server(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where there is no server the error says what to install, and tests in memory still run."""
    monkeypatch.setenv("EVENTBUS_SERVER", str(tmp_path / "missing"))
    project.makepyfile("""
        async def test_one(redis_bus):
            pass

        async def test_two(bus):
            pass
    """)
    result = run(project)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*no server for the fixture `eventbus_server`*EVENTBUS_SERVER*"])


def test_a_wrong_place(project: pytest.Pytester) -> None:
    """A place that does not exist is refused, with those that do."""
    project.makepyfile(TEST.format(place=""))
    project.makeini("[pytest]\nanyio_mode = auto\neventbus = moon\n")
    result = run(project)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*eventbus = 'moon'*memory, server*"])


def test_on_trio(project: pytest.Pytester) -> None:
    """Under another loop than asyncio the fixture says what to do."""
    pytest.importorskip("trio")
    project.makepyfile(TEST.format(place=""))
    project.makeconftest(CONFTEST.format(app="bus").replace('"asyncio"', '"trio"'))
    result = run(project, "-W", "ignore")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the bus runs on asyncio*anyio_backend*"])


def test_a_fixture_of_ones_own_wins(project: pytest.Pytester) -> None:
    """A project that has a fixture `bus` keeps it."""
    project.makepyfile("""
        import pytest

        @pytest.fixture
        def bus():
            return "red"

        def test_colour(bus):
            assert bus == "red"
    """)
    run(project).assert_outcomes(passed=1)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """The plugin itself imports nothing but pytest and the standard library before a fixture is
    asked for."""
    code = (
        "import sys, types, importlib.util as util;"
        "import pytest; before = set(sys.modules);"
        "spec = util.spec_from_file_location('plugin', 'eventbus/pytest_plugin.py');"
        "spec.loader.exec_module(util.module_from_spec(spec));"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "[]"
