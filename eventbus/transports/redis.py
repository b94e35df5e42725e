"""Redis: two connections, each kept by one owner task that connects, waits for the end, again.

Publisher and subscriber are kept apart, as Redis wants it. Reconnects wait with full jitter from
50 ms to 5 s and never give up; wrong credentials are retried slowly. One log line per change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from redis.backoff import FullJitterBackoff

from eventbus._errors import BusClosed, BusUnavailable, EventBusError, PermissionDenied
from eventbus._reports import logger
from eventbus._router import PROBE_PREFIX, Command
from eventbus._settings import Settings
from eventbus.transports._endpoint import Endpoint, describe_error, is_hopeless
from eventbus.transports._inbox import Inbox
from eventbus.transports._link import Link
from eventbus.transports._liveness import Liveness
from eventbus.transports._outbox import Outbox
from eventbus.transports.base import BEAT, Outgoing, Sink, Status

_SLOW = 30.0
"""Seconds between attempts with credentials that were refused, and between those for denied
patterns."""
_MAX_FAILURES = 10
_MAX_TOLD = 100
"""Reasons that are told once only, until it is connected again."""


class _Keeper:
    """Keeps one connection. `opened` and `lost` are told; `failed` hears of each failed attempt."""

    def __init__(
        self,
        role: str,
        endpoint: Endpoint,
        pressure: Callable[[], bool],
        opened: Callable[[Link], None],
        lost: Callable[[str], None],
        failed: Callable[[BaseException], None],
        connected: asyncio.Event,
        limit: int,
    ) -> None:
        self._limit = limit
        self._told: set[str] = set()
        self._connected = connected
        self.role = role
        self._endpoint = endpoint
        self._pressure = pressure
        self._opened = opened
        self._lost = lost
        self._failed = failed
        self.link: Link | None = None
        self.reason: str | None = None
        self._down = 0.0  # since when, by the clock of the loop

    def _fields(self, reason: str | None) -> dict[str, str | None]:
        """The `extra` of a line about this connection."""
        return {"role": self.role, "endpoint": self._endpoint.shown, "reason": reason}

    async def run(self) -> None:
        backoff = FullJitterBackoff(cap=5.0, base=0.05)
        loop = asyncio.get_running_loop()
        failures = 0
        was_up = False
        self._down = loop.time()
        while True:
            started = loop.time()
            delay = None
            try:
                await self._live_once()
                was_up = True
            except Exception as error:
                text, _ = describe_error(error)
                if text not in self._told:
                    if len(self._told) >= _MAX_TOLD:
                        self._told.clear()
                    self._told.add(text)
                    logger.warning(
                        "%s %s: %s",
                        self.role,
                        self._endpoint.shown,
                        text,
                        extra=self._fields(text),
                    )
                self.reason = text
                delay = _SLOW if is_hopeless(error) else None
                self._failed(error)
            flapping = was_up and loop.time() - started <= 5.0
            failures = 0 if was_up and loop.time() - started > 5.0 else failures + 1
            was_up = False
            if delay is None:
                delay = backoff.compute(min(failures - 1 if failures else 0, _MAX_FAILURES))
            await self._pause(delay, alone=flapping)

    async def _pause(self, delay: float, *, alone: bool) -> None:
        """Wait before the next attempt; shorter when the other connection finds the server back,
        but not when a connection just came and went: two that do so would wake each other."""
        if alone:
            await asyncio.sleep(delay)
            return
        self._connected.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._connected.wait()

    async def _live_once(self) -> None:
        """One connection, from its opening to its end. Raises what kept it from opening."""
        connection = await self._endpoint.open()
        link = self.link = Link(connection, self._pressure, self._limit)
        self._connected.set()
        if self.reason is not None:
            waited = round(asyncio.get_running_loop().time() - self._down, 3)
            logger.info(
                "%s %s: connected again",
                self.role,
                self._endpoint.shown,
                extra={**self._fields(self.reason), "waited": waited},
            )
        self.reason = None
        self._told.clear()
        try:
            self._opened(link)
            self.reason = await link.ended
        finally:
            self.link = None
            link.close()
            self._down = asyncio.get_running_loop().time()
            self._lost(self.reason or "closed")
        logger.warning(
            "%s %s: %s; reconnecting",
            self.role,
            self._endpoint.shown,
            self.reason,
            extra=self._fields(self.reason),
        )


class RedisTransport:
    """The transport of ``redis://``, ``rediss://``, ``unix://``, Sentinel and ``embedded://``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.user = endpoint.user
        self.connecting = endpoint.connecting
        self._tasks: list[asyncio.Task[None]] = []
        self._subscriber: _Keeper | None = None
        self._publisher: _Keeper | None = None
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._liveness: Liveness | None = None
        self._connected: asyncio.Future[None] | None = None
        self._time: Callable[[], float] = monotonic  # of the loop, from the start on
        self._stopped = False

    async def start(
        self, sink: Sink, settings: Settings, bus_id: str, number: Callable[[bytes], int]
    ) -> None:
        """See `Transport.start`. Raises PermissionDenied for wrong credentials, BusUnavailable for
        a certificate that is not good; otherwise tries until it is cancelled."""
        loop = asyncio.get_running_loop()
        self._time = loop.time
        if self._endpoint.database and not settings.namespace:
            logger.warning(
                "%s: database %d keeps nothing apart in Pub/Sub: buses on other numbers hear this"
                " one too; EventBus(..., namespace=...) does",
                self._endpoint.shown,
                self._endpoint.database,
            )
        prefix = settings.prefix.encode()
        probe = prefix + PROBE_PREFIX + bus_id.encode()
        self._connected = loop.create_future()
        outbox = self._outbox = Outbox(settings, number, self._endpoint.shown)
        outbox.user = self.user
        inbox = self._inbox = Inbox(
            sink,
            prefix,
            probe,
            self._on_probe,
            outbox.release,
            beat=prefix + BEAT if settings.beat else None,
        )
        back = asyncio.Event()
        self._subscriber = _Keeper(
            "subscriber",
            self._endpoint,
            sink.pressure,
            self._on_inbox,
            inbox.lost,
            self._on_failure,
            back,
            settings.max_pending_bytes + settings.max_payload,
        )
        self._publisher = _Keeper(
            "publisher",
            self._endpoint,
            _never,
            self._on_outbox,
            outbox.lost,
            self._on_failure,
            back,
            settings.max_pending_bytes + settings.max_payload,
        )
        if settings.heartbeat is not None:
            self._liveness = Liveness(
                inbox, outbox, settings.heartbeat, probe, check_role=self._endpoint.is_sentinel
            )
            inbox.on_probe_answered = self._liveness.beat_now
        for keeper in (self._subscriber, self._publisher):
            self._tasks.append(loop.create_task(keeper.run(), name="eventbus connection"))
        await self._connected
        if self._stopped:  # the connections were there before their cancellation reached them
            raise BusClosed("the bus was stopped while it started")
        if self._liveness is not None:
            self._tasks.append(loop.create_task(self._liveness.run(), name="eventbus heartbeat"))

    def _on_inbox(self, link: Link) -> None:
        if self._inbox is not None:
            self._inbox.opened(link)
        self._both()

    def _on_outbox(self, link: Link) -> None:
        if self._outbox is not None:
            deaf = self._inbox is None or self._inbox.away()
            self._outbox.opened(link, hold=deaf)
        self._both()

    def _both(self) -> None:
        keepers = (self._subscriber, self._publisher)
        if all(keeper is not None and keeper.link is not None for keeper in keepers):
            if self._connected is not None and not self._connected.done():
                self._connected.set_result(None)
            elif self._liveness is not None:
                self._liveness.beat_now()

    def _on_failure(self, error: BaseException) -> None:
        """What makes waiting useless ends the start."""
        if self._connected is None or self._connected.done() or not is_hopeless(error):
            return
        text, refused = describe_error(error)
        text, user = text.rstrip("."), self.user or "default"
        if refused:
            self._connected.set_exception(
                PermissionDenied(
                    f"{self._endpoint.shown} refuses user {user!r}: {text}. Set the password in the"
                    " URL (redis://user:password@host) or in redis_options",
                    user=user,
                )
            )
        else:
            self._connected.set_exception(
                BusUnavailable(f"{self._endpoint.shown} cannot be trusted: {text}")
            )

    def _on_probe(self, payload: bytes) -> None:
        if self._liveness is not None:
            self._liveness.on_probe(payload)

    async def stop(self) -> None:
        self._stopped = True
        pending, self._tasks = set(self._tasks), []
        while pending:  # a cancellation in the middle of a connect can be lost in redis-py
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.1)
        if self._outbox is not None:
            self._outbox.close()
        if self._connected is not None and not self._connected.done():
            self._connected.set_exception(BusClosed("the bus was stopped while it started"))
        await self._endpoint.close()

    async def flush(self) -> None:
        if self._outbox is not None:
            await self._outbox.flush()

    def publish(self, outgoing: Outgoing) -> None:
        if self._outbox is None:
            raise EventBusError("the transport was not started")
        self._outbox.publish(outgoing)

    def send(self, commands: Iterable[Command]) -> None:
        if self._inbox is not None:
            self._inbox.send(commands)

    def fence(self, reached: Callable[[], Any]) -> None:
        if self._inbox is None or not self._inbox.ping(b"fence", lambda answered: reached()):
            reached()

    def status(self) -> Status:
        status = Status()
        if self._subscriber is not None and self._publisher is not None:
            status.receiving = self._subscriber.link is not None
            status.publishing = self._publisher.link is not None
            for keeper in (self._publisher, self._subscriber):
                if keeper.reason is not None:
                    status.reason = f"{keeper.role}: {keeper.reason}"
        if self._inbox is not None and self._inbox.last_read is not None:
            status.last_received_age = self._time() - self._inbox.last_read
        if self._liveness is not None:
            status.probe = self._liveness.state
            status.round_trip = self._liveness.round_trip
        return status

    def describe(self) -> str:
        return self._endpoint.shown

    def redis(self) -> Any:
        return self._endpoint.client()


def _never() -> bool:
    return False
