"""Where a bus connects: URLs, the environment, redis_options, existing clients, and what is shown.

A secret may be in a URL, in options and in a client. It must be in no text that the bus makes.
"""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import redis.asyncio
from redis.asyncio.sentinel import Sentinel

import eventbus
from eventbus import BusClosed, EventBus, EventBusError, PermissionDenied
from eventbus.server import Server
from eventbus.server import main as stop_or_start
from tests.helpers import Lines, Seen, soon
from tests.test_failure import Note, listener

PASSWORD = "p#s/w?:@ %é"  # every character that has a meaning in a URL


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server on TCP and a unix socket, with a user whose password is hard to write."""
    with Server(port=0) as server:
        client = redis.Redis(port=server.port or 0)
        client.execute_command("ACL", "SETUSER", "app", "on", f">{PASSWORD}", "~*", "&*", "+@all")
        client.close()
        yield server


async def works(bus: EventBus) -> None:
    """Assert that the bus publishes and receives, and that its client answers."""
    seen: Seen[int] = Seen()

    @bus.on("note:*")
    async def keep(event: Note) -> None:
        seen.append(event.n)

    async with bus:
        assert (await bus.publish(Note(to="a", n=7))).receivers == 1
        await seen.reach(1)
        assert await bus.redis().ping()


# -- URLs ------------------------------------------------------------------------------------------


URLS = {
    "tcp": "redis://127.0.0.1:{port}",
    "name": "redis://localhost:{port}/",
    "database": "redis://localhost:{port}/3",
    "query": "redis://localhost:{port}?db=2&socket_timeout=3&health_check_interval=5",
    "pool": "redis://localhost:{port}?max_connections=5&timeout=3&decode_responses=True",
    "resp3": "redis://localhost:{port}?protocol=3",
    "user": "redis://app:{password}@localhost:{port}",
    "user in the query": "redis://localhost:{port}?username=app&password={password}",
    "unix": "unix://{path}",
    "unix with a user": "unix://app:{password}@{path}?db=1",
}
"""Ways to write the same server."""


def url_of(server: Server, how: str) -> str:
    """One of these for this server."""
    password = quote(PASSWORD, safe="")
    return URLS[how].format(port=server.port, path=quote(server.socket_path), password=password)


@pytest.mark.parametrize("how", URLS)
async def test_a_url_leads_to_the_server(server: Server, how: str, log: Lines) -> None:
    """A bus and its client reach the server by every spelling of its URL, and show the address
    without the user's password."""
    bus = EventBus(url_of(server, how))
    await works(bus)

    address = server.socket_path if how.startswith("unix") else f":{server.port}"
    assert address in repr(bus)
    assert all("keeps nothing apart" in line for line in log.lines)  # of a database number
    for text in (PASSWORD, quote(PASSWORD, safe="")):
        assert text not in repr(bus)


@pytest.mark.parametrize(
    "url",
    [
        "redis://app:hunter#2@localhost:6379",
        "redis://app:6#hunter2@localhost:6379",
        "redis://app#hunter2@localhost:6379",
        "redis://:hunter/2@localhost:6379",
        "redis://app:6/hunter2@localhost:6379",
        "redis://:6?hunter2@localhost:6379",
        "redis://:hunter2@localhost:port",
        "redis://:hunter2@localhost:99999999",
        "redis://:hunter2@[::1:6379",
        "redis://:hunter2@localhost?socket_timeout=soon",
        "rediss://app:hunter#2@localhost:6379",
        "redis+sentinel://:hunter#2@localhost/main",
        "redis+sentinel://:hunter/2@localhost/main",
        "redis+sentinel://app:6/hunter2@localhost/main",
        "redis+sentinel://:hunter2@localhost:port/main",
        "redis+sentinel://:hunter2@,localhost/main",
        "redis+sentinel://:hunter2@/main",
    ],
)
def test_an_unreadable_url_is_an_error_without_the_secret(url: str) -> None:
    """A URL that cannot be read, such as one with a bare '#' in its password, is refused when the
    bus is made: with advice, and without any part of the password."""
    with pytest.raises(EventBusError) as caught:
        EventBus(url)

    shown = f"{caught.value} {caught.value!r}"
    assert "percent-encoded" in shown
    assert "hunter" not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_sentinel_url_names_its_master() -> None:
    """A Sentinel URL without the name of the master says what is missing."""
    with pytest.raises(EventBusError, match="name of the master"):
        EventBus("redis+sentinel://:hunter2@localhost:26379")


@pytest.mark.parametrize(
    "url, shown",
    [
        ("redis://", "redis://localhost:6379"),
        ("redis://:pw@h", "redis://h:6379"),
        ("redis://u:pw@[::1]:7000/2", "redis://[::1]:7000"),
        ("rediss://u:pw@h:7000", "rediss://h:7000"),
        ("unix://u:pw@/run/r.sock?db=3", "unix:///run/r.sock"),
        ("redis+sentinel://u:pw@a:1,b,[::1]:3/main?db=1", "redis+sentinel://a:1,b,[::1]:3/main"),
        ("rediss+sentinel://u:pw@a:1/main", "rediss+sentinel://a:1/main"),
        ("memory://x", "memory://x"),
    ],
)
def test_a_bus_shows_its_address(url: str, shown: str) -> None:
    """repr(bus) tells name, state and address, and nothing else of the URL."""
    assert repr(EventBus(url, name="api")) == f"<EventBus api closed at {shown}>"


@pytest.mark.parametrize("url", ["kafka://localhost", "http://localhost:6379", "REDIS", ""])
def test_an_unknown_scheme_names_those_that_there_are(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL of another scheme is refused when the bus is made, with the schemes that work."""
    monkeypatch.delenv("EVENTBUS_URL", raising=False)
    with pytest.raises(EventBusError) as caught:
        EventBus(url)

    for scheme in ("redis", "rediss", "unix", "redis+sentinel", "memory", "embedded"):
        assert f"{scheme}://" in str(caught.value)


@pytest.mark.parametrize("target", [7, b"redis://localhost", object(), redis.Redis()])
def test_what_is_no_url_and_no_client_is_refused(target: Any) -> None:
    """Anything but a URL or a redis.asyncio.Redis is refused, and its type is named."""
    with pytest.raises(EventBusError, match=re.escape(type(target).__name__)):
        EventBus(target)


async def test_the_environment_and_the_default(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a URL, EVENTBUS_URL counts, and without that, or when it is empty, the local Redis;
    an argument wins over both."""
    monkeypatch.setenv("EVENTBUS_URL", server.url)
    await works(EventBus())
    assert "memory://" in repr(EventBus("memory://x"))
    monkeypatch.setenv("EVENTBUS_URL", "")
    assert "redis://localhost:6379" in repr(EventBus())
    monkeypatch.delenv("EVENTBUS_URL")
    assert "redis://localhost:6379" in repr(EventBus())


async def test_embedded_starts_a_server_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buses with embedded:// of one name meet at one server, which is started when needed."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = "embedded://t"
    try:
        bus, seen, _ = listener(url)
        async with bus, EventBus(url) as other:
            await other.publish(Note(to="a", n=1))
            await seen.reach(1)
        assert str(tmp_path) in repr(bus)
    finally:
        assert stop_or_start(["stop", "t"]) == 0


@pytest.mark.parametrize("name", ["../x", "a b", "a/b"])
def test_a_bad_embedded_name_is_our_error(name: str) -> None:
    """A name that is no plain word is an EventBusError."""
    with pytest.raises(EventBusError, match="bad server name"):
        EventBus(f"embedded://{name}")


def test_embedded_without_a_binary_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server to start, embedded:// is an EventBusError that says what to do."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("EVENTBUS_SERVER", str(tmp_path / "none"))
    with pytest.raises(EventBusError, match="EVENTBUS_SERVER"):
        EventBus("embedded://t")


def test_redis_works_where_there_is_no_fcntl() -> None:
    """On a system without fcntl (Windows) every scheme but embedded:// can be used, and that one
    says why not."""
    program = """
import sys
sys.modules["fcntl"] = None
from eventbus import EventBus, EventBusError
for url in ("redis://h", "rediss://h", "redis+sentinel://h/m", "memory://x"):
    EventBus(url)
try:
    EventBus("embedded://")
except EventBusError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "fcntl" in done.stdout


# -- Options ---------------------------------------------------------------------------------------


async def test_redis_options_are_handed_to_redis_py(server: Server, log: Lines) -> None:
    """redis_options reach both connections and the bus's own client, and win over the URL."""
    bus = EventBus(
        f"redis://nobody:wrong@localhost:{server.port}?client_name=url",
        redis_options={"username": "app", "password": PASSWORD, "client_name": "till"},
    )
    await works(bus)
    async with bus:
        clients = await bus.redis().client_list()
        mine = [client for client in clients if client["user"] == "app"]

        assert [client["name"] for client in mine] == ["till"] * 3
        assert "wrong" not in repr(bus)
        assert PASSWORD not in repr(bus)


async def test_the_caller_keeps_his_options(server: Server) -> None:
    """A change of the dictionary after the bus was made changes nothing, and the bus does not
    change it."""
    options = {"client_name": "till"}
    bus = EventBus(server.url, redis_options=options)
    options["client_name"] = "other"
    async with bus:
        names = {client["name"] for client in await bus.redis().client_list()}

    assert "till" in names
    assert "other" not in names
    assert options == {"client_name": "other"}


@pytest.mark.parametrize(
    "url, options",
    [
        ("redis://localhost", {"pasword": "hunter2"}),
        ("redis://localhost?pasword=hunter2", {}),
        ("redis+sentinel://localhost/main", {"pasword": "hunter2"}),
    ],
)
def test_a_misspelt_option_is_refused_at_once(url: str, options: dict[str, Any]) -> None:
    """An option that redis-py does not know is refused when the bus is made, by its name; its value
    is not shown."""
    with pytest.raises(EventBusError, match="pasword") as caught:
        EventBus(url, redis_options=options)

    assert "hunter2" not in str(caught.value)


async def test_credentials_may_come_from_a_provider(server: Server) -> None:
    """A credential provider of redis-py is asked at each connect."""
    asked = []

    class Provider(redis.CredentialProvider):
        async def get_credentials_async(self) -> tuple[str, str]:
            asked.append(1)
            return "app", PASSWORD

    bus = EventBus(
        f"redis://localhost:{server.port}", redis_options={"credential_provider": Provider()}
    )
    async with bus:
        await bus.publish(Note(to="a", n=1))
        assert await bus.redis().acl_whoami() == "app"
        assert len(asked) == 3


async def test_the_name_begins_the_source(server: Server) -> None:
    """`name` begins the source of what a bus publishes, and repr(bus)."""
    async with EventBus(server.url, name="api") as bus, bus.subscribe("note:*") as messages:
        await bus.publish(Note(to="a", n=1))
        message = await soon(anext(messages))

        assert re.fullmatch(r"api/[0-9a-f]{16}", message.source or "")
        assert repr(bus).startswith("<EventBus api live at")


async def test_no_text_holds_the_password(server: Server, log: Lines) -> None:
    """The password is in no log line and in no error of a bus that is refused, and not in its
    repr, whether it came by URL, by options or with a client."""
    address = f"localhost:{server.port}"
    client = redis.asyncio.Redis(port=server.port or 0, username="app", password="hunter2")
    buses = [
        EventBus(f"redis://app:hunter2@{address}"),
        EventBus(f"redis://{address}", redis_options={"username": "app", "password": "hunter2"}),
        EventBus(client),
    ]
    for bus in buses:
        with pytest.raises(PermissionDenied) as caught:
            await soon(bus.start())
        text = f"{caught.value} {caught.value!r} {vars(caught.value)} {bus!r}"
        assert "hunter2" not in text
        assert address in text
        assert caught.value.user == "app"
    assert "hunter2" not in "".join(log.lines)
    await client.aclose()


# -- An existing client ----------------------------------------------------------------------------


CLIENTS: dict[str, Callable[[Server], redis.asyncio.Redis]] = {
    "tcp": lambda s: redis.asyncio.Redis(host="127.0.0.1", port=s.port),
    "unix": lambda s: redis.asyncio.Redis(unix_socket_path=s.socket_path),
    "url": lambda s: redis.asyncio.Redis.from_url(url_of(s, "user") + "/2"),
    "password": lambda s: redis.asyncio.Redis(port=s.port, username="app", password=PASSWORD),
    "decoding": lambda s: redis.asyncio.Redis(port=s.port, decode_responses=True),
    "resp3": lambda s: redis.asyncio.Redis(port=s.port, protocol=3, health_check_interval=1),
    "no timeout": lambda s: redis.asyncio.Redis(port=s.port, protocol=2, socket_timeout=None),
    "single": lambda s: redis.asyncio.Redis(port=s.port, single_connection_client=True),
    "blocking pool": lambda s: redis.asyncio.Redis.from_pool(
        redis.asyncio.BlockingConnectionPool(port=s.port, max_connections=1, timeout=3)
    ),
    "pool of one": lambda s: redis.asyncio.Redis.from_pool(
        redis.asyncio.ConnectionPool(port=s.port, max_connections=1)
    ),
}
"""Clients as applications have them."""


@pytest.mark.parametrize("how", CLIENTS)
async def test_an_existing_client_is_taken_and_left_alone(server: Server, how: str) -> None:
    """A bus connects as the client does, with protocol and decoding of its own; it holds no
    connection of the client's pool, and the client works before, meanwhile and after."""
    client = CLIENTS[how](server)
    pool = client.connection_pool
    held = lambda: (len(pool._available_connections), len(pool._in_use_connections))  # noqa: E731
    bus = EventBus(client)
    await works(bus)
    assert held() == (0, 0)

    await client.set("key", "wert")
    before = held()
    other, seen, _ = listener(client)
    async with other:
        await other.publish(Note(to="é", n=1))
        await seen.reach(1)
        expected = "wert" if how == "decoding" else b"wert"
        assert await client.get("key") == expected
        assert await other.redis().get("key") == expected, "the options of the client"
        assert other.redis() is not client
        assert held() == before

    assert held() == before
    assert await client.get("key") == expected
    assert PASSWORD not in repr(other)
    await client.aclose()


async def test_options_win_over_those_of_the_client(server: Server) -> None:
    """redis_options are laid over the client's arguments."""
    client = redis.asyncio.Redis(port=server.port or 0, username="app", password="hunter2")
    await works(EventBus(client, redis_options={"password": PASSWORD}))
    await client.aclose()


async def test_a_subclass_of_the_connection_is_used(server: Server) -> None:
    """The client's connection class opens the bus's connections."""
    made = []

    class Mine(redis.asyncio.Connection):
        async def connect(self) -> None:
            made.append(self)
            await super().connect()

    pool = redis.asyncio.ConnectionPool(connection_class=Mine, port=server.port)
    client = redis.asyncio.Redis(connection_pool=pool)
    async with EventBus(client) as bus:
        await bus.publish(Note(to="a", n=1))
        assert len(made) == 2
    await client.aclose()


def test_a_client_of_a_sentinel_is_shown_as_such() -> None:
    """A client that asks Sentinels for its master keeps asking them, and shows no secret."""
    sentinel = Sentinel([("h1", 1), ("h2", 2)], sentinel_kwargs={"password": "hunter2"})
    client = sentinel.master_for("main", password="hunter2")

    assert "redis+sentinel://h1:1,h2:2/main" in repr(EventBus(client))
    assert "hunter2" not in repr(EventBus(client))


# -- bus.redis() -----------------------------------------------------------------------------------


async def test_the_client_of_the_bus_is_closed_with_it(server: Server) -> None:
    """`bus.redis()` is one client for the life of the bus; when the bus has stopped, none of its
    connections is left, and asking for it is BusClosed."""
    async with EventBus(server.url) as watch:
        bus = EventBus(server.url, redis_options={"client_name": "till"})
        async with bus:
            client = bus.redis()
            assert bus.redis() is client
            await asyncio.gather(*(client.blpop(["nothing"], timeout=0.01) for _ in range(5)))
            names = [found["name"] for found in await watch.redis().client_list()]
            assert names.count("till") == 7
        names = [found["name"] for found in await watch.redis().client_list()]
        assert "till" not in names
        with pytest.raises(BusClosed):
            bus.redis()
        async with bus:
            assert bus.redis() is not client
            assert await bus.redis().ping()


async def test_memory_has_no_client() -> None:
    """`bus.redis()` on memory:// is refused in a sentence."""
    async with EventBus("memory://x") as bus:
        with pytest.raises(EventBusError, match=r"memory://.* \w+"):
            bus.redis()


# -- redis-py's insides ----------------------------------------------------------------------------


def test_the_insides_of_redis_py_are_touched_in_one_place() -> None:
    """Only the class that takes a connection over touches redis-py's private reader and writer."""
    touched = set()
    for file in Path(eventbus.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr in ("_reader", "_writer"):
                    ours = isinstance(node.value, ast.Name) and node.value.id == "self"
                    touched |= set() if ours else {f"{file.name}:{function.name}"}

    assert touched == {"_link.py:adopt"}
