"""A node in a process of its own: it runs what it is told, one line of Python at a time.

    python -m tests.rooms.worker URL

Each line of stdin is JSON, `[namespace, source]`; the source may await, and knows `rooms` (of that
namespace), `connect`, `heard` and whatever an earlier line has left. The answer is a line of JSON,
`[value, null]` or `[null, error]`. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

from eventbus import EventBus
from eventbus.rooms import Client, Rooms
from tests.helpers import evaluate

FENCE = "fence"


class Seat:
    """A simulated browser: it keeps what it gets, and answers calls when it has an answer."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.answer: Any = None
        self.frames: list[list[Any]] = []
        self.left = asyncio.Event()
        self._grew = asyncio.Event()

    async def send(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            message = json.loads(frame)
            self.frames.append([message["event"], message["data"]])
        else:
            head, _, blob = frame.partition(b"\n")
            message = json.loads(head)
            self.frames.append([message["event"], f"bytes {blob.hex()}"])
        self._grew.set()
        if "ack" in message and self.answer is not None and self.client:
            if isinstance(self.answer, bytes):
                head = json.dumps({"ack": message["ack"]}).encode()
                self.client.receive(head + b"\n" + self.answer)
            else:
                self.client.receive(json.dumps({"ack": message["ack"], "data": self.answer}))

    async def heard(self) -> list[list[Any]]:
        """What came before the fence."""
        while [FENCE, None] not in self.frames:
            self._grew.clear()
            await self._grew.wait()
        at = self.frames.index([FENCE, None])
        found, self.frames = self.frames[:at], self.frames[at + 1 :]
        return found


class Space:
    """The names that the lines of one namespace know."""

    def __init__(self, bus: EventBus, name: str, stack: AsyncExitStack) -> None:
        self.seats: list[Seat] = []
        self.stack = stack
        self.names: dict[str, Any] = {
            "asyncio": asyncio,
            "connect": self.connect,
            "heard": self.heard,
            "rooms": Rooms(bus, name),
            "seats": self.seats,
        }

    async def start(self) -> None:
        await self.stack.enter_async_context(self.names["rooms"])

    async def connect(self, id: str, *joined: str, **options: Any) -> str:
        """A client that stays until the end, or until the server ends it."""
        seat = Seat()
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def stay() -> None:
            async with self.names["rooms"].connect(seat.send, id, **options) as client:
                seat.client = client
                await client.join(*joined)
                entered.set_result(None)
                await asyncio.get_running_loop().create_future()
            seat.left.set()

        task = asyncio.create_task(stay())
        self.names.setdefault("tasks", []).append(task)
        await asyncio.wait({task, entered}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        self.seats.append(seat)
        self.names[id] = seat.client
        return id

    async def heard(self) -> list[list[list[Any]]]:
        return [await seat.heard() for seat in self.seats]


def plain(value: Any) -> Any:
    """What JSON has no form for."""
    return sorted(value) if isinstance(value, frozenset) else repr(value)


async def main(url: str) -> None:
    """Answer lines until there are no more."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    spaces: dict[str, Space] = {}
    async with EventBus(url, publish_timeout=5.0) as bus, AsyncExitStack() as stack:
        print(json.dumps(["ready", None]), flush=True)
        while line := await reader.readline():
            name, source = json.loads(line)
            try:
                if name not in spaces:
                    spaces[name] = Space(bus, name, stack)
                    await spaces[name].start()
                answer = [await evaluate(source, spaces[name].names), None]
            except Exception as error:
                answer = [None, f"{type(error).__name__}: {error}"]
            print(json.dumps(answer, default=plain), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
