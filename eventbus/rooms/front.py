"""`Rooms`: the front of this package, one per process, bus and namespace."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from anyio import CancelScope, move_on_after

from eventbus import EventBus, EventBusError, InvalidChannel, escape
from eventbus.rooms.clients import Client, Frame, Overflow, Send, Socket, names_of
from eventbus.rooms.hub import Fetched, GapHandler, Hub, Target
from eventbus.rooms.peers import Replies, Servers, dumps

_NAME = 50
"""Characters of a namespace: with a room of 255 bytes it makes a channel of less than 512."""
_STOP = 5.0
"""Seconds for the goodbye and the last confirmations, which may find no Redis."""


class Rooms:
    """One namespace of rooms on a bus, on this node; other processes have theirs.

    Make it before the bus starts (else `on_gap` is not to be had), one per bus and name, and enter
    it inside the bus: ``async with bus, rooms:``. Without that it starts at its first use.
    """

    def __init__(self, bus: EventBus, name: str = "/") -> None:
        if ":" in name or len(name) > _NAME:
            raise InvalidChannel(f"a namespace of rooms is short, and has no colon: {name!a:.99}")
        self._hub = hub = Hub(bus, *names_of([name]))
        self._everyone = hub.everyone()
        self._hears_gaps = True
        try:
            bus.on_gap(escape(hub.prefix) + "*")(hub.hear_gap)
        except EventBusError:
            self._hears_gaps = False

    async def __aenter__(self) -> Self:
        await self._hub.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with move_on_after(_STOP, shield=True):
            await self._hub.stop()

    @property
    def node(self) -> str:
        """The name of this node, new at each start; empty before."""
        return self._hub.peers.id

    @property
    def servers(self) -> Servers:
        """The other nodes themselves."""
        return self._hub.peers.servers

    def on_gap(self, handler: GapHandler) -> GapHandler:
        """Hear of what clients may have missed: ``async def handler(gap, room)``, where the room is
        None when it may be any. Tell them with ``rooms.local`` or ``rooms.local.to(room)``."""
        if not self._hears_gaps:
            raise EventBusError("the bus was running already: make the Rooms before its start")
        self._hub.gap_handlers.append(handler)
        return handler

    @asynccontextmanager
    async def connect(
        self,
        send: Send | Socket,
        id: str | None = None,
        data: Any = None,
        *,
        max_queue: int = 256,
        overflow: Overflow = "close",
    ) -> AsyncGenerator[Client, None]:
        """A local connection, for as long as the block. `send` takes text or bytes; or it is an
        object with `send_text` and `send_bytes`. Without an `id` it gets one that nobody guesses.

        At most `max_queue` messages wait; then the client is closed, or loses the oldest. When the
        server ends the connection, the block is cancelled and left, and `client.closed` says why.
        """
        dumps(data)  # it must be able to travel
        (id,) = names_of([secrets.token_hex(12) if id is None else id])
        if max_queue < 1 or overflow not in ("close", "drop_oldest"):
            raise ValueError('max_queue is at least 1, overflow "close" or "drop_oldest"')
        await self._hub.start()
        entered = False
        with CancelScope() as scope:
            client = Client(
                self._hub, _sender(send), id, data,
                max_queue=max_queue, overflow=overflow, scope=scope,
            )  # fmt: skip
            self._hub.enter(client)
            writer = asyncio.create_task(client.write(), name="eventbus client")
            try:
                await client.join(id)
                entered = True
                yield client
            finally:
                self._hub.remove(client)
                writer.cancel()
                with CancelScope(shield=True):
                    await asyncio.wait({writer}, timeout=1.0)
        if not entered:
            raise EventBusError(f"client {id!a} was disconnected while it connected")

    # What follows is for everyone, as `rooms.to` is for some.

    def to(self, *rooms: str) -> Target:
        """See `Target.to`."""
        return self._everyone.to(*rooms)

    def except_(self, *rooms: str) -> Target:
        """See `Target.except_`."""
        return self._everyone.except_(*rooms)

    @property
    def local(self) -> Target:
        """See `Target.local`."""
        return self._everyone.local

    async def emit(self, event: str, data: object = None) -> int:
        """See `Target.emit`."""
        return await self._everyone.emit(event, data)

    async def call(self, event: str, data: object = None, timeout: float = 1.0) -> Replies:
        """See `Target.call`."""
        return await self._everyone.call(event, data, timeout)

    async def fetch(self, timeout: float = 1.0) -> Fetched:
        """See `Target.fetch`."""
        return await self._everyone.fetch(timeout)

    async def join(self, *rooms: str, timeout: float = 1.0) -> tuple[str, ...]:
        """See `Target.join`."""
        return await self._everyone.join(*rooms, timeout=timeout)

    async def leave(self, *rooms: str, timeout: float = 1.0) -> tuple[str, ...]:
        """See `Target.leave`."""
        return await self._everyone.leave(*rooms, timeout=timeout)

    async def disconnect(self, timeout: float = 1.0) -> tuple[str, ...]:
        """See `Target.disconnect`."""
        return await self._everyone.disconnect(timeout)


def _sender(send: Send | Socket) -> Send:
    if callable(send):
        return send

    def either(frame: Frame) -> Awaitable[object]:
        return send.send_bytes(frame) if isinstance(frame, bytes) else send.send_text(frame)

    return either
