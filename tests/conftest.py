"""What all tests share: the backend, the servers, hypothesis' profile, and the lines at the end.

The servers live for the whole session and are for traffic only: a test that kills, freezes or
configures one starts its own `Server`.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from eventbus.server import Server
from tests.helpers import Lines

DEBIAN = "/usr/bin/redis-server"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

# No test judges time; in CI the same examples are tried on every run.
hypothesis.settings.register_profile("eventbus", deadline=None, derandomize=IN_CI, print_blob=True)
hypothesis.settings.load_profile("eventbus")

_lines = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The loop under every async test."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """The embedded Valkey, on a private unix socket."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def debian_redis() -> Iterator[Server]:
    """Debian's Redis, on a private unix socket; skips at home when it is not installed."""
    if not os.access(DEBIAN, os.X_OK):
        missing = f"{DEBIAN} is missing: apt install redis-server"
        pytest.fail(missing) if IN_CI else pytest.skip(missing)
    with Server(binary=DEBIAN) as server:
        yield server


@pytest.fixture(scope="session", params=["valkey", "redis"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each real server in turn, running."""
    name = {"valkey": "valkey", "redis": "debian_redis"}[request.param]
    found: Server = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def server_url(server: Server) -> str:
    """The URL of each real server in turn."""
    return server.url


@pytest.fixture(params=["memory", "valkey", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """Each transport in turn: a memory bus of its own name, and both real servers."""
    if request.param == "memory":
        return f"memory://{secrets.token_hex(6)}"
    found: Server = request.getfixturevalue({"redis": "debian_redis"}.get(request.param, "valkey"))
    return found.url


@pytest.fixture
def log() -> Iterator[Lines]:
    """What the bus logs during the test."""
    lines = Lines()
    logger = logging.getLogger("eventbus")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line after the results of the run, where captured output does not hide it."""
    return pytestconfig.stash.setdefault(_lines, []).append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its lines over."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["lines"] = session.config.stash.get(_lines, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the lines of a worker that has ended."""
    lines = node.config.stash.setdefault(_lines, [])
    lines += getattr(node, "workeroutput", {}).get("lines", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The lines of `say`."""
    if lines := terminalreporter.config.stash.get(_lines, []):
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
