"""The limits that only the server can hold (docs/limits.md), on both real servers.

Each server is started with one limit set low, and the test goes over it: what the server does, and
what a bus says about it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from anyio.lowlevel import checkpoint
from redis.asyncio import Redis

from eventbus import BusUnavailable, EventBus, EventBusError, Gap, PublishUncertain
from eventbus.server import Server
from tests.conftest import DEBIAN
from tests.helpers import Lines, Seen

MIB = 1 << 20
SMALL = 8192
"""Bytes of a payload that every server copies for each subscriber: Valkey 9 shares one of 16 KiB or
more, and counts it for nobody (docs/limits.md)."""
Start = Callable[..., Server]


@pytest.fixture(params=["valkey", "redis"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a server of each kind with these options."""
    binary = None
    if request.param == "redis":
        request.getfixturevalue("debian_redis")  # skips where there is none
        binary = DEBIAN

    with ExitStack() as stack:

        def begin(*options: str) -> Server:
            return stack.enter_context(Server(binary=binary, options=options))

        yield begin


def client(server: Server) -> Redis:
    """A client to ask the server how it is."""
    return Redis.from_url(server.url, protocol=2)


@contextmanager
def connection(server: Server, command: bytes) -> Iterator[socket.socket]:
    """A connection that has sent this, and reads only when the test does."""
    with socket.socket(socket.AF_UNIX) as found:
        found.settimeout(20)
        found.connect(server.socket_path)
        found.sendall(command + b"\r\n")
        assert found.recv(1)
        yield found


async def used(asker: Redis) -> int:
    """Bytes that the server has allocated."""
    return int((await asker.info("memory"))["used_memory"])


@pytest.mark.scenario(37)
async def test_proto_max_bulk_len(start: Start) -> None:
    """A payload over `proto-max-bulk-len` is refused while it comes in; nobody receives it, the
    publish is an error of ours, and the next one works."""
    server = start("--proto-max-bulk-len", "1mb")
    bus = EventBus(server.url, max_payload=8 * MIB)
    seen: Seen[int] = Seen()

    @bus.on("in")
    async def see(payload: bytes) -> None:
        seen.append(len(payload))

    async with bus:
        with pytest.raises((BusUnavailable, PublishUncertain)) as refused:
            await bus.publish_raw("in", b"a" * (2 * MIB))
        print(type(refused.value).__name__, refused.value)
        await again(bus, b"a" * MIB)
        await seen.reach(1)
    assert set(seen) == {MIB}
    assert bus.stats().reconnects == 0


async def again(bus: EventBus, payload: bytes) -> None:
    """Publish until it is heard: the connection may have ended for what went before."""
    async with asyncio.timeout(20):
        while True:
            with suppress(EventBusError):
                receipt = await bus.publish_raw("in", payload)
                if receipt.receivers:
                    return


@pytest.mark.scenario(37)
async def test_client_query_buffer_limit(start: Start) -> None:
    """What one connection has sent and the server has not carried out is bounded by
    `client-query-buffer-limit`: over it the connection ends, and the bus comes back."""
    server = start("--client-query-buffer-limit", "1mb")
    bus = EventBus(server.url, max_payload=8 * MIB)
    seen: Seen[int] = Seen()

    @bus.on("in")
    async def see(payload: bytes) -> None:
        seen.append(len(payload))

    async with bus:
        with pytest.raises((BusUnavailable, PublishUncertain)) as refused:
            await bus.publish_raw("in", b"a" * (4 * MIB))
        print(type(refused.value).__name__, refused.value)
        await again(bus, b"a" * 1000)
        await seen.reach(1)
    assert set(seen) == {1000}
    assert "query buffer" in server.log()


@pytest.mark.scenario(27)
async def test_client_output_buffer_limit(start: Start) -> None:
    """A subscriber that does not read is closed at the hard limit of `client-output-buffer-limit
    pubsub`, and others do not notice."""
    server = start("--client-output-buffer-limit", "pubsub 1mb 0 0")
    bus, mouth = EventBus(server.url), EventBus(server.url, max_payload=8 * MIB)
    seen: Seen[int] = Seen()
    gaps: Seen[Gap] = Seen()

    @bus.on("in")
    async def see(payload: bytes) -> None:
        seen.append(len(payload))

    @bus.on_gap()
    async def miss(gap: Gap) -> None:
        gaps.append(gap)

    async with bus, mouth:
        with connection(server, b"SUBSCRIBE other") as deaf:
            while "output buffer limits" not in server.log():
                await mouth.publish_raw("other", b"a" * SMALL)
            assert len(until_the_end(deaf)) < 4 * MIB
        await again(mouth, b"a")
        await seen.reach(1)
    assert gaps == []
    assert bus.stats().reconnects == 0


@pytest.mark.scenario(27)
async def test_without_an_output_buffer_limit(start: Start) -> None:
    """Without that limit a subscriber that does not read costs the server all that it misses."""
    server = start("--client-output-buffer-limit", "pubsub 0 0 0")
    async with EventBus(server.url) as mouth, client(server) as asker:
        before = await used(asker)
        with connection(server, b"SUBSCRIBE other"):
            for _ in range(50):
                await mouth.publish_raw("other", b"a" * (MIB // 2))
            held = await used(asker) - before
    assert held > 20 * MIB


@pytest.mark.scenario(27)
async def test_maxmemory_clients(start: Start) -> None:
    """Over `maxmemory-clients` the connection that holds most is closed, a subscriber included."""
    server = start("--maxmemory-clients", "8mb", "--client-output-buffer-limit", "pubsub 0 0 0")
    bus = EventBus(server.url)
    seen: Seen[int] = Seen()

    @bus.on("in")
    async def see(payload: bytes) -> None:
        seen.append(len(payload))

    async with bus, client(server) as asker:
        with connection(server, b"SUBSCRIBE other"):
            for _ in range(2000):
                await bus.publish_raw("other", b"a" * SMALL)
            async with asyncio.timeout(20):  # the server looks at each connection once a second
                while not (evicted := (await asker.info("stats"))["evicted_clients"]):
                    await checkpoint()
        await again(bus, b"a")
        await seen.reach(1)
    assert evicted == 1
    assert bus.stats().reconnects == 0


async def test_timeout(start: Start, log: Lines) -> None:
    """`timeout` ends a connection that says nothing, and spares one that is subscribed; a bus with
    a heartbeat below it keeps both of its own, one without is connected anew."""
    server = start("--timeout", "1")
    async with EventBus(server.url, heartbeat=0.3) as bus:
        with connection(server, b"PING") as idle, connection(server, b"SUBSCRIBE other") as heard:
            said = await asyncio.to_thread(until_the_end, idle)
            assert said == b"PONG\r\n"
            assert (await bus.publish_raw("other", b"a")).receivers == 1
            assert await asyncio.to_thread(heard.recv, 1024)
        assert bus.stats().reconnects == 0
        assert log.lines == []
    async with EventBus(server.url, heartbeat=None) as bus:
        assert (await log.hear("reconnecting", 20)).startswith("publisher ")
        await log.hear("connected again")
        assert (await bus.publish_raw("other", b"a")).receivers == 0


def until_the_end(found: socket.socket) -> bytes:
    """All that the server says until it hangs up."""
    said = b""
    while more := found.recv(1024):
        said += more
    return said


async def test_maxclients(start: Start) -> None:
    """Each bus takes two connections; one too many is refused, and those that are there
    go on."""
    server = start("--maxclients", "3")
    async with EventBus(server.url, heartbeat=None) as bus:
        second = EventBus(server.url, connect_timeout=0.5)
        with pytest.raises(BusUnavailable):
            await second.start()
        assert (await bus.publish_raw("in", b"")).receivers == 0
