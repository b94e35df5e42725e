"""Typed events on Redis Pub/Sub. Everything a user needs is listed here; nothing else is public."""

from eventbus._acl import Acl
from eventbus._bus import EventBus
from eventbus._errors import (
    BusClosed,
    BusUnavailable,
    EventBusError,
    InvalidChannel,
    InvalidEvent,
    InvalidHandler,
    InvalidPattern,
    PayloadTooLarge,
    PermissionDenied,
    PublishUncertain,
)
from eventbus._events import Event
from eventbus._messages import Buffer, Gap, HandlerStats, Health, Message, Receipt, Stats
from eventbus._patterns import escape
from eventbus._routes import Messages, Route, RouteInfo, Router, matches

__all__ = [
    "Acl",
    "Buffer",
    "BusClosed",
    "BusUnavailable",
    "Event",
    "EventBus",
    "EventBusError",
    "Gap",
    "HandlerStats",
    "Health",
    "InvalidChannel",
    "InvalidEvent",
    "InvalidHandler",
    "InvalidPattern",
    "Message",
    "Messages",
    "PayloadTooLarge",
    "PermissionDenied",
    "PublishUncertain",
    "Receipt",
    "Route",
    "RouteInfo",
    "Router",
    "Stats",
    "escape",
    "matches",
]
__version__ = "0.1.0"
