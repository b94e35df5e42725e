"""A process: one contestant that publishes events, and how many a second the server got.

Every publish builds its event, awaits the answer, and goes to the same channel; nobody listens.
``CONCURRENT`` tasks do that in a loop. The server's own count of PUBLISH commands says whether
each one arrived, and arrived once.

    python -m benchmarks.publishers NAME PORT MESSAGES CONCURRENT [--profile FILE]
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from .meter import costs, profiled, spent
from .workload import USER, Chat, text

CHANNEL, ROOM = "chat:room-1", "room-1"
TEXT = text(ROOM)

Publish = Callable[[], Awaitable[object]]


@asynccontextmanager
async def eventbus(port: int, concurrent: int) -> AsyncIterator[Publish]:
    """The bus, its defaults."""
    from eventbus import Event, EventBus

    class MessageSent(Event, channel="chat:{room}"):
        room: str
        user: str
        text: str

    async with EventBus(f"redis://127.0.0.1:{port}") as bus:
        yield lambda: bus.publish(CHANNEL, MessageSent(room=ROOM, user=USER, text=TEXT))


@asynccontextmanager
async def redis_py(port: int, concurrent: int) -> AsyncIterator[Publish]:
    """The client, its defaults; one connection per task, for it raises without a free one."""
    from redis.asyncio import Redis

    settings: dict[str, Any] = {} if concurrent == 1 else {"max_connections": concurrent}
    async with Redis.from_url(f"redis://127.0.0.1:{port}", **settings) as client:
        yield lambda: client.publish(
            CHANNEL, Chat(room=ROOM, user=USER, text=TEXT).model_dump_json()
        )


@asynccontextmanager
async def faststream(port: int, concurrent: int) -> AsyncIterator[Publish]:
    """The broker, logging off."""
    from faststream.redis import RedisBroker

    settings: dict[str, Any] = {"logger": None}
    if concurrent > 1:
        settings["max_connections"] = concurrent
    async with RedisBroker(f"redis://127.0.0.1:{port}", **settings) as broker:
        yield lambda: broker.publish(Chat(room=ROOM, user=USER, text=TEXT), channel=CHANNEL)


@asynccontextmanager
async def valkey_glide(port: int, concurrent: int) -> AsyncIterator[Publish]:
    """The client, its defaults: one multiplexed connection, driven by Rust threads."""
    from glide import GlideClient, GlideClientConfiguration, NodeAddress

    client = await GlideClient.create(GlideClientConfiguration([NodeAddress("127.0.0.1", port)]))
    yield lambda: client.publish(Chat(room=ROOM, user=USER, text=TEXT).model_dump_json(), CHANNEL)
    await client.close()


Contestant = Callable[[int, int], AbstractAsyncContextManager[Publish]]

CONTESTANTS: dict[str, Contestant] = {
    "eventbus": eventbus,
    "eventbus_uvloop": eventbus,
    "redis_py": redis_py,
    "faststream": faststream,
    "valkey_glide": valkey_glide,
}


async def together(publish: Publish, messages: int, concurrent: int) -> None:
    """``messages`` publishes, shared evenly by ``concurrent`` tasks."""

    async def loop(times: int) -> None:
        for _ in range(times):
            await publish()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrent):
            tasks.create_task(loop(messages // concurrent))


async def published(port: int) -> int:
    """How many PUBLISH commands the server has executed."""
    from redis.asyncio import Redis

    async with Redis.from_url(f"redis://127.0.0.1:{port}") as client:
        commands = await client.info("commandstats")
    return int(commands.get("cmdstat_publish", {"calls": 0})["calls"])


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    port, messages, concurrent = options.port, options.messages, options.concurrent
    async with CONTESTANTS[options.name](port, concurrent) as publish:
        await together(publish, concurrent * 5 + 200, concurrent)  # connections, caches
        before = await published(port)
        begin = spent()
        with profiled(options.profile):
            await together(publish, messages, concurrent)
        end = spent()
        arrived = await published(port) - before
    return {
        "messages": messages,
        "received": arrived,
        "complete": 0 <= arrived - messages <= 3,  # a heartbeat of ours may fall in between
    } | costs(begin, end, messages)


def new_loop(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop for a contestant that says so in its name."""
    if not name.endswith("_uvloop"):
        return asyncio.new_event_loop
    from uvloop import new_event_loop

    return new_event_loop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("port", type=int)
    parser.add_argument("messages", type=int)
    parser.add_argument("concurrent", type=int)
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=new_loop(options.name)) as runner:
        print(json.dumps(runner.run(measure(options))))


if __name__ == "__main__":
    main()
