"""Servers that crash, stay away, hang up or pause, and what the bus does meanwhile.

`test_way_back.py` has those that refuse for now, moved, or are wanted by many; what wrong bytes do
is in `test_bytes.py`; half-open connections are in `tests/test_liveness.py`,
and those of a network that is really gone in `test_netns.py`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from eventbus import BusUnavailable, EventBus, PublishUncertain
from eventbus.server import Server
from tests.faults.proxy import Pair, Proxy
from tests.helpers import Lines, Seen, soon
from tests.test_failure import Note, listener, publish_until

PATIENCE = 15.0
"""Seconds on top of what a reconnect takes: a slow machine is no fault."""
QUIET = 60.0
"""A heartbeat that does not beat during the test."""
LOADING = "LOADING Redis is loading the dataset in memory"
MASTERDOWN = "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a TCP port, for one test."""
    with Server(port=0) as server:
        yield server


async def until(done: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Return when it is so. TimeoutError after these seconds."""
    async with asyncio.timeout(seconds):
        while not done():
            await checkpoint()


async def stays_away(log: Lines, seconds: float) -> None:
    """The bus does not find its server in this time."""
    with pytest.raises(TimeoutError):
        await log.hear("connected again", seconds)


# -- A crash, and a long outage --------------------------------------------------------------------


@pytest.mark.scenario(1)
async def test_a_crash_ends_every_publish_in_time_and_loses_no_subscription(server: Server) -> None:
    """A publish under way when the server is killed ends as sent, uncertain or unsent within its
    deadline, none arrives twice, and after the restart every subscription is there once."""
    bus, seen, gaps = listener(server.url, publish_timeout=0.5)
    names = [f"room:{n}" for n in range(20)]

    async def hear(event: Note) -> None: ...

    for name in names:
        bus.on(name)(hear)
    async with bus:
        await publish_until(bus, lambda: len(seen) > 10)
        calls = [asyncio.create_task(bus.publish(Note(to="b", n=-n))) for n in range(1, 200)]
        await checkpoint()
        server.kill()
        calls += [asyncio.create_task(bus.publish(Note(to="b", n=-n))) for n in range(200, 300)]
        outcomes = await soon(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
        server.start()
        await soon(gaps.reach(1), PATIENCE)
        heard = len(seen)
        await publish_until(bus, lambda: len(seen) > heard)

        failures = {type(o) for o in outcomes if isinstance(o, BaseException)}
        assert failures
        assert failures <= {BusUnavailable, PublishUncertain}
        assert max(Counter(n for n in seen if n < 0).values(), default=1) == 1
        assert [gap.reason for gap in gaps].count("reconnect") == 1
        async with EventBus(server.url, heartbeat=None) as admin:
            here = admin.redis()
            assert await here.pubsub_numpat() == 1
            assert dict(await here.pubsub_numsub(*names)) == {name.encode(): 1 for name in names}


async def outage(server: Server, log: Lines, seconds: float, say: Callable[[str], None]) -> None:
    """Let everybody who comes be hung up on for so long, and see the bus come back."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=QUIET)
        async with bus:
            before, spent = len(proxy.pairs), process_time()
            proxy.mode = "close"
            proxy.cut()
            await stays_away(log, seconds)
            attempts = len(proxy.pairs) - before
            spent = process_time() - spent
            say(f"outage of {seconds:.0f} s: {attempts} attempts, {spent:.2f} s of CPU")

            assert bus.health().state == "down"
            assert attempts >= 4
            assert attempts <= 60 + 2 * seconds
            proxy.mode = "pass"
            await soon(log.hear("connected again", 6 + PATIENCE), 6 + PATIENCE)
            await soon(gaps.reach(1), PATIENCE)
            await publish_until(bus, lambda: len(seen) > 0)
            assert bus.stats().reconnects == 1


@pytest.mark.scenario(2)
async def test_attempts_are_bounded_by_the_backoff(
    server: Server, log: Lines, say: Callable[[str], None]
) -> None:
    """While a server hangs up on everybody, attempts grow rarer, never stop, and the bus is back
    when the server is."""
    await outage(server, log, 3, say)


@pytest.mark.long
@pytest.mark.scenario(2)
async def test_an_outage_of_thirty_seconds(
    server: Server, log: Lines, say: Callable[[str], None]
) -> None:
    """After half a minute the attempts are still few, and the bus is back within the longest pause
    of the backoff."""
    await outage(server, log, 30, say)


@pytest.mark.scenario(2)
@pytest.mark.parametrize(
    "turns",
    [
        [LOADING],
        pytest.param([LOADING, MASTERDOWN]),
    ],
    ids=["one reason", "reasons that alternate"],
)
async def test_an_outage_says_each_reason_once(
    server: Server, log: Lines, turns: list[str]
) -> None:
    """However often it tries, a connection tells once why it cannot, for each reason."""
    async with Proxy(server.port) as proxy:
        bus, _, gaps = listener(proxy.url, heartbeat=QUIET)
        async with bus:
            attempts: list[Pair] = []

            def refuse(pair: Pair, command: str) -> bytes:
                if pair not in attempts:
                    attempts.append(pair)
                return b"-%b\r\n" % turns[attempts.index(pair) // 2 % len(turns)].encode()

            proxy.answer, proxy.mode = refuse, "answer"
            proxy.cut()
            await until(lambda: len(attempts) >= 12, 30)
            proxy.mode = "pass"
            await soon(gaps.reach(1), PATIENCE)

            told = Counter(line for line in log.lines if "connected again" not in line)
            assert set(told.values()) == {1}


@pytest.mark.scenario(2)
async def test_a_server_that_hangs_up_after_the_hello_is_no_busy_loop(
    server: Server, log: Lines
) -> None:
    """A server that answers the first PING and hangs up is tried again as rarely as one that
    refuses, and not as fast as both connections can wake each other."""
    async with Proxy(server.port) as proxy:
        bus, _, gaps = listener(proxy.url, heartbeat=QUIET)
        async with bus:

            def hang_up(pair: Pair, command: str) -> bytes:
                if command != "PING":
                    return b"+OK\r\n"
                asyncio.get_running_loop().call_soon(pair.cut)
                return b"+PONG\r\n"

            before = len(proxy.pairs)
            proxy.answer, proxy.mode = hang_up, "answer"
            proxy.cut()
            with pytest.raises(TimeoutError):
                await until(lambda: len(proxy.pairs) - before > 100, 3)
            proxy.mode = "pass"
            await soon(gaps.reach(1), PATIENCE)


@pytest.mark.scenario(4)
async def test_a_socket_that_times_out_in_the_kernel_is_over(server: Server, log: Lines) -> None:
    """ETIMEDOUT of the subscriber's socket, which Python calls TimeoutError, is the end of the
    connection and not of somebody's patience."""
    bus, seen, gaps = listener(server.url, heartbeat=None)
    async with bus:
        assert bus._run is not None
        keeper: Any = bus._run.transport
        link = keeper._subscriber.link
        link._transport._fatal_error(TimeoutError(110, "Connection timed out"))
        line = await log.hear("subscriber")
        await soon(gaps.reach(1), PATIENCE)
        await publish_until(bus, lambda: len(seen) > 0)

        assert "Connection timed out" in line
        assert (gaps[0].reason, bus.stats().reconnects) == ("reconnect", 1)


# -- A second drop ---------------------------------------------------------------------------------


@pytest.mark.scenario(7)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.99])
async def test_a_resubscribe_that_is_cut_twice_begins_anew(server: Server, share: float) -> None:
    """Cut twice after a part of what it asks for has left, the bus asks for everything anew: each
    subscription is live once at the end, and the outage is told once."""
    names = [f"room:{n}" for n in range(40)]
    async with Proxy(server.port) as proxy:
        bus, _, gaps = listener(proxy.url, heartbeat=QUIET)
        heard: Seen[str] = Seen()

        async def hear(event: Note) -> None:
            heard.append(event.to)

        for name in names:
            bus.on(name)(hear)
        async with bus:
            [pair] = proxy.living("subscriber")
            proxy.up_cuts = [int(pair.up * share), int(pair.up * share) + 1]
            proxy.cut("subscriber")
            await soon(gaps.reach(1), PATIENCE)

            assert proxy.up_cuts == []
            async with EventBus(server.url, heartbeat=None) as admin:
                here = admin.redis()
                assert dict(await here.pubsub_numsub(*names)) == {n.encode(): 1 for n in names}
                assert await here.pubsub_numpat() == 1
                for name in names:
                    await admin.publish(name, Note(to=name, n=1))
            await heard.reach(len(names))
            assert sorted(heard) == sorted(names)
            assert [gap.reason for gap in gaps] == ["reconnect"]


# -- Connections that the server ends or holds -----------------------------------------------------


@pytest.mark.scenario(12)
@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_killed_clients_come_back(server: Server, log: Lines, kind: str) -> None:
    """CLIENT KILL of either connection is survived: a publish at that moment says what became of
    it, nothing arrives twice, and later ones arrive."""
    bus, seen, gaps = listener(server.url, publish_timeout=2.0)
    async with bus, EventBus(server.url, heartbeat=None) as admin:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        here = admin.redis()
        killed = await here.client_kill_filter(_type=kind, skipme=True)
        outcome = ""
        try:
            await soon(bus.publish(Note(to="a", n=-2)))
        except (BusUnavailable, PublishUncertain) as error:
            outcome = type(error).__name__
        await log.hear("connected again")
        await until(lambda: bus.health().state == "live")
        heard = len(seen)
        await publish_until(bus, lambda: len(seen) > heard)

        assert killed >= 1
        assert seen.count(-2) <= (outcome != "BusUnavailable")
        assert bus.stats().reconnects == len([gap for gap in gaps if gap.reason == "reconnect"])
        assert bus.stats().reconnects == (kind == "pubsub")


@pytest.mark.scenario(13)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_heartbeats_keep_an_idle_connection_open(
    server: Server, log: Lines, busy: bool
) -> None:
    """A server that ends what is idle for a second ends no connection of a bus with a heartbeat,
    be it alone or beside one that publishes all the time; without a heartbeat it does."""
    over = asyncio.Event()

    def ended() -> int:
        return len([line for line in log.lines if "closed the connection" in line])

    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url)
        deaf = EventBus(server.url, heartbeat=None)
        async with bus, deaf, EventBus(server.url, heartbeat=None) as other:
            await other.redis().execute_command("CONFIG", "SET", "timeout", 1)
            loading = [asyncio.create_task(publish_until(other, over.is_set, 40))] * busy
            await until(lambda: ended() >= 1, 20)
            first = ended()
            await until(
                lambda: ended() > first, 20
            )  # long enough for an idle one to be ended twice
            over.set()
            await asyncio.gather(*loading)
            await publish_until(bus, lambda: len(seen) > 0)

            assert len(proxy.pairs) == 2
            assert not gaps
            assert deaf.stats().reconnects == 0, "a subscriber is never idle for the server"


@pytest.mark.scenario(13)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "under load"])
async def test_a_paused_server_holds_a_publish_and_takes_it_once(
    server: Server, log: Lines, busy: bool
) -> None:
    """What was written while CLIENT PAUSE holds is uncertain after its deadline and arrives at most
    once; no connection is ended for a pause that is shorter than the heartbeat."""
    bus, seen, gaps = listener(server.url, heartbeat=QUIET, publish_timeout=0.2)
    over = asyncio.Event()
    async with bus, EventBus(server.url, heartbeat=None) as admin:
        await bus.publish(Note(to="a", n=-1))
        await seen.reach(1)
        loading = [asyncio.create_task(publish_until(bus, over.is_set, 40))] * busy
        await admin.redis().execute_command("CLIENT", "PAUSE", 1500)
        with pytest.raises(PublishUncertain):
            await soon(bus.publish(Note(to="b", n=-2)))
        over.set()
        await asyncio.gather(*loading)
        await until(lambda: -2 in seen)
        await publish_until(bus, lambda: len(seen) > 2)

        assert seen.count(-2) == 1
        assert not gaps
        assert bus.stats().reconnects == 0
        assert not [line for line in log.lines if "reconnect" in line]


@pytest.mark.scenario(13)
async def test_a_pause_longer_than_the_deadline_is_a_dead_server(
    server: Server, log: Lines
) -> None:
    """A pause that outlasts the heartbeat ends the connection, and the bus hears again after it; a
    bus without a heartbeat says nothing."""
    bus, seen, gaps = listener(server.url, publish_timeout=0.2)
    deaf, _, deaf_gaps = listener(server.url, heartbeat=None)
    async with bus, deaf, EventBus(server.url, heartbeat=None) as admin:
        await admin.redis().execute_command("CLIENT", "PAUSE", 3000)
        await log.hear("no byte for a heartbeat")
        assert not bus.health() or bus.stats().reconnects
        await soon(gaps.reach(1), PATIENCE)
        await publish_until(bus, lambda: len(seen) > 0)

        assert deaf.health().state == "live"
        assert [gap for gap in deaf_gaps if gap.reason == "reconnect"] == []
