"""The clock of the beats: publishes at each heartbeat what `_beats` has to say.

One heartbeat's announcements are out before the next ones are made: what was numbered after their
acknowledgement came after them in the stream, which is what receivers rely on.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson

from eventbus._beats import Announcer, Beat, Listener
from eventbus._errors import EventBusError
from eventbus._reports import logger
from eventbus._settings import Settings
from eventbus.transports.base import BEAT, Outcome, Outgoing, Transport


class Pulse:
    """Announces the numbers of one started bus (`number` gives them); asks others for theirs."""

    published = 0  # announcements are not counted among the messages of the bus

    def __init__(
        self, settings: Settings, source: str, transport: Transport, listener: Listener
    ) -> None:
        prefix = settings.prefix.encode()
        self.unwatched: dict[Outgoing, Any] = {}
        self._announcer = Announcer(source, len(prefix))
        self.number = self._announcer.take
        self._interval = settings.heartbeat or 1.0
        self._channel = prefix + BEAT
        self._question = orjson.dumps({"source": source, "ask": True})
        self._transport = transport
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._warned = False
        self._pending: set[asyncio.Future[int | None]] = set()

    def tick(self) -> None:
        """One heartbeat; calls itself for the next one."""
        self._timer = self._loop.call_later(self._interval, self.tick)
        if self._pending or not self._transport.status().publishing:
            return
        listener, announcer = self._listener, self._announcer
        if listener.must_ask:
            listener.must_ask = False
            self._publish(self._question, None)
        if listener.asked:
            listener.asked = False
            announcer.repeat()
        for beat in announcer.beats():
            self._publish(beat.payload, beat)
        if announcer.unannounced and not self._warned:
            self._warned = True
            logger.warning(
                "more channels change than a beat can tell of: some losses stay uncounted"
            )

    def _publish(self, payload: bytes, beat: Beat | None) -> None:
        outgoing = Outgoing(self._channel, payload, b"", False, None, self)
        future = outgoing.future = self._loop.create_future()
        self._pending.add(future)
        future.add_done_callback(partial(self._answered, beat))
        try:
            self._transport.publish(outgoing)
        except EventBusError as error:
            future.set_exception(error)

    def _answered(self, beat: Beat | None, future: asyncio.Future[int | None]) -> None:
        self._pending.discard(future)
        arrived = not future.cancelled() and not future.exception() and future.result() is not None
        if beat is None:
            self._listener.must_ask = self._listener.must_ask or not arrived
        elif arrived:
            self._announcer.acknowledged(beat)
        else:
            self._announcer.failed(beat)

    def ended(self, outgoing: Outgoing, outcome: Outcome) -> None:
        """See `Owner`: the future tells."""

    def close(self) -> None:
        """No more beats."""
        if self._timer is not None:
            self._timer.cancel()
