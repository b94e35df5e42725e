"""Coverage-guided fuzzing of what reads foreign bytes: `python -m tests.faults.fuzz envelope`.

    python -m tests.faults.fuzz TARGET [--runs N] [--seconds S] [--keep FOLDER]

The targets are in `corpus/targets.py`, the seeds are the recorded cases. atheris watches which
branches of the package each input takes and keeps the inputs that take new ones; `--keep` names a
folder where these stay from one run to the next. An input that breaks a target is printed as a
Python literal, and the exit code is not 0. Give it back with `--input FILE` to see it again.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONGEST = 4096
"""Bytes of an input: what is longer finds the same branches, and later."""
SLOWEST = 30
"""Seconds that one input may take. Nothing comes near it, on a slow machine too."""
MEMORY = 1024
"""MiB of the whole process."""


def instrumented() -> Any:
    """The module of the targets, instrumented with all that it imports of the package."""
    import atheris

    with atheris.instrument_imports(include=["eventbus", "tests"], enable_loader_override=False):
        return importlib.import_module("tests.faults.corpus.targets")


def main(argv: Sequence[str] | None = None) -> None:
    """Fuzz one target until a limit is reached (exit code 0) or an input breaks it (not 0)."""
    parser = argparse.ArgumentParser("python -m tests.faults.fuzz")
    parser.add_argument("target", choices=("envelope", "head", "pattern", "resp", "canary"))
    parser.add_argument("--runs", type=int, default=0, help="inputs; 0: as many as time allows")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that were worth it")
    parser.add_argument("--input", type=Path, help="run this one input and nothing else")
    arguments = parser.parse_args(argv)
    if arguments.input is None and arguments.keep is None:
        with tempfile.TemporaryDirectory(prefix="eventbus-fuzz-") as folder:
            again = [sys.executable, "-m", "tests.faults.fuzz", *(argv or sys.argv[1:])]
            sys.exit(subprocess.run([*again, "--keep", folder], check=False).returncode)
    module = instrumented()
    target = module.TARGETS[arguments.target]
    if arguments.input is not None:
        target(arguments.input.read_bytes())
        return

    import atheris

    def run(data: bytes) -> None:
        try:
            target(data)
        except BaseException:
            print(f"broken by: {data!r}", flush=True)
            raise

    folder = arguments.keep
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(module.seeds(arguments.target)):
        (folder / f"seed-{number:03}").write_bytes(seed)
    words = folder / "words.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in module.WORDS[arguments.target]))
    limits = [f"-max_total_time={arguments.seconds}", f"-max_len={LONGEST}", f"-dict={words}"]
    limits += [f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={folder}/"]
    if arguments.runs:
        limits.append(f"-runs={arguments.runs}")
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", str(folder)], run)
    atheris.Fuzz()  # it ends the process


def _escaped(word: bytes) -> str:
    """A word as libFuzzer's dictionaries spell it."""
    return "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word
    )


if __name__ == "__main__":
    main()
