"""`Manager` and real Socket.IO clients: three servers of python-socketio, clients of Node.js."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from eventbus.server import Server
from tests.helpers import soon
from tests.socketio.node import House, NodeGuest, house
from tests.socketio.stage import LIMIT, Hall, Remote, only, servers

pytestmark = pytest.mark.cluster
LIVE = "bus.health().state == 'live'"


@pytest.fixture(scope="module")
async def redis() -> AsyncIterator[Server]:
    """A Redis that tests may break, and repair."""
    with Server(port=0) as found:
        yield found


@pytest.fixture(scope="module")
async def processes(redis: Server) -> AsyncIterator[list[Remote]]:
    """Three servers, which notice soon what happens to Redis."""
    options = {"heartbeat": 1.0, "publish_timeout": 1.0}
    async with servers(redis.url, 3, bus=options) as found:
        yield found


@pytest.fixture(scope="module")
async def clients(node_modules: Path) -> AsyncIterator[House]:
    """Where the clients live."""
    async with house(node_modules) as found:
        yield found


@pytest.fixture
async def hall(processes: list[Remote], clients: House) -> Hall:
    """A new namespace, and a client on each server; the answer of each is its number."""
    space = f"/{secrets.token_hex(4)}"
    guests = [
        await clients.guest(one, f"room{number}", "all", namespace=space, answer=number)
        for number, one in enumerate(processes)
    ]
    return Hall(space, processes, list(guests))


async def test_emit(hall: Hall) -> None:
    """An emit reaches the clients of all servers once, bytes as bytes, arguments as arguments."""
    await hall.emit("'hi', ('é', b'\\x00\\xff', {'deep': [b'1', None, 2.5]})")
    wanted = ("hi", "é", b"\x00\xff", {"deep": [b"1", None, 2.5]})
    assert await hall.heard() == only(0, 1, 2, event=wanted)


async def test_rooms(hall: Hall) -> None:
    """A room, several rooms, a client's id: each member on any server once, and nobody else."""
    await hall.emit("'hi', to='room1'")
    assert await hall.heard() == only(1)
    await hall.emit("'hi', to=['room2', 'all', 'room0']")
    assert await hall.heard() == only(0, 1, 2)
    await hall.emit(f"'hi', to={hall.guests[2].sid!r}")
    assert await hall.heard() == only(2)


async def test_rooms_of_clients_elsewhere(hall: Hall) -> None:
    """A server moves clients of other servers into rooms and out of them, in order."""
    sid = hall.guests[1].sid
    await hall.run(f"enter_room({sid!r}, 'x')")
    await hall.emit("'hi', to='x'")
    await hall.run(f"leave_room({sid!r}, 'x')")
    await hall.run("close_room('all')")
    await hall.emit("'hi', to=['x', 'all']")
    assert await hall.heard() == only(1)


async def test_what_a_client_says_to_the_others(hall: Hall) -> None:
    """What a client says reaches all others, on every server, and not itself."""
    speaker = hall.guests[1]
    assert isinstance(speaker, NodeGuest)
    assert await speaker.say("say", "hello", 7) == "heard"
    for number in (0, 2):
        assert await hall.guests[number].next() == ("said", "hello", 7)
    assert await hall.heard() == [[], [], []]


async def test_namespaces(hall: Hall, clients: House) -> None:
    """An emit in one namespace is not heard in another, on any server."""
    other = f"/{secrets.token_hex(4)}"
    strangers = [await clients.guest(one, namespace=other) for one in hall.servers]
    await hall.servers[0](f"await sio.emit('hi', namespace={other!r})")
    assert [await found.next() for found in strangers] == [("hi",)] * 3
    assert await hall.heard() == [[], [], []]


async def test_callbacks(hall: Hall) -> None:
    """A call brings the answer of a client on any server."""
    for number, found in enumerate(hall.guests):
        assert await hall.run(f"call('ok?', to={found.sid!r})") == number
    assert await hall.heard() == [[("ok?",)]] * 3


async def test_disconnect(hall: Hall) -> None:
    """A server disconnects a client of another."""
    sid = hall.guests[2].sid
    await hall.run(f"disconnect({sid!r})")
    await soon(hall.guests[2].gone.wait(), LIMIT)
    assert await hall.servers[2].until(f"{sid!r} in left")


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_redis_away_and_back(hall: Hall, redis: Server, fault: str) -> None:
    """While Redis is away, clients hear their own server, and nobody is disconnected; when it is
    back, all hear all, each emit once and in order, and the apps hear of the gap."""
    for server in hall.servers:
        await server("gaps.clear()")
    getattr(redis, fault)()
    for number in range(3):
        await hall.emit(f"'away', {number}")
    assert [await hall.guests[0].next() for _ in range(3)] == [("away", n) for n in range(3)]
    assert await hall.servers[0].until("bus.health().state != 'live'")
    {"kill": redis.start, "freeze": redis.thaw}[fault]()
    for server in hall.servers:
        await server.until(f"{LIVE} and 'reconnect' in gaps")
    for number in range(20):
        await hall.emit(f"'back', {number}")
    back = [("back", number) for number in range(20)]
    first, *others = await hall.heard()
    assert first == back
    for heard in others:  # what a frozen server had taken, it may hand out yet: once, and first
        early = heard[: len(heard) - len(back)]
        assert heard[len(early) :] == back
        assert early == [("away", number) for number in range(3)][: len(early)]
    assert not any(found.gone.is_set() for found in hall.guests)
