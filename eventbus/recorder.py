"""The record of what arrived on a bus, for tests: `record`, which `eventbus.testing` hands on.

    recorder = record(bus)
    await bus.publish(MessageSent(room="lobby", text="hi"))
    sent = await recorder.expect(MessageSent, channel="chat:*", within=1)

An expectation takes a message: two of them need two. When none comes, the error lists what did
arrive, the near misses first; that list is what a test that fails is read for. A recorder is a
handler like any other: middleware sees its calls, and it counts as a receiver.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from eventbus import Event, EventBus, EventBusError, Message, Route, matches

__all__ = ["Recorder", "record"]

E = TypeVar("E", bound=Event)
_SHOWN = 20
"""Messages that a failed expectation lists; the closest come first."""


@dataclass(slots=True)
class _Arrival:
    message: Message[dict[str, Any]]
    taken: bool = False


class Recorder:
    """What arrived on a bus, in order; made by `record`. The last `limit` messages are kept."""

    def __init__(self, bus: EventBus, patterns: tuple[str, ...], limit: int) -> None:
        self._bus, self._patterns, self._limit = bus, patterns, limit
        self._arrivals: list[_Arrival] = []
        self._first = 0  # the number of the first that is still kept
        self._waiting: list[asyncio.Future[None]] = []
        self._route: Route | None = None
        self._listens = bus.source is None
        if self._listens:
            bus.on(*patterns)(self._record)

    async def _record(self, message: Message[dict[str, Any]]) -> None:
        self._arrivals.append(_Arrival(message))
        if len(self._arrivals) > self._limit:
            del self._arrivals[0]
            self._first += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def _attach(self) -> Self:
        if not self._listens:
            self._route = await self._bus.attach(self._record, *self._patterns)
            self._listens = True
        return self

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._attach().__await__()

    async def __aenter__(self) -> Self:
        return await self._attach()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._route is not None:
            await self._route.detach()

    @property
    def messages(self) -> list[Message[dict[str, Any]]]:
        """All that arrived, in order, taken or not; the event is the data as a `dict`."""
        self._check()
        return [arrival.message for arrival in self._arrivals]

    def of(self, *wanted: type[E], channel: str = "*") -> list[Message[E]]:
        """Those of these event classes on channels that match, taken or not, with typed events."""
        self._check()
        fits = _matcher(channel)
        found = (_typed(item.message, wanted) for item in self._arrivals if fits(item.message))
        return [message for message in found if not isinstance(message, str)]

    @overload
    async def expect(
        self,
        *,
        channel: str = "*",
        within: float = 5.0,
        where: Callable[[Message[dict[str, Any]]], bool] | None = None,
    ) -> Message[dict[str, Any]]: ...
    @overload
    async def expect(
        self,
        *wanted: type[E],
        channel: str = "*",
        within: float = 5.0,
        where: Callable[[Message[E]], bool] | None = None,
    ) -> Message[E]: ...
    async def expect(
        self,
        *wanted: Any,
        channel: str = "*",
        within: float = 5.0,
        where: Callable[[Message[Any]], bool] | None = None,
    ) -> Message[Any]:
        """Take the first message that fits and was not taken yet, or wait for it.

        `wanted` are event classes (none: every type), `channel` is a pattern. Raises AssertionError
        after `within` seconds, with what did arrive: the near misses first.
        """
        __tracebackhide__ = True  # pytest shows the caller, and what is said at the end
        self._check()
        fits = _matcher(channel)
        why: dict[int, str] = {}  # what kept each arrival from being the one

        def judge(item: _Arrival) -> Message[Any] | str:
            if item.taken:
                return "taken by an earlier expect"
            found = _typed(item.message, wanted) if wanted else item.message
            if isinstance(found, str):
                return f"same channel, {found}" if fits(item.message) else "something else"
            if not fits(item.message):
                return "same type, other channel" if wanted else "other channel"
            return found if where is None or where(found) else "refused by `where`"

        look = self._first
        try:
            async with asyncio.timeout(within):
                while True:
                    look = max(look, self._first)
                    for item in self._arrivals[look - self._first :]:
                        found = judge(item)
                        if not isinstance(found, str):
                            item.taken = True
                            return found
                        why[look] = found
                        look += 1
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiting.append(waiter)
                    await waiter
        except TimeoutError:
            # An error of `where` is its own: only the limit ends here.
            names = " or ".join(cls.__name__ for cls in wanted) or "message"
            title = f"no {names} on {channel!a} within {within:g} s"
            raise AssertionError(self._account(title, why)) from None

    def _account(self, title: str, why: dict[int, str]) -> str:
        ranks = ("refused", "same channel", "same type", "taken", "other", "something")
        listed = sorted(
            (next(n for n, word in enumerate(ranks) if reason.startswith(word)), number, reason)
            for number, reason in why.items()
            if number >= self._first
        )
        lines = [f"{title}; {len(listed) or 'nothing'} arrived{':' if listed else ''}"]
        for _, number, reason in listed[:_SHOWN]:
            message = self._arrivals[number - self._first].message
            data = json.dumps(message.event, ensure_ascii=True)
            data = data if len(data) <= 120 else data[:120] + "…"
            lines.append(f"  {reason}: {message.type} on {message.channel!a} {data}")
        if len(listed) > _SHOWN:
            lines.append(f"  and {len(listed) - _SHOWN} more")
        return "\n".join(lines)

    def _check(self) -> None:
        if not self._listens:
            raise EventBusError(
                "the bus was running when `record(bus)` was called, so it does not listen yet:"
                " write `async with record(bus) as recorder:` or `recorder = await record(bus)`"
            )


def record(bus: EventBus, *patterns: str, limit: int = 10_000) -> Recorder:
    """Record what arrives on the bus: all of it, or what matches these patterns.

    Before the start of the bus this is enough: `recorder = record(bus)`. On a running bus it is
    entered, `async with record(bus) as recorder:` (detached at the end of the block), or awaited,
    `recorder = await record(bus)` (detached when the bus stops).
    """
    return Recorder(bus, patterns or ("*",), limit)


def _typed(message: Message[dict[str, Any]], wanted: tuple[type[E], ...]) -> Message[E] | str:
    """The message with its event typed, or what is wrong with it."""
    reason = "other type"
    for cls in wanted:
        if message.type in (cls.__event_type__, None):  # None: on a bus without envelopes
            try:
                event = cls.model_validate_json(json.dumps(message.event))
            except ValueError as error:
                reason = f"does not fit {cls.__name__} ({str(error).splitlines()[0]})"
            else:
                found: Message[Any] = message
                typed: Message[E] = replace(found, event=event)
                return typed
    return reason


def _matcher(pattern: str) -> Callable[[Message[Any]], bool]:
    """Whether a message's channel matches. Raises InvalidPattern at once."""
    matches(pattern, "x")
    return lambda message: matches(pattern, message.channel) is not None
