"""Where the time of one message goes: the profile of a receive and of a publish in eventbus.

Why cProfile and not clocks in the code: it knows nothing of the inside, so it stays true when the
inside changes; the modules of the package are the stages. It charges every Python call about
0.1 µs, so small functions look dearer than they are: read shares, not absolutes. The cost that is
printed as true comes from a run without it.
"""

import pstats
import tempfile
from collections.abc import Callable
from pathlib import Path

from .runs import Run, RunFailed, published, received

TOP = 20  # functions listed

JOBS: dict[str, tuple[int, Callable[..., Run]]] = {
    "receive": (51_200, lambda n, *flags: received("eventbus", "cloudevents", n, *flags)),
    "publish": (40_000, lambda n, *flags: published("eventbus", n, 100, *flags)),
}


def stage(file: str) -> str:
    """The module that a profiled line belongs to: ours by name, others by their package."""
    path = Path(file)
    for package in ("eventbus", "benchmarks", "redis", "pydantic", "asyncio", "anyio"):
        if package in path.parts:
            inside = path.parts[len(path.parts) - path.parts[::-1].index(package) :]
            own = package == "eventbus"
            return f"{package}/{'/'.join(inside)}" if own else package
    return "C functions" if file == "~" else path.stem


def breakdown(profile: Path, messages: int) -> str:
    """µs per message of every stage, and of the functions that cost most."""
    # {(file, line, function): (calls, calls, own time, time with callees, callers)}
    entries = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]
    by_stage: dict[str, float] = {}
    by_function: dict[str, tuple[float, float]] = {}
    for (file, _, function), (_, calls, own, _, callers) in entries.items():
        if "poll" in function and "select" in function:
            continue  # waiting is not work
        by_function[f"{stage(file)}: {function}"] = (own, calls)
        if file != "~":
            by_stage[stage(file)] = by_stage.get(stage(file), 0.0) + own
            continue
        for (caller, _, _), (_, _, share, _) in callers.items():  # C time belongs to its caller
            by_stage[stage(caller)] = by_stage.get(stage(caller), 0.0) + share
    scale = 1e6 / messages
    total = sum(by_stage.values()) * scale
    lines = [f"  {'stage (with the C it calls)':48}{'µs':>8}{'share':>8}"]
    for name, own in sorted(by_stage.items(), key=lambda item: -item[1]):
        if own * scale / total >= 0.005:
            lines.append(f"  {name:48}{own * scale:8.2f}{own * scale / total:8.0%}")
    lines.append(f"  {'function':62}{'µs':>8}{'calls':>8}")
    ranked = sorted(by_function.items(), key=lambda item: -item[1][0])[:TOP]
    lines += [
        f"  {name[:60]:62}{own * scale:8.2f}{calls / messages:8.2f}"
        for name, (own, calls) in ranked
    ]
    return "\n".join(lines)


def stages() -> str:
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (messages, run) in JOBS.items():
            path = Path(folder, name)
            try:
                plain = run(messages)
                run(messages, "--profile", path)
            except RunFailed as error:
                parts.append(f"one {name}: failed: {error}")
                continue
            parts.append(f"one {name}: {plain['cpu_us']:.2f} µs CPU without the profiler")
            parts.append(breakdown(path, messages))
    return "\n".join(parts)
