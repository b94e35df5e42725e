"""Presence: who is online, on whichever node and device, without ghosts.

The truth lives in Redis: the sessions of each user and of each node, and until when a node counts
as alive. One Lua script does every change, so "the first came" and "the last went" are decided in
one place, and the script itself (presence.lua) publishes the event: nobody can die between a change
and its event, no two tell the same change, and events leave in the order of the changes.

- A node says that it lives with one command, however many users it has. The same command carries
  what changed here, and sweeps out nodes that have been silent for `ttl`.
- If nobody could say so for a while (Redis itself was away), nobody is swept before all had `ttl`
  to come back.
- At each beat the number of sessions here is compared with what Redis has. When they differ (this
  node was swept, Redis lost data), the difference is told, in batches.

Only what a node tells and asks may enter; what is seen of it is `eventbus.roster`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import count
from types import TracebackType
from typing import Any, Self

import anyio
from redis.exceptions import NoPermissionError

from eventbus import (
    BusClosed,
    BusUnavailable,
    EventBus,
    EventBusError,
    Gap,
    InvalidChannel,
    PayloadTooLarge,
    PermissionDenied,
)
from eventbus.roster import Picture, Session, UserOffline, UserOnline, View

__all__ = ["Presence", "Session", "UserOffline", "UserOnline", "View"]

_BATCH = 500
"""Sessions in one command: Redis does nothing else meanwhile (a few milliseconds)."""
_MAX_META = 16 * 1024
_PATIENCE = 1.0
"""Seconds that a session waits for Redis; longer, and it is told when Redis is back."""
_NAME = re.compile(r"[^:\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z")
_MAX_NAME = 400
"""Bytes of a user's name: with a namespace it is a channel, of 512 at most."""

_DENIED = re.compile("NOPERM|ACL|executing the script can't")
"""How servers say that the script itself was denied something."""
_SCRIPT = files("eventbus").joinpath("presence.lua").read_text(encoding="utf-8")

_log = logging.getLogger("eventbus.presence")
_Users = list[str]
_Changes = list[tuple[str, str, str, str]]
_Waiters = list[asyncio.Future[None]]


@dataclass(slots=True)
class _Here:
    user: str
    value: str
    announced: bool = False


class Presence:
    """The users of this node, and the questions about those of all nodes.

    `ttl`: seconds after which the users of a silent node are offline; the same on every node. A
    node says four times in a `ttl` that it lives. `linger`: how long a user whose last session
    ended stays announced, so that a page that is loaded again does not flicker. Make it before the
    bus starts, and it hears of gaps at once. Use it inside the bus's block; ``async with bus,
    presence:`` signs off what is left, at once.
    """

    def __init__(self, bus: EventBus, *, ttl: float = 10.0, linger: float = 1.0) -> None:
        if not ttl > 0 or linger < 0:
            raise ValueError("Presence needs ttl > 0 and linger >= 0")
        self._bus = bus
        self._ttl, self._linger = ttl, linger
        space = f"{bus.namespace}:" if bus.namespace else ""
        self._base, self._channel = f"{{{space}presence}}", f"{space}presence:"
        self._node = ""
        self._numbers = count(1)
        self._sessions: dict[str, _Here] = {}
        self._pending: _Changes = []
        self._waiters: list[asyncio.Future[None]] = []
        self._views: set[View] = set()
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._doubt = self._away = False
        with suppress(EventBusError):  # on a running bus the beats alone tell views that they lag
            bus.on_gap("presence:*")(self._missed)

    # -- Sessions ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def track(
        self, user: str, *, meta: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Session, None]:
        """One device of this user is here, while the block lasts. `meta` is JSON, at most 16 KiB.

        While Redis is away the block is entered after a second, and told when Redis is back.
        Raises InvalidChannel for a name with ``:`` or control characters, PermissionDenied.
        """
        if not _NAME.match(user) or len(user.encode()) > _MAX_NAME:
            raise InvalidChannel(
                f"user {user!a:.100} must not be empty, nor hold ':' or control characters, nor be"
                f" longer than {_MAX_NAME} bytes: it is part of a channel"
            )
        text = json.dumps(dict(meta or {}), allow_nan=False)
        if len(text) > _MAX_META:
            raise PayloadTooLarge(f"meta has {len(text)} bytes, {_MAX_META} may be", size=len(text))
        self._begin()
        since = datetime.now(UTC)
        session = f"{self._node}:{next(self._numbers)}"
        here = self._sessions[session] = _Here(user, f"{since.isoformat()} {text}")
        try:
            await self._tell("+", session, here)
            yield Session(self._node, since, json.loads(text))
        finally:
            self._sessions.pop(session, None)
            with anyio.CancelScope(shield=True), suppress(EventBusError):
                await self._tell("-", session, here)

    async def _tell(self, op: str, session: str, here: _Here) -> None:
        if self._task is None or self._task.done():
            return  # left, or the bus stopped: the ttl sees to it
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((op, session, here.user, here.value))
        self._waiters.append(waiter)
        self._wake.set()
        await asyncio.wait({waiter}, timeout=_PATIENCE)
        if waiter.cancel():  # not done: Redis is away, or slow
            return
        waiter.result()

    # -- Questions ---------------------------------------------------------------------------------

    async def get(self, user: str) -> tuple[Session, ...]:
        """The sessions of a user, on all nodes that live; none: not online."""
        found = [_text(item) for item in await self._call("get", user)]
        sessions: list[Session] = []
        for session, value in zip(found[::2], found[1::2], strict=True):
            since, _, meta = value.partition(" ")
            node = session.rpartition(":")[0]
            sessions.append(Session(node, datetime.fromisoformat(since), json.loads(meta)))
        return tuple(sorted(sessions, key=lambda session: session.since))

    async def list(self) -> _Users:
        """Who has a session on a node that lives, in alphabetical order."""
        return sorted(map(_text, await self._call("list")))

    @asynccontextmanager
    async def watch(self) -> AsyncGenerator[View, None]:
        """A live picture: complete when the block is entered, then kept up to date."""
        self._begin()
        view = View(self._picture, self._ttl)
        async with self._bus.subscribe("presence:*", UserOnline, UserOffline) as messages:
            await view.refresh()
            self._views.add(view)
            task = asyncio.create_task(view.follow(messages), name="eventbus presence view")
            try:
                yield view
            finally:
                self._views.discard(view)
                task.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({task})

    async def _picture(self) -> Picture:
        epoch, version, age, users = await self._call("read")
        return Picture(_text(epoch), version, age / 1000, frozenset(map(_text, users)))

    async def _missed(self, gap: Gap) -> None:
        for view in tuple(self._views):
            with suppress(EventBusError):  # then the next beat does it
                await view.refresh()

    # -- The node ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (task := self._task) is None:
            return
        self._sessions.clear()
        self._doubt, self._task = True, None
        task.cancel()
        with anyio.CancelScope(shield=True), suppress(EventBusError):
            await asyncio.wait({task})
            await self._sync()
            while await self._call("quit", self._node, 0, 0, _BATCH):
                pass

    def _begin(self) -> None:
        """Have the task that speaks for this node. Raises EventBusError without a Redis."""
        self._client()
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            self._node = secrets.token_hex(8)
            self._doubt = bool(self._sessions)
            self._pending, self._waiters, self._wake = [], [], asyncio.Event()
            self._task = asyncio.create_task(self._live(), name="eventbus presence")

    async def _live(self) -> None:
        """Beat, tell what changed, sweep; until the bus stops."""
        while True:
            self._wake.clear()
            try:
                pause = await self._sync()
                if self._away:
                    _log.info("presence: Redis answers again")
                self._away = False
            except EventBusError as error:
                if not isinstance(error, BusUnavailable):
                    self._settle(error)
                if isinstance(error, BusClosed):
                    return
                if not self._away:
                    _log.warning("%s", error)
                self._away = self._doubt = True
                await asyncio.sleep(self._ttl / 16)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def _sync(self) -> float:
        """Tell Redis what it does not know; returns how long nothing more is to be done."""
        theirs: dict[str, str] | None = None
        if self._doubt:
            rows = [_text(item) for item in await self._call("own", self._node)]
            theirs = dict(zip(rows[::2], rows[1::2], strict=True))
        total, pending, waiters = len(self._sessions), self._pending, self._waiters
        self._pending, self._waiters = [], []
        if theirs is not None:
            pending = self._difference(theirs)
        told, verb = [change[1] for change in pending], "sync" if theirs is None else "resync"
        try:
            while len(pending) > _BATCH:
                await self._send(verb, -1, pending[:_BATCH])
                pending = pending[_BATCH:]
            known, more, epoch, version, due = await self._send(verb, total, pending)
        except BaseException:
            self._doubt = True
            self._waiters = waiters + self._waiters
            raise
        again, self._doubt = not known and not self._doubt, not known
        for session in (*told, *(theirs or ())):
            if here := self._sessions.get(session):
                here.announced = True
        self._settle(None, waiters)
        for view in tuple(self._views):
            await view.check(_text(epoch), version)
        beat = self._ttl / (16 if self._doubt else 4)
        return 0 if more or again else min(beat, due / 1000 if due >= 0 else beat)

    def _difference(self, theirs: Mapping[str, str]) -> _Changes:
        """What turns the sessions that Redis has for this node into those that are here."""
        here = self._sessions.items()
        new = [(s, it) for s, it in here if s not in theirs]
        return [("=" if it.announced else "+", s, it.user, it.value) for s, it in new] + [
            ("-", s, user, "") for s, user in theirs.items() if s not in self._sessions
        ]

    async def _send(self, verb: str, total: int, changes: _Changes) -> Any:
        """The beat, with what changed. `total`: the number of sessions then; -1: more follow."""
        linger, words = int(self._linger * 1000), [word for item in changes for word in item]
        return await self._call(verb, self._node, linger, total, _BATCH, *words)

    def _settle(self, error: Exception | None, waiters: _Waiters | None = None) -> None:
        if waiters is None:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    def _client(self) -> Any:
        try:
            return self._bus.redis()
        except BusClosed:
            raise
        except EventBusError as error:
            raise EventBusError(f"presence keeps its state in Redis: {error}") from error

    async def _call(self, verb: str, *words: object) -> Any:
        """Run the script. Raises BusUnavailable, PermissionDenied, BusClosed."""
        script = self._client().register_script(_SCRIPT)
        fixed = (verb, self._channel, secrets.token_hex(8), int(self._ttl * 1000))
        # In a task of its own: redis-py may lose a cancellation (wait_for of Python 3.11).
        call = asyncio.ensure_future(script(keys=[self._base], args=[*fixed, *words]))
        call.add_done_callback(_heard)
        try:
            done, _ = await asyncio.wait({call}, timeout=max(self._ttl / 4, 1.0))
        finally:
            call.cancel()
        if not done:
            raise BusUnavailable("presence: no answer in time")
        try:
            return call.result()
        except Exception as error:  # a client that is closed while it connects: AttributeError
            if isinstance(error, NoPermissionError) or _DENIED.search(str(error)):
                raise PermissionDenied(f"presence: {error}") from error
            raise BusUnavailable(f"presence: {error}") from error

    def __repr__(self) -> str:
        state = "away" if self._away else f"{len(self._sessions)} sessions here"
        return f"<Presence {self._base} {state}>"


def _text(value: str | bytes) -> str:
    """What Redis said; its client may decode by itself."""
    return value if isinstance(value, str) else value.decode()


def _heard(call: asyncio.Future[Any]) -> None:
    """Whoever asked may be gone: its error is nobody's then."""
    if not call.cancelled():
        call.exception()
