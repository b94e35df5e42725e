"""What metrics need of the engine: counters that never go back, and looks from any thread."""

from __future__ import annotations

import asyncio

from eventbus import Event, EventBus
from tests.helpers import soon


class Note(Event, channel="note:{number}"):
    number: int


async def test_counters_do_not_go_back_while_a_handler_is_detached() -> None:
    """What was delivered stays counted while `detach` waits for a handler that takes its time."""
    bus = EventBus("memory://stats-detach")
    begun, cancelled, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(event: Note) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await go.wait()

    async with bus:
        route = await bus.attach(slow, "note:*")
        await bus.publish(Note(number=1))
        await soon(begun.wait())
        before = bus.stats().delivered
        detaching = asyncio.create_task(route.detach())
        await soon(cancelled.wait())
        during = bus.stats().delivered
        go.set()
        await soon(detaching)
        assert (before, during, bus.stats().delivered) == (1, 1, 1)
