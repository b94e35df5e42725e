"""The contract between the bus and whatever carries its bytes.

A transport knows names and bytes, never events, handlers or patterns with captures. It is given a
`Sink` and tells it, in the order of the stream, what happened. All of this is synchronous: a
transport calls its sink from the event loop that it was started in. Only the contract may enter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eventbus._router import PROBE_PREFIX, Command, Subscription
from eventbus._settings import Settings

BEAT = PROBE_PREFIX + b"beat"
"""The channel on which sources announce their last numbers (`beat=True`)."""

Outcome = Exception | Literal["dropped", "conflated"]
"""What went wrong; dropped by the outage policy; replaced by a newer one."""


class Owner(Protocol):
    """Who published. `published` counts what Redis acknowledged; `unwatched` are the messages that
    nobody awaits; `ended` hears of every other outcome, and of all outcomes of these."""

    published: int
    unwatched: dict[Outgoing, Any]

    def ended(self, outgoing: Outgoing, outcome: Outcome) -> None: ...


class Outgoing:
    """One message on its way out. Its bytes are `before`, the number (when `numbered`), `after`.

    `written` says whether a byte may have left. The transport calls `buffered` when it keeps the
    message for later, and `finish` once. A message with `ended` is not to be sent.
    """

    __slots__ = (
        "after", "before", "born", "channel", "deadline", "ended", "future", "id", "numbered",
        "owner", "size", "written",
    )  # fmt: skip

    def __init__(
        self,
        channel: bytes,
        before: bytes,
        after: bytes,
        numbered: bool,
        id: str | None,
        owner: Owner,
    ) -> None:
        self.channel = channel
        self.before = before
        self.after = after
        self.numbered = numbered
        self.id = id
        self.owner = owner
        self.future: asyncio.Future[int | None] | None = None
        self.size = len(before) + len(after)
        self.ended = self.written = False
        self.born = self.deadline = 0.0

    def acknowledge(self, copies: int) -> None:
        """The usual end: Redis handed out this many copies."""
        if self.ended:
            return
        self.ended = True
        future, owner = self.future, self.owner
        if future is not None and not future.done():
            future.set_result(copies)
        owner.published += 1
        if owner.unwatched:
            owner.unwatched.pop(self, None)

    def buffered(self) -> None:
        """Kept for later: whoever waits is told so now."""
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def finish(self, outcome: Outcome) -> None:
        """Any other end. Later calls do nothing."""
        if self.ended:
            return
        self.ended = True
        future = self.future
        if future is not None and not future.done():
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(None)
        self.owner.ended(self, outcome)


class Sink(Protocol):
    """What a transport tells. The commands that come back are to be sent at once, in order.

    `away` says that subscriptions which were there are not confirmed again yet.
    """

    away: bool

    def opened(self) -> list[Command]:
        """A subscriber connection is there, with nothing subscribed on it yet."""
        ...

    def confirmed(self, subscription: Subscription) -> list[Command]: ...

    def refused(self, subscription: Subscription) -> list[Command]: ...

    def ended(self, subscription: Subscription) -> list[Command]: ...

    def lost(self, reason: str) -> None:
        """The subscriber connection is gone, and all subscriptions with it."""
        ...

    def frames(self, subscription: Subscription, rows: Sequence[Sequence[bytes]]) -> None:
        """Messages through this subscription, in order. A row ends with the channel as it is on the
        wire (with the namespace) and the payload."""
        ...

    def beat(self, payload: bytes) -> None:
        """What a source announces on the channel of the beats, in the order of the stream."""
        ...

    def pressure(self) -> bool:
        """Called before each read. Whether the lanes are filling up: then read in small bites."""
        ...


@dataclass(slots=True)
class Status:
    """How a transport stands, for `health()`."""

    receiving: bool = False
    publishing: bool = False
    reason: str | None = None
    last_received_age: float | None = None
    round_trip: float | None = None
    probe: str = "off"


class Transport(Protocol):
    """Where bytes travel. One instance serves one bus from its start to its stop."""

    user: str | None
    connecting: tuple[str, ...]
    """The ACL rules that opening and keeping a connection needs, beside PING."""

    async def start(
        self, sink: Sink, settings: Settings, bus_id: str, number: Callable[[bytes], int]
    ) -> None:
        """Connect. Returns when connected; raises what makes waiting useless (a wrong password).

        `bus_id` is unique per start; `number` gives the next number of a channel.
        """
        ...

    async def stop(self) -> None:
        """Close everything, at once. Idempotent."""
        ...

    async def flush(self) -> None:
        """Wait until everything handed to `publish` has an outcome."""
        ...

    def publish(self, outgoing: Outgoing) -> None:
        """Send, or queue, one message. Raises BusUnavailable when it is known to be hopeless."""
        ...

    def send(self, commands: Iterable[Command]) -> None:
        """Ask the server. Does nothing while away: `Sink.opened` asks for all of it."""
        ...

    def fence(self, reached: Callable[[], Any]) -> None:
        """Call `reached` at a point of the stream after everything sent so far."""
        ...

    def status(self) -> Status: ...

    def describe(self) -> str:
        """Where this goes, without a secret."""
        ...

    def redis(self) -> Any:
        """A redis-py client for the same server. Raises EventBusError where there is none."""
        ...
