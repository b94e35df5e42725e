"""Masters that move, and nodes that get no traffic any more: the fault catalogue, part B.

tests/test_sentinel.py shows how a bus follows a master; here the ledger shows what became of every
message meanwhile, and a detached replica what the probe is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from anyio.lowlevel import checkpoint

from eventbus import EventBus
from tests.faults.controller import Controller
from tests.faults.ledger import CHANNELS, Ledger, receiver, source_of
from tests.faults.proxy import Proxy
from tests.faults.sentinels import Watched
from tests.helpers import Lines, soon
from tests.test_failure import Note, listener, publish_until

QUICK = {"socket_timeout": 0.5}
HEARTBEAT = 0.3


# -- Failovers, by the ledger ----------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A master, a replica and three Sentinels, for one failover."""
    with ExitStack() as stack:
        yield Watched(stack, tmp_path)


@pytest.mark.parametrize(
    "how",
    [
        # Sentinel itself gives the old master 8 s before it demotes it.
        pytest.param("graceful", marks=[pytest.mark.long, pytest.mark.scenario(17)]),
        pytest.param("frozen", marks=pytest.mark.scenario(18)),
    ],
)
async def test_the_ledger_balances_after_a_failover(
    watched: Watched, say: Callable[[str], None], how: str
) -> None:
    """Over 1,000 channels and two sources, published all through a failover: what was delivered and
    what was reported missing add up exactly, and nothing comes twice."""
    old, new = await watched.roles()
    ledger = Ledger()
    bus = receiver(watched.url, ledger, redis_options=QUICK)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(bus)
        publishers: dict[str, EventBus] = {}
        for n in range(2):
            publisher = EventBus(
                watched.url,
                name=f"pub-{n}",
                heartbeat=0.5,
                publish_timeout=0.5,
                drain_timeout=1.0,
                redis_options=QUICK,
            )
            await stack.enter_async_context(publisher)
            publishers[source_of(publisher)] = publisher
        await ledger.all_heard(publishers)
        if how == "graceful":
            await watched.fail_over()
        else:
            old.freeze()
        try:
            await ledger.rounds(publishers, CHANNELS[:300], lambda: ledger.reconnects > 0)
            pairs = await ledger.all_heard(publishers)
            assert len(await new.clients("pubsub")) >= 3
        finally:
            if how == "frozen":
                old.thaw()
        await soon(bus.stop(), 20)
    say(f"ledger after a failover ({how}) over {len(pairs)} pairs: {ledger.sums()}")

    ledger.balance(pairs)
    assert ledger.reconnects == 1
    assert how == "graceful" or sum(ledger.uncertain.values()) + ledger.refused > 0


# -- Nodes without traffic -------------------------------------------------------------------------


@pytest.fixture
def master() -> Iterator[Controller]:
    """Where everybody publishes."""
    with Controller(port=0, options=("--repl-diskless-sync-delay", "0")) as server:
        yield server


@pytest.fixture
def replica(master: Controller) -> Iterator[Controller]:
    """A node that hears what is published at its master."""
    options = ("--replicaof", "127.0.0.1", str(master.port))
    with Controller(port=0, options=options) as server:
        yield server


async def replicated(replica: Controller) -> None:
    """Return when the replica hears its master."""
    async with asyncio.timeout(20):
        while (await replica.ask("INFO", "replication")).get("master_link_status") != "up":
            await checkpoint()


async def split(proxy: Proxy, master: Controller, log: Lines) -> None:
    """Leave the subscriber on the replica, and let the publisher find the master."""
    [publisher] = [pair for pair in proxy.living() if pair.role != "subscriber"]
    proxy.retarget(master.port)
    publisher.cut()
    await log.hear("publisher")
    await log.hear("connected again")


@pytest.mark.scenario(19)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_detached_replica_is_left(
    master: Controller, replica: Controller, log: Lines, busy: bool
) -> None:
    """A subscriber whose node gets no traffic any more, while its connection is as good as ever, is
    taken to where messages are published: the probe notices, whether anybody publishes or not."""
    await replicated(replica)
    async with Proxy(replica.port) as proxy, EventBus(master.url) as other:
        bus, seen, gaps = listener(proxy.url, heartbeat=HEARTBEAT)
        async with bus:
            await split(proxy, master, log)
            await publish_until(other, lambda: len(seen) > 0)
            moved = asyncio.Event()
            loading = asyncio.create_task(publish_until(other, moved.is_set)) if busy else None
            await replica.ask("REPLICAOF", "NO", "ONE")
            await log.hear("different nodes")
            await soon(gaps.reach(1), 15)
            moved.set()
            if loading is not None:
                await loading
            heard = len(seen)
            await publish_until(other, lambda: len(seen) > heard)

            assert gaps[0].reason == "reconnect"
            assert await replica.clients("pubsub") == []
            async with asyncio.timeout(15):
                while bus.health().state != "live":  # the publisher comes back in its own time
                    await checkpoint()


@pytest.mark.scenario(19)
async def test_without_a_heartbeat_a_detached_replica_starves_the_bus(
    master: Controller, replica: Controller, log: Lines
) -> None:
    """The negative control: with heartbeat=None the subscriber stays where nothing arrives, while a
    bus with a heartbeat beside it has moved, and nothing is said."""
    await replicated(replica)
    async with Proxy(replica.port) as proxy, Proxy(replica.port) as its_proxy:
        deaf, deaf_seen, deaf_gaps = listener(proxy.url, heartbeat=None)
        bus, seen, gaps = listener(its_proxy.url, heartbeat=HEARTBEAT)
        async with EventBus(master.url) as other, deaf:
            await split(proxy, master, log)
            await publish_until(other, lambda: len(deaf_seen) > 0)
            async with bus:
                await split(its_proxy, master, log)
                await replica.ask("REPLICAOF", "NO", "ONE")
                heard = len(deaf_seen)
                await soon(gaps.reach(1), 15)
                heard_by_both = len(seen)
                await publish_until(other, lambda: len(seen) > heard_by_both + 20)

                assert len(deaf_seen) == heard
                assert not deaf_gaps
                assert deaf.health().state == "live"
                assert len(await replica.clients("pubsub")) == 1


@pytest.mark.scenario(21)
async def test_a_publish_at_a_replica_reaches_only_its_own_subscribers(
    master: Controller, replica: Controller
) -> None:
    """What a redis:// URL of a replica does, since no Sentinel says where the master is: the bus
    hears what is published at the master, and the master does not hear the bus; so the number of
    receivers is that of the replica."""
    await replicated(replica)
    bus, seen, _ = listener(replica.url)
    other, other_seen, _ = listener(master.url)
    async with bus, other:
        receipt = await bus.publish(Note(to="a", n=-1))
        await publish_until(other, lambda: len(seen) > 1)

        assert receipt.receivers == 1
        assert -1 in seen
        assert -1 not in other_seen
