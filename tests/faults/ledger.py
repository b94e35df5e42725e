"""The ledger: what became of every message of every (source, channel), from both ends.

`Ledger.publish` notes what a publisher knows (acknowledged, uncertain, refused), `receiver` makes a
bus that notes what was delivered and what was reported missing, and `verdicts` compares them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from eventbus import BusUnavailable, Event, EventBus, Gap, Message, PublishUncertain

CHANNELS = [f"led:{n}" for n in range(1000)]
Pair = tuple[str, str]


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

    async def publish(self, bus: EventBus, source: str, channels: list[str]) -> None:
        """Publish once on each channel, many at a time, and note what became of each."""

        async def one(channel: str) -> None:
            try:
                await bus.publish(channel, Entry(text=source))
            except PublishUncertain:
                self.uncertain[source, channel] += 1
            except BusUnavailable:
                self.refused += 1
            else:
                self.acknowledged[source, channel] += 1

        for start in range(0, len(channels), 250):
            await asyncio.gather(*map(one, channels[start : start + 250]))

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done():
                self._changed.clear()
                await self._changed.wait()

    def verdicts(self, pairs: list[Pair]) -> Counter[str]:
        """Per pair: do delivered and missed add up to the last number that was heard?"""
        found: Counter[str] = Counter()
        for pair in pairs:
            sum_ = self.delivered[pair] + self.missed[pair]
            exact, last = sum_ == self.last[pair], self.last[pair]
            found["exact" if exact else "unknown" if sum_ < last else "over-reported"] += 1
            most = self.acknowledged[pair] + self.uncertain[pair]
            found["outside the bounds"] += not self.acknowledged[pair] <= sum_ <= most
        return found


def receiver(url: str, ledger: Ledger) -> EventBus:
    """A bus that keeps the ledger."""
    bus = EventBus(url, heartbeat=0.5, publish_timeout=0.5)

    @bus.on("led:*", max_queue=1_000_000)
    async def keep(message: Message[Entry]) -> None:
        ledger.hear(message)

    @bus.on_gap("led:*")
    async def tell(gap: Gap) -> None:
        ledger.tell(gap)

    return bus


def source_of(bus: EventBus) -> str:
    """The source of what a bus publishes, as its receivers see it."""
    run = bus._run
    assert run is not None
    return run.publisher._source
