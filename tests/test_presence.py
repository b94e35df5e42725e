"""Presence: sessions in Redis, events on the bus, and what happens when nodes or Redis go away."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from redis.asyncio import Redis

from eventbus import (
    BusUnavailable,
    EventBus,
    EventBusError,
    InvalidChannel,
    Message,
    PayloadTooLarge,
    PermissionDenied,
)
from eventbus.presence import Presence, UserOffline, UserOnline, View
from eventbus.roster import Picture
from eventbus.server import Server
from tests.faults.proxy import Proxy
from tests.helpers import LIMIT, Lines, Seen, soon

NODE = Path(__file__).parent / "presence" / "node.py"
Change = tuple[str, bool]


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may kill and freeze."""
    with Server(port=0) as server:
        yield server


@asynccontextmanager
async def node(
    url: Any, *, ttl: float = 10.0, linger: float = 0.2, **settings: Any
) -> AsyncIterator[tuple[Presence, Seen[Change]]]:
    """A node, and every change of presence that its bus heard, in order."""
    bus = EventBus(url, **{"heartbeat": 0.5, **settings})
    presence = Presence(bus, ttl=ttl, linger=linger)
    seen: Seen[Change] = Seen()

    @bus.on("presence:{user}")
    async def keep(event: UserOnline | UserOffline, user: str) -> None:
        assert event.user == user
        seen.append((user, isinstance(event, UserOnline)))

    async with bus, presence:
        yield presence, seen


async def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Let others run until it is so. TimeoutError after the limit."""
    async with asyncio.timeout(seconds):
        while not true():
            await checkpoint()


async def until_listed(presence: Presence, users: list[str], seconds: float = 30.0) -> None:
    """Ask until exactly these are online. TimeoutError after the limit."""
    listed = None
    async with asyncio.timeout(seconds):
        while listed != users:
            await checkpoint()
            with suppress(BusUnavailable):
                listed = await presence.list()


async def past_linger(presence: Presence, seen: Seen[Change]) -> None:
    """Return when whoever lingers now would have been told; what is seen of this is taken out."""
    async with presence.track("marker"):
        pass
    await until(lambda: ("marker", False) in seen)
    for came in (True, False):
        seen.remove(("marker", came))


async def track_all(stack: AsyncExitStack, presence: Presence, users: list[str]) -> None:
    """Be all of them."""
    await asyncio.gather(*(stack.enter_async_context(presence.track(user)) for user in users))


# -- Sessions --------------------------------------------------------------------------------------


async def test_the_first_comes_and_the_last_goes(server_url: str) -> None:
    """Two devices on two nodes are one user: one event when the first comes, one when both went."""
    async with (
        node(server_url, namespace="first") as (one, seen),
        node(server_url, namespace="first") as (two, _),
    ):
        async with one.track("ana", meta={"device": "phöne/1"}) as mine:
            assert await two.list() == ["ana"]
            async with two.track("ana"):
                sessions = await one.get("ana")
                assert sessions[0] == mine
                assert [dict(session.meta) for session in sessions] == [{"device": "phöne/1"}, {}]
                assert len({session.node for session in sessions}) == 2
            assert await two.get("ana") == (mine,)
            await past_linger(one, seen)
            assert seen == [("ana", True)]
        assert await two.get("ana") == ()
        assert await two.list() == []

        assert await seen.reach(2) == [("ana", True), ("ana", False)]


async def test_events_are_typed_messages_with_the_servers_time(valkey: Server) -> None:
    """An event is a whole CloudEvent: its meta, a number as its id, and the time of Redis."""
    async with EventBus(valkey.url, namespace="typed") as bus:
        presence = Presence(bus)
        async with (
            presence,
            bus.subscribe(UserOnline) as messages,
            presence.track("ü.1", meta={"a": [1]}),
        ):
            message: Message[UserOnline] = await soon(anext(messages))
            sessions = await presence.get("ü.1")

    assert message.event == UserOnline(user="ü.1", meta={"a": [1]})
    assert message.channel == "presence:ü.1"
    assert message.id == "1"
    assert message.time is not None
    assert abs((message.time - sessions[0].since).total_seconds()) < LIMIT


async def test_a_quick_reconnect_does_not_flicker(server_url: str) -> None:
    """A user who is back before `linger` is over, on any node, was never offline."""
    async with (
        node(server_url, namespace="flick", linger=2.0) as (one, seen),
        node(server_url, namespace="flick", linger=2.0) as (two, _),
    ):
        for presence in (one, two, one):
            async with presence.track("ana"):
                pass
        assert await one.list() == []  # the sessions are the truth, only the news lingers
        async with two.track("ana"):
            await past_linger(one, seen)
            assert seen == [("ana", True)]


async def test_the_last_node_that_leaves_says_who_went(server_url: str) -> None:
    """Nobody lingers when no node is left that could say so."""
    async with EventBus(server_url, namespace="last") as bus:
        presence = Presence(bus, linger=1000)
        async with bus.subscribe("presence:*", UserOffline) as messages:
            async with presence:
                stack = AsyncExitStack()
                await stack.enter_async_context(presence.track("open"))
                async with presence.track("lingers"):
                    pass
            gone = [(await soon(anext(messages))).event.user for _ in range(2)]
            assert await presence.list() == []
            await stack.aclose()

    assert sorted(gone) == ["lingers", "open"]


async def test_events_alternate_in_the_order_of_the_changes(valkey: Server) -> None:
    """However two nodes race for a user, an online is always followed by an offline."""
    async with (
        node(valkey.url, namespace="race", linger=0) as (one, seen),
        node(valkey.url, namespace="race", linger=0) as (two, _),
    ):

        async def come_and_go(presence: Presence) -> None:
            for _ in range(100):
                async with presence.track("ana"):
                    await checkpoint()

        await asyncio.gather(*(come_and_go(presence) for presence in (one, two, one)))
        await until(lambda: seen and not seen[-1][1])

    assert [came for _, came in seen] == [True, False] * (len(seen) // 2)


async def test_a_cancelled_session_ends(valkey: Server) -> None:
    """Cancelling the task that holds a session takes the session out."""
    async with node(valkey.url, namespace="cancel", linger=0) as (presence, seen):
        inside = asyncio.Event()

        async def hold() -> None:
            async with presence.track("ana"):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(hold())
        await soon(inside.wait())
        task.cancel()
        await asyncio.wait({task})

        assert await presence.get("ana") == ()
        assert await seen.reach(2) == [("ana", True), ("ana", False)]


@pytest.mark.parametrize("user", ["", "a:b", "a\n", "\ud800", "x" * 401])
async def test_a_user_must_fit_into_a_channel(user: str) -> None:
    """A name that would be another channel, or none, is refused before anything happens."""
    presence = Presence(EventBus("memory://names"))
    with pytest.raises(InvalidChannel):
        await presence.track(user).__aenter__()


async def test_meta_is_small_json() -> None:
    """Every reader of a user gets the meta, so it is bounded; and it must be JSON."""
    presence = Presence(EventBus("memory://meta"))
    with pytest.raises(PayloadTooLarge):
        await presence.track("ana", meta={"x": "x" * 20_000}).__aenter__()
    with pytest.raises(ValueError, match="JSON"):
        await presence.track("ana", meta={"x": float("nan")}).__aenter__()


async def test_memory_has_no_state() -> None:
    """On memory:// presence says that it needs a Redis."""
    async with EventBus("memory://presence") as bus:
        presence = Presence(bus)
        with pytest.raises(EventBusError, match="presence keeps its state in Redis"):
            await presence.list()
        with pytest.raises(EventBusError, match="presence keeps its state in Redis"):
            async with presence.track("ana"):
                pass


def test_settings_are_checked() -> None:
    """A ttl of nothing, and a negative linger, are refused."""
    for wrong in ({"ttl": 0.0}, {"linger": -1.0}):
        with pytest.raises(ValueError, match="ttl > 0"):
            Presence(EventBus("memory://x"), **wrong)


async def test_namespaces_are_worlds(valkey: Server) -> None:
    """A user of one namespace is not seen in another, in Redis or on the bus."""
    async with (
        node(valkey.url, namespace="world-1") as (one, seen),
        node(valkey.url, namespace="world-2") as (two, others),
        one.track("ana"),
        two.track("ben"),
    ):
        assert await one.list() == ["ana"]
        assert await two.list() == ["ben"]
        assert await seen.reach(1) == [("ana", True)]
        assert await others.reach(1) == [("ben", True)]


async def test_a_client_that_decodes_by_itself(valkey: Server) -> None:
    """A bus on a client with decode_responses reads the same."""
    client = Redis.from_url(valkey.url, decode_responses=True)
    async with node(client, namespace="decode") as (presence, seen), presence.track("ana"):
        assert await presence.list() == ["ana"]
        async with presence.watch() as view:
            assert list(view) == ["ana"]
        assert await seen.reach(1) == [("ana", True)]
    await client.aclose()


async def test_a_user_whose_events_are_denied(server_url: str) -> None:
    """Without the right to publish on presence:*, entering raises, and nobody is online."""
    async with EventBus(server_url) as admin:
        await admin.redis().execute_command(
            "ACL", "SETUSER", "presence-few", "on", ">few", "~*", "&denied:__eventbus__:*", "+@all"
        )
        async with EventBus(
            server_url.replace("//", "//presence-few:few@"), namespace="denied"
        ) as bus:
            presence = Presence(bus)
            with pytest.raises(PermissionDenied):
                async with presence.track("ana"):
                    pass
            assert await presence.list() == []


async def test_a_heartbeat_is_one_command_of_the_node(private: Server) -> None:
    """A node with 300 users says that it lives in one command that names none of them."""
    async with node(private.url, ttl=1.0) as (presence, _), AsyncExitStack() as stack:
        await track_all(stack, presence, [f"user-{n}" for n in range(300)])
        beats = []
        client = Redis.from_url(private.url)
        async with client.monitor() as monitor:
            while len(beats) < 5:
                command = await soon(monitor.next_command(), 30)
                said = command["command"]
                if command["client_type"] != "lua" and said.split()[0] not in ("PING", "PUBLISH"):
                    beats.append(said)
        await client.aclose()

    assert {beat.split()[0] for beat in beats} == {"EVALSHA"}
    assert all("user-" not in beat for beat in beats)


# -- Views -----------------------------------------------------------------------------------------


async def test_a_view_is_complete_at_once_and_follows(server_url: str) -> None:
    """The picture holds who was there before, and then each change, in order."""
    async with (
        node(server_url, namespace="view", linger=0) as (one, _),
        node(server_url, namespace="view", linger=0) as (two, _),
        one.track("ana"),
        two.watch() as view,
    ):
        assert (list(view), len(view), "ana" in view) == (["ana"], 1, True)
        async with one.track("ben", meta={"x": 1}):
            assert await soon(anext(view)) == UserOnline(user="ben", meta={"x": 1})
            assert list(view) == ["ana", "ben"]
        assert await soon(anext(view)) == UserOffline(user="ben")
        assert (list(view), view.rereads) == (["ana"], 0)


async def test_a_view_that_is_opened_in_the_middle_misses_and_doubles_nothing(
    valkey: Server,
) -> None:
    """Whenever a view is opened under traffic, what it holds and then tells add up to the truth."""
    chance = random.Random(11)
    users = [f"user-{n}" for n in range(20)]
    async with (
        node(valkey.url, namespace="middle", linger=0) as (one, _),
        node(valkey.url, namespace="middle", linger=0) as (two, _),
    ):
        over = False

        async def traffic(presence: Presence) -> None:
            while not over:
                async with presence.track(chance.choice(users)):
                    await checkpoint()

        async def look() -> None:
            async with two.watch() as view:
                online = set(view)
                for _ in range(30):
                    change = await soon(anext(view), 30)
                    came = isinstance(change, UserOnline)
                    assert (change.user in online) is not came
                    (online.add if came else online.remove)(change.user)
                views.append(view)

        views: list[View] = []
        tasks = [asyncio.create_task(traffic(p)) for p in (one, one, one, two, two)]
        for _ in range(10):
            await look()
        over = True
        await asyncio.wait(tasks)
        async with two.watch() as view:
            assert list(view) == await one.list() == []
        assert [view.rereads for view in views] == [0] * 10


@pytest.mark.parametrize("early", [True, False])
async def test_a_view_reads_again_after_a_gap(private: Server, early: bool) -> None:
    """What happened while the subscription was away is in the picture afterwards; also when the
    Presence was made too late to hear of gaps."""
    async with (
        Proxy(private.port) as proxy,
        node(private.url, linger=0) as (one, _),
        EventBus(proxy.url, heartbeat=0.5) as late,
        node(proxy.url, ttl=2.0) as (two, _),
        one.track("stays"),
        (two if early else Presence(late, ttl=2.0)).watch() as view,
    ):
        goes = AsyncExitStack()
        await goes.enter_async_context(one.track("goes"))
        assert await soon(anext(view)) == UserOnline(user="goes")
        proxy.mode = "hole"
        proxy.cut("subscriber")
        await goes.aclose()
        async with one.track("comes"):
            proxy.mode = "pass"
            proxy.cut()
            await until(lambda: set(view) == {"stays", "comes"})
            changes = {(await soon(anext(view))).user for _ in range(2)}

            assert changes == {"goes", "comes"}
            assert view.rereads > 0


async def test_what_others_publish_does_not_change_a_view(valkey: Server) -> None:
    """An event that no change in Redis has made is nobody's coming or going."""
    async with (
        node(valkey.url, namespace="forged") as (presence, seen),
        EventBus(valkey.url, namespace="forged") as other,
        presence.watch() as view,
    ):
        await other.publish(UserOnline(user="ghost"))
        async with presence.track("ana"):
            assert await soon(anext(view)) == UserOnline(user="ana")
            assert await seen.reach(2) == [("ghost", True), ("ana", True)]
            assert (list(view), view.rereads) == (["ana"], 0)


async def test_a_view_counts_the_changes() -> None:
    """What the picture holds already changes nothing; the next change is taken in; a number that is
    missing, and another life of the data, make the view read again; it tells the difference."""
    pictures = [
        Picture("e1", 5, 100.0, frozenset({"ana", "ben"})),
        Picture("e1", 8, 100.0, frozenset({"ana", "dan"})),
        Picture("e2", 1, 100.0, frozenset({"eve"})),
    ]

    async def read() -> Picture:
        return pictures.pop(0)

    def change(epoch: str, number: int, event: UserOnline | UserOffline) -> Message[Any]:
        return Message(event, "presence:x", source=f"presence/{epoch}", id=str(number))

    async def messages() -> AsyncIterator[Message[Any]]:
        yield change("e1", 4, UserOnline(user="zoe"))
        yield change("e1", 5, UserOffline(user="ana"))
        yield change("e1", 6, UserOnline(user="cem"))
        assert (list(view), view.rereads) == (["ana", "ben", "cem"], 0)
        yield change("e1", 8, UserOnline(user="dan"))
        assert (list(view), view.rereads) == (["ana", "dan"], 1)
        yield change("e2", 1, UserOnline(user="eve"))
        assert (list(view), view.rereads) == (["eve"], 2)

    view = View(read, 10.0)
    await view.refresh()
    await view.follow(messages())  # type: ignore[arg-type]

    assert [(change.user, isinstance(change, UserOnline)) async for change in view] == [
        ("ben", False),
        ("eve", True),
        ("ana", False),
    ]


async def test_a_view_ends_with_its_bus(valkey: Server) -> None:
    """Iterating a view ends when the bus stops."""
    bus = EventBus(valkey.url, namespace="ends")
    presence = Presence(bus)
    await bus.start()
    async with presence.watch() as view:
        await bus.stop()
        assert [change async for change in view] == []


# -- Nodes and servers that go away ----------------------------------------------------------------


@asynccontextmanager
async def process(url: str, ttl: float, number: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A node in a process of its own that tracks so many users; killed at the end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(NODE), url, str(ttl), "0", str(number),
        stdout=asyncio.subprocess.PIPE, cwd=NODE.parents[2],
    )  # fmt: skip
    assert child.stdout is not None
    try:
        assert await soon(child.stdout.readline(), 30) == b"ready\n"
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_no_ghosts_after_kill_9(private: Server, say: Callable[[str], None]) -> None:
    """1,000 users of a node that is killed go offline once each, whoever of three nodes sweeps; a
    user who is on another node too stays."""
    ttl, users = 4.0, [f"user-{n}" for n in range(1000)]
    async with (
        node(private.url, ttl=ttl) as (one, seen),
        node(private.url, ttl=ttl),
        node(private.url, ttl=ttl) as (three, _),
        process(private.url, ttl, 1000) as child,
    ):
        await until(lambda: len(seen) == 1000)
        async with one.track("user-7"), three.watch() as view:
            seen.clear()
            killed = monotonic()
            child.kill()
            await until(lambda: len(seen) >= 999)
            took = monotonic() - killed
            assert await one.list() == ["user-7"]
            await until(lambda: list(view) == ["user-7"])
        await until(lambda: ("user-7", False) in seen)

    assert Counter(seen) == Counter((user, False) for user in users)
    say(
        f"presence, kill -9 of a node with 1,000 users, ttl {ttl} s: all offline after {took:.2f} s"
    )


async def test_a_ghost_is_not_listed_before_it_is_swept(private: Server) -> None:
    """`get` and `list` know that a node is overdue, though nobody has swept it."""
    async with EventBus(private.url) as bus, process(private.url, 0.5, 3) as child:
        presence = Presence(bus, ttl=0.5)
        assert len(await presence.list()) == 3
        child.kill()
        await until_listed(presence, [])

        assert await presence.get("user-0") == ()
        assert await bus.redis().scard("{presence}:online") == 3


async def test_a_node_that_lost_redis_comes_back_to_the_truth(private: Server) -> None:
    """Cut off for longer than the ttl, a node's users go once and come once; what changed there
    meanwhile is right afterwards."""
    users = [f"user-{n}" for n in range(600)]
    async with (
        Proxy(private.port) as proxy,
        node(private.url, ttl=2.0) as (one, seen),
        node(proxy.url, ttl=2.0, linger=0, redis_options={"socket_timeout": 1.0}) as (two, _),
        AsyncExitStack() as stack,
    ):
        leaver = AsyncExitStack()
        await leaver.enter_async_context(two.track("leaver"))
        await track_all(stack, two, users)
        await until(lambda: len(seen) == 601)
        seen.clear()
        proxy.mode = "hole"
        for pair in proxy.living():
            pair.mode = "hole"
        await until(lambda: len(seen) == 601)
        assert {came for _, came in seen} == {False}
        assert await one.list() == []
        seen.clear()
        await leaver.aclose()
        async with two.track("late"):
            proxy.mode = "pass"
            proxy.cut()
            await until(lambda: len(seen) >= 601)
            await until_listed(one, sorted([*users, "late"]))

            assert Counter(seen) == Counter((user, True) for user in [*users, "late"])


async def test_a_short_cut_is_no_news(private: Server) -> None:
    """A node whose connections are cut, and come back within the ttl, makes no event."""
    async with (
        Proxy(private.port) as proxy,
        node(private.url) as (one, seen),
        node(proxy.url) as (two, _),
        two.track("ana"),
    ):
        for _ in range(3):
            proxy.cut()
            async with two.track("ben"):
                await until_listed(one, ["ana", "ben"])
        await until_listed(one, ["ana"])
        await until(lambda: ("ben", False) in seen)

        assert ("ana", False) not in seen


async def test_a_redis_that_was_frozen_makes_no_storm(private: Server, log: Lines) -> None:
    """When nobody could reach Redis for longer than the ttl, nobody was away: no event at all, and
    who really died meanwhile goes a ttl later."""
    async with (
        node(private.url, ttl=1.0) as (one, seen),
        node(private.url, ttl=1.0) as (two, _),
        process(private.url, 1.0, 2) as child,
        AsyncExitStack() as stack,
    ):
        await track_all(stack, one, [f"one-{n}" for n in range(100)])
        await track_all(stack, two, [f"two-{n}" for n in range(100)])
        await until(lambda: len(seen) == 202)
        seen.clear()
        private.freeze()
        child.kill()
        frozen = monotonic()
        await log.hear("presence: ", 30)
        await until(lambda: monotonic() > frozen + 2.0)
        private.thaw()
        await log.hear("presence: Redis answers again", 30)
        await until(lambda: len(seen) >= 2)

        assert len(await one.list()) == 200
        assert sorted(seen) == [("user-0", False), ("user-1", False)]


async def test_a_redis_that_forgot_everything_makes_no_storm(private: Server) -> None:
    """After a restart without data every node tells its users again, without an event; a view keeps
    its picture until all had the time to, and who left during the outage leaves it then."""
    async with (
        Proxy(private.port) as proxy,
        node(private.url, ttl=4.0) as (one, seen),
        node(proxy.url, ttl=4.0) as (two, _),
        AsyncExitStack() as stack,
        one.watch() as view,
    ):
        leaver = AsyncExitStack()
        await leaver.enter_async_context(one.track("leaver"))
        await track_all(stack, one, [f"one-{n}" for n in range(100)])
        await track_all(stack, two, [f"two-{n}" for n in range(100)])
        await until(lambda: len(seen) == len(view) == 201)
        for _ in range(201):
            await anext(view)
        seen.clear()
        proxy.retarget(1)
        private.kill()
        proxy.cut()
        await leaver.aclose()
        private.start()
        await until_listed(one, sorted(f"one-{n}" for n in range(100)))
        await until(lambda: view.rereads)
        assert len(view) == 201
        proxy.retarget(private.port)
        change = await soon(anext(view), 30)
        users = await one.list()

        assert change == UserOffline(user="leaver")
        assert list(view) == users
        assert len(users) == 200
        assert seen == []


async def test_sessions_begun_without_redis_are_told_when_it_is_back(private: Server) -> None:
    """Entering does not fail in an outage: the user is online as soon as Redis is back."""
    async with node(private.url, ttl=2.0) as (presence, _):
        private.kill()
        async with presence.track("ana"):
            private.start()
            await until_listed(presence, ["ana"])
            assert [session.node for session in await presence.get("ana")] == [presence._node]


async def test_a_lost_session_is_told_again_at_the_next_beat(private: Server) -> None:
    """A node notices that Redis has not the number of sessions that it has (a failover that lost
    the last writes), and tells the difference."""
    async with (
        node(private.url, ttl=1.0) as (presence, _),
        presence.track("ana"),
        presence.track("ben"),
        EventBus(private.url) as other,
    ):
        redis = other.redis()
        (key,) = await redis.keys("{presence}:node:*")
        session = next(s for s, user in (await redis.hgetall(key)).items() if user == b"ana")
        await redis.hdel(key, session)
        await redis.delete("{presence}:user:ana")
        await redis.srem("{presence}:online", "ana")
        assert await presence.list() == ["ben"]
        await until_listed(presence, ["ana", "ben"])


async def test_a_node_that_is_back_is_swept_no_further(private: Server) -> None:
    """A node that says that it lives while it is being swept keeps what it still has."""
    async with (
        node(private.url, ttl=1.0) as (presence, seen),
        presence.track("ana"),
        EventBus(private.url) as other,
    ):
        redis = other.redis()
        await redis.sadd("{presence}:dead", presence._node)
        async with asyncio.timeout(20):
            while await redis.scard("{presence}:dead"):
                await checkpoint()
        await past_linger(presence, seen)
        assert seen == [("ana", True)]


async def test_a_presence_outlives_its_bus(valkey: Server) -> None:
    """A bus that stops and starts again takes its presence along; leaving after it is safe."""
    bus = EventBus(valkey.url, namespace="again")
    presence = Presence(bus, linger=0)
    for _ in range(2):
        async with bus:
            stack = AsyncExitStack()
            await stack.enter_async_context(presence.track("ana"))
            assert "ana" in await presence.list()
            assert "sessions here" in repr(presence)
        await soon(stack.aclose())
    async with presence_of(bus):
        pass


@asynccontextmanager
async def presence_of(bus: EventBus) -> AsyncIterator[None]:
    """Leave nothing of this test in the shared server."""
    async with bus:
        for key in await bus.redis().keys("{again:*"):
            await bus.redis().delete(key)
        yield
