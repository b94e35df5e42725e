"""The recorded cases of bad input: `cases.toml` says what each is and what must become of it.

A small payload is a file of its own, `<name>.bin`, the bytes as they would travel. A large one is
made from `parts`, rows of a text and how often it stands. `note` says why the case is there; each
other column is what one kind of handler makes of the payload: "delivered", "skipped", or how the
first reason of its one `InvalidEvent` begins.

    event      `event: Note` in an envelope        bare        `event: Note` with wire="bare"
    dict       `event: dict` in an envelope        bare_dict   `event: dict` with wire="bare"
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from eventbus import Event

HERE = Path(__file__).parent
VIEWS = ("event", "dict", "bare", "bare_dict")


class Note(Event):
    """What the payloads are, or pretend to be."""

    x: int
    text: str = ""
    ratio: float = 0.0


class Case(NamedTuple):
    """One payload, and per view what must become of it."""

    name: str
    payload: bytes
    outcomes: dict[str, str]


def _payload(row: dict[str, Any]) -> bytes:
    if "parts" in row:
        return b"".join(text.encode() * times for text, times in row["parts"])
    return (HERE / f"{row['name']}.bin").read_bytes()


def load() -> list[Case]:
    """All cases, in the order of the table."""
    rows = tomllib.loads((HERE / "cases.toml").read_text())["case"]
    return [Case(row["name"], _payload(row), {view: row[view] for view in VIEWS}) for row in rows]
