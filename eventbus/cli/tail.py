"""`eventbus tail`: what passes on the channels, line by line, and what was missed of it.

It listens as a bus does, so it sees what a handler would see: gaps and reconnects stand in the
stream. Payloads are read as bytes: what is no event at all is shown too.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import orjson

from eventbus import Event, Gap, Message, Messages, RouteInfo, Router
from eventbus.cli.apps import load_bus, open_bus, place
from eventbus.cli.terminal import (
    FAILED,
    OK,
    LogLines,
    Terminal,
    amount,
    clean,
    count_of,
    cut,
    reasons,
    width_of,
)

Form = Literal["text", "json", "raw"]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `tail`."""

    patterns: tuple[str, ...]
    form: Form = "text"
    count: int | None = None
    timeout: float | None = None
    rate: bool = False
    full: bool = False


async def tail(
    asked: Asked, url: str | None = None, namespace: str | None = None, app: str | None = None
) -> int:
    """Print messages until the count, the time, or the user ends it. FAILED when the time was over
    before the count."""
    Router().on(*asked.patterns)  # refuses what is no pattern before Redis is asked
    known = load_bus(app) if app else None
    bus = open_bus(url, namespace, known)
    terminal = Terminal()
    classes = classes_of(known.routes) if known else {}
    printer = Printer(terminal, asked, classes)
    meter = Meter(terminal) if asked.rate else None

    @bus.on_gap("*")
    def tell_gap(gap: Gap) -> None:
        printer.gap(gap)

    async with bus, bus.subscribe(*asked.patterns, bytes) as messages:
        LogLines(printer.log)
        shown = ", ".join(map(ascii, asked.patterns))
        terminal.note(f"listening to {shown} at {place(bus)}; ctrl-c ends")
        try:
            async with asyncio.timeout(asked.timeout):
                await follow(messages, asked.count, meter or printer)
        except TimeoutError:
            return OK if asked.count is None else FAILED
        finally:
            if meter is not None:
                meter.stop()
    return OK


async def follow(messages: Messages[bytes], count: int | None, to: Printer | Meter) -> None:
    """Show messages until there were so many."""
    seen = 0
    async for message in messages:
        to.show(message)
        seen += 1
        if seen == count:
            return


def classes_of(routes: tuple[RouteInfo, ...]) -> dict[str, type[Event]]:
    """The event classes that these routes name, by their type on the wire."""
    return {cls.__event_type__: cls for route in routes for cls in route.events}


class Printer:
    """Messages as lines."""

    def __init__(self, terminal: Terminal, asked: Asked, classes: dict[str, type[Event]]) -> None:
        self._terminal, self._form, self._full = terminal, asked.form, asked.full
        self._classes = classes

    def show(self, message: Message[bytes]) -> None:
        """Print one message. Raises BrokenPipeError."""
        if self._form == "raw":
            self._terminal.write(message.event + b"\n")
        elif self._form == "json":
            self._terminal.line(as_json(as_record(message)))
        else:
            self._terminal.line(self._text(message))

    def _text(self, message: Message[bytes]) -> str:
        terminal = self._terminal
        clock = f"{datetime.now():%H:%M:%S.%f}"[:-3]  # noqa: DTZ005 (the clock on the wall)
        data, kind = self._data(message)
        words = [clean(message.channel), *([clean(message.type or "-")] if kind != "typed" else [])]
        data = clean(data)
        if not self._full:
            words = [cut(word, max(terminal.width // 3, 12)) for word in words]
            room = terminal.width - width_of(" ".join((clock, *words))) - 1
            data = cut(data, max(room, 12))
        words[0] = terminal.paint_channel(words[0], message.channel)
        words[1:] = (terminal.paint(word, "dim") for word in words[1:])
        data = terminal.paint(data, "red") if kind == "unfit" else data
        return " ".join((terminal.paint(clock, "dim"), *words, data))

    def _data(self, message: Message[bytes]) -> tuple[str, Literal["any", "typed", "unfit"]]:
        """The event as text: anything, a value of its class, or why it is none."""
        record = as_record(message)
        if "payload" in record:
            return str(record["payload"]), "any"
        data = orjson.dumps(record["data"])
        cls = self._classes.get(message.type or "")
        if cls is None:
            return data.decode(), "any"
        try:
            return repr(cls.model_validate_json(data)), "typed"
        except Exception as error:  # a validator is the application's code
            return f"does not fit {cls.__name__}: {reasons(error)}", "unfit"

    def gap(self, gap: Gap) -> None:
        """Print a gap, in the stream unless it is raw."""
        since = f"{gap.since.astimezone():%H:%M:%S}"
        channel = clean(gap.channel or "*")
        number = "some messages" if gap.missed is None else count_of(gap.missed, "message")
        text = f"gap ({gap.reason}) on {channel} since {since}: {number} missed"
        if gap.reason == "reconnect":
            text = f"connected again: messages since {since} may have been missed"
        if gap.reason == "overflow":
            text += " (this terminal is too slow)"
        if self._form == "text":
            self._terminal.aside(text)
        elif self._form == "json":
            fields = {
                name: getattr(gap, name) for name in ("reason", "channel", "source", "missed")
            }
            with suppress(OSError):
                self._terminal.line(as_json({"gap": {**fields, "since": gap.since.isoformat()}}))
        else:
            self._terminal.note(text)

    def log(self, line: str) -> None:
        """Print what the bus says of its connection."""
        if self._form == "text":
            self._terminal.aside(line)
        else:
            self._terminal.note(line)


def as_record(message: Message[bytes]) -> dict[str, Any]:
    """What is known of a message. `data` is that of an envelope; without one, `payload` is text."""
    found: dict[str, Any] = {"channel": message.channel}
    if message.type is not None:
        for name in ("type", "id", "source", "sequence"):
            found[name] = getattr(message, name)
        found["time"] = message.time.isoformat() if message.time else None
        if message.headers:
            found["headers"] = dict(message.headers)
        with suppress(ValueError):
            whole = orjson.loads(message.event)
            if isinstance(whole, dict):
                found["data"] = whole.get("data", whole.get("data_base64"))
                return found
    return {**found, "payload": message.event.decode("utf-8", "backslashreplace")}


def as_json(record: dict[str, Any]) -> str:
    """One line of ASCII: nothing in it can move a terminal."""
    try:
        return json.dumps(record)
    except RecursionError:
        return json.dumps({"channel": record["channel"], "error": "too deep"})


class Meter:
    """`--rate`: one line a second in place of the messages."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._messages = self._bytes = 0
        self._channels: set[str] = set()
        self._since = time.monotonic()
        self._task = asyncio.create_task(self._tick())
        self._gone: OSError | None = None

    def show(self, message: Message[bytes]) -> None:
        """Count one message. Raises BrokenPipeError when nobody reads the lines."""
        if self._gone is not None:
            raise self._gone
        self._messages += 1
        self._bytes += len(message.event)
        if len(self._channels) < 100_000:
            self._channels.add(message.channel)

    async def _tick(self) -> None:
        while self._gone is None:
            await asyncio.sleep(1.0)
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        seconds, self._since = max(now - self._since, 1e-3), now
        clock = self._terminal.paint(f"{datetime.now():%H:%M:%S}", "dim")  # noqa: DTZ005
        more = "+" if len(self._channels) == 100_000 else ""
        size = amount(self._bytes / seconds)
        channels = count_of(len(self._channels), "channel")
        rate = f"{self._messages / seconds:>10,.0f} messages/s {size:>7}/s"
        self._messages = self._bytes = 0
        self._channels.clear()
        try:
            self._terminal.line(f"{clock} {rate}   {channels}{more}")
        except BrokenPipeError as error:
            self._gone = error

    def stop(self) -> None:
        """Print what was counted since the last line, and end."""
        self._task.cancel()
        if self._messages and self._gone is None:
            self._print()
