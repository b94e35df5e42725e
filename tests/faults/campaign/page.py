"""How the figures are shown: a line in the terminal, and the tables of docs/reliability.md.

The prose of the page is written by hand; what stands between its `measured` marks is written here.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report import cores
from eventbus.server import find_binary
from tests.faults.campaign.stage import Figures
from tests.faults.campaign.subjects import HEARTBEAT, RATE

NAMES = {"eventbus": "eventbus", "redis_py": "redis-py `PubSub`", "faststream": "FastStream"}
FAULT_HEAD = (
    "| | noticed after | receiving again after | sent | delivered | reported missing"
    " | missing, unreported | uncertain | duplicated | worst loop lag | CPU while down |"
)
BEAT_HEAD = (
    "| channels changed | announced in one heartbeat | bytes | CPU of the source"
    " | CPU of each receiver | longest hold of its loop | last words lost | told, beat on"
    " | after heartbeats | told, beat off |"
)
PACKAGES = ("redis", "hiredis", "anyio", "pydantic", "faststream")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cores": cores(),
        "system": platform.system(),
        "heartbeat": HEARTBEAT,
        "rate": RATE,
        "root": os.geteuid() == 0,
        "versions": {
            "python": platform.python_version(),
            "server": server_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


def server_version() -> str:
    """Such as `Valkey 9.1.2`: what the controller starts."""
    command = [find_binary(), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    found = re.search(r"(redis|valkey).*?v=([\d.]+)", said, re.IGNORECASE)
    return f"{found[1].capitalize()} {found[2]}" if found else said.strip()


def line(figures: Figures) -> str:
    """One row for the terminal."""
    return (
        f"{figures.fault:<40} {figures.subject:<11} noticed {_seconds(figures.noticed):>7}"
        f" recovered {_seconds(figures.recovered):>7}  sent {figures.sent:>5}"
        f" delivered {figures.delivered:>5} missing {figures.missing:>5}"
        f" reported {figures.reported:>5} unreported {figures.unreported:>5}"
        f" duplicated {figures.duplicated:>3}  lag {figures.lag_ms} ms"
        f" cpu {figures.cpu_down} {figures.remark}"
    )


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


def _row(figures: Mapping[str, Any]) -> str:
    name = NAMES[figures["subject"]]
    if figures["remark"]:
        return f"| {name} | {figures['remark']} |" + " |" * 9
    cpu = figures["cpu_down"]
    return (
        f"| {name} | {_seconds(figures['noticed'])} | {_seconds(figures['recovered'])}"
        f" | {figures['sent']:,} | {figures['delivered']:,} | {figures['reported']:,}"
        f" | {figures['unreported']:,} | {figures['uncertain']:,} | {figures['duplicated']:,}"
        f" | {figures['lag_ms']:.0f} ms | {'' if cpu is None else f'{cpu:.2f} s'} |"
    )


def faults_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A small table for each fault."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for figures in found:
        groups[figures["fault"]].append(figures)
    parts = []
    for fault, rows in groups.items():
        parts += [
            f"**{fault[0].upper()}{fault[1:]}**",
            "",
            FAULT_HEAD,
            "|---" * 11 + "|",
            *map(_row, rows),
            "",
        ]
    return "\n".join(parts)


def beats_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the beat costs and finds."""
    parts = [
        BEAT_HEAD,
        "|---" * 10 + "|",
    ]
    for row in rows:
        with_, without = row["with"], row["without"]
        after = f"{with_['heartbeats']:.1f}" if with_["told"] else ""
        parts.append(
            f"| {row['channels']:,} | {row['announced']:,} | {row['bytes']:,}"
            f" | {row['source_ms']:.1f} ms | {row['receiver_ms']:.1f} ms"
            f" | {row['slowest_ms']:.1f} ms | {with_['lost']:,} | {with_['told']:,}"
            f" | {after} | {without['told']:,} |"
        )
    return "\n".join(parts) + "\n"


def scenarios(tests: Path) -> dict[int, list[str]]:
    """The tests (or files) that carry each number of the catalogue."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(tests.rglob("test_*.py")):
        file = str(path.relative_to(tests.parent))
        for node in ast.walk(ast.parse(path.read_text())):
            name, marks = file, []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, marks = f"{file}::{node.name}", node.decorator_list
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                marks = [node.value]
            for mark in marks:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.scenario":
                    for number in mark.args:
                        found[ast.literal_eval(number)].append(name)
    return dict(sorted(found.items()))


def _conditions(facts: Mapping[str, Any]) -> str:
    versions = facts["versions"]
    return (
        f"Measured on {facts['date']} with {versions['server']}, Python {versions['python']},"
        f" redis-py {versions['redis']}, FastStream {versions['faststream']}, on"
        f" {facts['cores']} cores ({facts['system']}); {facts['rate']:.0f} messages a second on 20"
        f" channels; eventbus with `heartbeat={facts['heartbeat']}`, the others with their"
        " defaults.\n"
    )


def write(root: Path, results: Mapping[str, Any]) -> None:
    """Put the figures between the marks of the page."""
    page = root / "docs/reliability.md"
    text = page.read_text()
    for name, content in {
        "conditions": _conditions(results["machine"]),
        "faults": faults_table(results["faults"]),
        "beats": beats_table(results["beats"]),
    }.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        made = f"{begin}\n\n{content}\n{end}"
        text, count = re.subn(pattern, lambda _, made=made: made, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"docs/reliability.md has no place for {name}")
    page.write_text(text)
