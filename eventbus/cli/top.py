"""`eventbus top`: the channels that are busy now, in a table that renews itself.

Memory is bounded: the channels that were quiet longest are forgotten when there are more than
`MAX_CHANNELS`; what they carried stays in the sums. On a screen the table is drawn in place by
four control sequences, which needs no library; into a pipe goes one table after another.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Literal, NamedTuple

from eventbus import Gap, Messages, Router
from eventbus.cli.apps import load_bus, open_bus, place
from eventbus.cli.terminal import OK, LogLines, Terminal, amount, clean, count_of, cut, pad

MAX_CHANNELS = 10_000
Order = Literal["rate", "bytes", "total", "channel", "seen"]

_ENTER, _LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


class Row:
    """What passed on one channel: since the last table, and since the start."""

    __slots__ = ("bytes", "bytes_rate", "channel", "messages", "rate", "seen", "total")

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.messages = self.bytes = self.total = 0
        self.rate = self.bytes_rate = self.seen = 0.0


class Table:
    """The channels, the one heard last at the end; and the sums over all that ever were."""

    def __init__(self, limit: int = MAX_CHANNELS) -> None:
        self._limit = limit
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._all = Row("")
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._rows)

    def count(self, channel: str, size: int, now: float) -> None:
        """One message."""
        row = self._rows.get(channel)
        if row is None:
            if len(self._rows) >= self._limit:
                self._rows.popitem(last=False)
                self.forgotten += 1
            row = self._rows[channel] = Row(channel)
        else:
            self._rows.move_to_end(channel)
        for each in (row, self._all):
            each.messages += 1
            each.bytes += size
            each.total += 1
            each.seen = now

    def turn(self, seconds: float) -> Row:
        """End an interval: its rates go into the rows. Returns the sums."""
        for row in (*self._rows.values(), self._all):
            row.rate, row.bytes_rate = row.messages / seconds, row.bytes / seconds
            row.messages = row.bytes = 0
        return self._all

    def best(self, number: int, order: Order) -> list[Row]:
        """The first rows in this order."""
        keys = {
            "rate": lambda row: (-row.rate, -row.total, row.channel),
            "bytes": lambda row: (-row.bytes_rate, -row.total, row.channel),
            "total": lambda row: (-row.total, row.channel),
            "channel": lambda row: row.channel,
            "seen": lambda row: (-row.seen, row.channel),
        }
        return sorted(self._rows.values(), key=keys[order])[:number]


class Asked(NamedTuple):
    """The options of `top`."""

    patterns: tuple[str, ...]
    interval: float = 1.0
    tables: int | None = None
    rows: int | None = None
    order: Order = "rate"


async def top(
    asked: Asked, url: str | None = None, namespace: str | None = None, app: str | None = None
) -> int:
    """Draw tables until so many were drawn, or the user ends it."""
    Router().on(*asked.patterns)  # refuses what is no pattern before Redis is asked
    bus = open_bus(url, namespace, load_bus(app) if app else None)
    terminal, table, said = Terminal(), Table(), [""]
    lost = [0]

    @bus.on_gap("*")
    def tell(gap: Gap) -> None:
        lost[0] += gap.missed or 0
        said[0] = f"last gap: {gap.reason}, {gap.missed or 'some'} missed"

    def log(line: str) -> None:
        said[0] = line

    async with bus, bus.subscribe(*asked.patterns, bytes) as messages:
        LogLines(log)
        reading = asyncio.create_task(read(messages, table))
        where = f"{', '.join(map(clean, asked.patterns))} at {place(bus)}"
        if terminal.is_screen:
            terminal.write(_ENTER)
        try:
            drawn, lines = 0, list[str]()
            while drawn != asked.tables:
                began = time.monotonic()
                await asyncio.wait({reading}, timeout=asked.interval)
                if reading.done():
                    reading.result()
                now = time.monotonic()
                total = table.turn(max(now - began, 1e-3))
                notes = [f"{lost[0]:,} missed" if lost[0] else "", said[0]]
                lines = lines_of(terminal, table, total, where, asked, notes, now)
                draw(terminal, lines)
                drawn += 1
        finally:
            reading.cancel()
            if terminal.is_screen:
                terminal.write(_LEAVE)
    if terminal.is_screen:  # the last table stays
        for line in lines:
            terminal.line(line)
    return OK


async def read(messages: Messages[bytes], table: Table) -> None:
    """Count what arrives, for ever."""
    async for message in messages:
        table.count(message.channel, len(message.event), time.monotonic())


def lines_of(
    terminal: Terminal,
    table: Table,
    total: Row,
    where: str,
    asked: Asked,
    notes: list[str],
    now: float,
) -> list[str]:
    """The lines of one table, none wider than the screen."""
    width = min(terminal.width, 120) if terminal.is_screen else 80
    height = terminal.height - 5 if terminal.is_screen else 20
    name = max(width - 42, 16)
    rows = table.best(asked.rows or max(height, 1), asked.order)
    channels = count_of(len(table), "channel")
    if table.forgotten:
        channels += f" (+{table.forgotten:,} forgotten)"
    sums = f"{total.rate:,.0f} messages/s, {amount(total.bytes_rate)}/s, {total.total:,} in all"
    lines = [
        terminal.paint(cut(where, width), "bold"),
        cut(f"{channels}, {sums}", width),
        terminal.paint(cut(", ".join(filter(None, notes)), width), "yellow"),
        terminal.paint(
            f"{pad('CHANNEL', name)} {'MSG/S':>9} {'BYTES/S':>9} {'TOTAL':>11}  SEEN", "dim"
        ),
    ]
    for row in rows:
        shown = terminal.paint_channel(pad(clean(row.channel), name), row.channel)
        lines.append(
            f"{shown} {row.rate:>9,.0f} {amount(row.bytes_rate):>9} {row.total:>11,}"
            f" {age(now - row.seen):>6}"
        )
    return lines if rows else [*lines, terminal.paint("nothing has passed yet", "dim")]


def age(seconds: float) -> str:
    """How long ago, in at most six characters."""
    if seconds < 1:
        return "now"
    for unit, size in (("s", 60), ("m", 60), ("h", 24)):
        if seconds < size:
            return f"{seconds:.0f} {unit}"
        seconds /= size
    return f"{seconds:.0f} d"


def draw(terminal: Terminal, lines: list[str]) -> None:
    """Put a table on the screen, or print it. Raises BrokenPipeError."""
    if terminal.is_screen:
        text = f"{_END_OF_LINE}\r\n".join(lines)
        terminal.write(f"{_HOME}{text}{_END_OF_LINE}{_BELOW}".encode("utf-8", "backslashreplace"))
    else:
        terminal.write("".join(f"{line}\n" for line in (*lines, "")).encode("utf-8", "replace"))
