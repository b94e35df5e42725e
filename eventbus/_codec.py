"""The data of an event: from a class's value to JSON, and back.

Reading is pydantic's JSON mode (so Decimal, datetime and bytes survive), by the class's own
validator; dicts are orjson's. Writing refuses what no receiver could read, or would read as
something else. Errors never hold the data. Pure; nothing here knows an envelope, a channel or a
handler.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast, get_args
from uuid import UUID

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError, create_model
from pydantic_core.core_schema import ErrorType

from eventbus._errors import InvalidEvent
from eventbus._events import Event

_MAX_REASONS = 10
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

    def read(self, payload: bytes, binary: str | None = None) -> Any:
        """The body inside an envelope of any layout, or in its `data_base64`. Raises
        InvalidEvent."""
        if binary is not None:
            try:
                data = b64decode(binary, validate=True)
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
