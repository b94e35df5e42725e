"""Wrong programs: both type checkers must refuse every marked line. Never run.

`type: ignore` is for mypy and `pyright: ignore` for basedpyright; one that is not needed is an
error.
"""

from __future__ import annotations

from eventbus import Event, EventBus, Message


class MessageSent(Event, channel="chat:{room}"):
    room: str


class Plain:
    room: str


bus = EventBus(timeout=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
bus = EventBus(outage="wait")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@bus.on("chat:*", overflow="block")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def one(event: MessageSent) -> None: ...


@bus.on(Plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def two(event: MessageSent) -> None: ...


async def main() -> None:
    await bus.publish("chat:a")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await bus.publish("chat:a", {"room": "a"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await bus.publish("chat:a", MessageSent)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await bus.publish_raw("chat:a", "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.expect("chat:*", MessageSent)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    async with bus.subscribe("chat:*", MessageSent) as messages:
        async for message in messages:
            message.event.text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            _: Message[Plain] = message  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
            message.event = MessageSent(room="b")  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
