"""The testing kit: a bus elsewhere, what arrived, whether all is done, outages to order."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus import (
    Buffer,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    InvalidPattern,
    Message,
    escape,
)
from eventbus._patterns import Pattern, encode_name
from eventbus.recorder import _matcher
from eventbus.server import Server
from eventbus.testing import away, on_memory, on_server, record, settled
from tests.helpers import Seen, soon


class MessageSent(Event, channel="chat:{room}"):
    room: str
    text: str = "hi"
    price: Decimal = Decimal("1.10")
    key: bytes = b"\xff"


class RoomClosed(Event, channel="chat:{room}"):
    room: str


class Tick(Event, channel="tick:{n}"):
    n: int


def memory(**settings: Any) -> EventBus:
    """A bus of its own name in memory."""
    return EventBus(f"memory://{secrets.token_hex(6)}", **settings)


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may end."""
    with Server() as server:
        yield server


# -- What arrived ----------------------------------------------------------------------------------


async def test_a_record_that_is_made_before_the_start(url: str) -> None:
    """`recorder = record(bus)` before the start records from the first message on; an expectation
    finds what has arrived already, typed."""
    bus = EventBus(url)
    recorder = record(bus)
    sent = MessageSent(room="lobby")
    async with bus:
        await bus.publish(sent)
        await settled(bus)
        found = await recorder.expect(MessageSent, channel="chat:*", within=1)

    assert found.event == sent
    assert found.channel == "chat:lobby"
    assert found.event.price == Decimal("1.10")
    assert [message.event["room"] for message in recorder.messages] == ["lobby"]


async def test_a_record_on_a_running_bus(url: str) -> None:
    """On a running bus a recorder is awaited, or entered and then detached at the end of the block;
    without that it says so instead of having missed everything."""
    async with EventBus(url) as bus:
        forgotten = record(bus)
        with pytest.raises(EventBusError, match="await record"):
            await forgotten.expect(MessageSent)
        with pytest.raises(EventBusError, match="async with record"):
            forgotten.messages  # noqa: B018
        awaited = await record(bus, "chat:*")
        async with record(bus) as entered:
            await bus.publish(MessageSent(room="a"))
            await bus.publish(Tick(n=1))
            await settled(bus)
        await bus.publish(MessageSent(room="b"))
        await settled(bus)

    assert [message.channel for message in entered.messages] == ["chat:a", "tick:1"]
    assert [message.channel for message in awaited.messages] == ["chat:a", "chat:b"]


async def test_an_expectation_waits_and_takes() -> None:
    """An expectation waits for what comes later, takes it, and the next one gets the next."""
    bus = memory()
    recorder = record(bus)
    async with bus, asyncio.TaskGroup() as group:
        first = group.create_task(recorder.expect(Tick, where=lambda tick: tick.event.n > 1))
        second = group.create_task(recorder.expect(channel="tick:{n}"))
        for n in (1, 2, 3):
            await bus.publish(Tick(n=n))
        third = group.create_task(recorder.expect(MessageSent, Tick))

    assert (await first).event == Tick(n=2)
    assert (await second).event == {"n": 1}
    assert (await third).event == Tick(n=3)
    assert [message.event.n for message in recorder.of(Tick)] == [1, 2, 3]
    assert recorder.of(Tick, channel="tick:[12]")[-1].event == Tick(n=2)
    assert recorder.of(MessageSent) == []


async def test_an_expectation_that_fails_tells_what_arrived() -> None:
    """The error of an expectation lists what did arrive, the nearest first, and why it was not it;
    long data is cut."""
    bus = memory()
    recorder = record(bus)
    async with bus:
        await bus.publish(Tick(n=1))
        await bus.publish(Tick(n=2))
        await bus.publish(MessageSent(room="other", text="x" * 500))
        await bus.publish(RoomClosed(room="lobby"))
        await bus.publish(MessageSent(room="lobby", text="spam"))
        await bus.publish_raw(
            "chat:lobby",
            json.dumps(
                {"specversion": "1.0", "id": "1", "source": "s", "type": "MessageSent", "data": {}}
            ).encode(),
        )
        await settled(bus)
        await recorder.expect(Tick)
        with pytest.raises(AssertionError) as info:
            await recorder.expect(
                MessageSent, channel="chat:lobby", within=0.01, where=lambda m: m.event.text == "hi"
            )

    first, *lines = str(info.value).splitlines()
    assert first == "no MessageSent on 'chat:lobby' within 0.01 s; 6 arrived:"
    shown = [re.sub(r"(?<=\d validation error).*", "", line).split(":")[0] for line in lines]
    assert shown == [
        "  refused by `where`",
        "  same channel, other type",
        "  same channel, does not fit MessageSent (1 validation error",
        "  same type, other channel",
        "  taken by an earlier expect",
        "  something else",
    ]
    assert all(len(line) < 220 for line in lines)


async def test_a_failure_lists_no_more_than_can_be_read() -> None:
    """Twenty lines are listed, the rest is counted; where nothing has arrived it says so."""
    bus = memory()
    recorder = record(bus)
    async with bus:
        with pytest.raises(AssertionError, match=r"no Tick on .* nothing arrived"):
            await recorder.expect(Tick, within=0.01)
        for n in range(30):
            await bus.publish(Tick(n=n))
        await settled(bus)
        with pytest.raises(AssertionError, match="and 10 more"):
            await recorder.expect(MessageSent, RoomClosed, within=0.01)
        with pytest.raises(AssertionError, match="no message on 'x'"):
            await recorder.expect(channel="x", within=0.01)


async def test_a_record_is_bounded() -> None:
    """Only the last `limit` messages are kept; an expectation that waits misses none meanwhile."""
    bus = memory()
    recorder = record(bus, limit=3)
    async with bus, asyncio.TaskGroup() as group:
        waiting = group.create_task(recorder.expect(MessageSent))
        for n in range(10):
            await bus.publish(Tick(n=n))
        await settled(bus)
        await bus.publish(MessageSent(room="a"))

    assert (await waiting).channel == "chat:a"
    assert [message.channel for message in recorder.messages] == ["tick:8", "tick:9", "chat:a"]


async def test_what_where_raises_comes_out() -> None:
    """An error of `where`, a TimeoutError too, is the error of the test."""
    bus = memory()
    recorder = record(bus)

    def wrong(message: Message[Any]) -> bool:
        raise ZeroDivisionError

    async with bus:
        await bus.publish(Tick(n=1))
        with pytest.raises(ZeroDivisionError):
            await recorder.expect(Tick, where=wrong)


async def test_without_envelopes() -> None:
    """On a bus with bare JSON an event class takes what fits it."""
    bus = memory(wire="bare")
    recorder = record(bus)
    async with bus:
        await bus.publish(RoomClosed(room="a"))
        await bus.publish(Tick(n=1))
        assert (await recorder.expect(Tick)).event == Tick(n=1)
        assert (await recorder.expect(RoomClosed)).event == RoomClosed(room="a")


names = st.text("ab:-]^[\\é", min_size=1, max_size=6)
globs = st.text("ab:*?[]^-\\{}", min_size=1, max_size=7) | st.lists(
    st.sampled_from(["a", ":", "*", "?", "{x}", "{y:path}", "[^a]", "[a-]", "[b-a]", "\\*", "{{"]),
    min_size=1,
    max_size=4,
).map("".join)


@given(globs, names)
@example("[a-]b]", "]")
@example("[]", "a")
@example("[^]", "a")
@example("chat:{room:path}", "chat:a:b")
def test_channels_match_as_for_a_handler(pattern: str, channel: str) -> None:
    """`channel=` matches what a handler with that pattern would get."""
    try:
        parsed = Pattern(pattern)
    except InvalidPattern:
        return
    fits = _matcher(pattern)
    assert fits(Message({}, channel)) == (parsed.match(encode_name(channel)) is not None)
    assert _matcher(escape(channel))(Message({}, channel))


@pytest.mark.parametrize("pattern", ["", "{", "}", "chat:{room"])
async def test_a_channel_that_is_no_pattern(pattern: str) -> None:
    """A brace without its fellow is refused."""
    recorder = record(memory())
    with pytest.raises(InvalidPattern):
        recorder.of(Tick, channel=pattern)


# -- Whether all is done ---------------------------------------------------------------------------


async def test_settled(url: str) -> None:
    """Handlers that publish, up to a depth of fifty, on one bus and its peer: when it returns, all
    of them have run."""
    bus, peer = EventBus(url), EventBus(url)
    seen: list[int] = []

    @bus.on(Tick)
    @peer.on(Tick)
    async def count(event: Tick, current: EventBus) -> None:
        seen.append(event.n)
        if event.n < 50 and current is bus:
            current.publish_nowait(Tick(n=event.n + 1))

    async with bus, peer:
        bus.publish_nowait(Tick(n=1))
        await settled(bus, peer, within=30)
        assert sorted(seen) == sorted([*range(1, 51)] * 2)
        await settled(bus, peer)


async def test_settled_waits_for_threads_and_gap_handlers(url: str) -> None:
    """A `def` handler that runs in its thread and a gap handler are waited for."""
    bus = EventBus(url)
    done: list[str] = []

    @bus.on(Tick, max_queue=1)
    def slow(event: Tick) -> None:
        done.append("thread")

    @bus.on_gap()
    async def lost(gap: Gap) -> None:
        done.append(gap.reason)

    async with bus:
        for n in range(5):
            bus.publish_nowait(Tick(n=n))
        await settled(bus)
        dropped = bus.stats().dropped
        assert done.count("thread") == 5 - dropped
        assert done.count("overflow") == dropped  # one for each channel


async def test_what_does_not_settle_is_named() -> None:
    """At the end of the time it says which handlers still have messages, or that one runs."""
    bus = memory()
    gate = asyncio.Event()

    @bus.on(Tick)
    async def stuck(event: Tick) -> None:
        await gate.wait()

    async with bus:
        await bus.publish(Tick(n=1))
        with pytest.raises(AssertionError, match="a handler does not return"):
            await settled(bus, within=0.01)
        await bus.publish(Tick(n=2))
        with pytest.raises(AssertionError, match=r"stuck \(1 waiting\)"):
            await settled(bus, within=0.01)
        gate.set()
        await settled(bus)
    with pytest.raises(EventBusError, match="not running"):
        await settled(bus)


# -- Where it runs ---------------------------------------------------------------------------------


def application() -> EventBus:
    """A bus as an application has it, at a place that no test may reach."""
    bus = EventBus("redis://127.0.0.1:1", namespace="app", connect_timeout=0.1)

    @bus.on(Tick)
    async def answer(event: Tick) -> None:
        await bus.publish(MessageSent(room=str(event.n)))

    return bus


async def test_an_application_in_memory_and_on_a_server(valkey: Server) -> None:
    """An application's own bus runs elsewhere with its own handlers, also one that publishes
    through the global; then it is where it was."""
    bus = application()
    for elsewhere in (on_memory(bus), on_server(bus, valkey), on_memory(bus, "named")):
        async with elsewhere as running, record(running) as recorder:
            await running.publish(Tick(n=7))
            found = await recorder.expect(MessageSent, channel="chat:7")
            assert found.pattern == "*"
            assert "127.0.0.1" not in repr(bus)
            assert running is bus
    assert "127.0.0.1:1" in repr(bus)
    with pytest.raises(BusUnavailable):
        await bus.start()


async def test_an_application_that_starts_by_itself() -> None:
    """Plain `with` brings the bus there and leaves its life to the application."""
    bus = application()
    with on_memory(bus, "mine") as same:
        async with bus.lifespan():
            assert same is bus
            assert bus.health().state == "live"
    assert "127.0.0.1:1" in repr(bus)
    async with on_memory(bus):
        with pytest.raises(EventBusError, match="running"), on_memory(bus):
            pass
        assert bus.health()


async def test_a_start_elsewhere_that_fails(private: Server) -> None:
    """When the bus cannot start there it is where it was."""
    bus = application()
    private.stop()
    with pytest.raises(BusUnavailable, match="eventbus"):
        await on_server(bus, private).__aenter__()
    assert "127.0.0.1:1" in repr(bus)


# -- Outages ---------------------------------------------------------------------------------------


def with_gaps(bus: EventBus) -> Seen[Gap]:
    """The gaps that the bus tells."""
    gaps: Seen[Gap] = Seen()

    @bus.on_gap()
    async def lost(gap: Gap) -> None:
        gaps.append(gap)

    return gaps


@pytest.mark.parametrize("place", ["memory", "server"])
async def test_away(place: str, private: Server) -> None:
    """Inside the block the bus is down and its publishes are refused; after it the bus is live, was
    told of one reconnect, and hears again."""
    name = secrets.token_hex(6)
    bus = EventBus("redis://nowhere", publish_timeout=0.2)
    gaps = with_gaps(bus)
    recorder = record(bus)
    async with on_memory(bus, name) if place == "memory" else on_server(bus, private):
        await bus.publish(Tick(n=1))
        async with away(bus):
            assert bus.health().state == "down"
            with pytest.raises(BusUnavailable) as info:
                await bus.publish(Tick(n=2))
        assert bus.health().state == "live"
        await gaps.reach(1)
        await bus.publish(Tick(n=3))
        await settled(bus)

    assert info.value.channel == "tick:2"
    assert [gap.reason for gap in gaps] == ["reconnect"]
    assert [message.event.n for message in recorder.of(Tick)] == [1, 3]
    assert bus.stats().refused == 1


@pytest.mark.parametrize("place", ["memory", "server"])
@pytest.mark.parametrize(
    "outage, heard",
    [
        ("drop", []),
        (Buffer(), [1, 2, 3]),
        (Buffer(max_events=2), [2, 3]),
        (Buffer(latest=True), [3]),
        ("fail", [1, 2, 3]),
    ],
    ids=["drop", "all", "bounded", "latest", "fail"],
)
async def test_outage_policies(place: str, outage: Any, heard: list[int], private: Server) -> None:
    """What is published on one channel while away meets the outage policy of the bus: the same in
    memory and on a server (where the bus may be back as a publisher before it hears again)."""
    bus = EventBus("redis://nowhere", outage=outage, publish_timeout=20.0)
    recorder = record(bus)
    async with on_memory(bus) if place == "memory" else on_server(bus, private):
        async with away(bus):
            for n in (1, 2, 3):
                bus.publish_nowait("tick:0", Tick(n=n))
        await settled(bus)
    stats = bus.stats()
    arrived = [message.event.n for message in recorder.of(Tick)]
    assert arrived == heard or (place, outage) == ("server", "fail")
    assert stats.published == len(heard)
    assert stats.refused + stats.conflated == 3 - len(heard)
    assert stats.conflated == (2 if heard == [3] else 0)


async def test_what_gets_old_in_an_outage_in_memory() -> None:
    """What is in a buffer for longer than `max_age` is dropped."""
    bus = memory(outage=Buffer(max_age=0.01))
    async with bus:
        async with away(bus):
            bus.publish_nowait(Tick(n=1))
            async with asyncio.timeout(20):
                while not bus.stats().refused:
                    await checkpoint()
        assert bus.stats().published == 0


async def test_a_peer_goes_on(url: str) -> None:
    """In memory only this bus is away: what a peer publishes meanwhile is missed, counted when the
    next one comes, and what waited before was delivered."""
    name = secrets.token_hex(6)
    bus, peer = EventBus("memory://" + name), EventBus("memory://" + name)
    gaps, recorder = with_gaps(bus), record(bus)
    async with bus, peer:
        await peer.publish("tick:0", Tick(n=1))
        async with away(bus):
            assert (await peer.publish("tick:0", Tick(n=2))).receivers == 0
        await peer.publish("tick:0", Tick(n=3))
        await gaps.reach(2)
        await settled(bus, peer)

    assert [message.event.n for message in recorder.of(Tick)] == [1, 3]
    assert [(gap.reason, gap.missed) for gap in gaps] == [("reconnect", None), ("sequence", 1)]


async def test_a_stop_while_away() -> None:
    """A bus that is stopped in an outage stays stopped, whoever waits is told, and it can be
    started again."""
    bus = memory(publish_timeout=20.0, drain_timeout=0.1)
    async with bus:
        async with away(bus):
            waiting = asyncio.create_task(bus.publish(Tick(n=1)))
            await checkpoint()
            await bus.stop()
        with pytest.raises(BusUnavailable, match="certainly not sent"):
            await soon(waiting)
        assert bus.health().state == "closed"
    async with bus:
        assert (await bus.publish(Tick(n=1))).receivers == 0


async def test_a_withdrawn_publish_is_not_sent_after_the_outage() -> None:
    """What nobody waits for any more is not sent when the outage is over."""
    bus = memory(publish_timeout=20.0)
    recorder = record(bus)
    async with bus:
        async with away(bus):
            waiting = asyncio.create_task(bus.publish(Tick(n=1)))
            await checkpoint()
            waiting.cancel()
            await asyncio.wait([waiting])
        await settled(bus)
    assert recorder.messages == []


async def test_a_server_that_is_not_the_tests(valkey: Server, private: Server) -> None:
    """`away` ends no server that it does not know; one that is named it does."""
    async with EventBus(valkey.url) as bus:
        with pytest.raises(EventBusError, match="on_server"):
            async with away(bus):
                pass
    async with EventBus(private.url) as bus:
        async with away(bus, private):
            assert not private.running
        assert bus.health().state == "live"


async def test_the_server_is_back_after_a_test_that_fails(private: Server) -> None:
    """An error inside the block comes out, and the server runs again."""
    async with EventBus(private.url) as bus:
        with pytest.raises(ZeroDivisionError):
            async with away(bus, private):
                raise ZeroDivisionError
        assert private.running
