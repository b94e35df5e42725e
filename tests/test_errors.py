"""The tree of errors: what programs catch, read and pass on."""

from __future__ import annotations

import copy
import pickle

import pytest

import eventbus
from eventbus import _errors
from eventbus._errors import EventBusError

CLASSES = {
    name: found
    for name, found in vars(_errors).items()
    if isinstance(found, type) and issubclass(found, Exception)
}
# Each with the builtin that it also is, and its fields when nobody sets them.
TREE: dict[str, tuple[type[Exception], dict[str, object]]] = {
    "EventBusError": (Exception, {}),
    "BusClosed": (Exception, {}),
    "BusUnavailable": (Exception, {"channel": None, "id": None, "waited": 0.0}),
    "PublishUncertain": (Exception, {"channel": None, "id": None, "waited": 0.0}),
    "PermissionDenied": (Exception, {"patterns": (), "channel": None, "user": None}),
    "PayloadTooLarge": (ValueError, {"channel": None, "size": 0}),
    "InvalidEvent": (ValueError, {"type": None, "channel": None, "reasons": ()}),
    "InvalidChannel": (ValueError, {"channel": None}),
    "InvalidPattern": (ValueError, {"pattern": None}),
    "InvalidHandler": (TypeError, {"handler": None, "parameter": None}),
}


def test_the_tree_is_whole() -> None:
    """These are all the errors, and the module's picture of them shows each one."""
    assert CLASSES.keys() == TREE.keys()
    picture = str(_errors.__doc__)
    assert [name for name in TREE if name not in picture] == []


@pytest.mark.parametrize("name", TREE)
def test_one_error(name: str) -> None:
    """An error has one parent of ours, is the builtin that fits, is public, and says what it is."""
    error, (builtin, fields) = CLASSES[name], TREE[name]
    assert issubclass(error, EventBusError)
    assert issubclass(error, builtin)
    assert getattr(eventbus, name) is error
    assert error.__doc__
    assert error.__mro__[1] is EventBusError or error is EventBusError
    raised = error("what happened")
    assert str(raised) == "what happened"
    assert {field: getattr(raised, field) for field in fields} == fields


@pytest.mark.parametrize("name", TREE)
def test_fields(name: str) -> None:
    """Facts given as keywords are attributes, and survive copying and pickling with the text."""
    fields = {field: f"a {field}" for field in TREE[name][1]}
    error = CLASSES[name]("what happened", **fields)
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is CLASSES[name]
        assert str(same) == "what happened"
        assert {field: getattr(same, field) for field in fields} == fields
    assert {field: getattr(CLASSES[name](), field) for field in fields} == TREE[name][1]


def test_no_message() -> None:
    """An error without a text is empty and has its defaults."""
    assert str(_errors.BusUnavailable(waited=2.0)) == ""
    assert _errors.BusUnavailable(waited=2.0).waited == 2.0
