"""The command line: look at a bus, speak on it, and find out what is wrong with it.

`main` is the script `eventbus`. It needs typer, of the extra `cli`; everything else is imported by
the command that needs it. What may enter: programs for people at a terminal, on public names.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

_MISSING = (
    "eventbus: the command line needs {name}: pip install 'eventbus-redis[cli]'"
    " (python -m eventbus.demo and python -m eventbus.server work without it)\n"
)


def main() -> int:
    """Run the command line; returns the exit code (docs/cli.md lists them)."""
    try:
        try:
            from eventbus.cli.commands import main_words
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "eventbus":
                raise
            sys.stderr.write(_MISSING.format(name=error.name))
            return 2
        return main_words()
    except KeyboardInterrupt:
        return 130
