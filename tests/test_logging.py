"""What log lines have as fields, for formatters that write JSON."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from eventbus import Event, EventBus
from eventbus.server import Server
from tests.helpers import soon

SECRET = "canary-4711"
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}


class Note(Event, channel="note:{number}"):
    number: int
    text: str = ""


class Records(logging.Handler):
    """The records of the bus, and a way to wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._changed.set()

    async def fields(self, text: str) -> dict[str, Any]:
        """What the first line with this text has beside what every record has."""
        while True:
            for record in self.records:
                if text in record.getMessage():
                    return {k: v for k, v in vars(record).items() if k not in STANDARD}
            self._changed.clear()
            await soon(self._changed.wait())


@pytest.fixture
def records() -> Iterator[Records]:
    """The records of one test."""
    found, logger = Records(), logging.getLogger("eventbus")
    logger.addHandler(found)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(found)
    logger.setLevel(logging.NOTSET)


async def test_a_failed_call_has_fields(records: Records) -> None:
    """A line about a handler's error, timeout or invalid event names handler, channel (escaped),
    pattern, id and the class of the error; no field holds the payload."""
    bus = EventBus("memory://logging")

    @bus.on("note:*")
    async def fail(event: Note) -> None:
        raise ValueError(event.text)

    @bus.on("slow:{rest}", timeout=0.01)
    async def hang(event: Note) -> None:
        await asyncio.Event().wait()

    async with bus:
        receipt = await bus.publish("note:ä", Note(number=1, text=SECRET))
        failed = await records.fields("failed on channel")
        await bus.publish("slow:1", Note(number=1, text=SECRET))
        late = await records.fields("took longer")
        await bus.publish_raw("note:2", f'{{"canary": "{SECRET}"}}'.encode())
        invalid = await records.fields("invalid event")
    assert failed == {
        "handler": "fail",
        "channel": "note:\\xe4",
        "pattern": "note:*",
        "id": receipt.id,
        "error": "ValueError",
    }
    assert (late["handler"], late["pattern"]) == ("hang", "slow:{rest}")
    assert late["error"] == "TimeoutError"
    assert (invalid["error"], invalid["id"]) == ("InvalidEvent", None)
    assert SECRET not in f"{failed}{late}{invalid}"


async def test_an_exception_handler_that_fails_has_fields(records: Records) -> None:
    """The line about an exception handler says whose error it was to handle."""
    bus = EventBus("memory://logging-handler")

    @bus.on(Note)
    async def fail(event: Note) -> None:
        raise ValueError

    @bus.exception_handler(ValueError)
    async def worse(error: ValueError, message: object) -> None:
        raise LookupError

    async with bus:
        await bus.publish(Note(number=1))
        fields = await records.fields("exception handler 'worse' failed")
    assert (fields["handler"], fields["error"]) == ("fail", "ValueError")


async def test_an_outage_has_fields(records: Records) -> None:
    """The lines of an outage name the connection, the place and the reason; the last one, how long
    it was away."""
    with Server(port=0) as server:
        async with EventBus(server.url, heartbeat=0.3) as bus:
            server.kill()
            lost = await records.fields("; reconnecting")
            server.start()
            back = await records.fields("connected again")
            assert bus is not None
    assert lost["role"] in ("subscriber", "publisher")
    assert lost["endpoint"] == back["endpoint"] != ""
    assert lost["reason"]
    assert back["waited"] > 0
