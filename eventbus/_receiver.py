"""The receiving half of a bus: from a frame to the handlers that it is for.

It is the `Sink` of the transport. Per frame: the sequence check, once; then the lanes of the routes
that want its type. A lane's worker decodes, runs the middleware and calls the handler; what goes
wrong there hurts that call only. What a channel's frames have in common (routes, captures, arguments)
is worked out once per channel and kept until the routing changes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

from anyio import to_thread

from eventbus._envelope import Frame, message_of, peek, read_head
from eventbus._errors import InvalidEvent
from eventbus._gaps import GapLane
from eventbus._handlers import SKIP, Body, CallPlan
from eventbus._lanes import Item, Lane, Options, Pool, Target
from eventbus._messages import EMPTY, Gap, HandlerStats, Message
from eventbus._patterns import Pattern, decode_name, literal_prefix, tokenize
from eventbus._reports import Reports
from eventbus._router import Command, Router, Subscription, wanted
from eventbus._sequences import Inbound
from eventbus._settings import Settings

_MAX_CHANNELS = 8192
"""Channels whose routes are remembered, per subscription."""
_MAX_TYPES = 64
_MAX_DROPS = 1000
"""Channels named one by one in the overflow gaps of one second."""

_DropKey = tuple[str, str, str | None]
Middleware = Callable[[Message[Any], Callable[[Message[Any]], Awaitable[Any]]], Awaitable[Any]]


class _Channel:
    """What the frames of one channel, through one subscription, have in common."""

    __slots__ = ("by_type", "first", "name", "targets")

    def __init__(self, name: str, targets: tuple[Target, ...], first: bool) -> None:
        self.name = name
        self.targets = targets
        self.first = first
        self.by_type: dict[bytes, tuple[tuple[Target, ...], tuple[Target, ...]]] = {}

    def choose(self, type: bytes) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
        """The targets that want this type, and those that do not."""
        known = self.by_type.get(type)
        if known is None:
            if len(self.by_type) >= _MAX_TYPES:
                self.by_type.clear()
            wants = [(t, t.types is None or type in t.types) for t in self.targets]
            known = self.by_type[type] = (
                tuple(target for target, wanted in wants if wanted),
                tuple(target for target, wanted in wants if not wanted),
            )
        return known


class Receiver:
    """The routes of a started bus, their lanes, and the counters of what arrived."""

    def __init__(
        self,
        *,
        bus: object,
        reports: Reports,
        gap_lanes: Sequence[GapLane],
        middleware: Sequence[Middleware],
        source: bytes,
        settings: Settings,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.router: Router[Lane] = Router()
        self.sequences = Inbound()
        self.pool = Pool(settings.max_pending_bytes)
        self.lanes: dict[str, Lane] = {}
        self.received = self.invalid = self.missed = self.reconnects = 0
        self.since = datetime.now(UTC)
        """The last byte before the latest loss of the connection, or the start."""
        self._gone: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._bus = bus
        self._reports = reports
        self._gap_lanes = gap_lanes
        self._middleware = tuple(middleware)
        self._source = source
        self._bare = settings.bare
        self._max_payload = settings.max_payload
        self._on_fatal = on_fatal
        self._channels: dict[Subscription, dict[bytes, _Channel]] = {}
        self._version = -1
        self._drops: Counter[_DropKey] = Counter()
        self._drops_timer: asyncio.TimerHandle | None = None
        self._drops_told = 0.0
        self._reopened = False
        self.away = False
        self._closing = False
        self._silent: asyncio.Future[None] | None = None
        self.age: Callable[[], float | None] = lambda: None
        """Seconds since the transport last heard a byte."""
        self._waiters: dict[Subscription, list[asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- Routes ----------------------------------------------------------------------------------

    def listen(self, name: str, options: Options, body: Body, plan: CallPlan | None) -> Lane:
        """The lane of a new route, with no patterns yet. A name that is taken gets a number."""
        unique = name
        while unique in self.lanes:
            self._names[name] += 1
            unique = f"{name}#{self._names[name]}"
        self._names.setdefault(name, 1)
        lane = Lane(unique, options, body, plan, self.pool, self._dropped, self._work)
        self.lanes[unique] = lane
        return lane

    def add(self, lane: Lane, patterns: Sequence[Pattern]) -> list[Command]:
        """The route listens to these patterns too. Patterns that it has already change nothing."""
        fresh = [p for p in dict.fromkeys(patterns) if p not in lane.patterns]
        lane.patterns += fresh
        return self.router.add(lane, fresh)

    def discard(self, lane: Lane, patterns: Sequence[Pattern]) -> list[Command]:
        """The route no longer listens to these. For a route that goes on: at a fence only."""
        known = [p for p in patterns if p in lane.patterns]
        lane.patterns = [p for p in lane.patterns if p not in known]
        commands = self.router.remove(lane, known)
        self._settle()
        return commands

    async def forget(self, lane: Lane, caller: Callable[[list[Command]], None]) -> None:
        """The route is gone: nothing more is put into its lane, what runs is cancelled."""
        if self.lanes.pop(lane.name, None) is None:
            return
        lane.closed = True
        caller(self.discard(lane, list(lane.patterns)))
        await lane.close()
        self._gone.update(lane.stats()._asdict())

    async def settled(self, patterns: Sequence[Pattern]) -> list[Pattern]:
        """Wait until the server confirmed or denied each pattern; returns the denied ones."""
        for pattern in patterns:
            subscription = wanted(pattern)
            while not self.router.is_settled(subscription):
                waiter = asyncio.get_running_loop().create_future()
                waiters = self._waiters.setdefault(subscription, [])
                waiters.append(waiter)
                try:
                    await waiter
                finally:
                    if waiter in waiters:
                        waiters.remove(waiter)
        return [pattern for pattern in patterns if self.router.is_denied(wanted(pattern))]

    def _settle(self) -> None:
        for subscription in [s for s in self._waiters if self.router.is_settled(s)]:
            for waiter in self._waiters.pop(subscription):
                if not waiter.done():
                    waiter.set_result(None)

    # -- The sink --------------------------------------------------------------------------------

    async def unsubscribe(self, send: Callable[[list[Command]], None]) -> None:
        """Let go of everything, and return when the server has confirmed that (or is gone)."""
        self._closing = True
        send([Command(False, subscription) for subscription in self.router.live])
        while self.router.live:
            self._silent = asyncio.get_running_loop().create_future()
            await self._silent

    def opened(self) -> list[Command]:
        if self._closing:
            return []
        self._reopened = self.away
        return self.router.restart() or self._after(())

    def confirmed(self, subscription: Subscription) -> list[Command]:
        return self._after(self.router.confirmed(subscription))

    def refused(self, subscription: Subscription) -> list[Command]:
        return self._after(self.router.refused(subscription))

    def ended(self, subscription: Subscription) -> list[Command]:
        commands = self.router.ended(subscription)
        self._forget_sequences(subscription)
        self._wake()
        return self._after(commands)

    def _wake(self) -> None:
        if self._silent is not None and not self._silent.done():
            self._silent.set_result(None)

    def lost(self, reason: str) -> None:
        self.away = True
        self._reopened = False
        self.since = datetime.now(UTC) - timedelta(seconds=self.age() or 0.0)
        self.router.lost()
        self._wake()

    def behind(self) -> bool:
        return self.pool.behind()

    def _after(self, commands: Sequence[Command]) -> list[Command]:
        """What follows every answer of the server: those who wait, and the end of an outage."""
        self._settle()
        if self._closing:
            return []
        if self._reopened and not self.router.asking():
            self._reopened = self.away = False
            self.reconnects += 1
            self.tell(Gap("reconnect", None, None, None, None, None, self.since))
            return [*commands, *self.router.retry_denied()]
        return list(commands)

    def _forget_sequences(self, subscription: Subscription) -> None:
        """Channels that nobody listens to any more have no numbers to hold against them."""
        if not subscription.pattern:
            if not self.router.hears(subscription.name):
                self.sequences.forget_channel(subscription.name)
            return
        prefix = literal_prefix(tokenize(subscription.name))
        self.sequences.forget(prefix, lambda channel: not self.router.hears(channel))

    def frame(self, subscription: Subscription, channel: bytes, payload: bytes) -> None:
        if self._version != self.router.version:
            self._version = self.router.version
            self._channels.clear()
        channels = self._channels.get(subscription)
        if channels is None:
            channels = self._channels[subscription] = {}
        known = channels.get(channel)
        if known is None:
            if len(channels) >= _MAX_CHANNELS:
                channels.clear()
            known = channels[channel] = self._resolve(subscription, channel)
        frame = Frame(known.name, payload, None if self._bare else peek(payload))
        if known.first:
            self.received += 1
            if not self._bare:
                self._check_sequence(channel, frame)
            if len(payload) > self._max_payload:
                self._too_large(frame)
        if len(payload) > self._max_payload:
            return
        head = frame.head
        if head is None:
            chosen = known.targets
        else:
            chosen, others = known.choose(head.type)
            for target in others:
                target.lane.skipped += 1
        for target in chosen:
            if target.lane.options.echo or head is None or head.source != self._source:
                target.lane.put(frame, target)

    def _check_sequence(self, channel: bytes, frame: Frame) -> None:
        head = frame.head
        if head is None and b'"busseq"' in frame.payload:
            try:
                head = frame.head = read_head(frame.payload)
            except InvalidEvent:
                return  # the worker that decodes it reports it
        if head is None or head.number is None:
            return
        missed = self.sequences.hear(channel, head.source, head.number)
        if missed:
            self.missed += missed
            source = head.source.decode("utf-8", "replace")
            self.tell(Gap("sequence", None, None, frame.channel, source, missed, self.since))

    def _resolve(self, subscription: Subscription, channel: bytes) -> _Channel:
        matches, first = self.router.resolve(subscription, channel)
        targets = []
        for lane, pattern, captures in matches:
            try:
                static = lane.plan.static(captures, self._bus) if lane.plan else {}
            except ValueError:
                static = None
            shown_captures = MappingProxyType(captures) if captures else EMPTY
            targets.append(Target(lane, pattern.text, shown_captures, static))
        return _Channel(decode_name(channel), tuple(targets), first)

    # -- Gaps ------------------------------------------------------------------------------------

    def tell(self, gap: Gap) -> None:
        """Hand a gap to every `on_gap` handler that it concerns."""
        for lane in self._gap_lanes:
            if lane.concerns(gap):
                lane.add(gap, self._reports)

    def _dropped(self, lane: Lane, item: Item) -> None:
        if not self._gap_lanes:
            return
        key: _DropKey = (lane.name, item.target.pattern, item.frame.channel)
        if key not in self._drops and len(self._drops) >= _MAX_DROPS:
            key = (lane.name, item.target.pattern, None)
        self._drops[key] += 1
        if self._drops_timer is None:
            loop = asyncio.get_running_loop()
            due = max(loop.time(), self._drops_told + 1.0)
            self._drops_timer = loop.call_at(due, self.tell_drops)

    def tell_drops(self) -> None:
        """Sum what was dropped into gaps; at most once a second."""
        if self._drops_timer is not None:
            self._drops_timer.cancel()
            self._drops_timer = None
        self._drops_told = asyncio.get_running_loop().time()
        drops, self._drops = self._drops, Counter()
        for (handler, pattern, channel), missed in drops.items():
            self.tell(Gap("overflow", handler, pattern, channel, None, missed, datetime.now(UTC)))

    # -- One call --------------------------------------------------------------------------------

    async def _work(self, item: Item) -> None:
        """Decode one frame and call one handler."""
        target = item.target
        lane, plan = target.lane, target.lane.plan
        event = await self.read(item)
        if event is SKIP or plan is None:
            return
        lane.delivered += 1
        message = None
        try:
            if self._middleware or plan.needs_message:
                message = self.message(item, event)
            if self._middleware:
                await self._through(0, item, message)
            else:
                await self._call(item, event, message)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            await self._failed(item, event, error)
        except Exception as error:
            await self._failed(item, event, error)
        except BaseException as error:  # KeyboardInterrupt, SystemExit: the end of the bus
            lane.failed += 1
            self._on_fatal(error)
            raise

    async def read(self, item: Item) -> Any:
        """The event of a frame, for its route; SKIP when it is not one for it. Never raises."""
        frame, target = item.frame, item.target
        try:
            event = target.lane.body.decode(frame) if target.static is not None else SKIP
        except InvalidEvent as error:
            await self.judge(frame, error, target)
            return SKIP
        if event is SKIP:
            target.lane.skipped += 1
        return event

    async def _call(self, item: Item, event: Any, message: Message[Any] | None) -> Any:
        target, timeout = item.target, item.target.lane.options.timeout
        plan: CallPlan = target.lane.plan  # type: ignore[assignment]  # a stream calls nothing
        static = target.static or {}
        if plan.threaded:
            call = partial(plan.call, event, item.frame, static, message)
            return await self._call_thread(item, event, call, timeout)
        if timeout is None:
            return await plan.call(event, item.frame, static, message)
        try:
            async with asyncio.timeout(timeout) as clock:
                return await plan.call(event, item.frame, static, message)
        except TimeoutError:
            if not clock.expired():
                raise
            raise TimeoutError(f"took longer than {timeout} s and was cancelled") from None

    async def _call_thread(
        self, item: Item, event: Any, call: Callable[[], Any], timeout: float | None
    ) -> Any:
        """A thread cannot be cancelled: one that overruns has failed, and keeps its place."""
        limiter = item.target.lane.limiter
        running = asyncio.ensure_future(
            to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
        )
        try:
            done, _ = await asyncio.wait({running}, timeout=timeout)
            if done:
                return running.result()
            overrun = TimeoutError(f"took longer than {timeout} s; its thread goes on")
            await self._failed(item, event, overrun)
            await asyncio.wait({running})
            running.exception()
        finally:
            running.cancel()
        return None

    async def _through(self, depth: int, item: Item, message: Message[Any]) -> Any:
        """The middleware from `depth` on, and at last the handler."""
        if depth == len(self._middleware):
            return await self._call(item, message.event, message)
        return await self._middleware[depth](message, partial(self._through, depth + 1, item))

    async def _failed(self, item: Item, event: Any, error: BaseException) -> None:
        target = item.target
        target.lane.failed += 1
        await self._reports.report(error, self.message(item, event), target.lane.name)

    def message(self, item: Item, event: Any) -> Message[Any]:
        """The message around an event, as this route sees it."""
        target = item.target
        bare = self._bare or target.lane.body.bare
        return message_of(item.frame, event, target.pattern, target.captures, bare=bare)

    async def judge(self, frame: Frame, error: InvalidEvent, target: Target | None) -> None:
        """Count and report a frame that is no event, once."""
        if frame.judged:
            return
        frame.judged = True
        self.invalid += 1
        error.channel = frame.channel
        pattern, captures = (target.pattern, target.captures) if target else (None, EMPTY)
        message = message_of(frame, frame.payload, pattern, captures, bare=self._bare)
        await self._reports.report(error, message, target.lane.name if target else "")

    def _too_large(self, frame: Frame) -> None:
        size = len(frame.payload)
        error = InvalidEvent(
            f"the payload has {size} bytes, over max_payload ({self._max_payload})",
            reasons=("payload: too large",),
        )
        frame.payload = b""
        task = asyncio.get_running_loop().create_task(self.judge(frame, error, None))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- The end ---------------------------------------------------------------------------------

    async def drain(self, caller: asyncio.Task[Any] | None) -> None:
        """Return when every lane is empty and idle, and every gap was told."""
        for lane in list(self.lanes.values()):
            if lane.plan is not None:
                await lane.drain(caller)
        self.tell_drops()
        for gaps in self._gap_lanes:
            await gaps.drain()

    async def close(self) -> None:
        """Cancel what still runs; what still waits is dropped and counted."""
        for lane in list(self.lanes.values()):
            await lane.close()
        self.tell_drops()
        for gaps in self._gap_lanes:
            await gaps.close()
        for task in list(self._tasks):
            task.cancel()

    def handler_stats(self) -> dict[str, HandlerStats]:
        """The lanes as they stand, by handler name."""
        return {name: lane.stats() for name, lane in self.lanes.items()}

    def total(self, counter: str) -> int:
        """A lane counter summed over all lanes, those of routes that are gone included."""
        living: int = sum(getattr(lane, counter) for lane in self.lanes.values())
        return living + self._gone[counter]
