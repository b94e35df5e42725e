"""Rooms on three processes: what the test suite of the Socket.IO Redis adapter asks for, and more.

Every test has a namespace of its own. Client c1 is on the first node, c2 on the second, c3 on the
third. `heard` sends a last message to all: what came before it is all that came, since a node hears
the messages of another in their order.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus
from eventbus.server import Server
from tests.rooms.cluster import Remote, three

NOBODY: list[Any] = [[], [], []]


class Nothing(Event):
    """An event that rooms do not know."""


@pytest.fixture(scope="module")
async def processes(valkey: Server) -> AsyncIterator[list[Remote]]:
    """Three processes, for all tests of this file."""
    async with three(valkey.url) as found:
        yield found


@pytest.fixture
async def nodes(processes: list[Remote]) -> list[Remote]:
    """Three nodes of a new namespace, with one client each."""
    space = f"/{secrets.token_hex(4)}"
    found = [await process.open(space) for process in processes]
    for number, remote in enumerate(found, 1):
        await remote(f"await connect('c{number}')")
    return found


async def heard(nodes: list[Remote]) -> list[Any]:
    """What the client on each node got since the last look."""
    await nodes[0]("await rooms.emit('fence')")
    return [(await remote("await heard()"))[0] for remote in nodes]


def only(*got: int, event: str = "test", data: Any = None) -> list[Any]:
    """What `heard` finds when these clients got this once, and the others nothing."""
    return [[[event, data]] if number in got else [] for number in (1, 2, 3)]


# -- Broadcasting ----------------------------------------------------------------------------------


async def test_broadcast_to_all(nodes: list[Remote]) -> None:
    """An emit reaches every client on every node, with its data as it was."""
    data = [1, "2", {"3": [True, None]}]
    await nodes[0](f"await rooms.emit('test', {data!r})")
    assert await heard(nodes) == only(1, 2, 3, data=data)


async def test_broadcast_in_a_namespace(nodes: list[Remote], processes: list[Remote]) -> None:
    """An emit in one namespace is not heard in another."""
    space = f"/{secrets.token_hex(4)}"
    others = [await process.open(space) for process in processes]
    for other in others:
        await other("await connect('c')")
    await others[0]("await rooms.emit('test')")
    assert await heard(others) == only(1, 2, 3)
    assert await heard(nodes) == NOBODY


async def test_broadcast_in_a_room(nodes: list[Remote]) -> None:
    """An emit to a room reaches its members on other nodes, and nobody else."""
    await nodes[1]("await c2.join('room1')")
    await nodes[0]("await rooms.to('room1').emit('test')")
    assert await heard(nodes) == only(2)


async def test_broadcast_except_a_room(nodes: list[Remote]) -> None:
    """An emit with an exception passes over the members of that room, on every node."""
    await nodes[1]("await c2.join('room1')")
    await nodes[0]("await rooms.except_('room1').emit('test')")
    assert await heard(nodes) == only(1, 3)


async def test_broadcast_once(nodes: list[Remote]) -> None:
    """A client that is in several of the rooms gets an emit to their union once."""
    await nodes[0]("await c1.join('room1', 'room2')")
    await nodes[1]("await c2.join('room1', 'room2', 'room3')")
    await nodes[2]("await c3.join('room3')")
    await nodes[0]("await rooms.to('room1').to('room2').to('room3').emit('test')")
    assert await heard(nodes) == only(1, 2, 3)


async def test_broadcast_locally(nodes: list[Remote]) -> None:
    """A local emit stays on its node."""
    await nodes[1]("await rooms.local.emit('test')")
    assert await heard(nodes) == only(2)


async def test_broadcast_to_a_single_client(nodes: list[Remote]) -> None:
    """A client is a member of the room that has its id for a name, wherever it is."""
    await nodes[0]("await rooms.to('c3').emit('test')")
    assert await heard(nodes) == only(3)


# -- With acknowledgements -------------------------------------------------------------------------


async def call(nodes: list[Remote], source: str) -> Any:
    """What a call from the first node brings: replies, missing clients, missing nodes."""
    replies, missing, missing_nodes = await nodes[0](f"await rooms.{source}")
    return replies, missing, missing_nodes


async def test_call(nodes: list[Remote]) -> None:
    """A call brings the answer of every client that was meant, from every node."""
    for number, remote in enumerate(nodes, 1):
        await remote(f"seats[0].answer = {number}")
    found = await call(nodes, "call('test', timeout=20.0)")
    assert found == ({"c1": 1, "c2": 2, "c3": 3}, [], [])
    assert await heard(nodes) == only(1, 2, 3)


async def test_call_with_binary_content(nodes: list[Remote]) -> None:
    """Bytes go to the clients as bytes, and come back as bytes."""
    for number, remote in enumerate(nodes, 1):
        await remote(f"seats[0].answer = bytes([{number}, 10, 255])")
    replies, missing, _ = await call(nodes, "call('test', b'\\x00\\n\\xff', timeout=20.0)")
    assert replies == {f"c{n}": repr(bytes([n, 10, 255])) for n in (1, 2, 3)}
    assert not missing
    assert await heard(nodes) == only(1, 2, 3, data="bytes 000aff")


async def test_call_without_clients(nodes: list[Remote]) -> None:
    """A call that nobody is meant by is over when all nodes have said so."""
    assert await call(nodes, "to('nobody').call('test', timeout=20.0)") == ({}, [], [])


async def test_call_that_one_does_not_answer(nodes: list[Remote]) -> None:
    """A client that does not answer in time is named beside the answers of the others."""
    for number, remote in enumerate(nodes[:2], 1):
        await remote(f"seats[0].answer = {number}")
    found = await call(nodes, "call('test', timeout=2.0)")
    assert found == ({"c1": 1, "c2": 2}, ["c3"], [])


# -- Joining, leaving, disconnecting, fetching --------------------------------------------------


async def rooms_of(nodes: list[Remote]) -> list[Any]:
    """The rooms of c1, c2 and c3, but for those of their own ids."""
    return [await remote(f"c{at}.rooms - {{'c{at}'}}") for at, remote in enumerate(nodes, 1)]


async def test_all_join(nodes: list[Remote]) -> None:
    """Every client can be made a member; what is emitted afterwards is missed by none."""
    assert await nodes[0]("await rooms.join('room1', timeout=20.0)") == []
    await nodes[2]("await rooms.to('room1').emit('test')")
    assert await rooms_of(nodes) == [["room1"]] * 3
    assert await heard(nodes) == only(1, 2, 3)


async def test_the_matching_join(nodes: list[Remote]) -> None:
    """The members of a room can be made members of others."""
    await nodes[0]("await c1.join('room1')")
    await nodes[2]("await c3.join('room1')")
    await nodes[0]("await rooms.to('room1').join('room2', 'room3', timeout=20.0)")
    assert await rooms_of(nodes) == [["room1", "room2", "room3"], [], ["room1", "room2", "room3"]]


async def test_one_joins(nodes: list[Remote]) -> None:
    """One client can be made a member from another node."""
    await nodes[0]("await rooms.to('c2').join('room3', timeout=20.0)")
    assert await rooms_of(nodes) == [[], ["room3"], []]


async def test_all_leave(nodes: list[Remote]) -> None:
    """Every client can be made to leave."""
    for number, remote in enumerate(nodes, 1):
        await remote(f"await c{number}.join('room1', 'room2')")
    assert await nodes[0]("await rooms.leave('room1', timeout=20.0)") == []
    await nodes[0]("await rooms.to('room1').emit('test')")
    assert await rooms_of(nodes) == [["room2"]] * 3
    assert await heard(nodes) == NOBODY


async def test_the_matching_leave(nodes: list[Remote]) -> None:
    """The members of a room can be made to leave others."""
    await nodes[0]("await c1.join('room1', 'room2')")
    await nodes[1]("await c2.join('room2')")
    await nodes[2]("await c3.join('room1', 'room2', 'room3')")
    await nodes[0]("await rooms.to('room1').leave('room1', 'room2', timeout=20.0)")
    assert await rooms_of(nodes) == [[], ["room2"], ["room3"]]


async def test_one_leaves(nodes: list[Remote]) -> None:
    """One client can be made to leave from another node."""
    await nodes[1]("await c2.join('room1', 'room2')")
    await nodes[0]("await rooms.to('c2').leave('room1', timeout=20.0)")
    assert await rooms_of(nodes) == [[], ["room2"], []]


async def test_all_are_disconnected(nodes: list[Remote]) -> None:
    """Every client can be disconnected: its block ends, and it is found nowhere."""
    assert await nodes[0]("await rooms.disconnect(timeout=20.0)") == []
    for number, remote in enumerate(nodes, 1):
        await remote("await seats[0].left.wait()")
        assert await remote(f"c{number}.closed") == "disconnected"
    assert await nodes[1]("await rooms.fetch(timeout=20.0)") == [[], []]


async def test_fetch_all(nodes: list[Remote]) -> None:
    """Every client is found: who, where, in which rooms, with its data."""
    await nodes[1]("await connect('c4', 'room1', data={'name': 'Ada'})")
    clients, missing = await nodes[0]("await rooms.fetch(timeout=20.0)")
    assert sorted(clients) == [
        ["c1", nodes[0].name, ["c1"], None],
        ["c2", nodes[1].name, ["c2"], None],
        ["c3", nodes[2].name, ["c3"], None],
        ["c4", nodes[1].name, ["c4", "room1"], {"name": "Ada"}],
    ]
    assert missing == []


async def test_fetch_the_matching(nodes: list[Remote]) -> None:
    """The members of a room are found, and nobody else."""
    await nodes[2]("await c3.join('room1')")
    clients, _ = await nodes[0]("await rooms.to('room1').fetch(timeout=20.0)")
    assert [client[0] for client in clients] == ["c3"]


# -- From node to node -----------------------------------------------------------------------------

SERVE = """
told = asyncio.Queue()
@rooms.servers.on('hello')
async def hello(data):
    told.put_nowait(data)
    return [data, rooms.node]
"""


async def test_servers_emit(nodes: list[Remote]) -> None:
    """What a node tells the servers reaches the other nodes, not itself and no client."""
    for remote in nodes:
        await remote(SERVE)
    await nodes[0]("await rooms.servers.emit('hello', {'n': 1})")
    for remote in nodes[1:]:
        assert await remote("await told.get()") == {"n": 1}
    assert await heard(nodes) == NOBODY
    assert await nodes[0]("told.qsize()") == 0


async def test_servers_call(nodes: list[Remote]) -> None:
    """Asked for an answer, every other node gives its own."""
    for remote in nodes:
        await remote(SERVE)
    replies, missing, _ = await nodes[0]("await rooms.servers.call('hello', 7, timeout=20.0)")
    assert replies == {remote.name: [7, remote.name] for remote in nodes[1:]}
    assert missing == []


async def test_servers_call_that_one_does_not_answer(nodes: list[Remote]) -> None:
    """A node that does not answer in time is named beside the answers of the others."""
    await nodes[1](SERVE)
    await nodes[2]("stuck = rooms.servers.on('hello')(lambda data: asyncio.Event().wait())")
    replies, missing, silent = await nodes[0]("await rooms.servers.call('hello', timeout=2.0)")
    assert list(replies) == [nodes[1].name]
    assert missing == silent == [nodes[2].name]


async def test_servers_call_when_one_has_left(nodes: list[Remote]) -> None:
    """A node that has said goodbye is neither waited for nor missing."""
    for remote in nodes:
        await remote(SERVE)
    await nodes[2]("await rooms.__aexit__(None, None, None)")
    replies, missing, _ = await nodes[0]("await rooms.servers.call('hello', timeout=20.0)")
    assert (list(replies), missing) == ([nodes[1].name], [])


# -- Nodes that do not answer ----------------------------------------------------------------------


async def test_a_frozen_node_is_named(nodes: list[Remote]) -> None:
    """What a frozen process has is missing from the answers, which name it; the rest is there."""
    nodes[2].freeze()
    try:
        clients, missing = await nodes[0]("await rooms.fetch(timeout=1.5)")
        assert sorted(client[0] for client in clients) == ["c1", "c2"]
        assert missing == [nodes[2].name]
        replies, silent, missing = await nodes[0]("await rooms.call('test', timeout=1.5)")
        assert (replies, silent, missing) == ({}, ["c1", "c2"], [nodes[2].name])
    finally:
        nodes[2].thaw()
    clients, missing = await nodes[0]("await rooms.fetch(timeout=20.0)")
    assert (len(clients), missing) == (3, [])


async def test_a_killed_node_is_named_and_costs_no_time(valkey: Server) -> None:
    """A process that died is missing at once: Redis handed out no copy for it to answer."""
    async with three(valkey.url) as found:
        space = f"/{secrets.token_hex(4)}"
        one, two, dead = [await process.open(space) for process in found]
        await two("await connect('c2')")
        await dead.kill()
        async with EventBus(valkey.url) as bus:
            while (await bus.publish(f"rooms:{space}:all", Nothing())).receivers != 2:
                await checkpoint()
        clients, missing = await one("await rooms.fetch(timeout=60.0)")
        assert [client[0] for client in clients] == ["c2"]
        assert missing == [dead.name]
