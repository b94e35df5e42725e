"""Faults, with `Manager` and with the `AsyncRedisManager` that comes with python-socketio.

    python -m tests.socketio.compare

Each line is one fault on two servers of their own; what it says is what a client saw. The table of
docs/socketio.md comes from here. Nothing judges: it is run by people.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from time import monotonic
from typing import Any

import redis.asyncio
import socketio
from anyio.lowlevel import checkpoint

from eventbus import EventBus
from eventbus.server import Server
from eventbus.socketio import Manager
from tests.socketio.stage import Guest, Hall, guest, servers

WAIT = 5.0
"""Seconds after which what has not come is said to be missing."""
OURS: dict[str, Any] = {}
THEIRS: dict[str, Any] = {"theirs": True}


@asynccontextmanager
async def pair(options: dict[str, Any]) -> AsyncIterator[tuple[Server, Hall]]:
    """A Redis, two servers, and a guest on each; both managers are known to listen."""
    with Server(port=0) as server:
        many = {} if "fork" in options else {"count": 2}
        async with (
            servers(server.url, **many, **options) as (one, two),
            guest(one, "all") as first,
            guest(two, "all") as second,
        ):
            hall = Hall("/", [one, two], [first, second])
            if "fork" not in options:
                for number in (0, 1):
                    await meet(hall, number)
            yield server, hall


async def meet(hall: Hall, number: int) -> None:
    """Emit until the guest on the other server hears it."""
    async with asyncio.timeout(60):
        while not await came(hall.guests[1 - number], ("meet",), 0.2):
            await hall.emit("'meet'", number)
    for found in hall.guests:
        found.seen.clear()


async def came(found: Guest, wanted: tuple[Any, ...], within: float = WAIT) -> bool:
    """Whether a guest hears this in time."""
    try:
        async with asyncio.timeout(within):
            while wanted not in found.seen:
                await checkpoint()
    except TimeoutError:
        return False
    return True


async def forked(options: dict[str, Any]) -> str:
    """Two servers that were forked from one process, with one manager."""
    async with pair(options | {"fork": 2}) as (_, hall):
        start = monotonic()
        while not (heard := await came(hall.guests[1], ("hi",), 0.2)):
            await hall.emit("'hi'")
            if monotonic() - start > WAIT:
                break
        return "they hear each other" if heard else "the other server hears nothing"


async def bytes_in_answers(options: dict[str, Any]) -> str:
    """A client of the other server answers a call with bytes."""
    async with pair(options) as (_, hall):
        hall.guests[1].answer = b"\x00"
        words = f"call('ok?', to={hall.guests[1].sid!r}, timeout={WAIT})"
        try:
            await hall.run(words)
        except RuntimeError as error:
            return f"the call ends with {error}".rstrip(": ")
        return "the call brings them"


async def callback_that_calls(options: dict[str, Any]) -> str:
    """A callback waits for the answer of a client of the other server."""
    async with pair(options) as (_, hall):
        hall.guests[1].answer = "yes"
        sid = hall.guests[1].sid
        lines = [
            "done = asyncio.Event()",
            "async def called(answer):",
            f"    names['again'] = await sio.call('b', to={sid!r}, timeout={WAIT})",
            "    done.set()",
            "async def wait():",
            f"    async with asyncio.timeout({WAIT}): await done.wait()",
        ]
        await hall.servers[0]("\n".join(lines))
        await hall.emit(f"'a', to={sid!r}, callback=called")
        try:
            await hall.servers[0]("await wait()")
        except RuntimeError:
            return "its call is never answered"
        return "its call is answered"


async def slow_handler(options: dict[str, Any]) -> str:
    """A handler for a disconnect that was ordered by the other server waits."""
    async with pair(options) as (_, hall):
        await hall.servers[1]("hold = asyncio.Event()")
        await hall.run(f"disconnect({hall.guests[1].sid!r})")
        await hall.servers[1].until("left")
        async with guest(hall.servers[1]) as other:
            await hall.emit("'hi'")
            heard = await came(other, ("hi",))
            await hall.servers[1]("hold.set(); names.pop('hold')")
        return "emits go on" if heard else "the server hears nothing until the handler ends"


async def nonsense(options: dict[str, Any]) -> str:
    """What is valid JSON and no message, every twenty emits."""
    async with pair(options) as (server, hall):
        channel = "socketio" if options else "socketio:all"
        client = redis.asyncio.Redis.from_url(server.url)
        for number in range(200):
            if number % 20 == 10:
                await client.publish(channel, "5")
            await hall.emit(f"'hi', {number}")
        await client.aclose()
        await came(hall.guests[1], ("hi", 199))
        heard = len({event for event in hall.guests[1].seen if event[0] == "hi"})
        return f"{heard} of 200 emits arrive"


async def not_meant(options: dict[str, Any]) -> str:
    """Emits from outside to a room without a member."""
    async with pair(options) as (server, hall):
        used = "__import__('time').process_time()"
        data = {"text": "x" * 500, "numbers": list(range(100))}
        bus = EventBus(server.url)
        outside: Any = Manager(bus, write_only=True)
        if options:
            outside = socketio.AsyncRedisManager(server.url, write_only=True)
        async with bus:
            before = await hall.servers[1](used)
            for _ in range(250):
                await asyncio.gather(*(outside.emit("hi", data, room="nobody") for _ in range(20)))
            await outside.emit("over", None)
            await came(hall.guests[1], ("over",), 60.0)
            spent = (await hall.servers[1](used) - before) / 5000
        if options:
            await outside.redis.aclose()
        return f"{spent * 1e6:.0f} µs of CPU for each"


async def frozen(options: dict[str, Any]) -> str:
    """Redis answers nothing."""
    async with pair(options) as (server, hall):
        server.freeze()
        start = monotonic()
        emitting = asyncio.create_task(hall.emit("'hi'"))
        local = await came(hall.guests[0], ("hi",))
        done, _ = await asyncio.wait({emitting}, timeout=20.0)
        took = f"returns after {monotonic() - start:.1f} s" if done else "has not returned in 20 s"
        server.thaw()
        await asyncio.wait({emitting})
        return f"clients here hear it: {local}; the emit {took}"


async def restarted(options: dict[str, Any]) -> str:
    """Redis is gone, and comes back."""
    async with pair(options) as (server, hall):
        server.kill()
        start, slowest = monotonic(), 0.0
        while monotonic() - start < 10.0:
            before = monotonic()
            await hall.emit("'away'")
            slowest = max(slowest, monotonic() - before)
        server.start()
        start = monotonic()
        while not await came(hall.guests[1], ("meet",), 0.1):
            await hall.emit("'meet'")
        gaps = await hall.servers[1]("gaps")
        told = "the app was told" if gaps else "the app was not told"
        waited = monotonic() - start
        return f"heard again after {waited:.1f} s, {told}; slowest emit {slowest:.1f} s"


FAULTS: dict[str, Callable[[dict[str, Any]], Awaitable[str]]] = {
    "made before a fork": forked,
    "bytes in an answer": bytes_in_answers,
    "a callback that calls": callback_that_calls,
    "a slow disconnect handler": slow_handler,
    "the JSON text 5 on the channel": nonsense,
    "emits of 1 KB to nobody": not_meant,
    "Redis frozen": frozen,
    "Redis away for 10 s": restarted,
}


async def main() -> None:
    """Print the table."""
    names = ("python-socketio", "redis", "aiohttp")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print("| fault | `AsyncRedisManager` | `Manager` |\n|---|---|---|")
    for name, run in FAULTS.items():
        print(f"| {name} | {await run(THEIRS)} | {await run(OURS)} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
