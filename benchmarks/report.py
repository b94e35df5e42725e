"""Two forms of the same numbers: a table for people, JSON for the docs and the picture."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .meter import PACING
from .runs import Run, binary
from .targets import Medians, Verdict

PACKAGES = (
    "redis", "hiredis", "pydantic", "pydantic-core", "anyio", "orjson",
    "uvloop", "faststream", "valkey-glide",
)  # fmt: skip
TITLES = {
    "receive": "receiving",
    "publish_1": "publishing, 1 at a time",
    "publish_100": "publishing, 100 concurrent",
    "latency": "publish to handler, 1 ms apart",
    "latency_hot": "publish to handler, at once",
    "routes": "receiving with many routes",
    "lag": "lag of the loop under flood",
    "import": "import",
}
COLUMNS = {
    "per_second": ("messages/s", ",.0f"),
    "cpu_us": ("µs CPU/message", ".2f"),
    "busy": ("busy", ".2f"),
    "queued": ("no core", ".2f"),
    "p50_us": ("p50 µs", ".0f"),
    "p99_us": ("p99 µs", ".0f"),
    "lag_max_ms": ("worst lag ms", ".1f"),
    "cpu_ms": ("CPU ms", ".1f"),
}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def server_version() -> str:
    """Such as `redis 7.0.15`."""
    command = [binary(), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    found = re.search(r"(redis|valkey).*?v=([\d.]+)", said, re.IGNORECASE)
    return f"{found[1].lower()} {found[2]}" if found else said.strip()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "cores": cores(),
        "system": platform.platform(),
        "pacing": PACING,
        "versions": {
            "python": platform.python_version(),
            "server": server_version(),
            **{package: installed(package) for package in PACKAGES},
        },
    }


def document(
    runs: Mapping[str, Mapping[str, Sequence[Run]]], medians: Medians, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        **machine(),
        "medians": medians,
        "targets": [
            {**asdict(verdict.target), "value": verdict.value, "hit": verdict.hit,
             "note": verdict.note}
            for verdict in verdicts
        ],
        "runs": runs,
    }  # fmt: skip


def rendered(medians: Medians) -> str:
    """One block a section, only the columns that it has."""
    lines: list[str] = []
    for section, rows in medians.items():
        columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
        heads = "".join(f"{COLUMNS[key][0]:>16}" for key in columns)
        lines += ["", f"{TITLES[section]:30}{heads}"]
        for name, row in rows.items():
            cells = (format(row[key], COLUMNS[key][1]) if key in row else "-" for key in columns)
            lines.append(f"  {name:28}" + "".join(f"{cell:>16}" for cell in cells) + remark(row))
    return "\n".join(lines)


def remark(row: Mapping[str, Any]) -> str:
    """What a reader must know before believing the row."""
    if "error" in row:
        return f"  failed: {row['error']}"
    if not row["complete"]:
        return (
            f"  NOT EQUAL: {row.get('received', 0):,.0f} of {row.get('messages', 0):,.0f} arrived"
        )
    return ""


def judgement(verdicts: Sequence[Verdict]) -> str:
    lines = ["", "targets"]
    for verdict in verdicts:
        target = verdict.target
        value = "-" if verdict.value is None else f"{verdict.value:.2f}"
        word = {True: "hit", False: "MISS", None: "open"}[verdict.hit]
        lines.append(
            f"  {word:5}{value:>8} {target.relation} {target.bound:<6g}"
            f"{target.section}: {target.says}" + (f" ({verdict.note})" if verdict.note else "")
        )
    return "\n".join(lines)
