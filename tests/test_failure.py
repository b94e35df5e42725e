"""What goes wrong underneath: servers that die, freeze, refuse; loops that block; calls cut short.

Each test has a server of its own. Waits are for what the bus says: gaps, log lines, answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import (
    Buffer,
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    Gap,
    InvalidEvent,
    PermissionDenied,
    PublishUncertain,
)
from eventbus.server import Server
from tests.helpers import Lines, Seen, soon

HEARTBEAT = 0.3


class Note(Event, channel="note:{to}"):
    to: str
    n: int


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that this test may kill."""
    with Server() as server:
        yield server


def listener(url: str, **settings: Any) -> tuple[EventBus, Seen[int], Seen[Gap]]:
    """A bus that notes what arrives on `note:*`, and its gaps."""
    bus = EventBus(url, **{"heartbeat": HEARTBEAT, **settings})
    seen: Seen[int] = Seen()
    gaps: Seen[Gap] = Seen()

    @bus.on("note:*")
    async def keep(event: Note) -> None:
        seen.append(event.n)

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    return bus, seen, gaps


async def publish_until(
    bus: EventBus, done: Callable[[], bool], seconds: float = 15.0
) -> list[str]:
    """Publish one note after another until `done`; returns the names of the outcomes."""
    outcomes = []
    async with asyncio.timeout(seconds):
        while not done():
            try:
                await bus.publish(Note(to="a", n=len(outcomes)))
            except (BusUnavailable, PublishUncertain) as error:
                outcomes.append(type(error).__name__)
                await checkpoint()
            else:
                outcomes.append("ok")
    return outcomes


# -- Servers that die ------------------------------------------------------------------------------


@pytest.mark.scenario(1)
async def test_a_killed_server_is_noticed_reported_and_survived(server: Server) -> None:
    """After kill -9 and a restart every on_gap handler hears of it once, and messages flow
    again."""
    bus, seen, gaps = listener(server.url)
    async with bus:
        await bus.publish(Note(to="a", n=1))
        await seen.reach(1)
        server.kill()
        server.start()
        [gap] = await soon(gaps.reach(1), 15)
        assert (gap.reason, gap.missed, gap.handler) == ("reconnect", None, None)
        await publish_until(bus, lambda: len(seen) > 1)

        assert bus.stats().reconnects == 1
        assert [g.reason for g in gaps].count("reconnect") == 1
        assert bus.health().state in ("live", "degraded")


async def test_every_gap_handler_hears_of_a_reconnect(server: Server) -> None:
    """A handler for channels that nobody used hears of a reconnect as well, since it may concern
    it."""
    bus, _, gaps = listener(server.url)
    other: Seen[Gap] = Seen()

    @bus.on_gap("cache:*")
    def in_a_thread(gap: Gap) -> None:
        loop.call_soon_threadsafe(other.append, gap)

    loop = asyncio.get_running_loop()
    async with bus:
        server.kill()
        server.start()
        await soon(gaps.reach(1), 15)
        await soon(other.reach(1), 15)

        assert len(other) == 1


@pytest.mark.scenario(12)
async def test_losses_of_an_outage_are_counted_by_sequence(server: Server) -> None:
    """What a publisher sent while the subscriber was away is reported as missed, with the
    number."""
    bus, seen, gaps = listener(server.url)
    async with bus, EventBus(server.url) as other:
        await other.publish(Note(to="a", n=0))
        await seen.reach(1)
        redis = other.redis()
        lost = 0

        async def cut() -> None:
            nonlocal lost
            await redis.client_kill_filter(_type="pubsub")
            while bus.stats().reconnects == 0:
                receipt = await other.publish(Note(to="a", n=1))
                lost += not receipt.receivers

        await soon(cut(), 15)
        await publish_until(other, lambda: len(seen) > 1)
        await bus.publish(Note(to="b", n=2))

        assert sum(g.missed or 0 for g in gaps if g.reason == "sequence") == lost
        assert bus.stats().missed == lost


@pytest.mark.scenario(2)
async def test_a_server_that_is_away_at_start_is_waited_for(server: Server) -> None:
    """A bus that starts before its server goes live when the server comes."""
    server.stop()
    bus, seen, _ = listener(server.url, connect_timeout=20.0)
    starting = asyncio.create_task(bus.start())
    await asyncio.wait({starting}, timeout=0.2)
    assert not starting.done()
    assert bus.health().state == "starting"

    server.start()
    await soon(starting, 15)
    await bus.publish(Note(to="a", n=1))
    await seen.reach(1)
    await bus.stop()


async def test_a_start_without_a_server_says_where_it_tried(server: Server) -> None:
    """BusUnavailable after connect_timeout names the address and what to do, and leaves no task."""
    server.stop()
    bus = EventBus(server.url, connect_timeout=0.3)
    before = asyncio.all_tasks()

    with pytest.raises(BusUnavailable) as caught:
        await bus.start()

    assert server.url in str(caught.value)
    assert "EVENTBUS_URL" in str(caught.value)
    assert caught.value.waited == 0.3
    assert asyncio.all_tasks() == before
    assert bus.health().state == "closed"


# -- Servers that freeze ---------------------------------------------------------------------------


@pytest.mark.scenario(5)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_frozen_server_is_noticed(server: Server, log: Lines, busy: bool) -> None:
    """A server that stops answering is given up within two heartbeats, idle or under load, and no
    message arrives twice when it wakes."""
    bus, seen, gaps = listener(server.url, publish_timeout=0.5)
    async with bus:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        stop = asyncio.Event()

        async def load() -> list[str]:
            return await publish_until(bus, stop.is_set, 30)

        loading = asyncio.create_task(load()) if busy else None
        if busy:
            await seen.reach(20)
        server.freeze()
        await log.hear("no byte for a heartbeat", 4 * HEARTBEAT + 5)
        down = bus.health()
        server.thaw()
        await soon(gaps.reach(1), 15)
        stop.set()
        if loading is not None:
            outcomes = await loading
            assert "PublishUncertain" in outcomes
        await publish_until(bus, lambda: bus.stats().received > 20 * busy + 1)

        assert not down
        assert down.state == "down"
        numbers = [n for n in seen if n >= 0]
        assert len(numbers) == len(set(numbers)) or not busy


@pytest.mark.scenario(5)
async def test_without_a_heartbeat_a_frozen_server_is_not_noticed(
    server: Server, log: Lines
) -> None:
    """The negative control: with heartbeat=None nothing is said while the server is frozen."""
    bus, _, _ = listener(server.url)
    deaf = EventBus(server.url, heartbeat=None)
    async with bus, deaf:
        server.freeze()
        await log.hear("no byte for a heartbeat", 10)

        assert deaf.health().state == "live"
        server.thaw()


async def test_a_blocked_loop_does_not_reconnect(server: Server, log: Lines) -> None:
    """A loop that was blocked for longer than the deadline finds its connections alive."""
    bus, seen, gaps = listener(server.url)
    async with bus:
        await bus.publish(Note(to="a", n=1))
        await seen.reach(1)
        for _ in range(3):
            until = monotonic() + 4 * HEARTBEAT
            while monotonic() < until:
                pass  # the loop is blocked; this is the point
            await bus.publish(Note(to="a", n=2))
        await seen.reach(4)

        assert bus.stats().reconnects == 0
        assert not gaps
        assert not [line for line in log.lines if "reconnect" in line]


# -- Refusals --------------------------------------------------------------------------------------


async def acl(server: Server, *rules: str) -> None:
    """Make the user `app` with these rules."""
    async with EventBus(server.url) as bus:
        await bus.redis().execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)


def app_url(server: Server, password: str = "secret") -> str:
    """The URL of the user `app`."""
    return server.url.replace("unix://", f"unix://app:{password}@")


@pytest.mark.scenario(23)
async def test_one_denied_pattern_names_itself_at_start(server: Server) -> None:
    """A start with one denied pattern of three raises PermissionDenied with it, and closes."""
    await acl(server, "+@all", "resetchannels", "&note:*", "&ok:*", "&__eventbus__:*")
    bus, _, _ = listener(app_url(server))

    @bus.on("ok:*")
    async def ok(event: dict) -> None: ...

    @bus.on("secret:*")
    async def denied(event: dict) -> None: ...

    with pytest.raises(PermissionDenied) as caught:
        await bus.start()

    assert caught.value.patterns == ("secret:*",)
    assert caught.value.user == "app"
    assert "secret:*" in str(caught.value)
    assert bus.health().state == "closed"


@pytest.mark.scenario(23)
async def test_one_denied_pattern_hurts_only_itself(server: Server) -> None:
    """With on_denied="degrade" the other patterns are live, before and after a reconnect, and the
    denied one goes live when the rule is widened."""
    await acl(server, "+@all", "resetchannels", "&note:*", "&ok:*", "&__eventbus__:*")
    bus, seen, gaps = listener(app_url(server), on_denied="degrade")
    late: Seen[Any] = Seen()

    @bus.on("secret:*")
    async def denied(event: dict) -> None:
        late.append(event)

    async with bus, EventBus(server.url) as admin:
        health = bus.health()
        assert health
        assert (health.state, health.denied) == ("degraded", ("secret:*",))
        await admin.publish("note:1", Note(to="1", n=1))
        await seen.reach(1)

        await admin.redis().client_kill_filter(_type="pubsub")
        await soon(gaps.reach(1), 15)
        await admin.publish("note:1", Note(to="1", n=2))
        await seen.reach(2)
        assert bus.health().denied == ("secret:*",)

        await admin.redis().execute_command("ACL", "SETUSER", "app", "&secret:*")
        await admin.redis().client_kill_filter(_type="pubsub")
        await soon(gaps.reach(2), 15)
        await publish_secret(admin, late)
        assert bus.health().denied == ()


async def publish_secret(admin: EventBus, late: Seen[Any]) -> None:
    """Publish on the denied channel until it arrives."""
    async with asyncio.timeout(10):
        while not late:
            await admin.publish("secret:1", Note(to="1", n=3))


@pytest.mark.scenario(23)
async def test_attaching_a_denied_pattern_changes_nothing(server: Server) -> None:
    """attach raises PermissionDenied for a denied pattern; what is live stays, the bus goes on."""
    await acl(server, "+@all", "resetchannels", "&note:*", "&__eventbus__:*")
    bus, seen, _ = listener(app_url(server))

    async def handler(event: dict) -> None: ...

    async with bus:
        with pytest.raises(PermissionDenied):
            await bus.attach(handler, "n*")
        await bus.publish(Note(to="a", n=1))
        await seen.reach(1)

        assert bus.stats().handlers.keys() == {"keep"}
        assert bus.health().subscriptions == ("note:*",)


@pytest.mark.scenario(25)
async def test_a_denied_publish_is_typed(server: Server) -> None:
    """Publishing where the ACL forbids raises PermissionDenied with channel and user."""
    await acl(server, "+@all", "resetchannels", "&note:*", "&__eventbus__:*")
    async with EventBus(app_url(server)) as bus:
        with pytest.raises(PermissionDenied) as caught:
            await bus.publish("other:1", Note(to="a", n=1))

        assert (caught.value.channel, caught.value.user) == ("other:1", "app")


@pytest.mark.scenario(25)
async def test_without_permission_for_the_probe_the_bus_is_degraded_and_alive(
    server: Server, log: Lines
) -> None:
    """When the probe channel is denied, PING alone proves life, health says so, and nothing
    reconnects."""
    await acl(server, "+@all", "resetchannels", "&note:*")
    bus, seen, gaps = listener(app_url(server))
    async with bus:
        for n in range(4):
            ages = bus.health().last_received_age
            assert ages is not None
            await soon(beat(bus), 5)
            await bus.publish(Note(to="a", n=n))
        await seen.reach(4)

        health = bus.health()
        assert (health.state, health.probe) == ("degraded", "denied")
        assert health
        assert not gaps
        assert bus.stats().reconnects == 0


async def beat(bus: EventBus) -> None:
    """Return when the bus has heard a byte again after a pause."""
    loop = asyncio.get_running_loop()
    due: asyncio.Future[None] = loop.create_future()
    loop.call_later(HEARTBEAT * 1.2, due.set_result, None)
    await due


@pytest.mark.parametrize("password", ["wrong", ""])
@pytest.mark.scenario(22)
async def test_wrong_credentials_fail_at_once(server: Server, password: str) -> None:
    """A wrong or missing password raises PermissionDenied at start, long before connect_timeout,
    and the password is in no text."""
    await acl(server, "+@all", "allchannels")
    async with EventBus(server.url) as admin:
        await admin.redis().execute_command("CONFIG", "SET", "requirepass", "s3cret")
    url = app_url(server, password) if password else server.url
    bus = EventBus(url, connect_timeout=60)

    with pytest.raises(PermissionDenied) as caught:
        await soon(bus.start(), 10)

    assert caught.value.user == ("app" if password else "default")
    assert "wrong" not in str(caught.value)
    assert "wrong" not in repr(bus)


# -- Outage policies -------------------------------------------------------------------------------


async def down(bus: EventBus, server: Server, log: Lines) -> None:
    """Take the server away, and return when the publisher knows."""
    server.kill()
    await log.hear("publisher")


@pytest.mark.scenario(1)
async def test_by_default_a_publish_during_an_outage_fails_for_certain(
    server: Server, log: Lines
) -> None:
    """outage="fail": BusUnavailable within the deadline, counted as refused, and never sent
    later."""
    bus, seen, gaps = listener(server.url, publish_timeout=0.3)
    async with bus:
        await down(bus, server, log)
        with pytest.raises(BusUnavailable) as caught:
            await bus.publish(Note(to="a", n=-5))
        assert caught.value.channel == "note:a"
        assert caught.value.waited < 5
        server.start()
        await soon(gaps.reach(1), 15)
        await publish_until(bus, lambda: len(seen) > 0)

        assert bus.stats().refused >= 1
        assert -5 not in seen


async def test_in_a_long_outage_a_publish_is_refused_at_once_and_says_why(
    server: Server, log: Lines
) -> None:
    """Away for longer than a publish waits, the next one is refused with how long that is, and not
    with a time in which nothing was tried."""
    bus, _, _ = listener(server.url, publish_timeout=0.3)
    async with bus:
        await down(bus, server, log)
        said = set[str]()
        async with asyncio.timeout(15):
            while len(said) < 2:
                with pytest.raises(BusUnavailable) as caught:
                    await bus.publish(Note(to="a", n=1))
                about = re.sub(r"\d+\.\d", "N", str(caught.value).split("): ")[1])
                said.add(about)
    assert said == {
        "after N s the message is given up; certainly not sent",
        "for N s now, so the message is refused at once; certainly not sent",
    }


async def test_drop_drops_and_counts(server: Server, log: Lines) -> None:
    """outage="drop": a publish returns without receivers, and is counted as refused."""
    bus, _, _ = listener(server.url, outage="drop")
    async with bus:
        await down(bus, server, log)
        receipts = [await bus.publish(Note(to="a", n=n)) for n in range(3)]

        assert [receipt.receivers for receipt in receipts] == [None] * 3
        assert bus.stats().refused == 3


async def test_a_buffer_is_sent_first_and_in_order(server: Server, log: Lines) -> None:
    """outage=Buffer: what was published meanwhile arrives after the outage, in order, before what
    comes later, also at the bus that kept it; beyond max_events the oldest was dropped."""
    bus, seen, _ = listener(server.url, outage=Buffer(max_events=3), publish_timeout=5.0)
    async with bus:
        await down(bus, server, log)
        for n in range(5):
            receipt = await bus.publish(Note(to="a", n=n))
            assert receipt.receivers is None
        server.start()
        await seen.reach(3)
        await bus.publish(Note(to="a", n=5))
        await seen.reach(4)

        assert seen == [2, 3, 4, 5]
        stats = bus.stats()
        assert (stats.published, stats.refused, stats.uncertain) == (4, 2, 0)


async def test_a_buffer_of_the_latest_keeps_one_per_channel(server: Server, log: Lines) -> None:
    """Buffer(latest=True): of many messages for one channel the newest is sent, the others count as
    conflated."""
    bus, seen, _ = listener(server.url, outage=Buffer(latest=True), publish_timeout=5.0)
    async with bus:
        await down(bus, server, log)
        for n in range(10):
            await bus.publish(Note(to="a", n=n))
            await bus.publish(Note(to="b", n=10 + n))
        server.start()
        await seen.reach(2)

        assert seen == [9, 19]
        assert (bus.stats().conflated, bus.stats().published) == (18, 2)


async def test_an_old_buffered_event_expires(server: Server, log: Lines) -> None:
    """What is older than max_age is dropped, counted as refused, and not sent."""
    bus, _, _ = listener(server.url, outage=Buffer(max_age=0.2))
    failed: Seen[Any] = Seen()

    @bus.exception_handler(BusUnavailable)
    async def note(error: BusUnavailable, message: Any) -> None:
        failed.append(error)

    async with bus:
        await down(bus, server, log)
        bus.publish_nowait(Note(to="a", n=1))
        await failed.reach(1)

        assert bus.stats().refused == 1
        assert bus.stats().publish_failed == 1


# -- Slow handlers ---------------------------------------------------------------------------------


@pytest.mark.scenario(26)
async def test_a_slow_handler_hurts_only_itself(server: Server) -> None:
    """Ten times what its queue takes: the slow handler's drops are counted and reported exactly,
    and another handler gets everything."""
    bus, seen, gaps = listener(server.url)
    free = asyncio.Event()

    @bus.on("note:*", max_queue=50)
    async def slow(event: Note) -> None:
        await free.wait()

    async with bus:
        for n in range(500):
            await bus.publish(Note(to="a", n=n))
        await seen.reach(500)
        stats = bus.stats().handlers["slow"]
        free.set()
        while bus.stats().handlers["slow"].depth:
            await checkpoint()

        assert list(seen) == list(range(500))
        assert stats.dropped == 449
        assert stats.depth == 50
    told = [gap for gap in gaps if gap.reason == "overflow"]
    assert sum(gap.missed or 0 for gap in told) == 449
    assert {(gap.handler, gap.pattern) for gap in told} == {("slow", "note:*")}


# -- Calls that are cut short ----------------------------------------------------------------------


async def test_a_publish_that_is_cancelled_before_the_write_is_not_sent(server: Server) -> None:
    """Cancelled before its bytes went out, a message is never sent; the next one is."""
    bus, seen, _ = listener(server.url)
    async with bus:
        task = asyncio.create_task(bus.publish(Note(to="a", n=1)))
        await checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bus.publish(Note(to="a", n=2))
        await seen.reach(1)

        assert seen == [2]


async def connections(server: Server) -> int:
    """How many clients the server has, this question's own not counted."""
    async with EventBus(server.url, heartbeat=None) as bus:
        return len(await bus.redis().client_list()) - 3


async def test_a_cancelled_start_leaves_nothing_behind(server: Server) -> None:
    """A start that is cancelled at any step leaves no task and no connection, and the bus can start
    again."""
    bus, seen, _ = listener(server.url)
    tasks = asyncio.all_tasks()
    for steps in range(40):
        starting = asyncio.create_task(bus.start())
        for _ in range(steps):
            await checkpoint()
        starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            pass
        else:
            await bus.stop()
    assert asyncio.all_tasks() == tasks
    async with bus:
        await bus.publish(Note(to="a", n=1))
        await seen.reach(1)
    assert await connections(server) == 0


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_stop_still_closes_everything(server: Server, how: str) -> None:
    """A stop that is cancelled while a handler hangs cancels the handler, closes all, and
    raises."""
    bus = EventBus(server.url)
    entered = asyncio.Event()

    @bus.on("note:*")
    async def hang(event: Note) -> None:
        entered.set()
        await asyncio.Event().wait()

    tasks = asyncio.all_tasks()
    await bus.start()
    await bus.publish(Note(to="a", n=1))
    await soon(entered.wait())
    if how == "task":
        stopping = asyncio.create_task(bus.stop())
        for _ in range(5):
            await checkpoint()
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(stopping)
    else:
        with anyio.move_on_after(0.1) as scope:
            async with asyncio.timeout(8):
                await bus.stop()
        assert scope.cancelled_caught or bus.health().state == "closed"

    assert bus.health().state == "closed"
    assert asyncio.all_tasks() == tasks
    assert await connections(server) == 0


async def test_a_stop_during_an_outage_ends(server: Server, log: Lines) -> None:
    """Stopping while Redis is away does not hang."""
    bus, _, _ = listener(server.url, drain_timeout=1.0)
    await bus.start()
    await down(bus, server, log)
    await soon(bus.stop(), 8)

    with pytest.raises(BusClosed):
        await bus.publish(Note(to="a", n=1))


async def test_one_bad_message_hurts_only_itself(server: Server) -> None:
    """Payloads that are no events are each reported once, and the good one after them arrives."""
    bus, seen, _ = listener(server.url)
    errors: Seen[InvalidEvent] = Seen()

    @bus.exception_handler(InvalidEvent)
    async def invalid(error: InvalidEvent, message: Any) -> None:
        errors.append(error)

    bad = [b"", b"nope", b"\xff\xfe", b"[]", b"null", b"{" * 5000, b'{"specversion":"1.0"}']
    async with bus:
        for payload in bad:
            await bus.publish_raw("note:1", payload)
        await bus.publish(Note(to="1", n=1))
        await seen.reach(1)
        await errors.reach(len(bad))

        assert bus.stats().invalid == len(bad)
        assert bus.stats().failed == 0


def test_server_files_are_in_the_test_folder(tmp_path: Path) -> None:
    """A server of a test keeps its socket in a folder that goes with it."""
    with Server(tmp_path / "s") as server:
        assert server.socket_path is not None
    assert not Path(server.socket_path).exists()


@pytest.mark.parametrize("raw", [False, True], ids=["publish", "publish_raw"])
@pytest.mark.parametrize("outage", ["fail", "drop", Buffer(max_events=10)], ids=str)
async def test_a_publisher_that_tries_again_lets_the_loop_run(
    server: Server, outage: Any, raw: bool
) -> None:
    """Who publishes again and again while Redis is away does not keep other tasks waiting."""
    settings: dict[str, Any] = {"publish_timeout": 0.2, "heartbeat": None, "outage": outage}
    async with EventBus(server.url, **settings) as bus:

        async def publish() -> None:
            with contextlib.suppress(BusUnavailable, PublishUncertain):
                await (bus.publish_raw("x", b"") if raw else bus.publish(Note(to="a", n=1)))

        server.kill()
        while bus.health():
            await checkpoint()
        await publish()
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        task = asyncio.create_task(other())
        for _ in range(1_000):
            await publish()
        task.cancel()
        assert turns > 10
