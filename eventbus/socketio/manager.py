"""`Manager`: servers of python-socketio that share rooms, callbacks and orders over an `EventBus`.

An emit goes to the clients of its own node at once, and to the other nodes as one event on one
channel. One channel, and not one for each room, because then what a node says keeps its order (a
client elsewhere enters a room, and the next emit to that room reaches it), a client that has just
connected or joined waits for no subscription, and whatever a node says next shows that something
before it was lost. The price: every node reads the head of every emit. What is emitted travels in
it as text that is not decoded where nobody is meant. Emits to a client of this very node stay here,
and the answer to a callback goes to the asker alone.

Nothing here identifies a node: what this bus published is not heard again (``echo=False``), and an
answer finds its callback by an id that nobody else has. So a manager that was made before a fork is
right in every child.

Of python-socketio (5.18) it relies on what `AsyncServer` asks of its `AsyncManager`; on the
book-keeping of that class (`rooms`, and the methods that it shares with a server alone); and on
`Packet`, which takes bytes out of data and puts them back. `AsyncPubSubManager` is not its base:
that one listens in a task of its own, handles each message inside it, and tells nodes apart by an
id that a fork copies.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from eventbus import (
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    PublishUncertain,
    escape,
)
from eventbus.socketio.wire import Answer, Emission, Order, Room, What, pack, unpack

_Base: Any = object
_Packet: Any = None
try:
    from socketio import AsyncManager  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
    from socketio.packet import Packet  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
except ImportError:
    pass
else:
    _Base, _Packet = AsyncManager, Packet

G = TypeVar("G", bound=Callable[[Gap], Any])

_MAX_ASKED = 10_000
"""Callbacks that wait; the one that waited longest goes. A call that timed out leaves one here."""
_PATIENCE = 2.0
"""Seconds for which `start` waits for Redis before it goes on trying in the background."""
_AGAIN = 5.0
"""Seconds until the next attempt when it was refused: a wrong password stays so for a while."""
_SLOW = 5.0
"""Seconds for one emit of another node. Only a handler of the app takes long, which python-socketio
calls when it finds that a client is gone; the sending goes on, and so do we."""
_logger = logging.getLogger("eventbus")


class Manager(_Base):  # type: ignore[misc]
    """``socketio.AsyncServer(client_manager=Manager(bus))``: its clients, and those of all servers
    with a manager of this `channel`. Make it before the bus starts, one per bus and channel.

    Whoever starts the bus stops it: ``async with bus``, its lifespan, or `start` and `stop` of the
    manager, which serve the clients of this node while Redis is still away. When nobody has by the
    time the first client connects, the manager starts it.

    `write_only`: emit and give orders only; no server is needed. `json`: then, what writes the
    data; else the server's own.
    """

    def __init__(
        self, bus: EventBus, channel: str = "socketio", write_only: bool = False, json: Any = None
    ) -> None:
        if not hasattr(_Base, "is_pre_connected"):
            wanted = "python-socketio 5.18 or newer: pip install 'eventbus-redis[socketio]'"
            raise EventBusError(f"Manager needs {wanted}")
        super().__init__()
        self._bus, self._all = bus, f"{channel}:all"
        self._reply = f"{channel}:to:{secrets.token_hex(8)}"
        self._asked: dict[str, Callable[..., Any]] = {}
        self._gap_handlers: list[Callable[[Gap], Any]] = []
        self._starter: asyncio.Task[None] | None = None
        self._late: datetime | None = None
        self._unheard = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        if json is not None:
            self.json = json
        if not write_only:
            bus.on(escape(self._all), echo=False)(self._hear)
            # A lane of its own: somebody may wait for an answer in what is done for an order.
            bus.on(escape(self._reply), echo=False)(self._hear_answer)
            bus.on_gap(escape(f"{channel}:") + "*")(self._hear_gap)

    # -- Life --------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Called by the server when the first client connects."""
        super().initialize()
        if self._bus.health().state == "closed":
            self._spawn(self.start())

    async def start(self, app: object = None) -> None:
        """Start the bus, unless it runs. When Redis is away, go on trying in the background, and
        let this node serve its own clients meanwhile. What is not just a matter of time is raised.

        It fits a start-up hook: ``socketio.ASGIApp(sio, on_startup=manager.start)``."""
        if self._starter is None or self._starter.done():
            if self._bus.health().state != "closed":
                return
            self._late = None
            self._starter = asyncio.create_task(self._keep_starting(), name="eventbus socketio")
        done, _ = await asyncio.wait({self._starter}, timeout=_PATIENCE)
        if not done:
            self._late = self._late or datetime.now(UTC)
            _logger.warning("Redis is away: clients of this node hear this node alone, until then")
        elif (error := self._starter.exception()) is not None:
            self._starter = None
            raise error

    async def _keep_starting(self) -> None:
        while self._bus.health().state == "closed":
            try:
                await self._bus.start()
            except BusUnavailable:
                continue  # it has waited for `connect_timeout`
            except EventBusError:
                if self._late is None:  # somebody waits for it in `start`
                    raise
                _logger.exception("the bus does not start; again in %s s", _AGAIN)
                await asyncio.sleep(_AGAIN)
        if self._late is not None:
            _logger.info("Redis is there: the clients of this node hear all nodes")
            await self._hear_gap(Gap("reconnect", None, None, None, None, None, self._late))

    async def stop(self, app: object = None) -> None:
        """Stop the bus, if it was started here. Idempotent."""
        starter, self._starter = self._starter, None
        if starter is not None:
            starter.cancel()
            await asyncio.wait({starter})
            await self._bus.stop()

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncGenerator[None, None]:
        """`start` and `stop`: ``Starlette(lifespan=manager.lifespan)``."""
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    # -- What the server asks for ------------------------------------------------------------------

    async def emit(
        self,
        event: str,
        data: Any = None,
        namespace: str | None = None,
        room: Any = None,
        skip_sid: Any = None,
        callback: Callable[..., Any] | None = None,
        to: Any = None,
        **kwargs: Any,
    ) -> None:
        """See `AsyncServer.emit`. Clients of this node have it at once; that others do not get it
        because Redis is away is logged and counted. It is raised when there is a `callback`, which
        would never be called, and without a server, since then nobody has got it."""
        namespace, room = namespace or "/", to or room
        but = [skip_sid] if isinstance(skip_sid, str) else list(skip_sid or ())
        here = partial(super().emit, event, data, namespace, room=room, skip_sid=but)
        rooms = room if room is None or isinstance(room, list | tuple) else (room,)
        if rooms is not None and not rooms:
            return
        if kwargs.get("ignore_queue") or self._are_here(rooms, namespace):
            await here(callback=callback)
            return
        if callback is not None and self.server is None:
            raise RuntimeError("Callbacks can only be issued from the context of a server.")
        if callback is not None and room is None:
            raise ValueError("Cannot use callback without a room set.")
        values = list(data) if isinstance(data, tuple) else [] if data is None else [data]
        text, blobs = pack(_Packet, self.json, values)
        ack = None if callback is None else self._ask(callback)
        said = Emission(
            name=event, namespace=namespace, rooms=None if rooms is None else tuple(rooms),
            but=tuple(but), reply=self._reply, ack=ack, data=text, blobs=blobs,
        )  # fmt: skip
        if ack is None:
            await here()
            await self._tell(self._all, said)
            return
        try:
            await here(callback=partial(self._answered, ack))
            await self._bus.publish(self._all, said)
        except BaseException:
            self._asked.pop(ack, None)
            raise

    async def can_disconnect(self, sid: str, namespace: str) -> bool:
        """Whether it is a client of this node; the node that it is of disconnects it otherwise."""
        if self._is_here(sid, namespace):
            return bool(await super().can_disconnect(sid, namespace))
        await self._order("disconnect", namespace, sid)
        return False

    async def disconnect(self, sid: str, namespace: str, **kwargs: Any) -> None:
        """Forget a client, as the server says (`ignore_queue`), or disconnect it, wherever."""
        if kwargs.get("ignore_queue"):
            await super().disconnect(sid, namespace)
        elif self._is_here(sid, namespace):
            await self.server.disconnect(sid, namespace=namespace, ignore_queue=True)
        else:
            await self._order("disconnect", namespace, sid)

    async def enter_room(
        self, sid: str, namespace: str, room: Room, eio_sid: str | None = None
    ) -> None:
        """Make it a member, wherever it is."""
        if self._is_here(sid, namespace):
            await super().enter_room(sid, namespace, room, eio_sid=eio_sid)
        else:
            await self._order("enter", namespace, sid, room)

    async def leave_room(self, sid: str, namespace: str, room: Room) -> None:
        """Make it leave, wherever it is."""
        if self._is_here(sid, namespace):
            await super().leave_room(sid, namespace, room)
        else:
            await self._order("leave", namespace, sid, room)

    async def close_room(self, room: Room, namespace: str | None = None) -> None:
        """Make everyone leave, on every node."""
        await super().close_room(room, namespace or "/")
        await self._order("close", namespace, None, room)

    # -- To the other nodes ------------------------------------------------------------------------

    async def _order(
        self, what: What, space: str | None, sid: str | None = None, room: Room | None = None
    ) -> None:
        """Raises what `EventBus.publish` does: nothing was done, or it was done here alone."""
        said = Order(what=what, namespace=space or "/", sid=sid, room=room)
        await self._bus.publish(self._all, said)

    async def _tell(self, channel: str, said: Event) -> None:
        try:
            await self._bus.publish(channel, said)
        except (BusClosed, BusUnavailable, PublishUncertain) as error:
            if self.server is None:
                raise
            self._unheard += 1
            if self._unheard == 1:  # one line for each change, not for each emit
                _logger.warning("what this node emits does not reach the others: %s", error)
        else:
            if self._unheard:
                lost, self._unheard = self._unheard, 0
                again = (
                    "what this node emits reaches the others again; %s emits did not, or may not"
                )
                _logger.warning(again, lost)

    def _ask(self, callback: Callable[..., Any]) -> str:
        if len(self._asked) >= _MAX_ASKED:
            del self._asked[next(iter(self._asked))]
        ack = secrets.token_hex(8)
        self._asked[ack] = callback
        return ack

    # -- From the other nodes ----------------------------------------------------------------------

    async def _hear(self, said: Emission | Order) -> None:
        namespace = said.namespace
        if isinstance(said, Emission):
            known, ack = self.rooms.get(namespace, {}), said.ack
            if any(room in known for room in ((None,) if said.rooms is None else said.rooms)):
                async with asyncio.timeout(_SLOW):
                    await super().emit(
                        said.name, unpack(_Packet, self.json, said), namespace,
                        room=None if said.rooms is None else list(said.rooms),
                        skip_sid=list(said.but),
                        callback=None if ack is None else partial(self._answer, said.reply, ack),
                    )  # fmt: skip
        elif said.what == "close":
            await super().close_room(said.room, namespace)
        elif not self._is_here(said.sid, namespace):
            pass
        elif said.what == "enter":
            await super().enter_room(said.sid, namespace, said.room)
        elif said.what == "leave":
            await super().leave_room(said.sid, namespace, said.room)
        else:  # it calls a handler of the app, for which nobody else should wait
            self._spawn(self.server.disconnect(said.sid, namespace, ignore_queue=True))

    async def _answer(self, reply: str, ack: str, *values: Any) -> None:
        data, blobs = pack(_Packet, self.json, list(values))
        await self._tell(reply, Answer(ack=ack, data=data, blobs=blobs))

    async def _hear_answer(self, said: Answer) -> None:
        if said.ack in self._asked:
            self._spawn(self._answered(said.ack, *unpack(_Packet, self.json, said)))

    async def _answered(self, ack: str, *values: Any) -> None:
        callback = self._asked.pop(ack, None)  # of several answers the first counts
        found = callback(*values) if callback is not None else None
        if inspect.isawaitable(found):
            await found

    def on_gap(self, handler: G) -> G:
        """Hear that emits from other nodes were, or may have been, missed: ``async def f(gap)``.
        Tell the clients with ``sio.emit(..., ignore_queue=True)``, which stays on this node."""
        self._gap_handlers.append(handler)
        return handler

    async def _hear_gap(self, gap: Gap) -> None:
        for handler in self._gap_handlers:
            found = handler(gap)
            if inspect.isawaitable(found):
                await found

    # -- Small things ------------------------------------------------------------------------------

    def _is_here(self, sid: Any, space: str | None) -> bool:
        where = sid, space or "/"
        return bool(self.is_connected(*where) or self.is_pre_connected(*where))

    def _are_here(self, rooms: Any, namespace: str) -> bool:
        """Whether these are clients of this node, and nothing else."""
        return bool(rooms) and all(self._is_here(room, namespace) for room in rooms)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("what a client, or the app, was to do failed", exc_info=error)
