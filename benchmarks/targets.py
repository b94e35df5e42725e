"""What we promised (design.md §6), and whether the medians keep it.

Two rates can be compared on messages per second only when each contestant had a core and work all
the time: one that waited for its messages shows the speed of the publisher and the server, and one
that waited for a core shows how many the machine has. So a receive ratio is judged on messages per
second when both were busy, else on CPU per message; both are printed, and the line says which.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BUSY = 0.9  # CPU seconds per second above which a contestant, not its source, sets the pace

Medians = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Target:
    """``ours`` divided by ``other`` (alone when that is None), in ``unit``, against ``bound``."""

    section: str
    says: str
    ours: str
    other: str | None
    unit: str
    relation: Literal[">=", "<="]
    bound: float


TARGETS = (
    Target("receive", "typed, against FastStream", "eventbus", "faststream", "rate", ">=", 30),
    Target("receive", "against redis-py listen()", "eventbus", "redis_py_listen", "rate", ">=", 2),
    Target("receive", "against the typed floor", "eventbus", "floor_typed", "rate", ">=", 0.45),
    Target("publish_100", "against redis-py", "eventbus", "redis_py", "per_second", ">=", 10),
    Target(
        "publish_100", "against valkey-glide", "eventbus", "valkey_glide", "per_second", ">=", 3
    ),
    Target("publish_1", "against redis-py", "eventbus", "redis_py", "per_second", ">=", 1),
    Target("latency", "p50 against redis-py", "eventbus", "redis_py", "p50_us", "<=", 0.65),
    Target("routes", "CPU, 10,000 against 1", "routes_10000", "routes_1", "cpu_us", "<=", 1.2),
    Target("lag", "worst lag of the loop, ms", "eventbus", None, "lag_max_ms", "<=", 20),
    Target(
        "import", "CPU against its ingredients", "eventbus", "ingredients", "cpu_ms", "<=", 1.15
    ),
)


@dataclass(frozen=True)
class Verdict:
    """``hit`` is None when the number could not be had; ``note`` says why, or what judged."""

    target: Target
    value: float | None
    hit: bool | None
    note: str = ""


def judge(target: Target, medians: Medians) -> Verdict:
    section = medians[target.section]
    names = [name for name in (target.ours, target.other) if name]
    for name in names:
        if not section.get(name, {}).get("complete"):
            return Verdict(target, None, None, f"no complete row of {name}")
    ours = section[target.ours]
    if target.other is None:
        value, note = float(ours[target.unit]), ""
    elif target.unit == "rate":
        value, note = rate(ours, section[target.other], target.other)
    else:
        value, note = ours[target.unit] / section[target.other][target.unit], ""
    hit = value >= target.bound if target.relation == ">=" else value <= target.bound
    return Verdict(target, value, hit, note)


def rate(ours: Mapping[str, Any], other: Mapping[str, Any], name: str) -> tuple[float, str]:
    """How many times as fast, and on which of the two measures."""
    per_second = ours["per_second"] / other["per_second"]
    cpu = other["cpu_us"] / ours["cpu_us"]
    reasons = [
        f"{who} waited for {'a core' if row['busy'] + row['queued'] >= BUSY else 'the publisher'}"
        for who, row in (("eventbus", ours), (name, other))
        if row["busy"] < BUSY
    ]
    if reasons:
        return cpu, f"on CPU, for {' and '.join(reasons)}; on messages/s {per_second:.2f}"
    return per_second, f"on messages/s; on CPU {cpu:.2f}"


def verdicts(medians: Medians) -> list[Verdict]:
    """One for each target whose section was run."""
    return [judge(target, medians) for target in TARGETS if target.section in medians]
