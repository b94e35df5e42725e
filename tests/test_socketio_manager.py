"""`Manager` on three server processes, with clients of python-socketio in this one."""

from __future__ import annotations

import asyncio
import json
import secrets
import types
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
import redis.asyncio
import socketio

import eventbus.socketio.manager as module
from eventbus import (
    BusClosed,
    EventBus,
    EventBusError,
    Gap,
    PayloadTooLarge,
)
from eventbus.server import Server
from eventbus.socketio import Manager
from tests.helpers import Lines, Seen, soon
from tests.socketio.stage import Hall, Remote, guest, only, servers

NOTHING: list[Any] = [[], [], []]
LIVE = "bus.health().state == 'live'"
PUBLISHES = """[
    one
    for one in await asyncio.gather(bus.publish_raw("nobody", b""), return_exceptions=True)
    if not isinstance(one, Exception)
]"""


@pytest.fixture(scope="module")
async def processes(valkey: Server) -> AsyncIterator[list[Remote]]:
    """Three processes, for all tests of this file that break nothing."""
    async with servers(valkey.url, 3) as found:
        yield found


class Shaken(NamedTuple):
    """A server of Redis that a test may break, and repairs; two of ours on it, in one namespace."""

    redis: Server
    hall: Hall

    async def up(self) -> None:
        """See to it that both hear, also when this is the first test of its process."""
        if not self.redis.running:
            for server in self.hall.servers:
                await server.until("[line for line in log if 'Redis is away' in line]")
            self.redis.start()
            await self.again()

    async def again(self) -> None:
        """Wait until both hear again, and forget what they noted before."""
        for server in self.hall.servers:
            await server.until(f"{LIVE} and gaps")
            await server("gaps.clear(); log.clear()")


@pytest.fixture(scope="module")
async def shaken() -> AsyncIterator[Shaken]:
    """The servers notice soon what happens to Redis, which is away when they start; nobody but
    their first clients starts the buses."""
    options = {"heartbeat": 0.5, "publish_timeout": 0.5}
    with Server(port=0) as redis:
        redis.kill()
        async with (
            servers(redis.url, 2, start="nobody", patience=0.1, bus=options) as found,
            guest(found[0], "all") as first,
            guest(found[1], "all") as second,
        ):
            yield Shaken(redis, Hall("/", found, [first, second]))


@pytest.fixture
async def hall(processes: list[Remote]) -> AsyncIterator[Hall]:
    """A new namespace."""
    space = f"/{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        guests = [
            await stack.enter_async_context(guest(one, f"room{number}", "all", namespace=space))
            for number, one in enumerate(processes)
        ]
        yield Hall(space, processes, guests)


# -- Emits -----------------------------------------------------------------------------------------


async def test_emit_to_everyone(hall: Hall) -> None:
    """An emit reaches the clients of all servers once, with its data as it was."""
    data = [1, "é", {"3": [True, None, 2**60]}]
    await hall.emit(f"'hi', {data!r}")
    assert await hall.heard() == only(0, 1, 2, event=("hi", data))


async def test_emit_to_a_room(hall: Hall) -> None:
    """An emit to a room reaches its members on another server, and nobody else."""
    await hall.emit("'hi', to='room1'")
    assert await hall.heard() == only(1)


async def test_emit_to_several_rooms(hall: Hall) -> None:
    """Who is in several of the rooms gets the emit once; who is in none does not get it."""
    await hall.run(f"enter_room({hall.guests[2].sid!r}, 'more')", 2)
    await hall.emit("'hi', to=['room2', 'more', 'room0', 'nobody']")
    assert await hall.heard() == only(0, 2)


async def test_emit_to_a_client_elsewhere(hall: Hall) -> None:
    """A client is reached by its id from every server."""
    for number in range(3):
        await hall.emit(f"'hi', to={hall.guests[1].sid!r}", number)
    assert await hall.guests[1].next() == ("hi",)
    assert await hall.guests[1].next() == ("hi",)
    assert await hall.guests[1].next() == ("hi",)
    assert await hall.heard() == NOTHING


async def test_emit_to_a_client_here_stays_here(hall: Hall) -> None:
    """An emit to clients of the same server is not published."""
    before = await hall.servers[0]("bus.stats().published")
    await hall.emit(f"'hi', to={hall.guests[0].sid!r}")
    await hall.emit(f"'hi', to=[{hall.guests[0].sid!r}]")
    assert await hall.servers[0]("bus.stats().published") == before
    assert await hall.heard() == [[("hi",), ("hi",)], [], []]


async def test_emit_but_to_the_sender(hall: Hall) -> None:
    """`skip_sid` is kept on every server, for one client, and for a list of them."""
    first, second, _ = (found.sid for found in hall.guests)
    await hall.emit(f"'hi', skip_sid={second!r}")
    assert await hall.heard() == only(0, 2)
    await hall.emit(f"'hi', to='all', skip_sid=[{first!r}, {second!r}]")
    assert await hall.heard() == only(2)


async def test_emit_in_a_namespace(hall: Hall, processes: list[Remote]) -> None:
    """An emit in one namespace is not heard in another."""
    other = f"/{secrets.token_hex(4)}"
    async with guest(processes[1], namespace=other) as stranger:
        await processes[0](f"await sio.emit('hi', namespace={other!r})")
        assert await stranger.next() == ("hi",)
    assert await hall.heard() == NOTHING


async def test_emit_binary(hall: Hall) -> None:
    """Bytes are bytes on the other side, at every depth, and a number of arguments stays one."""
    await hall.emit("'hi', (b'\\x00\\xff', {'deep': [b'1', 'text']}, None)")
    await hall.emit("'none', ()")
    wanted = ("hi", b"\x00\xff", {"deep": [b"1", "text"]}, None)
    assert await hall.heard() == [[wanted, ("none",)]] * 3


async def test_emits_keep_their_order(hall: Hall) -> None:
    """What one server emits arrives in its order, whatever the rooms."""
    lines = [
        "for number in range(200):",
        "    room = ['all', None, 'room1', ['room1', 'all']][number % 4]",
        f"    await sio.emit('hi', number, to=room, namespace={hall.space!r})",
    ]
    await hall.servers[0]("\n".join(lines))
    wanted = [("hi", number) for number in range(200)]
    some = [("hi", number) for number in range(200) if number % 4 != 2]
    assert await hall.heard() == [some, wanted, some]


async def test_an_emit_that_is_ignored_by_the_queue_stays_here(hall: Hall) -> None:
    """`ignore_queue` is for the clients of one server."""
    await hall.emit("'hi', ignore_queue=True", 1)
    assert await hall.heard() == only(1)


async def test_data_is_not_decoded_where_nobody_is_meant(hall: Hall) -> None:
    """A server without a member of the room does not read the data of the emit."""
    spy = [
        "import json, types",
        "read = []",
        "loads = lambda text: (read.append(text), json.loads(text))[1]",
        "manager.json = types.SimpleNamespace(dumps=json.dumps, loads=loads)",
    ]
    for server in hall.servers:
        await server("\n".join(spy))
    await hall.emit("'hi', 1, to='room1'")
    await hall.emit("'hi', 2, to='all'")
    await hall.heard()
    assert await hall.servers[1]("read") == ["[1]", "[2]", "[]"]
    assert await hall.servers[2]("read") == ["[2]", "[]"]


# -- Callbacks -------------------------------------------------------------------------------------


async def test_call_elsewhere(hall: Hall) -> None:
    """A call brings the answer of a client of another server, and of one's own."""
    for number, found in enumerate(hall.guests):
        found.answer = ("yes", number)
        assert await hall.run(f"call('ok?', 5, to={found.sid!r})") == ["yes", number]
        assert await found.next() == ("ok?", 5)


async def test_call_elsewhere_with_bytes(hall: Hall) -> None:
    """Bytes come back as bytes."""
    hall.guests[2].answer = {"blob": b"\x00\xff"}
    answer = await hall.run(f"call('ok?', b'\\x01', to={hall.guests[2].sid!r})")
    assert answer == {"blob": repr(b"\x00\xff")}
    assert await hall.guests[2].next() == ("ok?", b"\x01")


async def test_call_that_nobody_answers(hall: Hall) -> None:
    """A call to a client that does not exist waits for an answer until the caller gives up."""
    with pytest.raises(RuntimeError, match="TimeoutError"):
        await hall.servers[0](
            "async with asyncio.timeout(0.2): await sio.call('ok?', to='nobody', timeout=60)"
        )


async def test_callback_of_a_room(hall: Hall) -> None:
    """A callback is called once, with what the first member of the room answered."""
    for number, found in enumerate(hall.guests):
        found.answer = number
    await hall.servers[0]("answers = []")
    await hall.emit("'ok?', to='all', callback=lambda *found: answers.append(found)")
    for number, found in enumerate(hall.guests):  # the answers to these come after those
        assert await hall.run(f"call('ok?', to={found.sid!r})") == number
    assert await hall.servers[0]("answers") in ([[0]], [[1]], [[2]])


async def test_a_callback_that_fails(hall: Hall) -> None:
    """A callback that raises is logged, and the next ones are called."""
    hall.guests[1].answer = hall.guests[2].answer = "yes"
    await hall.servers[0]("async def failing(answer): raise ValueError(answer)")
    await hall.emit(f"'ok?', to={hall.guests[1].sid!r}, callback=failing")
    assert await hall.servers[0].until("[line for line in log if 'failed' in line]")
    assert await hall.run(f"call('ok?', to={hall.guests[2].sid!r})") == "yes"


async def test_a_callback_that_calls(hall: Hall) -> None:
    """A callback may itself wait for the answer of a client elsewhere."""
    first, second = hall.guests[1:]
    first.answer, second.answer = "one", "two"
    lines = [
        "done = asyncio.Event()",
        "async def called(answer):",
        f"    names['got'] = answer, await sio.call('b', to={second.sid!r}, namespace=space)",
        "    done.set()",
    ]
    await hall.servers[0](f"space = {hall.space!r}\n" + "\n".join(lines))
    await hall.emit(f"'a', to={first.sid!r}, callback=called")
    await hall.servers[0]("await done.wait()")
    assert await hall.servers[0]("got") == ["one", "two"]


# -- Orders ----------------------------------------------------------------------------------------


async def test_rooms_of_a_client_elsewhere(hall: Hall) -> None:
    """A client of another server enters and leaves, in the order of the emits around it."""
    sid = hall.guests[1].sid
    for words in ("'hi', 1", f"enter_room({sid!r}, 'x')", "'hi', 2", f"leave_room({sid!r}, 'x')"):
        await (hall.run(words) if words[0] != "'" else hall.emit(f"{words}, to='x'"))
    await hall.emit("'hi', 3, to='x'")
    assert await hall.heard() == only(1, event=("hi", 2))


async def test_close_room(hall: Hall) -> None:
    """A room that is closed has no member on any server."""
    await hall.run("close_room('all')")
    await hall.emit("'hi', to='all'")
    assert await hall.heard() == NOTHING


async def test_disconnect_elsewhere(hall: Hall) -> None:
    """A client of another server is disconnected, and the handler of its server called."""
    found = hall.guests[2]
    sid = found.sid
    await hall.run(f"disconnect({sid!r})")
    await soon(found.gone.wait())
    assert await hall.servers[2].until(f"{sid!r} in left")
    assert not await hall.servers[0](f"{sid!r} in left")


async def test_a_slow_disconnect_handler_delays_nobody(hall: Hall) -> None:
    """While a handler for the disconnect of one client waits, emits go on."""
    sid = hall.guests[1].sid
    await hall.servers[1]("hold = asyncio.Event()")
    await hall.run(f"disconnect({sid!r})")
    assert await hall.servers[1].until(f"{sid!r} in left")
    async with guest(hall.servers[1], namespace=hall.space) as other:
        await hall.emit("'hi'")
        assert await other.next() == ("hi",)
        await hall.servers[1]("hold.set(); names.pop('hold')")


async def test_disconnect_by_the_manager(hall: Hall) -> None:
    """What a manager without a server can do, that of a server can: disconnect, wherever."""
    for found in hall.guests[:2]:
        await hall.servers[0](f"await manager.disconnect({found.sid!r}, {hall.space!r})")
        await soon(found.gone.wait())


async def test_disconnect_here(hall: Hall) -> None:
    """A client of the same server is disconnected without the others."""
    found = hall.guests[0]
    before = await hall.servers[0]("bus.stats().published")
    await hall.run(f"disconnect({found.sid!r})")
    await soon(found.gone.wait())
    assert await hall.servers[0]("bus.stats().published") == before


# -- From outside ----------------------------------------------------------------------------------


async def test_write_only(hall: Hall, valkey: Server) -> None:
    """A process without a server emits, and moves and disconnects clients, wherever they are."""
    bus = EventBus(valkey.url)
    outside = Manager(bus, write_only=True)
    space, found = hall.space, hall.guests[1]
    async with bus:
        await outside.emit("hi", b"\x01", namespace=space, skip_sid=hall.guests[0].sid)
        assert [await other.next() for other in hall.guests[1:]] == [("hi", b"\x01")] * 2
        await outside.enter_room(found.sid, space, "x")
        await outside.emit("hi", namespace=space, room="x")
        await outside.leave_room(found.sid, space, "x")
        await outside.close_room("all", space)
        await outside.emit("hi", namespace=space, room=["x", "all"])
        await outside.emit("fence", namespace=space)
        assert [await other.heard() for other in hall.guests] == only(1)
        await outside.disconnect(found.sid, space)
        await soon(found.gone.wait())
        assert not await outside.can_disconnect(hall.guests[0].sid, space)
        await soon(hall.guests[0].gone.wait())
        assert bus.stats().received == 0


async def test_write_only_says_what_it_cannot() -> None:
    """Without a server there is nobody to hear an emit here: what fails is raised."""
    bus = EventBus("memory://outside")
    outside = Manager(bus, write_only=True)
    with pytest.raises(BusClosed):
        await outside.emit("hi")
    async with bus:
        with pytest.raises(RuntimeError, match="context of a server"):
            await outside.emit("hi", room="x", callback=print)
        await outside.emit("hi", room=[])
        assert bus.stats().published == 0


async def test_json_of_a_write_only_manager() -> None:
    """The data is written by the `json` that it was given."""
    bus = EventBus("memory://json")
    words = types.SimpleNamespace(dumps=lambda *_, **__: "[7]", loads=json.loads)
    outside = Manager(bus, "mine", write_only=True, json=words)
    async with bus, bus.subscribe("mine:all") as messages:
        await outside.emit("hi", object())
        assert (await soon(anext(aiter(messages)))).event["data"] == "[7]"


# -- Who starts the bus ----------------------------------------------------------------------------


async def test_a_manager_from_before_a_fork(valkey: Server) -> None:
    """Servers that were forked from one process, with one manager, hear each other."""
    async with servers(valkey.url, fork=2) as (one, two), guest(one) as first, guest(two) as second:
        second.answer = "yes"
        await one("await sio.emit('hi')")
        assert await first.next() == await second.next() == ("hi",)
        assert await one(f"await sio.call('ok?', to={second.sid!r})") == "yes"
        assert await second.next() == ("ok?",)


async def test_nobody_starts_the_bus_and_redis_is_away(shaken: Shaken) -> None:
    """The first client makes the manager start the bus. While Redis is away, a server serves its
    own clients; later it joins the others, and says that something was missed."""
    redis, hall = shaken
    for server in hall.servers:
        await server.until("[line for line in log if 'Redis is away' in line]")
    await hall.emit("'hi', 1")
    assert await hall.guests[0].next() == ("hi", 1)
    redis.start()
    await shaken.again()
    await hall.emit("'hi', 2")
    assert [await found.next() for found in hall.guests] == [("hi", 2)] * 2


async def test_the_manager_starts_and_stops_the_bus() -> None:
    """A bus that the manager has started is stopped with it, once, and can be started again."""
    bus = EventBus("memory://started")
    manager = Manager(bus)
    for _ in range(2):
        async with manager.lifespan():
            assert bus.health()
            await manager.start()
        await manager.stop()
        assert not bus.health()
    await manager.start()
    await bus.stop()
    async with manager.lifespan():
        assert bus.health()


async def test_a_bus_that_its_owner_runs_is_left_alone() -> None:
    """`start` and `stop` do nothing to a bus that somebody else has started."""
    bus = EventBus("memory://owned")
    manager = Manager(bus)
    async with bus:
        await manager.start()
        await manager.stop()
        assert bus.health()


async def test_a_start_that_is_refused() -> None:
    """What time does not heal is raised at the start, and the next start tries anew."""
    with Server(options=("--requirepass", "secret")) as redis:
        manager = Manager(EventBus(redis.url))
        for _ in range(2):
            with pytest.raises(EventBusError, match=r"(?i)auth"):
                await manager.start()


async def test_a_refusal_after_the_start(monkeypatch: pytest.MonkeyPatch, log: Lines) -> None:
    """A refusal that comes when nobody waits any more is logged, and tried again."""
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    monkeypatch.setattr(module, "_AGAIN", 0.1)
    with Server(port=0, options=("--requirepass", "secret")) as redis:
        redis.kill()
        manager = Manager(EventBus(redis.url, connect_timeout=0.3))
        async with manager.lifespan():
            redis.start()
            await log.hear("does not start")
            async with redis_client(redis.url.replace("//", "//:secret@")) as client:
                await client.config_set("requirepass", "")
            await log.hear("hear all nodes")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without python-socketio, or with an old one, one sentence says what to install."""
    monkeypatch.setattr(module, "_Base", object)
    with pytest.raises(EventBusError, match=r"pip install 'eventbus-redis\[socketio\]'"):
        Manager(EventBus("memory://missing"))


# -- When Redis is away ----------------------------------------------------------------------------


@asynccontextmanager
async def redis_client(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A client of one's own."""
    client = redis.asyncio.Redis.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


async def test_connections_killed(shaken: Shaken) -> None:
    """Whatever connections Redis closes, both servers hear each other again."""
    await shaken.up()
    redis, hall = shaken
    async with redis_client(redis.url) as client:
        for kind in ("pubsub", "normal"):
            await client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
            if kind == "pubsub":
                await shaken.again()
            for number, server in enumerate(hall.servers):
                await server.until(PUBLISHES)
                await hall.emit(f"'hi', {number}", number)
                assert [await found.next() for found in hall.guests] == [("hi", number)] * 2


async def test_redis_killed_and_back(shaken: Shaken) -> None:
    """Clients of the same server go on; the failure is logged once and counted; then all hear all,
    each emit once, and the app hears of the gap."""
    await shaken.up()
    redis, hall = shaken
    (one, two), (first, second) = hall.servers, hall.guests
    count = "bus.stats().refused + bus.stats().uncertain"
    before = await one(count)
    redis.kill()
    for number in range(3):
        await hall.emit(f"'away', {number}")
    assert [await first.next() for _ in range(3)] == [("away", number) for number in range(3)]
    assert await one(count) - before == 3
    assert len(await one("[line for line in log if 'does not reach' in line]")) == 1
    with pytest.raises(RuntimeError, match=r"BusUnavailable|PublishUncertain"):
        await one(f"await sio.call('ok?', to={second.sid!r})")
    with pytest.raises(RuntimeError, match="BusUnavailable"):
        await one(f"await sio.enter_room({second.sid!r}, 'x')")
    redis.start()
    for server in (one, two):
        assert await server.until(f"{LIVE} and gaps") == ["reconnect"]
    await hall.emit("'back'")
    assert await one.until("[line for line in log if 'again; 3 emits' in line]")
    await hall.emit("'back'", 1)
    assert await second.next() == ("back",)
    assert await second.next() == ("back",)
    assert await hall.heard() == [[("back",), ("back",)], []]
    await shaken.again()


async def test_redis_frozen_and_back(shaken: Shaken) -> None:
    """A server that answers nothing delays no client of the same server, and what it hands out when
    it goes on arrives once."""
    await shaken.up()
    redis, hall = shaken
    redis.freeze()
    await hall.emit("'frozen'")
    assert await hall.guests[0].next() == ("frozen",)
    assert await hall.servers[0].until("bus.health().state != 'live'")
    await hall.emit("'frozen'")
    assert await hall.guests[0].next() == ("frozen",)
    redis.thaw()
    await shaken.again()
    await hall.emit("'back'")
    heard = await hall.heard()
    assert heard[0] == [("back",)]
    assert heard[1] in ([("back",)], [("frozen",), ("back",)])


async def test_nonsense_on_the_channel(hall: Hall, valkey: Server) -> None:
    """Whatever is published on the channel, emits go on."""
    bus = EventBus(valkey.url)
    good = module.Emission(
        name="hi", namespace=hall.space, rooms=None, but=(), reply="x", ack=None, data="[]",
        blobs=(),
    )  # fmt: skip
    async with bus:
        for text in (b"", b"5", b"[]", b"{}", b"null", b"\xff", b'{"method": "emit"}'):
            await bus.publish_raw("socketio:all", text)
        for wrong in (
            {"data": "["},
            {"data": "5"},
            {"data": '[{"_placeholder":true,"num":9}]', "blobs": (b"1",)},
            {"rooms": ()},
        ):
            await bus.publish("socketio:all", good.model_copy(update=wrong))
        sid = hall.guests[0].sid
        for what, room in (("enter", hall.guests[0].sid), ("close", sid), ("enter", None)):
            order = module.Order(what=what, namespace=hall.space, sid=sid, room=room)
            await bus.publish("socketio:all", order)
    await hall.emit("'hi', 'still'")
    heard = await hall.heard()
    assert all(found[-1:] == [("hi", "still")] for found in heard)


async def test_what_is_the_callers_fault_is_raised() -> None:
    """An emit that is too large for the others is an error; the clients here have got it."""
    bus = EventBus("memory://large", max_payload=1000)
    manager = Manager(bus)
    socketio.AsyncServer(client_manager=manager)
    async with bus:
        with pytest.raises(PayloadTooLarge):
            await manager.emit("hi", "x" * 2000)
        with pytest.raises(ValueError, match="without a room"):
            await manager.emit("hi", callback=print)
    await manager.emit("hi")  # the bus was stopped: like an outage


async def test_a_slow_handler_delays_emits_only_for_a_while(
    monkeypatch: pytest.MonkeyPatch, log: Lines
) -> None:
    """When an emit finds that a client is gone, the app's handler for that holds the next emits up
    for a limited time."""
    monkeypatch.setattr(module, "_SLOW", 0.1)
    bus, other = EventBus("memory://slow"), EventBus("memory://slow")
    sio = socketio.AsyncServer(client_manager=Manager(bus))
    sent = Seen[Any]()
    hold = asyncio.Event()

    async def send(eio_sid: str, packet: Any) -> None:
        sent.append(packet.data)
        if len(sent) == 1:
            await hold.wait()

    monkeypatch.setattr(sio, "_send_eio_packet", send)
    outside = Manager(other, write_only=True)
    async with bus, other:
        await sio.manager.connect("eio", "/")
        await outside.emit("hi", 1)
        await outside.emit("hi", 2)
        assert await sent.reach(2) == ['2["hi",1]', '2["hi",2]']
        hold.set()


async def test_callbacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of callbacks that nobody answers the oldest is forgotten."""
    monkeypatch.setattr(module, "_MAX_ASKED", 3)
    bus, other = EventBus("memory://asked"), EventBus("memory://asked")
    manager = Manager(bus)
    socketio.AsyncServer(client_manager=manager)
    called = Seen[int]()
    async with bus, other, other.subscribe("socketio:all", module.Emission) as messages:
        for number in range(5):
            await manager.emit("hi", to="x", callback=lambda number=number: called.append(number))
        acks = [(await anext(aiter(messages))).event for _ in range(5)]
        for ask in acks:
            answer = module.Answer(ack=ask.ack, data="[]", blobs=())
            await other.publish(ask.reply, answer)
        assert await called.reach(3) == [2, 3, 4]


async def test_a_handler_of_gaps_may_be_plain() -> None:
    """A gap is told to plain and to async functions."""
    manager = Manager(EventBus("memory://gaps"))
    told = Seen[Gap]()
    manager.on_gap(told.append)
    await manager._hear_gap(gap := Gap("reconnect", None, None, None, None, None, None))
    assert told == [gap]
