"""Handlers: from a function's signature to a plan for calling it.

The signature is read once, at decoration. A parameter named like a capture takes the capture; every
other is filled by its annotation. What cannot be filled is refused here, with the parameter's name
and what is available. Nothing is inspected per message. Pure.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from eventbus._codec import DICT, Reader, event_reader, model_reader
from eventbus._envelope import Frame
from eventbus._errors import InvalidEvent, InvalidHandler
from eventbus._events import Event
from eventbus._messages import Message
from eventbus._patterns import Pattern

SKIP: Any = object()
"""What `CallPlan.decode` returns for a message of a type that the handler did not ask for."""

_BODY, _MESSAGE, _DICT, _BYTES, _BUS = "event", "Message", "dict", "bytes", "EventBus"


class Body:
    """What a handler wants as the event: event classes by wire type, or one reader for every type.

    `types` are the wire types (None: every type). Without readers the event is the raw bytes.
    """

    __slots__ = ("bare", "types", "_reader", "_readers")

    def __init__(
        self,
        reader: Reader | None = None,
        readers: dict[bytes, Reader] | None = None,
        *,
        bare: bool = False,
    ) -> None:
        self.bare = bare
        self.types = None if readers is None else frozenset(readers)
        self._reader = reader
        self._readers = readers

    def reader_for(self, type: bytes) -> Reader | None:
        """What reads a message of this wire type out of an envelope; None: nothing, or no need."""
        if self.bare:
            return None
        return self._reader if self._readers is None else self._readers.get(type)

    def decode(self, frame: Frame) -> Any:
        """The event of this frame, or SKIP. Raises InvalidEvent."""
        if self._readers is not None:
            return self._decode_typed(frame, self._readers)
        if self._reader is None:
            return frame.payload
        return self._reader.read_bare(frame.payload) if self.bare else frame.body(self._reader)

    def _decode_typed(self, frame: Frame, readers: dict[bytes, Reader]) -> Any:
        type = frame.envelope().type
        if type not in readers:
            return SKIP
        try:
            event = frame.body(readers[type])
        except InvalidEvent:
            if frame.envelope().type == type:
                raise
        else:
            if frame.envelope().type == type:
                return event
        return self._decode_typed(frame, readers)  # the long way found another type


def events_body(classes: Sequence[type[Event]]) -> Body:
    """A body of these event classes. Raises ValueError for two classes of one type, or `Event`."""
    found: dict[bytes, Reader] = {}
    for cls in classes:
        if not issubclass(cls, Event):
            raise ValueError("a union must be of event classes only")
        if cls is Event:
            raise ValueError("Event itself is no type that travels: name the classes you want")
        wire = cls.__event_type__.encode()
        if wire in found:
            raise ValueError(f"two classes have the type {cls.__event_type__!r}")
        found[wire] = event_reader(cls)
    return Body(readers=found)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, through Annotated; a single annotation is its own member."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_body(annotation: Any) -> bool:
    return all(_is_model(member) for member in _members(annotation))


def _has_discriminator(annotation: Any) -> bool:
    return any(
        isinstance(extra, FieldInfo) and extra.discriminator is not None
        for extra in get_args(annotation)[1:]
    )


def body_of(annotation: Any, bare: bool = False) -> Body:
    """The body that an annotation asks for. Raises ValueError with the reason when it cannot be."""
    if annotation is bytes:
        return Body(bare=bare)
    if annotation is dict or get_origin(annotation) is dict or annotation is Any:
        return Body(DICT, bare=bare)
    members: tuple[Any, ...] = _members(annotation)
    if not _is_body(annotation):
        raise ValueError("it is no event class, model, dict, bytes, Message or EventBus")
    if bare:
        if len(members) > 1 and not _has_discriminator(annotation):
            raise ValueError("a bare wire has no type: a union needs a discriminator of its own")
        return Body(model_reader(annotation), bare=True)
    if len(members) > 1 or all(issubclass(member, Event) for member in members):
        return events_body(members)
    return Body(model_reader(annotation))


class CallPlan:
    """How to call one handler."""

    __slots__ = (
        "_captures", "_only", "_slots", "_wants_dict", "body", "bus_name", "fn", "name",
        "needs_message", "required", "signature", "takes_event_first", "threaded",
    )  # fmt: skip

    def __init__(
        self,
        fn: Callable[..., Any],
        body: Body,
        slots: dict[str, str],
        captures: dict[str, TypeAdapter[Any] | None],
        required: frozenset[str],
        bus_name: str | None,
        only: tuple[tuple[str, Any], ...],
        signature: inspect.Signature,
    ) -> None:
        self.fn = fn
        self.signature = signature
        self.name = name_of(fn)
        self.threaded = not is_async(fn)
        self.body = body
        self.required = required
        """Captures that every pattern must have."""
        self.bus_name = bus_name
        self.needs_message = _MESSAGE in slots.values()
        self._wants_dict = _DICT in slots.values() and _BODY in slots.values()
        self._slots = slots
        self._captures = captures
        self._only = only
        self.takes_event_first = self._is_simple(slots)
        """Whether ``fn(event, **static)`` is the whole call."""

    def _is_simple(self, slots: dict[str, str]) -> bool:
        first = next(iter(self.signature.parameters.values()), None)
        return (
            list(slots.values()) == [_BODY]
            and first is not None
            and first.name in slots
            and first.kind is not first.KEYWORD_ONLY
            and len(self._only) <= 1
        )

    def static(self, captures: Mapping[str, str], bus: object) -> dict[str, Any] | None:
        """The arguments that are the same for every message of one channel; None when a capture
        does not convert."""
        found: dict[str, Any] = {}
        for name, adapter in self._captures.items():
            if name in captures:
                text = captures[name]
                try:
                    found[name] = adapter.validate_strings(text) if adapter else text
                except Exception:  # a validator is the user's code
                    return None
        if self.bus_name is not None:
            found[self.bus_name] = bus
        return found

    def check(self, frame: Frame) -> None:
        """Raise InvalidEvent when a second view of the body (a dict beside a model) is no such."""
        if self._wants_dict:
            self._table(frame)

    def _table(self, frame: Frame) -> Any:
        return DICT.read_bare(frame.payload) if self.body.bare else frame.body(DICT)

    def call(
        self, event: Any, frame: Frame, static: dict[str, Any], message: Message[Any] | None
    ) -> Any:
        """Call the handler; returns what it returns (an awaitable for `async def`)."""
        if self.takes_event_first:
            return self.fn(event, **static)
        filled = dict(static)
        for name, kind in self._slots.items():
            if kind == _BODY:
                filled[name] = event
            elif kind == _MESSAGE:
                filled[name] = message
            elif kind == _BYTES:
                filled[name] = frame.payload
            else:
                filled[name] = self._table(frame)
        return self.fn(*[filled.pop(name, default) for name, default in self._only], **filled)


def name_of(fn: Callable[..., Any]) -> str:
    """What a handler is called in stats, logs and gaps."""
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling it gives an awaitable (`async def`, also inside a partial or an object)."""
    while isinstance(fn, partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004  # an object whose __call__ is async
    )


def names_of_caller() -> Callable[[], Mapping[str, Any]]:
    """The local names of the function that called the caller: where a handler is declared inside a
    function, its annotations may be classes of that function."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    return lambda: frame.f_locals if frame else {}


def signature_of(
    fn: Callable[..., Any], local_names: Callable[[], Mapping[str, Any]]
) -> inspect.Signature:
    """The signature with its annotations evaluated; `local_names` help where a module uses
    `from __future__ import annotations` inside a function. Raises InvalidHandler."""
    try:
        return inspect.signature(fn, eval_str=True)
    except NameError:
        pass
    except Exception as error:  # an annotation is code, and may raise anything
        raise _refuse(fn, None, f"is not a handler: its signature is unknown ({error})") from None
    try:
        return inspect.signature(fn, eval_str=True, locals=local_names())
    except Exception as error:
        raise _refuse(fn, None, f"has an annotation that is not known here: {error}") from None


def _refuse(fn: Callable[..., Any], parameter: str | None, problem: str) -> InvalidHandler:
    where = f"parameter {parameter!r} of handler" if parameter else "handler"
    return InvalidHandler(
        f"{where} {name_of(fn)!r} {problem}", handler=name_of(fn), parameter=parameter
    )


def _kind_of(annotation: Any) -> str | None:
    if annotation is Message or get_origin(annotation) is Message:
        return _MESSAGE
    if annotation is dict or get_origin(annotation) is dict:
        return _DICT
    if annotation is bytes:
        return _BYTES
    if isinstance(annotation, type) and getattr(annotation, "__is_bus__", False):
        return _BUS
    if annotation is not inspect.Parameter.empty and _is_body(annotation):
        return _BODY
    return None


def plan_call(
    fn: Callable[..., Any],
    patterns: Sequence[Pattern],
    *,
    bare: bool = False,
    local_names: Callable[[], Mapping[str, Any]] = dict,
    signature: inspect.Signature | None = None,
) -> CallPlan:
    """The plan for calling `fn` for messages of these patterns.

    Raises InvalidHandler, naming the parameter and what could have filled it.
    """
    if not callable(fn):
        raise InvalidHandler(f"a handler is a function, not {type(fn).__name__}")
    named = {name for pattern in patterns for name in pattern.captures}
    common = named.intersection(*(pattern.captures for pattern in patterns))
    captures: dict[str, TypeAdapter[Any] | None] = {}
    required: set[str] = set()
    slots: dict[str, str] = {}
    asked: dict[str, tuple[str, Any]] = {}
    only: list[tuple[str, Any]] = []
    bus_name: str | None = None
    signature = signature or signature_of(fn, local_names)
    for name, parameter in signature.parameters.items():
        optional = parameter.default is not parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in named:
            if name not in common and not optional:
                raise _refuse(
                    fn, name, "is a capture that not every pattern has; give it a default"
                )
            captures[name] = _converter(fn, name, parameter.annotation)
            if not optional:
                required.add(name)
        else:
            kind = _kind_of(parameter.annotation)
            if kind is None and not optional:
                available = ", ".join(sorted(named)) or "none"
                raise _refuse(
                    fn,
                    name,
                    f"cannot be filled. Captures here: {available}. Otherwise annotate it with an"
                    " Event class, a pydantic model, dict, bytes, Message or EventBus",
                )
            if kind in asked:
                raise _refuse(fn, name, f"is the second of its kind ({kind}); one is enough")
            if kind is not None:
                asked[kind] = (name, parameter.annotation)
                if kind == _BUS:
                    bus_name = name
                else:
                    slots[name] = kind
        if parameter.kind is parameter.POSITIONAL_ONLY:
            only.append((name, parameter.default))
    body = _choose_body(fn, asked, bare)
    needed = frozenset(required)
    return CallPlan(fn, body, slots, captures, needed, bus_name, tuple(only), signature)


def _converter(fn: Callable[..., Any], name: str, annotation: Any) -> TypeAdapter[Any] | None:
    if annotation in (inspect.Parameter.empty, str, Any):
        return None
    try:
        return TypeAdapter(annotation)
    except Exception as error:  # pydantic raises many kinds for what it cannot validate
        raise _refuse(fn, name, f"is a capture, which no text converts to: {error}") from None


def _choose_body(fn: Callable[..., Any], asked: Mapping[str, tuple[str, Any]], bare: bool) -> Body:
    """The one body of a handler: its event parameter, else its Message, else its dict or bytes."""
    name, message = asked.get(_MESSAGE, (None, None))
    inner = (*get_args(message), None)[0]
    if isinstance(inner, typing.TypeVar):
        inner = None
    if _BODY in asked:
        name, first = asked[_BODY]
        if inner is not None and inner != first:
            raise _refuse(fn, name, f"is {first!r} beside Message of {inner!r}: one event only")
    elif message is not None:
        first = dict if inner is None else inner
    elif _DICT in asked or _BYTES in asked:
        name, first = asked.get(_DICT) or asked[_BYTES]
    else:
        return Body(bare=bare)
    try:
        return body_of(first, bare)
    except ValueError as problem:
        raise _refuse(fn, name, f"cannot be {first!r}: {problem}") from None


def stream_body(types: Sequence[Any], bare: bool) -> Body:
    """The body of `bus.subscribe`: event classes, or one other type; default dict.

    Raises InvalidHandler.
    """
    try:
        if len(types) > 1 and not bare and all(map(_is_model, types)):
            return events_body(types)
        if len(types) > 1:
            raise ValueError("name event classes, or one other type")
        return body_of(types[0] if types else dict, bare)
    except ValueError as problem:
        raise InvalidHandler(f"subscribe cannot take {list(types)!r}: {problem}") from None
