"""Run the campaign and write what it found. See the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import traceback
from dataclasses import asdict
from pathlib import Path

from tests.faults.campaign import beats, page
from tests.faults.campaign.faults import FAULTS
from tests.faults.campaign.stage import Figures
from tests.faults.campaign.subjects import SUBJECTS

ROOT = Path(__file__).parents[3]


async def run(faults: list[str], subjects: list[str]) -> list[Figures]:
    """Every fault under every subject, one after the other."""
    found = []
    for fault in faults:
        for subject in subjects:
            try:
                figures = await FAULTS[fault](subject)
            except Exception as error:
                traceback.print_exc()
                figures = Figures(subject, fault, remark=f"failed: {error!r}"[:200])
            print(page.line(figures), flush=True)
            found.append(figures)
    return found


def faults_of(found: list[Figures]) -> list[str]:
    """What must not be: ours duplicated, unreported, never recovered, or not measured."""
    wrong = []
    for figures in found:
        if figures.subject != "eventbus" or figures.remark.startswith("not measured"):
            continue
        bad = figures.remark or figures.duplicated or figures.unreported
        if bad or None in (figures.recovered, figures.noticed):
            wrong.append(page.line(figures))
    return wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    found = asyncio.run(run(options.only, options.subjects))
    costs = [] if options.dry else asyncio.run(beats.measure())
    if not options.dry:
        results = {
            "machine": page.machine(),
            "faults": [asdict(figures) for figures in found],
            "beats": costs,
        }
        (ROOT / "docs/reliability.json").write_text(json.dumps(results, indent=1) + "\n")
        page.write(ROOT, results)
    wrong = faults_of(found)
    for text in wrong:
        print(f"NOT AS PROMISED: {text}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
