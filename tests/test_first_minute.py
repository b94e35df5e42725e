"""The mistakes that newcomers make in their first minute: each message says what is wrong, and what
to write instead."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from anyio.lowlevel import checkpoint

from eventbus import (
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    InvalidChannel,
    InvalidEvent,
    InvalidHandler,
    InvalidPattern,
    PayloadTooLarge,
    PermissionDenied,
)
from eventbus.server import Server
from tests.helpers import LIMIT


class Said(Event, type="first-minute.said", channel="chat:{room}"):
    room: str
    text: str = "hi"


class Homeless(Event, type="first-minute.homeless"):
    text: str = "hi"


class Plain:
    """A class that forgot `Event`."""


def declare(pattern: Any, fn: Callable[..., Any], **options: Any) -> None:
    """Declare a handler on a bus that is not started."""
    EventBus("memory://first").on(pattern, **options)(fn)


async def unknown(evnt) -> None:  # type: ignore[no-untyped-def]
    """A parameter without an annotation."""


async def number(size: int) -> None:
    """A parameter that is no capture."""


async def any_event(event: Event) -> None:
    """The root of all events."""


async def captured(event: Said, user: str) -> None:
    """A capture of another pattern."""


async def twice(one: Said, other: Said) -> None:
    """Two of one kind."""


async def good(event: Said) -> None:
    """As it should be."""


# -- While it is written ---------------------------------------------------------------------------

DECLARED: dict[str, tuple[Callable[[], object], type[EventBusError], str, str]] = {
    "a parameter that nothing fills": (
        lambda: declare("chat:*", unknown),
        InvalidHandler,
        "parameter 'evnt' of handler 'unknown' cannot be filled",
        "annotate it with an Event class",
    ),
    "a parameter of a plain type": (
        lambda: declare("chat:*", number),
        InvalidHandler,
        "parameter 'size' of handler 'number' cannot be filled",
        "Captures here: none",
    ),
    "a capture that the pattern has not": (
        lambda: declare("chat:{room}", captured),
        InvalidHandler,
        "parameter 'user'",
        "Captures here: room",
    ),
    "Event itself": (
        lambda: declare("chat:*", any_event),
        InvalidHandler,
        "Event itself is no type that travels",
        "name the classes you want",
    ),
    "two of one kind": (
        lambda: declare("chat:*", twice),
        InvalidHandler,
        "'other' of handler 'twice' is the second of its kind",
        "one is enough",
    ),
    "a plain class instead of an Event": (
        lambda: declare(Plain, good),
        InvalidPattern,
        "is neither a pattern nor an Event class",
        '@bus.on("chat:*") or @bus.on(MessageSent)',
    ),
    "a decorator without parentheses": (
        lambda: EventBus("memory://first").on(good),  # type: ignore[arg-type]
        InvalidPattern,
        "is neither a pattern nor an Event class",
        '@bus.on("chat:*")',
    ),
    "a decorator without a pattern": (
        lambda: EventBus("memory://first").on()(good),
        InvalidPattern,
        "name at least one pattern or Event class",
        '@bus.on("chat:*")',
    ),
    "a brace that is not closed": (
        lambda: declare("chat:{room", good),
        InvalidPattern,
        "'chat:{room' has a brace that is not closed",
        "a literal brace is written {{",
    ),
    "a policy that is none": (
        lambda: declare("chat:*", good, overflow="oldest"),
        InvalidHandler,
        "overflow is",
        '"drop_oldest", "drop_newest" or "latest"',
    ),
    "a field that the class has not": (
        lambda: type("Lost", (Event,), {"__annotations__": {"a": str}}, channel="x:{b}"),
        InvalidChannel,
        "names 'b', which is not a field",
        "(fields: a)",
    ),
    "a scheme of another program": (
        lambda: EventBus("http://localhost:6379"),
        EventBusError,
        "no transport for 'http'",
        "use redis://",
    ),
    "a URL without a scheme": (
        lambda: EventBus("localhost:6379"),
        EventBusError,
        "a URL without a scheme",
        "use redis://",
    ),
    "a URL with a password that is not encoded": (
        lambda: EventBus("redis://:pa#ss/word@localhost:6379"),
        EventBusError,
        "cannot be read",
        "percent-encoded",
    ),
}


@pytest.mark.parametrize("mistake", DECLARED)
def test_a_declaration_says_what_to_write(mistake: str) -> None:
    """What is wrong with a declaration is said where it is written, with what to write instead."""
    do, kind, what, instead = DECLARED[mistake]
    with pytest.raises(kind) as caught:
        do()
    assert what in str(caught.value)
    assert instead in str(caught.value)


# -- While it is used ------------------------------------------------------------------------------


USED: dict[str, tuple[Callable[[EventBus], Any], type[Exception], str, str]] = {
    "a handler declared too late": (
        lambda bus: bus.on("chat:*")(good),
        EventBusError,
        "the bus is running",
        "route = await bus.attach(handler, pattern)",
    ),
    "a dict for an event": (
        lambda bus: bus.publish("chat:1", {"text": "hi"}),
        InvalidEvent,
        "publish takes an Event instance, not dict",
        "class MyEvent(Event)",
    ),
    "a text for an event": (
        lambda bus: bus.publish("chat:1", "hi"),
        InvalidEvent,
        "publish takes an Event instance, not str",
        "publish_raw for bytes",
    ),
    "the class for an instance": (
        lambda bus: bus.publish("chat:1", Said),
        InvalidEvent,
        "not the class Said",
        "Said(...)",
    ),
    "no channel": (
        lambda bus: bus.publish(Homeless()),
        InvalidChannel,
        "Homeless has no channel template",
        'class Homeless(Event, channel="...")',
    ),
    "a channel of bytes": (
        lambda bus: bus.publish(b"chat:1", Said(room="1")),
        InvalidChannel,
        "a channel is a str",
        "not bytes",
    ),
    "a room with a colon": (
        lambda bus: bus.publish(Said(room="a:b")),
        InvalidChannel,
        "field 'room' of the channel template 'chat:{room}'",
        "without ':', and is 'a:b'",
    ),
    "a whole file in one message": (
        lambda bus: bus.publish(Said(room="1", text="x" * 2_000_000)),
        PayloadTooLarge,
        "over max_payload (1048576)",
        "publish a key and keep the value elsewhere",
    ),
    "a message that never comes": (
        lambda bus: bus.expect("chat:9", Said, timeout=0.01),
        TimeoutError,
        "no message for 'chat:9'",
        "within 0.01 s",
    ),
    "a second start": (
        lambda bus: bus.start(),
        EventBusError,
        "the bus is running already",
        "",
    ),
}


@pytest.mark.parametrize("mistake", USED)
async def test_a_call_says_what_to_do(mistake: str) -> None:
    """What is wrong with a call is said by its error, and the bus goes on."""
    do, kind, what, instead = USED[mistake]
    async with EventBus("memory://first") as bus:
        with pytest.raises(kind) as caught:
            await do(bus)
        assert what in str(caught.value)
        assert instead in str(caught.value)
        assert await bus.publish(Said(room="1"))


@pytest.mark.parametrize("when", ["before its start", "after its stop"])
async def test_a_bus_that_does_not_run(when: str) -> None:
    """A bus that is not running names the block that starts it, whatever is asked of it."""
    bus = EventBus("memory://first")
    if when == "after its stop":
        async with bus:
            pass
    calls: list[Callable[[], Any]] = [
        lambda: bus.publish(Said(room="1")),
        lambda: bus.attach(good, "chat:*"),
        lambda: bus.expect("chat:1", Said, timeout=1.0),
    ]
    for call in calls:
        with pytest.raises(BusClosed, match="use it inside `async with bus:`"):
            await call()
    with pytest.raises(BusClosed, match="use it inside `async with bus:`"):
        bus.publish_nowait(Said(room="1"))


async def test_a_forgotten_await() -> None:
    """A publish that nobody awaits is named by Python's own warning."""
    async with EventBus("memory://first") as bus:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            bus.publish(Said(room="1"))  # type: ignore[unused-coroutine]
            gc.collect()
    assert "coroutine 'EventBus.publish' was never awaited" in str(said[0].message)


async def test_a_second_loop() -> None:
    """A bus that is used in another loop than its own says which one it belongs to."""
    async with EventBus("memory://first") as bus:

        def elsewhere() -> None:
            asyncio.run(bus.publish(Said(room="1")))

        with pytest.raises(BusClosed, match="use it in the loop that started it") as caught:
            await asyncio.to_thread(elsewhere)
    assert "make it `async def`" in str(caught.value)


async def test_a_plain_function_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A `def` handler that overruns its timeout is reported by name, with its channel."""
    bus = EventBus("memory://first")
    release = threading.Event()

    @bus.on("chat:*", timeout=0.01)
    def hangs(event: Said) -> None:
        release.wait(20.0)

    async with bus:
        await bus.publish(Said(room="1"))
        async with asyncio.timeout(LIMIT):
            while "took longer than" not in caplog.text:
                await checkpoint()
        release.set()
    assert "hangs" in caplog.text
    assert "chat:1" in caplog.text


# -- At the server ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """A server with a password, and a user who may use `ok:*` alone."""
    with Server(port=0) as server:
        with redis.Redis(unix_socket_path=server.socket_path) as admin:
            admin.execute_command(
                "ACL", "SETUSER", "bob", "on", ">pw", "+@all", "~*", "resetchannels", "&ok:*"
            )
            admin.config_set("requirepass", "secret")
        yield server


SERVED: dict[str, tuple[str, type[EventBusError], str, str]] = {
    "nobody is there": (
        "redis://127.0.0.1:1",
        BusUnavailable,
        "redis://127.0.0.1:1 could not be reached within",
        "Is Redis running there? Set the URL with EventBus(url) or EVENTBUS_URL",
    ),
    "a host that is none": (
        "redis://no-such-host.invalid:6379",
        BusUnavailable,
        "redis://no-such-host.invalid:6379 could not be reached",
        "Set the URL",
    ),
    "no password": (
        "redis://127.0.0.1:{port}",
        PermissionDenied,
        "refuses user 'default'",
        "Set the password in the URL (redis://user:password@host)",
    ),
    "a wrong password": (
        "redis://bob:wrong@127.0.0.1:{port}",
        PermissionDenied,
        "refuses user 'bob': invalid username-password pair",
        "Set the password in the URL",
    ),
    "a channel that the ACL denies": (
        "redis://bob:pw@127.0.0.1:{port}",
        PermissionDenied,
        "Redis denies 'chat:*' to user 'bob'",
        "ACL SETUSER bob &chat:*",
    ),
    "a database that is none": (
        "redis://:secret@127.0.0.1:{port}/99",
        BusUnavailable,
        "DB index is out of range",
        "leave the database number out",
    ),
}


@pytest.mark.parametrize("mistake", SERVED)
async def test_a_start_says_where_and_what_to_do(mistake: str, strict: Server) -> None:
    """A start that fails says where it tried, what the server said, and what to do."""
    url, kind, what, instead = SERVED[mistake]
    bus = EventBus(url.format(port=strict.port), connect_timeout=1.0)
    bus.on("chat:*")(good)
    with pytest.raises(kind) as caught:
        await bus.start()
    assert what in str(caught.value)
    assert instead in str(caught.value)


@pytest.mark.parametrize("namespace", ["", "staging"])
async def test_a_database_number(
    namespace: str, strict: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A database number keeps nothing apart: a bus that has one, and no namespace, says so."""
    url = f"redis://:secret@127.0.0.1:{strict.port}/3"
    with caplog.at_level(logging.WARNING):
        async with EventBus(url, namespace=namespace):
            pass
    warned = "database 3 keeps nothing apart" in caplog.text and "namespace=" in caplog.text
    assert warned == (namespace == "")
