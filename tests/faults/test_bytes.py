"""Bytes that are late, in pieces, wrong or hostile: what the bus makes of what a server says.

A stream that went wrong is dropped, and a new connection begins a new one; nothing is read twice,
nothing is trusted that does not fit what was asked, and memory has a bound.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eventbus import BusUnavailable, EventBus, PublishUncertain
from eventbus.server import Server
from tests.faults.proxy import Proxy, saying
from tests.faults.test_network import PATIENCE, QUIET, until
from tests.helpers import Lines, Seen, soon
from tests.test_failure import HEARTBEAT, Note, listener, publish_until

DEEP = b"*1\r\n" * 5000
CONFIRMED = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server on a TCP port, which nobody stops: the faults are on the way."""
    with Server(port=0) as server:
        yield server


# -- Slow, and in pieces ---------------------------------------------------------------------------


@pytest.mark.scenario(8)
@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12))
@settings(
    max_examples=15,
    phases=[Phase.generate],  # a smaller example would be a longer wait: each fails by a limit
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_the_same_messages_however_they_are_cut_up(server: Server, sizes: list[int]) -> None:
    """Wherever the network splits what the server says, the same messages come in the same
    order."""
    payloads = [b"", b"\r\n", b"$3\r\n", b"*3\r\n$7\r\nmessage\r\n", bytes(range(256)) * 3]
    async with Proxy(server.port) as proxy:
        proxy.sizes = sizes
        bus, seen, gaps = listener(proxy.url, heartbeat=QUIET)
        raw: Seen[bytes] = Seen()

        @bus.on("raw:*")
        async def keep(payload: bytes) -> None:
            raw.append(payload)

        async with bus:
            for n in range(5):
                assert (await bus.publish(Note(to="é", n=n))).receivers == 1
            for payload in payloads:
                await bus.publish_raw("raw:1", payload)
            await seen.reach(5)
            await raw.reach(len(payloads))

            assert seen == list(range(5))
            assert raw == payloads
            assert not gaps


@pytest.mark.scenario(8)
async def test_a_message_that_trickles_is_no_dead_connection(server: Server, log: Lines) -> None:
    """A link so slow that one message takes longer than the deadline of the heartbeat is not taken
    for dead: a byte is life."""
    async with Proxy(server.port) as proxy, EventBus(server.url, heartbeat=None) as publisher:
        bus, seen, gaps = listener(proxy.url)
        async with bus:
            [pair] = proxy.living("subscriber")
            pair.sizes, pair.delay = (4,), HEARTBEAT / 10
            started = asyncio.get_running_loop().time()
            await publisher.publish(Note(to="a", n=1))
            async with asyncio.timeout(30):
                await until(lambda: seen, 30)
            took = asyncio.get_running_loop().time() - started
            pair.sizes, pair.delay = (), 0.0

            assert seen == [1]
            assert took > 2 * HEARTBEAT
            assert not gaps
            assert bus.stats().reconnects == 0
            assert not [line for line in log.lines if "heartbeat" in line]


# -- Wrong bytes -----------------------------------------------------------------------------------

_FRAME = b"*4\r\n$8\r\npmessage\r\n$6\r\nnote:*\r\n$6\r\nnote:a\r\n$230\r\n"
"""A message before its payload. A wrong byte in the payload is an invalid event, no more."""


@pytest.mark.scenario(9)
@pytest.mark.parametrize("byte", [b"\n", b"z", b"9", b"*", b"\xff"])
async def test_a_wrong_byte_costs_at_most_one_connection(
    server: Server, log: Lines, byte: bytes
) -> None:
    """Whichever byte of a message's frame is wrong, the connection ends at most once for it, the
    bus is back, and what comes later arrives: nothing is read again."""
    async with Proxy(server.port) as proxy, EventBus(server.url, heartbeat=None) as publisher:
        for place in range(0, len(_FRAME), 3):
            bus, seen, gaps = listener(proxy.url)
            async with bus:
                [pair] = proxy.living("subscriber")
                pair.garbles = [(pair.down + place, byte[0])]
                await publisher.publish(Note(to="a", n=-1))
                await until(lambda p=pair: not p.garbles or not p.open)
                heard = len(seen)
                await publish_until(publisher, lambda s=seen, h=heard: len(s) > h)

                assert bus.stats().reconnects <= 1, place
                assert bus.stats().missed <= 1000
                assert len([gap for gap in gaps if gap.reason == "reconnect"]) <= 1
    assert not [line for line in log.lines if "reading a reply failed" in line]


@pytest.mark.scenario(9)
async def test_wrong_bytes_at_random_places_are_survived(
    server: Server, say: Callable[[str], None]
) -> None:
    """Any byte of either connection, at any place: the bus comes back, and no wrong byte costs more
    than each connection once."""
    chance = random.Random(3)
    count = 30
    async with Proxy(server.port) as proxy:
        for _ in range(count):
            bus, seen, _ = listener(proxy.url, publish_timeout=0.3)
            async with bus:
                await bus.publish(Note(to="a", n=0))
                pair = chance.choice(proxy.living())
                pair.garbles = [(pair.down + chance.randrange(60), chance.randrange(256))]
                await publish_until(bus, lambda p=pair: not p.garbles or not p.open)
                heard = len(seen)
                await publish_until(bus, lambda s=seen, h=heard: len(s) > h)

                assert bus.stats().reconnects <= 1
        ended = len(proxy.pairs) - 2 * count
        say(f"{count} wrong bytes: {ended} connections ended")
        assert ended <= 2 * count


@pytest.mark.scenario(9)
async def test_a_length_that_is_wrong_does_not_make_the_bus_deaf(
    server: Server, log: Lines
) -> None:
    """When a wrong byte makes the reader wait for more than ever comes, and swallow every answer
    meanwhile, the connection is given up although bytes arrive."""
    async with Proxy(server.port) as proxy:
        bus, seen, gaps = listener(proxy.url, heartbeat=0.1)
        async with bus, EventBus(server.url, heartbeat=None) as publisher:
            [pair] = proxy.living("subscriber")
            pair.garbles = [(pair.down + _FRAME.index(b"$230") + 1, ord("9"))]
            await publisher.publish_raw("note:a", b"x" * 100_000)
            await until(lambda: gaps, 5)
            await publish_until(publisher, lambda: len(seen) > 0)

            assert bus.stats().reconnects == 1


@pytest.mark.scenario(9)
@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_a_truncated_frame_is_no_message(server: Server, cut: int) -> None:
    """A connection that ends in the middle of a message ends with it: the bytes that came are no
    message and do not reach the next connection."""
    async with Proxy(server.port) as proxy, EventBus(server.url, heartbeat=None) as publisher:
        bus, seen, gaps = listener(proxy.url, heartbeat=QUIET)
        async with bus:
            [pair] = proxy.living("subscriber")
            pair.cuts = [pair.down + cut]
            await publisher.publish(Note(to="a", n=-1))
            await soon(gaps.reach(1), PATIENCE)
            await publish_until(publisher, lambda: len(seen) > 0)

            assert -1 not in seen
            assert bus.stats().invalid == 0
            assert bus.stats().reconnects == 1


# -- Answers to another question -------------------------------------------------------------------


@pytest.mark.scenario(9)
async def test_an_answer_too_many_ends_the_publisher(server: Server, log: Lines) -> None:
    """A server that answers once more than it was asked is out of step: the connection ends before
    a later publish can be given another one's answer."""
    async with Proxy(server.port) as proxy:
        bus, seen, _ = listener(proxy.url, heartbeat=None)
        async with bus:
            proxy.answer = saying(PUBLISH=b":7\r\n:8\r\n")
            proxy.mode = "answer"
            [publisher] = [pair for pair in proxy.living() if pair.role != "subscriber"]
            publisher.cut()
            await log.hear("connected again")
            receipt = await bus.publish(Note(to="a", n=1))
            proxy.mode = "pass"
            await log.hear("nobody asked for")
            await publish_until(bus, lambda: len(seen) > 0)

            assert receipt.receivers == 7


@pytest.mark.scenario(9)
@pytest.mark.parametrize("words", [b"+OK\r\n", b"*0\r\n", b"$1\r\nx\r\n", b"$-1\r\n"])
async def test_an_answer_that_does_not_fit_a_publish_is_uncertain(
    server: Server, log: Lines, words: bytes
) -> None:
    """An answer that no PUBLISH has says nothing about this one: it is uncertain, and the
    connection, which is out of step, ends."""
    async with Proxy(server.port) as proxy:
        bus, seen, _ = listener(proxy.url, heartbeat=None)
        async with bus:
            proxy.answer, proxy.mode = saying(PUBLISH=words), "answer"
            [publisher] = [pair for pair in proxy.living() if pair.role != "subscriber"]
            publisher.cut()
            await log.hear("connected again")
            with pytest.raises(PublishUncertain):
                await soon(bus.publish(Note(to="a", n=1)))
            proxy.mode = "pass"
            await publish_until(bus, lambda: len(seen) > 0)


@pytest.mark.scenario(9)
@pytest.mark.parametrize("words", [b":1\r\n", b"+OK\r\n", CONFIRMED, b"*0\r\n", b"$-1\r\n"])
async def test_an_answer_that_does_not_fit_a_subscribe_confirms_nothing(
    server: Server, log: Lines, words: bytes
) -> None:
    """A bus is live when the server has confirmed what was asked, name by name; any other answer
    ends the connection."""
    async with Proxy(server.port, mode="answer") as proxy:
        proxy.answer = saying(SUBSCRIBE=words, PSUBSCRIBE=words, PUBLISH=b":1\r\n")
        bus, seen, _ = listener(proxy.url, connect_timeout=60.0)
        starting = asyncio.create_task(bus.start())
        await until(lambda: len(proxy.pairs) >= 4 or starting.done())
        early = starting.done()
        proxy.mode = "pass"
        proxy.cut()
        await soon(starting, PATIENCE)
        await publish_until(bus, lambda: len(seen) > 0)
        await bus.stop()

        assert not early
        assert not [line for line in log.lines if "reading a reply failed" in line]


# -- Hostile servers -------------------------------------------------------------------------------


@pytest.mark.scenario(10)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param(b"*4294967296\r\n", id="too many"),
        pytest.param(b"*4294967295\r\n", id="more than memory"),
        pytest.param(b"$99999999999999999999\r\n", id="too long"),
        pytest.param(b"*-2\r\n", id="fewer than none"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
    ],
)
async def test_what_no_server_says_ends_the_connection(
    server: Server, log: Lines, words: bytes
) -> None:
    """A reply that is nested without end, or longer than anything, ends the connection with one
    line; nothing but the wait for a good server reaches the user."""
    async with Proxy(server.port, mode="answer") as proxy:
        proxy.answer = saying(SUBSCRIBE=words, PUBLISH=b":1\r\n")
        bus, seen, _ = listener(proxy.url, connect_timeout=60.0)
        starting = asyncio.create_task(bus.start())
        await log.hear("what the server sent is no RESP")
        await until(lambda: len(proxy.pairs) >= 5)
        proxy.mode = "pass"
        await soon(starting, PATIENCE)
        await publish_until(bus, lambda: len(seen) > 0)
        await bus.stop()

        assert not [line for line in log.lines if "failed" in line]


@pytest.mark.scenario(10)
@pytest.mark.parametrize("words", [DEEP, b"$999999999999\r\n", b"nonsense\r\n", b"*-2\r\n"])
async def test_a_hostile_hello_is_no_more_than_a_server_away(server: Server, words: bytes) -> None:
    """Whatever is said before anything is asked, the start ends in BusUnavailable, in time."""
    async with Proxy(server.port, mode="answer") as proxy:
        proxy.answer = lambda pair, command: words
        bus = EventBus(
            proxy.url, connect_timeout=1.0, redis_options={"socket_connect_timeout": 0.2}
        )
        with pytest.raises(BusUnavailable):
            await soon(bus.start(), PATIENCE)


@pytest.mark.scenario(10)
@pytest.mark.parametrize("words", [b"$999999999999\r\n", b"*1000000\r\n"], ids=["bytes", "items"])
async def test_a_reply_without_an_end_has_a_bound(server: Server, log: Lines, words: bytes) -> None:
    """A reply that goes on and on ends the connection when it is larger than all that the bus may
    keep, though bytes arrive all the time."""
    async with Proxy(server.port, mode="answer") as proxy:
        proxy.answer = saying(SUBSCRIBE=words + b":1\r\n" * (1 << 19), PUBLISH=b":1\r\n")
        bus, seen, _ = listener(
            proxy.url, connect_timeout=60.0, max_payload=1 << 16, max_pending_bytes=1 << 20
        )
        starting = asyncio.create_task(bus.start())
        try:
            await log.hear("subscriber", 5)
        finally:
            proxy.mode = "pass"
            proxy.cut()
            await soon(starting, PATIENCE)
            await publish_until(bus, lambda: len(seen) > 0)
            await bus.stop()
