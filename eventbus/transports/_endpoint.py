"""One place that knows how to open a connection: URL, credentials, TLS, Sentinel, or a client.

redis-py does all of it, with its own retries off, RESP2 and bytes. What comes out is a connected
redis-py connection that has answered a PING; `_link.adopt` takes its socket over.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import anyio
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from eventbus._errors import EventBusError
from eventbus._reports import logger, quoted

_NOT_A_CLIENTS = (
    "connection_class",
    "connection_pool",
    "event_dispatcher",
    "himport_registry",
    "maint_notifications_pool_handler",
    "oss_cluster_maint_notifications_handler",
    "sentinel_kwargs",
    "timeout",
)
"""What belongs to one pool: a second pool must not be given it."""
_NOT_OURS = (
    *_NOT_A_CLIENTS,
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
)
"""Options of a client or pool that say how *it* uses a connection, not how one is opened."""

_CONNECT_TIMEOUT = 5.0
"""Seconds for a connection, and for each answer until it is handed over: without a limit (redis-py
before 8) a frozen server, which still accepts, would hold an attempt for ever."""
_SENTINEL_TIMEOUT = 1.0
_PASSING = (ssl.SSLEOFError, ssl.SSLSyscallError, ssl.SSLZeroReturnError)
"""TLS errors of a server that dies during the handshake; it may come back."""


class Endpoint:
    """Where the servers are, and how to open a connection to the one that counts now. Raises
    EventBusError for options that redis-py does not take."""

    def __init__(
        self,
        connection_class: type[Any],
        options: Mapping[str, Any],
        shown: str,
        *,
        sentinels: Sentinel | None = None,
        master: str = "",
    ) -> None:
        self.shown = shown
        """The address, without a secret."""
        self.user: str | None = options.get("username")
        self.is_sentinel = sentinels is not None
        self.database: int = options.get("db") or 0
        needs = {"+role": True, "+select": self.database != 0}
        needs["+client|setname"] = bool(options.get("client_name"))
        self.connecting = tuple(rule for rule, needed in needs.items() if needed)
        """The ACL rules that opening and keeping a connection needs, beside PING."""
        self._class = connection_class
        self._options = {k: v for k, v in options.items() if k not in _NOT_OURS}
        limit = _CONNECT_TIMEOUT
        for timeout in ("socket_connect_timeout", "socket_timeout"):
            limit = self._options[timeout] = self._options.get(timeout) or limit
        self._sentinels = sentinels
        self._master = master
        self._client_options = {k: v for k, v in options.items() if k not in _NOT_A_CLIENTS}
        self._warned = self._told_replica = False
        try:
            self._connection()
        except (TypeError, ValueError, RedisError) as error:
            raise EventBusError(f"redis-py does not take these options: {error}") from None

    def _connection(self, **address: Any) -> Any:
        options = {**self._options, **address}
        return self._class(**options, protocol=2, retry=Retry(NoBackoff(), 0))

    async def open(self) -> Any:
        """A connected redis-py connection that answers. Raises redis-py's errors and OSError."""
        address: dict[str, Any] = {}
        if self._sentinels is not None:
            address["host"], address["port"] = await self._find_master()
        connection = self._connection(**address)
        self._warn(connection)
        try:
            await self._connect(connection)
            await self._check(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _connect(self, connection: Any) -> None:
        try:
            await connection.connect()
        except ResponseError as error:
            if "DB index" not in str(error):
                raise
            hint = f"{error}: leave the database number out, Pub/Sub has no databases"
            raise ResponseError(hint) from error
        except RedisTimeoutError as error:
            if not isinstance(connection, SSLConnection):
                raise
            # A Redis without TLS takes the hello for half a command, and waits for the rest of it.
            hint = f"{error} (no TLS handshake in time: does this port speak TLS?)"
            raise RedisTimeoutError(hint) from error

    def _warn(self, connection: Any) -> None:
        """Say once per start that this TLS protects from nobody who can answer in Redis's place."""
        if self._warned or not isinstance(connection, SSLConnection):
            return
        self._warned = True
        option = "ssl_check_hostname=false"
        if connection.cert_reqs == ssl.CERT_NONE:
            option = "ssl_cert_reqs=none"
        elif connection.check_hostname:
            return
        logger.warning(
            "%s: with %s anybody on the way can pass for this server", self.shown, option
        )

    async def _check(self, connection: Any) -> None:
        """A server that is loading or wants a password must not pass for a good one."""
        try:
            await connection.send_command("PING", check_health=False)
            await connection.read_response()
        except NoPermissionError:
            pass  # an answer is an answer
        await connection.send_command("ROLE", check_health=False)
        try:
            role = (await connection.read_response())[0]
        except ResponseError:
            return  # denied, or a server that has no roles
        if role == b"master":
            return
        if self.is_sentinel:
            raise RedisConnectionError(f"{self.shown}: this node is a replica now")
        if not self._told_replica:
            self._told_replica = True
            logger.warning(
                "%s is a replica: what is published there reaches its own subscribers alone; give"
                " the address of the master, or redis+sentinel://",
                self.shown,
            )

    async def _find_master(self) -> tuple[str, int]:
        if self._sentinels is None:
            raise EventBusError("no Sentinel is configured")
        try:
            host, port = await self._sentinels.discover_master(self._master)
        except MasterNotFoundError:  # its text has the representation of each client
            raise RedisConnectionError(
                f"no Sentinel of {self.shown} answers and knows a living master {self._master!a}"
            ) from None
        return host, int(port)

    async def close(self) -> None:
        """Close the connections to the Sentinels."""
        if self._sentinels is not None:
            for sentinel in self._sentinels.sentinels:
                await sentinel.aclose()

    def client(self) -> Redis:
        """A client of the same server (of the current master), for its caller to close."""
        options = self._client_options
        if self._sentinels is not None:
            tls = issubclass(self._class, SSLConnection)
            kind = SentinelManagedSSLConnection if tls else SentinelManagedConnection
            client: Redis = self._sentinels.master_for(
                self._master, connection_class=kind, **options
            )
            return client
        return Redis.from_pool(ConnectionPool(connection_class=self._class, **options))


def endpoint_of_url(url: str, options: Mapping[str, Any]) -> Endpoint:
    """The endpoint of ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` and
    ``embedded://``. Raises EventBusError for a URL that cannot be read, without quoting it."""
    scheme, _, rest = url.partition("://")
    if scheme == "embedded":
        return endpoint_of_url(_embedded(rest or "default"), options)
    try:
        if scheme.endswith("+sentinel"):
            return _sentinel_endpoint(url, options)
        _check_url(url)
        found: dict[str, Any] = dict(parse_url(url))
    except ValueError:
        raise EventBusError(
            f"the {scheme}:// URL cannot be read; special characters of a password must be percent"
            "-encoded ('#' as %23, '/' as %2F, '?' as %3F, '@' as %40), and a port is a number"
        ) from None
    found |= options
    connection_class = found.pop("connection_class", Connection)
    return Endpoint(connection_class, found, _shown(connection_class, found))


def _embedded(name: str) -> str:
    try:
        from eventbus.server import embedded  # for POSIX alone: it imports fcntl

        return embedded(name)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise EventBusError(f"embedded://{name}: {error}") from error


def _check_url(url: str) -> None:
    """Raise ValueError where a character of the password would end the address: what is left of it
    can be read, as another server, and would be shown."""
    parts = urlsplit(url)
    if "#" in url:
        raise ValueError("fragment")
    if parts.scheme in ("redis", "rediss") and (
        not re.fullmatch(r"/?\d*/?", parts.path) or (not parts.hostname and "@" in parts.query)
    ):
        raise ValueError("path or query")


def _shown(connection_class: type[Any], options: Mapping[str, Any]) -> str:
    if issubclass(connection_class, UnixDomainSocketConnection):
        return f"unix://{options.get('path', '')}"
    scheme = "rediss" if issubclass(connection_class, SSLConnection) else "redis"
    host = options.get("host", "localhost")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.get('port', 6379)}"


def _sentinel_endpoint(url: str, options: Mapping[str, Any]) -> Endpoint:
    """``redis+sentinel://user:password@host:port,host:port/master?db=0``: the user and the password
    are those of the data nodes; those of the Sentinels go into ``sentinel_kwargs`` of the options.
    ``rediss+sentinel://`` is TLS to both."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    master = parts.path.strip("/")
    addresses = []
    for address in hosts.split(","):
        match = re.fullmatch(r"(\[[^]]+\]|[^:]+)(?::(\d+))?", address)
        if match is None or "#" in url or "@" in master:
            raise ValueError("address")
        addresses.append((match[1].strip("[]"), int(match[2] or 26379)))
    if not master:
        raise EventBusError(
            "a redis+sentinel:// URL ends with the name of the master: .../mymaster"
        )
    scheme = parts.scheme.partition("+")[0]
    found: dict[str, Any] = dict(parse_url(f"{scheme}://{login}@/?{parts.query}"))
    found |= options
    connection_class = found.pop("connection_class", Connection)
    over_tls = {k: v for k, v in found.items() if k.startswith("ssl_")}
    if scheme == "rediss":
        over_tls["ssl"] = True
    shown = f"{parts.scheme}://{hosts}/{master}"
    sentinels = _sentinels(addresses, over_tls | found.get("sentinel_kwargs", {}))
    return Endpoint(connection_class, found, shown, sentinels=sentinels, master=master)


def _sentinels(addresses: Iterable[tuple[str, int]], options: Mapping[str, Any]) -> Sentinel:
    """Clients of these Sentinels that give up soon: they are asked one after another."""
    ours = {
        "socket_timeout": _SENTINEL_TIMEOUT,
        "socket_connect_timeout": _SENTINEL_TIMEOUT,
        **options,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    return _Sentinels(addresses, sentinel_kwargs=ours)


class _Sentinels(Sentinel):
    """Sentinels that are asked by one task at a time: redis-py moves the one that answered to the
    front of a shared list, and two tasks that do so at once lose another one of them for ever."""

    def __init__(self, addresses: Iterable[tuple[str, int]], **options: Any) -> None:
        super().__init__(addresses, **options)  # type: ignore[no-untyped-call]
        self._asking = anyio.Lock()

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        async with self._asking:
            found: tuple[str, int] = await super().discover_master(service_name)
            return found


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
        theirs = pool.sentinel_manager
        known = [sentinel.connection_pool.connection_kwargs for sentinel in theirs.sentinels]
        addresses = [(options["host"], options["port"]) for options in known]
        hosts = ",".join(f"{host}:{port}" for host, port in addresses)
        return Endpoint(
            SSLConnection if tls else Connection,
            found,
            f"{'rediss' if tls else 'redis'}+sentinel://{hosts}/{pool.service_name}",
            sentinels=_sentinels(addresses, theirs.sentinel_kwargs),
            master=pool.service_name,
        )
    return Endpoint(pool.connection_class, found, _shown(pool.connection_class, found))


def is_hopeless(error: BaseException) -> bool:
    """Whether trying again soon is useless: wrong credentials, or a certificate that is not
    good."""
    return any(
        _is_refusal(e) or (isinstance(e, ssl.SSLError) and not isinstance(e, _PASSING))
        for e in _chain(error)
    )


def describe_error(error: BaseException) -> tuple[str, bool]:
    """One line of what went wrong, and whether it is the server's refusal of this user."""
    refused = any(map(_is_refusal, _chain(error)))
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {getattr(cause, 'verify_message', '') or cause.reason or cause}", refused
    if isinstance(error, TimeoutError):
        return "no answer in time", refused
    return quoted(error) or type(error).__name__, refused


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
