"""`publish` and `top`: speaking by hand, and the table of who speaks."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from eventbus.cli.top import Table, age
from eventbus.server import Server
from tests.cli.tool import (
    LIMIT,
    SHOP,
    Tool,
    ended,
    on_screen,
    read_screen,
    say,
    started,
    tail,
)
from tests.helpers import foreign


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Make these bytes the standard input."""
    files: list[IO[str]] = []

    def make(data: bytes) -> None:
        path = tmp_path / "input"
        path.write_bytes(data)
        files.append(path.open())
        monkeypatch.setattr(sys, "stdin", files[-1])

    yield make
    for file in files:
        file.close()


# -- publish ---------------------------------------------------------------------------------------


def test_publish_counts_copies(tool: Tool, valkey: Server) -> None:
    """It says how many copies Redis handed out, over all that it published."""
    with tail(valkey.url, "publish-a", "-n", "3", "--json") as process:
        shown = tool(
            "publish", "publish-a", '{"text":"hi"}', "--type", "T", "-n", "3", "--url", valkey.url
        )
        found = [json.loads(line) for line in ended(process).out.splitlines()]
    assert shown.code == 0
    assert shown.err == ""
    assert shown.out == (
        f"published 3 events on publish-a at {valkey.url}: Redis handed out 3 copies\n"
    )
    assert [(r["type"], r["data"], r["sequence"]) for r in found] == [
        ("T", {"text": "hi"}, n) for n in (1, 2, 3)
    ]
    assert found[0]["source"].startswith("cli/")


def test_publish_to_nobody(tool: Tool, valkey: Server) -> None:
    """Without a listener it says so, and what to look at; the code is 0, since it was published."""
    shown = tool("publish", "nobody", "{}", "--url", valkey.url)
    assert shown.code == 0
    assert "handed out 0 copies" in shown.out
    assert "hint: nobody listens" in shown.err


def test_publish_typed(tool: Tool, valkey: Server) -> None:
    """With --app the data is read as the class that --type names."""
    with tail(valkey.url, "pay:1", "-n", "1", "--json") as process:
        shown = tool(
            "publish", "pay:1", '{"shop":"1","cents":"3"}', "--type", "Payment",
            "--app", f"{SHOP}:bus", "--url", valkey.url,
        )  # fmt: skip
        record = json.loads(ended(process).out)
    assert shown.code == 0
    assert (record["type"], record["data"]) == ("Payment", {"shop": "1", "cents": 3})


def test_publish_the_only_class(tool: Tool, valkey: Server) -> None:
    """An application with one event class needs no --type."""
    words = ["publish", "work:1", '{"job":"1"}', "--app", "tests.cli.slow:bus"]
    assert tool(*words, "--url", valkey.url).code == 0


@pytest.mark.parametrize("raw", [False, True])
def test_publish_stdin(
    tool: Tool, valkey: Server, give: Callable[[bytes], None], raw: bool
) -> None:
    """--stdin publishes each line that is not empty, in order; --raw any bytes."""
    lines = [b"\xff\x00" if raw else b'{"a":1}', b"", b'{"a":2}']
    give(b"\r\n".join(lines))
    with tail(valkey.url, "publish-b", "-n", "2", "--raw") as process:
        words = ["publish", "publish-b", "--stdin", *(["--raw"] if raw else [])]
        shown = tool(*words, "--url", valkey.url)
        out, _ = process.communicate(timeout=LIMIT)
    assert shown.code == 0, shown.err
    assert f"published 2 {'messages' if raw else 'events'} on publish-b" in shown.out
    if raw:
        assert out == b'\xff\x00\n{"a":2}\n'
    else:
        assert [json.loads(line)["data"]["a"] for line in out.splitlines()] == [1, 2]
        assert "sent with the type 'cli'" in shown.err


def test_publish_stdin_says_which_line(
    tool: Tool, valkey: Server, give: Callable[[bytes], None]
) -> None:
    """A line that is no event ends it with 2, and is quoted."""
    give(b"{}\n[\x1b]\n")
    shown = tool("publish", "publish-c", "--stdin", "--url", valkey.url)
    assert shown.code == 2
    assert "where: '[\\x1b]'" in shown.err


def test_publish_is_interrupted_at_the_keyboard(valkey: Server) -> None:
    """ctrl-c ends a `publish --stdin` that waits for a line."""
    with (
        tail(valkey.url, "publish-d", "-n", "1") as listener,
        started("publish", "publish-d", "--stdin", url=valkey.url) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        ended(listener)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
        assert ended(process).err == ""


# -- top -------------------------------------------------------------------------------------------


def test_top_in_a_pipe(valkey: Server) -> None:
    """Into a pipe goes one table after another: channel, rate, bytes, sum, last seen."""
    with started("top", "top-a:*", "-n", "2000", "-i", "0.1", url=valkey.url) as process:
        assert process.stdout is not None
        text = process.stdout.readline()
        say(valkey.url, ("top-a:\u202e", b"12345"), *[("top-a:busy", b"1234567890")] * 3)
        while b"4 in all" not in text:
            text = process.stdout.readline()
            assert text
        table = [process.stdout.readline().decode() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        shown = ended(process)
    assert shown.code == 130
    assert table[1].split() == ["CHANNEL", "MSG/S", "BYTES/S", "TOTAL", "SEEN"]
    rows = {row.split()[0]: row.split() for row in table[2:]}
    assert set(rows) == {"top-a:busy", "top-a:\\u202e"}
    assert rows["top-a:busy"][-2] == "3"
    assert max(map(len, table)) <= 120


def test_top_on_a_screen(valkey: Server) -> None:
    """On a terminal the table is drawn in place, no wider than it, and the screen is given back
    when SIGTERM ends it."""
    with on_screen(["top", "top-b:*", "-i", "0.1"], valkey.url) as (pid, screen):
        read_screen(screen, "nothing has passed yet")
        say(valkey.url, ("top-b:" + "x" * 200, b"1"))
        table = read_screen(screen, "1 in all")
        table += read_screen(screen, "\x1b[J")
        os.kill(pid, signal.SIGTERM)
        rest = read_screen(screen, "\x1b[?1049l")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert "\x1b[?25h\x1b[?1049l" in rest
    lines = re.sub(r"\x1b\[[\d?]*[a-zA-Z]", "", table.replace("\x1b[H", "\n")).splitlines()
    assert max(map(len, lines)) <= 80


def test_top_leaves_its_last_table(valkey: Server) -> None:
    """On a terminal the last of a number of tables stays on the screen."""
    with on_screen(["top", "silence", "-i", "0.1", "-n", "1"], valkey.url) as (pid, screen):
        text = read_screen(screen, "")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "nothing has passed yet" in text.partition("\x1b[?1049l")[2]


def test_top_tells_of_a_loss() -> None:
    """A gap and a lost connection are told above the table, and the table goes on."""
    with Server() as server, started("top", "-i", "0.1", url=server.url) as process:
        assert process.stdout is not None
        process.stdout.readline()
        say(
            server.url,
            ("top-c", foreign(type="T", source="s", busseq=1)),
            ("top-c", foreign(type="T", source="s", busseq=5)),
        )
        while (line := process.stdout.readline()) != b"3 missed, last gap: sequence, 3 missed\n":
            assert line
        server.kill()
        while b"3 missed, subscriber unix://" not in (line := process.stdout.readline()):
            assert line
        server.start()
        while b"last gap: reconnect, some missed" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        assert ended(process).code == 130


@pytest.mark.parametrize(
    "seconds, told", [(0.4, "now"), (59, "59 s"), (120, "2 m"), (7200, "2 h"), (200_000, "2 d")]
)
def test_ages(seconds: float, told: str) -> None:
    """How long ago, in a word."""
    assert age(seconds) == told


def test_top_forgets() -> None:
    """A million channels take the room of the limit; the sums count all that was forgotten."""
    table = Table(limit=100)
    for number in range(1_000):
        table.count(f"c{number}", 10, float(number))
        table.count("busy", 1, float(number))
    assert len(table) == 100
    assert table.forgotten == 901
    total = table.turn(2.0)
    assert (total.total, total.rate, total.bytes_rate) == (2_000, 1_000.0, 5_500.0)
    assert table.best(2, "rate")[0].channel == "busy"
    assert table.best(1, "bytes")[0].channel == "busy"
    assert table.best(1, "total")[0].channel == "busy"
    assert table.best(1, "channel")[0].channel == "busy"
    assert table.best(2, "seen")[1].channel == "c999"
    assert table.turn(1.0).rate == 0


def test_publish_an_endless_line(valkey: Server) -> None:
    """A line without an end is given up when the bus would refuse it anyway."""
    with started("publish", "publish-e", "--stdin", "--raw", url=valkey.url) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(b"x" * (5 << 20))
        assert process.wait(LIMIT) == 2
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdin = None
        assert "bytes" in ended(process).err


def test_publish_without_the_last_resort() -> None:
    """What the bus logs while it tries is not printed beside the three lines of the error."""
    with started("publish", "x", "{}", "--url", "redis://127.0.0.1:1") as process:
        assert ended(process).err.count("\n") == 3
