"""One connection: a socket that redis-py opened, read in batches with hiredis.

redis-py's own reader and writer are touched in `adopt` and nowhere else. Why not `redis.asyncio`'s
reading: docs/delivery.md. A link reports its end exactly once and never reconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis

from eventbus._reports import logger

_BITE = 64 * 1024
_SMALL_BITE = 4 * 1024
"""Bytes per read: small while handlers are pressure, so that they get more turns per byte read."""


class Link(asyncio.BufferedProtocol):
    """A live connection. `on_replies` gets the parsed replies of each read, in order; `ended`
    resolves with the reason when the connection is over."""

    def __init__(
        self,
        connection: Any,
        pressure: Callable[[], bool] = lambda: False,
        limit: int = 1 << 30,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.on_replies: Callable[[list[Any]], None] = lambda replies: None
        self.on_writable: Callable[[], None] = lambda: None
        self.paused = False
        self.last_read = loop.time()
        self._time = loop.time
        self._pressure = pressure
        self._limit = limit
        self._unfinished = 0
        """Bytes that came since there was a whole reply."""
        self._replies = hiredis.Reader()
        self._buffer = memoryview(bytearray(_BITE))
        self._small = self._buffer[:_SMALL_BITE]
        self._writer = adopt(connection, self)  # its end would close the socket
        self._transport: asyncio.WriteTransport = self._writer.transport

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket. Nothing happens on a link that is over."""
        if not self.ended.done():
            self._transport.write(data)

    def fail(self, reason: str) -> None:
        """Drop the connection at once."""
        if not self.ended.done():
            self.ended.set_result(reason)
        self._transport.abort()

    def close(self) -> None:
        """Close the connection."""
        self.fail("closed")

    # -- asyncio's side ----------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._small if self._pressure() else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came, all of it: hiredis moves its whole buffer for what is left in it."""
        self.last_read = self._time()
        self.parse(self._buffer[:nbytes])

    def parse(self, data: memoryview | bytes) -> None:
        gets = self._replies.gets
        replies: list[Any] = []
        try:
            self._replies.feed(cast("bytes", data))  # it takes any buffer
            while (reply := gets()) is not False:
                replies.append(reply)
            if not replies:
                self._unfinished += len(data)
                if self._unfinished > self._limit:
                    self.fail(f"a reply has no end after {self._unfinished} bytes")
                return
            self._unfinished = 0
            self.on_replies(replies)
        except (hiredis.HiredisError, MemoryError) as error:  # an array of billions has no room
            text = str(error) or type(error).__name__
            self.fail(f"what the server sent is no RESP: {text}")
        except Exception:
            logger.exception("reading a reply failed")
            self.fail("a reply could not be handled")

    def eof_received(self) -> bool:
        """The server closed the connection."""
        self.fail("the server closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        if not self.ended.done():
            self.ended.set_result(str(exc) if exc else "the connection was lost")

    def pause_writing(self) -> None:
        """The socket takes no more."""
        self.paused = True

    def resume_writing(self) -> None:
        """The socket took all."""
        self.paused = False
        self.on_writable()


def adopt(connection: Any, link: Link) -> asyncio.StreamWriter:
    """Take the socket of a connected redis-py connection over, which forgets it. Tested with the
    oldest and the newest supported version; nothing else may touch these private attributes."""
    reader, writer = connection._reader, connection._writer
    connection._reader = connection._writer = None
    transport = writer.transport
    transport.set_write_buffer_limits(high=0)
    transport.set_protocol(link)
    transport.resume_reading()
    early = bytes(reader._buffer)
    if early:
        link.parse(early)
    taken: asyncio.StreamWriter = writer
    return taken
