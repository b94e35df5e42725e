"""An application that does not wait for its server."""

from __future__ import annotations

from eventbus import EventBus

bus = EventBus(connect_timeout=0.2)
