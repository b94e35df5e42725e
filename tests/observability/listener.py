"""A process that traces what it handles: `listener.py URL`.

It prints "ready" when it listens, handles one message, prints its span as JSON, and ends.
"""

from __future__ import annotations

import asyncio
import sys

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from eventbus import Event, EventBus
from eventbus.otel import instrument


class MessageSent(Event, channel="chat:{room}"):
    room: str
    text: str


async def main(url: str) -> None:
    """Handle one message."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    trace.set_tracer_provider(provider)
    bus = EventBus(url)
    instrument(bus)
    handled = asyncio.Event()

    @bus.on(MessageSent)
    async def show(event: MessageSent) -> None:
        handled.set()

    async with bus:
        print("ready", flush=True)
        await handled.wait()
    (span,) = memory.get_finished_spans()
    print(span.to_json(indent=None), flush=True)


asyncio.run(main(sys.argv[1]))
