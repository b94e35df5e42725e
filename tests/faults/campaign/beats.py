"""What the beat costs and what it finds, with 100, 10,000 and 100,000 channels that change."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from eventbus import Event, EventBus, Gap
from eventbus._beats import Announcer, Listener
from eventbus._sequences import Inbound
from tests.faults.controller import Controller

SIZES = (100, 10_000, 100_000)
HEARTBEAT = 1.0
_LIMIT = 60.0


class Text(Event):
    text: str


def costs(channels: int) -> dict[str, Any]:
    """Bytes and CPU of one heartbeat in which all these channels changed, at both ends."""
    announcer = Announcer("shop/0123456789abcdef", 0)
    names = [b"chat:room-%d" % n for n in range(channels)]
    for name in names:
        announcer.take(name)
    before = time.process_time()
    beats = announcer.beats()
    said = time.process_time() - before
    inbound = Inbound()
    listener = Listener(inbound, lambda channel: True, lambda *missed: None)
    for name in names:
        inbound.hear(name, b"shop/0123456789abcdef", 1)
    before = time.process_time()
    slowest = 0.0
    for beat in beats:
        began = time.perf_counter()
        listener.hear(beat.payload, b"other/0")
        slowest = max(slowest, time.perf_counter() - began)
    heard = time.process_time() - before
    return {
        "announced": sum(len(beat.last) for beat in beats),
        "messages": len(beats),
        "bytes": sum(len(beat.payload) for beat in beats),
        "source_ms": round(said * 1000, 2),
        "receiver_ms": round(heard * 1000, 2),
        "slowest_ms": round(slowest * 1000, 2),
    }


async def finds(channels: int, *, beat: bool) -> dict[str, Any]:
    """How many of the last messages, one on each channel, are told when nothing follows them."""
    names = [f"chat:room-{n}" for n in range(channels)]
    told = 0
    with Controller(port=0) as server:
        bus = EventBus(server.url, heartbeat=HEARTBEAT, beat=beat, max_pending_bytes=1 << 30)
        source = EventBus(server.url, heartbeat=HEARTBEAT, beat=beat)

        @bus.on("chat:*", max_queue=10 * channels)
        async def hear(event: Text) -> None: ...

        @bus.on_gap("chat:*")
        async def gap(gap: Gap) -> None:
            nonlocal told
            told += gap.missed or 0

        async with bus, source:
            await asyncio.sleep(2.5 * HEARTBEAT)
            await _publish(source, names)
            await asyncio.sleep(2.5 * HEARTBEAT)
            await server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            lost = await _publish_while_away(source, bus, names)
            began = time.monotonic()
            found_at = None
            while time.monotonic() - began < _LIMIT:
                before = told
                await asyncio.sleep(HEARTBEAT / 10)
                if told > before:
                    found_at = time.monotonic()
                if told >= lost or time.monotonic() - (found_at or began) > 15 * HEARTBEAT:
                    break
            return {
                "lost": lost,
                "told": told,
                "heartbeats": round(((found_at or began) - began) / HEARTBEAT, 1),
            }


async def _publish(source: EventBus, names: list[str]) -> None:
    for start in range(0, len(names), 500):
        await asyncio.gather(
            *(source.publish(name, Text(text="x")) for name in names[start : start + 500])
        )


async def _publish_while_away(source: EventBus, bus: EventBus, names: list[str]) -> int:
    """Once on each channel while the receiver cannot come back; how many were lost."""
    run = bus._run
    assert run is not None
    endpoint = run.transport._endpoint
    opened = endpoint.open

    async def refuse() -> Any:
        raise OSError("kept away")

    endpoint.open = refuse
    while bus.health():  # noqa: ASYNC110 - health is polled
        await asyncio.sleep(0.01)
    await _publish(source, names)
    endpoint.open = opened
    return len(names)


async def measure() -> list[dict[str, Any]]:
    """A row for each size."""
    rows = []
    for channels in SIZES:
        row = {"channels": channels, **costs(channels)}
        row["with"] = await finds(channels, beat=True)
        row["without"] = await finds(channels, beat=False)
        print(row, flush=True)
        rows.append(row)
    return rows
