"""Events: the typed, frozen values that travel on the bus.

An event class says its wire name (`type`) and, if it likes, the channel that its values belong on
(a template filled from its own fields). There is no registry: a handler knows the classes it names.
Pure; only what is true of event classes alone may enter.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from eventbus._errors import InvalidChannel, InvalidEvent
from eventbus._patterns import Template

_SCALARS = (str, int, UUID)  # bool is an int


class Event(BaseModel):
    """The base of all events: ``class MessageSent(Event, channel="chat:{room}")``.

    Class keywords: `type`, the name on the wire (default: the class name; never inherited), and
    `channel`, a template rendered from the fields of the same name (inherited). Instances are
    frozen; unknown fields are ignored, so that a newer publisher does not break an older
    subscriber.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    __event_type__: ClassVar[str] = "Event"
    __event_template__: ClassVar[Template | None] = None

    def __init_subclass__(
        cls, *, type: str | None = None, channel: str | None = None, **kwargs: Any
    ) -> None:
        """Take the class keywords; they are read once the fields are known."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, type: str | None = None, channel: str | None = None, **kwargs: Any
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.__name__ if type is None else type
        if not name or not name.isprintable() or '"' in name or "\\" in name or len(name) > 256:
            raise InvalidEvent(
                f"the type of {cls.__qualname__} is {name!a:.200}: it must be 1 to 256 printable"
                " characters without quotes or backslashes",
                type=name,
            )
        cls.__event_type__ = name
        if channel is not None:
            cls.__event_template__ = Template(channel)
        if cls.__event_template__ is not None:
            _check_fields(cls, cls.__event_template__)


def _check_fields(cls: type[Event], template: Template) -> None:
    for name in template.fields:
        field = cls.model_fields.get(name)
        if field is None:
            raise InvalidChannel(
                f"the channel template {template.text!a} of {cls.__qualname__} names {name!r},"
                f" which is not a field (fields: {', '.join(cls.model_fields) or 'none'})",
                channel=template.text,
            )
        if cls.__pydantic_complete__ and not _is_scalar(field.annotation):
            raise InvalidChannel(
                f"field {name!r} of {cls.__qualname__} is in its channel template and must be str,"
                f" int, bool, UUID or an enum of these, not {field.annotation!r}",
                channel=template.text,
            )


def _is_scalar(annotation: Any) -> bool:
    while hasattr(annotation, "__supertype__"):  # typing.NewType
        annotation = annotation.__supertype__
    if not isinstance(annotation, type):
        return False
    if issubclass(annotation, Enum):
        return all(isinstance(member.value, _SCALARS) for member in annotation)
    return issubclass(annotation, _SCALARS)


def _spell(value: object) -> str:
    """A template value as its JSON scalar, without quotes."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, UUID)):
        return str(value)
    raise InvalidChannel(f"a {type(value).__name__} has no place in a channel name")


def template_of(cls: type[Event]) -> Template:
    """The channel template of an event class. Raises InvalidChannel when it has none."""
    template = cls.__event_template__
    if template is None:
        raise InvalidChannel(
            f"{cls.__qualname__} has no channel template: name a channel, or declare one as"
            f' `class {cls.__name__}(Event, channel="...")`'
        )
    return template


def channel_of(event: Event) -> str:
    """The channel that an event belongs on, rendered from its fields. Raises InvalidChannel."""
    template = template_of(type(event))
    return template.render({name: _spell(getattr(event, name)) for name in template.fields})
