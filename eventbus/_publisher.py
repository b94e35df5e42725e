"""The publishing half of a bus: from an event to the transport, and the outcome back.

Encoding, size and channel are checked before anything is queued, so that a refused call leaves no
trace. The number on the channel is given by the transport when the bytes go to the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from functools import partial
from itertools import count
from time import time_ns
from types import MappingProxyType
from typing import Any, NamedTuple

from eventbus._codec import encode_data, event_writer
from eventbus._envelope import (
    DATA,
    is_plain,
    write_head,
    write_headers,
)
from eventbus._errors import (
    BusUnavailable,
    InvalidChannel,
    InvalidEvent,
    PayloadTooLarge,
    PublishUncertain,
)
from eventbus._events import Event, channel_of
from eventbus._messages import EMPTY, Header, Message, Receipt, check_headers
from eventbus._patterns import check_channel
from eventbus._reports import Reports, finish, inside
from eventbus._settings import Settings
from eventbus.transports.base import Outcome, Outgoing, Transport

Middleware = Callable[[Message[Any], Callable[[Message[Any]], Awaitable[Any]]], Awaitable[Any]]

_MAX_CHANNELS = 8192
_ENVELOPE_ROOM = 20
"""Bytes that a sequence number may add."""


class _Clock:
    """The time as RFC 3339 text with milliseconds, worked out once a millisecond."""

    def __init__(self) -> None:
        self._millisecond = 0
        self._text = b""

    def now(self) -> bytes:
        millisecond = time_ns() // 1_000_000
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            self._text = _spell(datetime.fromtimestamp(millisecond / 1000, UTC))
        return self._text


def _spell(time: datetime) -> bytes:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()


class _Kind(NamedTuple):
    """How events of one class are written: the data, and what stands around id and time."""

    write: Callable[[Event], bytes]
    start: bytes
    middle: bytes
    end: bytes


class Publisher:
    """Publishing on a started bus. `source` and `instance` are those of this start."""

    def __init__(
        self,
        *,
        transport: Transport,
        reports: Reports,
        middleware: Sequence[Middleware],
        source: str,
        instance: str,
        settings: Settings,
    ) -> None:
        self.published = self.refused = self.uncertain = self.failed = self.conflated = 0
        self._transport = transport
        self._reports = reports
        self._middleware = tuple(middleware)
        self.source = source
        self._instance = instance
        self._prefix = settings.prefix
        self._bare = settings.bare
        self._max_payload = settings.max_payload
        self._count = count(1)
        self._clock = _Clock()
        self._channels: dict[str, bytes] = {}
        self._kinds: dict[type[Event], _Kind] = {}
        self.unwatched: dict[Outgoing, tuple[str, Event]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def begin(
        self, channel: str | Event, event: Event | None
    ) -> tuple[Outgoing, asyncio.Future[int | None]] | Awaitable[Receipt]:
        """Encode an event and hand it over; the future is the answer. With middleware in the way:
        what does all of it, to be awaited."""
        name, event = _arguments(channel, event)
        if self._middleware:
            return self._through(0, self._message(name, event))
        outgoing = self._encode(name, event, self._next_id(), self._clock.now(), EMPTY)
        future: asyncio.Future[int | None] = self._loop.create_future()
        outgoing.future = future
        self._hand_over(outgoing)
        return outgoing, future

    async def _sent(self, outgoing: Outgoing) -> int | None:
        future: asyncio.Future[int | None] = self._loop.create_future()
        outgoing.future = future
        try:
            self._hand_over(outgoing)
        except BusUnavailable:
            await asyncio.sleep(0)  # as `EventBus.publish`
            raise
        try:
            if future.done():
                await asyncio.sleep(0)
            return await future
        except asyncio.CancelledError:
            self.withdraw(outgoing)
            raise

    def withdraw(self, outgoing: Outgoing) -> None:
        """Nobody waits any more: what was not written yet is certainly not sent."""
        if not outgoing.written:
            outgoing.ended = True

    def publish_nowait(self, channel: str | Event, event: Event | None = None) -> str:
        """See `EventBus.publish_nowait`."""
        name, event = _arguments(channel, event)
        if self._middleware:
            message = self._message(name, event)
            self._check(name, event)
            self._keep(self._loop.create_task(self._through_unwatched(message)))
            return str(message.id)
        outgoing = self._encode(name, event, self._next_id(), self._clock.now(), EMPTY)
        self._hand_over(outgoing)
        if not outgoing.ended:
            self.unwatched[outgoing] = (name, event)
        return str(outgoing.id)

    def _hand_over(self, outgoing: Outgoing) -> None:
        try:
            self._transport.publish(outgoing)
        except BusUnavailable:
            self.refused += 1
            raise

    async def publish_raw(self, channel: str, data: bytes) -> Receipt:
        """See `EventBus.publish_raw`."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidEvent(f"publish_raw takes bytes, not {type(data).__name__}")
        wire = self._wire_name(channel)
        self._check_size(len(data), channel)
        outgoing = Outgoing(wire, bytes(data), b"", False, None, self)
        return Receipt(None, await self._sent(outgoing))

    # -- Encoding --------------------------------------------------------------------------------

    def _next_id(self) -> str:
        return f"{self._instance}-{next(self._count)}"

    def _wire_name(self, channel: str) -> bytes:
        wire = self._channels.get(channel)
        if wire is None:
            wire = check_channel(channel, self._prefix)
            if len(self._channels) >= _MAX_CHANNELS:
                self._channels.clear()
            self._channels[channel] = wire
        return wire

    def _check_size(self, size: int, channel: str) -> None:
        if size > self._max_payload:
            raise PayloadTooLarge(
                f"the message for channel {channel!a} has {size} bytes, over max_payload"
                f" ({self._max_payload}); publish a key and keep the value elsewhere",
                channel=channel,
                size=size,
            )

    def _check(self, channel: str, event: Event) -> bytes:
        """Raise at once what is known at once. Returns the data."""
        self._wire_name(channel)
        data = encode_data(event)
        self._check_size(len(data), channel)
        return data

    def _encode(
        self, channel: str, event: Event, id: str, time: bytes, headers: Mapping[str, Header]
    ) -> Outgoing:
        wire = self._channels.get(channel) or self._wire_name(channel)
        kind = self._kinds.get(type(event)) or self._learn_kind(type(event))
        data = kind.write(event)
        if self._bare:
            self._check_size(len(data), channel)
            return Outgoing(wire, data, b"", False, id, self)
        between = write_headers(headers) if headers else DATA
        before = b"%b%b%b%b%b" % (kind.start, id.encode(), kind.middle, time, kind.end)
        after = b"%b%b}" % (between, data)
        if len(before) + len(after) + _ENVELOPE_ROOM > self._max_payload:
            self._check_size(len(before) + len(after) + _ENVELOPE_ROOM, channel)
        return Outgoing(wire, before, after, True, id, self)

    def _learn_kind(self, cls: type[Event]) -> _Kind:
        """What is the same for every event of a class."""
        if len(self._kinds) >= _MAX_CHANNELS:
            self._kinds.clear()
        head = write_head(self.source, cls.__event_type__)
        kind = self._kinds[cls] = _Kind(event_writer(cls), *head)
        return kind

    # -- Middleware ------------------------------------------------------------------------------

    def _message(self, channel: str, event: Event) -> Message[Any]:
        now = datetime.now(UTC)
        return Message(
            event,
            channel,
            id=self._next_id(),
            source=self.source,
            type=type(event).__event_type__,
            time=now.replace(microsecond=now.microsecond // 1000 * 1000),  # as on the wire
        )

    async def _through(self, depth: int, message: Message[Any]) -> Receipt:
        if depth < len(self._middleware):
            step: Receipt = await self._middleware[depth](
                message, partial(self._through, depth + 1)
            )
            return step
        if not isinstance(message.event, Event):
            raise InvalidEvent("a publish middleware passed on something that is no Event")
        check_headers(message.headers)
        if not is_plain(str(message.id).encode("utf-8", "replace")):
            raise InvalidEvent("a publish middleware passed on an id that is no plain text")
        time = (message.time or datetime.now(UTC)).astimezone(UTC)
        headers = MappingProxyType(dict(message.headers))
        outgoing = self._encode(
            message.channel, message.event, str(message.id), _spell(time), headers
        )
        return Receipt(outgoing.id, await self._sent(outgoing))

    async def _through_unwatched(self, message: Message[Any]) -> None:
        try:
            await self._through(0, message)
        except Exception as error:
            self.failed += 1
            await self._report(error, message)

    # -- Outcomes --------------------------------------------------------------------------------

    def ended(self, outgoing: Outgoing, outcome: Outcome) -> None:
        """Count what was not acknowledged; what nobody awaits goes to the exception handlers."""
        if isinstance(outcome, PublishUncertain):
            self.uncertain += 1
        elif outcome == "conflated":
            self.conflated += 1
        else:
            self.refused += 1
        known = self.unwatched.pop(outgoing, None)
        if known is not None and isinstance(outcome, Exception):
            self.failed += 1
            message = Message(known[1], known[0], id=outgoing.id, source=self.source)
            self._keep(self._loop.create_task(self._report(outcome, message)))

    async def _report(self, error: Exception, message: Message[Any]) -> None:
        inside.set(asyncio.current_task())
        await self._reports.report(error, message, "publish_nowait")

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Return when everything published has an outcome, and each was reported."""
        await self._transport.flush()
        while tasks := self._tasks - spared:
            await asyncio.wait(tasks)

    async def close(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Cancel what is still being reported."""
        tasks = self._tasks - spared
        for task in tasks:
            task.cancel()
        await finish(tasks, "an exception handler")


def _arguments(channel: object, event: object) -> tuple[str, Event]:
    """The channel and the event of a publish call. Raises InvalidEvent or InvalidChannel."""
    if isinstance(channel, Event) and event is None:
        return channel_of(channel), channel
    if not isinstance(event, Event):
        wrong = channel if event is None and not isinstance(channel, str) else event
        if isinstance(wrong, type):
            name = wrong.__name__
            raise InvalidEvent(f"publish takes an instance, not the class {name}: {name}(...)")
        raise InvalidEvent(
            f"publish takes an Event instance, not {type(wrong).__name__}: declare"
            " `class MyEvent(Event): ...` and publish MyEvent(...), or use publish_raw for bytes"
        )
    if not isinstance(channel, str):
        raise InvalidChannel(f"a channel is a str, not {type(channel).__name__}")
    return channel, event
