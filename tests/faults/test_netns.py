"""A peer that vanishes: no FIN, no RST, no answer; what the bus and what the kernel make of it.

The server is at the other end of a cable that the test pulls (`netns`). Needs root: `-m long`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint

from eventbus import EventBus
from tests.faults.netns import Cable, ip, need_namespaces
from tests.helpers import Lines, soon
from tests.test_failure import Note, listener, publish_until
from tests.test_liveness import load

pytestmark = pytest.mark.long

BEAT = 1.0
PATIENCE = 20.0
"""Seconds on top of what detection takes: a slow machine is no fault."""
KEEPALIVE = {
    "socket_keepalive": True,
    "socket_keepalive_options": {
        socket.TCP_KEEPIDLE: 1,
        socket.TCP_KEEPINTVL: 1,
        socket.TCP_KEEPCNT: 3,
    },
    "socket_connect_timeout": 1.0,
}
NO_KEEPALIVE = {"socket_keepalive": False, "socket_connect_timeout": 1.0}
Say = Callable[[str], None]


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    """A server at the end of a cable, for one test."""
    need_namespaces()
    with Cable(tmp_path) as cable:
        yield cable


class Lag:
    """How late the loop was at the worst, while it was watched."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def watch(self, over: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        while not over.done():
            due = loop.time() + 0.01
            await asyncio.wait({over}, timeout=0.01)
            if not over.done():
                self.worst = max(self.worst, loop.time() - due)


@asynccontextmanager
async def watched(say: Say, what: str) -> AsyncIterator[Lag]:
    """Watch the loop in this block, and say how late it was."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    lag = Lag()
    task = asyncio.create_task(lag.watch(over))
    try:
        yield lag
    finally:
        over.set_result(None)
        await task
        say(f"{what}: the loop was {lag.worst * 1000:.0f} ms late at the worst")


def local(cable: Cable, **settings: Any) -> EventBus:
    """A bus at the server's side of the cable: a unix socket needs none."""
    assert cable.server is not None
    return EventBus(f"unix://{cable.server.socket_path}", **settings)


@pytest.mark.scenario(3)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_peer_that_vanishes_is_noticed(
    cable: Cable, log: Lines, say: Say, busy: bool
) -> None:
    """A peer that vanishes is given up within two heartbeats, the loop never stands still, and
    messages flow again when it is back; a bus without a heartbeat beside it noticed nothing."""
    options = {"redis_options": NO_KEEPALIVE}
    bus, seen, gaps = listener(cable.url, heartbeat=BEAT, publish_timeout=0.5, **options)
    deaf, _, deaf_gaps = listener(cable.url, heartbeat=None, drain_timeout=0.2, **options)
    async with bus, deaf, local(cable) as other, watched(say, "peer vanished") as lag:
        await other.publish(Note(to="a", n=-1))
        await seen.reach(1)
        async with load(busy, bus), load(busy, other):
            await to_thread.run_sync(cable.pull)
            await log.hear("subscriber", 2 * BEAT + 1 + PATIENCE)
            await log.hear("publisher", 2 * BEAT + 1 + PATIENCE)
            down = bus.health()

            assert [line for line in log.lines if "no byte for a heartbeat" in line]
            assert (down.state, bool(down)) == ("down", False)
            assert deaf.health().state == "live"
            assert not deaf_gaps
            await to_thread.run_sync(cable.plug)
            await soon(gaps.reach(1), PATIENCE)
        heard = len(seen)
        await publish_until(other, lambda: len(seen) > heard, PATIENCE)
        await publish_until(bus, lambda: bus.health().state == "live", PATIENCE)

        assert gaps[0].reason == "reconnect"
        assert bus.stats().reconnects == 1
        assert lag.worst < 1.0


@pytest.mark.scenario(3, 4)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_timeout_of_the_kernel_ends_the_connection(
    cable: Cable, log: Lines, say: Say, busy: bool
) -> None:
    """When the kernel gives a peer up (ETIMEDOUT), the subscriber's connection is over and is made
    anew, also without a heartbeat; without keepalive the kernel notices nothing meanwhile."""
    bus, seen, gaps = listener(cable.url, heartbeat=None, redis_options=KEEPALIVE)
    deaf, _, deaf_gaps = listener(
        cable.url, heartbeat=None, drain_timeout=0.2, redis_options=NO_KEEPALIVE
    )
    async with bus, deaf, local(cable) as other, watched(say, "kernel's timeout") as lag:
        await other.publish(Note(to="a", n=-1))
        await seen.reach(1)
        async with load(busy, other):
            await to_thread.run_sync(cable.pull)
            line = await log.hear("subscriber", 4 + PATIENCE)
            async with asyncio.timeout(PATIENCE):
                while bus.health():
                    await checkpoint()

            assert "Connection timed out" in line
            assert deaf.health().state == "live"
            assert not deaf_gaps
            await to_thread.run_sync(cable.plug)
            await soon(gaps.reach(1), PATIENCE)
        heard = len(seen)
        await publish_until(other, lambda: len(seen) > heard, PATIENCE)

        assert gaps[0].reason == "reconnect"
        assert bus.stats().reconnects == 1
        assert lag.worst < 1.0


def test_a_cable_leaves_nothing_behind(tmp_path: Path) -> None:
    """The namespace, both ends of the pair and the server are gone when the block ends."""
    need_namespaces()
    with Cable(tmp_path) as cable:
        server = cable.server
        assert server is not None
        assert server.running

    assert not server.running
    assert cable.name not in ip("netns", "list")
