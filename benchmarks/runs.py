"""How one run is made: a fresh server, a fresh process for the contestant, and its one JSON line.

Where messages are received there is a process for the flood as well. All of it ends with the run,
also when it fails or hangs. Why a fresh server: Redis 7.0 stays slow after 10,000 patterns came and
went, and a row must not pay for the row before it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Timer
from typing import IO, Any

from eventbus.server import Server, find_binary

from .imports import starts
from .meter import STEP, Board

Run = dict[str, Any]

DEADLINE = 60.0  # seconds for one run: the longest takes 5
STARTS = 5  # starts of the file in one run of an import row
THREADED = {"valkey_glide"}  # its parser runs in Rust threads
LAST_WORD = 200  # characters of a failed process's last line that a row keeps


class RunFailed(Exception):
    """A contestant did not get to its result; says what its process said last."""


class Child:
    """A module of ours in a process of its own, that answers in JSON lines."""

    def __init__(self, errors: IO[bytes], module: str, *words: object) -> None:
        self._errors = errors
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def ready(self) -> None:
        """Wait until it says so."""
        assert self.process.stdout
        if self.process.stdout.readline() != "ready\n":
            self.result()
            raise self._failed()

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> Run:
        """Wait for its end, and read its last line."""
        output, _ = self.process.communicate()
        if self.process.returncode or not output:
            raise self._failed()
        result: Run = json.loads(output.splitlines()[-1])
        return result

    def _failed(self) -> RunFailed:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        return RunFailed(said[-1].strip()[:LAST_WORD] if said else f"ended with {code}")


@contextmanager
def children() -> Iterator[Callable[..., Child]]:
    """Start processes that end with the block, after ``DEADLINE`` seconds at the latest."""
    started: list[Child] = []

    def end() -> None:
        for child in started:
            if child.process.poll() is None:
                child.process.kill()

    with tempfile.TemporaryFile() as errors:

        def start(module: str, *words: object) -> Child:
            started.append(Child(errors, module, *words))
            return started[-1]

        watchdog = Timer(DEADLINE, end)
        watchdog.start()
        try:
            yield start
        finally:
            watchdog.cancel()
            end()
            for child in started:
                child.process.communicate()


def binary() -> str:
    """Debian's redis-server where there is one, else what eventbus itself would start."""
    return shutil.which("redis-server") or find_binary()


def new_server() -> Server:
    """A server on a free loopback port (not every peer speaks unix sockets)."""
    return Server(binary=binary(), port=0)


def place(source: Iterable[int | None], contestant: int, *, threaded: bool) -> None:
    """Put the source (server and flood) on one core, and the contestant on the others.

    Left alone, Linux likes to run a receiver where its sender runs, and a third of the time goes by
    in the queue for that core. A contestant with working threads of its own may use every core. It
    takes two cores and a system that lets us; elsewhere the column "no core" tells more.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    first, *others = sorted(os.sched_getaffinity(0))
    if others:
        for process in filter(None, source):
            os.sched_setaffinity(process, {first})
        if not threaded:
            os.sched_setaffinity(contestant, others)


def received(name: str, wire: str, messages: int, *flags: object) -> Run:
    """One contestant under the flood. The first tenth is warm-up."""
    warm = messages // 10 // STEP * STEP
    with new_server() as server, tempfile.TemporaryDirectory() as folder, children() as start:
        board = Path(folder, "board")
        Board.create(board)
        flood = start("flood", server.port, wire, messages, board)
        consumer = start("receivers", name, server.port, messages, warm, board, *flags)
        source = server.pid, flood.process.pid
        place(source, consumer.process.pid, threaded=name in THREADED)
        consumer.ready()
        flood.ready()
        flood.go()
        result = consumer.result()
        if result["complete"]:
            result["flood"] = flood.result()
        return result


def published(name: str, messages: int, concurrent: int, *flags: object) -> Run:
    """One contestant publishes."""
    with new_server() as server, children() as start:
        return start("publishers", name, server.port, messages, concurrent, *flags).result()


def travelled(name: str, messages: int, pause: float) -> Run:
    """One contestant sends to itself, one at a time, with a pause (in seconds) before each."""
    with new_server() as server, children() as start:
        return start("latencies", name, server.port, messages, pause).result()


def imported(name: str) -> Run:
    """One import, a few times."""
    taken = starts(name, STARTS)
    return {"complete": True, "starts": len(taken), "cpu_ms": median(taken) * 1e3}
