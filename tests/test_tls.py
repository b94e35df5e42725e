"""TLS against Debian's Redis: a good certificate works end to end, every other is refused at once.

The certificates are made here, for one run. Nothing ever falls back to plaintext.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import redis.asyncio
from anyio.lowlevel import checkpoint

from eventbus import BusUnavailable, EventBus, EventBusError
from eventbus.server import Server, ServerFailed
from tests.conftest import DEBIAN, IN_CI
from tests.faults.certificates import Authority
from tests.faults.proxy import Mode, Proxy
from tests.helpers import Lines, soon
from tests.test_failure import Note, listener, publish_until

pytestmark = pytest.mark.scenario(15)

LONG = 60.0
"""A connect_timeout that no test waits for: what fails before `soon` gives up failed at once."""


class Secure:
    """A TLS server, and the URL that trusts the good authority."""

    def __init__(self, server: Server, port: int, authority: Path) -> None:
        self.server = server
        self.port = port
        self.address = f"rediss://localhost:{port}"
        self.url = f"{self.address}?ssl_ca_certs={quote(str(authority))}"


Start = Callable[..., Secure]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the bus trusts."""
    return Authority(tmp_path_factory.mktemp("tls"), "good")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the bus knows nothing of."""
    return Authority(tmp_path_factory.mktemp("tls"), "stranger")


@pytest.fixture(scope="module")
def start(authority: Authority) -> Iterator[Start]:
    """Start a TLS server with these options; skips at home without Debian's binary."""
    if not os.access(DEBIAN, os.X_OK):
        missing = f"{DEBIAN} is missing: apt install redis-server"
        pytest.fail(missing) if IN_CI else pytest.skip(missing)
    with ExitStack() as stack:

        def start(*options: str) -> Secure:
            for left in reversed(range(5)):
                port = 20_000 + secrets.randbelow(12_000)
                server = Server(
                    binary=DEBIAN,
                    options=(
                        *("--tls-port", str(port), "--tls-auth-clients", "no"),
                        *("--tls-ca-cert-file", str(authority.file), *options),
                    ),
                )
                try:
                    return Secure(stack.enter_context(server), port, authority.file)
                except ServerFailed:
                    if not left:
                        raise
            raise AssertionError

        yield start


@pytest.fixture(scope="module")
def good(start: Start, authority: Authority) -> Secure:
    """A server with a good certificate."""
    return start(*authority.certificate("good"))


async def refused(url: str, **settings: object) -> str:
    """Start a bus that must fail at once, long before connect_timeout; the text of its error."""
    bus = EventBus(url, connect_timeout=LONG, **settings)  # type: ignore[arg-type]
    with pytest.raises(BusUnavailable) as caught:
        await soon(bus.start(), 10)
    assert bus.health().state == "closed"
    return str(caught.value)


# -- What works ------------------------------------------------------------------------------------


async def test_a_good_certificate_works_end_to_end(good: Secure, log: Lines) -> None:
    """Over TLS both connections and `bus.redis()` work, messages larger than a TLS record arrive
    whole and in order, and nothing is warned of."""
    bus, seen, gaps = listener(good.url, max_payload=1 << 24)
    sizes = [0, 1, 16_384, 100_000, 3_000_000]
    async with bus, bus.subscribe("raw:*", bytes) as messages:
        for n in range(200):
            await bus.publish(Note(to="a", n=n))
        await seen.reach(200)
        for size in sizes:
            await bus.publish_raw("raw:1", b"x" * size)
        got = [len((await soon(anext(messages))).event) for _ in sizes]

        assert seen == list(range(200))
        assert got == sizes
        assert await bus.redis().ping()
        assert good.address in repr(bus)
        assert not gaps
    assert not log.lines


async def test_tls_survives_the_end_of_its_connections(good: Secure, log: Lines) -> None:
    """When the server ends every connection, both are made anew over TLS, and the gap is told."""
    bus, seen, gaps = listener(good.url)
    async with bus, EventBus(good.server.url) as admin:
        await admin.redis().client_kill_filter(_type="pubsub")
        await admin.redis().client_kill_filter(_type="normal", skipme=True)
        await soon(gaps.reach(1), 10)
        await publish_until(bus, lambda: len(seen) > 0)

        assert bus.stats().reconnects == 1


async def test_a_client_with_tls_is_taken_with_its_certificates(
    good: Secure, authority: Authority
) -> None:
    """An existing client's TLS settings are used, and so are those of redis_options."""
    options = {"ssl_ca_certs": str(authority.file)}
    client = redis.asyncio.Redis(host="localhost", port=good.port, ssl=True, **options)
    for bus in (EventBus(client), EventBus(good.address, redis_options=options)):
        async with bus:
            assert (await bus.publish(Note(to="a", n=1))).receivers == 0
            assert await bus.redis().ping()
    await client.aclose()


# -- What does not ---------------------------------------------------------------------------------


async def test_an_expired_certificate_is_refused(start: Start, authority: Authority) -> None:
    """The start fails at once and says that the certificate has expired."""
    text = await refused(start(*authority.certificate("old", days=-1)).url)

    assert "certificate has expired" in text


async def test_a_certificate_of_another_host_is_refused(start: Start, authority: Authority) -> None:
    """The start fails at once and says for which host the certificate is not valid."""
    text = await refused(start(*authority.certificate("host", host="example.com")).url)

    assert "localhost" in text.partition("TLS:")[2]
    assert "not valid for" in text


async def test_a_certificate_of_an_unknown_authority_is_refused(
    start: Start, stranger: Authority, good: Secure
) -> None:
    """The start fails at once and says that nobody known signed the certificate, be it another
    authority's or the system's authorities are asked for a private one."""
    other = await refused(start(*stranger.certificate("alien")).url)
    system = await refused(good.address)

    assert "certificate" in other
    assert "unable to get local issuer" in other
    assert "certificate" in system


async def test_a_plain_server_on_the_tls_port_never_gets_a_command(log: Lines) -> None:
    """A server that does not speak TLS is not talked to in plaintext: the start ends within its
    timeout, asks whether the port speaks TLS, and no command was written."""
    with Server(port=0) as server:
        async with Proxy(server.port) as proxy:
            url = proxy.url.replace("redis://", "rediss://:hunter2@")
            bus = EventBus(url, connect_timeout=2.0, redis_options={"socket_connect_timeout": 0.3})
            with pytest.raises(BusUnavailable) as caught:
                await soon(bus.start())

            assert "TLS" in str(caught.value)
            assert "hunter2" not in str(caught.value) + repr(bus) + "".join(log.lines)
            assert proxy.pairs
            assert not [pair for pair in proxy.pairs if b"PING" in pair.said]
            assert not [pair for pair in proxy.pairs if b"hunter2" in pair.said]


async def test_a_plain_answer_to_the_hello_is_refused_at_once() -> None:
    """A server that answers in plaintext, as a full Redis does, is refused at once."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR max number of clients reached\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as plain:
        text = await refused(f"rediss://localhost:{plain.sockets[0].getsockname()[1]}")

    assert "TLS: " in text
    assert "WRONG_VERSION_NUMBER" in text.upper().replace(" ", "_")


async def test_a_tls_port_is_not_reached_without_tls(good: Secure) -> None:
    """A plaintext URL to a TLS port does not work, and says where it tried."""
    url = good.address.replace("rediss://", "redis://")
    with pytest.raises(BusUnavailable) as caught:
        await soon(EventBus(url, connect_timeout=0.5).start())

    assert url in str(caught.value)


@pytest.mark.parametrize("mode", ["down_hole", "stall"])
async def test_a_server_that_stalls_in_the_handshake_is_given_up(good: Secure, mode: Mode) -> None:
    """A handshake that never ends, or never begins, does not outlast connect_timeout, and nothing
    is left behind."""
    async with Proxy(good.port, mode=mode) as proxy:
        tasks = asyncio.all_tasks()
        bus = EventBus(
            proxy.url.replace("redis:", "rediss:"),
            connect_timeout=0.5,
            redis_options={"socket_connect_timeout": 0.2},
        )
        with pytest.raises(BusUnavailable) as caught:
            await soon(bus.start())
        assert "TLS" in str(caught.value)
        proxy.mode = "close"  # for one that is only now accepted
        proxy.cut()
        await soon(settled(tasks))


async def settled(tasks: set[asyncio.Task[object]]) -> None:
    """Return when no task is left that was not there."""
    while not asyncio.all_tasks() - {asyncio.current_task()} <= tasks:
        await checkpoint()


# -- What is unwise --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, option",
    [
        ("?ssl_cert_reqs=none", "ssl_cert_reqs=none"),
        ("&ssl_check_hostname=false", "ssl_check_hostname=false"),
    ],
)
async def test_tls_that_checks_nothing_works_and_warns(
    start: Start, authority: Authority, log: Lines, query: str, option: str
) -> None:
    """Without the check of the certificate, or of its host, the bus works and warns once per start,
    naming the option."""
    host = "example.com" if query.startswith("&") else "localhost"
    server = start(*authority.certificate("lax", host=host))
    url = server.url + query if query.startswith("&") else server.address + query
    for started in (1, 2):
        async with EventBus(url) as bus:
            assert (await bus.publish(Note(to="a", n=1))).receivers == 0
        warnings = [line for line in log.lines if option in line]
        assert len(warnings) == started
        assert server.address in warnings[0]


async def test_a_file_that_is_no_certificate_is_refused(good: Secure, tmp_path: Path) -> None:
    """A missing file of authorities fails the start and is named as the reason."""
    missing = tmp_path / "nothing.pem"
    url = f"{good.address}?ssl_ca_certs={quote(str(missing))}"
    with pytest.raises(BusUnavailable) as caught:
        await soon(EventBus(url, connect_timeout=0.5).start())

    assert "No such file" in str(caught.value)


def test_a_misspelt_tls_option_is_refused_at_once() -> None:
    """An option that redis-py does not know is an error when the bus is made, and is named."""
    with pytest.raises(EventBusError, match="ssl_ca_cert"):
        EventBus("rediss://localhost?ssl_ca_cert=x.pem")
    with pytest.raises(EventBusError, match="maybe"):
        EventBus("rediss://localhost?ssl_cert_reqs=maybe")
