"""Bad input: what arrives hurts only itself, and what no receiver could read is not sent.

The payloads are the recorded cases of `corpus/cases.toml`. Each runs alone and followed by a good
event, for every kind of handler, on memory and on real servers, through public names.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from eventbus import (
    Event,
    EventBus,
    Gap,
    InvalidChannel,
    InvalidEvent,
    InvalidPattern,
    Message,
    PayloadTooLarge,
    Router,
    escape,
)
from eventbus.server import Server
from tests.faults.corpus.cases import Case, Note, load
from tests.helpers import TIME, Lines, Seen, soon

HEAD = f'{{"specversion":"1.0","id":"1f-1","source":"s","type":"Note","time":"{TIME}","busseq":'
GOOD = HEAD.encode() + b'2,"data":{"x":424242}}'
BARE = b'{"x":424242}'
LARGE = 1 << 20
KINDS = {  # which column of the table a handler of each kind goes by
    "event": "event",
    "message": "event",
    "dict": "dict",
    "meta": "dict",
    "bytes": "",
    "bare": "bare",
    "bare_dict": "bare_dict",
}


async def until(done: Callable[[], bool]) -> None:
    """Return when it is so; a TimeoutError when it never is."""
    async with asyncio.timeout(10):
        while not done():
            await checkpoint()


# -- 37: payloads ----------------------------------------------------------------------------------


class Ears:
    """A bus with one handler of every kind, each on a channel of its own, and three together."""

    def __init__(self, url: str, namespace: str) -> None:
        self.bus = bus = EventBus(url, namespace=namespace)
        self.heard: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.refused: list[tuple[str, tuple[str, ...], Any]] = []

        @bus.on("in:event")
        async def event(event: Note) -> None:
            self.hear("event", event.x)

        @bus.on("in:message")
        async def message(message: Message[Note]) -> None:
            self.hear("message", message.event.x)

        @bus.on("in:dict")
        async def table(data: dict[str, Any]) -> None:
            self.hear("dict", data.get("x"))

        @bus.on("in:meta")
        async def meta(message: Message) -> None:  # type: ignore[type-arg]
            self.hear("meta", message.event.get("x"))

        @bus.on("in:bytes")
        async def raw(payload: bytes) -> None:
            self.hear("bytes", 424242 if payload == GOOD else 0)

        @bus.on("in:bare", wire="bare")
        async def bare(event: Note) -> None:
            self.hear("bare", event.x)

        @bus.on("in:bare_dict", wire="bare")
        async def bare_table(data: dict[str, Any]) -> None:
            self.hear("bare_dict", data.get("x"))

        @bus.on("in:all")
        async def first(event: Note) -> None:
            self.hear("all event", event.x)

        @bus.on("in:all")
        async def second(data: dict[str, Any]) -> None:
            self.hear("all dict", data.get("x"))

        @bus.on("in:all")
        async def third(payload: bytes) -> None:
            self.hear("all bytes", 424242 if payload == GOOD else 0)

        @bus.exception_handler(InvalidEvent)
        async def refuse(error: InvalidEvent, message: Message[Any]) -> None:
            self.refused.append((str(error.channel), error.reasons, message.event))

    def hear(self, kind: str, x: object) -> None:
        (self.good if x == 424242 else self.heard)[kind] += 1


def expected(case: Case, times: int) -> tuple[Counter[str], Counter[str], int]:
    """What the handlers hear, what is refused on each channel, and how often one skips."""
    outcomes = {kind: case.outcomes.get(column, "delivered") for kind, column in KINDS.items()}
    outcomes |= {f"all {kind}": outcomes[kind] for kind in ("event", "dict", "bytes")}
    if len(case.payload) > LARGE:
        outcomes = dict.fromkeys(outcomes, "payload: too large")
    refused = {
        "in:all" if kind.startswith("all ") else f"in:{kind}"
        for kind, outcome in outcomes.items()
        if outcome not in ("delivered", "skipped")
    }
    heard = [kind for kind, outcome in outcomes.items() if outcome == "delivered"]
    skipped = sum(outcome == "skipped" for outcome in outcomes.values())
    return (
        Counter(dict.fromkeys(heard, times)),
        Counter(dict.fromkeys(refused, times)),
        skipped * times,
    )


CASES = load()
IDS = [case.name for case in CASES]


@pytest.mark.scenario(37)
@pytest.mark.parametrize(
    "case",
    CASES,
    ids=IDS,
)
async def test_payload(url: str, case: Case) -> None:
    """Each recorded payload, alone and followed by a good event, is delivered, skipped, or one
    InvalidEvent per frame with its reasons; the good event arrives, on the same connection."""
    namespace = secrets.token_hex(6)
    ears = Ears(url, namespace)
    mouth = EventBus(url, namespace=namespace, max_payload=8 * LARGE)

    async def say(*more: bytes) -> None:
        channels = [*(f"in:{kind}" for kind in KINDS), "in:all"]
        good = {"in:bare": BARE, "in:bare_dict": BARE}
        async with asyncio.TaskGroup() as group:  # as one stream: no answer is awaited in between
            for channel in channels:
                group.create_task(mouth.publish_raw(channel, case.payload))
                for payload in more:
                    group.create_task(mouth.publish_raw(channel, good.get(channel, payload)))

    def settled(times: int) -> bool:
        heard, refused, skipped = expected(case, times)
        stats = ears.bus.stats()
        return (ears.heard, len(ears.refused), stats.skipped) == (heard, refused.total(), skipped)

    async with ears.bus, mouth:
        await say()
        await until(lambda: settled(1) or len(ears.heard) > 10)
        await say(GOOD)
        await until(lambda: len(ears.good) == len(KINDS) + 3 and settled(2))
        stats = ears.bus.stats()
    heard, refused, _ = expected(case, 2)
    assert ears.heard == heard
    assert Counter(channel for channel, _, _ in ears.refused) == refused
    assert ears.good == Counter(dict.fromkeys(ears.good, 1))
    assert stats.invalid == refused.total()
    assert (stats.received, stats.failed, stats.reconnects) == (3 * (len(KINDS) + 1), 0, 0)
    for channel, reasons, payload in ears.refused:
        reason = case.outcomes.get(KINDS.get(channel[3:], "event"), "payload: too large")
        assert channel == "in:all" or reasons[0].startswith(reason), (channel, reasons)
        assert payload == (b"" if len(case.payload) > LARGE else case.payload)


@pytest.mark.scenario(37)
@pytest.mark.parametrize("case", CASES, ids=IDS)
async def test_payload_on_a_bare_bus(case: Case) -> None:
    """On a bus that knows no envelope a payload has the outcome of a bare handler."""
    url = f"memory://{secrets.token_hex(6)}"
    bus, mouth = EventBus(url, wire="bare"), EventBus(url, max_payload=8 * LARGE)
    seen: Seen[Note] = Seen()
    refused: Seen[InvalidEvent] = Seen()

    @bus.on("in")
    async def see(event: Note) -> None:
        seen.append(event)

    @bus.exception_handler(InvalidEvent)
    async def refuse(error: InvalidEvent, message: Message[Any]) -> None:
        refused.append(error)

    outcome = case.outcomes["bare"]
    good = outcome == "delivered"
    async with bus, mouth:
        await mouth.publish_raw("in", case.payload)
        await mouth.publish_raw("in", BARE)
        await seen.reach(2 if good else 1)
        await refused.reach(0 if good else 1)
    assert seen[-1] == Note(x=424242)
    assert [error.reasons[0][: len(outcome)] for error in refused] == ([] if good else [outcome])
    assert bus.stats().invalid == len(refused)


@pytest.mark.scenario(37)
async def test_a_large_payload_is_never_parsed(url: str) -> None:
    """Over `max_payload` no validator runs and no handler is called, however good the payload is;
    up to it the event is delivered, and a publisher refuses it before it is sent."""
    calls: Seen[int] = Seen()

    class Counted(Event):
        text: str

        def model_post_init(self, context: object) -> None:
            calls.append(len(self.text))

    namespace = secrets.token_hex(6)
    bus = EventBus(url, namespace=namespace, max_payload=4096)
    mouth = EventBus(url, namespace=namespace)
    refused: Seen[tuple[str, ...]] = Seen()
    seen: Seen[int] = Seen()

    @bus.on("in")
    async def see(event: Counted) -> None:
        seen.append(len(event.text))

    @bus.on("in")
    async def raw(payload: bytes) -> None:
        assert len(payload) <= 4096

    @bus.exception_handler(InvalidEvent)
    async def refuse(error: InvalidEvent, message: Message[Any]) -> None:
        refused.append(error.reasons)

    def payload(size: int) -> bytes:
        start = HEAD.replace("Note", "Counted").encode() + b'1,"data":{"text":"'
        return start + b"a" * (size - len(start) - 3) + b'"}}'

    async with bus, mouth:
        await mouth.publish_raw("in", payload(4097))
        await mouth.publish_raw("in", payload(4096))
        await seen.reach(1)
        await refused.reach(1)
        with pytest.raises(PayloadTooLarge):
            await bus.publish_raw("in", payload(4097))
    assert len(calls) == len(seen) == 1
    assert refused == [("payload: too large",)]
    assert (bus.stats().invalid, bus.stats().failed) == (1, 0)


def peak_of(payload: bytes) -> int:
    """The most bytes that were held at once while a bus of memory received this payload."""

    async def receive() -> None:
        url = f"memory://{secrets.token_hex(6)}"
        bus, mouth = EventBus(url), EventBus(url, max_payload=8 * LARGE)

        @bus.on("in")
        async def see(event: Note) -> None: ...

        @bus.exception_handler(InvalidEvent)
        async def refuse(error: InvalidEvent, message: Message[Any]) -> None: ...

        async with bus, mouth:
            tracemalloc.start()
            await mouth.publish_raw("in", payload)
            await until(lambda: bus.stats().delivered + bus.stats().invalid == 1)

    try:
        asyncio.run(receive())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.scenario(37)
@pytest.mark.parametrize("size", [LARGE // 2, 2 * LARGE], ids=["within the cap", "over the cap"])
def test_a_long_header_costs_no_multiple_of_itself(size: int) -> None:
    """A header of any length is read in memory of a few times its own length."""
    payload = HEAD.encode() + b'1,"h":"' + b"a" * size + b'","data":{"x":1}}'
    assert peak_of(payload) < 16 * size


@pytest.mark.scenario(37)
@pytest.mark.parametrize("place", ["source", "type"])
async def test_long_names_in_envelopes_are_not_kept(place: str) -> None:
    """A publisher that invents long names leaves nothing behind in a receiver's memory."""
    url = f"memory://{secrets.token_hex(6)}"
    bus, mouth = EventBus(url), EventBus(url)

    @bus.on("in")
    async def see(payload: bytes) -> None: ...

    def payload(number: int) -> bytes:
        old = {"source": '"source":"s"', "type": '"type":"Note"'}[place]
        long = f'"{place}":"{number}{"x" * 200_000}"'
        return HEAD.replace(old, long).encode() + b'1,"data":{"x":1}}'

    async with bus, mouth:
        await mouth.publish_raw("in", GOOD)
        tracemalloc.start()
        try:
            for number in range(50):
                await mouth.publish_raw("in", payload(number))
            await until(lambda: bus.stats().delivered == 51)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 2_000_000


@pytest.mark.scenario(39)
async def test_long_channels_are_not_kept(valkey: Server) -> None:
    """A foreign publisher that takes channels of any length leaves nothing behind in a receiver's
    memory."""
    prefix = secrets.token_hex(6)
    bus = EventBus(valkey.url)
    seen: Seen[int] = Seen()

    @bus.on(f"{prefix}:*")
    async def see(payload: bytes, message: Message) -> None:  # type: ignore[type-arg]
        seen.append(len(message.channel))

    async with bus:
        client = bus.redis()
        await client.publish(f"{prefix}:a", GOOD)
        tracemalloc.start()
        try:
            for number in range(50):
                await client.publish(f"{prefix}:{number}{'x' * 200_000}", GOOD)
            await seen.reach(51)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held < 2_000_000


@pytest.mark.scenario(37)
async def test_a_number_of_astronomic_size() -> None:
    """A `busseq` that no publisher can have reached leaves counters that can be counted with."""
    url = f"memory://{secrets.token_hex(6)}"
    bus, mouth = EventBus(url), EventBus(url)

    @bus.on("in")
    async def see(event: Note) -> None: ...

    @bus.on_gap()
    async def miss(gap: Gap) -> None: ...

    async with bus, mouth:
        await mouth.publish_raw("in", GOOD)
        await mouth.publish_raw("in", HEAD.encode() + b"9" * 4000 + b',"data":{"x":1}}')
        await until(lambda: bus.stats().delivered == 2)
    assert bus.stats().missed < 1 << 63


# -- 38: what two codecs see -----------------------------------------------------------------------


class Anything(Event):
    value: Any = None


class Exact(Event):
    number: int = 0
    ratio: float = 0.0
    text: str = ""


def nested(depth: int) -> list[Any]:
    """A list in a list, so many times."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


REFUSED: dict[str, Callable[[], Event]] = {
    "NaN": lambda: Exact.model_construct(ratio=float("nan")),
    "Infinity": lambda: Exact.model_construct(ratio=float("inf")),
    "-Infinity": lambda: Exact.model_construct(ratio=float("-inf")),
    "NaN anywhere": lambda: Anything(value={"a": [float("nan")]}),
    "Infinity anywhere": lambda: Anything(value={"a": [float("inf")]}),
    "lone surrogate": lambda: Exact.model_construct(text="\ud800"),
    "lone surrogate anywhere": lambda: Anything(value=["\udfff"]),
    "lone surrogate as key": lambda: Anything(value={"\ud800": 1}),
    "5,000 digits": lambda: Exact.model_construct(number=10**4999),
    "5,000 digits anywhere": lambda: Anything(value=[10**4999]),
    "depth 250": lambda: Anything(value=nested(250)),
    "depth 1,100": lambda: Anything(value=nested(1100)),
    "bytes anywhere": lambda: Anything(value=b"\xff"),
    "text as number": lambda: Exact.model_construct(number="SECRET"),
}
ACCEPTED: dict[str, Callable[[], Event]] = {
    "2**64": lambda: Exact(number=2**64),
    "-2**63-1": lambda: Exact(number=-(2**63) - 1),
    "4,000 digits": lambda: Exact(number=10**3999),
    "2**64 anywhere": lambda: Anything(value=[2**64]),
    "greatest float": lambda: Exact(ratio=1.7976931348623157e308),
    "least float": lambda: Exact(ratio=5e-324),
    "minus zero": lambda: Exact(ratio=-0.0),
    "depth 150": lambda: Anything(value=nested(150)),
    "NUL": lambda: Exact(text="\x00"),
    "U+202E": lambda: Exact(text="\u202e"),
    "U+2028": lambda: Exact(text="\u2028"),
    "beyond the BMP": lambda: Exact(text="\U0001f600"),
}


@pytest.mark.scenario(38)
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
async def test_publish_refuses_what_receive_would_refuse(
    url: str, make: Callable[[], Event]
) -> None:
    """What no receiver could read is an InvalidEvent at its publisher, and nothing is sent."""
    bus = EventBus(url, namespace=secrets.token_hex(6))
    seen: Seen[bytes] = Seen()

    @bus.on("in")
    async def see(payload: bytes) -> None:
        seen.append(payload)

    event = make()
    async with bus:
        for publish in (bus.publish, bus.publish_nowait):
            with pytest.raises(InvalidEvent) as caught:
                await publish("in", event)  # type: ignore[misc]
            assert caught.value.reasons
            assert "SECRET" not in f"{caught.value} {vars(caught.value)}"
        await bus.publish_raw("in", b"the end")
        await seen.reach(1)
    assert seen == [b"the end"]


@pytest.mark.scenario(38)
@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
async def test_what_is_published_comes_back(url: str, make: Callable[[], Event]) -> None:
    """What is published arrives equal, at a typed handler; nothing is refused on the way in."""
    bus = EventBus(url, namespace=secrets.token_hex(6))
    event = make()
    seen: Seen[Event] = Seen()

    @bus.on("in")
    async def see(event: Exact | Anything) -> None:
        seen.append(event)

    async with bus:
        await bus.publish("in", event)
        await seen.reach(1)
    assert repr(seen[0]) == repr(event)
    assert bus.stats().invalid == 0


# What stands in JSON, what `Any` in a model makes of it, and what a dict does. None: refused.
DIFFER: list[tuple[str, object, object]] = [
    ("18446744073709551616", 2**64, float(2**64)),
    ("-9223372036854775809", -(2**63) - 1, float(-(2**63) - 1)),
    ("18446744073709551615", 2**64 - 1, 2**64 - 1),
    ("[" * 150 + "]" * 150, nested(150), nested(150)),
    ("[" * 500 + "]" * 500, None, nested(500)),
    ("1e999", math.inf, None),
    ("NaN", math.nan, None),
    ("Infinity", math.inf, None),
    ('"\\ud800"', None, None),
    ('{"a":1,"a":2}', {"a": 2}, {"a": 2}),
    ("9" * 5000, None, None),
    ("1.0", 1.0, 1.0),
    ("-0", 0, 0),
]


@pytest.mark.scenario(38)
@pytest.mark.parametrize(
    "text, model, table", DIFFER, ids=[f"{text[:20]} {len(text)}" for text, _, _ in DIFFER]
)
async def test_where_the_codecs_differ(text: str, model: object, table: object) -> None:
    """A dict and an `Any` of a model read one JSON text alike, but for numbers beyond 64 bits, for
    depth, and for what is no JSON: what a model takes there, no publisher of ours can send."""
    bus = EventBus(f"memory://{secrets.token_hex(6)}")
    seen: list[tuple[str, object]] = []

    @bus.on("in:1")
    async def typed(event: Anything) -> None:
        seen.append(("model", event.value))

    @bus.on("in:2")
    async def untyped(data: dict[str, Any]) -> None:
        seen.append(("dict", data["value"]))

    @bus.exception_handler(InvalidEvent)
    async def refuse(error: InvalidEvent, message: Message[Any]) -> None:
        seen.append(("model" if message.channel == "in:1" else "dict", None))

    payload = HEAD.replace("Note", "Anything") + f'1,"data":{{"value":{text}}}}}'
    async with bus:
        for channel in ("in:1", "in:2"):
            await bus.publish_raw(channel, payload.encode())
    assert sorted(map(repr, seen)) == sorted(map(repr, [("model", model), ("dict", table)]))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**4400), 10**4400)
    | st.floats()
    | st.text(st.characters() | st.sampled_from("\ud800\udfff\x00\u202e"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.scenario(38)
@settings(max_examples=60)
@given(value=json_values)
async def test_refused_or_equal(value: Any) -> None:
    """Whatever is put into an event, it is refused at once or it arrives as it was."""
    bus = EventBus(f"memory://{secrets.token_hex(6)}")
    seen: Seen[Any] = Seen()

    @bus.on("in")
    async def see(event: Anything) -> None:
        seen.append(event.value)

    async with bus:
        try:
            await bus.publish("in", Anything(value=value))
        except InvalidEvent:
            return
        await seen.reach(1)
    assert seen == [value]
    assert bus.stats().invalid == 0


# -- 39: names -------------------------------------------------------------------------------------

NO_NAMES = {
    "empty": ("", "is empty"),
    "NUL": ("a\x00b", "has a control character"),
    "newline": ("a\nb", "has a control character"),
    "ESC": ("\x1b[31mred", "has a control character"),
    "DEL": ("a\x7f", "has a control character"),
    "C1": ("a\x9b31m", "has a control character"),
    "lone surrogate": ("a\ud800", "has a lone surrogate"),
    "513 bytes": ("x" * 513, "is 513 bytes long"),
    "514 bytes in two-byte characters": ("é" * 257, "is 514 bytes long"),
    "UTF-8 in escapes": ("\udcc3\udca9", "spells UTF-8 in surrogate escapes"),
}
NAMES = {
    "U+202E": "a\u202eb",
    "no UTF-8": "a\udcff\udc80",
    "512 bytes": "x" * 512,
    "all of the glob": "a*b?c[d]e\\f^g-h{i}j",
    "star": "*",
    "open bracket": "[",
    "backslash": "\\",
    "braces": "{x}",
    "blanks": " ",
    "colons": "::",
    "no-break": "\xa0\u2028",
}
OTHERS = {
    "Sentinel's": "__sentinel__:hello",
    "keyspace": "__keyevent@0__:expired",
    "ours": "__eventbus__:0123456789abcdef",
}
ODD_PATTERNS = [
    *("[", "[^", "[a", "[a-", "[a-]", "[z-a]", "[]", "[^]", "]", "a\\", "[\\", "**", "?" * 100),
    *("*" * 400, "*a" * 200 + "b", "[ab]*" * 80, "{x}{y}*{z}*{p:path}"),
]


def printable(text: str) -> bool:
    """Whether a line shows what it is, on any terminal."""
    return text.isascii() and text.isprintable()


@pytest.mark.scenario(39)
@pytest.mark.parametrize("name, problem", NO_NAMES.values(), ids=NO_NAMES)
async def test_what_is_no_name(name: str, problem: str) -> None:
    """A name that could not be told from another, or would garble a log, is refused by everything
    that takes a name, with the reason, and escaped."""
    bus = EventBus(f"memory://{secrets.token_hex(6)}")
    async with bus:
        for send in (
            lambda: bus.publish(name, Exact()),
            lambda: bus.publish_raw(name, b""),
        ):
            with pytest.raises(InvalidChannel) as refused:
                await send()
            assert problem in str(refused.value)
            assert printable(str(refused.value))
        with pytest.raises(InvalidChannel):
            bus.publish_nowait(name, Exact())
        with pytest.raises(InvalidPattern):
            async with bus.subscribe(name):
                pass
        with pytest.raises(InvalidPattern):
            await soon(bus.expect(name, timeout=1))
    assert bus.stats().published == 0

    async def handler(payload: bytes) -> None: ...

    async def gap_handler(gap: Gap) -> None: ...

    declare: list[Callable[[], object]] = [
        lambda: bus.on(name)(handler),
        lambda: bus.on_gap(name)(gap_handler),
        lambda: Router().on(name)(handler),
    ]
    for register in declare:
        with pytest.raises(InvalidPattern) as unfit:
            register()
        assert problem in str(unfit.value)
        assert printable(str(unfit.value))


@pytest.mark.scenario(39)
@pytest.mark.parametrize("name", [*NAMES.values(), *OTHERS.values()], ids=[*NAMES, *OTHERS])
async def test_odd_names_are_literal(url: str, name: str) -> None:
    """An odd name that is allowed is delivered to the handler of its escaped text, under that very
    name, and to no neighbour; what begins with two underscores never comes to `*`."""
    bus = EventBus(url)
    seen: Seen[tuple[str, str]] = Seen()

    @bus.on(escape(name))
    async def exact(message: Message[Exact]) -> None:
        seen.append(("exact", message.channel))

    @bus.on("*")
    async def all_of_them(message: Message[Exact]) -> None:
        seen.append(("*", message.channel))

    @bus.on("__*")
    async def hidden(message: Message[Exact]) -> None:
        seen.append(("__*", message.channel))

    other = name[:-1] + "y"
    async with bus:
        for channel in (other, name):
            await bus.publish(channel, Exact())
        await seen.reach(3)
    wide = "__*" if name.startswith("__") else "*"
    expect = [(wide, other), (wide, name), ("exact", name)]
    assert sorted(seen) == sorted(expect)


@pytest.mark.scenario(39)
async def test_odd_patterns_are_harmless(url: str) -> None:
    """Globs that look broken or slow are taken as Redis takes them, and hold nobody up; 900 times
    `a*` and 1,001 stars are refused for their length."""
    bus = EventBus(url, namespace=secrets.token_hex(6))
    seen: Seen[str] = Seen()

    async def ignore(payload: bytes) -> None: ...

    for text in ("a*" * 900, "*" * 1001, "[ab]" * 200):
        with pytest.raises(InvalidPattern, match="over the 512"):
            bus.on(text)(ignore)

    for text in ODD_PATTERNS:
        bus.on(text)(ignore)

    @bus.on("a*")
    async def see(payload: bytes) -> None:
        seen.append("a")

    async with bus:
        for _ in range(20):
            await bus.publish_raw("a" * 400, b"")
        await seen.reach(20)
        assert bus.health()
    assert bus.stats().failed == 0


@pytest.mark.scenario(39)
async def test_the_log_is_escaped(server_url: str, log: Lines) -> None:
    """Whatever name a foreign publisher takes, the log has one printable line for each message."""
    prefix = secrets.token_hex(6)
    wires = [b"\x1b[31m", b"a\nERROR all is well", b"\x00", b"\xff\xfe", "\u202e".encode()]
    wires += [b"y" * 5000, b"%s%n"]
    bus = EventBus(server_url)
    seen: Seen[str] = Seen()

    @bus.on(f"{prefix}:*")
    async def fail(event: Note, message: Message[Note]) -> None:
        seen.append(message.channel)
        raise LookupError

    async with bus:
        client = bus.redis()
        for wire in wires:
            for payload in (GOOD, b"\x1b[2J garbage"):
                await client.publish(prefix.encode() + b":" + wire, payload)
        await seen.reach(len(wires))
        await until(lambda: len(log.lines) >= 2 * len(wires))
    assert len(log.lines) == 2 * len(wires)
    assert [line for line in log.lines if not printable(line.replace("…", ""))] == []
    assert max(map(len, log.lines)) < 1000
    assert [name.encode("utf-8", "surrogateescape")[13:] for name in seen] == wires


@pytest.mark.scenario(39)
def test_a_capture_of_no_kind() -> None:
    """A colon in a capture is followed by the kind that it announces."""
    with pytest.raises(InvalidPattern):
        EventBus().on("a:{x:}")


def test_the_table_is_whole() -> None:
    """Each case has a file or parts of its own, and every file is a case."""
    from tests.faults.corpus.cases import HERE

    small = {case.name for case in CASES if (HERE / f"{case.name}.bin").exists()}
    assert {file.stem for file in HERE.glob("*.bin")} == small
    assert len({case.payload for case in CASES}) == len(CASES)
    assert all(json.dumps(case.outcomes) for case in CASES)
