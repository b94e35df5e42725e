"""The soak: minutes of traffic, reconnects and churn, after which nothing has grown.

EVENTBUS_SOAK is its length in seconds. It goes in rounds: publishers, churn and faults work side by
side; at the end of a round they stop, everything comes to rest, and what is held is counted. The
first rounds fill the caches; from then on the counts must be flat.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import NamedTuple

import anyio
import pytest
import redis
from anyio.lowlevel import checkpoint

import eventbus
from eventbus import Event, EventBus, EventBusError, Gap, Message, PublishUncertain, _receiver
from eventbus._sequences import Inbound
from eventbus.server import Server
from tests.faults.proxy import Proxy

SECONDS = float(os.environ.get("EVENTBUS_SOAK") or 600)
ROUNDS, WARM = 12, 4
BETWEEN_FAULTS = 5.2
"""Seconds from a repair to the next fault: a connection that lives for less than 5 s counts as one
that fails again and again, and the next attempt waits for longer."""
LIMIT = 60.0
CHANNELS = [f"soak:{n}" for n in range(20)]
ROOM = 512 * 1024
"""Bytes by which the memory of the whole process may have grown: caches of the libraries, buffers,
and this test's own counters. One object leaked per message would be many times as much."""
OUR_ROOM = 128 * 1024
"""The same for what was allocated by the lines of the package, which has bounded caches too."""
REMEMBERED = 400
"""Pairs of source and channel that the receiver remembers here, instead of 65,536: every short bus
is a new source, and the bound must be reached while the caches fill, or it would look like a leak.
"""
_HERE = os.path.dirname(__file__)  # the memory of the proxy, and of this test, is its own
Pair = tuple[str, str]


class Tick(Event):
    text: str


class Held(NamedTuple):
    """What is held at a moment of rest."""

    tasks: int
    descriptors: int
    clients: int
    memory: int
    ours: int


class Soak:
    """One receiver, two publishers, and what each of them knows."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.receiver = EventBus(proxy.url, heartbeat=0.5, max_pending_bytes=8 << 20)
        self.publishers = [
            EventBus(proxy.url, heartbeat=0.5, publish_timeout=0.5, name=f"soak{n}")
            for n in range(2)
        ]
        self.last: dict[Pair, int] = {}
        self.delivered: Counter[Pair] = Counter()
        self.missed: Counter[Pair] = Counter()
        self.counts: Counter[str] = Counter()
        self.overflown = 0
        self.latest: dict[str, int] = {}
        self.pulse = asyncio.Event()
        self.faults = cycle(("kill the clients", "cut", "kill the server"))
        self.heard = asyncio.Event()
        self.due = 0.0
        self.lines: dict[str, int] = {}
        self._chance = random.Random(35)
        self._declare(self.receiver)

    def _declare(self, bus: EventBus) -> None:
        @bus.on("soak:*", max_queue=100_000)
        async def keep(message: Message[Tick]) -> None:
            pair, number = (str(message.source), message.channel), message.sequence or 0
            self.counts["twice or out of order"] += number <= self.last.get(pair, 0)
            self.last[pair] = number
            self.delivered[pair] += 1
            self.heard.set()

        @bus.on("soak:{n}", max_queue=20)
        async def slow(event: Tick) -> None:
            await self.pulse.wait()

        @bus.on("soak:*", overflow="latest")
        async def newest(event: Tick, message: Message[Tick]) -> None:
            await self.pulse.wait()
            self.latest[message.channel] = message.sequence or 0

        @bus.on("soak:1?", concurrency=4, order_by="channel", timeout=0.05)
        async def hangs_at_times(event: Tick) -> None:
            if event.text == "hang":
                await asyncio.Event().wait()

        @bus.exception_handler(TimeoutError)
        async def overran(error: TimeoutError, message: Message[Tick]) -> None:
            self.counts["overran"] += 1

        @bus.on_gap()
        async def gap(gap: Gap) -> None:
            self.counts[f"{gap.reason} gaps"] += 1
            if gap.reason == "sequence":
                self.missed[str(gap.source), str(gap.channel)] += gap.missed or 0
            elif gap.reason == "overflow" and gap.handler == "slow":
                self.overflown += gap.missed or 0

    # -- What happens side by side, until the end of a round ---------------------------------------

    async def publish(self, bus: EventBus, until: float) -> None:
        """Publish all the time, a few at once; each batch lets the slow handlers go on."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            text = "hang" if self._chance.random() < 0.01 else "x" * self._chance.randrange(300)
            batch = self._chance.sample(CHANNELS, 10)
            calls = [bus.publish(channel, Tick(text=text)) for channel in batch]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(result, PublishUncertain):
                    self.counts["uncertain"] += 1
                elif isinstance(result, EventBusError):
                    self.counts["refused"] += 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    self.counts["acknowledged"] += 1
            self.beat()
            if self._chance.random() < 0.1:
                self._withdraw(bus)

    def _withdraw(self, bus: EventBus) -> None:
        """A publish whose caller goes away."""
        task = asyncio.ensure_future(bus.publish("soak:0", Tick(text="cancelled")))
        asyncio.get_running_loop().call_soon(task.cancel)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def beat(self) -> None:
        """Let every slow handler go on."""
        self.pulse.set()
        self.pulse.clear()

    async def churn(self, until: float) -> None:
        """Routes, streams and whole buses come and go; an outage makes some of them fail."""
        loop = asyncio.get_running_loop()
        number = 0

        async def handler(event: Tick) -> None:
            self.counts["heard by routes that came and went"] += 1

        while loop.time() < until:
            number = (number + 1) % 50
            bus = self.receiver
            try:
                route = await bus.attach(handler, f"soak:{number}", f"churn:{number}:*")
                try:
                    await route.add(f"soak:{number % 7}*")
                    await bus.publish(f"churn:{number}:x", Tick(text=""))
                    await route.discard(f"soak:{number}")
                finally:
                    await route.detach()
                async with asyncio.timeout(2.0), bus.subscribe("soak:1*", Tick) as messages:
                    await anext(messages)
                with suppress(TimeoutError):
                    await bus.expect("soak:2", Tick, timeout=self._chance.random() / 100)
                if number % 10 == 0:
                    async with EventBus(self.proxy.url, connect_timeout=2.0) as short:
                        await short.publish("soak:3", Tick(text="short"))
                self.counts["churned"] += 1
            except (EventBusError, TimeoutError) as error:
                self.counts[f"churn met {type(error).__name__}"] += 1
                await checkpoint()

    async def trouble(self, until: float) -> None:
        """A fault about every five seconds, each kind in turn; the next comes after the repair."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            if loop.time() < self.due:
                await self._hear()
                continue
            kind = next(self.faults)
            before = self.receiver.stats().reconnects
            if kind == "cut":
                self.proxy.cut()
            elif kind == "kill the clients":
                with redis.Redis(unix_socket_path=self.server.socket_path) as admin:
                    admin.client_kill_filter(_type="pubsub")
                    admin.client_kill_filter(_type="normal", skipme=True)
            else:
                await anyio.to_thread.run_sync(self.server.kill)
                await anyio.to_thread.run_sync(self.server.start)
            self.counts[kind] += 1
            await self.live(before + 1)
            self.due = loop.time() + BETWEEN_FAULTS

    async def _hear(self) -> None:
        """Return when a message came, or none can come."""
        self.heard.clear()
        waiting = asyncio.ensure_future(self.heard.wait())
        await asyncio.wait({waiting}, timeout=1.0)
        waiting.cancel()

    # -- Rest --------------------------------------------------------------------------------------

    def forget_strangers(self) -> None:
        """What this test itself remembers of the short buses, which are new sources each time."""
        for counts in (self.last, self.delivered, self.missed):
            for pair in [pair for pair in counts if not pair[0].startswith("soak")]:
                del counts[pair]

    async def live(self, reconnects: int = 0) -> None:
        """Return when every bus is live."""
        buses = [self.receiver, *self.publishers]
        async with asyncio.timeout(LIMIT):
            while self.receiver.stats().reconnects < reconnects or any(
                bus.health().state != "live" for bus in buses
            ):
                await checkpoint()

    async def rest(self) -> None:
        """Return when every channel was heard once more, and no handler has anything to do."""
        await self.live()
        pairs: dict[Pair, int] = {}
        for bus in self.publishers:
            for channel in CHANNELS:
                await bus.publish(channel, Tick(text="rest"))
        sources = {source for source, _ in self.last if source.startswith("soak")}
        pairs = {(s, c): self.delivered[s, c] for s in sources for c in CHANNELS}
        async with asyncio.timeout(LIMIT):
            while any(lane.depth for lane in self.receiver.stats().handlers.values()) or not all(
                self.delivered[pair] for pair in pairs
            ):
                self.beat()
                await checkpoint()
            for _ in range(50):  # what was taken out of its queue is on its way
                self.beat()
                await checkpoint()

    async def held(self, tasks: int) -> Held:
        """Count what is held, when what ends by itself has ended."""
        with redis.Redis(unix_socket_path=self.server.socket_path) as admin:
            async with asyncio.timeout(LIMIT):
                while len(asyncio.all_tasks()) > tasks > 0 or len(admin.client_list()) > 7:
                    self.beat()
                    await checkpoint()
            clients = len(admin.client_list()) - 1
        gc.collect()
        self.lines = lines = {
            str(line.traceback): line.size
            for line in tracemalloc.take_snapshot().statistics("lineno")
            if not line.traceback[0].filename.startswith((_HERE, tracemalloc.__file__))
        }
        folder = os.path.dirname(eventbus.__file__)
        ours = sum(size for line, size in lines.items() if line.startswith(folder))
        descriptors = len(os.listdir("/proc/self/fd"))
        return Held(len(asyncio.all_tasks()), descriptors, clients, sum(lines.values()), ours)


def growth(sizes: list[int]) -> float:
    """The mean of the last half less that of the first: it swings as caches fill and empty."""
    half = len(sizes) // 2
    return sum(sizes[-half:]) / half - sum(sizes[:half]) / half


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of its own, to be killed."""
    with Server(port=0) as server:
        yield server


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory is traced, by the line that asked for it; pytest, which keeps log lines, gets none."""
    monkeypatch.setattr(_receiver, "Inbound", partial(Inbound, limit=REMEMBERED))
    logger = logging.getLogger("eventbus")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    tracemalloc.start()
    yield
    tracemalloc.stop()
    logger.setLevel(level)


@pytest.mark.long
@pytest.mark.scenario(35)
@pytest.mark.timeout(max(900, int(SECONDS * 2)))
async def test_soak(server: Server, traced: None, say: Callable[[str], None]) -> None:
    """After minutes with a reconnect every five seconds, no message came twice, every loss on every
    channel was counted exactly, and tasks, connections, descriptors and memory are flat."""
    loop = asyncio.get_running_loop()
    async with Proxy(server.port) as proxy:
        soak = Soak(server, proxy)
        async with soak.receiver, soak.publishers[0], soak.publishers[1]:
            await soak.rest()
            samples: list[Held] = []
            warm_lines: dict[str, int] = {}
            for number in range(ROUNDS):
                until = loop.time() + SECONDS / ROUNDS
                async with asyncio.TaskGroup() as group:
                    for bus in soak.publishers:
                        group.create_task(soak.publish(bus, until))
                    group.create_task(soak.churn(until))
                    group.create_task(soak.trouble(until))
                await soak.rest()
                proxy.pairs[:] = proxy.living()  # the proxy's own memory
                soak.forget_strangers()
                samples.append(await soak.held(samples[WARM].tasks if number > WARM else 0))
                if number == WARM:
                    warm_lines = soak.lines
            stats = soak.receiver.stats()
            mine = [pair for pair in soak.last if pair[0].startswith("soak")]
            sums = {p: soak.delivered[p] + soak.missed[p] - soak.last[p] for p in mine}
        say(f"soak: {SECONDS:.0f} s, {dict(sorted(soak.counts.items()))}")
        say(
            f"soak: received {stats.received}, delivered {stats.delivered}, dropped"
            f" {stats.dropped}, conflated {stats.conflated}, missed {stats.missed},"
            f" reconnects {stats.reconnects}"
        )
        for sample in samples:
            say(f"soak: {sample}")
        grown_lines = {line: size - warm_lines.get(line, 0) for line, size in soak.lines.items()}
        for line in sorted(grown_lines, key=lambda line: -grown_lines[line])[:6]:
            say(f"soak: {grown_lines[line]} bytes more from {line}")
        for what in ("memory", "ours"):
            grown = growth([getattr(sample, what) for sample in samples[WARM:]])
            say(f"soak: {what} grew by {grown:.0f} bytes over {stats.received} messages")
    assert soak.counts["twice or out of order"] == 0
    assert len(mine) == 2 * len(CHANNELS)
    assert not any(sums.values()), sums
    assert soak.overflown == stats.handlers["slow"].dropped
    assert stats.reconnects >= int(SECONDS / BETWEEN_FAULTS / 3)
    warm = samples[WARM:]
    assert len({sample[:3] for sample in warm}) == 1
    assert growth([sample.memory for sample in warm]) < ROOM
    assert growth([sample.ours for sample in warm]) < OUR_ROOM
