"""The emitter: the bytes on the wire, beside those of Socket.IO's own, and what it refuses.

`tests/cluster/node/golden.json` holds calls and what Socket.IO's emitter publishes for them;
`tests/cluster/test_emitter.py` makes it again, and drives real servers and clients.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import ormsgpack
import pytest

from eventbus import (
    Buffer,
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PermissionDenied,
    PublishUncertain,
    Receipt,
)
from eventbus.server import Server
from eventbus.socketio import Emitter
from eventbus.socketio.emitter import Target
from tests.helpers import LIMIT, Seen

GOLDEN = json.loads((Path(__file__).parent / "cluster/node/golden.json").read_text())
PYTHON = {
    "except": "except_",
    "socketsJoin": "sockets_join",
    "socketsLeave": "sockets_leave",
    "disconnectSockets": "disconnect_sockets",
    "serverSideEmit": "server_side_emit",
}
Frames = Seen[tuple[str, bytes]]


class Room(str, Enum):  # noqa: UP042 - the kind whose format() is not its text
    LOBBY = "lobby"


class Said(Event):
    text: str
    at: datetime
    raw: bytes


@pytest.fixture
async def bus() -> AsyncIterator[EventBus]:
    """A bus whose messages are all seen by `frames`."""
    async with EventBus("memory://") as started:
        yield started


@pytest.fixture
async def frames(bus: EventBus) -> Frames:
    """What was published: channels and bytes."""
    seen: Frames = Seen()

    async def handler(channel: str, data: bytes) -> None:
        seen.append((channel, data))

    await bus.attach(handler, "{channel:path}", wire="bare")
    return seen


def rich(value: Any) -> Any:
    """What golden.json writes as {"$bytes": hex} is bytes."""
    if isinstance(value, list):
        return [rich(one) for one in value]
    if isinstance(value, dict):
        found = value.get("$bytes")
        return {k: rich(v) for k, v in value.items()} if found is None else bytes.fromhex(found)
    return value


def packed(payload: bytes) -> Any:
    """The value that these bytes of msgpack stand for."""
    return ormsgpack.unpackb(payload)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: json.dumps(golden["steps"])[:60])
async def test_the_bytes_are_those_of_socketio(
    bus: EventBus, frames: Frames, golden: dict[str, Any]
) -> None:
    """A call publishes the bytes that Socket.IO's own emitter publishes, on the same channel."""
    at: Any = Emitter(bus)
    for method, *args in rich(golden["steps"]):
        at = getattr(at, PYTHON.get(method, method))(*args)
    await at
    text = golden.get("json")
    payload = bytes.fromhex(golden["msgpack"]) if text is None else text.encode()
    assert await frames.reach(1) == [(golden["channel"], payload)]


async def test_rooms_come_in_any_shape(bus: EventBus, frames: Frames) -> None:
    """Rooms are named one by one or in any iterable, and each counts once; an enum is its text."""
    emitter = Emitter(bus)
    for target in (
        emitter.to("lobby", "b"),
        emitter.to(["lobby", "b"]).to("b"),
        emitter.to(iter(("lobby", "lobby")), Room.LOBBY).to("b"),
    ):
        await target.emit("hi")
    first, *others = await frames.reach(3)
    assert others == [first, first]
    await emitter.to(Room.LOBBY).emit("hi")
    assert (await frames.reach(4))[3][0] == "socket.io#/#lobby#"


async def test_a_target_never_changes(bus: EventBus, frames: Frames) -> None:
    """Narrowing a target leaves the one that it came from as it was."""
    emitter = Emitter(bus)
    room = emitter.to("a")
    await room.to("b").except_("c").volatile().compress(False).emit("hi")
    await room.emit("hi")
    await emitter.emit("hi")
    seen = [packed(payload)[2] for _, payload in await frames.reach(3)]
    assert seen == [
        {"rooms": ["a", "b"], "except": ["c"], "flags": {"volatile": True, "compress": False}},
        {"rooms": ["a"], "except": [], "flags": {}},
        {"rooms": [], "except": [], "flags": {}},
    ]


async def test_models_and_bytes(bus: EventBus, frames: Frames) -> None:
    """A model is sent as its JSON, wherever it stands in the data, and bytes as bytes."""
    said = Said(text="hi", at=datetime(2026, 1, 2, tzinfo=UTC), raw=b"\x00\xff")
    emitter = Emitter(bus)
    await emitter.emit("said", said, [bytearray(b"ab"), memoryview(b"cd")])
    await emitter.server_side_emit("said", {"event": said})
    await emitter.server_side_emit("said", said, b"\x00")
    first, second, third = [payload for _, payload in await frames.reach(3)]
    plain = {"text": "hi", "at": "2026-01-02T00:00:00Z", "raw": "AP8="}
    assert packed(first)[1]["data"] == ["said", plain, [b"ab", b"cd"]]
    assert json.loads(second)["data"] == ["said", {"event": plain}]
    assert packed(third) == {"uid": "emitter", "type": 6, "data": ["said", plain, b"\x00"]}


@pytest.mark.parametrize(
    "data",
    [
        object(),
        {1, 2},
        {1: "a"},
        2**64,
        "\ud800",
        [["x", object()]],
        Said.model_construct(text=b"\xff"),
    ],
    ids=["object", "set", "key", "number", "surrogate", "nested", "model"],
)
async def test_data_that_cannot_be_sent(bus: EventBus, frames: Frames, data: object) -> None:
    """Data that the format cannot say is an InvalidEvent that does not show it; nothing is sent."""
    emitter = Emitter(bus)
    with pytest.raises(InvalidEvent, match=r"'hi' cannot be sent to Socket\.IO") as event:
        await emitter.to("a").emit("hi", data)
    assert (event.value.type, event.value.channel) == ("hi", "socket.io#/#a#")
    with pytest.raises(InvalidEvent, match=r"'hi' cannot be sent to Socket\.IO") as order:
        await emitter.server_side_emit("hi", data)
    assert order.value.channel == "socket.io-request#/#"
    await emitter.emit("fence")
    assert len(await frames.reach(1)) == 1


async def test_data_without_end(bus: EventBus) -> None:
    """A list that holds itself is refused, and so is one that is nested too deeply."""
    ring: list[Any] = []
    ring.append(ring)
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    for data in (ring, deep):
        with pytest.raises(InvalidEvent, match="Recursion"):
            await Emitter(bus).emit("hi", data)


@pytest.mark.parametrize(
    "event", ["connect", "connect_error", "disconnect", "disconnecting", "newListener", "", None, 7]
)
async def test_event_names_for_clients(bus: EventBus, frames: Frames, event: Any) -> None:
    """A name that would cut a client's connection, or that is none, is refused and not sent."""
    with pytest.raises(InvalidEvent, match="name"):
        await Emitter(bus).emit(event, 1)
    await Emitter(bus).emit("message")
    assert len(await frames.reach(1)) == 1


@pytest.mark.parametrize("event", ["connect", "connection", "new_namespace", "error", "", None])
async def test_event_names_for_servers(bus: EventBus, frames: Frames, event: Any) -> None:
    """A name that would make a server fail or take data for a client is refused and not sent."""
    with pytest.raises(InvalidEvent, match="name"):
        await Emitter(bus).server_side_emit(event, 1)
    await Emitter(bus).server_side_emit("disconnect")  # for servers it is a name like others
    assert len(await frames.reach(1)) == 1


@pytest.mark.parametrize("room", ["", "a\x00b", "a\n", "\ud800", None, 7, b"a", [7], ["a", ""]])
async def test_rooms_that_are_none(bus: EventBus, room: Any) -> None:
    """A room that is no text, empty, or unfit for a channel is refused wherever rooms are named."""
    emitter = Emitter(bus)
    for method in (emitter.to, emitter.except_, emitter.to("a").to):
        with pytest.raises(InvalidChannel, match="room"):
            method(room)
    for order in (emitter.sockets_join, emitter.sockets_leave):
        with pytest.raises(InvalidChannel, match="room"):
            await order("a", room)


async def test_no_room_is_not_everyone(bus: EventBus) -> None:
    """An empty list of rooms is refused; to except nobody is fine."""
    emitter = Emitter(bus)
    for call in (emitter.to, lambda: emitter.to([])):
        with pytest.raises(InvalidChannel, match="names no room"):
            call()
    with pytest.raises(InvalidChannel, match="names no room"):
        await emitter.sockets_join([])
    await emitter.except_([]).emit("hi")


async def test_a_room_that_is_too_long(bus: EventBus, frames: Frames) -> None:
    """A room whose channel would be too long is an InvalidChannel, and nothing is sent."""
    with pytest.raises(InvalidChannel, match="over the 512"):
        await Emitter(bus).to("x" * 600).emit("hi")
    await Emitter(bus).emit("fence")
    assert len(await frames.reach(1)) == 1


@pytest.mark.parametrize("bad", ["", "a\x07", None, 1])
async def test_namespaces_and_prefixes(bus: EventBus, bad: Any) -> None:
    """A namespace or a prefix that cannot be part of a channel is refused at once."""
    with pytest.raises(InvalidChannel, match="namespace"):
        Emitter(bus, bad)
    with pytest.raises(InvalidChannel, match="namespace"):
        Emitter(bus).of(bad)
    with pytest.raises(InvalidChannel, match="prefix"):
        Emitter(bus, prefix=bad)


async def test_what_is_no_bus() -> None:
    """An emitter is made on an EventBus and on nothing else."""
    wrong: Any = "redis://localhost"
    with pytest.raises(TypeError, match="needs an EventBus, not str"):
        Emitter(wrong)


async def test_prefix_and_the_bus_namespace(valkey: Server) -> None:
    """Each channel begins with the bus's namespace and the prefix, and `key` is both."""
    seen: Frames = Seen()
    listener = EventBus(valkey.url)

    @listener.on("{channel:path}", wire="bare")
    async def handler(channel: str, data: bytes) -> None:
        seen.append((channel, data))

    async with listener, EventBus(valkey.url, namespace="staging", heartbeat=None) as bus:
        emitter = Emitter(bus, "/admin", prefix="shop")
        assert emitter.key == emitter.of("/").key == "staging:shop"
        assert Emitter(bus).key == "staging:socket.io"
        assert Emitter(listener).key == "socket.io"
        await emitter.emit("hi")
        await emitter.of("/").to("a").disconnect_sockets()
        channels = [channel for channel, _ in await seen.reach(2)]
    assert channels == ["staging:shop#/admin#", "staging:shop-request#/#"]


async def test_a_redis_user_with_rules() -> None:
    """`bus.acl("socket.io*")` is all that an emitter needs, and other channels are denied."""
    with Server() as server:
        async with EventBus(server.url) as admin, admin.redis() as redis:
            rules = admin.acl("socket.io*").both
            await redis.execute_command("ACL", "SETUSER", "app", "on", ">secret", *rules)
        login = {"username": "app", "password": "secret"}
        async with EventBus(server.url, redis_options=login) as bus:
            assert (await Emitter(bus, "/admin").to("a").emit("hi")).receivers == 0
            assert (await Emitter(bus).server_side_emit("hi")).receivers == 0
            with pytest.raises(PermissionDenied):
                await Emitter(bus, prefix="other").emit("hi")


async def test_receivers(url: str) -> None:
    """The receipt counts who listens on Redis, which is 0 without a server of Socket.IO."""
    async with EventBus(url) as bus:
        emitter = Emitter(bus).to("a")
        assert (await emitter.emit("hi")).receivers == 0
        assert (await emitter.sockets_join("b")).receivers == 0
        async with bus.subscribe("socket.io#/#*"):
            assert await emitter.emit("hi") == (None, 1)


async def test_too_large(frames: Frames) -> None:
    """What is over the bus's limit is refused whole."""
    async with EventBus("memory://small", max_payload=1_000) as bus:
        emitter = Emitter(bus)
        with pytest.raises(PayloadTooLarge) as event:
            await emitter.emit("hi", "x" * 1_000)
        assert event.value.channel == "socket.io#/#"
        with pytest.raises(PayloadTooLarge):
            await emitter.server_side_emit("hi", "x" * 1_000)
        assert (await emitter.emit("hi", "x" * 900)).receivers == 0
        assert bus.stats().published == 1


async def test_a_bus_that_does_not_run() -> None:
    """An emitter can be made before its bus is started; calls say BusClosed until it is."""
    bus = EventBus("memory://")
    emitter = Emitter(bus)
    with pytest.raises(BusClosed):
        await emitter.emit("hi")
    async with bus:
        await emitter.emit("hi")
    with pytest.raises(BusClosed):
        await emitter.emit("hi")


async def answered(target: Target) -> Receipt:
    """What a call gives, once the bus has noticed: what was written before that is uncertain."""
    async with asyncio.timeout(LIMIT):
        while True:
            with suppress(PublishUncertain):
                return await target.emit("hi")


async def test_redis_away() -> None:
    """While Redis is away a call fails with what the bus says, or waits in its buffer."""
    with Server() as server:
        options: dict[str, Any] = {"publish_timeout": 0.2, "heartbeat": None}
        async with (
            EventBus(server.url, **options) as failing,
            EventBus(server.url, **options, outage=Buffer()) as buffering,
        ):
            server.kill()
            with pytest.raises(BusUnavailable):
                await answered(Emitter(failing))
            assert (await answered(Emitter(buffering))).receivers is None


async def test_repr(bus: EventBus) -> None:
    """An emitter and a target show where they send to."""
    emitter = Emitter(bus, "admin")
    assert repr(emitter) == "<Emitter socket.io#/admin>"
    narrowed = emitter.to("a").except_("b").volatile()
    assert repr(narrowed) == (
        "<Target socket.io#/admin rooms=['a'] flags={'volatile': True} except=['b']>"
    )


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ormsgpack, making an emitter says which extra to install."""
    monkeypatch.setitem(sys.modules, "ormsgpack", None)
    with pytest.raises(EventBusError, match=r"pip install 'eventbus-redis\[socketio\]'"):
        Emitter(EventBus("memory://"))


def test_the_golden_calls_cover_every_method() -> None:
    """Every public method that sends or narrows has its bytes compared with Socket.IO's."""
    tried = {PYTHON.get(step[0], step[0]) for golden in GOLDEN for step in golden["steps"]}
    assert tried == {name for name in dir(Emitter) if not name.startswith("_")} - {"key"}
