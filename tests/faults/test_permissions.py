"""What Redis refuses, at the start and under a running bus: the fault catalogue, part C.

A refusal is told by its name, hurts only what it is about, and is asked again slowly. The password
is in no text.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from anyio.lowlevel import checkpoint

from eventbus import BusUnavailable, Event, EventBus, Message, PermissionDenied
from tests.faults.controller import Controller
from tests.faults.proxy import Proxy
from tests.helpers import Lines, Seen, soon
from tests.test_failure import HEARTBEAT, Note, listener, publish_until

PASSWORD = "canary-" + secrets.token_hex(8)
MINIMUM = ("-@all", "+publish", "+subscribe", "+psubscribe", "+unsubscribe", "+punsubscribe")
PROBE = "&__eventbus__:*"
REFUSALS = ("invalid username-password", "Authentication required", "without any password")


@pytest.fixture
def server() -> Iterator[Controller]:
    """A server of this test, without users but the default one."""
    with Controller(port=0) as server:
        yield server


async def let_in(server: Controller, *rules: str) -> None:
    """Make the user `app` with these rules."""
    await server.acl("app", "reset", "on", f">{PASSWORD}", *rules)


def as_app(url: str) -> str:
    """The URL with the user `app` in it."""
    return url.replace("://", f"://app:{PASSWORD}@")


# -- Credentials -----------------------------------------------------------------------------------


async def take_away(server: Controller, what: str) -> None:
    """Make the credentials of a bus worthless. Redis itself ends the connections of a user that is
    deleted, and leaves them in the other cases."""
    match what:
        case "user deleted":
            await server.ask("ACL", "DELUSER", "app")
        case "user disabled":
            await server.acl("app", "off")
        case "password changed":
            await server.acl("app", "resetpass", ">another")
        case "password demanded":
            await server.config("requirepass", PASSWORD)


def refusals(log: Lines) -> list[str]:
    """The log lines that speak of credentials."""
    return [line for line in log.lines if any(text in line for text in REFUSALS)]


@pytest.mark.scenario(22)
@pytest.mark.parametrize(
    "what", ["user deleted", "user disabled", "password changed", "password demanded"]
)
async def test_credentials_that_die_are_retried_slowly(
    server: Controller, log: Lines, what: str
) -> None:
    """While an ordinary outage is tried again a dozen times, refused credentials are not tried once
    more; each connection says so in one line, publishes are certainly not sent, and the password is
    in no text."""
    await let_in(server, "+@all", "allchannels")
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy(server.port))
        outage = await stack.enter_async_context(Proxy(server.port))
        url = proxy.url if what == "password demanded" else as_app(proxy.url)
        bus, seen, gaps = listener(url, publish_timeout=0.2)
        other, _, _ = listener(outage.url)
        await stack.enter_async_context(bus)
        await stack.enter_async_context(other)
        await bus.publish(Note(to="a", n=1))
        await seen.reach(1)
        await take_away(server, what)
        proxy.cut()
        async with asyncio.timeout(20):
            while len(refusals(log)) < 2:
                await checkpoint()
        tried = len(proxy.pairs)
        outage.retarget(1)
        outage.cut()
        async with asyncio.timeout(40):
            while len(outage.pairs) < 2 + 12:
                await checkpoint()
        with pytest.raises(BusUnavailable) as caught:
            await soon(bus.publish(Note(to="a", n=2)))
        health = bus.health()

        assert len(proxy.pairs) == tried
        assert sorted(line.split()[0] for line in refusals(log)) == ["publisher", "subscriber"]
        assert (health.state, bool(health)) == ("down", False)
        assert any(text in str(health.reason) for text in REFUSALS)
        assert not gaps
        told = [*log.lines, str(caught.value), repr(caught.value), repr(bus), str(health.reason)]
        assert PASSWORD not in "\n".join(told)


@pytest.mark.timeout(120)
@pytest.mark.long  # refused credentials are tried every 30 s
@pytest.mark.scenario(22)
async def test_credentials_that_are_good_again_are_found(server: Controller, log: Lines) -> None:
    """A user that is deleted and made again is tried within the slow interval: the bus is live, the
    gap is told, messages flow."""
    await let_in(server, "+@all", "allchannels")
    bus, seen, gaps = listener(as_app(server.url))
    async with bus:
        await take_away(server, "user deleted")
        await log.hear(REFUSALS[0])
        await let_in(server, "+@all", "allchannels")
        async with asyncio.timeout(60):
            while not gaps:
                await checkpoint()
        await publish_until(bus, lambda: len(seen) > 0)

        assert bus.health().state == "live"
        assert bus.stats().reconnects == 1


# -- Patterns --------------------------------------------------------------------------------------

MANY = [f"area{n}:*" for n in range(20)]
FORBIDDEN = MANY[7]
PERMITTED = [pattern for pattern in MANY if pattern != FORBIDDEN]


class Word(Event):
    text: str


def many(url: str, **settings: object) -> tuple[EventBus, Seen[str]]:
    """A bus with twenty handlers, and the channels on which they heard something."""
    bus = EventBus(url, heartbeat=HEARTBEAT, **settings)  # type: ignore[arg-type]
    seen: Seen[str] = Seen()
    for pattern in MANY:

        async def hear(event: Word, message: Message[Word]) -> None:
            seen.append(message.channel)

        bus.on(pattern)(hear)
    return bus, seen


@pytest.mark.scenario(23)
async def test_one_denied_pattern_of_twenty_hurts_only_itself(
    server: Controller, log: Lines
) -> None:
    """With on_denied="degrade" nineteen of twenty patterns are live at the start and after each
    reconnect, and health names the twentieth; the answers are not mixed up."""
    await let_in(server, "+@all", "resetchannels", PROBE, *(f"&{name}" for name in PERMITTED))
    bus, seen = many(as_app(server.url), on_denied="degrade")
    channels = [pattern.replace("*", "1") for pattern in PERMITTED]
    async with bus, EventBus(server.url) as other:
        for connection in range(1, 4):
            assert bus.health().denied == (FORBIDDEN,)
            assert sorted(bus.health().subscriptions) == sorted(PERMITTED)
            assert bus.health()
            assert (await other.publish("area7:1", Word(text=""))).receivers == 0
            for channel in channels:
                await other.publish(channel, Word(text=""))
            await seen.reach(len(channels) * connection)
            await server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            async with asyncio.timeout(20):
                while bus.stats().reconnects < connection or not bus.health().denied:
                    await checkpoint()

    assert sorted(seen) == sorted(channels * 3)


@pytest.mark.scenario(23)
async def test_a_start_names_every_denied_pattern(server: Controller) -> None:
    """Of twenty patterns those that are denied are named in one PermissionDenied at the start, and
    nothing of the bus stays at the server."""
    await let_in(server, "+@all", "resetchannels", PROBE, *(f"&{name}" for name in PERMITTED[:-1]))
    bus, _ = many(as_app(server.url))

    with pytest.raises(PermissionDenied) as caught:
        await bus.start()

    assert set(caught.value.patterns) == {FORBIDDEN, PERMITTED[-1]}
    assert PASSWORD not in str(caught.value) + repr(caught.value)
    async with asyncio.timeout(10):
        while await server.clients():
            await checkpoint()


@pytest.mark.scenario(23, 24)
@pytest.mark.parametrize("on_denied", ["raise", "degrade"])
@pytest.mark.parametrize("probe", [True, False], ids=["with a probe", "without a probe"])
async def test_rules_that_are_narrowed_live_end_only_what_they_forbid(
    server: Controller, on_denied: str, probe: bool
) -> None:
    """Redis closes the connection of a subscriber whose rules are narrowed: the bus comes back with
    what is still permitted, health names the rest, and publishing there is denied too."""
    await let_in(server, "+@all", "allchannels")
    bus, seen = many(as_app(server.url), on_denied=on_denied)
    async with bus, EventBus(server.url) as other:
        assert bus.health().state == "live"
        rules = [f"&{name}" for name in PERMITTED] + [PROBE] * probe
        await server.acl("app", "resetchannels", *rules)
        async with asyncio.timeout(20):
            while not (bus.stats().reconnects and bus.health().denied):
                await checkpoint()
        await other.publish("area7:1", Word(text=""))
        for pattern in PERMITTED:
            await other.publish(pattern.replace("*", "1"), Word(text=""))
        await seen.reach(len(PERMITTED))
        health = bus.health()
        with pytest.raises(PermissionDenied) as caught:
            await bus.publish("area7:1", Word(text=""))

        assert (health.state, health.denied, bool(health)) == ("degraded", (FORBIDDEN,), True)
        assert caught.value.channel == "area7:1"
        assert "area7:1" not in seen


@pytest.mark.timeout(120)
@pytest.mark.long  # what was denied is asked for again every 30 s
@pytest.mark.scenario(23, 24)
async def test_rules_that_are_widened_live_are_found(server: Controller) -> None:
    """A pattern that was denied goes live within the slow interval after its rule was added, and
    nothing reconnects for it."""
    await let_in(server, "+@all", "resetchannels", PROBE, *(f"&{name}" for name in PERMITTED))
    bus, seen = many(as_app(server.url), on_denied="degrade")
    async with bus, EventBus(server.url) as other:
        await server.acl("app", f"&{FORBIDDEN}")
        async with asyncio.timeout(60):
            while bus.health().denied:
                await checkpoint()
        await other.publish("area7:1", Word(text=""))
        await seen.reach(1)

        assert bus.health().state == "live"
        assert bus.stats().reconnects == 0


# -- Publishing and liveness -----------------------------------------------------------------------


@pytest.mark.scenario(25)
@pytest.mark.parametrize(
    "rules, probe",
    [
        pytest.param([*MINIMUM, "&note:*", PROBE], "ok", id="no +ping"),
        pytest.param([*MINIMUM, "&note:*"], "denied", id="no +ping and no probe"),
        pytest.param(
            ["-@all", "+ping", "+psubscribe", "+punsubscribe", "&note:*"],
            "denied",
            id="a mere listener",
        ),
    ],
)
async def test_liveness_needs_no_right(
    server: Controller, log: Lines, rules: list[str], probe: str
) -> None:
    """Without the right to PING, to the probe, or to publish at all, a refusal is a sign of life:
    the bus does not reconnect while the server lives, and notices when it freezes."""
    await let_in(server, *rules)
    bus, seen, gaps = listener(as_app(server.url))
    async with bus, EventBus(server.url, heartbeat=HEARTBEAT) as other:
        beats = Beats(other)
        async with asyncio.timeout(20):
            while bus.health().probe != probe or beats.count() < 5:
                await checkpoint()
        await other.publish(Note(to="a", n=1))
        await seen.reach(1)
        health = bus.health()
        before = [line for line in log.lines if "reconnecting" in line]
        server.freeze()
        await log.hear("no byte for a heartbeat", 4 * HEARTBEAT + 10)
        server.thaw()
        await soon(gaps.reach(1), 15)

        assert not before
        assert bool(health)
        assert health.state == ("live" if probe == "ok" else "degraded")
        assert probe == "ok" or "probe" in str(health.reason)


class Beats:
    """How often a bus beside the one under test has heard its own probe: a clock that stands still
    when the machine does."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._count = 0
        self._last: float | None = None

    def count(self) -> int:
        """The number so far; to be asked again and again."""
        now = self._bus.health().round_trip
        self._count += now != self._last
        self._last = now
        return self._count


@pytest.mark.scenario(25)
async def test_a_listener_that_may_not_publish(server: Controller) -> None:
    """Each publish of a user without +publish is a PermissionDenied with channel and user, alone or
    among many, and what it subscribes to arrives."""
    await let_in(server, "-@all", "+ping", "+psubscribe", "+punsubscribe", "&note:*")
    bus, seen, gaps = listener(as_app(server.url))
    async with bus, EventBus(server.url) as other:
        publishes = [bus.publish(Note(to=str(n), n=n)) for n in range(50)]
        errors = await asyncio.gather(*publishes, return_exceptions=True)
        await other.publish(Note(to="a", n=-1))
        await seen.reach(1)

        denied = [error for error in errors if isinstance(error, PermissionDenied)]
        assert [error.channel for error in denied] == [f"note:{n}" for n in range(50)]
        assert {error.user for error in denied} == {"app"}
        assert bus.stats().refused == 50
        assert not gaps
