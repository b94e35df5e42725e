"""The hub: who is in which room on this node, and what goes to the rooms of all nodes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple, Self

import orjson

from eventbus import BusClosed, Event, EventBus, EventBusError, Gap, InvalidChannel, Route, escape
from eventbus.rooms.clients import Client, Frame, frame_of, names_of
from eventbus.rooms.interest import Interest
from eventbus.rooms.peers import Answer, Ask, Peers, Replies, dumps, tables_of

_IDS = 1000
"""Ids in one answer: far from the 1 MiB that a message may have."""
_logger = logging.getLogger("eventbus")

GapHandler = Callable[[Gap, str | None], Awaitable[object]]


class Member(NamedTuple):
    """A client somewhere: who, on which node, in which rooms, and the data of its connect."""

    id: str
    node: str
    rooms: frozenset[str]
    data: Any


class Fetched(NamedTuple):
    """The clients that were found, and the nodes that did not answer."""

    clients: tuple[Member, ...]
    missing: tuple[str, ...]


class Emission(Event, type="eventbus.rooms.emission"):
    """A frame for the members of `rooms` (none: for everybody), but not for those of `but`."""

    rooms: tuple[str, ...]
    but: tuple[str, ...]
    text: str
    blob: bytes | None


@dataclass(frozen=True, slots=True)
class Target:
    """Whom something is for: `to` adds rooms (or ids), `except_` takes away; each client once."""

    _hub: Hub
    rooms: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    only_here: bool = False

    def to(self, *rooms: str) -> Self:
        """The members of these rooms, too. Without any `to`, everyone is meant."""
        if not rooms:
            raise InvalidChannel("name at least one room: nobody is meant by none")
        return replace(self, rooms=self.rooms + names_of(rooms))

    def except_(self, *rooms: str) -> Self:
        """Not the members of these rooms."""
        return replace(self, but=self.but + names_of(rooms))

    @property
    def local(self) -> Self:
        """Clients of this node only; no Redis."""
        return replace(self, only_here=True)

    async def emit(self, event: str, data: object = None) -> int:
        """Send to the clients of this node, at once, and to those of the others. Returns how many
        these are here. What `EventBus.publish` raises is about the other nodes only."""
        return await self._hub.emit(self, frame_of(data, event=event))

    async def call(self, event: str, data: object = None, timeout: float = 1.0) -> Replies:
        """Send, and wait for the answer of each client that was meant."""
        return await self._hub.call(self, event, data, timeout)

    async def fetch(self, timeout: float = 1.0) -> Fetched:
        """The clients that are meant: who, where, in which rooms."""
        return await self._hub.fetch(self, timeout)

    async def join(self, *rooms: str, timeout: float = 1.0) -> tuple[str, ...]:
        """Make them members, confirmed. Returns the nodes that did not say that they have."""
        return await self._hub.change("join", self, names_of(rooms), timeout)

    async def leave(self, *rooms: str, timeout: float = 1.0) -> tuple[str, ...]:
        """Make them leave. Returns the nodes that did not say that they have."""
        return await self._hub.change("leave", self, names_of(rooms), timeout)

    async def disconnect(self, timeout: float = 1.0) -> tuple[str, ...]:
        """End their `connect` blocks. Returns the nodes that did not say that they have."""
        return await self._hub.change("disconnect", self, (), timeout)


class Hub:
    """This node: its clients and their rooms, and what it says to the others and does for them."""

    def __init__(self, bus: EventBus, name: str) -> None:
        self.clients: dict[str, Client] = {}
        self.members: dict[str, set[Client]] = {}
        self.gap_handlers: list[GapHandler] = []
        self.prefix = f"rooms:{name}:"
        self.peers = Peers(bus, self.prefix, self._do, self.start)
        self._bus = bus
        self._route: Route | None = None
        self._starting = asyncio.Lock()
        self._interest = Interest(
            bus, self.members, self._pattern, self._route_now, self._tell_late
        )
        self._pending: dict[str, tuple[Ask, set[str]]] = {}

    # -- Life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and learn who else is there. Nothing to do when that was done."""
        if self._route is None:
            async with self._starting:
                if self._route is None:
                    self._route = await self.peers.attach(self.hear_rooms)

    async def stop(self) -> None:
        """End the clients, say goodbye, and listen no more."""
        for client in list(self.clients.values()):
            client.close("stopped")
        await self._interest.close()
        await self.peers.detach()
        if self._route is not None:
            await self._route.detach()
        self._route = None

    async def _route_now(self, anew: bool) -> Route:
        if anew:
            self._route = None
        await self.start()
        if self._route is None:
            raise BusClosed("these rooms were stopped")
        return self._route

    def _pattern(self, room: str) -> str:
        return escape(f"{self.prefix}in:{room}")

    # -- Members -----------------------------------------------------------------------------------

    def everyone(self) -> Target:
        """All clients, on every node."""
        return Target(self)

    def enter(self, client: Client) -> None:
        """Know a new client. Raises EventBusError when its id is taken."""
        if client.id in self.clients:
            raise EventBusError(f"a client {client.id!a} is connected to this node already")
        self.clients[client.id] = client

    async def join(self, clients: Collection[Client], names: Collection[str]) -> bool:
        """Members here at once; of what others publish, too, when it returns (see `Client`)."""
        fresh: dict[Client, set[str]] = {}
        for client in clients:
            if self.clients.get(client.id) is not client:
                raise EventBusError(f"client {client.id!a} is not connected any more")
            fresh[client] = set(names) - client.joined
            client.joined.update(names)
            for name in names:
                self.members.setdefault(name, set()).add(client)
        try:
            return await self._interest.settle(names)
        except BaseException:  # denied or cancelled: as if it had not been tried
            for client, news in fresh.items():
                self._take([client], news)
            self._interest.touch(names)
            raise

    async def leave(self, clients: Collection[Client], names: Collection[str]) -> None:
        """Members no more, at once; unsubscribed, where nobody is left, when it returns."""
        self._take(clients, names)
        await self._interest.settle(names)

    def _take(self, clients: Collection[Client], names: Collection[str]) -> None:
        for client in clients:
            for name in client.joined.intersection(names):
                client.joined.discard(name)
                self.members[name].discard(client)
                if not self.members[name]:
                    del self.members[name]

    def remove(self, client: Client) -> bool:
        """Forget a client. False when that was done before."""
        if self.clients.get(client.id) is not client:
            return False
        del self.clients[client.id]
        for ask, waiting in self._pending.values():
            if client.id in waiting:
                waiting.discard(client.id)
                self.peers.answer(ask, gone=(client.id,), done=False)
        names = client.rooms
        self._take([client], names)
        self._interest.touch(names)
        return True

    def matching(self, rooms: Iterable[str], but: Iterable[str]) -> list[Client]:
        """The clients of this node that are meant, each once."""
        named = [self.members.get(name, set()) for name in rooms]
        found: Collection[Client] = self.clients.values()
        if named:
            found = named[0] if len(named) == 1 else set().union(*named)
        if not but:
            return list(found)
        out: set[Client] = set().union(*(self.members.get(name, ()) for name in but))
        return [client for client in found if client not in out]

    # -- To clients --------------------------------------------------------------------------------

    async def emit(self, to: Target, frame: Frame) -> int:
        """See `Target.emit`."""
        clients = self.matching(to.rooms, to.but)
        for client in clients:
            client.put(frame)
        if not to.only_here:
            text, blob = ("", frame) if isinstance(frame, bytes) else (frame, None)
            channel = f"in:{to.rooms[0]}" if len(to.rooms) == 1 else "all"
            emission = Emission(rooms=to.rooms, but=to.but, text=text, blob=blob)
            await self._bus.publish(self.prefix + channel, emission)
        return len(clients)

    async def hear_rooms(self, event: Emission | Ask | Answer) -> None:
        """What the other nodes say."""
        if isinstance(event, Emission):
            frame = event.text if event.blob is None else event.blob
            for client in self.matching(event.rooms, event.but):
                client.put(frame)
        else:
            await self.peers.hear(event)

    # -- Questions ---------------------------------------------------------------------------------

    async def _ask(self, what: str, to: Target, timeout: float, **more: Any) -> Any:
        names, blob = more.get("names", ()), more.get("blob")
        body = dumps([to.rooms, to.but, names, more.get("text"), timeout])
        return await self.peers.ask(
            what,
            body,
            timeout=timeout,
            id=more.get("id", ""),
            blob=blob,
            scope="here" if to.only_here else "all",
        )

    async def call(self, to: Target, event: str, data: object, timeout: float) -> Replies:
        """See `Target.call`."""
        ack = secrets.token_hex(8)
        frame = frame_of(data, event=event, ack=ack)
        text, blob = (None, frame) if isinstance(frame, bytes) else (frame, None)
        found = await self._ask("call", to, timeout, id=ack, text=text, blob=blob)
        return Replies(found.said, tuple(sorted(found.asked - found.said.keys())), found.missing)

    async def fetch(self, to: Target, timeout: float) -> Fetched:
        """See `Target.fetch`."""
        found = await self._ask("fetch", to, timeout)
        members = (
            Member(id, node, frozenset(rooms), data)
            for id, node, rooms, data in found.said.values()
        )
        return Fetched(tuple(members), found.missing)

    async def change(
        self,
        what: Literal["join", "leave", "disconnect"],
        to: Target,
        names: tuple[str, ...],
        timeout: float,
    ) -> tuple[str, ...]:
        """See `Target.join`."""
        missing: tuple[str, ...] = (await self._ask(what, to, timeout, names=names)).missing
        return missing

    async def _do(self, ask: Ask) -> None:
        """Answer a question, of another node or our own."""
        rooms, but, names, text, timeout = orjson.loads(ask.body)
        clients = self.matching(rooms, but)
        parts: list[dict[str, Any]] = []
        if ask.what == "call":
            self._pending[ask.id] = ask, {client.id for client in clients}
            asyncio.get_running_loop().call_later(timeout, self._pending.pop, ask.id, None)
            ids = [client.id for client in clients]
            parts = [{"asked": tuple(ids[at : at + _IDS])} for at in range(0, len(ids), _IDS)]
        elif ask.what == "fetch":
            here = self.peers.id
            members = [
                dumps({f"{here} {client.id}": (client.id, here, [*client.joined], client.data)})
                for client in clients
            ]
            parts = [{"said": said} for said in tables_of(members)]
        elif ask.what == "join":
            await self.join(clients, names)
        elif ask.what == "leave":
            await self.leave(clients, names)
        elif ask.what == "disconnect":
            for client in clients:
                client.close("disconnected")
        sent = [self.peers.answer(ask, done=False, **part) for part in parts]
        if all(sent):  # else we are missing, rather than some of what we know
            self.peers.answer(ask)
        if ask.what == "call":
            for client in clients:
                client.put(text if ask.blob is None else ask.blob)

    def acknowledged(self, client: Client, ack: str, data: object) -> None:
        """A client has answered a call. It counts if it was asked, and once."""
        ask, waiting = self._pending.get(ack, (None, set[str]()))
        if ask is not None and client.id in waiting:
            waiting.discard(client.id)
            blob, value = (data, None) if isinstance(data, bytes) else (None, data)
            said = dumps({client.id: value}).decode()
            self.peers.answer(ask, said=said, blob=blob, done=False)

    # -- Gaps --------------------------------------------------------------------------------------

    async def hear_gap(self, gap: Gap) -> None:
        """Something was, or may have been, missed: greet the others anew, and tell the app."""
        inside = self.prefix + "in:"
        channel = gap.channel or self.prefix + "all"
        room = channel.removeprefix(inside) if channel.startswith(inside) else None
        if self._route is not None and room is None:
            await self.peers.greet()
        if room is not None or channel == self.prefix + "all":
            for handler in self.gap_handlers:
                await handler(gap, room)

    async def _tell_late(self, room: str, since: datetime) -> None:
        for handler in self.gap_handlers:
            try:
                await handler(Gap("reconnect", None, None, None, None, None, since), room)
            except Exception:
                _logger.exception("a gap handler of rooms failed")
