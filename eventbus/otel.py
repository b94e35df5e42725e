"""Traces across the bus: a publish and the handler calls that it causes are one trace.

`instrument` adds a publish and a receive middleware, and nothing else knows of OpenTelemetry. The
context travels as the W3C headers `traceparent` and `tracestate`; what arrives in them from
elsewhere is believed only when it is well formed. Spans follow OpenTelemetry's conventions for
messaging (docs/observability.md says which choices they leave, and what is chosen).

Span names are made of what stands in the code: patterns, channel templates, event types. A channel
is never a name, and an attribute only when asked for; an error is recorded by its class alone,
because its text may hold a payload.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from eventbus import Event, EventBus, EventBusError, Message

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["instrument"]

Next = Callable[[Message[Any]], Awaitable[Any]]

_W3C = ("traceparent", "tracestate")
_MAX_W3C = 512  # characters; the propagator would log each longer one, and strangers send many
_LITERAL = re.compile(r"(?:\\.|\{\{|\}\}|[^\\*?\[{}])*", re.DOTALL)
_MAX_NAMES = 500  # patterns that name spans: those made at run time must not grow without end
_MAX_TEXT = 256  # characters of an id, a type, a source: they may come from anywhere


def instrument(
    bus: EventBus,
    tracer_provider: TracerProvider | None = None,
    *,
    channels: bool = False,
    new_traces: bool = False,
) -> None:
    """Trace what this bus publishes and handles. Call it once, before the bus starts, and before
    other middleware that is to run inside the spans.

    `tracer_provider`: default the global one, which is looked up now. `channels`: put the name of
    the channel on each span, too. A handler's span is a child of the publish and linked to it; with
    `new_traces` it begins a trace of its own and is linked alone. Raises EventBusError when the bus
    runs, and without opentelemetry-api.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        missing = "eventbus.otel needs opentelemetry-api: pip install 'eventbus-redis[otel]'"
        raise EventBusError(missing) from error
    tracer = trace.get_tracer("eventbus", tracer_provider=tracer_provider)
    propagator = TraceContextTextMapPropagator()
    patterns = _Patterns()

    def context_in(headers: Mapping[str, object]) -> Context | None:
        """The context that headers carry; None when there is none, or it is malformed."""
        values = {name: headers.get(name) for name in _W3C}
        carrier = {n: v for n, v in values.items() if isinstance(v, str) and len(v) <= _MAX_W3C}
        if "traceparent" not in carrier:
            return None
        found = propagator.extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN))
        return found if trace.get_current_span(found).get_span_context().is_valid else None

    def link_to(context: Context | None) -> list[trace.Link]:
        return (
            []
            if context is None
            else [trace.Link(trace.get_current_span(context).get_span_context())]
        )

    async def inside(span: Span, message: Message[Any], call_next: Next) -> Any:
        """Go on within a span, and end it."""
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                return await call_next(message)
        except BaseException as error:
            span.set_attribute("error.type", _class_of(error))
            span.set_status(trace.Status(trace.StatusCode.ERROR))
            raise
        finally:
            span.end()

    def attributes(message: Message[Any], name: str, type: str, template: str | None) -> _Values:
        found: _Values = {
            "messaging.system": "redis",
            "messaging.operation.name": name,
            "messaging.operation.type": type,
            "messaging.destination.template": template,
            "messaging.destination.name": message.channel if channels else None,
            "messaging.client.id": bus.source,
            "messaging.message.id": message.id,
            "cloudevents.event_source": message.source,
            "cloudevents.event_type": message.type,
        }
        return {key: _text(value) for key, value in found.items() if value is not None}

    @bus.middleware("publish")
    async def publish(message: Message[Any], call_next: Next) -> Any:
        template = _template_of(message)
        made = context_in(message.headers)  # by a middleware before this one: it stays
        span = tracer.start_span(
            f"publish {template or _type_of(message) or ''}".rstrip(),
            kind=trace.SpanKind.CLIENT if made else trace.SpanKind.PRODUCER,
            attributes=attributes(message, "publish", "send", template),
            links=link_to(made),
        )
        if made is None:
            carrier: dict[str, str] = {}
            propagator.inject(carrier, trace.set_span_in_context(span))
            if carrier:
                message = message.with_headers(carrier)
        return await inside(span, message, call_next)

    @bus.middleware("receive")
    async def process(message: Message[Any], call_next: Next) -> Any:
        template = patterns.name(message.pattern) or _template_of(message)
        made = context_in(message.headers)
        nothing = trace.set_span_in_context(trace.INVALID_SPAN)
        span = tracer.start_span(
            f"process {template or _type_of(message) or ''}".rstrip(),
            context=nothing if made is None or new_traces else made,
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes(message, "process", "process", template),
            links=link_to(made),
        )
        return await inside(span, message, call_next)


_Values = dict[str, str | None]


class _Patterns:
    """The patterns that name spans: those with wildcards, as many as are allowed. A literal one is
    a channel, which may have been made at run time."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def name(self, pattern: str | None) -> str | None:
        if pattern in self._known:
            return pattern
        if pattern is None or len(self._known) >= _MAX_NAMES or _LITERAL.fullmatch(pattern):
            return None
        self._known.add(pattern)
        return pattern


def _template_of(message: Message[Any]) -> str | None:
    """The channel template of the event's class, when the channel is one of its channels."""
    template = getattr(type(message.event), "__event_template__", None)
    if template is None:
        return None
    channel = message.channel.encode("utf-8", "replace")
    return None if template.pattern.match(channel) is None else str(template.text)


def _type_of(message: Message[Any]) -> str | None:
    """The wire type of an event that has a class here; what strangers send names nothing."""
    return type(message.event).__event_type__ if isinstance(message.event, Event) else None


def _class_of(error: BaseException) -> str:
    cls = type(error)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )


def _text(value: str) -> str:
    if value.isascii() and len(value) <= _MAX_TEXT:
        return value
    return value[:_MAX_TEXT].encode("utf-8", "replace").decode()
