"""Gaps on their way to `on_gap` handlers: lanes that merge by summing and drop nothing, and the
sums of what other lanes dropped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from eventbus._handlers import name_of
from eventbus._messages import Gap, Message
from eventbus._patterns import Pattern, encode_name
from eventbus._reports import Reports, call_plain, inside, was_cancelled

_MAX_KEYS = 10_000
"""Gaps that wait for one handler. Beyond, they merge into one without channel and source."""

_MAX_DROPS = 1000
"""Channels named one by one in the overflow gaps of one second."""

_Dropped = tuple[str, str, str | None]
_Key = tuple[str, str | None, str | None, str | None, str | None]


class Drops:
    """What lanes dropped, summed into `"overflow"` gaps at most once a second."""

    def __init__(self, tell: Callable[[Gap], None]) -> None:
        self._tell = tell
        self._counts: Counter[_Dropped] = Counter()
        self._since: dict[_Dropped, datetime] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._told = 0.0

    def add(self, handler: str, pattern: str, channel: str) -> None:
        """One message of this channel was dropped for this handler."""
        key: _Dropped = (handler, pattern, channel)
        if key not in self._counts and len(self._counts) >= _MAX_DROPS:
            key = (handler, pattern, None)
        self._counts[key] += 1
        self._since.setdefault(key, datetime.now(UTC))
        if self._timer is None:
            loop = asyncio.get_running_loop()
            due = max(loop.time() + 0.1, self._told + 1.0)
            self._timer = loop.call_at(due, self.tell)

    def tell(self) -> None:
        """Tell now what was summed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._told = asyncio.get_running_loop().time()
        counts, self._counts = self._counts, Counter()
        since, self._since = self._since, {}
        for key, missed in counts.items():
            handler, pattern, channel = key
            self._tell(Gap("overflow", handler, pattern, channel, None, missed, since[key]))


class GapLane:
    """The gaps that wait for one handler, and the task that hands them over."""

    def __init__(
        self,
        fn: Callable[[Gap], Any],
        pattern: Pattern,
        is_async: bool,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._on_fatal = on_fatal
        self.fn = fn
        self.pattern = pattern
        self._is_async = is_async
        self._waiting: dict[_Key, Gap] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def concerns(self, gap: Gap) -> bool:
        """Whether a gap is about a channel that this handler asked for (or may be)."""
        return gap.channel is None or self.pattern.match(encode_name(gap.channel)) is not None

    def add(self, gap: Gap, reports: Reports) -> None:
        """Queue a gap, merging it with one that waits for the same place."""
        key = (gap.reason, gap.handler, gap.pattern, gap.channel, gap.source)
        if key not in self._waiting and len(self._waiting) >= _MAX_KEYS:
            key = (gap.reason, gap.handler, gap.pattern, None, None)
            gap = replace(gap, channel=None, source=None)
        known = self._waiting.get(key)
        if known is not None:
            total = None if gap.missed is None else gap.missed + (known.missed or 0)
            gap = replace(known, missed=total, since=min(known.since, gap.since))
        self._waiting[key] = gap
        if self._task is None:
            self._hire(reports)

    def _hire(self, reports: Reports) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(reports))
        self._task.add_done_callback(lambda _: self._left(reports))

    def _left(self, reports: Reports) -> None:
        """The task is gone; one that the handler cancelled is replaced when more gaps wait."""
        self._task = None
        if self._waiting and not self._closed:
            self._hire(reports)

    async def _run(self, reports: Reports) -> None:
        inside.set(asyncio.current_task())
        while self._waiting:
            gap = self._waiting.pop(next(iter(self._waiting)))
            try:
                await call_plain(self.fn, gap, is_async=self._is_async)
            except (Exception, asyncio.CancelledError) as error:
                cancelled = was_cancelled(error)
                if not (cancelled and self._closed):
                    message: Message[Gap] = Message(gap, gap.channel or "")
                    await reports.report(error, message, name_of(self.fn))
                if cancelled:
                    raise
            except BaseException as error:
                self._on_fatal(error)
                raise

    async def drain(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Return when every gap was handed over (at once when the handler is one of the spared)."""
        while self._task is not None and self._task not in spared:
            await asyncio.wait({self._task})

    def close(self, spared: AbstractSet[asyncio.Task[Any]]) -> set[asyncio.Task[None]]:
        """Cancel the handler, whose task is returned, unless it is spared."""
        self._closed = True
        if self._task is None or self._task in spared:
            return set()
        self._task.cancel()
        return {self._task}
