"""Too much at once, and handlers that misbehave: the fault catalogue, part D.

A full queue, a killed output buffer and a slow handler cost exactly what is reported; what a
handler does, to itself or to its bus, ends that call and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus, Gap, Message
from tests.faults.controller import Controller
from tests.faults.ledger import CHANNELS, PATIENCE, Entry, Ledger, receiver, source_of
from tests.helpers import Seen, soon


class Note(Event, channel="note:{to}"):
    to: str = "a"
    n: int = 0


@pytest.fixture
def server() -> Iterator[Controller]:
    """A server on a unix socket, whose buffers are small."""
    with Controller() as server:
        yield server


# -- A slow handler --------------------------------------------------------------------------------


@pytest.mark.scenario(26)
@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest"])
@pytest.mark.parametrize("order_by", [None, "channel"])
async def test_the_ledger_of_a_lane_that_overflows_balances(
    server: Controller,
    say: Callable[[str], None],
    overflow: Literal["drop_oldest", "drop_newest"],
    order_by: Literal["channel"] | None,
) -> None:
    """Over 1,000 channels, ten times what a lane takes: on each channel what the slow handler got
    and what it was told was dropped for it is what was published, and the handler beside it misses
    nothing."""
    ledger, told, slow_got = Ledger(), Counter[str](), Counter[str]()
    bus = receiver(server.url, ledger, heartbeat=None)
    free = asyncio.Event()

    @bus.on("led:*", max_queue=1000, overflow=overflow, order_by=order_by, concurrency=4)
    async def slow(message: Message[Entry]) -> None:
        await free.wait()
        slow_got[message.channel] += 1

    @bus.on_gap("led:*")
    async def tell(gap: Gap) -> None:
        if gap.reason == "overflow":
            assert (gap.handler, gap.pattern, gap.source) == ("slow", "led:*", None)
            told[str(gap.channel)] += gap.missed or 0

    async with bus, EventBus(server.url, publish_timeout=10.0) as publisher:
        source = source_of(publisher)
        for _ in range(10):
            await ledger.publish(publisher, source, CHANNELS)
        await ledger.until(lambda: sum(ledger.delivered.values()) == 10_000)
        dropped = bus.stats().handlers["slow"].dropped
        free.set()
        await soon(bus.stop(), PATIENCE)
    say(
        f"a lane that overflows ({overflow}): {sum(slow_got.values())} delivered, {dropped} dropped"
    )

    assert {channel: slow_got[channel] + told[channel] for channel in CHANNELS} == dict.fromkeys(
        CHANNELS, 10
    )
    assert sum(told.values()) == dropped == 10_000 - 1000 - 4
    ledger.balance([(source, channel) for channel in CHANNELS])
    assert not ledger.missed


# -- The output buffer of the server ---------------------------------------------------------------


class Elsewhere:
    """A publisher with a thread and a loop of its own: it goes on while this loop is blocked."""

    def __init__(self, url: str) -> None:
        self.bus = EventBus(url, name="elsewhere", heartbeat=None, publish_timeout=10.0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    async def __aenter__(self) -> Self:
        self._thread.start()
        await self.do(self.bus.start())
        self.source = source_of(self.bus)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.do(self.bus.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def do(self, work: Any) -> Any:
        """Have it done, and wait for it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def block(self, work: Any) -> Any:
        """Have it done, and block this loop meanwhile."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)


async def overflow_the_buffer(server: Controller, elsewhere: Elsewhere, ledger: Ledger) -> None:
    """Publish until the server has killed whoever does not read."""
    async with asyncio.timeout(PATIENCE):
        while (await elsewhere.bus.publish("led:0", Entry(text="?"))).receivers:
            ledger.acknowledged[elsewhere.source, "led:0"] += 1
            await ledger.publish(elsewhere.bus, elsewhere.source, CHANNELS[:100], "x" * 16_000)
        ledger.acknowledged[elsewhere.source, "led:0"] += 1


@pytest.mark.scenario(27)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
@pytest.mark.parametrize("heartbeat", [0.5, None])
async def test_the_ledger_balances_after_an_output_buffer_kill(
    server: Controller, say: Callable[[str], None], busy: bool, heartbeat: float | None
) -> None:
    """A bus that did not read for so long that the server gave it up comes back and says so, with
    or without a heartbeat: over 1,000 channels, what was delivered and what was reported missing
    add up exactly, and nothing comes twice."""
    await server.config("client-output-buffer-limit", "pubsub 1mb 256kb 2")
    ledger, stop = Ledger(), asyncio.Event()
    bus = receiver(server.url, ledger, heartbeat=heartbeat)
    async with bus, Elsewhere(server.url) as elsewhere:

        async def all_heard() -> None:
            before = dict(ledger.last)
            pairs = [(elsewhere.source, channel) for channel in CHANNELS]
            async with asyncio.timeout(PATIENCE):
                while any(ledger.last.get(pair) == before.get(pair) for pair in pairs):
                    await elsewhere.do(ledger.publish(elsewhere.bus, elsewhere.source, CHANNELS))

        async def load() -> None:
            while not stop.is_set():
                await ledger.publish(bus, source_of(bus), CHANNELS[:50])

        await all_heard()
        loading = asyncio.create_task(load()) if busy else None
        mine = [(source_of(bus), channel) for channel in CHANNELS[:50] if busy]
        await ledger.until(lambda: ledger.last.keys() >= set(mine))
        elsewhere.block(overflow_the_buffer(server, elsewhere, ledger))
        await ledger.until(lambda: ledger.reconnects > 0)
        heard = {pair: ledger.last[pair] for pair in mine}
        await all_heard()
        await ledger.until(lambda: all(ledger.last[pair] > heard[pair] for pair in mine))
        stop.set()
        if loading is not None:
            await loading
        pairs = [*mine, *((elsewhere.source, channel) for channel in CHANNELS)]
        await soon(bus.stop(), 20)
    say(f"ledger after an output-buffer kill over {len(pairs)} pairs: {ledger.sums()}")

    assert "output buffer limits" in server.log()
    ledger.balance(pairs)
    assert ledger.reconnects == 1
    assert sum(ledger.missed.values()) > 0


@pytest.mark.scenario(27)
async def test_without_numbers_a_kill_costs_nobody_knows_how_much(server: Controller) -> None:
    """The negative control: on a bare wire, which has no numbers, the same kill is told as a
    reconnect, and the messages that it cost are counted nowhere."""
    await server.config("client-output-buffer-limit", "pubsub 1mb 256kb 2")
    bus = EventBus(server.url, wire="bare", heartbeat=0.5)
    seen: Seen[int] = Seen()
    gaps: Seen[Gap] = Seen()

    @bus.on("x")
    async def hear(payload: bytes) -> None:
        seen.append(len(payload))

    @bus.on_gap()
    async def tell(gap: Gap) -> None:
        gaps.append(gap)

    async with bus, Elsewhere(server.url) as elsewhere:

        async def flood() -> int:
            sent = 1
            while (await elsewhere.bus.publish_raw("x", b"x" * 64_000)).receivers:
                sent += 1
            return sent

        sent = elsewhere.block(flood())
        await soon(gaps.reach(1), PATIENCE)
        assert (await elsewhere.do(elsewhere.bus.publish_raw("x", b"last"))).receivers == 1
        async with asyncio.timeout(PATIENCE):
            while 4 not in seen:
                await checkpoint()

        assert len(seen) - 1 < sent
        assert [(gap.reason, gap.missed) for gap in gaps] == [("reconnect", None)]
        assert bus.stats().missed == 0


# -- A publisher that starts again -----------------------------------------------------------------


async def test_the_ledger_balances_after_a_restart_of_the_publisher(
    server: Controller, say: Callable[[str], None]
) -> None:
    """A publisher that stops and starts again, in the middle of cuts of its receiver, is a new
    source: each of its lives balances by itself over 1,000 channels, and none is mixed up with
    another."""
    ledger = Ledger()
    bus = receiver(server.url, ledger)
    pairs = []
    async with bus:
        publisher = EventBus(server.url, name="again", heartbeat=0.5)
        for life in range(3):
            async with publisher:
                sources = {source_of(publisher): publisher}
                await ledger.all_heard(sources)
                await server.ask("CLIENT", "KILL", "TYPE", "pubsub")
                await ledger.rounds(
                    sources, CHANNELS[::7], lambda life=life: bus.stats().reconnects > life
                )
                pairs += await ledger.all_heard(sources)
        await soon(bus.stop(), 20)
    say(f"ledger of a publisher that starts again over {len(pairs)} pairs: {ledger.sums()}")

    assert len({source for source, _ in pairs}) == 3
    ledger.balance(pairs)
    assert sum(ledger.missed.values()) > 0


# -- Many at once ----------------------------------------------------------------------------------


PATTERNS = [f"room:{n}:*" for n in range(10_000)]


def many(url: str) -> tuple[EventBus, Seen[str], Seen[Gap]]:
    """A bus with ten thousand patterns, of which none covers another."""
    bus = EventBus(url, connect_timeout=40.0, drain_timeout=30.0)
    seen: Seen[str] = Seen()
    gaps: Seen[Gap] = Seen()

    @bus.on(*PATTERNS, max_queue=100_000)
    async def hear(event: Note, message: Message[Note]) -> None:
        seen.append(message.channel)

    @bus.on_gap()
    async def tell(gap: Gap) -> None:
        gaps.append(gap)

    return bus, seen, gaps


async def publish_on(bus: EventBus, patterns: list[str], seen: Seen[str]) -> set[int | None]:
    """Publish once under each pattern, and wait until all of it was heard. Returns the numbers of
    receivers that Redis told."""
    receivers: set[int | None] = set()
    for start in range(0, len(patterns), 500):
        channels = [pattern.replace("*", "1") for pattern in patterns[start : start + 500]]
        receipts = await asyncio.gather(*(bus.publish(name, Note()) for name in channels))
        receivers |= {receipt.receivers for receipt in receipts}
    async with asyncio.timeout(PATIENCE):
        while len(seen) < len(patterns):
            await checkpoint()
    return receivers


@pytest.mark.scenario(36)
async def test_ten_thousand_patterns_come_back_after_a_cut(server: Controller) -> None:
    """Ten thousand patterns are confirmed when the bus has started, and again when it has told of
    the reconnect; those that are tried hear."""
    bus, seen, gaps = many(server.url)
    async with bus, EventBus(server.url, publish_timeout=20.0) as other:
        assert await server.ask("PUBSUB", "NUMPAT") == len(PATTERNS)
        await server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await soon(gaps.reach(1), PATIENCE)
        assert await server.ask("PUBSUB", "NUMPAT") == len(PATTERNS)
        assert len(bus.health().subscriptions) == len(PATTERNS)
        tried = PATTERNS[::20]
        assert await publish_on(other, tried, seen) == {1}

        assert sorted(seen) == sorted(pattern.replace("*", "1") for pattern in tried)
        assert [gap.reason for gap in gaps] == ["reconnect"]


@pytest.mark.timeout(180)
@pytest.mark.long  # Redis takes a while to match 10,000 messages with 10,000 patterns
@pytest.mark.scenario(36)
async def test_ten_thousand_patterns_end_as_fast_as_they_begin(server: Controller) -> None:
    """A stop lets go of ten thousand patterns, each of which was used, without a search through all
    of them for every one: it does not block the loop for seconds."""
    bus, seen, _ = many(server.url)
    async with EventBus(server.url, publish_timeout=20.0) as other:
        await bus.start()
        await publish_on(other, PATTERNS, seen)
        try:
            await soon(bus.stop(), 5)
        finally:
            await bus.stop()


@pytest.mark.scenario(36)
async def test_three_hundred_publishes_at_once_share_one_connection(server: Controller) -> None:
    """Three hundred tasks that publish at the same time all get a receipt, over the one connection
    that the bus has: there is no pool to run out of."""
    ledger = Ledger()
    bus = receiver(server.url, ledger, publish_timeout=20.0)

    async def work(number: int) -> None:
        for _ in range(10):
            receipt = await bus.publish(f"led:{number}", Entry(text="x"))
            assert receipt.receivers == 1

    async with bus:
        before = len(await server.clients())
        async with asyncio.TaskGroup() as group:
            for number in range(300):
                group.create_task(work(number))
        during = len(await server.clients())
        await ledger.until(lambda: sum(ledger.delivered.values()) == 3000)

        assert (before, during) == (2, 2)
        assert bus.stats().published == 3000
        assert ledger.twice == 0
    assert set(ledger.delivered.values()) == {10}
