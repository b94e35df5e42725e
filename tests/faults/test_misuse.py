"""Handlers that raise, hang, block and cancel themselves: the fault catalogue, part D.

Whatever a handler does to itself ends its call and nothing else, but for what ends a program.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus, Message
from tests.helpers import Seen
from tests.test_bus import run_script


class Note(Event, channel="note:{to}"):
    to: str = "a"
    n: int = 0


# -- Handlers that raise ---------------------------------------------------------------------------


class Odd(BaseException):
    """What is neither an Exception nor a way to end a program."""


def grouped(error: BaseException) -> BaseException:
    """As a task group raises it."""
    return BaseExceptionGroup("all", [ValueError("one of two"), error])


@pytest.mark.scenario(28)
@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain"),
        ExceptionGroup("group", [ValueError(), ExceptionGroup("inner", [KeyError()])]),
        StopAsyncIteration(),
        StopIteration(),
        asyncio.CancelledError(),
        grouped(asyncio.CancelledError()),
        RecursionError(),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("how", ["async", "def", "task group"])
async def test_what_a_handler_raises_ends_one_call(
    url: str, error: BaseException, how: str
) -> None:
    """An error of a handler is counted and reported once, for this call alone: its next call and
    the handler beside it are as if nothing had happened."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    beside: Seen[int] = Seen()
    errors: list[BaseException] = []
    loop = asyncio.get_running_loop()

    def fail(n: int) -> None:
        if n == 1:
            raise error

    if how == "def":

        @bus.on("note:*")
        def in_a_thread(event: Note) -> None:
            loop.call_soon_threadsafe(seen.append, event.n)
            fail(event.n)

    else:

        @bus.on("note:*")
        async def handler(event: Note) -> None:
            seen.append(event.n)
            if how == "async":
                fail(event.n)
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(checkpoint)
                    await checkpoint()
                    fail(event.n)

    @bus.on("note:*")
    async def other(event: Note) -> None:
        beside.append(event.n)

    @bus.exception_handler(BaseException)
    async def keep(error: BaseException, message: Message[Any]) -> None:
        errors.append(error)

    async with bus:
        for n in range(3):
            await bus.publish(Note(n=n))
        await seen.reach(3)
        await beside.reach(3)

    assert seen == beside == [0, 1, 2]
    assert len(errors) == bus.stats().failed == 1
    assert bus.health().reason is None or "raised" not in bus.health().reason


@pytest.mark.scenario(28)
@pytest.mark.parametrize("grouping", [False, True], ids=["alone", "in a group"])
@pytest.mark.parametrize("kind", [Odd, GeneratorExit])
async def test_an_error_that_is_no_exception_stops_the_bus(
    url: str, kind: type[BaseException], grouping: bool
) -> None:
    """What is no Exception is not swallowed: alone, it stops the bus, which closes in order; among
    others in a group it is one failed call."""
    bus = EventBus(url, drain_timeout=1.0)
    seen: Seen[int] = Seen()

    @bus.on("note:*")
    async def handler(event: Note) -> None:
        seen.append(event.n)
        if event.n == 0:
            raise grouped(kind()) if grouping else kind()

    await bus.start()
    await bus.publish(Note(n=0))
    if grouping:
        await bus.publish(Note(n=1))
        await seen.reach(2)
        assert bus.stats().failed == 1
        await bus.stop()
    else:
        async with asyncio.timeout(10):
            while f"raised {kind.__name__}" not in str(bus.health().reason):
                await checkpoint()
        await bus.stop()
    assert bus.health().state == "closed"


@pytest.mark.scenario(28)
async def test_an_error_that_stops_the_bus_is_told_by_the_bus_alone() -> None:
    """The error with which a worker ends is the bus's to report: asyncio has nothing to add about
    an exception that was never retrieved."""
    said: list[str] = []
    loop = asyncio.get_running_loop()
    bus = EventBus("memory://odd")

    @bus.on("note:*")
    async def handler(event: Note) -> None:
        raise Odd

    loop.set_exception_handler(lambda loop, context: said.append(context["message"]))
    try:
        await bus.start()
        await bus.publish(Note())
        async with asyncio.timeout(10):
            while bus.health():
                await checkpoint()
        await bus.stop()
        del bus, handler
        gc.collect()
    finally:
        loop.set_exception_handler(None)

    assert said == []


@pytest.mark.scenario(28)
@pytest.mark.parametrize(
    "group",
    [
        "asyncio.TaskGroup()",
        pytest.param("anyio.create_task_group()"),
    ],
)
@pytest.mark.parametrize("kind", ["SystemExit(3)", "KeyboardInterrupt"])
def test_an_exit_in_a_task_group_ends_the_program(group: str, kind: str) -> None:
    """SystemExit and KeyboardInterrupt end the bus and the program, also from inside a task group,
    which may have wrapped them."""
    done = run_script(f"""
import anyio
bus = EventBus("memory://x", drain_timeout=2.0)
@bus.on("x")
async def handler():
    async with {group} as group:
        raise {kind}
async def main():
    try:
        async with bus:
            await bus.publish("x", Count())
            await asyncio.wait_for(asyncio.Event().wait(), 5)
    finally:
        print(bus.health().state, flush=True)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(3)
""")
    assert (done.stdout, done.returncode) == ("closed\n", 3)


# -- Handlers that hang, block, and cancel themselves ----------------------------------------------


@pytest.mark.scenario(29)
@pytest.mark.parametrize("order_by", [None, "channel"])
async def test_a_handler_that_hangs_gives_its_place_back(url: str, order_by: Any) -> None:
    """With a timeout, calls that hang fill every place of a handler only for so long: each is one
    TimeoutError, and what waited behind them is handled."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    errors: Seen[int] = Seen()

    @bus.on("note:*", timeout=0.1, concurrency=3, order_by=order_by)
    async def handler(event: Note) -> None:
        if event.n < 3:
            await asyncio.Event().wait()
        seen.append(event.n)

    @bus.exception_handler(TimeoutError)
    async def late(error: TimeoutError, message: Message[Note]) -> None:
        errors.append(message.event.n)

    async with bus:
        for n in range(9):
            await bus.publish(Note(to=str(n % 3), n=n))
        await seen.reach(6)
        await errors.reach(3)

        assert sorted(seen) == [3, 4, 5, 6, 7, 8]
        assert sorted(errors) == [0, 1, 2]
        assert bus.stats().failed == 3


@pytest.mark.scenario(29)
@pytest.mark.parametrize("timeout", [None, 10.0])
@pytest.mark.parametrize("how", ["its scope", "its task group", "its task", "its task at the end"])
async def test_a_handler_that_cancels_itself_ends_one_call(
    url: str, how: str, timeout: float | None
) -> None:
    """A handler may cancel its scope, its task group, or its own task, at any moment: its next call
    comes, and the handler beside it misses nothing."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    beside: Seen[int] = Seen()

    @bus.on("note:*", timeout=timeout)
    async def handler(event: Note) -> None:
        seen.append(event.n)
        task = asyncio.current_task()
        if event.n != 1 or task is None:
            return
        if how == "its scope":
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep_forever()
        elif how == "its task group":
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                group.cancel_scope.cancel()
        else:
            task.cancel()
            if how == "its task":
                await anyio.sleep_forever()

    @bus.on("note:*")
    async def other(event: Note) -> None:
        beside.append(event.n)

    async with bus:
        for n in range(5):
            bus.publish_nowait(Note(n=n))  # all at once: some wait behind the one that cancels
        await seen.reach(5)
        await beside.reach(5)

        assert bus.health()
        assert bus.stats().failed <= 1
    assert seen == beside == [0, 1, 2, 3, 4]


@pytest.mark.scenario(30)
async def test_a_handler_that_blocks_a_thread_blocks_nothing_else(server_url: str) -> None:
    """While a `def` handler blocks, for as long as the test wants, the loop turns: messages are
    handled, the heart beats, the bus publishes and nothing reconnects. It keeps its one place."""
    bus = EventBus(server_url, heartbeat=0.1)
    go_on = threading.Event()
    entered: Seen[int] = Seen()
    seen: Seen[int] = Seen()
    loop = asyncio.get_running_loop()

    @bus.on("note:*")
    def blocking(event: Note) -> None:
        loop.call_soon_threadsafe(entered.append, event.n)
        go_on.wait(50)

    @bus.on("note:*")
    async def other(event: Note) -> None:
        seen.append(event.n)

    async with bus:
        await bus.publish(Note(n=0))
        await entered.reach(1)
        beats: set[float | None] = set()
        sent = 1
        async with asyncio.timeout(30):
            while len(beats) < 10:
                beats.add(bus.health().round_trip)
                await bus.publish(Note(n=sent))
                sent += 1
                await seen.reach(sent)

        assert entered == [0], "it was called again although it has not returned"
        assert bus.stats().reconnects == 0
        go_on.set()
        await entered.reach(sent)
    assert entered == seen == list(range(sent))
