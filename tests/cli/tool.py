"""How the tests run the command line: in this process where they can, else in one of its own."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from eventbus import Event, EventBus
from eventbus.cli import main

ROOT = Path(__file__).parents[2]
LIMIT = 25.0
SHOP = "tests.cli.shop"


class Result(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


class Tool:
    """The command line in this process: for commands that leave nothing behind in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *words: str) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["eventbus", *words])
        self._capfd.readouterr()
        try:
            code = main()
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err
        return Result(code, out, err)


def environment(url: str | None, **more: str) -> dict[str, str]:
    """Of a process whose bus goes there."""
    not_ours = ("NO_COLOR", "PYTHONUNBUFFERED")
    known = {key: value for key, value in os.environ.items() if key not in not_ours}
    return {**known, "PYTHONPATH": str(ROOT), "EVENTBUS_URL": url or "", "COLUMNS": "", **more}


@contextmanager
def started(
    *words: str, url: str | None = None, ready: str = "", **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process of its own, when it has said on standard error that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eventbus", *words],
        cwd=ROOT,
        env=environment(url, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            if ready:
                assert process.stderr is not None
                line = process.stderr.readline().decode()
                assert ready in line, line + process.stderr.read().decode()
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[bytes]) -> Result:
    """How it ended, and what it said since it was last read."""
    out, err = process.communicate(timeout=LIMIT)
    assert b"Traceback" not in err, err.decode()
    return Result(process.returncode, out.decode(), err.decode())


@contextmanager
def on_screen(words: Sequence[str], url: str, **more: str) -> Iterator[tuple[int, int]]:
    """A command on a terminal of 80 columns: its process id, and the terminal's other end."""
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(
            sys.executable,
            [sys.executable, "-m", "eventbus", *words],
            environment(url, TERM="xterm", **more),
        )
    try:
        yield pid, screen
    finally:
        os.close(screen)


def read_screen(screen: int, until: str) -> str:
    """What the terminal was sent, until this text, or the end of the program."""
    found = b""
    while until.encode() not in found or not until:
        assert select.select([screen], [], [], LIMIT)[0], found
        try:
            data = os.read(screen, 65536)
        except OSError:  # the program has ended
            data = b""
        if not data:
            break
        found += data
    return found.decode()


def say(url: str, *messages: tuple[str, bytes | Event]) -> None:
    """Publish these, one after another."""

    async def work() -> None:
        async with EventBus(url, name="test") as bus:
            for channel, data in messages:
                if isinstance(data, bytes):
                    await bus.publish_raw(channel, data)
                else:
                    await bus.publish(channel, data)

    asyncio.run(work())


def tail(url: str, *words: str, **more: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A `tail` that listens."""
    return started("tail", *words, url=url, ready="listening to", **more)
