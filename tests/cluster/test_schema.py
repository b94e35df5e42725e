"""The document of `eventbus schema`, judged by AsyncAPI's own JSON schema.

The schema comes with the package `@asyncapi/specs` of npm. Python's `jsonschema` reads it: it is
written in draft 7, and needs no network, since all its parts are in the one file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from eventbus import EventBus
from eventbus.cli.schema import document_of
from tests.cli import shop

pytestmark = pytest.mark.cluster

VERSIONS = ("3.0.0", "3.1.0")


@pytest.fixture(params=VERSIONS)
def judge(request: pytest.FixtureRequest, node_modules: Path) -> Any:
    """The official schema of one version, ready to judge documents that say this version."""
    folder = node_modules / "node_modules" / "@asyncapi" / "specs" / "schemas"
    schema = json.loads((folder / f"{request.param}.json").read_text(encoding="utf-8"))
    judge = jsonschema.Draft7Validator(schema)

    def errors(document: dict[str, Any]) -> list[str]:
        judged = json.loads(json.dumps({**document, "asyncapi": request.param}))
        found = []
        for error in judge.iter_errors(judged):
            best = jsonschema.exceptions.best_match([error])
            found.append(f"{best.json_path}: {best.message}"[:500])
        return found

    return errors


def test_the_document_is_valid(judge: Any) -> None:
    """A bus with every kind of route, field and pattern has a valid document."""
    document = document_of(shop.bus, [shop.Closed], "shop", "1.0")
    assert judge(document) == []


def test_an_empty_bus_is_valid(judge: Any) -> None:
    """So has a bus that listens to nothing."""
    assert judge(document_of(EventBus("memory://empty"), [], "empty", "1.0")) == []


@pytest.mark.parametrize(
    "path, value",
    [
        (("channels", "pay_shop", "parameters", "shop", "location"), "here"),
        (("operations", "receive-book", "action"), "listen"),
        (("components", "schemas", "Moved", "properties", "pet", "discriminator"), {"a": 1}),
        (("info",), {"title": "x"}),
    ],
)
def test_the_judge_finds_faults(judge: Any, path: tuple[str, ...], value: object) -> None:
    """A document with one fault is not valid: the schema does look at these places."""
    document = json.loads(json.dumps(document_of(shop.bus, [shop.Closed], "shop", "1.0")))
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert judge(document)
