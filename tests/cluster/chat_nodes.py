"""Nodes of the chat for its tests: real processes, on ports that nobody uses."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.helpers import soon

ROOT = Path(__file__).parents[2]
START = 40.0
"""Seconds until a node has not started, on a machine where much else runs."""


def free_ports(number: int) -> list[int]:
    """Ports below those that the system hands out by itself, so that nobody dials from them."""
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(20_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


class Nodes:
    """Processes of one chat: `node-1`, `node-2`, …, each with its URL."""

    def __init__(self, redis: str, number: int, roam: bool) -> None:
        self.names = [f"node-{place}" for place in range(1, number + 1)]
        ports = free_ports(number)
        self.urls = {
            name: f"http://127.0.0.1:{port}" for name, port in zip(self.names, ports, strict=True)
        }
        self._redis, self._roam = redis, roam
        self._processes: dict[str, Process] = {}

    def __getitem__(self, place: int) -> str:
        """The URL of a node; the first is 1."""
        return self.urls[f"node-{place}"]

    async def start(self, name: str) -> None:
        """Start one, and return when it is ready."""
        urls = ",".join(self.urls.values()) if self._roam else ""
        words = ["--name", name, "--port", self.urls[name].rpartition(":")[2]]
        words += ["--redis", self._redis, "--nodes", urls, "--heartbeat", "0.5", "--ttl", "2"]
        self._processes[name] = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "examples.chat.node", *words, cwd=ROOT, stdout=PIPE
        )
        assert process.stdout is not None
        assert await soon(process.stdout.readline(), START) == f"{name} is ready\n".encode()

    async def kill(self, place: int) -> None:
        """End one as a crash would."""
        process = self._processes[f"node-{place}"]
        process.kill()
        await soon(process.wait())

    def freeze(self, place: int) -> None:
        """Halt one: its connections stay open, and nothing is answered."""
        self._processes[f"node-{place}"].send_signal(signal.SIGSTOP)

    async def stop(self) -> None:
        """End all that are left: in order, or else by force."""
        left = [process for process in self._processes.values() if process.returncode is None]
        for process in left:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
        try:
            await soon(asyncio.gather(*(process.wait() for process in left)))
        finally:
            for process in left:
                with suppress(ProcessLookupError):
                    process.kill()
        assert [process.returncode for process in left] == [0] * len(left)


@asynccontextmanager
async def chat(redis: str, number: int = 3, *, roam: bool = False) -> AsyncIterator[Nodes]:
    """A chat on this Redis. With `roam` a page knows all nodes, else only its own."""
    nodes = Nodes(redis, number, roam)
    try:
        await asyncio.gather(*map(nodes.start, nodes.names))
        yield nodes
    finally:
        await nodes.stop()
