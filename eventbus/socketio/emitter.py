"""An emitter: what a Python service says to a cluster of Node.js Socket.IO servers.

Those servers share rooms through Redis Pub/Sub with the package `@socket.io/redis-adapter`. Whoever
publishes in its format is heard by all of their clients, and that is all that happens here: nothing
is subscribed to, no server of Socket.IO runs in this process, and no answer comes back.

- **The format is theirs, byte for byte** (8.3; the tests compare with their own emitter). An event
  is msgpack of `[sender, packet, options]`; an order to the servers is a JSON object with a number
  for its type. The servers pass on what they receive without looking at it twice, so all is judged
  here, before a byte is sent.
- **One call is one message**, so nothing is ever half sent. It goes through `bus.publish_raw`: its
  errors, deadline, limit of size and behaviour while Redis is away hold here too.
- **A room has a channel of its own**: the servers that do not have the room drop it undecoded. Two
  rooms and more go to the channel of all, once, and the servers see to it that a client who is in
  both gets it once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import orjson
from pydantic import BaseModel

from eventbus import EventBus, EventBusError, InvalidChannel, InvalidEvent, Receipt

__all__ = ["Emitter", "RoomNames", "Target"]

RoomNames: TypeAlias = str | Iterable[str]
"""A room, or several. The id of a client is a room too: every client is in the room of its id."""

_SENDER = "emitter"  # the servers' own ids have six characters: none takes this for its own
_EVENT = 2  # the type of a packet that is an event
_JOIN, _LEAVE, _DISCONNECT, _SERVER_SIDE_EMIT = 2, 3, 4, 6  # the types of orders
_EVERYONE: Mapping[str, Any] = {"rooms": [], "flags": {}, "except": []}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

# Names that Socket.IO and Node.js keep for themselves. A client that receives one of them cuts its
# connection. A server would take the data for a client, or, when nobody listens for `error`, end.
_NOT_FOR_CLIENTS = """
connect connect_error disconnect disconnecting newListener removeListener
""".split()
_NOT_FOR_SERVERS = ["connect", "connection", "new_namespace", "error"]


@dataclass(frozen=True, slots=True)
class _Cluster:
    """Where the bytes go: one namespace of the servers that share a prefix."""

    bus: EventBus
    namespace: str
    prefix: str
    pack: Callable[[Any], bytes]

    async def event(self, event: str, data: object, options: Mapping[str, Any]) -> Receipt:
        packet = {"type": _EVENT, "data": data, "nsp": self.namespace}
        channel = f"{self.prefix}#{self.namespace}#"
        if len(options["rooms"]) == 1:
            channel += f"{options['rooms'][0]}#"
        try:
            payload = self.pack([_SENDER, packet, options])
        except TypeError as error:
            raise self._unfit(event, channel, error) from error
        return await self.bus.publish_raw(channel, payload)

    async def order(self, event: str, order: dict[str, Any]) -> Receipt:
        channel = f"{self.prefix}-request#{self.namespace}#"
        try:
            payload = orjson.dumps(order, default=_plain)
        except TypeError:  # it holds bytes, or what no format can say
            try:
                payload = self.pack(order)
            except TypeError as error:
                raise self._unfit(event, channel, error) from error
        return await self.bus.publish_raw(channel, payload)

    @staticmethod
    def _unfit(event: str, channel: str, error: TypeError) -> InvalidEvent:
        return InvalidEvent(
            f"the data of {event!a} cannot be sent to Socket.IO ({error}): send None, bool, int,"
            " float, str, bytes, lists, dicts with str keys, or pydantic models",
            type=event,
            channel=channel,
            reasons=(str(error),),
        )


class Target:
    """Some of the clients of a namespace, and what can be done to them.

    A target is never changed: `to`, `except_`, `volatile` and `compress` return a new one, so that
    it can be kept and shared. What is awaited returns a `Receipt` whose `receivers` says how many
    servers were listening: 0 means that there was none. It says nothing about clients.
    """

    def __init__(self, cluster: _Cluster, options: Mapping[str, Any] = _EVERYONE) -> None:
        self._cluster, self._options = cluster, options

    def __repr__(self) -> str:
        marks = "".join(f" {name}={value}" for name, value in self._options.items() if value)
        return f"<{type(self).__name__} {self._cluster.prefix}#{self._cluster.namespace}{marks}>"

    def to(self, *rooms: RoomNames) -> Target:
        """The clients that are in one of these rooms (and of those named before).

        With no room at all it raises InvalidChannel: an empty list must not reach everyone.
        """
        if not (named := _names(rooms)):
            raise InvalidChannel("to() names no room; emit without to() reaches everyone")
        return self._but("rooms", _union(self._options["rooms"], named))

    def except_(self, *rooms: RoomNames) -> Target:
        """The same clients without those that are in one of these rooms."""
        return self._but("except", _union(self._options["except"], _names(rooms)))

    def volatile(self) -> Target:
        """For events that a client may miss when its connection is not ready to be written to."""
        return self._but("flags", {**self._options["flags"], "volatile": True})

    def compress(self, compress: bool = True) -> Target:
        """Whether the servers compress the event, where they do compress."""
        return self._but("flags", {**self._options["flags"], "compress": bool(compress)})

    async def emit(self, event: str, *data: object) -> Receipt:
        """Send an event, with any number of arguments, to these clients.

        A client that two of the rooms hold gets it once. Data is what msgpack can say, `bytes` and
        pydantic models (as their JSON) included; else it raises InvalidEvent, and so do names that
        Socket.IO keeps for itself. Raises what `EventBus.publish_raw` raises, PayloadTooLarge among
        it.
        """
        _check_event(event, _NOT_FOR_CLIENTS)
        return await self._cluster.event(event, [event, *data], self._options)

    async def sockets_join(self, *rooms: RoomNames) -> Receipt:
        """Make these clients join rooms."""
        return await self._move(_JOIN, "sockets_join", rooms)

    async def sockets_leave(self, *rooms: RoomNames) -> Receipt:
        """Make these clients leave rooms."""
        return await self._move(_LEAVE, "sockets_leave", rooms)

    async def disconnect_sockets(self, close: bool = False) -> Receipt:
        """Disconnect these clients from the namespace; with `close`, cut their connections."""
        order = {"type": _DISCONNECT, "opts": self._filter(), "close": bool(close)}
        return await self._cluster.order("disconnect_sockets", order)

    async def _move(self, type: int, method: str, rooms: tuple[RoomNames, ...]) -> Receipt:
        if not (named := _names(rooms)):
            raise InvalidChannel(f"{method}() names no room")
        order = {"type": type, "opts": self._filter(), "rooms": named}
        return await self._cluster.order(method, order)

    def _filter(self) -> dict[str, Any]:
        return {"rooms": self._options["rooms"], "except": self._options["except"]}

    def _but(self, name: str, value: object) -> Target:
        return Target(self._cluster, {**self._options, name: value})


class Emitter(Target):
    """All clients of one namespace of a Node.js Socket.IO cluster.

    The servers use `createAdapter` of `@socket.io/redis-adapter` on the same Redis, with a `key`
    that equals `emitter.key` (it does when both are left at their default). The sharded adapter
    listens elsewhere and does not hear this. The bus needs no handler and is started as ever;
    making an emitter costs nothing.
    """

    def __init__(self, bus: EventBus, namespace: str = "/", prefix: str = "socket.io") -> None:
        try:
            from ormsgpack import packb
        except ImportError as error:
            missing = "Emitter needs ormsgpack: pip install 'eventbus-redis[socketio]'"
            raise EventBusError(missing) from error
        if not isinstance(bus, EventBus):
            raise TypeError(f"an emitter needs an EventBus, not {type(bus).__name__}")
        prefix, namespace = _name(prefix, "prefix"), _name(namespace, "namespace")
        if not namespace.startswith("/"):  # Socket.IO's `of` does the same
            namespace = f"/{namespace}"
        super().__init__(_Cluster(bus, namespace, prefix, partial(packb, default=_plain)))

    @property
    def key(self) -> str:
        """What the servers must give to `createAdapter` as `key`: the prefix, after the namespace
        of the bus when that has one."""
        bus, prefix = self._cluster.bus, self._cluster.prefix
        return f"{bus.namespace}:{prefix}" if bus.namespace else prefix

    def of(self, namespace: str) -> Emitter:
        """All clients of another namespace of the same servers."""
        return Emitter(self._cluster.bus, namespace, self._cluster.prefix)

    async def server_side_emit(self, event: str, *data: object) -> Receipt:
        """Send an event to the servers themselves: `io.on(event, ...)` there, no client."""
        _check_event(event, _NOT_FOR_SERVERS)
        order = {"uid": _SENDER, "type": _SERVER_SIDE_EMIT, "data": [event, *data]}
        return await self._cluster.order(event, order)


def _plain(value: object) -> object:
    """What the encoders do not know by themselves: a model, as its JSON."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(type(value).__name__)


def _check_event(event: object, reserved: Sequence[str]) -> None:
    if not isinstance(event, str) or not event:
        raise InvalidEvent(f"the name of an event is a str that is not empty, not {event!a:.100}")
    if event in reserved:
        taken = f"the event name {event!a} cannot be sent: Socket.IO or Node.js keeps it for itself"
        raise InvalidEvent(taken, type=event)


def _name(name: object, what: str) -> str:
    """The name, when it can be a part of a channel. Raises InvalidChannel."""
    if not isinstance(name, str):
        raise InvalidChannel(f"a {what} is a str, not {type(name).__name__}")
    problem = "is empty" if not name else "has a control character" if _CONTROL.search(name) else ""
    if not problem:
        try:
            name.encode()
        except UnicodeEncodeError:
            problem = "has a lone surrogate, which has no UTF-8 form"
    if problem:
        raise InvalidChannel(f"{what} {name!a:.200} {problem}", channel=name)
    return str.__str__(name)  # the text itself, where it is an enum's


def _names(rooms: tuple[object, ...]) -> list[str]:
    """One flat list of rooms. Raises InvalidChannel for the first that is unfit."""
    flat: list[str] = []
    for one in rooms:
        several = one if isinstance(one, Iterable) and not isinstance(one, str) else [one]
        flat += [_name(room, "room") for room in several]
    return flat


def _union(known: list[str], more: list[str]) -> list[str]:
    return list(dict.fromkeys(known + more))
