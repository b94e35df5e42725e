"""What reaches the terminal, and how: cleaned, coloured for people alone, and never a traceback.

Names and payloads come from strangers, who may send escape sequences, line breaks and text that
turns the reading direction. `clean` lets through what is printable, and spells out everything else.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
import traceback
import unicodedata
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from eventbus import (
    BusUnavailable,
    EventBusError,
    InvalidChannel,
    InvalidEvent,
    InvalidPattern,
    PayloadTooLarge,
    PermissionDenied,
    PublishUncertain,
)

OK, FAILED, USAGE, UNAVAILABLE = 0, 1, 2, 3
INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143  # 128 and the signal: what shells say
"""The exit codes of every command (docs/cli.md)."""

Colour = Literal["bold", "dim", "red", "green", "yellow", "blue", "magenta", "cyan"]
_CODES: dict[Colour, str] = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}
_CHANNELS: tuple[Colour, ...] = ("cyan", "green", "magenta", "yellow", "blue")
_WIDE = ("W", "F")
_LOGIN = re.compile(r"(?<=://)[^\s@/]*:[^\s]*@")


class Failure(Exception):
    """A command cannot go on. Its three lines: what happened, where, and what to do."""

    def __init__(self, what: str, where: str, do: str, code: int = FAILED) -> None:
        super().__init__(what)
        self.what, self.where, self.do, self.code = what, where, do, code


def clean(text: str) -> str:
    """The text with everything spelled out that a terminal would obey instead of showing."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def hide_login(text: str) -> str:
    """The text without the user and the password of any URL in it."""
    return _LOGIN.sub("***@", text)


def width_of(text: str) -> int:
    """The columns that clean text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in _WIDE)
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """The text, or as much of it as fits in these columns, with an ellipsis."""
    if columns < 1:
        return ""
    if len(text) * 2 <= columns or width_of(text) <= columns:
        return text
    kept, used = [], 1
    for c in text:
        used += width_of(c)
        if used > columns:
            break
        kept.append(c)
    return "".join(kept) + "…"


def pad(text: str, columns: int) -> str:
    """The text, cut and filled to exactly these columns."""
    text = cut(text, columns)
    return text + " " * (columns - width_of(text))


def amount(number: float) -> str:
    """A number of bytes, short: `512 B`, `1.4 kB`, `23 MB`."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def count_of(number: int, noun: str) -> str:
    """`1 message`, `2,000 messages`, `3 copies`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


class Terminal:
    """Standard output for results, standard error for what is said beside them.

    Colours only where a terminal shows them, and not with NO_COLOR. A reader that has gone raises
    BrokenPipeError from `line` and `write`; `note` and `beside` never raise.
    """

    def __init__(self) -> None:
        self.is_screen = sys.stdout.isatty()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "")
        self._colours = self.is_screen and not plain
        self._encoding = sys.stdout.encoding or "utf-8"

    @property
    def width(self) -> int:
        """Columns of the screen; a line that goes to a file is as long as it is."""
        return shutil.get_terminal_size((80, 24)).columns if self.is_screen else 1 << 30

    @property
    def height(self) -> int:
        """Lines of the screen."""
        return shutil.get_terminal_size((80, 24)).lines

    def paint(self, text: str, colour: Colour) -> str:
        """The text in this colour, where there are colours."""
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self._colours else text

    def paint_channel(self, text: str, channel: str) -> str:
        """The text in the colour of this channel, which is the same at each start."""
        number = zlib.crc32(channel.encode("utf-8", "surrogatepass"))
        return self.paint(text, _CHANNELS[number % len(_CHANNELS)])

    def write(self, data: bytes) -> None:
        """These bytes, as they are, at once."""
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def line(self, text: str = "") -> None:
        """One line of results. The caller has cleaned what came from elsewhere."""
        self.write(f"{text}\n".encode(self._encoding, "backslashreplace"))

    def aside(self, text: str) -> None:
        """A line in the stream that is no result: a gap, a reconnect."""
        with suppress(OSError):
            self.line(self.paint(f"-- {text}", "yellow"))

    @staticmethod
    def note(text: str, indent: str = "") -> None:
        """One cleaned line on standard error; on a screen it is broken between words."""
        with suppress(OSError, ValueError):
            line = clean(hide_login(text))
            if sys.stderr.isatty():
                columns = shutil.get_terminal_size((80, 24)).columns
                line = textwrap.fill(
                    line, columns, subsequent_indent=indent, break_on_hyphens=False
                )
            sys.stderr.buffer.write(f"{line}\n".encode("utf-8", "backslashreplace"))
            sys.stderr.buffer.flush()


class LogLines(logging.Handler):
    """What the bus logs (a connection lost, and found again), handed to a function line by line;
    for commands that only listen, so what it says of the publishing connection is left out."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take
        logger = logging.getLogger("eventbus")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        line = clean(hide_login(record.getMessage()))
        if not line.startswith("publisher "):
            self._take(line)


def guard(work: Callable[[], int]) -> int:
    """Do the work of a command. Returns its exit code, whatever happens; errors take three
    lines, ctrl-c and a closed pipe none."""
    try:
        return work()
    except Failure as failure:
        return _tell(failure)
    except BrokenPipeError:
        # Whatever is still buffered goes nowhere, without a complaint at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _tell(explain(error))


def _tell(failure: Failure) -> int:
    Terminal.note(f"eventbus: {failure.what}")
    Terminal.note(f"  where: {failure.where}", " " * 9)
    Terminal.note(f"  do:    {failure.do}", " " * 9)
    return failure.code


def place_of(error: BaseException) -> str:
    """File and line where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"


def reasons(error: Exception) -> str:
    """Why data does not fit a class, in a line that holds none of the data."""
    found = getattr(error, "errors", None)
    if found is None:  # a validator of the application raised something of its own
        return type(error).__name__
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found())


def explain(error: Exception) -> Failure:
    """The three lines for an error."""
    text = str(error) or type(error).__name__
    if isinstance(error, BusUnavailable):
        return Failure(
            "Redis could not be reached",
            text.partition(". Is Redis running")[0],
            "start Redis (`eventbus server start`), or name another with --url or EVENTBUS_URL",
            UNAVAILABLE,
        )
    if isinstance(error, PermissionDenied):
        return Failure(
            "Redis refuses this user",
            text,
            "check the user and password of the URL, and its ACL rules: `eventbus acl module:bus`"
            " prints those that a bus needs, `eventbus doctor` tries them",
            UNAVAILABLE,
        )
    if isinstance(error, PublishUncertain):
        where = f"channel {error.channel!a}: {text}"
        do = "look whether it arrived before you publish it again"
        return Failure("nobody knows whether the message arrived", where, do)
    if isinstance(
        error, InvalidPattern | InvalidChannel | InvalidEvent | PayloadTooLarge | ValueError
    ):
        return Failure("this cannot be done", text, "correct it; see --help and docs/cli.md", USAGE)
    if isinstance(error, EventBusError):
        return Failure("the bus refuses this", text, "correct it; see docs/cli.md", USAGE)
    kind = type(error).__name__
    return Failure(
        f"unexpected {kind}: {text}"[:400],
        place_of(error),
        "this is a fault of eventbus or of your application: please report these three lines",
    )
