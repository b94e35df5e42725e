"""The one event that all contestants carry, its channels and its bytes on the wire.

Why it is shared: a ratio means something only when both sides moved the same event. Every
contestant gets it in the shape that it would get from a publisher of its own kind, encoded before
the clock starts:

* ``bare``: the JSON body alone, 150 bytes (floors, redis-py, valkey-glide);
* ``cloudevents``: eventbus's envelope around that body, with a true ``busseq`` per channel;
* ``faststream``: FastStream's own binary frame around that body, written by FastStream.
"""

from collections.abc import Iterator
from itertools import count, islice

from pydantic import BaseModel, ConfigDict

ROOMS = tuple(f"room-{n}" for n in range(20))
BODY_BYTES = 150
BLOCK = 128  # messages in one write of the flood: about 50 KB, a socket buffer's worth

USER = "alice"
PATTERN = "chat:*"


class Chat(BaseModel):
    """The event as a plain model, for every contestant that is not eventbus."""

    model_config = ConfigDict(frozen=True)

    room: str
    user: str
    text: str


def text(room: str) -> str:
    """Text that makes the JSON body of this room exactly ``BODY_BYTES`` long."""
    frame = len(Chat(room=room, user=USER, text="").model_dump_json())
    return ("The quick brown fox jumps over the lazy dog. " * 4)[: BODY_BYTES - frame]


def chat(room: str) -> Chat:
    return Chat(room=room, user=USER, text=text(room))


BODIES = {room: chat(room).model_dump_json().encode() for room in ROOMS}

# design.md §4: specversion, id, source, type, time, busseq, headers, data - in this order.
ENVELOPE = (
    b'{"specversion":"1.0","id":"%032x","source":"bench/0123456789abcdef","type":"MessageSent",'
    b'"time":"2026-01-01T00:00:00.000000Z","busseq":%d,"data":%b}'
)


def publish_command(channel: bytes, payload: bytes) -> bytes:
    """One PUBLISH, raw RESP."""
    return b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(channel),
        channel,
        len(payload),
        payload,
    )


def bare() -> Iterator[bytes]:
    """The body, round the rooms."""
    for n in count():
        room = ROOMS[n % len(ROOMS)]
        yield publish_command(b"chat:" + room.encode(), BODIES[room])


def cloudevents() -> Iterator[bytes]:
    """The enveloped body, round the rooms: busseq counts one source on one channel, from 1."""
    for n in count():
        room = ROOMS[n % len(ROOMS)]
        envelope = ENVELOPE % (n, n // len(ROOMS) + 1, BODIES[room])
        yield publish_command(b"chat:" + room.encode(), envelope)


def fresh() -> Iterator[bytes]:
    """Enveloped bodies of which every second one is on a channel that nobody has seen before.

    Names share their literal prefix (``room-123``) with one of the 10,000 routes, and only the
    covering pattern ``room-*`` wants them: both sizes of bus make exactly one call a message.
    """
    for n in count():
        room = ROOMS[n // 2 % len(ROOMS)]
        if n % 2:
            channel, number = b"%b-new-%d" % (room.encode(), n), 1
        else:
            channel, number = room.encode(), n // 2 // len(ROOMS) + 1
        yield publish_command(channel, ENVELOPE % (n, number, BODIES[room]))


def faststream() -> Iterator[bytes]:
    """What a FastStream publisher sends, by FastStream's own encoder, round the rooms."""
    import asyncio

    from faststream.redis.parser import BinaryMessageFormatV1

    async def encode(room: str) -> bytes:
        return await BinaryMessageFormatV1.encode(
            message=chat(room).model_dump(),
            reply_to=None,
            headers=None,
            correlation_id=f"{room:0>36}",
        )

    frames = [
        publish_command(b"chat:" + room.encode(), asyncio.run(encode(room))) for room in ROOMS
    ]
    for n in count():
        yield frames[n % len(frames)]


WIRES = {"bare": bare, "cloudevents": cloudevents, "fresh": fresh, "faststream": faststream}


def blocks(wire: str, messages: int) -> list[bytes]:
    """``messages`` commands, joined into blocks of ``BLOCK``."""
    commands = islice(WIRES[wire](), messages)
    joined = []
    while block := b"".join(islice(commands, BLOCK)):
        joined.append(block)
    return joined
