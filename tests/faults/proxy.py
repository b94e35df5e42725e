"""A TCP proxy that makes a network bad: between a bus and a server, in the loop of the test.

    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url)

Each connection has a mode of its own; `Proxy.mode` is what new ones begin with.

    "pass"       bytes go both ways
    "hole"       both directions are swallowed; nobody is told
    "down_hole"  what the server says is swallowed, what the client says arrives
    "drip"       what the server says arrives byte by byte, one in each turn of the loop

`retarget` sends new connections to another server, `cut` ends those that are open, and
each number in `cuts` ends the one that was the first to bring that many bytes from the server.
"""

from __future__ import annotations

import asyncio
from typing import Literal, Self

from anyio.lowlevel import checkpoint

Mode = Literal["pass", "hole", "down_hole", "drip"]


class Pair:
    """One connection through the proxy: to the client, and to the server. `up` and `down` count
    what was handed on; `said` is what the client said, swallowed or not."""

    def __init__(self, mode: Mode, client: asyncio.StreamWriter, port: int) -> None:
        self.mode = mode
        self.port = port
        self.said = bytearray()
        self.up = self.down = 0
        self.open = True
        self.client = client
        self.server: asyncio.StreamWriter | None = None

    @property
    def role(self) -> str:
        """Who is at its other end: "subscriber", "publisher" (has published), or ""."""
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
    """See above. It listens on 127.0.0.1, while it is entered; `pairs` are all it ever had."""

    def __init__(self, port: int | None, mode: Mode = "pass") -> None:
        self.mode = mode
        self.cuts: list[int] = []
        self.pairs: list[Pair] = []
        self.port = 0
        self._target = port or 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        """Where a bus finds it."""
        return f"redis://127.0.0.1:{self.port}"

    def retarget(self, port: int | None) -> None:
        """Send new connections there; those that are open stay."""
        self._target = port or 0

    def living(self, role: str | None = None) -> list[Pair]:
        """The connections that are open, all or those of one role."""
        return [pair for pair in self.pairs if pair.open and role in (None, pair.role)]

    def cut(self, role: str | None = None) -> None:
        """End the connections that are open, all or those of one role."""
        for pair in self.living(role):
            pair.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = Pair(self.mode, writer, self._target)
        self.pairs.append(pair)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            from_server, pair.server = await asyncio.open_connection("127.0.0.1", pair.port)
            await asyncio.gather(self._up(pair, reader), self._down(pair, from_server))
        except OSError:
            pass  # a reset, or nobody listens
        finally:
            pair.cut()

    async def _up(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            pair.said += data
            if pair.mode != "hole" and pair.server is not None:
                pair.up += len(data)
                pair.server.write(data)
                await pair.server.drain()
        if pair.server is not None:
            pair.server.close()

    async def _down(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            if pair.mode in ("hole", "down_hole"):
                continue
            over = bool(self.cuts) and pair.down + len(data) >= self.cuts[0]
            data = data[: self.cuts.pop(0) - pair.down] if over else data
            pair.down += len(data)
            for piece in (bytes([byte]) for byte in data) if pair.mode == "drip" else (data,):
                pair.client.write(piece)
                await pair.client.drain()
                if pair.mode == "drip" or over:
                    await checkpoint()
            if over:
                break
        pair.client.close()
