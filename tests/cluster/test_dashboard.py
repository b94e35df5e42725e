"""The dashboard and the alerts of docs/observability.md, asked of a real Prometheus.

A query may be well formed, name metrics that exist, and still show nothing: a label that is not
there, a sum over the wrong ones, a rate over too short a time. So two buses, a third one that is
denied something, and a server that is killed make every figure move; Prometheus scrapes them as it
would scrape two processes, and answers what Grafana would ask. Grafana itself is not here: the
variables of the queries are filled in as its Prometheus data source does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from eventbus import Event, EventBus, EventBusError
from eventbus.prometheus import Collector
from eventbus.server import Server
from eventbus.testing import away
from tests.helpers import write

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

DOCS = Path(__file__).parents[2] / "docs"
BOARD: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))
PANELS = {panel["title"]: panel for panel in BOARD["panels"] if panel["type"] != "row"}
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
ALERTS = re.findall(
    r"```yaml\n(groups:.*?)```", (DOCS / "observability.md").read_text(encoding="utf-8"), re.DOTALL
)

SCRAPE = 500
"""Milliseconds between two scrapes, and between two points of a graph."""
RATE = "4s"
"""What `$__rate_interval` is for a data source that is told a scrape interval of a second."""
BUSES = ("shop", "mail.eu")
FIRED = {
    *("EventbusMissed", "EventbusDropped", "EventbusNotSent", "EventbusDenied"),
    *("EventbusInvalid", "EventbusHandlerFails"),
}
"""The alerts for what happens here. The others ask for more, or for longer."""
LIMIT = 60.0
"""Seconds until everything is shown. It takes a tenth of that, when nobody else is busy."""


class Note(Event, channel="note:{number}"):
    number: int


class Word(Event, channel="note:{number}"):
    number: int


# -- Prometheus ------------------------------------------------------------------------------------


class Bell:
    """A part of a registry that has no metrics, and tells the loop of each scrape."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()

    def describe(self) -> Iterable[Any]:
        return []

    def collect(self) -> Iterable[Any]:
        self._loop.call_soon_threadsafe(self._rung.set)
        return []

    async def ring(self) -> None:
        """Return at the next scrape."""
        self._rung.clear()
        await self._rung.wait()


class Prometheus:
    """One that runs, and what it is asked."""

    def __init__(self, http: httpx.AsyncClient, bell: Bell) -> None:
        self.bell = bell
        self._http = http
        self._begin = time.time()

    async def ask(self, path: str, **parameters: Any) -> Any:
        """What it answers; an AssertionError with its own words when that is an error."""
        answer = (await self._http.get(f"/api/v1/{path}", params=parameters)).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def _time(self) -> dict[str, float]:
        return {"start": self._begin, "end": time.time()}

    async def graph(self, query: str) -> list[dict[str, Any]]:
        """The series that a panel over the whole time would show."""
        found = await self.ask("query_range", query=query, step=SCRAPE / 1000, **self._time())
        assert found["resultType"] == "matrix"
        return found["result"]

    async def values(self, label: str, metric: str) -> list[str]:
        """What `label_values(metric, label)` is to Grafana."""
        return await self.ask(f"label/{label}/values", **{"match[]": metric}, **self._time())

    async def active(self) -> set[str]:
        """The alerts that are pending or firing."""
        return {alert["labels"]["alertname"] for alert in (await self.ask("alerts"))["alerts"]}


@contextmanager
def exporter(registry: CollectorRegistry) -> Iterator[str]:
    """The address at which a registry is scraped."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@asynccontextmanager
async def prometheus(folder: Path, targets: list[str], bell: Bell) -> AsyncIterator[Prometheus]:
    """Debian's Prometheus, which scrapes the targets and evaluates the alerts of the page."""
    if (binary := shutil.which("prometheus")) is None:
        missing = "prometheus is not on the PATH: apt install prometheus"
        pytest.fail(missing, pytrace=False)
    every = f"{SCRAPE}ms"
    config = {
        "global": {
            "scrape_interval": every,
            "scrape_timeout": every,
            "evaluation_interval": every,
        },
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "eventbus", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    (folder / "alerts.yml").write_text("".join(ALERTS), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        binary,
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        "--web.listen-address=127.0.0.1:0",
        cwd=folder,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    log: list[str] = []
    address = ""
    reader: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(LIMIT):
            while "ready to receive" not in (line := (await process.stderr.readline()).decode()):
                log.append(line)
                assert line, f"prometheus ended by itself:\n{''.join(log)}"
                if found := re.search(r'Listening on"? .*address=(127\.0\.0\.1:\d+)', line):
                    address = found[1]
        reader = asyncio.create_task(drain(process.stderr))
        async with httpx.AsyncClient(
            base_url=f"http://{address}", timeout=LIMIT, trust_env=False
        ) as http:
            yield Prometheus(http, bell)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(LIMIT):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if reader is not None:
            await reader


async def drain(stream: asyncio.StreamReader) -> None:
    """Read what nobody wants, so that the writer goes on."""
    while await stream.readline():
        pass


# -- What Grafana makes of a query -----------------------------------------------------------------


def chosen(*names: str) -> str:
    """What a variable with several values becomes in a query of Prometheus."""
    escaped = [
        re.sub(r"[$^*{}\[\]+?.()|]", r"\\\\\g<0>", name.replace("\\", "\\" * 4)) for name in names
    ]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def filled_in(query: str, *buses: str) -> str:
    """A query of the dashboard with its variables filled in: these buses, or "All"."""
    known = {
        "bus": chosen(*buses) if buses else VARIABLES["bus"]["allValue"],
        "__rate_interval": RATE,
    }
    unknown = {*re.findall(r"\$(\w+)", query)} - {*known}
    assert unknown == set(), query
    return re.sub(r"\$(\w+)", lambda found: known[found[1]], query)


def highest(series: list[dict[str, Any]]) -> float:
    """The highest point of a graph; no point is 0."""
    points = [float(value) for one in series for _, value in one["values"]]
    return max((point for point in points if not math.isnan(point)), default=0.0)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """What stands under the graph for the series with these labels. KeyError for one without."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda label: labels[label[1]], target["legendFormat"])


# -- What there is to be seen ----------------------------------------------------------------------


def shop_on(url: str, released: asyncio.Event) -> EventBus:
    """A bus with a good handler, a bad one, and two that do not get on until they are released."""
    bus = EventBus(url, heartbeat=1.0, publish_timeout=0.5)

    @bus.on(Note)
    async def good(event: Note) -> None: ...

    @bus.on(Note)
    async def bad(event: Note) -> None:
        raise ValueError

    @bus.on("note:*", max_queue=2)
    async def slow(event: Note) -> None:
        await released.wait()

    @bus.on("note:*", max_queue=2, overflow="latest")
    async def newest(event: Note) -> None:
        await released.wait()

    @bus.exception_handler(Exception)
    async def quiet(error: Exception, message: Any) -> None: ...

    return bus


async def a_round(bus: EventBus, hole: int) -> None:
    """Events that are wanted, one that nobody wants, one that is none, and a hole in the numbers.
    Right after an outage some may be refused."""
    with suppress(EventBusError):
        for number in (1, 2, 1, 2, 1):
            await bus.publish(Note(number=number))
        await bus.publish(Word(number=1))
        await bus.publish_raw("note:1", b"not an event")
        await bus.publish_raw("note:7", write(Note(number=7), number=hole))


@pytest.fixture(scope="module")
async def seen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """A Prometheus that has scraped two processes while everything happened that is counted."""
    released, bell, registries = asyncio.Event(), Bell(), (CollectorRegistry(), CollectorRegistry())
    registries[0].register(bell)
    guest = ("--user guest on nopass +@all resetchannels &note:* &__eventbus__:*").split()
    with (
        Server(port=0, options=guest) as server,
        exporter(registries[0]) as first,
        exporter(registries[1]) as second,
    ):
        shop = shop_on(server.url, released)
        mail = EventBus(server.url, heartbeat=1.0, publish_timeout=0.5)
        limited = EventBus(server.url.replace("://", "://guest:any@"), on_denied="degrade")
        limited.on("note:*", "secret:*")(ignore)
        Collector(shop, "shop", durations=True, registry=registries[0]).add(mail, "mail.eu")
        Collector(limited, "shop", registry=registries[1])
        folder = tmp_path_factory.mktemp("prometheus")
        async with prometheus(folder, [first, second], bell) as started, shop, mail, limited:
            try:
                await everything(started, server, shop, mail)
                yield started
            finally:
                released.set()


async def ignore(event: Note) -> None:
    """Do nothing."""


async def everything(started: Prometheus, server: Server, shop: EventBus, mail: EventBus) -> None:
    """All that the dashboard shows. What is not seen within the limit, the tests will tell."""
    blank = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]

    async def is_blank(query: str) -> bool:
        with suppress(AssertionError):  # no query at all: the test of its panel will tell
            return highest(await started.graph(filled_in(query))) <= 0
        return False

    with suppress(TimeoutError):
        async with asyncio.timeout(LIMIT):
            while len(await started.graph("eventbus_up == 1")) < 3:
                await started.bell.ring()  # counters are seen at 0 before they grow

            async with away(shop, server):
                with suppress(EventBusError):
                    await shop.publish(Note(number=1))
                while not await started.graph("eventbus_up == 0"):
                    await started.bell.ring()

            while not (mail.stats().uncertain and mail.stats().publish_failed):
                server.freeze()
                with suppress(EventBusError):
                    mail.publish_nowait(Note(number=1))
                    await mail.publish(Note(number=1))
                server.thaw()
                await started.bell.ring()

            for hole in itertools.count(1, 3):
                await a_round(mail, hole)
                await a_round(shop, hole + 1)
                await started.bell.ring()
                blank = [query for query in blank if await is_blank(query)]
                if not blank and await started.active() >= FIRED:
                    break


# -- The tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", PANELS)
async def test_a_panel_shows_what_happened(seen: Prometheus, title: str) -> None:
    """Each query of the panel is one that Prometheus answers, has a series that is not 0 all the
    time, and has in each series the labels that its legend names; no two legends are the same."""
    legends = []
    for target in PANELS[title]["targets"]:
        series = await seen.graph(filled_in(target["expr"]))
        assert highest(series) > 0, target["expr"]
        legends += [legend(target, one["metric"]) for one in series]

    assert len({*legends}) == len(legends)
    assert all(text == text.strip() != "" for text in legends)


async def test_the_variable_lists_the_buses(seen: Prometheus) -> None:
    """The only variable with a query is `bus`: it offers each bus, once."""
    queries = {name: one["query"] for name, one in VARIABLES.items() if one["type"] == "query"}
    assert [*queries] == ["bus"]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", queries["bus"]["query"])
    assert found
    assert sorted(await seen.values(found[2], found[1])) == sorted(BUSES)


@pytest.mark.parametrize("title", PANELS)
async def test_a_choice_of_buses_is_kept(seen: Prometheus, title: str) -> None:
    """With both buses chosen a panel shows what it shows for all; with one, what is of that one;
    with none that there is, nothing."""
    for target in PANELS[title]["targets"]:
        every = await seen.graph(filled_in(target["expr"]))
        both = await seen.graph(filled_in(target["expr"], *BUSES))
        assert [one["metric"] for one in both] == [one["metric"] for one in every]
        assert await seen.graph(filled_in(target["expr"], "mail-eu")) == []
        labels = [one["metric"] for one in every]
        for bus in BUSES:
            alone = [one["metric"] for one in await seen.graph(filled_in(target["expr"], bus))]
            assert all(metric in labels for metric in alone)
            assert [metric for metric in alone if "bus" in metric] == [
                metric for metric in labels if metric.get("bus") == bus
            ]


async def test_two_processes_are_two(seen: Prometheus) -> None:
    """Two processes with a bus of one name are added up: two of `shop` receive, one of the
    other."""
    (up,) = [one for one in PANELS["Processes that receive"]["targets"] if "sum" in one["expr"]]
    series = {one["metric"]["bus"]: one for one in await seen.graph(filled_in(up["expr"]))}
    assert {bus: highest([one]) for bus, one in series.items()} == {"shop": 2, "mail.eu": 1}


async def test_the_alerts_are_rules(seen: Prometheus) -> None:
    """Prometheus takes the alerts of the page as they stand there, evaluates each without an error,
    and those for what happened here are active."""
    (group,) = (await seen.ask("rules"))["groups"]
    rules = {rule["name"]: rule for rule in group["rules"]}
    assert [*rules] == re.findall(r"- alert: (\w+)", "".join(ALERTS))
    assert {name: rule["lastError"] for name, rule in rules.items() if rule.get("lastError")} == {}
    assert {rule["health"] for rule in rules.values()} == {"ok"}
    assert await seen.active() >= FIRED
