"""The beat: each source says from time to time what its last numbers are, and others compare.

Sequence numbers alone show a loss when the same source is heard again on the same channel. With
`beat=True` a bus announces, at each heartbeat, the channels that changed and their last numbers; so
a loss is found although nothing follows it, and on channels that were first used while this process
was away. After an outage a receiver asks, and sources say once more all that they remember.

    {"source": "shop/3f…", "beat": 7, "last": {"chat:1": [12, 5]}}         last number, born
    {"source": "shop/3f…", "beat": 9, "last": {…}, "all": 8}               the end of a repetition
    {"source": "shop/3f…", "ask": true}

*Born* is the newest beat that Redis had acknowledged when number 1 of the channel was taken:
whoever heard that beat, and listens to the same patterns since, has missed what it did not hear.
Pure: dictionaries with bounds, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import orjson

from eventbus._sequences import LIMIT, LONGEST, Inbound, Outbound

MAX_CHANNELS = 10_000
"""Channels that one source announces in one heartbeat; the others wait for the next."""
_CHUNK = 16 * 1024
"""Bytes of one announcement, about: a receiver's loop is not held up by one."""
_LARGE = 4 * _CHUNK
"""Bytes that no announcement has."""
_MAX_SOURCES = 4096
_MAX_NUMBER = 10**18


class Beat(NamedTuple):
    """One announcement on its way: its number, its bytes, and what it said."""

    number: int
    payload: bytes
    last: dict[bytes, int]


class Announcer:
    """The numbers of one source, and what is still to be announced. `skip` bytes go before each
    name on the wire (the namespace)."""

    def __init__(self, source: str, skip: int, limit: int = LIMIT) -> None:
        self._source = source
        self._skip = skip
        self._limit = limit
        self._outbound = Outbound(limit)
        self._born: dict[bytes, int] = {}
        self._changed: dict[bytes, int] = {}
        self._again: list[bytes] = []
        self._again_from = 0
        self._index = 0
        self._heard = 0
        self.unannounced = 0
        """Channels that were forgotten before their turn came: too many changed at once."""

    def take(self, channel: bytes) -> int:
        """The next number of a channel, as `Outbound.take`."""
        number = self._outbound.take(channel)
        if number == 1:
            self._born.pop(channel, None)
            if len(self._born) >= self._limit:
                del self._born[next(iter(self._born))]
            if not self._outbound.forgot:
                self._born[channel] = self._heard
        self._note(channel, number)
        return number

    def _note(self, channel: bytes, number: int) -> None:
        if channel not in self._changed and len(self._changed) >= self._limit:
            del self._changed[next(iter(self._changed))]
            self.unannounced += 1
        self._changed[channel] = number

    def repeat(self) -> None:
        """Somebody came back: announce all that is remembered, the latest first."""
        self._again = list(self._outbound.channels())
        self._again_from = self._index + 1

    def beats(self) -> list[Beat]:
        """What to publish in this heartbeat, oldest change first. Empty when nothing changed; but
        the first one says that this source is there."""
        changed = dict(islice(self._changed.items(), MAX_CHANNELS))
        for channel in changed:
            del self._changed[channel]
        was_asked = bool(self._again_from)
        while self._again and len(changed) < MAX_CHANNELS:
            channel = self._again.pop()
            number = self._outbound.last(channel)
            if number:
                changed.setdefault(channel, number)
        is_over = was_asked and not self._again
        chunks = list(_chunks(changed))
        if not chunks and (is_over or not self._index):
            chunks = [{}]
        beats = []
        for at, chunk in enumerate(chunks):
            self._index += 1
            said: dict[str, Any] = {
                "source": self._source,
                "beat": self._index,
                "last": {
                    channel[self._skip :].decode(): (number, self._born.get(channel, -1))
                    for channel, number in chunk.items()
                },
            }
            if is_over and at == len(chunks) - 1:
                said["all"] = self._again_from
                self._again_from = 0
            beats.append(Beat(self._index, orjson.dumps(said), chunk))
        return beats

    def acknowledged(self, beat: Beat) -> None:
        """Redis has handed it out."""
        self._heard = max(self._heard, beat.number)

    def failed(self, beat: Beat) -> None:
        """It may not have arrived: say it again."""
        for channel, number in beat.last.items():
            if channel not in self._changed:
                self._note(channel, number)


def _chunks(changed: dict[bytes, int]) -> Iterator[dict[bytes, int]]:
    """Pieces of about one chunk of bytes each."""
    chunk: dict[bytes, int] = {}
    size = 0
    for channel, number in changed.items():
        chunk[channel] = number
        size += len(channel) + 24
        if size >= _CHUNK:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


class _Heard:
    """What was heard of one source. Every announcement up to `upto` is known; those from `run` to
    `last` came without a hole."""

    __slots__ = ("last", "run", "upto", "widened")

    def __init__(self, index: int, widened: int) -> None:
        self.last = self.run = self.upto = index
        self.widened = widened


class Listener:
    """Compares what sources announce with what was heard.

    `hears` says whether a channel is listened to at all; `missed(channel, source, number)` is told.
    """

    def __init__(
        self,
        inbound: Inbound,
        hears: Callable[[bytes], bool],
        missed: Callable[[bytes, bytes, int], None],
    ) -> None:
        self._inbound = inbound
        inbound.firsts = {}
        self._hears = hears
        self._missed = missed
        self._sources: dict[bytes, _Heard] = {}
        self.widened = 0
        """Grows when this process begins to listen to something more."""
        self.must_ask = False
        """Whether announcements were lost: ask for a repetition."""
        self.asked = False
        """Whether somebody else asks this source for one."""

    def hear(self, payload: bytes, own: bytes) -> None:
        """An announcement, or a question. What is neither is no concern of ours."""
        if len(payload) > _LARGE:
            return
        try:
            said = orjson.loads(payload)
            source = said["source"].encode()
            if source == own or len(source) > LONGEST:
                return
            if said.get("ask") is True:
                self.asked = True
                return
            index, all_from = int(said["beat"]), int(said.get("all", 0))
            last = [(name.encode(), int(n), int(born)) for name, (n, born) in said["last"].items()]
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        if 0 < index < _MAX_NUMBER and all(0 < number < _MAX_NUMBER for _, number, _ in last):
            self._compare(source, index, all_from, last)

    def _compare(
        self, source: bytes, index: int, all_from: int, last: list[tuple[bytes, int, int]]
    ) -> None:
        heard = self._sources.pop(source, None)
        is_known = heard is not None and heard.widened == self.widened
        if heard is None or not is_known:
            heard = _Heard(index, self.widened)
        if len(self._sources) >= _MAX_SOURCES:
            del self._sources[next(iter(self._sources))]
        self._sources[source] = heard
        announced, hears = self._inbound.announced, self._hears
        for channel, number, born in last:
            everything = is_known and born >= heard.upto and not self._inbound.forgot
            missed = announced(channel, source, number, everything=everything, hears=hears)
            if missed:
                self._missed(channel, source, missed)
        if index <= heard.last:
            return
        if index > heard.last + 1:
            self.must_ask = True
            heard.run = index
        heard.last = index
        if heard.run <= heard.upto + 1 or heard.run <= all_from:
            heard.upto = index
