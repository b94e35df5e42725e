"""What a hostile reading of the engine found, one test each, so that it stays mended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from threading import Event as ThreadEvent
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import pytest
from pydantic import AfterValidator, field_validator

from eventbus import BusClosed, Event, EventBus, Gap, InvalidEvent, Message
from eventbus.server import Server
from tests.helpers import Seen, soon


class Note(Event, channel="note:{n}"):
    n: int


class Picky(Event):
    n: int

    @field_validator("n")
    @classmethod
    def known(cls, n: int) -> int:
        return {1: 1}[n]


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that this test may freeze or kill."""
    with Server() as server:
        yield server


def _known(text: str) -> str:
    return {"x": "x"}[text]


async def test_a_capture_converter_that_fails_hurts_only_its_route(url: str) -> None:
    """A validator of a capture that raises anything is a capture that does not convert."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()

    @bus.on("t:{k}")
    async def odd(event: Note, k: Annotated[str, AfterValidator(_known)]) -> None: ...

    @bus.on("o")
    async def other(event: Note) -> None:
        seen.append(event.n)

    async with bus:
        await bus.publish("t:unknown", Note(n=0))
        await bus.publish("o", Note(n=1))
        await seen.reach(1)

        assert bus.stats().reconnects == 0
        assert bus.stats().handlers["odd"].skipped == 1


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
async def test_a_validator_that_fails_makes_the_event_invalid(url: str, overflow: Any) -> None:
    """Whatever a validator raises, the event is invalid, once, and the channel goes on."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    errors: Seen[InvalidEvent] = Seen()

    @bus.on("a", overflow=overflow)
    async def handler(event: Picky) -> None:
        seen.append(event.n)

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        errors.append(error)

    async with bus:
        await bus.publish_raw(
            "a",
            b'{"specversion":"1.0","id":"1","source":"x","type":"Picky",'
            b'"time":"2024-05-06T07:08:09.0Z","busseq":1,"data":{"n":2}}',
        )
        await errors.reach(1)
        await bus.publish("a", Picky(n=1))
        await seen.reach(1)

        assert bus.stats().invalid == 1


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
@pytest.mark.scenario(29)
async def test_a_handler_that_cancels_itself_is_one_failed_call(url: str, overflow: Any) -> None:
    """A handler that cancels its own task has failed once, and its lane goes on."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()

    @bus.on("a", overflow=overflow)
    async def handler(event: Note) -> None:
        seen.append(event.n)
        task = asyncio.current_task()
        if event.n == 1 and task is not None:
            task.cancel()
            await asyncio.Event().wait()

    async with bus:
        for n in (1, 2, 3):
            await bus.publish("a", Note(n=n))
            await seen.reach(n)

        assert bus.stats().failed == 1
    assert seen == [1, 2, 3]


@pytest.mark.scenario(33)
async def test_a_publish_held_up_in_a_middleware_ends_with_the_bus(server: Server) -> None:
    """A publish that reaches the transport after the stop is BusClosed, and does not hang."""
    bus = EventBus(server.url)
    gate, waiting = asyncio.Event(), asyncio.Event()

    @bus.middleware("publish")
    async def hold(message: Message[Any], call_next: Any) -> Any:
        waiting.set()
        await gate.wait()
        return await call_next(message)

    await bus.start()
    task = asyncio.create_task(bus.publish(Note(n=1)))
    await soon(waiting.wait())
    await bus.stop()
    gate.set()

    with pytest.raises(BusClosed):
        await soon(task)


@pytest.mark.scenario(33)
async def test_a_handler_that_swallows_its_cancellation_does_not_hold_the_stop(url: str) -> None:
    """stop() ends although a handler does not."""
    bus = EventBus(url, drain_timeout=0.1)
    entered, over = asyncio.Event(), asyncio.Event()

    @bus.on("a")
    async def stubborn(event: Note) -> None:
        entered.set()
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    await bus.start()
    await bus.publish("a", Note(n=1))
    await soon(entered.wait())
    await soon(bus.stop())
    over.set()

    assert bus.health().state == "closed"


@pytest.mark.scenario(33)
@pytest.mark.scenario(31)
async def test_two_handlers_may_stop_the_bus(url: str) -> None:
    """Two handlers that both call stop() wait for neither each other nor the drain timeout."""
    bus = EventBus(url, drain_timeout=60)
    stopped: Seen[str] = Seen()

    @bus.on("a")
    async def one(event: Note) -> None:
        await bus.stop()
        stopped.append("one")

    @bus.on("a")
    async def two(event: Note) -> None:
        await bus.stop()
        stopped.append("two")

    await bus.start()
    await bus.publish("a", Note(n=1))
    await stopped.reach(2)

    assert bus.stats().failed == 0


@pytest.mark.scenario(33)
async def test_what_waits_for_the_server_ends_with_the_bus(server: Server) -> None:
    """An attach that waits for a frozen server raises BusClosed when the bus is stopped."""
    bus = EventBus(server.url, drain_timeout=0.2)

    async def handler(event: Note) -> None: ...

    await bus.start()
    server.freeze()
    task = asyncio.create_task(bus.attach(handler, "z:*"))
    await asyncio.wait({task}, timeout=0.1)
    await soon(bus.stop())

    with pytest.raises(BusClosed):
        await soon(task)
    server.thaw()


@pytest.mark.scenario(5)
async def test_a_gap_begins_before_the_loss(server: Server) -> None:
    """`since` of a reconnect gap is the last byte before the server froze, not the moment when that
    was noticed, a heartbeat later."""
    bus_heartbeat = 0.6
    bus = EventBus(server.url, heartbeat=bus_heartbeat)
    gaps: Seen[Gap] = Seen()

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    async with bus:
        await bus.publish(Note(n=1))
        server.freeze()
        frozen = datetime.now(UTC)
        await anyio.to_thread.run_sync(ThreadEvent().wait, 1.5)
        server.thaw()
        await soon(gaps.reach(1), 15)

        assert gaps[0].since <= frozen + timedelta(seconds=bus_heartbeat / 2)


async def test_numbers_die_with_a_route_that_was_detached_during_an_outage(
    server: Server,
) -> None:
    """What is published on a channel that nobody listens to any more is nobody's loss, although the
    route was taken away while Redis was away."""
    seen: Seen[int] = Seen()
    gaps: Seen[Gap] = Seen()

    async def handler(event: Note) -> None:
        seen.append(event.n)

    bus = EventBus(server.url, heartbeat=0.3)

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    async with bus, EventBus(server.url, heartbeat=0.3) as publisher:
        route = await bus.attach(handler, "a:*")
        await publisher.publish("a:1", Note(n=1))
        await seen.reach(1)
        server.kill()
        async with asyncio.timeout(10):
            while bus.health():
                await anyio.lowlevel.checkpoint()
        await route.detach()
        server.start()
        await soon(gaps.reach(1), 15)
        async with asyncio.timeout(15):
            while publisher.health().state != "live":
                await anyio.lowlevel.checkpoint()
        for n in range(5):
            await publisher.publish("a:1", Note(n=n))
        await bus.attach(handler, "a:*")
        await publisher.publish("a:1", Note(n=9))
        await seen.reach(2)

        assert bus.stats().missed == 0


@pytest.mark.scenario(33)
async def test_health_is_false_while_stopping(url: str) -> None:
    """A bus that is being stopped does not say that it can receive."""
    bus = EventBus(url, drain_timeout=60)
    entered, gate = asyncio.Event(), asyncio.Event()

    @bus.on("a")
    async def slow(event: Note) -> None:
        entered.set()
        await gate.wait()

    await bus.start()
    await bus.publish("a", Note(n=1))
    await soon(entered.wait())
    stopping = asyncio.create_task(bus.stop())
    await asyncio.wait({stopping}, timeout=0.05)

    assert not bus.health()
    gate.set()
    await soon(stopping)


async def test_the_size_cap_comes_before_parsing(url: str) -> None:
    """A payload over max_payload is refused without reading it as JSON."""
    bus = EventBus(url, max_payload=1000)
    errors: Seen[InvalidEvent] = Seen()

    @bus.on("a")
    async def handler(event: dict[str, Any]) -> None: ...

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        errors.append(error)

    huge = b'{ "busseq":1,"specversion":"1.0","id":"1","source":"s","type":"t","data":['
    async with bus, EventBus(url, max_payload=1 << 20) as other:
        await other.publish_raw("a", huge + b"1," * 2000 + b"1]}")
        await errors.reach(1)

        assert errors[0].reasons == ("payload: too large",)
        assert bus._run is not None
        assert len(bus._run.receiver.sequences) == 0


async def test_a_secret_in_a_url_without_a_scheme_is_not_shown() -> None:
    """The error for a URL that is none does not quote it."""
    for url in ("default:s3cret@localhost:6379", "redis:/u:s3cret@h"):
        with pytest.raises(Exception, match="without a scheme") as caught:
            EventBus(url)
        assert "s3cret" not in str(caught.value)


@pytest.mark.scenario(34)
async def test_a_route_used_from_another_loop_is_refused(url: str) -> None:
    """route.add in another loop raises BusClosed and changes nothing."""

    async def handler(event: Note) -> None: ...

    async with EventBus(url) as bus:
        route = await bus.attach(handler, "a")

        def elsewhere() -> None:
            asyncio.run(route.add("b"))

        with pytest.raises(BusClosed):
            await anyio.to_thread.run_sync(elsewhere)
        assert route.patterns == ("a",)


async def test_adding_to_a_route_that_was_emptied_keeps_it(url: str) -> None:
    """A route without patterns is still a route."""
    seen: Seen[int] = Seen()

    async def handler(event: Note) -> None:
        seen.append(event.n)

    async with EventBus(url) as bus:
        route = await bus.attach(handler, "x")
        await route.discard("x")
        await route.add("y")
        await bus.publish("y", Note(n=1))
        await seen.reach(1)


async def test_drop_newest_is_the_policy_for_bytes_too(url: str) -> None:
    """Over max_pending_bytes a drop_newest lane keeps the oldest."""
    bus = EventBus(url, max_pending_bytes=2000)
    gate = asyncio.Event()
    seen: Seen[int] = Seen()

    @bus.on("a", overflow="drop_newest")
    async def handler(event: Note) -> None:
        await gate.wait()
        seen.append(event.n)

    async with bus:
        for n in range(40):
            await bus.publish("a", Note(n=n))
        gate.set()
        await seen.reach(3)
    assert list(seen) == sorted(seen)
    assert seen[:3] == [0, 1, 2]


async def test_names_of_streams_are_not_kept(url: str) -> None:
    """A thousand short streams leave nothing behind."""
    async with EventBus(url) as bus:
        for n in range(1000):
            async with bus.subscribe(f"reply:{n}"):
                pass
        receiver = bus._run.receiver if bus._run else None
        assert receiver is not None
        assert not receiver.lanes
        assert not receiver._names
        assert not receiver.router._entries


@pytest.mark.scenario(34)
async def test_a_bus_whose_loop_died_can_start_again(server: Server) -> None:
    """A bus that was never stopped, and whose loop is gone, starts in a new loop."""
    bus = EventBus(server.url)

    def twice() -> str:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(bus.start())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(anyio.lowlevel.checkpoint())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

        async def again() -> str:
            async with bus:
                return bus.health().state

        return asyncio.run(again())

    assert await anyio.to_thread.run_sync(twice) == "live"
