"""The demo, from outside: it ends by itself with sums that hold, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventbus import demo

ROOT = Path(demo.__file__).parents[1]
ROW = re.compile(r"^  \S+ +(\d+) <= +(\d+) \+ +(\d+) \+ +(\d+) <= +(\d+) +(\d+)$", re.MULTILINE)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, shorter than by hand; its server's folder is under `tmp_path`."""
    with subprocess.Popen(
        [sys.executable, "-m", "eventbus.demo", "--seconds", "5"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(short(tmp_path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process
        process.terminate()


def short(folder: Path) -> Path:
    """The folder itself; a test fails early when a socket in it would have too long a path."""
    assert len(str(folder / "eventbus-0123456789ab" / "server.sock")) < 104
    return folder


def test_the_sums_hold(play: subprocess.Popen[str], tmp_path: Path) -> None:
    """The demo ends with exit code 0, all twelve sums hold, and its lines fit a terminal."""
    output, _ = play.communicate(timeout=50)
    assert play.returncode == 0, output
    rows = [tuple(map(int, row)) for row in ROW.findall(output)]
    assert len(rows) == 12
    for least, delivered, dropped, missed, most, twice in rows:
        assert 0 < least <= delivered + dropped + missed <= most
        assert twice == 0
    assert any(dropped for _, _, dropped, *_ in rows)
    assert "All 12 sums hold, and nothing came twice." in output
    for word in ("PublishUncertain", "BusUnavailable", "Gap('reconnect')", "Gap('sequence')"):
        assert word in output
    assert max(map(len, output.splitlines())) <= 80
    assert "\x1b" not in output  # colours are for terminals
    assert not list(tmp_path.iterdir())


def test_interrupt(play: subprocess.Popen[str], tmp_path: Path) -> None:
    """Ctrl-C, twice, ends the three processes and the server, and says so."""
    assert play.stdout is not None
    while "A sample" not in play.stdout.readline():
        pass
    play.send_signal(signal.SIGINT)
    play.send_signal(signal.SIGINT)
    output, _ = play.communicate(timeout=20)
    assert play.returncode == 130
    assert output.endswith("stopped; nothing is left running\n")
    assert not list(tmp_path.iterdir())


def test_process_without_parent() -> None:
    """A process whose parent went away ends by itself, having said that it was live."""
    words = [sys.executable, "-m", "eventbus.demo", "--serve", "server-1", "memory://demo"]
    done = subprocess.run(
        words, cwd=ROOT, input="go\n", capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"kind": "ready"' in done.stdout


def test_what_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """A sum that does not hold, a duplicate, or a foreign counter is named, and the code is 1."""

    class Lost:
        """A process that was not told of one message, and heard another twice."""

        name = "server-1"
        last = {  # noqa: RUF012
            "counts": {"acknowledged chat": 3, "delivered audit": 2, "delivered show": 3}
            | {"twice show": 1},
            "agrees": False,
        }

    assert demo.judge([Lost()]) == 1  # type: ignore[list-item]
    output = capsys.readouterr().out
    assert "DOES NOT HOLD: server-1, chat:*" in output
    assert "DOES NOT HOLD: server-1, chat:{room}" in output
    assert "DOES NOT HOLD: bus.stats() of server-1" in output
    assert "All 12" not in output


def test_without_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no server binary is found, the demo says what to install."""
    monkeypatch.setenv("EVENTBUS_SERVER", "/nowhere/valkey-server")
    assert demo.main(["--seconds", "1"]) == 1
    assert "/nowhere/valkey-server" in capsys.readouterr().err
