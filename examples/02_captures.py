"""Patterns: what is in braces is captured, converted, and handed to the handler.

Two handlers see the first message; `chat:*` covers both patterns, so Redis sends it once. Each
handler has its own queue: order holds within a handler, not between two.

It prints:

    audit: chat:42:general
    show: tenant 42, room general, from alice
    audit: chat:acme:general
    files: ('docs', 'a/b.txt')
"""

import asyncio
import os

from eventbus import Event, EventBus, Message


class MessageSent(Event, channel="chat:{tenant}:{room}"):
    tenant: str
    room: str
    user: str


class FileChanged(Event):
    size: int


bus = EventBus(os.environ.get("EVENTBUS_URL", "memory://captures"))


@bus.on("chat:*")
async def audit(message: Message[MessageSent]) -> None:
    print("audit:", message.channel)


@bus.on("chat:{tenant}:{room}")
async def show(event: MessageSent, tenant: int, room: str) -> None:
    # "acme" is no int: that message is not for this handler (it is counted as skipped).
    print(f"show: tenant {tenant}, room {room}, from {event.user}")


@bus.on("files:{share}:{path:path}")  # :path takes several segments
async def files(event: FileChanged, share: str, path: str) -> None:
    print("files:", (share, path.replace(":", "/")))


async def main() -> None:
    async with bus:
        await bus.publish(MessageSent(tenant="42", room="general", user="alice"))
        await bus.publish(MessageSent(tenant="acme", room="general", user="bob"))
        await bus.publish("files:docs:a:b.txt", FileChanged(size=3))


asyncio.run(main())
