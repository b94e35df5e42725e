"""The local cache: one load per key, invalidations everywhere, and nothing stale after a loss."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from enum import Enum
from time import monotonic
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from eventbus import EventBus, EventBusError, Gap, InvalidChannel, InvalidHandler
from eventbus.cache import Invalidated, LocalCache, Policy
from eventbus.server import Server
from tests.faults.proxy import Proxy
from tests.helpers import foreign, soon

KEY = "product-42"


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may kill."""
    with Server(port=0) as server:
        yield server


class Database:
    """Rows with a version; a load takes a turn of the loop, or until `gate` is opened."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.loads = 0
        self.gate: asyncio.Event | None = None
        self.reading = asyncio.Event()

    def loader(self, key: str) -> Callable[[], Awaitable[int]]:
        async def load() -> int:
            self.loads += 1
            value = self.rows.get(key, 0)
            self.reading.set()
            await (self.gate.wait() if self.gate else checkpoint())
            return value

        return load


@asynccontextmanager
async def cached(url: str, **options: Any) -> AsyncIterator[tuple[LocalCache, EventBus]]:
    """A cache on a running bus."""
    bus = EventBus(url, heartbeat=0.3, publish_timeout=0.5)
    cache = LocalCache(bus, **options)
    async with bus:
        yield cache, bus


async def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Let others run until it is so. TimeoutError after the limit."""
    async with asyncio.timeout(seconds):
        while not true():
            await checkpoint()


# -- Reading ---------------------------------------------------------------------------------------


async def test_a_value_is_loaded_once_and_kept(url: str) -> None:
    """A hundred readers of a cold key wait for one load; later ones are served from memory."""
    base = Database()
    async with cached(url) as (cache, _):
        found = await asyncio.gather(
            *(cache.get_or_load(KEY, base.loader(KEY)) for _ in range(100))
        )
        assert found == [0] * 100
        assert base.loads == 1
        await cache.get_or_load(KEY, base.loader(KEY))
        stats = cache.stats()

    assert (stats.hits, stats.misses, stats.loads, stats.size) == (1, 100, 1, 1)
    assert repr(cache) == "<LocalCache cache:invalidate: 1 kept>"


async def test_none_is_a_value(url: str) -> None:
    """A loader that finds nothing has found that: None is kept like any value."""

    async def nothing() -> None:
        return None

    async with cached(url) as (cache, _):
        assert await cache.get_or_load(KEY, nothing) is None
        assert await cache.get_or_load(KEY, nothing) is None
        assert cache.stats().loads == 1


async def test_a_failed_load_fails_all_who_wait_and_is_not_kept(url: str) -> None:
    """The error of a loader reaches each reader; the next reader loads anew."""
    base = Database()

    async def broken() -> int:
        await checkpoint()
        raise LookupError("gone")

    async with cached(url) as (cache, _):
        found = await asyncio.gather(
            *(cache.get_or_load(KEY, broken) for _ in range(3)), return_exceptions=True
        )
        assert [type(error) for error in found] == [LookupError] * 3
        assert await cache.get_or_load(KEY, base.loader(KEY)) == 0


async def test_a_load_lives_as_long_as_somebody_waits(url: str) -> None:
    """One of two readers may be cancelled; with the last one the load is cancelled too."""
    base = Database()
    base.gate = asyncio.Event()
    async with cached(url) as (cache, _):

        async def read() -> int:
            return await cache.get_or_load(KEY, base.loader(KEY))

        one, two = asyncio.create_task(read()), asyncio.create_task(read())
        await soon(base.reading.wait())
        one.cancel()
        await asyncio.wait({one})
        base.gate.set()
        assert await soon(two) == 0

        cache.drop(KEY)
        base.gate.clear()
        base.reading.clear()
        last = asyncio.create_task(read())
        await soon(base.reading.wait())
        last.cancel()
        await asyncio.wait({last})
        base.gate.set()
        assert await soon(read()) == 0
        assert base.loads == 3


async def test_values_age_and_the_least_used_go(valkey: Server) -> None:
    """A value lives for `ttl` at most, and no more than `max_size` are kept."""
    base = Database()
    async with cached(valkey.url, ttl=0.2, max_size=10) as (cache, _):
        for n in range(20):
            await cache.get_or_load(f"k{n}", base.loader("k"))
        assert cache.stats().size <= 10
        await cache.get_or_load(KEY, base.loader(KEY))
        base.rows[KEY] = 1
        async with asyncio.timeout(20):
            while await cache.get_or_load(KEY, base.loader(KEY)) == 0:
                await checkpoint()


@pytest.mark.parametrize("key", ["", "*", "a\n", "\ud800", "x" * 401])
async def test_a_key_must_end_a_channel(key: str) -> None:
    """A key that could not be invalidated elsewhere is not kept here."""
    async with cached("memory://keys") as (cache, _):
        with pytest.raises(InvalidChannel):
            await cache.get_or_load(key, Database().loader(key))
        with pytest.raises(InvalidChannel):
            await cache.invalidate(key)


# -- The decorator ---------------------------------------------------------------------------------


class Size(Enum):
    LARGE = "L"


async def test_a_function_is_cached_by_its_arguments(url: str) -> None:
    """The template makes the key, from positions, names and defaults alike."""
    calls = []
    async with cached(url) as (cache, _):

        @cache.cached("product-{id}-{size}-{new}")
        async def product(id: int, size: Size = Size.LARGE, *, new: bool = False) -> str:
            """What it was."""
            calls.append(id)
            return f"product {id}"

        assert await product(42) == await product(id=42, new=False) == "product 42"
        assert calls == [42]
        assert product.__doc__ == "What it was."
        await cache.invalidate("product-42-L-false")
        await product(42, Size.LARGE)
        await product(43)
        assert calls == [42, 42, 43]


async def test_a_template_names_parameters() -> None:
    """A name that is no parameter is refused at decoration, naming it."""
    cache = LocalCache(EventBus("memory://template"))
    with pytest.raises(InvalidHandler, match="'ident' is no parameter") as caught:

        @cache.cached("product-{ident}")
        async def product(id: int) -> int:
            return id

    assert caught.value.parameter == "ident"


@pytest.mark.parametrize("value", ["", "a:b", 1.5, None, [1]])
async def test_an_argument_must_have_one_spelling(value: object) -> None:
    """What has no plain spelling, or would be another key, does not go into a key."""
    async with cached("memory://spelling") as (cache, _):

        @cache.cached("product-{id}")
        async def product(id: object) -> object:
            return id

        with pytest.raises(InvalidChannel):
            await product(value)


# -- Invalidation ----------------------------------------------------------------------------------


async def test_an_invalidation_drops_here_at_once_and_everywhere(url: str) -> None:
    """The next read on the writing node is new at once, on the others when the message is there;
    nobody drops its own news twice."""
    base = Database()
    async with cached(url) as (one, _), cached(url) as (two, _):
        for cache in (one, two):
            await cache.get_or_load(KEY, base.loader(KEY))
            await cache.get_or_load("other", base.loader("other"))
        base.rows[KEY] = 1
        assert await one.invalidate(KEY) is True
        assert await one.get_or_load(KEY, base.loader(KEY)) == 1
        await until(lambda: two.stats().invalidated == 1)
        assert await two.get_or_load(KEY, base.loader(KEY)) == 1
        assert two.stats().size == 2

        await two.invalidate_all()
        await until(lambda: one.stats().invalidated == 2)
        assert one.stats().size == two.stats().size == 0


@pytest.mark.parametrize("payload", [b"", b"\xff", b'{"x":1}', foreign({"key": "another"})])
async def test_any_message_on_the_channel_counts(url: str, payload: bytes) -> None:
    """Another program invalidates with whatever payload it likes: the channel names the key."""
    base = Database()
    async with cached(url) as (cache, _), EventBus(url) as other:
        await cache.get_or_load("a:b::c", base.loader(KEY))
        await other.publish_raw("cache:invalidate:a:b::c", payload)
        await until(lambda: cache.stats().invalidated == 1)
        assert cache.stats().size == 0


async def test_a_prefix_is_literal(url: str) -> None:
    """Glob characters and braces of a prefix mean themselves."""
    base = Database()
    async with cached(url, prefix="c[*]{x}:") as (cache, _), EventBus(url) as other:
        await cache.get_or_load(KEY, base.loader(KEY))
        await other.publish_raw("c[*]x:" + KEY, b"")
        await other.publish_raw("c[*]{x}:" + KEY, b"")
        await until(lambda: cache.stats().invalidated)
        assert (cache.stats().invalidated, cache.stats().size) == (1, 0)


async def test_an_invalidation_during_a_load_discards_what_it_brings(url: str) -> None:
    """A value that was read before the write is neither kept nor returned: it is loaded again, for
    those who waited; who comes later does not join the old load."""
    base = Database()
    base.gate = asyncio.Event()
    async with cached(url) as (one, _), cached(url) as (two, _):
        before = asyncio.create_task(two.get_or_load(KEY, base.loader(KEY)))
        await soon(base.reading.wait())
        base.rows[KEY] = 1
        await one.invalidate(KEY)
        await until(lambda: two.stats().invalidated)
        after = asyncio.create_task(two.get_or_load(KEY, base.loader(KEY)))
        await until(lambda: base.loads == 2)
        base.gate.set()

        assert await soon(before) == await soon(after) == 1
        assert two.stats().discarded == 1
        assert await two.get_or_load(KEY, base.loader(KEY)) == 1
        assert base.loads == 2


async def test_a_key_that_changes_all_the_time_is_returned_all_the_same(url: str) -> None:
    """With an invalidation in every load, a reader gets the last of three, which is not kept."""
    loads = []
    async with cached(url) as (cache, _):

        async def load() -> int:
            loads.append(len(loads))
            await checkpoint()
            cache.drop(KEY)
            return loads[-1]

        assert await soon(cache.get_or_load(KEY, load)) == 2
        assert cache.stats().size == 0
        assert cache.stats().discarded == 3


async def test_an_invalidation_that_could_not_be_sent_is_owed(private: Server) -> None:
    """While Redis is away `invalidate` says so and does not fail; the others hear of it later, and
    too many keys become one for all."""
    other, base = EventBus(private.url), Database()
    heard = []

    @other.on("cache:invalidate:*")
    async def hear(event: Invalidated) -> None:
        heard.append(event.key)

    async with (
        Proxy(private.port) as proxy,
        cached(proxy.url) as (cache, bus),
        other,
    ):
        await cache.get_or_load(KEY, base.loader(KEY))
        proxy.retarget(1)
        proxy.cut()
        assert await cache.invalidate(KEY) is False
        assert await cache.invalidate("b") is False
        assert cache.stats().size == 0
        proxy.retarget(private.port)
        await until(lambda: len(heard) == 2)
        assert heard == [KEY, "b"]

        await until(bus.health)
        proxy.retarget(1)
        proxy.cut()
        cache._owed = dict.fromkeys(map(str, range(10_000)))
        assert await cache.invalidate(KEY) is False
        proxy.retarget(private.port)
        await until(lambda: len(heard) == 3)
        assert heard[2:] == ["*"]


async def test_what_is_owed_ends_with_the_bus(private: Server) -> None:
    """A bus that stops while something is owed leaves no task behind."""
    async with cached(private.url) as (cache, _):
        private.kill()
        assert await cache.invalidate(KEY) is False
        payer = cache._payer
    assert payer is not None
    await asyncio.wait({payer}, timeout=20)
    assert payer.done()


# -- Loss ------------------------------------------------------------------------------------------


async def lose(bus: EventBus, server: Server) -> None:
    """Cut the subscriptions, and wait until they are back and the gap is told."""
    before = bus.stats().reconnects
    async with EventBus(server.url) as admin:
        await admin.redis().client_kill_filter(_type="pubsub")
    await until(lambda: bus.stats().reconnects > before)


async def test_a_reconnect_flushes(private: Server) -> None:
    """What was kept before the subscription was away is not served after it."""
    base = Database()
    async with cached(private.url) as (cache, bus):
        await cache.get_or_load(KEY, base.loader(KEY))
        await lose(bus, private)
        await until(lambda: cache.stats().flushes)
        assert await cache.get_or_load(KEY, base.loader(KEY)) == 0
        assert base.loads == 2


async def test_the_first_read_after_a_reconnect_waits_for_no_gap_handler(private: Server) -> None:
    """A cache that nobody read during an outage is flushed by the first read after it, even if that
    comes before the gap is told."""
    base = Database()
    async with cached(private.url) as (cache, bus):
        await cache.get_or_load(KEY, base.loader(KEY))
        cache._looked = 0.0  # as after a moment
        await lose(bus, private)
        await cache.get_or_load(KEY, base.loader(KEY))
        assert base.loads > 1  # a gap told during the load discards it


async def test_a_deaf_bus_serves_nothing_from_memory(private: Server) -> None:
    """While the bus cannot hear, each read loads, and nothing is kept."""
    base = Database()
    async with cached(private.url) as (cache, bus):
        await cache.get_or_load(KEY, base.loader(KEY))
        private.kill()
        await until(lambda: not bus.health())
        async with asyncio.timeout(20):  # it looks anew after a moment
            while cache.stats().flushes == 0:
                await cache.get_or_load(KEY, base.loader(KEY))
        for n in range(1, 4):
            base.rows[KEY] = n
            assert await cache.get_or_load(KEY, base.loader(KEY)) == n
        assert cache.stats().size == 0


async def test_a_cache_whose_pattern_is_denied_keeps_nothing(private: Server) -> None:
    """A bus that goes on without this pattern hears no invalidation: nothing is kept."""
    base = Database()
    async with EventBus(private.url) as admin:
        await admin.redis().execute_command(
            "ACL", "SETUSER", "few", "on", ">few", "~*", "&__eventbus__:*", "+@all"
        )
    bus = EventBus(private.url.replace("//", "//few:few@"), on_denied="degrade")
    cache = LocalCache(bus, "c{x}:")
    async with bus:
        for _ in range(2):
            await cache.get_or_load(KEY, base.loader(KEY))
        assert (base.loads, cache.stats().size) == (2, 0)


async def test_a_bus_that_starts_again_begins_with_an_empty_cache(url: str) -> None:
    """Between a stop and a start nothing was heard: what was kept before is not served."""
    base = Database()
    bus = EventBus(url)
    cache = LocalCache(bus)
    async with bus:
        await cache.get_or_load(KEY, base.loader(KEY))
    base.rows[KEY] = 1
    cache._looked = 0.0  # as after a moment
    async with bus:
        assert await cache.get_or_load(KEY, base.loader(KEY)) == 1


async def test_a_load_that_spans_a_loss_is_discarded(private: Server) -> None:
    """A value that was read before the loss is not kept after it."""
    base = Database()
    base.gate = asyncio.Event()
    async with cached(private.url) as (cache, bus):
        reading = asyncio.create_task(cache.get_or_load(KEY, base.loader(KEY)))
        await soon(base.reading.wait())
        await lose(bus, private)
        await until(lambda: cache.stats().flushes)
        base.rows[KEY] = 1
        base.gate.set()
        assert await soon(reading) == 1
        assert cache.stats().discarded == 1


def numbered(key: str, number: int) -> bytes:
    """An invalidation as a publisher that has sent so many on this channel would send it."""
    event = json.loads(foreign({"key": key}, source="p/1", type="Invalidated"))
    return json.dumps(event | {"busseq": number}).encode()


@pytest.mark.parametrize("policy", ["flush", "key"])
async def test_a_hole_in_a_publishers_numbers(url: str, policy: Policy) -> None:
    """A gap that names a channel drops that key, or everything, as the policy says."""
    base = Database()
    async with cached(url, on_gap=policy) as (cache, _), EventBus(url) as other:
        await other.publish_raw("cache:invalidate:a", numbered("a", 1))
        await until(lambda: cache.stats().invalidated)
        for key in ("a", "b"):
            await cache.get_or_load(key, base.loader(key))
        await other.publish_raw("cache:invalidate:a", numbered("a", 3))
        await until(lambda: cache.stats().flushes)
        size = cache.stats().size

    assert size == (1 if policy == "key" else 0)


async def test_a_shortened_life(private: Server) -> None:
    """With "shorten" a loss leaves what is kept to be served for a while; then it is gone."""
    base = Database()
    async with cached(private.url, on_gap="shorten", shorten_to=1.0) as (cache, bus):
        await cache.get_or_load(KEY, base.loader(KEY))
        private.kill()
        await until(lambda: not bus.health())
        base.rows[KEY] = 1
        assert await cache.get_or_load(KEY, base.loader(KEY)) == 0
        async with asyncio.timeout(20):
            while await cache.get_or_load(KEY, base.loader(KEY)) == 0:
                await checkpoint()
        assert base.loads == 2
        assert cache.stats().size == 1  # loaded while deaf, for as short a time


async def test_jitter_spreads_the_flush(private: Server) -> None:
    """With jitter the values go one by one, within so many seconds."""
    base = Database()
    random.seed(5)
    async with cached(private.url, jitter=1.0) as (cache, bus):
        for n in range(100):
            await cache.get_or_load(f"k{n}", base.loader("k"))
        await lose(bus, private)
        await until(lambda: cache.stats().flushes)
        sizes = set()
        async with asyncio.timeout(20):
            while cache.stats().size:
                sizes.add(cache.stats().size)
                await checkpoint()

    assert len(sizes) > 10


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_policy_of_ones_own(private: Server, is_async: bool) -> None:
    """A function of the gap does it all: until it acts, the cache serves what it has."""
    base, gaps = Database(), []

    async def later(gap: Gap) -> None:
        gaps.append(gap.reason)

    policy: Policy = later if is_async else lambda gap: gaps.append(gap.reason)
    async with cached(private.url, on_gap=policy) as (cache, bus):
        await cache.get_or_load(KEY, base.loader(KEY))
        await lose(bus, private)
        await until(lambda: gaps)
        await cache.get_or_load(KEY, base.loader(KEY))
        assert gaps == ["reconnect"]
        assert base.loads == 1
        cache.flush()
        assert cache.stats().size == 0


# -- Making one ------------------------------------------------------------------------------------


def test_settings_are_checked() -> None:
    """Sizes and times that make no sense, and unknown policies, are refused."""
    bus = EventBus("memory://x")
    for wrong in ({"max_size": 0}, {"ttl": 0.0}, {"shorten_to": 0.0}, {"jitter": -1.0}):
        with pytest.raises(ValueError, match="LocalCache needs"):
            LocalCache(bus, **wrong)
    with pytest.raises(ValueError, match="on_gap is"):
        LocalCache(bus, on_gap="clear")  # type: ignore[arg-type]


async def test_a_cache_comes_before_the_start() -> None:
    """A running bus takes no new gap handler, so no cache."""
    async with EventBus("memory://late") as bus:
        with pytest.raises(EventBusError, match="before its start"):
            LocalCache(bus)


def test_without_cachetools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, making a cache says which extra to install."""
    monkeypatch.setitem(sys.modules, "cachetools", None)
    with pytest.raises(EventBusError, match=r"pip install 'eventbus-redis\[cache\]'"):
        LocalCache(EventBus("memory://x"))


# -- Never stale after loss ------------------------------------------------------------------------

KEYS = ["a", "b", "c"]
HEARTBEAT = 0.2
BOUND = 4.0
"""Seconds. Documented are 2 x HEARTBEAT + 0.05 + a round trip; the rest is for a slow machine. What
a lost invalidation leaves is kept for `ttl`, 300 s: nothing of it hides in the difference."""

Step = tuple[str, int]


async def ignore(gap: Gap) -> None:
    """The gap rule, turned off."""


class Trial:
    """Two reading nodes behind a bad network, a writer, and what every write has been told when."""

    def __init__(self, server: Server, proxy: Proxy, caches: list[LocalCache]) -> None:
        self.server, self.proxy = server, proxy
        self.writer, *self.readers = caches
        self.base = Database()
        self.told: dict[tuple[str, int], float] = {}
        self.reads = self.stale = 0
        self.oldest = 0.0
        self.writes: list[asyncio.Task[None]] = []

    async def read(self, cache: LocalCache, key: str) -> bool:
        """Read, and note how long the value has been known to be old; whether it is the newest."""
        began = monotonic()
        value = await cache.get_or_load(key, self.base.loader(key))
        age = began - self.told.get((key, value + 1), began)
        self.reads += 1
        self.stale += age > 0
        self.oldest = max(self.oldest, age)
        return value == self.base.rows.get(key, 0)

    async def read_all(self) -> bool:
        """Every key on every node; whether all are the newest."""
        return all([await self.read(cache, key) for cache in self.readers for key in KEYS])

    async def tell(self, key: str, version: int) -> None:
        while not await self.writer.invalidate(key):
            await checkpoint()
        self.told[key, version] = monotonic()

    async def step(self, what: str, which: int) -> None:
        key = KEYS[which % len(KEYS)]
        if what == "write":
            version = self.base.rows[key] = self.base.rows.get(key, 0) + 1
            self.writes.append(asyncio.create_task(self.tell(key, version)))
        elif what == "read":
            await self.read_all()
        elif what == "cut":
            self.proxy.cut("subscriber" if which else None)
        elif what == "hole":
            for pair in self.proxy.living():
                pair.mode = "hole" if which else "down_hole"
        else:
            self.server.kill()
            self.server.start()

    async def settle(self) -> None:
        """All writes are told; then read until all is new, or too old."""
        await soon(asyncio.gather(*self.writes), 20)
        end = max(self.told.values(), default=0.0) + BOUND
        while not await self.read_all() and monotonic() < end + 0.1:
            await checkpoint()


async def trial(steps: list[Step], on_gap: Policy = "flush") -> Trial:
    """Run the steps against a fresh server."""
    with Server(port=0) as server:
        async with Proxy(server.port) as proxy:
            buses = [
                EventBus(url, heartbeat=HEARTBEAT, publish_timeout=0.3)
                for url in (server.url, proxy.url, proxy.url)
            ]
            found = Trial(server, proxy, [LocalCache(bus, on_gap=on_gap) for bus in buses])
            async with buses[0], buses[1], buses[2]:
                await found.read_all()
                for what, which in steps:
                    await found.step(what, which)
                    await checkpoint()
                await found.settle()
    return found


STEPS = st.lists(
    st.tuples(
        st.sampled_from("write write write read read cut hole restart".split()), st.integers(0, 3)
    ),
    min_size=5,
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@pytest.mark.timeout(60)
async def test_no_reader_sees_an_old_value_for_long(steps: list[Step]) -> None:
    """Whatever is written, read, cut, swallowed and restarted, no value is served that was known to
    be old longer than the bound."""
    found = await trial(steps)

    assert found.oldest < BOUND, (found.reads, found.stale)


HARD: list[Step] = [("hole", 1), ("write", 0), ("write", 1), ("read", 0), ("write", 2)]


async def test_the_gap_rule_is_what_keeps_it_fresh(say: Callable[[str], None]) -> None:
    """The same trial fails with the gap rule turned off."""
    found = await trial(HARD)
    without = await trial(HARD, on_gap=ignore)
    say(
        f"cache, a swallowed network, heartbeat {HEARTBEAT} s: stale for {found.oldest:.2f} s at"
        f" most; without the gap rule for {without.oldest:.2f} s, and on"
    )

    assert found.oldest < BOUND
    assert without.oldest >= BOUND
