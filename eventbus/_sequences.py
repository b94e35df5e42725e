"""The numbers that make loss visible: what was sent, and what was heard, per source and channel.

A publisher numbers its messages on each channel from 1 (`busseq`); a hole in what arrives is a
loss, and its size is exact. Both sides remember a bounded number and forget what was not used for
long: that starts again as a first sight, so a count can be missing but never false. Pure: bounded
dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

LIMIT = 65_536
LONGEST = 512
"""Bytes of a channel or a source that is remembered. What is longer is no name of ours, and would
make the number of entries no bound."""


class Outbound:
    """The last number given to each channel of one source.

    Two generations of channels: when the young one is full it becomes the old one, and what was not
    used since is forgotten. So this costs one look-up, and what is in use stays.
    """

    __slots__ = ("_half", "_old", "_young", "forgot")

    def __init__(self, limit: int = LIMIT) -> None:
        self.forgot = False
        """Whether a channel was forgotten: since then 1 may be a number that was given before."""
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._half = max(1, limit // 2)

    def take(self, channel: bytes) -> int:
        """The next number for this channel: 1, 2, 3, …"""
        number = self._young.get(channel)
        if number is None:
            number = self._old.get(channel, 0)
            if len(self._young) >= self._half:
                self.forgot = self.forgot or bool(self._old)
                self._old, self._young = self._young, {}
        self._young[channel] = number + 1
        return number + 1

    def last(self, channel: bytes) -> int:
        """The last number given to this channel; 0 when it was never used, or was forgotten."""
        return self._young.get(channel) or self._old.get(channel, 0)

    def channels(self) -> Iterator[bytes]:
        """Every channel that is remembered, those not used for long first."""
        yield from (channel for channel in self._old if channel not in self._young)
        yield from self._young


class Inbound:
    """The last number heard from each source on each channel, in two generations as `Outbound`."""

    __slots__ = ("_count", "_half", "_old", "_young", "firsts", "forgot")

    def __init__(self, limit: int = LIMIT) -> None:
        self.firsts: dict[tuple[bytes, bytes], int] | None = None
        """When somebody asks for it: how many came before the first one that was heard."""
        self.forgot = False
        """Whether a pair was forgotten because there are too many."""
        self._young: dict[bytes, dict[bytes, int]] = {}
        self._old: dict[bytes, dict[bytes, int]] = {}
        self._count = 0
        self._half = max(1, limit // 2)

    def __len__(self) -> int:
        generations = (*self._young.values(), *self._old.values())
        return sum(len(sources) for sources in generations)

    def hear(self, channel: bytes, source: bytes, number: int) -> int:
        """How many messages are missing before this one.

        1, a first sight, and a number that is not greater than the last are a new baseline: 0.
        """
        sources = self._young.get(channel)
        known = None if sources is None else sources.get(source)
        if sources is None or known is None:
            known = self._remember(channel, source, number)
        else:
            sources[source] = number
        return number - known - 1 if number > known and number != 1 else 0

    def _remember(self, channel: bytes, source: bytes, number: int) -> int:
        """Put a pair into the young generation; the number before, or this one at a first sight."""
        if len(channel) > LONGEST or len(source) > LONGEST:
            return number
        if self._count >= self._half:
            self.forgot = self.forgot or bool(self._old)
            self._old, self._young, self._count = self._young, {}, 0
        before = self._old.get(channel, {})
        known = before.pop(source, None)
        if known is None:
            known = number
            if self.firsts is not None:
                self._note_first(self.firsts, (channel, source), number)
        if not before:
            self._old.pop(channel, None)
        self._young.setdefault(channel, {})[source] = number
        self._count += 1
        return known

    def _note_first(
        self, firsts: dict[tuple[bytes, bytes], int], pair: tuple[bytes, bytes], number: int
    ) -> None:
        firsts.pop(pair, None)
        if number > 1:
            if len(firsts) >= self._half:
                del firsts[next(iter(firsts))]
            firsts[pair] = number - 1

    def announced(
        self,
        channel: bytes,
        source: bytes,
        number: int,
        *,
        everything: bool,
        hears: Callable[[bytes], bool],
    ) -> int:
        """How many are missing when the source says that `number` was its last one.

        `everything`: all of its messages on this channel were sent while this process listened.
        A channel that it does not hear has none.
        """
        for generation in (self._young, self._old):
            sources = generation.get(channel)
            if sources is not None and (known := sources.get(source)) is not None:
                missed = max(0, number - known)
                if missed:
                    sources[source] = number
                if everything and self.firsts:
                    missed += self.firsts.pop((channel, source), 0)
                return missed
        if not hears(channel) or len(channel) > LONGEST or len(source) > LONGEST:
            return 0
        self._remember(channel, source, number)
        if self.firsts is not None:
            self.firsts.pop((channel, source), None)
        return number if everything else 0

    def forget(self, prefix: bytes, dead: Callable[[bytes], bool]) -> int:
        """Drop the channels under a literal prefix that are `dead`. Returns how many.

        For when a subscription ended: what is sent on them from now on is nobody's loss.
        """
        known = {*self._young, *self._old}
        gone = [c for c in known if c.startswith(prefix) and dead(c)]
        for channel in gone:
            self.forget_channel(channel)
        return len(gone)

    def forget_channel(self, channel: bytes) -> None:
        """Drop one channel: `forget` for a literal subscription, without a search."""
        self._count -= len(self._young.pop(channel, ()))
        self._old.pop(channel, None)
