"""Right programs: both type checkers must accept every line, and see these types. Never run."""

from __future__ import annotations

from typing import Any, assert_type

from eventbus import Buffer, Event, EventBus, Gap, Health, Message, Receipt, Route, Router, Stats


class MessageSent(Event, type="chat.message-sent", channel="chat:{room}"):
    room: str
    text: str


class Typing(Event, channel="chat:{room}"):
    room: str


bus = EventBus("memory://x", outage=Buffer(max_events=10), namespace="staging", heartbeat=None)
router = Router(prefix="chat:")


@bus.on("chat:*", MessageSent, concurrency=4, order_by="channel", overflow="drop_newest")
async def audit(event: MessageSent) -> int:
    assert_type(event.text, str)
    return 1


@bus.on(MessageSent)
def in_a_thread(event: MessageSent | Typing, room: str) -> str:
    return room


@router.on("{room}", timeout=1.0, echo=False, wire="bare")
async def bare(event: dict[str, Any], message: Message[Any], room: str, on: EventBus) -> None: ...


@bus.on_gap("cache:*")
async def gap(gap: Gap) -> None:
    assert_type(gap.missed, int | None)


@bus.exception_handler(ValueError)
async def failed(error: ValueError, message: Message[Any]) -> None: ...


async def main() -> None:
    assert_type(await audit(MessageSent(room="a", text="b")), int)  # on() returned it unchanged
    assert_type(in_a_thread(Typing(room="a"), "a"), str)
    bus.include_router(router, prefix="v1:")
    async with bus as same:
        assert_type(same, EventBus)
        assert_type(await bus.publish("chat:a", MessageSent(room="a", text="b")), Receipt)
        assert_type(await bus.publish(MessageSent(room="a", text="b")), Receipt)
        assert_type(bus.publish_nowait(Typing(room="a")), str)
        assert_type(await bus.publish_raw("x", b"y"), Receipt)
        route = await bus.attach(audit, "chat:*", MessageSent, max_queue=5)
        assert_type(route, Route)
        await route.add("a:*", Typing)
        await route.discard("a:*")
        await route.detach()
        async with bus.subscribe("chat:*", MessageSent) as messages:
            assert_type(messages.dropped, int)
            async for message in messages:
                assert_type(message, Message[MessageSent])
                assert_type(message.event.text, str)
                assert_type(message.with_headers(trace="x"), Message[MessageSent])
        async with bus.subscribe(MessageSent) as typed:
            async for message in typed:
                assert_type(message.event, MessageSent)
        async with bus.subscribe("chat:*") as plain:
            async for some in plain:
                assert_type(some.event, dict[str, Any])
        found = await bus.expect("chat:*", MessageSent, timeout=1, where=lambda m: bool(m.id))
        assert_type(found, Message[MessageSent])
        assert_type(await bus.expect(Typing, timeout=1), Message[Typing])
        assert_type(bus.health(), Health)
        assert_type(bus.stats(), Stats)
        assert_type(bus.stats().handlers["audit"].dropped, int)
