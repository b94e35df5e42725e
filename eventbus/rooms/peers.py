"""Peers: nodes that know one another, and put questions to all without waiting for the dead.

A node greets the others when it starts and after each outage, and says goodbye; whoever was heard
is in its roster. A question goes to all on one channel, the answers come back on the asker's own.
It is over when everyone whom Redis handed a copy has answered, so a dead node costs no time;
whoever is in the roster and gave no answer is *named*, never raised.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel

from eventbus import (
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    InvalidEvent,
    PublishUncertain,
    Route,
    escape,
)

_PATIENCE = 0.25
"""Seconds for which somebody whom Redis knows and the roster does not may stay silent: a new node,
or a monitor that never answers."""
_REMEMBER = 60.0
"""Seconds for which a silent node is named before it is forgotten: it may only be cut off."""
_BYTES = 200_000
"""Bytes of one answer in parts: far from the 1 MiB that a message may have."""
_AT_A_TIME = 16
"""Questions of other nodes that are worked on at a time, in `Servers.on` handlers."""


def dumps(value: object) -> bytes:
    """A value as JSON, pydantic models too. Raises InvalidEvent."""
    try:
        return orjson.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise InvalidEvent(f"the data is no JSON: {error}") from error


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def tables_of(tables: Iterable[bytes]) -> Iterator[str]:
    """JSON objects made one, and another when that gets long."""
    part: list[bytes] = []
    size = 0
    for table in tables:
        if size + len(table) > _BYTES and part:
            yield f"{{{b','.join(part).decode()}}}"
            part, size = [], 0
        part.append(table[1:-1])
        size += len(table)
    if part:
        yield f"{{{b','.join(part).decode()}}}"


class Ask(Event, type="eventbus.rooms.ask"):
    """A question of one node to all: what, and the details as JSON."""

    id: str
    node: str
    what: str
    body: str = "{}"
    blob: bytes | None = None


class Answer(Event, type="eventbus.rooms.answer"):
    """What one node says to a question: whom it asks in turn, what these said or that they are gone
    without a word, and whether it is done.

    A `blob` is the value of the one name in `said`.
    """

    id: str
    node: str
    asked: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    said: str = "{}"
    blob: bytes | None = None
    done: bool = True


class Replies(NamedTuple):
    """What was answered, by client (by node from `Servers.call`); who was asked and did not answer;
    and the nodes that did not even say whom they asked."""

    replies: dict[str, Any]
    missing: tuple[str, ...]
    missing_nodes: tuple[str, ...]


class Gathered:
    """The answers to one question."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.owing: set[str] = set()
        self.said: dict[str, Any] = {}
        self.done: set[str] = set()
        self.missing: tuple[str, ...] = ()
        self.changed = asyncio.Event()

    def hear(self, answer: Answer) -> None:
        """One answer more."""
        self.asked.update(answer.asked)
        self.owing.update(answer.asked)
        said = orjson.loads(answer.said)
        for who, what in said.items():
            self.said[who] = what if answer.blob is None else answer.blob
        self.owing.difference_update(answer.gone, said)
        if answer.done:
            self.done.add(answer.node)
        self.changed.set()


class Peers:
    """The other nodes that use this prefix. `do` answers their questions (and our own), `ready`
    sees to it that we are attached."""

    def __init__(
        self,
        bus: EventBus,
        prefix: str,
        do: Callable[[Ask], Awaitable[None]],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self.bus = bus
        self.id = ""
        self.roster: dict[str, float] = {}
        """The others, and since when each is silent (0: it is not)."""
        self.servers = Servers(self)
        self._prefix = prefix
        self._do, self._ready = do, ready
        self._open: dict[str, Gathered] = {}
        self._serving: Route | None = None

    async def attach(self, hear: Callable[..., Awaitable[None]]) -> Route:
        """Begin as a new node; `hear` handles all that is said on the route that is returned."""
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        all_, mine, servers = (
            escape(self._prefix + last) for last in ("all", f"node:{self.id}", "servers")
        )
        route = await self.bus.attach(hear, all_, mine, echo=False)
        try:
            self._serving = await self.bus.attach(
                self.servers.serve_nodes, servers, echo=False, concurrency=_AT_A_TIME
            )
        except BaseException:
            await route.detach()
            raise
        await self.greet()
        return route

    async def detach(self) -> None:
        """Say goodbye, and answer no more."""
        serving, self._serving = self._serving, None
        if serving is not None:
            with suppress(EventBusError):
                await self.tell("all", self.new("bye"))
            await serving.detach()

    async def greet(self) -> None:
        """Learn who else is there, and tell them."""
        await self.ask("hello", timeout=_PATIENCE)

    async def hear(self, event: Ask | Answer) -> None:
        """What another node asked or answered."""
        self.roster[event.node] = 0.0
        if isinstance(event, Answer):
            if (gathered := self._open.get(event.id)) is not None:
                gathered.hear(event)
        elif event.what == "hello":
            self.answer(event)
        elif event.what == "bye":
            del self.roster[event.node]
        else:
            await self._do(event)

    def answer(self, ask: Ask, **fields: Any) -> bool:
        """Answer a question, once or in parts (all but the last with `done=False`). False when
        that cannot be sent."""
        answer = Answer(id=ask.id, node=self.id, **fields)
        if ask.node == self.id:
            if (gathered := self._open.get(ask.id)) is not None:
                gathered.hear(answer)
        else:
            try:
                self.bus.publish_nowait(f"{self._prefix}node:{ask.node}", answer)
            except EventBusError:
                return False  # the asker will name us
        return True

    async def tell(self, channel: str, ask: Ask) -> int:
        """Publish; returns how many copies Redis has handed out."""
        return (await self.bus.publish(self._prefix + channel, ask)).receivers or 0

    def new(self, what: str, body: bytes = b"{}", id: str = "", blob: bytes | None = None) -> Ask:
        id = id or secrets.token_hex(8)
        return Ask(id=id, node=self.id, what=what, body=body.decode(), blob=blob)

    async def ask(
        self,
        what: str,
        body: bytes = b"{}",
        *,
        timeout: float,
        id: str = "",
        blob: bytes | None = None,
        scope: str = "all",
    ) -> Gathered:
        """The answers of all nodes, our own first, within the time. `scope` is "here" for our own
        alone and "servers" for the others alone. Everyone `asked` must have `said` something, or be
        gone.
        """
        if what != "hello":
            await self._ready()
        ask = self.new(what, body, id, blob)
        gathered = self._open[ask.id] = Gathered()
        loop = asyncio.get_running_loop()
        patient = loop.time() + _PATIENCE
        timer = loop.call_at(patient, gathered.changed.set)
        copies = 0

        def is_over() -> bool:
            if gathered.owing:
                return False
            return len(gathered.done) >= copies or (
                loop.time() >= patient and self.roster.keys() <= gathered.done
            )

        with suppress(TimeoutError, BusUnavailable, PublishUncertain):  # the answers so far
            try:
                async with asyncio.timeout(timeout):
                    if scope == "servers" or what == "hello":
                        gathered.done.add(self.id)
                    else:
                        await self._do(ask)
                    if scope != "here":
                        copies = await self.tell(scope, ask)
                    while not is_over():
                        gathered.changed.clear()
                        await gathered.changed.wait()
            finally:
                timer.cancel()
                del self._open[ask.id]
        if scope != "here":
            gathered.missing = self._missing(gathered.done, loop.time())
        return gathered

    def _missing(self, done: set[str], now: float) -> tuple[str, ...]:
        missing = tuple(sorted(self.roster.keys() - done))
        for node in missing:
            self.roster[node] = since = self.roster[node] or now
            if now - since > _REMEMBER:
                del self.roster[node]
        return missing


Handler = Callable[[Any], Any]


class Servers:
    """The other nodes themselves: `on` says what they do, `emit` and `call` ask them to."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._handlers: dict[str, Handler] = {}

    def on(self, event: str) -> Callable[[Handler], Handler]:
        """Handle what other nodes emit: a function of the data; what it returns is the answer."""

        def decorate(fn: Handler) -> Handler:
            self._handlers[event] = fn
            return fn

        return decorate

    async def emit(self, event: str, data: object = None) -> None:
        """Tell the other nodes, and wait for nothing."""
        await self._peers.tell("servers", self._peers.new("tell", dumps([event, data])))

    async def call(self, event: str, data: object = None, timeout: float = 1.0) -> Replies:
        """Ask the other nodes. One without such a handler, or whose handler failed, is missing."""
        found = await self._peers.ask(
            "serve", dumps([event, data]), timeout=timeout, scope="servers"
        )
        asked = {*found.missing, *found.done} - {self._peers.id}
        missing = tuple(sorted(asked - found.said.keys()))
        return Replies(found.said, missing, missing)

    async def serve_nodes(self, ask: Ask) -> None:
        """What another node emitted, or asks."""
        event, data = orjson.loads(ask.body)
        said = b"{}"
        try:
            if (handler := self._handlers.get(event)) is not None:
                reply = handler(data)
                if inspect.isawaitable(reply):
                    reply = await reply
                said = dumps({self._peers.id: reply})
        finally:
            if ask.what == "serve":
                self._peers.answer(ask, said=said.decode())
