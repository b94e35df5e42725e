"""Three nodes in three processes, for tests: `await node("rooms.emit('hi', 1)")` runs it there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

LIMIT = 30.0
"""Seconds for one line: nothing that works takes long, and a machine may be busy."""


class Remote:
    """A node of one namespace, in another process."""

    def __init__(self, process: asyncio.subprocess.Process, space: str = "/") -> None:
        self._process = process
        self._space = space
        self.name = ""

    async def open(self, space: str) -> Remote:
        """The same process as a node of this namespace."""
        other = Remote(self._process, space)
        other.name = await other("rooms.node")
        return other

    async def __call__(self, source: str) -> Any:
        """The value of a line of Python that runs there; RuntimeError with what it raised."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([self._space, source]).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Any:
        assert self._process.stdout
        async with asyncio.timeout(LIMIT):
            value, error = json.loads(await self._process.stdout.readline())
        if error is not None:
            raise RuntimeError(error)
        return value

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def node(url: str) -> AsyncIterator[Remote]:
    """A process that is ready to be a node."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.rooms.worker", url),
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 24,
    )
    remote = Remote(process)
    try:
        await remote.answer()
        yield remote
        if process.returncode is None and process.stdin:
            process.stdin.close()
            async with asyncio.timeout(LIMIT):
                await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def three(url: str) -> AsyncIterator[list[Remote]]:
    """Three of them."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node(url)) for _ in range(3)]
