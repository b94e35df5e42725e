"""The plan on real servers: routes come and go under traffic, and nothing is lost or doubled.

More examples: EVENTBUS_CAMPAIGN=20 and a longer `--timeout`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from eventbus import Event, EventBus, Gap, Route
from eventbus._router import Router, Subscription
from eventbus.server import Server
from tests.helpers import LIMIT, soon

CAMPAIGN = int(os.environ.get("EVENTBUS_CAMPAIGN", "1"))
PUBLISHERS = 3
AT_ONCE = 10
CHANNELS = "ab acb cb ac cab xcx abc".split()
PATTERNS = "a* *b *c* *c ab* *a* * acb a{x}b ab cb {x}c x{x}".split()
"""The first three match `acb`, and none covers another."""

Key = tuple[int, str]
"""A publisher and a channel: within one, order counts."""


class Tick(Event):
    publisher: int
    channel: str
    number: int


def listens(pattern: str, channel: str) -> bool:
    """Whether the channel matches; here a capture is a star that is not empty."""
    spelled = re.sub(r"\{x\}", ".+", pattern.replace("*", ".*"))
    return re.fullmatch(spelled, channel) is not None


class Listener:
    """One route, and what it must get: from its confirmation on, number after number."""

    def __init__(self) -> None:
        self.route: Route | None = None
        self.patterns: list[str] = []
        self.last: defaultdict[Key, int] = defaultdict(int)
        self.due: dict[Key, int] = {}  # the number that may come next at the latest
        self.closed = False
        self.problems: list[str] = []
        self.arrived = asyncio.Event()
        self.count = 0

    async def handle(self, tick: Tick) -> None:
        key, last = (tick.publisher, tick.channel), self.last[tick.publisher, tick.channel]
        if self.closed:
            self.problems.append(f"{key} {tick.number} after the detach")
        if tick.number <= last:
            self.problems.append(f"{key} {tick.number} after {last}, on {self.patterns}")
        if tick.number > self.due.get(key, tick.number):
            self.problems.append(f"{key} {tick.number} after {last}: missed, on {self.patterns}")
        if key in self.due:
            self.due[key] = tick.number + 1
        self.last[key] = tick.number
        self.count += 1
        self.arrived.set()

    async def reach(self, numbers: dict[Key, int]) -> None:
        """Return when all of these have arrived."""
        async with asyncio.timeout(LIMIT):
            while any(self.last[key] < number for key, number in numbers.items()):
                self.arrived.clear()
                await self.arrived.wait()


class World:
    """One bus that listens, three that publish all the time, and the ledger."""

    def __init__(self, url: str) -> None:
        namespace = f"plan-{secrets.token_hex(4)}"
        self.bus = EventBus(url, namespace=namespace)
        self.publishers = [EventBus(url, namespace=namespace) for _ in range(PUBLISHERS)]
        self.called: defaultdict[Key, int] = defaultdict(int)
        self.acked: defaultdict[Key, int] = defaultdict(int)
        self.listeners: list[Listener] = []
        self.gone: list[Listener] = []
        self.gaps: list[Gap] = []
        self.bus.on_gap()(self.gaps.append)
        self.over = False
        self.tasks: list[asyncio.Task[None]] = []
        self.published = asyncio.Event()

    async def start(self) -> None:
        for bus in (self.bus, *self.publishers):
            await bus.start()
        loop = asyncio.get_running_loop()
        self.tasks = [loop.create_task(self.publish(i)) for i in range(PUBLISHERS)]

    async def publish(self, publisher: int) -> None:
        """Every channel in turn, some at a time, for ever; bounded by what the server answers."""
        bus, channels = self.publishers[publisher], itertools.cycle(CHANNELS)
        while not self.over:
            ticks = []
            for channel in itertools.islice(channels, AT_ONCE):
                self.called[publisher, channel] += 1
                number = self.called[publisher, channel]
                ticks.append(Tick(publisher=publisher, channel=channel, number=number))
            await asyncio.gather(*(bus.publish(tick.channel, tick) for tick in ticks))
            for tick in ticks:
                self.acked[publisher, tick.channel] = tick.number
            self.published.set()

    # -- What users do

    async def do(self, steps: list[tuple[str, int, list[str]]]) -> None:
        """Some changes at once, each to a route of its own; then every publisher goes on."""
        free = list(self.listeners)
        work = []
        for kind, which, patterns in steps:
            if kind == "attach" or not free:
                work.append(self.attach(patterns))
            else:
                listener = free.pop(which % len(free))
                work.append(getattr(self, kind)(listener, patterns))
        await soon(asyncio.gather(*work), 2 * LIMIT)
        before = dict(self.acked)
        async with asyncio.timeout(LIMIT):
            for i, channel in itertools.product(range(PUBLISHERS), CHANNELS):
                while self.acked[i, channel] <= before.get((i, channel), 0):
                    self.published.clear()
                    await self.published.wait()
        self.check()

    async def attach(self, patterns: list[str]) -> None:
        listener = Listener()
        listener.patterns = list(patterns)
        listener.route = await self.bus.attach(listener.handle, *patterns)
        self.confirmed(listener)
        self.listeners.append(listener)

    async def add(self, listener: Listener, patterns: list[str]) -> None:
        assert listener.route is not None
        await listener.route.add(*patterns)
        listener.patterns = list(dict.fromkeys(listener.patterns + patterns))
        self.confirmed(listener)

    async def discard(self, listener: Listener, patterns: list[str]) -> None:
        assert listener.route is not None
        listener.patterns = [item for item in listener.patterns if item not in patterns]
        owed = {key: self.acked[key] for key in listener.due if not self.is_on(listener, key)}
        for key in owed:
            del listener.due[key]
        await listener.route.discard(*patterns)
        await listener.reach(owed)

    async def detach(self, listener: Listener, patterns: list[str]) -> None:
        assert listener.route is not None
        self.listeners.remove(listener)
        self.gone.append(listener)
        await listener.reach({key: self.acked[key] for key in listener.due})
        await listener.route.detach()
        listener.closed = True

    def is_on(self, listener: Listener, key: Key) -> bool:
        return any(listens(pattern, key[1]) for pattern in listener.patterns)

    def confirmed(self, listener: Listener) -> None:
        """What is published from now on is due."""
        for key in itertools.product(range(PUBLISHERS), CHANNELS):
            if self.is_on(listener, key):
                listener.due.setdefault(key, self.called[key] + 1)

    # -- What must be true

    def check(self) -> None:
        everyone = self.listeners + self.gone
        assert not [problem for listener in everyone for problem in listener.problems]
        assert not self.gaps

    async def stop(self) -> None:
        """All that was published has arrived, and was counted once."""
        self.over = True
        try:
            await soon(asyncio.gather(*self.tasks))
            for listener in self.listeners:
                await listener.reach({key: self.acked[key] for key in listener.due})
            self.check()
            stats = self.bus.stats()
            assert (stats.missed, stats.failed, stats.invalid) == (0, 0, 0)
            assert not any(handler.dropped for handler in stats.handlers.values())
            assert stats.delivered == sum(item.count for item in self.listeners + self.gone)
            assert stats.received <= sum(self.called.values())
        finally:
            for bus in (self.bus, *self.publishers):
                await bus.stop()


class Counts:
    """How often the plan changed, over all examples of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.switches = self.subscriptions = self.messages = self.delivered = 0
        carry = Router._carry

        def counting(router: Router[object], member: Subscription, carrier: Subscription) -> None:
            self.switches += router._carrier.get(member, carrier) != carrier
            carry(router, member, carrier)

        monkeypatch.setattr(Router, "_carry", counting)
        for name in ("confirmed", "ended"):
            monkeypatch.setattr(Router, name, self.change(getattr(Router, name)))

    def change(self, method: Callable[..., object]) -> Callable[..., object]:
        def counting(router: Router[object], subscription: Subscription) -> object:
            self.subscriptions += 1
            return method(router, subscription)

        return counting


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """The plans of all buses, watched."""
    return Counts(monkeypatch)


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    """A loop in another thread, which runs on while hypothesis thinks."""
    with start_blocking_portal("asyncio") as found:
        yield found


@pytest.mark.timeout(240)  # under coverage every message costs several times as much
def test_routes_come_and_go_under_traffic(
    server: Server,
    request: pytest.FixtureRequest,
    portal: BlockingPortal,
    counts: Counts,
    say: Callable[[str], None],
) -> None:
    """Each handler gets each message once and in order, from its confirmation to its end."""
    kinds = st.sampled_from(["attach", "add", "discard", "detach"])
    patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True)
    step = st.tuples(kinds, st.integers(0, 9), patterns)
    examples = 0

    class Traffic(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            nonlocal examples
            examples += 1
            self.world = World(server.url)
            portal.call(self.world.start)
            portal.call(self.world.do, [("attach", 0, [pattern]) for pattern in PATTERNS[:3]])

        @rule(steps=st.lists(step, min_size=1, max_size=4))
        def change(self, steps: list[tuple[str, int, list[str]]]) -> None:
            portal.call(self.world.do, steps)

        def teardown(self) -> None:
            portal.call(self.world.stop)
            counts.messages += sum(self.world.acked.values())
            counts.delivered += self.world.bus.stats().delivered

    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=12 * CAMPAIGN,
            stateful_step_count=30,
            phases=[Phase.generate],  # what a real server did cannot be shrunk
            suppress_health_check=list(HealthCheck),
        ),
    )
    say(
        f"plan, on {request.node.callspec.id}: {examples} examples,"
        f" {counts.switches} switches of carriers, {counts.subscriptions} changes of subscriptions,"
        f" {counts.messages} messages, {counts.delivered} deliveries, none lost, none twice"
    )
    assert counts.switches > 50


async def test_a_covered_set_crosses_the_wire_once(url: str) -> None:
    """With routes on patterns that cover each other, PUBLISH hands out one copy."""
    bus = EventBus(url, namespace=f"plan-{secrets.token_hex(4)}")
    got: asyncio.Queue[str] = asyncio.Queue()

    @bus.on("chat:room-1")
    @bus.on("chat:{room}")
    @bus.on("chat:*")
    async def take(event: Tick) -> None:
        got.put_nowait(event.channel)

    async with bus:
        tick = Tick(publisher=0, channel="chat:room-1", number=1)
        receipt = await bus.publish("chat:room-1", tick)
        assert receipt.receivers == 1
        assert bus.health().subscriptions == ("chat:*",)
        for _ in range(3):
            assert await soon(got.get()) == "chat:room-1"
        assert bus.stats().received == 1
