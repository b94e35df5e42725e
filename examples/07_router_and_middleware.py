"""Routers, middleware and exception handlers: a bus for more than one file.

It prints:

    request r-1 -> chat:lobby
    show: [lobby] hi
    request r-1 -> chat:lobby
    broken failed on chat:lobby: ValueError('no such user')
"""

import asyncio
import contextvars
import os
from collections.abc import Awaitable, Callable
from typing import Any

from eventbus import Event, EventBus, Message, Router

request = contextvars.ContextVar("request", default="none")


class MessageSent(Event, channel="chat:{room}"):
    room: str
    text: str


shown = asyncio.Event()


# chat.py: the handlers of one module, without a bus
chat = Router(prefix="chat:")


@chat.on("{room}")
async def show(event: MessageSent, room: str) -> None:
    print(f"show: [{room}] {event.text}")
    shown.set()


@chat.on("*")
async def broken(event: MessageSent) -> None:
    await shown.wait()
    raise ValueError("no such user")


# app.py: the bus takes them over
bus = EventBus(os.environ.get("EVENTBUS_URL", "memory://router"))
bus.include_router(chat)

Next = Callable[[Message[Any]], Awaitable[Any]]


@bus.middleware("publish")
async def stamp(message: Message[Any], call_next: Next) -> Any:
    return await call_next(message.with_headers(request=request.get()))


@bus.middleware("receive")
async def restore(message: Message[Any], call_next: Next) -> Any:
    request.set(str(message.headers["request"]))
    print(f"request {request.get()} -> {message.channel}")
    return await call_next(message)


@bus.exception_handler(ValueError)
async def complain(error: ValueError, message: Message[Any]) -> None:
    print(f"broken failed on {message.channel}: {error!r}")


async def main() -> None:
    async with bus:
        request.set("r-1")
        await bus.publish(MessageSent(room="lobby", text="hi"))


asyncio.run(main())
