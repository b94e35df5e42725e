"""Where events travel: from a URL (or a redis-py client) to the transport that serves it.

The one place that knows all schemes. Each transport is imported when its scheme is used, so that
`import eventbus` does not pay for Redis.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from eventbus._errors import EventBusError

if TYPE_CHECKING:
    from eventbus.transports.base import Transport

_REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


def transport_for(target: Any, options: dict[str, Any]) -> Transport:
    """The transport for a URL or a `redis.asyncio.Redis`. Raises EventBusError for any other."""
    if not isinstance(target, str):
        from eventbus.transports._endpoint import endpoint_of_client
        from eventbus.transports.redis import RedisTransport

        return RedisTransport(endpoint_of_client(target, options))
    scheme = target.partition("://")[0]
    if scheme == "memory":
        from eventbus.transports.memory import MemoryTransport

        parts = urlsplit(target)
        return MemoryTransport(f"{parts.netloc}{parts.path}" or "default")
    if scheme == "embedded" or scheme in _REDIS:
        from eventbus.transports._endpoint import endpoint_of_url
        from eventbus.transports.redis import RedisTransport

        return RedisTransport(endpoint_of_url(target, options))
    known = "://" in target and re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme)
    shown = ascii(scheme) if known else "a URL without a scheme"
    raise EventBusError(
        f"no transport for {shown}: use redis://, rediss://, unix://, redis+sentinel://,"
        " memory:// or embedded://"
    )
