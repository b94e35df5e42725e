"""A process under test: `python -m tests.faults.campaign.subjects SUBJECT ROLE URL`.

A receiver listens to `c:*` and `d:*`; a publisher numbers its messages and notes what became of
each. Both obey words on stdin and answer the last one, "report", with a line of JSON. Times are of
`time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from typing import Any, Protocol
from urllib.parse import urlsplit

CHANNELS = [f"c:{n}" for n in range(20)]
PATTERNS = ("c:*", "d:*")
HEARTBEAT = 1.0
RATE = 250.0
"""Messages a second."""
_TICK = 0.01
_LOOK = 5
"""Ticks between two looks at what the library says of itself."""


class Notes:
    """What a subject saw. `id` is the number of a message among all of its publisher."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, float]] = []
        self.notices: list[tuple[float, str]] = []
        self.sent: dict[int, float] = {}
        self.acknowledged: list[int] = []
        self.uncertain: list[int] = []
        self.refused: list[int] = []
        self.lag = 0.0
        self.missed = 0

    def message(self, text: str) -> None:
        """A message has reached a handler."""
        self.arrived.append((int(text.partition(" ")[0]), time.monotonic()))

    def notice(self, what: object) -> None:
        """Something has told the program that there is trouble."""
        if len(self.notices) < 1000:
            self.notices.append((time.monotonic(), repr(what)[:100]))


Publish = Callable[[str, str], Any]
"""Returns "acknowledged", "uncertain" or "refused"."""


class Subject(Protocol):
    """A library in use. Yields its publish function, and one that looks after it now and then."""

    def __call__(self, url: str, notes: Notes, listens: bool) -> Any: ...


@asynccontextmanager
async def eventbus(
    url: str, notes: Notes, listens: bool
) -> AsyncIterator[tuple[Publish, Callable[[], None]]]:
    """This package, with a heartbeat of a second."""
    from eventbus import BusUnavailable, Event, EventBus, Gap, PublishUncertain

    class Text(Event):
        text: str

    bus = EventBus(url, heartbeat=HEARTBEAT)
    if listens:

        @bus.on(*PATTERNS)
        async def hear(event: Text) -> None:
            notes.message(event.text)

        @bus.on_gap("*")
        async def gap(gap: Gap) -> None:
            notes.notice(gap.reason)

    async def publish(channel: str, text: str) -> str:
        try:
            await bus.publish(channel, Text(text=text))
        except PublishUncertain:
            return "uncertain"
        except BusUnavailable:
            return "refused"
        return "acknowledged"

    def look() -> None:
        state = bus.health().state
        if state != "live":
            notes.notice(state)
        notes.missed = bus.stats().missed

    async with bus:
        yield publish, look


@asynccontextmanager
async def redis_py(
    url: str, notes: Notes, listens: bool
) -> AsyncIterator[tuple[Publish, Callable[[], None]]]:
    """The client that most programs use, its defaults, and a loop that survives every error."""
    from redis.asyncio import Redis
    from redis.asyncio.sentinel import Sentinel
    from redis.exceptions import RedisError

    parts = urlsplit(url)
    if parts.scheme == "redis+sentinel":
        addresses = [host.rsplit(":", 1) for host in parts.netloc.split(",")]
        sentinel = Sentinel([(host, int(port)) for host, port in addresses])
        client: Any = sentinel.master_for(parts.path.strip("/"))
    else:
        client = Redis.from_url(url)

    async def listen() -> None:
        while True:
            try:
                async with client.pubsub() as pubsub:
                    await pubsub.psubscribe(*PATTERNS)
                    async for message in pubsub.listen():
                        if message["type"] == "pmessage":
                            notes.message(message["data"].decode())
            except (RedisError, OSError) as error:
                notes.notice(error)
                await asyncio.sleep(0.1)

    async def publish(channel: str, text: str) -> str:
        try:
            await client.publish(channel, text)
        except (RedisError, OSError):
            return "uncertain"  # it does not say whether the message was written
        return "acknowledged"

    task = asyncio.create_task(listen()) if listens else None
    await asyncio.sleep(0.3)
    yield publish, lambda: None
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
    await client.aclose()


@asynccontextmanager
async def faststream(
    url: str, notes: Notes, listens: bool
) -> AsyncIterator[tuple[Publish, Callable[[], None]]]:
    """The broker with its defaults; what it logs as a warning or worse is what it notices."""
    from faststream.redis import PubSub, RedisBroker

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.notice(record.getMessage())

    logger = logging.getLogger("subject")
    logger.propagate = False
    heard = Heard(logging.WARNING)
    logger.addHandler(heard)
    logging.getLogger("asyncio").addHandler(heard)
    broker = RedisBroker(url, logger=logger)
    if listens:
        for pattern in PATTERNS:

            @broker.subscriber(channel=PubSub(pattern, pattern=True))
            async def hear(text: str) -> None:
                notes.message(text)

    async def publish(channel: str, text: str) -> str:
        try:
            await broker.publish(text, channel=channel)
        except Exception:
            return "uncertain"
        return "acknowledged"

    async with broker:
        await broker.start()
        await asyncio.sleep(0.3)
        yield publish, lambda: None


SUBJECTS: dict[str, Subject] = {
    "eventbus": eventbus,
    "redis_py": redis_py,
    "faststream": faststream,
}


class Process:
    """The loop of a subject: words in, a report out."""

    def __init__(self, role: str, notes: Notes, publish: Publish, look: Callable[[], None]) -> None:
        self._listens = role == "receiver"
        self._notes = notes
        self._publish = publish
        self._look = look
        self._count = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._traffic: asyncio.Task[None] | None = None

    async def obey(self, words: list[str]) -> str | None:
        """Do what a line says; the answer to it."""
        notes = self._notes
        match words:
            case ["go"]:
                self._traffic = asyncio.create_task(self._flow())
            case ["burst", count, size]:
                filling = "x" * int(size)
                for n in range(int(count)):
                    await self._send(CHANNELS[n % len(CHANNELS)], filling)
            case ["block", seconds]:
                time.sleep(float(seconds))  # noqa: ASYNC251 - a program that blocks its loop
                notes.lag = 0.0
            case ["mark"]:
                notes.lag = 0.0
            case ["halt"]:
                if self._traffic is not None:
                    self._traffic.cancel()
                    await asyncio.wait({self._traffic})
                if self._sending:
                    await asyncio.wait(self._sending, timeout=12)
            case ["report"]:
                self._look()
                return json.dumps(vars(notes))
            case _:
                raise SystemExit(f"what is {words}?")
        return None

    async def _flow(self) -> None:
        """Messages at the rate, whatever becomes of them; at most a thousand under way."""
        started, due = time.monotonic(), 0
        while True:
            while due < (time.monotonic() - started) * RATE and len(self._sending) < 1000:
                task = asyncio.create_task(self._send(CHANNELS[due % len(CHANNELS)], ""))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
                due += 1
            due = max(due, int((time.monotonic() - started) * RATE) - 10)
            await asyncio.sleep(_TICK)

    async def _send(self, channel: str, filling: str) -> None:
        self._count += 1
        id, notes = self._count, self._notes
        notes.sent[id] = time.monotonic()
        outcome = await self._publish(channel, f"{id} {filling}")
        getattr(notes, outcome).append(id)
        if outcome != "acknowledged":
            notes.notice(outcome)

    async def watch(self) -> None:
        """How late the loop is, at worst, and what the library says of itself."""
        for tick in count():
            before = time.monotonic()
            await asyncio.sleep(_TICK)
            self._notes.lag = max(self._notes.lag, time.monotonic() - before - _TICK)
            if self._listens and tick % _LOOK == 0:
                self._look()


async def main(subject: str, role: str, url: str) -> None:
    """Run until stdin ends."""
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    notes = Notes()
    async with AsyncExitStack() as stack:
        opened = SUBJECTS[subject](url, notes, role == "receiver")
        publish, look = await stack.enter_async_context(opened)
        process = Process(role, notes, publish, look)
        watcher = asyncio.create_task(process.watch())
        print("ready", flush=True)
        while line := await reader.readline():
            answer = await process.obey(line.decode().split())
            if answer is not None:
                print(answer, flush=True)
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
