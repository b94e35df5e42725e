"""python-socketio: two servers, one chat. Both are in this process here; that changes nothing.

It needs `pip install 'eventbus-redis[socketio]' aiohttp`. A browser connects in the same way as the
clients here do, with the socket.io-client of its choice.

It prints:

    dora got hello ('everyone',)
    bob got hello ('everyone',)
    dora got news ('for the talk',)
    dora was asked rating
    dora gives 5 stars
    dora got bye ('from outside',)
    bob got bye ('from outside',)
"""

import asyncio
import os

import socketio
from aiohttp import web

from eventbus import EventBus
from eventbus.socketio import Manager

URL = os.environ.get("EVENTBUS_URL", "memory://socketio")


class Node:
    """What one process of a real deployment has: a bus, a manager, a server."""

    def __init__(self) -> None:
        self.manager = Manager(EventBus(URL))
        self.sio = socketio.AsyncServer(client_manager=self.manager, async_mode="aiohttp")
        self.app = web.Application()
        self.sio.attach(self.app)
        self.app.on_startup.append(self.manager.start)  # with ASGIApp: on_startup=manager.start
        self.app.on_cleanup.append(self.manager.stop)
        self.runner = web.AppRunner(self.app, access_log=None)

    async def start(self) -> str:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"


class Browser:
    def __init__(self, user: str) -> None:
        self.user = user
        self.heard = asyncio.Semaphore(0)
        self.io = socketio.AsyncClient()
        self.io.on("rating", self.rate)
        self.io.on("*", self.hear)

    async def hear(self, event: str, *data: object) -> None:
        print(self.user, "got", event, data)
        self.heard.release()

    async def rate(self) -> int:
        print(self.user, "was asked rating")
        return 5


async def main() -> None:
    one, two = Node(), Node()
    dora, bob = Browser("dora"), Browser("bob")
    await dora.io.connect(await one.start(), transports=["websocket"])
    await bob.io.connect(await two.start(), transports=["websocket"])
    sid = dora.io.get_sid()

    await one.sio.emit("hello", "everyone")
    await dora.heard.acquire()
    await bob.heard.acquire()

    await two.sio.enter_room(sid, "talk")  # dora is a client of the other server
    await two.sio.emit("news", "for the talk", room="talk")
    await dora.heard.acquire()

    print("dora gives", await two.sio.call("rating", to=sid), "stars")

    # A process without a server, such as a worker that has finished a job.
    bus = EventBus(URL)
    outside = Manager(bus, write_only=True)
    async with bus:
        await outside.emit("bye", "from outside")
    await dora.heard.acquire()
    await bob.heard.acquire()

    await dora.io.disconnect()
    await bob.io.disconnect()
    for node in (one, two):
        await node.sio.shutdown()
        await node.runner.cleanup()


asyncio.run(main())
