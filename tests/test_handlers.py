"""Handlers: what a signature asks for is what the call gets; what cannot be is refused early."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Annotated, Any, Literal, NewType, TypeVar
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from eventbus import Event, EventBus, EventBusError, InvalidHandler, Message, Router, Stats
from tests.helpers import soon

Handler = Callable[..., Any]


class Note(Event, channel="note:{room}"):
    room: str = "a"
    x: int = 0


class Twin(Event, type="Note"):
    pass


class Said(Event):
    text: str = ""


class Shape(BaseModel):
    x: int


class Flat(BaseModel):
    kind: Literal["flat"] = "flat"
    x: int = 0


class Deep(BaseModel):
    kind: Literal["deep"] = "deep"
    y: int = 0


class Colour(Enum):
    RED = "red"
    TWO = 2


UserId = NewType("UserId", int)
T = TypeVar("T")
NOTE = Note()
ROOM = UUID("12345678-1234-5678-1234-567812345678")


async def deliver(
    handler: Handler,
    *patterns: str | type[Event],
    to: str = "note:a",
    event: Event | None = None,
    raw: bytes | None = None,
    **options: Any,
) -> Stats:
    """Publish one event to one handler on a bus of its own; its errors are raised."""
    bus = EventBus("memory://handlers", **options)
    failures: list[Exception] = []
    bus.on(*patterns or ("note:*",))(handler)

    @bus.exception_handler(Exception)
    async def keep(error: Exception, message: Message[Any]) -> None:
        failures.append(error)

    async with bus:
        if raw is not None:
            await bus.publish_raw(to, raw)
        else:
            await bus.publish(to, event or Note(x=7))
    if failures:
        raise failures[0]
    return bus.stats()


def refused(handler: Any, *patterns: str | type[Event], **options: Any) -> InvalidHandler:
    """The error of declaring this handler; the bus is as it was before."""
    bus = EventBus("memory://refused")
    with pytest.raises(InvalidHandler) as caught:
        bus.on(*patterns or ("note:{room}",), **options)(handler)
    assert isinstance(caught.value, EventBusError)
    assert isinstance(caught.value, TypeError)
    assert bus.stats().handlers == {}
    return caught.value


# What a parameter may ask for


async def test_every_kind_at_once() -> None:
    """Event, capture, message, dict, bytes and bus are all filled, whatever their order."""
    seen: list[Any] = []

    async def handler(
        raw: bytes, room: str, bus: EventBus, event: Note, table: dict, message: Message[Note]
    ) -> None:
        seen.extend((event, room, table, message, raw, bus))

    await deliver(handler, "note:{room}", to="note:b")
    event, room, table, message, raw, bus = seen
    assert event == Note(x=7)
    assert room == "b"
    assert table == {"room": "a", "x": 7}
    assert message.event == event
    assert (message.channel, message.pattern, dict(message.captures)) == (
        "note:b",
        "note:{room}",
        {"room": "b"},
    )
    assert raw.startswith(b'{"specversion":"1.0"')
    assert isinstance(bus, EventBus)


async def test_no_parameter() -> None:
    """A handler without parameters is called for every message."""
    calls: list[int] = []

    async def handler() -> None:
        calls.append(1)

    await deliver(handler)
    await deliver(handler, raw=b"\x00\xff")
    assert calls == [1, 1]


@pytest.mark.parametrize(
    "annotation", [dict, dict[str, Any], dict[str, object], Message[dict]], ids=str
)
async def test_dict(annotation: Any) -> None:
    """A dict takes the data of every type."""
    seen: list[Any] = []

    async def handler(found: Any) -> None:
        seen.append(getattr(found, "event", found))

    handler.__annotations__["found"] = annotation
    await deliver(handler)
    await deliver(handler, event=Said(text="hi"))
    assert seen == [{"room": "a", "x": 7}, {"text": "hi"}]


async def test_bare_message_is_a_message_of_dict() -> None:
    """`Message` without a type has the data as a dict."""
    seen: list[Message[Any]] = []

    async def handler(message: Message) -> None:
        seen.append(message)

    await deliver(handler)
    assert seen[0].event == {"room": "a", "x": 7}
    assert seen[0].type == "Note"


async def test_message_of_a_type_variable() -> None:
    """A message of a type variable is as good as a bare one."""
    seen: list[Any] = []

    async def handler(message: Message[T]) -> None:
        seen.append(message.event)

    await deliver(handler)
    assert seen == [{"room": "a", "x": 7}]


async def test_bytes_alone() -> None:
    """A handler of bytes gets the payload as it was, even when it is no event at all."""
    seen: list[bytes] = []

    async def handler(raw: bytes) -> None:
        seen.append(raw)

    stats = await deliver(handler, raw=b"\x00 anything")
    assert seen == [b"\x00 anything"]
    assert (stats.delivered, stats.invalid) == (1, 0)


async def test_message_of_bytes() -> None:
    """`Message[bytes]` has the payload as its event, and the metadata when there is an envelope."""
    seen: list[Message[bytes]] = []

    async def handler(message: Message[bytes]) -> None:
        seen.append(message)

    await deliver(handler, raw=b"\xff")
    await deliver(handler)
    assert (seen[0].event, seen[0].id, seen[0].time, seen[0].channel) == (
        b"\xff",
        None,
        None,
        "note:a",
    )
    assert seen[1].event.startswith(b"{")
    assert (seen[1].type, seen[1].sequence) == ("Note", 1)


async def test_plain_model() -> None:
    """A pydantic model that is no event takes every type that fits, and is invalid for others."""
    seen: list[Shape] = []

    async def handler(shape: Shape) -> None:
        seen.append(shape)

    await deliver(handler)
    with pytest.raises(EventBusError, match="x: Field required"):
        await deliver(handler, event=Said())
    assert seen == [Shape(x=7)]


async def test_union_of_events() -> None:
    """A union takes exactly its members, whichever way it is written."""
    seen: list[Event] = []

    async def bar(event: Note | Said) -> None:
        seen.append(event)

    async def annotated(event: Annotated[Note | Said, "whatever"]) -> None:
        seen.append(event)

    async def in_message(message: Message[Note | Said]) -> None:
        seen.append(message.event)

    class Third(Event):
        pass

    for handler in (bar, annotated, in_message):
        for event in (Note(x=7), Said(text="t"), Third()):
            stats = await deliver(handler, event=event)
            assert stats.skipped == isinstance(event, Third)
    assert seen == [Note(x=7), Said(text="t")] * 3


async def test_annotated_event() -> None:
    """`Annotated[Note, ...]` is as good as `Note`."""
    seen: list[Event] = []

    async def handler(event: Annotated[Note, "for the reader"]) -> None:
        seen.append(event)

    await deliver(handler)
    assert seen == [Note(x=7)]


async def test_event_and_its_message() -> None:
    """An event beside a message of it, or beside a bare message, is one and the same object."""
    seen: list[bool] = []

    async def typed(event: Note, message: Message[Note]) -> None:
        seen.append(message.event is event)

    async def bare(message: Message, event: Note) -> None:
        seen.append(message.event is event)

    await deliver(typed)
    await deliver(bare)
    assert seen == [True, True]


async def test_event_and_dict() -> None:
    """A dict beside an event has all that was sent, also what the event class does not know."""
    seen: list[Any] = []

    async def handler(table: dict, event: Note) -> None:
        seen.append((table, event))

    raw = b'{"id":"1","source":"s","specversion":"1.0","type":"Note","data":{"x":1,"new":2}}'
    await deliver(handler, raw=raw)
    assert seen == [({"x": 1, "new": 2}, Note(x=1))]


# Captures


@pytest.mark.parametrize(
    "annotation, text, value",
    [
        (str, "7", "7"),
        (int, "-7", -7),
        (float, "1.5", 1.5),
        (bool, "true", True),
        (bool, "0", False),
        (UUID, str(ROOM), ROOM),
        (Colour, "red", Colour.RED),
        (UserId, "7", 7),
        (Literal["a", "b"], "a", "a"),
        (Annotated[int, Field(gt=5)], "6", 6),
        (int | None, "6", 6),
        (Any, "6", "6"),
        (str, "grün", "grün"),
        (str, "caf\udce9", "caf\udce9"),
    ],
    ids=str,
)
async def test_capture_is_converted(annotation: Any, text: str, value: object) -> None:
    """A capture is converted by the annotation of its parameter."""
    seen: list[Any] = []

    async def handler(room: Any) -> None:
        seen.append(room)

    handler.__annotations__["room"] = annotation
    stats = await deliver(handler, "note:{room}", to=f"note:{text}")
    assert seen == [value]
    assert type(seen[0]) is type(value)
    assert stats.skipped == 0


@pytest.mark.parametrize(
    "annotation, text",
    [
        (int, "x"),
        (int, "1.5"),
        (bool, "maybe"),
        (UUID, "7"),
        (Colour, "blue"),
        (Literal["a"], "b"),
        (Annotated[int, Field(gt=5)], "5"),
        (int, "caf\udce9"),
    ],
    ids=str,
)
async def test_capture_that_does_not_convert(annotation: Any, text: str) -> None:
    """A capture that does not convert skips the message, counted for this route; no error."""
    seen: list[Any] = []

    async def handler(room: Any, event: Note) -> None:
        seen.append(room)

    handler.__annotations__["room"] = annotation
    stats = await deliver(handler, "note:{room}", to=f"note:{text}")
    assert seen == []
    assert (stats.skipped, stats.delivered, stats.invalid, stats.failed) == (1, 0, 0, 0)
    assert stats.handlers["handler"].skipped == 1


async def test_capture_without_annotation() -> None:
    """A capture parameter without an annotation is the text."""
    seen: list[Any] = []

    async def handler(room) -> None:  # type: ignore[no-untyped-def]
        seen.append(room)

    await deliver(handler, "note:{room}")
    assert seen == ["a"]


async def test_several_captures_and_a_path() -> None:
    """Captures are filled by name, a path with its colons."""
    seen: list[Any] = []

    async def handler(rest: str, room: int, event: Note, kind: str) -> None:
        seen.append((kind, room, rest))

    await deliver(handler, "{kind}:{room}:{rest:path}", to="note:5:x:y")
    assert seen == [("note", 5, "x:y")]


async def test_capture_wins_over_the_type() -> None:
    """A parameter that is named like a capture takes the capture, not the bus or the payload."""
    seen: list[Any] = []

    async def handler(bus: str, raw: str) -> None:
        seen.append((bus, raw))

    await deliver(handler, "{bus}:{raw}")
    assert seen == [("note", "a")]


async def test_capture_of_some_patterns() -> None:
    """A capture that not every pattern has is its default where it is missing."""
    seen: list[Any] = []

    async def handler(event: Note, room: str = "none") -> None:
        seen.append(room)

    for to in ("note:x", "all"):
        await deliver(handler, "note:{room}", "all", to=to)
    assert seen == ["x", "none"]


async def test_unused_capture() -> None:
    """A capture that no parameter asks for is left in the message."""
    seen: list[Any] = []

    async def handler(message: Message) -> None:
        seen.append(message.captures["room"])

    await deliver(handler, "note:{room}")
    assert seen == ["a"]


# Forms of a handler


async def test_defaults_stay() -> None:
    """Parameters with defaults that nothing fills keep them; one that can be filled is filled."""
    seen: list[Any] = []

    async def handler(
        event: Note, limit: int = 5, *, name: str = "n", other: Any = None, raw: bytes = b""
    ) -> None:
        seen.append((event, limit, name, other, raw[:1]))

    await deliver(handler)
    assert seen == [(Note(x=7), 5, "n", None, b"{")]


async def test_keyword_only() -> None:
    """Keyword-only parameters are filled."""
    seen: list[Any] = []

    async def handler(*, event: Note, room: str) -> None:
        seen.append((event.x, room))

    await deliver(handler, "note:{room}")
    assert seen == [(7, "a")]


async def test_positional_only() -> None:
    """Positional-only parameters are filled in their places, captures among them."""
    seen: list[Any] = []

    async def handler(room: str, event: Note, message: Message, /, *, raw: bytes) -> None:
        seen.append((room, event.x, message.type, raw[:1]))

    async def alone(event: Note, /) -> None:
        seen.append(event.x)

    async def capture_last(event: Note, room: str, /) -> None:
        seen.append((event.x, room))

    await deliver(handler, "note:{room}")
    await deliver(alone)
    await deliver(capture_last, "note:{room}")
    assert seen == [("a", 7, "Note", b"{"), 7, (7, "a")]


async def test_positional_only_with_defaults() -> None:
    """A positional-only parameter that nothing fills keeps its default."""
    seen: list[Any] = []

    async def handler(limit: int = 5, event: Note = NOTE, /) -> None:
        seen.append((limit, event.x))

    await deliver(handler)
    assert seen == [(5, 7)]


async def test_positional_only_capture_of_some_patterns() -> None:
    """A positional-only capture with a default is its default where the pattern has none."""
    seen: list[Any] = []

    async def handler(room: str = "none", /, *, event: Note) -> None:
        seen.append((room, event.x))

    for to in ("note:x", "all"):
        await deliver(handler, "note:{room}", "all", to=to)
    assert seen == [("x", 7), ("none", 7)]


async def test_args_and_kwargs() -> None:
    """`*args` and `**kwargs` stay empty."""
    seen: list[Any] = []

    async def handler(event: Note, *args: Any, room: str = "", **kwargs: Any) -> None:
        seen.append((event.x, args, room, kwargs))

    await deliver(handler, "note:{room}")
    assert seen == [(7, (), "a", {})]


async def test_def_runs_in_a_thread() -> None:
    """A `def` handler runs in a worker thread, an `async def` handler on the loop."""
    seen: list[Any] = []

    def blocking(event: Note, room: str) -> None:
        seen.append((event.x, room, threading.current_thread() is threading.main_thread()))

    async def on_loop(event: Note, room: str) -> None:
        seen.append((event.x, room, threading.current_thread() is threading.main_thread()))

    await deliver(blocking, "note:{room}")
    await deliver(on_loop, "note:{room}")
    assert seen == [(7, "a", False), (7, "a", True)]


async def test_methods_and_objects() -> None:
    """Bound methods, class and static methods and objects with `__call__` are handlers."""
    seen: list[Any] = []

    class Service:
        async def method(self, event: Note, room: str) -> None:
            seen.append(("method", event.x, room, threading.get_ident() == here))

        def blocking(self, event: Note) -> None:
            seen.append(("blocking", event.x, threading.get_ident() == here))

        @classmethod
        async def of_class(cls, event: Note) -> None:
            seen.append(("class", event.x))

        @staticmethod
        async def static(event: Note) -> None:
            seen.append(("static", event.x))

    class Async:
        async def __call__(self, event: Note) -> None:
            seen.append(("object", event.x, threading.get_ident() == here))

    class Blocking:
        def __call__(self, event: Note) -> None:
            seen.append(("object", event.x, threading.get_ident() == here))

    here = threading.get_ident()
    service = Service()
    for handler in (service.method, service.blocking, Service.of_class, Service.static):
        await deliver(handler, "note:{room}")
    names = [list((await deliver(item)).handlers) for item in (Async(), Blocking())]
    assert seen == [
        ("method", 7, "a", True),
        ("blocking", 7, False),
        ("class", 7),
        ("static", 7),
        ("object", 7, True),
        ("object", 7, False),
    ]
    assert names == [["Async"], ["Blocking"]]


async def test_partials() -> None:
    """What a partial has bound stays; the rest is filled. It has the name of its function."""
    seen: list[Any] = []

    async def handler(prefix: str, event: Note, room: str, *, suffix: str) -> None:
        seen.append((prefix, event.x, room, suffix))

    def blocking(prefix: str, event: Note) -> None:
        seen.append((prefix, event.x, threading.current_thread() is threading.main_thread()))

    partial = functools.partial(functools.partial(handler, "p"), suffix="s")
    stats = await deliver(partial, "note:{room}")
    await deliver(functools.partial(blocking, "p"))
    assert seen == [("p", 7, "a", "s"), ("p", 7, False)]
    assert list(stats.handlers) == ["handler"]


async def test_wrapped_function() -> None:
    """A decorated handler is filled by the signature of what it wraps."""
    seen: list[Any] = []

    def logged(fn: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @functools.wraps(fn)
        async def wrapper(*args: Any, **kwargs: Any) -> None:
            seen.append("before")
            await fn(*args, **kwargs)

        return wrapper

    @logged
    async def handler(event: Note, room: int) -> None:
        seen.append((event.x, room))

    await deliver(handler, "note:{room}", to="note:5")
    assert seen == ["before", (7, 5)]


async def test_one_function_twice() -> None:
    """One function may be declared more than once; each is a route with a name of its own."""
    bus = EventBus("memory://twice")
    seen: list[str] = []

    @bus.on("a")
    @bus.on("b", "{c}")
    async def handler(message: Message) -> None:
        seen.append(message.channel)

    async with bus:
        assert len(bus.stats().handlers) == 2
        assert "handler" in bus.stats().handlers
        await bus.publish("a", Note())
        await bus.publish("b", Note())
    assert seen == ["a", "a", "b"]


def test_function_comes_back() -> None:
    """`on`, `on_gap`, `exception_handler` and `middleware` return the very function."""
    bus = EventBus("memory://x")

    async def handler(event: Note) -> None: ...

    async def gap(gap: Any) -> None: ...

    async def two(message: Any, call_next: Any) -> None: ...

    assert bus.on(Note)(handler) is handler
    assert Router().on(Note)(handler) is handler
    assert bus.on_gap()(gap) is gap
    assert bus.exception_handler(ValueError)(two) is two
    assert bus.middleware("receive")(two) is two


# Names that are local to a function, with `from __future__ import annotations` above


async def test_local_classes() -> None:
    """Annotations may name classes that exist only in the function that declares the handler."""

    class Local(Event):
        y: int = 0

    seen: list[Any] = []
    bus = EventBus("memory://local")

    @bus.on("a:{n}")
    async def handler(event: Local, message: Message[Local], n: int) -> None:
        seen.append((event, message.event, n))

    async def attached(event: Local) -> None:
        seen.append(event)

    async with bus:
        await bus.attach(attached, "b")
        await bus.publish("a:5", Local(y=1))
        await bus.publish("b", Local(y=2))
    assert seen == [(Local(y=1), Local(y=1), 5), Local(y=2)]


async def test_local_classes_in_a_router() -> None:
    """Local names are those of the place where the router's handler was declared."""
    bus = EventBus("memory://router")
    seen: list[Any] = []

    def declare() -> tuple[Router, type[Event]]:
        class Local(Event):
            y: int = 0

        router = Router(prefix="r:")

        @router.on("{n}")
        async def handler(event: Local, n: int) -> None:
            seen.append((event.y, n))

        return router, Local

    router, local = declare()
    bus.include_router(router)
    async with bus:
        await bus.publish("r:5", local(y=1))
    assert seen == [(1, 5)]


async def test_attach_in_a_task() -> None:
    """`attach` knows the local classes of its caller, also when its coroutine runs in a task."""

    class Local(Event):
        y: int = 0

    seen: list[Any] = []

    async def handler(event: Local) -> None:
        seen.append(event)

    async with EventBus("memory://task") as bus:
        await soon(asyncio.create_task(bus.attach(handler, "b")))
        await bus.publish("b", Local(y=2))
    assert seen == [Local(y=2)]


def test_unknown_name() -> None:
    """An annotation that names nothing is refused, and the error says which name it is."""

    async def handler(event: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    error = refused(handler)
    assert error.handler == "handler"
    assert "'Missing'" in str(error)


@pytest.mark.parametrize("text", ["functools.Missing", "not an expression", "1 / 0", "Note()[0]"])
def test_annotation_that_fails(text: str) -> None:
    """An annotation that cannot be evaluated, for whatever reason, is an InvalidHandler."""

    async def handler(event: Any) -> None: ...

    handler.__annotations__["event"] = text
    assert refused(handler).handler == "handler"


# What cannot be filled


def message_of(error: InvalidHandler, parameter: str | None, *words: str) -> None:
    """Its fields name the handler and the parameter, its text says more."""
    assert error.handler == "handler"
    assert error.parameter == parameter
    for word in ("handler", *words):
        assert word in str(error)


def test_unknown_parameter() -> None:
    """A parameter that nothing fills is refused, with the captures that there are."""

    async def handler(event: Note, who: str) -> None: ...

    message_of(refused(handler, "x:{room}:{user}"), "who", "'who'", "room, user", "Event")
    message_of(refused(handler, "x"), "who", "none")


@pytest.mark.parametrize(
    "annotation",
    [int, str, list[int], object, asyncio.Event, Note | None, Note | int, Note | Shape, type[Note]],
    ids=str,
)
def test_kinds_that_do_not_exist(annotation: Any) -> None:
    """Annotations that are no event, model, dict, bytes, Message or EventBus are refused."""

    async def handler(thing: Any) -> None: ...

    handler.__annotations__["thing"] = annotation
    error = refused(handler)
    message_of(error, "thing", "'thing'")


def test_parameter_without_annotation() -> None:
    """A parameter without annotation that is no capture is refused."""

    async def handler(event) -> None: ...  # type: ignore[no-untyped-def]

    message_of(refused(handler), "event", "cannot be filled")


@pytest.mark.parametrize(
    "first, second",
    [
        (Note, Said),
        (Note, Note),
        (Shape, Note),
        (bytes, bytes),
        (dict, dict[str, Any]),
        (Message, Message[Note]),
        (EventBus, EventBus),
    ],
    ids=str,
)
def test_two_of_one_kind(first: Any, second: Any) -> None:
    """Two parameters of one kind are refused; the error names the second."""

    async def handler(one: Any, two: Any) -> None: ...

    handler.__annotations__ |= {"one": first, "two": second}
    message_of(refused(handler), "two", "'two'", "second")


def test_event_and_message_of_another() -> None:
    """An event beside a message of another event is refused."""

    async def handler(event: Note, message: Message[Said]) -> None: ...

    error = refused(handler)
    assert error.handler == "handler"
    assert "Note" in str(error)
    assert "Said" in str(error)


def test_capture_that_not_every_pattern_has() -> None:
    """A capture that not every pattern has needs a default."""

    async def handler(event: Note, room: str) -> None: ...

    message_of(refused(handler, "note:{room}", "all"), "room", "'room'", "default")


def test_capture_that_nothing_converts_to() -> None:
    """A capture annotated with what no text converts to is refused at once."""

    async def handler(room: asyncio.Event) -> None: ...

    message_of(refused(handler), "room", "'room'", "capture")


def test_event_itself() -> None:
    """Annotating `Event` itself is refused, alone, in a union, in a message."""

    async def alone(event: Event) -> None: ...

    async def union(event: Note | Event) -> None: ...

    async def message(event: Message[Event]) -> None: ...

    for handler in (alone, union, message):
        error = refused(handler)
        assert error.handler == handler.__name__
        assert error.parameter == "event"
        assert "Event itself" in str(error)


def test_two_classes_of_one_type() -> None:
    """Two classes with one wire type in a union are refused, and the type is named."""

    async def handler(event: Note | Twin) -> None: ...

    error = refused(handler)
    message_of(error, "event", "'Note'")


@pytest.mark.parametrize("inner", [int, str, list[int], Note | None, Note | Shape], ids=str)
def test_message_of_something_else(inner: Any) -> None:
    """A message of what is no event is refused."""

    async def handler(message: Any) -> None: ...

    handler.__annotations__["message"] = Message[inner]
    assert refused(handler).handler == "handler"


def test_router_is_no_bus() -> None:
    """A parameter annotated with `Router` is not filled with the bus."""

    async def handler(event: Note, router: Router) -> None: ...

    message_of(refused(handler), "router", "'router'")


@pytest.mark.parametrize("thing", [None, 5, "name", Note(x=1)], ids=str)
def test_no_function(thing: object) -> None:
    """What cannot be called is no handler."""
    assert type(thing).__name__ in str(refused(thing))


def test_builtin_without_signature() -> None:
    """A callable that Python knows no signature of is refused."""
    assert "not a handler" in str(refused(dict))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": -1}, "concurrency"),
        ({"max_queue": 0}, "max_queue"),
        ({"order_by": "user"}, "order_by"),
        ({"overflow": "block"}, "overflow"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"wire": "json"}, "wire"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], word: str) -> None:
    """An option that makes no sense is refused, and named."""

    async def handler(event: Note) -> None: ...

    assert word in str(refused(handler, **options))


async def test_nothing_is_left_of_a_refused_attach() -> None:
    """A handler that `attach` refuses leaves no route behind."""

    async def handler(event: Note, who: str) -> None: ...

    async with EventBus("memory://refused") as bus:
        with pytest.raises(InvalidHandler):
            await bus.attach(handler, "x:{room}")
        assert bus.stats().handlers == {}
        assert bus.health().subscriptions == ()


# The bare wire


async def test_bare() -> None:
    """On a bare wire a model, a dict, bytes, or a union with a discriminator reads the payload."""
    seen: list[Any] = []

    async def model(found: Shape) -> None:
        seen.append(found)

    async def event(found: Note) -> None:
        seen.append(found)

    async def table(found: dict) -> None:
        seen.append(found)

    async def raw(found: bytes) -> None:
        seen.append(found)

    async def union(found: Annotated[Flat | Deep, Field(discriminator="kind")]) -> None:
        seen.append(found)

    async def message(found: Message[Note]) -> None:
        seen.append((found.event, found.id, found.source, found.type, found.time, found.sequence))

    async def both(found: Note, table: dict, raw: bytes) -> None:
        seen.append((found, table, raw))

    payload = b'{"kind": "flat", "x": 3, "room": "b"}'
    note = Note(x=3, room="b")
    for handler in (model, event, table, raw, union, message, both):
        await deliver(handler, raw=payload, wire="bare")
    as_dict = {"kind": "flat", "x": 3, "room": "b"}
    assert seen == [
        Shape(x=3),
        note,
        as_dict,
        payload,
        Flat(x=3),
        (note, None, None, None, None, None),
        (note, as_dict, payload),
    ]


def test_bare_union_needs_a_discriminator() -> None:
    """On a bare wire there is no type, so a union without a discriminator of its own is refused."""

    async def handler(found: Note | Said) -> None: ...

    async def plain(found: Flat | Deep) -> None: ...

    assert "discriminator" in str(refused(handler, wire="bare"))
    assert "discriminator" in str(refused(plain, wire="bare"))


async def test_bare_payload_that_does_not_fit() -> None:
    """A bare payload that does not fit is invalid, for each kind of reader."""

    async def model(found: Shape) -> None: ...

    async def table(found: dict) -> None: ...

    for handler in (model, table):
        for raw in (b"[]", b"nothing", b"", b"5", b"\xff"):
            with pytest.raises(EventBusError, match="does not fit"):
                await deliver(handler, raw=raw, wire="bare")


# Streams


@pytest.mark.parametrize(
    "types", [(Event,), (Note, int), (int,), (dict, bytes), (Note, Shape)], ids=str
)
async def test_stream_types(types: tuple[Any, ...]) -> None:
    """`subscribe` takes event classes, or one other type; anything else is refused."""
    async with EventBus("memory://stream") as bus:
        with pytest.raises(InvalidHandler, match="subscribe"):
            bus.subscribe("x", *types)
