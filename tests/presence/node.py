"""A node of its own, for tests that kill one: `node.py URL TTL FIRST COUNT` tracks so many users.

It prints "ready" when Redis knows all of them, and stays until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

from eventbus import EventBus
from eventbus.presence import Presence


async def main(url: str, ttl: float, first: int, number: int) -> None:
    """Track them until the process is ended."""
    bus = EventBus(url)
    presence = Presence(bus, ttl=ttl)
    async with bus, presence, AsyncExitStack() as stack:
        users = [f"user-{n}" for n in range(first, first + number)]
        await asyncio.gather(*(stack.enter_async_context(presence.track(user)) for user in users))
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
