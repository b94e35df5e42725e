"""Cancellation at every wait of every operation: nothing is left behind, and the next use works."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis
from anyio.lowlevel import checkpoint

from eventbus import (
    Buffer,
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    Message,
)
from eventbus.server import Server
from tests.faults.proxy import Proxy
from tests.faults.suspensions import LIMIT, Census, How, Outcome, cancel_at, counting
from tests.helpers import Seen, foreign, soon

HOWS: list[How] = ["task", "late", "scope"]
MANY = 400
"""Waits until an operation that was not cancelled must have ended."""
Say = Callable[[str], None]
Operation = Callable[["World"], AsyncGenerator[Coroutine[Any, Any, Any], Outcome]]


class Count(Event):
    n: int = 0
    text: str = ""


async def until(condition: Callable[[], object]) -> None:
    """Return when it is true: for what has no event of its own, such as `health()`."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await checkpoint()


async def works(bus: EventBus) -> None:
    """One event goes out and comes back."""
    async with bus.subscribe("works", Count) as messages:
        assert (await soon(bus.publish("works", Count(n=7)), LIMIT)).receivers
        assert (await soon(anext(messages), LIMIT)).event.n == 7


class World:
    """Where operations are tried: a URL, its server, and how to count what the server holds."""

    def __init__(self, url: str, server: Server | None) -> None:
        self.url = url
        self.server = server
        self._admin: redis.Redis | None = None
        if server is not None:
            self._admin = redis.Redis(unix_socket_path=server.socket_path)
            self._admin.ping()
        self.gate = asyncio.Event()

    def close(self) -> None:
        if self._admin is not None:
            self._admin.close()

    def clients(self) -> int:
        return 0 if self._admin is None else len(self._admin.client_list())

    def freeze(self) -> None:
        if self.server is not None:
            self.server.freeze()

    def thaw(self) -> None:
        if self.server is not None:
            self.server.thaw()

    def census(self) -> Census:
        return Census.take(self.clients)

    async def same(self, before: Census, what: str) -> None:
        await before.again(self.clients, what)

    def bus(self, **settings: Any) -> EventBus:
        """A bus with handlers of several kinds; those of "slow" wait for the gate."""
        bus = EventBus(self.url, **settings)

        @bus.on("a:*", concurrency=2)
        async def quick(event: Count) -> None: ...

        @bus.on("a:{n}", "b")
        async def other(event: Count) -> None: ...

        @bus.on("slow")
        async def slow(event: Count) -> None:
            await self.gate.wait()

        @bus.on_gap()
        async def gap() -> None: ...

        return bus


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with a port, which the tests of this file may freeze."""
    with Server(port=0) as server:
        yield server


@pytest.fixture(params=["memory", "valkey", "slow"])
async def world(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[World]:
    """Each place in turn; in the slow one every answer arrives byte by byte."""
    if request.param == "memory":
        found = World(f"memory://{secrets.token_hex(6)}", None)
        yield found
    elif request.param == "valkey":
        found = World(f"unix://{server.socket_path}", server)
        yield found
        found.close()
    else:
        async with Proxy(server.port, "drip") as proxy:
            found = World(proxy.url, server)
            yield found
            found.close()


@pytest.fixture
async def real(server: Server) -> AsyncIterator[World]:
    """The embedded Valkey alone."""
    found = World(f"unix://{server.socket_path}", server)
    yield found
    server.thaw()  # a test that failed may have left it frozen
    found.close()


async def sweep(world: World, operation: Operation, how: How, *, deep: bool = False) -> int:
    """Try an operation, cancelled at each of its waits. Returns at which it was over."""
    for k in range(MANY):
        what = f"{operation.__name__} ({how}) cancelled at wait {k}"
        attempt = operation(world)
        outcome = await cancel_at(k, await anext(attempt), how, deep=deep)
        if outcome.hit and how != "scope":
            assert outcome.cancelled, f"{what} ended with {outcome.value!r}, {outcome.error!r}"
        elif outcome.error is not None and not outcome.cancelled:
            assert isinstance(outcome.error, EventBusError | TimeoutError), what
        try:
            await attempt.asend(outcome)
        except StopAsyncIteration:
            pass
        except Exception as error:
            raise AssertionError(f"after {what}: {error!r}") from error
        if not outcome.hit:
            return k
    raise AssertionError(f"{operation.__name__} waits more than {MANY} times")


# Life


async def start(world: World) -> AsyncGenerator[Coroutine[Any, Any, Any], Outcome]:
    """A start. When it is cancelled, nothing is open before anybody stops the bus."""
    bus, before = world.bus(), world.census()
    outcome = yield bus.start()
    if outcome.error is not None:
        await world.same(before, "a cancelled start")
        assert bus.health().state == "closed"
        await bus.start()
    await works(bus)
    await bus.stop()
    await world.same(before, "a stop")


async def stop(world: World) -> AsyncGenerator[Coroutine[Any, Any, Any], Outcome]:
    """A stop, with a handler that runs, messages that wait, and a stream that is open."""
    bus, before = world.bus(drain_timeout=0.03), world.census()
    await bus.start()
    for _ in range(3):
        bus.publish_nowait("slow", Count())
    async with bus.subscribe("later"):
        outcome = yield bus.stop()
        if not outcome.begun:
            await bus.stop()
    assert bus.health().state == "closed"
    await world.same(before, "a cancelled stop")
    async with bus:
        await works(bus)
    await world.same(before, "the stop after a cancelled stop")


async def block(world: World) -> AsyncGenerator[Coroutine[Any, Any, Any], Outcome]:
    """A whole block: start, publish, stop."""
    bus, before = world.bus(), world.census()

    async def enter_and_leave() -> None:
        async with bus:
            await bus.publish("a:1", Count())
            bus.publish_nowait("b", Count())

    yield enter_and_leave()
    assert bus.health().state == "closed"
    await world.same(before, "a cancelled block")
    async with bus:
        await works(bus)
    await world.same(before, "the block after a cancelled block")


@pytest.mark.scenario(32)
@pytest.mark.parametrize("how", [*HOWS, "deep"])
@pytest.mark.parametrize("operation", [start, stop, block])
async def test_life(world: World, operation: Operation, how: Any, say: Say) -> None:
    """A start, a stop or a block that is cancelled at any of its waits, or at any of those of the
    tasks that it began, ends cancelled, leaves no task and no socket, and the bus starts again."""
    deep = how == "deep"
    with counting():
        k = await sweep(world, operation, "task" if deep else how, deep=deep)
    say(f"cancellation: {operation.__name__} {how} on {world.url.partition(':')[0]}: {k} waits")


# On a running bus


async def publish(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """One publish."""
    yield bus.publish("a:1", Count())


async def publish_slowly(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """Three ways to publish, one after another."""

    async def three() -> None:
        bus.publish_nowait("a:1", Count())
        await bus.publish("a:2", Count())
        await bus.publish_raw("b", b"{}")

    yield three()


async def attach(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """An attach with several patterns: confirmed, or as if it had not been."""

    async def handler(event: Count) -> None: ...

    handlers = dict(bus.stats().handlers)
    outcome = yield bus.attach(handler, "x:*", "y", "a:1")
    if outcome.error is None:
        await outcome.value.detach()
    assert bus.stats().handlers.keys() == handlers.keys()


async def add(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A route gets patterns: all of them, or none."""
    seen: Seen[int] = Seen()

    async def handler(event: Count) -> None:
        seen.append(event.n)

    route = await bus.attach(handler, "x")
    outcome = yield route.add("y:*", "z")
    if outcome.error is not None:
        await until(lambda: route.patterns == ("x",))
        await route.add("z")
    for n, channel in enumerate(("x", "z")):
        await bus.publish(channel, Count(n=n))
    await seen.reach(2)
    await route.detach()


async def discard(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A route loses a pattern: at once, or a little later."""
    seen: Seen[int] = Seen()

    async def handler(event: Count) -> None:
        seen.append(event.n)

    route = await bus.attach(handler, "x", "y:*")
    outcome = yield route.discard("y:*")
    if not outcome.begun:
        await route.discard("y:*")
    await until(lambda: route.patterns == ("x",))
    await bus.publish("x", Count(n=1))
    await seen.reach(1)
    await route.detach()


async def detach(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A route is detached while its handler runs."""
    entered = asyncio.Event()

    async def handler(event: Count) -> None:
        entered.set()
        await asyncio.Event().wait()

    route = await bus.attach(handler, "x", "y:*")
    await bus.publish("x", Count())
    await soon(entered.wait(), LIMIT)
    outcome = yield route.detach()
    if not outcome.begun:
        await route.detach()
    assert route.name not in bus.stats().handlers


async def enter(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A stream is entered."""
    messages = bus.subscribe("x:*", "y", Count)
    outcome = yield messages.__aenter__()
    if outcome.error is None:
        await messages.__aexit__(None, None, None)


async def iterate(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A stream is read: a message that nobody took is there for the next reader."""
    async with bus.subscribe("x", Count) as messages:

        async def receive() -> int:
            bus.publish_nowait("x", Count(n=5))
            return (await anext(messages)).event.n

        outcome = yield receive()
        if not outcome.begun:
            bus.publish_nowait("x", Count(n=5))
        if outcome.error is not None:  # a message that nobody took is still there
            assert (await soon(anext(messages), LIMIT)).event.n == 5


async def leave(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A stream is entered, read and left."""
    messages = bus.subscribe("x:*", Count)

    async def whole() -> None:
        async with messages:
            await bus.publish("x:1", Count())
            async for _ in messages:
                break

    yield whole()


async def expect(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A message is expected, and comes."""

    async def both() -> None:
        waiting = asyncio.create_task(bus.expect("x", Count, timeout=LIMIT))
        try:
            while not waiting.done():
                await bus.publish("x", Count())
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})

    yield both()


async def expect_in_vain(world: World, bus: EventBus) -> AsyncGenerator[Any, Outcome]:
    """A message is expected, and does not come."""
    yield bus.expect("x", Count, timeout=0.02)


RUNNING = [
    publish, publish_slowly, attach, add, discard, detach, enter, iterate, leave, expect,
    expect_in_vain,
]  # fmt: skip


def running(operation: Any, bus: EventBus, *, frozen: bool = False) -> Operation:
    """An operation on a running bus, and what must be true of the bus after it."""

    async def attempt(world: World) -> AsyncGenerator[Coroutine[Any, Any, Any], Outcome]:
        before, live = world.census(), bus.health().subscriptions
        inner = operation(world, bus)
        coroutine = await anext(inner)
        if frozen:
            world.freeze()
        outcome = yield coroutine
        if frozen:
            world.thaw()
        with pytest.raises(StopAsyncIteration):
            await inner.asend(outcome)
        await works(bus)
        await until(lambda: bus.health().subscriptions == live)
        await until(lambda: len(asyncio.all_tasks()) <= len(before.tasks) + 2)  # idle workers
        assert world.clients() == before.clients

    attempt.__name__ = operation.__name__
    return attempt


@pytest.mark.scenario(32)
@pytest.mark.parametrize("how", [*HOWS, "twice", "deep"])
async def test_running(world: World, how: Any, say: Say) -> None:
    """Whatever is cancelled on a running bus, at any wait: it is undone (or done), the bus works,
    and has the same subscriptions, connections and tasks as before."""
    before = world.census()
    bus = world.bus(heartbeat=None)
    deep = how == "deep"
    counts = []
    async with bus:
        await works(bus)
        with counting():
            for operation in RUNNING:
                k = await sweep(world, running(operation, bus), "task" if deep else how, deep=deep)
                counts.append(f"{operation.__name__} {k}")
    await world.same(before, "the stop")
    say(f"cancellation: {how} on {world.url.partition(':')[0]}: {', '.join(counts)}")


@pytest.mark.scenario(32)
@pytest.mark.parametrize("how", [*HOWS, "twice"])
async def test_frozen(real: World, how: How, say: Say) -> None:
    """What is cancelled while Redis is frozen ends at once, and does no harm when Redis goes on."""
    before = real.census()
    bus = real.bus(heartbeat=None, publish_timeout=0.1, connect_timeout=0.1)
    counts = []
    async with bus:
        await works(bus)
        for operation in (publish, publish_slowly, attach, enter, leave, expect_in_vain):
            k = await sweep(real, running(operation, bus, frozen=True), how)
            counts.append(f"{operation.__name__} {k}")
    await real.same(before, "the stop")
    say(f"cancellation: {how} while frozen: {', '.join(counts)}")


@pytest.mark.scenario(32)
@pytest.mark.parametrize("how", HOWS)
async def test_stop_while_frozen(real: World, how: How, say: Say) -> None:
    """A stop that is cancelled while Redis is frozen ends cancelled, and leaves nothing."""

    async def frozen_stop(world: World) -> AsyncGenerator[Any, Outcome]:
        bus, before = world.bus(drain_timeout=0.05, publish_timeout=0.05), world.census()
        await bus.start()
        bus.publish_nowait("slow", Count())
        world.freeze()
        outcome = yield bus.stop()
        world.thaw()
        if not outcome.begun:
            await bus.stop()
        await world.same(before, "a stop while frozen")
        async with bus:
            await works(bus)
        await world.same(before, "a stop")

    k = await sweep(real, frozen_stop, how)
    say(f"cancellation: {how}, stop while frozen: {k} waits")


@pytest.mark.scenario(32)
async def test_start_while_frozen(real: World, say: Say) -> None:
    """A start that is cancelled at any wait of the connecting itself, against a server that
    accepts and says nothing, leaves nothing."""

    async def frozen_start(world: World) -> AsyncGenerator[Any, Outcome]:
        bus, before = world.bus(connect_timeout=0.1), world.census()
        world.freeze()
        outcome = yield bus.start()
        assert outcome.error is not None
        assert bus.health().state == "closed"
        world.thaw()
        await world.same(before, "a start while frozen")
        async with bus:
            await works(bus)
        await world.same(before, "a stop")

    with counting():
        k = await sweep(real, frozen_start, "task", deep=True)
    say(f"cancellation: start while frozen, with its tasks: {k} waits")


@pytest.mark.scenario(32)
@pytest.mark.parametrize("how", HOWS)
async def test_publish_into_the_buffer(server: Server, how: How) -> None:
    """Of the publishes that are cancelled while Redis is away and a buffer takes them, none is sent
    that ended cancelled, and each of the others once, in order."""
    async with Proxy(server.port) as proxy:
        world = World(proxy.url, server)
        kept: list[int] = []
        bus = EventBus(proxy.url, outage=Buffer(), heartbeat=None)
        seen: Seen[int] = Seen()

        @bus.on("x")
        async def keep(event: Count) -> None:
            seen.append(event.n)

        async def buffered(world: World) -> AsyncGenerator[Any, Outcome]:
            number = numbers.pop(0)
            outcome = yield bus.publish("x", Count(n=number))
            if outcome.error is None:
                kept.append(number)

        numbers = list(range(MANY))
        async with bus:
            await works(bus)
            proxy.retarget(None)
            proxy.cut()
            await until(lambda: bus.health().state == "down")
            for _ in range(10):
                await sweep(world, buffered, how)
            proxy.retarget(server.port)
            await until(lambda: bus.health().state == "live")
            await works(bus)
            await until(lambda: len(seen) >= len(kept))
            await works(bus)
        assert len(kept) >= 10
        assert seen == kept
        world.close()


# What the sweep and a hostile reading found, one test each


@pytest.mark.scenario(32)
@pytest.mark.parametrize("operation", [start, block])
async def test_cancelled_twice(real: World, operation: Operation, say: Say) -> None:
    """A start that is cancelled again while it cleans up still cleans up, and the bus starts
    again."""
    with counting():
        k = await sweep(real, operation, "twice")
        k_deep = await sweep(real, operation, "twice", deep=True)
    say(f"cancellation: {operation.__name__} twice: {k} waits, {k_deep} with its tasks")


@pytest.mark.scenario(32)
async def test_start_in_vain(real: World) -> None:
    """A start that fails and is cancelled while it cleans up leaves a bus that can start."""

    async def nobody_there(world: World) -> AsyncGenerator[Any, Outcome]:
        bus, before = EventBus("redis://127.0.0.1:1", connect_timeout=0.02), world.census()
        yield bus.start()
        await world.same(before, "a start in vain")
        with pytest.raises(BusUnavailable):
            await bus.start()
        await bus.stop()

    await sweep(real, nobody_there, "task")
    await sweep(real, nobody_there, "late")


@pytest.mark.scenario(32)
async def test_two_readers_of_a_stream(url: str) -> None:
    """When one of two readers of a stream is cancelled as a message comes, the other gets it."""
    for turns in range(8):
        async with EventBus(url) as bus, bus.subscribe("x", Count) as messages:
            readers = [asyncio.create_task(anext(messages)) for _ in range(2)]
            for _ in range(3):
                await checkpoint()
            bus.publish_nowait("x", Count())
            await until(lambda bus=bus: bus.stats().received)  # type: ignore[misc]
            for _ in range(turns):
                await checkpoint()
            readers[0].cancel()
            await asyncio.wait(readers, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(readers[:1], timeout=LIMIT)
            done = readers[1] if readers[0].cancelled() else readers[0]
            await soon(asyncio.shield(done))
            readers[1].cancel()
            await asyncio.wait(readers)


async def _idle(event: Count) -> None:
    """A handler that does nothing."""


@pytest.mark.scenario(32)
async def test_discard_cancelled_then_add(real: World) -> None:
    """A pattern that is added after a cancelled discard of it stays."""
    async with real.bus(heartbeat=None) as bus:
        route = await bus.attach(_idle, "x", "y")
        real.freeze()
        discarding = asyncio.create_task(route.discard("y"))
        await checkpoint()
        discarding.cancel()
        await asyncio.wait({discarding})
        adding = asyncio.create_task(route.add("y"))
        await checkpoint()
        await checkpoint()
        real.thaw()
        await soon(adding, LIMIT)
        await works(bus)
        assert route.patterns == ("x", "y")
        assert (await bus.publish("y", Count())).receivers == 1


@pytest.mark.scenario(32)
async def test_detach_while_patterns_are_added(real: World) -> None:
    """Patterns that wait to be added when their route is detached are refused, and nothing of them
    stays on the server."""
    async with real.bus(heartbeat=None) as bus:
        route = await bus.attach(_idle, "x")
        real.freeze()
        adding = [asyncio.create_task(route.add(name)) for name in ("y", "z")]
        await checkpoint()
        detaching = asyncio.create_task(route.detach())
        await checkpoint()
        real.thaw()
        results = await soon(asyncio.gather(*adding, return_exceptions=True), LIMIT)
        await soon(detaching, LIMIT)
        await works(bus)
        assert [type(result) for result in results] == [BusClosed, BusClosed]
        assert not {"y", "z"} & set(bus.health().subscriptions)


@pytest.mark.scenario(32)
async def test_add_cancelled_while_frozen(real: World) -> None:
    """Whoever is cancelled while adding a pattern does not wait for a frozen server to undo it, and
    the pattern can be added again."""
    async with real.bus(heartbeat=None, connect_timeout=60.0) as bus:
        route = await bus.attach(_idle, "x")
        real.freeze()
        adding = asyncio.create_task(route.add("y"))
        await checkpoint()
        adding.cancel()
        done, _ = await asyncio.wait({adding}, timeout=5.0)
        real.thaw()
        await asyncio.wait({adding})
        assert done
        await soon(route.add("y"), LIMIT)
        await works(bus)
        assert route.patterns == ("x", "y")


@pytest.mark.scenario(32)
async def test_counters_after_a_cancelled_detach(url: str) -> None:
    """What a route counted stays counted when its detach is cancelled."""
    entered, gate = asyncio.Event(), asyncio.Event()

    async def stubborn(event: Count) -> None:
        entered.set()
        try:
            await gate.wait()
        finally:
            await gate.wait()

    async with EventBus(url) as bus:
        route = await bus.attach(stubborn, "x")
        await bus.publish("x", Count())
        await soon(entered.wait())
        detaching = asyncio.create_task(route.detach())
        await checkpoint()
        detaching.cancel()
        await asyncio.wait({detaching})
        assert bus.stats().delivered == 1
        gate.set()


@pytest.mark.scenario(32)
async def test_a_gap_handler_that_cancels_itself(url: str) -> None:
    """A gap handler that cancels its own task has failed once; what waits behind is told."""
    bus = EventBus(url)
    told: Seen[str] = Seen()
    gate = asyncio.Event()

    @bus.on("x")
    async def quiet(event: dict[str, Any]) -> None: ...

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        told.append(str(gap.source))
        await gate.wait()
        if gap.source == "/s0" and (task := asyncio.current_task()):
            task.cancel()
            await checkpoint()

    async with bus:
        for source in range(3):
            for number in (1, 3):
                await bus.publish_raw("x", foreign({}, source=f"/s{source}", busseq=number))
        await told.reach(1)
        await works(bus)
        gate.set()
        await told.reach(3)
        assert sorted(told) == ["/s0", "/s1", "/s2"]


@pytest.mark.scenario(32)
async def test_withdrawn(server: Server) -> None:
    """A publish that is cancelled while Redis is away is certainly not sent; those around it are,
    in order."""
    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url, heartbeat=None, publish_timeout=LIMIT)
        receiver = EventBus(f"unix://{server.socket_path}", heartbeat=None)
        seen: Seen[int] = Seen()

        @receiver.on("x")
        async def keep(event: Count) -> None:
            seen.append(event.n)

        async with receiver, bus:
            proxy.retarget(None)
            proxy.cut()
            await until(lambda: bus.health().state == "down")
            tasks = [asyncio.create_task(bus.publish("x", Count(n=n))) for n in range(30)]
            await checkpoint()
            for task in tasks[::3]:
                task.cancel()
            proxy.retarget(server.port)
            await soon(asyncio.gather(*tasks, return_exceptions=True), LIMIT)
            await works(receiver)
        assert [task.cancelled() for task in tasks] == [n % 3 == 0 for n in range(30)]
        assert seen == [n for n in range(30) if n % 3]


# The storm


@pytest.mark.scenario(32)
@pytest.mark.parametrize("mode", ["pass", "drip"])
async def test_storm(server: Server, mode: Any, say: Say) -> None:
    """Of 300 publishes, 200 of them cancelled at random moments, each gets its own answer: the
    number of copies of its channel. What was acknowledged arrives, and nothing arrives twice."""
    chance = random.Random(32)
    listeners = []
    for number in range(4):  # channel s:n has n listeners, and the bus
        listener = socket.socket(socket.AF_UNIX)
        listener.connect(server.socket_path)
        names = " ".join(f"s:{n}" for n in range(number + 1, 4)) or "nothing"
        listener.sendall(f"SUBSCRIBE {names}\r\n".encode())
        listener.recv(4096)
        listeners.append(listener)
    expected = [1 + n for n in range(4)]
    seen: Seen[int] = Seen()
    acknowledged: set[int] = set()

    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url, heartbeat=None, publish_timeout=LIMIT)

        @bus.on("s:*", max_queue=1000)
        async def keep(message: Message[Count]) -> None:
            seen.append(message.event.n)

        async def one(n: int) -> None:
            receipt = await bus.publish(f"s:{n % 4}", Count(n=n, text="x" * 1500))
            assert receipt.receivers == expected[n % 4]
            acknowledged.add(n)

        async def cancel_later(task: asyncio.Task[None], turns: int) -> None:
            for _ in range(turns):
                await checkpoint()
            task.cancel()

        async with bus:
            for n in range(4):
                assert (await bus.publish(f"s:{n}", Count(n=1000 + n))).receivers == expected[n]
            for pair in proxy.living("publisher"):
                pair.mode = mode
            tasks = [asyncio.create_task(one(n)) for n in range(300)]
            cancels = [
                asyncio.create_task(cancel_later(task, chance.choice((1, 2, 3, 5, 8, 90))))
                for task in chance.sample(tasks, 200)
            ]
            results = await soon(asyncio.gather(*tasks, return_exceptions=True), LIMIT)
            await asyncio.gather(*cancels)
            wrong = [
                result
                for result in results
                if result is not None and not isinstance(result, asyncio.CancelledError)
            ]
            assert not wrong
            for n in range(4):
                assert (await bus.publish(f"s:{n}", Count(n=2000 + n))).receivers == expected[n]
            await until(lambda: 2003 in seen and acknowledged <= set(seen))
        assert len(set(seen)) == len(seen)
    for listener in listeners:
        listener.close()
    counts = f"{len(acknowledged)} acknowledged, {len(seen) - 8} arrived"
    say(f"cancellation: storm ({mode}): 300 published, 200 cancelled, {counts}")
