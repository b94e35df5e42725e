"""The decisions of .ci/run that need more than a line of shell. Standard library only.

- `gates.py coverage JSON`: fail below the coverage gates (JSON: what `coverage json` wrote).
- `gates.py oldest NAME`: print the oldest version of NAME that pyproject.toml allows.
- `gates.py other-python`: print the newest other Python >= 3.11 on this machine, if there is one.
- `gates.py summary FOLDER`: list the skips in all JUnit reports of FOLDER, then the sums. With
  CI=true a skip is a failure.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

# The pure modules have no I/O to hide behind: every line and every branch.
PURE = (
    "_errors",
    "_patterns",
    "_events",
    "_beats",
    "_acl",
    "_messages",
    "_codec",
    "_envelope",
    "_handlers",
    "_index",
    "_router",
    "_sequences",
    "_settings",
    "transports/base",
)
# Elsewhere some branches need an accident that no test can order at the right moment.
REST_PERCENT = 95.0


def coverage(report: str) -> int:
    """Hold every pure module to 100 %, and all others together to REST_PERCENT."""
    files = json.loads(Path(report).read_text(encoding="utf-8"))["files"]
    summaries = {name: data["summary"] for name, data in files.items()}
    pure = {f"eventbus/{name}.py" for name in PURE}
    faults = [f"{name}: not measured; was it renamed?" for name in sorted(pure - set(summaries))]
    for name in sorted(pure & set(summaries)):
        lines, branches = summaries[name]["missing_lines"], summaries[name]["missing_branches"]
        if lines or branches:
            faults.append(f"{name}: {lines} lines and {branches} branches missing, 100 % wanted")

    rest = [summary for name, summary in summaries.items() if name not in pure]
    covered = sum(s["covered_lines"] + s["covered_branches"] for s in rest)
    possible = sum(s["num_statements"] + s["num_branches"] for s in rest)
    percent = 100 * covered / possible if possible else 100.0
    if percent < REST_PERCENT:
        faults.append(f"all other modules together: {percent:.1f} %, {REST_PERCENT:.0f} % wanted")

    for fault in faults:
        print(f"coverage gate: {fault}")
    if not faults:
        print(f"Coverage: pure modules 100 %, all others {percent:.1f} %.")
    return 1 if faults else 0


def oldest(name: str) -> int:
    """Print a requirement that pins a dependency to its floor: `redis[hiredis]==7.0`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        match = re.fullmatch(rf"({re.escape(name)}(?:\[.*?\])?)>=([\w.]+).*", requirement)
        if match:
            print(f"{match[1]}=={match[2]}")
            return 0
    print(f"pyproject.toml names no floor (>=) for {name}", file=sys.stderr)
    return 1


def other_python() -> int:
    """Print the path of the newest Python of another minor version than this one, 3.11 or newer."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += (Path.home() / ".pyenv" / "versions").glob("*/bin")
    found: dict[tuple[int, ...], str] = {}
    for candidate in (path for folder in folders for path in folder.glob("python3.*")):
        if not re.fullmatch(r"python3\.\d+", candidate.name):
            continue
        # It must run (pyenv's shims of inactive versions do not) and be able to make environments.
        probe = "import sys, ensurepip, venv; print(*sys.version_info[:3], sys.executable)"
        answer = subprocess.run(
            [candidate, "-I", "-c", probe], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            *version, executable = answer.stdout.split(maxsplit=3)
            found[tuple(map(int, version))] = executable.strip()
    others = [v for v in found if v >= (3, 11) and v[:2] != sys.version_info[:2]]
    if others:
        print(found[max(others)])
    return 0


def summary(folder: str) -> int:
    """Print each skip of each run, then the sums of all runs as the log's last line."""
    passed = failed = 0
    skips: list[str] = []
    for report in sorted(Path(folder).glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            skip = case.find("skipped")
            if skip is not None:
                test = f"{case.get('classname')}::{case.get('name')}"
                skips.append(f"{report.stem}: {test}: {skip.get('message')}")
            elif case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            else:
                passed += 1

    print("Skipped tests of all runs:" if skips else "Skipped tests of all runs: none")
    for line in skips:
        print(f"  {line}")
    forbidden = bool(skips) and os.environ.get("CI") == "true"
    if forbidden:
        print("A skip is a failure here (CI=true): what a test needs must be installed by .ci/run.")
    print(f"total: {passed} passed, {failed} failed" + (f", {len(skips)} skipped" if skips else ""))
    return 1 if forbidden or failed or not passed else 0


if __name__ == "__main__":
    commands = {
        "coverage": coverage,
        "oldest": oldest,
        "other-python": other_python,
        "summary": summary,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
