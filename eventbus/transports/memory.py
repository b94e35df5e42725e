"""`memory://name`: a bus within one process, for tests and for running without a server.

The same names, globs and counts as Redis: one frame per matching subscription, each receiver in the
order of its publisher. Buses of one name see each other from any event loop and thread. There is no
outage here; a receiver whose loop is blocked may miss messages, and the sequence check says so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from eventbus._errors import BusClosed, EventBusError
from eventbus._patterns import glob_matches, tokenize
from eventbus._router import Command, Subscription
from eventbus._settings import Settings
from eventbus.transports.base import Outgoing, Sink, Status

_MAX_WAITING = 100_000
"""Frames that wait for the event loop of one receiver in another thread."""


class Hub:
    """All endpoints of one name. Every method may be called from any thread."""

    _hubs: ClassVar[dict[str, Hub]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.endpoints: dict[MemoryTransport, None] = {}

    @classmethod
    def of(cls, name: str) -> Hub:
        with cls._guard:
            return cls._hubs.setdefault(name, cls())

    def publish(self, channel: bytes, payload: Callable[[], bytes]) -> int:
        """Hand a message to every matching subscription; returns how many copies that were."""
        with self.lock:
            data = payload()
            return sum(endpoint.offer(channel, data) for endpoint in list(self.endpoints))


class MemoryTransport:
    """One bus's place in a hub."""

    user: str | None = None
    connecting: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name
        self._hub = Hub.of(name)
        self._waiting: deque[tuple[Subscription, bytes, bytes]] = deque(maxlen=_MAX_WAITING)
        self._matching: dict[bytes, list[Subscription]] = {}
        self._subscriptions: dict[Subscription, tuple[int, ...] | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sink: Sink | None = None
        self._scheduled = False
        self._prefix = b""
        self._number: Callable[[bytes], int] = len

    async def start(
        self, sink: Sink, settings: Settings, bus_id: str, number: Callable[[bytes], int]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        self._prefix = settings.prefix.encode()
        self._number = number
        with self._hub.lock:
            self._hub.endpoints[self] = None
        self.send(sink.opened())

    async def stop(self) -> None:
        with self._hub.lock:
            self._hub.endpoints.pop(self, None)
            self._subscriptions.clear()
            self._matching.clear()
            self._sink = None

    async def flush(self) -> None:
        await asyncio.sleep(0)  # every answer is at most one turn away

    def publish(self, outgoing: Outgoing) -> None:
        if self._sink is None:
            raise BusClosed("the bus is stopped")

        def payload() -> bytes:
            if not outgoing.numbered:
                return outgoing.before + outgoing.after
            number = self._number(outgoing.channel)
            return b"%b%d%b" % (outgoing.before, number, outgoing.after)

        outgoing.written = True
        copies = self._hub.publish(outgoing.channel, payload)
        # The answer takes a turn of the loop, as a server's would: handlers get theirs.
        asyncio.get_running_loop().call_soon(outgoing.acknowledge, copies)

    def send(self, commands: Iterable[Command]) -> None:
        """Do it at once, and what follows from it."""
        todo = deque(commands)
        while todo and self._sink is not None:
            subscribe, subscription = todo.popleft()
            with self._hub.lock:
                self._deliver()  # what was sent before this point of the stream
                self._matching.clear()
                if subscribe:
                    name = self._prefix + subscription.name
                    self._subscriptions[subscription] = (
                        tokenize(name) if subscription.pattern else None
                    )
                    todo += self._sink.confirmed(subscription)
                else:
                    self._subscriptions.pop(subscription, None)
                    todo += self._sink.ended(subscription)

    def fence(self, reached: Callable[[], Any]) -> None:
        with self._hub.lock:
            self._deliver()
            reached()

    def offer(self, channel: bytes, payload: bytes) -> int:
        """Take one copy per matching subscription. Called under the hub's lock, from any thread."""
        matching = self._matching.get(channel)
        if matching is None:
            if len(self._matching) >= 4096:
                self._matching.clear()
            matching = self._matching[channel] = self._find(channel)
        if not matching or self._loop is None or self._loop.is_closed():
            return 0
        self._waiting.extend((subscription, channel, payload) for subscription in matching)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._deliver)
        return len(matching)

    def _find(self, channel: bytes) -> list[Subscription]:
        prefix = self._prefix
        return [
            subscription
            for subscription, tokens in self._subscriptions.items()
            if (
                channel == prefix + subscription.name
                if tokens is None
                else glob_matches(tokens, channel)
            )
        ]

    def _deliver(self) -> None:
        """Hand over what waits. Called in the loop of the bus."""
        with self._hub.lock:
            self._scheduled = False
            waiting, self._waiting = self._waiting, deque(maxlen=_MAX_WAITING)
        if self._sink is None:
            return
        self._sink.pressure()
        for subscription, channel, payload in waiting:
            if subscription in self._subscriptions:
                self._sink.frames(subscription, ((channel, payload),))

    def status(self) -> Status:
        up = self._sink is not None
        return Status(up, up, None if up else "stopped", 0.0 if up else None, None, "off")

    def describe(self) -> str:
        return f"memory://{self._name}"

    def redis(self) -> Any:
        raise EventBusError("memory:// has no Redis behind it: bus.redis() needs a redis:// URL")
