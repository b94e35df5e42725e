"""Fixtures for pytest: a bus in memory for each test, its recorder, and a real server.

pytest finds them by the entry point. No fixture is used by itself, and one of the same name in your
own files wins. docs/testing.md says which async plugins can run them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from eventbus import EventBus, Router
    from eventbus.server import Server
    from eventbus.testing import Recorder

_PLACES = ("memory", "server")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--eventbus=server`, and `eventbus = "server"` in the configuration."""
    help = "where the fixture `bus` runs: memory (default), or server (the embedded one)"
    parser.getgroup("eventbus").addoption(
        "--eventbus", choices=_PLACES, default=None, dest="eventbus_place", help=help
    )
    parser.addini("eventbus", help, default="memory")


@pytest.fixture(scope="session")
def eventbus_server() -> Generator[Server]:
    """The embedded server of this session (of each worker, with pytest-xdist), on a private
    socket."""
    from eventbus.server import Server, ServerNotFound

    try:
        server = Server()
    except ServerNotFound as error:
        pytest.fail(f"no server for the fixture `eventbus_server`: {error}", pytrace=False)
    with server:
        yield server


@pytest.fixture
def eventbus_app() -> EventBus | Router | None:
    """What the fixture `bus` runs: return your application's bus, or a router of it. None: a bus
    without handlers."""
    return None


@pytest.fixture
def _eventbus_place(request: pytest.FixtureRequest) -> Server | None:
    place = request.config.getoption("eventbus_place") or request.config.getini("eventbus")
    if place not in _PLACES:
        raise pytest.UsageError(f"eventbus = {place!r}: it is one of {', '.join(_PLACES)}")
    server: Server | None = None
    if place == "server":
        server = request.getfixturevalue("eventbus_server")
    return server


@pytest.fixture
async def bus(
    eventbus_app: EventBus | Router | None, _eventbus_place: Server | None
) -> AsyncGenerator[EventBus]:
    """A running bus for one test, with the handlers of `eventbus_app`: on `memory://` under a fresh
    name, or on the embedded server."""
    from eventbus.testing import on_memory, on_server

    server, found = _eventbus_place, _bus_of(eventbus_app)
    async with on_memory(found) if server is None else on_server(found, server) as running:
        yield running


@pytest.fixture
async def redis_bus(
    eventbus_app: EventBus | Router | None, eventbus_server: Server
) -> AsyncGenerator[EventBus]:
    """As `bus`, always on the embedded server. Without an `EventBus` in `eventbus_app` it has a
    namespace of its own."""
    from eventbus.testing import on_server

    async with on_server(_bus_of(eventbus_app), eventbus_server) as running:
        yield running


@pytest.fixture
async def recorder(bus: EventBus) -> AsyncGenerator[Recorder]:
    """What arrives on `bus` during the test."""
    from eventbus.testing import record

    async with record(bus) as recorder:
        yield recorder


def _bus_of(app: EventBus | Router | None) -> EventBus:
    """The bus to run: the application's own, or a new one that takes its router."""
    import asyncio
    from secrets import token_hex

    from eventbus import EventBus

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        reason = "the bus runs on asyncio: let your fixture `anyio_backend` return 'asyncio'"
        pytest.fail(reason, pytrace=False)
    if isinstance(app, EventBus):
        return app
    bus = EventBus("memory://", namespace=f"test-{token_hex(6)}")
    if app is not None:
        bus.include_router(app)
    return bus
