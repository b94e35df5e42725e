"""Presence: who is online, on whichever node and device, and no ghosts of a node that dies.

It starts a server of its own when EVENTBUS_URL names none: the sessions live in Redis.

It prints:

    ana is online, on 2 devices
    a view sees: ana
    ana left the laptop, and is still online
    ana has gone
    nobody is online
"""

import asyncio
import os

from eventbus import EventBus
from eventbus.presence import Presence, UserOffline, UserOnline
from eventbus.server import Server


class Node:
    def __init__(self, url: str) -> None:
        self.bus = EventBus(url)
        self.presence = Presence(self.bus, linger=0.1)
        self.gone = asyncio.Event()
        self.bus.on(UserOffline)(self.farewell)

    async def farewell(self, event: UserOffline) -> None:
        self.gone.set()


async def main(url: str) -> None:
    one, two = Node(url), Node(url)
    async with one.bus, one.presence, two.bus, two.presence, two.presence.watch() as view:
        async with one.presence.track("ana", meta={"device": "phone"}):
            async with two.presence.track("ana", meta={"device": "laptop"}):
                devices = await one.presence.get("ana")
                print("ana is online, on", len(devices), "devices")
                change = await anext(view)
                assert isinstance(change, UserOnline)
                print("a view sees:", ", ".join(view))
            assert await two.presence.list() == ["ana"]
            print("ana left the laptop, and is still online")
        await one.gone.wait()
        print("ana has gone")
        assert isinstance(await anext(view), UserOffline)
        print(", ".join(view) or "nobody", "is online")


if url := os.environ.get("EVENTBUS_URL"):
    asyncio.run(main(url))
else:
    with Server() as server:
        asyncio.run(main(server.url))
