"""Sentinel: three of them watch a master and a replica; the bus follows the master.

Plain redis-py publishes to the new master while its subscriber stays on the dead one, without an
error. Here both connections leave, and the loss is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from anyio.lowlevel import checkpoint
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError

from eventbus import BusUnavailable, EventBus, Gap, PublishUncertain
from eventbus.transports._endpoint import _sentinels
from tests.faults.controller import Controller
from tests.faults.sentinels import CONFIG, Watched
from tests.helpers import Lines, Seen, soon
from tests.test_failure import Note, listener, publish_until

HEARTBEAT = 0.5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two servers and three Sentinels, for the tests that leave the master where it is."""
    with ExitStack() as stack:
        yield Watched(stack, tmp_path_factory.mktemp("sentinel"))


@pytest.fixture
def movable(tmp_path: Path) -> Iterator[Watched]:
    """A set for one failover: after one, Sentinels need 10 s to know the roles again, and a new
    set is ready in 2."""
    with ExitStack() as stack:
        yield Watched(stack, tmp_path)


def bus_of(
    url: str, *, heartbeat: float | None = HEARTBEAT, client_name: str = "bus"
) -> tuple[EventBus, Seen[int], Seen[Gap]]:
    """A bus on `note:*` whose connections bear its name."""
    return listener(
        url,
        heartbeat=heartbeat,
        publish_timeout=0.3,
        drain_timeout=1.0,
        redis_options={"client_name": client_name, "socket_timeout": 0.5},
    )


async def connections(server: Controller) -> int:
    """How many connections of `bus_of` this server has."""
    return len(await server.clients(name="bus"))


def balance(bus: EventBus, seen: list[int], outcomes: list[str]) -> None:
    """Assert that what was acknowledged was heard or counted as missed, and nothing came twice."""
    told = len(seen) + bus.stats().missed
    assert len(seen) == len(set(seen))
    assert outcomes.count("ok") <= told <= len(outcomes)


# -- Quiet times -----------------------------------------------------------------------------------


async def test_a_bus_finds_the_master(cluster: Watched, log: Lines) -> None:
    """Through redis+sentinel:// both connections and `bus.redis()` lead to the master, also when
    the first Sentinel is dead; nothing is left open."""
    master, replica = await cluster.roles()
    bus, seen, gaps = bus_of(cluster.url)
    cluster.sentinels[0].kill()
    try:
        async with bus:
            assert (await bus.publish(Note(to="a", n=1))).receivers == 1
            await seen.reach(1)
            await bus.redis().set("key", "value")
            assert await connections(master) == 3
            assert await connections(replica) == 0
            assert bus.health().state == "live"
    finally:
        cluster.sentinels[0].start()
    assert await connections(master) == 0
    assert not gaps
    assert not log.lines


async def test_a_client_of_a_sentinel_is_taken_and_left_alone(cluster: Watched) -> None:
    """A client made by `Sentinel.master_for` leads to the master; its pool and the clients of its
    Sentinels are neither used nor closed."""
    await cluster.roles()
    theirs = Sentinel([("localhost", server.port or 0) for server in cluster.sentinels])
    client = theirs.master_for("main", decode_responses=True)
    assert await client.ping()
    pools = [client.connection_pool, theirs.sentinels[0].connection_pool]
    before = [(list(pool._available_connections), len(pool._in_use_connections)) for pool in pools]
    bus = EventBus(client)
    async with bus, bus.subscribe("note:*", Note) as messages:
        await bus.publish(Note(to="a", n=1))
        assert (await soon(anext(messages))).event.n == 1
        await bus.redis().set("key", "value")
        assert await bus.redis().get("key") == "value"

    after = [(list(pool._available_connections), len(pool._in_use_connections)) for pool in pools]
    assert after == before
    assert all(connection.is_connected for pool in after for connection in pool[0])
    await client.aclose()
    for sentinel in theirs.sentinels:
        await sentinel.aclose()


async def test_an_unknown_master_says_so(cluster: Watched) -> None:
    """A name that no Sentinel watches, or Sentinels that refuse the password, fail the start; the
    name is told, and no secret of the node or of the Sentinels."""
    url = cluster.url.replace("/main", "/mine").replace("//", "//:hunter2@")
    options = {"sentinel_kwargs": {"password": "hunter2"}}
    for bus in (
        EventBus(url, connect_timeout=0.5),
        EventBus(url, connect_timeout=0.5, redis_options=options),
    ):
        with pytest.raises(BusUnavailable, match="no Sentinel") as caught:
            await soon(bus.start())

        assert "'mine'" in str(caught.value)
        assert "hunter2" not in str(caught.value) + repr(bus)


# -- The master moves ------------------------------------------------------------------------------


@pytest.mark.long  # Sentinel itself gives the old master 8 s before it demotes it
@pytest.mark.scenario(17)
async def test_a_graceful_failover_is_followed_and_told(movable: Watched, log: Lines) -> None:
    """After SENTINEL FAILOVER the bus is on the new master, the gap is told, messages flow, and the
    sum of heard and missed is what was acknowledged."""
    old, new = await movable.roles()
    bus, seen, gaps = bus_of(movable.url)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        await movable.fail_over()
        outcomes = await publish_until(bus, lambda: len(gaps) > 0)
        outcomes += await follow(bus, seen, len(outcomes))

        assert gaps[0].reason == "reconnect"
        assert await connections(new) == 2
        assert await connections(old) == 0
        balance(bus, seen, ["ok", *outcomes])


async def follow(
    bus: EventBus, seen: Seen[int], start: int, until: asyncio.Event | None = None
) -> list[str]:
    """Publish notes from this number on until one of them is heard, or as long as `until` is not
    set; returns the outcomes."""
    outcomes: list[str] = []
    async with asyncio.timeout(40):
        while not until.is_set() if until else not seen or seen[-1] < start:
            try:
                await bus.publish(Note(to="a", n=start + len(outcomes)))
            except (BusUnavailable, PublishUncertain) as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("ok")
            await checkpoint()
    return outcomes


@pytest.mark.scenario(18)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_frozen_master_is_left_by_both_connections(
    movable: Watched, log: Lines, busy: bool
) -> None:
    """A master that freezes is left within the liveness deadline, whether anybody publishes or not;
    when Sentinel has chosen the new one, both connections are there and messages flow, and what was
    acknowledged is heard or counted. It does not come back when the old one wakes."""
    old, new = await movable.roles()
    bus, seen, gaps = bus_of(movable.url)
    async with bus:
        outcomes = await follow(bus, seen, 0)
        loading = None
        if busy:
            moved = asyncio.Event()
            loading = asyncio.create_task(follow(bus, seen, len(outcomes), moved))
            await seen.reach(20)
        old.freeze()
        try:
            await log.hear("publisher", 4 * HEARTBEAT + 5)
            await log.hear("subscriber", 4 * HEARTBEAT + 5)
            await soon(gaps.reach(1), 30)
            if loading is not None:
                moved.set()
                outcomes += await soon(loading, 20)
            outcomes += await follow(bus, seen, len(outcomes))
            assert gaps[0].reason == "reconnect"
            assert await connections(new) == 2
        finally:
            old.thaw()
        more = await follow(bus, seen, len(outcomes))

        assert set(more) == {"ok"}
        assert await connections(new) == 2
        assert [line for line in log.lines if "no byte for a heartbeat" in line]
        balance(bus, seen, [*outcomes, *more])


@pytest.mark.scenario(18)
async def test_without_a_heartbeat_a_frozen_master_starves_the_bus(movable: Watched) -> None:
    """The negative control: with heartbeat=None the bus stays on the frozen master, says that it is
    live and hears of nothing, while the bus beside it has followed the failover."""
    old, new = await movable.roles()
    deaf, deaf_seen, deaf_gaps = bus_of(movable.url, heartbeat=None, client_name="deaf")
    bus, seen, gaps = bus_of(movable.url)
    async with deaf, bus:
        await follow(bus, seen, 0)
        old.freeze()
        try:
            await soon(gaps.reach(1), 30)
            await follow(bus, seen, 1000)
            assert len(await new.clients(name="bus")) == 2
            assert await new.clients(name="deaf") == []
            assert max(deaf_seen) < 1000
            assert not deaf_gaps
            assert deaf.health().state == "live"
        finally:
            old.thaw()


# -- One node and one Sentinel, without anybody to fail over to -----------------------------------


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[tuple[Controller, str]]:
    """A master that a single Sentinel watches, and the URL."""
    config = tmp_path / "sentinel.conf"
    with Controller(port=0) as master:
        config.write_text(CONFIG.format(port=master.port))
        options = (str(config), "--sentinel")
        with Controller(tmp_path / "s", port=0, options=options) as sentinel:
            yield master, f"redis+sentinel://localhost:{sentinel.port}/main"


@pytest.mark.scenario(21)
async def test_a_publisher_is_never_left_on_a_replica(
    lonely: tuple[Controller, str], log: Lines
) -> None:
    """When the node under a running bus becomes a replica, the next beat notices: publishes are
    certainly not sent until there is a master again, and then they are."""
    master, url = lonely
    bus, seen, _ = bus_of(url)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        await master.ask("REPLICAOF", "127.0.0.1", "1")
        await log.hear("publisher", 4 * HEARTBEAT)
        with pytest.raises(BusUnavailable) as caught:
            await bus.publish(Note(to="a", n=-2))
        await master.ask("REPLICAOF", "NO", "ONE")
        await follow(bus, seen, 0)

        assert "replica" in str(caught.value)
        assert "replica" in log.lines[0]
        assert -2 not in seen


@pytest.mark.scenario(21)
async def test_a_start_on_a_replica_is_refused(lonely: tuple[Controller, str]) -> None:
    """When Sentinel still names a node that is a replica by now, the start does not take it."""
    master, url = lonely
    await master.ask("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BusUnavailable, match="replica"):
        await soon(EventBus(url, connect_timeout=0.5).start())


async def test_two_discoveries_at_once_keep_every_sentinel() -> None:
    """The publisher and the subscriber ask at the same time: no Sentinel is lost to either
    (tests/upstream: redis-py's own list loses one)."""
    sentinels = _sentinels([("localhost", 1), ("localhost", 2), ("localhost", 3)], {})
    known = set(sentinels.sentinels)
    first, second, third = sentinels.sentinels

    async def fails() -> None:
        await checkpoint()
        raise RedisConnectionError

    async def answers() -> dict[str, dict[str, object]]:
        await checkpoint()
        state = {"is_master": True, "is_sdown": False, "is_odown": False, "ip": "::1", "port": 1}
        return {"main": state | {"num-other-sentinels": 2}}

    first.sentinel_masters = fails
    second.sentinel_masters = third.sentinel_masters = answers
    await asyncio.gather(sentinels.discover_master("main"), sentinels.discover_master("main"))

    assert set(sentinels.sentinels) == known
