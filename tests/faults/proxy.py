"""A TCP proxy that makes a network bad: between a bus and a server, in the loop of the test.

Each connection (`Pair`) has a mode of its own; `Proxy.mode` is what new ones begin with.

    "pass"       bytes go both ways
    "hole"       both directions are swallowed, and nobody is told
    "down_hole"  what the server says is swallowed, what the client says arrives
    "up_hole"    what the client says is swallowed, what the server says arrives
    "drip"       what the server says arrives byte by byte, one in each turn of the loop
    "stall"      the connection is accepted, and nothing is read from it until the mode changes
    "close"      the connection is accepted and closed at once
    "answer"     the server is not asked: `Proxy.answer` makes up what it says

A pair can also be slow: `sizes` cuts what the server says into pieces of these many bytes, in turn
and again from the first, and `delay` is the pause after each piece.

What happens at a certain byte is a list of numbers. `cuts`: the first is the byte from the server
at which the connection ends. `up_cuts`: the same for what the client says. `garbles`: pairs, which
byte from the server, and what it becomes. Those of a `Pair` are its own; those of the `Proxy` are
for whichever connection is the next to come so far (`up_cuts`: if it is no publisher's).

`retarget` sends new connections to another server, and `cut` ends those that are open.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Literal, Self

from anyio.lowlevel import checkpoint

Mode = Literal["pass", "hole", "down_hole", "up_hole", "drip", "stall", "close", "answer"]
_HEAD = 64 * 1024
_COMMAND = re.compile(rb"^\*\d+\r\n\$\d+\r\n(\w+)", re.MULTILINE)


class Pair:
    """One connection. `said` is how the client began, `up` and `down` count what was handed on,
    `born` is the loop's time when it was accepted."""

    def __init__(self, mode: Mode, client: asyncio.StreamWriter) -> None:
        self.said = bytearray()
        self.up = self.down = 0
        self.open = True
        self.born = asyncio.get_running_loop().time()
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.sizes: Sequence[int] = ()
        self.delay = 0.0
        self.cuts: list[int] = []
        self.up_cuts: list[int] = []
        self.garbles: list[tuple[int, int]] = []
        self._mode = mode
        self._moved = asyncio.Event()

    @property
    def mode(self) -> Mode:
        """What is done to it, from now on."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        self._moved.set()

    @property
    def role(self) -> str:
        """What the bus uses it for: "subscriber", "publisher" (when it has published), or ""."""
        if b"SUBSCRIBE\r\n" in self.said:
            return "subscriber"
        return "publisher" if b"PUBLISH\r\n" in self.said else ""

    def cut(self) -> None:
        """End it at both sides, whatever is under way."""
        self.open = False
        self._moved.set()
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()

    async def while_it_stalls(self) -> None:
        """Return when the mode is another one, or the connection is over."""
        while self.mode == "stall" and self.open:
            await self.pause(None)

    async def pause(self, seconds: float | None) -> None:
        """Return after these seconds; at once when the mode changes or the connection ends."""
        self._moved.clear()
        waiting = asyncio.ensure_future(self._moved.wait())
        await asyncio.wait({waiting}, timeout=seconds)
        waiting.cancel()


Answer = Callable[[Pair, str], bytes]
"""What a server says to a command (in capitals) on a connection."""


class Proxy:
    """`async with Proxy(server.port) as proxy: EventBus(proxy.url)`. `pairs` are all it had."""

    def __init__(self, target: int | None, mode: Mode = "pass") -> None:
        self.mode = mode
        self.cuts: list[int] = []
        self.up_cuts: list[int] = []
        self.garbles: list[tuple[int, int]] = []
        self.sizes: Sequence[int] = ()
        self.delay = 0.0
        self.answer: Answer = lambda pair, command: b""
        self.pairs: list[Pair] = []
        self.url = ""
        self.port = 0
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        self.mode = "close"
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
        pair.sizes, pair.delay = self.sizes, self.delay
        if task := asyncio.current_task():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await pair.while_it_stalls()
            if pair.mode == "answer":
                await self._make_up(pair, reader)
            elif pair.mode != "close" and pair.open:
                from_server, pair.server = await asyncio.open_connection("127.0.0.1", self._target)
                await asyncio.gather(self._up(pair, reader), self._down(pair, from_server))
        except OSError:
            pass  # a reset, or nobody listens there
        finally:
            pair.cut()

    async def _make_up(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        """Answer each command in the server's place."""
        while pair.mode == "answer" and (data := await reader.read(_HEAD)):
            pair.said += data[: _HEAD - len(pair.said)]
            for verb in _COMMAND.findall(data):
                pair.client.write(self.answer(pair, verb.decode().upper()))
            await pair.client.drain()

    async def _up(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        over = False
        while not over and pair.server and (data := await reader.read(_HEAD)):
            pair.said += data[: _HEAD - len(pair.said)]
            if pair.mode in ("hole", "up_hole"):
                continue
            limits = pair.up_cuts or ([] if pair.role == "publisher" else self.up_cuts)
            if over := bool(limits) and pair.up < limits[0] <= pair.up + len(data):
                data = data[: limits.pop(0) - pair.up]
            pair.up += len(data)
            pair.server.write(data)
            await pair.server.drain()
        if over:
            await self._until_said(pair)
        pair.cut()

    async def _until_said(self, pair: Pair) -> None:
        """Let what was just written leave: an abort would take it back."""
        while pair.server and pair.server.transport.get_write_buffer_size():
            await checkpoint()

    async def _down(self, pair: Pair, reader: asyncio.StreamReader) -> None:
        over = False
        while not over and (data := await reader.read(_HEAD)):
            await pair.while_it_stalls()
            if pair.mode in ("hole", "down_hole"):
                continue
            limits = pair.cuts or self.cuts
            if over := bool(limits) and pair.down < limits[0] <= pair.down + len(data):
                data = data[: limits.pop(0) - pair.down]
            data = self._garble(pair, data)
            pair.down += len(data)
            for piece in _pieces(pair, data):
                pair.client.write(piece)
                await pair.client.drain()
                if pair.delay:
                    await pair.pause(pair.delay)
                await checkpoint()
        pair.client.close()

    def _garble(self, pair: Pair, data: bytes) -> bytes:
        """The same with the next wrong byte in it, when its place is there."""
        places = pair.garbles or self.garbles
        if places and pair.down <= places[0][0] < pair.down + len(data):
            place, byte = places.pop(0)
            wrong = bytearray(data)
            wrong[place - pair.down] = byte
            return bytes(wrong)
        return data


def _pieces(pair: Pair, data: bytes) -> Iterator[bytes]:
    """What the server said at once, as it arrives."""
    sizes = cycle((1,) if pair.mode == "drip" else pair.sizes or (len(data),))
    start = 0
    while start < len(data):
        end = start + next(sizes)
        yield data[start:end]
        start = end


def saying(**words: bytes) -> Answer:
    """For `Proxy.answer`: these answers to these commands, and what a server says to a hello."""
    usual = {"PING": b"+PONG\r\n", "CLIENT": b"+OK\r\n", "ROLE": b"-ERR no\r\n", **words}
    return lambda pair, command: usual.get(command, b"")


def refusing(text: str) -> Answer:
    """For `Proxy.answer`: this error to everything."""
    return lambda pair, command: b"-%b\r\n" % text.encode()
