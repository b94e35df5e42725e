"""The ledger: what became of every message of every (source, channel), from both ends.

`Ledger.publish` notes what a publisher knows (acknowledged, uncertain, refused), `receiver` makes a
bus that notes what was delivered and what was reported missing, and `verdicts` compares them.
`balance` is the whole proof for channels that were heard before a loss and again after it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from eventbus import BusUnavailable, Event, EventBus, Gap, Message, PublishUncertain

CHANNELS = [f"led:{n}" for n in range(1000)]
Pair = tuple[str, str]
PATIENCE = 30.0
"""Seconds for thousands of messages on a busy machine."""


class Entry(Event):
    text: str


class Ledger:
    """What one receiver heard and what it was told it missed, and what its publishers know."""

    def __init__(self) -> None:
        self.delivered: Counter[Pair] = Counter()
        self.missed: Counter[Pair] = Counter()
        self.last: dict[Pair, int] = {}
        self.twice = 0
        self.acknowledged: Counter[Pair] = Counter()
        self.uncertain: Counter[Pair] = Counter()
        self.refused = 0
        self.reconnects = 0
        self._numbers: set[tuple[str, str, int]] = set()
        self._changed = asyncio.Event()

    def hear(self, message: Message[Entry]) -> None:
        pair = (str(message.source), message.channel)
        number = message.sequence or 0
        self.twice += (*pair, number) in self._numbers
        self._numbers.add((*pair, number))
        self.delivered[pair] += 1
        self.last[pair] = max(number, self.last.get(pair, 0))
        self._changed.set()

    def tell(self, gap: Gap) -> None:
        if gap.reason == "sequence":
            self.missed[str(gap.source), str(gap.channel)] += gap.missed or 0
        elif gap.reason == "reconnect":
            self.reconnects += 1
            self._changed.set()

    async def publish(
        self, bus: EventBus, source: str, channels: list[str], text: str | None = None
    ) -> None:
        """Publish once on each channel, many at a time, and note what became of each."""

        async def one(channel: str) -> None:
            try:
                await bus.publish(channel, Entry(text=text or source))
            except PublishUncertain:
                self.uncertain[source, channel] += 1
            except BusUnavailable:
                self.refused += 1
            else:
                self.acknowledged[source, channel] += 1

        for start in range(0, len(channels), 250):
            await asyncio.gather(*map(one, channels[start : start + 250]))

    async def rounds(
        self, publishers: Mapping[str, EventBus], channels: list[str], done: Callable[[], bool]
    ) -> None:
        """Publish on these channels, all publishers in turn, at least once and until `done`."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for source, bus in publishers.items():
                    await self.publish(bus, source, channels)
                if done():
                    return

    async def all_heard(self, publishers: Mapping[str, EventBus]) -> list[Pair]:
        """Publish on all `CHANNELS` until each was heard (again), from every publisher. Returns the
        pairs: from here on the last numbers are those of the publishers."""
        pairs = [(source, channel) for source in publishers for channel in CHANNELS]
        before = {pair: self.last.get(pair) for pair in pairs}
        await self.rounds(
            publishers, CHANNELS, lambda: all(self.last.get(p) != before[p] for p in pairs)
        )
        return pairs

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done():
                self._changed.clear()
                await self._changed.wait()

    def verdicts(self, pairs: Iterable[Pair]) -> Counter[str]:
        """Per pair: do delivered and missed add up to the last number that was heard?"""
        found: Counter[str] = Counter()
        for pair in pairs:
            sum_ = self.delivered[pair] + self.missed[pair]
            exact, last = sum_ == self.last[pair], self.last[pair]
            found["exact" if exact else "unknown" if sum_ < last else "over-reported"] += 1
            most = self.acknowledged[pair] + self.uncertain[pair]
            found["outside the bounds"] += not self.acknowledged[pair] <= sum_ <= most
        return found

    def balance(self, pairs: list[Pair]) -> None:
        """Assert of pairs that were heard before and after, once the receiver has drained: what was
        delivered and what was missed is the last number, nothing came twice, and no more and no
        less is accounted for than the publishers know of."""
        found = self.verdicts(pairs)
        assert found == {"exact": len(pairs), "outside the bounds": 0}, self._wrong(pairs)
        assert self.twice == 0, self.sums()

    def _wrong(self, pairs: list[Pair]) -> str:
        """The pairs that do not balance, some of them, with their figures."""
        wrong = [pair for pair in pairs if self.verdicts([pair])["exact"] != 1]
        wrong += [pair for pair in pairs if self.verdicts([pair])["outside the bounds"]]
        figures = ("delivered", "missed", "last", "acknowledged", "uncertain")
        shown = [{name: getattr(self, name)[pair] for name in figures} for pair in wrong[:5]]
        return f"{len(wrong)} of {len(pairs)} pairs: {shown}; in all {self.sums()}"

    def sums(self) -> str:
        """One line of the totals, for `say`."""
        return (
            f"{sum(self.delivered.values())} delivered, {sum(self.missed.values())} missing,"
            f" {sum(self.uncertain.values())} uncertain, {self.refused} refused,"
            f" {self.twice} twice"
        )


def receiver(url: str, ledger: Ledger, **settings: Any) -> EventBus:
    """A bus that keeps the ledger."""
    bus = EventBus(url, **{"heartbeat": 0.5, "publish_timeout": 0.5, **settings})

    @bus.on("led:*", max_queue=1_000_000)
    async def keep(message: Message[Entry]) -> None:
        ledger.hear(message)

    @bus.on_gap("led:*")
    async def tell(gap: Gap) -> None:
        ledger.tell(gap)

    return bus


def source_of(bus: EventBus) -> str:
    """The source of what a bus publishes, as its receivers see it."""
    assert bus.source is not None
    return bus.source
