"""Events: their class keywords, their channel templates, and what of them travels."""

from __future__ import annotations

import math
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Generic, Literal, NewType, TypeVar
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from eventbus._errors import InvalidChannel, InvalidEvent, InvalidPattern
from eventbus._events import Event, channel_of, template_of

T = TypeVar("T")
RoomId = NewType("RoomId", str)
VipRoomId = NewType("VipRoomId", RoomId)


class Color(Enum):
    RED = "red"
    TEN = 10
    YES = True
    ID = UUID(int=1)


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    HI = "hi"


class Mixed(Enum):
    RED = "red"
    HALF = 0.5


class MessageSent(Event, channel="chat:{room}"):
    room: str
    text: str = ""


# -- Class keywords --------------------------------------------------------------------------------


def test_the_type_is_the_class_name() -> None:
    """Without the keyword the wire name is the class name."""
    assert MessageSent.__event_type__ == "MessageSent"
    assert Event.__event_type__ == "Event"


def test_the_type_is_not_inherited() -> None:
    """A subclass is another type, whatever its parent is called on the wire."""

    class Parent(Event, type="parent.v1"):
        pass

    class Child(Parent):
        pass

    class Named(Parent, type="child.v1"):
        pass

    types = [Parent.__event_type__, Child.__event_type__, Named.__event_type__]
    assert types == ["parent.v1", "Child", "child.v1"]


def test_the_channel_is_inherited() -> None:
    """A subclass keeps its parent's template unless it declares its own."""

    class Edited(MessageSent):
        pass

    class Pinned(MessageSent, channel="pins:{room}"):
        pass

    assert channel_of(Edited(room="a")) == "chat:a"
    assert channel_of(Pinned(room="a")) == "pins:a"
    assert channel_of(MessageSent(room="a")) == "chat:a"


@pytest.mark.parametrize("name", ["", "a\nb", 'a"b', "a\\b", "x" * 257, "a\ud800", "\u2028"])
def test_a_bad_type(name: str) -> None:
    """A type that would need escapes on the wire is refused at the class, and the error has it."""
    with pytest.raises(InvalidEvent, match=r"^the type of .*Bad is .*1 to 256 printable") as raised:

        class Bad(Event, type=name):
            pass

    assert raised.value.type == name


def test_good_types() -> None:
    """Dots, dashes, spaces, non-ASCII and 256 characters are fine in a type."""
    for name in ("chat.message-sent", "a b", "größe", "x" * 256):

        class Good(Event, type=name):
            pass

        assert Good.__event_type__ == name


def test_a_generic_event() -> None:
    """Each parametrisation of a generic event is a type of its own, with the same template."""

    class Cached(Event, Generic[T], channel="cache:{key}"):
        key: str
        value: T

    assert Cached[int].__event_type__ == "Cached[int]"
    assert channel_of(Cached[int](key="k", value=1)) == "cache:k"


def test_other_class_keywords_reach_pydantic() -> None:
    """Configuration may still be given as class keywords."""

    class Titled(Event, channel="t:{room}", title="A title"):
        room: str

    assert Titled.model_config["title"] == "A title"
    assert Titled.model_config["frozen"] is True


# -- Templates -------------------------------------------------------------------------------------


def test_an_unknown_field() -> None:
    """A template that names no field is refused at the class, and the error lists the fields."""
    with pytest.raises(InvalidChannel, match="'rom', which is not a field") as raised:

        class Typo(Event, channel="chat:{rom}"):
            room: str
            user: str

    assert str(raised.value).endswith("(fields: room, user)")
    assert raised.value.channel == "chat:{rom}"
    with pytest.raises(InvalidChannel, match=r"\(fields: none\)$"):

        class Empty(Event, channel="chat:{room}"):
            pass


def test_a_template_that_is_none() -> None:
    """A template that cannot be parsed is refused at the class."""
    with pytest.raises(InvalidPattern, match="lone brace"):

        class Open(Event, channel="chat:{room"):
            room: str


@pytest.mark.parametrize(
    "annotation",
    [
        float,
        bytes,
        str | None,
        list[str],
        Literal["a"],
        Mixed,
        object,
        MessageSent,
        NewType("Half", float),
    ],
    ids=str,
)
def test_refused_fields(annotation: Any) -> None:
    """A field that is no str, int, bool, UUID or enum of these has no place in a template."""
    with pytest.raises(InvalidChannel, match="must be str, int, bool, UUID or an enum of these"):
        create_model(
            "Bad", __base__=Event, __cls_kwargs__={"channel": "c:{x}"}, x=(annotation, ...)
        )


def test_a_subclass_cannot_spoil_the_template() -> None:
    """A field that an inherited template names is checked in the subclass too."""
    with pytest.raises(InvalidChannel, match=r"field 'room' of .*Worse"):

        class Worse(MessageSent):
            room: float  # type: ignore[assignment]


class Everything(Event, channel="{s}:{i}:{b}:{u}:{e}:{n}:{w}:{r}:{a}:{p:path}"):
    s: str = "x"
    i: int = -5
    b: bool = True
    u: UUID = UUID(int=255)
    e: Color = Color.RED
    n: Level = Level.LOW
    w: Word = Word.HI
    r: VipRoomId = VipRoomId(RoomId("vip"))
    a: Annotated[str, Field(min_length=1)] = "ann"
    p: str = "p:q"


UUID_255 = "00000000-0000-0000-0000-0000000000ff"


@pytest.mark.parametrize(
    "fields, place, spelled",
    [
        ({}, 0, "x"),
        ({"s": "a*?[é"}, 0, "a*?[é"),
        ({}, 1, "-5"),
        ({"i": 0}, 1, "0"),
        ({}, 2, "true"),
        ({"b": False}, 2, "false"),
        ({}, 3, UUID_255),
        ({}, 4, "red"),
        ({"e": Color.TEN}, 4, "10"),
        ({"e": Color.YES}, 4, "true"),
        ({"e": Color.ID}, 4, str(UUID(int=1))),
        ({}, 5, "1"),
        ({}, 6, "hi"),
        ({}, 7, "vip"),
        ({}, 8, "ann"),
        ({}, slice(9, None), ["p", "q"]),
    ],
)
def test_rendering(fields: dict[str, object], place: int | slice, spelled: str | list[str]) -> None:
    """A template field is rendered as its JSON scalar."""
    assert channel_of(Everything(**fields)).split(":")[place] == spelled  # type: ignore[arg-type]


def test_rendering_is_json() -> None:
    """What stands in the channel is what stands in the event's own JSON."""
    dumped = Everything().model_dump(mode="json")
    captures = template_of(Everything).pattern.match(channel_of(Everything()).encode())
    as_json = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in dumped.items()}
    assert captures == as_json


def test_enum_values_in_use() -> None:
    """A model that keeps the values of its enums renders the same channel."""

    class Plain(Event, channel="c:{e}"):
        model_config = ConfigDict(use_enum_values=True)
        e: Color

    assert channel_of(Plain(e=Color.RED)) == "c:red"


def test_no_template() -> None:
    """An event without a template says how to declare one."""

    class Homeless(Event):
        x: int = 0

    with pytest.raises(InvalidChannel, match=r'class Homeless\(Event, channel="\.\.\."\)'):
        channel_of(Homeless())


@given(st.text(max_size=8))
def test_a_room_cannot_escape(room: str) -> None:
    """A user-supplied room is one segment of the channel, or is refused."""
    event = MessageSent(room=room)
    if not room or ":" in room:
        with pytest.raises(InvalidChannel, match="field 'room' of the channel template 'chat:"):
            channel_of(event)
    else:
        assert channel_of(event) == f"chat:{room}"


@pytest.mark.parametrize("path", ["", ":", "a:", ":a", "a::b"])
def test_a_path_has_no_empty_segment(path: str) -> None:
    """A path may hold colons, and each of its segments has something in it."""
    with pytest.raises(InvalidChannel, match="must have no empty segment"):
        channel_of(Everything(p=path))


def test_an_unvalidated_event() -> None:
    """A value that never was validated is refused when the channel is rendered."""
    with pytest.raises(InvalidChannel, match="a NoneType has no place in a channel name"):
        channel_of(MessageSent.model_construct(room=None))


def test_a_class_that_is_not_complete() -> None:
    """A field whose type is not known yet is judged when its channel is rendered."""

    class Early(Event, channel="c:{x}"):
        x: Later  # type: ignore[name-defined]  # noqa: F821

    Early.model_rebuild(_types_namespace={"Later": float})
    with pytest.raises(InvalidChannel, match="a float has no place in a channel name"):
        channel_of(Early(x=1.5))


# -- What travels ----------------------------------------------------------------------------------


def test_frozen() -> None:
    """An event cannot be changed, so it may be shared and hashed."""
    event = MessageSent(room="a")
    with pytest.raises(ValidationError, match="frozen"):
        event.room = "b"
    assert hash(event) == hash(MessageSent(room="a"))


def test_unknown_fields_are_ignored() -> None:
    """A newer publisher's field does not break an older subscriber, and does not stay."""
    event = MessageSent.model_validate_json('{"room": "a", "added_in_v2": 1}')
    assert event == MessageSent(room="a")
    assert not hasattr(event, "added_in_v2")


class Blob(Event):
    data: bytes = b""
    number: float = 0.0


@given(st.binary(max_size=40))
def test_bytes_are_base64(data: bytes) -> None:
    """Any bytes survive JSON."""
    assert Blob.model_validate_json(Blob(data=data).model_dump_json()).data == data


def test_base64_is_what_travels() -> None:
    """Bytes are base64 in JSON, and what is no base64 is refused."""
    assert '"data":"aGk="' in Blob(data=b"hi").model_dump_json()
    with pytest.raises(ValidationError, match="base64"):
        Blob.model_validate_json('{"data": "!"}')


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_no_infinities(number: float) -> None:
    """Numbers that JSON does not have are refused where the event is made."""
    with pytest.raises(ValidationError, match="finite"):
        Blob(number=number)


def test_errors_do_not_show_the_data() -> None:
    """A validation error of an event never holds what the fields held."""
    with pytest.raises(ValidationError) as raised:
        Blob(number="secret")  # type: ignore[arg-type]
    assert "secret" not in str(raised.value)


def test_the_base_is_a_model() -> None:
    """An event is a pydantic model like any other, also inside another one."""

    class Outer(BaseModel):
        inner: MessageSent

    assert Outer(inner=MessageSent(room="a")).model_dump() == {"inner": {"room": "a", "text": ""}}
