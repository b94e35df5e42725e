"""Metrics: they say what the bus says, from any thread, with labels of few values."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event as Flag
from typing import Any
from urllib.request import urlopen

import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from eventbus import Event, EventBus, EventBusError, Stats
from eventbus import prometheus as module
from eventbus.prometheus import Collector
from eventbus.server import Server
from tests.helpers import Seen, foreign, soon

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "observability.md"
DASHBOARD = ROOT / "docs" / "grafana-dashboard.json"
DURATION = "eventbus_handler_duration_seconds"
UNITS = {"bytes", "cps", "s", "short"}
"""Units that Grafana knows."""


class Note(Event, channel="note:{number}"):
    number: int


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own."""
    return CollectorRegistry(auto_describe=True)


def value(registry: CollectorRegistry, name: str, bus: str = "eventbus", **labels: str) -> Any:
    """One sample; None when there is none."""
    return registry.get_sample_value(f"eventbus_{name}", {"bus": bus, **labels})


def samples(registry: CollectorRegistry) -> Iterator[Any]:
    """All samples of one scrape, as Prometheus would read them."""
    for family in parse(generate_latest(registry).decode()):
        yield from family.samples


def names(registry: CollectorRegistry) -> set[str]:
    """The names of all metrics that a query could use."""
    found = {sample.name for sample in samples(registry)}
    return {name for name in found if not name.endswith("_created")}


async def until_delivered(bus: EventBus, number: int) -> None:
    """Return when handlers were called so often."""
    async with asyncio.timeout(20):
        while bus.stats().delivered < number:
            await checkpoint()


# -- What is shown ---------------------------------------------------------------------------------


async def test_metrics_say_what_the_bus_says(url: str, registry: CollectorRegistry) -> None:
    """Every counter of `stats()`, of the bus and of each handler, and the health are metrics with
    the same figures; both text formats are well formed."""
    bus = EventBus(url)
    Collector(bus, "shop", registry=registry)
    assert (value(registry, "up", "shop"), value(registry, "received_total", "shop")) == (0, 0)

    @bus.on("note:{number}")
    async def good(event: Note) -> None: ...

    @bus.on("note:*")
    async def bad(event: Note) -> None:
        raise ValueError

    async with bus:
        for number in range(3):
            await bus.publish(Note(number=number))
        await bus.publish_raw("note:1", foreign({}))
        await bus.publish_raw("note:1", b"no event")
        await until_delivered(bus, 6)
        while bus.stats().invalid < 1:  # the limit of the test ends it
            await checkpoint()
        stats, health = bus.stats(), bus.health()
        shown = {key: value(registry, f"{key}_total", "shop") for key in module._COUNTERS}
        handlers = {
            name: {
                key: value(registry, f"handler_{key}_total", "shop", handler=name)
                for key in module._PER_HANDLER
            }
            for name in ("good", "bad")
        }
        assert value(registry, "up", "shop") == 1
        assert value(registry, "subscriptions", "shop") == len(health.subscriptions) == 1
        assert value(registry, "denied_subscriptions", "shop") == 0
        assert value(registry, "last_received_age_seconds", "shop") >= 0
        states = {state: value(registry, "state", "shop", state=state) for state in module._STATES}
        assert states == {state: float(state == health.state) for state in states}

    assert shown == {key: getattr(stats, key) for key in shown}
    assert (shown["delivered"], shown["failed"], shown["received"]) == (6, 3, 5)
    for name, figures in handlers.items():
        assert figures == {key: getattr(stats.handlers[name], key) for key in figures}
    assert (value(registry, "up", "shop"), value(registry, "received_total", "shop")) == (0, 5)
    assert list(parse_openmetrics(generate_openmetrics(registry).decode()))


def test_every_counter_has_a_metric() -> None:
    """No field of `Stats` is forgotten."""
    assert set(module._COUNTERS) | {"handlers"} == set(Stats._fields)


async def test_what_waits_is_shown(registry: CollectorRegistry) -> None:
    """The messages and bytes that wait for a handler are gauges; a full queue is seen in them."""
    bus = EventBus("memory://prometheus-queue")
    Collector(bus, registry=registry)
    begun, go = asyncio.Event(), asyncio.Event()

    @bus.on(Note)
    async def slow(event: Note) -> None:
        begun.set()
        await go.wait()

    async with bus:
        for number in range(4):
            await bus.publish(Note(number=number))
        await soon(begun.wait())
        assert value(registry, "handler_queue_messages", handler="slow") == 3
        assert value(registry, "handler_queue_bytes", handler="slow") > 100
        go.set()


async def test_several_buses_share_a_registry(registry: CollectorRegistry) -> None:
    """Each bus is shown under its own name, and a removed one no more."""
    one, two = EventBus("memory://prometheus-1"), EventBus("memory://prometheus-2")
    seen: Seen[Note] = Seen()
    for bus in (one, two):

        @bus.on(Note)
        async def hear(event: Note) -> None:
            seen.append(event)

    collector = Collector(registry=registry)
    collector.add(one, "one", durations=True)
    collector.add(two, "two", durations=True)
    with pytest.raises(ValueError, match="'two' already"):
        collector.add(one, "two")
    async with one, two:
        await one.publish(Note(number=1))
        await two.publish(Note(number=2))
        await two.publish(Note(number=3))
        await seen.reach(3)
        await one.stop()
        await two.stop()
    calls = {"handler": "hear", "pattern": "note:{number}"}
    assert value(registry, "received_total", "one") == 1
    assert value(registry, "received_total", "two") == 2
    assert value(registry, "handler_duration_seconds_count", "two", **calls) == 2
    collector.remove(two)
    assert {sample.labels["bus"] for sample in samples(registry)} == {"one"}
    collector.unregister()
    assert list(samples(registry)) == []


async def test_a_removed_bus_is_timed_no_more(registry: CollectorRegistry) -> None:
    """After `remove` handlers are called as before, and no series of the bus comes back."""
    bus, seen = EventBus("memory://prometheus-removed"), Seen[Note]()

    @bus.on(Note)
    async def hear(event: Note) -> None:
        seen.append(event)

    collector = Collector(bus, durations=True, registry=registry)
    async with bus:
        collector.remove(bus)
        await bus.publish(Note(number=1))
        await seen.reach(1)
    assert list(samples(registry)) == []


def test_one_collector_for_one_registry(registry: CollectorRegistry) -> None:
    """A second collector on a registry is refused, saying what to do; on another one it is not."""
    bus = EventBus("memory://prometheus-twice")
    Collector(bus, registry=registry)
    with pytest.raises(ValueError, match="`add` the bus"):
        Collector(bus, registry=registry)
    Collector(bus, registry=CollectorRegistry())


def test_the_default_registry_is_the_global_one() -> None:
    """Without an argument the metrics are where prometheus_client's own exporters look."""
    collector = Collector(EventBus("memory://prometheus-global"), "global")
    try:
        assert b'eventbus_up{bus="global"} 0.0' in generate_latest()
    finally:
        collector.unregister()
    assert b"eventbus_up" not in generate_latest()


async def test_timing_comes_before_the_start(registry: CollectorRegistry) -> None:
    """Durations of a bus that runs already are refused, and nothing is left registered; its
    counters can be added at any time."""
    async with EventBus("memory://prometheus-late") as bus:
        with pytest.raises(EventBusError, match="running"):
            Collector(bus, durations=True, registry=registry)
        Collector(bus, registry=registry)
        assert value(registry, "up") == 1


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without prometheus-client the collector says which extra to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(EventBusError, match=r"pip install 'eventbus-redis\[prometheus\]'"):
        Collector()


# -- Labels ----------------------------------------------------------------------------------------


async def test_channels_are_no_labels(registry: CollectorRegistry) -> None:
    """Lanes that come and go with channels in their names make no series: they are summed by
    handler, and a literal pattern is "literal"."""
    bus = EventBus("memory://prometheus-labels")
    Collector(bus, durations=True, registry=registry)
    seen: Seen[Note] = Seen()

    async def hear(event: Note) -> None:
        seen.append(event)

    async with bus:
        await bus.attach(hear, "note:*")
        for number in range(3):
            await bus.attach(hear, f"note:{number}", rf"note:\[{number}\]")
            async with bus.subscribe(f"note:{number}", Note) as messages:
                await bus.publish(Note(number=number))
                await anext(messages)
                generate_latest(registry)
        await seen.reach(9 - 3)
        await until_delivered(bus, 9)
        shown = list(samples(registry))
    allowed = {
        "bus": {"eventbus"},
        "handler": {"hear", "subscribe"},
        "pattern": {"note:*", "literal"},
        "state": set(module._STATES),
    }
    for sample in shown:
        for label, text in sample.labels.items():
            assert label == "le" or text in allowed[label], sample
    assert value(registry, "handler_delivered_total", handler="hear") == 6


async def test_labels_are_bounded(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handlers and patterns beyond the bound are counted as "other", and none gets lost."""
    monkeypatch.setattr(module, "_MAX_LABELS", 2)
    monkeypatch.setattr(module, "_MAX_KNOWN", 2)
    bus, seen = EventBus("memory://prometheus-bound"), Seen[Note]()
    Collector(bus, durations=True, registry=registry)
    for number in range(5):

        async def hear(event: Note) -> None:
            seen.append(event)

        hear.__name__ = f"hear_{number}"
        bus.on(f"*{number}")(hear)
    async with bus:
        for number in range(5):
            await bus.publish(Note(number=number))
        await seen.reach(5)
    counts = {
        (sample.labels["handler"], sample.labels["pattern"]): sample.value
        for sample in samples(registry)
        if sample.name == f"{DURATION}_count"
    }
    assert counts[("other", "other")] == 3
    assert len(counts) == 3
    delivered = [s.value for s in samples(registry) if s.name == "eventbus_handler_delivered_total"]
    assert sorted(delivered) == [1, 1, 3]


async def test_durations_are_of_handler_and_pattern(registry: CollectorRegistry) -> None:
    """Each call, a failed one too, is timed once under its handler and the pattern that chose it;
    `def` handlers and several workers are no exception."""
    bus, seen = EventBus("memory://prometheus-durations"), Seen[object]()
    Collector(bus, durations=True, buckets=(1.0, 60.0), registry=registry)
    loop = asyncio.get_running_loop()

    @bus.on("note:{number}", concurrency=3)
    async def fail(event: Note) -> None:
        seen.append(event)
        raise ValueError

    @bus.on("other:*", "note:*")
    def threaded(event: Note) -> None:
        loop.call_soon_threadsafe(seen.append, event)

    async with bus:
        await bus.publish(Note(number=1))
        await bus.publish(Note(number=2))
        await bus.publish("other:1", Note(number=3))
        await seen.reach(5)
    count = "handler_duration_seconds_count"
    assert value(registry, count, handler="fail", pattern="note:{number}") == 2
    assert value(registry, count, handler="threaded", pattern="note:*") == 2
    assert value(registry, count, handler="threaded", pattern="other:*") == 1
    bucket = "handler_duration_seconds_bucket"
    assert value(registry, bucket, handler="fail", pattern="note:{number}", le="60.0") == 2


async def test_a_handler_that_is_called_elsewhere(registry: CollectorRegistry) -> None:
    """When a middleware calls on in a task of its own, the handler is unknown, and no task's name
    becomes a label."""
    bus, seen = EventBus("memory://prometheus-elsewhere"), Seen[Note]()

    @bus.middleware("receive")
    async def elsewhere(message: Any, call_next: Any) -> Any:
        return await asyncio.create_task(call_next(message))

    Collector(bus, durations=True, registry=registry)

    @bus.on(Note)
    async def hear(event: Note) -> None:
        seen.append(event)

    async with bus:
        await bus.publish(Note(number=1))
        await seen.reach(1)
    count = "handler_duration_seconds_count"
    assert value(registry, count, handler="unknown", pattern="note:{number}") == 1


# -- Threads, and time -----------------------------------------------------------------------------


async def test_a_scrape_from_another_thread(registry: CollectorRegistry) -> None:
    """While lanes come and go, every scrape from other threads succeeds, and no counter goes back,
    although what a lane counted is out of sight while its handlers end."""
    bus = EventBus("memory://prometheus-threads")
    Collector(bus, registry=registry)
    over = Flag()

    def scrape() -> int:
        highest: dict[tuple[str, str], float] = {}
        scrapes = 0
        while not over.is_set():
            for sample in samples(registry):
                if sample.name.endswith("_total"):
                    key = (sample.name, sample.labels.get("handler", ""))
                    assert sample.value >= highest.get(key, 0), key
                    highest[key] = sample.value
            scrapes += 1
        return scrapes

    async def hear(event: Note) -> None: ...

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as pool:
        scrapers = [loop.run_in_executor(pool, scrape) for _ in range(2)]
        try:
            async with bus:
                for number in range(60):
                    route = await bus.attach(hear, "note:*")
                    async with bus.subscribe("note:*", Note):
                        await bus.publish(Note(number=number))
                        await until_delivered(bus, 1)
                    await route.detach()
        finally:
            over.set()
        assert all(scrapes > 1 for scrapes in await asyncio.gather(*scrapers))
    assert value(registry, "delivered_total") == bus.stats().delivered


async def test_a_counter_never_goes_back(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure that is lower for a moment, while its parts are added up anew, is not shown: to
    Prometheus it would be a restart, and all of it would count again."""
    async with EventBus("memory://prometheus-back-and-forth") as bus:
        Collector(bus, registry=registry)
        for figure, shown in ((5, 5), (2, 5), (7, 7)):
            stats = bus.stats()._replace(delivered=figure)
            with monkeypatch.context() as patch:
                patch.setattr(bus, "stats", lambda stats=stats: stats)
                assert value(registry, "delivered_total") == shown


async def test_a_scrape_looks_again(registry: CollectorRegistry) -> None:
    """A look that another thread disturbed is taken again; one that fails for ever fails."""
    tries = iter([RuntimeError("dictionary changed size during iteration"), 7])

    def look() -> object:
        found = next(tries)
        if isinstance(found, Exception):
            raise found
        return found

    def never() -> object:
        raise RuntimeError("for ever")

    assert module._look(look) == 7
    with pytest.raises(RuntimeError, match="for ever"):
        module._look(never)


async def test_a_blocked_loop_can_be_scraped(registry: CollectorRegistry) -> None:
    """The HTTP server of prometheus_client answers while the event loop is stuck."""
    bus = EventBus("memory://prometheus-blocked")
    Collector(bus, registry=registry)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        async with bus:
            with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=20) as answer:  # noqa: ASYNC210
                assert b'eventbus_up{bus="eventbus"} 1.0' in answer.read()
    finally:
        server.shutdown()
        server.server_close()
        await to_thread.run_sync(thread.join)


async def test_a_counter_begins_anew_with_its_bus(registry: CollectorRegistry) -> None:
    """A bus that starts a second time counts from 0, for itself and for each handler."""
    bus, seen = EventBus("memory://prometheus-again"), Seen[Note]()
    Collector(bus, registry=registry)

    @bus.on(Note)
    async def hear(event: Note) -> None:
        seen.append(event)

    for number in (2, 1):
        async with bus:
            for _ in range(number):
                await bus.publish(Note(number=1))
            await seen.reach(number)
            seen.clear()
        assert value(registry, "delivered_total") == number
        assert value(registry, "handler_delivered_total", handler="hear") == number


async def test_a_name_that_comes_back_is_a_new_lane(registry: CollectorRegistry) -> None:
    """A handler that was detached and attached again goes on from what it had."""
    bus, seen = EventBus("memory://prometheus-back"), Seen[Note]()
    Collector(bus, registry=registry)

    async def hear(event: Note) -> None:
        seen.append(event)

    async with bus:
        for total, number in ((3, 3), (4, 1)):
            route = await bus.attach(hear, "note:*")
            for _ in range(number):
                await bus.publish(Note(number=1))
            await seen.reach(total)
            assert value(registry, "handler_delivered_total", handler="hear") == total
            await route.detach()
        assert value(registry, "handler_delivered_total", handler="hear") == 4


async def test_an_outage_is_seen(registry: CollectorRegistry) -> None:
    """A killed server turns `eventbus_up` to 0; when it is back, a reconnect was counted."""
    with Server(port=0) as server:
        bus = EventBus(server.url, heartbeat=0.3)
        Collector(bus, registry=registry)

        @bus.on(Note)
        async def hear(event: Note) -> None: ...

        async with bus, asyncio.timeout(40):
            assert value(registry, "up") == 1
            server.kill()
            while value(registry, "up"):
                await checkpoint()
            assert value(registry, "state", state="down") == 1
            server.start()
            while not value(registry, "reconnects_total") or not value(registry, "up"):
                await checkpoint()
            while value(registry, "round_trip_seconds") is None:
                await checkpoint()


# -- The page and the dashboard --------------------------------------------------------------------


@pytest.fixture
async def known(registry: CollectorRegistry) -> set[str]:
    """The metrics of a bus that has done everything once."""
    bus, seen = EventBus("memory://prometheus-known", heartbeat=0.05), Seen[Note]()
    Collector(bus, durations=True, registry=registry)

    @bus.on(Note)
    async def hear(event: Note) -> None:
        seen.append(event)

    async with bus:
        await bus.publish(Note(number=1))
        await seen.reach(1)
        return names(registry) | {"eventbus_round_trip_seconds"}


def used(text: str) -> set[str]:
    """The metrics that queries name."""
    return set(re.findall(r"\beventbus_[a-z_]+", text))


async def test_the_dashboard_uses_what_there_is(known: set[str]) -> None:
    """Each metric in the Grafana dashboard exists, and each panel has a query and a name."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert used(" ".join(queries)) - known == set()
    assert len({panel["title"] for panel in panels}) == len(panels) > 8
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["targets"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}


def test_the_dashboard_can_be_imported() -> None:
    """Nothing asks for an id, a data source or a unit that another Grafana has not: all are asked
    of the one that is chosen at the top, and the panels lie side by side on 24 columns."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert (variables["source"]["type"], variables["source"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert "id" not in board
    assert 30 < board["schemaVersion"] <= 42  # that of Grafana 13, which brings older ones up to it

    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    targets = [target for panel in panels for target in panel["targets"]]
    asked = [*targets, *(one for one in variables.values() if one["type"] == "query")]
    assert {json.dumps(one["datasource"]) for one in asked} == {
        '{"type": "prometheus", "uid": "${source}"}'
    }
    named = re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))
    assert {*named} <= {*variables, "__rate_interval"}
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in panels} <= UNITS
    for panel in panels:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])

    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert columns.start >= 0 < len(cells), panel["title"]
        assert columns.stop <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


async def test_the_page_names_what_there_is(known: set[str]) -> None:
    """Each metric on the page exists, alerts included, and each that exists is on the page."""
    on_page = used(PAGE.read_text(encoding="utf-8"))
    assert on_page - known - {DURATION} == set()
    parts = {f"{DURATION}_{part}" for part in ("bucket", "count", "sum")}
    assert known - parts - on_page == set()
