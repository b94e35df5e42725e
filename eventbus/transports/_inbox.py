"""The subscriber connection: what was asked, in order, and what the server says.

One name per command and one row of what is outstanding, since an error names no channel. Answers
and messages are handed to the sink in the order of the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import hiredis

from eventbus._reports import logger, quoted
from eventbus._router import Command, Subscription
from eventbus.transports._link import Link
from eventbus.transports._outbox import command
from eventbus.transports.base import Sink


class _Ping:
    """A PING that is outstanding, its token, and who waits for it."""

    __slots__ = ("answered", "token")

    def __init__(self, token: bytes, answered: Callable[[bool], Any]) -> None:
        self.token = token
        self.answered = answered


class Inbox:
    """Subscriptions on one connection at a time. `probe` is the wire name of the bus's own channel;
    `on_probe` gets what arrives on it."""

    def __init__(
        self,
        sink: Sink,
        prefix: bytes,
        probe: bytes,
        on_probe: Callable[[bytes], None],
        on_ready: Callable[[], None],
        *,
        beat: bytes | None = None,
    ) -> None:
        self._sink = sink
        self._prefix = prefix
        self._probe = probe
        self._beat = beat
        self._own: dict[bytes, Callable[[bytes], None]] = {probe: on_probe}
        if beat is not None:
            self._own[beat] = sink.beat
        self._on_ready = on_ready
        self._link: Link | None = None
        self._asked: deque[Command | _Ping] = deque()
        self._literals: dict[bytes, Subscription] = {}
        self._patterns: dict[bytes, Subscription] = {}
        self.probe_live = False
        self.probe_denied = False
        self.on_probe_answered: Callable[[], None] = lambda: None
        """Called when it is known whether the probe can be heard on this connection."""
        self.connections = 0
        """How many connections there were."""

    @property
    def last_read(self) -> float | None:
        """Loop time of the last byte; None while away."""
        return None if self._link is None else self._link.last_read

    def opened(self, link: Link) -> None:
        """A connection is there: ask for the probe, then for all that the routes need."""
        self._link = link
        self.connections += 1
        link.on_replies = self._on_replies
        self.probe_live = self.probe_denied = False
        self._literals.clear()
        self._patterns.clear()
        self._ask([Command(True, Subscription(False, name)) for name in self._own], b"")
        self.send(self._sink.opened())

    def lost(self, reason: str) -> None:
        """The connection is gone."""
        asked, self._asked = self._asked, deque()
        self._sink.lost(reason)  # it asks for the time of the last byte
        self._link = None
        for item in asked:
            if isinstance(item, _Ping):
                item.answered(False)

    def away(self) -> bool:
        """Whether what is published now would not arrive here."""
        return self._link is None or self._sink.away

    def fail(self, reason: str) -> None:
        """Drop the connection: it is dead, or leads to the wrong node."""
        if self._link is not None:
            self._link.fail(reason)

    def send(self, commands: Iterable[Command]) -> None:
        """Ask for these, with the namespace before each name."""
        self._ask(commands, self._prefix)

    def _ask(self, commands: Iterable[Command], prefix: bytes) -> None:
        if self._link is None:
            return
        parts = []
        for item in commands:
            subscribe, (pattern, name) = item
            verb = (b"P" if pattern else b"") + (b"SUBSCRIBE" if subscribe else b"UNSUBSCRIBE")
            parts.append(command(verb, prefix + name))
            self._asked.append(item)
        if parts:
            self._link.write(b"".join(parts))

    def ping(self, token: bytes, answered: Callable[[bool], Any]) -> bool:
        """PING; `answered` hears True at the answer, False at a loss. False while away."""
        if self._link is None:
            return False
        self._asked.append(_Ping(token, answered))
        self._link.write(command(b"PING", token))
        return True

    # -- Replies ---------------------------------------------------------------------------------

    def _on_replies(self, replies: list[Any]) -> None:
        patterns, literals = self._patterns, self._literals
        rows: list[list[bytes]] = []
        current: Subscription | None = None
        for reply in replies:
            kind = reply[0] if type(reply) is list and len(reply) > 1 else None
            if kind == b"pmessage":
                subscription = patterns.get(reply[1])
            elif kind == b"message" and reply[1] not in self._own:
                subscription = literals.get(reply[1])
            else:
                self._hand_over(current, rows)
                rows = []
                self._answer(reply)
                continue
            if subscription is not current:
                self._hand_over(current, rows)
                rows = []
                current = subscription
            if type(reply[-1]) is bytes:  # `__redis__:invalidate` sends a list
                rows.append(reply)
        self._hand_over(current, rows)

    def _hand_over(self, subscription: Subscription | None, rows: list[list[bytes]]) -> None:
        if rows and subscription is not None:
            self._sink.frames(subscription, rows)

    def _answer(self, reply: Any) -> None:
        """An answer to what was asked first, or the bus's own probe."""
        if type(reply) is list and reply[:1] == [b"message"]:
            self._own[reply[1]](reply[2])
            return
        refused = isinstance(reply, hiredis.ReplyError)
        if not self._asked:
            self.fail(f"the server says: {quoted(reply)}")
            return
        item = self._asked.popleft()
        if not refused and not self._fits(item, reply):
            self.fail(f"the server answers another question: {quoted(reply)}")
            return
        if isinstance(item, _Ping):
            item.answered(True)  # NOPERM to a PING is an answer too
            return
        if refused and not str(reply).startswith("NOPERM"):
            self.fail(f"the server says: {quoted(reply)}")
            return
        self._take_effect(item, refused)
        if not self._sink.away:
            self._on_ready()

    def _fits(self, item: Command | _Ping, reply: Any) -> bool:
        """Whether it can be the answer: one that is not means that both sides are out of step."""
        if isinstance(item, _Ping):  # without a subscription a PONG is the token alone
            return reply in ([b"pong", item.token], item.token)
        subscribe, (pattern, name) = item
        verb = (b"p" if pattern else b"") + (b"subscribe" if subscribe else b"unsubscribe")
        wire = name if name in self._own and not pattern else self._prefix + name
        return type(reply) is list and reply[:2] == [verb, wire]

    def _take_effect(self, item: Command, refused: bool) -> None:
        subscription = item.subscription
        if not subscription.pattern and subscription.name == self._beat:
            if refused:
                logger.warning("Redis denies the channel of the beats: nothing is compared")
        elif not subscription.pattern and subscription.name == self._probe:
            self.probe_live, self.probe_denied = not refused, refused
            self.on_probe_answered()
        elif refused:
            self.send(self._sink.refused(subscription))
        elif item.subscribe:
            names = self._patterns if subscription.pattern else self._literals
            names[self._prefix + subscription.name] = subscription
            self.send(self._sink.confirmed(subscription))
        else:
            names = self._patterns if subscription.pattern else self._literals
            names.pop(self._prefix + subscription.name, None)
            self.send(self._sink.ended(subscription))
