"""The settings of a bus, checked once. Times are seconds, sizes are bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from eventbus._errors import InvalidChannel
from eventbus._messages import Buffer
from eventbus._patterns import check_channel, escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """See `EventBus` for what each one means. Raises ValueError, naming the setting."""

    name: str = "eventbus"
    namespace: str = ""
    wire: Literal["bare"] | None = None
    outage: Literal["fail", "drop"] | Buffer = "fail"
    heartbeat: float | None = 5.0
    publish_timeout: float = 1.0
    connect_timeout: float = 10.0
    drain_timeout: float = 10.0
    on_denied: Literal["raise", "degrade"] = "raise"
    beat: bool = False
    max_payload: int = 1 << 20
    max_pending_bytes: int = 64 << 20
    redis_options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise ValueError("name must be ASCII letters, digits, '.', '_' and '-'")
        if self.namespace:
            if escape(self.namespace) != self.namespace:
                raise ValueError("namespace must not hold glob characters or braces")
            try:
                check_channel(self.namespace)
            except InvalidChannel as error:
                raise ValueError(f"namespace: {error}") from None
        if self.wire not in (None, "bare"):
            raise ValueError('wire is None or "bare"')
        if self.outage not in ("fail", "drop") and not isinstance(self.outage, Buffer):
            raise ValueError('outage is "fail", "drop" or a Buffer')
        if self.on_denied not in ("raise", "degrade"):
            raise ValueError('on_denied is "raise" or "degrade"')
        if self.heartbeat is not None and not self.heartbeat > 0:
            raise ValueError("heartbeat is a positive number of seconds, or None")
        if self.beat and self.heartbeat is None:
            raise ValueError("beat=True announces at each heartbeat: heartbeat must not be None")
        timeouts = ("publish_timeout", "connect_timeout", "drain_timeout")
        for setting in (*timeouts, "max_payload", "max_pending_bytes"):
            if not getattr(self, setting) > 0:
                raise ValueError(f"{setting} must be positive")

    @property
    def bare(self) -> bool:
        return self.wire == "bare"

    @property
    def prefix(self) -> str:
        """What goes before every name on the wire."""
        return f"{self.namespace}:" if self.namespace else ""
