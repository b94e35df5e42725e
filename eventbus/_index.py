"""An index of globs by what is literal in them: which may match a name, cover a glob, or be
covered.

Theory of operation. A glob has literal bytes at its start, at its end, and in runs between.
Whatever matches a name, or covers another glob, must find its own start, end and longest inner run
(the *needle*) in the literal bytes of the other (the *hay*). Few globs pass that, however many
there are, so the exact and much slower tests (`glob_matches`, `covers`) are made for these few
only.

Pure: no I/O, no clock. Nothing is known here of routes or of what the server does.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from eventbus._patterns import MAX_NAME, covers, glob_matches, tokenize

K = TypeVar("K", bound=tuple[Any, ...])


class Shape(NamedTuple):
    """A name or a glob: its tokens, and what is literal in them. `start`, `end` and `hay` of a name
    are the name itself. Zero bytes, which no name has, part the runs in the hay of a glob."""

    tokens: tuple[int, ...]
    start: bytes
    end: bytes
    needle: bytes
    hay: bytes

    def matches(self, name: bytes) -> bool:
        """Whether this glob matches the name, or is it."""
        size = len(self.start)
        if self.start == self.hay:
            return self.hay == name
        return name[:size] == self.start and glob_matches(self.tokens[size:], name[size:])

    def covers(self, other: Shape) -> bool:
        """Whether this matches all that the other matches. Sound, as `_patterns.covers` is."""
        return (
            self.needle in other.hay
            and other.start.startswith(self.start)
            and other.end.endswith(self.end)
            and covers(self.tokens, other.tokens)
        )


def name_shape(name: bytes) -> Shape:
    """The shape of one literal name."""
    return Shape(tuple(1 << byte for byte in name), name, name, b"", name)


def glob_shape(glob: bytes) -> Shape:
    """The shape of a plain Redis glob."""
    tokens = tokenize(glob)
    single = (
        token.bit_length() - 1 if token > 0 and not token & (token - 1) else 0 for token in tokens
    )
    hay = bytes(single)
    start, *runs = hay.split(b"\0")
    end = runs.pop() if runs else start
    return Shape(tokens, start, end, max(runs, key=len, default=b""), hay)


class Index(Generic[K]):
    """Keys by their shape."""

    def __init__(self) -> None:
        self._names: dict[bytes, K] = {}
        self._globs: dict[tuple[int, int], dict[tuple[bytes, bytes], dict[K, bytes]]] = {}
        self._starts: list[tuple[bytes, K]] = []
        self._ends: list[tuple[bytes, K]] = []

    def add(self, key: K, shape: Shape) -> None:
        """Add a key that is not there."""
        _, start, end, needle, hay = shape
        if start == hay:
            self._names[hay] = key
        else:
            table = self._globs.setdefault((len(start), len(end)), {})
            table.setdefault((start, end), {})[key] = needle
        bisect.insort(self._starts, (start, key))
        bisect.insort(self._ends, (end[::-1], key))

    def remove(self, key: K, shape: Shape) -> None:
        """Remove a key that is there."""
        _, start, end, _, hay = shape
        if start == hay:
            del self._names[hay]
        else:
            sizes = len(start), len(end)
            table = self._globs[sizes]
            del table[start, end][key]
            if not table[start, end]:
                del table[start, end]
                if not table:
                    del self._globs[sizes]
        del self._starts[bisect.bisect_left(self._starts, (start, key))]
        del self._ends[bisect.bisect_left(self._ends, (end[::-1], key))]

    def above(self, start: bytes, end: bytes, hay: bytes) -> Iterator[K]:
        """All that may match a name (which is all three of these), or cover a glob with these."""
        if hay in self._names:
            yield self._names[hay]
        for (before, after), table in self._globs.items():
            if before <= len(start) and after <= len(end):
                found = table.get((start[:before], end[len(end) - after :]))
                if found:
                    for key, needle in found.items():
                        if needle in hay:
                            yield key

    def below(self, shape: Shape) -> list[K]:
        """All that this glob may cover."""
        starts = _span(self._starts, shape.start)
        ends = _span(self._ends, shape.end[::-1])
        order, span = min((self._starts, starts), (self._ends, ends), key=lambda item: len(item[1]))
        return [order[i][1] for i in span]


def _span(order: list[tuple[bytes, K]], first: bytes) -> range:
    """The places of all that begins with these bytes."""
    low = bisect.bisect_left(order, (first,))
    return range(low, bisect.bisect_left(order, (first + b"\xff" * MAX_NAME,), low))
