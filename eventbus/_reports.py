"""Where trouble goes that no caller waits for: the exception handlers, or else the log.

Names in the log are escaped and payloads are never logged. What a line says of a handler it has as
fields, too (`fields_of`), for formatters that write JSON.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from eventbus._errors import InvalidEvent
from eventbus._handlers import name_of
from eventbus._messages import Message

logger = logging.getLogger("eventbus")
logger.addHandler(logging.NullHandler())

inside: ContextVar[asyncio.Task[Any] | None] = ContextVar("inside", default=None)
"""The task of the bus that calls the user's code here, also in tasks which that code started."""

ErrorHandler = Callable[[Any, Message[Any]], Awaitable[None] | None]


def shown(name: str | None, limit: int = 200) -> str:
    """A name for a log line: escaped, and cut when it is long."""
    text = ascii(name)
    return text if len(text) <= limit else text[:limit] + "…"


def quoted(reply: object, limit: int = 200) -> str:
    """One line of what a server said, for a log line or an error: escaped, cut when it is long, and
    without the arguments (a password, a payload) that it repeats of a command it does not know."""
    text = str(reply).strip().partition("\n")[0].partition(", with args beginning with")[0]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])


def fields_of(message: Message[Any], handler: str, error: BaseException) -> dict[str, str | None]:
    """The `extra` of a line about one call: where it happened, and the class of the error."""
    return {
        "handler": handler,
        "channel": shown(message.channel)[1:-1],
        "pattern": message.pattern,
        "id": None if message.id is None else shown(message.id)[1:-1],
        "error": type(error).__name__,
    }


def was_cancelled(error: BaseException) -> bool:
    """Whether this is the cancellation of the task that runs here, and not one that the user's code
    raised by itself."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and bool(task and task.cancelling())


async def call_plain(fn: Callable[..., Any], *args: object, is_async: bool) -> None:
    """Call a function of the user: on the loop when it is `async def`, else in a worker thread."""
    if is_async:
        await fn(*args)
    else:
        from anyio import to_thread

        await to_thread.run_sync(partial(fn, *args), abandon_on_cancel=True)


_PATIENCE = 1.0
"""Seconds that cancelled tasks have to end. A handler that swallows its cancellation is left
behind."""


async def finish(tasks: set[asyncio.Task[Any]], name: str) -> None:
    """Wait for tasks that were cancelled."""
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=_PATIENCE)
        if left:
            logger.error(
                "handler %r does not end although it was cancelled", name, extra={"handler": name}
            )


class Reports:
    """The exception handlers of a bus, nearest class in the MRO first."""

    def __init__(self) -> None:
        self._handlers: dict[type[BaseException], tuple[ErrorHandler, bool]] = {}

    def register(self, kind: type[BaseException], fn: ErrorHandler, *, is_async: bool) -> None:
        self._handlers[kind] = (fn, is_async)

    async def report(self, error: BaseException, message: Message[Any], handler: str) -> None:
        """Hand an error to its exception handler, or log it."""
        for kind in type(error).__mro__:
            if kind in self._handlers:
                fn, is_async = self._handlers[kind]
                try:
                    await call_plain(fn, error, message, is_async=is_async)
                except (Exception, asyncio.CancelledError) as failure:
                    if was_cancelled(failure) and not was_cancelled(error):
                        raise
                    logger.exception(
                        "exception handler %r failed for %s",
                        name_of(fn),
                        type(error).__name__,
                        extra=fields_of(message, handler, error),
                    )
                return
        extra = fields_of(message, handler, error)
        if isinstance(error, InvalidEvent):
            logger.error(
                "invalid event on channel %s: %s", shown(message.channel), error, extra=extra
            )
        elif isinstance(error, TimeoutError) and error.args:
            logger.error(
                "handler %r on channel %s: %s",
                handler,
                shown(message.channel),
                error,
                extra=extra,
            )
        else:
            logger.error(
                "handler %r failed on channel %s",
                handler,
                shown(message.channel),
                exc_info=error,
                extra=extra,
            )
