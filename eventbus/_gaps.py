"""Gaps on their way to `on_gap` handlers: lanes that merge by summing and drop nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from eventbus._handlers import name_of
from eventbus._messages import Gap, Message
from eventbus._patterns import Pattern, encode_name
from eventbus._reports import Reports, call_plain, inside, was_cancelled

_MAX_KEYS = 10_000
"""Gaps that wait for one handler. Beyond, they merge into one without channel and source."""

_Key = tuple[str, str | None, str | None, str | None, str | None]


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
            self._task = asyncio.get_running_loop().create_task(self._run(reports))

    async def _run(self, reports: Reports) -> None:
        inside.set(asyncio.current_task())
        try:
            while self._waiting:
                gap = self._waiting.pop(next(iter(self._waiting)))
                try:
                    await call_plain(self.fn, gap, is_async=self._is_async)
                except (Exception, asyncio.CancelledError) as error:
                    if was_cancelled(error):
                        raise
                    message: Message[Gap] = Message(gap, gap.channel or "")
                    await reports.report(error, message, name_of(self.fn))
                except BaseException as error:
                    self._on_fatal(error)
                    raise
        finally:
            self._task = None

    async def drain(self, spared: AbstractSet[asyncio.Task[Any]]) -> None:
        """Return when every gap was handed over (at once when the handler is one of the spared)."""
        if self._task is not None and self._task not in spared:
            await asyncio.wait({self._task})

    def close(self, spared: AbstractSet[asyncio.Task[Any]]) -> set[asyncio.Task[None]]:
        """Cancel the handler, whose task is returned, unless it is spared."""
        if self._task is None or self._task in spared:
            return set()
        self._task.cancel()
        return {self._task}
