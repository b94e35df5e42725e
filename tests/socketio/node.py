"""Guests from Node: clients of `socket.io-client`, all in one program."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.helpers import soon
from tests.socketio.stage import LIMIT, Guest, Remote


def rich(value: Any) -> Any:
    """JSON as the program writes it: bytes are ``{"$bytes": hex}``."""
    if isinstance(value, list):
        return [rich(item) for item in value]
    if isinstance(value, dict):
        return (
            bytes.fromhex(value["$bytes"])
            if "$bytes" in value
            else {key: rich(item) for key, item in value.items()}
        )
    return value


class NodeGuest(Guest):
    """One client. `replies` is what servers acknowledged to it."""

    def __init__(self, house: House, name: str, namespace: str) -> None:
        super().__init__(namespace)
        self._house, self.name = house, name
        self.connected: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.replies: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def sid(self) -> str:
        return self.connected.result()

    async def say(self, *event: Any) -> Any:
        """Emit to the server, and return what it acknowledges."""
        self._house.tell(say=self.name, event=event)
        return await soon(self.replies.get(), LIMIT)


class Program:
    """A program of Node.js that speaks JSON, one value a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def read(self) -> None:
        """Hand on what it says, until it ends."""
        assert self._process.stdout
        async for line in self._process.stdout:
            self.hear(json.loads(line))

    def hear(self, said: Any) -> None:
        raise NotImplementedError

    def tell(self, **order: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order).encode() + b"\n")


P = TypeVar("P", bound=Program)


@asynccontextmanager
async def program(kind: type[P], folder: Path, *words: str) -> AsyncIterator[P]:
    """It runs, and has ended afterwards: by itself when its stdin closes, or else by force."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "node", *words, cwd=folder, stdin=pipe, stdout=pipe, limit=1 << 24
    )
    started = kind(process)
    reader = asyncio.create_task(started.read())
    try:
        yield started
        assert process.returncode is None, f"{words[0]} ended by itself"
        assert process.stdin
        process.stdin.close()
        await soon(process.wait(), LIMIT)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reader


class House(Program):
    """The program that has the clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process)
        self._guests: dict[str, NodeGuest] = {}

    def hear(self, said: Any) -> None:
        """Hand on what a client hears."""
        said = rich(said)
        guest = self._guests[said["client"]]
        if "connected" in said:
            guest.connected.set_result(said["connected"])
        elif "refused" in said:
            guest.connected.set_exception(ConnectionError(said["refused"]))
        elif "event" in said:
            guest.seen.append(tuple(said["event"]))
        elif "reply" in said:
            guest.replies.put_nowait(said["reply"])
        else:
            guest.gone.set()

    async def guest(
        self, remote: Remote, *rooms: str, namespace: str = "/", answer: Any = None
    ) -> NodeGuest:
        """A client of this server, which acknowledges with `answer`."""
        found = NodeGuest(self, f"guest-{len(self._guests)}", namespace)
        self._guests[found.name] = found
        url = remote.url + namespace
        self.tell(open=found.name, url=url, auth={"rooms": rooms}, answer=answer)
        await soon(found.connected, LIMIT)
        return found


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    """A program for clients; none is left afterwards."""
    async with program(House, folder, "manager_client.mjs") as found:
        yield found
