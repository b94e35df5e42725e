"""The wire: what is written is read back, and bad input is an InvalidEvent and nothing else."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field

from eventbus import Event, EventBus, EventBusError, InvalidEvent, Message
from eventbus._envelope import peek
from tests.helpers import TIME, Seen, foreign, read, write


class Colour(Enum):
    RED = "red"
    GREEN = "grün"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Point(BaseModel):
    x: int
    label: str | None = None


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    names: list[str]


class Everything(Event):
    text: str
    number: int
    ratio: float
    flag: bool
    price: Decimal
    blob: bytes
    when: datetime
    day: date
    span: timedelta
    key: UUID
    colour: Colour
    level: Level
    maybe: Decimal | None
    either: int | str | None
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    points: list[Point]
    pair: tuple[int, str]
    table: dict[str, list[int]]
    by_number: dict[int, Decimal]
    tags: frozenset[str]


class Plain(Event):
    """Its types alone prove that it can be read back."""

    text: str
    number: int
    flag: bool
    key: UUID
    when: datetime
    day: date
    colour: Colour
    maybe: int | None
    points: list[Point]
    table: dict[str, list[int]]


class Note(Event):
    x: int = 0


class Other(Event):
    x: int = 0


ints = st.integers(-(10**80), 10**80)
offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(timezones=st.none() | offsets)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
points = st.builds(Point, x=ints, label=st.none() | st.text())
pets = st.builds(Cat, lives=ints) | st.builds(Dog, names=st.lists(st.text()))
everything = st.builds(
    Everything,
    text=st.text(),
    number=ints,
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    price=decimals,
    blob=st.binary(),
    when=moments,
    day=st.dates(),
    span=st.timedeltas(),
    key=st.uuids(),
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    maybe=st.none() | decimals,
    either=st.none() | ints | st.text(),
    pet=pets,
    points=st.lists(points, max_size=3),
    pair=st.tuples(ints, st.text()),
    table=st.dictionaries(st.text(), st.lists(ints, max_size=3), max_size=3),
    by_number=st.dictionaries(ints, decimals, max_size=3),
    tags=st.frozensets(st.text(), max_size=3),
)
plain = st.builds(
    Plain,
    text=st.text(),
    number=ints,
    flag=st.booleans(),
    key=st.uuids(),
    when=moments,
    day=st.dates(),
    colour=st.sampled_from(Colour),
    maybe=st.none() | ints,
    points=st.lists(points, max_size=3),
    table=st.dictionaries(st.text(), st.lists(ints, max_size=3), max_size=3),
)
headers = st.dictionaries(
    st.from_regex(r"\A[a-z0-9]{1,8}\Z").map(lambda name: "x" + name),
    st.text() | st.booleans() | st.integers(-(2**63), 2**64 - 1),
    max_size=4,
)


# Round trips


@given(event=everything | plain)
def test_round_trip(event: Everything | Plain) -> None:
    """Every kind of field comes back equal, and of the same type."""
    message = read(write(event), Everything, Plain)
    assert message is not None
    assert message.event == event
    assert type(message.event) is type(event)


@given(event=everything | plain, headers=headers)
def test_round_trip_in_another_layout(event: Everything | Plain, headers: dict[str, Any]) -> None:
    """The same envelope, written by another JSON library in another order, is the same message."""
    payload = write(event, number=7, **headers)
    shuffled = json.dumps(dict(reversed(json.loads(payload).items()))).encode()
    assert read(shuffled, Everything, Plain) == read(payload, Everything, Plain)


@given(headers=headers, number=st.integers(1, 10**18))
def test_metadata_round_trip(headers: dict[str, Any], number: int) -> None:
    """Number, time and headers come back as they were given, with their types."""
    message = read(write(Note(x=1), number=number, **headers), Note)
    assert message is not None
    assert (message.sequence, message.id, message.source) == (number, "id-1", "test/1")
    assert message.time == datetime.fromisoformat(TIME)
    assert dict(message.headers) == headers
    assert [type(v) for v in message.headers.values()] == [type(v) for v in headers.values()]


class Renamed(Event):
    """Read and written under one other name."""

    value: int = Field(alias="the-value")


class Computed(Event):
    x: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        """Written, and ignored by the reader."""
        return 2 * self.x


class Holder(Event):
    held: Note
    many: list[Note]


def test_alias_and_computed_round_trip() -> None:
    """A field with an alias, a computed field and a nested event come back equal."""
    for event in (
        Renamed.model_validate({"the-value": 3}),
        Computed(x=2),
        Holder(held=Note(x=1), many=[Note(x=2)]),
    ):
        message = read(write(event), type(event))
        assert message is not None
        assert message.event == event


class Later(Event):
    then: list[After]


class After(BaseModel):
    x: int


def test_forward_reference() -> None:
    """An event class whose fields name a class that was defined later works."""
    message = read(write(Later(then=[After(x=1)])), Later)
    assert message is not None
    assert message.event == Later(then=[After(x=1)])


# Our layout, on the wire


async def payload_of(event: Event, **headers: Any) -> bytes:
    """What a handler of bytes gets when this event is published on a bus."""
    bus = EventBus(f"memory://{secrets.token_hex(6)}", name="shop")
    seen: Seen[bytes] = Seen()

    @bus.on("here")
    async def raw(payload: bytes) -> None:
        seen.append(payload)

    if headers:

        @bus.middleware("publish")
        async def add(message: Message[Any], call_next: Callable[[Message[Any]], Any]) -> Any:
            return await call_next(message.with_headers(headers))

    async with bus:
        await bus.publish("here", event)
    assert len(seen) == 1
    return seen[0]


async def test_attribute_order() -> None:
    """The attributes are written in the order that the fast reader expects, headers before data."""
    payload = await payload_of(Note(x=5), tenant="a", retry=2, urgent=True)
    pairs: list[tuple[str, Any]] = json.loads(payload, object_pairs_hook=list)
    names = [name for name, _ in pairs]
    core = ["specversion", "id", "source", "type", "time", "busseq"]
    assert names == [*core, "tenant", "retry", "urgent", "data"]
    found = dict(pairs)
    assert (found["specversion"], found["type"], found["busseq"]) == ("1.0", "Note", 1)
    assert found["source"].startswith("shop/")
    assert len(found["source"]) > len("shop/")
    assert datetime.fromisoformat(found["time"]).utcoffset() == timedelta(0)
    assert found["data"] == [("x", 5)]
    assert (found["tenant"], found["retry"], found["urgent"]) == ("a", 2, True)


async def test_cloudevents_package_reads_ours() -> None:
    """The `cloudevents` package reads what we write: attributes, extensions, time and data."""
    payload = await payload_of(Note(x=5), tenant="ümlaut")
    event = JSONFormat().read(CloudEvent, payload)
    assert event.get_specversion() == "1.0"
    assert event.get_type() == "Note"
    assert event.get_source().startswith("shop/")
    assert event.get_extension("busseq") == 1
    assert event.get_extension("tenant") == "ümlaut"
    assert event.get_data() == {"x": 5}
    assert event.get_time() is not None


@given(x=ints, tenant=st.text(), when=st.datetimes(timezones=offsets))
def test_we_read_the_cloudevents_package(x: int, tenant: str, when: datetime) -> None:
    """What the `cloudevents` package writes is read by us, its extensions as headers."""
    attributes = {"id": "1", "source": "/shop", "type": "Note", "time": when, "tenant": tenant}
    attributes["subject"] = "cart"
    message = read(JSONFormat().write(CloudEvent(attributes, {"x": x})), Note)
    assert message is not None
    assert message.event == Note(x=x)
    assert (message.id, message.source, message.type) == ("1", "/shop", "Note")
    assert (message.time, message.sequence) == (when, None)
    assert dict(message.headers) == {"tenant": tenant, "subject": "cart"}


def test_we_read_binary_data_of_the_cloudevents_package() -> None:
    """Bytes as data (`data_base64` on the wire) are the JSON of the event."""
    attributes = {"id": "1", "source": "/shop", "type": "Note"}
    message = read(JSONFormat().write(CloudEvent(attributes, b'{"x": 3}')), Note)
    assert message is not None
    assert message.event == Note(x=3)
    assert "data_base64" not in message.headers


# Foreign events


@given(
    order=st.permutations(["specversion", "id", "source", "type", "time", "busseq", "h", "data"]),
    indent=st.sampled_from([None, 1]),
)
def test_any_order(order: list[str], indent: int | None) -> None:
    """A CloudEvent is read whatever the order and the blanks."""
    event: dict[str, Any] = {"specversion": "1.0", "id": "i", "source": "s", "type": "Note"}
    event |= {"time": TIME, "busseq": 4, "h": "v", "data": {"x": 9}}
    payload = json.dumps({name: event[name] for name in order}, indent=indent).encode()
    message = read(payload, Note)
    assert message is not None
    assert message.event == Note(x=9)
    assert (message.id, message.source, message.sequence) == ("i", "s", 4)
    assert message.time == datetime.fromisoformat(TIME)
    assert dict(message.headers) == {"h": "v"}


def test_foreign_without_number_and_time() -> None:
    """A foreign event needs neither `busseq` nor `time`; both are None then."""
    message = read(foreign({"x": 1}), Note)
    assert message is not None
    assert (message.sequence, message.time, dict(message.headers)) == (None, None, {})


@pytest.mark.parametrize("number", [0, -3, True, "5", 1.5, [1], {}])
def test_number_of_another_kind(number: object) -> None:
    """A `busseq` that is no positive integer is no sequence, and no reason to refuse the event."""
    message = read(foreign({"x": 1}, busseq=number), Note)
    assert message is not None
    assert message.sequence is None
    assert message.event == Note(x=1)


def test_headers_of_every_type() -> None:
    """Unknown attributes of type str, int and bool are headers; others are left out."""
    payload = foreign(
        {"x": 1}, subject="s", retry=3, urgent=True, ratio=1.5, nested={"a": 1}, listed=[1]
    )
    message = read(payload, Note)
    assert message is not None
    assert dict(message.headers) == {"subject": "s", "retry": 3, "urgent": True}
    with pytest.raises(TypeError):
        message.headers["x"] = 1  # type: ignore[index]


def test_binary_data() -> None:
    """`data_base64` holds the JSON of the event, for a model and for a dict."""
    encoded = base64.b64encode(b'{"x": 4}').decode()
    for wanted, value in ((Note, Note(x=4)), (dict, {"x": 4})):
        message = read(foreign(data_base64=encoded), wanted)
        assert message is not None
        assert message.event == value


@pytest.mark.parametrize("binary", ["***", "eA", "é", "eA==", "", 5, {"x": 1}])
@pytest.mark.parametrize("wanted", [Note, dict])
def test_bad_binary_data(binary: object, wanted: type) -> None:
    """`data_base64` that is not base64, or not the base64 of such JSON, is an InvalidEvent."""
    with pytest.raises(InvalidEvent):
        read(foreign(data_base64=binary), wanted)


def test_dict_and_model_take_every_type() -> None:
    """A dict or a model that is no event reads the data of every type, in every layout."""
    for payload in (write(Note(x=3)), foreign({"x": 3}), foreign({"x": 3}, type="Unheard")):
        for wanted, value in ((dict, {"x": 3}), (Point, Point(x=3)), (None, {"x": 3})):
            message = read(payload, *([] if wanted is None else [wanted]))
            assert message is not None
            assert message.event == value


@pytest.mark.parametrize("data", [[1], "text", 5, None, True])
@pytest.mark.parametrize("wanted", [Note, dict, Point])
def test_data_that_is_no_object(data: object, wanted: type) -> None:
    """Data that is no object, or is missing, is an InvalidEvent in our layout and in others."""
    ours = write(Note(x=1)).replace(b'{"x":1}', json.dumps(data).encode())
    for payload in (ours, foreign(data)):
        with pytest.raises(InvalidEvent) as caught:
            read(payload, wanted)
        assert caught.value.reasons


def test_missing_field() -> None:
    """The error of data that does not fit names the type, and the fields in its reasons."""
    for payload in (write(Note()), foreign({})):
        with pytest.raises(InvalidEvent, match=r"does not fit Computed.*Field required") as caught:
            read(payload.replace(b"Note", b"Computed").replace(b'"x":0', b""), Computed)
        assert caught.value.type == "Computed"
        assert any("x: Field required" in reason for reason in caught.value.reasons)


def test_newer_publisher() -> None:
    """Fields that this reader does not know are ignored."""
    message = read(foreign({"x": 1, "added": {"later": True}}), Note)
    assert message is not None
    assert message.event == Note(x=1)


def test_type_decides() -> None:
    """Another wire type is skipped without a look at its data; a subclass is another type."""

    class More(Note):
        y: int = 0

    assert read(foreign({"y": "bad"}, type="More"), Note) is None
    assert read(write(More(x=1)), Note) is None
    assert read(write(Note(x=1)), Other, More) is None


# Bad input. Every case is read alone, and a good one after it.

HEAD = b'{"specversion":"1.0","id":"1","source":"s","type":"Note","time":"' + TIME.encode() + b'"'


def ours(data: bytes = b'{"x":1}', head: bytes = b',"busseq":1') -> bytes:
    """A payload in our own layout, with these bytes as data and before it."""
    return HEAD + head + b',"data":' + data + b"}"


REFUSED = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "number": b"1",
    "array": b"[]",
    "string": b'"text"',
    "empty object": b"{}",
    "not JSON": b"SECRET",
    "cut": ours()[:-1],
    "cut in the head": ours()[:40],
    "trailing bytes": ours() + b"x",
    "two values": ours() + ours(),
    "one brace too many": ours() + b"}",
    "BOM": b"\xef\xbb\xbf" + ours(),
    "UTF-16": ours().decode().encode("utf-16"),
    "NUL after": ours() + b"\x00",
    "control character": ours(b'{"x":1,"y":"\x01"}'),
    "raw newline": ours(b'{"x":1,"y":"\n"}'),
    "invalid UTF-8 in data": ours(b'{"x":1,"y":"\xff"}'),
    "invalid UTF-8 in a key": ours(b'{"x":1,"\xc3\x28":2}'),
    "invalid UTF-8 in a header": ours(head=b',"busseq":1,"h":"\xff"'),
    "invalid UTF-8 in the id": ours().replace(b'"id":"1"', b'"id":"\xff"'),
    "invalid UTF-8 in the source": ours().replace(b'"source":"s"', b'"source":"\xff"'),
    "lone surrogate": ours(b'{"x":1,"y":"\\ud800"}'),
    "lone surrogate in a header": ours(head=b',"busseq":1,"h":"\\ud800"'),
    "bad escape": ours(b'{"x":1,"y":"\\q"}'),
    "bad escape in a header": ours(head=b',"busseq":1,"h":"\\q"'),
    "leading zero": ours(b'{"x":01}'),
    "leading zero in a header": ours(head=b',"busseq":1,"h":01'),
    "no data": HEAD + b"}",
    "nothing as data": ours(b""),
    "wrong specversion": ours().replace(b'"1.0"', b'"0.3"'),
    "newer specversion": ours().replace(b'"1.0"', b'"2.0"'),
    "numeric specversion": ours().replace(b'"1.0"', b"1.0"),
    "no id": ours().replace(b'"id":"1",', b""),
    "empty id": ours().replace(b'"id":"1"', b'"id":""'),
    "null id": ours().replace(b'"id":"1"', b'"id":null'),
    "numeric id": ours().replace(b'"id":"1"', b'"id":1'),
    "empty source": ours().replace(b'"source":"s"', b'"source":""'),
    "no source": ours().replace(b'"source":"s",', b""),
    "no type": ours().replace(b'"type":"Note",', b""),
    "empty type": ours().replace(b'"type":"Note"', b'"type":""'),
    "time that is none": ours().replace(TIME.encode(), b"tomorrow"),
    "time of no calendar": ours().replace(TIME.encode(), b"2024-13-01T00:00:00Z"),
    "digits as time": ours().replace(TIME.encode(), b"9" * 20),
    "dashes as time": ours().replace(TIME.encode(), b"-" * 20),
    "second specversion after the data": ours(b'{"x":1},"specversion":"0.3"'),
    "second time after the data": ours(b'{"x":1},"time":"SECRET"'),
    "NaN": ours(b'{"x":NaN}'),
    "Infinity": ours(b'{"x":Infinity}'),
    "1e999": ours(b'{"x":1e999}'),
    "5000 digits": ours(b'{"x":1' + b"0" * 5000 + b"}"),
    "deep": ours(b'{"x":1,"y":' + b"[" * 1100 + b"]" * 1100 + b"}"),
    "very deep": b"[" * 100_000,
    "very deep data": ours(b'{"x":' + b"[" * 100_000 + b"}"),
    "very deep header": foreign({"x": 1})[:-1] + b',"h":' + b"[" * 5000 + b"]" * 5000 + b"}",
}


@pytest.mark.parametrize("wanted", [Note, dict, Point])
@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED)
def test_refused(payload: bytes, wanted: type) -> None:
    """It is an InvalidEvent with reasons and without the data; and the next event is read."""
    with pytest.raises(InvalidEvent) as caught:
        read(payload, wanted)
    assert caught.value.reasons
    assert all(isinstance(reason, str) for reason in caught.value.reasons)
    assert "SECRET" not in f"{caught.value} {vars(caught.value)}"
    assert read(ours(), wanted) is not None


@pytest.mark.parametrize("name", ["id", "source", "type", "specversion"])
def test_required_attributes(name: str) -> None:
    """Each attribute that CloudEvents requires is required, and the reasons name it."""
    with pytest.raises(InvalidEvent) as caught:
        read(foreign({"x": 1}, **{name: None}), Note)
    assert any(reason.startswith(name) for reason in caught.value.reasons)


def test_duplicate_keys() -> None:
    """The last of two equal keys wins, in the data and in the envelope."""
    message = read(ours(b'{"x":1,"x":2}'), Note)
    assert message is not None
    assert message.event == Note(x=2)
    message = read(b'{"id":"first",' + foreign({"x": 3})[1:], Note)
    assert message is not None
    assert (message.id, message.event) == ("7", Note(x=3))


def test_large_numbers() -> None:
    """Integers beyond 64 bits arrive exactly."""
    message = read(ours(b'{"x":123456789012345678901234567890}'), Note)
    assert message is not None
    assert message.event == Note(x=123456789012345678901234567890)


def test_wide_data() -> None:
    """A list of a hundred thousand elements is no trouble."""
    payload = ours(b'{"x":1,"y":[' + b"0," * 100_000 + b"0]}")
    message = read(payload, Note)
    assert message is not None
    assert message.event == Note(x=1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
attributes = st.sampled_from(
    ["specversion", "id", "source", "type", "time", "busseq", "data", "data_base64", "h", "x", ""]
)


def read_or_refuse(payload: bytes, wanted: type) -> None:
    """Either there is a message, or an InvalidEvent with reasons."""
    with contextlib.suppress(InvalidEvent):
        try:
            assert read(payload, wanted) is not None or wanted in (Note, Everything)
        except InvalidEvent as error:
            if not error.reasons:
                raise AssertionError from error
            raise


@given(payload=st.binary(max_size=300))
def test_any_bytes(payload: bytes) -> None:
    """Nothing but InvalidEvent comes out of arbitrary bytes."""
    for wanted in (Note, dict, Point):
        with pytest.raises(InvalidEvent):
            read(payload, wanted)


@given(data=st.binary(max_size=60), head=st.binary(max_size=30))
def test_any_bytes_in_our_layout(data: bytes, head: bytes) -> None:
    """Nothing but InvalidEvent comes out of our own head with arbitrary bytes in it or after it."""
    for payload in (ours(data), ours(head=head), ours() + data, ours(b'{"x":' + data + b"}")):
        for wanted in (Note, dict):
            read_or_refuse(payload, wanted)


@given(
    event=st.dictionaries(attributes, json_values)
    | st.dictionaries(attributes, json_values).map(
        lambda found: {"specversion": "1.0", "id": "1", "source": "s", "type": "Note"} | found
    )
)
def test_any_object(event: dict[str, Any]) -> None:
    """Nothing but InvalidEvent comes out of arbitrary JSON objects with our attributes."""
    payload = json.dumps(event).encode()
    for wanted in (Note, dict, Point, Everything):
        read_or_refuse(payload, wanted)


# The data stays out of the errors


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    x: int = 0


def quoting(value: str) -> str:
    """A validator of a user, whose error quotes the value."""
    raise ValueError(f"{value} is bad")


class Sensitive(Event):
    table: dict[str, int] = Field(default_factory=dict)
    strict: Strict = Strict()
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] = Cat(lives=9)
    colour: Colour = Colour.RED
    when: datetime | None = None
    name: Annotated[str, Field(pattern="^[a-z]*$", max_length=3)] = ""
    either: int | bool = 0
    listed: list[int] = Field(default_factory=list)
    key: UUID | None = None
    checked: Annotated[str, AfterValidator(quoting)] = ""


@pytest.mark.parametrize(
    "data",
    [
        {"table": {"SECRET": "x"}},
        {"table": {"a": "SECRET"}},
        {"table": "SECRET"},
        {"strict": {"SECRET": 1}},
        {"pet": {"kind": "SECRET"}},
        {"pet": {"kind": "dog", "names": ["SECRET", 1]}},
        {"colour": "SECRET"},
        {"when": "SECRET"},
        {"name": "SECRET"},
        {"either": "SECRET"},
        {"listed": ["SECRET"]},
        {"key": "SECRET"},
        {"checked": "SECRET"},
        ["SECRET"],
        "SECRET",
    ],
    ids=json.dumps,
)
def test_error_without_data(data: object) -> None:
    """The text and the fields of an InvalidEvent hold nothing of the payload, keys included."""
    in_ours = ours(json.dumps(data).encode()).replace(b"Note", b"Sensitive")
    for payload in (in_ours, foreign(data, type="Sensitive")):
        with pytest.raises(InvalidEvent) as caught:
            read(payload, Sensitive)
        assert caught.value.reasons
        assert "SECRET" not in f"{caught.value!r} {vars(caught.value)}"


def test_reasons_are_few() -> None:
    """A payload with a thousand faults has an error of bounded size."""
    payload = foreign({"listed": ["x"] * 1000}, type="Sensitive")
    with pytest.raises(InvalidEvent) as caught:
        read(payload, Sensitive)
    assert len(caught.value.reasons) <= 20
    assert len(str(caught.value)) < 4000


# The fast path and the long way


class Readers:
    """Running buses that read in every way: one handler alone, several that share a frame, with and
    without the metadata, from a dict, and a stream."""

    def __init__(self) -> None:
        self.name = f"memory://{secrets.token_hex(6)}"
        self.publisher = EventBus(self.name)
        self.alone, self.whole, self.several = (EventBus(self.name) for _ in range(3))
        self.found: list[Any] = []

        @self.alone.on("in")
        async def alone(event: Note) -> None:
            self.found.append(("alone", event))

        @self.whole.on("in")
        async def whole(message: Message[Note]) -> None:
            self.found.append(("whole", message))

        @self.several.on("in")
        async def one(event: Note) -> None:
            self.found.append(("one", event))

        @self.several.on("i*")
        async def two(event: Other, message: Message[Other]) -> None:
            self.found.append(("two", event, message))

        @self.several.on("{x}")
        async def of_dict(message: Message[dict[str, Any]]) -> None:
            self.found.append(("dict", message))

        for bus in (self.alone, self.whole, self.several):
            self.report(bus)

    def report(self, bus: EventBus) -> None:
        @bus.exception_handler(Exception)
        async def keep(error: Exception, message: Message[Any]) -> None:
            self.found.append(error)

    async def verdict(self, payload: bytes) -> list[Any]:
        """What became of a payload, in an order that does not depend on the tasks."""
        self.found.clear()
        async with self.publisher, self.alone, self.whole, self.several:
            await self.publisher.publish_raw("in", payload)
        assert all(not isinstance(e, Exception) or type(e) is InvalidEvent for e in self.found)
        found = [("invalid",) if isinstance(item, Exception) else item for item in self.found]
        return sorted(found, key=lambda item: item[0])


async def agree(payload: bytes) -> None:
    """A blank before it takes the fast path away and changes nothing else. Only a type that nobody
    wants is skipped on the fast path before its JSON is looked at: there fewer say `invalid`."""
    readers = Readers()
    fast, long = await readers.verdict(payload), await readers.verdict(b" " + payload)
    head = peek(payload)
    if head is not None and head.type not in (b"Note", b"Other"):
        fast, long = ([v for i, v in enumerate(vs) if v not in vs[:i]] for vs in (fast, long))
    assert fast == long


LOOKALIKES = {
    "good": ours(),
    "no number": ours(head=b""),
    "headers": ours(head=b',"busseq":3,"h":"v","n":-5,"t":true'),
    "escapes in a header": ours(head=b',"busseq":3,"h":"\\u00e9\\n\\"\\\\"'),
    "surrogate pair in a header": ours(head=b',"busseq":3,"h":"\\ud83d\\ude00"'),
    "DEL in a header": ours(head=b',"busseq":3,"h":"\x7f"'),
    "minus zero": ours(head=b',"busseq":3,"h":-0'),
    "long number": ours(head=b',"busseq":3,"h":-9999999999999999999'),
    "longest number": ours(head=b',"busseq":3,"h":9999999999999999999'),
    "repeated header": ours(head=b',"busseq":3,"h":1,"h":2'),
    "type after a number": ours(b'1,"type":"Other"'),
    "type after null": ours(b'null,"type":"Other"'),
    "id after the data": ours(b'{"x":1},"id":"2"'),
    "source after the data": ours(b'{"x":1},"source":"t"'),
    "number after the data": ours(b'{"x":1},"busseq":9'),
    "data after the data": ours(b'{"x":1},"data":{"x":2}'),
    "binary after the data": ours(b'{"x":1},"data_base64":"eyJ4IjoyfQ=="'),
    "header after the data": ours(b'{"x":1},"h":"v"'),
    "blank after the data": ours(b'{"x":1} '),
    "blank before the data": ours(b' {"x":1}'),
    "blank after all": ours() + b"\n",
    "header named like an attribute": ours(head=b',"busseq":1,"type":"Other"'),
    "header named id": ours(head=b',"busseq":1,"id":"2"'),
    "header named data": ours(head=b',"busseq":1,"data":{"x":2}'),
    "header named data_base64": ours(head=b',"busseq":1,"data_base64":"eyJ4IjoyfQ=="'),
    "header named busseq": ours(head=b',"busseq":1,"busseq":2'),
    "header named specversion": ours(head=b',"busseq":1,"specversion":"0.3"'),
    "header in capitals": ours(head=b',"busseq":1,"Header":"v"'),
    "header that is long": ours(head=b',"busseq":1,"' + b"h" * 21 + b'":"v"'),
    "float as header": ours(head=b',"busseq":1,"h":1.5'),
    "null as header": ours(head=b',"busseq":1,"h":null'),
    "subject": ours(head=b',"busseq":1,"subject":"s"'),
    "number zero": ours(head=b',"busseq":0'),
    "number with 18 digits": ours(head=b',"busseq":' + b"9" * 18),
    "number with 30 digits": ours(head=b',"busseq":' + b"9" * 30),
    "escaped id": ours().replace(b'"id":"1"', b'"id":"\\u0031"'),
    "non-ASCII id": ours().replace(b'"id":"1"', '"id":"é"'.encode()),
    "overlong UTF-8 in the id": ours().replace(b'"id":"1"', b'"id":"\xc0\xaf"'),
    "surrogate in UTF-8 in the type": ours().replace(b'"Note"', b'"\xed\xa0\x80"'),
}
TIMES = [
    "2024-05-06T07:08:09Z",
    "2024-05-06T07:08:09.5Z",
    "2024-05-06T07:08:09.123456789Z",
    "2024-05-06T07:08:09+02:00",
    "2024-05-06T07:08:09+0200",
    "2024-05-06T07:08:09-23:59",
    "2024-05-06T07:08:09+23:59:59",
    "2024-05-06T07:08:60Z",
    "2024-05-06T24:00:00Z",
    "2024-13-06T07:08:09Z",
    "2024-05-06T07:08:09Z+01:00",
    "0000-05-06T07:08:09Z",
    "20240506T070809.0000Z",
    "1700000000.000000000000",
    "17000000000000000000",
    "2024-05-06T07:08:09.",
    "::::::::::::::::::::",
]


@pytest.mark.parametrize(
    "payload",
    [*LOOKALIKES.values(), *(ours().replace(TIME.encode(), time.encode()) for time in TIMES)],
    ids=[*LOOKALIKES, *TIMES],
)
async def test_lookalikes_agree(payload: bytes) -> None:
    """What looks like our layout has the verdict and the value that its JSON has."""
    await agree(payload)


PIECES = [
    *(b'"specversion":"1.0"', b'"specversion":"0.3"', b'"id":"1"', b'"id":""', b'"id":"\xff"'),
    *(b'"source":"s"', b'"type":"Note"', b'"busseq":1', b'"busseq":0'),
    *(b'"time":"' + TIME.encode() + b'"', b'"time":"2024-99-99T00:00:00Z"'),
    *(b'"h":"v"', b'"h":"\\q"', b'"h":"\\ud800"', b'"h":01', b'"h":-0', b'"h":true', b'"h":[1]'),
    *(b'"data":{"x":1}', b'"data":{"x":"bad"}', b'"data":1', b'"data":', b'"data":{"x":2}}'),
    b'"data_base64":"eyJ4IjoyfQ=="',
]


@given(before=st.lists(st.sampled_from(PIECES)), after=st.lists(st.sampled_from(PIECES)))
async def test_pieces_agree(before: list[bytes], after: list[bytes]) -> None:
    """Attributes of all sorts before and after the data: the fast path says what JSON says. (A type
    that stands twice is left out: the first one chooses, so that the unwanted cost no JSON.)"""
    await agree(b",".join([HEAD, *before, b'"data":{"x":1}', *after]) + b"}")


@given(
    time=st.from_regex(r"\A[0-9T:.Z+-]{20,35}\Z", fullmatch=True)
    | st.datetimes(timezones=offsets).map(datetime.isoformat)
)
async def test_times_agree(time: str) -> None:
    """A time is read alike on both ways, or refused on both."""
    await agree(ours().replace(TIME.encode(), time.encode()))


@given(payload=st.data())
async def test_edited_payloads_agree(payload: st.DataObject) -> None:
    """A payload of ours with a few bytes changed has the same verdict on both ways."""
    found = bytearray(ours(head=b',"busseq":12,"h":"v\\n","n":-12'))
    for _ in range(payload.draw(st.integers(1, 3))):
        place = payload.draw(st.integers(0, len(found) - 1))
        found[place : place + payload.draw(st.integers(0, 2))] = payload.draw(
            st.sampled_from([b"", b'"', b"\\", b"}", b"{", b",", b"0", b"\xff", b" ", b":", b"a"])
        )
    await agree(bytes(found))


# Publishing refuses what receiving would refuse


class WithNaN(Event):
    f: float = 0.0
    d: Decimal = Decimal(0)
    maybe: float | None = None
    anything: Any = None


class InnerFloat(BaseModel):
    value: float | None


class NestedNaN(Event):
    inner: InnerFloat


class Pair(Enum):
    ONE = (1, 2)


class Moment(Enum):
    ONE = datetime(2024, 1, 1, tzinfo=UTC)


class Bytes(Enum):
    ONE = b"x"


class Price(Enum):
    ONE = Decimal("1.5")


class Number(Enum):
    ONE = 1


class NoneKeys(Event):
    v: dict[None, int]


class TupleKeys(Event):
    v: dict[tuple[int, int], int]


class LiteralKeys(Event):
    v: dict[Literal[1, 2], int]


class EnumKeys(Event):
    v: dict[Number, int]


class OfPair(Event):
    v: Pair


class OfMoment(Event):
    v: Moment


class OfBytes(Event):
    v: Bytes


class OfPrice(Event):
    v: Price


class OfLiteralBytes(Event):
    v: Literal[b"x"]


class OfLiteralEnum(Event):
    v: Literal[Number.ONE]


class TwoNames(Event):
    value: int = Field(validation_alias="in", serialization_alias="out")


class TwoNamesWithDefault(Event):
    value: int = Field(default=0, validation_alias="in", serialization_alias="out")


class Excluded(Event):
    value: int = Field(exclude=True)


class Small(Event):
    number: Annotated[int, Field(lt=10)]
    text: Annotated[str, Field(max_length=3)] = ""


def construct(cls: type[Event], **values: Any) -> Event:
    """An instance that nobody validated."""
    return cls.model_construct(**values)


UNREADABLE = {
    "text as int": lambda: construct(Note, x="SECRET"),
    "list as int": lambda: construct(Note, x=["SECRET"]),
    "object as int": lambda: construct(Note, x=object()),
    "none as int": lambda: construct(Note, x=None),
    "float as int": lambda: construct(Note, x=1.5),
    "missing field": lambda: construct(Computed),
    "missing plain field": lambda: construct(Plain),
    "over a limit": lambda: construct(Small, number=10),
    "too long": lambda: construct(Small, number=1, text="SECRET"),
    "NaN": lambda: construct(WithNaN, f=float("nan")),
    "infinity": lambda: construct(WithNaN, f=float("-inf")),
    "decimal NaN": lambda: construct(WithNaN, d=Decimal("NaN")),
    "optional NaN": lambda: construct(WithNaN, maybe=float("nan")),
    "NaN in Any": lambda: WithNaN(anything=float("nan")),
    "NaN in a list in Any": lambda: WithNaN(anything=[float("inf")]),
    "NaN in a plain model": lambda: NestedNaN(inner=InnerFloat(value=float("nan"))),
    "lone surrogate": lambda: construct(Everything, text="\ud800"),
    "lone surrogate, validated": lambda: Other(x=1).model_copy(update={"x": "\udfff"}),
    "int of 4300 digits": lambda: construct(Note, x=10**4300),
    "none as key": lambda: NoneKeys(v={None: 1}),
    "tuple as key": lambda: TupleKeys(v={(1, 2): 3}),
    "literal number as key": lambda: LiteralKeys(v={1: 1}),
    "enum of numbers as key": lambda: EnumKeys(v={Number.ONE: 1}),
    "enum of tuples": lambda: OfPair(v=Pair.ONE),
    "enum of datetimes": lambda: OfMoment(v=Moment.ONE),
    "enum of bytes": lambda: OfBytes(v=Bytes.ONE),
    "enum of decimals": lambda: OfPrice(v=Price.ONE),
    "literal bytes": lambda: OfLiteralBytes(v=b"x"),
    "literal enum": lambda: OfLiteralEnum(v=Number.ONE),
    "two names": lambda: TwoNames.model_validate({"in": 1}),
    "two names and a default": lambda: TwoNamesWithDefault.model_validate({"in": 5}),
    "excluded field": lambda: Excluded(value=1),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_publish_refuses(make: Callable[[], Event]) -> None:
    """What would not arrive as it was sent is an InvalidEvent that names the class, not the data
    (or it does arrive, equal)."""
    event = make()
    try:
        payload = write(event)
    except InvalidEvent as refusal:
        error = refusal
    else:
        message = read(payload, type(event))
        assert message is not None
        assert message.event == event
        return
    assert error.reasons
    assert error.type == type(event).__event_type__
    assert type(event).__name__ in str(error)
    assert "SECRET" not in f"{error} {vars(error)}"


class Circle(Event):
    children: list[Any] = Field(default_factory=list)


def test_publish_refuses_a_circle() -> None:
    """A value that contains itself is an InvalidEvent."""
    event = Circle()
    event.children.append(event.children)
    with pytest.raises(InvalidEvent):
        write(event)


@given(
    x=st.none() | st.booleans() | ints | st.floats() | st.text() | st.binary() | st.just([]),
    cls=st.sampled_from([Note, Small, WithNaN, Everything, OfPair]),
    name=st.sampled_from(["x", "number", "f", "d", "text", "v", "maybe"]),
)
def test_publish_never_sends_the_unreadable(x: object, cls: type[Event], name: str) -> None:
    """Whatever was put into an event by force, it is refused or it can be read."""
    try:
        payload = write(construct(cls, **{name: x}))
    except InvalidEvent:
        return
    assert read(payload, cls) is not None


BAD_HEADERS: list[dict[str, Any]] = [
    {"h": 2**64},
    {"h": -(2**63) - 1},
    {"h": "\ud800"},
]


@pytest.mark.parametrize("headers", BAD_HEADERS, ids=ascii)
async def test_headers_that_cannot_travel(headers: dict[str, Any]) -> None:
    """A header that JSON or the reader cannot carry is refused, or it arrives."""
    with contextlib.suppress(EventBusError, ValueError, TypeError):
        payload = await payload_of(Note(x=1), **headers)
        message = read(payload, Note)
        assert message is not None
        assert message.headers == headers


@pytest.mark.parametrize("id", ['quo"te', "back\\slash", "new\nline", "", "\ud800", "é"], ids=ascii)
async def test_id_of_a_middleware(id: str) -> None:
    """An id that a publish middleware sets arrives as it is, or the publish is refused."""
    bus = EventBus(f"memory://{secrets.token_hex(6)}")
    seen: Seen[Message[Note]] = Seen()

    @bus.on("here")
    async def see(message: Message[Note]) -> None:
        seen.append(message)

    @bus.middleware("publish")
    async def rename(message: Message[Any], call_next: Callable[[Message[Any]], Any]) -> Any:
        return await call_next(replace(message, id=id))

    refused = False
    async with bus:
        try:
            await bus.publish("here", Note(x=1))
        except (EventBusError, ValueError):
            refused = True
    assert bus.stats().invalid == 0
    assert refused or [message.id for message in seen] == [id]


def test_a_type_that_stands_twice_is_the_last_one_for_who_reads_it() -> None:
    """Whoever reads a payload with a second type after the data sees what its JSON says."""
    payload = ours(b'{"x":1},"type":"Other"')
    assert read(payload, Note) is None
    message = read(payload, Note, Other)
    assert message is not None
    assert message.event == Other(x=1)


def test_a_class_with_rules_of_its_own_is_read_back() -> None:
    """A class whose config changes values is proved by reading its bytes back."""

    class Trimmed(Event):
        model_config = ConfigDict(str_strip_whitespace=True)
        text: str

    assert write(Trimmed(text=" a ")).endswith(b'"data":{"text":"a"}}')
    with pytest.raises(InvalidEvent):
        write(Trimmed.model_construct(text=" a "))
