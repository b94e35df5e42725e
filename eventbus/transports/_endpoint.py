"""One place that knows how to open a connection: URL, credentials, TLS, Sentinel, or a client.

redis-py does all of it, with its own retries off, RESP2 and bytes. What comes out is a connected
redis-py connection that has answered a PING; `_link.adopt` takes its socket over.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from eventbus._errors import EventBusError
from eventbus.server import embedded

_NOT_OURS = (
    "connection_class",
    "connection_pool",
    "decode_responses",
    "health_check_interval",
    "maint_notifications_config",
    "max_connections",
    "parser_class",
    "protocol",
    "redis_connect_func",
    "retry",
    "retry_on_error",
    "retry_on_timeout",
    "sentinel_kwargs",
    "timeout",
)
"""Options of a client or pool that say how *it* uses a connection, not how one is opened."""

_CONNECT_TIMEOUT = 5.0
_SENTINEL_TIMEOUT = 1.0


class Endpoint:
    """Where the servers are, and how to open a connection to the one that counts now."""

    def __init__(
        self,
        connection_class: type[Any],
        options: Mapping[str, Any],
        shown: str,
        *,
        sentinels: Sentinel | None = None,
        master: str = "",
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.shown = shown
        """The address, without a secret."""
        self.user: str | None = options.get("username")
        self.is_sentinel = sentinels is not None
        self._class = connection_class
        self._options = {k: v for k, v in options.items() if k not in _NOT_OURS}
        self._options.setdefault("socket_connect_timeout", _CONNECT_TIMEOUT)
        self._sentinels = sentinels
        self._master = master
        self._client_options = dict(client_options if client_options is not None else options)

    async def open(self) -> Any:
        """A connected redis-py connection that answers. Raises redis-py's errors and OSError."""
        options = dict(self._options)
        if self._sentinels is not None:
            options["host"], options["port"] = await self._find_master()
        connection = self._class(**options, protocol=2, retry=Retry(NoBackoff(), 0))
        try:
            await connection.connect()
            await self._check(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _check(self, connection: Any) -> None:
        """A server that is loading or wants a password must not pass for a good one."""
        try:
            await connection.send_command("PING", check_health=False)
            await connection.read_response()
        except NoPermissionError:
            pass  # an answer is an answer
        if self.is_sentinel:
            await connection.send_command("ROLE", check_health=False)
            try:
                role = (await connection.read_response())[0]
            except NoPermissionError:
                return
            if role != b"master":
                raise RedisConnectionError(f"{self.shown}: this node is a replica now")

    async def _find_master(self) -> tuple[str, int]:
        if self._sentinels is None:
            raise EventBusError("no Sentinel is configured")
        host, port = await self._sentinels.discover_master(self._master)
        return host, int(port)

    async def close(self) -> None:
        """Close the connections to the Sentinels."""
        if self._sentinels is not None:
            for sentinel in self._sentinels.sentinels:
                await sentinel.aclose()

    def client(self) -> Redis:
        """A client of the same server (of the current master), for its caller to close."""
        if self._sentinels is not None:
            options = {k: v for k, v in self._options.items() if k != "connection_class"}
            client: Redis = self._sentinels.master_for(self._master, **options)
            return client
        pool = ConnectionPool(connection_class=self._class, **self._client_options)
        return Redis.from_pool(pool)


def endpoint_of_url(url: str, options: Mapping[str, Any]) -> Endpoint:
    """The endpoint of ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` and
    ``embedded://``. Raises EventBusError for a URL that cannot be read, without quoting it."""
    scheme = url.partition("://")[0]
    if scheme == "embedded":
        name = url.partition("://")[2] or "default"
        return endpoint_of_url(embedded(name), options)
    try:
        if scheme.endswith("+sentinel"):
            return _sentinel_endpoint(url, options)
        found = dict(parse_url(url))
    except ValueError:
        raise EventBusError(
            f"the {scheme}:// URL cannot be read; special characters of a password must be percent"
            "-encoded ('#' as %23, '/' as %2F, '@' as %40)"
        ) from None
    found |= options
    connection_class = found.pop("connection_class", Connection)
    return Endpoint(connection_class, found, _shown(connection_class, found))


def _shown(connection_class: type[Any], options: Mapping[str, Any]) -> str:
    if issubclass(connection_class, UnixDomainSocketConnection):
        return f"unix://{options.get('path', '')}"
    scheme = "rediss" if issubclass(connection_class, SSLConnection) else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}"


def _sentinel_endpoint(url: str, options: Mapping[str, Any]) -> Endpoint:
    """``redis+sentinel://user:password@host:port,host:port/master?db=0``: the user and the password
    are those of the data nodes."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    master = parts.path.strip("/")
    addresses = []
    for address in hosts.split(","):
        host, port = re.fullmatch(r"(\[[^]]+\]|[^:]+)(?::(\d+))?", address).groups()  # type: ignore[union-attr]
        addresses.append((host.strip("[]"), int(port or 26379)))
    if not master:
        raise EventBusError(
            "a redis+sentinel:// URL ends with the name of the master: .../mymaster"
        )
    found: dict[str, Any] = {k: v[0] for k, v in parse_qs(parts.query).items()}
    user, _, password = login.partition(":")
    if user:
        found["username"] = unquote(user)
    if password:
        found["password"] = unquote(password)
    found |= options
    tls = parts.scheme.startswith("rediss")
    sentinels = Sentinel(
        addresses,
        sentinel_kwargs={
            "socket_timeout": _SENTINEL_TIMEOUT,
            "socket_connect_timeout": _SENTINEL_TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            **found.get("sentinel_kwargs", {}),
        },
    )
    shown = f"redis+sentinel://{hosts}/{master}"
    connection_class = SSLConnection if tls else Connection
    return Endpoint(connection_class, found, shown, sentinels=sentinels, master=master)


def endpoint_of_client(client: Any, options: Mapping[str, Any]) -> Endpoint:
    """The endpoint that an existing `redis.asyncio.Redis` uses. It is neither used nor closed here:
    its connection class and arguments are taken. Raises EventBusError for anything else."""
    if not isinstance(client, Redis):
        raise EventBusError(
            f"a bus takes a URL or a redis.asyncio.Redis, not {type(client).__module__}."
            f"{type(client).__name__}"
        )
    pool = client.connection_pool
    found = {**pool.connection_kwargs, **options}
    if isinstance(pool, SentinelConnectionPool):
        tls = issubclass(pool.connection_class, SSLConnection)
        return Endpoint(
            SSLConnection if tls else Connection,
            found,
            f"redis+sentinel://{pool.service_name}",
            sentinels=pool.sentinel_manager,
            master=pool.service_name,
        )
    return Endpoint(pool.connection_class, found, _shown(pool.connection_class, found))


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again soon is useless: wrong credentials, or a certificate that is not
    good."""
    return any(_is_refusal(e) or isinstance(e, ssl.SSLError) for e in _chain(error))


def describe_error(error: BaseException) -> tuple[str, bool]:
    """One line of what went wrong, and whether it is the server's refusal of this user."""
    refused = any(map(_is_refusal, _chain(error)))
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {getattr(cause, 'verify_message', '') or cause.reason or cause}", refused
    if isinstance(error, TimeoutError):
        return "no answer in time", refused
    text = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    return text, refused


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: redis-py wraps the cause that tells."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError):
        return True
    return isinstance(error, ResponseError) and str(error).startswith(("NOAUTH", "WRONGPASS"))


__all__ = [
    "Endpoint",
    "RedisError",
    "describe_error",
    "endpoint_of_client",
    "endpoint_of_url",
    "is_hopeless",
]
