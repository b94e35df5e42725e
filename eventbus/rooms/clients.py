"""Clients: one connection each, with a bounded queue and a writer of its own.

A slow client fills its own queue and delays nobody; what happens then is its policy. Frames come
encoded: the same object goes into the queue of every client that it is for.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import orjson
from anyio import CancelScope

from eventbus import InvalidChannel, InvalidEvent
from eventbus.rooms.peers import dumps

if TYPE_CHECKING:
    from eventbus.rooms.hub import Target

Frame = str | bytes
Send = Callable[[Any], Awaitable[object]]
Overflow = Literal["close", "drop_oldest"]
Closed = Literal["slow", "disconnected", "stopped", "lost"]

_NAME = re.compile("[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")
_FLUSH = 1.0  # s that a client has to take what it was sent before it was disconnected


class Socket(Protocol):
    """What Starlette, FastAPI and Litestar call a WebSocket."""

    async def send_text(self, data: str) -> None: ...
    async def send_bytes(self, data: bytes) -> None: ...


class Incoming(NamedTuple):
    """What a client sent. With an `ack` it awaits `client.reply(ack, data)`."""

    event: str
    data: Any
    ack: Any


class Home(Protocol):
    """What a client needs of the node that it is connected to."""

    def everyone(self) -> Target: ...
    async def join(self, clients: Collection[Client], names: Collection[str]) -> bool: ...
    async def leave(self, clients: Collection[Client], names: Collection[str]) -> None: ...
    def remove(self, client: Client) -> bool: ...
    def acknowledged(self, client: Client, ack: str, data: object) -> None: ...


def names_of(names: Iterable[Any]) -> tuple[str, ...]:
    """The names, if all may be rooms or ids. A colon may: a room is the last part of a channel."""
    for name in (found := tuple(names)):
        if not (isinstance(name, str) and _NAME.fullmatch(name) and len(name.encode()) < 256):
            raise InvalidChannel(f"{name!a:.99} is no name of 1 to 255 bytes without controls")
    return found


def frame_of(data: object, **head: object) -> Frame:
    """What goes to a client: text, or for bytes a binary frame."""
    if isinstance(data, bytes | bytearray | memoryview):
        return b"\n".join((dumps(head), data))
    return dumps({**head, "data": data}).decode()


class Client:
    """A local connection, from `rooms.connect`. `data` is the user's own; `dropped` counts what a
    slow client lost; `closed` says why the server ended the connection, None while it did not:
    "slow" (its queue was full), "disconnected", "stopped" (the rooms were), or "lost" (`send`
    raised)."""

    def __init__(
        self,
        home: Home,
        send: Send,
        id: str,
        data: Any,
        *,
        max_queue: int,
        overflow: Overflow,
        scope: CancelScope,
    ) -> None:
        self.id = id
        self.data = data
        self.closed: Closed | None = None
        self.dropped = 0
        self.joined: set[str] = set()
        self._home, self._send, self._scope = home, send, scope
        self._max_queue, self._overflow = max_queue, overflow
        self._queue: deque[Frame | None] = deque()
        self._wake: asyncio.Future[None] | None = None

    @property
    def rooms(self) -> frozenset[str]:
        """Where it is a member; its own id is one of them."""
        return frozenset(self.joined)

    async def join(self, *rooms: str) -> bool:
        """Become a member: nothing that is published after the return is missed. False when Redis
        is away: a member on this node, and on the others as soon as it is back (told by `on_gap`).
        """
        return await self._home.join([self], names_of(rooms))

    async def leave(self, *rooms: str) -> None:
        """Be no member any more."""
        await self._home.leave([self], rooms)

    async def emit(self, event: str, data: object = None) -> None:
        """Send to this client only; no Redis."""
        self.put(frame_of(data, event=event))

    async def reply(self, ack: object, data: object = None) -> None:
        """Answer a message of this client that had an `ack`."""
        self.put(frame_of(data, ack=ack))

    @property
    def broadcast(self) -> Target:
        """Everyone but this client, on every node."""
        return self._home.everyone().except_(self.id)

    def to(self, *rooms: str) -> Target:
        """The members of these rooms but this client, on every node."""
        return self.broadcast.to(*rooms)

    def receive(self, message: str | bytes) -> Incoming | None:
        """Read what the client sent; None when it was the answer to a `call`. InvalidEvent when it
        is neither."""
        head, blob = message, None
        if isinstance(message, bytes) and b"\n" in message:
            head, _, blob = message.partition(b"\n")
        with suppress(orjson.JSONDecodeError):
            said = orjson.loads(head)
            if isinstance(said, dict):
                data, ack = said.get("data") if blob is None else blob, said.get("ack")
                if isinstance(event := said.get("event"), str):
                    return Incoming(event, data, ack)
                if isinstance(ack, str):
                    self._home.acknowledged(self, ack, data)
                    return None
        raise InvalidEvent(
            'a client sends {"event": ..., "data": ...} or {"ack": ..., "data": ...}'
        )

    def put(self, frame: Frame | None) -> None:
        """Queue a frame, by the policy of this client; None is the last."""
        queue = self._queue
        if len(queue) >= self._max_queue and frame is not None:
            if self._overflow == "close":
                return self.close("slow", 0.0)
            queue.popleft()
            self.dropped += 1
        queue.append(frame)
        if (wake := self._wake) is not None:
            self._wake = None
            if not wake.done():
                wake.set_result(None)
        return None

    def close(self, reason: Closed, flush: float = _FLUSH) -> None:
        """End the connection's block, when it has taken what waits or `flush` seconds are over."""
        if self.closed is None and self._home.remove(self):
            self.closed = reason
            self.put(None)
            asyncio.get_running_loop().call_later(flush, self._scope.cancel)

    async def write(self) -> None:
        """The life of its writer: one frame after the other, in a task of its own."""
        try:
            while True:
                while self._queue:
                    if (frame := self._queue.popleft()) is None:
                        return self._scope.cancel()
                    await self._send(frame)
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
        except Exception:  # whatever the server's library raises for a lost connection
            self.close("lost", 0.0)
        finally:
            self._queue, self._wake = deque(maxlen=0), None  # nobody sends what comes now
