"""`eventbus schema`: the AsyncAPI 3 document of a bus, written from its handlers and event classes.

A channel for each pattern and each template; what is variable in it is a parameter. AsyncAPI knows
no wildcards: `*` becomes a parameter `any1`, and `x-eventbus-pattern` keeps the pattern itself. The
payload is what is on the wire, so the envelope is part of it. The dialect is AsyncAPI's own, a
superset of JSON Schema draft 7; pydantic writes 2020-12, and the two places that differ are turned.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import models_json_schema

from eventbus import Event, EventBus, RouteInfo, escape
from eventbus.cli.apps import load_bus, load_events
from eventbus.cli.terminal import OK, USAGE, Failure, Terminal

_ENVELOPE = "eventbus.CloudEvent"
_ANY = "any"
_PIECE = re.compile(
    r"(?P<escaped>\\.)|(?P<brace>\{\{|\}\})|\{(?P<capture>[^}:]+)(?P<path>:path)?\}"
    r"|(?P<wild>\*|\?|\[\^?(?:\\.|[^\]\\])*\]?)|(?P<plain>.)",
    re.DOTALL,
)
_WILD = {"*": "any text, also none", "?": "one byte"}
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "items")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs")
_SCHEMAS = (
    "additionalProperties",
    "items",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
)

Document = dict[str, Any]


class Address(NamedTuple):
    """A pattern as AsyncAPI writes it: its text with parameters, and a description of each."""

    text: str
    parameters: dict[str, Document]


def schema(
    app: str, publishes: list[str], title: str | None = None, release: str | None = None
) -> int:
    """Print the document."""
    bus = load_bus(app)
    package = app.partition(":")[0].partition(".")[0]
    document = document_of(
        bus, load_events(publishes), title or app.partition(":")[0], release or _version(package)
    )
    Terminal().line(json.dumps(document, indent=2, ensure_ascii=False))
    return OK


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0.0.0"


def document_of(
    bus: EventBus, publishes: Iterable[type[Event]], title: str, release: str
) -> Document:
    """The document. Raises Failure for a field that JSON Schema cannot describe."""
    routes = bus.routes
    published = tuple(publishes)
    classes = dict.fromkeys([*(c for route in routes for c in route.events), *published])
    refs, schemas = describe(classes)
    writer = _Writer(f"{bus.namespace}:" if bus.namespace else "", refs)
    for cls in classes:
        writer.own_channel(cls, is_sent=cls in published)
    for route in routes:
        for pattern in route.patterns:
            writer.receives(route, pattern)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": title, "version": release},
        "defaultContentType": "application/cloudevents+json",
        "channels": writer.channels,
        "operations": writer.operations,
        "components": {"messages": writer.messages, "schemas": {_ENVELOPE: envelope(), **schemas}},
    }


def describe(classes: Iterable[type[Event]]) -> tuple[dict[type[Event], Document], Document]:
    """A reference for each class, and the schemas that they lead to."""
    wanted: Any = [(cls, "validation") for cls in classes]
    try:
        found, whole = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    except PydanticInvalidForJsonSchema as error:
        raise Failure(
            "an event class has a field that JSON Schema cannot describe",
            str(error).partition("\n")[0],
            "give its type a __get_pydantic_json_schema__, or annotate it with WithJsonSchema",
            USAGE,
        ) from None
    refs: dict[type[Event], Document] = {cls: found[cls, "validation"] for cls, _ in wanted}
    return refs, {name: turned(body) for name, body in whole.get("$defs", {}).items()}


def turned(node: Any) -> Any:
    """A schema of 2020-12 as one of draft 7. Only schemas are entered: a property may be called
    `discriminator`, a default may hold anything."""
    if not isinstance(node, dict):
        return node
    found = dict(node)
    if "prefixItems" in found:  # a tuple
        rest = found.pop("items", None)
        found["items"] = found.pop("prefixItems")
        if rest is not None:
            found["additionalItems"] = rest
    if isinstance(discriminator := found.get("discriminator"), dict):
        found["discriminator"] = discriminator["propertyName"]
    for key in _SCHEMAS:
        if isinstance(found.get(key), dict):
            found[key] = turned(found[key])
    for key in _SCHEMA_LISTS:
        if isinstance(found.get(key), list):
            found[key] = [turned(item) for item in found[key]]
    for key in _SCHEMA_MAPS:
        if isinstance(found.get(key), dict):
            found[key] = {name: turned(item) for name, item in found[key].items()}
    return found


def envelope() -> Document:
    """The schema of what is around the data on the wire."""
    text = {"type": "string", "minLength": 1}
    return {
        "title": "CloudEvent",
        "description": "CloudEvents 1.0, JSON, structured mode",
        "type": "object",
        "properties": {
            "specversion": {"const": "1.0"},
            "id": text,
            "source": text,
            "type": text,
            "time": {"type": "string", "format": "date-time"},
            "busseq": {
                "type": "integer",
                "minimum": 1,
                "description": "counts this source's messages on this channel",
            },
            "data": {},
        },
        "required": ["specversion", "id", "source", "type"],
        "additionalProperties": {"type": ["string", "integer", "boolean"]},
    }


def address_of(pattern: str, prefix: str = "") -> Address:
    """The address of a pattern."""
    text = [prefix]
    parameters: dict[str, Document] = {}
    taken = {match["capture"] for match in _PIECE.finditer(pattern)}

    def parameter(name: str, body: Document) -> None:
        parameters[name] = body
        text.append(f"{{{name}}}")

    def fresh() -> str:
        number = 1
        while f"{_ANY}{number}" in taken:
            number += 1
        taken.add(f"{_ANY}{number}")
        return f"{_ANY}{number}"

    for match in _PIECE.finditer(pattern):
        if match["capture"]:
            kind = (
                "segments, with a colon between" if match["path"] else "a segment without a colon"
            )
            name = re.sub(r"[^A-Za-z0-9_]", "_", match["capture"])
            parameter(name, {"description": kind})
        elif match["wild"]:
            meaning = _WILD.get(match["wild"], f"one byte of {match['wild']}")
            parameter(fresh(), {"description": meaning})
        else:
            literal = match["escaped"] or match["brace"] or match["plain"]
            if literal[-1] in "{}":  # an address has no way to write a brace
                parameter(fresh(), {"enum": [literal[-1]]})
            else:
                text.append(literal[-1])
    return Address("".join(text), parameters)


class _Writer:
    """The channels, operations and messages, each entered once."""

    def __init__(self, prefix: str, refs: dict[type[Event], Document]) -> None:
        self._prefix = prefix
        self._refs = refs
        self.channels: Document = {}
        self.operations: Document = {}
        self.messages: Document = {}
        self._channel_keys: dict[str, str] = {}
        self._message_keys: dict[tuple[type[Event] | None, bool], str] = {}

    def receives(self, route: RouteInfo, pattern: str) -> None:
        """A handler on one of its patterns."""
        channel = self._channel(pattern, route.events)
        events = route.events or (None,)
        keys = [self._add_message(channel, event, route.bare) for event in events]
        summary = (inspect.getdoc(route.fn) or "").partition("\n")[0]
        self._operation("receive", route.name, channel, keys, summary)

    def own_channel(self, cls: type[Event], *, is_sent: bool) -> None:
        """The channel that an event class declares for itself, if it does."""
        template = cls.__event_template__
        if template is None:
            return
        channel = self._channel(template.text, (cls,), is_template=True)
        key = self._add_message(channel, cls, bare=False)
        if is_sent:
            self._operation("send", cls.__name__, channel, [key], "")

    def _channel(
        self, pattern: str, events: tuple[type[Event], ...], *, is_template: bool = False
    ) -> str:
        if is_template:  # everything outside its braces is literal
            parts = re.split(r"(\{\{|\}\}|\{[^{}]*\})", pattern)
            pattern = "".join(
                part if number % 2 else escape(part) for number, part in enumerate(parts)
            )
        address = address_of(pattern, self._prefix)
        known = self._channel_keys.get(address.text)
        if known is not None:
            return known
        key = self._channel_keys[address.text] = _fresh(address.text, self.channels)
        body: Document = {"address": address.text, "messages": {}}
        if address.parameters:
            body["parameters"] = {
                name: {**parameter, **self._field(name, events)}
                for name, parameter in address.parameters.items()
            }
        if any(word in pattern for word in "*?["):
            body["x-eventbus-pattern"] = pattern
        self.channels[key] = body
        return key

    @staticmethod
    def _field(name: str, events: tuple[type[Event], ...]) -> Document:
        """Where the message itself says the parameter: in a field of the same name."""
        if not events or not all(
            event.__event_template__ is not None and name in event.__event_template__.fields
            for event in events
        ):
            return {}
        return {"location": f"$message.payload#/data/{name}"}

    def _add_message(self, channel: str, cls: type[Event] | None, bare: bool) -> str:
        key = self._message_keys.get((cls, bare))
        if key is None:
            name = _ANY if cls is None else cls.__event_type__
            key = _fresh(name + ("-bare" if bare else ""), self.messages)
            self._message_keys[cls, bare] = key
            self.messages[key] = self._message(cls, bare)
        self.channels[channel]["messages"][key] = {"$ref": f"#/components/messages/{key}"}
        return key

    def _message(self, cls: type[Event] | None, bare: bool) -> Document:
        whole: Document = {"$ref": f"#/components/schemas/{_ENVELOPE}"}
        if cls is None:
            return {"title": "any type", "payload": {} if bare else whole}
        body: Document = {"name": cls.__event_type__, "title": cls.__name__}
        if cls.__doc__ and cls.__doc__ != Event.__doc__:
            body["summary"] = cls.__doc__.strip().partition("\n")[0]
        if bare:
            return {**body, "contentType": "application/json", "payload": self._refs[cls]}
        data = {"type": {"const": cls.__event_type__}, "data": self._refs[cls]}
        return {**body, "payload": {"allOf": [whole, {"properties": data, "required": ["data"]}]}}

    def _operation(
        self, action: str, name: str, channel: str, keys: list[str], summary: str
    ) -> None:
        ref = f"#/channels/{channel}"
        body: Document = {
            "action": action,
            "channel": {"$ref": ref},
            "messages": [{"$ref": f"{ref}/messages/{key}"} for key in keys],
        }
        if summary:
            body["summary"] = summary
        self.operations[_fresh(f"{action}-{name}", self.operations)] = body


def _fresh(name: str, taken: Document) -> str:
    """A key for this name that is not taken: letters, digits, `_`, `-` and `.` alone."""
    key = base = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_") or "_"
    number = 1
    while key in taken:
        number += 1
        key = f"{base}-{number}"
    return key
