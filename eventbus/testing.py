"""Testing what is built on a bus: where it runs, what arrived, whether all is done, and outages.

    async with on_memory(app.bus) as bus, record(bus) as recorder:
        await bus.publish(OrderPlaced(number=8, total=250))
        granted = await recorder.expect(DiscountGranted, channel="discount:*")

No pytest in here: `eventbus.pytest_plugin` has the fixtures. Rules: every wait has a limit, and
what is raised at its end says what did happen; what is true of `memory://` and of a server alike
has one spelling. To move a bus, to be idle and to be away there are no public names: what is needed
of its inside is reached through `_inside` and `Elsewhere`, and nowhere else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from eventbus import Buffer, BusUnavailable, EventBus, EventBusError
from eventbus.recorder import Recorder, record
from eventbus.server import Server

__all__ = ["Elsewhere", "Recorder", "away", "on_memory", "on_server", "record", "settled"]

_NOTICE = 20.0
"""Seconds for a bus to notice an outage, and to be back after it, on a busy machine too."""
_LOOK = 0.005
"""Seconds between two looks at the health of a bus, which tells nobody when it changes."""
_served: WeakKeyDictionary[EventBus, Server] = WeakKeyDictionary()
"""The servers that buses were brought to by `on_server`: `away` may end them."""


def _inside(bus: EventBus) -> Any:
    """The run of a started bus. Raises EventBusError when it is not running."""
    if bus.source is None:
        raise EventBusError("the bus is not running: use this inside `async with bus:`")
    return bus._run  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


# -- Where it runs ---------------------------------------------------------------------------------


class Elsewhere:
    """An application's bus in another place; made by `on_memory` and `on_server`.

    `async with` starts the bus there and stops it at the end; plain `with` only brings it there,
    for an application that starts its bus itself (in its lifespan). Both give the bus, and both
    bring it back. Handlers, middleware and settings are the application's own.
    """

    def __init__(self, bus: EventBus, url: str, server: Server | None) -> None:
        self._bus, self._url, self._server = bus, url, server
        self._before: tuple[Any, str] | None = None

    def __enter__(self) -> EventBus:
        bus = self._bus
        if bus.source is not None:
            raise EventBusError(f"{bus!r} is running: stop it first, then test it elsewhere")
        self._before = self._place(self._url, self._url)
        if self._server is not None:
            _served[bus] = self._server
        return bus

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _served.pop(self._bus, None)
        if self._before is not None:
            self._place(*self._before)
            self._before = None

    async def __aenter__(self) -> EventBus:
        bus = self.__enter__()
        try:
            await bus.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return bus

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._bus.stop()
        finally:
            self.__exit__(kind, error, trace)

    def _place(self, target: Any, shown: str) -> tuple[Any, str]:
        """Where the next start goes; returns where it went before."""
        bus: Any = self._bus
        before: tuple[Any, str] = (bus._target, bus._describe)  # noqa: SLF001
        bus._target, bus._describe = target, shown  # noqa: SLF001
        return before


def on_memory(bus: EventBus, name: str | None = None) -> Elsewhere:
    """The application's bus on `memory://`: under a fresh name, or one that its peers use too."""
    return Elsewhere(bus, f"memory://{name or secrets.token_hex(8)}", None)


def on_server(bus: EventBus, server: Server) -> Elsewhere:
    """The application's bus on a server of the test, which `away` may then end and start again."""
    return Elsewhere(bus, server.url, server)


# -- Whether all is done ---------------------------------------------------------------------------


async def settled(bus: EventBus, *peers: EventBus, within: float = 5.0) -> None:
    """Return when all that these buses published has its outcome, has reached them, and was
    handled, and all that their handlers published thereby, too: nothing waits, no handler runs.

    They all belong to this event loop. What other processes publish, streams (`bus.subscribe`) and
    tasks that a handler has left behind are not waited for. Raises AssertionError after `within`
    seconds, with the handlers that still have messages. A handler that calls it waits for itself.
    """
    buses = (bus, *peers)
    runs = [_inside(one) for one in buses]
    try:
        async with asyncio.timeout(within):
            while True:
                for run in runs:
                    await run.receiver.drain(frozenset[Any]())
                before = [one.stats()[:-1] for one in buses]
                for run in runs:  # no handler runs: what is on its way now is all there is
                    await run.publisher.drain(frozenset[Any]())
                for run in runs:
                    await _read_up(run)
                if before == [one.stats()[:-1] for one in buses]:
                    return
    except TimeoutError:
        waiting = [
            f"{name} ({lane.depth} waiting)"
            for one in buses
            for name, lane in one.stats().handlers.items()
            if lane.depth
        ]
        raise AssertionError(
            f"not settled within {within:g} s: {', '.join(waiting) or 'a handler does not return'}"
        ) from None


async def _read_up(run: Any) -> None:
    """Return when the bus has read all that the server had for it."""
    reached = asyncio.get_running_loop().create_future()
    run.transport.fence(lambda: None if reached.done() else reached.set_result(None))
    await reached


# -- Outages ---------------------------------------------------------------------------------------


@asynccontextmanager
async def away(bus: EventBus, server: Server | None = None) -> AsyncGenerator[None]:
    """The server is away for this bus inside the block, and it is live again after it.

    On `memory://` the bus alone is cut off: it hears nothing, and its publishes meet its outage
    policy. Elsewhere the server itself is killed and started again, for whoever is on it: the one
    that the bus was brought to by `on_server` (the fixtures do that), or `server`. Raises
    TimeoutError when the bus does not notice, or is not back, in 20 s.
    """
    run = _inside(bus)
    if run.transport.describe().startswith("memory://"):
        async with _Cut(bus, run):
            yield
        return
    server = server or _served.get(bus)
    if server is None:
        raise EventBusError(
            "`away` ends a server of the test, and does not know one for this bus: bring the bus to"
            " it with `on_server(bus, server)`, or name it: `away(bus, server)`"
        )
    await asyncio.to_thread(server.kill)
    try:
        await _until(
            lambda: not (run.transport.status().receiving or run.transport.status().publishing)
        )
        yield
    finally:
        await asyncio.to_thread(server.start)
    await _until(lambda: bus.health().state in ("live", "closed"))


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(_NOTICE):
        while not is_so():  # noqa: ASYNC110  # health has no event to wait for
            await asyncio.sleep(_LOOK)


class _Cut:
    """An outage of one bus in memory, under the outage policy of that bus.

    The transport is stopped and started anew, as at a loss of its connection; meanwhile what is
    published comes here, and waits for its deadline or for the end.
    """

    def __init__(self, bus: EventBus, run: Any) -> None:
        self._bus, self._run = bus, run
        self._number: Any = None
        self._settings = run._settings  # noqa: SLF001
        self._policy: Any = self._settings.outage
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._waiting: dict[object, Any] = {}

    async def __aenter__(self) -> None:
        transport, receiver = self._run.transport, self._run.receiver
        await _read_up(self._run)
        receiver.lost("away")
        self._number = transport._number  # noqa: SLF001
        await transport.stop()
        transport.publish = self._publish

    async def __aexit__(self, *_: object) -> None:
        transport = self._run.transport
        del transport.publish
        lives = self._run.stopping is None and not self._run.ended.is_set()
        if lives:
            await transport.start(self._run.receiver, self._settings, "", self._number)
        for outgoing in self._waiting.values():
            if lives and not outgoing.ended:
                transport.publish(outgoing)
            else:
                outgoing.finish(self._refusal(outgoing))

    def _publish(self, outgoing: Any) -> None:
        now = outgoing.born = self._loop.time()
        policy = self._policy
        if policy == "drop":
            outgoing.finish("dropped")
            return
        if not isinstance(policy, Buffer):
            left = self._settings.publish_timeout - (now - self._since)
            if left <= 0:
                raise self._refusal(outgoing)
            self._waiting[outgoing] = outgoing
            self._loop.call_later(left, self._expire, outgoing)
            return
        outgoing.buffered()
        key = outgoing.channel if policy.latest else outgoing
        replaced = self._waiting.pop(key, None)
        if replaced is not None:
            replaced.finish("conflated")
        self._waiting[key] = outgoing
        while len(self._waiting) > policy.max_events:
            self._waiting.pop(next(iter(self._waiting))).finish("dropped")
        self._loop.call_later(policy.max_age, self._expire, outgoing)

    def _expire(self, outgoing: Any) -> None:
        buffered = isinstance(self._policy, Buffer)
        outgoing.finish("dropped" if buffered else self._refusal(outgoing))

    def _refusal(self, outgoing: Any) -> BusUnavailable:
        prefix = f"{self._bus.namespace}:" if self._bus.namespace else ""
        waited = self._loop.time() - outgoing.born
        return BusUnavailable(
            f"{self._run.transport.describe()} is away (eventbus.testing); certainly not sent",
            channel=outgoing.channel.decode("utf-8", "replace").removeprefix(prefix),
            id=outgoing.id,
            waited=waited,
        )
