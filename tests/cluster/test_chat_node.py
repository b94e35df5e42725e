"""One node of the chat, as a WebSocket sees it: what it refuses, and what it says in an outage."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from eventbus.server import Server
from tests.cluster.chat_nodes import ROOT, START, Nodes, chat, free_ports
from tests.helpers import soon

WAIT = 20.0


class Visitor:
    """What a browser does, without a browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self.socket = connection
        self._acks = 0

    async def send(self, event: str, data: Any = None, **more: Any) -> None:
        """Send, and wait for nothing."""
        await self.socket.send(json.dumps({"event": event, "data": data, **more}))

    async def hear(self, **what: Any) -> dict[str, Any]:
        """The next message with these attributes; others are passed over."""
        async with asyncio.timeout(WAIT):
            while True:
                message: dict[str, Any] = json.loads(await self.socket.recv())
                if what.items() <= message.items():
                    return message

    async def ask(self, event: str, **data: Any) -> Any:
        """Send, and return the answer."""
        self._acks += 1
        await self.send(event, data, ack=self._acks)
        return (await self.hear(ack=self._acks))["data"]


@asynccontextmanager
async def visit(nodes: Nodes, place: int, user: str, room: str | None = None) -> AsyncIterator[Any]:
    """A visitor of a node, who has been let in, and has joined the room."""
    url = f"{nodes[place].replace('http', 'ws')}/ws?user={user}"
    async with connect(url, max_queue=None) as connection:
        visitor = Visitor(connection)
        if room is not None:
            await visitor.hear(event="welcome")
            assert await visitor.ask("join", room=room) == {"room": room, "live": True}
        yield visitor


@pytest.fixture(scope="module")
async def nodes(valkey: Server) -> AsyncIterator[Nodes]:
    """Two nodes, for the tests that break nothing."""
    async with chat(valkey.url, 2) as nodes:
        yield nodes


async def test_what_crosses(nodes: Nodes) -> None:
    """A message and a typing reach the room on another node, each once, with who and where."""
    async with visit(nodes, 1, "ana", "one") as ana, visit(nodes, 2, "ben", "one") as ben:
        assert (await ana.ask("say", room="one", text="hi\nyou"))["outcome"] == "sent"
        said = (await ben.hear(event="message"))["data"]
        assert said.pop("time")
        assert said == {"room": "one", "user": "ana", "node": "node-1", "text": "hi\nyou"}
        await ben.send("typing", {"room": "one"})
        typing = {"room": "one", "user": "ben", "node": "node-2"}
        assert (await ana.hear(event="typing"))["data"] == typing
        await ana.ask("leave", room="one")
        await ben.ask("say", room="one", text="where are you?")
        await ana.send("ping", ack="end")
        heard = []
        while (message := json.loads(await soon(ana.socket.recv()))) != {
            "ack": "end",
            "data": None,
        }:
            heard.append(message["event"])
        assert "message" not in heard


@pytest.mark.parametrize(
    "sent, reason",
    [
        ("no JSON", "a client sends"),
        ("[]", "a client sends"),
        ("{}", "a client sends"),
        (b'{"event": "ping"}', "send text"),
        ('{"event": "shout"}', "may join, leave"),
        ('{"event": "join"}', "data is an object"),
        ('{"event": "join", "data": ["two"]}', "data is an object"),
        ('{"event": "join", "data": {}}', "the name of a room"),
        ('{"event": "join", "data": {"room": 7}}', "the name of a room"),
        ('{"event": "join", "data": {"room": ""}}', "the name of a room"),
        ('{"event": "join", "data": {"room": "a:b"}}', "the name of a room"),
        ('{"event": "join", "data": {"room": "*"}}', "the name of a room"),
        ('{"event": "join", "data": {"room": "a\\u0000"}}', "the name of a room"),
        (json.dumps({"event": "join", "data": {"room": "a" * 33}}), "the name of a room"),
        ('{"event": "say", "data": {"room": "three", "text": "hi"}}', "join three first"),
        ('{"event": "typing", "data": {"room": "three"}}', "join three first"),
        ('{"event": "say", "data": {"room": "two"}}', "a message has 1 to"),
        ('{"event": "say", "data": {"room": "two", "text": ""}}', "a message has 1 to"),
        ('{"event": "say", "data": {"room": "two", "text": "a\\u001b[31m"}}', "a message has 1 to"),
        ('{"event": "say", "data": {"room": "two", "text": "\\ud800"}}', "a client sends"),
        (json.dumps({"event": "say", "data": {"room": "two", "text": "a" * 1001}}), "1 to 1,000"),
    ],
)
async def test_bad_input(nodes: Nodes, sent: str | bytes, reason: str) -> None:
    """What a browser must not send gets a sentence, and nobody hears of it; it may go on."""
    async with visit(nodes, 1, "ana", "two") as ana, visit(nodes, 2, "ben", "two") as ben:
        await ana.socket.send(sent)
        assert reason in (await ana.hear(event="error"))["data"]["text"]
        assert (await ana.ask("say", room="two", text="still here"))["outcome"] == "sent"
        assert (await ben.hear(event="message"))["data"]["text"] == "still here"


async def test_an_error_names_the_ack(nodes: Nodes) -> None:
    """Who waits for an answer learns that there is none."""
    async with visit(nodes, 1, "ana", "two") as ana:
        await ana.send("say", {"room": "three", "text": "hi"}, ack=[7])
        data = (await ana.hear(event="error"))["data"]
        assert data == {"text": "join three first", "about": "say", "ack": [7]}


@pytest.mark.parametrize("user", ["", "a%3Ab", "%00", "a" * 33, "%3Cb%3E"])
async def test_bad_name(nodes: Nodes, user: str) -> None:
    """Without a good name a browser is told why, and let go with 1008."""
    async with visit(nodes, 1, user) as visitor:
        assert "a name is" in (await visitor.hear(event="error"))["data"]["text"]
        with pytest.raises(ConnectionClosed):
            await soon(visitor.socket.recv())
        assert visitor.socket.close_code == 1008


async def test_too_long(nodes: Nodes) -> None:
    """A frame over the limit ends the WebSocket with 1009, and only this one."""
    async with visit(nodes, 1, "ana", "two") as ana, visit(nodes, 1, "ben", "two") as ben:
        await ana.socket.send("a" * 20_000)
        with pytest.raises(ConnectionClosed):
            await ana.hear(event="never")
        assert ana.socket.close_code == 1009
        assert (await ben.ask("say", room="two", text="hi"))["outcome"] == "sent"


async def test_too_fast(nodes: Nodes) -> None:
    """A browser that floods is refused what is too much, and hears so."""
    async with visit(nodes, 1, "ana", "two") as ana:
        for _ in range(60):
            await ana.send("ping")
        assert "not so fast" in (await ana.hear(event="error"))["data"]["text"]


async def test_too_many_rooms(nodes: Nodes) -> None:
    """A browser is in twenty rooms at most."""
    async with visit(nodes, 1, "ana", "room 0") as ana:
        for number in range(1, 20):
            await ana.ask("join", room=f"room {number}")
        await ana.ask("join", room="room 7")
        await ana.send("join", {"room": "one more"})
        assert "leave one first" in (await ana.hear(event="error"))["data"]["text"]


async def test_redis_is_frozen() -> None:
    """While Redis is frozen a browser hears so, and what it says reaches its own node, and is
    marked; then it hears that messages may have been missed, and all goes on."""
    with Server() as server:
        async with (
            chat(server.url, 2) as nodes,
            visit(nodes, 1, "ana", "one") as ana,
            visit(nodes, 1, "ben", "one") as ben,
            visit(nodes, 2, "eve", "one") as eve,
        ):
            server.freeze()
            try:
                assert (await ana.ask("say", room="one", text="first"))["outcome"] == "maybe"
                assert (await ben.hear(event="message"))["data"]["text"] == "first"
                assert (await eve.hear(event="redis"))["data"] == {"away": True, "node": "node-2"}
                await ana.hear(event="redis", data={"away": True, "node": "node-1"})
                async with asyncio.timeout(WAIT):  # until the other connection is given up, too
                    while (await ana.ask("say", room="one", text="second"))["outcome"] == "maybe":
                        pass
                assert (await ana.ask("say", room="one", text="third"))["outcome"] == "not sent"
                assert (await ben.hear(event="message"))["data"]["text"] == "second"
            finally:
                server.thaw()
            for visitor, node in ((ana, "node-1"), (eve, "node-2")):
                gap = (await visitor.hear(event="gap"))["data"]
                assert (gap["room"], gap["missed"], gap["node"]) == (None, None, node)
            await eve.ask("say", room="one", text="is it over?")
            assert (await ana.hear(event="message"))["data"]["text"] == "is it over?"


async def test_redis_restarts() -> None:
    """When Redis dies and comes back empty, a browser hears so; nobody went offline by that."""
    with Server() as server:
        async with (
            chat(server.url, 2) as nodes,
            visit(nodes, 1, "ana", "one") as ana,
            visit(nodes, 2, "ben", "one") as ben,
        ):
            server.kill()
            await ana.hear(event="redis", data={"away": True, "node": "node-1"})
            server.start()
            heard = [await ana.hear()]
            while heard[-1]["event"] != "gap":
                heard.append(await ana.hear())
            await ben.hear(event="gap")
            assert (await ben.ask("say", room="one", text="hi"))["outcome"] == "sent"
            while heard[-1]["event"] != "message":
                heard.append(await ana.hear())
            assert not any(one["data"]["went"] for one in heard if one["event"] == "online")


async def test_what_stops_a_node() -> None:
    """A node that cannot start says why in its last line, without a traceback or a password."""

    async def fails(reason: str, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "examples.chat.node", *words, cwd=ROOT, stdout=PIPE, stderr=PIPE
        )
        out, error = await soon(process.communicate(), START)
        assert (process.returncode, out) == (1, b""), words
        assert reason in error.decode().splitlines()[-1]
        for never in (b"Traceback", b"right", b"wrong@"):
            assert never not in error

    [port] = free_ports(1)
    with Server(port=0, options=("--requirepass", "right")) as server:
        good = server.url.replace("//", "//:right@")
        with socket.create_server(("127.0.0.1", port)):
            await asyncio.gather(
                fails("password", "--redis", good.replace("right", "wrong"), "--port", "0"),
                fails("in use", "--redis", good, "--port", str(port)),
                fails("name must be", "--redis", good, "--port", "0", "--name", "a b"),
            )


async def test_make_chat() -> None:
    """The whole play starts three nodes, shows what crosses, and leaves nothing when it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "examples.chat", "--port", str(free_ports(1)[0]), cwd=ROOT,
        stdin=DEVNULL, stdout=PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        urls = {}
        while len(urls) < 3:
            name, url = (await soon(process.stdout.readline(), START)).decode().split()
            urls[name] = url
        async with connect(urls["node-2"].replace("http", "ws") + "/ws?user=ana") as connection:
            ana = Visitor(connection)
            await ana.ask("join", room="general")
            await ana.ask("say", room="general", text="a\nb")
            lines = []
            while not lines or "#general" not in lines[-1]:
                lines.append((await soon(process.stdout.readline())).decode().strip())
            assert lines[-1].split(maxsplit=1) == ["node-2", "#general ana: a b"]
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = await soon(process.communicate())
    assert (process.returncode, rest.decode().splitlines()[-1]) == (
        0,
        "ended; nothing is left running",
    )
    for url in urls.values():
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection(*url.removeprefix("http://").split(":"))
