"""Lanes: the bounded queue of one route, and the workers that empty it.

The reader of the connection puts frames into lanes and never waits. A full lane drops by its own
named policy and counts. Workers are started when there is work, up to the route's `concurrency`.
Three queues: plain order; order per channel, parallel across channels; only the newest per channel.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eventbus._codec import Reader
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
    """Where the frames of one channel go: a lane, and all that is the same for each of them.

    `static` are arguments of the handler. When a capture did not convert (None is given), nothing
    of this channel is for the lane: such frames are skipped.
    """

    __slots__ = ("captures", "channel", "converts", "lane", "pattern", "static")

    def __init__(
        self,
        lane: Lane,
        channel: str,
        pattern: str,
        captures: Mapping[str, str],
        static: dict[str, Any] | None,
    ) -> None:
        self.lane = lane
        self.channel = channel
        self.pattern = pattern
        self.captures = captures
        self.converts = static is not None
        self.static = static or {}

    def wants(self, type: bytes) -> bool:
        """Whether a message of this wire type is for the lane."""
        types = self.lane.body.types
        return self.converts and (types is None or type in types)


Item = tuple[Target, bytes, int, Reader | None, Frame | None]
"""What waits in a lane: the target, the payload, where its data begins with the reader for it (0
and None when the layout is not our own), and the frame that several lanes share (or None). A plain
tuple: one is made per message and handler."""


# A queue has `append` (which may return an item that the new one replaced), `popleft` (the next
# to work on) and `drop` (the one to give up), both IndexError when there is none; `done` is told
# when an item was worked on, if anything depends on it.


class _Plain(deque[Item]):
    """In order of arrival."""

    done: None = None

    def drop(self, newest: bool) -> Item:
        return self.pop() if newest else self.popleft()


class _PerChannel:
    """In order within a channel; a channel is worked on by one worker at a time.

    `_arrivals` is all items in order of arrival, each with a mark whether it was taken since.
    """

    def __init__(self) -> None:
        self._channels: dict[str, deque[list[Any]]] = {}
        self._ready: deque[str] = deque()
        self._busy: set[str] = set()
        self._arrivals: deque[list[Any]] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, item: Item) -> None:
        channel = item[0].channel
        waiting = self._channels.get(channel)
        if waiting is None:
            waiting = self._channels[channel] = deque()
            if channel not in self._busy:
                self._ready.append(channel)
        marked = [item, False]
        waiting.append(marked)
        if len(self._arrivals) > 2 * self._size + 64:
            self._arrivals = deque(known for known in self._arrivals if not known[1])
        self._arrivals.append(marked)
        self._size += 1

    def popleft(self) -> Item:
        while True:
            channel = self._ready.popleft()
            if channel not in self._busy and channel in self._channels:
                self._busy.add(channel)
                return self._take(channel)

    def _take(self, channel: str, newest: bool = False) -> Item:
        waiting = self._channels[channel]
        marked = waiting.pop() if newest else waiting.popleft()
        if not waiting:
            del self._channels[channel]
            if len(self._ready) > 2 * len(self._channels) + 64:
                self._ready = deque(c for c in dict.fromkeys(self._ready) if c in self._channels)
        marked[1] = True
        self._size -= 1
        item: Item = marked[0]
        return item

    def done(self, item: Item) -> None:
        channel = item[0].channel
        self._busy.discard(channel)
        if channel in self._channels:
            self._ready.append(channel)

    def drop(self, newest: bool) -> Item:
        while True:
            item, taken = self._arrivals.pop() if newest else self._arrivals.popleft()
            if not taken:
                return self._take(item[0].channel, newest)


class _Latest:
    """The newest per channel, in the place of the one that it replaces."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, Item] = OrderedDict()
        self._busy: set[str] = set()

    def __len__(self) -> int:
        return len(self._items)

    def append(self, item: Item) -> Item | None:
        channel = item[0].channel
        replaced = self._items.get(channel)
        self._items[channel] = item
        return replaced

    def replaces(self, item: Item) -> bool:
        """Whether this item would take the place of another."""
        return item[0].channel in self._items

    def popleft(self) -> Item:
        for channel in self._items:
            if channel not in self._busy:
                self._busy.add(channel)
                return self._items.pop(channel)
        raise IndexError

    def done(self, item: Item) -> None:
        self._busy.discard(item[0].channel)

    def drop(self, newest: bool) -> Item:
        if not self._items:
            raise IndexError
        return self._items.popitem(last=newest)[1]


def _limiter(threads: int) -> Any:
    from anyio import CapacityLimiter  # few buses have `def` handlers: import it for these

    return CapacityLimiter(threads)


def _queue_for(options: Options) -> _Plain | _PerChannel | _Latest:
    if options.overflow == "latest":
        return _Latest()
    if options.order_by == "channel" and options.concurrency > 1:
        return _PerChannel()
    return _Plain()


class Pool:
    """All lanes of a bus, which share one bound on the bytes that wait. `busy` are the lanes in
    which something may wait."""

    def __init__(self, max_bytes: int) -> None:
        self.busy: set[Lane] = set()
        self._max_bytes = max_bytes

    def pressure(self) -> bool:
        """Called once per read. While the bound is passed, the lane with most bytes drops by its
        own policy. Returns whether a lane is more than half full."""
        if not self.busy:
            return False
        total = sum(lane.bytes for lane in self.busy)
        while total > self._max_bytes:
            fullest = max(self.busy, key=lambda lane: lane.bytes)
            before = fullest.bytes
            if not fullest.drop():
                break
            total -= before - fullest.bytes
        return any(len(lane.queue) * 2 > lane.options.max_queue for lane in self.busy)


class Lane:
    """The queue of one route, and how its handler is called (`plan` is None for a stream, which is
    read by its user). `serve` is the work of one worker; `on_drop` hears of each message dropped.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        body: Body,
        plan: CallPlan | None,
        pool: Pool,
        on_drop: Callable[[Lane, Item], None],
        serve: Callable[[Lane], Coroutine[Any, Any, None]],
    ) -> None:
        self.name = name
        self.options = options
        self.body = body
        self.plan = plan
        self.patterns: dict[Pattern, None] = {}
        self.limiter = _limiter(options.concurrency) if plan and plan.threaded else None
        self.queue = _queue_for(options)
        self.bytes = 0
        self.delivered = self.dropped = self.failed = self.skipped = self.conflated = 0
        self.closed = False
        self.echo = options.echo
        self._max = options.max_queue
        self._pool = pool
        self._on_drop = on_drop
        self._serve = serve
        self._workers: set[asyncio.Task[None]] = set()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._resting: set[asyncio.Task[Any] | None] = set()
        self._exempt: set[asyncio.Task[Any]] = set()
        self.lock = asyncio.Lock()  # one change of the patterns at a time
        self.switched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.switched.set_result(None)  # done when no discard is on its way

    def stats(self) -> HandlerStats:
        """The lane as it stands."""
        figures = (len(self.queue), self.bytes, self.delivered, self.dropped, self.failed)
        return HandlerStats.of(figures, self.skipped, self.conflated)

    # -- The reader's side -------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Queue one item; drops by the lane's policy when it is full. Never waits."""
        queue = self.queue
        if len(queue) >= self._max and self._makes_no_room(item):
            return
        replaced = queue.append(item)
        self.bytes += len(item[1])
        if replaced is not None:
            self.bytes -= len(replaced[1])
            self.conflated += 1
        if self._idle:
            self._wake()
        elif len(self._workers) < self.options.concurrency:
            self._hire()

    def put_all(self, items: list[Item]) -> None:
        """Queue several items, in order."""
        queue = self.queue
        if not isinstance(queue, _Plain) or len(queue) + len(items) > self._max or not items:
            for item in items:
                self.put(item)
            return
        queue.extend(items)
        self.bytes += sum([len(item[1]) for item in items])
        for _ in items:
            if self._idle:
                self._wake()
            elif len(self._workers) < self.options.concurrency:
                self._hire()
            else:
                break

    def _makes_no_room(self, item: Item) -> bool:
        """The lane is full. Whether that is the end of this item."""
        if self.closed:
            return True
        if self.options.overflow == "drop_newest":
            self._lose(item)
            return True
        if not (isinstance(self.queue, _Latest) and self.queue.replaces(item)):
            self.drop()
        return False

    def _wake(self) -> None:
        waiter = self._idle.popleft()
        self._pool.busy.add(self)
        if not waiter.done():
            waiter.set_result(None)

    def drop(self) -> bool:
        """Drop one message by the lane's policy; False when there is none."""
        try:
            item = self.queue.drop(self.options.overflow == "drop_newest")
        except IndexError:
            return False
        self.bytes -= len(item[1])
        self._lose(item)
        return True

    def _lose(self, item: Item) -> None:
        self.dropped += 1
        self._on_drop(self, item)

    # -- The workers' side -------------------------------------------------------------------------

    def take(self) -> Item | None:
        """The next item, or None. The taker tells `done` when it is done with it."""
        try:
            item = self.queue.popleft()
        except IndexError:
            return None
        self.bytes -= len(item[1])
        return item

    async def wait(self) -> None:
        """Return when something was put."""
        waiter, task = asyncio.get_running_loop().create_future(), asyncio.current_task()
        self._idle.append(waiter)
        self._resting.add(task)
        self._exempt.discard(task)  # its call is over: it waits for no stop
        if not len(self.queue):
            self._pool.busy.discard(self)
            self._tell_drained()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._idle:
                self._idle.remove(waiter)
            elif self._idle and len(self.queue):
                self._wake()  # it was woken for a message that another can take
            raise
        finally:
            self._resting.discard(task)

    def _hire(self) -> None:
        self._pool.busy.add(self)
        if self.plan is None or self.closed:
            return
        loop = asyncio.get_running_loop()
        worker = loop.create_task(self._serve(self), name=f"eventbus {self.name}")
        self._workers.add(worker)
        worker.add_done_callback(self._left)

    def _left(self, worker: asyncio.Task[None]) -> None:
        """A worker is gone; one that a handler cancelled is replaced when there is work."""
        self._workers.discard(worker)
        error = None if worker.cancelled() else worker.exception()
        if isinstance(error, Exception):  # a defect of ours; what stops the bus was told by the bus
            context = {"message": f"a worker of {self.name} failed", "exception": error}
            worker.get_loop().call_exception_handler(context)
        if len(self.queue) and not self.closed:
            self._hire()
        self._tell_drained()

    # -- The end -----------------------------------------------------------------------------------

    def _is_drained(self) -> bool:
        if self._exempt:  # what stands behind them waits for them
            return self._workers - self._exempt <= self._resting
        return not len(self.queue) and len(self._workers) == len(self._idle)

    def spare(self, caller: asyncio.Task[Any] | None) -> None:
        """A handler of this lane waits for the stop itself: it is neither waited for nor
        cancelled."""
        if caller in self._workers and caller not in self._resting:
            self._exempt.add(caller)
            self._tell_drained()

    def _tell_drained(self) -> None:
        if self._waiters and self._is_drained():
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters.clear()

    async def drain(self) -> None:
        """Return when nothing waits and nothing runs, but for what was spared."""
        if not self._is_drained():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def close(self) -> set[asyncio.Task[None]]:
        """The end: cancel the workers, which are returned; what still waits is dropped and counted.
        Idempotent."""
        self.closed = True
        self._pool.busy.discard(self)
        for waiter in self._idle:
            if not waiter.done():
                waiter.set_result(None)
        workers = self._workers - self._exempt - {asyncio.current_task()}
        for worker in workers:
            worker.cancel()
        while len(self.queue):
            self.bytes -= len(self.queue.drop(False)[1])
            self.dropped += 1
        return workers
