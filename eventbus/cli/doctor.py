"""`eventbus doctor`: is there anything between here and Redis that a bus would suffer from?

It prints what `checks` finds, line by line as it is found, with what to do about it.
"""

from __future__ import annotations

import os
import textwrap
import time
from typing import NamedTuple

from eventbus import BusUnavailable, PermissionDenied
from eventbus.cli import checks
from eventbus.cli.apps import load_bus, load_events, open_bus, place
from eventbus.cli.checks import Finding, Level
from eventbus.cli.programs import is_running
from eventbus.cli.terminal import (
    FAILED,
    OK,
    UNAVAILABLE,
    Colour,
    Terminal,
    clean,
    count_of,
    explain,
)

_COLOURS: dict[Level, Colour] = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "red"}


class Report:
    """Findings, printed as they come."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._width = min(terminal.width, 80)
        self.levels: list[Level] = []

    def add(self, finding: Finding) -> None:
        """Print it."""
        self.levels.append(finding.level)
        terminal, room = self._terminal, self._width - 21
        head = f"{finding.level:<5} {finding.about:<14}"
        painted = terminal.paint(head[:5], _COLOURS[finding.level]) + head[5:]
        rows = _wrap(finding.text, room) or [""]
        for number, row in enumerate(rows):
            terminal.line(f"{painted if number == 0 else ' ' * 20} {row}")
        for number, row in enumerate(_wrap(finding.do, room - 4)):
            terminal.line(f"{' ' * 21}{'do: ' if number == 0 else '    '}{row}")

    def count(self, level: Level) -> int:
        """How many of this level."""
        return self.levels.count(level)


def _wrap(text: str, columns: int) -> list[str]:
    """Cleaned, and broken between words alone: options have hyphens in them."""
    return textwrap.wrap(clean(text), columns, break_on_hyphens=False)


class Asked(NamedTuple):
    """The options of `doctor`."""

    app: str | None = None
    publishes: tuple[str, ...] = ()
    user: str | None = None


async def doctor(asked: Asked, url: str | None = None, namespace: str | None = None) -> int:
    """Print the findings. FAILED when one of them is a fault."""
    app = load_bus(asked.app) if asked.app else None
    events = load_events(list(asked.publishes))
    terminal = Terminal()
    report = Report(terminal)
    report.add(Finding("info", "client", checks.libraries()))
    where = url or os.environ.get("EVENTBUS_URL", "") if app is None else url or ""
    scheme, _, name = where.partition("://")
    if scheme == "embedded" and not is_running(name or "default"):  # a bus would start it
        text = f"the embedded server {name or 'default'!r} is not running"
        start = f"eventbus server start {name}".strip()
        report.add(Finding("fail", "reachable", text, f"start it: `{start}`"))
        return UNAVAILABLE
    bus = open_bus(url, namespace, app)
    began = time.perf_counter()
    try:
        await bus.start()
    except (BusUnavailable, PermissionDenied) as error:
        failure = explain(error)
        report.add(Finding("fail", "reachable", f"{failure.what}: {failure.where}", failure.do))
        return UNAVAILABLE
    try:
        took = time.perf_counter() - began
        report.add(Finding("ok", "reachable", f"{place(bus)}, in {took * 1e3:.0f} ms"))
        client = checks.Client(bus)
        report.add(await checks.probe(bus))
        for finding in await checks.of_connection(bus, client):
            report.add(finding)
        for finding in await checks.of_server(client):
            report.add(finding)
        if app is not None:
            for finding in await checks.of_rules(app, events, bus, client, asked.user):
                report.add(finding)
    finally:
        await bus.stop()
    warned, failed = report.count("warn"), report.count("fail")
    terminal.line(f"{count_of(failed, 'fault')}, {count_of(warned, 'warning')}")
    return FAILED if failed else OK
