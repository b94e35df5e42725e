"""What managers say to one another: three events, and the form of data in them."""

from __future__ import annotations

from typing import Any, Literal

from eventbus import Event

Room = str | int
What = Literal["disconnect", "enter", "leave", "close"]


class Emission(Event, type="eventbus.socketio.emission"):
    """An event for the clients in `rooms` (None: for all), but not for those in `but`.

    `data` is the JSON of its arguments, with placeholders for the bytes in `blobs`. With an `ack`,
    a client's answer goes to the channel `reply`.
    """

    name: str
    namespace: str
    rooms: tuple[Room, ...] | None
    but: tuple[str, ...]
    reply: str
    ack: str | None
    data: str
    blobs: tuple[bytes, ...]


class Order(Event, type="eventbus.socketio.order"):
    """What is to be done to a client, wherever it is, or to a room, everywhere."""

    what: What
    namespace: str
    sid: str | None
    room: Room | None


class Answer(Event, type="eventbus.socketio.answer"):
    """What a client has answered to the emission with this `ack`."""

    ack: str
    data: str
    blobs: tuple[bytes, ...]


def pack(packet: Any, json: Any, values: list[Any]) -> tuple[str, tuple[bytes, ...]]:
    """Values as JSON and the bytes that are taken out of it; `packet` is python-socketio's."""
    blobs: list[bytes] = []
    if packet.data_is_binary(values):
        values, blobs = packet.deconstruct_binary(values)
    return json.dumps(values, separators=(",", ":")), tuple(map(bytes, blobs))


def unpack(packet: Any, json: Any, said: Emission | Answer) -> tuple[Any, ...]:
    """The values again."""
    values = json.loads(said.data)
    return tuple(packet.reconstruct_binary(values, said.blobs) if said.blobs else values)
