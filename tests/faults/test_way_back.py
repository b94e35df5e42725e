"""The way back: to a server that refuses for now, that moved, or that many want at one moment."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis.asyncio

from eventbus import EventBus
from eventbus.server import Server
from tests.faults.proxy import Pair, Proxy, refusing
from tests.faults.test_network import LOADING, MASTERDOWN, PATIENCE, QUIET, until
from tests.helpers import Lines, Seen, soon
from tests.test_failure import Note, listener, publish_until

REFUSALS = [
    LOADING,
    MASTERDOWN,
    "ERR max number of clients reached",
    "DENIED Redis is running in protected mode because protected mode is enabled",
]


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a TCP port, for one test."""
    with Server(port=0) as server:
        yield server


# -- Refusals at the door --------------------------------------------------------------------------


@pytest.mark.scenario(11)
@pytest.mark.parametrize("text", REFUSALS, ids=lambda text: text.split()[0])
async def test_a_server_that_refuses_for_now_is_waited_for(
    server: Server, log: Lines, text: str
) -> None:
    """At the start and in a reconnect the bus says what the server says, tries again, and goes live
    when the server takes it."""
    words = " ".join(text.split()[-3:])
    async with Proxy(server.port, mode="answer") as proxy:
        proxy.answer = refusing(text)
        bus, seen, gaps = listener(proxy.url, connect_timeout=60.0)
        starting = asyncio.create_task(bus.start())
        await log.hear(words)
        await until(lambda: len(proxy.pairs) >= 6)
        first = bus.health()
        proxy.mode = "pass"
        await soon(starting, PATIENCE)
        told = len(log.lines)
        proxy.mode = "answer"
        proxy.cut()
        before = len(proxy.pairs)
        await until(lambda: len(proxy.pairs) >= before + 6)
        second = bus.health()
        proxy.mode = "pass"
        await soon(gaps.reach(1), PATIENCE)
        await publish_until(bus, lambda: len(seen) > 0)
        await bus.stop()

        assert not first
        assert not second
        assert (first.state, second.state) == ("starting", "down")
        assert words in str(first.reason)
        assert words in str(second.reason)
        assert [line for line in log.lines[told:] if words in line]


@pytest.mark.scenario(11)
async def test_a_server_that_is_full_is_waited_for(server: Server, log: Lines) -> None:
    """A server with no room for another client is said to be full (or to have hung up: it says so
    and closes at once), and the bus goes live when it has room."""
    assert server.port is not None
    admin = redis.asyncio.Redis(port=server.port, single_connection_client=True)
    await admin.execute_command("CONFIG", "SET", "maxclients", 1)
    bus, seen, _ = listener(server.url, connect_timeout=60.0)
    starting = asyncio.create_task(bus.start())
    line = await log.hear(server.url)
    waiting = bus.health()
    await admin.execute_command("CONFIG", "SET", "maxclients", 100)
    await soon(starting, PATIENCE)
    await publish_until(bus, lambda: len(seen) > 0)
    await bus.stop()
    await admin.aclose()

    assert waiting.state == "starting"
    assert "max number of clients" in line or "Connection lost" in line


# -- Names that lead elsewhere ---------------------------------------------------------------------


@pytest.mark.scenario(14)
async def test_a_name_is_asked_again_at_each_attempt(
    server: Server, log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the name of the server leads to another address after an outage, also after nowhere and
    after one that refuses, the bus is there; while there is no such name it says so."""
    loop = asyncio.get_running_loop()
    answers: list[int | None] = [server.port]
    asked: Counter[int | None] = Counter()

    async def resolve(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        assert host == "bus.test"
        asked[answers[0]] += 1
        if answers[0] is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        address = ("127.0.0.1", answers[0])
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    bus, seen, gaps = listener("redis://bus.test:6379", publish_timeout=0.2)
    with Server(port=0) as other:
        async with bus:
            await bus.publish(Note(to="a", n=-1))
            await seen.reach(1)
            answers[0] = None
            server.kill()
            await until(lambda: "not known" in str(bus.health().reason))
            answers[0] = 1
            await until(lambda: asked[1] >= 2)
            answers[0] = other.port
            await soon(gaps.reach(1), PATIENCE)
            await publish_until(bus, lambda: len(seen) > 1)

            assert bus.stats().reconnects == 1
            async with EventBus(other.url, heartbeat=None) as admin:
                assert await admin.redis().pubsub_numpat() == 1


@pytest.mark.scenario(14)
async def test_a_name_with_two_addresses_is_reached_at_the_one_that_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the addresses of a name one is dead: the bus goes live at the other."""
    loop = asyncio.get_running_loop()

    async def resolve(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("127.0.0.1", 1)), (*kind, ("127.0.0.1", server.port))]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    bus, seen, _ = listener("redis://bus.test:6379")
    async with bus:
        await publish_until(bus, lambda: len(seen) > 0)


# -- Many at once ----------------------------------------------------------------------------------


@pytest.mark.scenario(16)
async def test_fifty_buses_do_not_come_back_in_one_step(
    server: Server, say: Callable[[str], None]
) -> None:
    """Fifty buses that lose their server at one moment do not come back in the order in which they
    lost it: each waits by chance. Their attempts are bounded, and all hear again."""
    count = 50
    async with Proxy(server.port) as proxy, AsyncExitStack() as stack:
        heard: Seen[int] = Seen()
        buses = []
        for n in range(count):
            options = {"client_name": f"bus-{n:02}"}
            bus = EventBus(proxy.url, heartbeat=QUIET, redis_options=options)

            async def hear(event: Note, n: int = n) -> None:
                heard.append(n)

            bus.on("note:*")(hear)
            buses.append(await stack.enter_async_context(bus))
        before = len(proxy.pairs)
        proxy.answer, proxy.mode = refusing(LOADING), "answer"
        cut = asyncio.get_running_loop().time()
        proxy.cut()
        await until(lambda: len(proxy.pairs) - before >= 6 * count, 40)
        attempts = [pair.born - cut for pair in proxy.pairs[before:]]
        proxy.mode = "pass"
        await until(lambda: all(bus.health().state == "live" for bus in buses), 40)
        await until(lambda: all(bus.stats().reconnects == 1 for bus in buses), 40)
        async with EventBus(server.url, heartbeat=None) as admin:
            receipt = await admin.publish(Note(to="all", n=1))
        await heard.reach(count)

        slots = Counter(int(time / 0.1) for time in attempts)
        say(f"{count} buses: attempts per 100 ms {[slots[n] for n in range(max(slots) + 1)]}")
        assert receipt.receivers == count
        assert sorted(heard) == list(range(count))
        assert shuffled([pair for pair in proxy.pairs[before:] if b"bus-" in pair.said]) > 0.02
        assert len(proxy.pairs) - before < 40 * count


def shuffled(pairs: list[Pair]) -> float:
    """How far the first attempts are from the order of their names: 0.5 is chance, 0 what no jitter
    gives; a machine that takes longer than the first pause (50 ms) is in between."""
    names = list(dict.fromkeys(bytes(pair.said).partition(b"bus-")[2][:2] for pair in pairs))
    swaps = [a > b for n, a in enumerate(names) for b in names[n + 1 :]]
    return sum(swaps) / len(swaps)
