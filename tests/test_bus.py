"""The bus as its users meet it: the same behaviour on memory and on two real servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio.lowlevel import checkpoint
from pydantic import Field

from eventbus import (
    Buffer,
    BusClosed,
    BusUnavailable,
    Event,
    EventBus,
    EventBusError,
    Gap,
    HandlerStats,
    InvalidChannel,
    InvalidEvent,
    InvalidHandler,
    InvalidPattern,
    Message,
    PayloadTooLarge,
    PermissionDenied,
    Receipt,
    Router,
    Stats,
    escape,
)
from eventbus.server import Server
from tests.helpers import LIMIT, Seen, foreign, soon, write

ROOT = Path(__file__).parents[1]
CallNext = Callable[[Message[Any]], Any]


class Said(Event, channel="chat:{room}"):
    room: str = "a"
    text: str = ""


class Count(Event):
    n: int = 0


class Tagged(Event):
    tags: list[str] = Field(default_factory=list)


async def fence(bus: EventBus) -> None:
    """Return when the bus has taken in all that was published before."""
    async with bus.subscribe("fence") as messages:
        await bus.publish("fence", Count())
        await soon(anext(messages))


async def until(condition: Callable[[], object]) -> None:
    """Return when it is true: for what has no event of its own, such as `health()`."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await checkpoint()


def silent(bus: EventBus) -> Callable[[], object]:
    """Whether nothing is subscribed; leaving does not wait for the server to confirm it."""
    return lambda: not bus.health().subscriptions


def run_script(code: str, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A program of its own, for what must not happen to the tests: signals, forks, a hang."""
    preamble = (
        "import asyncio, os, sys\nfrom eventbus import *\nclass Count(Event):\n    n: int = 0\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", preamble + code],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


# Handling


async def test_first_page(url: str) -> None:
    """The program of the documentation's first page works."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("chat:*")
    async def audit(event: Said) -> None:
        seen.append(("audit", event.text))

    @bus.on("chat:{room}")
    async def show(event: Said, room: str) -> None:
        seen.append(("show", event.text, room))

    async with bus:
        receipt = await bus.publish("chat:room-1", Said(room="room-1", text="hi"))
        await bus.publish(Said(room="room-2", text="ho"))
    assert receipt.receivers == 1
    assert receipt.id
    assert sorted(seen) == [
        ("audit", "hi"),
        ("audit", "ho"),
        ("show", "hi", "room-1"),
        ("show", "ho", "room-2"),
    ]


async def test_explicit_channel_wins(url: str) -> None:
    """A channel that is named wins over the template of the class."""
    bus = EventBus(url)
    seen: list[str] = []

    @bus.on("*")
    async def handler(message: Message[Said]) -> None:
        seen.append(message.channel)

    async with bus:
        await bus.publish("elsewhere", Said(room="b"))
        await bus.publish(Said(room="b"))
    assert seen == ["elsewhere", "chat:b"]


async def test_on_an_event_class(url: str) -> None:
    """`on(Class)` listens where the template of the class points, with its fields as captures."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on(Said)
    async def handler(event: Said, message: Message[Said]) -> None:
        seen.append((event.text, message.pattern, dict(message.captures)))

    @bus.on(Said)
    async def with_capture(room: str) -> None:
        seen.append(room)

    async with bus:
        await bus.publish(Said(room="b", text="t"))
        await bus.publish("chat:b:c", Said(text="deeper than the template"))
    assert len(seen) == 2
    assert ("t", "chat:{room}", {"room": "b"}) in seen
    assert "b" in seen


async def test_message_fields(url: str) -> None:
    """A message knows its event, its way and its origin, and cannot be changed."""
    bus = EventBus(url, name="shop")
    seen: list[Message[Said]] = []

    @bus.on("chat:{room}")
    async def handler(message: Message[Said]) -> None:
        seen.append(message)

    before = datetime.now(UTC) - timedelta(seconds=1)
    async with bus:
        receipts = [await bus.publish(Said(room="b", text=str(n))) for n in range(2)]
        await bus.publish(Said(room="c"))
    first, second, other = seen
    assert first.event == Said(room="b", text="0")
    assert (first.channel, first.pattern, first.type) == ("chat:b", "chat:{room}", "Said")
    assert first.captures == {"room": "b"}
    assert [first.id, second.id] == [receipt.id for receipt in receipts]
    assert first.id != second.id
    assert first.source == second.source
    assert str(first.source).startswith("shop/")
    assert [first.sequence, second.sequence, other.sequence] == [1, 2, 1]
    assert first.time is not None
    assert first.time.utcoffset() == timedelta(0)
    assert before < first.time < datetime.now(UTC) + timedelta(seconds=1)
    assert first.headers == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.channel = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        first.captures["room"] = "x"  # type: ignore[index]
    with pytest.raises(TypeError):
        first.headers["x"] = "x"  # type: ignore[index]
    more = first.with_headers({"a": 1}, b=True)
    assert (more.headers, first.headers) == ({"a": 1, "b": True}, {})
    assert more.with_headers(a=2).headers == {"a": 2, "b": True}


@pytest.mark.parametrize(
    "name", ["", "Upper", "a-b", "x" * 21, "id", "data", "busseq", "ü", "a\n"], ids=ascii
)
def test_header_names(name: str) -> None:
    """A header whose name the wire cannot carry is refused by `with_headers`."""
    with pytest.raises(ValueError, match="header"):
        Message(None, "x").with_headers({name: "v"})


@pytest.mark.parametrize("value", [None, 1.5, b"x", [1]], ids=repr)
def test_header_values(value: Any) -> None:
    """A header that is no str, int or bool is refused by `with_headers`."""
    with pytest.raises(TypeError, match="'h'"):
        Message(None, "x").with_headers(h=value)


async def test_types_select(url: str) -> None:
    """A handler gets the types that it names; others are skipped, counted per route."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("x:*")
    async def says(event: Said) -> None:
        seen.append(event)

    @bus.on("x:*")
    async def both(event: Said | Count) -> None:
        seen.append(event)

    @bus.on("x:{n}")
    async def numbers(n: int, event: Count) -> None:
        seen.append(n)

    async with bus:
        await bus.publish("x:1", Said())
        await bus.publish("x:2", Count())
        await bus.publish("x:a", Count())
    stats = bus.stats()
    assert {name: found.skipped for name, found in stats.handlers.items()} == {
        "says": 2,
        "both": 0,
        "numbers": 2,
    }
    assert (stats.skipped, stats.delivered, stats.received, stats.invalid) == (4, 5, 3, 0)


async def test_overlaps_run_once(url: str) -> None:
    """Each handler runs once for a message, however many of its patterns match; the first of its
    patterns that matches gives the captures."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("chat:{room}", "chat:*", "*:b", "chat:b", "?hat:b", "c*b")
    async def first(message: Message, room: str = "none") -> None:
        seen.append(("first", message.channel, message.pattern, room))

    @bus.on("*:b", "chat:{room}")
    async def second(message: Message, room: str = "none") -> None:
        seen.append(("second", message.channel, message.pattern, room))

    @bus.on("chat:b")
    async def third(message: Message) -> None:
        seen.append(("third", message.channel, message.pattern))

    async with bus:
        await bus.publish("chat:b", Count())
        await bus.publish("chat:c", Count())
        await bus.publish("other:b", Count())
    assert sorted(seen) == [
        ("first", "chat:b", "chat:{room}", "b"),
        ("first", "chat:c", "chat:{room}", "c"),
        ("first", "other:b", "*:b", "none"),
        ("second", "chat:b", "*:b", "none"),
        ("second", "chat:c", "chat:{room}", "c"),
        ("second", "other:b", "*:b", "none"),
        ("third", "chat:b", "chat:b"),
    ]
    assert bus.stats().received == 3


async def test_covered_patterns_cross_the_wire_once(url: str) -> None:
    """Patterns that one of them covers are one subscription: Redis hands out one copy."""
    bus = EventBus(url)

    @bus.on("chat:*", "chat:{room}", "chat:b", "chat:b?")
    async def handler() -> None: ...

    async with bus:
        assert (await bus.publish("chat:b", Count())).receivers == 1
        assert bus.health().subscriptions == ("chat:*",)


NAMES = ["caf\udce9", "grün", "日本:語", "a*b?[c]^\\", "{x}", "}}", " ", 'qu"ote', "a\u202eb", "::"]


async def test_names_of_any_bytes(url: str) -> None:
    """Names that are no UTF-8, no ASCII or full of glob characters arrive, by both kinds."""
    bus = EventBus(url)
    by_literal: list[str] = []
    by_glob: list[str] = []

    @bus.on(*map(escape, NAMES))
    async def literal(message: Message[Count]) -> None:
        by_literal.append(message.channel)

    @bus.on("*")
    async def glob(message: Message[Count]) -> None:
        by_glob.append(message.channel)

    async with bus:
        for name in NAMES:
            assert (await bus.publish(name, Count())).receivers == 1
        await bus.publish("unheard", Count())
    assert by_literal == NAMES
    assert by_glob == [*NAMES, "unheard"]


async def test_hidden_channels(url: str) -> None:
    """Channels that start with `__` reach only routes whose pattern starts literally with `__`."""
    bus = EventBus(url)
    seen: list[Any] = []

    def listen(pattern: str) -> None:
        @bus.on(pattern)
        async def handler(message: Message[bytes]) -> None:
            seen.append((pattern, message.channel))

    patterns = ["*", "_*", "?_*", "[_a]_*", "{name}", "__*", "__key{x}", "\\_\\_*", "__keyspace"]
    for pattern in patterns:
        listen(pattern)
    async with bus:
        await bus.publish_raw("__keyspace", b"x")
        await bus.publish_raw("_keyspace", b"x")
    assert {pattern for pattern, name in seen if name == "__keyspace"} == {
        "__*",
        "__key{x}",
        "\\_\\_*",
        "__keyspace",
    }
    assert {pattern for pattern, name in seen if name == "_keyspace"} == {"*", "_*", "{name}"}


async def test_several_buses(url: str) -> None:
    """What one bus publishes, every bus with a handler gets; the receipt counts the copies."""
    buses = [EventBus(url) for _ in range(3)]
    seen: list[Any] = []

    def listen(index: int, bus: EventBus) -> None:
        @bus.on("x")
        async def handler(event: Count) -> None:
            seen.append((index, event.n))

    for index, bus in enumerate(buses):
        listen(index, bus)
    async with EventBus(url) as publisher, buses[0], buses[1], buses[2]:
        assert (await publisher.publish("x", Count(n=1))).receivers == 3
        assert (await buses[0].publish("x", Count(n=2))).receivers == 3
        assert (await publisher.publish("y", Count(n=3))).receivers == 0
    assert sorted(seen) == [(i, n) for i in range(3) for n in (1, 2)]


async def test_echo(url: str) -> None:
    """`echo=False` skips what this very bus published, and nothing of others."""
    mine, other = EventBus(url), EventBus(url)
    quiet: list[int] = []
    loud: list[int] = []

    @mine.on("x", echo=False)
    async def without(event: Count) -> None:
        quiet.append(event.n)

    @mine.on("x")
    async def with_echo(event: Count) -> None:
        loud.append(event.n)

    @mine.middleware("publish")
    async def add(message: Message[Any], call_next: CallNext) -> Any:
        return await call_next(message.with_headers(h="1") if message.event.n == 2 else message)

    async with mine, other:
        await mine.publish("x", Count(n=1))
        await mine.publish("x", Count(n=2))
        await other.publish("x", Count(n=3))
        await other.publish_raw("x", foreign({"n": 4}, type="Count"))
    assert quiet == [3, 4]
    assert loud == [1, 2, 3, 4]


async def test_echo_alone(url: str) -> None:
    """`echo=False` holds when its route is the only one, too, and before a restart's new source."""
    bus = EventBus(url)
    seen: list[int] = []

    @bus.on("x", echo=False)
    async def handler(event: Count) -> None:
        seen.append(event.n)

    for _ in range(2):
        async with bus:
            await bus.publish("x", Count(n=1))
            await fence(bus)
    assert seen == []
    assert bus.stats().published == 2


async def test_immutable_events_are_shared(url: str) -> None:
    """Handlers that want the same type share one decode of an event that nobody can change."""
    bus = EventBus(url)
    seen: list[Said] = []

    for pattern in ("x", "x*", "*"):

        @bus.on(pattern)
        async def handler(event: Said) -> None:
            seen.append(event)

    async with bus:
        await bus.publish("x", Said(text="t"))
        await bus.publish_raw("x", foreign({"text": "t"}, type="Said"))
    assert seen == [Said(text="t")] * 6
    assert len({id(event) for event in seen}) == 2


async def test_mutable_events_are_not_shared(url: str) -> None:
    """A handler that changes a list in its event changes nobody else's."""
    bus = EventBus(url)
    seen: list[Any] = []

    def listen(name: str) -> None:
        @bus.on("x")
        async def handler(event: Tagged) -> None:
            event.tags.append(name)
            seen.append(event.tags)

        @bus.on("x")
        async def of_dict(data: dict[str, Any]) -> None:
            data["tags"].append(name)
            seen.append(data["tags"])

    listen("one")
    listen("two")
    async with bus:
        await bus.publish("x", Tagged(tags=["t"]))
    assert sorted(seen) == [["t", "one"], ["t", "one"], ["t", "two"], ["t", "two"]]


# Declaring while running


async def test_attach(url: str) -> None:
    """An attached handler hears of everything after `attach` has returned, and nothing after
    `detach` has."""
    seen: Seen[int] = Seen()

    async def handler(event: Count, key: int) -> None:
        seen.append(event.n)

    async with EventBus(url) as bus:
        await bus.publish("a:1", Count(n=0))
        route = await bus.attach(handler, "a:{key}")
        assert (route.name, route.patterns) == ("handler", ("a:{key}",))
        assert (await bus.publish("a:1", Count(n=1))).receivers == 1
        await route.add("b:{key}", "a:{key}")
        assert route.patterns == ("a:{key}", "b:{key}")
        await bus.publish("b:1", Count(n=2))
        await fence(bus)
        await route.discard("a:{key}", "never:*")
        assert route.patterns == ("b:{key}",)
        assert (await bus.publish("a:1", Count(n=3))).receivers == 0
        await bus.publish("b:1", Count(n=4))
        await seen.reach(3)
        await route.detach()
        await route.detach()
        await until(silent(bus))
        assert (await bus.publish("b:1", Count(n=5))).receivers == 0
        assert bus.stats().handlers == {}
        assert bus.stats().delivered >= 3
        with pytest.raises(BusClosed, match="detached"):
            await route.add("c:{key}")
        await route.discard("b:{key}")
    assert seen == [1, 2, 4]
    assert bus.stats().skipped == 0


async def test_attach_takes_the_options_of_on(url: str) -> None:
    """`attach` takes event classes and options, and refuses what `on` would refuse."""
    seen: list[Any] = []

    async def handler(event: Said, room: str) -> None:
        seen.append(room)

    async with EventBus(url) as bus:
        with pytest.raises(InvalidHandler, match="concurrency"):
            await bus.attach(handler, Said, concurrency=0)
        with pytest.raises(InvalidPattern):
            await bus.attach(handler)
        with pytest.raises(InvalidHandler, match="'room'"):
            await bus.attach(handler, "*")
        route = await bus.attach(handler, Said, concurrency=2, order_by="channel", timeout=5.0)
        with pytest.raises(InvalidHandler, match="'room'") as caught:
            await route.add("other:*")
        assert (caught.value.handler, caught.value.parameter) == ("handler", "room")
        assert route.patterns == ("chat:{room}",)
        assert "handler" in repr(route)
        assert "chat:{room}" in repr(route)
        await bus.publish(Said(room="b"))
    assert seen == ["b"]


async def test_detach_ends_what_runs(url: str) -> None:
    """Detaching cancels the call that runs and drops what waits; other handlers go on."""
    events: Seen[str] = Seen()

    async def stuck(event: Count) -> None:
        events.append("started")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    async with EventBus(url) as bus:
        route = await bus.attach(stuck, "x")
        await bus.publish("x", Count())
        await bus.publish("x", Count())
        await events.reach(1)
        await fence(bus)
        await route.detach()
        assert events == ["started", "ended"]
        await fence(bus)
    assert bus.stats().dropped == 1


@pytest.mark.scenario(31)
async def test_detach_inside_the_handler(url: str) -> None:
    """A handler may detach itself; it runs to its end and is not called again."""
    seen: Seen[int] = Seen()
    routes: list[Any] = []

    async def once(event: Count) -> None:
        await routes[0].detach()
        seen.append(event.n)

    async with EventBus(url) as bus:
        routes.append(await bus.attach(once, "x"))
        for n in range(3):
            await bus.publish("x", Count(n=n))
        await seen.reach(1)
        await fence(bus)
    assert seen == [0]


async def test_concurrent_adds_are_both_confirmed(url: str) -> None:
    """Of two that add one pattern at the same time, neither returns before it is confirmed."""

    async def handler() -> None: ...

    async with EventBus(url) as bus:
        route = await bus.attach(handler, "x")
        confirmed: list[bool] = []

        async def add() -> None:
            await route.add("y")
            confirmed.append("y" in bus.health().subscriptions)

        await asyncio.gather(add(), add())
        assert confirmed == [True, True]


async def test_too_late_to_declare(url: str) -> None:
    """On a started bus `on` and its kin raise, and name `attach`."""
    async with EventBus(url) as bus:
        for declare in (
            lambda: bus.on("x"),
            bus.on_gap,
            lambda: bus.include_router(Router()),
            lambda: bus.middleware("receive"),
        ):
            with pytest.raises(EventBusError, match="attach"):
                declare()


def test_bad_declarations() -> None:
    """What is no pattern, no gap pattern, no middleware and no exception class is refused."""
    bus = EventBus("memory://x")
    with pytest.raises(InvalidPattern, match="at least one"):
        bus.on()
    for wrong in (5, None, b"x", Event, int):
        with pytest.raises((InvalidPattern, InvalidChannel)):
            bus.on(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidPattern):
        bus.on("a{b")
    with pytest.raises(InvalidPattern):
        bus.on_gap(Said)  # type: ignore[arg-type]
    with pytest.raises(InvalidPattern):
        bus.on_gap("")
    with pytest.raises(InvalidHandler):
        bus.on_gap()(5)  # type: ignore[type-var]
    with pytest.raises(InvalidHandler):
        bus.middleware("other")  # type: ignore[arg-type]
    with pytest.raises(InvalidHandler):
        bus.middleware("publish")(lambda message, call_next: None)
    for kind in (5, "ValueError", int):
        with pytest.raises(InvalidHandler):
            bus.exception_handler(kind)  # type: ignore[arg-type]
    with pytest.raises(InvalidPattern):
        Router("a{b")


# Routers


async def test_router(url: str) -> None:
    """A router's prefix goes before its patterns and may hold captures; the prefix of the inclusion
    is literal; event classes keep their own template."""
    router = Router(prefix="user:{user_id}:")
    bus = EventBus(url)
    seen: list[Any] = []

    @router.on("login", "logout:{place}")
    async def handler(message: Message, user_id: int, place: str = "") -> None:
        seen.append((message.channel, message.pattern, user_id, place))

    @router.on(Said)
    async def says(event: Said, room: str) -> None:
        seen.append(room)

    bus.include_router(router)
    bus.include_router(router, prefix="v*{2}:")
    async with bus:
        await bus.publish("user:5:login", Count())
        await bus.publish("v*{2}:user:6:logout:home", Count())
        await bus.publish("vxx{2}:user:7:login", Count())
        await bus.publish("login", Count())
        await bus.publish("user:x:login", Count())
        await bus.publish(Said(room="b"))
    assert sorted(map(str, seen)) == sorted(
        map(
            str,
            [
                ("user:5:login", "user:{user_id}:login", 5, ""),
                (
                    "v*{2}:user:6:logout:home",
                    "v\\*{{2}}:user:{user_id}:logout:{place}",
                    6,
                    "home",
                ),
                "b",
                "b",
            ],
        )
    )
    assert bus.stats().skipped == 1


async def test_router_in_a_bare_bus(url: str) -> None:
    """Handlers of a router read the wire of the bus that includes it."""
    router = Router()
    bus = EventBus(url, wire="bare")
    seen: list[Any] = []

    @router.on("x")
    async def handler(event: Count) -> None:
        seen.append(event.n)

    bus.include_router(router)
    async with bus:
        await bus.publish("x", Count(n=1))
        await bus.publish_raw("x", b'{"n": 2}')
    assert seen == [1, 2]


async def test_router_gaps(url: str) -> None:
    """A router's gap handlers hear of gaps under its prefix, and only of those."""
    router = Router("a:")
    bus = EventBus(url)
    seen: list[Any] = []

    @router.on_gap("{x}")
    async def gap(gap: Gap) -> None:
        seen.append(gap.channel)

    @bus.on("*")
    async def handler() -> None: ...

    bus.include_router(router, "p:")
    async with bus:
        for channel in ("p:a:1", "a:1", "p:b:1"):
            for number in (1, 3):
                await bus.publish_raw(channel, write(Count(), number=number))
    assert seen == ["p:a:1"]
    assert bus.stats().missed == 3


# Streams


async def test_subscribe(url: str) -> None:
    """A stream gives messages of the types asked for, from the moment its block is entered."""
    async with EventBus(url) as bus:
        await bus.publish("chat:a", Said(text="before"))
        async with (
            bus.subscribe("chat:*", Said) as typed,
            bus.subscribe("chat:*") as dicts,
            bus.subscribe(Said) as by_class,
            bus.subscribe("x", "chat:{room}", Said, Count) as union,
            bus.subscribe("chat:a", bytes) as raw,
        ):
            await bus.publish(Said(text="t"))
            await bus.publish("chat:a", Count(n=5))
            first = await soon(anext(typed))
            assert (first.event, first.pattern) == (Said(text="t"), "chat:*")
            assert [(await soon(anext(dicts))).event for _ in range(2)] == [
                {"room": "a", "text": "t"},
                {"n": 5},
            ]
            found = await soon(anext(by_class))
            assert (found.event, found.captures) == (Said(text="t"), {"room": "a"})
            assert [(await soon(anext(union))).event for _ in range(2)] == [
                Said(text="t"),
                Count(n=5),
            ]
            assert (await soon(anext(raw))).event.startswith(b"{")
        await until(silent(bus))
        assert bus.stats().handlers == {}


async def test_stream_add_and_discard(url: str) -> None:
    """A stream may change what it listens to; both are confirmed when they return."""
    async with EventBus(url) as bus, bus.subscribe("a", Count) as messages:
        await bus.publish("b", Count(n=0))
        await messages.add("b")
        await bus.publish("b", Count(n=1))
        assert (await soon(anext(messages))).event.n == 1
        await messages.discard("a")
        await bus.publish("a", Count(n=2))
        await bus.publish("b", Count(n=3))
        assert (await soon(anext(messages))).event.n == 3


@pytest.mark.parametrize(
    "overflow, expected, dropped",
    [("drop_oldest", [7, 8, 9], 7), ("drop_newest", [0, 1, 2], 7), ("latest", [9], 0)],
)
async def test_stream_overflow(url: str, overflow: Any, expected: list[int], dropped: int) -> None:
    """A stream that is not read drops by its policy, and says how many."""
    async with (
        EventBus(url) as bus,
        bus.subscribe("a", Count, max_queue=3, overflow=overflow) as messages,
    ):
        assert messages.dropped == 0
        for n in range(10):
            await bus.publish("a", Count(n=n))
        await fence(bus)
        assert messages.dropped == dropped
        assert [(await soon(anext(messages))).event.n for _ in expected] == expected
    assert messages.dropped == dropped
    assert bus.stats().dropped == dropped
    assert bus.stats().conflated == (9 if overflow == "latest" else 0)


async def test_stream_ends(url: str) -> None:
    """Iteration ends when the bus stops, and after the block."""
    bus = EventBus(url)
    await bus.start()
    async with bus.subscribe("a", Count) as messages:
        await bus.publish("a", Count(n=1))
        found = []
        async for message in messages:
            found.append(message.event.n)
            stopping = asyncio.create_task(bus.stop())
        await soon(stopping)
        assert found == [1]
    with pytest.raises(StopAsyncIteration):
        await soon(anext(messages))


async def test_stream_out_of_its_block(url: str) -> None:
    """A stream that was not entered, or was entered before, raises."""
    async with EventBus(url) as bus:
        messages = bus.subscribe("a")
        assert messages.dropped == 0
        with pytest.raises(InvalidHandler, match="enter"):
            await anext(messages)
        async with messages:
            pass
        with pytest.raises(InvalidHandler, match="again"):
            async with messages:
                pass


async def test_stream_skips_the_invalid(url: str) -> None:
    """A stream goes on after bad messages; they are counted and reported."""
    bus = EventBus(url)
    errors: Seen[Any] = Seen()

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        errors.append(message.channel)

    async with bus, bus.subscribe("a", Count) as messages:
        await bus.publish_raw("a", b"nonsense")
        await bus.publish("a", Said())
        await bus.publish("a", Count(n=1))
        assert (await soon(anext(messages))).event.n == 1
        assert errors == ["a"]
        assert bus.stats().invalid == 1


async def test_expect(url: str) -> None:
    """`expect` returns the first message that fits, and leaves no subscription behind."""
    async with EventBus(url) as bus:

        async def later() -> None:
            await until(lambda: bus.health().subscriptions)
            await bus.publish("chat:a", Count(n=1))
            for n in range(3):
                await bus.publish(Said(text=str(n)))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(later())
            message = await bus.expect(
                "chat:{room}", Said, timeout=5.0, where=lambda found: found.event.text == "2"
            )
        assert message.event == Said(text="2")
        assert message.captures == {"room": "a"}
        await until(silent(bus))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(later())
            by_class = await bus.expect(Said, timeout=5.0)
        assert by_class.event.text == "0"
        await until(silent(bus))


async def test_expect_in_vain(url: str) -> None:
    """`expect` raises TimeoutError, what its `where` raises, and BusClosed when the bus stops."""
    bus = EventBus(url)
    async with bus:
        with pytest.raises(TimeoutError):
            await bus.expect("x", timeout=0.02)
        await until(silent(bus))
        waiting = asyncio.create_task(bus.expect("x", timeout=5.0))
        broken = asyncio.create_task(bus.expect("x", timeout=5.0, where=lambda m: 1 / 0 > 0))
        await until(lambda: bus.health().subscriptions)
        await bus.publish_raw("x", b"{}")
        await bus.publish("x", Count())
        with pytest.raises(ZeroDivisionError):
            await soon(broken)
        await soon(waiting)
        await until(silent(bus))
        waiting = asyncio.create_task(bus.expect("y", timeout=5.0))
        await until(lambda: bus.health().subscriptions)
    with pytest.raises(BusClosed):
        await soon(waiting)


# Order, concurrency, overflow


async def test_order(url: str) -> None:
    """One bus publishing on one channel: a handler sees that order, whichever way it was sent."""
    bus = EventBus(url)
    seen: list[int] = []

    @bus.on("x")
    async def handler(event: Count) -> None:
        await checkpoint()
        seen.append(event.n)

    async with bus:
        receipts = await asyncio.gather(*(bus.publish("x", Count(n=n)) for n in range(100)))
        for n in range(100, 200):
            bus.publish_nowait("x", Count(n=n))
        await bus.publish("x", Count(n=200))
    assert seen == list(range(201))
    assert all(receipt.receivers == 1 for receipt in receipts)
    assert bus.stats().missed == 0


async def test_order_by_channel(url: str) -> None:
    """With `order_by="channel"` eight channels are worked on at a time, each in its order."""
    bus = EventBus(url)
    gate = asyncio.Event()
    entered: Seen[str] = Seen()
    seen: dict[str, list[int]] = {}
    running: set[str] = set()

    @bus.on("c:{key}", concurrency=8, order_by="channel")
    async def handler(event: Count, key: str) -> None:
        assert key not in running
        running.add(key)
        entered.append(key)
        await gate.wait()
        for _ in range(hash((key, event.n)) % 4):
            await checkpoint()
        seen.setdefault(key, []).append(event.n)
        running.discard(key)

    async with bus:
        for n in range(20):
            for key in range(8):
                bus.publish_nowait(f"c:{key}", Count(n=n))
        await entered.reach(8)
        assert sorted(entered) == [str(key) for key in range(8)]
        gate.set()
    assert seen == {str(key): list(range(20)) for key in range(8)}
    assert bus.stats().failed == 0


async def test_concurrency(url: str) -> None:
    """Without an order so many calls run at a time, also on one channel, and no more."""
    bus = EventBus(url)
    gate = asyncio.Event()
    entered: Seen[int] = Seen()
    seen: list[int] = []

    @bus.on("x", concurrency=3)
    async def handler(event: Count) -> None:
        entered.append(event.n)
        await gate.wait()
        seen.append(event.n)

    async with bus:
        for n in range(10):
            await bus.publish("x", Count(n=n))
        await entered.reach(3)
        await fence(bus)
        assert len(entered) == 3
        assert bus.stats().handlers["handler"].depth == 7
        gate.set()
    assert sorted(seen) == list(range(10))


async def test_threads_run_side_by_side(url: str) -> None:
    """A `def` handler with concurrency runs that many threads at a time."""
    bus = EventBus(url)
    barrier = threading.Barrier(3)
    seen: list[int] = []

    @bus.on("x", concurrency=3)
    def handler(event: Count) -> None:
        barrier.wait(5)
        seen.append(event.n)

    async with bus:
        for n in range(6):
            await bus.publish("x", Count(n=n))
    assert sorted(seen) == list(range(6))
    assert bus.stats().failed == 0


async def blocked(bus: EventBus, numbers: int, **options: Any) -> tuple[list[int], list[Gap]]:
    """What a handler sees, and the gaps, when it hangs in message 0 while the others arrive."""
    gate = asyncio.Event()
    seen: Seen[int] = Seen()
    gaps: list[Gap] = []

    @bus.on("x:*", **options)
    async def slow(event: Count) -> None:
        seen.append(event.n)
        await gate.wait()

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    async with bus:
        await bus.publish("x:a", Count(n=0))
        await seen.reach(1)
        for n in range(1, numbers):
            await bus.publish("x:a", Count(n=n))
        await fence(bus)
        gate.set()
    return list(seen), gaps


@pytest.mark.parametrize(
    "overflow, expected", [("drop_oldest", [0, 5, 6, 7]), ("drop_newest", [0, 1, 2, 3])]
)
@pytest.mark.parametrize("order_by", [None, "channel"])
@pytest.mark.scenario(26)
async def test_overflow(url: str, overflow: str, order_by: str | None, expected: list[int]) -> None:
    """A full queue drops by its policy; the gap names handler and channel, and is exact."""
    bus = EventBus(url)
    seen, gaps = await blocked(bus, 8, max_queue=3, overflow=overflow, order_by=order_by)
    assert seen == expected
    assert sum(gap.missed or 0 for gap in gaps) == 4
    assert {(gap.reason, gap.handler, gap.pattern, gap.channel, gap.source) for gap in gaps} == {
        ("overflow", "slow", "x:*", "x:a", None)
    }
    assert all(gap.since.utcoffset() == timedelta(0) for gap in gaps)
    stats = bus.stats()
    assert (stats.dropped, stats.missed, stats.conflated, stats.delivered) == (4, 0, 0, 5)
    assert stats.handlers["slow"].dropped == 4


@pytest.mark.scenario(26)
async def test_overflow_per_channel(url: str) -> None:
    """With order per channel and concurrency, the oldest of all channels is dropped."""
    bus = EventBus(url)
    seen, gaps = await blocked(bus, 8, max_queue=3, concurrency=4, order_by="channel")
    assert seen == [0, 5, 6, 7]
    assert sum(gap.missed or 0 for gap in gaps) == 4


async def test_latest(url: str) -> None:
    """`latest` keeps the newest per channel, in the place of the one that it replaces."""
    bus = EventBus(url)
    gate = asyncio.Event()
    seen: Seen[Any] = Seen()

    @bus.on("x:{key}", overflow="latest")
    async def handler(event: Count, key: str) -> None:
        seen.append((key, event.n))
        await gate.wait()

    async with bus:
        await bus.publish("x:a", Count(n=0))
        await seen.reach(1)
        for key, n in (("a", 1), ("b", 1), ("a", 2), ("c", 1), ("b", 2), ("a", 3)):
            await bus.publish(f"x:{key}", Count(n=n))
        await fence(bus)
        assert bus.stats().handlers["handler"].depth == 3
        gate.set()
    assert seen == [("a", 0), ("a", 3), ("b", 2), ("c", 1)]
    stats = bus.stats()
    assert (stats.conflated, stats.dropped, stats.handlers["handler"].conflated) == (3, 0, 3)


async def test_latest_counts_channels(url: str) -> None:
    """With `latest`, `max_queue` counts channels; one too many drops the oldest, with a gap."""
    bus = EventBus(url)
    gate = asyncio.Event()
    seen: Seen[Any] = Seen()
    gaps: list[Gap] = []

    @bus.on("x:{key}", overflow="latest", max_queue=2)
    async def handler(event: Count, key: str) -> None:
        seen.append(key)
        await gate.wait()

    @bus.on_gap("x:*")
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    async with bus:
        await bus.publish("x:a", Count())
        await seen.reach(1)
        for key in "bcbcd":
            await bus.publish(f"x:{key}", Count())
        await fence(bus)
        gate.set()
    assert seen == ["a", "c", "d"]
    assert [(gap.reason, gap.channel, gap.missed) for gap in gaps] == [("overflow", "x:b", 1)]
    assert (bus.stats().conflated, bus.stats().dropped) == (2, 1)


async def test_latest_is_ordered_by_channel(url: str) -> None:
    """`latest` with concurrency works on a channel by one worker at a time."""
    bus = EventBus(url)
    gate = asyncio.Event()
    seen: Seen[Any] = Seen()

    @bus.on("x:{key}", overflow="latest", concurrency=3)
    async def handler(event: Count, key: str) -> None:
        seen.append((key, event.n))
        await gate.wait()

    async with bus:
        for n in range(3):
            await bus.publish("x:a", Count(n=n))
            await bus.publish("x:b", Count(n=n))
            await seen.reach(2)
        await fence(bus)
        assert sorted(seen) == [("a", 0), ("b", 0)]
        gate.set()
    assert sorted(seen) == [("a", 0), ("a", 2), ("b", 0), ("b", 2)]


async def test_max_pending_bytes(url: str) -> None:
    """Over `max_pending_bytes` the lane with most bytes drops, and no other."""
    bus = EventBus(url, max_pending_bytes=20_000)
    gate = asyncio.Event()
    entered: Seen[str] = Seen()
    fat: list[str] = []
    thin: list[int] = []

    @bus.on("fat")
    async def slow(event: Said) -> None:
        entered.append("slow")
        await gate.wait()
        fat.append(event.room)

    @bus.on("thin")
    async def small(event: Count) -> None:
        entered.append("small")
        await gate.wait()
        thin.append(event.n)

    async with EventBus(url) as publisher, bus:
        for n in range(20):
            await publisher.publish("thin", Count(n=n))
        for n in range(40):
            await publisher.publish("fat", Said(room=str(n), text="x" * 1000))
        await entered.reach(2)
        await fence(bus)
        found = bus.stats().handlers
        assert sum(lane.bytes for lane in found.values()) <= 20_000
        assert found["slow"].dropped >= 20
        assert found["small"].dropped == 0
        gate.set()
    assert thin == list(range(20))
    assert fat[0] == "0"
    assert fat[-1] == "39"
    assert bus.stats().handlers["slow"].bytes == 0


@pytest.mark.scenario(26)
async def test_a_slow_handler_slows_nobody(url: str) -> None:
    """While one handler hangs, others on the same channel go on."""
    bus = EventBus(url)
    gate = asyncio.Event()
    seen: Seen[int] = Seen()

    @bus.on("x")
    async def stuck(event: Count) -> None:
        await gate.wait()

    @bus.on("x")
    async def quick(event: Count) -> None:
        seen.append(event.n)

    async with bus:
        for n in range(50):
            await bus.publish("x", Count(n=n))
        await seen.reach(50)
        gate.set()
    assert bus.stats().delivered == 100


# Failures of handlers


async def test_exception_handlers_by_mro(url: str) -> None:
    """The nearest class in the error's MRO wins; the handler gets the error and its message."""

    class Base(Exception):
        pass

    class Middle(Base):
        pass

    class Leaf(Middle):
        pass

    bus = EventBus(url)
    seen: list[Any] = []
    errors = [Base(), Middle(), Leaf(), ValueError("v"), KeyError("k")]

    @bus.on("x")
    async def handler(event: Count) -> None:
        raise errors[event.n]

    @bus.exception_handler(Base)
    async def base(error: Base, message: Message[Count]) -> None:
        seen.append(("base", error, message.event.n, message.channel))

    @bus.exception_handler(Middle)
    async def middle(error: Middle, message: Message[Count]) -> None:
        seen.append(("middle", error, message.event.n, message.channel))

    @bus.exception_handler(Exception)
    def in_a_thread(error: Exception, message: Message[Count]) -> None:
        seen.append(("any", error, message.event.n, message.channel))

    async with bus:
        for n in range(5):
            await bus.publish("x", Count(n=n))
    assert seen == [
        (name, errors[n], n, "x")
        for n, name in enumerate(["base", "middle", "middle", "any", "any"])
    ]
    assert (bus.stats().failed, bus.stats().delivered) == (5, 5)
    assert bus.stats().handlers["handler"].failed == 5


async def test_errors_are_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without an exception handler an error is logged with handler and escaped channel, and without
    the payload."""
    bus = EventBus(url)

    @bus.on("*")
    async def broken(event: Said) -> None:
        raise ValueError("boom")

    with caplog.at_level(logging.ERROR, "eventbus"):
        async with bus:
            await bus.publish("grün\u202e", Said(text="SECRET"))
            await bus.publish_raw("grün\u202e", b"SECRET")
    assert len(caplog.records) == 2
    failed, invalid = (record.getMessage() for record in caplog.records)
    assert "broken" in failed
    for line in (failed, invalid):
        assert "gr\\xfcn\\u202e" in line
        assert line.isascii()
    assert caplog.records[0].exc_info is not None
    assert "SECRET" not in caplog.text


async def test_exception_handler_that_fails(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An exception handler that fails itself is logged, and the bus goes on."""
    bus = EventBus(url)
    seen: list[int] = []

    @bus.on("x")
    async def handler(event: Count) -> None:
        seen.append(event.n)
        raise ValueError

    @bus.exception_handler(ValueError)
    async def worse(error: ValueError, message: Message[Any]) -> None:
        raise KeyError("worse")

    async with bus:
        await bus.publish("x", Count(n=1))
        await bus.publish("x", Count(n=2))
    assert seen == [1, 2]
    assert "worse" in caplog.text


@pytest.mark.scenario(28, 29)
async def test_cancelled_error_of_a_handler(url: str) -> None:
    """A handler that raises CancelledError itself has failed; the next message is handled. So has
    one that raises a group of errors."""
    bus = EventBus(url)
    seen: list[int] = []
    errors: list[BaseException] = []

    @bus.on("x")
    async def handler(event: Count) -> None:
        seen.append(event.n)
        if event.n == 0:
            raise asyncio.CancelledError
        if event.n == 1:
            raise BaseExceptionGroup("all", [asyncio.CancelledError()])

    @bus.on("x")
    def in_a_thread(event: Count) -> None:
        if event.n == 0:
            raise asyncio.CancelledError

    @bus.on("x", timeout=5.0)
    async def timed(event: Count, message: Message[Count]) -> None:
        if event.n == 0:
            raise asyncio.CancelledError

    @bus.exception_handler(BaseException)
    async def keep(error: BaseException, message: Message[Any]) -> None:
        errors.append(error)

    async with bus:
        for n in range(3):
            await bus.publish("x", Count(n=n))
    assert seen == [0, 1, 2]
    assert len(errors) == 4
    failed = {name: found.failed for name, found in bus.stats().handlers.items()}
    assert failed == {"handler": 2, "in_a_thread": 1, "timed": 1}
    assert bus.stats().delivered == 9


@pytest.mark.scenario(29)
async def test_timeout_of_a_coroutine(url: str) -> None:
    """A call that takes too long is cancelled and reported as TimeoutError; the next one runs."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("x", timeout=0.02)
    async def handler(event: Count) -> None:
        if event.n == 0:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("cancelled")
        elif event.n == 1:
            raise TimeoutError("its own")
        seen.append(event.n)

    @bus.exception_handler(TimeoutError)
    async def late(error: TimeoutError, message: Message[Count]) -> None:
        seen.append((message.event.n, str(error)))

    async with bus:
        for n in range(3):
            await bus.publish("x", Count(n=n))
    assert seen[0] == "cancelled"
    assert seen[1][0] == 0
    assert "0.02" in seen[1][1]
    assert seen[2:] == [(1, "its own"), 2]
    assert bus.stats().failed == 2


@pytest.mark.parametrize("ending", ["return", "ValueError", "CancelledError"])
@pytest.mark.scenario(29, 30)
async def test_timeout_of_a_thread(url: str, ending: str) -> None:
    """A `def` handler that overruns has failed, once, and keeps its place until it returns."""
    bus = EventBus(url)
    go_on = threading.Event()
    errors: Seen[Any] = Seen()
    calls: list[int] = []

    @bus.on("x", timeout=0.02)
    def handler(event: Count) -> None:
        calls.append(event.n)
        if event.n == 0:
            go_on.wait(5)
            if ending == "ValueError":
                raise ValueError
            if ending == "CancelledError":
                raise asyncio.CancelledError

    @bus.exception_handler(BaseException)
    async def keep(error: BaseException, message: Message[Count]) -> None:
        errors.append((type(error), message.event.n))

    async with bus:
        await bus.publish("x", Count(n=0))
        await bus.publish("x", Count(n=1))
        await errors.reach(1)
        await fence(bus)
        assert 1 not in calls  # the thread may not even have begun
        assert bus.stats().failed == 1
        go_on.set()
    assert calls == [0, 1]
    assert errors == [(TimeoutError, 0)]
    assert bus.stats().failed == 1


async def test_timeout_is_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without an exception handler a timeout is one log line with handler and channel."""
    bus = EventBus(url)

    @bus.on("x", timeout=0.01)
    async def handler(event: Count) -> None:
        await asyncio.Event().wait()

    async with bus:
        await bus.publish("x", Count())
    assert len(caplog.records) == 1
    assert "'handler'" in caplog.text
    assert "'x'" in caplog.text
    assert "0.01" in caplog.text


POISON = [
    b"",
    b"nonsense",
    b"\xff\xfe",
    b"[]",
    b"{}",
    foreign({"n": "SECRET"}, type="Count"),
    foreign(type="Count"),
    foreign({"n": 1}, type="Count", specversion="0.3"),
    write(Count(n=5)).replace(b'"n":5', b'"n":"SECRET"'),
    write(Count(n=5), h="v").replace(b'"v"', b'"\\ud800"'),
    write(Count(n=5), h="v").replace(b'"v"', b'"\\q"'),
    write(Count(n=5), h="v").replace(b'"v"', b"01"),
    write(Count(n=5)).replace(b"2024-05", b"2024-99"),
    write(Count(n=5)).replace(b"id-1", b"\xff"),
    write(Count(n=5))[:-1],
    b"[" * 100_000,
]


@pytest.mark.parametrize("shape", ["event", "message", "dict", "several", "middleware", "timeout"])
async def test_poison(url: str, shape: str) -> None:
    """Each bad payload is one InvalidEvent, once per frame however many routes there are, and the
    good one after it is handled; whatever the handlers ask for."""
    bus = EventBus(url)
    good: list[int] = []
    errors: list[Any] = []

    if shape in ("event", "several", "middleware"):

        @bus.on("x:*")
        async def of_event(event: Count) -> None:
            good.append(event.n)

    if shape in ("message", "several"):

        @bus.on("x:*", "x:{a}")
        async def of_message(message: Message[Count]) -> None:
            good.append(message.event.n)

    if shape in ("dict", "several"):

        @bus.on("x:a")
        async def of_dict(message: Message[dict[str, Any]]) -> None:
            good.append(message.event["n"])

    if shape == "timeout":

        @bus.on("x:a", timeout=5.0)
        async def timed(event: Count, message: Message[Count]) -> None:
            good.append(event.n)

    if shape == "middleware":

        @bus.middleware("receive")
        async def through(message: Message[Any], call_next: CallNext) -> Any:
            return await call_next(message)

    @bus.exception_handler(Exception)
    async def keep(error: Exception, message: Message[Any]) -> None:
        errors.append(error)
        assert message.channel == "x:a"

    of_any_shape = [item for item in POISON if b"SECRET" not in item]
    poison = of_any_shape if shape in ("dict", "several") else POISON
    async with bus:
        for n, payload in enumerate(poison):
            await bus.publish_raw("x:a", payload)
            await bus.publish("x:a", Count(n=n))
    assert [type(error) for error in errors] == [InvalidEvent] * len(poison)
    assert all(error.channel == "x:a" for error in errors)
    assert all("SECRET" not in f"{error} {vars(error)}" for error in errors)
    routes = 3 if shape == "several" else 1
    assert sorted(good) == sorted(list(range(len(poison))) * routes)
    stats = bus.stats()
    assert stats.invalid == len(poison)
    assert stats.failed == 0


async def test_invalid_is_told_once(url: str) -> None:
    """Several routes, one bad frame: one count and one report, with the payload as the event."""
    bus = EventBus(url)
    told: list[Any] = []

    for pattern in ("x:*", "x:{a}", "x:a", "x:?"):

        @bus.on(pattern)
        async def handler(event: Count) -> None: ...

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        told.append((message.channel, message.event, error.type, bool(error.reasons)))

    bad = foreign({"n": []}, type="Count")
    async with bus:
        await bus.publish_raw("x:a", bad)
        await bus.publish_raw("x:a", b"nothing")
    assert told == [("x:a", bad, "Count", True), ("x:a", b"nothing", None, True)]
    assert bus.stats().invalid == 2
    assert bus.stats().skipped == 0


# Gaps


async def gaps_of(url: str, frames: list[tuple[str, bytes]], *patterns: str) -> list[Gap]:
    """The gaps that these raw frames make, on a bus with a handler for these patterns."""
    bus = EventBus(url)
    gaps: list[Gap] = []

    @bus.on(*patterns or ("*",))
    async def handler(message: Message[bytes]) -> None: ...

    @bus.on_gap()
    def gap(gap: Gap) -> None:
        gaps.append(gap)

    async with bus, EventBus(url) as publisher:
        for channel, payload in frames:
            await publisher.publish_raw(channel, payload)
    assert bus.stats().missed == sum(gap.missed or 0 for gap in gaps)
    return gaps


async def test_sequence_gap(url: str) -> None:
    """A hole in a source's numbers on a channel is one exact gap, before any handler and once for
    all of them."""
    numbers = [(2, 0), (3, 0), (7, 3), (8, 0), (8, 0), (5, 0), (6, 0), (1, 0), (2, 0), (4, 1)]
    frames = [("x:a", write(Count(), number=number)) for number, _ in numbers]
    gaps = await gaps_of(url, frames, "x:*", "*:a", "x:a")
    assert sum(gap.missed or 0 for gap in gaps) == sum(missed for _, missed in numbers)
    assert {(gap.reason, gap.channel, gap.source, gap.handler, gap.pattern) for gap in gaps} == {
        ("sequence", "x:a", "test/1", None, None)
    }
    assert all(gap.since.utcoffset() == timedelta(0) for gap in gaps)


async def test_sequences_are_apart(url: str) -> None:
    """Each source has numbers of its own on each channel, in any layout."""
    one = write(Count(), number=1)
    frames = [
        ("a", one),
        ("b", write(Count(), number=5)),
        ("a", one.replace(b"test/1", b"test/2").replace(b'"busseq":1', b'"busseq":9')),
        ("a", foreign({}, source="test/1", busseq=4)),
        ("a", foreign({}, source="test/1")),
        ("a", write(Count(), number=6, h="v")),
        ("b", b"nonsense"),
        ("b", b'{"busseq": 77}'),
        ("b", write(Count(), number=6)),
    ]
    gaps = await gaps_of(url, frames)
    assert {(gap.channel, gap.source) for gap in gaps} == {("a", "test/1")}
    assert sum(gap.missed or 0 for gap in gaps) == 3


async def test_gaps_merge(url: str) -> None:
    """Gaps that wait for a handler merge by summing, and none is lost."""
    bus = EventBus(url)
    gate = asyncio.Event()
    gaps: Seen[Any] = Seen()

    @bus.on("*")
    async def handler() -> None: ...

    @bus.on_gap("a*")
    async def gap(gap: Gap) -> None:
        gaps.append((gap.channel, gap.missed))
        await gate.wait()

    async with bus:
        for channel, number in [("a", 1), ("a", 3), ("ab", 1)]:
            await bus.publish_raw(channel, write(Count(), number=number))
        await gaps.reach(1)
        for channel, number in [("a", 6), ("ab", 5), ("a", 10), ("b", 1), ("b", 9)]:
            await bus.publish_raw(channel, write(Count(), number=number))
        await fence(bus)
        gate.set()
    assert gaps == [("a", 1), ("a", 5), ("ab", 3)]
    assert bus.stats().missed == 1 + 5 + 3 + 7


async def test_gap_handler_that_fails(url: str) -> None:
    """A gap handler that fails is reported like a handler, and hears of the next gap."""
    bus = EventBus(url)
    seen: Seen[Any] = Seen()

    @bus.on("*")
    async def handler() -> None: ...

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        raise ValueError(gap.channel)

    @bus.exception_handler(ValueError)
    async def keep(error: ValueError, message: Message[Gap]) -> None:
        seen.append((str(error), message.event.missed))

    async with bus:
        for channel in ("a", "b"):
            for number in (1, 3):
                await bus.publish_raw(channel, write(Count(), number=number))
            await seen.reach(1 if channel == "a" else 2)
    assert seen == [("a", 1), ("b", 1)]


async def test_unsubscribed_channels_have_no_gaps(url: str) -> None:
    """What was published while nobody listened is nobody's loss."""
    gaps: list[Gap] = []
    bus = EventBus(url)

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        gaps.append(gap)

    async def handler() -> None: ...

    async with bus:
        for pattern in ("x", "x*"):
            for _ in range(2):
                route = await bus.attach(handler, pattern)
                await bus.publish("x", Count())
                await fence(bus)
                await route.detach()
                await bus.publish("x", Count())
    assert gaps == []
    assert bus.stats().missed == 0


# Publishing


async def test_receipts(url: str) -> None:
    """A receipt has the id of the message, and the number of copies; a raw one has no id."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("x")
    async def handler(message: Message[bytes]) -> None:
        seen.append((message.id, message.event))

    async with bus:
        receipt = await bus.publish("x", Count())
        assert isinstance(receipt, Receipt)
        raw = await bus.publish_raw("x", b"raw \x00\xff")
        await bus.publish_raw("x", bytearray(b"array"))
        await bus.publish_raw("x", memoryview(b"view"))
        await bus.publish_raw("x", b"")
        id = bus.publish_nowait("x", Count())
    assert (receipt.receivers, raw) == (1, Receipt(None, 1))
    assert [seen[0][0], seen[5][0]] == [receipt.id, id]
    assert [payload for _, payload in seen[1:5]] == [b"raw \x00\xff", b"array", b"view", b""]
    assert bus.stats().published == 6


BAD_CHANNELS = ["", "a\n", "a\x00b", "\x85", "\x1b[31m", "\x7f", "a" * 513, "é" * 257, "\ud800"]


@pytest.mark.parametrize("channel", [*BAD_CHANNELS, 5, b"x", None], ids=lambda c: ascii(c)[:20])
async def test_bad_channels(channel: Any) -> None:
    """A channel that is no name is an InvalidChannel, at once, and nothing is sent."""
    async with EventBus("memory://bad") as bus:
        for publish in (
            lambda: bus.publish(channel, Count()),
            lambda: bus.publish_raw(channel, b"x"),
        ):
            with pytest.raises(InvalidChannel) as caught:
                await publish()
            assert isinstance(caught.value, ValueError)
            if isinstance(channel, str):
                assert caught.value.channel == channel
        with pytest.raises(InvalidChannel):
            bus.publish_nowait(channel, Count())
        assert (bus.stats().published, bus.stats().refused) == (0, 0)
    assert bus.stats().publish_failed == 0


async def test_longest_channel(url: str) -> None:
    """A channel of 512 bytes works; the namespace counts."""
    async with EventBus(url) as plain, EventBus(url, namespace="ns") as spaced:
        await plain.publish("a" * 512, Count())
        await spaced.publish("a" * 509, Count())
        with pytest.raises(InvalidChannel) as caught:
            await spaced.publish("a" * 510, Count())
        assert caught.value.channel == "a" * 510


@pytest.mark.parametrize("room", ["", "a:b", ":", "a\n", "\x00"], ids=ascii)
async def test_field_that_would_escape(room: str) -> None:
    """A field that would lead into another channel is an InvalidChannel."""
    async with EventBus("memory://bad") as bus:
        with pytest.raises(InvalidChannel):
            await bus.publish(Said(room=room))
        with pytest.raises(InvalidChannel):
            bus.publish_nowait(Said(room=room))


@pytest.mark.parametrize(
    "arguments",
    [
        (5,),
        (None,),
        ({"n": 1},),
        ("x",),
        ("x", None),
        ("x", {"n": 1}),
        ("x", "text"),
        ("x", b"x"),
        (Count(), Count()),
        ("x", Count),
        (Count,),
    ],
    ids=repr,
)
async def test_what_is_no_event(arguments: Any) -> None:
    """What is no event cannot be published, and the error says so."""
    async with EventBus("memory://bad") as bus:
        with pytest.raises((InvalidEvent, InvalidChannel)):
            await bus.publish(*arguments)
        with pytest.raises((InvalidEvent, InvalidChannel)):
            bus.publish_nowait(*arguments)
        with pytest.raises(InvalidEvent, match="bytes"):
            await bus.publish_raw("x", "text")  # type: ignore[arg-type]


async def test_event_without_a_channel() -> None:
    """An event whose class has no template needs a channel."""
    async with EventBus("memory://bad") as bus:
        with pytest.raises(InvalidChannel, match="Count"):
            await bus.publish(Count())
        with pytest.raises(InvalidChannel, match="Count"):
            bus.subscribe(Count)


async def test_invalid_event_is_not_sent(url: str) -> None:
    """An event that no receiver could read is refused with its type and reasons."""
    bus = EventBus(url)
    seen: list[Any] = []

    @bus.on("x")
    async def handler(event: Count) -> None:
        seen.append(event.n)

    async with bus:
        wrong = Count.model_construct(n="SECRET")
        with pytest.raises(InvalidEvent) as caught:
            await bus.publish("x", wrong)
        assert caught.value.type == "Count"
        assert "SECRET" not in f"{caught.value} {vars(caught.value)}"
        with pytest.raises(InvalidEvent):
            bus.publish_nowait("x", wrong)
        await bus.publish("x", Count(n=1))
    assert seen == [1]
    stats = bus.stats()
    assert (stats.published, stats.publish_failed, stats.missed, stats.invalid) == (1, 0, 0, 0)


async def test_payload_too_large(url: str) -> None:
    """A message over `max_payload` is refused before it is sent, with channel and size, and leaves
    no hole in the numbers."""
    bus = EventBus(url, max_payload=1000)
    seen: list[Any] = []

    @bus.on("*")
    async def handler(message: Message[bytes]) -> None:
        seen.append((len(message.event), message.sequence))

    async with bus:
        await bus.publish("x", Said())
        for publish in (bus.publish, bus.publish_nowait):
            with pytest.raises(PayloadTooLarge, match="'x'") as caught:
                await publish("x", Said(text="x" * 1000))  # type: ignore[misc]
            assert caught.value.channel == "x"
            assert caught.value.size > 1000
        with pytest.raises(PayloadTooLarge) as caught:
            await bus.publish_raw("x", b"x" * 1001)
        assert caught.value.size == 1001
        await bus.publish_raw("x", b"x" * 1000)
        await bus.publish("x", Said())
    assert [size for size, _ in seen][1] == 1000
    assert [number for _, number in seen] == [1, None, 2]
    assert bus.stats().published == 3


async def test_too_large_to_receive(url: str) -> None:
    """A payload over `max_payload` is invalid, once, and is not handed to anybody."""
    bus = EventBus(url, max_payload=1000)
    told: Seen[Any] = Seen()
    seen: list[Any] = []

    for pattern in ("x", "x*", "*"):

        @bus.on(pattern)
        async def handler(message: Message[bytes]) -> None:
            seen.append(len(message.event))

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        told.append((error.channel, message.channel, "1001" in str(error)))

    async with EventBus(url) as publisher, bus:
        await publisher.publish_raw("x", b"x" * 1001)
        await publisher.publish_raw("x", b"x" * 1000)
        await told.reach(1)
    assert told == [("x", "x", True)]
    assert seen == [1000] * 3
    assert (bus.stats().invalid, bus.stats().received) == (1, 2)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_closed(url: str, when: str) -> None:
    """A bus that is not running refuses everything with BusClosed, and says how to start it."""
    bus = EventBus(url)

    async def handler() -> None: ...

    if when == "after":
        async with bus:
            await bus.publish("x", Count())
            route = await bus.attach(handler, "x")
            messages = bus.subscribe("x")
        with pytest.raises(BusClosed):
            await route.add("y")
        await route.discard("x")
        await route.detach()
        with pytest.raises(BusClosed):
            await soon(messages.__aenter__(), 1.0)
    with pytest.raises(BusClosed, match="async with bus"):
        await bus.publish("x", Count())
    with pytest.raises(BusClosed):
        bus.publish_nowait("x", Count())
    with pytest.raises(BusClosed):
        await bus.publish_raw("x", b"")
    with pytest.raises(BusClosed):
        await bus.attach(handler, "x")
    with pytest.raises(BusClosed):
        bus.subscribe("x")
    with pytest.raises(BusClosed):
        await bus.expect("x", timeout=1.0)
    with pytest.raises(BusClosed):
        bus.redis()
    await bus.stop()


# Middleware


async def test_receive_middleware(url: str) -> None:
    """Receive middleware runs around each handler call, first added outermost, and may change the
    message or not call on."""
    bus = EventBus(url)
    log: list[Any] = []

    @bus.middleware("receive")
    async def outer(message: Message[Any], call_next: CallNext) -> Any:
        log.append("outer")
        result = await call_next(message.with_headers(seen="yes"))
        log.append("outer end")
        return result

    @bus.middleware("receive")
    async def inner(message: Message[Any], call_next: CallNext) -> Any:
        log.append(("inner", message.headers["seen"]))
        if message.event.n == 2:
            return None
        changed = dataclasses.replace(message, event=Count(n=message.event.n + 10))
        return await call_next(changed)

    @bus.on("x")
    async def handler(event: Count, message: Message[Count]) -> None:
        log.append((event.n, message.event.n, dict(message.headers)))

    async with bus:
        await bus.publish("x", Count(n=1))
        await bus.publish("x", Count(n=2))
    assert log == [
        "outer",
        ("inner", "yes"),
        (11, 11, {"seen": "yes"}),
        "outer end",
        "outer",
        ("inner", "yes"),
        "outer end",
    ]


async def test_receive_middleware_per_handler(url: str) -> None:
    """Receive middleware runs for each handler that a message goes to, `def` handlers too, sees
    what     they raise, and fails the call when it raises."""
    bus = EventBus(url)
    log: list[Any] = []

    @bus.middleware("receive")
    async def guard(message: Message[Any], call_next: CallNext) -> Any:
        if message.event.n == 3:
            raise LookupError
        try:
            return await call_next(message)
        except ValueError:
            log.append(("swallowed", message.pattern))

    @bus.on("x")
    def one(event: Count) -> None:
        if event.n == 2:
            raise ValueError
        log.append(("one", event.n))

    @bus.on("x*")
    async def two(event: Count) -> None:
        log.append(("two", event.n))

    @bus.exception_handler(LookupError)
    async def keep(error: LookupError, message: Message[Any]) -> None:
        log.append(("failed", message.pattern))

    async with bus:
        for n in (1, 2, 3):
            await bus.publish("x", Count(n=n))
    assert sorted(log) == [
        ("failed", "x"),
        ("failed", "x*"),
        ("one", 1),
        ("swallowed", "x"),
        ("two", 1),
        ("two", 2),
    ]
    assert bus.stats().failed == 2


async def test_publish_middleware(url: str) -> None:
    """Publish middleware runs once per publish, first added outermost, and its headers, event and
    channel are what travels; not for raw bytes."""
    bus = EventBus(url)
    log: list[Any] = []
    seen: list[Message[Any]] = []

    @bus.middleware("publish")
    async def outer(message: Message[Any], call_next: CallNext) -> Any:
        log.append((message.channel, message.type, message.event))
        receipt = await call_next(message.with_headers(tenant="é", n=1))
        log.append(receipt)
        return receipt

    @bus.middleware("publish")
    async def inner(message: Message[Any], call_next: CallNext) -> Any:
        log.append(dict(message.headers))
        if message.channel == "moved":
            message = dataclasses.replace(message, channel="x", event=Said(text="other"))
        return await call_next(message.with_headers(n=2))

    @bus.on("x")
    async def one(message: Message[Count | Said]) -> None:
        seen.append(message)

    @bus.on("*")
    async def two(event: Count) -> None: ...

    async with bus:
        receipt = await bus.publish("x", Count(n=1))
        assert isinstance(receipt, Receipt)
        await bus.publish("moved", Count(n=2))
        id = bus.publish_nowait("x", Count(n=3))
        await bus.publish_raw("x", b"raw")
    first = ("x", "Count", Count(n=1))
    assert log[:3] == [first, {"tenant": "é", "n": 1}, receipt]
    assert len(log) == 9
    assert [message.event for message in seen] == [Count(n=1), Said(text="other"), Count(n=3)]
    assert all(message.headers == {"tenant": "é", "n": 2} for message in seen)
    assert [seen[0].id, seen[2].id] == [receipt.id, id]
    assert [message.sequence for message in seen] == [1, 2, 3]


async def test_publish_middleware_that_refuses(url: str) -> None:
    """A publish middleware that raises or does not call on sends nothing; its error or result is
    the     caller's."""
    bus = EventBus(url)
    errors: Seen[Any] = Seen()

    @bus.middleware("publish")
    async def refuse(message: Message[Any], call_next: CallNext) -> Any:
        if message.event.n == 1:
            raise LookupError("refused")
        return "instead"

    @bus.exception_handler(LookupError)
    async def keep(error: LookupError, message: Message[Any]) -> None:
        errors.append((message.id, message.channel))

    async with bus:
        with pytest.raises(LookupError, match="refused"):
            await bus.publish("x", Count(n=1))
        assert await bus.publish("x", Count(n=2)) == "instead"  # type: ignore[comparison-overlap]
        id = bus.publish_nowait("x", Count(n=1))
        await errors.reach(1)
    assert errors == [(id, "x")]
    assert bus.stats().published == 0
    assert bus.stats().publish_failed == 1


async def test_publish_middleware_that_spoils(url: str) -> None:
    """What a publish middleware passes on is checked like any publish."""
    bus = EventBus(url)

    @bus.middleware("publish")
    async def spoil(message: Message[Any], call_next: CallNext) -> Any:
        changes: dict[str, Any] = [
            {"event": {"n": 1}},
            {"headers": {"Bad": 1}},
            {"headers": {"bad": 1.5}},
            {"channel": "a\n"},
        ][message.event.n]
        return await call_next(dataclasses.replace(message, **changes))

    async with bus:
        for n, expected in enumerate((InvalidEvent, ValueError, TypeError, InvalidChannel)):
            with pytest.raises(expected):
                await bus.publish("x", Count(n=n))
    assert bus.stats().published == 0


# Namespaces


async def test_namespaces(url: str) -> None:
    """A namespace isolates everything, is invisible in it, and is a prefix on the wire."""
    staging, other, plain = (
        EventBus(url, namespace="st"),
        EventBus(url, namespace="s"),
        EventBus(url),
    )
    seen: list[Any] = []

    def listen(name: str, bus: EventBus) -> None:
        @bus.on("*")
        async def glob(message: Message[bytes]) -> None:
            seen.append((name, "*", message.channel))

        @bus.on("x:a")
        async def literal(message: Message[bytes]) -> None:
            seen.append((name, "x:a", message.channel))

        @bus.on("x:{key}")
        async def capture(key: str) -> None:
            seen.append((name, "{}", key))

    for name, bus in (("staging", staging), ("other", other), ("plain", plain)):
        listen(name, bus)
    async with staging, other, plain:
        await staging.publish("x:a", Count())
        await staging.publish_raw("x:a", b"x")
        assert set(staging.health().subscriptions) == {"*"}
        async with staging.subscribe("y") as messages:
            await staging.publish("y", Count())
            assert (await soon(anext(messages))).channel == "y"
    mine = [("staging", "*", "x:a"), ("staging", "x:a", "x:a"), ("staging", "{}", "a")] * 2
    assert sorted(seen) == sorted(
        [*mine, ("staging", "*", "y")] + [("plain", "*", "st:x:a")] * 2 + [("plain", "*", "st:y")]
    )


async def test_namespace_hides_by_its_own_names(url: str) -> None:
    """What starts with `__` after the namespace is hidden in it too."""
    bus = EventBus(url, namespace="ns")
    seen: list[str] = []

    @bus.on("*", "__a")
    async def handler(message: Message[bytes]) -> None:
        seen.append(message.channel)

    async with bus:
        await bus.publish_raw("__b", b"")
        await bus.publish_raw("__a", b"")
    assert seen == ["__a"]


async def test_what_buses_of_another_namespace_say_to_themselves_is_no_message(url: str) -> None:
    """The probe of a bus with a namespace reaches only patterns that literally name it, and counts
    as a message nowhere; a channel that only looks like it is a message."""
    bus = EventBus(url)
    seen: list[tuple[str, str]] = []

    @bus.on("*", "ns:*", "{stage}:{rest:path}", "ns:__*", "ns:[_]*")
    async def handler(message: Message[bytes]) -> None:
        seen.append((message.pattern, message.channel))

    async with bus:
        await bus.publish_raw("ns:__eventbus__:0123456789abcdef", b"")
        received = bus.stats().received
        await bus.publish_raw("ns:__events", b"")
    assert (seen, received) == (
        [("ns:__*", "ns:__eventbus__:0123456789abcdef"), ("*", "ns:__events")],
        0,
    )


# The bare wire


async def test_bare_bus(url: str) -> None:
    """A bare bus publishes and reads JSON bodies; messages have no metadata."""
    bus = EventBus(url, wire="bare")
    seen: list[Any] = []

    @bus.on("x")
    async def typed(message: Message[Count]) -> None:
        seen.append(message)

    @bus.on("x")
    async def raw(payload: bytes) -> None:
        seen.append(payload)

    async with bus, bus.subscribe("x", Count) as messages:
        await bus.publish("x", Count(n=5))
        stream = await soon(anext(messages))
    assert b'{"n":5}' in seen
    [message] = [item for item in seen if isinstance(item, Message)]
    for found in (message, stream):
        assert (found.event, found.channel, found.pattern) == (Count(n=5), "x", "x")
        assert (found.id, found.source, found.type, found.time, found.sequence) == (None,) * 5
        assert found.headers == {}


async def test_bare_handler(url: str) -> None:
    """A bare handler reads plain bodies on a bus with envelopes, beside a handler of events."""
    bus = EventBus(url)
    seen: list[Any] = []
    invalid: list[Any] = []

    @bus.on("x", wire="bare")
    async def bare(event: Count) -> None:
        seen.append(("bare", event.n))

    @bus.on("y")
    async def enveloped(event: Count) -> None:
        seen.append(("event", event.n))

    @bus.exception_handler(InvalidEvent)
    async def keep(error: InvalidEvent, message: Message[Any]) -> None:
        invalid.append((message.channel, message.event))

    async with bus:
        for channel in ("x", "y"):
            await bus.publish_raw(channel, b'{"n": 1}')
            await bus.publish(channel, Count(n=2))
    assert ("bare", 1) in seen
    assert ("event", 2) in seen
    assert ("event", 1) not in seen
    assert invalid == [("y", b'{"n": 1}')]


async def test_redis_cli(server: Server) -> None:
    """`redis-cli PUBLISH` feeds a bare handler and a bare bus."""
    bus, bare_bus = EventBus(server.url), EventBus(server.url, wire="bare")
    seen: Seen[Any] = Seen()

    @bus.on("cli:{key}", wire="bare")
    async def handler(event: Count, key: str) -> None:
        seen.append(("handler", key, event.n))

    @bare_bus.on("cli:*")
    async def of_dict(data: dict[str, Any]) -> None:
        seen.append(("bus", data))

    async with bus, bare_bus:
        cli = ["redis-cli", "-s", server.socket_path, "PUBLISH", "cli:a", '{"n": 5}']
        done = await anyio.run_process(cli)
        assert done.stdout.strip() == b"2"
        await seen.reach(2)
    assert sorted(seen, key=str) == [("bus", {"n": 5}), ("handler", "a", 5)]


# Life


@pytest.mark.scenario(33)
async def test_drain(url: str) -> None:
    """Leaving finishes what was received, and handlers may publish until then."""
    bus = EventBus(url)
    other = EventBus(url)
    gate = asyncio.Event()
    entered: Seen[int] = Seen()
    seen: list[int] = []
    after: list[int] = []

    @bus.on("x")
    async def handler(event: Count) -> None:
        entered.append(event.n)
        await gate.wait()
        await bus.publish("after", event)
        seen.append(event.n)

    @other.on("after")
    async def hears(event: Count) -> None:
        after.append(event.n)

    async with other:
        await bus.start()
        for n in range(10):
            await bus.publish("x", Count(n=n))
        await entered.reach(1)
        stopping = asyncio.create_task(bus.stop())
        await until(silent(bus))
        assert not stopping.done()
        gate.set()
        await soon(stopping)
        assert seen == list(range(10))
        await fence(other)
    assert after == list(range(10))
    assert bus.health().state == "closed"
    assert bus.stats().dropped == 0


@pytest.mark.scenario(33)
async def test_drain_timeout(url: str) -> None:
    """What does not finish within `drain_timeout` is cancelled; what still waits is dropped."""
    bus = EventBus(url, drain_timeout=0.05)
    seen: Seen[str] = Seen()

    @bus.on("x")
    async def stuck(event: Count) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with bus:
        for _ in range(3):
            await bus.publish("x", Count())
        await fence(bus)
    assert seen == ["cancelled"]
    assert bus.stats().dropped == 2
    assert bus.stats().handlers["stuck"].depth == 0


@pytest.mark.scenario(33)
@pytest.mark.scenario(30)
async def test_thread_that_never_ends(url: str) -> None:
    """A `def` handler that hangs does not keep the bus from stopping."""
    bus = EventBus(url, drain_timeout=0.05)
    go_on = threading.Event()
    entered = threading.Event()

    @bus.on("x")
    def stuck(event: Count) -> None:
        entered.set()
        go_on.wait(10)

    async with bus:
        await bus.publish("x", Count())
        assert await asyncio.to_thread(entered.wait, 5)
    go_on.set()
    assert bus.health().state == "closed"


@pytest.mark.scenario(33)
async def test_stop_in_a_cancelled_scope(url: str) -> None:
    """Cancelled inside its block, a bus closes everything within `drain_timeout`, lets the
    cancellation pass, and can be started again."""
    bus = EventBus(url, drain_timeout=0.05)
    entered: Seen[int] = Seen()

    @bus.on("x")
    async def stuck(event: Count) -> None:
        entered.append(1)
        await asyncio.Event().wait()

    with anyio.CancelScope() as scope:
        async with bus:
            await bus.publish("x", Count())
            await entered.reach(1)
            scope.cancel()
            await checkpoint()
    assert scope.cancelled_caught
    assert bus.health().state == "closed"
    async with bus:
        await bus.publish("y", Count())


@pytest.mark.scenario(33)
@pytest.mark.scenario(31)
async def test_stop_inside_a_handler(url: str) -> None:
    """`stop()` inside a handler does not wait for that handler, and the bus is closed after it."""
    bus = EventBus(url)
    seen: Seen[Any] = Seen()

    @bus.on("x")
    async def handler(event: Count) -> None:
        await bus.stop()
        seen.append(bus.health().state)

    await bus.start()
    await bus.publish("x", Count())
    await seen.reach(1)
    assert seen == ["closed"]
    with pytest.raises(BusClosed):
        await bus.publish("x", Count())


@pytest.mark.scenario(33)
async def test_stop_inside_an_exception_handler(url: str) -> None:
    """An exception handler may stop the bus."""
    bus = EventBus(url)
    seen: Seen[Any] = Seen()

    @bus.on("x")
    async def handler(event: Count) -> None:
        raise ValueError

    @bus.exception_handler(ValueError)
    async def give_up(error: ValueError, message: Message[Any]) -> None:
        await bus.stop()
        seen.append(bus.health().state)

    await bus.start()
    await bus.publish("x", Count())
    await seen.reach(1)
    assert seen == ["closed"]


STOPS = {
    "gap handler": """
@bus.on_gap()
async def gap(gap): await stop()
""",
    "wait_for in a handler": """
@bus.on("stop")
async def handler(): await asyncio.wait_for(stop(), 5)
""",
    "gather in a handler": """
@bus.on("stop")
async def handler(): await asyncio.gather(stop(), stop())
""",
    "exception handler of publish_nowait": """
@bus.middleware("publish")
async def refuse(message, call_next):
    if message.channel == "stop": raise ValueError
    return await call_next(message)
@bus.exception_handler(ValueError)
async def handler(error, message): await stop()
""",
    "def handler": """
import anyio
@bus.on("stop")
def handler(): anyio.from_thread.run(stop)
""",
}


@pytest.mark.scenario(33)
@pytest.mark.parametrize("where", STOPS)
def test_stop_from_anywhere(where: str) -> None:
    """`stop()` returns within `drain_timeout` wherever it is called from."""
    code = f"""
bus = EventBus("memory://x", drain_timeout=0.2)
stopped = None
async def stop():
    await bus.stop()
    stopped.set()
{STOPS[where]}
@bus.on("*")
async def other(): pass
async def main():
    global stopped
    stopped = asyncio.Event()
    await bus.start()
    for number in (1, 3):
        head = b'{{"specversion":"1.0","id":"1","source":"s","type":"T","data":{{}}'
        await bus.publish_raw("x", b'%b,"busseq":%d}}' % (head, number))
    bus.publish_nowait("stop", Count())
    try:
        async with asyncio.timeout(3): await stopped.wait()
    except TimeoutError:
        print("hangs", flush=True)
        os._exit(1)
    print(bus.health().state)
asyncio.run(main())
"""
    done = run_script(code)
    assert (done.stdout, done.stderr, done.returncode) == ("closed\n", "", 0)


@pytest.mark.scenario(33)
async def test_stop_twice(url: str) -> None:
    """`stop` is idempotent: before a start, twice, at the same time, and after an exit."""
    bus = EventBus(url)
    await bus.stop()
    await bus.start()
    await asyncio.gather(bus.stop(), bus.stop(), bus.stop())
    await bus.stop()
    async with bus:
        await bus.stop()
    assert bus.health().state == "closed"


@pytest.mark.scenario(33)
async def test_nothing_is_left(url: str) -> None:
    """No task outlives the bus that made it, whatever it was doing."""
    before = asyncio.all_tasks()
    bus = EventBus(url, drain_timeout=0.05)
    entered: Seen[int] = Seen()

    @bus.on("x", concurrency=2)
    async def stuck(event: Count) -> None:
        entered.append(1)
        await asyncio.Event().wait()

    @bus.on_gap()
    async def gap(gap: Gap) -> None:
        await asyncio.Event().wait()

    async with bus, bus.subscribe("y"):
        await bus.publish("x", Count())
        await bus.publish_raw("x", write(Count(), number=1))
        await bus.publish_raw("x", write(Count(), number=3))
        bus.publish_nowait("z", Count())
        await entered.reach(2)
    assert asyncio.all_tasks() == before
    assert bus.stats().published == 4


async def test_start_while_running(url: str) -> None:
    """A second start of a running bus is refused, and harms nothing."""
    async with EventBus(url) as bus:
        with pytest.raises(EventBusError, match="running"):
            await bus.start()
        await bus.publish("x", Count())
        assert bus.health().state == "live"


async def test_restart(url: str) -> None:
    """A bus may be started again: its handlers are there, its counters at zero, its source new."""
    bus = EventBus(url)
    seen: list[Message[Count]] = []

    @bus.on("x")
    async def handler(message: Message[Count]) -> None:
        seen.append(message)

    for n in range(3):
        async with bus:
            assert bus.stats().published == 0
            assert bus.stats().delivered == 0
            await bus.publish("x", Count(n=n))
        assert bus.stats().published == 1
        assert bus.stats().delivered == 1
    assert [message.event.n for message in seen] == [0, 1, 2]
    assert [message.sequence for message in seen] == [1, 1, 1]
    assert len({message.source for message in seen}) == 3
    assert len({message.id for message in seen}) == 3
    assert bus.stats().missed == 0


async def test_attached_handlers_end_with_the_run(url: str) -> None:
    """What was attached lives until the stop, not beyond."""
    bus = EventBus(url)

    async def handler() -> None: ...

    async with bus:
        await bus.attach(handler, "x")
    async with bus:
        assert bus.stats().handlers == {}
        assert (await bus.publish("x", Count())).receivers == 0


@pytest.mark.scenario(34)
async def test_another_loop(url: str) -> None:
    """From start to stop a bus belongs to one loop; elsewhere every call is a clear BusClosed."""
    bus = EventBus(url)
    async with bus:

        def elsewhere() -> list[str]:
            async def attempt() -> list[str]:
                found = []
                for call in (
                    lambda: bus.publish("x", Count()),
                    lambda: bus.publish_raw("x", b""),
                    lambda: bus.expect("x", timeout=1.0),
                    bus.stop,
                ):
                    try:
                        await call()
                    except BusClosed as error:
                        found.append(str(error))
                return found

            return asyncio.run(attempt())

        found = await asyncio.to_thread(elsewhere)
        assert len(found) == 4
        assert all("loop" in text for text in found)
        await bus.publish("x", Count())


@pytest.mark.scenario(34)
async def test_use_in_a_thread(url: str) -> None:
    """In a `def` handler the bus can be looked at; publishing there is a clear BusClosed."""
    bus = EventBus(url)
    seen: list[Any] = []
    errors: list[Any] = []

    @bus.on("x")
    def handler(event: Count) -> None:
        seen.extend((repr(bus), bus.health().state, bus.stats().received))
        try:
            bus.publish_nowait("y", Count())
        except BusClosed as error:
            seen.append(str(error))

    @bus.exception_handler(Exception)
    async def keep(error: Exception, message: Message[Any]) -> None:
        errors.append(error)

    async with bus:
        await bus.publish("x", Count())
    assert errors == []
    assert seen[1] in ("live", "closed")  # closed: while it stops
    assert seen[2] == 1
    assert seen[1] in seen[0]
    assert "loop" in seen[3]


async def test_look_at_it_without_a_loop(url: str) -> None:
    """`repr`, `health` and `stats` work in a thread without an event loop."""

    def look() -> tuple[str, str, int]:
        return repr(bus), bus.health().state, bus.stats().published

    bus = EventBus(url)
    assert (await asyncio.to_thread(look))[1:] == ("closed", 0)
    async with bus:
        await bus.publish("x", Count())
        text, *found = await asyncio.to_thread(look)
        assert found == ["live", 1]
        assert "live" in text


@pytest.mark.scenario(34)
def test_fork() -> None:
    """A bus started before a fork refuses to work in the child; one built before it works there."""
    code = """
started, built = EventBus("memory://x"), EventBus("memory://x")
async def main():
    async with started:
        child = os.fork()
        if not child:
            os._exit(in_child())
        _, status = os.waitpid(child, 0)
        await started.publish("x", Count())
        print(os.waitstatus_to_exitcode(status))
def in_child():
    import threading
    codes = []
    def work():
        async def attempt():
            try:
                await started.publish("x", Count())
            except BusClosed as error:
                codes.append("process" in str(error))
            async with built:
                codes.append((await built.publish("x", Count())).receivers == 0)
        asyncio.run(attempt())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return 0 if codes == [True, True] else 1
asyncio.run(main())
"""
    done = run_script(code)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


async def test_lifespan(url: str) -> None:
    """`lifespan` is what an ASGI application asks for: running inside, stopped after."""
    bus = EventBus(url)
    async with bus.lifespan(object()):
        assert bus.health().state == "live"
        await bus.publish("x", Count())
    assert bus.health().state == "closed"
    with pytest.raises(LookupError):
        async with bus.lifespan():
            raise LookupError
    assert bus.health().state == "closed"


@pytest.mark.scenario(33)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run(number: signal.Signals) -> None:
    """`run()` goes on until a signal, lets the handlers finish, and returns."""
    code = """
bus = EventBus("memory://x")
@bus.on("x")
async def handler():
    print("handling", flush=True)
    await gate.wait()
    print("done", flush=True)
async def main():
    global gate
    gate = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, gate.set)
    running = asyncio.create_task(bus.run())
    while not bus.health():
        await asyncio.sleep(0)
    await bus.publish("x", Count())
    await running
    print(bus.health().state, flush=True)
asyncio.run(main())
"""
    preamble = (
        "import asyncio, os, sys\nfrom eventbus import *\nclass Count(Event):\n    n: int = 0\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", preamble + code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "handling\n"
        process.send_signal(number)
        out, err = process.communicate("go\n", timeout=20)
    assert (out, err, process.returncode) == ("done\nclosed\n", "", 0)


@pytest.mark.scenario(33)
async def test_run_ends_with_the_bus(url: str) -> None:
    """`run()` returns when something else stops the bus, such as a handler."""
    bus = EventBus(url)

    @bus.on("x")
    async def handler(event: Count) -> None:
        await bus.stop()

    running = asyncio.create_task(bus.run())
    try:
        await until(bus.health)
        await bus.publish("x", Count())
        await soon(asyncio.shield(running), 2.0)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert bus.health().state == "closed"


@pytest.mark.scenario(33)
@pytest.mark.parametrize("kind", ["SystemExit(3)", "KeyboardInterrupt"])
@pytest.mark.scenario(28)
def test_exit_in_a_handler(kind: str) -> None:
    """SystemExit and KeyboardInterrupt of a handler end the bus and the program."""
    code = f"""
bus = EventBus("memory://x", drain_timeout=2.0)
@bus.on("x")
async def handler():
    raise {kind}
async def main():
    try:
        async with bus:
            await bus.publish("x", Count())
            await asyncio.Event().wait()
    finally:
        print(bus.health().state, flush=True)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(3)
"""
    done = run_script(code)
    assert (done.stdout, done.returncode) == ("closed\n", 3)


# How it stands


async def test_health_of_a_healthy_bus(url: str) -> None:
    """Health is closed, live, closed; truthy only while it can receive."""
    bus = EventBus(url)

    @bus.on("a", "b:*")
    async def handler() -> None: ...

    assert (bus.health().state, bool(bus.health())) == ("closed", False)
    async with bus:
        health = bus.health()
        assert (health.state, health.reason, bool(health)) == ("live", None, True)
        assert set(health.subscriptions) == {"a", "b:*"}
        assert health.denied == ()
        assert health.last_received_age is not None
        assert health.last_received_age >= 0
    health = bus.health()
    assert (health.state, bool(health), health.subscriptions) == ("closed", False, ())


async def test_health_while_starting() -> None:
    """While Redis is not there the bus is starting, with a reason; a cancelled start leaves it
    closed."""
    bus = EventBus("redis://127.0.0.1:1", connect_timeout=5.0)
    starting = asyncio.create_task(bus.start())
    await until(lambda: "127.0.0.1" in str(bus.health().reason))
    assert (bus.health().state, bool(bus.health())) == ("starting", False)
    assert "starting" in repr(bus)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(starting)
    assert bus.health().state == "closed"


async def test_start_without_redis() -> None:
    """Without Redis a start ends after `connect_timeout`, and the error says where it tried, why it
    failed and what to do."""
    bus = EventBus("redis://:SECRET@127.0.0.1:1", connect_timeout=0.05)
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1.*\(.+\).*EVENTBUS_URL") as caught:
        await bus.start()
    assert caught.value.waited == 0.05
    assert "SECRET" not in str(caught.value)
    assert bus.health().state == "closed"


async def test_health_while_down() -> None:
    """A bus whose server has gone is down, and live again with a reconnect gap when it is back."""
    gaps: Seen[Gap] = Seen()
    lost = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "reconnecting" in record.getMessage():
                lost.set()

    watch = Watch()
    logging.getLogger("eventbus").addHandler(watch)
    try:
        with Server() as server:
            bus = EventBus(server.url)

            @bus.on("x")
            async def handler() -> None: ...

            @bus.on_gap()
            async def gap(gap: Gap) -> None:
                gaps.append(gap)

            async with bus:
                server.kill()
                await soon(lost.wait())
                await until(lambda: not bus.health())
                health = bus.health()
                assert (health.state, bool(health), health.subscriptions) == ("down", False, ())
                assert health.reason
                assert "down" in repr(bus)
                server.start()
                await gaps.reach(1)
                await until(lambda: bus.health().state == "live")
                assert bus.stats().reconnects == 1
                assert (await bus.publish("x", Count())).receivers == 1
    finally:
        logging.getLogger("eventbus").removeHandler(watch)
    assert [(gap.reason, gap.missed, gap.channel) for gap in gaps] == [("reconnect", None, None)]


@pytest.fixture
def restricted() -> Iterator[Server]:
    """A server of its own, with a user who may do little: listen and publish on `ok*`, in any
    namespace `ns`, and nothing else."""
    with Server() as server:
        client = redis.Redis(unix_socket_path=server.socket_path)
        rules = ["on", ">SECRET", "+@all", "resetchannels", "&ok", "&ok:*", "&ns:ok", "&__*"]
        client.execute_command("ACL", "SETUSER", "guest", *rules)
        client.close()
        yield server


def guest(server: Server, **options: Any) -> EventBus:
    """A bus that logs in as this user."""
    login = {"username": "guest", "password": "SECRET"}
    return EventBus(server.url, redis_options=login, **options)


@pytest.mark.scenario(23)
async def test_denied_patterns(restricted: Server) -> None:
    """A start with denied patterns raises PermissionDenied with all of them and the user."""
    bus = guest(restricted)

    @bus.on("ok", "no:*", "ok:*", "never")
    async def handler() -> None: ...

    with pytest.raises(PermissionDenied) as caught:
        await bus.start()
    assert set(caught.value.patterns) == {"no:*", "never"}
    assert caught.value.user == "guest"
    assert "ACL SETUSER guest" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert bus.health().state == "closed"


@pytest.mark.scenario(23)
async def test_degraded(restricted: Server) -> None:
    """With `on_denied="degrade"` the other patterns are live, and health names the denied."""
    bus = guest(restricted, on_denied="degrade")
    seen: Seen[str] = Seen()

    @bus.on("ok", "no:*")
    async def handler(message: Message) -> None:
        seen.append(message.channel)

    async with bus:
        health = bus.health()
        assert (health.state, bool(health)) == ("degraded", True)
        assert (health.subscriptions, health.denied) == (("ok",), ("no:*",))
        assert "no:*" in str(health.reason)
        await bus.publish("ok", Count())
    assert seen == ["ok"]


@pytest.mark.scenario(23)
async def test_attach_denied(restricted: Server) -> None:
    """A denied `attach`, `add` or `subscribe` raises and changes nothing."""

    async def handler() -> None: ...

    async with guest(restricted) as bus:
        with pytest.raises(PermissionDenied) as caught:
            await bus.attach(handler, "ok", "no:*")
        assert caught.value.patterns == ("no:*",)
        assert bus.stats().handlers == {}
        await until(silent(bus))
        route = await bus.attach(handler, "ok")
        with pytest.raises(PermissionDenied):
            await route.add("never")
        assert route.patterns == ("ok",)
        with pytest.raises(PermissionDenied):
            async with bus.subscribe("never"):
                pass
        await until(lambda: bus.health().subscriptions == ("ok",))
        assert bus.health().state == "live"


@pytest.mark.parametrize("namespace", ["", "ns"])
@pytest.mark.scenario(25)
async def test_publish_denied(restricted: Server, namespace: str) -> None:
    """A denied publish is a PermissionDenied with the channel as the caller named it and the user;
    `publish_nowait` reports it to the exception handlers. The next publish works."""
    bus = guest(restricted, namespace=namespace)
    told: Seen[Any] = Seen()

    @bus.exception_handler(PermissionDenied)
    async def keep(error: PermissionDenied, message: Message[Any]) -> None:
        told.append((error.channel, message.channel, message.id, message.event))

    async with bus:
        with pytest.raises(PermissionDenied) as caught:
            await bus.publish("no", Count())
        assert (caught.value.channel, caught.value.user) == ("no", "guest")
        id = bus.publish_nowait("no", Count(n=1))
        await told.reach(1)
        await bus.publish("ok", Count())
    assert told == [("no", "no", id, Count(n=1))]
    stats = bus.stats()
    assert (stats.published, stats.refused, stats.publish_failed) == (1, 2, 1)


@pytest.mark.scenario(22)
async def test_wrong_password(restricted: Server) -> None:
    """A wrong password fails at once, without the password."""
    bus = EventBus(
        restricted.url, redis_options={"username": "guest", "password": "WRONG"}, connect_timeout=9
    )
    with pytest.raises(PermissionDenied, match="guest") as caught:
        await soon(bus.start(), 3.0)
    assert "WRONG" not in str(caught.value)


async def test_stats(url: str) -> None:
    """The counters say what became of everything; before the first start they are zero."""
    bus = EventBus(url)

    @bus.on("x")
    async def handler(event: Count) -> None:
        if event.n == 1:
            raise ValueError

    @bus.exception_handler(Exception)
    async def keep(error: Exception, message: Message[Any]) -> None: ...

    assert bus.stats() == Stats(*[0] * 13, {})
    async with bus:
        await bus.publish("x", Count(n=0))
        await bus.publish("x", Count(n=1))
        await bus.publish("x", Said())
        await bus.publish_raw("x", b"nonsense")
        await bus.publish("y", Count())
    stats = bus.stats()
    assert stats._fields == (
        *("published", "refused", "uncertain", "publish_failed", "received", "delivered"),
        *("skipped", "invalid", "dropped", "conflated", "missed", "failed", "reconnects"),
        "handlers",
    )
    assert stats._replace(handlers={}) == Stats(5, 0, 0, 0, 4, 2, 1, 1, 0, 0, 0, 1, 0, {})
    assert HandlerStats._fields[:5] == ("depth", "bytes", "delivered", "dropped", "failed")
    assert stats.handlers["handler"][:5] == (0, 0, 2, 0, 1)


async def test_redis_client(server_url: str) -> None:
    """`bus.redis()` is a redis-py client of the same server, closed with the bus."""
    async with EventBus(server_url) as bus:
        client = bus.redis()
        assert bus.redis() is client
        await client.set("eventbus:test", "1", ex=60)
        assert await client.get("eventbus:test") in (b"1", "1")
        await client.delete("eventbus:test")


async def test_no_redis_client_of_memory() -> None:
    """On `memory://` there is no Redis, and `bus.redis()` says so in one sentence."""
    async with EventBus("memory://x") as bus:
        with pytest.raises(EventBusError, match="memory://"):
            bus.redis()


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:SECRET@localhost:1",
        "redis://:SECRET@localhost:1/3",
        "redis://localhost:1?password=SECRET",
        "rediss://user:SECRET@localhost:1?ssl_cert_reqs=none",
        "unix://user:SECRET@/tmp/x.sock",
        "redis+sentinel://user:SECRET@localhost:1,localhost:2/mymaster",
    ],
)
def test_repr_without_secrets(url: str) -> None:
    """`repr` tells name, state and place, and never a secret."""
    bus = EventBus(url, name="shop", redis_options={"client_name": "SECRET"})
    for text in (repr(bus), str(bus), repr(bus.health())):
        assert "SECRET" not in text
        assert "closed" in text
    assert "shop" in repr(bus)
    assert "/tmp/x.sock" in repr(bus) or "localhost" in repr(bus)


@pytest.mark.parametrize(
    "setting, values",
    [
        ("name", ["", "a b", "é", 'q"', "a\n", "a/b"]),
        ("namespace", ["a*", "a{b}", "a\n", "[", "x" * 600, "\ud800"]),
        ("wire", ["json", ""]),
        ("outage", ["wait", None, 5]),
        ("heartbeat", [0, -1.0, float("nan")]),
        ("publish_timeout", [0, -1.0, float("nan")]),
        ("connect_timeout", [0, -1.0, float("nan")]),
        ("drain_timeout", [-1.0, float("nan")]),
        ("on_denied", ["ignore", None]),
        ("max_payload", [0, -5]),
        ("max_pending_bytes", [0, -5]),
    ],
)
def test_settings(setting: str, values: list[Any]) -> None:
    """A setting that makes no sense is a ValueError that names it."""
    for value in values:
        with pytest.raises(ValueError, match=setting):
            EventBus("memory://x", **{setting: value})


@pytest.mark.parametrize(
    "wrong", [{"max_events": 0}, {"max_age": 0.0}, {"max_age": -1.0}, {"max_age": float("nan")}]
)
def test_buffer_settings(wrong: dict[str, Any]) -> None:
    """A buffer of no size or no age is refused."""
    assert Buffer() == Buffer(max_events=10_000, max_age=30.0, latest=False)
    with pytest.raises(ValueError, match="Buffer"):
        Buffer(**wrong)


@pytest.mark.parametrize("url", ["http://x", "x", "", "redis:/x", 5, ..., b"redis://x"], ids=str)
def test_bad_url(url: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL of no transport, or no URL at all, is an error at construction."""
    with pytest.raises(EventBusError):
        EventBus(url)


def test_url_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a URL the bus takes EVENTBUS_URL, else Redis on this machine."""
    monkeypatch.setenv("EVENTBUS_URL", "memory://from-env")
    assert "memory://from-env" in repr(EventBus())
    monkeypatch.delenv("EVENTBUS_URL")
    assert "redis://localhost:6379" in repr(EventBus())


async def test_memory_names() -> None:
    """Memory buses of one name see each other, of two names do not; from any thread and loop."""
    one, two = EventBus("memory://one"), EventBus("memory://two")
    seen: Seen[Any] = Seen()

    @one.on("x")
    async def handler(event: Count) -> None:
        seen.append(event.n)

    async def publish(n: int) -> None:
        async with EventBus("memory://one") as bus:
            await bus.publish("x", Count(n=n))

    async with one, two:
        assert (await two.publish("x", Count(n=0))).receivers == 0
        await publish(1)
        await asyncio.to_thread(asyncio.run, publish(2))
        await seen.reach(2)
    assert seen == [1, 2]
