"""The publisher connection: what waits to be written, and what waits for its answer.

Calls queue messages; one write per turn of the loop takes at most 64 KiB of them, so that the rest
can still be withdrawn. Answers come in order. What was written is never written again. While Redis
is away the outage policy decides: wait up to the deadline and fail, drop, or keep a bounded
backlog.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import hiredis

from eventbus._errors import (
    BusClosed,
    BusUnavailable,
    EventBusError,
    PermissionDenied,
    PublishUncertain,
)
from eventbus._messages import Buffer
from eventbus._patterns import decode_name
from eventbus._reports import quoted
from eventbus._settings import Settings
from eventbus.transports._link import Link
from eventbus.transports.base import Outgoing

_BATCH = 64 * 1024
_TICK = 0.005
"""Seconds between two looks at the deadlines, at least."""
_GRACE = 0.1
"""Seconds that a written message has for its answer, however late it was written."""


def command(*words: bytes) -> bytes:
    """A Redis command as RESP."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


class Outbox:
    """Messages on their way out. All methods are called from the loop of the bus."""

    def __init__(self, settings: Settings, number: Callable[[bytes], int], shown: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._timeout = settings.publish_timeout
        self._max_bytes = settings.max_pending_bytes
        self._skip = len(settings.prefix.encode())
        self._number = number
        self._shown = shown
        self.user: str | None = None
        self._link: Link | None = None
        self._away_since = self._loop.time()
        self._reason = "not connected yet"
        self._waiting: deque[Outgoing] = deque()
        self._waiting_bytes = 0
        self._written: deque[Outgoing | Callable[[Any], None]] = deque()
        self._backlog: OrderedDict[bytes | int, Outgoing] = OrderedDict()
        self._backlog_count = 0
        self._flushing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._empty: list[asyncio.Future[None]] = []
        policy = settings.outage
        self._held = self._closed = False
        self._buffer = policy if isinstance(policy, Buffer) else None
        self._drops = policy == "drop"

    # -- In --------------------------------------------------------------------------------------

    def publish(self, outgoing: Outgoing) -> None:
        """Queue a message. Raises BusUnavailable when it is known that it cannot be sent."""
        if self._closed:
            raise BusClosed("the bus was stopped")
        now = outgoing.born = self._time()
        timeout = self._timeout
        if self._link is None:
            if self._drops:
                outgoing.finish("dropped")
                return
            if self._buffer is not None:
                self._keep(outgoing, now)
                return
            if now - self._away_since > timeout:
                raise self._unavailable(outgoing, now)
        if self._waiting_bytes + outgoing.size > self._max_bytes:
            raise BusUnavailable(
                f"{self._waiting_bytes} bytes wait to be written to {self._shown} already"
                " (max_pending_bytes); certainly not sent",
                channel=self._name(outgoing),
                id=outgoing.id,
            )
        outgoing.deadline = now + timeout
        self._waiting.append(outgoing)
        self._waiting_bytes += outgoing.size
        if self._flushing is None and self._link is not None:
            self._flushing = self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_at(outgoing.deadline, self._due)

    def _keep(self, outgoing: Outgoing, now: float) -> None:
        """Put a message into the backlog of an outage."""
        policy = self._buffer
        if policy is None:
            return
        if not outgoing.deadline or outgoing.deadline < outgoing.born + policy.max_age:
            outgoing.deadline = outgoing.born + policy.max_age
        outgoing.buffered()
        self._backlog_count += 1
        key = outgoing.channel if policy.latest else self._backlog_count
        replaced = self._backlog.get(key)
        self._backlog[key] = outgoing
        self._waiting_bytes += outgoing.size
        if replaced is not None:
            self._waiting_bytes -= replaced.size
            replaced.finish("conflated")
        while len(self._backlog) > policy.max_events or (self._waiting_bytes > self._max_bytes):
            _, oldest = self._backlog.popitem(last=False)
            self._waiting_bytes -= oldest.size
            oldest.finish("dropped")
        if self._timer is None:
            self._timer = self._loop.call_at(now + policy.max_age, self._due)

    def ask(self, words: bytes, answer: Callable[[Any], None]) -> bool:
        """Write a command at once; False while away. `answer` gets the reply, None at a loss."""
        if self._link is None:
            return False
        self._written.append(answer)
        self._link.write(words)
        return True

    # -- Out -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._flushing = None
        link = self._link
        if link is None or link.paused or self._held or link.ended.done():
            return
        waiting, written, number = self._waiting, self._written, self._number
        now = self._time()
        grace, latest = now + min(_GRACE, self._timeout), now + self._timeout
        parts: list[bytes] = []
        size = 0
        while waiting and size < _BATCH:
            outgoing = waiting.popleft()
            self._waiting_bytes -= outgoing.size
            future = outgoing.future
            if outgoing.ended or (future is not None and future.cancelled()):
                outgoing.ended = True  # withdrawn: nobody waits any more
                continue
            channel = outgoing.channel
            digits = b"%d" % number(channel) if outgoing.numbered else b""
            length = outgoing.size + len(digits)
            parts.append(
                b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b%b%b\r\n"
                % (len(channel), channel, length, outgoing.before, digits, outgoing.after)
            )
            size += length
            outgoing.written = True
            if not grace <= outgoing.deadline <= latest:
                outgoing.deadline = min(max(outgoing.deadline, grace), latest)
            written.append(outgoing)
        if parts:
            link.write(b"".join(parts))
        if waiting and not link.paused:
            self._flushing = self._loop.call_soon(self._flush)
        elif not written:
            self._report_empty()

    def _on_replies(self, replies: list[Any]) -> None:
        written = self._written
        for reply in replies:
            if not written:
                self.fail(f"an answer that nobody asked for: {quoted(reply)}")
                return
            waiting = written.popleft()
            if not isinstance(waiting, Outgoing):
                waiting(reply)
            elif type(reply) is int:
                waiting.acknowledge(reply)
            elif isinstance(reply, hiredis.ReplyError):
                waiting.finish(self._refusal(waiting, str(reply)))
            else:  # the stream is out of step: nobody knows what became of this one
                written.appendleft(waiting)
                self.fail("an answer that no PUBLISH has")
                return
        if self._empty and not written and not self._waiting:
            self._report_empty()

    def _refusal(self, outgoing: Outgoing, text: str) -> EventBusError:
        channel = self._name(outgoing)
        if text.startswith("NOPERM"):
            user = self.user or "default"
            return PermissionDenied(
                f"Redis denies user {user!r} to publish on {channel!a}: {quoted(text)}. It needs"
                f" +publish and a channel rule, e.g. ACL SETUSER {user} +publish &{channel!a}",
                channel=channel,
                user=user,
            )
        return BusUnavailable(
            f"Redis refused to publish on {channel!a}: {quoted(text)}; certainly not sent",
            channel=channel,
            id=outgoing.id,
            waited=self._loop.time() - outgoing.born,
        )

    # -- Connection ------------------------------------------------------------------------------

    @property
    def last_read(self) -> float | None:
        """Loop time of the last byte of an answer; None while away."""
        return None if self._link is None else self._link.last_read

    def opened(self, link: Link, *, hold: bool) -> None:
        """A connection is there: the backlog goes first. With `hold` it waits a little for
        `release`, so that this bus hears what it kept."""
        self._link = link
        self._held = hold and bool(self._backlog)
        if self._held:
            self._loop.call_later(self._timeout / 2, self.release)
        link.on_replies = self._on_replies
        link.on_writable = self._flush
        self._expire()
        backlog = list(self._backlog.values())
        self._backlog.clear()
        self._waiting.extendleft(reversed(backlog))
        self._flush()

    def release(self) -> None:
        """Nothing is held back any more."""
        if self._held:
            self._held = False
            self._flush()

    def lost(self, reason: str) -> None:
        """The connection is gone: what was written is uncertain, the rest waits by the policy."""
        now = self._away_since = self._loop.time()
        self._reason = reason
        self._link = None
        written, self._written = self._written, deque()
        for item in written:
            if isinstance(item, Outgoing):
                item.finish(self._uncertain(item, now, reason))
            else:
                item(None)
        if self._buffer is not None or self._drops:
            waiting, self._waiting = self._waiting, deque()
            for outgoing in waiting:
                self._waiting_bytes -= outgoing.size
                if outgoing.ended:
                    continue
                if self._drops:
                    outgoing.finish("dropped")
                else:
                    self._keep(outgoing, now)
        self._report_empty()

    def fail(self, reason: str) -> None:
        """Drop the connection: it is dead, or leads to the wrong node."""
        if self._link is not None:
            self._link.fail(reason)

    def close(self) -> None:
        """The end: nothing waits any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._flushing is not None:
            self._flushing.cancel()
        if self._link is not None:
            self.lost("the bus was stopped")
        now = self._loop.time()
        for outgoing in (*self._backlog.values(), *self._waiting):
            outgoing.finish(self._unavailable(outgoing, now))
        self._backlog.clear()
        self._waiting.clear()

    async def flush(self) -> None:
        """Return when everything has an outcome, or nothing can be sent."""
        while self._link is not None and (self._waiting or self._written):
            waiter = self._loop.create_future()
            self._empty.append(waiter)
            await waiter

    def _report_empty(self) -> None:
        waiters, self._empty = self._empty, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- Deadlines -------------------------------------------------------------------------------

    def _due(self) -> None:
        """A deadline has passed. One more turn first: its answer may wait in the socket."""
        self._timer = self._loop.call_later(0, self._expire)

    def _expire(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        nearest = [
            self._expire_written(now),
            self._expire_waiting(now),
            self._expire_backlog(now),
        ]
        due = [time for time in nearest if time is not None]
        if due:
            self._timer = self._loop.call_at(max(min(due), now + _TICK), self._due)

    def _expire_written(self, now: float) -> float | None:
        nearest = None
        for item in self._written:
            if isinstance(item, Outgoing) and not item.ended:
                if item.deadline <= now:
                    item.finish(self._uncertain(item, now, "no answer"))
                elif nearest is None or item.deadline < nearest:
                    nearest = item.deadline
        return nearest

    def _expire_waiting(self, now: float) -> float | None:
        nearest = None
        for outgoing in self._waiting:
            if outgoing.ended:
                continue
            if outgoing.deadline <= now:
                outgoing.finish(self._unavailable(outgoing, now))
            elif nearest is None or outgoing.deadline < nearest:
                nearest = outgoing.deadline
                if self._buffer is None:
                    break  # without a backlog, deadlines are in order
        while self._waiting and self._waiting[0].ended:
            self._waiting_bytes -= self._waiting.popleft().size
        return nearest

    def _expire_backlog(self, now: float) -> float | None:
        old = [key for key, outgoing in self._backlog.items() if outgoing.deadline <= now]
        for key in old:
            outgoing = self._backlog.pop(key)
            self._waiting_bytes -= outgoing.size
            outgoing.finish(self._unavailable(outgoing, now))
        return min((outgoing.deadline for outgoing in self._backlog.values()), default=None)

    def _name(self, outgoing: Outgoing) -> str:
        """The channel as its publisher named it, without the namespace."""
        return decode_name(outgoing.channel[self._skip :])

    def _unavailable(self, outgoing: Outgoing, now: float) -> BusUnavailable:
        waited = now - outgoing.born
        why = "could not be written to" if self._link is not None else "cannot be reached at"
        reason = "" if self._link is not None else f" ({self._reason})"
        how = f"after {waited:.1f} s the message is given up"
        if not waited:  # longer than a publish waits
            how = f"for {now - self._away_since:.1f} s now, so the message is refused at once"
        return BusUnavailable(
            f"Redis {why} {self._shown}{reason}: {how}; certainly not sent",
            channel=self._name(outgoing),
            id=outgoing.id,
            waited=waited,
        )

    def _uncertain(self, outgoing: Outgoing, now: float, reason: str) -> PublishUncertain:
        waited = now - outgoing.born
        return PublishUncertain(
            f"the message was written to {self._shown} and got no answer in {waited:.1f} s"
            f" ({reason}): it may have arrived; it is not sent again",
            channel=self._name(outgoing),
            id=outgoing.id,
            waited=waited,
        )
