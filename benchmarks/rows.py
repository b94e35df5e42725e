"""Which contestant runs in which section, how often, and what of it counts.

Rows of a section alternate (A B C A B C ...) and not one after the other (A A A B B B ...), so that
a machine that slows down for a while slows all of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

from .runs import Run, RunFailed, imported, published, received, travelled


@dataclass(frozen=True)
class Row:
    section: str
    name: str
    run: Callable[[], Run]


# name: wire, messages (a second's worth here, so that a run is short and the noise small)
RECEIVE = {
    "floor_untyped": ("bare", 409_600),
    "floor_typed": ("bare", 307_200),
    "eventbus": ("cloudevents", 153_600),
    "valkey_glide": ("bare", 102_400),
    "redis_py_listen": ("bare", 76_800),
    "faststream": ("faststream", 7_680),
}
PUBLISH = {  # messages with 1 task, with 100
    "eventbus": (6_000, 100_000),
    "eventbus_uvloop": (6_000, 150_000),
    "redis_py": (6_000, 10_000),
    "valkey_glide": (5_000, 30_000),
    "faststream": (5_000, 7_000),
}
LATENCY = ("floor", "eventbus", "redis_py", "faststream")
PAUSES = {"latency": (1_000, 0.001), "latency_hot": (2_000, 0.0)}  # messages, seconds between them
LAG = {name: RECEIVE[name] for name in ("floor_typed", "eventbus", "redis_py_listen", "faststream")}
ROUTES = (1, 10_000)
IMPORT = ("ingredients", "eventbus")
QUICK = {"floor_typed", "eventbus", "redis_py", "redis_py_listen", "faststream"}
SECTIONS = ("receive", "publish", "latency", "routes", "lag", "import")


def rows(section: str, *, quick: bool = False) -> list[Row]:
    """The rows of a section, in the order in which they alternate. Quick: fewer and shorter."""
    share = 3 if quick else 1

    def make(table: str, name: str, run: Callable[..., Run], *words: object) -> list[Row]:
        return [] if quick and name not in QUICK else [Row(table, name, partial(run, name, *words))]

    match section:
        case "receive":
            return [
                row
                for name, (wire, messages) in RECEIVE.items()
                for row in make("receive", name, received, wire, messages // share)
            ]
        case "publish":
            return [
                row
                for at, concurrent in enumerate((1, 100))
                for name, messages in PUBLISH.items()
                for row in make(
                    f"publish_{concurrent}",
                    name,
                    published,
                    messages[at] // share // 100 * 100,
                    concurrent,
                )
            ]
        case "latency":
            return [
                row
                for table, (messages, pause) in PAUSES.items()
                for name in LATENCY
                for row in make(table, name, travelled, messages, pause)
            ]
        case "routes":
            return [
                Row(
                    "routes",
                    f"routes_{n}",
                    partial(received, "eventbus_routes", "fresh", 102_400, "--routes", n),
                )
                for n in ROUTES
            ]
        case "lag":
            return [
                Row("lag", name, partial(received, name, wire, messages, "--heartbeat"))
                for name, (wire, messages) in LAG.items()
            ]
        case "import":
            return [Row("import", name, partial(imported, name)) for name in IMPORT]
    raise ValueError(f"no section {section!r}; there are {', '.join(SECTIONS)}")


def alternate(
    rows: list[Row], runs: int, deadline: float, tell: Callable[[str], None]
) -> dict[str, dict[str, list[Run]]]:
    """Every row once, and again, ``runs`` times; no further round that would pass the deadline.

    A row that fails says why and is not tried again.
    """
    done: dict[str, dict[str, list[Run]]] = {}
    for number in range(runs):
        begin = time.monotonic()
        for row in rows:
            results = done.setdefault(row.section, {}).setdefault(row.name, [])
            if any("error" in run for run in results):
                continue
            tell(f"{row.section}: {row.name}, run {number + 1} of {runs}")
            try:
                results.append(row.run())
            except (RunFailed, RuntimeError, OSError) as error:
                results.append({"complete": False, "error": str(error)})
        now = time.monotonic()
        if now + (now - begin) > deadline:
            break
    return done


def medians(runs: list[Run]) -> Run:
    """The median of every number that all runs have, and what went wrong in any of them."""
    errors = [run["error"] for run in runs if "error" in run]
    summary: Run = {"runs": len(runs), "complete": all(run["complete"] for run in runs)}
    if errors:
        return summary | {"error": errors[0]}
    for key, value in runs[0].items():
        if type(value) in (int, float) and all(key in run for run in runs):
            summary[key] = median(run[key] for run in runs)
    return summary
