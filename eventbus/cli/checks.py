"""What `eventbus doctor` looks at: the connection, the server, and the rules of a user.

It only reads and measures: nothing on the server is changed, and no message goes out but the bus's
own probe. What this user may not read is said, and is no fault.
"""

from __future__ import annotations

import asyncio
import platform
import ssl
import statistics
import time
from collections.abc import Awaitable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

from eventbus import EventBus, PermissionDenied
from eventbus.cli.apps import place
from eventbus.cli.terminal import count_of

Level = Literal["ok", "info", "warn", "fail"]

_PACKAGES = ("eventbus-redis", "redis", "hiredis", "pydantic", "anyio", "orjson")
_MANY_PATTERNS = 1_000
_PINGS = 20
_SLOW = 0.05  # seconds: the bus still works, people notice
_PUBSUB_LIMIT = 8 << 20  # below this a burst of messages closes a subscriber that was only busy
_UNCHECKED = ("none", "optional", ssl.CERT_NONE, ssl.CERT_OPTIONAL)
_PATIENCE = 5.0  # seconds for the bus's first probe to come back


class Finding(NamedTuple):
    """One line: how it is, about what, and what to do when it is not good."""

    level: Level
    about: str
    text: str
    do: str = ""


def libraries() -> str:
    """The versions of what the bus is made of."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (no version)")
    return ", ".join(found)


class Client:
    """The redis-py client of the bus; what the server refuses is None, and remembered."""

    def __init__(self, bus: EventBus) -> None:
        self.redis = bus.redis()
        self.refused: list[str] = []

    async def ask(self, what: str, answer: Awaitable[Any]) -> Any:
        """The answer, or None."""
        try:
            return await answer
        except Exception:  # denied, renamed, or unknown to this server
            self.refused.append(what)
            return None

    async def config(self, name: str) -> str | None:
        """One setting of the server."""
        found = await self.ask(f"CONFIG GET {name}", self.redis.config_get(name))
        value = (found or {}).get(name)
        return None if value is None else str(value)

    async def info(self, section: str) -> dict[str, Any]:
        """One section of INFO."""
        found = await self.ask(f"INFO {section}", self.redis.info(section))
        return dict(found or {})

    async def text(self, *words: str) -> str | None:
        """The answer to a command, as text."""
        found = await self.ask(" ".join(words[:2]), self.redis.execute_command(*words))
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


async def probe(bus: EventBus) -> Finding:
    """Whether what is published arrives: the bus tries it when it has started."""
    until = time.monotonic() + _PATIENCE
    while (health := bus.health()).probe == "pending" and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if health.probe == "ok":
        return Finding("ok", "end to end", "what is published here is received here")
    if health.probe == "denied":
        return Finding(
            "warn",
            "end to end",
            "this user may not use the bus's own channel, so a connection that leads to the wrong"
            " node is not noticed",
            "allow &__eventbus__:* (after the namespace); `eventbus acl module:bus` has the rules",
        )
    text = f"what is published here does not arrive here: {health.reason or health.probe}"
    return Finding("fail", "end to end", text, "ask who runs Redis what stands between")


async def of_connection(bus: EventBus, client: Client) -> list[Finding]:
    """Round trips, the database number, who we are, and who can listen in."""
    found = []
    times = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        if await client.ask("PING", client.redis.ping()) is None:
            break
        times.append(time.perf_counter() - began)
    if times:
        median, worst = statistics.median(times), max(times)
        level: Level = "ok" if median < _SLOW else "warn"
        found.append(
            Finding(
                level,
                "round trip",
                f"{median * 1e3:.2f} ms median, {worst * 1e3:.2f} ms worst of {len(times)}",
                "" if level == "ok" else "run the bus nearer to Redis",
            )
        )
    options = client.redis.connection_pool.connection_kwargs
    if database := options.get("db"):
        found.append(
            Finding(
                "warn",
                "database",
                f"the URL names database {database}, and Pub/Sub ignores it: everybody on this"
                " server hears everybody",
                'keep programs apart with namespace="..." (--namespace)',
            )
        )
    if options.get("ssl_check_hostname") is False or options.get("ssl_cert_reqs") in _UNCHECKED:
        text = "the certificate is not checked: anybody on the way can pass for this server"
        do = "name your authority with ssl_ca_certs=, and leave the checks on"
        found.append(Finding("warn", "certificate", text, do))
    where = place(bus)
    is_near = where.startswith(("unix:", "redis://localhost", "redis://127.", "redis://[::1]"))
    user = await client.text("ACL", "WHOAMI")
    if where.startswith("redis") and "rediss" not in where and not is_near:
        found.append(
            Finding(
                "warn",
                "encryption",
                "the connection is not encrypted: whoever is on the way can read and forge events",
                "use rediss://, if the network is not yours alone",
            )
        )
    if user is not None:
        bare = user == "default" and not options.get("password")
        level = "warn" if bare and not is_near else "ok"
        found.append(
            Finding(
                level,
                "user",
                f"{user}{', without a password' if bare else ''}",
                "make a user with a password and the least rules: `eventbus acl module:bus`"
                if level == "warn"
                else "",
            )
        )
    return found


async def of_server(client: Client) -> list[Finding]:
    """Its version, its limits, and what it has to do for each publish."""
    info = {**await client.info("server"), **await client.info("replication")}
    info |= await client.info("stats")
    found = list(of_version(info)) if info else []
    limit = await client.config("client-output-buffer-limit")
    if limit is not None:
        found.append(
            of_buffer(limit, int(info.get("client_output_buffer_limit_disconnections", 0)))
        )
    ceiling = await client.config("maxmemory-clients")
    evicted = int(info.get("evicted_clients", 0))
    if ceiling not in (None, "0"):
        found.append(
            Finding(
                "warn",
                "client memory",
                f"maxmemory-clients is {ceiling}: Redis closes its largest clients beyond that,"
                f" subscribers first ({evicted:,} so far)",
                "watch for reconnect gaps, or set it to 0",
            )
        )
    clients = await client.info("clients")
    connected, most = int(clients.get("connected_clients", 0)), int(clients.get("maxclients", 0))
    if most and connected > most * 0.8:
        text = f"{connected:,} of {most:,} connections are taken; a bus needs two"
        found.append(Finding("warn", "connections", text, "raise maxclients"))
    patterns = await client.ask("PUBSUB NUMPAT", client.redis.pubsub_numpat())
    if patterns is not None:
        calls = (await client.info("commandstats")).get("cmdstat_publish", {})
        cost = f"; a PUBLISH takes it {calls['usec_per_call']} µs" if calls else ""
        many = patterns > _MANY_PATTERNS
        found.append(
            Finding(
                "warn" if many else "ok",
                "patterns",
                f"{count_of(patterns, 'pattern')} on the server{cost}; each PUBLISH tries all",
                "listen to fewer, wider patterns, or to literal channels, which cost nothing"
                if many
                else "",
            )
        )
    if client.refused:
        text = f"this user may not ask: {', '.join(dict.fromkeys(client.refused))}"
        found.append(Finding("info", "not looked at", text))
    return found


def of_version(info: dict[str, Any]) -> Iterator[Finding]:
    """What the server is. A replica, or a node of a cluster, is not what a bus wants."""
    name = str(info.get("server_name", "redis")).lower()
    number = str(info.get(f"{name}_version", info.get("redis_version", "?")))
    mode = str(info.get(f"{name}_mode", info.get("redis_mode", info.get("server_mode", "?"))))
    role = str(info.get("role", "?"))
    text = f"{name.capitalize()} {number}, {mode}, {role}"
    major = str(info.get("redis_version", "7")).partition(".")[0]
    if major.isdigit() and int(major) < 6:
        yield Finding("warn", "server", text, "upgrade: the bus is tested with Redis 7 and Valkey")
    elif role not in ("master", "?"):
        yield Finding(
            "fail",
            "server",
            f"{text}: what is published here reaches its own subscribers alone",
            "use the address of the master, or redis+sentinel://",
        )
    elif mode == "cluster":
        yield Finding(
            "warn",
            "server",
            f"{text}: every node carries every message",
            "works; do not expect more nodes to carry more messages",
        )
    else:
        yield Finding("ok", "server", text)


def of_buffer(limit: str, closed: int) -> Finding:
    """How far a subscriber may fall behind before Redis closes it."""
    words = limit.split()
    hard, soft, seconds = map(int, words[words.index("pubsub") + 1 :][:3])
    text = f"a subscriber is closed at {_size(hard)}, or {_size(soft)} for {seconds} s"
    if not hard:
        text = "a subscriber that does not read is never closed, and fills the server's memory"
    if closed:
        text += f"; it happened to {count_of(closed, 'client')} since the server started"
    if closed or not hard or hard < _PUBSUB_LIMIT:
        do = "client-output-buffer-limit pubsub 64mb 16mb 60 gives bursts more room"
        return Finding("warn", "output buffer", text, do)
    return Finding("ok", "output buffer", text)


def _size(number: int) -> str:
    """Bytes as Redis's own configuration counts them."""
    return f"{number / (1 << 20):g} MiB" if number >= 1 << 20 else f"{number:,} bytes"


async def of_rules(
    app: EventBus, publishes: list[Any], bus: EventBus, client: Client, user: str | None
) -> list[Finding]:
    """Whether the user may do what the application does, tried without doing it (ACL DRYRUN);
    where that is refused, the subscriptions are made and given back."""
    rules = app.acl(*publishes) if app.routes or publishes else None
    if rules is None:
        return [Finding("info", "rules", "the application has no handlers, and names no event")]
    who = user or await client.text("ACL", "WHOAMI") or "default"
    wanted = [("PUBLISH", name) for name in _names(rules.publisher)]
    wanted += [
        ("PSUBSCRIBE" if set("*?[") & set(name.replace("\\*", "")) else "SUBSCRIBE", name)
        for name in _names(rules.subscriber)
    ]
    denied = []
    for command, name in wanted:
        words = [command, name, *(["x"] if command == "PUBLISH" else [])]
        answer = await client.text("ACL", "DRYRUN", who, *words)
        if answer is None:
            return [await _by_trying(app, bus)]
        if answer != "OK":
            denied.append(f"{command} {name}")
    if not denied:
        text = f"{who} may do all {len(wanted)} things that the application does"
        return [Finding("ok", "rules", text)]
    text = f"{who} may not: {', '.join(denied[:10])}{' …' if len(denied) > 10 else ''}"
    do = f"ACL SETUSER {who} {' '.join('&' + item.partition(' ')[2] for item in denied[:10])}"
    return [Finding("fail", "rules", text, do)]


def _names(words: tuple[str, ...]) -> list[str]:
    """The channels of a list of rules."""
    return [word[1:] for word in words if word.startswith("&")]


async def _by_trying(app: EventBus, bus: EventBus) -> Finding:
    denied: list[str] = []
    patterns = list(dict.fromkeys(p for route in app.routes for p in route.patterns))
    for pattern in patterns:
        try:
            async with bus.subscribe(pattern):
                pass
        except PermissionDenied:
            denied.append(pattern)
    note = "ACL DRYRUN is refused, so subscribing was tried, and publishing was not"
    if denied:
        text = f"this user may not listen to {', '.join(denied)} ({note})"
        return Finding("fail", "rules", text, "`eventbus acl module:bus` prints what it needs")
    return Finding("ok", "rules", f"all {count_of(len(patterns), 'pattern')} allowed ({note})")
