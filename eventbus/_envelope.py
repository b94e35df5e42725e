"""The wire: CloudEvents 1.0, JSON, structured mode, written in one fixed order.

    {"specversion":"1.0","id":…,"source":…,"type":…,"time":…,"busseq":…,<headers>,"data":…}

Theory of operation. What this package writes is recognised by an anchored pattern over the bytes:
source, type and number are read without JSON, and only the `data` slice is validated, by the event
class's own validator. Anything else (another order, another publisher, a slice that fails) goes the
long way, through a model of the envelope, and that judges. Pure; only bytes and values may enter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from eventbus._codec import Reader, reasons_of
from eventbus._errors import InvalidEvent
from eventbus._messages import EMPTY, Header, Message

_TEXT = rb'"([^"\\\x00-\x1f]+)"'
_CORE = rb"specversion|id|source|type|time|busseq|data|data_base64"
_HEAD = re.compile(
    rb'\{"specversion":"1\.0","id":' + _TEXT + rb',"source":' + _TEXT + rb',"type":' + _TEXT
    + rb',"time":' + _TEXT + rb'(?:,"busseq":([1-9][0-9]{0,17}))?'
    + rb'((?:,"(?!(?:' + _CORE + rb')")[a-z0-9]{1,20}":'
    + rb'(?:"(?:[^"\\\x00-\x1f]++|\\.)*+"|-?(?:0|[1-9][0-9]{0,17})|true|false))*+),"data":'
)  # fmt: skip
_OWN = re.compile(
    rb'\{"specversion":"1\.0","id":"[0-9a-f-]++","source":"([^"]++)"'
    rb',"type":"([^"]++)","time":"([^"]++)","busseq":([1-9][0-9]{0,17}+),"data":'
)
_PLAIN_TEXT = re.compile(rb'[^"\\\x00-\x1f]+')
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")

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
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 1 << 63:
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
                value = reader.read(self.payload, head.binary)
        else:
            value = reader.read(self.payload, head.binary)
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
