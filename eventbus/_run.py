"""One start of a bus, up to its stop: everything that belongs to one event loop and one process.

A `Run` is made at `start()` and thrown away at `stop()`. So a bus that was built before a fork, or
is started twice, begins anew: another instance id, counters at zero.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from asyncio import _get_running_loop
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio

from eventbus._errors import BusClosed, BusUnavailable, PermissionDenied
from eventbus._gaps import GapLane
from eventbus._handlers import is_async
from eventbus._lanes import Lane
from eventbus._messages import Health, State
from eventbus._patterns import Pattern, check_channel, decode_name
from eventbus._publisher import Middleware, Publisher
from eventbus._pulse import Pulse
from eventbus._receiver import Receiver
from eventbus._reports import Reports, inside, logger
from eventbus._router import Command
from eventbus._routes import Declaration, GapDeclaration
from eventbus._sequences import Outbound
from eventbus._settings import Settings
from eventbus.transports.base import Transport

_RETRY_DENIED = 30.0
"""Seconds between attempts to subscribe to what was denied."""


class Run:
    """The transport with the receiving and the publishing half, and their common life."""

    def __init__(
        self,
        bus: object,
        settings: Settings,
        transport: Transport,
        reports: Reports,
        *,
        declared: Sequence[Declaration],
        declared_gaps: Sequence[GapDeclaration],
        receive_middleware: Sequence[Middleware],
        publish_middleware: Sequence[Middleware],
        on_stopped: Callable[[Run], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport = transport
        self.stopping: asyncio.Task[None] | None = None
        self._settings = settings
        self._declared = declared
        self._on_stopped = on_stopped
        self._pid = os.getpid()
        self._ready = False
        self._over = False
        self.ended = asyncio.Event()
        self._hurry = asyncio.Event()
        self._spared: set[asyncio.Task[Any]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._client: Any = None
        self._fatal_error: str | None = None
        self._instance = uuid.uuid4().hex[:16]
        source = f"{settings.name}/{self._instance}"
        self.receiver = Receiver(
            bus=bus,
            reports=reports,
            gap_lanes=[
                GapLane(item.fn, item.pattern, is_async(item.fn), self._fatal)
                for item in declared_gaps
            ],
            middleware=receive_middleware,
            source=source.encode(),
            settings=settings,
            on_fatal=self._fatal,
        )
        listener = self.receiver.listener
        self._pulse = None if listener is None else Pulse(settings, source, transport, listener)
        self.receiver.age = lambda: transport.status().last_received_age
        self.publisher = Publisher(
            transport=transport,
            reports=reports,
            middleware=publish_middleware,
            source=source,
            instance=self._instance,
            settings=settings,
        )

    def is_alive(self) -> bool:
        """Whether this run still has a loop, and this process is the one it belongs to."""
        return not self.loop.is_closed() and self._pid == os.getpid()

    def check_here(self) -> None:
        """Raise BusClosed when this run is over, and when called from another loop or process."""
        if self.loop is _get_running_loop() and not self._over:
            return
        if self._over:
            raise BusClosed("the bus was stopped: what belongs to a run ends with it")
        if self._pid != os.getpid():
            raise BusClosed(
                f"the bus was started in process {self._pid}: start one in each process, after the"
                " fork"
            )
        raise BusClosed(
            "the bus belongs to another event loop: from a start to its stop, use it in the"
            " loop that started it (a `def` handler runs in a thread: make it `async def`)"
        )

    # -- Start -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and subscribe. Raises what `EventBus.start` says; the caller closes then."""
        settings, receiver = self._settings, self.receiver
        everything: list[Pattern] = []
        for item in self._declared:
            self._check_lengths(item.patterns)
            lane = receiver.listen(item.plan.name, item.options, item.plan.body, item.plan)
            receiver.add(lane, item.patterns)
            everything += item.patterns
        try:
            async with asyncio.timeout(settings.connect_timeout):
                number = Outbound().take if self._pulse is None else self._pulse.number
                await self.transport.start(receiver, settings, self._instance, number)
                denied = await receiver.settled(everything)
        except TimeoutError:
            reason = self.transport.status().reason or "no answer"
            raise BusUnavailable(
                f"{self.transport.describe()} could not be reached within"
                f" {settings.connect_timeout} s ({reason}). Is Redis running there? Set the URL"
                " with EventBus(url) or EVENTBUS_URL; a server to try with is EventBus('embedded://'),"
                " from eventbus-redis[server]",
                waited=settings.connect_timeout,
            ) from None
        if self.stopping is not None:
            raise BusClosed("the bus was stopped while it started")
        if denied and settings.on_denied == "raise":
            raise self._denied(list(dict.fromkeys(denied)))
        self._ready = True
        if self._pulse is not None:
            self._pulse.tick()
        self._retry = self.loop.call_later(_RETRY_DENIED, self._retry_denied)

    def _retry_denied(self) -> None:
        """Ask again for what was denied: a rule may have been widened."""
        self.send(self.receiver.router.retry_denied())
        self._retry = self.loop.call_later(_RETRY_DENIED, self._retry_denied)

    def _check_lengths(self, patterns: Sequence[Pattern]) -> None:
        for pattern in patterns:
            check_channel(self._settings.prefix + decode_name(pattern.wire))

    def _denied(self, patterns: Sequence[Pattern]) -> PermissionDenied:
        user = self.transport.user or "default"
        prefix = self._settings.prefix
        rules = " ".join(f"&{ascii(prefix + decode_name(p.wire))[1:-1]}" for p in patterns[:5])
        return PermissionDenied(
            f"Redis denies {_listed(patterns)} to user {user!r} at {self.transport.describe()}. A"
            f" pattern in an ACL must be literally equal: ACL SETUSER {user} {rules}",
            patterns=tuple(pattern.text for pattern in patterns),
            user=user,
        )

    # -- Routes ----------------------------------------------------------------------------------

    def send(self, commands: list[Command]) -> None:
        """Ask the server for what the router decided."""
        if commands:
            self.transport.send(commands)

    async def add(self, lane: Lane, patterns: Sequence[Pattern], *, is_new: bool = False) -> None:
        """Add patterns to a lane; confirmed when it returns, and undone when it raises."""
        self.check_here()
        async with lane.lock:
            await self._add(lane, patterns, is_new)

    async def _add(self, lane: Lane, patterns: Sequence[Pattern], is_new: bool) -> None:
        self._check_attached(lane)
        timeout = self._settings.connect_timeout
        if not lane.switched.done():  # a discard that nobody waits for any more comes first
            await asyncio.wait({lane.switched}, timeout=timeout)
        fresh = [pattern for pattern in patterns if pattern not in lane.patterns]
        try:
            if not lane.switched.done():
                raise TimeoutError
            self._check_lengths(fresh)
            self.send(self.receiver.add(lane, fresh))
            async with asyncio.timeout(timeout):
                denied = await self.receiver.settled(patterns)
            if denied and self._settings.on_denied == "raise":
                raise self._denied(denied)
            if self.stopping is not None:
                raise BusClosed("the bus is being stopped")
            self._check_attached(lane)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                if is_new:
                    await self.forget(lane)
                elif isinstance(error, asyncio.CancelledError):
                    self._begin_discard(lane, fresh)  # whoever is cancelled waits for no server
                else:
                    await self._discard(lane, fresh)
            if isinstance(error, TimeoutError):
                raise BusUnavailable(
                    f"{self.transport.describe()} did not confirm {_listed(fresh)} within"
                    f" {timeout} s; nothing was changed",
                    waited=timeout,
                ) from None
            raise

    def _check_attached(self, lane: Lane) -> None:
        if lane.closed:
            raise BusClosed(f"the route {lane.name!r} was detached")

    async def discard(self, lane: Lane, patterns: Sequence[Pattern]) -> None:
        """Take patterns from a lane."""
        if self._over:
            return
        self.check_here()
        async with lane.lock:
            await self._discard(lane, patterns)

    async def _discard(self, lane: Lane, patterns: Sequence[Pattern]) -> None:
        """At a point of the stream: the other patterns of the lane may answer for the same
        channels, and each message must meet one state only."""
        reached = self._begin_discard(lane, patterns)
        await asyncio.wait({reached}, timeout=self._settings.connect_timeout)

    def _begin_discard(self, lane: Lane, patterns: Sequence[Pattern]) -> asyncio.Future[None]:
        """Ask for that point. It comes whether or not anybody waits for it (with the end of the
        connection at the latest), and no pattern is added to the lane before."""
        reached = lane.switched = self.loop.create_future()

        def switch() -> None:
            self.send(self.receiver.discard(lane, patterns))
            if not reached.done():
                reached.set_result(None)

        self.transport.fence(switch)
        return reached

    async def forget(self, lane: Lane) -> None:
        """Take a lane out, with all that waits in it. Nothing more to do when the run is over."""
        if not self._over:
            self.check_here()
        await self.receiver.forget(lane, self.send)

    # -- Stop ------------------------------------------------------------------------------------

    def begin_stop(self) -> asyncio.Task[None]:
        """The task that stops this run; a second call gives the same one."""
        if self.stopping is None or self.stopping.cancelled():
            self.stopping = self.loop.create_task(self._stop(), name="eventbus stop")
        return self.stopping

    async def give_up(self) -> None:
        """Close at once after a start that failed. Whoever is cancelled in it is so when nothing is
        left open: a task of its own does it, which no impatient caller can interrupt."""
        self._hurry.set()
        await self.stop()

    async def stop(self) -> None:
        """Stop, and return (or raise CancelledError) when nothing is left open."""
        stopping = self.begin_stop()
        caller = inside.get()
        if caller is not None:
            self._spared.add(caller)
            self.receiver.spare(caller)
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            self._hurry.set()
            if caller is not None and self._over:
                raise  # the stop itself ends this task, and waits for that
            with anyio.CancelScope(shield=True):
                while not stopping.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.shield(stopping)
            raise

    def _fatal(self, error: BaseException) -> None:
        """A handler raised KeyboardInterrupt or SystemExit: that ends the bus."""
        is_exit = isinstance(error, KeyboardInterrupt | SystemExit)
        trace = None if is_exit else error
        logger.error("a handler raised %s: the bus stops", type(error).__name__, exc_info=trace)
        self._fatal_error = type(error).__name__
        self.begin_stop()

    async def _stop(self) -> None:
        """Unsubscribe, drain, close: bounded by `drain_timeout`, cut short by a cancelled stop."""
        try:
            work = asyncio.ensure_future(self._drain())
            hurry = asyncio.ensure_future(self._hurry.wait())
            try:
                await asyncio.wait(
                    {work, hurry},
                    timeout=self._settings.drain_timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                hurry.cancel()
                work.cancel()
                await asyncio.wait({work, hurry})
            if not work.cancelled() and work.exception() is not None:
                logger.error("stopping the bus", exc_info=work.exception())
        finally:
            try:
                await self.close()
            finally:
                self._on_stopped(self)
                self.ended.set()

    async def _drain(self) -> None:
        await self.receiver.unsubscribe(self.send)
        await self.receiver.drain(self._spared)
        await self.publisher.drain(self._spared)

    async def close(self) -> None:
        """Cancel what still runs and close every connection. Idempotent."""
        self._ready, self._over = False, True
        if self._retry is not None:
            self._retry.cancel()
        if self._pulse is not None:
            self._pulse.close()
        try:
            await self.receiver.close(self._spared)
            await self.publisher.close(self._spared)
        finally:
            await self.transport.stop()
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                await client.aclose()

    # -- How it stands -----------------------------------------------------------------------------

    def health(self) -> Health:
        """See `EventBus.health`."""
        status, router = self.transport.status(), self.receiver.router
        live = tuple(decode_name(item.name) for item in list(router.live))
        denied = tuple(decode_name(item.name) for item in list(router.denied))
        state: State = "live"
        reason = None
        if self._pid != os.getpid():
            state, reason = "closed", f"started in process {self._pid}, not in this one"
        elif self.loop.is_closed():
            state, reason = "closed", "its event loop is closed"
        elif self._fatal_error is not None:
            state, reason = "closed", f"a handler raised {self._fatal_error}"
        elif self.stopping is not None:
            state, reason = "closed", "the bus is being stopped"
        elif not self._ready:
            state, reason = "starting", status.reason or "waiting for Redis"
        elif not status.receiving:
            state, reason = "down", status.reason or "not connected"
        elif self.receiver.away:
            state, reason = "down", "waiting for the subscriptions to be confirmed"
        elif denied:
            state, reason = (
                ("degraded" if live else "down"),
                f"denied: {', '.join(map(ascii, denied[:5]))}",
            )
        elif not status.publishing:
            state, reason = "degraded", status.reason or "the publisher is not connected"
        elif status.probe == "denied":
            state, reason = "degraded", "the liveness probe is denied; PING is used alone"
        return Health(
            state, reason, status.last_received_age, status.round_trip, status.probe, live, denied
        )

    def redis(self) -> Any:
        """See `EventBus.redis`."""
        if self._client is None:
            self._client = self.transport.redis()
        return self._client


def _listed(patterns: Sequence[Pattern]) -> str:
    shown = ", ".join(ascii(pattern.text) for pattern in patterns[:5])
    return shown + (f" and {len(patterns) - 5} more" if len(patterns) > 5 else "")
