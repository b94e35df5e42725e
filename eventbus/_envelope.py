"""The wire: CloudEvents 1.0, JSON, structured mode, written in one fixed order.

    {"specversion":"1.0","id":…,"source":…,"type":…,"time":…,"busseq":…,<headers>,"data":…}

Theory of operation. What this package writes is recognised by an anchored pattern over the bytes:
source, type and number are read without JSON, and only the `data` slice is validated, by the event
class's own validator. Anything else (another order, another publisher, a slice that fails) goes the
long way, through a model of the envelope, and that judges. Data is always read in pydantic's JSON
mode, so Decimal, datetime and bytes survive. Pure; only bytes and values may enter.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core.core_schema import ErrorType

from eventbus._errors import InvalidEvent
from eventbus._events import Event
from eventbus._messages import EMPTY, Header, Message

_TEXT = rb'"([^"\\\x00-\x1f]+)"'
_CORE = rb"specversion|id|source|type|time|busseq|data|data_base64"
_HEAD = re.compile(
    rb'\{"specversion":"1\.0","id":' + _TEXT + rb',"source":' + _TEXT + rb',"type":' + _TEXT
    + rb',"time":' + _TEXT + rb'(?:,"busseq":([1-9][0-9]{0,17}))?'
    + rb'((?:,"(?!(?:' + _CORE + rb')")[a-z0-9]{1,20}":'
    + rb'(?:"(?:[^"\\\x00-\x1f]|\\.)*"|-?(?:0|[1-9][0-9]{0,17})|true|false))*),"data":'
)  # fmt: skip
_OWN = re.compile(
    rb'\{"specversion":"1\.0","id":"[0-9a-f-]++","source":"([^"]++)"'
    rb',"type":"([^"]++)","time":"([^"]++)","busseq":([1-9][0-9]{0,17}+),"data":'
)
_PLAIN_TEXT = re.compile(rb'[^"\\\x00-\x1f]+')
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")
_MAX_REASONS = 10

own_layout = _OWN.match
"""Recognise our own layout, without headers: source, type, time and number as groups, the data from
the end of the match to the last byte but one. What is not `is_plain` or no `time_of`, and
everything that does not match, goes through `peek`."""


def is_plain(text: bytes) -> bool:
    """Whether the inside of a JSON string stands for itself."""
    if _PLAIN_TEXT.fullmatch(text) is None:
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def time_of(text: bytes) -> datetime | None:
    """The time that an envelope names, when it is plain RFC 3339."""
    if not text.isascii() or not _TIME.fullmatch(text.decode()):
        return None
    try:
        return datetime.fromisoformat(text.decode())
    except ValueError:
        return None


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


class Head(NamedTuple):
    """What the envelope says beside the data. `number` is `busseq`, None when there is none;
    `short` is where the data begins when the layout is our own, else 0; `binary` is
    `data_base64`."""

    id: str
    source: bytes
    type: bytes
    time: datetime | None
    number: int | None
    headers: Mapping[str, Header]
    short: int = 0
    binary: str | None = None


def peek(payload: bytes) -> Head | None:
    """The head of a payload in our own layout, read without JSON; None for every other layout, and
    for what the long way must judge."""
    found = _HEAD.match(payload)
    if found is None:
        return None
    id, source, type, text, number, headers = found.groups()
    time = time_of(text)
    if time is None or not (is_plain(id) and is_plain(source) and is_plain(type)):
        return None
    try:
        more = MappingProxyType(orjson.loads(b"{" + headers[1:] + b"}")) if headers else EMPTY
    except orjson.JSONDecodeError:
        return None
    return Head(id.decode(), source, type, time, int(number) if number else None, more, found.end())


def read_head(payload: bytes) -> Head:
    """The head of any CloudEvents 1.0 JSON event, the long way. Raises InvalidEvent."""
    try:
        envelope = _Envelope.model_validate_json(payload)
    except ValidationError as error:
        raise InvalidEvent(
            "the payload is not a CloudEvents 1.0 JSON event",
            reasons=reasons_of(error, frozenset(_Envelope.model_fields)),
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
        envelope.id,
        envelope.source.encode("utf-8", "replace"),
        envelope.type.encode("utf-8", "replace"),
        envelope.time,
        number,
        MappingProxyType(headers),
        0,
        binary if isinstance(binary, str) else None,
    )


_KNOWN_ERRORS = frozenset(get_args(ErrorType)) - {
    "assertion_error", "extra_forbidden", "union_tag_invalid", "value_error"
}  # fmt: skip
"""Kinds of errors whose text holds nothing of the data."""


def reasons_of(error: ValidationError, names: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The lines of a validation error, without the data that caused it: of places only the `names`
    of fields, of texts only those that pydantic itself words."""
    lines = error.errors(include_url=False, include_context=False, include_input=False)
    reasons = []
    for line in lines[:_MAX_REASONS]:
        place = ".".join(str(p) if isinstance(p, int) or p in names else "*" for p in line["loc"])
        text = line["msg"] if line["type"] in _KNOWN_ERRORS else line["type"]
        reasons.append(f"{place or 'payload'}: {text}")
    return tuple(reasons)


# -- Reading data --------------------------------------------------------------------------------


class Reader:
    """How one kind of body is read from a payload: an event class, a model, a dict.

    `key` names the kind; frames keep what was read under it when `shared`, so that several handlers
    share one decode. `direct` validates bare JSON bytes; `names` are the fields that errors may
    name.
    """

    __slots__ = ("direct", "key", "label", "names", "shared", "_wrapped")

    def __init__(
        self,
        key: object,
        label: str,
        direct: Callable[[bytes], Any],
        *,
        shared: bool = False,
        names: frozenset[str] = frozenset(),
    ) -> None:
        self.key = key
        self.label = label
        self.direct = direct
        self.shared = shared
        self.names = names | {"data"}
        self._wrapped: Callable[[bytes], Any] | None = None

    def read(self, payload: bytes, head: Head) -> Any:
        """The body inside an envelope, the long way. Raises InvalidEvent."""
        if head.binary is not None:
            try:
                data = b64decode(head.binary, validate=True)
            except ValueError:
                raise self.refusal(("data_base64: not base64",)) from None
            return self._judged(self.direct, data)
        if self._wrapped is None:
            self._wrapped = _wrap(self.key)
        return self._judged(self._wrapped, payload)

    def read_bare(self, payload: bytes) -> Any:
        """The body that is the whole payload. Raises InvalidEvent."""
        return self._judged(self.direct, payload)

    def _judged(self, read: Callable[[bytes], Any], data: bytes) -> Any:
        try:
            return read(data)
        except ValidationError as error:
            raise self.refusal(reasons_of(error, self.names)) from None
        except ValueError as error:
            text = "not JSON" if isinstance(error, orjson.JSONDecodeError) else str(error)
            raise self.refusal((f"data: {text}",)) from None
        except Exception as error:  # a validator is the user's code
            raise self.refusal((f"data: a validator raised {type(error).__name__}",)) from error

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


DICT = Reader(dict, "dict", _load_dict)


@lru_cache(maxsize=1024)
def event_reader(cls: type[Event]) -> Reader:
    """The reader of an event class."""
    cls.model_rebuild()
    validate = cls.__pydantic_validator__.validate_json
    nodes = _nodes(cls.__pydantic_core_schema__)
    return Reader(
        cls, cls.__event_type__, validate, shared=_is_immutable(nodes), names=_names(nodes)
    )


def model_reader(annotation: Any) -> Reader:
    """The reader of any pydantic model, or of a union with its own discriminator."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    label = getattr(annotation, "__name__", None) or str(annotation)
    names = _names(_nodes(adapter.core_schema))
    return Reader(annotation, label, adapter.validate_json, names=names)


# -- What is known of a class ----------------------------------------------------------------------

_IMMUTABLE = frozenset(
    "str int bool float decimal uuid date time datetime timedelta bytes none literal enum complex"
    " url multi-host-url nullable union tagged-union tuple frozenset default model model-fields"
    " model-field definitions definition-ref".split()
)
_EXACT: dict[str, type] = {"str": str, "int": int, "bool": bool, "uuid": UUID}


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


def _is_immutable(nodes: Sequence[dict[str, Any]]) -> bool:
    """Whether one instance may be handed to several handlers."""
    return all(
        node["type"] in _IMMUTABLE
        and (node["type"] != "model" or bool(node["cls"].model_config.get("frozen")))
        for node in nodes
    )


def _names(nodes: Sequence[dict[str, Any]]) -> frozenset[str]:
    """The names of all fields, those of models inside included."""
    return frozenset(
        name for node in nodes if isinstance(node.get("fields"), dict) for name in node["fields"]
    )


def _exact_types(cls: type[BaseModel]) -> tuple[type, ...] | None:
    """The exact types of a flat class's values, when these alone prove that its JSON is read back
    as it was: plain text, whole numbers, truth values and UUIDs, without rules of their own."""
    types: list[type] = []
    model: Any = cls.__pydantic_core_schema__
    inner = model.get("schema", {})
    if "serialization" in model or inner.get("type") != "model-fields":
        return None
    if model.get("config", {}).keys() - {"title", "extra_fields_behavior", *Event.model_config}:
        return None
    for field in inner["fields"].values():
        schema = field["schema"]
        if schema["type"] == "default":
            schema = schema["schema"]
        exact = _EXACT.get(schema.get("type", ""))
        if (
            exact is None
            or schema.keys() != {"type"}
            or field.keys() - {"type", "schema", "metadata"}
        ):
            return None
        types.append(exact)
    return tuple(types)


# -- Writing ---------------------------------------------------------------------------------------

_PROVABLE = 4096
"""Bytes. Longer data is always read back: very long numbers are where codecs disagree."""


@lru_cache(maxsize=1024)
def event_writer(cls: type[Event]) -> Callable[[Event], bytes]:
    """What writes events of a class as JSON. It raises InvalidEvent for what no receiver could
    read, or would read as something else.

    The types of the values prove it where they can; else the bytes are read back and compared.
    """
    cls.model_rebuild()
    to_json = cls.__pydantic_serializer__.to_json
    validate = cls.__pydantic_validator__.validate_json
    exact = _exact_types(cls)
    kept = [name for name, field in cls.model_fields.items() if not field.exclude]

    def write(event: Event) -> bytes:
        values = event.__dict__
        try:
            if tuple(map(type, values.values())) == exact:
                data: bytes = to_json(event)
                if len(data) <= _PROVABLE:
                    return data
            data = to_json(event, by_alias=True, warnings="error")
            seen = validate(data).__dict__
            changed = [name for name in kept if seen[name] != values[name]]
            if not changed:
                return data
            reasons = tuple(f"{name}: would be read as something else" for name in changed)
        except ValidationError as error:
            reasons = reasons_of(error, event_reader(cls).names)
        except Exception:  # serializers and validators are the user's code; their texts quote data
            reasons = ("a value does not fit its field, or has no JSON form",)
        raise InvalidEvent(
            f"{cls.__qualname__} cannot be published, since no receiver could read it:"
            f" {'; '.join(reasons)}",
            type=cls.__event_type__,
            reasons=reasons,
        )

    return write


def encode_data(event: Event) -> bytes:
    """The event as JSON; see `event_writer`."""
    return event_writer(type(event))(event)


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
        """The body that this reader reads. Raises InvalidEvent.

        When the data of our own layout does not fit, all of the payload is read the long way, which
        may find another head.
        """
        if self._read is not None and reader.key in self._read:
            return self._read[reader.key]
        head = self.envelope()
        if head.short and self.payload.endswith(b"}"):
            try:
                value = reader.direct(self.payload[head.short : -1])
            except Exception:  # the long way judges
                head = self.head = read_head(self.payload)
                value = reader.read(self.payload, head)
        else:
            value = reader.read(self.payload, head)
        if reader.shared:
            self._read = {**(self._read or {}), reader.key: value}
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
    return Message(
        event,
        frame.channel,
        pattern,
        captures,
        head.id,
        head.source.decode("utf-8", "replace"),
        head.type.decode("utf-8", "replace"),
        head.time,
        head.number,
        head.headers,
    )
