"""What metrics and traces cost: CPU for one event, published and handled in one process.

    python -m benchmarks.observability [--messages 5000] [--runs 5] [--out FILE]

One bus publishes a 150-byte event, 100 at a time, on a real server, and handles it in a function
that does nothing. The variants run in turn, `--runs` times; a ratio is the median of the ratios
within one turn, so that a slow moment hits all of them. "middleware" is a publish and a receive
middleware that do nothing: what opening the two doors costs by itself. The spans go to a processor
that drops them: exporting is another package's work.
"""

import argparse
import asyncio
import json
import platform
import secrets
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry

from eventbus import Event, EventBus
from eventbus.otel import instrument
from eventbus.prometheus import Collector

from .runs import new_server
from .workload import USER, text

BATCH = 100
PACKAGES = ("eventbus-redis", "opentelemetry-sdk", "prometheus-client", "redis", "pydantic")
ROOM = "room-1"


class MessageSent(Event, channel="chat:{room}"):
    room: str
    user: str
    text: str


EVENT = MessageSent(room=ROOM, user=USER, text=text(ROOM))


def nothing(bus: EventBus) -> None:
    """The bus as it is."""


def middleware(bus: EventBus) -> None:
    """Both doors opened, and nobody goes through."""

    async def through(message: Any, call_next: Any) -> Any:
        return await call_next(message)

    bus.middleware("publish")(through)
    bus.middleware("receive")(through)


def collector(bus: EventBus) -> None:
    """Counters and health, which nobody scrapes during the run."""
    Collector(bus, registry=CollectorRegistry())


def durations(bus: EventBus) -> None:
    """Handler calls are timed, too."""
    Collector(bus, durations=True, registry=CollectorRegistry())


def otel_api(bus: EventBus) -> None:
    """The API without an SDK."""
    instrument(bus, NoOpTracerProvider())


def otel_unsampled(bus: EventBus) -> None:
    """The SDK, and a sampler that takes none."""
    instrument(bus, TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False))


def otel_all(bus: EventBus) -> None:
    """The SDK, and every span is recorded."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanProcessor())
    instrument(bus, provider)


VARIANTS: dict[str, Callable[[EventBus], None]] = {
    "nothing": nothing,
    "middleware": middleware,
    "collector": collector,
    "durations": durations,
    "otel, API alone": otel_api,
    "otel, none sampled": otel_unsampled,
    "otel, all sampled": otel_all,
}


async def cost(url: str, prepare: Callable[[EventBus], None], messages: int) -> float:
    """Microseconds of CPU for one event."""
    bus = EventBus(url, namespace=secrets.token_hex(4))
    prepare(bus)
    handled, all_handled = 0, asyncio.Event()

    @bus.on("chat:*")
    async def handle(event: MessageSent) -> None:
        nonlocal handled
        handled += 1
        if handled == messages:
            all_handled.set()

    async with bus, asyncio.timeout(120):
        begin = process_time()
        for _ in range(messages // BATCH):
            await asyncio.gather(*(bus.publish(EVENT) for _ in range(BATCH)))
        await all_handled.wait()
        return (process_time() - begin) / messages * 1e6


def main() -> None:
    """Run everything, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.observability")
    parser.add_argument("--messages", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    messages = max(options.messages // BATCH, 1) * BATCH
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with new_server() as server:
        asyncio.run(cost(server.url, otel_all, messages))  # imports and caches: not counted
        for _ in range(options.runs):
            for name, prepare in VARIANTS.items():
                found[name].append(asyncio.run(cost(server.url, prepare, messages)))
    plain = found["nothing"]
    for name, costs in found.items():
        ratio = median(own / base for own, base in zip(costs, plain, strict=True))
        print(f"{name:20} {median(costs):8.1f} µs CPU an event {ratio:8.2f} ×")
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    if options.out:
        result = {"messages": messages, "versions": versions, "cpu_us": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
