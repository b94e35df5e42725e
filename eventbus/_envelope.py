"""The wire: CloudEvents 1.0, JSON, structured mode, written in one fixed order.

    {"specversion":"1.0","id":…,"source":…,"type":…,"time":…,"busseq":…,<headers>,"data":…}

Theory of operation. What this package writes is recognised by an anchored pattern over the bytes:
source, type and number are read without JSON, and only the `data` slice is validated, by the event
class's own validator. Anything else (another order, another publisher, a slice that fails) goes the
long way, through a model of the envelope, and that judges. Data is always read in pydantic's JSON
mode, so Decimal, datetime and bytes survive. Pure; only bytes and values may enter.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticSerializationError

from eventbus._errors import InvalidEvent
from eventbus._events import Event
from eventbus._messages import EMPTY, Header, Message

_TEXT = rb'"([^"\\\x00-\x1f]+)"'
_CORE = rb"specversion|id|source|type|time|busseq|data|data_base64"
_HEAD = re.compile(
    rb'\{"specversion":"1\.0","id":' + _TEXT + rb',"source":' + _TEXT + rb',"type":' + _TEXT
    + rb',"time":"([0-9T:.Z+-]{20,35})"(?:,"busseq":([1-9][0-9]{0,17}))?'
    + rb'((?:,"(?!(?:' + _CORE + rb')")[a-z0-9]{1,20}":'
    + rb'(?:"(?:[^"\\\x00-\x1f]|\\.)*"|-?[0-9]{1,19}|true|false))*),"data":'
)  # fmt: skip
_OWN = re.compile(
    rb'\{"specversion":"1\.0","id":"[0-9a-f-]++","source":"([^"]++)(?<!\\)"'
    rb',"type":"([^"]++)(?<!\\)","time":"[^"]{20,35}+(?<!\\)"'
    rb',"busseq":([1-9][0-9]{0,17}+),"data":'
)
_PLAIN_TEXT = re.compile(rb'[^"\\\x00-\x1f]+')
_MAX_REASONS = 10

own_layout = _OWN.match
"""Recognise our own layout, without headers: source, type and number as groups, the data from the
end of the match to the last byte but one. A type that is not `is_plain`, and everything that does
not match, goes through `peek`."""


def is_plain(text: bytes) -> bool:
    """Whether the inside of a JSON string stands for itself."""
    return _PLAIN_TEXT.fullmatch(text) is not None


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


class _Envelope(BaseModel):
    """The long way: every CloudEvents 1.0 JSON event, in any order."""

    model_config = ConfigDict(extra="allow")

    specversion: Literal["1.0"]
    id: Annotated[str, AfterValidator(_not_empty)]
    source: Annotated[str, AfterValidator(_not_empty)]
    type: Annotated[str, AfterValidator(_not_empty)]
    time: datetime | None = None


class Head:
    """What the envelope says beside the data. `number` is `busseq`, None when there is none."""

    __slots__ = ("binary", "headers", "id", "number", "short", "source", "time", "type")

    def __init__(
        self,
        id: bytes,
        source: bytes,
        type: bytes,
        time: bytes | datetime | None,
        number: int | None,
        headers: bytes | Mapping[str, Header],
        short: int = 0,
        binary: str | None = None,
    ) -> None:
        self.id = id
        self.source = source
        self.type = type
        self.time = time
        self.number = number
        self.headers = headers
        self.short = short
        """Where the data begins, when the layout is our own; else 0."""
        self.binary = binary
        """`data_base64`, as text."""


def peek(payload: bytes) -> Head | None:
    """The head of a payload in our own layout, read without JSON; None for every other layout."""
    found = _HEAD.match(payload)
    if found is None:
        return None
    id, source, type, time, number, headers = found.groups()
    return Head(id, source, type, time, int(number) if number else None, headers, found.end())


def read_head(payload: bytes) -> Head:
    """The head of any CloudEvents 1.0 JSON event, the long way. Raises InvalidEvent."""
    try:
        envelope = _Envelope.model_validate_json(payload)
    except ValidationError as error:
        raise InvalidEvent(
            "the payload is not a CloudEvents 1.0 JSON event", reasons=reasons_of(error)
        ) from None
    extra = dict(envelope.model_extra or {})
    number = extra.get("busseq")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        number = None
    else:
        del extra["busseq"]
    binary = extra.pop("data_base64", None) if "data" not in extra else None
    extra.pop("data", None)
    headers = {k: v for k, v in extra.items() if isinstance(v, str | int | bool)}
    return Head(
        envelope.id.encode("utf-8", "replace"),
        envelope.source.encode("utf-8", "replace"),
        envelope.type.encode("utf-8", "replace"),
        envelope.time,
        number,
        MappingProxyType(headers),
        0,
        binary if isinstance(binary, str) else None,
    )


def reasons_of(error: ValidationError) -> tuple[str, ...]:
    """The lines of a validation error, without the data that caused it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return tuple(
        f"{'.'.join(map(str, line['loc'])) or 'payload'}: {line['msg']}"
        for line in found[:_MAX_REASONS]
    )


# -- Reading data --------------------------------------------------------------------------------


class Reader:
    """How one kind of body is read from a payload: an event class, a model, a dict.

    `key` names the kind; frames keep what was read under it when `shared`, so that several handlers
    share one decode. `direct` validates bare JSON bytes.
    """

    __slots__ = ("direct", "key", "label", "shared", "_wrapped")

    def __init__(
        self, key: object, label: str, shared: bool, direct: Callable[[bytes], Any]
    ) -> None:
        self.key = key
        self.label = label
        self.shared = shared
        self.direct = direct
        self._wrapped: Callable[[bytes], Any] | None = None

    def read(self, payload: bytes, head: Head) -> Any:
        """The body inside an envelope. Raises InvalidEvent."""
        if head.short and payload.endswith(b"}"):
            try:
                return self.direct(payload[head.short : -1])
            except ValueError:
                pass  # the long way judges
        return self.read_long(payload, head.binary)

    def read_long(self, payload: bytes, binary: str | None) -> Any:
        """The body inside an envelope of any layout. Raises InvalidEvent."""
        try:
            if binary is not None:
                return self.direct(b64decode(binary, validate=True))
            if self._wrapped is None:
                self._wrapped = _wrap(self.key)
            return self._wrapped(payload)
        except ValidationError as error:
            raise self.refusal(reasons_of(error)) from None
        except binascii.Error:
            raise self.refusal(("data_base64: not base64",)) from None
        except ValueError as error:
            raise self.refusal((f"data: {error}",)) from None

    def read_bare(self, payload: bytes) -> Any:
        """The body that is the whole payload. Raises InvalidEvent."""
        try:
            return self.direct(payload)
        except ValidationError as error:
            raise self.refusal(reasons_of(error)) from None
        except ValueError as error:
            raise self.refusal((f"payload: {error}",)) from None

    def refusal(self, reasons: tuple[str, ...]) -> InvalidEvent:
        """The error that says why this payload is no such body."""
        return InvalidEvent(
            f"the data does not fit {self.label}: {'; '.join(reasons)}",
            type=self.label,
            reasons=reasons,
        )


def _wrap(key: object) -> Callable[[bytes], Any]:
    """Reads `data` out of an envelope of any layout."""
    if key is dict:
        return _dict_inside
    validate = create_model(
        "_Data", data=(cast("Any", key), ...)
    ).__pydantic_validator__.validate_json

    def read(payload: bytes) -> Any:
        return validate(payload).data

    return read


def _dict_inside(payload: bytes) -> dict[str, Any]:
    envelope = orjson.loads(payload)
    if "data" not in envelope:
        raise ValueError("Field required")
    return _a_dict(envelope["data"])


def _a_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("Input should be an object")
    return value


def _load_dict(data: bytes) -> dict[str, Any]:
    return _a_dict(orjson.loads(data))


DICT = Reader(dict, "dict", False, _load_dict)


@lru_cache(maxsize=1024)
def event_reader(cls: type[Event]) -> Reader:
    """The reader of an event class."""
    cls.model_rebuild()
    validate = cls.__pydantic_validator__.validate_json
    return Reader(cls, cls.__event_type__, _traits(cls).immutable, validate)


def model_reader(annotation: Any) -> Reader:
    """The reader of any pydantic model, or of a union with its own discriminator."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    label = getattr(annotation, "__name__", None) or str(annotation)
    return Reader(annotation, label, False, adapter.validate_json)


# -- What is known of a class ----------------------------------------------------------------------

_SCALARS = frozenset(
    "str int bool float decimal uuid date time datetime timedelta bytes none literal enum url"
    " multi-host-url complex".split()
)
_FROZEN = _SCALARS | {"nullable", "union", "tagged-union", "tuple", "frozenset", "default"}
_FROZEN |= {"model", "model-fields", "model-field", "definitions", "definition-ref"}
_PLAIN = frozenset(
    "str int bool uuid none nullable default literal enum model model-fields model-field list dict"
    " tuple date datetime".split()
)
_BENIGN = frozenset(
    "type schema fields cls config custom_init root_model frozen extra_behavior ref metadata"
    " default default_factory items_schema keys_schema values_schema variadic_item_index model_name"
    " post_init strict serialization_exclude expected members sub_type missing computed_fields"
    " required microseconds_precision copy_default fail_fast validate_default".split()
)


class _Traits:
    """`immutable`: one instance may be handed to several handlers.
    `plain`: what pydantic writes without a warning, pydantic reads back."""

    __slots__ = ("immutable", "plain")

    def __init__(self, immutable: bool, plain: bool) -> None:
        self.immutable = immutable
        self.plain = plain


def _nodes(schema: Any) -> list[dict[str, Any]]:
    """Every node of a core schema (a dict with a `type`), outermost first."""
    found: list[dict[str, Any]] = []
    todo = [schema]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if isinstance(item.get("type"), str):
                found.append(item)
            todo += [v for k, v in item.items() if k not in ("metadata", "config", "expected")]
        elif isinstance(item, list | tuple):
            todo += item
    return found


@lru_cache(maxsize=1024)
def _traits(cls: type[BaseModel]) -> _Traits:
    nodes = _nodes(cls.__pydantic_core_schema__)
    immutable = all(
        node["type"] in _FROZEN
        and (node["type"] != "model" or bool(node.get("config", {}).get("frozen")))
        for node in nodes
    )
    plain = all(
        node["type"] in _PLAIN and node.keys() <= _BENIGN and not node.get("computed_fields")
        for node in nodes
    )
    return _Traits(immutable, plain)


# -- Writing ---------------------------------------------------------------------------------------

_PROVABLE = 4096
"""Bytes. Longer data is always read back: very long numbers are where codecs disagree."""


@lru_cache(maxsize=1024)
def event_writer(cls: type[Event]) -> Callable[[Event], bytes]:
    """What writes events of a class; see `encode_data`."""
    cls.model_rebuild()
    to_json = cls.__pydantic_serializer__.to_json
    validate = cls.__pydantic_validator__.validate_json
    plain = _traits(cls).plain

    def write(event: Event) -> bytes:
        data: bytes = to_json(event, by_alias=True, warnings="error")
        if not plain or len(data) > _PROVABLE:
            validate(data)
        return data

    return write


def encode_data(event: Event) -> bytes:
    """The event as JSON. Raises InvalidEvent for what a receiver would refuse.

    The class proves it by its types where it can; else the bytes are read back.
    """
    cls = type(event)
    try:
        return event_writer(cls)(event)
    except ValidationError as error:
        reasons = reasons_of(error)
    except (PydanticSerializationError, ValueError):  # their texts quote the data
        reasons = ("a value does not fit its field, or has no JSON form",)
    raise InvalidEvent(
        f"{cls.__qualname__} cannot be published, since no receiver could read it:"
        f" {'; '.join(reasons)}",
        type=cls.__event_type__,
        reasons=reasons,
    )


def write_head(source: str, type: str) -> tuple[bytes, bytes, bytes]:
    """What stands around the id and the time of every event of a type: before the id, between the
    two, and after the time (up to the number). The texts must need no JSON escape."""
    return (
        b'{"specversion":"1.0","id":"',
        f'","source":"{source}","type":"{type}","time":"'.encode(),
        b'","busseq":',
    )


def write_headers(headers: Mapping[str, Header]) -> bytes:
    """What stands between the number and the data. Raises TypeError for what JSON cannot carry."""
    return b"," + orjson.dumps(dict(headers))[1:-1] + DATA if headers else DATA


DATA = b',"data":'


# -- A frame and its message -----------------------------------------------------------------------


class Frame:
    """One message as it arrived, looked at only as far as somebody asks. Handlers of several routes
    share one, and with it what was read."""

    __slots__ = ("channel", "head", "judged", "payload", "_read")

    def __init__(self, channel: str, payload: bytes, head: Head | None = None) -> None:
        self.channel = channel
        self.payload = payload
        self.head = head
        self.judged = False
        """Whether this frame was counted as invalid already (once per frame)."""
        self._read: dict[object, Any] | None = None

    def envelope(self) -> Head:
        """The head, read the long way when need be. Raises InvalidEvent."""
        head = self.head
        if head is None:
            head = self.head = peek(self.payload) or read_head(self.payload)
        return head

    def body(self, reader: Reader) -> Any:
        """The body that this reader reads. Raises InvalidEvent."""
        if not reader.shared:
            return reader.read(self.payload, self.envelope())
        if self._read is None:
            self._read = {}
        elif reader.key in self._read:
            return self._read[reader.key]
        value = self._read[reader.key] = reader.read(self.payload, self.envelope())
        return value


def message_of(
    frame: Frame,
    event: Any,
    pattern: str | None,
    captures: Mapping[str, str],
    *,
    bare: bool = False,
) -> Message[Any]:
    """The message that a handler, a middleware or a stream sees. Without an envelope (`bare`, or a
    payload that is none) its metadata is None."""
    try:
        head = None if bare else frame.envelope()
    except InvalidEvent:
        head = None
    if head is None:
        return Message(event, frame.channel, pattern, captures)
    time = head.time
    if isinstance(time, bytes):
        try:
            time = datetime.fromisoformat(time.decode())
        except ValueError:
            time = None
    headers = head.headers
    if isinstance(headers, bytes):
        headers = MappingProxyType(orjson.loads(b"{" + headers[1:] + b"}")) if headers else EMPTY
    return Message(
        event,
        frame.channel,
        pattern,
        captures,
        head.id.decode("utf-8", "replace"),
        head.source.decode("utf-8", "replace"),
        head.type.decode("utf-8", "replace"),
        time,
        head.number,
        headers,
    )
