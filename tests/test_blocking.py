"""The blocking publisher: the same events and errors, from any thread and process."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync

from eventbus import (
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    InvalidChannel,
    InvalidEvent,
    Message,
    PayloadTooLarge,
    PermissionDenied,
)
from eventbus.blocking import Publisher
from eventbus.portal import guard
from eventbus.server import Server
from tests.faults.controller import Controller
from tests.helpers import Seen, soon

ROOT = Path(__file__).parents[1]
PATIENT: dict[str, Any] = {"connect_timeout": 20.0, "publish_timeout": 20.0}
"""On a busy machine nothing is to be refused that would be taken in time elsewhere."""


class Note(Event, channel="note:{to}"):
    to: str
    n: int = 0


@pytest.fixture
def publisher(url: str) -> Iterator[Publisher]:
    """A publisher on each transport in turn."""
    with Publisher(url, name="web", **PATIENT) as publisher:
        yield publisher


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may freeze, and whose clients it may count."""
    with Server() as server:
        yield server


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[Seen[Message[Any]]]:
    """Everything that arrives at a server."""
    seen: Seen[Message[Any]] = Seen()
    bus = EventBus(url)

    @bus.on("*")
    async def hear(message: Message[bytes]) -> None:
        seen.append(message)

    async with bus:
        yield seen


def clients(server: Server) -> int:
    """The connections at a server beside the one that asks."""
    with redis.Redis(unix_socket_path=server.socket_path) as client:
        return len(client.client_list()) - 1


async def until(is_so: Callable[[], bool]) -> None:
    """Return when it is so. TimeoutError after a while."""
    async with asyncio.timeout(30):
        while not is_so():
            await checkpoint()


@asynccontextmanager
async def process(*words: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that ends with the block, and all that it has forked with it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", *words),
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


def said(errors: bytes) -> list[str]:
    """The lines on stderr, but for asyncio's word that a turn of the loop was slow: around a fork
    it stands still, and a machine may be busy."""
    return [line for line in errors.decode().splitlines() if not line.startswith("Executing <")]


async def program(name: str, *words: str) -> str:
    """What a helper program prints, when it ends well and says nothing on stderr."""
    async with process("-W", "error", "-m", f"tests.blocking.{name}", *words) as running:
        output, errors = await soon(running.communicate(), 50)
        assert (running.returncode, said(errors)) == (0, [])
        return output.decode()


# -- The same events, receipts and errors ----------------------------------------------------------


async def test_an_event_arrives(publisher: Publisher, url: str) -> None:
    """What is published from a thread arrives as what a bus publishes does, and the receipt says to
    how many."""
    async with EventBus(url) as bus, bus.subscribe(Note) as notes:
        first = await run_sync(lambda: publisher.publish(Note(to="a", n=1)))
        second = await run_sync(lambda: publisher.publish("note:b", Note(to="a", n=2)))
        messages = [await soon(anext(notes)) for _ in range(2)]

        assert [message.event.n for message in messages] == [1, 2]
        assert [message.channel for message in messages] == ["note:a", "note:b"]
        assert [message.id for message in messages] == [first.id, second.id]
        assert first.receivers == 1
        assert {message.source for message in messages} == {publisher.bus.source}


async def test_raw_bytes_and_nowait(publisher: Publisher, url: str) -> None:
    """`publish_raw` sends bytes as they are; `publish_nowait` returns the id of what arrives."""
    async with EventBus(url) as bus, bus.subscribe("raw:*", "note:*", bytes) as found:
        await run_sync(lambda: publisher.publish_raw("raw:1", b"\x00\x01"))
        id = await run_sync(lambda: publisher.publish_nowait(Note(to="a")))
        other = await run_sync(lambda: publisher.publish_nowait("note:b", Note(to="a")))
        messages = [await soon(anext(found)) for _ in range(3)]

        assert messages[0].event == b"\x00\x01"
        assert [message.id for message in messages[1:]] == [id, other]
        assert (await run_sync(publisher.stats)).published == 3


async def test_within_a_running_loop(publisher: Publisher) -> None:
    """Called in a running event loop it blocks that loop, and does what it says."""
    assert publisher.publish(Note(to="a")).receivers == 0
    assert publisher.health().state == "live"


@pytest.mark.parametrize(
    "what, kind",
    [
        (lambda p: p.publish("a", 1), InvalidEvent),
        (lambda p: p.publish("a\nb", Note(to="a")), InvalidChannel),
        (lambda p: p.publish(Note(to="a:b")), InvalidChannel),
        (lambda p: p.publish_nowait("", Note(to="a")), InvalidChannel),
        (lambda p: p.publish_raw("a", b"x" * (1 << 21)), PayloadTooLarge),
    ],
    ids=["no event", "control character", "field", "nowait", "size"],
)
def test_errors_keep_their_class(what: Callable[[Any], Any], kind: type[Exception]) -> None:
    """What `EventBus.publish` raises comes out as it is, with the lines of this program above those
    of the bus; the publisher goes on."""
    with Publisher(f"memory://{secrets.token_hex(6)}") as publisher:
        with pytest.raises(kind) as info:
            what(publisher)
        assert type(info.value) is kind
        files = [
            Path(frame.filename).name for frame in traceback.extract_tb(info.value.__traceback__)
        ]
        assert files[0] == "test_blocking.py"
        assert "_publisher.py" in files
        assert publisher.publish(Note(to="a")).receivers == 0


async def test_a_denied_channel(private: Server) -> None:
    """A channel that the rules do not allow raises PermissionDenied, with its fields."""
    with Controller() as server:
        await server.acl("web", "on", "nopass", "+@all", "&note:*", "&__eventbus__:*")
        url = server.url.replace("unix://", "unix://web:x@")
        with Publisher(url, **PATIENT) as publisher:
            await run_sync(lambda: publisher.publish(Note(to="a")))
            with pytest.raises(PermissionDenied) as info:
                await run_sync(lambda: publisher.publish("other:a", Note(to="a")))
            assert info.value.channel == "other:a"


def test_settings_are_checked_at_once() -> None:
    """A wrong URL or setting is refused where the publisher is made, not at the first publish."""
    with pytest.raises(EventBusError, match="no transport"):
        Publisher("http://localhost")
    with pytest.raises(ValueError, match="publish_timeout"):
        Publisher("memory://x", publish_timeout=-1)


def test_middleware_sees_the_context_of_the_caller() -> None:
    """A middleware of the bus behind it runs in the context of the thread that publishes."""
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    found = []
    with Publisher("memory://context") as publisher:

        @publisher.bus.middleware("publish")
        async def look(message: Message[Any], call_next: Any) -> Any:
            found.append(user.get("nobody"))
            return await call_next(message)

        contextvars.copy_context().run(lambda: (user.set("alice"), publisher.publish(Note(to="a"))))
        publisher.publish(Note(to="a"))

    assert found == ["alice", "nobody"]


# -- Life ------------------------------------------------------------------------------------------


async def test_nothing_before_the_first_publish(private: Server) -> None:
    """Neither making a publisher nor asking how it stands connects or starts a thread; closing it
    leaves no connection and no thread."""
    before = threading.active_count()
    publisher = Publisher(private.url, **PATIENT)
    assert publisher.health().state == "closed"
    assert publisher.stats().published == 0
    assert (clients(private), threading.active_count()) == (0, before)
    publisher.publish(Note(to="a"))
    assert clients(private) == 2
    publisher.close()
    publisher.close()
    assert threading.active_count() == before
    await until(lambda: clients(private) == 0)
    with pytest.raises(BusClosed, match="closed"):
        publisher.publish(Note(to="a"))
    assert publisher.stats().published == 1


def test_close_while_it_starts() -> None:
    """A close does not wait for a server that is not there, and whoever publishes is told."""
    publisher = Publisher("redis://127.0.0.1:1", connect_timeout=1.0)
    found: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.publish(Note(to="a"))
        except EventBusError as error:
            found.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    publisher.close()
    thread.join(30)
    assert isinstance(found[0], BusUnavailable | BusClosed)


async def test_forgotten(private: Server) -> None:
    """A publisher that nobody holds any more lets go of its connections."""
    publisher = Publisher(private.url, **PATIENT)
    publisher.publish(Note(to="a"))
    del publisher
    gc.collect()
    await until(lambda: clients(private) == 0)


def test_forgotten_while_another_begins() -> None:
    """Letting go of a publisher waits for nobody: the garbage collector does it in any thread, also
    in one that is waited for by who makes the next publisher ready."""
    held = [Publisher("memory://forgotten")]
    held[0].publish(Note(to="a"))
    thread = threading.Thread(target=held.clear)
    with guard:
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


async def test_threads_share_one_connection(private: Server) -> None:
    """Eight threads that begin at one moment have one bus: one source, and no hole in its
    numbers."""
    barrier = threading.Barrier(8)
    with Publisher(private.url, **PATIENT) as publisher:

        def publish() -> None:
            barrier.wait(20)
            for n in range(25):
                publisher.publish(Note(to="a", n=n))

        async with listening(private.url) as seen:
            threads = [threading.Thread(target=publish) for _ in range(8)]
            for thread in threads:
                thread.start()
            await seen.reach(200)
            for thread in threads:
                thread.join(20)
        assert len({message.source for message in seen}) == 1
        assert [message.sequence for message in seen] == list(range(1, 201))
        assert clients(private) == 2


async def test_an_outage_at_the_start(private: Server) -> None:
    """While the server is away a first publish raises BusUnavailable after `connect_timeout`, the
    next one at once; when it is back, so is the publisher."""
    private.stop()
    with Publisher(private.url, connect_timeout=0.2) as publisher:
        with pytest.raises(BusUnavailable, match="could not be reached") as first:
            await run_sync(lambda: publisher.publish(Note(to="a")))
        with pytest.raises(BusUnavailable) as second:
            await run_sync(lambda: publisher.publish(Note(to="a")))
        assert first.value.waited == 0.2
        assert second.value.waited in (0.0, 0.2)  # on a very slow machine it has tried anew
        private.start()

        def published() -> bool:
            try:
                return publisher.publish(Note(to="a")).receivers == 0
            except BusUnavailable:
                return False

        async with asyncio.timeout(30):
            while not await run_sync(published):
                await checkpoint()


def test_an_interrupted_publish() -> None:
    """KeyboardInterrupt in a publish that is on its way withdraws it, and the publisher goes on."""
    withdrawn = threading.Event()
    main = threading.main_thread().ident
    with Publisher("memory://interrupted") as publisher:

        @publisher.bus.middleware("publish")
        async def hold(message: Message[Any], call_next: Any) -> Any:
            if message.event.n:
                return await call_next(message)
            signal.pthread_kill(main, signal.SIGINT)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                withdrawn.set()
                raise

        with pytest.raises(KeyboardInterrupt):
            publisher.publish(Note(to="a", n=0))
        assert withdrawn.wait(20)
        publisher.publish(Note(to="a", n=1))
        assert publisher.stats().published == 1


def test_inside_its_own_thread() -> None:
    """A blocking publish in the publisher's own thread is an error, and no deadlock."""
    with Publisher("memory://inside") as publisher:

        @publisher.bus.middleware("publish")
        async def wrong(message: Message[Any], call_next: Any) -> Any:
            assert publisher.health().state == "live"
            publisher.publish(message.event)

        with pytest.raises(EventBusError, match="wait for itself"):
            publisher.publish(Note(to="a"))


async def test_a_close_lets_what_is_on_its_way_arrive(private: Server) -> None:
    """What `publish_nowait` took before a close has arrived after it."""
    async with listening(private.url) as seen:
        publisher = Publisher(private.url, **PATIENT)

        def publish() -> None:
            for n in range(100):
                publisher.publish_nowait(Note(to="a", n=n))
            publisher.close()

        await run_sync(publish)
        await seen.reach(100)


# -- Processes -------------------------------------------------------------------------------------


async def test_forks(valkey: Server) -> None:
    """A publisher that is used before, while and after its process forks, with a second thread
    always publishing: each process has its own source, and each source its own numbers from 1, none
    missing."""
    numbers: dict[tuple[str | None, str], list[int | None]] = defaultdict(list)
    async with listening(valkey.url) as seen:
        lines = (await program("forks", valkey.url, "5")).split("\n")[:-1]
        await seen.reach(1 + 11 * 10)
        sources = dict(reversed(line.split()) for line in lines)
        await until(lambda: sum(m.channel == "note:parent" for m in seen) == 10)
    for message in seen:
        numbers[message.source, message.channel].append(message.sequence)

    assert len(sources) == 11
    assert len(set(sources.values())) == 11
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())
    for part, source in sources.items():
        assert len(numbers[source, f"note:{part}"]) == 10
    assert {source for source, channel in numbers if channel == "note:thread"} == {
        sources["parent"]
    }


async def test_a_child_does_not_keep_the_connection_of_its_parent(private: Server) -> None:
    """When the parent closes, its connections end although a child lives on; the child publishes on
    its own, and ends without a word."""
    words = ("-W", "error", "-m", "tests.blocking.inherits", private.url)
    async with listening(private.url) as seen:
        own = clients(private)
        async with process(*words) as running:
            assert running.stdout
            assert await soon(running.stdout.readline(), 40) == b"closed\n"
            await until(lambda: clients(private) == own)
            rest, errors = await soon(running.communicate(b"go\n"), 40)
        await until(lambda: seen[-1].channel == "raw:child")
    assert (running.returncode, rest, said(errors)) == (0, b"", [])


@pytest.mark.parametrize(
    "how, said", [("plain", ""), ("thread", ""), ("late", "the publisher is closed\n")]
)
async def test_exits(valkey: Server, how: str, said: str) -> None:
    """A program that does not close its publisher ends and says nothing of it, and what it has
    published without waiting arrives."""
    async with listening(valkey.url) as seen:
        assert await program("ends", valkey.url, how) == said
        await until(lambda: [m.sequence for m in seen if m.channel == "note:end"][-1:] == [10])


async def test_gunicorn(valkey: Server, tmp_path: Path) -> None:
    """In a pre-fork server whose master has published before it forks, each worker has a source of
    its own, and its numbers are without a hole."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("flask")
    socket = str(tmp_path / "web.sock")
    words = ["-m", "gunicorn", "-c", "tests/blocking/gunicorn_conf.py", "--bind", f"unix:{socket}"]
    app = "tests.blocking.flask_app:app"
    async with (
        listening(valkey.url) as seen,
        process(*words, app, EVENTBUS_URL=valkey.url) as running,
    ):
        await soon(seen.reach(1), 40)  # the master's
        answers: list[bytes] = []
        async with asyncio.timeout(40):
            while len({message.source for message in seen}) < 3:
                answers += await asyncio.gather(*(post(socket) for _ in range(6)))
        await seen.reach(1 + len(answers))
        running.terminate()
        _, log = await soon(running.communicate(), 40)
    assert all(b"201 CREATED" in answer for answer in answers)
    assert running.returncode == 0, log.decode()
    numbers: dict[Any, list[int | None]] = defaultdict(list)
    for message in seen:
        numbers[message.source].append(message.sequence)
    assert all(found == list(range(1, len(found) + 1)) for found in numbers.values())
    assert numbers[seen[0].source] == [1]


async def post(path: str) -> bytes:
    """The answer of the application to one order; tries until somebody listens."""
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(path)
            break
        except OSError:
            await checkpoint()
    writer.write(b"POST /orders/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


async def test_celery(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Celery task publishes."""
    pytest.importorskip("celery")
    monkeypatch.setenv("EVENTBUS_URL", valkey.url)
    from tests.blocking.celery_app import make_report, publisher

    async with listening(valkey.url) as seen:
        result = await run_sync(lambda: make_report.apply([7]))
        [message] = await seen.reach(1)
    publisher.close()
    assert (result.get(), message.channel) == (message.id, "report:7")


async def test_django(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Django view publishes."""
    django = pytest.importorskip("django")
    monkeypatch.setenv("EVENTBUS_URL", valkey.url)
    from django.conf import settings
    from django.test import Client

    settings.configure(ROOT_URLCONF="tests.blocking.django_app", ALLOWED_HOSTS=["*"])
    django.setup()
    from tests.blocking.django_app import publisher

    async with listening(valkey.url) as seen:
        answer = await run_sync(lambda: Client().get("/orders/8"))
        [message] = await seen.reach(1)
    publisher.close()
    assert (answer.json()["id"], message.channel) == (message.id, "order:8")
