"""The picture of the numbers: `python -m benchmarks.plot docs/benchmarks.json docs/benchmarks.svg`.

One SVG for light and dark pages: no background, and only middle tones, which stand out on both.
The same JSON always gives the same bytes, so a diff of the picture means a diff of the numbers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes

OURS, FLOOR, PEER, INK = "#e5484d", "#8b8d98", "#4f8fd0", "#80838d"
PANELS = {  # section: title, number, which way is better
    "receive": ("Receiving, messages/s", "per_second", "more is better"),
    "publish_100": ("Publishing, 100 concurrent, messages/s", "per_second", "more is better"),
    "publish_1": ("Publishing, 1 at a time, messages/s", "per_second", "more is better"),
    "latency": ("From publish to handler, p50 µs", "p50_us", "less is better"),
}
NAMES = {
    "eventbus": "eventbus",
    "eventbus_uvloop": "eventbus, uvloop",
    "floor": "floor: no client",
    "floor_typed": "floor: parse, validate, await",
    "floor_untyped": "floor: parse only",
    "redis_py": "redis-py",
    "redis_py_listen": "redis-py listen(), untyped",
    "faststream": "FastStream",
    "valkey_glide": "valkey-glide",
}
RECEIVER_NAMES = NAMES | {
    "eventbus": "eventbus, typed",
    "faststream": "FastStream, typed",
    "valkey_glide": "valkey-glide, untyped",
}


def colour(name: str) -> str:
    return OURS if name.startswith("eventbus") else FLOOR if name.startswith("floor") else PEER


def panel(axes: Axes, section: str, rows: dict[str, dict[str, Any]]) -> None:
    title, key, better = PANELS[section]
    shown = {name: row[key] for name, row in rows.items() if row["complete"] and key in row}
    ranked = sorted(shown, key=lambda name: shown[name], reverse=better.startswith("more"))
    values = [shown[name] for name in ranked]
    names = RECEIVER_NAMES if section == "receive" else NAMES
    bars = axes.barh(
        [names.get(name, name) for name in ranked],
        values,
        color=[colour(name) for name in ranked],
        height=0.7,
    )
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4, color=INK, fontsize=9)
    axes.set_title(f"{title} ({better})", loc="left", color=INK, fontsize=10, fontweight="bold")
    axes.set_xlim(0, max(values, default=1.0) * 1.15)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw(document: dict[str, Any], path: Path) -> None:
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "eventbus"}
    sections = [section for section in PANELS if section in document["medians"]]
    heights = [len(document["medians"][section]) + 1.2 for section in sections]
    figure, grid = pyplot.subplots(
        len(sections),
        figsize=(8, sum(heights) * 0.3 + 0.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, section in zip(grid[:, 0], sections, strict=True):
        panel(axes, section, document["medians"][section])
    versions = document["versions"]
    figure.supxlabel(
        f"{document['date'][:10]}, {document['cores']} cores, Python {versions['python']}, "
        f"{versions['server']}, redis-py {versions['redis']}, pydantic {versions['pydantic']}; "
        "150-byte event, medians of alternating runs",
        fontsize=7.5,
        color=INK,
    )
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text()), target)
