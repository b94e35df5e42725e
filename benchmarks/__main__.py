"""The door: `python -m benchmarks` runs the rows, prints what came out, writes it down.

A full run takes some minutes and writes docs/benchmarks.json; a quick or partial one writes only
where `--out` says, so that it never replaces the published numbers by accident.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from .meter import PACING
from .report import document, judgement, rendered
from .rows import SECTIONS, alternate, medians, rows
from .runs import Run
from .stages import stages
from .targets import verdicts

PUBLISHED = Path("docs/benchmarks.json")
QUICK_SECTIONS = ("receive", "publish")
QUICK_SECONDS = 38.0  # no round starts that would end later, so that the whole ends under 45
FULL_SECONDS = 900.0  # the same for each section of a full run; a bound, not an aim


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="receive and publish, under 45 s")
    parser.add_argument("--runs", type=int, default=5, help="rounds of each section (5)")
    parser.add_argument("--only", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help=f"the JSON; a full run's is {PUBLISHED}")
    parser.add_argument("--profile", action="store_true", help="the profile of a message alone")
    chosen = parser.parse_args()
    chosen.sections = tuple(chosen.only.split(",")) if chosen.only else SECTIONS
    if chosen.quick and not chosen.only:
        chosen.sections = QUICK_SECTIONS
    if unknown := set(chosen.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if chosen.runs < 1:
        parser.error("at least one run")
    if not (chosen.quick or chosen.only or chosen.out):
        chosen.out = PUBLISHED
    return chosen


def tell(line: str) -> None:
    """Progress, on a terminal only: logs get the table."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def main() -> None:
    chosen = options()
    if chosen.profile:
        print(stages())
        return
    runs: dict[str, dict[str, list[Run]]] = {}
    tables = [rows(section, quick=chosen.quick) for section in chosen.sections]
    if chosen.quick:
        tables = [[row for table in tables for row in table]]  # one budget, equal rounds for all
    seconds = QUICK_SECONDS if chosen.quick else FULL_SECONDS
    for table in tables:
        runs |= alternate(table, chosen.runs, time.monotonic() + seconds, tell)
    tell("")
    found = {
        section: {name: medians(results) for name, results in table.items()}
        for section, table in runs.items()
    }
    judged = verdicts(found)
    rounds = {
        row["runs"] for table in found.values() for row in table.values() if "error" not in row
    }
    print(f"median of {'-'.join(map(str, sorted(rounds))) or 0} alternating runs; flood: {PACING}")
    print(rendered(found))
    print(judgement(judged))
    if not chosen.quick:
        print("\nthe profile of a message\n" + stages())
    if chosen.out:
        text = json.dumps(document(runs, found, judged), indent=1)
        chosen.out.write_text(text + "\n")
        print(f"\nwritten: {chosen.out}")


if __name__ == "__main__":
    main()
