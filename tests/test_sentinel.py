"""Sentinel: three of them watch a master and a replica; the bus follows the master.

Plain redis-py publishes to the new master while its subscriber stays on the dead one, without an
error. Here both connections leave, and the loss is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from anyio.lowlevel import checkpoint
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from eventbus import BusUnavailable, EventBus, Gap, PublishUncertain
from eventbus.server import Server
from eventbus.transports._endpoint import _sentinels
from tests.helpers import Lines, Seen, soon
from tests.test_failure import Note, listener, publish_until

HEARTBEAT = 0.5
CONFIG = """
sentinel monitor main 127.0.0.1 {port} 2
sentinel down-after-milliseconds main 1000
sentinel failover-timeout main 2000
"""
FAST = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


class Watched:
    """A master and a replica, and the Sentinels over them."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.master = stack.enter_context(Server(port=0, options=FAST))
        port = str(self.master.port)
        self.replica = stack.enter_context(
            Server(port=0, options=(*FAST, "--replicaof", "127.0.0.1", port))
        )
        self.sentinels = []
        for number in range(3):
            config = folder / f"sentinel{number}.conf"
            config.write_text(CONFIG.format(port=port))
            server = Server(folder / f"s{number}", port=0, options=(str(config), "--sentinel"))
            self.sentinels.append(stack.enter_context(server))
        hosts = ",".join(f"localhost:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/main"

    async def ask(self, server: Server, *words: str) -> Any:
        """The answer of one of the servers."""
        async with redis.asyncio.Redis(port=server.port or 0) as client:
            return await client.execute_command(*words)

    async def roles(self) -> tuple[Server, Server]:
        """The master of now and the replica, when every Sentinel knows them and the others."""
        async with asyncio.timeout(20):
            for sentinel in self.sentinels:
                async with redis.asyncio.Redis(port=sentinel.port or 0) as client:
                    events = client.pubsub()
                    await events.psubscribe("*")
                    while not await self._healthy(client):
                        await events.get_message(timeout=0.2)  # the next event, or have a look
                    await events.aclose()
            _, port = await self.ask(
                self.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"
            )
        servers = (self.master, self.replica)
        return servers if int(port) == self.master.port else servers[::-1]

    async def _healthy(self, client: redis.asyncio.Redis) -> bool:
        try:
            await client.execute_command("SENTINEL", "CKQUORUM", "main")
        except ResponseError:
            return False
        master = (await client.sentinel_masters())["main"]
        known = master["num-other-sentinels"] == 2 and master["num-slaves"] == 1
        # A Sentinel itself looks every 10 s only.
        servers = (self.master, self.replica)
        [replica] = [server for server in servers if server.port != master["port"]]
        async with redis.asyncio.Redis(port=replica.port or 0) as direct:
            return known and (await direct.info()).get("master_link_status") == "up"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two servers and three Sentinels; tests that move the master ask where it is."""
    with ExitStack() as stack:
        yield Watched(stack, tmp_path_factory.mktemp("sentinel"))


def bus_of(url: str) -> tuple[EventBus, Seen[int], Seen[Gap]]:
    """A bus on `note:*` whose connections bear its name."""
    return listener(
        url,
        heartbeat=HEARTBEAT,
        publish_timeout=0.3,
        drain_timeout=1.0,
        redis_options={"client_name": "bus", "socket_timeout": 0.5},
    )


async def connections(cluster: Watched, server: Server) -> int:
    """How many connections of `bus_of` this server has."""
    async with redis.asyncio.Redis(port=server.port or 0) as client:
        clients = await client.client_list()
    return sum(client["name"] == "bus" for client in clients)


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
            assert await connections(cluster, master) == 3
            assert await connections(cluster, replica) == 0
            assert bus.health().state == "live"
    finally:
        cluster.sentinels[0].start()
    assert await connections(cluster, master) == 0
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


async def test_a_graceful_failover_is_followed_and_told(cluster: Watched, log: Lines) -> None:
    """After SENTINEL FAILOVER the bus is on the new master, the gap is told, messages flow, and the
    sum of heard and missed is what was acknowledged."""
    old, new = await cluster.roles()
    bus, seen, gaps = bus_of(cluster.url)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        await cluster.ask(cluster.sentinels[0], "SENTINEL", "FAILOVER", "main")
        outcomes = await publish_until(bus, lambda: len(gaps) > 0)
        outcomes += await follow(bus, seen, len(outcomes))

        assert gaps[0].reason == "reconnect"
        assert await connections(cluster, new) == 2
        assert await connections(cluster, old) == 0
        balance(bus, seen, ["ok", *outcomes])


async def follow(bus: EventBus, seen: Seen[int], start: int) -> list[str]:
    """Publish notes from this number on until one of them is heard; returns the outcomes."""
    outcomes = []
    async with asyncio.timeout(15):
        while not seen or seen[-1] < start:
            try:
                await bus.publish(Note(to="a", n=start + len(outcomes)))
            except (BusUnavailable, PublishUncertain) as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("ok")
            await checkpoint()
    return outcomes


async def test_a_frozen_master_is_left_by_both_connections(cluster: Watched, log: Lines) -> None:
    """A master that freezes is left within the liveness deadline; when Sentinel has chosen the new
    one, both connections are there and messages flow, and what was acknowledged is heard or
    counted. It does not come back when the old one wakes."""
    old, new = await cluster.roles()
    bus, seen, gaps = bus_of(cluster.url)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        old.freeze()
        try:
            await log.hear("publisher", 4 * HEARTBEAT)
            await log.hear("subscriber", 4 * HEARTBEAT)
            outcomes = await follow(bus, seen, 0)
            assert gaps[0].reason == "reconnect"
            assert await connections(cluster, new) == 2
        finally:
            old.thaw()
        more = await follow(bus, seen, len(outcomes))

        assert set(more) == {"ok"}
        assert await connections(cluster, new) == 2
        assert [line for line in log.lines if "no byte for a heartbeat" in line]
        balance(bus, seen, ["ok", *outcomes, *more])


# -- One node and one Sentinel, without anybody to fail over to -----------------------------------


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A master that a single Sentinel watches, and the URL."""
    config = tmp_path / "sentinel.conf"
    with Server(port=0) as master:
        config.write_text(CONFIG.format(port=master.port))
        options = (str(config), "--sentinel")
        with Server(tmp_path / "s", port=0, options=options) as sentinel:
            yield master, f"redis+sentinel://localhost:{sentinel.port}/main"


async def make_replica(server: Server, *of: str) -> None:
    """Change the role of a running node."""
    async with redis.asyncio.Redis(port=server.port or 0) as client:
        await client.execute_command("REPLICAOF", *of)


async def test_a_publisher_is_never_left_on_a_replica(
    lonely: tuple[Server, str], log: Lines
) -> None:
    """When the node under a running bus becomes a replica, the next beat notices: publishes are
    certainly not sent until there is a master again, and then they are."""
    master, url = lonely
    bus, seen, _ = bus_of(url)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        await make_replica(master, "127.0.0.1", "1")
        await log.hear("publisher", 4 * HEARTBEAT)
        with pytest.raises(BusUnavailable) as caught:
            await bus.publish(Note(to="a", n=-2))
        await make_replica(master, "NO", "ONE")
        await follow(bus, seen, 0)

        assert "replica" in str(caught.value)
        assert "replica" in log.lines[0]
        assert -2 not in seen


async def test_a_start_on_a_replica_is_refused(lonely: tuple[Server, str]) -> None:
    """When Sentinel still names a node that is a replica by now, the start does not take it."""
    master, url = lonely
    await make_replica(master, "127.0.0.1", "1")
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
