"""`eventbus publish`: put events on a channel by hand, and say how many copies Redis handed out."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError, create_model

from eventbus import Event, EventBus, Receipt
from eventbus.cli.apps import load_bus, open_bus, place
from eventbus.cli.tail import classes_of
from eventbus.cli.terminal import OK, USAGE, Failure, Terminal, clean, count_of, reasons

_DEFAULT_TYPE = "cli"
_MAX_LINE = 4 << 20
_NOBODY = (
    "nobody listens on that channel here. Is it the same server, the same namespace, the channel"
    " spelled right? `eventbus tail '*'` shows what does pass."
)
_NO_TYPE = "sent with the type 'cli': handlers that name an event class skip it; see --type, --app"


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `publish`."""

    channel: str
    data: str | None = None
    type: str | None = None
    stdin: bool = False
    raw: bool = False
    count: int = 1


async def publish(
    asked: Asked, url: str | None = None, namespace: str | None = None, app: str | None = None
) -> int:
    """Publish, and print one line of what became of it."""
    if (asked.data is None) != asked.stdin:
        raise Failure(
            "there is nothing to publish" if asked.data is None else "there is too much to publish",
            "the argument DATA and the option --stdin",
            """name one of them: eventbus publish chat:1 '{"text":"hi"}', or --stdin""",
            USAGE,
        )
    known = load_bus(app) if app else None
    cls = class_for(known, asked.type) if not asked.raw else None
    only = None if asked.data is None else read(asked.data, cls)
    bus = open_bus(url, namespace, known, heartbeat=None)
    terminal = Terminal()
    sent = copies = 0
    async with bus:
        async for event in events_of_stdin(cls) if only is None else once(only):
            for _ in range(asked.count):
                receipt = await send(bus, asked.channel, event)
                sent, copies = sent + 1, copies + (receipt.receivers or 0)
    what = count_of(sent, "message" if asked.raw else "event")
    terminal.line(
        f"published {what} on {clean(asked.channel)} at {place(bus)}:"
        f" Redis handed out {count_of(copies, 'copy')}"
    )
    if sent and not copies:
        terminal.note(f"hint: {_NOBODY}", " " * 6)
    elif sent and cls is not None and cls.__event_type__ == _DEFAULT_TYPE and not asked.type:
        terminal.note(f"hint: {_NO_TYPE}", " " * 6)
    return OK


async def send(bus: EventBus, channel: str, event: Event | bytes) -> Receipt:
    """Publish an event, or bytes as they are."""
    if isinstance(event, bytes):
        return await bus.publish_raw(channel, event)
    return await bus.publish(channel, event)


def class_for(app: EventBus | None, wanted: str | None) -> type[Event]:
    """The application's class of this type; without one, a class of any JSON object."""
    known = classes_of(app.routes) if app is not None else {}
    if wanted is None and len(known) == 1:
        return next(iter(known.values()))
    if app is not None and wanted not in known:
        raise Failure(
            f"the application has no event class of the type {wanted!a}"
            if wanted
            else "which type?",
            "the option --type",
            f"name one of: {', '.join(sorted(known)) or '(its handlers name no event class)'}",
            USAGE,
        )
    if wanted in known:
        return known[wanted]
    made: Any = create_model(
        "Event", __base__=Event, __cls_kwargs__={"type": wanted or _DEFAULT_TYPE, "extra": "allow"}
    )
    found: type[Event] = made
    return found


def read(text: str, cls: type[Event] | None) -> Event | bytes:
    """The event of this JSON; without a class the bytes. Raises Failure."""
    if cls is None:
        return text.encode("utf-8", "surrogateescape")
    do = 'an event is a JSON object, as in \'{"text":"hi"}\'; --raw sends any bytes'
    try:
        if not isinstance(orjson.loads(text), dict):
            raise ValueError("it is no object")
        return cls.model_validate_json(text)
    except ValidationError as error:
        where = f"it does not fit {cls.__name__}: {reasons(error)}"[:500]
        raise Failure("this is no such event", where, "correct the data", USAGE) from None
    except ValueError as error:
        raise Failure("this is no event", f"{text!a:.60}: {error}", do, USAGE) from None


async def once(event: Event | bytes) -> AsyncIterator[Event | bytes]:
    """The one event of the command line."""
    yield event


async def events_of_stdin(cls: type[Event] | None) -> AsyncIterator[Event | bytes]:
    """The lines of standard input, each as soon as it is there.

    It is read in a daemon thread, so that one which waits for the keyboard does not keep ctrl-c
    waiting; and past Python's own buffer, whose lock such a thread would hold at the exit.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    room = threading.Semaphore(100)
    number = sys.stdin.fileno()

    def pump() -> None:
        with suppress(RuntimeError):  # the loop has ended
            for line in itertools.chain(_lines_of(number), (None,)):
                room.acquire()
                loop.call_soon_threadsafe(queue.put_nowait, line)

    threading.Thread(target=pump, daemon=True).start()
    while (line := await queue.get()) is not None:
        room.release()
        if text := line.rstrip(b"\r\n"):
            yield read(text.decode("utf-8", "surrogateescape"), cls)


def _lines_of(number: int) -> Iterator[bytes]:
    rest = b""
    while data := os.read(number, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > _MAX_LINE:  # the bus will refuse it, and say why
            break
    yield rest
