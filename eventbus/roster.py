"""The roster: the events of presence, and a live picture of who is online.

A picture that is only corrected by events would be wrong for ever after one that got lost. So each
event has a number (its `id`, of the life of Redis's data that its `source` names), and a view that
misses one, that lags behind what Redis says at a beat, or that hears of a gap reads everything
again. Only what is seen may enter here; `eventbus.presence` does what is told, and reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import Field

from eventbus import Event, EventBusError, Message, Messages

__all__ = ["Picture", "Session", "UserOffline", "UserOnline", "View"]

_SOURCE = "presence/"


class UserOnline(Event, channel="presence:{user}"):
    """The first session of a user came, with its `meta`."""

    user: str
    meta: dict[str, Any] = Field(default_factory=dict)


class UserOffline(Event, channel="presence:{user}"):
    """The last session of a user went, or its node died."""

    user: str


@dataclass(frozen=True, slots=True)
class Session:
    """One device of a user: on which node, since when, and what was said of it."""

    node: str
    since: datetime
    meta: Mapping[str, Any]


class Picture(NamedTuple):
    """What Redis said: the life of its data, the number of the last change, how many seconds that
    life has lasted, and who is online."""

    epoch: str
    version: int
    age: float
    users: frozenset[str]


class View:
    """Who is online, kept up to date: ``"ana" in view``, ``len(view)``, ``for user in view``.

    ``async for change in view`` gives the changes since the view was entered, at most one that
    waits per user: who came and went before you looked is not told. Ends with the bus. `rereads`
    counts how often the picture was read again; what that finds has no `meta`.
    """

    def __init__(self, read: Callable[[], Awaitable[Picture]], ttl: float) -> None:
        self._read = read
        self._ttl = ttl
        self._users: set[str] = set()
        self._changes: dict[str, UserOnline | UserOffline] = {}
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()
        self._epoch, self._version, self._seen = "", 0, 0
        self._behind = self._settling = self._over = False
        self.rereads = -1

    def __contains__(self, user: object) -> bool:
        return user in self._users

    def __len__(self) -> int:
        return len(self._users)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._users))

    def __aiter__(self) -> AsyncIterator[UserOnline | UserOffline]:
        return self

    async def __anext__(self) -> UserOnline | UserOffline:
        while not self._changes:
            if self._over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._changes.pop(next(iter(self._changes)))

    def _note(self, change: UserOnline | UserOffline) -> None:
        came = isinstance(change, UserOnline)
        if (change.user in self._users) is came:
            return
        (self._users.add if came else self._users.remove)(change.user)
        if self._changes.pop(change.user, None) is None:
            self._changes[change.user] = change
        self._news.set()

    async def refresh(self) -> None:
        """Read the picture again. Raises BusUnavailable, and tries again at the next beat."""
        async with self._turn:
            await self._refresh()

    async def _refresh(self) -> None:
        self._behind = True
        epoch, version, age, users = await self._read()
        if self.rereads < 0:  # the first is no news
            self._users = set(users)
        # Redis has lost its data: who was online is, until all nodes had the time to say so.
        self._settling = age < self._ttl and (self._settling or self._epoch not in {"", epoch})
        for user in sorted(users - self._users):
            self._note(UserOnline(user=user))
        for user in sorted(() if self._settling else self._users - users):
            self._note(UserOffline(user=user))
        self._epoch, self._version, self._behind = epoch, version, False
        self.rereads += 1

    async def check(self, epoch: str, version: int) -> None:
        """Compare with what Redis said just now; what was so one beat ago must have come."""
        late = self._version < self._seen or epoch != self._epoch
        self._seen = version
        if late or self._behind or self._settling:
            with suppress(EventBusError):
                await self.refresh()

    async def follow(self, messages: Messages[Event]) -> None:
        """Take in what arrives, until the bus stops."""
        async for message in messages:
            async with self._turn:
                with suppress(EventBusError):
                    await self._take(message)
        self._over = True
        self._news.set()

    async def _take(self, message: Message[Event]) -> None:
        source, number = message.source or "", message.id or ""
        change = message.event
        if not isinstance(change, UserOnline | UserOffline):
            return
        if not source.startswith(_SOURCE) or not number.isdecimal():
            return  # somebody else's own idea of this event
        step = int(number) - self._version
        if source.removeprefix(_SOURCE) != self._epoch or step > 1:
            await self._refresh()
        elif step == 1:
            self._version += 1
            self._note(change)
