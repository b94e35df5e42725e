"""`eventbus bench`: how fast this server and this machine are for this bus, just now.

One process publishes and receives by itself, so the two share a CPU: the figures say what to
expect here, not what the bus can do. `benchmarks/` in the source compares it with other clients.
"""

from __future__ import annotations

import asyncio
import platform
import secrets
import time
from collections import deque
from importlib.metadata import version

from eventbus import Event, EventBus
from eventbus.cli.apps import load_bus, open_bus, place
from eventbus.cli.terminal import FAILED, OK, Terminal

_WINDOW = 100  # publishes under way at a time
_ROUNDS = 500
_GRACE = 5.0  # seconds for the last messages to arrive


class Tick(Event, type="bench"):
    """About 150 bytes with its envelope and a chat message's worth of text."""

    number: int
    text: str = "the quick brown fox jumps over the lazy dog"


async def bench(
    seconds: float, url: str | None = None, namespace: str | None = None, app: str | None = None
) -> int:
    """Measure for about this long. FAILED when not every message arrived."""
    bus = open_bus(url, namespace, load_bus(app) if app else None, publish_timeout=10.0)
    channel = f"eventbus-bench:{secrets.token_hex(4)}"
    terminal = Terminal()
    arrived: deque[float] = deque(maxlen=1)
    received = 0
    grew = asyncio.Event()

    @bus.on(channel, max_queue=100_000)
    async def take(event: Tick) -> None:  # noqa: ARG001 (it asks for the decoding)
        nonlocal received
        received += 1
        arrived.append(time.perf_counter())
        grew.set()

    async with bus:
        trips: list[float] = []
        until = time.perf_counter() + seconds / 2
        while len(trips) < _ROUNDS and time.perf_counter() < until:
            grew.clear()
            began = time.perf_counter()
            await bus.publish(channel, Tick(number=len(trips)))
            async with asyncio.timeout(_GRACE):
                await grew.wait()
            trips.append(arrived[0] - began)
        alone = received
        began = time.perf_counter()
        sent = await flood(bus, channel, until=began + seconds)
        published = time.perf_counter() - began
        waited = time.perf_counter() + _GRACE
        while received < alone + sent and time.perf_counter() < waited:
            grew.clear()
            with_limit = asyncio.wait_for(grew.wait(), _GRACE)
            try:
                await with_limit
            except TimeoutError:
                break
        took = arrived[0] - began
        stats = bus.stats()
        info = await server_of(bus)
    trips.sort()
    half, most = trips[len(trips) // 2], trips[int(len(trips) * 0.99)]
    terminal.line(f"server    {info} at {place(bus)}")
    terminal.line(
        f"client    eventbus {version('eventbus-redis')}, Python {platform.python_version()},"
        f" {platform.machine()}"
    )
    terminal.line(
        f"latency   {half * 1e6:,.0f} µs median, {most * 1e6:,.0f} µs for 99 of 100"
        f" (publish to handler, {len(trips)} one by one)"
    )
    terminal.line(
        f"publish   {sent / published:,.0f} events/s ({sent:,} events, {_WINDOW} at a time)"
    )
    terminal.line(
        f"receive   {(received - alone) / took:,.0f} events/s by a typed handler meanwhile"
    )
    lost = alone + sent - received
    terminal.line(f"lost      {lost:,} ({stats.dropped:,} dropped, {stats.missed:,} missed)")
    return FAILED if lost else OK


async def flood(bus: EventBus, channel: str, *, until: float) -> int:
    """Publish as fast as the answers come, so many at a time; returns how many."""
    sent = 0

    async def one_after_another() -> None:
        nonlocal sent
        while time.perf_counter() < until:
            sent += 1
            await bus.publish(channel, Tick(number=sent))

    async with asyncio.TaskGroup() as group:
        for _ in range(_WINDOW):
            group.create_task(one_after_another())
    return sent


async def server_of(bus: EventBus) -> str:
    """Name and version of the server."""
    try:
        info = await bus.redis().info("server")
    except Exception:  # a user may be denied INFO
        return "a server that does not say its version"
    name = str(info.get("server_name", "redis")).capitalize()
    return f"{name} {info.get(f'{name.lower()}_version', info.get('redis_version'))}"
