"""`tail`: what passes on a real server, as lines."""

from __future__ import annotations

import json
import re
import signal
import subprocess

import pytest

from eventbus.server import Server
from tests.cli.shop import Payment
from tests.cli.tool import LIMIT, SHOP, ended, on_screen, read_screen, say, started, tail
from tests.helpers import foreign

HOSTILE = bytes(range(256)) + "\u202e\u2028\x9b2J\u200b日本".encode()


def test_tail_lines(valkey: Server) -> None:
    """A line has the time, the channel, the type and the data; it ends after the count, with 0."""
    with tail(valkey.url, "tail-a:*", "--count", "2") as process:
        say(valkey.url, ("tail-a:1", Payment(shop="é", cents=3)), ("tail-a:2", b"{}"))
        shown = ended(process)
    first, second = shown.out.splitlines()
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} tail-a:1 Payment \{"shop":"é","cents":3\}', first
    ), first
    assert second.endswith(" tail-a:2 - {}")
    assert (shown.code, shown.err) == (0, "")


def test_tail_shows_strangers_harmlessly(valkey: Server) -> None:
    """Whatever is in a channel, a type or a payload: a line is printable, and one message is one
    line; so in JSON, in ASCII."""
    channel = "tail-b:\u202e\u200b"
    told = [
        (channel, HOSTILE),
        (channel, foreign(type="t\x1b[2J\n", data={"a\x1b": "\x07\x7f"})),
        (channel, b'{"specversion":"1.0","id":"1","source":"s","type":"t","data":' + b"[" * 5000),
    ]
    with (
        tail(valkey.url, "tail-b:*", "-n", "3") as text,
        tail(valkey.url, "tail-b:*", "-n", "3", "--json") as as_json,
    ):
        say(valkey.url, *told)
        lines = ended(text).out.split("\n")
        objects = ended(as_json).out
    assert lines.pop() == ""
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "\\u202e\\u200b" in lines[0]
    assert "\\x1b[2J" in lines[1]
    assert objects.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", objects)
    found = [json.loads(line) for line in objects.splitlines()]
    assert [record["channel"] for record in found] == [channel] * 3
    assert found[0]["payload"].endswith("日本")
    assert found[1]["type"] == "t\x1b[2J\n"
    assert found[1]["data"] == {"a\x1b": "\x07\x7f"}


def test_tail_raw_is_the_bytes(valkey: Server) -> None:
    """--raw writes each payload as it is, and a line feed."""
    with tail(valkey.url, "tail-c", "--raw", "-n", "2") as process:
        say(valkey.url, ("tail-c", HOSTILE), ("tail-c", b""))
        out, _ = process.communicate(timeout=LIMIT)
    assert out == HOSTILE + b"\n\n"


def test_tail_typed(valkey: Server) -> None:
    """With --app an event is a value of its class, and data that does not fit says why."""
    wrong = foreign(type="Payment", data={"shop": 1, "cents": "geheim"})
    with tail(valkey.url, "tail-d:*", "--app", f"{SHOP}:bus", "-n", "2") as process:
        say(valkey.url, ("tail-d:1", Payment(shop="a", cents=3)), ("tail-d:1", wrong))
        first, second = ended(process).out.splitlines()
    assert first.endswith(" tail-d:1 Payment(shop='a', cents=3)")
    assert "does not fit Payment: shop: Input should be a valid string; cents: Input" in second
    assert "geheim" not in second


def test_tail_with_a_namespace(valkey: Server) -> None:
    """--namespace hears that namespace alone, and shows names without it."""
    with tail(valkey.url, "tail-e", "--namespace", "blue", "-n", "1", "--json") as process:
        say(valkey.url, ("tail-e", b"other"), ("blue:tail-e", b"ours"))
        record = json.loads(ended(process).out)
    assert record == {"channel": "tail-e", "payload": "ours"}


def test_tail_shows_gaps_and_reconnects() -> None:
    """A hole in a source's numbers, a lost connection and the reconnect stand in the stream."""
    with Server() as server, tail(server.url, "gap:*", "-n", "3") as process:
        say(
            server.url,
            ("gap:1", foreign(type="T", source="s", busseq=1)),
            ("gap:1", foreign(type="T", source="s", busseq=5)),
        )
        server.kill()
        server.start()
        assert process.stdout is not None
        lines = []
        while not lines or "connected again: messages since" not in lines[-1]:
            lines.append(process.stdout.readline().decode())
            assert lines[-1], lines
        say(server.url, ("gap:1", b"{}"))
        ended(process)
    told = "".join(lines)
    assert re.search(r"-- gap \(sequence\) on gap:1 since [\d:]+: 3 messages missed\n", told)
    assert "-- subscriber unix://" in told


def test_tail_tells_gaps_in_json() -> None:
    """In JSON a gap is an object of its own."""
    with Server() as server, tail(server.url, "gap:*", "-n", "2", "--json") as process:
        say(
            server.url,
            ("gap:1", foreign(type="T", source="s", busseq=1)),
            ("gap:1", foreign(type="T", source="s", busseq=5)),
            ("gap:1", b"end"),
        )
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        ended(process)
    gaps = [line["gap"] for line in lines if "gap" in line]
    assert [(gap["reason"], gap["channel"], gap["missed"]) for gap in gaps] == [
        ("sequence", "gap:1", 3)
    ]


def test_tail_raw_tells_gaps_beside() -> None:
    """With --raw a gap goes to standard error: nothing but payloads is in the stream."""
    second = foreign(type="T", source="s", busseq=5)
    with Server() as server, tail(server.url, "gap:*", "-n", "2", "--raw") as process:
        say(server.url, ("gap:1", foreign(type="T", source="s", busseq=1)), ("gap:1", second))
        shown = ended(process)
    assert shown.out.endswith(second.decode() + "\n")
    assert shown.out.count("\n") == 2
    assert "gap (sequence) on gap:1" in shown.err


def test_tail_ends_in_time(valkey: Server) -> None:
    """--timeout ends it: with 0, or with 1 when a count was asked for and not reached."""
    with (
        started("tail", "silence", "--timeout", "0.1", url=valkey.url) as free,
        started("tail", "silence", "-t", "0.1", "-n", "1", url=valkey.url) as counted,
    ):
        assert ended(free)[:2] == (0, "")
        assert ended(counted)[:2] == (1, "")


def test_tail_rate(valkey: Server) -> None:
    """--rate counts messages, bytes and channels in place of showing them."""
    with tail(valkey.url, "tail-f:*", "--rate", "-n", "4") as process:
        say(valkey.url, *[(f"tail-f:{n % 2}", b"x" * 100) for n in range(4)])
        out = ended(process).out
    assert re.search(r" +[\d,]+ messages/s +[\d.]+ k?B/s   2 channels\n", out), out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_tail_is_interrupted(valkey: Server, number: int, code: int) -> None:
    """ctrl-c and SIGTERM end it without a word."""
    with tail(valkey.url, "silence") as process:
        process.send_signal(number)
        assert ended(process) == (code, "", "")


def test_tail_into_a_closed_pipe(valkey: Server) -> None:
    """A reader that has gone (`| head`) ends it without a word."""
    with tail(valkey.url, "tail-g", "--raw") as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        say(valkey.url, ("tail-g", b"x"))
        shown = subprocess.Popen.communicate(process, timeout=LIMIT)
    assert (process.returncode, shown[1]) == (141, b"")


@pytest.mark.parametrize("plain", [False, True])
def test_tail_on_a_screen(valkey: Server, plain: bool) -> None:
    """On a terminal there is colour, unless NO_COLOR is set, and a line is cut to the width."""
    more = {"NO_COLOR": "1"} if plain else {}
    with on_screen(["tail", "tail-h", "-n", "1"], valkey.url, **more) as (_, screen):
        read_screen(screen, "ends\r\n")
        say(valkey.url, ("tail-h", b"x" * 500))
        line = read_screen(screen, "xx…").splitlines()[-1]
    assert ("\x1b[" in line) is not plain
    assert len(re.sub(r"\x1b\[\d+m", "", line)) == 80
