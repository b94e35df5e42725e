"""What can go wrong, as one small tree.

Every error of this package is an `EventBusError`. Its text says what happened, where, and what to
do next; its fields carry the same facts for programs. Only exception classes may enter here.

    EventBusError
    ├── BusClosed           the bus is not started, is stopped, or is another loop's or process's
    ├── BusUnavailable      certainly not sent (or: could not start); Redis cannot be reached
    ├── PublishUncertain    written to the socket, and nobody can say whether it arrived
    ├── PermissionDenied    Redis refuses this user these channels or patterns
    ├── PayloadTooLarge     over `max_payload`; nothing was sent
    ├── InvalidEvent        the data does not fit the event class (or is no event at all)
    ├── InvalidChannel      not a name that a message can be published on
    ├── InvalidPattern      not a pattern that a handler can listen to
    └── InvalidHandler      a signature that cannot be filled
"""

from __future__ import annotations


class EventBusError(Exception):
    """The root. Keyword arguments become attributes of the same name."""

    def __init__(self, message: str = "", **fields: object) -> None:
        super().__init__(message)
        self.__dict__.update(fields)


class BusClosed(EventBusError):
    """The bus is not running here: not started, stopped, or used from another loop or process."""


class BusUnavailable(EventBusError):
    """Redis could not be reached in time. What was to be published was certainly not sent."""

    channel: str | None = None
    id: str | None = None
    waited: float = 0.0
    """Seconds between the call and the refusal."""


class PublishUncertain(EventBusError):
    """The message was written to the socket and no answer came: it may have arrived, at most once.

    It is never sent again by the bus.
    """

    channel: str | None = None
    id: str | None = None
    waited: float = 0.0


class PermissionDenied(EventBusError):
    """Redis answered NOPERM (an ACL rule) or refused the user name and password."""

    patterns: tuple[str, ...] = ()
    channel: str | None = None
    user: str | None = None


class PayloadTooLarge(EventBusError, ValueError):
    """The encoded message is longer than `max_payload` bytes. Nothing was sent."""

    channel: str | None = None
    size: int = 0


class InvalidEvent(EventBusError, ValueError):
    """The data does not fit the event class, or the payload is not an event at all.

    `reasons` are short lines such as ``"room: Field required"``. They never hold the data itself.
    """

    type: str | None = None
    channel: str | None = None
    reasons: tuple[str, ...] = ()


class InvalidChannel(EventBusError, ValueError):
    """Not a channel name: empty, control characters, too long, a field that escapes its place."""

    channel: str | None = None


class InvalidPattern(EventBusError, ValueError):
    """Not a pattern: an unclosed brace, a repeated capture, non-ASCII inside brackets, too long."""

    pattern: str | None = None


class InvalidHandler(EventBusError, TypeError):
    """A parameter of the handler cannot be filled, or its options contradict each other."""

    handler: str | None = None
    parameter: str | None = None
