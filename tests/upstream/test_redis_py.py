"""What redis-py does that we work around, each in its smallest form (docs/upstream.md).

A test here holds while the defect is there. When one fails, upstream has mended it: read the page,
and take the workaround out once the oldest supported redis-py has the repair too. Where versions
differ, the test says which; the suite runs with the oldest one and with the newest.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import redis
from anyio.lowlevel import checkpoint
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from eventbus.server import Server
from tests.faults.proxy import Pair, Proxy

VERSION = tuple(int(part) for part in redis.__version__.split(".")[:2])
MANY = 100
"""Polls that would take minutes if they waited for what they are told to wait."""


@pytest.fixture(scope="module")
def upstream_server() -> Iterator[Server]:
    """A server on TCP, for connections that are cut and killed."""
    with Server(port=0) as server:
        yield server


def default_retry() -> Retry:
    """As many retries as redis-py makes when nothing is said, without its pauses."""
    retry = Redis().get_retry()
    return Retry(NoBackoff(), retry.get_retries() if retry else 0)


@asynccontextmanager
async def client_of(proxy: Proxy, **options: Any) -> AsyncIterator[Redis]:
    """A client through the proxy, closed at the end whatever it went through."""
    options = {"protocol": 2, "retry": default_retry(), **options}
    client: Redis = Redis.from_url(proxy.url, **options)
    try:
        yield client
    finally:
        await client.connection_pool.disconnect()


@asynccontextmanager
async def pubsub_of(client: Redis, *patterns: str) -> AsyncIterator[PubSub]:
    """Its PubSub, with confirmed patterns."""
    async with client.pubsub() as pubsub:
        await pubsub.psubscribe(*patterns)
        for _ in patterns:
            async with asyncio.timeout(5):
                while await pubsub.get_message(timeout=1) is None:
                    pass
        yield pubsub


async def until_it_fails(pubsub: PubSub) -> None:
    """Read, up to the first error."""
    async with asyncio.timeout(10):
        while True:
            await pubsub.get_message(timeout=0.05)


async def subscriber_in(proxy: Proxy) -> Pair:
    """The connection of the only subscriber."""
    async with asyncio.timeout(5):
        while not proxy.living("subscriber"):
            await checkpoint()
    return proxy.living("subscriber")[0]


# -- A subscription that dies and says nothing -----------------------------------------------------


async def test_a_kernel_timeout_reads_as_silence_for_ever(upstream_server: Server) -> None:
    """What the kernel says of a dead peer (ETIMEDOUT) is a TimeoutError, and passes for the
    caller's own: `get_message(timeout=...)` is None at once from then on, without an error."""
    async with (
        Redis(port=upstream_server.port, protocol=2) as client,
        pubsub_of(client, "dead:*") as pubsub,
    ):
        connection = pubsub.connection
        connection._reader.set_exception(TimeoutError(110, ""))
        async with asyncio.timeout(20):
            polled = [await pubsub.get_message(timeout=10) for _ in range(MANY)]
        assert polled == [None] * MANY
        assert connection.is_connected

        step = pubsub.parse_response(block=True)  # what `listen()` awaits
        try:
            if VERSION >= (8, 1):  # it returns without a pause: `listen()` blocks the loop
                with pytest.raises(StopIteration) as stopped:
                    step.send(None)
                assert stopped.value.value is None
        finally:
            step.close()


async def test_a_health_check_misses_no_answer(upstream_server: Server) -> None:
    """`health_check_interval` sends PINGs on a subscriber and misses no PONG: half-open, a
    connection stays "connected" without an error."""
    async with (
        Proxy(upstream_server.port) as proxy,
        client_of(proxy, health_check_interval=0.01) as client,
        pubsub_of(client, "half:*") as pubsub,
    ):
        pair = await subscriber_in(proxy)
        pair.mode = "hole"
        async with asyncio.timeout(10):
            while pair.said.count(b"PING") < 5:
                assert await pubsub.get_message(timeout=0.02) is None
        assert pubsub.connection.is_connected
        assert proxy.pairs == [pair]


async def test_a_reconnect_is_silent(upstream_server: Server) -> None:
    """A connection that is lost comes back with its subscriptions inside `get_message`, which
    returns None as if nothing had been missed."""
    async with (
        Proxy(upstream_server.port) as proxy,
        client_of(proxy) as client,
        pubsub_of(client, "back:*") as pubsub,
    ):
        (await subscriber_in(proxy)).cut()
        async with Redis(port=upstream_server.port) as other:
            async with asyncio.timeout(10):
                while await other.pubsub_numpat():
                    await checkpoint()  # the server hears of the end
                assert await other.publish("back:1", "lost") == 0
                while (message := await pubsub.get_message(timeout=0.05)) is None:
                    pass
            assert message["type"] == "psubscribe"
            assert await other.publish("back:2", "heard") == 1


async def test_garbage_is_read_again_and_again(upstream_server: Server) -> None:
    """After one reply that is no RESP, every read raises for the same bytes; the connection is not
    dropped, and what is published is not heard."""
    async with (
        Proxy(upstream_server.port) as proxy,
        client_of(proxy) as client,
        pubsub_of(client, "bad:*") as pubsub,
    ):
        pair = await subscriber_in(proxy)
        pair.client.write(b"garbage\r\n")
        for _ in range(3):
            with pytest.raises(InvalidResponse):
                await pubsub.get_message(timeout=5)
        async with Redis(port=upstream_server.port) as other:
            assert await other.publish("bad:1", "lost") == 1
        with pytest.raises(InvalidResponse):
            await pubsub.get_message(timeout=5)
        assert proxy.living() == [pair]


# -- Permissions -----------------------------------------------------------------------------------


async def test_one_denied_pattern_takes_the_others_with_it(upstream_server: Server) -> None:
    """`psubscribe` returns before the server has denied a pattern, which stays in `patterns`; at
    the next reconnect all go in one command, and all are denied."""
    async with Redis(port=upstream_server.port) as other:
        await other.acl_setuser("guest", True, reset=True, nopass=True, commands=["+@all"])
        await other.execute_command("ACL", "SETUSER", "guest", "resetchannels", "&ok:*")
        async with (
            Redis(
                port=upstream_server.port, username="guest", protocol=2, retry=default_retry()
            ) as client,
            pubsub_of(client, "ok:*") as pubsub,
        ):
            await pubsub.psubscribe("no:*")
            with pytest.raises(NoPermissionError):
                await pubsub.get_message(timeout=5)
            assert await other.publish("ok:1", "heard") == 1
            assert await pubsub.get_message(timeout=5) is not None

            await other.client_kill_filter(_type="pubsub")
            with pytest.raises(NoPermissionError):
                await until_it_fails(pubsub)
            assert await other.publish("ok:2", "lost") == 0
            assert await pubsub.get_message(timeout=0.05) is None
            assert pubsub.connection.is_connected


async def test_wrong_credentials_are_tried_again(upstream_server: Server) -> None:
    """A refused password counts as a lost connection: since version 8 it is sent again, as often
    as retries are allowed."""
    assert issubclass(AuthenticationError, RedisConnectionError)
    async with Proxy(upstream_server.port) as proxy:
        async with client_of(proxy, username="nobody", password="wrong") as client:
            with pytest.raises(AuthenticationError):
                await client.ping()
        assert (len(proxy.pairs) > 1) == (VERSION >= (8, 0))


# -- Publishing ------------------------------------------------------------------------------------


async def test_a_publish_is_sent_again(upstream_server: Server) -> None:
    """An answer that got lost is taken for a message that got lost: by default it is published
    again, and subscribers have it twice."""
    async with Proxy(upstream_server.port) as proxy, client_of(proxy) as client:
        await client.ping()
        [pair] = proxy.living()
        async with (
            Redis(port=upstream_server.port) as direct,
            pubsub_of(direct, "twice:*") as heard,
        ):
            pair.mode = "down_hole"
            publishing = asyncio.ensure_future(client.publish("twice:1", "once"))
            async with asyncio.timeout(10):
                first = await heard.get_message(timeout=9)
                pair.cut()
                assert await publishing == 1
                second = await heard.get_message(timeout=9)
            assert first["data"] == second["data"] == b"once"


async def test_a_publish_outlives_its_timeout(upstream_server: Server) -> None:
    """`socket_timeout` is the limit of one attempt: against a server that is frozen, a publish
    lasts that long once for each retry and once more."""
    async with (
        Proxy(upstream_server.port) as proxy,
        client_of(proxy, socket_timeout=0.02) as client,
    ):
        await client.ping()
        proxy.mode = proxy.living()[0].mode = "hole"
        with pytest.raises(RedisTimeoutError):
            await client.publish("frozen", "x")
        assert len(proxy.pairs) > default_retry().get_retries()


async def test_a_pool_refuses_instead_of_waiting(upstream_server: Server) -> None:
    """A pool that has given out all its connections raises at once, so of many publishes at the
    same time those beyond its size fail; and a PubSub keeps one of them."""
    pool = ConnectionPool(port=upstream_server.port, max_connections=1, retry=default_retry())
    async with Redis.from_pool(pool) as client, pubsub_of(client, "pool:*"):
        with pytest.raises(RedisConnectionError, match="Too many connections"):
            await client.publish("pool:1", "refused")


def test_no_limit_for_an_answer_before_8() -> None:
    """Before version 8 a connection waits for an answer without a limit, so that a frozen server
    holds it for ever; since then it has one of its own."""
    connection = Connection()
    limits = (connection.socket_timeout, connection.socket_connect_timeout)
    assert (None in limits) == (VERSION < (8, 0))


# -- Tasks -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_a_pubsub_is_for_one_task(upstream_server: Server) -> None:
    """Tasks that use a PubSub while it is disconnected connect it each for itself: they disturb
    each other's reading, leave sockets behind, and lose a pattern."""
    async with Proxy(upstream_server.port) as proxy, client_of(proxy) as client:
        async with pubsub_of(client, "a:*") as pubsub:
            await pubsub.connection.disconnect()
            before = len(proxy.pairs)
            async with asyncio.timeout(10):
                outcomes = await asyncio.gather(
                    pubsub.get_message(timeout=0.05),
                    pubsub.psubscribe("b:*"),
                    pubsub.psubscribe("c:*"),
                    return_exceptions=True,
                )
            assert any(isinstance(outcome, Exception) for outcome in outcomes)
            assert len(proxy.pairs) - before > 1
            assert len(pubsub.patterns) < 3
        proxy.cut()
        for _ in range(MANY):  # what they left behind hears that it was cut, and is collected here
            await checkpoint()
        gc.collect()


async def test_a_cancellation_in_a_write_gets_lost(upstream_server: Server) -> None:
    """With a `socket_timeout` every write goes through `asyncio.wait_for`, which in Python 3.11
    forgets a cancellation that comes when it is done: a connect, which writes, ends as if it had
    not been cancelled."""
    lost = 0
    port = upstream_server.port or 0
    for turns in range(6):
        connection = Connection(port=port, socket_timeout=5, retry=Retry(NoBackoff(), 0))
        await connection.connect()
        sending = asyncio.ensure_future(connection.send_command("PING", check_health=False))
        for _ in range(turns):
            await checkpoint()
        asked = sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
            lost += asked
        await connection.disconnect(nowait=True)
    assert bool(lost) == (sys.version_info < (3, 12))


async def test_two_tasks_that_ask_sentinels_at_once_lose_one_of_them() -> None:
    """`Sentinel.discover_master` swaps by an index from before its await: one client is twice in
    the list, another one is gone, neither asked again nor closed."""
    sentinels = Sentinel([("localhost", 1), ("localhost", 2), ("localhost", 3)])
    first, second, third = sentinels.sentinels

    async def fails() -> None:
        await checkpoint()
        raise RedisConnectionError

    async def answers() -> dict[str, dict[str, object]]:
        await checkpoint()
        state = {"is_master": True, "is_sdown": False, "is_odown": False, "ip": "::1", "port": 1}
        return {"main": state | {"num-other-sentinels": 2}}

    first.sentinel_masters = fails
    second.sentinel_masters = third.sentinel_masters = answers
    await asyncio.gather(sentinels.discover_master("main"), sentinels.discover_master("main"))

    assert first not in sentinels.sentinels


# -- Secrets ---------------------------------------------------------------------------------------

CANARY = "canary-1f3a"


async def test_a_missing_master_shows_the_clients() -> None:
    """The error of a Sentinel that does not answer holds the representation of its client, in 7.0
    with the password."""
    options = {"username": f"u{CANARY}", "password": CANARY, "retry": Retry(NoBackoff(), 0)}
    sentinels = Sentinel([("127.0.0.1", 1)], sentinel_kwargs=options)
    with pytest.raises(MasterNotFoundError) as caught:
        await sentinels.discover_master("main")
    assert "Redis(" in str(caught.value)
    if VERSION == (7, 0):
        assert f"password={CANARY}" in str(caught.value)


@pytest.mark.parametrize("separator", "#/?")
def test_a_url_that_cannot_be_read_shows_a_part_of_the_password(separator: str) -> None:
    """Where a character of the password ends the address, what stands before it is taken for the
    port and quoted in the error; when it is a number, it even passes for the port."""
    with pytest.raises(ValueError, match=CANARY):
        parse_url(f"redis://user:{CANARY}{separator}rest@example.org/0")
    assert parse_url(f"redis://user:1234{separator}rest@example.org/0")["port"] == 1234


async def test_resp3_writes_payloads_at_debug(
    upstream_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """With RESP3 (the default since 8) every message is formatted for the logger `push_response`,
    and at DEBUG it is in the log."""
    assert (Connection().protocol not in (2, "2", None)) == (VERSION >= (8, 0))
    async with (
        Redis(port=upstream_server.port, protocol=3) as client,
        pubsub_of(client, "resp3:*") as pubsub,
    ):
        caplog.set_level(logging.DEBUG, "push_response")
        await client.publish("resp3:1", CANARY)
        async with asyncio.timeout(5):
            while await pubsub.get_message(timeout=1) is None:
                pass
    assert CANARY in caplog.text


def test_a_client_showed_its_password_before_7_4() -> None:
    """The representation of a client, and with it that of `bus.redis()`, has the password in it
    before version 7.4."""
    assert (CANARY in repr(Redis(password=CANARY))) == (VERSION < (7, 4))
