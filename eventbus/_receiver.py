"""The receiving half of a bus: from a frame to the handlers that it is for.

It is the `Sink` of the transport. Per frame: the sequence check, once; then the lanes of the routes
that want its type. A lane's worker decodes, runs the middleware and calls the handler; what goes
wrong there hurts that call only. What a channel's frames have in common (routes, captures,
arguments) is worked out once per channel and kept until the routing changes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

from eventbus._beats import Listener
from eventbus._dispatch import Dispatcher, Middleware
from eventbus._envelope import Frame, is_plain, own_layout, peek, read_head, time_of
from eventbus._errors import BusClosed, InvalidEvent
from eventbus._gaps import Drops, GapLane
from eventbus._handlers import Body, CallPlan
from eventbus._lanes import Item, Lane, Options, Pool, Target
from eventbus._messages import EMPTY, Gap, HandlerStats
from eventbus._patterns import MAX_NAME, Pattern, decode_name, literal_prefix, tokenize
from eventbus._reports import Reports, finish
from eventbus._router import PROBE_PREFIX, Command, Router, Subscription, wanted
from eventbus._sequences import Inbound
from eventbus._settings import Settings
from eventbus._targets import Channel, Choice

_MAX_CHANNELS = 8192
"""Channels whose routes are remembered, per subscription."""
_BRACE = ord("}")
_HEAD_ROOM = 4096
"""Bytes in which the head of a payload that is too large is looked for."""
_MAX_TIMES = 256
"""Times that were found good; messages of one millisecond share one."""


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
        self.listener = (
            Listener(self.sequences, self.router.hears, self._announced) if settings.beat else None
        )
        self.pool = Pool(settings.max_pending_bytes)
        self.lanes: dict[str, Lane] = {}
        self.received = self.missed = self.reconnects = 0
        self.since = datetime.now(UTC)
        """The last byte before the latest loss of the connection, or the start."""
        self._gone: Counter[str] = Counter()
        self._leaving: set[Lane] = set()  # their counts are not in `_gone` yet
        self._names: dict[str, int] = {}  # the last number of names given out twice
        self._bus = bus
        self._reports = reports
        self._gap_lanes = gap_lanes
        self.dispatcher = Dispatcher(reports, middleware, bare=settings.bare, on_fatal=on_fatal)
        self._source = source
        self._bare = settings.bare
        self._max_payload = settings.max_payload
        self._skip = len(settings.prefix.encode())
        self._limit = 0 if settings.bare else settings.max_payload
        self._channels: dict[Subscription, dict[bytes, Channel]] = {}
        self._times: set[bytes] = set()
        self._current: Subscription | None = None
        self._known: dict[bytes, Channel] = {}
        self._seen: set[bytes] = set()
        self._version = -1
        self._drops = Drops(self.tell)
        self._reopened = False
        self.away = False
        self._before: set[Subscription] = set()  # what was live before the loss
        self._closing = self._closed = False
        self._let_go: set[Subscription] = set()
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
            self._names[name] = self._names.get(name, 1) + 1
            unique = f"{name}#{self._names[name]}"
        lane = Lane(unique, options, body, plan, self.pool, self._dropped, self.dispatcher.serve)
        self.lanes[unique] = lane
        return lane

    def add(self, lane: Lane, patterns: Sequence[Pattern]) -> list[Command]:
        """The route listens to these patterns too. Patterns that it has already change nothing."""
        fresh = [p for p in dict.fromkeys(patterns) if p not in lane.patterns]
        lane.patterns |= dict.fromkeys(fresh)
        return self.router.add(lane, fresh)

    def discard(self, lane: Lane, patterns: Sequence[Pattern]) -> list[Command]:
        """The route no longer listens to these. For a route that goes on: at a fence only."""
        known = [p for p in dict.fromkeys(patterns) if p in lane.patterns]
        for pattern in known:
            del lane.patterns[pattern]
        commands = self.router.remove(lane, known)
        self._settle()
        return commands

    async def forget(self, lane: Lane, caller: Callable[[list[Command]], None]) -> None:
        """The route is gone: nothing more is put into its lane, what runs is cancelled."""
        if lane.name not in self.lanes:
            return
        self._leaving.add(lane)
        del self.lanes[lane.name]
        lane.closed = True
        caller(self.discard(lane, list(lane.patterns)))
        try:
            await finish(lane.close(), lane.name)
        finally:  # what it counted stays counted, also when the caller is cancelled here
            for counter in ("delivered", "dropped", "failed", "skipped", "conflated"):
                self._gone[counter] += getattr(lane, counter)
            self._leaving.discard(lane)

    async def settled(self, patterns: Sequence[Pattern]) -> list[Pattern]:
        """Wait until the server confirmed or denied each pattern; returns the denied ones."""
        for pattern in patterns:
            subscription = wanted(pattern)
            while not self.router.is_settled(subscription):
                if self._closed:
                    raise BusClosed("the bus was stopped")
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
        self._let_go.update(self.router.live)
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
        if self.listener is not None and subscription not in self._before:
            self.listener.widened += 1
        commands = self._after(self.router.confirmed(subscription))
        if self._closing and subscription not in self._let_go:  # it was asked for before the end
            self._let_go.add(subscription)
            return [Command(False, subscription)]
        return commands

    def refused(self, subscription: Subscription) -> list[Command]:
        return self._after(self.router.refused(subscription))

    def ended(self, subscription: Subscription) -> list[Command]:
        commands = self.router.ended(subscription)
        if not self._closing:  # at the end all numbers go, and each search is through all of them
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
        if self.router.live:
            self._before = set(self.router.live)
        self.router.lost()
        self._wake()

    def beat(self, payload: bytes) -> None:
        if self.listener is not None:
            self.listener.hear(payload, self._source)

    def _announced(self, channel: bytes, source: bytes, missed: int) -> None:
        self._missed(decode_name(channel), source, missed)

    def pressure(self) -> bool:
        return self.pool.pressure()

    def _after(self, commands: Sequence[Command]) -> list[Command]:
        """What follows every answer of the server: those who wait, and the end of an outage."""
        self._settle()
        if self._closing:
            return []
        if self._reopened and not self.router.asking():
            self._reopened = self.away = False
            self.reconnects += 1
            self._before = set()
            if self.listener is not None:
                self.listener.must_ask = True
            self.sequences.forget(b"", lambda channel: not self.router.hears(channel))
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

    def frames(self, subscription: Subscription, rows: Sequence[Sequence[bytes]]) -> None:
        if subscription is not self._current or self._version != self.router.version:
            self._turn_to(subscription)
        recognise, hear, limit, mine = own_layout, self.sequences.hear, self._limit, self._source
        waiting: list[Item] = []
        lane: Lane | None = None
        heard = 0
        for row in rows:
            channel, payload = row[-2], row[-1]
            known = self._known.get(channel) or self._learn(subscription, channel)
            found = recognise(payload)
            if found is None or payload[-1] != _BRACE or len(payload) > limit:
                self._put(lane, waiting)
                lane = None
                self._unusual(known, payload)
                continue
            source, type, time, number = found.groups()
            choice = known.by_type.get(type) or known.choose(type)
            if choice.odd or (time not in self._times and self._is_odd(source, time)):
                self._put(lane, waiting)
                lane = None
                self._unusual(known, payload)
                continue
            if known.first:
                heard += 1
                missed = hear(known.key, source, int(number))
                if missed:
                    self._missed(known.name, source, missed)
            if choice.only is None:
                self._put(lane, waiting)
                lane = None
                self._spread(choice, source, Frame(known.name, payload))
                continue
            target, reader = choice.only
            if target.lane is not lane:
                self._put(lane, waiting)
                lane = target.lane
            if target.lane.echo or source != mine:
                waiting.append((target, payload, found.end(), reader, None))
        self._put(lane, waiting)
        self.received += heard

    def _is_odd(self, source: bytes, time: bytes) -> bool:
        """Look at what the fast recognition passed over: whether the long way must judge it."""
        if not is_plain(source) or time_of(time) is None:
            return True
        if len(self._times) >= _MAX_TIMES:
            self._times.clear()
        self._times.add(time)
        return False

    def _put(self, lane: Lane | None, waiting: list[Item]) -> None:
        """Put what was collected for one lane, before anything else goes into any."""
        if lane is not None:
            lane.put_all(waiting)
            waiting.clear()

    def _spread(self, choice: Choice, source: bytes, frame: Frame) -> None:
        """A frame that no handler, or more than one, wants."""
        for target in choice.targets:
            if target.lane.echo or source != self._source:
                target.lane.put((target, frame.payload, 0, None, frame))
        for lane in choice.skipped:
            lane.skipped += 1

    def _unusual(self, known: Channel, payload: bytes) -> None:
        """A frame with headers, of another publisher, without an envelope, or too large."""
        frame = Frame(known.name, payload)
        is_large = len(payload) > self._max_payload
        head = None if self._bare else peek(payload[:_HEAD_ROOM] if is_large else payload)
        if head is None and not self._bare and not is_large and b'"busseq"' in payload:
            with suppress(InvalidEvent):  # the worker that decodes it reports it
                head = read_head(payload)
        frame.head = head
        if known.first:
            self.received += 1
            if head is not None and head.number is not None:
                missed = self.sequences.hear(known.key, head.source, head.number)
                if missed:
                    self._missed(known.name, head.source, missed)
        if is_large:
            if known.first:
                self._too_large(frame)
            return
        targets = known.targets
        if head is not None:
            choice = known.by_type.get(head.type) or known.choose(head.type)
            self._spread(choice, head.source, frame)
            return
        for target in targets:
            target.lane.put((target, payload, 0, None, frame))

    def _missed(self, channel: str, source: bytes, missed: int) -> None:
        self.missed += missed
        name = source.decode("utf-8", "replace")
        self.tell(Gap("sequence", None, None, channel, name, missed, self.since))

    def _turn_to(self, subscription: Subscription) -> None:
        """Frames of this subscription follow: have what is known of its channels at hand."""
        if self._version != self.router.version:
            self._version = self.router.version
            self._channels.clear()
        self._current = subscription
        self._known = self._channels.setdefault(subscription, {})

    def _learn(self, subscription: Subscription, channel: bytes) -> Channel:
        """Work out what frames of this channel (its name on the wire) have in common."""
        wire, channel = channel, channel[self._skip :]
        matches, first = self.router.resolve(subscription, channel)
        name = decode_name(channel)
        targets: list[Target] = []
        for lane, pattern, captures in matches:
            static: dict[str, Any] | None = {}
            if lane.plan is not None:
                static = lane.plan.static(captures, self._bus)
            shown = MappingProxyType(captures) if captures else EMPTY
            targets.append(Target(lane, name, pattern.text, shown, static))
        if PROBE_PREFIX in channel:
            first = False  # what buses say to themselves is no message
        known = Channel(channel, targets, first)
        if len(wire) > MAX_NAME:
            return known  # no bus of ours takes such a name: it is not worth keeping
        if wire in self._seen:
            if len(self._known) >= _MAX_CHANNELS:
                self._known.clear()
            self._known[wire] = known
        else:  # most channels that are met once are never met again: only their name is kept
            if len(self._seen) >= _MAX_CHANNELS:
                self._seen.clear()
            self._seen.add(wire)
        return known

    # -- Gaps ------------------------------------------------------------------------------------

    def tell(self, gap: Gap) -> None:
        """Hand a gap to every `on_gap` handler that it concerns."""
        for lane in self._gap_lanes:
            if lane.concerns(gap):
                lane.add(gap, self._reports)

    def _dropped(self, lane: Lane, item: Item) -> None:
        if self._gap_lanes:
            target = item[0]
            self._drops.add(lane.name, target.pattern, target.channel)

    def _too_large(self, frame: Frame) -> None:
        size = len(frame.payload)
        error = InvalidEvent(
            f"the payload has {size} bytes, over max_payload ({self._max_payload})",
            reasons=("payload: too large",),
        )
        frame.payload = b""
        task = asyncio.get_running_loop().create_task(self.dispatcher.judge(frame, error, None))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- The end ---------------------------------------------------------------------------------

    def spare(self, caller: asyncio.Task[Any] | None) -> None:
        """A handler that waits for the stop is not waited for."""
        for lane in self.lanes.values():
            lane.spare(caller)

    async def drain(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Return when every lane is empty and idle, and every gap was told, but for what the spared
        tasks themselves stand in the way of."""
        for lane in list(self.lanes.values()):
            if lane.plan is not None:
                await lane.drain()
        self._drops.tell()
        for gaps in self._gap_lanes:
            await gaps.drain(spared)

    async def close(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Cancel what still runs; what still waits is dropped and counted."""
        self._closed = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(BusClosed("the bus was stopped"))
        tasks: set[asyncio.Task[Any]] = set()
        for lane in list(self.lanes.values()):
            tasks |= lane.close()
        self._drops.tell()
        for gaps in self._gap_lanes:
            tasks |= gaps.close(spared)
        for task in self._tasks:
            task.cancel()
        await finish(tasks, "some handlers")

    def handler_stats(self) -> dict[str, HandlerStats]:
        """The lanes as they stand, by handler name."""
        return {name: lane.stats() for name, lane in list(self.lanes.items())}

    def total(self, counter: str) -> int:
        """A lane counter summed over all lanes, those of routes that are gone included."""
        lanes = {*self.lanes.values(), *self._leaving}  # a copy: a scrape reads in another thread
        living: int = sum(getattr(lane, counter) for lane in lanes)
        return living + self._gone[counter]
