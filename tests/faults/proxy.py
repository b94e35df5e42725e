"""A TCP proxy that makes a network bad: between a bus and a server, in the loop of the test.

Each connection (`Pair`) has a mode of its own; `Proxy.mode` is what new ones begin with.

    "pass"       bytes go both ways
    "hole"       both directions are swallowed, and nobody is told
    "down_hole"  what the server says is swallowed, what the client says arrives
    "drip"       what the server says arrives byte by byte, one in each turn of the loop

`retarget` sends new connections to another server, `cut` ends those that are open, and each number
in `cuts` ends the connection that is the next to bring that many bytes from the server.
"""

from __future__ import annotations

import asyncio
from typing import Literal, Self

from anyio.lowlevel import checkpoint

Mode = Literal["pass", "hole", "down_hole", "drip"]
_HEAD = 64 * 1024


class Pair:
    """One connection. `said` is how the client began, `up` and `down` count what was handed on."""

    def __init__(self, mode: Mode, client: asyncio.StreamWriter) -> None:
        self.mode = mode
        self.said = bytearray()
        self.up = self.down = 0
        self.open = True
        self.client = client
        self.server: asyncio.StreamWriter | None = None

    @property
    def role(self) -> str:
        """What the bus uses it for: "subscriber", "publisher" (when it has published), or ""."""
        if b"SUBSCRIBE\r\n" in self.said:
            return "subscriber"
        return "publisher" if b"PUBLISH\r\n" in self.said else ""

    def cut(self) -> None:
        """End it at both sides, whatever is under way."""
        self.open = False
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class Proxy:
    """`async with Proxy(server.port) as proxy: EventBus(proxy.url)`. `pairs` are all it had."""

    def __init__(self, target: int | None, mode: Mode = "pass") -> None:
        self.mode = mode
        self.cuts: list[int] = []
        self.pairs: list[Pair] = []
        self.url = ""
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def retarget(self, target: int | None) -> None:
        """Send new connections to this port; those that are open stay."""
        self._target = target

    def living(self, role: str | None = None) -> list[Pair]:
        """Those that are open, all or of one role."""
        return [pair for pair in self.pairs if pair.open and role in (None, pair.role)]

    def cut(self, role: str | None = None) -> None:
        """End those that are open, all or of one role."""
        for pair in self.living(role):
            pair.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pairs.append(pair := Pair(self.mode, writer))
        if task := asyncio.current_task():
            self._tasks.add(task)
        try:
            from_server, pair.server = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._up(pair, reader), self._down(pair, from_server))
        except OSError:
            pass  # a reset, or nobody listens there
        finally:
            pair.cut()

    async def _up(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        while pair.server and (data := await reader.read(_HEAD)):
            pair.said += data[: _HEAD - len(pair.said)]
            if pair.mode != "hole":
                pair.up += len(data)
                pair.server.write(data)
                await pair.server.drain()
        pair.cut()

    async def _down(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        over = False
        while not over and (data := await reader.read(_HEAD)):
            if pair.mode in ("hole", "down_hole"):
                continue
            if over := bool(self.cuts) and pair.down + len(data) >= self.cuts[0] > pair.down:
                data = data[: self.cuts.pop(0) - pair.down]
            pair.down += len(data)
            step = 1 if pair.mode == "drip" else len(data)
            for start in range(0, len(data), step):
                pair.client.write(data[start : start + step])
                await pair.client.drain()
                await checkpoint()
        pair.client.close()
