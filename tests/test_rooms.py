"""Rooms in one process: clients, queues, names, outages. `test_rooms_cluster` has the processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from eventbus import (
    BusClosed,
    BusUnavailable,
    EventBus,
    EventBusError,
    Gap,
    InvalidChannel,
    InvalidEvent,
    PermissionDenied,
)
from eventbus._patterns import Pattern
from eventbus.rooms import Client, Rooms
from eventbus.server import Server
from tests.helpers import Seen, soon

LIMIT = 20.0


class Browser(Seen[Any]):
    """What a client was sent, as values; `frames` as they came. A gate that is shut holds it up."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[str | bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, frame: str | bytes) -> None:
        await self.gate.wait()
        self.frames.append(frame)
        message = json.loads(frame.partition(b"\n")[0] if isinstance(frame, bytes) else frame)
        self.append((message.get("event"), message.get("data")))


@asynccontextmanager
async def two(url: str, **options: Any) -> AsyncIterator[tuple[Rooms, Rooms]]:
    """Two nodes in this process."""
    buses = [EventBus(url, **options) for _ in range(2)]
    one, other = (Rooms(bus) for bus in buses)
    async with buses[0], buses[1], one, other:
        yield one, other


async def until(true: Callable[[], object]) -> None:
    """Let the others run until it is true."""
    async with asyncio.timeout(LIMIT):
        while not true():
            await checkpoint()


def listening(bus: EventBus) -> set[str]:
    """The rooms that a bus is subscribed to."""
    names = bus.health().subscriptions
    return {name.partition(":in:")[2] for name in names if ":in:" in name}


@pytest.fixture
def bus(url: str) -> EventBus:
    """A bus on each transport in turn."""
    return EventBus(url)


# -- A client --------------------------------------------------------------------------------------


async def test_a_client_alone(bus: EventBus) -> None:
    """What is emitted to one client reaches that client only, as JSON that anybody can read."""
    mine, other = Browser(), Browser()
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(mine.send) as client, rooms.connect(other.send):
        await client.emit("hi", {"n": 1})
        await client.reply(7, "yes")
        await soon(mine.reach(2))
        assert mine.frames == ['{"event":"hi","data":{"n":1}}', '{"ack":7,"data":"yes"}']
        assert other == []
        assert client.rooms == {client.id}


async def test_bytes_are_a_binary_frame(url: str) -> None:
    """Bytes follow the JSON after a newline, here and on another node."""
    mine, theirs = Browser(), Browser()
    async with two(url) as (here, there), here.connect(mine.send), there.connect(theirs.send):
        await here.emit("image", b"\x00\n\xff")
        await soon(theirs.reach(1))
        assert mine.frames == theirs.frames == [b'{"event":"image"}\n\x00\n\xff']


async def test_a_model_is_data(bus: EventBus) -> None:
    """A pydantic model travels as its JSON; what has no JSON is refused, and nothing is sent."""

    class Point(BaseModel):
        x: int

    mine = Browser()
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(mine.send) as client:
        await rooms.emit("point", [Point(x=1)])
        with pytest.raises(InvalidEvent, match="not JSON serializable: object"):
            await rooms.emit("wrong", object())
        with pytest.raises(InvalidEvent):
            async with rooms.connect(mine.send, data=object()):
                pass
        await client.emit("end")
        assert await soon(mine.reach(2)) == [("point", [{"x": 1}]), ("end", None)]


async def test_a_websocket_object_is_taken_as_it_is(bus: EventBus) -> None:
    """An object with `send_text` and `send_bytes`, as frameworks have it, is a sender."""

    class WebSocket:
        def __init__(self) -> None:
            self.sent: Seen[tuple[str, object]] = Seen()

        async def send_text(self, data: str) -> None:
            self.sent.append(("text", data))

        async def send_bytes(self, data: bytes) -> None:
            self.sent.append(("bytes", data))

    socket = WebSocket()
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(socket) as client:
        await client.emit("a")
        await client.emit("b", b"1")
        assert await soon(socket.sent.reach(2)) == [
            ("text", '{"event":"a","data":null}'),
            ("bytes", b'{"event":"b"}\n1'),
        ]


async def test_what_a_client_sends_is_read(bus: EventBus) -> None:
    """Events are values with their wish for an answer; anything else is refused, and harmless."""
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(Browser().send) as client:
        assert client.receive('{"event":"say","data":[1],"ack":3}') == ("say", [1], 3)
        assert client.receive(b'{"event":"say"}') == ("say", None, None)
        assert client.receive(b'{"event":"say"}\n\x00\n') == ("say", b"\x00\n", None)
        assert client.receive('{"ack":"of nobody","data":1}') is None
        for wrong in ("", "[]", "{}", '{"event":1}', '{"ack":1}', "\ud800", b"\xff\xfe"):
            with pytest.raises(InvalidEvent):
                client.receive(wrong)


async def test_the_error_of_a_block_is_not_wrapped(bus: EventBus) -> None:
    """What the user's code raises inside `connect` leaves it as it is, and the client is gone."""
    rooms = Rooms(bus)
    async with bus, rooms:
        with pytest.raises(ZeroDivisionError):
            async with rooms.connect(Browser().send, "a"):
                raise ZeroDivisionError
        assert (await rooms.fetch()).clients == ()


async def test_an_id_is_taken_once(bus: EventBus) -> None:
    """A second client of one id on one node is refused, and the first one stays."""
    mine = Browser()
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(mine.send, "a"):
        with pytest.raises(EventBusError, match="connected to this node already"):
            async with rooms.connect(Browser().send, "a"):
                pass
        await rooms.to("a").emit("still")
        await soon(mine.reach(1))


async def test_a_lost_connection_ends_the_block(bus: EventBus) -> None:
    """A `send` that raises ends the client's block, and `closed` says why."""

    async def broken(frame: object) -> None:
        raise ConnectionResetError("gone")

    rooms = Rooms(bus)
    async with bus, rooms:
        async with rooms.connect(broken) as client:
            await client.emit("x")
            await soon(asyncio.Event().wait(), LIMIT)
        assert client.closed == "lost"
        await client.emit("nobody hears this")
        with pytest.raises(EventBusError, match="not connected any more"):
            await client.join("a")


async def test_a_disconnected_client_gets_what_waits(bus: EventBus) -> None:
    """Disconnecting ends the block after what was sent before; the rest of the app goes on."""
    mine = Browser()
    rooms = Rooms(bus)
    async with bus, rooms:
        async with rooms.connect(mine.send, "a") as client:
            await rooms.to("a").emit("bye")
            assert await rooms.to("a").disconnect() == ()
            await rooms.to("a").emit("too late")
            await soon(asyncio.Event().wait(), LIMIT)
        assert client.closed == "disconnected"
        assert mine == [("bye", None)]


@pytest.mark.parametrize("name", ["", "a\nb", "\x00", "x" * 256, "é" * 128, "\ud800", 7])
async def test_names_are_checked(name: Any) -> None:
    """A name that cannot be part of a channel is refused everywhere, before anything happens."""
    bus = EventBus("memory://rooms-names")
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(Browser().send) as client:
        for attempt in (
            lambda: client.join(name),
            lambda: rooms.to(name).emit("x"),
            lambda: rooms.except_(name).emit("x"),
            lambda: rooms.join(name),
            lambda: rooms.connect(Browser().send, name).__aenter__(),
        ):
            with pytest.raises(InvalidChannel):
                await attempt()
        assert client.rooms == {client.id}


async def test_strange_names_are_rooms(url: str) -> None:
    """Colons, globs and braces in a name mean nothing: it is that room, and no other."""
    strange = ["a:b", "*", "all", "{x}", "a b", "é", "?[a]\\", "x" * 255]
    async with two(url) as (here, there), AsyncExitStack() as stack:
        for name in strange:
            browser = Browser()
            client = await stack.enter_async_context(there.connect(browser.send))
            await client.join(name)
            await here.to(name).emit("test", name)
            assert await soon(browser.reach(1)) == [("test", name)]
            await client.leave(name)


def test_a_namespace_has_no_colon() -> None:
    """The name of a namespace cannot reach into another; nobody is meant by no room."""
    bus = EventBus("memory://rooms-namespace")
    with pytest.raises(InvalidChannel):
        Rooms(bus, "/a:in")
    with pytest.raises(InvalidChannel):
        Rooms(bus, "x" * 51)
    with pytest.raises(InvalidChannel):
        Rooms(bus).to()


async def test_options_are_checked(bus: EventBus) -> None:
    """A queue without room, or an unknown policy, is refused."""
    rooms = Rooms(bus)
    wrong: list[dict[str, Any]] = [{"max_queue": 0}, {"overflow": "wait"}]
    async with bus, rooms:
        for options in wrong:
            with pytest.raises(ValueError, match="max_queue"):
                async with rooms.connect(Browser().send, **options):
                    pass


# -- Slow clients ----------------------------------------------------------------------------------


async def test_a_frame_is_encoded_once(url: str) -> None:
    """Every client of a node gets the very same object, on the emitting node and on another."""
    async with two(url) as (here, there), AsyncExitStack() as stack:
        browsers = [[Browser() for _ in range(5)] for _ in range(2)]
        for rooms, group in zip((here, there), browsers, strict=True):
            for browser in group:
                await stack.enter_async_context(rooms.connect(browser.send))
        await here.emit("test", "text")
        for group in browsers:
            for browser in group:
                await soon(browser.reach(1))
            assert len({id(browser.frames[0]) for browser in group}) == 1


async def test_a_slow_client_delays_nobody_and_is_closed(bus: EventBus) -> None:
    """A client that takes nothing is closed when its queue is full; all others got everything."""
    slow, quick = Browser(), Browser()
    slow.gate.clear()
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(quick.send, max_queue=3):
        async with rooms.connect(slow.send, max_queue=3) as client:
            for n in range(10):
                await rooms.emit("test", n)
                await soon(quick.reach(n + 1))
            await soon(asyncio.Event().wait(), LIMIT)
        assert client.closed == "slow"
        assert slow == []
        assert len((await rooms.fetch()).clients) == 1


async def test_a_slow_client_may_lose_the_oldest(bus: EventBus) -> None:
    """With "drop_oldest" the newest stay, and the lost ones are counted."""
    slow = Browser()
    slow.gate.clear()
    rooms = Rooms(bus)
    async with bus, rooms:
        async with rooms.connect(slow.send, max_queue=3, overflow="drop_oldest") as client:
            for n in range(10):
                await rooms.emit("test", n)
                await checkpoint()
            slow.gate.set()
            await until(lambda: ("test", 9) in slow)
            assert slow[-3:] == [("test", 7), ("test", 8), ("test", 9)]
            assert client.dropped == 10 - len(slow)
        assert client.closed is None


async def test_a_client_that_takes_nothing_does_not_hold_up_its_end(bus: EventBus) -> None:
    """A disconnected client has a moment to take what waits, and then its block ends anyway."""
    stuck = Browser()
    stuck.gate.clear()
    rooms = Rooms(bus)
    async with bus, rooms:
        async with rooms.connect(stuck.send, "a"):
            await rooms.emit("test")
            await rooms.disconnect()
            await soon(asyncio.Event().wait(), LIMIT)
        assert stuck == []


# -- Rooms -----------------------------------------------------------------------------------------


async def test_broadcast_from_a_client(url: str) -> None:
    """`broadcast` and `to` of a client mean everyone but this client, on every node."""
    a, b, c = Browser(), Browser(), Browser()
    async with (
        two(url) as (here, there),
        here.connect(a.send) as client,
        here.connect(b.send) as second,
        there.connect(c.send) as third,
    ):
        for each in (client, second, third):
            await each.join("room")
        await client.broadcast.emit("all")
        await client.to("room").emit("room")
        await client.to("room").except_(second.id).emit("some")
        await here.emit("end")
        for browser in (a, b, c):
            await until(lambda browser=browser: ("end", None) in browser)
    assert [event for event, _ in a] == ["end"]
    assert [event for event, _ in b] == ["all", "room", "end"]
    assert [event for event, _ in c] == ["all", "room", "some", "end"]


async def test_emits_of_one_node_keep_their_order(url: str) -> None:
    """Whatever the kinds of its targets, a node's emits reach a client in their order."""
    browser = Browser()
    async with two(url) as (here, there), there.connect(browser.send, "a") as client:
        await client.join("x", "y")
        targets = [here, here.to("x"), here.to("x", "y"), here.to("a"), here.except_("z")]
        async with asyncio.TaskGroup() as tasks:
            for n in range(200):
                tasks.create_task(targets[n % 5].emit("test", n))
        await soon(browser.reach(200), LIMIT)
        assert [data for _, data in browser] == list(range(200))


async def test_who_has_joined_misses_nothing(url: str) -> None:
    """What another node publishes after `join` has returned arrives, however often one joins."""
    browser = Browser()
    bus, other = EventBus(url), EventBus(url)
    here, there = Rooms(other), Rooms(bus)
    async with other, here, bus, there, there.connect(browser.send) as client:
        for n in range(50):
            await client.join("room")
            assert "room" in listening(bus)
            await here.to("room").emit("test", n)
            await soon(browser.reach(n + 1))
            await client.leave("room")
            await here.to("room").emit("missed", n)
        assert [data for _, data in browser] == list(range(50))


async def test_a_node_hears_only_the_rooms_of_its_members(bus: EventBus) -> None:
    """A room is subscribed to when its first member has joined, until its last one has left."""
    rooms = Rooms(bus)
    async with bus, rooms:
        async with rooms.connect(Browser().send, "a") as a, rooms.connect(Browser().send, "b") as b:
            await a.join("x", "y")
            await b.join("x")
            assert listening(bus) == {"a", "b", "x", "y"}
            await a.leave("x", "y", "never joined")
            await until(lambda: listening(bus) == {"a", "b", "x"})
            await b.leave("x")
            await until(lambda: listening(bus) == {"a", "b"})
            await b.join("z")
        await until(lambda: listening(bus) == set())


async def test_many_join_at_once(url: str) -> None:
    """A thousand clients that join and leave at the same time end with the right subscriptions."""
    async with two(url) as (here, there), AsyncExitStack() as stack:
        browsers = [Browser() for _ in range(300)]
        clients = [
            await stack.enter_async_context(there.connect(browser.send)) for browser in browsers
        ]

        async def hop(n: int, client: Client) -> None:
            await client.join(f"room-{n}", f"half-{n % 2}", "all")
            await client.leave(f"room-{n}", f"half-{n % 2}")
            await client.join(f"room-{n}")

        await soon(asyncio.gather(*(hop(n, client) for n, client in enumerate(clients))), LIMIT)
        for n in range(300):
            await here.to(f"room-{n}").emit("test", n)
        for n, browser in enumerate(browsers):
            assert await soon(browser.reach(1), LIMIT) == [("test", n)]
        found = await there.local.fetch(timeout=LIMIT)
        assert {len(member.rooms) for member in found.clients} == {3}


async def test_a_long_answer_comes_in_parts(url: str) -> None:
    """A fetch finds more clients than fit into one message, with all their data."""
    async with two(url) as (here, there), AsyncExitStack() as stack:
        data = "x" * 1000
        for n in range(1200):
            await stack.enter_async_context(there.connect(Browser().send, f"c{n}", data))
        found = await here.fetch(timeout=LIMIT)
        assert {member.id for member in found.clients} == {f"c{n}" for n in range(1200)}
        assert {member.data for member in found.clients} == {data}
        assert found.missing == ()


async def test_a_cancelled_join_has_not_happened(url: str) -> None:
    """A join that is cancelled while it waits leaves neither a member nor a subscription."""
    bus = EventBus(url)
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(Browser().send, "a") as client:
        task = asyncio.create_task(client.join("room"))
        await checkpoint()
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: task.cancelled() == (client.rooms == {"a"}))
        await client.leave("room")
        await until(lambda: listening(bus) == {"a"})


async def test_a_node_whose_answer_is_too_long_is_missing(url: str) -> None:
    """A node that cannot send what it knows is named, and its part is not taken for the whole."""
    data = "x" * 30_000
    async with (
        two(url, max_payload=20_000) as (here, there),
        there.connect(Browser().send, "long", data),
    ):
        assert await here.fetch(timeout=1.0) == ((), (there.node,))


# -- Calls -----------------------------------------------------------------------------------------


async def test_only_who_was_asked_answers_and_once(url: str) -> None:
    """A reply of a client that was not asked, or a second one, is not counted."""
    a, b = Browser(), Browser()
    async with (
        two(url) as (here, there),
        here.connect(a.send, "a") as asked,
        there.connect(b.send, "b") as other,
    ):
        call = asyncio.create_task(here.to("a").call("q", timeout=LIMIT))
        await soon(a.reach(1))
        ack = json.loads(a.frames[0])["ack"]
        for client, data in ((other, "forged"), (asked, "true"), (asked, "again")):
            assert client.receive(json.dumps({"ack": ack, "data": data})) is None
        assert await soon(call) == ({"a": "true"}, (), ())
    assert b == []


async def test_a_client_that_leaves_is_not_waited_for(url: str) -> None:
    """A call ends when those who did not answer are gone, and names them."""
    async with two(url) as (here, there):
        browser = Browser()
        async with there.connect(browser.send, "b"):
            call = asyncio.create_task(here.call("q", timeout=60.0))
            await soon(browser.reach(1))
        assert await soon(call, LIMIT) == ({}, ("b",), ())


async def test_a_local_call(url: str) -> None:
    """`local` asks the clients of this node only, and no node is missing."""
    async with two(url) as (here, there):
        a, b = Browser(), Browser()
        async with here.connect(a.send, "a"), there.connect(b.send, "b"):
            call = asyncio.create_task(here.local.call("q", timeout=LIMIT))
            await soon(a.reach(1))
            assert (await here.local.fetch()).clients[0].id == "a"
            await here.local.disconnect()
            assert await soon(call) == ({}, ("a",), ())
        assert b == []


async def test_a_failing_server_handler_is_missing(url: str) -> None:
    """A node whose handler raises does not keep the asker waiting, and is named."""
    buses = EventBus(url), EventBus(url)
    here, there = map(Rooms, buses)
    errors: Seen[BaseException] = Seen()

    @buses[1].exception_handler(ZeroDivisionError)
    async def note(error: ZeroDivisionError, message: object) -> None:
        errors.append(error)

    @there.servers.on("divide")
    def divide(data: int) -> float:
        return 1 / data

    async with buses[0], buses[1], here, there:
        assert (await here.servers.call("divide", 2, LIMIT)).replies == {there.node: 0.5}
        assert await here.servers.call("divide", 0, LIMIT) == ({}, (there.node,), (there.node,))
        assert await here.servers.call("unknown", 0, LIMIT) == ({}, (there.node,), (there.node,))
        await soon(errors.reach(1))


# -- Life ------------------------------------------------------------------------------------------


async def test_rooms_start_at_their_first_use(bus: EventBus) -> None:
    """Without `async with rooms` the first connect starts them; before the bus runs it cannot."""
    rooms = Rooms(bus)
    with pytest.raises(BusClosed):
        async with rooms.connect(Browser().send):
            pass
    async with bus:
        async with rooms.connect(Browser().send) as client:
            assert (await rooms.fetch()).clients[0].id == client.id
        with pytest.raises(EventBusError, match="before its start"):
            Rooms(bus, "/late").on_gap(tell_nobody)


async def tell_nobody(gap: Gap, room: str | None) -> None:
    """A gap handler."""


async def test_rooms_on_a_bus_that_starts_again(url: str) -> None:
    """After the bus was stopped and started, whoever connects is found and heard again."""
    bus, other = EventBus(url), EventBus(url)
    rooms, there = Rooms(bus), Rooms(other)
    async with other, there:
        for _ in range(2):
            browser = Browser()
            async with bus, rooms.connect(browser.send, "a") as client:
                await client.join("room")
                await there.to("room").emit("test")
                await soon(browser.reach(1))


async def test_stopping_ends_the_clients(bus: EventBus) -> None:
    """When the rooms stop, every client's block ends, and says why."""
    rooms = Rooms(bus)
    async with bus:
        await rooms.__aenter__()
        async with rooms.connect(Browser().send) as client:
            await rooms.__aexit__(None, None, None)
            await soon(asyncio.Event().wait(), LIMIT)
        assert client.closed == "stopped"
        await until(lambda: listening(bus) == set())


async def test_a_cancelled_connect_leaves_nothing(bus: EventBus) -> None:
    """A block that is cancelled from outside is cancelled, and its client is gone."""
    rooms = Rooms(bus)
    entered = asyncio.Event()

    async def stay() -> None:
        async with rooms.connect(Browser().send, "a"):
            entered.set()
            await asyncio.Event().wait()

    async with bus, rooms:
        task = asyncio.create_task(stay())
        await soon(entered.wait())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: listening(bus) == set())


# -- Outages ---------------------------------------------------------------------------------------


@pytest.fixture
def private() -> Iterator[Server]:
    """A server of this test alone, to be stopped and started."""
    with Server() as server:
        yield server


async def test_local_delivery_goes_on_while_redis_is_away(private: Server) -> None:
    """Without Redis the clients of a node still hear each other and may come and join; the emit
    says that the others were not reached. Back again, all is heard, and the app was told."""
    told: Seen[tuple[str, str | None]] = Seen()
    bus, other = (
        EventBus(private.url, publish_timeout=0.2, heartbeat=0.5, connect_timeout=1.0)
        for _ in range(2)
    )
    here, there = Rooms(bus), Rooms(other)

    @here.on_gap
    async def tell(gap: Gap, room: str | None) -> None:
        told.append((gap.reason, room))
        await here.local.emit("missed", room)

    async with bus, other, here, there:
        a, b = Browser(), Browser()
        async with here.connect(a.send, "a") as first:
            private.stop()
            await until(lambda: not bus.health())
            with pytest.raises(BusUnavailable):
                await here.emit("test", 1)
            await soon(a.reach(1))
            async with here.connect(b.send, "b") as second:
                assert await second.join("room") is False
                assert await first.join("room") is False
                with pytest.raises(BusUnavailable):
                    await first.to("room").emit("test", 2)
                assert await soon(b.reach(1)) == [("test", 2)]
                assert (await here.fetch()).missing == (there.node,)
                private.start()
                await soon(told.reach(2), LIMIT)
                await until(lambda: {("reconnect", None), ("reconnect", "room")} <= set(told))
                await until(lambda: {bus.health().state, other.health().state} == {"live"})
                async with asyncio.timeout(LIMIT):
                    while ("test", 3) not in b or ("test", 3) not in a:
                        await there.to("room").emit("test", 3)
                assert ("missed", "room") in a
                assert (await here.fetch(timeout=LIMIT)).missing == ()


async def test_an_emit_that_finds_no_redis_may_be_dropped(private: Server) -> None:
    """With `outage="drop"` an emit reaches the clients here and raises nothing."""
    bus = EventBus(private.url, outage="drop", publish_timeout=0.2, heartbeat=0.5)
    rooms, browser = Rooms(bus), Browser()
    async with bus, rooms, rooms.connect(browser.send):
        private.stop()
        await until(lambda: not bus.health())
        assert await rooms.emit("test") == 1
        await soon(browser.reach(1))


async def test_a_gap_of_a_room_is_told_with_its_name(url: str) -> None:
    """When messages of one room are missing, the app hears of that room, and how many."""
    told: Seen[tuple[int | None, str | None]] = Seen()
    bus = EventBus(url)
    rooms = Rooms(bus)

    @rooms.on_gap
    async def tell(gap: Gap, room: str | None) -> None:
        told.append((gap.missed, room))

    def emission(number: int) -> bytes:
        data = {"rooms": ["a:b"], "but": [], "text": "{}", "blob": None}
        event = {"specversion": "1.0", "id": str(number), "source": "other/1"}
        event |= {"type": "eventbus.rooms.emission", "time": "2026-01-01T00:00:00.000Z"}
        return json.dumps(event | {"busseq": number, "data": data}).encode()

    async with bus, rooms, rooms.connect(Browser().send) as client:
        await client.join("a:b")
        for number in (1, 2, 6):
            await bus.publish_raw("rooms:/:in:a:b", emission(number))
        assert await soon(told.reach(1)) == [(3, "a:b")]


async def test_a_denied_room_hurts_only_itself(private: Server) -> None:
    """A room that Redis denies to this user raises for whoever joins it, and undoes only that."""
    async with EventBus(private.url) as admin:
        await admin.redis().execute_command(
            *"ACL SETUSER rooms on >pw +@all resetchannels &rooms:/:all &rooms:/:servers".split(),
            *"&rooms:/:node:* &rooms:/:in:ok* &__eventbus__:*".split(),
        )
    bus = EventBus(private.url, redis_options={"username": "rooms", "password": "pw"})
    rooms = Rooms(bus)
    browser = Browser()
    async with bus, rooms, rooms.connect(browser.send, "ok-1") as client:

        async def join(name: str) -> object:
            try:
                return await client.join(name)
            except PermissionDenied as error:
                return error.patterns

        found = await asyncio.gather(*map(join, ("ok-2", "secret", "ok-3")))
        assert found == [True, ("rooms:/:in:secret",), True]
        with pytest.raises(PermissionDenied):
            await client.join("ok-2", "secret", "ok-4")
        assert client.rooms == {"ok-1", "ok-2", "ok-3"}
        await until(lambda: listening(bus) == {"ok-1", "ok-2", "ok-3"})


# -- What the engine owes to many rooms ------------------------------------------------------------


async def test_many_patterns_cost_no_more_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding and discarding patterns of a route compares each with a few others, not with all."""
    compared = 0
    equals = Pattern.__eq__

    def counted(one: Pattern, other: object) -> bool:
        nonlocal compared
        compared += 1
        return equals(one, other)

    monkeypatch.setattr(Pattern, "__eq__", counted)
    async with EventBus("memory://rooms-many") as bus:
        route = await bus.attach(ignore, "first")
        names = [f"room-{n}" for n in range(300)]
        await route.add(*names)
        await route.discard(*names)
    assert compared < 20 * len(names)


async def test_stopping_with_many_subscriptions_looks_at_each_a_few_times() -> None:
    """A bus that stops does not walk all of its subscriptions for each that ends."""

    class Walked(dict[Any, int]):
        walks = 0

        def __iter__(self) -> Iterator[Any]:
            self.walks += 1
            return super().__iter__()

    bus = EventBus("memory://rooms-stop")
    async with bus:
        await bus.attach(ignore, *(f"room-{n}" for n in range(300)))
        assert bus._run is not None
        router = bus._run.receiver.router
        router.live = walked = Walked(router.live)
    assert walked.walks < 10


async def ignore(event: dict[str, Any]) -> None:
    """A handler."""
