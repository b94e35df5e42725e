"""Hello: declare an event, handle it, publish it.

It prints:

    [lobby] alice: hi
    1 copy handed out
"""

import asyncio
import os

from eventbus import Event, EventBus


class MessageSent(Event, channel="chat:{room}"):
    room: str
    user: str
    text: str


bus = EventBus(os.environ.get("EVENTBUS_URL", "memory://hello"))


@bus.on("chat:{room}")
async def show(event: MessageSent, room: str) -> None:
    print(f"[{room}] {event.user}: {event.text}")


async def main() -> None:
    async with bus:  # connected, and every subscription confirmed by the server
        receipt = await bus.publish(MessageSent(room="lobby", user="alice", text="hi"))
    # Leaving the block waited for the handler.
    print(f"{receipt.receivers} copy handed out")


asyncio.run(main())
