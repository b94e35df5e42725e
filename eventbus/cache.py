"""A cache in each process, and invalidations on the bus: never stale after a loss.

An invalidation that gets lost would leave an old value for ever. So a kept value counts only while
the bus can hear: once it is known to be deaf, and for every gap, the policy of the cache decides
what still may be served. A value that was being loaded when its key was invalidated, or when a loss
was noticed, is not kept, and is loaded again for whoever waits. An invalidation that could not be
published is owed, and published when Redis is back; a key that is dropped twice does no harm.

The map itself is cachetools' (extra ``cache``). Only local memory may enter: no second level.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import wraps
from string import Formatter
from time import monotonic
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar
from uuid import UUID

from eventbus import (
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    InvalidChannel,
    InvalidHandler,
    Message,
    PublishUncertain,
    escape,
)

__all__ = ["CacheStats", "Invalidated", "LocalCache", "Policy"]

P = ParamSpec("P")
T = TypeVar("T")
Policy = Literal["flush", "key", "shorten"] | Callable[[Gap], object]

_LOOK = 0.05  # seconds for which "the bus can hear" is believed
_TRIES = 3  # loads for one caller, when invalidations keep coming in between
_MAX_OWED = 10_000  # keys that wait to be published; more become one "everything"
_AGAIN = 0.25  # seconds between attempts to publish what is owed
_ALL = "*"


class Invalidated(Event):
    """A key whose value has changed; ``*`` is every key. Any message on the channel says so too."""

    key: str


class CacheStats(NamedTuple):
    """Since the cache was made: reads served from memory or not, loaders called, loaded values not
    kept (an invalidation or a loss came first), invalidations from anywhere, flushes after a loss;
    and how many values are kept now."""

    hits: int
    misses: int
    loads: int
    discarded: int
    invalidated: int
    flushes: int
    size: int


class _Entry(NamedTuple):
    value: Any
    until: float


@dataclass(slots=True)
class _Flight:
    """One load, and how many wait for it. `stale`: what it brings is not to be kept."""

    task: asyncio.Task[Any] = field(init=False)
    waiting: int = 0
    stale: bool = False


class LocalCache:
    """Values by key, dropped everywhere when one node says so. Make it before the bus starts, one
    per prefix and bus.

    `max_size` values (the least recently used goes) are kept for `ttl` seconds at most. `on_gap` is
    the policy for a loss: "flush" everything; "key", only the one that the gap names (everything
    when it names none); "shorten", what is kept or loaded meanwhile lives for `shorten_to` seconds;
    or a function of the `Gap`, which does it all, and until then the cache serves what it has.
    `jitter`: what goes after a loss goes within so many seconds, each value at its own moment.
    """

    def __init__(
        self,
        bus: EventBus,
        prefix: str = "cache:invalidate:",
        *,
        max_size: int = 10_000,
        ttl: float = 300.0,
        on_gap: Policy = "flush",
        shorten_to: float = 5.0,
        jitter: float = 0.0,
    ) -> None:
        try:
            from cachetools import TLRUCache
        except ImportError as error:
            missing = "LocalCache needs cachetools: pip install 'eventbus-redis[cache]'"
            raise EventBusError(missing) from error
        if on_gap not in ("flush", "key", "shorten") and not callable(on_gap):
            raise ValueError('on_gap is "flush", "key", "shorten" or a function of the gap')
        if max_size < 1 or not ttl > 0 or not shorten_to > 0 or jitter < 0:
            raise ValueError("LocalCache needs max_size >= 1, ttl and shorten_to > 0, jitter >= 0")
        self._bus, self._prefix, self._pattern = bus, prefix, escape(prefix) + "*"
        self._policy, self._ttl, self._jitter = on_gap, ttl, jitter
        self._after_loss = shorten_to if on_gap == "shorten" else 0.0
        kept: Any = TLRUCache  # it gives no type to what it holds
        self._kept = kept(max_size, lambda key, entry, now: entry.until, monotonic)
        self._flights: dict[str, _Flight] = {}
        self._owed: dict[str, None] = {}
        self._payer: asyncio.Task[None] | None = None
        self._deaf, self._looked, self._reconnects = True, 0.0, 0
        self._start: object = None
        self._hits = self._misses = self._loads = 0
        self._discarded = self._invalidated = self._flushes = 0
        # Only the newest message of a key counts, whatever its type. Its own is done already.
        bus.on(self._pattern, echo=False, overflow="latest", max_queue=100_000)(self._heard)
        bus.on_gap(self._pattern)(self._missed)

    # -- Reading -----------------------------------------------------------------------------------

    async def get_or_load(self, key: str, loader: Callable[[], Awaitable[T]]) -> T:
        """The kept value, or what the loader returns; one load at a time per key.

        What the loader raises reaches all who wait, and nothing is kept. When nobody waits any more
        it is cancelled. Raises InvalidChannel for a key that cannot end a channel.
        """
        tries = 0
        while True:
            self._look()
            if not self._deaf or self._after_loss or self._jitter or callable(self._policy):
                entry: _Entry | None = self._kept.get(key)
                if entry is not None:
                    self._hits += not tries
                    value: T = entry.value
                    return value
            self._misses += not tries
            _check(key)
            flight = self._flights.get(key) or self._depart(key, loader)
            loaded: T = await self._land(key, flight)
            tries += 1
            if not flight.stale or tries == _TRIES:
                return loaded

    def cached(
        self, template: str
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
        """Keep what an ``async def`` returns, by a key made of its arguments:
        ``@cache.cached("product-{id}")``.

        Raises InvalidHandler for a name that is no parameter; a call raises InvalidChannel for an
        argument that is no str, int, bool, UUID or enum of these, is empty, or holds ``:``.
        """
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]

        def decorate(fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
            signature = inspect.signature(fn)
            for name in (name for name in names if name not in signature.parameters):
                raise InvalidHandler(f"{template!a}: {name!a} is no parameter", parameter=name)

            @wraps(fn)
            async def through(*args: P.args, **kwargs: P.kwargs) -> T:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                key = template.format(**{name: _spell(bound.arguments[name]) for name in names})
                return await self.get_or_load(key, lambda: fn(*args, **kwargs))

            return through

        return decorate

    def _depart(self, key: str, loader: Callable[[], Awaitable[Any]]) -> _Flight:
        flight = self._flights[key] = _Flight()
        flight.task = asyncio.create_task(self._load(key, flight, loader))
        return flight

    async def _load(self, key: str, flight: _Flight, loader: Callable[[], Awaitable[Any]]) -> Any:
        self._loads += 1
        try:
            value = await loader()
            self._look()
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
        life = self._life() if self._deaf and not callable(self._policy) else self._ttl
        if flight.stale:
            self._discarded += 1
        elif life > 0:
            self._kept[key] = _Entry(value, monotonic() + life)
        return value

    async def _land(self, key: str, flight: _Flight) -> Any:
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    def stats(self) -> CacheStats:
        """See `CacheStats`."""
        counted = (self._hits, self._misses, self._loads, self._discarded, self._invalidated)
        return CacheStats(*counted, self._flushes, len(self._kept))

    # -- Dropping ----------------------------------------------------------------------------------

    async def invalidate(self, key: str) -> bool:
        """Drop a key here at once, and on every node. True: Redis has told all who listen. False:
        Redis is away; the key is owed, and published when it is back."""
        _check(key)
        self.drop(key)
        return await self._publish(key)

    async def invalidate_all(self) -> bool:
        """`invalidate` for every key."""
        self.flush()
        return await self._publish(_ALL)

    def drop(self, key: str) -> None:
        """Drop one key, here alone; a load of it that is under way is not kept."""
        self._invalidated += 1
        self._kept.pop(key, None)
        if flight := self._flights.pop(key, None):
            flight.stale = True

    def flush(self) -> None:
        """Drop everything, here alone; no load that is under way is kept."""
        self._kept.clear()
        self._ground()

    def _ground(self) -> None:
        for flight in self._flights.values():
            flight.stale = True
        self._flights.clear()

    async def _heard(self, message: Message[bytes]) -> None:
        key = message.channel.removeprefix(self._prefix)
        if key == _ALL:
            self._invalidated += 1
            self.flush()
        else:
            self.drop(key)

    async def _publish(self, key: str) -> bool:
        if await self._send(key):
            return True
        self._owed[key] = None
        if len(self._owed) > _MAX_OWED:
            self._owed = {_ALL: None}
        if self._payer is None or self._payer.done():
            self._payer = asyncio.create_task(self._pay(), name="eventbus cache")
        return False

    async def _send(self, key: str) -> bool:
        try:
            receipt = await self._bus.publish(self._prefix + key, Invalidated(key=key))
        except (BusUnavailable, PublishUncertain):
            return False
        return receipt.receivers is not None  # None: the bus drops it, or keeps it for a while only

    async def _pay(self) -> None:
        """Publish what is owed; ends when nothing is, or with the bus."""
        with suppress(EventBusError):
            while self._owed:
                await asyncio.sleep(_AGAIN)
                for key in list(self._owed):
                    if not await self._send(key):
                        break
                    self._owed.pop(key, None)

    # -- Loss --------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Whether the bus hears, and has always heard since the last look."""
        now = monotonic()
        if now < self._looked + _LOOK:
            return
        was_long_ago, self._looked = now > self._looked + 5 * _LOOK, now
        health = self._bus.health()
        denied = self._pattern.replace("{{", "{").replace("}}", "}") in health.denied
        deaf = denied or not health
        start = self._bus.source
        lost = (deaf and not self._deaf) or self._start not in {None, start}
        if was_long_ago:  # else a loss was seen above
            before, self._reconnects = self._reconnects, self._bus.stats().reconnects
            lost = lost or self._reconnects > before
        self._deaf, self._start = deaf, start
        if lost and not callable(self._policy):
            self._lose()

    async def _missed(self, gap: Gap) -> None:
        self._reconnects = self._bus.stats().reconnects
        if callable(self._policy):
            done = self._policy(gap)
            if inspect.isawaitable(done):
                await done
        elif self._policy == "key" and gap.channel is not None:
            self._flushes += 1
            self.drop(gap.channel.removeprefix(self._prefix))
        else:
            self._lose()

    def _life(self) -> float:
        """How long a value may live after a loss, or while it lasts."""
        return self._after_loss + random.uniform(0.0, self._jitter)

    def _lose(self) -> None:
        """What is kept may be wrong; so may be what is being loaded."""
        self._flushes += 1
        self._ground()
        if not self._after_loss and not self._jitter:
            self._kept.clear()
        for key, entry in list(self._kept.items()):
            self._kept[key] = entry._replace(until=min(entry.until, monotonic() + self._life()))

    def __repr__(self) -> str:
        return f"<LocalCache {self._prefix} {len(self._kept)} kept>"


def _check(key: str) -> None:
    if not key or key == _ALL or not key.isprintable() or len(key.encode()) > 400:
        raise InvalidChannel(f"cache key {key!a:.100} must be printable, 1 to 400 bytes, not '*'")


def _spell(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        value = str(value).lower()
    text = str(value)
    if not isinstance(value, str | int | UUID) or not text or ":" in text:
        raise InvalidChannel(f"{value!a:.100} has no place in a cache key")
    return text
