"""The numbers that make loss visible: what was sent, and what was heard, per source and channel.

A publisher numbers its messages on each channel from 1 (`busseq`); a hole in what arrives is a
loss, and its size is exact. Both sides remember a bounded number of channels, least recently used
first out: what is forgotten starts again as a first sight, so a count can be missing but never
false. Pure: two bounded dictionaries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

LIMIT = 65_536


class Outbound:
    """The last number given to each channel of one source.

    Two generations of channels: when the young one is full it becomes the old one, and what was not
    used since is forgotten. So this costs one look-up, and what is in use stays.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, limit: int = LIMIT) -> None:
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._half = max(1, limit // 2)

    def take(self, channel: bytes) -> int:
        """The next number for this channel: 1, 2, 3, …"""
        number = self._young.get(channel)
        if number is None:
            number = self._old.get(channel, 0)
            if len(self._young) >= self._half:
                self._old, self._young = self._young, {}
        self._young[channel] = number + 1
        return number + 1


class Inbound:
    """The last number heard from each source on each channel."""

    __slots__ = ("_last", "_limit", "_sources")

    def __init__(self, limit: int = LIMIT) -> None:
        self._last: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._sources: dict[bytes, set[bytes]] = {}
        self._limit = limit

    def __len__(self) -> int:
        return len(self._last)

    def hear(self, channel: bytes, source: bytes, number: int) -> int:
        """How many messages are missing before this one.

        1, a first sight, and a number that is not greater than the last are a new baseline: 0.
        """
        last = self._last
        key = (channel, source)
        known = last.get(key)
        last[key] = number
        if known is None:
            self._remember(channel, source)
            return 0
        last.move_to_end(key)
        return number - known - 1 if number > known and number != 1 else 0

    def _remember(self, channel: bytes, source: bytes) -> None:
        self._sources.setdefault(channel, set()).add(source)
        if len(self._last) > self._limit:
            (channel, source), _ = self._last.popitem(last=False)
            sources = self._sources[channel]
            sources.discard(source)
            if not sources:
                del self._sources[channel]

    def forget(self, prefix: bytes, dead: Callable[[bytes], bool]) -> int:
        """Drop the channels under a literal prefix that are `dead`. Returns how many.

        For when a subscription ended: what is sent on them from now on is nobody's loss.
        """
        known = self._sources
        gone = [c for c in known if c.startswith(prefix) and dead(c)]
        for channel in gone:
            for source in known.pop(channel):
                del self._last[channel, source]
        return len(gone)

    def forget_channel(self, channel: bytes) -> None:
        """Drop one channel: `forget` for a literal subscription, without a search."""
        for source in self._sources.pop(channel, ()):
            del self._last[channel, source]
