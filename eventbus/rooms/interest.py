"""Interest: a route that is subscribed to the names that somebody here wants, and to no others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import UTC, datetime

from eventbus import (
    BusClosed,
    BusUnavailable,
    EventBus,
    EventBusError,
    PermissionDenied,
    Route,
)

_PATIENCE = 0.25
"""Seconds until a wait looks whether Redis is away."""


class Interest:
    """Keeps a route subscribed to what is in `wanted`, which others change and then `touch`.

    What changes while a round is under way makes the next one, so ten thousand names take a few.
    """

    def __init__(
        self,
        bus: EventBus,
        wanted: Collection[str],
        pattern: Callable[[str], str],
        route: Callable[[bool], Awaitable[Route]],
        late: Callable[[str, datetime], Awaitable[None]],
    ) -> None:
        """`route` gives the route, a new one when it is asked for; `late` hears of a name that was
        wanted since then, and could be subscribed to only now."""
        self._bus, self._wanted, self._pattern = bus, wanted, pattern
        self._route, self._tell_late = route, late
        self._looked, self._away = 0.0, False
        self._live: set[str] = set()
        self._late: dict[str, datetime] = {}
        self._changed: dict[str, asyncio.Future[EventBusError | None]] = {}
        self._moving: dict[str, asyncio.Future[EventBusError | None]] = {}
        self._task: asyncio.Task[None] | None = None

    def touch(self, names: Iterable[str]) -> dict[str, asyncio.Future[EventBusError | None]]:
        """See to it that what the server knows of these becomes true; the waits for that."""
        found = {}
        for name in names:
            if name in self._moving or (name in self._live) != (name in self._wanted):
                if name not in self._changed:
                    self._changed[name] = asyncio.get_running_loop().create_future()
                found[name] = self._changed[name]
        if found and self._task is None:
            self._task = asyncio.create_task(self._keep(), name="eventbus interest")
            self._task.add_done_callback(self._ended)
        return found

    async def settle(self, names: Collection[str]) -> bool:
        """Wait until it is true; False while Redis is away: it will be. Raises PermissionDenied."""
        waits = self.touch(names)
        while waits:
            done, _ = await asyncio.wait(waits.values(), timeout=_PATIENCE)
            errors = [error for future in done if (error := future.result()) is not None]
            for error in errors:
                if not isinstance(error, BusUnavailable):
                    raise error
            if errors or (len(done) < len(waits) and self._is_away()):
                self._late.update(dict.fromkeys(waits, datetime.now(UTC)))
                return False
            waits = {name: future for name, future in waits.items() if future not in done}
        return True

    def _is_away(self) -> bool:
        """Whether Redis is away; looked up once for all who wait, since a look costs much."""
        now = asyncio.get_running_loop().time()
        if now - self._looked >= _PATIENCE / 2:
            self._looked, self._away = now, not self._bus.health()
        return self._away

    async def _keep(self) -> None:
        while self._changed:
            self._moving, self._changed = self._changed, {}
            error = await self._round(list(self._moving))
            moving, self._moving = self._moving, {}
            for future in moving.values():
                if not future.done():
                    future.set_result(error)
            if isinstance(error, BusUnavailable):
                self.touch(moving)
        self._task = None  # here, not in a callback: the next touch may come before that

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            return
        self._task = None  # it may have been cancelled before it began
        for future in [*self._moving.values(), *self._changed.values()]:
            if not future.done():
                future.set_result(BusClosed("nobody keeps this interest any more"))
        self._moving, self._changed = {}, {}

    async def _round(self, names: Collection[str]) -> EventBusError | None:
        try:
            try:
                await self._apply(await self._route(False), names)
            except BusClosed:  # the bus was stopped; perhaps it was started again
                self._live.clear()
                await self._apply(await self._route(True), list(self._wanted))
        except EventBusError as error:
            return error
        return None

    async def _apply(self, route: Route, names: Collection[str]) -> None:
        if drop := [name for name in names if name in self._live and name not in self._wanted]:
            await route.discard(*map(self._pattern, drop))
            self._live.difference_update(drop)
        for name in [name for name in names if name not in self._wanted]:
            self._late.pop(name, None)
        add = [name for name in names if name in self._wanted and name not in self._live]
        while add:
            try:
                await route.add(*map(self._pattern, add))
            except PermissionDenied as error:
                refused = {name for name in add if self._pattern(name) in error.patterns}
                if not refused:
                    raise
                for name in refused & self._moving.keys():
                    self._moving[name].set_result(error)
                add = [name for name in add if name not in refused]
            else:
                self._live.update(add)
                break
        for name in [name for name in add if name in self._late]:
            await self._tell_late(name, self._late.pop(name))

    async def close(self) -> None:
        """Keep nothing any more."""
        self._live.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
