"""The counters and the health of buses as Prometheus metrics, read when somebody scrapes.

A `Collector` holds no counter that the engine increments: at a scrape it looks at `bus.stats()` and
`bus.health()`, and between two scrapes it costs nothing. Only the durations of handler calls need a
middleware, and they are opt-in.

Labels are made of what stands in the code: the name that a bus is given here, the name of a
handler, a pattern with wildcards. A channel is never a label: lanes that come and go at run time
(`attach`, `subscribe`) are summed by handler, and what is more than a bound becomes "other".

A scrape comes from any thread. It takes no turn of the event loop, so that a blocked loop can be
seen; it reads again when a set of lanes changed under its eyes. A counter never goes back while its
bus runs, whatever comes and goes; a bus that starts again begins at 0, as Prometheus expects.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from eventbus import EventBus, EventBusError, HandlerStats, Health, Message

if TYPE_CHECKING:
    from prometheus_client import Histogram
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import CollectorRegistry

__all__ = ["Collector"]

T = TypeVar("T")
Next = Callable[[Message[Any]], Awaitable[Any]]

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. Handlers of events are shorter than requests of the web."""

_COUNTERS = {
    "published": "Publishes that Redis answered.",
    "refused": "Publishes that were certainly not sent.",
    "uncertain": "Publishes that were written and got no answer.",
    "publish_failed": "Failures of publish_nowait, which no caller saw.",
    "received": "Messages that arrived in this process, each once.",
    "delivered": "Handler calls, and messages read from a subscription.",
    "skipped": "Messages that matched a pattern, and not the types or captures of its handler.",
    "invalid": "Payloads that are no event.",
    "dropped": "Messages dropped because a queue was full, or at the end.",
    "conflated": "Messages replaced by a newer one of their channel.",
    "missed": "Messages that never reached this process: the sum of all sequence gaps.",
    "failed": "Handler calls that raised or overran their timeout.",
    "reconnects": "How often the subscription came back after a loss.",
}
_PER_HANDLER = {
    "delivered": "Calls of this handler.",
    "dropped": "Messages dropped from the queue of this handler.",
    "failed": "Calls of this handler that raised or overran their timeout.",
    "skipped": "Messages that were not of the types or captures of this handler.",
    "conflated": "Messages of this handler that were replaced by a newer one of their channel.",
}
_QUEUES = {
    "handler_queue_messages": "Messages that wait for this handler.",
    "handler_queue_bytes": "Bytes that wait for this handler.",
}
_GAUGES = {
    "up": "Whether this process can receive: 1 when the bus is live or degraded.",
    "subscriptions": "Subscriptions that the server has confirmed.",
    "denied_subscriptions": "Subscriptions that the server has denied.",
    "last_received_age_seconds": "Seconds since the last byte from the server.",
    "round_trip_seconds": "The last round trip of the liveness probe.",
}
_STATES = ("starting", "live", "degraded", "down", "closed")
_DURATION = "eventbus_handler_duration_seconds"

_OTHER = "other"
_LITERAL = re.compile(r"(?:\\.|\{\{|\}\}|[^\\*?\[{}])*", re.DOTALL)
_WORKER = "eventbus "  # begins the name of a worker's task; the name of its lane follows
_MAX_LABELS = 500  # handlers, and pairs of handler and pattern, that have a series of their own
_MAX_KNOWN = 4096  # series that are at hand without being looked up
_LOOKS = 20  # a look lasts less than the turn of a thread; so often it does not fail by chance


class Collector:
    """The metrics of one or more buses, for one registry (default: the global one).

    ``Collector(bus, "orders")`` registers itself, and `add` takes further buses: a registry has one
    collector, and each bus its own name. With `durations` handler calls are timed, too, in
    `buckets` of seconds. Raises ValueError for a name or a registry that is taken, EventBusError
    without prometheus-client.
    """

    def __init__(
        self,
        bus: EventBus | None = None,
        name: str = "eventbus",
        *,
        durations: bool = False,
        buckets: Sequence[float] = BUCKETS,
        registry: CollectorRegistry | None = None,
    ) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            missing = "Collector needs prometheus-client: pip install 'eventbus-redis[prometheus]'"
            raise EventBusError(missing) from error
        self._buses: dict[str, _Watched] = {}
        self._lock = Lock()
        self._labels = ("bus", "handler", "pattern")
        self._durations = prometheus_client.Histogram(
            _DURATION,
            "Seconds that one call of a handler took, middleware included.",
            self._labels,
            buckets=buckets,
            registry=None,
        )
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        try:
            self._registry.register(self)
        except ValueError as error:
            taken = "this registry has a Collector of eventbus: `add` the bus to that one"
            raise ValueError(taken) from error
        if bus is not None:
            try:
                self.add(bus, name, durations=durations)
            except EventBusError:
                self._registry.unregister(self)
                raise

    def add(self, bus: EventBus, name: str, *, durations: bool = False) -> None:
        """Show this bus, too, under a name of its own.

        With `durations` its handler calls are timed: that is a middleware, so the bus must not run
        yet (EventBusError). Raises ValueError for a name that is taken.
        """
        with self._lock:
            if name in self._buses:
                raise ValueError(f"there is a bus {name!a} already: give each a name of its own")
            watched = _Watched(bus)
            if durations:
                bus.middleware("receive")(_timing(name, self._durations, watched))
            self._buses[name] = watched

    def remove(self, bus: EventBus) -> None:
        """Show this bus no more. Its calls are timed no more either."""
        with self._lock:
            for name in [name for name, watched in self._buses.items() if watched.bus is bus]:
                self._buses.pop(name).is_shown = False
                for _, labels, *_ in [*self._samples(name)]:
                    self._durations.remove(*(labels[key] for key in self._labels))

    def unregister(self) -> None:
        """Leave the registry, and let go of all buses."""
        self._registry.unregister(self)
        for watched in list(self._buses.values()):
            self.remove(watched.bus)

    def _samples(self, name: str) -> Iterator[Any]:
        for metric in self._durations.collect():
            for sample in metric.samples:
                if sample.labels["bus"] == name and sample.name.endswith("_count"):
                    yield sample

    # -- What a registry calls ---------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """The families without a sample: a registry learns their names, and no bus is looked at."""
        return [*_Families().all(), *self._durations.describe()]

    def collect(self) -> Iterable[Metric]:
        """The families as the buses stand now. From any thread."""
        families = _Families()
        with self._lock:
            for name, watched in self._buses.items():
                watched.show(name, families)
            return [*families.all(), *self._durations.collect()]


class _Families:
    """The metric families of one scrape."""

    def __init__(self) -> None:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        bus, handler = ("bus",), ("bus", "handler")
        self.counters = {
            key: CounterMetricFamily(f"eventbus_{key}", text, labels=bus)
            for key, text in _COUNTERS.items()
        }
        self.handlers = {
            key: CounterMetricFamily(f"eventbus_handler_{key}", text, labels=handler)
            for key, text in _PER_HANDLER.items()
        }
        self.queues = {
            key: GaugeMetricFamily(f"eventbus_{key}", text, labels=handler)
            for key, text in _QUEUES.items()
        }
        self.gauges = {
            key: GaugeMetricFamily(f"eventbus_{key}", text, labels=bus)
            for key, text in _GAUGES.items()
        }
        self.state = GaugeMetricFamily(
            "eventbus_state", "1 for the state that the bus is in.", labels=("bus", "state")
        )

    def all(self) -> list[Metric]:
        return [
            *self.counters.values(),
            *self.handlers.values(),
            *self.queues.values(),
            *self.gauges.values(),
            self.state,
        ]


class _Watched:
    """One bus, and what must be remembered of it so that no counter goes back while it runs."""

    def __init__(self, bus: EventBus) -> None:
        self.bus = bus
        self.is_shown = True
        self._source: str | None = None
        self._highest: Counter[str] = Counter()
        self._lanes: dict[str, HandlerStats] = {}
        self._gone: dict[str, Counter[str]] = {}
        self._known = _Labels()

    def show(self, name: str, families: _Families) -> None:
        """Add the samples of this bus."""
        source, stats = self.bus.source, _look(self.bus.stats)
        is_less = any(getattr(stats, key) < count for key, count in self._highest.items())
        is_new = source != self._source if source else is_less
        if is_new:  # another start, or another one that is over already: all counts from 0
            self._source = source
            self._highest, self._lanes, self._gone = Counter(), {}, {}
        for key, counter in families.counters.items():
            self._highest[key] = max(self._highest[key], getattr(stats, key))
            counter.add_metric((name,), self._highest[key])
        for handler, figures in self._sums(dict(stats.handlers)).items():
            for key, counter in families.handlers.items():
                counter.add_metric((name, handler), figures[key])
            for key, queue in families.queues.items():
                queue.add_metric((name, handler), figures[key])
        self._show_health(name, _look(self.bus.health), families)

    def _sums(self, lanes: dict[str, HandlerStats]) -> dict[str, Counter[str]]:
        """The figures by handler: all its lanes, those that are gone included."""
        for lane, before in self._lanes.items():
            now = lanes.get(lane)
            if now is None or any(getattr(now, key) < getattr(before, key) for key in _PER_HANDLER):
                gone = self._gone.setdefault(self._label(lane), Counter())
                gone.update({key: getattr(before, key) for key in _PER_HANDLER})
        self._lanes = lanes
        found = {handler: Counter(figures) for handler, figures in self._gone.items()}
        for lane, now in lanes.items():
            sums = found.setdefault(self._label(lane), Counter())
            sums.update({key: getattr(now, key) for key in _PER_HANDLER})
            sums.update(handler_queue_messages=now.depth, handler_queue_bytes=now.bytes)
        return found

    def _label(self, lane: str) -> str:
        return self._known.of((_handler_of(lane),))[0]

    def _show_health(self, name: str, health: Health, families: _Families) -> None:
        figures: dict[str, float | None] = {
            "up": float(bool(health)),
            "subscriptions": len(health.subscriptions),
            "denied_subscriptions": len(health.denied),
            "last_received_age_seconds": health.last_received_age,
            "round_trip_seconds": health.round_trip,
        }
        for key, gauge in families.gauges.items():
            figure = figures[key]
            if figure is not None:
                gauge.add_metric((name,), figure)
        for state in _STATES:
            families.state.add_metric((name, state), float(state == health.state))


class _Labels:
    """The label values that have a series of their own: as many as are allowed, then "other"."""

    def __init__(self) -> None:
        self._known: set[tuple[str, ...]] = set()

    def of(self, values: tuple[str, ...]) -> tuple[str, ...]:
        if values not in self._known:
            if len(self._known) >= _MAX_LABELS:
                return (_OTHER,) * len(values)
            self._known.add(values)
        return values


def _handler_of(lane: str) -> str:
    """The name of a handler, from that of one of its lanes: `show#3` is a further one of `show`,
    and subscriptions, which are named by their patterns, are all one."""
    return "subscribe" if lane.startswith("subscribe(") else re.sub(r"#[0-9]+\Z", "", lane)


def _look(read: Callable[[], T]) -> T:
    """What it returns. The loop may change a dictionary while another thread goes through it, which
    Python notices: then look again."""
    for _ in range(_LOOKS):
        try:
            return read()
        except RuntimeError:
            continue
    return read()


def _timing(name: str, durations: Histogram, watched: _Watched) -> Callable[..., Awaitable[Any]]:
    """The middleware that times handler calls."""
    labels = _Labels()
    known: dict[tuple[str, str | None], Histogram] = {}

    def series(task: str, pattern: str | None) -> Histogram:
        is_worker = task.startswith(_WORKER)
        handler = _handler_of(task.removeprefix(_WORKER)) if is_worker else "unknown"
        shown = "literal" if _LITERAL.fullmatch(pattern or "") else str(pattern)
        return durations.labels(name, *labels.of((handler, shown)))

    async def measured(message: Message[Any], call_next: Next) -> Any:
        if not watched.is_shown:
            return await call_next(message)
        task = asyncio.current_task()
        key = ("" if task is None else task.get_name(), message.pattern)
        found = known.get(key)
        if found is None:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            found = known[key] = series(*key)
        begin = perf_counter()
        try:
            return await call_next(message)
        finally:
            found.observe(perf_counter() - begin)

    return measured
