"""Servers in processes of their own, and guests: clients of python-socketio, in this one.

Every test has a namespace of its own, and a guest on each server. `Hall.heard` sends a last emit
from the first server: what came before it is all that came, since a node hears another in its
order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import socketio
from anyio.lowlevel import checkpoint

from tests.helpers import Seen, soon

LIMIT = 30.0
"""Seconds for one line: nothing that works takes long, and a machine may be busy."""
FENCE = "fence"


class Remote:
    """A server in another process: `await remote("await sio.emit('hi')")` runs it there."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._session = session

    async def __call__(self, source: str) -> Any:
        """The value of a line of Python; RuntimeError with what it raised."""
        async with (
            asyncio.timeout(LIMIT),
            self._session.post(self.url + "/run", data=source) as got,
        ):
            value, error = json.loads(await got.text())
        if error is not None:
            raise RuntimeError(error)
        return value

    async def until(self, source: str) -> Any:
        """The value of a line, when it has become true. TimeoutError after the limit."""
        async with asyncio.timeout(LIMIT):
            while not (value := await self(source)):
                await checkpoint()
        return value


@asynccontextmanager
async def servers(url: str, count: int = 1, **options: Any) -> AsyncIterator[list[Remote]]:
    """So many processes with a server each; with `fork`, as many servers as each of them forks."""
    command = (sys.executable, "-m", "tests.socketio.worker", url, json.dumps(options))
    processes: list[asyncio.subprocess.Process] = []
    try:
        while len(processes) < count:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            processes.append(process)
        async with aiohttp.ClientSession() as session:
            found = []
            for process in processes:
                assert process.stdout
                for _ in range(options.get("fork") or 1):
                    port = int(await soon(process.stdout.readline(), LIMIT))
                    found.append(Remote(port, session))
            yield found
        for process in processes:
            assert process.stdin
            process.stdin.close()
        for process in processes:
            await soon(process.wait(), LIMIT)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # with all that it has forked
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class Guest:
    """What a client hears is in `seen`, as `(event, *data)`; `answer` is what it acknowledges
    with."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.seen: Seen[tuple[Any, ...]] = Seen()
        self.answer: Any = None
        self.gone = asyncio.Event()

    @property
    def sid(self) -> str:
        raise NotImplementedError

    async def heard(self) -> list[tuple[Any, ...]]:
        """What came before the fence, and was not looked at before."""
        async with asyncio.timeout(LIMIT):
            while (FENCE,) not in self.seen:
                await self.seen.reach(len(self.seen) + 1)
        at = self.seen.index((FENCE,))
        found = list(self.seen[:at])
        del self.seen[: at + 1]
        return found

    async def next(self) -> tuple[Any, ...]:
        """What comes next."""
        await self.seen.reach(1)
        return self.seen.pop(0)


class PythonGuest(Guest):
    """A client of python-socketio."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.io = socketio.AsyncClient(reconnection=False)
        self.io.on("*", self._hear, namespace=namespace)
        self.io.on("disconnect", self._left, namespace=namespace)

    @property
    def sid(self) -> str:
        return str(self.io.get_sid(self.namespace))

    async def _hear(self, *event: Any) -> Any:
        self.seen.append(event)
        return self.answer

    async def _left(self, *reason: object) -> None:
        self.gone.set()


@asynccontextmanager
async def guest(remote: Remote, *rooms: str, namespace: str = "/") -> AsyncIterator[Guest]:
    """A client of this server, a member of these rooms."""
    found = PythonGuest(namespace)
    await found.io.connect(
        remote.url,
        transports=["websocket"],
        namespaces=[namespace],
        auth={"rooms": rooms},
        wait_timeout=LIMIT,
    )
    try:
        yield found
    finally:
        await found.io.disconnect()


class Hall(NamedTuple):
    """Some servers, one namespace, and a guest on each server."""

    space: str
    servers: list[Remote]
    guests: list[Guest]

    async def emit(self, words: str, number: int = 0) -> None:
        """`sio.emit(words)` on one of the servers, in the namespace of this test."""
        await self.servers[number](f"await sio.emit({words}, namespace={self.space!r})")

    async def heard(self) -> list[Any]:
        """What each guest heard since the last look."""
        await self.emit(repr(FENCE))
        return [await found.heard() for found in self.guests]

    async def run(self, words: str, number: int = 0) -> Any:
        """`sio.words` on one of the servers, in the namespace of this test."""
        return await self.servers[number](f"await sio.{words[:-1]}, namespace={self.space!r})")


def only(*got: int, event: tuple[Any, ...] = ("hi",)) -> list[Any]:
    """What `heard` finds when these of three guests got this once, and the others nothing."""
    return [[event] if number in got else [] for number in range(3)]
