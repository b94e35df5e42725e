"""A process: how long one event takes from the publish call to the handler.

One at a time, both ends in this process and on its one loop, so that a single clock tells: this is
the time of an idle system, where the distance is made of wake-ups and not of queues.

Two rows. With a pause before each event (the one we judge): what a message takes that comes now and
then, with caches and cores as cold as they are in life. Back to back ("hot"): what is left when
everything is warm; there even the raw floor saves only a fifth of redis-py's time.

    python -m benchmarks.latencies NAME PORT MESSAGES PAUSE      (PAUSE in seconds)
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import Any

import hiredis

from .workload import BODIES, PATTERN, USER, Chat, publish_command, text

CHANNEL, ROOM = "chat:room-1", "room-1"
TEXT = text(ROOM)
WARM = 200  # connections, caches; not counted

Publish = Callable[[], Awaitable[object]]
Arrived = Callable[[], None]


@asynccontextmanager
async def floor(port: int, arrived: Arrived) -> AsyncIterator[Publish]:
    """Two raw connections, hiredis, a validated model: no client at all."""
    validate = Chat.__pydantic_validator__.validate_json
    command = publish_command(CHANNEL.encode(), BODIES[ROOM])

    class Subscriber(asyncio.Protocol):
        def __init__(self) -> None:
            self.reader = hiredis.Reader()

        def data_received(self, data: bytes) -> None:
            self.reader.feed(data)
            while (frame := self.reader.gets()) is not False:
                if frame[0] == b"pmessage":
                    validate(frame[3])
                    arrived()

    loop = asyncio.get_running_loop()
    subscriber, _ = await loop.create_connection(Subscriber, "127.0.0.1", port)
    publisher, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
    subscriber.write(b"PSUBSCRIBE %b\r\n" % PATTERN.encode())
    await asyncio.sleep(0.1)

    async def publish() -> None:
        publisher.write(command)

    yield publish
    subscriber.close()
    publisher.close()


@asynccontextmanager
async def eventbus(port: int, arrived: Arrived) -> AsyncIterator[Publish]:
    """One bus that publishes to itself."""
    from eventbus import Event, EventBus

    class MessageSent(Event, channel="chat:{room}"):
        room: str
        user: str
        text: str

    bus = EventBus(f"redis://127.0.0.1:{port}")

    @bus.on("chat:{room}")
    async def show(event: MessageSent, room: str) -> None:
        arrived()

    async with bus:
        yield lambda: bus.publish(CHANNEL, MessageSent(room=ROOM, user=USER, text=TEXT))


@asynccontextmanager
async def redis_py(port: int, arrived: Arrived) -> AsyncIterator[Publish]:
    """One client, its pool and its PubSub: untyped dicts."""
    from redis.asyncio import Redis

    url = f"redis://127.0.0.1:{port}"
    async with Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(PATTERN)

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] == "pmessage":
                    arrived()

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.1)
        yield lambda: client.publish(
            CHANNEL, Chat(room=ROOM, user=USER, text=TEXT).model_dump_json()
        )
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def faststream(port: int, arrived: Arrived) -> AsyncIterator[Publish]:
    """One broker with a typed handler, logging off."""
    from faststream.redis import PubSub, RedisBroker

    quiet: dict[str, Any] = {"logger": None}
    broker = RedisBroker(f"redis://127.0.0.1:{port}", **quiet)

    @broker.subscriber(channel=PubSub(PATTERN, pattern=True))
    async def show(event: Chat) -> None:
        arrived()

    async with broker:
        await broker.start()
        await asyncio.sleep(0.3)
        yield lambda: broker.publish(Chat(room=ROOM, user=USER, text=TEXT), channel=CHANNEL)


CONTESTANTS: dict[str, Callable[[int, Arrived], AbstractAsyncContextManager[Publish]]] = {
    "floor": floor,
    "eventbus": eventbus,
    "redis_py": redis_py,
    "faststream": faststream,
}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    arrival: asyncio.Future[float] = loop.create_future()
    received = 0

    def arrived() -> None:
        nonlocal received
        received += 1
        if not arrival.done():
            arrival.set_result(perf_counter())

    times: list[float] = []
    async with CONTESTANTS[options.name](options.port, arrived) as publish:
        for _ in range(WARM + options.messages):
            arrival = loop.create_future()
            if options.pause:
                await asyncio.sleep(options.pause)
            begin = perf_counter()
            await publish()
            async with asyncio.timeout(5):
                times.append(await arrival - begin)
    measured = sorted(times[WARM:])
    return {
        "messages": options.messages,
        "received": received - WARM,
        "complete": received == WARM + options.messages,
        "p50_us": measured[len(measured) // 2] * 1e6,
        "p99_us": measured[len(measured) * 99 // 100] * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("port", type=int)
    parser.add_argument("messages", type=int)
    parser.add_argument("pause", type=float)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))


if __name__ == "__main__":
    main()
