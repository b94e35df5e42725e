"""What must be in no text: a password, a payload, and the bare characters of a hostile name.

The canaries are planted where users have secrets; then the bus goes through everything that can
happen to it, and each text that it made is searched: log lines at DEBUG (its own, redis-py's and
asyncio's), errors with all that caused them, tracebacks, representations, `health()`, `stats()`.
docs/security.md says what is promised.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import secrets
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis
from anyio.lowlevel import checkpoint
from pydantic import BaseModel, field_validator
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

import eventbus
from eventbus import (
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    InvalidChannel,
    InvalidEvent,
    InvalidPattern,
    Message,
    PayloadTooLarge,
    PermissionDenied,
    Router,
)
from eventbus.server import Server
from tests.faults.proxy import Proxy
from tests.helpers import Lines, Seen, foreign, soon, write

PACKAGE = Path(eventbus.__file__).parent
PASSWORD = "canary-7b41e0"
WRONG = "canary-wrong-e2"
SECRET = "4111-1111-canary"
REDACTS = tuple(int(part) for part in redis.__version__.split(".")[:2]) >= (7, 4)
"""Whether redis-py keeps passwords out of the representation of its clients."""


class Card(Event, channel="ok:card"):
    number: str
    cents: int = 0


# -- Looking at everything -------------------------------------------------------------------------


def ours(root: object) -> Iterator[object]:
    """Every object of the package that can be reached from here."""
    found: dict[int, object] = {}
    todo = deque([root])
    while todo:
        item = todo.popleft()
        if id(item) in found:
            continue
        found[id(item)] = item
        if type(item).__module__.partition(".")[0] == "eventbus":
            yield item
            slots = [name for cls in type(item).__mro__ for name in getattr(cls, "__slots__", ())]
            todo += [getattr(item, name, None) for name in slots]
            todo += getattr(item, "__dict__", {}).values()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | frozenset | deque):
            todo += item


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it came from, told or suppressed."""
    todo, found = deque[BaseException | None]([error]), set[int]()
    while todo:
        item = todo.popleft()
        if item is None or id(item) in found:
            continue
        found.add(id(item))
        yield item
        todo += (item.__cause__, item.__context__)
        if isinstance(item, BaseExceptionGroup):
            todo += item.exceptions


def told_by(error: BaseException) -> Iterator[str]:
    """What a log line, a print and a traceback say of an error."""
    yield from traceback.format_exception(error)
    yield f"{error} {error!r} {vars(error)}"


def texts_of_error(error: BaseException) -> Iterator[str]:
    """Whatever anybody may print of an error: also what a reporter of crashes shows, causes that
    were suppressed and the local variables in our functions."""
    yield from told_by(error)
    for item in chain(error):
        yield from told_by(item)
        for frame, line in traceback.walk_tb(item.__traceback__):
            where = Path(frame.f_code.co_filename)
            if where.is_relative_to(PACKAGE):
                yield f"{where}:{line} {[*map(shown, frame.f_locals.values())]}"


def shown(value: object) -> str:
    """Its representation; that of a thing half made may fail."""
    try:
        return repr(value)
    except Exception as error:
        return f"no repr: {error!r}"


def texts_of(bus: EventBus, errors: Iterable[BaseException] = ()) -> Iterator[str]:
    """Whatever anybody may print of a bus and its errors."""
    yield f"{bus.health()} {bus.stats()}"
    for item in ours(bus):
        yield f"{item!r} {item}"
    for error in errors:
        yield from texts_of_error(error)


def texts_of_log(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """Whatever a handler of log records may write."""
    for record in caplog.records:
        yield f"{record.name} {record.getMessage()} {record.args!r}"
    yield caplog.text


def leaks(canary: str, *texts: Iterable[str]) -> list[str]:
    """The texts with the canary in them."""
    return [text for group in texts for text in group if canary in text]


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All log lines of all loggers."""
    caplog.set_level(logging.DEBUG)
    for name in ("eventbus", "redis", "asyncio", "push_response"):
        caplog.set_level(logging.DEBUG, name)
    return caplog


async def failing(awaitable: Awaitable[Any], kind: type[BaseException]) -> BaseException:
    """The error that it must end with."""
    with pytest.raises(kind) as caught:
        await soon(awaitable, 20)
    return caught.value


# -- A password ------------------------------------------------------------------------------------

RULES = ("~*", "resetchannels", "&ok:*", "&__*", "+@all")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A server with a user `app`, whose password is the canary."""
    user = ("--user", "app", "on", f">{PASSWORD}", *RULES)
    with Server(port=0, options=user) as server:
        yield server


WAYS: dict[str, Callable[[str, str], tuple[Any, dict[str, Any]]]] = {
    "URL": lambda where, word: (f"redis://app:{word}@{where}", {}),
    "URL query": lambda where, word: (f"redis://{where}?username=app&password={word}", {}),
    "redis_options": lambda where, word: (
        f"redis://{where}",
        {"redis_options": {"username": "app", "password": word}},
    ),
    "client": lambda where, word: (Redis.from_url(f"redis://app:{word}@{where}"), {}),
}


def bus_by(way: str, url: str, word: str = PASSWORD, **settings: Any) -> EventBus:
    """A bus that has the password from one of the places where users put it."""
    target, more = WAYS[way](url.removeprefix("redis://"), word)
    return EventBus(target, **{"connect_timeout": 5.0, **more, **settings})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.scenario(22)
async def test_no_password_in_a_refusal(
    way: str, guarded: Server, everything: pytest.LogCaptureFixture
) -> None:
    """A server that refuses the password: neither it nor the right one is in any text."""
    bus = bus_by(way, guarded.url, WRONG)
    error = await failing(bus.start(), PermissionDenied)
    assert not leaks(WRONG, texts_of(bus, [error]), texts_of_log(everything))
    assert everything.records


@pytest.mark.parametrize("way", WAYS)
async def test_no_password_while_the_server_is_away(
    way: str, everything: pytest.LogCaptureFixture
) -> None:
    """A server that is not there: the password is in no text."""
    bus = bus_by(way, "redis://127.0.0.1:1", connect_timeout=0.05)
    error = await failing(bus.start(), BusUnavailable)
    assert not leaks(PASSWORD, texts_of(bus, [error]), texts_of_log(everything))


@pytest.mark.parametrize("way", WAYS)
async def test_no_password_in_a_life(way: str, everything: pytest.LogCaptureFixture) -> None:
    """Start, failing handlers, denials, garbage, a frozen and a dead server, and the stop: the
    password is in no text at any moment."""
    errors: list[BaseException] = []
    found: list[str] = []
    user = ("--user", "app", "on", f">{PASSWORD}", *RULES)
    with Server(port=0, options=user) as server:
        async with Proxy(server.port) as proxy:
            bus = bus_by(way, proxy.url, publish_timeout=0.1, heartbeat=0.2, drain_timeout=0.5)
            called = Seen[str]()

            @bus.on("ok:*")
            async def fails(event: Card) -> None:
                called.append(event.number)
                raise LookupError("a handler failed")

            @bus.on_gap()
            async def fails_too(gap: Gap) -> None:
                raise LookupError("a gap handler failed")

            def look() -> None:
                found.extend(leaks(PASSWORD, texts_of(bus, errors)))

            async with bus:
                await bus.publish(Card(number="1"))
                await called.reach(1)
                errors.append(
                    await failing(bus.publish("no:1", Card(number="2")), PermissionDenied)
                )
                errors.append(await failing(bus.attach(fails, "no:*"), PermissionDenied))
                assert await bus.redis().ping()
                if REDACTS:
                    found += leaks(PASSWORD, [f"{bus.redis()!r} {bus.redis().connection_pool!r}"])
                look()
                for pair in proxy.living():
                    pair.client.write(b"garbage\r\n")
                async with asyncio.timeout(20):
                    while not bus.stats().reconnects or bus.health().state != "live":
                        await checkpoint()
                look()
                server.freeze()
                errors.append(await failing(bus.publish(Card(number="3")), EventBusError))
                look()
                server.kill()
                async with asyncio.timeout(20):
                    while bus.health().state != "down":
                        await checkpoint()
                while not isinstance(errors[-1], BusUnavailable):
                    errors.append(await failing(bus.publish(Card(number="4")), EventBusError))
                look()
            look()
    assert not found
    assert not leaks(PASSWORD, texts_of_log(everything))
    assert "a handler failed" in everything.text


TARGETS = {
    "TLS": f"rediss://app:{PASSWORD}@127.0.0.1:{{port}}",
    "TLS, unchecked": f"rediss://app:{PASSWORD}@127.0.0.1:{{port}}?ssl_cert_reqs=none",
    "Sentinel": f"redis+sentinel://app:{PASSWORD}@127.0.0.1:1,127.0.0.1:{{port}}/main",
    "Sentinel over TLS": f"rediss+sentinel://app:{PASSWORD}@127.0.0.1:{{port}}/main",
}


@pytest.mark.parametrize("kind", TARGETS)
async def test_no_password_of_tls_and_sentinels(
    kind: str, guarded: Server, everything: pytest.LogCaptureFixture
) -> None:
    """TLS and Sentinel URLs that lead to no such server: the passwords, those of the Sentinels
    included, are in no text."""
    options: dict[str, Any] = {"socket_timeout": 0.2, "socket_connect_timeout": 0.2}
    if "Sentinel" in kind:
        options["sentinel_kwargs"] = {"username": "app", "password": PASSWORD}
    url = TARGETS[kind].format(port=guarded.port)
    bus = EventBus(url, connect_timeout=0.5, redis_options=options)
    error = await failing(bus.start(), EventBusError)
    assert not leaks(PASSWORD, texts_of(bus, [error]), texts_of_log(everything))


async def test_no_password_of_a_client_of_sentinels(
    everything: pytest.LogCaptureFixture,
) -> None:
    """A client that asks Sentinels: its password and theirs are in no text."""
    theirs = Sentinel([("127.0.0.1", 1)], sentinel_kwargs={"password": PASSWORD})
    bus = EventBus(theirs.master_for("main", password=PASSWORD), connect_timeout=0.1)
    error = await failing(bus.start(), BusUnavailable)
    assert not leaks(PASSWORD, texts_of(bus, [error]), texts_of_log(everything))


UNREADABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "a bare #": (f"redis://app:{PASSWORD}#x@localhost", {}),
    "a bare /": (f"redis://app:{PASSWORD}/x@localhost", {}),
    "a bare ?": (f"redis://app:{PASSWORD}?x@localhost", {}),
    "no scheme": (f"app:{PASSWORD}@localhost", {}),
    "a scheme nobody knows": (f"amqp://app:{PASSWORD}@localhost", {}),
    "a port that is none": (f"redis://app:{PASSWORD}@localhost:x", {}),
    "no master": (f"redis+sentinel://app:{PASSWORD}@localhost", {}),
    "an option that is none": (f"redis://app:{PASSWORD}@localhost", {"nonsense": 1}),
    "an option of the URL that is none": (f"redis://app:{PASSWORD}@localhost?nonsense=1", {}),
    "two kinds of credentials": (
        "redis://localhost",
        {"username": "app", "password": PASSWORD, "credential_provider": object()},
    ),
}


def unreadable(name: str) -> EventBusError:
    """The error of a target that is refused when the bus is made."""
    target, options = UNREADABLE[name]
    with pytest.raises(EventBusError) as caught:
        EventBus(target, redis_options=options)
    return caught.value


@pytest.mark.parametrize("name", UNREADABLE)
def test_no_password_of_a_target_that_is_refused(name: str) -> None:
    """A URL or an option that cannot be used is refused without the password in the error or its
    traceback."""
    assert not leaks(PASSWORD, told_by(unreadable(name)))


@pytest.mark.parametrize("name", UNREADABLE)
def test_no_password_in_the_variables_of_a_refusal(name: str) -> None:
    """Nor is it in what reporters of crashes show: suppressed causes, and the local variables of
    our functions."""
    assert not leaks(PASSWORD, texts_of_error(unreadable(name)))


def test_no_password_before_a_scheme() -> None:
    """A URL with something before its scheme is refused without quoting that."""
    with pytest.raises(EventBusError) as caught:
        EventBus(f"app:{PASSWORD}@redis://localhost")
    assert not leaks(PASSWORD, told_by(caught.value))


def agree(command: list[bytes]) -> bytes:
    """What a server answers that has nothing against it."""
    if command[0] == b"SUBSCRIBE":
        return b"*3\r\n$9\r\nsubscribe\r\n$%d\r\n%b\r\n:1\r\n" % (len(command[1]), command[1])
    return b"+PONG\r\n" if command[0] == b"PING" else b"+OK\r\n"


@asynccontextmanager
async def answering(answer: Callable[[list[bytes]], bytes]) -> Any:
    """The URL of a server that answers each command as it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader()
        try:
            while data := await reader.read(4096):
                commands.feed(data)
                while (command := commands.gets()) is not False:
                    writer.write(answer(command))
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://app:{PASSWORD}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_no_password_that_the_server_repeats(everything: pytest.LogCaptureFixture) -> None:
    """A server that does not know AUTH quotes the whole command in its error, as Redis does for
    every unknown one; the bus does not pass that on."""

    def quotes(command: list[bytes]) -> bytes:
        given = b" ".join(b"'%b'" % word for word in command[1:])
        return b"-ERR unknown command 'AUTH', with args beginning with: %b\r\n" % given

    async with answering(quotes) as url:
        bus = EventBus(url, connect_timeout=0.2)
        error = await failing(bus.start(), EventBusError)
    assert not leaks(PASSWORD, texts_of(bus, [error]), texts_of_log(everything))


# -- A payload -------------------------------------------------------------------------------------


class Strict(Event):
    """An event whose validator is the user's own code, and quotes what it refuses."""

    number: str

    @field_validator("number")
    @classmethod
    def _known(cls, number: str) -> str:
        raise ValueError(f"no such card: {number}")


class Loose(BaseModel):
    """A model that does not hide its input in errors, as pydantic's are."""

    cents: int


@pytest.fixture
async def debugging() -> Any:
    """The loop logs each of its steps, with the arguments."""
    loop = asyncio.get_running_loop()
    known = loop.slow_callback_duration
    loop.set_debug(True)
    loop.slow_callback_duration = 0
    yield
    loop.set_debug(False)
    loop.slow_callback_duration = known


CASES: dict[str, bytes] = {
    "data that does not fit": write(Card(number="1")).replace(b'"number":"1"', b'"x":"SECRET"'),
    "data of another kind": write(Card(number="1")).replace(b'"cents":0', b'"cents":"SECRET"'),
    "a validator of the user": write(Card(number="SECRET")).replace(b'"Card"', b'"Strict"'),
    "no JSON": b"SECRET",
    "no envelope": b'{"number":"SECRET"}',
    "a wrong envelope": b'{"specversion":"SECRET","SECRET":1}',
    "a foreign envelope": foreign({"number": {"a": "SECRET"}}, type="Card"),
    "data_base64": foreign(None, type="Card", data_base64="SECRET!"),
    "good, but its handler fails": write(Card(number="SECRET")),
    "too large": write(Card(number="SECRET" + 2000 * "x")),
}


@pytest.mark.parametrize("wire", [None, "bare"])
@pytest.mark.parametrize("case", CASES)
async def test_no_payload_of_a_message_in_the_log(
    case: str,
    wire: Any,
    valkey: Server,
    log: Lines,
    everything: pytest.LogCaptureFixture,
    debugging: None,
) -> None:
    """Whatever is wrong with a message, or with its handlers: no log line at any level and no error
    text has a word of it, and neither has one of the loop in debug mode."""
    name = f"pay:{secrets.token_hex(4)}"
    bus = EventBus(valkey.url, max_payload=1000)

    async def fails(event: Card | Strict) -> None:
        raise LookupError("a handler failed")

    def fails_in_a_thread(event: Loose) -> None:
        raise LookupError("a handler failed")

    bus.on(name, wire=wire)(fails_in_a_thread if wire else fails)
    async with bus, Redis.from_url(valkey.url, protocol=2) as other:
        await other.publish(name, CASES[case].replace(b"SECRET", SECRET.encode()))
        await log.hear(name)
        told = [f"{bus.stats()} {bus.health()} {bus!r}"]
    assert not leaks(SECRET, told, texts_of_log(everything))


async def test_no_payload_in_the_errors_of_a_message(valkey: Server) -> None:
    """An exception handler that logs its InvalidEvent, in any way, logs nothing of the payload."""
    bus = EventBus(valkey.url, max_payload=1000)
    errors = Seen[BaseException]()

    @bus.on("errors:*")
    async def take(event: Card | Strict) -> None: ...

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        errors.append(error)

    secret = SECRET.encode()
    payloads = [case.replace(b"SECRET", secret) for case in CASES.values()]
    async with bus, Redis.from_url(valkey.url, protocol=2) as other:
        for payload in payloads:
            await other.publish("errors:1", payload)
        await errors.reach(8)
    assert not leaks(SECRET, *map(told_by, errors))


async def test_no_payload_in_the_errors_of_a_publish(
    valkey: Server, everything: pytest.LogCaptureFixture, debugging: None
) -> None:
    """What cannot be published is refused without a word of it."""
    bus = EventBus(valkey.url, max_payload=1000)
    wrong = Card.model_construct(number=SECRET, cents=SECRET)
    attempts: list[Callable[[], Awaitable[Any]]] = [
        lambda: bus.publish("pub:1", wrong),
        lambda: bus.publish("pub:1", Card(number=SECRET + 2000 * "x")),
        lambda: bus.publish_raw("pub:1", (SECRET + 2000 * "x").encode()),
        lambda: bus.publish_raw("pub:1", SECRET),  # type: ignore[arg-type]
        lambda: bus.publish("pub:1", Loose(cents=1)),  # type: ignore[call-overload]
        lambda: bus.publish("pub:1", SECRET),  # type: ignore[call-overload]
    ]
    async with bus:
        errors = [await failing(attempt(), EventBusError) for attempt in attempts]
        await bus.publish("pub:1", Card(number=SECRET))
    assert not leaks(SECRET, texts_of_log(everything), *map(told_by, errors))


async def test_no_payload_that_the_server_repeats(everything: pytest.LogCaptureFixture) -> None:
    """A server without PUBLISH (a renamed command) quotes the payload in its error; the bus does
    not pass that on."""

    def quotes(command: list[bytes]) -> bytes:
        if command[0] == b"PUBLISH":
            given = b" ".join(b"'%b'" % word for word in command[1:])
            return b"-ERR unknown command 'PUBLISH', with args beginning with: %b\r\n" % given
        return agree(command)

    async with answering(quotes) as url, EventBus(url, heartbeat=None) as bus:
        error = await failing(bus.publish_raw("ok:1", SECRET.encode()), EventBusError)
    assert not leaks(SECRET, told_by(error), texts_of_log(everything))


# -- Names -----------------------------------------------------------------------------------------

ESCAPE, LINE, BIDI = "evil\x1b[31mred", "evil\nERROR a line", "evil\u202etxt"
LONG = "evil" + "x" * 10_000
LIMIT = 1500
"""Characters of the longest line that a name of any length may make."""


def dirty(*texts: Iterable[str]) -> list[str]:
    """The texts that would do something to a terminal or a log, or that are endless."""
    return [text for group in texts for text in group if is_dirty(text)]


def is_dirty(text: str) -> bool:
    """Whether a log line or an error must not hold this."""
    if len(text) > LIMIT or not all(c.isprintable() or c == "\n" for c in text):
        return True
    return any(line.startswith("ERROR a line") for line in text.splitlines())


def says(error: BaseException) -> list[str]:
    """The text of an error, and how it is represented."""
    return [str(error), repr(error), *traceback.format_exception_only(error)]


USES: dict[str, Callable[[EventBus, str], Any]] = {
    "on": lambda bus, name: bus.on(name),
    "on_gap": lambda bus, name: bus.on_gap(name),
    "subscribe": lambda bus, name: Router().on(name),
    "a prefix": lambda bus, name: Router(prefix=name).on("x"),
    "a template": lambda bus, name: type("Named", (Event,), {"__module__": __name__}, channel=name),
    "a type": lambda bus, name: type("Named", (Event,), {"__module__": __name__}, type=name),
    "a namespace": lambda bus, name: EventBus("memory://names", namespace=name),
    "a capture": lambda bus, name: bus.on("a:{" + name + "}"),
    "a brace": lambda bus, name: bus.on(name + "}"),
    "a scheme": lambda bus, name: EventBus(f"{name}://localhost"),
    "a header": lambda bus, name: Message(None, "a").with_headers({name: 1}),
}


@pytest.mark.parametrize(
    "use",
    USES,
)
@pytest.mark.scenario(39)
def test_a_hostile_name_is_refused_in_clean_words(use: str) -> None:
    """Where a name is refused, the error shows it escaped and cut short."""
    bus = EventBus("memory://names")
    texts: list[str] = []
    for name in (ESCAPE, LINE, BIDI, LONG):
        try:
            USES[use](bus, name)
        except (EventBusError, ValueError) as error:
            texts += says(error)
    assert texts
    assert not dirty(texts)


@pytest.mark.scenario(39)
async def test_a_hostile_channel_of_a_publish_is_refused_in_clean_words() -> None:
    """A channel with control characters or without end is refused; one that is allowed and may
    disturb a terminal is escaped in the errors about it."""
    bus = EventBus(f"memory://{secrets.token_hex(4)}", max_payload=300)
    big = Card(number="x" * 1000)
    async with bus:
        errors = [await failing(bus.publish(BIDI, big), PayloadTooLarge)]
        for name in (ESCAPE, LINE, LONG):
            errors.append(await failing(bus.publish(name, Card(number="1")), InvalidChannel))
            errors.append(await failing(bus.expect(name, timeout=1), InvalidPattern))
    assert not dirty(*map(says, errors))


@pytest.mark.scenario(39)
async def test_a_hostile_name_from_the_wire_is_escaped(
    valkey: Server, everything: pytest.LogCaptureFixture
) -> None:
    """Channels, types, sources and headers that another publisher made up are escaped and cut in
    every log line and error."""
    tag = secrets.token_hex(4)
    bus = EventBus(valkey.url, max_payload=50_000)
    calls = Seen[str]()
    gaps = Seen[Gap]()

    @bus.on(f"{tag}*")
    async def fails(message: Message[Card]) -> None:
        calls.append(message.channel)
        raise LookupError("a handler failed")

    @bus.on(f"{tag}*", timeout=0.001)
    async def hangs(message: Message[Card]) -> None:
        await asyncio.Event().wait()

    @bus.on_gap(f"{tag}*")
    async def note(gap: Gap) -> None:
        gaps.append(gap)

    good = {"number": "1"}
    async with bus, Redis.from_url(valkey.url, protocol=2) as other:
        for name in (ESCAPE, LINE, BIDI, LONG):
            await other.publish(tag + name, "no event")
            await other.publish(tag + name, b"x" * 50_001)
            await other.publish(tag + name, foreign(good, type=name))
            await other.publish(tag + name, foreign({"number": 1}, type="Card", source=name))
            for number in (1, 9):
                event = foreign(good, type="Card", id=name, source=name, busseq=number, evil=name)
                await other.publish(tag + name, event)
        await calls.reach(8)
        await gaps.reach(3)  # a source without end is not remembered
        assert sorted(set(calls)) == sorted(tag + name for name in (ESCAPE, LINE, BIDI, LONG))
    lines = [record.getMessage() for record in everything.records if record.name == "eventbus"]
    assert len([line for line in lines if tag in line]) >= 16
    assert not dirty(lines)
    assert all(repr(gap).isprintable() for gap in gaps)


@pytest.mark.parametrize("role", ["PING", "SUBSCRIBE", "PUBLISH"])
async def test_a_hostile_server_is_quoted_in_clean_words(
    role: str, everything: pytest.LogCaptureFixture
) -> None:
    """What a server says of an error is escaped in log lines, errors and `health()`."""
    evil = f"-ERR {ESCAPE}{BIDI}\r\n".encode()

    def answer(command: list[bytes]) -> bytes:
        if command[0] == role.encode():
            return evil
        return agree(command)

    texts: list[str] = []
    async with answering(answer) as url:
        bus = EventBus(url, connect_timeout=0.3, heartbeat=None)

        @bus.on("ok:x")
        async def take(event: Card) -> None: ...

        try:
            async with bus:
                texts += says(await failing(bus.publish(Card(number="1")), EventBusError))
        except EventBusError as error:
            texts += says(error)
        texts.append(str(bus.health()))
    lines = [record.getMessage() for record in everything.records if record.name == "eventbus"]
    assert "evil" in "".join([*texts, *lines])
    assert not dirty(lines, texts)


# -- Code ------------------------------------------------------------------------------------------

DANGEROUS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "jsonpickle", "runpy"}
CALLS = {"eval", "exec", "compile", "__import__", "import_module", "find_class", "load_module"}


def dangers(source: str) -> list[str]:
    """What in a program could turn data into code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = node.func
            name = getattr(called, "id", None) or getattr(called, "attr", "")
            # `re.compile` makes no code: only the builtin does.
            if name in CALLS and not (name == "compile" and isinstance(called, ast.Attribute)):
                found.append(name)
        found += [
            name
            for name in names
            if name.split(".")[0] in DANGEROUS or set(name.split(".")) & CALLS
        ]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import safe_load",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "__import__(name)",
        "eval(text)",
        "def f():\n    exec(text)",
        "compile(text, '', 'exec')",
    ],
)
def test_a_danger_is_found(source: str) -> None:
    """The test below sees what it must see."""
    assert dangers(source)


def test_no_data_becomes_code() -> None:
    """No module of the package unpickles, evaluates, or imports by a name that it was given. (The
    command line imports the module that its user names; `__init__` what its own table names.)"""
    free = {PACKAGE / "cli" / "apps.py", PACKAGE / "__init__.py"}
    modules = sorted(set(PACKAGE.rglob("*.py")) - free)
    assert len(modules) > 20
    assert {str(m): d for m in modules if (d := dangers(m.read_text(encoding="utf-8")))} == {}
