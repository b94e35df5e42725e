"""The values that the bus hands out: what arrived, what was lost, how things stand.

All are immutable. Only values may enter: nothing here knows a connection, a queue or a clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

E = TypeVar("E")

Header = str | int | bool
EMPTY: Mapping[str, Any] = MappingProxyType({})

CORE_ATTRIBUTES = frozenset(
    "specversion id source type time busseq data data_base64 datacontenttype dataschema"
    " subject".split()
)
_HEADER = re.compile(r"[a-z0-9]{1,20}\Z")


def check_headers(headers: Mapping[str, object]) -> None:
    """Raises ValueError or TypeError for a header that CloudEvents could not carry."""
    for name, value in headers.items():
        if not _HEADER.match(name) or name in CORE_ATTRIBUTES:
            raise ValueError(
                f"header {name!a:.200} must be 1 to 20 of a-z and 0-9, and no attribute of the"
                " envelope itself"
            )
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError(f"header {name!r} is a number of more than 64 bits")
        if not isinstance(value, str | int | bool):
            raise TypeError(
                f"header {name!r} is a {type(value).__name__}; str, int and bool travel"
            )


@dataclass(frozen=True, slots=True)
class Message(Generic[E]):
    """A received event with everything that is known of it.

    `channel` is without the namespace. `pattern` is the handler's pattern that matched, `captures`
    the texts that its braces took. `id`, `source`, `type`, `time`, `sequence` come from the
    envelope; they are None on a bare wire (and `sequence` for a foreign publisher). `headers` are
    the other attributes of the envelope.
    """

    event: E
    channel: str
    pattern: str | None = None
    captures: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    id: str | None = None
    source: str | None = None
    type: str | None = None
    time: datetime | None = None
    sequence: int | None = None
    headers: Mapping[str, Header] = field(default_factory=lambda: EMPTY)

    def with_headers(self, headers: Mapping[str, Header] | None = None, /, **more: Header) -> Self:
        """A copy with these headers added. Raises ValueError for a name the wire cannot carry."""
        added = {**(headers or {}), **more}
        check_headers(added)
        return replace(self, headers=MappingProxyType({**self.headers, **added}))


GapReason = Literal["sequence", "overflow", "reconnect"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages were, or may have been, missed.

    `missed` is exact, or None after a reconnect. `handler` and `pattern` name the handler that an
    overflow hit. `since` is the aware UTC time of the last byte before the loss.
    """

    reason: GapReason
    handler: str | None
    pattern: str | None
    channel: str | None
    source: str | None
    missed: int | None
    since: datetime


class Receipt(NamedTuple):
    """What `publish` returns. `receivers` is Redis's own count of the copies that it handed out
    (not people, not handlers); None when the event was buffered or dropped during an outage."""

    id: str | None
    receivers: int | None


State = Literal["starting", "live", "degraded", "down", "closed"]


@dataclass(frozen=True, slots=True)
class Health:
    """How the bus stands. Truthy only if this process can receive.

    `last_received_age` and `round_trip` are seconds, None when nothing was measured yet. `probe`
    says how liveness is proved: "ok", "pending", "denied", or "off". `subscriptions` and `denied`
    are the patterns that the server confirmed and refused.
    """

    state: State
    reason: str | None
    last_received_age: float | None
    round_trip: float | None
    probe: str
    subscriptions: tuple[str, ...]
    denied: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.state in ("live", "degraded")


class _Lane(NamedTuple):
    depth: int
    bytes: int
    delivered: int
    dropped: int
    failed: int


class HandlerStats(_Lane):
    """One handler's lane: ``(depth, bytes, delivered, dropped, failed)``; messages and bytes that
    wait, and what became of the others. `skipped` and `conflated` are attributes beside these."""

    skipped: int
    conflated: int

    @classmethod
    def of(cls, lane: tuple[int, int, int, int, int], skipped: int, conflated: int) -> Self:
        """The figures of one lane."""
        stats = cls(*lane)
        stats.skipped, stats.conflated = skipped, conflated
        return stats


class Stats(NamedTuple):
    """Counters since the start of the bus (docs/delivery.md says what each one counts)."""

    published: int
    refused: int
    uncertain: int
    publish_failed: int
    received: int
    delivered: int
    skipped: int
    invalid: int
    dropped: int
    conflated: int
    missed: int
    failed: int
    reconnects: int
    handlers: Mapping[str, HandlerStats]


@dataclass(frozen=True, slots=True)
class Buffer:
    """An outage policy: keep what is published while Redis is away, and send it first afterwards.

    Bounded by number (the oldest goes) and by age in seconds. With `latest` only the newest per
    channel is kept.
    """

    max_events: int = 10_000
    max_age: float = 30.0
    latest: bool = False

    def __post_init__(self) -> None:
        if self.max_events < 1 or not self.max_age > 0:
            raise ValueError("Buffer needs max_events >= 1 and max_age > 0")
