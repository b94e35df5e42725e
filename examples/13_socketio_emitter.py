"""A Python service speaks to the clients of Socket.IO servers on Node.js. A handler stands in for
those servers here, and prints what they are told.

It prints:

    socket.io#/# ['news', {'text': 'hello'}] to everyone except nobody
    socket.io#/#order-7# ['status', 'shipped'] to ['order-7'] except nobody
    socket.io#/# ['map', b'PNG'] to ['order-7', 'order-8'] except ['muted']
    socket.io-request#/admin# {"type":2,"opts":{"rooms":["order-7"],"except":[]},"rooms":["vip"]}
    1 server heard it
"""

import asyncio
import os

import ormsgpack

from eventbus import EventBus
from eventbus.socketio import Emitter

bus = EventBus(os.environ.get("EVENTBUS_URL", "memory://socketio-emitter"))
emitter = Emitter(bus)


@bus.on("{channel:path}", wire="bare")
async def node(channel: str, data: bytes) -> None:
    if data.startswith(b"{"):
        print(channel, data.decode())
        return
    _, packet, options = ormsgpack.unpackb(data)
    rooms = options["rooms"] or "everyone"
    print(channel, packet["data"], "to", rooms, "except", options["except"] or "nobody")


async def main() -> None:
    async with bus:
        await emitter.emit("news", {"text": "hello"})
        await emitter.to("order-7").emit("status", "shipped")
        await emitter.to("order-7", "order-8").except_("muted").emit("map", b"PNG")
        receipt = await emitter.of("/admin").to("order-7").sockets_join("vip")
    print(receipt.receivers, "server heard it")


asyncio.run(main())
