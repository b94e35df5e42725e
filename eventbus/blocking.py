"""Publishing from code without an event loop: Flask and Django views, Celery tasks, scripts.

    publisher = Publisher("redis://localhost:6379", name="web")   # connects at the first publish
    receipt = publisher.publish("chat:lobby", MessageSent(room="lobby", user="alice", text="hi"))

There is no second implementation: in each process one background thread runs one `EventBus`
(`eventbus.portal`), and a call waits for its answer from there. So receipts, errors (class, fields,
traceback) and order are those of `EventBus.publish`, and middleware sees the caller's context
variables. Nothing starts before the first publish, and a child of a fork begins anew at its own
first one: own connection, own source, numbers from 1.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, overload
from weakref import WeakSet

from eventbus import Buffer, BusClosed, Event, EventBus, EventBusError, Health, Receipt, Stats
from eventbus.portal import Portal, guard

__all__ = ["Publisher", "Settings"]

T = TypeVar("T")

_CONNECT = 2.0
"""The default `connect_timeout`: somebody waits for the page whose view publishes."""
_SLACK = 5.0
"""Seconds that a close may take beyond `drain_timeout`."""
_publishers: WeakSet[Publisher] = WeakSet()
"""Those to be closed at exit."""


class Settings(TypedDict, total=False):
    """The settings of an `EventBus`, which a publisher hands on."""

    name: str
    namespace: str
    wire: Literal["bare"] | None
    outage: Literal["fail", "drop"] | Buffer
    heartbeat: float | None
    publish_timeout: float
    connect_timeout: float
    drain_timeout: float
    beat: bool
    max_payload: int
    max_pending_bytes: int
    redis_options: dict[str, Any] | None


class Publisher:
    """Publishes from any thread, without an event loop: ``with Publisher(url) as publisher:``.

    Takes what `EventBus` takes, and connects at the first publish: one at module level is right,
    before a fork too. While Redis cannot be reached at all, a publish raises BusUnavailable after
    `connect_timeout` (2 s here), and at once within the second after that; once it was reached, the
    outage policy decides. Closed by `close`, by the end of a `with` block, and at exit.
    """

    def __init__(self, url: Any = None, **settings: Unpack[Settings]) -> None:
        settings.setdefault("connect_timeout", _CONNECT)
        self._bus = EventBus(url, **settings)
        self._patience = settings.get("drain_timeout", 10.0) + _SLACK
        self._portal: Portal | None = None
        self._closed = False
        with guard:
            _publishers.add(self)

    @property
    def bus(self) -> EventBus:
        """The bus behind it, to declare middleware and exception handlers on before the first
        publish. It belongs to the background thread: await nothing of it elsewhere."""
        return self._bus

    @overload
    def publish(self, channel: str, event: Event, /) -> Receipt: ...
    @overload
    def publish(self, event: Event, /) -> Receipt: ...
    def publish(self, channel: Any, event: Any = None, /) -> Receipt:
        """Publish an event, and return when Redis has answered.

        Raises what `EventBus.publish` does. When the caller is interrupted (KeyboardInterrupt),
        what is not written yet is withdrawn.
        """
        return self._call(lambda: self._bus.publish(channel, event))

    @overload
    def publish_nowait(self, channel: str, event: Event, /) -> str: ...
    @overload
    def publish_nowait(self, event: Event, /) -> str: ...
    def publish_nowait(self, channel: Any, event: Any = None, /) -> str:
        """Publish without waiting for Redis; returns the id. What is known at once raises at once;
        later failures are counted, and logged or handed to the exception handlers of `bus`."""

        async def hand_over() -> str:
            return self._bus.publish_nowait(channel, event)

        return self._call(hand_over)

    def publish_raw(self, channel: str, data: bytes) -> Receipt:
        """Publish bytes as they are: no envelope, no number, no middleware."""
        return self._call(lambda: self._bus.publish_raw(channel, data))

    def health(self) -> Health:
        """How its bus stands; "closed" before the first publish in this process."""
        return self._ask(self._bus.health)

    def stats(self) -> Stats:
        """The counters of its bus in this process."""
        return self._ask(self._bus.stats)

    def close(self) -> None:
        """Let what was published have its outcome (within `drain_timeout`), and disconnect.
        Idempotent; a later publish raises BusClosed."""
        with guard:
            self._closed = True
            portal = self._portal
        if portal is not None:
            portal.close(self._patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        portal: Portal | None = getattr(self, "_portal", None)  # None: the constructor raised
        if portal is not None:
            portal.end()

    def __repr__(self) -> str:
        return f"<Publisher on {self._bus!r}>"

    # -- The way to the loop ---------------------------------------------------------------------

    def _call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        portal = self._running()
        if portal.is_here():
            raise EventBusError(
                "a blocking publish in the publisher's own thread would wait for itself: in"
                " middleware and exception handlers, await the publish of their bus"
            )
        portal.wait_ready()
        return portal.call(work)

    def _ask(self, question: Callable[[], T]) -> T:
        async def answer() -> T:
            return question()

        portal = self._portal
        if portal is not None and portal.is_ready() and not portal.is_here():
            with contextlib.suppress(BusClosed):  # it ended meanwhile
                return portal.call(answer)
        return question()

    def _running(self) -> Portal:
        """The portal of this process; the first caller starts it, all wait for the same start."""
        with guard:
            if self._closed:
                raise BusClosed("the publisher is closed")
            portal = self._portal
            if portal is None or not portal.may_be_used():
                portal = self._portal = Portal(self._bus)
            return portal


def _at_exit() -> None:
    with guard:
        publishers = list(_publishers)
    for publisher in publishers:
        publisher.close()


atexit.register(_at_exit)
