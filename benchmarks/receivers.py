"""A process: one contestant that receives the flood and says what a message cost it.

Why one process each: imports, event loop and garbage of one must not be in the bill of another.
Handlers do nothing but `hit()`. "Typed" means that the handler got a validated model.

    python -m benchmarks.receivers NAME PORT MESSAGES WARM BOARD
        [--heartbeat] [--routes N] [--profile FILE]
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import hiredis

from .meter import Board, Meter, profiled
from .workload import PATTERN, Chat

BEAT = 0.005  # seconds between two heartbeats of the loop lag row


@dataclass(frozen=True)
class Seat:
    """What a contestant is given."""

    port: int
    hit: Callable[[], None]
    routes: int
    extra: dict[str, Any]  # whatever it wants to see in its line

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


@asynccontextmanager
async def subscribed(seat: Seat, protocol: asyncio.Protocol) -> AsyncIterator[None]:
    """A raw connection, subscribed and confirmed: the first bytes are the confirmation."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: protocol, "127.0.0.1", seat.port)
    transport.write(b"PSUBSCRIBE %b\r\n" % PATTERN.encode())
    await asyncio.sleep(0.1)
    try:
        yield
    finally:
        transport.close()


@asynccontextmanager
async def floor_untyped(seat: Seat) -> AsyncIterator[None]:
    """hiredis parses, nobody looks: what any Python client pays at least."""

    class Floor(asyncio.Protocol):
        def __init__(self) -> None:
            self.reader = hiredis.Reader()

        def data_received(self, data: bytes) -> None:
            self.reader.feed(data)
            gets, hit = self.reader.gets, seat.hit
            while (frame := gets()) is not False:
                if frame[0] == b"pmessage":
                    hit()

    async with subscribed(seat, Floor()):
        yield


@asynccontextmanager
async def floor_typed(seat: Seat) -> AsyncIterator[None]:
    """hiredis, a validated model, an awaited handler: what any typed bus pays at least."""
    validate = Chat.__pydantic_validator__.validate_json
    frames: list[Any] = []
    filled = asyncio.Event()

    class Floor(asyncio.Protocol):
        def __init__(self) -> None:
            self.reader = hiredis.Reader()

        def data_received(self, data: bytes) -> None:
            self.reader.feed(data)
            gets, keep = self.reader.gets, frames.append
            while (frame := gets()) is not False:
                keep(frame)
            filled.set()

    async def handler(event: Chat) -> None:
        seat.hit()

    async def deliver() -> None:
        while True:
            await filled.wait()
            filled.clear()
            batch = frames[:]
            frames.clear()
            for frame in batch:
                if frame[0] == b"pmessage":
                    await handler(validate(frame[3]))

    task = asyncio.create_task(deliver())
    async with subscribed(seat, Floor()):
        yield
    task.cancel()


@asynccontextmanager
async def eventbus(seat: Seat) -> AsyncIterator[None]:
    """Typed, enveloped, captured, checked for holes."""
    from eventbus import Event, EventBus

    class MessageSent(Event, channel="chat:{room}"):
        room: str
        user: str
        text: str

    bus = EventBus(seat.url)

    @bus.on("chat:{room}")
    async def show(event: MessageSent, room: str) -> None:
        seat.hit()

    async with bus:
        yield
        seat.extra.update(tally(bus))


@asynccontextmanager
async def eventbus_routes(seat: Seat) -> AsyncIterator[None]:
    """One pattern that covers everything, and as many routes as asked for below it."""
    from eventbus import Event, EventBus

    class MessageSent(Event):
        room: str
        user: str
        text: str

    bus = EventBus(seat.url)

    @bus.on("room-*")
    async def show(event: MessageSent) -> None:
        seat.hit()

    def below_the_cover(n: int) -> None:
        @bus.on(f"room-{n}:{{x}}")
        async def other(event: MessageSent, x: str) -> None:
            raise AssertionError("no message of this row is for a route below the cover")

    for n in range(seat.routes - 1):
        below_the_cover(n)

    async with bus:
        yield
        seat.extra.update(tally(bus))


def tally(bus: Any) -> dict[str, int]:
    """The counters that must be zero in an honest row."""
    stats = bus.stats()
    names = "skipped", "invalid", "dropped", "missed", "failed", "reconnects"
    return {name: getattr(stats, name) for name in names}


@asynccontextmanager
async def redis_py_listen(seat: Seat) -> AsyncIterator[None]:
    """redis-py's PubSub: untyped dicts."""
    from redis.asyncio import Redis

    async with Redis.from_url(seat.url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(PATTERN)

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] == "pmessage":
                    seat.hit()

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.1)
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def faststream(seat: Seat) -> AsyncIterator[None]:
    """FastStream's broker with a typed handler, logging off."""
    from faststream.redis import PubSub, RedisBroker

    quiet: dict[str, Any] = {"logger": None}
    broker = RedisBroker(seat.url, **quiet)

    @broker.subscriber(channel=PubSub(PATTERN, pattern=True))
    async def show(event: Chat) -> None:
        seat.hit()

    async with broker:
        await broker.start()
        await asyncio.sleep(0.3)
        yield


@asynccontextmanager
async def valkey_glide(seat: Seat) -> AsyncIterator[None]:
    """valkey-glide's callback: untyped; its parser runs in Rust threads of this process."""
    from glide import GlideClient, GlideClientConfiguration, NodeAddress

    modes = GlideClientConfiguration.PubSubChannelModes
    client = await GlideClient.create(
        GlideClientConfiguration(
            [NodeAddress("127.0.0.1", seat.port)],
            pubsub_subscriptions=GlideClientConfiguration.PubSubSubscriptions(
                {modes.Pattern: {PATTERN}}, lambda message, context: seat.hit(), None
            ),
        )
    )
    await asyncio.sleep(0.3)
    yield
    await client.close()


CONTESTANTS: dict[str, Callable[[Seat], AbstractAsyncContextManager[None]]] = {
    "floor_untyped": floor_untyped,
    "floor_typed": floor_typed,
    "eventbus": eventbus,
    "eventbus_routes": eventbus_routes,
    "redis_py_listen": redis_py_listen,
    "faststream": faststream,
    "valkey_glide": valkey_glide,
}


async def heartbeat(lags: list[float]) -> None:
    """How late the loop is for a timer, again and again."""
    while True:
        due = perf_counter() + BEAT
        await asyncio.sleep(BEAT)
        lags.append(perf_counter() - due)


async def receive(options: argparse.Namespace) -> dict[str, Any]:
    meter = Meter(Board(options.board), total=options.messages, warm=options.warm)
    seat = Seat(options.port, meter.hit, options.routes, {})
    lags: list[float] = []
    async with CONTESTANTS[options.name](seat):
        print("ready", flush=True)
        beat = asyncio.create_task(heartbeat(lags)) if options.heartbeat else None
        with profiled(options.profile):
            await meter.finished()
        if beat:
            beat.cancel()
    result = meter.result() | seat.extra
    if lags:
        result["lag_max_ms"] = max(lags) * 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("port", type=int)
    parser.add_argument("messages", type=int)
    parser.add_argument("warm", type=int)
    parser.add_argument("board", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--heartbeat", action="store_true")
    parser.add_argument("--routes", type=int, default=1)
    print(json.dumps(asyncio.run(receive(parser.parse_args()))))


if __name__ == "__main__":
    main()
