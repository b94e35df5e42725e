"""What several test files share: waiting with a limit, collecting what handlers saw, and payloads.

`write` and `read` are the one place where the tests call the functions of the envelope: from an
event to the bytes on the wire, and from bytes to the message that a handler would see.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from eventbus import Event, Message
from eventbus._codec import encode_data
from eventbus._envelope import Frame, message_of
from eventbus._handlers import SKIP, stream_body

T = TypeVar("T")

LIMIT = 20.0
"""Seconds until a wait has failed. Nothing that works comes near it, on a busy machine either."""
TIME = "2024-05-06T07:08:09.000010Z"


async def soon(awaitable: Awaitable[T], seconds: float = LIMIT) -> T:
    """What it returns, or a TimeoutError after the limit."""
    async with asyncio.timeout(seconds):
        return await awaitable


class Seen(list[T]):
    """What handlers saw, in order; a test waits until it has a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self._grew = asyncio.Event()

    def append(self, item: T) -> None:
        """Called on the loop, by handlers."""
        super().append(item)
        self._grew.set()

    async def reach(self, count: int) -> list[T]:
        """The list, when it has this many items. TimeoutError after the limit."""
        async with asyncio.timeout(LIMIT):
            while len(self) < count:
                self._grew.clear()
                await self._grew.wait()
        return self


class Lines(logging.Handler):
    """The log lines of the bus, and a way to wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._changed.set()

    async def hear(self, text: str, seconds: float = LIMIT) -> str:
        """The first line with this text in it, past or to come."""
        async with asyncio.timeout(seconds):
            while True:
                for line in self.lines:
                    if text in line:
                        return line
                self._changed.clear()
                await self._changed.wait()


def write(event: Event, *, number: int = 1, **headers: Any) -> bytes:
    """The payload that publishing this event puts on the wire."""
    more = json.dumps(headers, ensure_ascii=False, separators=(",", ":"))[1:-1]
    head = (
        f'{{"specversion":"1.0","id":"id-1","source":"test/1","type":"{type(event).__event_type__}"'
        f',"time":"{TIME}","busseq":{number}{"," * bool(headers)}{more},"data":'
    )
    return head.encode() + encode_data(event) + b"}"


def read(payload: bytes, *types: Any) -> Message[Any] | None:
    """The message that a handler of these types sees; None when the type is not one of them."""
    frame = Frame("here", payload)
    event = stream_body(types, False).decode(frame)
    return None if event is SKIP else message_of(frame, event, None, {})


def foreign(data: object = None, **attributes: Any) -> bytes:
    """A CloudEvent as another program may write it: JSON with blanks. None leaves one out."""
    event = {"data": data, "type": "Note", "source": "/other", "id": "7", "specversion": "1.0"}
    event |= attributes
    return json.dumps({k: v for k, v in event.items() if v is not None}).encode()


async def evaluate(source: str, names: dict[str, Any]) -> Any:
    """What a line of Python gives (None for a statement); `await` may stand in it."""
    kind = "eval"
    try:
        code = compile(source, "line", "eval", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError:
        kind = "exec"
        code = compile(source, "line", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    found = eval(code, names)
    if inspect.isawaitable(found):
        found = await found
    return found if kind == "eval" else None
