"""`doctor`, `schema`, `acl` and `bench`: what they find, on servers that are as they should be and
on others."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from redis import Redis

from eventbus import Event, EventBus
from eventbus.cli import bench as measured
from eventbus.cli import checks
from eventbus.cli.schema import address_of, document_of, turned
from eventbus.server import Server
from tests.cli import shop
from tests.cli.tool import SHOP, Tool

APP = ["--app", f"{SHOP}:bus"]


def findings(out: str) -> dict[str, tuple[str, str]]:
    """What each finding is about: its level, and all its words."""
    found: dict[str, tuple[str, str]] = {}
    for line in out.splitlines():
        if match := re.match(r"(ok|info|warn|fail) {1,4}(\S.{12}\S| {0}\S.{13}) (.*)", line):
            about, words = match[2].strip(), match[3]
            found[about] = (match[1], words)
        elif line.startswith(" ") and found:
            level, words = found[about]
            found[about] = (level, f"{words} {line.strip()}")
    return found


@pytest.fixture
def own() -> Any:
    """A server that a test may configure, and a client of it."""
    with Server() as server, Redis(unix_socket_path=server.socket_path) as client:
        yield server, client


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_finds_nothing(tool: Tool, server: Server) -> None:
    """On a fresh server with an application all is well, in 80 columns, and the code is 0."""
    shown = tool("doctor", *APP, "--url", server.url)
    found = findings(shown.out)
    assert (shown.code, shown.err) == (0, ""), shown.out
    assert shown.out.endswith("0 faults, 0 warnings\n")
    assert {level for level, _ in found.values()} == {"ok", "info"}
    expected = "client reachable end_to_end round_trip user server output_buffer patterns rules"
    assert [name.replace(" ", "_") for name in found] == expected.split()
    assert "redis 8." in found["client"][1] or "redis 7." in found["client"][1]
    assert re.match(r"(Redis|Valkey) \d+\.\d+\.\d+, standalone, master", found["server"][1])
    assert "32 MiB, or 8 MiB for 60 s" in found["output buffer"][1]
    assert found["rules"][1].startswith("default may do all")
    assert max(map(len, shown.out.splitlines())) <= 80


def test_doctor_starts_no_server(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded server that is not running is a finding: it is named, and stays stopped."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("EVENTBUS_URL", "embedded://absent")
    for words in ([], ["--url", "embedded://absent"]):
        shown = tool("doctor", *words)
        level, text = findings(shown.out)["reachable"]
        assert (shown.code, level) == (3, "fail")
        assert "'absent' is not running" in text
        assert "eventbus server start absent" in text
    assert tool("server", "status", "absent").out.startswith("stopped")


def test_doctor_of_a_restricted_user(tool: Tool, own: tuple[Server, Redis]) -> None:
    """A user with exactly the rules that `acl` prints may do all; what it may not ask is said."""
    server, client = own
    line = tool("acl", f"{SHOP}:bus", "--user", "shop").out
    words = line.replace("'>PASSWORD'", ">geheim").split()
    client.execute_command(*words)
    url = f"unix://shop:geheim@{server.socket_path}"
    shown = tool("doctor", *APP, "--url", url)
    found = findings(shown.out)
    assert shown.code == 0, shown.out
    assert found["end to end"][0] == "ok"
    assert found["rules"][0] == "ok"
    assert "ACL DRYRUN is refused, so subscribing was tried" in found["rules"][1]
    assert "CONFIG GET client-output-buffer-limit" in found["not looked at"][1]
    assert "geheim" not in shown.out


def test_doctor_finds_denied_patterns(tool: Tool, own: tuple[Server, Redis]) -> None:
    """A user that lacks rules is told which, by the dry run and, without it, by trying."""
    server, client = own
    client.execute_command("ACL", "SETUSER", "shop", "on", ">geheim", "+@all", "&pay:*")
    client.execute_command("ACL", "SETUSER", "poor", "on", ">geheim", "+@all", "-acl", "&pay:*")
    dry = tool("doctor", *APP, "--url", f"unix://shop:geheim@{server.socket_path}")
    tried = tool("doctor", *APP, "--url", f"unix://poor:geheim@{server.socket_path}")
    other = tool("doctor", *APP, "--url", server.url, "--user", "shop")
    level, words = findings(dry.out)["rules"]
    assert (dry.code, level) == (1, "fail")
    assert "shop may not: PUBLISH refund" in words
    assert "PSUBSCRIBE more:*" in words
    assert "do: ACL SETUSER shop &refund:[ab]?:" in words
    assert "pay:*" not in words
    assert findings(dry.out)["end to end"][0] == "warn"
    level, words = findings(tried.out)["rules"]
    assert (tried.code, level) == (1, "fail")
    assert "may not listen to refund:[ab]?:" in words
    assert "more:{deep:path}" in words
    assert (other.code, findings(other.out)["rules"][0]) == (1, "fail")
    assert "1 fault, " in other.out


def test_doctor_is_refused(tool: Tool, own: tuple[Server, Redis]) -> None:
    """A wrong password ends with 3, and is not repeated."""
    server, client = own
    client.execute_command("ACL", "SETUSER", "default", "resetpass", ">right")
    shown = tool("doctor", "--url", f"unix://:geheim@{server.socket_path}")
    assert shown.code == 3
    assert findings(shown.out)["reachable"][0] == "fail"
    assert "geheim" not in shown.out + shown.err


def test_doctor_of_a_bad_server(tool: Tool, own: tuple[Server, Redis]) -> None:
    """Limits that hurt subscribers, too many patterns, and a database number are warnings, each
    with what to do."""
    server, client = own
    client.config_set("client-output-buffer-limit", "pubsub 1mb 512 10")
    client.config_set("maxmemory-clients", "5g")
    listener = client.pubsub()
    listener.psubscribe(*(f"x{number}:*" for number in range(1_001)))
    while not listener.get_message(timeout=5):
        pass
    shown = tool("doctor", "--url", f"unix://{server.socket_path}?db=3")
    listener.close()
    found = findings(shown.out)
    assert shown.code == 0
    for about in ("output buffer", "client memory", "patterns", "database"):
        assert found[about][0] == "warn", about
        assert " do: " in found[about][1]
    assert "1 MiB, or 512 bytes for 10 s" in found["output buffer"][1]
    assert "names database 3, and Pub/Sub ignores it" in found["database"][1]
    assert "0 faults, 4 warnings" in shown.out
    client.config_set("client-output-buffer-limit", "pubsub 0 0 0")
    shown = tool("doctor", "--url", server.url)
    assert "is never closed" in findings(shown.out)["output buffer"][1]


def test_doctor_of_an_empty_application(tool: Tool, valkey: Server) -> None:
    """An application without handlers is told so, unless it says what it publishes."""
    words = ["doctor", "--app", "tests.cli.test_look:EMPTY", "--url", valkey.url]
    assert "names no event" in findings(tool(*words).out)["rules"][1]
    told = tool(*words, "--publishes", f"{SHOP}:Closed")
    assert findings(told.out)["rules"][0] == "ok"


EMPTY = EventBus("redis://localhost:1")


@pytest.mark.parametrize(
    "info, level, told",
    [
        ({"redis_version": "5.0.1", "redis_mode": "standalone"}, "warn", "upgrade"),
        ({"redis_version": "7.2.0", "role": "slave"}, "fail", "its own subscribers alone"),
        ({"redis_version": "7.2.0", "redis_mode": "cluster", "role": "master"}, "warn", "every"),
        ({"server_name": "valkey", "valkey_version": "9.1"}, "ok", "Valkey 9.1"),
    ],
)
def test_kinds_of_servers(info: dict[str, str], level: str, told: str) -> None:
    """A replica is a fault, a cluster and an old version are warnings."""
    (found,) = checks.of_version(info)
    assert found.level == level
    assert told in found.text + found.do


class Answers:
    """What a bus and its client say, for what no server near here is like."""

    class Pool:  # noqa: D106
        connection_kwargs = {"ssl_cert_reqs": "none", "db": 0}  # noqa: RUF012

    connection_pool = Pool()
    refused: list[str]

    def __init__(self) -> None:
        self.redis = self
        self.refused = []

    def __repr__(self) -> str:
        return "<EventBus x live at redis://far.example:6379>"

    async def ping(self) -> bool:
        return True

    async def ask(self, what: str, answer: Any) -> Any:
        return await answer

    async def text(self, *words: str) -> str:
        return "default"


async def test_a_far_server_without_protection() -> None:
    """No encryption, no check of the certificate, and no password are warnings, far from here."""
    answers: Any = Answers()
    found = {item.about: item for item in await checks.of_connection(answers, answers)}
    assert {about for about, item in found.items() if item.level == "warn"} == {
        "encryption",
        "certificate",
        "user",
    }
    assert all(item.do for item in found.values() if item.level == "warn")


def test_clients_that_were_closed() -> None:
    """Subscribers that the server had to close are a warning, whatever the limit is."""
    found = checks.of_buffer("normal 0 0 0 slave 1 1 1 pubsub 33554432 8388608 60", closed=2)
    assert found.level == "warn"
    assert "it happened to 2 clients" in found.text


# -- acl -------------------------------------------------------------------------------------------


def test_acl(tool: Tool) -> None:
    """One line for Redis, with the rules of `bus.acl()`, and no password."""
    shown = tool("acl", f"{SHOP}:bus", "--role", "publisher", "--publishes", f"{SHOP}:Payment")
    assert shown.code == 0
    rules = " ".join(shop.bus.acl(shop.Payment).publisher)
    assert shown.out == f"ACL SETUSER NAME on '>PASSWORD' {rules}\n"
    nothing = tool("acl", "tests.cli.test_look:EMPTY")
    assert nothing.code == 2
    assert "has no handlers" in nothing.err


# -- bench -----------------------------------------------------------------------------------------


def test_bench(tool: Tool, valkey: Server) -> None:
    """It names the server and the client, and no message is lost."""
    shown = tool("bench", "--seconds", "0.2", "--url", valkey.url)
    assert shown.code == 0, shown.out
    assert [line.split()[0] for line in shown.out.splitlines()] == [
        "server", "client", "latency", "publish", "receive", "lost",
    ]  # fmt: skip
    assert "lost      0 (0 dropped, 0 missed)" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 100


def test_bench_finds_a_loss(tool: Tool, valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that does not arrive is counted, and the code is 1."""

    async def flood(bus: EventBus, channel: str, *, until: float) -> int:
        return 1  # and sends none

    monkeypatch.setattr(measured, "flood", flood)
    monkeypatch.setattr(measured, "_GRACE", 0.1)
    shown = tool("bench", "--seconds", "0.2", "--url", valkey.url)
    assert shown.code == 1
    assert "lost      1 (0 dropped, 0 missed)" in shown.out


# -- schema ----------------------------------------------------------------------------------------


def references(node: object) -> list[str]:
    """Every `$ref` in a document."""
    if isinstance(node, dict):
        own_ref = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own_ref + [ref for item in node.values() for ref in references(item)]
    if isinstance(node, list):
        return [ref for item in node for ref in references(item)]
    return []


def find(document: Any, ref: str) -> Any:
    """What a reference leads to."""
    for part in ref.removeprefix("#/").split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


def test_schema(tool: Tool) -> None:
    """Every event and every pattern is in the document, every reference leads somewhere, and the
    parameters are those of the addresses."""
    shown = tool("schema", f"{SHOP}:bus", "--publishes", f"{SHOP}:Closed", "--release", "1.2")
    assert shown.code == 0, shown.err
    document = json.loads(shown.out)
    assert document["info"] == {"title": SHOP, "version": "1.2"}
    for ref in references(document):
        assert find(document, ref) is not None
    addresses = {}
    for channel in document["channels"].values():
        named = re.findall(r"\{(\w+)\}", channel["address"])
        assert named == list(channel.get("parameters", {}))
        addresses[channel["address"]] = channel
    assert list(addresses) == [
        "pay:{shop}", "stock:{any1}x{any2}:{size}:{path}", "closed:{shop}", "pay:{any1}",
        "refund:{any1}{any2}:{any3}x{any4}*", "bare:{any1}:{any2}", "more:{deep}",
    ]  # fmt: skip
    assert addresses["pay:{any1}"]["x-eventbus-pattern"] == "pay:*"
    assert addresses["pay:{shop}"]["parameters"]["shop"] == {
        "description": "a segment without a colon",
        "location": "$message.payload#/data/shop",
    }
    assert set(document["components"]["messages"]) == {
        "Payment", "stock.moved", "Closed", "any", "Payment-bare",
    }  # fmt: skip
    operations = document["operations"]
    assert {key: body["action"] for key, body in operations.items()} == {
        "send-Closed": "send", "receive-book": "receive", "receive-anything": "receive",
        "receive-anything-2": "receive", "receive-moved": "receive", "receive-bare": "receive",
        "receive-union": "receive",
    }  # fmt: skip
    assert operations["receive-book"]["summary"] == "Write it down."
    assert len(operations["receive-union"]["messages"]) == 2


def test_schema_has_the_namespace() -> None:
    """Addresses are what is on the wire."""
    bus = EventBus("memory://schema", namespace="blue")
    bus.on("pay:*")(shop.book)
    (channel, other) = document_of(bus, [], "x", "1")["channels"].values()
    assert channel["address"] == "blue:pay:{shop}"
    assert other["address"] == "blue:pay:{any1}"


def test_the_dialect_is_that_of_asyncapi() -> None:
    """Tuples and discriminators are spelled as in draft 7; properties of those names are not
    touched."""
    (schema,) = [
        body
        for name, body in document_of(shop.bus, [], "x", "1")["components"]["schemas"].items()
        if name == "Moved"
    ]
    fields = schema["properties"]
    assert fields["place"]["items"] == [{"type": "integer"}, {"type": "string"}]
    assert fields["places"]["items"] == {"type": "integer"}
    assert fields["pet"]["discriminator"] == "kind"
    assert isinstance(fields["discriminator"], dict)
    assert turned({"prefixItems": [True], "items": False}) == {
        "items": [True],
        "additionalItems": False,
    }


@pytest.mark.parametrize(
    "pattern, address",
    [
        ("a", "a"),
        ("a:*", "a:{any1}"),
        ("{any1}:*?", "{any1}:{any2}{any3}"),
        (r"a\*[^\]x]b", "a*{any1}b"),
        ("{{{x}}}", "{any1}{x}{any2}"),
        ("[", "{any1}"),
        ("[]x", "{any1}x"),
        ("é:{é}", "é:{_}"),
        ("\\", "\\"),
    ],
)
def test_addresses(pattern: str, address: str) -> None:
    """What is variable in a pattern is a parameter, what is literal stays."""
    EventBus("memory://schema").on_gap(pattern)
    found = address_of(pattern)
    assert found.text == address
    assert re.findall(r"\{(\w+)\}", address) == list(found.parameters)


def test_a_field_without_a_schema(tool: Tool) -> None:
    """A type that JSON Schema cannot describe is named."""
    shown = tool("schema", f"{SHOP}:bus", "--publishes", "tests.cli.test_look:Odd")
    assert shown.code == 2
    assert "JSON Schema cannot describe" in shown.err


class Odd(Event):
    model_config = {"arbitrary_types_allowed": True}  # noqa: RUF012
    path: re.Pattern[str] | Path | type[BaseModel]
    loop: asyncio.AbstractEventLoop
