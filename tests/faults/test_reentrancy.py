"""Handlers that turn on their own bus: they publish, attach, detach and stop inside a call. The
fault catalogue, scenario 31: no deadlock, a result that is defined, and bounds that hold.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from eventbus import BusClosed, Event, EventBus, Gap
from tests.helpers import Seen, soon


class Note(Event, channel="note:{to}"):
    to: str = "a"
    n: int = 0


@pytest.mark.scenario(31)
@pytest.mark.parametrize("nowait", [False, True], ids=["publish", "publish_nowait"])
async def test_a_handler_may_publish_to_its_own_channel(url: str, nowait: bool) -> None:
    """A message may beget the next one on the channel that it came from: in order, no deeper in the
    stack, and for ever if nobody ends it."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    enough = asyncio.Event()

    @bus.on("note:*")
    async def handler(event: Note) -> None:
        seen.append(event.n)
        if event.n >= 2000:
            enough.set()
        elif nowait:
            bus.publish_nowait(Note(n=event.n + 1))
        else:
            await bus.publish(Note(n=event.n + 1))

    async with bus:
        await bus.publish(Note(n=0))
        await soon(enough.wait(), 40)
    assert seen == list(range(2001))


@pytest.mark.scenario(31)
async def test_a_chain_reaction_stays_within_the_queue(url: str) -> None:
    """Handlers that publish two messages for each one they get do not exhaust the memory: their
    lane keeps its bound, drops by its policy, and says how many; the bus can be stopped."""
    bus = EventBus(url, drain_timeout=0.5)
    told: Seen[Gap] = Seen()
    depths: list[int] = []

    @bus.on("note:*", max_queue=100)
    async def handler(event: Note) -> None:
        depths.append(bus.stats().handlers["handler"].depth)
        bus.publish_nowait(Note(n=event.n + 1))
        bus.publish_nowait(Note(n=event.n + 1))

    @bus.on_gap()
    async def tell(gap: Gap) -> None:
        told.append(gap)

    async with bus:
        await bus.publish(Note(n=0))
        await soon(told.reach(1), 30)
        await soon(bus.stop(), 30)

        assert max(depths) <= 100
        assert {(gap.reason, gap.handler) for gap in told} == {("overflow", "handler")}
    assert sum(gap.missed or 0 for gap in told) <= bus.stats().dropped


@pytest.mark.scenario(31)
async def test_routes_may_come_and_go_inside_a_handler(url: str) -> None:
    """A handler may attach, change and detach routes and streams, on the very pattern that it
    serves: each is confirmed when the call returns, and no message is lost or doubled by it."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()
    attached: Seen[int] = Seen()

    async def late(event: Note) -> None:
        attached.append(event.n)

    @bus.on("note:*")
    async def handler(event: Note) -> None:
        route = await bus.attach(late, "note:*")
        await route.add("more:*", "note:b")
        await route.discard("note:*")
        receipt = await bus.publish("more:1", Note(n=event.n))
        assert receipt.receivers == 1
        await attached.reach(event.n + 1)
        await route.detach()
        async with bus.subscribe("note:*", Note) as messages:
            await messages.add("other:*")
        seen.append(event.n)

    async with bus:
        for n in range(5):
            await bus.publish(Note(n=n))
            await seen.reach(n + 1)
        async with asyncio.timeout(30):
            while bus.health().subscriptions != ("note:*",):
                await checkpoint()

        assert bus.stats().failed == 0
        assert bus.stats().handlers.keys() == {"handler"}
    assert seen == attached == [0, 1, 2, 3, 4]


@pytest.mark.scenario(31)
async def test_off_and_on_again_at_once(url: str) -> None:
    """A route that is detached and attached again without a pause, many times and by many tasks at
    once, ends as the last one left it: one subscription, one copy of each message."""
    bus = EventBus(url)
    seen: Seen[int] = Seen()

    async def handler(event: Note) -> None:
        seen.append(event.n)

    async def flicker() -> None:
        for _ in range(20):
            route = await bus.attach(handler, "note:*", "note:a")
            await route.detach()

    async with bus:
        await asyncio.gather(*(flicker() for _ in range(10)))
        route = await bus.attach(handler, "note:*")
        leaving = asyncio.create_task(route.detach())
        again = await bus.attach(handler, "note:*")
        await leaving
        receipt = await bus.publish(Note(n=1))
        await seen.reach(1)

        assert receipt.receivers == 1
        assert bus.health().subscriptions == ("note:*",)
        await again.detach()
        assert (await bus.publish(Note(n=2))).receivers == 0
    assert seen == [1]


@pytest.mark.scenario(31)
async def test_one_handler_twice_is_two_routes(url: str) -> None:
    """A handler that is attached twice is called twice for each message, over one subscription;
    when one route is detached, the other one stays."""
    seen: Seen[int] = Seen()

    async def handler(event: Note) -> None:
        seen.append(event.n)

    async with EventBus(url) as bus:
        first = await bus.attach(handler, "note:*")
        second = await bus.attach(handler, "note:*")
        receipt = await bus.publish(Note(n=1))
        await seen.reach(2)
        await first.detach()
        await first.detach()
        await bus.publish(Note(n=2))
        await seen.reach(3)

        assert receipt.receivers == 1
        assert first.name != second.name
        assert seen == [1, 1, 2]


@pytest.mark.scenario(31)
@pytest.mark.parametrize("order_by", [None, "channel"])
async def test_a_stop_inside_a_handler_ends_everything(url: str, order_by: Any) -> None:
    """Handlers that stop their bus, several at once and each of them twice, with publishes under
    way: nothing deadlocks, each of them ends, and a publish afterwards says that it is too late."""
    bus = EventBus(url, drain_timeout=30.0)
    inside: Seen[int] = Seen()
    after: Seen[int] = Seen()

    @bus.on("note:*", concurrency=3, order_by=order_by)
    async def handler(event: Note) -> None:
        inside.append(event.n)
        await inside.reach(3)
        publishing = asyncio.create_task(bus.publish("other", Note()))
        await bus.stop()
        await bus.stop()
        with pytest.raises(BusClosed):
            await bus.publish(Note(to=event.to, n=99))
        await asyncio.wait({publishing})
        publishing.exception()
        after.append(event.n)

    await bus.start()
    for n in range(3):
        await bus.publish(Note(to=str(n), n=n))
    await after.reach(3)
    await soon(bus.stop(), 20)

    assert sorted(after) == [0, 1, 2]
    assert bus.health().state == "closed"
