"""`bus.acl()`: a user with exactly these rules can do all of it, and with one less it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio

from eventbus import Acl, Event, EventBus, EventBusError, InvalidPattern, PermissionDenied
from eventbus.server import Server
from tests.conftest import DEBIAN
from tests.helpers import Seen, soon


class Text(Event, channel="chat:{room}"):
    room: str


def build(url: str, **settings: Any) -> tuple[EventBus, Seen[str]]:
    """A bus with overlapping, covered, literal and odd patterns."""
    bus = EventBus(url, heartbeat=0.2, connect_timeout=1.0, drain_timeout=0.5, **settings)
    seen: Seen[str] = Seen()

    @bus.on("chat:*")
    async def wide(event: Text) -> None:
        seen.append("wide")

    @bus.on("chat:{room}", "chat:a*")
    async def covered(event: Text, room: str = "") -> None:
        seen.append("covered")

    @bus.on("news", r"star\*", "x:[a-c]?")
    async def literal(event: Text) -> None:
        seen.append("literal")

    return bus, seen


@pytest.fixture(params=[None, DEBIAN], ids=["valkey", "redis"])
async def admin(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A client that may do everything, on a server of its own with TCP."""
    if request.param:
        request.getfixturevalue("debian_redis")
    with Server(port=0, binary=request.param) as own:
        async with redis.asyncio.Redis(port=own.port or 0) as client:
            yield client


async def grant(admin: Any, rules: tuple[str, ...], **settings: Any) -> tuple[EventBus, Seen[str]]:
    """A bus whose user has these rules and no others."""
    await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)
    await admin.acl_log_reset()
    port = admin.connection_pool.connection_kwargs["port"]
    return build(f"redis://app:secret@localhost:{port}", **settings)


async def denials(admin: Any) -> set[str]:
    """What the server has denied. Libraries name themselves at connect, which nobody needs."""
    found = {entry["object"] for entry in await admin.acl_log()}
    return {name.decode() if isinstance(name, bytes) else name for name in found} - {
        "client|setinfo"
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"namespace": "staging"},
    {"beat": True},
    {"redis_options": {"client_name": "shop", "db": 1}},
]


async def exercise(bus: EventBus, seen: Seen[str]) -> None:
    """Everything that a bus does with its server: listen, publish, attach, let go, and beat."""
    async with bus:
        await bus.publish(Text(room="a1"))
        await bus.publish("news", Text(room="r"))
        await bus.publish("star*", Text(room="r"))
        await bus.publish("x:b1", Text(room="r"))
        await seen.reach(5)
        async with bus.subscribe("chat:a*", "news"):
            pass
        async with asyncio.timeout(10):
            while bus.health().probe == "pending":
                await bus.publish(Text(room="a"))
        assert bus.health().state == "live", bus.health()


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "namespace", "beat", "options"])
async def test_exactly_these_rules_are_enough(admin: Any, settings: dict[str, Any]) -> None:
    """A user who is granted what `acl().both` lists is denied nothing."""
    rules = build("redis://localhost", **settings)[0].acl().both
    bus, seen = await grant(admin, rules, **settings)
    await exercise(bus, seen)
    assert await denials(admin) == set()


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=["plain", "options"])
async def test_no_rule_is_for_nothing(admin: Any, settings: dict[str, Any]) -> None:
    """Without any one of the rules, something is denied: they are the least."""
    rules = build("redis://localhost", **settings)[0].acl().both
    spare = []
    for rule in rules[3:]:
        bus, seen = await grant(admin, tuple(r for r in rules if r != rule), **settings)
        try:
            await soon(exercise(bus, seen), 20)
        except (EventBusError, AssertionError, TimeoutError):
            continue
        if not await denials(admin):
            spare.append(rule)
    assert spare == ["&chat:a*"]  # covered: needed only when the wide one is denied


async def test_covered_patterns_are_listed_too(admin: Any) -> None:
    """When the wide pattern is taken away, the covered ones go on: their rules were there."""
    rules = build("redis://localhost")[0].acl().both
    assert "&chat:a*" in rules
    less = tuple(rule for rule in rules if rule != "&chat:*")
    bus, seen = await grant(admin, (*less, "&chat:[b-z]*"), on_denied="degrade")
    async with bus:
        await bus.publish("chat:a1", Text(room="a1"))
        await seen.reach(1)
        assert seen == ["covered"]


async def test_a_publisher_can_publish_and_nothing_else(admin: Any) -> None:
    """The publisher's role: its channels, and no subscription."""
    rules = EventBus("redis://localhost").acl("chat:*", "news").publisher
    assert rules == (
        *("resetkeys", "resetchannels", "-@all", "+publish", "+ping", "+role"),
        *("&chat:*", "&news", "&__eventbus__:*"),
    )
    await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)
    port = admin.connection_pool.connection_kwargs["port"]
    async with EventBus(f"redis://app:secret@localhost:{port}") as bus:
        await bus.publish(Text(room="1"))
        with pytest.raises(PermissionDenied):
            await bus.publish("other", Text(room="1"))
        with pytest.raises(PermissionDenied):
            async with bus.subscribe("chat:*"):
                pass


async def test_a_subscriber_can_listen_and_not_publish(admin: Any) -> None:
    """The subscriber's role: its patterns, and no PUBLISH."""
    rules = build("redis://localhost")[0].acl().subscriber
    bus, _ = await grant(admin, rules)
    async with bus:
        await admin.publish("chat:1", b"{}")
        with pytest.raises(PermissionDenied):
            await bus.publish(Text(room="1"))
        assert bus.health().probe in ("denied", "pending")
        assert bus.health()


def test_event_classes_name_what_is_published() -> None:
    """`acl(MessageSent)` grants the template of the class."""
    acl = EventBus("redis://localhost", heartbeat=None).acl(Text)
    assert acl == Acl(
        ("resetkeys", "resetchannels", "-@all", "+publish", "+ping", "+role", "&chat:*"),
        ("resetkeys", "resetchannels", "-@all", "+subscribe", "+unsubscribe", "+ping", "+role"),
        (
            *("resetkeys", "resetchannels", "-@all", "+publish", "+subscribe", "+unsubscribe"),
            *("+ping", "+role", "&chat:*"),
        ),
    )


def test_a_pattern_that_no_rule_can_name_is_refused() -> None:
    """Redis's rules cannot hold a space: a sentence says so."""
    bus = EventBus("memory://x")
    with pytest.raises(InvalidPattern, match="space"):
        bus.acl("a b")


async def test_a_running_bus_lists_what_was_attached() -> None:
    """`acl()` of a running bus knows the routes of now."""

    async def more(event: Text) -> None: ...

    async with EventBus("memory://x") as bus:
        await bus.attach(more, "late:*")
        assert "&late:*" in bus.acl().subscriber
