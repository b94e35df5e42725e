"""The emitter and a real cluster: two Socket.IO servers of Node.js, and clients of its own.

What a client did not get is proved by a fence: an event to everyone that is emitted afterwards. The
servers receive in order, so what has not come before the fence never comes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from anyio.lowlevel import checkpoint

from eventbus import BusUnavailable, EventBus, PublishUncertain
from eventbus.server import Server
from eventbus.socketio import Emitter
from tests.helpers import soon
from tests.socketio.node import Program, program

pytestmark = pytest.mark.cluster
LIMIT = 60.0
"""Seconds for one line of a program: it is there at once, but the machine may be busy."""


class Side(Program):
    """A program whose lines are waited for, one after the other."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process)
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def read(self) -> None:
        await super().read()
        self.hear({"ended": True})  # who waits for a line fails at once

    def hear(self, said: Any) -> None:
        self.said.put_nowait(said)

    async def line(self) -> dict[str, Any]:
        return await soon(self.said.get(), LIMIT)


class Client:
    """One client: its id while it is connected, what it got, and what became of it."""

    def __init__(self, namespace: str) -> None:
        self.id = ""
        self.namespace = namespace
        self.events: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.changes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def change(self) -> dict[str, Any]:
        """The next time that it connects or is disconnected."""
        line = await soon(self.changes.get(), LIMIT)
        self.id = line.get("connected", "")
        return line


class Cluster:
    """Two servers that share a Redis, and one process that holds clients of both."""

    def __init__(self, redis: Server, key: str) -> None:
        self.redis, self.key = redis, key
        self.servers: list[Side] = []
        self.ports: list[int] = []
        self._clients: dict[str, Client] = {}
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def run(self, folder: Path) -> AsyncIterator[Cluster]:
        options = json.dumps({"redis": self.redis.url, "key": self.key})
        async with AsyncExitStack() as stack:
            for _ in range(2):
                server = await stack.enter_async_context(
                    program(Side, folder, "server.mjs", options)
                )
                self.servers.append(server)
                self.ports.append((await server.line())["ready"])
            self._holder = await stack.enter_async_context(program(Side, folder, "client.mjs"))
            sorter = asyncio.create_task(self._sort())
            yield self
            sorter.cancel()

    async def _sort(self) -> None:
        while True:
            line = await self._holder.said.get()
            if "ended" in line:
                break
            client = self._clients[line.pop("client")]
            if "event" in line:
                client.events.put_nowait(line["event"])
            else:
                client.changes.put_nowait(line)

    async def client(self, server: int, namespace: str = "/") -> Client:
        """A client that is connected to the first (0) or the second (1) server."""
        name, client = f"client-{next(self._numbers)}", Client(namespace)
        self._clients[name] = client
        self._holder.tell(open=name, port=self.ports[server], namespace=namespace)
        await client.change()
        assert client.id
        return client

    async def close(self) -> None:
        """Close every client that is open."""
        for name, client in self._clients.items():
            if client.id:
                self._holder.tell(close=name)
                assert await client.change() == {"disconnected": "io client disconnect"}

    async def got(self, emitter: Emitter, *clients: Client) -> list[list[list[Any]]]:
        """What each of the clients got since the last time: all that was emitted before."""
        fence = ["fence", next(self._numbers)]
        for namespace in {client.namespace for client in clients}:
            assert (await emitter.of(namespace).emit(*fence)).receivers == 2
        found = []
        for client in clients:
            got = []
            while (event := await soon(client.events.get(), LIMIT)) != fence:
                got.append(event)
            found.append(got)
        return found


@pytest.fixture(scope="module")
async def cluster(node_modules: Path) -> AsyncIterator[Cluster]:
    """The cluster of all tests but those that stop Redis."""
    with Server(port=0) as redis:
        async with Cluster(redis, "socket.io").run(node_modules) as running:
            yield running


@pytest.fixture
async def emitter(cluster: Cluster) -> AsyncIterator[Emitter]:
    """An emitter of that cluster; every client is closed afterwards."""
    async with EventBus(cluster.redis.url) as bus:
        yield Emitter(bus)
    await cluster.close()


async def test_everyone(cluster: Cluster, emitter: Emitter) -> None:
    """An event reaches the clients of both servers once, and the receipt counts the servers."""
    a, b = await cluster.client(0), await cluster.client(1)
    assert (await emitter.emit("hi", "there", 2)).receivers == 2
    assert await cluster.got(emitter, a, b) == [[["hi", "there", 2]]] * 2


async def test_a_client_is_a_room(cluster: Cluster, emitter: Emitter) -> None:
    """The id of a client names that client alone, on whichever server it is."""
    a, b, c = await cluster.client(0), await cluster.client(1), await cluster.client(1)
    await emitter.to(b.id).emit("psst")
    assert await cluster.got(emitter, a, b, c) == [[], [["psst"]], []]


async def test_join_room_and_leave(cluster: Cluster, emitter: Emitter) -> None:
    """Clients of both servers join a room, get what is sent to it, and leave it."""
    a, b, c = await cluster.client(0), await cluster.client(1), await cluster.client(1)
    room = emitter.to("raum:ä#1")
    await emitter.to(a.id, b.id).sockets_join("raum:ä#1")
    await room.emit("in")
    await room.except_(a.id).sockets_leave("raum:ä#1")
    await room.emit("alone")
    await emitter.sockets_leave(["raum:ä#1", "never"])
    await room.emit("empty")
    assert await cluster.got(emitter, a, b, c) == [[["in"], ["alone"]], [["in"]], []]


async def test_two_rooms_once(cluster: Cluster, emitter: Emitter) -> None:
    """A client in two of the rooms gets an event once, and an excepted room gets none."""
    both, first, second, none = [await cluster.client(number % 2) for number in range(4)]
    await emitter.to(both.id, first.id).sockets_join("1", "first")
    await emitter.to(both.id, second.id).sockets_join("2")
    await emitter.to("1", "2").emit("or")
    await emitter.to("1").except_("2").emit("without")
    await emitter.except_("first", none.id).emit("all but")
    assert await cluster.got(emitter, both, first, second, none) == [
        [["or"]],
        [["or"], ["without"]],
        [["or"], ["all but"]],
        [],
    ]


async def test_a_room_may_be_emptied_into_another(cluster: Cluster, emitter: Emitter) -> None:
    """Everyone joins at once, without to()."""
    a, b = await cluster.client(0), await cluster.client(1)
    await emitter.sockets_join(["x", "y"])
    await emitter.to("y").emit("y")
    assert await cluster.got(emitter, a, b) == [[["y"]]] * 2


async def test_namespaces(cluster: Cluster, emitter: Emitter) -> None:
    """What is sent in one namespace does not reach the other, not even with one room name."""
    root, admin = await cluster.client(0), await cluster.client(1, "/admin")
    await emitter.sockets_join("r")
    await emitter.of("/admin").sockets_join("r")
    await emitter.of("/admin").emit("secret")
    await emitter.of("admin").to("r").emit("secret room")
    await emitter.to("r").emit("public room")
    assert await cluster.got(emitter, root, admin) == [
        [["public room"]],
        [["secret"], ["secret room"]],
    ]


DATA: list[Any] = [
    *(0, -1, 255, 2**31, 2**53 - 1, -(2**53) + 1, 1.5, 1e300, True, False, None),
    *("", "ä € 😀 日本語 \u0000 \u2028", "x" * 70_000),
    *([], {}, [[[]]], {"a": {"b": [None, {"c": "d"}]}, "": 1}),
]


async def test_data(cluster: Cluster, emitter: Emitter) -> None:
    """Numbers, None, text and what is nested arrive as they were sent, in one event or in many."""
    a, b = await cluster.client(0), await cluster.client(1)
    await emitter.emit("all", *DATA)
    for one in DATA:
        await emitter.emit("one", one)
    expected = [["all", *DATA], *(["one", one] for one in DATA)]
    assert await cluster.got(emitter, a, b) == [expected, expected]


async def test_what_javascript_cannot_say(cluster: Cluster, emitter: Emitter) -> None:
    """The limits that the page names: big ints are rounded, NaN is null, `__proto__` gets lost."""
    a = await cluster.client(1)
    day, id = datetime(2026, 1, 2, tzinfo=UTC), UUID(int=7)
    await emitter.emit("js", 2**53 + 1, math.nan, {"__proto__": {"a": 1}, "b": 2}, day, id)
    expected = ["js", 2**53, None, {"b": 2}, "2026-01-02T00:00:00+00:00", str(id)]
    assert await cluster.got(emitter, a) == [[expected]]


async def test_binary(cluster: Cluster, emitter: Emitter) -> None:
    """Bytes arrive as bytes, at the top and inside, empty and large."""
    a, b = await cluster.client(0), await cluster.client(1)
    every = bytes(range(256))
    await emitter.emit("raw", every, b"", {"deep": [every * 300, "text"]})
    shown = [{"$bytes": every.hex()}, {"$bytes": ""}]
    expected = ["raw", *shown, {"deep": [{"$bytes": (every * 300).hex()}, "text"]}]
    assert await cluster.got(emitter, a, b) == [[expected], [expected]]


async def test_flags(cluster: Cluster, emitter: Emitter) -> None:
    """Volatile and uncompressed events arrive at clients that are ready for them."""
    a, b = await cluster.client(0), await cluster.client(1)
    await emitter.volatile().emit("volatile")
    await emitter.to(a.id).compress(False).emit("plain")
    assert await cluster.got(emitter, a, b) == [[["volatile"], ["plain"]], [["volatile"]]]


async def test_order(cluster: Cluster, emitter: Emitter) -> None:
    """What one emitter sends arrives in that order, to rooms and to everyone."""
    a = await cluster.client(1)
    for number in range(100):
        target = (emitter, emitter.to(a.id), emitter.to("x", a.id))[number % 3]
        await target.emit("n", number)
    assert await cluster.got(emitter, a) == [[["n", number] for number in range(100)]]


async def test_disconnect(cluster: Cluster, emitter: Emitter) -> None:
    """Clients are disconnected by room, or all, and those that are left stay connected."""
    a, b, c = await cluster.client(0), await cluster.client(1), await cluster.client(1)
    await emitter.to(b.id).disconnect_sockets()
    assert await b.change() == {"disconnected": "io server disconnect"}
    assert await cluster.got(emitter, a, c) == [[], []]
    await emitter.except_(a.id).disconnect_sockets(close=True)
    assert "disconnected" in await c.change()
    assert await cluster.got(emitter, a) == [[]]


async def test_server_side_emit(cluster: Cluster, emitter: Emitter) -> None:
    """The servers themselves hear an event, in its namespace, with bytes too; clients do not."""
    a = await cluster.client(0)
    assert (await emitter.server_side_emit("notice", {"ä": [1, None]})).receivers == 2
    await emitter.of("/admin").server_side_emit("notice", b"\x00\xff")
    for server in cluster.servers:
        assert await server.line() == {"heard": ["/", "notice", {"ä": [1, None]}]}
        assert await server.line() == {"heard": ["/admin", "notice", {"$bytes": "00ff"}]}
    assert await cluster.got(emitter, a) == [[]]


async def test_bus_namespace_and_prefix(node_modules: Path) -> None:
    """Servers with the emitter's `key` hear a bus that has a namespace, and no other bus."""
    with Server(port=0) as redis:
        async with (
            EventBus(redis.url, namespace="staging") as staging,
            EventBus(redis.url) as production,
            Cluster(redis, Emitter(staging, prefix="shop").key).run(node_modules) as cluster,
        ):
            a, b = await cluster.client(0), await cluster.client(1)
            assert (await Emitter(production, prefix="shop").emit("other")).receivers == 0
            emitter = Emitter(staging, prefix="shop")
            await emitter.to(a.id).sockets_join("r")
            await emitter.to("r").emit("ours")
            assert await cluster.got(emitter, a, b) == [[["ours"]], []]


async def test_redis_restarts(node_modules: Path) -> None:
    """After Redis was killed and started anew, events arrive again, and nothing arrives twice."""
    with Server(port=0) as redis:
        async with (
            EventBus(redis.url) as bus,
            Cluster(redis, "socket.io").run(node_modules) as cluster,
        ):
            emitter = Emitter(bus)
            a, b = await cluster.client(0), await cluster.client(1)
            await emitter.sockets_join("r")
            await emitter.emit("before")
            assert await cluster.got(emitter, a, b) == [[["before"]]] * 2

            redis.kill()
            lost, number = 0, itertools.count()
            async with asyncio.timeout(LIMIT):
                while not lost:
                    await checkpoint()
                    try:
                        await emitter.emit("lost", next(number))
                    except BusUnavailable:
                        lost += 1
                    except PublishUncertain:
                        continue

            redis.start()
            async with asyncio.timeout(LIMIT):
                while True:  # the receipt says when both servers are back
                    await checkpoint()
                    try:
                        if (await emitter.emit("knock", next(number))).receivers == 2:
                            break
                    except (BusUnavailable, PublishUncertain):
                        continue
            await emitter.to("r").emit("after")  # rooms live in the servers, not in Redis
            for got in await cluster.got(emitter, a, b):
                assert got[-1] == ["after"]
                assert len({json.dumps(event) for event in got}) == len(got)
                assert not [event for event in got if event[0] == "lost"]


async def test_the_golden_bytes_are_still_theirs(node_modules: Path) -> None:
    """Socket.IO's own emitter publishes what golden.json says (`node golden.mjs --write`)."""
    process = await asyncio.create_subprocess_exec(
        "node", "golden.mjs", cwd=node_modules, stdout=asyncio.subprocess.PIPE
    )
    text, _ = await soon(process.communicate(), LIMIT)
    assert process.returncode == 0
    assert text.decode() == (node_modules / "golden.json").read_text()
