"""`EventBus`: the front of the engine. It owns the life of a bus, from start to stop.

Everything between two starts lives in one `Run`: the transport, the receiving and the publishing
half, the loop and the process that they belong to. A bus that is not running has none.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import anyio

from eventbus._acl import Acl, acl_of
from eventbus._errors import BusClosed, BusUnavailable, EventBusError, InvalidHandler
from eventbus._events import Event
from eventbus._handlers import is_async, names_of_caller, stream_body
from eventbus._lanes import Options, Overflow
from eventbus._messages import Buffer, Health, Message, Receipt, Stats
from eventbus._patterns import escape
from eventbus._publisher import Middleware
from eventbus._reports import Reports
from eventbus._router import PROBE_PREFIX
from eventbus._routes import Declarations, Messages, Route, Router, patterns_of
from eventbus._run import Run
from eventbus._settings import Settings
from eventbus.transports import transport_for

E = TypeVar("E")
M = TypeVar("M", bound=Middleware)
X = TypeVar("X", bound=Callable[..., Any])

_DEFAULT_URL = "redis://localhost:6379"


class EventBus(Declarations):
    """An event bus on Redis Pub/Sub.

    `url` says where events travel: ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://``,
    ``memory://``, ``embedded://``, or an existing ``redis.asyncio.Redis``; default the
    environment's EVENTBUS_URL, else ``redis://localhost:6379``. Times are seconds, sizes bytes.

    name: begins the `source` of what this bus publishes.
    namespace: goes before every name on the wire; database numbers do not isolate Pub/Sub.
    wire: "bare" publishes and reads JSON without an envelope.
    outage: what a publish does while Redis is away: "fail", "drop", or a `Buffer`.
    heartbeat: a silent connection is tested after this long and dead after twice this; None: never.
    beat: announce the last numbers of changed channels at each heartbeat, and compare what others
    announce: loss is found although nothing follows it (docs/delivery.md says what it costs).
    on_denied: "raise" at start when a pattern is denied, or "degrade" and say so in `health()`.
    """

    __is_bus__ = True  # what a handler's parameter is recognised by

    def __init__(
        self,
        url: Any = None,
        *,
        name: str = "eventbus",
        namespace: str = "",
        wire: Literal["bare"] | None = None,
        outage: Literal["fail", "drop"] | Buffer = "fail",
        heartbeat: float | None = 5.0,
        publish_timeout: float = 1.0,
        connect_timeout: float = 10.0,
        drain_timeout: float = 10.0,
        on_denied: Literal["raise", "degrade"] = "raise",
        beat: bool = False,
        max_payload: int = 1 << 20,
        max_pending_bytes: int = 64 << 20,
        redis_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._settings = settings = Settings(
            name=name,
            namespace=namespace,
            wire=wire,
            outage=outage,
            heartbeat=heartbeat,
            publish_timeout=publish_timeout,
            connect_timeout=connect_timeout,
            drain_timeout=drain_timeout,
            on_denied=on_denied,
            beat=beat,
            max_payload=max_payload,
            max_pending_bytes=max_pending_bytes,
            redis_options=dict(redis_options or {}),
        )
        self._bare = settings.bare
        self._target = url if url is not None else os.environ.get("EVENTBUS_URL") or _DEFAULT_URL
        self._run: Run | None = None
        self._describe, refusal = "no place", ""
        try:
            transport = transport_for(self._target, settings.redis_options)
            self._describe, self._connecting = transport.describe(), transport.connecting
        except EventBusError as error:
            refusal = str(error)
        if refusal:  # anew: what led to it, and its frames, hold the URL and the options
            url = redis_options = None
            raise EventBusError(refusal) from None
        self._reports = Reports()
        self._receive_middleware: list[Middleware] = []
        self._publish_middleware: list[Middleware] = []
        self._last: Run | None = None

    # -- Declaring -------------------------------------------------------------------------------

    def _may_declare(self) -> None:
        if self._run is not None:
            raise EventBusError(
                "the bus is running: declare handlers before its start, or use"
                " `route = await bus.attach(handler, pattern)`"
            )

    def include_router(self, router: Router, prefix: str = "") -> None:
        """Take over the handlers of a router, with a literal prefix before their patterns."""
        self._may_declare()
        self._include(router, escape(prefix))

    def exception_handler(self, kind: type[BaseException]) -> Callable[[X], X]:
        """Hear of errors that nobody awaits: ``async def handler(error, message)``.

        The nearest class in the error's MRO wins. For errors of handlers, TimeoutError of their
        `timeout`, InvalidEvent, and what `publish_nowait` could not send.
        """
        if not _is_exception_class(kind):
            raise InvalidHandler("exception_handler takes an exception class")

        def decorate(fn: X) -> X:
            self._reports.register(kind, fn, is_async=is_async(fn))
            return fn

        return decorate

    def middleware(self, kind: Literal["receive", "publish"]) -> Callable[[M], M]:
        """Wrap every handler call ("receive") or every publish ("publish"), first added outermost:
        ``async def f(message, call_next): return await call_next(message)``."""
        if kind not in ("receive", "publish"):
            raise InvalidHandler('middleware is "receive" or "publish"')
        self._may_declare()

        def decorate(fn: M) -> M:
            if not is_async(fn):
                raise InvalidHandler("a middleware is an `async def` function")
            found = self._receive_middleware if kind == "receive" else self._publish_middleware
            found.append(fn)
            return fn

        return decorate

    # -- Life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect, subscribe, and return when the server has confirmed every subscription.

        Raises PermissionDenied with all denied patterns, BusUnavailable when Redis is not reached
        within `connect_timeout`; a wrong password or certificate fails at once.
        """
        if self._run is not None and self._run.is_alive():
            raise EventBusError("the bus is running already (or another task is starting it)")
        run = self._run = self._last = Run(
            self,
            self._settings,
            transport_for(self._target, self._settings.redis_options),
            self._reports,
            declared=self._declared,
            declared_gaps=self._declared_gaps,
            receive_middleware=self._receive_middleware,
            publish_middleware=self._publish_middleware,
            on_stopped=self._stopped,
        )
        try:
            await run.start()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await run.give_up()
            raise

    async def stop(self) -> None:
        """Unsubscribe, let the handlers finish within `drain_timeout`, flush, close. Idempotent.
        Inside a handler it does not wait for that handler. When cancelled, it stops waiting for
        handlers, still closes everything, and raises CancelledError then.
        """
        if self._run is not None:
            self._run.check_here()
            await self._run.stop()

    def _stopped(self, run: Run) -> None:
        if self._run is run:
            self._run = None

    async def run(self) -> None:
        """Start, run until SIGTERM or SIGINT, then drain and stop. A signal ends the start, too."""
        loop = asyncio.get_running_loop()
        over, signals = asyncio.Event(), (signal.SIGTERM, signal.SIGINT)
        for number in signals:  # before the start: process 1 of a container has no other answer
            loop.add_signal_handler(number, over.set)
        starting = asyncio.ensure_future(self.start())
        waits = [starting, asyncio.ensure_future(over.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                waits.append(asyncio.ensure_future(self._here().ended.wait()))
                await asyncio.wait(waits[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for number in signals:  # a second signal does not wait for the drain
                loop.remove_signal_handler(number)
            ours = not starting.done() or starting.cancelled() or starting.exception() is None
            for wait in waits:
                wait.cancel()
            if ours:  # else another task's start was met, or ours has cleaned up
                await self.stop()
            await asyncio.wait(waits)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncGenerator[None, None]:
        """For ASGI applications: ``Starlette(lifespan=bus.lifespan)``."""
        async with self:
            yield

    def _here(self) -> Run:
        run = self._run
        if run is None:
            raise BusClosed("the bus is not running: use it inside `async with bus:`")
        run.check_here()
        return run

    # -- Publishing --------------------------------------------------------------------------------

    @overload
    async def publish(self, channel: str, event: Event, /) -> Receipt: ...
    @overload
    async def publish(self, event: Event, /) -> Receipt: ...
    async def publish(self, channel: Any, event: Any = None, /) -> Receipt:
        """Publish an event on a channel, or on the channel that its own class declares.

        Returns when Redis has answered, within `publish_timeout`. Raises BusUnavailable (certainly
        not sent), PublishUncertain (written, outcome unknown), PermissionDenied, PayloadTooLarge,
        InvalidEvent, InvalidChannel, BusClosed. Cancelled before the write: certainly not sent.
        """
        publisher = self._here().publisher
        try:
            begun = publisher.begin(channel, event)
        except BusUnavailable:
            await asyncio.sleep(0)  # a loop that tries again must not keep the bus from coming back
            raise
        if not isinstance(begun, tuple):
            return await begun
        outgoing, future = begun
        try:
            if future.done():  # dropped or kept: the same
                await asyncio.sleep(0)
            return Receipt(outgoing.id, await future)
        except asyncio.CancelledError:
            publisher.withdraw(outgoing)
            raise

    @overload
    def publish_nowait(self, channel: str, event: Event, /) -> str: ...
    @overload
    def publish_nowait(self, event: Event, /) -> str: ...
    def publish_nowait(self, channel: Any, event: Any = None, /) -> str:
        """Publish without waiting; returns the id. Raises at once what is known at once; later
        failures are counted and reported to the exception handlers."""
        return self._here().publisher.publish_nowait(channel, event)

    async def publish_raw(self, channel: str, data: bytes) -> Receipt:
        """Publish bytes as they are: no envelope, no number, no middleware."""
        return await self._here().publisher.publish_raw(channel, data)

    # -- Listening while running -------------------------------------------------------------------

    def attach(
        self,
        handler: Callable[..., Any],
        *patterns: str | type[Event],
        concurrency: int = 1,
        order_by: Literal["channel"] | None = None,
        max_queue: int = 10_000,
        overflow: Overflow = "drop_oldest",
        timeout: float | None = None,
        echo: bool = True,
        wire: Literal["bare"] | None = None,
    ) -> Coroutine[Any, Any, Route]:
        """`on` for a running bus: the subscription is confirmed when it returns.

        Raises PermissionDenied, and BusUnavailable when Redis does not answer within
        `connect_timeout`; the handler is not attached then.
        """
        run = self._here()
        options = Options(concurrency, order_by, max_queue, overflow, timeout, echo, wire)
        parsed = patterns_of(patterns)
        plan = self._plan(handler, parsed, options, local_names=names_of_caller())

        async def confirmed() -> Route:
            lane = run.receiver.listen(plan.name, options, plan.body, plan)
            await run.add(lane, parsed, is_new=True)
            return Route(run, lane)

        return confirmed()

    @overload
    def subscribe(
        self, *patterns: str, max_queue: int = 10_000, overflow: Overflow = "drop_oldest"
    ) -> Messages[dict[str, Any]]: ...
    @overload
    def subscribe(
        self, *wanted: type[E], max_queue: int = 10_000, overflow: Overflow = "drop_oldest"
    ) -> Messages[E]: ...
    @overload
    def subscribe(
        self,
        pattern: str,
        /,
        *wanted: type[E],
        max_queue: int = 10_000,
        overflow: Overflow = "drop_oldest",
    ) -> Messages[E]: ...
    @overload
    def subscribe(
        self,
        *patterns_or_types: str | type[E],
        max_queue: int = 10_000,
        overflow: Overflow = "drop_oldest",
    ) -> Messages[E]: ...
    def subscribe(
        self,
        *patterns_or_types: Any,
        max_queue: int = 10_000,
        overflow: Overflow = "drop_oldest",
    ) -> Messages[Any]:
        """The messages themselves: ``async with bus.subscribe("chat:*", MessageSent) as messages``.

        Strings are patterns; classes are the types wanted (event classes give their template when
        no pattern is named; dict, bytes or a model take every type). Confirmed when the block is
        entered.
        """
        run = self._here()
        texts = [item for item in patterns_or_types if isinstance(item, str)]
        types = [item for item in patterns_or_types if not isinstance(item, str)]
        patterns = patterns_of(texts or types)
        options = Options(max_queue=max_queue, overflow=overflow)
        body = stream_body(types, self._bare)
        name = f"subscribe({', '.join(pattern.text for pattern in patterns)})"
        return Messages(run, patterns, lambda: run.receiver.listen(name, options, body, None))

    async def expect(
        self,
        pattern_or_type: str | type[E],
        /,
        *types: type[E],
        timeout: float,
        where: Callable[[Message[E]], bool] | None = None,
    ) -> Message[E]:
        """The next message that fits. Raises TimeoutError after `timeout` seconds."""
        return await self.subscribe(pattern_or_type, *types).first(timeout, where)

    # -- How it stands -----------------------------------------------------------------------------

    def health(self) -> Health:
        """How the bus stands; truthy only if this process can receive."""
        if self._run is None:
            return Health("closed", "not running", None, None, "off", (), ())
        return self._run.health()

    def stats(self) -> Stats:
        """Counters since the start; those of the last run when the bus is stopped."""
        run = self._last
        if run is None:
            return Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {})
        receiver, publisher = run.receiver, run.publisher
        return Stats(
            published=publisher.published,
            refused=publisher.refused,
            uncertain=publisher.uncertain,
            publish_failed=publisher.failed,
            received=receiver.received,
            delivered=receiver.total("delivered"),
            skipped=receiver.total("skipped"),
            invalid=receiver.dispatcher.invalid,
            dropped=receiver.total("dropped"),
            conflated=receiver.total("conflated") + publisher.conflated,
            missed=receiver.missed,
            failed=receiver.total("failed"),
            reconnects=receiver.reconnects,
            handlers=receiver.handler_stats(),
        )

    @property
    def namespace(self) -> str:
        """What goes before every name on the wire, with a colon after it; empty: nothing."""
        return self._settings.namespace

    def beside(self, **settings: Any) -> EventBus:
        """A new bus without handlers, to the same place and namespace; `settings` are as here."""
        same: Any = {"namespace": self.namespace, "redis_options": self._settings.redis_options}
        return EventBus(self._target, **{**same, **settings})

    @property
    def source(self) -> str | None:
        """The `source` of what this start publishes; None when the bus is not running."""
        return None if self._run is None else self._run.publisher.source

    def redis(self) -> Any:
        """A redis-py client from the same URL and options, closed with the bus."""
        return self._here().redis()

    def acl(self, *publishes: str | type[Event]) -> Acl:
        """The least ACL rules for what this bus does: words for ``ACL SETUSER name on ...``.

        `publishes` are the patterns and event classes that this program publishes on; none: what
        its handlers listen to. Patterns are compared literally by Redis: each is listed. Raises
        InvalidPattern for one that no rule can name. Works before the start too.
        """
        listens = [pattern for item in self._declared for pattern in item.patterns]
        if self._run is not None:
            listens = [p for lane in self._run.receiver.lanes.values() for p in lane.patterns]
        prefix = self._settings.prefix
        return acl_of(
            listens,
            patterns_of(publishes) if publishes else listens,
            prefix=prefix,
            internal=f"&{prefix}{PROBE_PREFIX.decode()}*" if self._settings.heartbeat else None,
            connecting=self._connecting,
        )

    def __repr__(self) -> str:
        return f"<EventBus {self._settings.name} {self.health().state} at {self._describe}>"


def _is_exception_class(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)
