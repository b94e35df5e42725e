"""Typed events on Redis Pub/Sub. Everything a user needs is listed here; nothing else is public.

A name is imported when it is first asked for (PEP 562): the command line and the modules that need
no bus, such as `eventbus.server`, start without pydantic, asyncio and the engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


if not TYPE_CHECKING:  # a checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'eventbus' has no attribute {name!r}")
        home = import_module(f"eventbus.{_HOMES.get(name, '_errors')}")
        value = globals()[name] = getattr(home, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


_HOMES = {
    "Acl": "_acl",
    "EventBus": "_bus",
    "Event": "_events",
    "escape": "_patterns",
    **dict.fromkeys("Buffer Gap HandlerStats Health Message Receipt Stats".split(), "_messages"),
    **dict.fromkeys("Messages Route RouteInfo Router matches".split(), "_routes"),
}
"""In which module a name is, when not in `_errors`."""
