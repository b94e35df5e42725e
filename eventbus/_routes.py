"""Declaring routes, and the handles that a running bus gives out for them.

`Declarations` is what `EventBus` and `Router` share: `on` and `on_gap`. `Route` and `Messages` are
the handles of `attach` and `subscribe`; they hold no state of their own beside their lane.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Protocol, Self, TypeVar, get_args

from eventbus._errors import BusClosed, InvalidHandler, InvalidPattern
from eventbus._events import Event, template_of
from eventbus._handlers import SKIP, CallPlan, names_of_caller, plan_call
from eventbus._lanes import TURN, Lane, Options, Overflow
from eventbus._messages import Gap, Message
from eventbus._patterns import Pattern, encode_name
from eventbus._receiver import Receiver

F = TypeVar("F", bound=Callable[..., Any])
G = TypeVar("G", bound=Callable[[Gap], Any])
E_co = TypeVar("E_co", covariant=True)


def patterns_of(listed: Sequence[object], prefix: str = "") -> list[Pattern]:
    """The patterns of texts (with the prefix) and of event classes (their own template)."""
    found = []
    for item in listed:
        if isinstance(item, str):
            found.append(Pattern(prefix + item))
        elif isinstance(item, type) and issubclass(item, Event):
            found.append(template_of(item).pattern)
        else:
            raise InvalidPattern(
                f"{item!r} is neither a pattern nor an Event class; write"
                ' @bus.on("chat:*") or @bus.on(MessageSent)'
            )
    if not found:
        raise InvalidPattern('name at least one pattern or Event class, as in @bus.on("chat:*")')
    return list(dict.fromkeys(found))


def matches(pattern: str, channel: str) -> dict[str, str] | None:
    """The captures when the pattern matches the channel (empty without captures), else None: what a
    handler with that pattern would get. Raises InvalidPattern."""
    return Pattern(pattern).match(encode_name(channel))


@dataclass(frozen=True, slots=True)
class Declaration:
    """A handler that waits for the start of its bus."""

    fn: Callable[..., Any]
    listed: tuple[str | type[Event], ...]
    patterns: tuple[Pattern, ...]
    options: Options
    plan: CallPlan


class RouteInfo(NamedTuple):
    """What one route was declared as: its name in `stats()`, its function, its patterns, the event
    classes that the function names (none: it takes every type), and whether it is bare."""

    name: str
    fn: Callable[..., Any]
    patterns: tuple[str, ...]
    events: tuple[type[Event], ...]
    bare: bool


def _events_in(annotation: Any) -> Iterator[type[Event]]:
    if isinstance(annotation, type) and issubclass(annotation, Event):
        yield annotation
    for part in get_args(annotation):
        yield from _events_in(part)


@dataclass(frozen=True, slots=True)
class GapDeclaration:
    """A gap handler that waits for the start of its bus. `listed` is without a prefix."""

    fn: Callable[[Gap], Any]
    listed: str
    pattern: Pattern


class Declarations:
    """`on` and `on_gap`, and what they collected."""

    _prefix = ""
    _bare = False

    def __init__(self) -> None:
        self._declared: list[Declaration] = []
        self._declared_gaps: list[GapDeclaration] = []

    @property
    def routes(self) -> tuple[RouteInfo, ...]:
        """The routes that were declared with `on`, in order, those of routers among them."""
        return tuple(
            RouteInfo(
                item.plan.name,
                item.fn,
                tuple(pattern.text for pattern in item.patterns),
                tuple(
                    dict.fromkeys(
                        event
                        for parameter in item.plan.signature.parameters.values()
                        for event in _events_in(parameter.annotation)
                    )
                ),
                item.plan.body.bare,
            )
            for item in self._declared
        )

    def _may_declare(self) -> None:
        """Raise when it is too late."""

    def on(
        self,
        *patterns: str | type[Event],
        concurrency: int = 1,
        order_by: Literal["channel"] | None = None,
        max_queue: int = 10_000,
        overflow: Overflow = "drop_oldest",
        timeout: float | None = None,
        echo: bool = True,
        wire: Literal["bare"] | None = None,
    ) -> Callable[[F], F]:
        """Handle what is published on channels that match. Returns the function unchanged.

        `concurrency` calls run at a time (more than one gives up order, unless
        `order_by="channel"`); at most `max_queue` messages wait, then `overflow` decides:
        "drop_oldest", "drop_newest", or "latest" (only the newest per channel is kept). `timeout`
        is seconds for one call. `echo=False` skips what this very bus published. `wire="bare"`
        reads payloads without an envelope. Raises InvalidPattern or InvalidHandler, saying what to
        change.
        """
        self._may_declare()
        options = Options(concurrency, order_by, max_queue, overflow, timeout, echo, wire)
        parsed = tuple(patterns_of(patterns, self._prefix))

        def decorate(fn: F) -> F:
            plan = self._plan(fn, parsed, options, local_names=names_of_caller())
            self._declared.append(Declaration(fn, patterns, parsed, options, plan))
            return fn

        return decorate

    def _plan(
        self, fn: Callable[..., Any], patterns: Sequence[Pattern], options: Options, **known: Any
    ) -> CallPlan:
        bare = self._bare or options.wire == "bare"
        return plan_call(fn, patterns, bare=bare, **known)

    def _include(self, other: Declarations, prefix: str) -> None:
        """Take over what another collected, with this prefix before its own."""
        before = prefix + other._prefix
        for item in other._declared:
            parsed = tuple(patterns_of(item.listed, before))
            plan = self._plan(item.fn, parsed, item.options, signature=item.plan.signature)
            self._declared.append(Declaration(item.fn, item.listed, parsed, item.options, plan))
        for gap in other._declared_gaps:
            pattern = Pattern(before + gap.listed)
            self._declared_gaps.append(GapDeclaration(gap.fn, before + gap.listed, pattern))

    def on_gap(self, pattern: str = "*") -> Callable[[G], G]:
        """Hear of messages that were, or may have been, missed on channels that match.

        The function takes one `Gap`. Gaps for the same place merge by summing; none is dropped.
        """
        self._may_declare()
        if not isinstance(pattern, str):
            raise InvalidPattern('on_gap takes a pattern, as in @bus.on_gap("cache:*")')
        parsed = Pattern(self._prefix + pattern)

        def decorate(fn: G) -> G:
            if not callable(fn):
                raise InvalidHandler(f"a gap handler is a function, not {type(fn).__name__}")
            self._declared_gaps.append(GapDeclaration(fn, pattern, parsed))
            return fn

        return decorate


class Router(Declarations):
    """Handlers of one module, to be included in a bus: ``Router(prefix="chat:")``.

    The prefix goes before every pattern (not before those of event classes) and may hold captures.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        if prefix:
            Pattern(prefix)
        self._prefix = prefix


class Engine(Protocol):
    """What a handle needs of the running bus that gave it out."""

    receiver: Receiver

    def check_here(self) -> None: ...

    async def add(
        self, lane: Lane, patterns: Sequence[Pattern], *, is_new: bool = False
    ) -> None: ...

    async def discard(self, lane: Lane, patterns: Sequence[Pattern]) -> None: ...

    async def forget(self, lane: Lane) -> None: ...


class Route:
    """A handler that was attached to a running bus."""

    def __init__(self, run: Engine, lane: Lane) -> None:
        self._run = run
        self._lane = lane

    @property
    def name(self) -> str:
        """Its name in `stats().handlers`."""
        return self._lane.name

    @property
    def patterns(self) -> tuple[str, ...]:
        """What it listens to, in order."""
        return tuple(pattern.text for pattern in self._lane.patterns)

    async def add(self, *patterns: str | type[Event]) -> None:
        """Listen to these too; confirmed when it returns. Raises PermissionDenied."""
        found = patterns_of(patterns)
        plan = self._lane.plan
        for pattern in found:
            missing = plan.required - set(pattern.captures) if plan else ()
            for name in missing:
                raise InvalidHandler(
                    f"pattern {pattern.text!a} has no capture {name!r}, which handler"
                    f" {self.name!r} needs",
                    handler=self.name,
                    parameter=name,
                )
        await self._run.add(self._lane, found)

    async def discard(self, *patterns: str | type[Event]) -> None:
        """Stop listening to these. What arrived before it returns is still handled."""
        await self._run.discard(self._lane, patterns_of(patterns))

    async def detach(self) -> None:
        """Stop listening. What waits is dropped, what runs is cancelled. Idempotent."""
        await self._run.forget(self._lane)

    def __repr__(self) -> str:
        return f"<Route {self.name} on {', '.join(map(ascii, self.patterns)) or 'nothing'}>"


class Messages(Generic[E_co]):
    """The messages of `bus.subscribe`: an async context manager and an async iterator.

    Iteration ends when the bus stops or the block is left.
    """

    def __init__(
        self, run: Engine, patterns: Sequence[Pattern], listen: Callable[[], Lane]
    ) -> None:
        self._run = run
        self._patterns = patterns
        self._listen = listen
        self._lane: Lane | None = None
        self._turn = 0.0

    async def __aenter__(self) -> Self:
        self._run.check_here()
        if self._lane is not None:
            raise InvalidHandler("these messages were entered before: call bus.subscribe again")
        self._lane = lane = self._listen()
        await self._run.add(lane, self._patterns, is_new=True)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lane is not None:
            await self._run.forget(self._lane)

    def __aiter__(self) -> AsyncIterator[Message[E_co]]:
        return self

    async def __anext__(self) -> Message[E_co]:
        lane = self._entered()
        dispatcher = self._run.receiver.dispatcher
        while True:
            if monotonic() - self._turn > TURN:
                await asyncio.sleep(0)
                self._turn = monotonic()
            if lane.closed:
                raise StopAsyncIteration
            item = lane.take()
            if item is None:
                self._run.check_here()  # in another loop nobody would wake it
                await lane.wait()
                self._turn = monotonic()
                continue
            if lane.queue.done is not None:
                lane.queue.done(item)
            event, frame = await dispatcher.read(item)
            if event is not SKIP:
                lane.delivered += 1
                return dispatcher.message(item[0], frame, event)

    async def first(
        self, timeout: float, where: Callable[[Message[E_co]], bool] | None
    ) -> Message[E_co]:
        """Enter, and leave with the first message that fits; see `EventBus.expect`."""
        timer = asyncio.timeout(timeout)
        try:
            async with timer, self:
                async for message in self:
                    if where is None or where(message):
                        return message
        except TimeoutError:
            if not timer.expired():
                raise
            what = ", ".join(pattern.text for pattern in self._patterns)
            fits = "" if where is None else " that `where` takes"
            raise TimeoutError(f"no message for {what!a}{fits} came within {timeout} s") from None
        raise BusClosed("the bus stopped while a message was expected")

    def _entered(self) -> Lane:
        if self._lane is None:
            raise InvalidHandler("enter the messages first: `async with bus.subscribe(...) as m`")
        return self._lane

    @property
    def dropped(self) -> int:
        """Messages that were dropped because too many waited."""
        return 0 if self._lane is None else self._lane.dropped

    async def add(self, *patterns: str | type[Event]) -> None:
        """Listen to these too; confirmed when it returns."""
        await self._run.add(self._entered(), patterns_of(patterns))

    async def discard(self, *patterns: str | type[Event]) -> None:
        """Stop listening to these."""
        await self._run.discard(self._entered(), patterns_of(patterns))
