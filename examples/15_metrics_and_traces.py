"""Metrics and traces: what Prometheus reads, and one trace from the publish to the handler.

It prints:

    publish order:{number} PRODUCER
    process order:{number} CONSUMER error.type=ValueError
    one trace: True, and the handler's parent is the publish: True
    eventbus_published_total{bus="shop"} 1.0
    eventbus_handler_failed_total{bus="shop",handler="pack"} 1.0
    eventbus_up{bus="shop"} 1.0
    eventbus_handler_duration_seconds_count{bus="shop",handler="pack",pattern="order:{number}"} 1.0
"""

import asyncio
import os

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from eventbus import Event, EventBus, Message
from eventbus.otel import instrument
from eventbus.prometheus import Collector

SHOWN = (
    "eventbus_up{",
    "eventbus_published_total{",
    "eventbus_handler_failed_total{",
    "eventbus_handler_duration_seconds_count{",
)


class OrderPlaced(Event, channel="order:{number}"):
    number: int


# A real program exports to a collector: provider and exporter are OpenTelemetry's business.
memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))

bus = EventBus(os.environ.get("EVENTBUS_URL", "memory://shop"))
instrument(bus, provider)
Collector(bus, "shop", durations=True)
failed = asyncio.Event()


@bus.on(OrderPlaced)
async def pack(event: OrderPlaced) -> None:
    raise ValueError(f"nothing left for {event}")  # the text reaches no span: it holds the event


@bus.exception_handler(ValueError)
async def note(error: ValueError, message: Message[OrderPlaced]) -> None:
    failed.set()


async def main() -> None:
    async with bus:
        await bus.publish(OrderPlaced(number=7))
        await failed.wait()
        metrics = generate_latest().decode()

    spans = {span.name.split()[0]: span for span in memory.get_finished_spans()}
    published, handled = spans["publish"], spans["process"]
    print(published.name, published.kind.name)
    print(handled.name, handled.kind.name, f"error.type={handled.attributes['error.type']}")
    same = handled.context.trace_id == published.context.trace_id
    child = handled.parent.span_id == published.context.span_id
    print(f"one trace: {same}, and the handler's parent is the publish: {child}")
    for line in metrics.splitlines():
        if line.startswith(SHOWN):
            print(line)


asyncio.run(main())
