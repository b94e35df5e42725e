"""Lanes: the bounded queue of one route, and the workers that empty it.

The reader of the connection puts frames into lanes and never waits. A full lane drops by its own
named policy and counts. Workers are started when there is work, up to the route's `concurrency`.
Three queues: plain order; order per channel, parallel across channels; only the newest per channel.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, Protocol

from anyio import CapacityLimiter

from eventbus._envelope import Frame
from eventbus._errors import InvalidHandler
from eventbus._handlers import Body, CallPlan
from eventbus._messages import HandlerStats
from eventbus._patterns import Pattern

Overflow = Literal["drop_oldest", "drop_newest", "latest"]

TURN = 0.004
"""Seconds that a worker may go on before it gives the loop back. A few ms keep a web server alive;
a whole read chunk must fit in, or a burst is dropped that the handler could have taken."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a route, checked. Raises InvalidHandler for what contradicts itself."""

    concurrency: int = 1
    order_by: Literal["channel"] | None = None
    max_queue: int = 10_000
    overflow: Overflow = "drop_oldest"
    timeout: float | None = None
    echo: bool = True
    wire: Literal["bare"] | None = None

    def __post_init__(self) -> None:
        wrong = [
            (self.concurrency < 1, "concurrency must be at least 1"),
            (self.max_queue < 1, "max_queue must be at least 1"),
            (self.order_by not in (None, "channel"), 'order_by is None or "channel"'),
            (
                self.overflow not in ("drop_oldest", "drop_newest", "latest"),
                'overflow is "drop_oldest", "drop_newest" or "latest"',
            ),
            (self.timeout is not None and not self.timeout > 0, "timeout must be positive seconds"),
            (self.wire not in (None, "bare"), 'wire is None or "bare"'),
        ]
        problems = [text for is_wrong, text in wrong if is_wrong]
        if problems:
            raise InvalidHandler("; ".join(problems))


class Target:
    """Where a frame of one channel goes: a lane, and all that is the same for each such frame."""

    __slots__ = ("captures", "lane", "pattern", "static", "types")

    def __init__(
        self,
        lane: Lane,
        pattern: str,
        captures: Mapping[str, str],
        static: dict[str, Any] | None,
    ) -> None:
        self.lane = lane
        self.pattern = pattern
        self.captures = captures
        self.static = static
        """Arguments of the handler; None when a capture did not convert: such frames are skipped."""
        self.types = lane.body.types if static is not None else frozenset[bytes]()
        """Wire types that the lane takes; None: all."""


class Item:
    """A frame that waits in a lane."""

    __slots__ = ("frame", "taken", "target")

    def __init__(self, frame: Frame, target: Target) -> None:
        self.frame = frame
        self.target = target
        self.taken = False


class _Queue(Protocol):
    def __len__(self) -> int: ...
    def push(self, item: Item) -> Item | None: ...
    def pop(self) -> Item | None: ...
    def done(self, item: Item) -> None: ...
    def drop(self) -> Item | None: ...


class _Plain:
    """In order of arrival."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Item) -> None:
        self._items.append(item)

    def pop(self) -> Item | None:
        return self._items.popleft() if self._items else None

    def done(self, item: Item) -> None:
        pass

    def drop(self) -> Item | None:
        return self.pop()


class _PerChannel:
    """In order within a channel; a channel is worked on by one worker at a time."""

    def __init__(self) -> None:
        self._channels: dict[str, deque[Item]] = {}
        self._ready: deque[str] = deque()
        self._busy: set[str] = set()
        self._arrivals: deque[Item] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: Item) -> None:
        channel = item.frame.channel
        waiting = self._channels.get(channel)
        if waiting is None:
            waiting = self._channels[channel] = deque()
            if channel not in self._busy:
                self._ready.append(channel)
        waiting.append(item)
        if len(self._arrivals) > 2 * self._size + 64:
            self._arrivals = deque(known for known in self._arrivals if not known.taken)
        self._arrivals.append(item)
        self._size += 1

    def pop(self) -> Item | None:
        while self._ready:
            channel = self._ready.popleft()
            if channel in self._busy or channel not in self._channels:
                continue
            self._busy.add(channel)
            return self._take(channel)
        return None

    def _take(self, channel: str) -> Item:
        waiting = self._channels[channel]
        item = waiting.popleft()
        if not waiting:
            del self._channels[channel]
        item.taken = True
        self._size -= 1
        return item

    def done(self, item: Item) -> None:
        channel = item.frame.channel
        self._busy.discard(channel)
        if channel in self._channels:
            self._ready.append(channel)

    def drop(self) -> Item | None:
        while self._arrivals:
            oldest = self._arrivals.popleft()
            if not oldest.taken:
                return self._take(oldest.frame.channel)
        return None


class _Latest:
    """The newest per channel, in the place of the one that it replaces."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, Item] = OrderedDict()
        self._busy: set[str] = set()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Item) -> Item | None:
        channel = item.frame.channel
        replaced = self._items.get(channel)
        self._items[channel] = item
        return replaced

    def pop(self) -> Item | None:
        for channel in self._items:
            if channel not in self._busy:
                self._busy.add(channel)
                return self._items.pop(channel)
        return None

    def done(self, item: Item) -> None:
        self._busy.discard(item.frame.channel)

    def drop(self) -> Item | None:
        return self._items.popitem(last=False)[1] if self._items else None


def _queue_for(options: Options) -> _Queue:
    if options.overflow == "latest":
        return _Latest()
    if options.order_by == "channel" and options.concurrency > 1:
        return _PerChannel()
    return _Plain()


class Pool:
    """All lanes of a bus, which share one bound on the bytes that wait."""

    def __init__(self, max_bytes: int) -> None:
        self.lanes: dict[Lane, None] = {}
        self.bytes = 0
        self.max_bytes = max_bytes
        self.crowded: set[Lane] = set()

    def shed(self) -> None:
        """Let the lanes with most bytes drop until the bound holds."""
        while self.bytes > self.max_bytes:
            fullest = max(self.lanes, key=lambda lane: lane.bytes)
            if not fullest.drop():
                return

    def behind(self) -> bool:
        """Whether a lane is more than half full."""
        return bool(self.crowded)


class Lane:
    """The queue of one route, and how its handler is called (`plan` is None for a stream, which is
    read by its user). `work` handles one item; `on_drop` hears of each message dropped."""

    def __init__(
        self,
        name: str,
        options: Options,
        body: Body,
        plan: CallPlan | None,
        pool: Pool,
        on_drop: Callable[[Lane, Item], None],
        work: Callable[[Item], Awaitable[None]],
    ) -> None:
        self.name = name
        self.options = options
        self.body = body
        self.plan = plan
        self.patterns: list[Pattern] = []
        self.limiter = CapacityLimiter(options.concurrency) if plan and plan.threaded else None
        self.queue = _queue_for(options)
        self.bytes = 0
        self.delivered = self.dropped = self.failed = self.skipped = self.conflated = 0
        self._pool = pool
        self._on_drop = on_drop
        self._work = work
        self._workers: set[asyncio.Task[None]] = set()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._exempt: asyncio.Task[Any] | None = None
        self.active = 0
        self.closed = False
        pool.lanes[self] = None

    def stats(self) -> HandlerStats:
        return HandlerStats(
            len(self.queue),
            self.bytes,
            self.delivered,
            self.dropped,
            self.failed,
            self.skipped,
            self.conflated,
        )

    # -- The reader's side -------------------------------------------------------------------------

    def put(self, frame: Frame, target: Target) -> None:
        """Queue one frame; drops by the lane's policy when it is full. Never waits."""
        if self.closed:
            return
        item = Item(frame, target)
        queue = self.queue
        if len(queue) >= self.options.max_queue and self.options.overflow != "latest":
            if self.options.overflow == "drop_newest":
                self._lose(item)
                return
            self.drop()
        replaced = queue.push(item)
        size = len(frame.payload)
        if replaced is not None:
            self.conflated += 1
            size -= len(replaced.frame.payload)
        elif len(queue) > self.options.max_queue:
            self.drop()
        self.bytes += size
        self._pool.bytes += size
        if len(queue) * 2 > self.options.max_queue:
            self._pool.crowded.add(self)
        if self._pool.bytes > self._pool.max_bytes:
            self._pool.shed()
        if self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
        elif self.plan is not None and len(self._workers) < self.options.concurrency:
            self._hire()

    def drop(self) -> bool:
        """Drop one message by the lane's policy; False when there is none."""
        item = self.queue.drop()
        if item is None:
            return False
        self._release(item)
        self._lose(item)
        return True

    def _lose(self, item: Item) -> None:
        self.dropped += 1
        self._on_drop(self, item)

    def _release(self, item: Item) -> None:
        size = len(item.frame.payload)
        self.bytes -= size
        self._pool.bytes -= size
        if self._pool.crowded and len(self.queue) * 2 <= self.options.max_queue:
            self._pool.crowded.discard(self)

    # -- The workers' side -------------------------------------------------------------------------

    def take(self) -> Item | None:
        """The next item, or None. The taker calls `finish` when it is done with it."""
        item = self.queue.pop()
        if item is not None:
            self._release(item)
            self.active += 1
        return item

    def finish(self, item: Item) -> None:
        self.active -= 1
        self.queue.done(item)
        if not self.active and self._waiters and not len(self.queue):
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    async def wait(self) -> None:
        """Return when something was put."""
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._idle:
                self._idle.remove(waiter)
            raise

    def _hire(self) -> None:
        worker = asyncio.get_running_loop().create_task(self._run(), name=f"eventbus {self.name}")
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _run(self) -> None:
        work = self._work
        turn = monotonic()
        while not self.closed:
            item = self.take()
            if item is None:
                await self.wait()
                turn = monotonic()
                continue
            try:
                await work(item)
            finally:
                self.finish(item)
            if monotonic() - turn > TURN:
                await asyncio.sleep(0)
                turn = monotonic()

    # -- The end -----------------------------------------------------------------------------------

    async def drain(self, caller: asyncio.Task[Any] | None) -> None:
        """Return when nothing waits and nothing runs. A handler that itself waits for this (the
        `caller`) is not waited for, nor is what only it could have handled."""
        if caller in self._workers:
            self._exempt = caller
            if self.options.concurrency == 1 or self.active == 1:
                return
        elif self.active or len(self.queue):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    async def close(self) -> None:
        """Cancel the workers and drop what still waits. Idempotent."""
        self.closed = True
        self._pool.lanes.pop(self, None)
        self._pool.crowded.discard(self)
        for waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)
        spared = (self._exempt, asyncio.current_task())
        workers = [worker for worker in self._workers if worker not in spared]
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)
        while (item := self.queue.drop()) is not None:
            self._release(item)
            self.dropped += 1
