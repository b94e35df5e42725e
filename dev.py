"""Make the virtual environment ready: `python3 dev.py [--venv DIR] [--remake] [EXTRA ...]`.

The Makefile calls this before every command. The script needs the standard library only, is safe to
run at any time, and says nothing when there is nothing to do.

An environment is ready when its stamp, one file for each extra, holds today's fingerprint: what
pyproject.toml says of the build and of the dependencies (a new linter setting installs nothing),
and where the project and the environment are (a copied tree is not trusted). `uv sync` takes pip
out, and perhaps more, so an environment without pip is not ready either.

It must stay readable for a Python as old as 3.6, or the sentence that names the old version would
be a SyntaxError.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 11)


def main():
    """Check the interpreter, then create or complete the environment where that is needed."""
    parser = argparse.ArgumentParser(description="Make the virtual environment ready.")
    parser.add_argument("--venv", default=".venv", help="its folder (default: .venv)")
    parser.add_argument(
        "--remake",
        action="store_true",
        help="make it anew where it was made by a Python of another version than this one",
    )
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml (default: dev)")
    options = parser.parse_args()

    check_interpreter()
    venv = ROOT / options.venv  # An absolute --venv stays what it is.
    python = venv / "bin" / "python"
    found = version_of(venv)
    if found is None or found < OLDEST or (options.remake and found != sys.version_info[:3]):
        python_exists = False
    else:
        python_exists = python.exists()  # False for a link to an interpreter that is gone.
    extras = sorted({"dev", *options.extras})
    stamps = [venv / (".ready-" + extra) for extra in extras]
    fingerprint = fingerprint_of(venv)
    pip_exists = (venv / "bin" / "pip").exists()
    stamped = all(stamp.exists() and stamp.read_text() == fingerprint for stamp in stamps)
    if python_exists and pip_exists and stamped:
        return

    version = ".".join(map(str, found if python_exists else sys.version_info[:3]))
    say(f"Setting up {options.venv} for {' and '.join(extras)}, with Python {version} ...")
    started = time.monotonic()
    if not python_exists:
        if venv.exists():
            if not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
                leave(f"{venv} is no virtual environment: remove it, or name another folder.")
            shutil.rmtree(str(venv))
        run(sys.executable, "-m", "venv", str(venv))
    elif not pip_exists:
        run(str(python), "-m", "ensurepip", "--upgrade", "--default-pip")
    for stamp in venv.glob(".ready-*"):
        stamp.unlink()  # Nothing is ready while pip is at work.
    run(
        *(str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"),
        *("--editable", f".[{','.join(extras)}]"),
    )
    for stamp in stamps:
        stamp.write_text(fingerprint)
    say(f"... ready in {time.monotonic() - started:.0f} s.")


def check_interpreter():
    """Leave with one sentence when this interpreter cannot make the environment."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        leave(
            f"eventbus needs Python 3.11 or newer, and {sys.executable} is {version}:"
            " install a newer one, then name it, for example `PYTHON=python3.13 make test`."
        )
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        leave(
            f"{sys.executable} (Python {version}) has no venv module:"
            " install it with `apt install python3-venv` (Debian, Ubuntu), then run this again."
        )


def version_of(venv):
    """Return the version of the Python that an environment was made with; None without one."""
    try:
        lines = (venv / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return None
    settings = {key.strip(): value.strip() for key, _, value in (s.partition("=") for s in lines)}
    text = settings.get("version") or settings.get("version_info") or ""  # venv's word, or uv's
    numbers = [int(part) for part in text.split(".")[:3] if part.isdigit()]
    return tuple(numbers) or None


def fingerprint_of(venv):
    """Return a digest of everything that decides what must be installed."""
    import tomllib  # New in 3.11: only after the interpreter was checked.

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packaging = project["build-system"], project["project"], project["tool"]["hatch"]
    parts = [*packaging, str(ROOT), str(venv)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run(*command):
    """Run one command of the set-up in the project's folder, or leave with its words above ours."""
    # Only what goes wrong is shown.
    result = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        leave(f"The set-up stopped at `{' '.join(command)}`: the reason stands above.")


def say(text):
    """Tell the developer, apart from what a command prints as its result."""
    print(text, file=sys.stderr, flush=True)


def leave(text):
    """Say why the set-up cannot go on, and end."""
    say(text)
    sys.exit(1)


if __name__ == "__main__":
    # An activated environment or an inherited path must not reach into the one made here.
    for name in ("PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__"):
        os.environ.pop(name, None)
    main()
