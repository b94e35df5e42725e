"""Whether both connections are alive, and lead to the same server.

Every heartbeat: a PING on the subscriber, and a probe. The probe is a fence: a message to the bus's
own channel is published; when Redis has acknowledged it, it lies in the subscriber's stream, so the
PONG to a PING sent then must come after it. A PONG without the probe before it proves that
publisher and subscriber are connected to different nodes.

Bytes may go on while no answer comes. When a probe arrives that was published a heartbeat after a
PING, and the PONG is not before it, what the subscriber says is lost on the way. When no probe
arrives either (a stream out of step swallows it), a PING without an answer for ten heartbeats ends
the subscriber: less would take a slow link for a dead one.

A connection is dead when a whole heartbeat brought no byte after a PING, and one more read of the
socket brings none either (a blocked loop must not pass for a dead server).
"""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis

from eventbus._reports import logger
from eventbus.transports._inbox import Inbox
from eventbus.transports._outbox import Outbox, command

_PATIENCE = 10
"""Heartbeats for an answer that may be behind others."""
_MAX_PROBES = 100
"""Probes on their way whose time is remembered."""


class Liveness:
    """The heart of a pair of connections. `heartbeat` is seconds."""

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        heartbeat: float,
        probe: bytes,
        *,
        check_role: bool,
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._heartbeat = heartbeat
        self._probe = probe
        self._check_role = check_role
        self._loop = asyncio.get_running_loop()
        self._beats = 0
        self._seen = b""
        self._publish_denied = False
        self._started: dict[bytes, float] = {}
        """When the probes were published that have not arrived."""
        self._asked_since: float | None = None
        """When the oldest PING was sent that has no answer yet."""
        self.round_trip: float | None = None
        self.state = "pending"

    async def run(self) -> None:
        """Beat for ever."""
        pinged = self._loop.time()
        silent: tuple[bool, bool] = (False, False)
        while True:
            self._beat()
            pinged = self._loop.time()
            await asyncio.sleep(self._heartbeat)
            silent = self._silent_since(pinged)
            if any(silent):
                for _ in range(3):  # whatever lies in the sockets is read in these turns
                    await asyncio.sleep(0)
                silent = self._silent_since(pinged)
            reason = f"no byte for a heartbeat ({self._heartbeat} s) after a PING"
            if silent[0]:
                self._inbox.fail(reason)
            if silent[1]:
                self._outbox.fail(reason)
            asked = self._asked_since
            if asked is not None and self._loop.time() - asked > _PATIENCE * self._heartbeat:
                self._inbox.fail(f"no answer for {_PATIENCE} heartbeats, though bytes come")

    def _silent_since(self, pinged: float) -> tuple[bool, bool]:
        heard = (self._inbox.last_read, self._outbox.last_read)
        return (
            heard[0] is not None and heard[0] < pinged,
            heard[1] is not None and heard[1] < pinged,
        )

    def _beat(self) -> None:
        self._beats += 1
        token = b"%d" % self._beats
        if self._inbox.ping(b"beat", self._on_pong) and self._asked_since is None:
            self._asked_since = self._loop.time()
        if self._check_role:
            self._outbox.ask(command(b"ROLE"), self._on_role)
        if self._inbox.probe_denied or self._publish_denied:
            self.state = "denied"
            self._outbox.ask(command(b"PING"), lambda reply: None)
        elif not self._inbox.probe_live:
            self._outbox.ask(command(b"PING"), lambda reply: None)
        else:
            started, connection = self._loop.time(), self._inbox.connections
            if len(self._started) >= _MAX_PROBES:
                self._started.clear()
            self._started[token] = started

            def published(reply: Any) -> None:
                if isinstance(reply, int) and connection == self._inbox.connections:
                    self._inbox.ping(token, lambda answered: self._judge(answered, token, started))
                elif isinstance(reply, hiredis.ReplyError):
                    self._publish_denied = str(reply).startswith("NOPERM")

            self._outbox.ask(command(b"PUBLISH", self._probe, token), published)

    def beat_now(self) -> None:
        """A first beat: as soon as both connections are there, and when the probe can be heard."""
        self._publish_denied = False
        self._beat()

    def _on_pong(self, answered: bool) -> None:
        """An answer, or a loss: either way nothing older is outstanding."""
        self._asked_since = None

    def on_probe(self, payload: bytes) -> None:
        """The probe has arrived."""
        self._seen = payload
        started, asked = self._started.pop(payload, None), self._asked_since
        if started is not None and asked is not None and asked <= started - 0.9 * self._heartbeat:
            self._inbox.fail("what the subscriber asks for is lost: messages come, answers do not")

    def _judge(self, answered: bool, token: bytes, started: float) -> None:
        if not answered:
            return
        if self._seen == token:
            self.round_trip = self._loop.time() - started
            self.state = "ok"
            return
        if len(self._seen) > len(token) or (len(self._seen) == len(token) and self._seen > token):
            return  # a later probe came first: this one was overtaken, not lost
        logger.warning("publisher and subscriber are on different nodes: connecting again")
        self.state = "pending"
        self._inbox.fail("wrong node: what is published does not arrive here")
        self._outbox.fail("wrong node: what is published does not arrive at the subscriber")

    def _on_role(self, reply: Any) -> None:
        if type(reply) is list and reply and reply[0] != b"master":
            self._outbox.fail("this node is a replica now")
