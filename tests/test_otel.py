"""Traces: one trace from publish to handler, names of few values, and no payload anywhere."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode

from eventbus import Event, EventBus, EventBusError, InvalidChannel, Message
from eventbus import otel as module
from eventbus.otel import instrument
from eventbus.server import Server
from tests.helpers import Seen, foreign, soon

ROOT = Path(__file__).parents[1]
LISTENER = ROOT / "tests" / "observability" / "listener.py"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "canary-4711"


class MessageSent(Event, channel="chat:{room}"):
    room: str
    text: str = ""


class Plain(Event):
    text: str = ""


class Spans:
    """What was traced, and the provider that it goes through."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        # What a stranger's flags say of sampling does not count here.
        self.provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))

    def all(self) -> list[ReadableSpan]:
        return list(self._memory.get_finished_spans())

    def of(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.all() if span.kind is kind]

    def one(self, kind: SpanKind) -> ReadableSpan:
        (span,) = self.of(kind)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Where the spans of one test go."""
    found = Spans()
    yield found
    found.provider.shutdown()


def context_of(span: ReadableSpan) -> trace.SpanContext:
    """Its context, which every span of the SDK has."""
    context = span.get_span_context()
    assert context is not None
    return context


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    """Its attributes."""
    return dict(span.attributes or {})


# -- One trace -------------------------------------------------------------------------------------


async def test_a_publish_and_its_handlers_are_one_trace(url: str, spans: Spans) -> None:
    """What a handler publishes, and what that causes, belongs to the trace of the first publish;
    each handler's span is a child of the publish, and linked to it."""
    bus = EventBus(url)
    instrument(bus, spans.provider)
    seen: Seen[str] = Seen()

    @bus.on("chat:*")
    async def answer(event: MessageSent) -> None:
        await bus.publish("log:chat", Plain())

    @bus.on("log:*")
    def log(event: Plain) -> None:
        inside = trace.get_current_span().get_span_context()
        loop.call_soon_threadsafe(seen.append, trace.format_trace_id(inside.trace_id))

    loop = asyncio.get_running_loop()
    tracer = spans.provider.get_tracer("test")
    async with bus:
        with tracer.start_as_current_span("request") as request:
            await bus.publish(MessageSent(room="r"))
        await seen.reach(1)

    first, second = spans.of(SpanKind.PRODUCER)
    answers, logs = spans.of(SpanKind.CONSUMER)
    if first.name != "publish chat:{room}":
        first, second = second, first
    if answers.name != "process chat:*":
        answers, logs = logs, answers
    parents = [request.get_span_context(), *map(context_of, (first, answers, second))]
    for span, parent in zip((first, answers, second, logs), parents, strict=True):
        assert span.parent is not None
        assert span.parent.span_id == parent.span_id, span.name
        assert context_of(span).trace_id == request.get_span_context().trace_id
    assert [link.context.span_id for link in answers.links] == [context_of(first).span_id]
    assert seen == [trace.format_trace_id(request.get_span_context().trace_id)]


async def test_a_trace_crosses_processes(server: Server, spans: Spans) -> None:
    """A publish here and the handler in another process have one trace id."""
    bus = EventBus(server.url)
    instrument(bus, spans.provider)
    command = [sys.executable, "-W", "error", str(LISTENER), server.url]
    listener = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=ROOT)
    assert listener.stdout is not None
    try:
        async with bus:
            assert await soon(listener.stdout.readline(), 40) == b"ready\n"
            await bus.publish(MessageSent(room="r", text=SECRET))
            line = await soon(listener.stdout.readline(), 40)
            assert await soon(listener.wait(), 40) == 0
    finally:
        if listener.returncode is None:
            listener.kill()
            await listener.wait()
    there, here = json.loads(line), context_of(spans.one(SpanKind.PRODUCER))
    assert there["context"]["trace_id"] == f"0x{trace.format_trace_id(here.trace_id)}"
    assert there["parent_id"] == f"0x{trace.format_span_id(here.span_id)}"
    assert (there["name"], there["kind"]) == ("process chat:{room}", "SpanKind.CONSUMER")
    assert SECRET not in line.decode()


async def test_publish_nowait_keeps_the_context(spans: Spans) -> None:
    """A publish that nobody awaits belongs to the span in which it was called."""
    bus = EventBus("memory://otel-nowait")
    instrument(bus, spans.provider)
    async with bus:
        with spans.provider.get_tracer("test").start_as_current_span("request") as request:
            bus.publish_nowait(MessageSent(room="r"))
    parent = spans.one(SpanKind.PRODUCER).parent
    assert parent is not None
    assert parent.span_id == request.get_span_context().span_id


async def test_a_handler_may_begin_its_own_trace(spans: Spans) -> None:
    """With `new_traces` a handler's span has no parent, another trace id, and the link alone."""
    bus = EventBus("memory://otel-new")
    instrument(bus, spans.provider, new_traces=True)
    seen: Seen[MessageSent] = Seen()

    @bus.on(MessageSent)
    async def show(event: MessageSent) -> None:
        seen.append(event)

    async with bus:
        await bus.publish(MessageSent(room="r"))
        await seen.reach(1)
    published, handled = spans.one(SpanKind.PRODUCER), spans.one(SpanKind.CONSUMER)
    assert handled.parent is None
    assert context_of(handled).trace_id != context_of(published).trace_id
    assert [link.context.span_id for link in handled.links] == [context_of(published).span_id]


async def test_a_context_that_was_given_stays(spans: Spans) -> None:
    """A `traceparent` that a middleware before ours has set is sent as it is; the publish is linked
    to it, and is no producer then."""
    bus = EventBus("memory://otel-given")
    given = f"00-{TRACE}-{SPAN}-01"
    seen: Seen[Message[MessageSent]] = Seen()

    @bus.middleware("publish")
    async def give(message: Message[Any], call_next: Callable[..., Any]) -> Any:
        return await call_next(message.with_headers(traceparent=given))

    instrument(bus, spans.provider)

    @bus.on(MessageSent)
    async def show(message: Message[MessageSent]) -> None:
        seen.append(message)

    async with bus:
        await bus.publish(MessageSent(room="r"))
        await seen.reach(1)
    assert seen[0].headers["traceparent"] == given
    assert spans.of(SpanKind.PRODUCER) == []
    (link,) = spans.one(SpanKind.CLIENT).links
    assert trace.format_trace_id(link.context.trace_id) == TRACE
    assert trace.format_trace_id(context_of(spans.one(SpanKind.CONSUMER)).trace_id) == TRACE


async def test_the_state_of_a_vendor_travels(spans: Spans) -> None:
    """`tracestate` reaches the handler's span with `traceparent`."""
    bus = EventBus("memory://otel-state")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    @bus.on("note")
    async def hear(event: dict[str, Any]) -> None:
        seen.append(event)

    async with bus:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1,other=2"}
        await bus.publish_raw("note", foreign({}, **headers))
        await seen.reach(1)
    context = context_of(spans.one(SpanKind.CONSUMER))
    assert trace.format_trace_id(context.trace_id) == TRACE
    assert context.trace_state.to_header() == "vendor=1,other=2"


# -- What strangers send ---------------------------------------------------------------------------

header = st.one_of(
    st.integers(-5, 5),
    st.booleans(),
    st.text(max_size=80),
    st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}", fullmatch=True),
    st.sampled_from(
        [
            f"00-{TRACE}-{SPAN}-01",
            f"ff-{TRACE}-{SPAN}-01",
            f"00-{'0' * 32}-{SPAN}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"00-{TRACE}-{SPAN}-01-more",
            "x" * 100_000,
        ]
    ),
)


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.lists(st.tuples(header, header), min_size=1, max_size=5))
def test_a_malformed_context_is_harmless(pairs: list[tuple[object, object]]) -> None:
    """Whatever a stranger writes into the two headers, each message is handled once, in a span."""
    asyncio.run(hear_them(pairs))


async def hear_them(pairs: list[tuple[object, object]]) -> None:
    """Send messages with these headers, and see that each is handled."""
    spans, seen = Spans(), Seen[object]()
    bus = EventBus("memory://otel-strangers")
    instrument(bus, spans.provider)

    @bus.on("note")
    async def hear(event: dict[str, Any]) -> None:
        seen.append(event)

    async with bus:
        for traceparent, tracestate in pairs:
            headers = {"traceparent": traceparent, "tracestate": tracestate}
            await bus.publish_raw("note", foreign({}, **headers))
        await seen.reach(len(pairs))
        assert bus.stats().failed == bus.stats().invalid == 0
    found = spans.of(SpanKind.CONSUMER)
    assert len(found) == len(pairs)
    for span, (traceparent, _) in zip(found, pairs, strict=True):
        if span.parent is not None:
            assert trace.format_span_id(span.parent.span_id) in str(traceparent)


async def test_a_stranger_fills_no_log(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    """Headers that are too long are passed over in silence: a stranger can send many."""
    bus = EventBus("memory://otel-silent")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    @bus.on("note")
    async def hear(event: dict[str, Any]) -> None:
        seen.append(event)

    async with bus:
        await bus.publish_raw("note", foreign({}, traceparent="0" * 1000))
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1," * 1000}
        await bus.publish_raw("note", foreign({}, **headers))
        await seen.reach(2)
    assert caplog.records == []


# -- Names and attributes --------------------------------------------------------------------------


async def test_channels_name_no_span(spans: Spans) -> None:
    """Spans are named by template, pattern or type: neither a channel nor a literal pattern, which
    a program may have made of one, nor the type of a stranger is found in a name."""
    bus = EventBus("memory://otel-names")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    async def hear(event: MessageSent) -> None:
        seen.append(event)

    async def plain(event: Plain) -> None:
        seen.append(event)

    async def untyped(event: dict[str, Any]) -> None:
        seen.append(event)

    async with bus:
        await bus.attach(hear, "chat:room-1", "deep:chat:{room}")
        await bus.attach(plain, "chat:room-1")
        await bus.attach(untyped, "foreign:1", r"foreign:\[2\]")
        await bus.publish(MessageSent(room="room-1"))
        await bus.publish("deep:chat:room-1", MessageSent(room="room-1"))
        await bus.publish("chat:room-1", Plain())
        await bus.publish_raw("foreign:1", foreign({}, type="type-1"))
        await bus.publish_raw("foreign:[2]", foreign({}, type="type-2"))
        await seen.reach(5)
    assert sorted(span.name for span in spans.all()) == [
        "process",
        "process",
        "process Plain",
        "process chat:{room}",
        "process deep:chat:{room}",
        "publish MessageSent",
        "publish Plain",
        "publish chat:{room}",
    ]
    shown = "".join(str(attributes_of(span)) for span in spans.all())
    assert "room-1" not in shown


async def test_patterns_that_name_spans_are_bounded(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns beyond the bound name their spans by the event, so that names do not grow."""
    monkeypatch.setattr(module, "_MAX_NAMES", 1)
    bus = EventBus("memory://otel-bound")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    @bus.on("a:*", "b:*")
    async def hear(event: Plain) -> None:
        seen.append(event)

    async with bus:
        for channel in ("a:1", "b:1", "a:2"):
            await bus.publish(channel, Plain())
        await seen.reach(3)
    names = [span.name for span in spans.of(SpanKind.CONSUMER)]
    assert names == ["process a:*", "process Plain", "process a:*"]


@pytest.mark.parametrize("channels", [False, True])
async def test_attributes_follow_the_conventions(spans: Spans, channels: bool) -> None:
    """Each attribute is one of OpenTelemetry's; the channel is there when it was asked for."""
    messaging = import_module("opentelemetry.semconv._incubating.attributes.messaging_attributes")
    cloud = import_module("opentelemetry.semconv._incubating.attributes.cloudevents_attributes")
    bus = EventBus("memory://otel-attributes", name="shop")
    instrument(bus, spans.provider, channels=channels)
    seen: Seen[Message[MessageSent]] = Seen()

    @bus.on(MessageSent)
    async def hear(message: Message[MessageSent]) -> None:
        seen.append(message)

    async with bus:
        source = bus.source
        await bus.publish(MessageSent(room="room-1"))
        await seen.reach(1)
    operations = {SpanKind.PRODUCER: ("publish", "send"), SpanKind.CONSUMER: ("process", "process")}
    for kind, (name, type) in operations.items():
        expected = {
            messaging.MESSAGING_SYSTEM: "redis",
            messaging.MESSAGING_OPERATION_NAME: name,
            messaging.MESSAGING_OPERATION_TYPE: type,
            messaging.MESSAGING_DESTINATION_TEMPLATE: "chat:{room}",
            messaging.MESSAGING_CLIENT_ID: source,
            messaging.MESSAGING_MESSAGE_ID: seen[0].id,
            cloud.CLOUDEVENTS_EVENT_SOURCE: source,
            cloud.CLOUDEVENTS_EVENT_TYPE: "MessageSent",
        }
        if channels:
            expected[messaging.MESSAGING_DESTINATION_NAME] = "chat:room-1"
        assert attributes_of(spans.one(kind)) == expected


async def test_long_and_odd_texts_are_cut(spans: Spans) -> None:
    """An id of a stranger that is very long is cut on the span."""
    bus = EventBus("memory://otel-long")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    @bus.on("note")
    async def hear(event: dict[str, Any]) -> None:
        seen.append(event)

    async with bus:
        await bus.publish_raw("note", foreign({}, id="ä" * 10_000))
        await seen.reach(1)
    assert attributes_of(spans.one(SpanKind.CONSUMER))["messaging.message.id"] == "ä" * 256


# -- Errors ----------------------------------------------------------------------------------------


async def test_errors_are_recorded_without_their_text(spans: Spans) -> None:
    """A handler's error, its timeout and a refused publish mark their span by the class of the
    error; what it says, which may be a payload, is nowhere on it. The error itself goes on."""
    bus = EventBus("memory://otel-errors")
    instrument(bus, spans.provider)
    errors: Seen[BaseException] = Seen()

    @bus.on(MessageSent)
    async def fail(event: MessageSent) -> None:
        raise ValueError(event.text)

    @bus.on(MessageSent, timeout=0.01)
    async def hang(event: MessageSent) -> None:
        await asyncio.Event().wait()

    @bus.exception_handler(Exception)
    async def keep(error: Exception, message: Message[Any]) -> None:
        errors.append(error)

    async with bus:
        await bus.publish(MessageSent(room="r", text=SECRET))
        await errors.reach(2)
        with pytest.raises(InvalidChannel):
            await bus.publish(f"{SECRET}\0", Plain())
    assert sorted(type(error).__name__ for error in errors) == ["TimeoutError", "ValueError"]
    failed = [span for span in spans.all() if span.status.status_code is StatusCode.ERROR]
    assert sorted(attributes_of(span)["error.type"] for span in failed) == [
        "TimeoutError",
        "ValueError",
        f"{InvalidChannel.__module__}.InvalidChannel",
    ]
    assert len(spans.all()) == 4
    assert SECRET not in "".join(span.to_json() for span in spans.all())


# -- On and off ------------------------------------------------------------------------------------


async def test_a_bare_wire_has_no_context(spans: Spans) -> None:
    """Without an envelope nothing can carry the context: both sides are traced, each by itself."""
    bus = EventBus("memory://otel-bare", wire="bare")
    instrument(bus, spans.provider)
    seen: Seen[object] = Seen()

    @bus.on(MessageSent)
    async def hear(event: MessageSent) -> None:
        seen.append(event)

    async with bus:
        await bus.publish(MessageSent(room="r"))
        await seen.reach(1)
    handled = spans.one(SpanKind.CONSUMER)
    assert (handled.parent, handled.links) == (None, ())
    assert handled.name == "process chat:{room}"
    assert spans.one(SpanKind.PRODUCER).name == "publish chat:{room}"


async def test_without_a_provider_nothing_is_added() -> None:
    """With the API alone (no SDK, no provider) events travel as they do without traces."""
    bus = EventBus("memory://otel-api")
    instrument(bus, trace.NoOpTracerProvider())
    seen: Seen[Message[MessageSent]] = Seen()

    @bus.on(MessageSent)
    async def hear(message: Message[MessageSent]) -> None:
        seen.append(message)

    async with bus:
        await bus.publish(MessageSent(room="r"))
        await seen.reach(1)
    assert dict(seen[0].headers) == {}


async def test_instrument_comes_before_the_start(spans: Spans) -> None:
    """A bus that runs cannot be instrumented any more, and says so."""
    async with EventBus("memory://otel-late") as bus:
        with pytest.raises(EventBusError, match="running"):
            instrument(bus, spans.provider)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without opentelemetry-api the function says which extra to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(EventBusError, match=r"pip install 'eventbus-redis\[otel\]'"):
        instrument(EventBus("memory://otel-missing"))


@pytest.mark.parametrize("name", ["eventbus", "eventbus.otel", "eventbus.prometheus"])
def test_what_is_off_is_not_imported(name: str) -> None:
    """Importing the bus, and even the two modules, imports neither OpenTelemetry nor
    prometheus_client; and the bus imports neither of the two modules."""
    code = (
        f"import sys, {name}; print(sorted(name for name in sys.modules"
        " if name.split('.')[0] in ('opentelemetry', 'prometheus_client')"
        f" or name in {{'eventbus.otel', 'eventbus.prometheus'}} - {{{name!r}}}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout.strip() == "[]"
