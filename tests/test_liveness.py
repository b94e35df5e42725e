"""Connections that look alive and are not: half-open, led to two servers, cut while it subscribes.

A proxy between the bus and its server does what networks do. Negative controls show that without
the heartbeat the same fault stays unseen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio
from anyio.lowlevel import checkpoint

from eventbus import BusUnavailable, EventBus, PublishUncertain
from eventbus.server import Server
from tests.faults.proxy import Mode, Proxy
from tests.helpers import Lines, Seen, soon
from tests.test_failure import HEARTBEAT, Note, listener, publish_until

PATIENCE = 15.0
"""Seconds on top of what detection takes: a slow machine is no fault."""


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a TCP port, for one test."""
    with Server(port=0) as server:
        yield server


@pytest.fixture
def other() -> Iterator[Server]:
    """A second server, which knows nothing of the first."""
    with Server(port=0) as server:
        yield server


async def publish_at(server: Server, *numbers: int) -> list[int | None]:
    """Publish these notes directly at a server; returns who got them."""
    async with EventBus(server.url, heartbeat=None) as bus:
        return [(await bus.publish(Note(to="a", n=n))).receivers for n in numbers]


@asynccontextmanager
async def load(busy: bool, bus: EventBus) -> AsyncIterator[None]:
    """With `busy`, a publisher that never stops in this block."""
    over = asyncio.Event()
    publishing = asyncio.create_task(publish_until(bus, over.is_set, 50)) if busy else None
    try:
        yield
    finally:
        over.set()
        if publishing is not None:
            await publishing


# -- Two servers behind one address ----------------------------------------------------------------


async def split(proxy: Proxy, other: Server, log: Lines) -> None:
    """Leave the subscriber where it is, and let the publisher find the other server."""
    [publisher] = [pair for pair in proxy.living() if pair.role != "subscriber"]
    proxy.retarget(other.port)
    publisher.cut()
    await log.hear("publisher")
    await log.hear("connected again")


async def test_a_publisher_on_another_node_is_noticed_at_once(
    server: Server, other: Server, log: Lines
) -> None:
    """The fence of the first beat after a reconnect proves that publisher and subscriber are on
    different nodes: long before the next heartbeat both connect again, and messages flow."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=60.0)
        async with bus:
            await bus.publish(Note(to="a", n=1))
            await seen.reach(1)
            await split(proxy, other, log)
            await log.hear("different nodes")
            await soon(gaps.reach(1))
            await publish_until(bus, lambda: len(seen) > 1)

            assert await publish_at(server, 7) == [0]
            assert await publish_at(other, 8) == [1]
            assert [gap.reason for gap in gaps] == ["reconnect"]


async def test_a_subscriber_on_another_node_is_noticed_at_once(
    server: Server, other: Server, log: Lines
) -> None:
    """The same when it is the subscriber that connects again, elsewhere: the fence is tried when
    its probe can be heard, and not a heartbeat later."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=60.0)
        async with bus:
            [subscriber] = [pair for pair in proxy.living() if pair.role == "subscriber"]
            proxy.retarget(other.port)
            subscriber.cut()
            await log.hear("different nodes")
            await soon(gaps.reach(1))
            await publish_until(bus, lambda: len(seen) > 0)

            assert await publish_at(server, 7) == [0]
            assert await publish_at(other, 8) == [1]


async def test_without_a_heartbeat_a_wrong_node_starves_the_bus(
    server: Server, other: Server, log: Lines
) -> None:
    """The negative control: with heartbeat=None the bus publishes where nobody listens, hears
    nothing of its own, and says nothing."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=None)
        async with bus:
            await split(proxy, other, log)
            receipts = [await bus.publish(Note(to="a", n=n)) for n in range(20)]
            await publish_at(server, 99)
            await seen.reach(1)

            assert {receipt.receivers for receipt in receipts} == {0}
            assert seen == [99]
            assert bus.health().state == "live"
            assert not gaps
            assert not [line for line in log.lines if "different nodes" in line]


# -- Half-open connections -------------------------------------------------------------------------


@pytest.mark.scenario(3, 6)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
@pytest.mark.parametrize("mode", ["hole", "down_hole"])
async def test_a_half_open_subscriber_is_noticed(
    server: Server, log: Lines, mode: Mode, busy: bool
) -> None:
    """A subscriber that hears nothing any more, with its socket open, is given up within two
    heartbeats, be it idle or in the middle of a stream; what it missed is counted, and it hears
    again."""
    async with Proxy(server.port) as proxy, EventBus(server.url) as publisher:
        bus, seen, gaps = listener(proxy.url)
        async with bus:
            await publisher.publish(Note(to="a", n=0))
            await seen.reach(1)
            async with load(busy, publisher):
                [pair] = proxy.living("subscriber")
                pair.mode = mode
                lost = [await publisher.publish(Note(to="a", n=n)) for n in range(1, 4)]
                await log.hear("subscriber", 2 * HEARTBEAT + 1 + PATIENCE)
                await soon(gaps.reach(1), PATIENCE)
            heard = len(seen)
            await publish_until(publisher, lambda: len(seen) > heard)
            await soon(gaps.reach(2))

            assert [receipt.receivers for receipt in lost] == [1, 1, 1]
            assert (gaps[0].reason, gaps[0].missed) == ("reconnect", None)
            assert sum(gap.missed or 0 for gap in gaps) == bus.stats().missed >= 3
            assert [line for line in log.lines if "no byte for a heartbeat" in line]
            assert bus.stats().reconnects == 1


@pytest.mark.scenario(3, 6)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_without_a_heartbeat_a_half_open_subscriber_is_not_noticed(
    server: Server, log: Lines, busy: bool
) -> None:
    """The negative control: with heartbeat=None the same hole swallows messages while the bus with
    a heartbeat beside it has long recovered."""
    async with Proxy(server.port) as proxy, EventBus(server.url) as other, load(busy, other):
        deaf, deaf_seen, deaf_gaps = listener(proxy.url, heartbeat=None, drain_timeout=0.2)
        bus, seen, gaps = listener(proxy.url)
        async with deaf, bus:
            for pair in proxy.living("subscriber"):
                pair.mode = "hole"
            await soon(gaps.reach(1), PATIENCE)
            before = len(deaf_seen), len(seen)
            await publish_until(bus, lambda: len(seen) > before[1] + 10)

            assert len(deaf_seen) == before[0]
            assert not deaf_gaps
            assert deaf.health().state == "live"


@pytest.mark.scenario(6)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_half_open_publisher_is_noticed_and_sends_nothing_twice(
    server: Server, log: Lines, busy: bool
) -> None:
    """When the answers to a publisher are lost, a publish is uncertain within its deadline and
    arrives at most once, and the connection is given up within two heartbeats, be it idle or in the
    middle of its work."""
    async with Proxy(server.port) as proxy:
        bus, seen, _ = listener(proxy.url, publish_timeout=0.2)
        async with bus:
            await bus.publish(Note(to="a", n=-1))
            await seen.reach(1)
            async with load(busy, bus):
                [pair] = proxy.living("publisher")
                pair.mode = "down_hole"
                with pytest.raises(PublishUncertain) as caught:
                    await soon(bus.publish(Note(to="a", n=-2)))
                await log.hear("publisher", 2 * HEARTBEAT + 1 + PATIENCE)
                await log.hear("connected again", PATIENCE)
            heard = len(seen)
            await publish_until(bus, lambda: len(seen) > heard + 1)

            assert seen.count(-2) == 1
            assert caught.value.channel == "note:a"
            assert bus.stats().uncertain >= 1
            assert bus.stats().reconnects == 0, "the subscriber was alive all the time"
            assert [line for line in log.lines if "no byte for a heartbeat" in line]


@pytest.mark.scenario(6)
async def test_what_arrived_without_an_answer_is_not_sent_again(server: Server, log: Lines) -> None:
    """When a connection is cut after a message has arrived and before its answer has, the publish
    is uncertain at once, and there is one copy, also after the reconnect."""
    async with Proxy(server.port) as proxy:
        bus, seen, _ = listener(proxy.url, heartbeat=None, publish_timeout=60.0)
        async with bus:
            await bus.publish(Note(to="a", n=-1))
            [pair] = proxy.living("publisher")
            pair.mode = "down_hole"
            publishing = asyncio.create_task(bus.publish(Note(to="a", n=-2)))
            await seen.reach(2)
            pair.cut()
            with pytest.raises(PublishUncertain):
                await soon(publishing)
            await publish_until(bus, lambda: len(seen) > 2)

            assert seen.count(-2) == 1
            assert bus.stats().uncertain == 1


@pytest.mark.scenario(6)
async def test_without_a_heartbeat_a_half_open_publisher_is_not_noticed(
    server: Server, log: Lines
) -> None:
    """The negative control: with heartbeat=None every publish is uncertain, one after another, long
    after the bus with a heartbeat beside it has a new connection."""
    async with Proxy(server.port) as proxy:
        deaf, _, _ = listener(proxy.url, heartbeat=None, publish_timeout=0.1, drain_timeout=0.2)
        bus, _, _ = listener(proxy.url, publish_timeout=0.1)
        async with deaf, bus:
            for pair in proxy.living():
                if pair.role != "subscriber":
                    pair.mode = "down_hole"
            await log.hear("publisher", 2 * HEARTBEAT + 1 + PATIENCE)
            await publish_until(bus, lambda: bus.stats().published > 0)
            for n in range(3):
                with pytest.raises(PublishUncertain):
                    await soon(deaf.publish(Note(to="a", n=n)))

            assert deaf.health().state == "live"
            assert deaf.stats().published == 0


@pytest.mark.scenario(6)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_subscriber_whose_requests_are_lost_is_noticed(
    server: Server, log: Lines, busy: bool
) -> None:
    """A subscriber that hears, and whose own words arrive nowhere, cannot subscribe any more: it is
    given up although messages come, and what waited is subscribed."""

    async def handler(event: Note) -> None: ...

    async with Proxy(server.port) as proxy, EventBus(server.url, heartbeat=None) as publisher:
        bus, _, gaps = listener(proxy.url, heartbeat=0.1, drain_timeout=0.2)
        async with bus, load(busy, publisher):
            [pair] = proxy.living("subscriber")
            pair.mode = "up_hole"
            attaching = asyncio.create_task(bus.attach(handler, "late:*"))
            try:
                await log.hear("messages come, answers do not")
                await soon(gaps.reach(1), 6)
                await soon(attaching, PATIENCE)
            finally:
                attaching.cancel()
            receipt = await publisher.publish("late:1", Note(to="a", n=1))

            assert receipt.receivers == 1
            assert bus.stats().reconnects == 1


@pytest.mark.scenario(6)
async def test_a_publisher_in_a_hole_sends_nothing_late(server: Server, log: Lines) -> None:
    """What a dead network swallowed is uncertain, never sent again after the reconnect, and leaves
    a hole that is counted."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, publish_timeout=0.2)
        async with bus:
            await bus.publish(Note(to="a", n=-1))
            await seen.reach(1)
            [pair] = proxy.living("publisher")
            pair.mode = "hole"
            with pytest.raises(PublishUncertain):
                await soon(bus.publish(Note(to="a", n=-2)))
            await publish_until(bus, lambda: len(seen) > 1)
            await soon(gaps.reach(1))

            assert -2 not in seen
            assert {gap.reason for gap in gaps} == {"sequence"}
            assert bus.stats().missed <= bus.stats().uncertain


@pytest.mark.scenario(3, 5)
async def test_a_server_that_accepts_and_never_answers_does_not_hold_an_attempt() -> None:
    """A server that is frozen when the bus connects is given up after the connect timeout and tried
    again, also by a client that has no timeouts: it may be another server by then."""
    with Server(port=0) as server:
        async with Proxy(server.port, mode="hole") as proxy:
            port = int(proxy.url.rpartition(":")[2])
            client = redis.asyncio.Redis(port=port, socket_timeout=None)
            bus = EventBus(client, redis_options={"socket_connect_timeout": 0.1})
            starting = asyncio.create_task(bus.start())
            async with asyncio.timeout(5):
                while len(proxy.pairs) < 4:
                    await checkpoint()
                proxy.mode = "pass"
                await starting
            assert bus.health()
            await bus.stop()
            await client.aclose()


# -- A second drop, while it subscribes again ------------------------------------------------------


@pytest.mark.scenario(7)
async def test_a_second_drop_during_the_resubscribe_starts_from_the_full_set(
    server: Server, log: Lines
) -> None:
    """Cut again and again in the middle of the confirmations, the bus asks for everything anew:
    every subscription is live at the end, none twice, and the outage is told once."""
    names = [f"room:{n}" for n in range(40)]
    async with Proxy(server.port) as proxy:
        bus, _, gaps = listener(proxy.url)
        heard: Seen[str] = Seen()

        async def hear(event: Note) -> None:
            heard.append(event.to)

        for name in names:
            bus.on(name)(hear)
        async with bus:
            [pair] = proxy.living("subscriber")
            whole = pair.down
            proxy.cuts = [whole // 10, whole // 2, whole // 3, whole * 3 // 4]
            proxy.cut("subscriber")
            await soon(gaps.reach(1), 15)

            assert proxy.cuts == []
            async with EventBus(server.url) as admin:
                redis = admin.redis()
                assert dict(await redis.pubsub_numsub(*names)) == {n.encode(): 1 for n in names}
                assert await redis.pubsub_numpat() == 1
                receipts = [await admin.publish(name, Note(to=name, n=1)) for name in names]
            await heard.reach(len(names))
            assert sorted(heard) == sorted(names)
            assert {receipt.receivers for receipt in receipts} == {1}
            assert [gap.reason for gap in gaps] == ["reconnect"]
            assert len(bus.health().subscriptions) == len(names) + 1
            async with asyncio.timeout(5), bus.subscribe("late:*", bytes) as messages:
                await bus.publish_raw("late:1", b"answers meet their questions")
                assert (await anext(messages)).channel == "late:1"


# -- Reading ---------------------------------------------------------------------------------------


@pytest.mark.scenario(8)
async def test_replies_that_are_split_everywhere_arrive_whole(server: Server) -> None:
    """Answers and messages that come byte by byte, in every reply split at every offset, are the
    same messages in the same order."""
    async with Proxy(server.port, mode="drip") as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=None)
        raw: Seen[bytes] = Seen()

        @bus.on("raw:*")
        async def keep(payload: bytes) -> None:
            raw.append(payload)

        payloads = [b"", b"\r\n", b"$3\r\n", b"*0\r\n" * 9, bytes(range(256)), b"\xff" * 300]
        async with bus:
            for n in range(10):
                receipt = await bus.publish(Note(to="é", n=n))
                assert receipt.receivers == 1
            for payload in payloads:
                await bus.publish_raw("raw:1", payload)
            await seen.reach(10)
            await raw.reach(len(payloads))

            assert seen == list(range(10))
            assert raw == payloads
            assert not gaps
            assert {pair.mode for pair in proxy.pairs} == {"drip"}


@pytest.mark.scenario(14)
async def test_a_publish_while_nobody_listens_at_the_address(server: Server, log: Lines) -> None:
    """A publish while the address refuses connections is certainly not sent, and the bus comes back
    when the address leads to another server."""
    with Server(port=0) as other:
        async with Proxy(server.port) as proxy:
            bus, seen, gaps = listener(proxy.url, publish_timeout=0.2)
            async with bus:
                proxy.retarget(1)
                proxy.cut()
                await log.hear("publisher")
                with pytest.raises(BusUnavailable):
                    await soon(bus.publish(Note(to="a", n=-1)))
                proxy.retarget(other.port)
                await soon(gaps.reach(1), 10)
                await publish_until(bus, lambda: len(seen) > 0)

                assert -1 not in seen
                assert await publish_at(other, 5) == [1]
