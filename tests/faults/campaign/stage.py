"""What stands around a subject: its server, the proxies before it, its two processes, the sums."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from eventbus.server import Server
from tests.faults.proxy import Proxy

_TICKS = os.sysconf("SC_CLK_TCK")
_ANSWER = 30.0
"""Seconds for an answer of a subject: one with a frozen loop never gives it."""


class Player:
    """One process of a subject."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, subject: str, role: str, url: str) -> Player:
        """A process that is ready."""
        command = (sys.executable, "-m", "tests.faults.campaign.subjects", subject, role, url)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, limit=1 << 26
        )
        player = cls(process)
        if await player._line() != b"ready\n":
            raise RuntimeError(f"{subject} did not start at {url}")
        return player

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(_ANSWER):
            return await self._process.stdout.readline()

    def tell(self, words: str) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(words.encode() + b"\n")

    async def report(self) -> dict[str, Any] | None:
        """What it saw; None from one whose loop does not answer any more."""
        self.tell("report")
        try:
            found: dict[str, Any] = json.loads(await self._line())
        except TimeoutError:
            return None
        return found

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        with open(f"/proc/{self._process.pid}/stat") as file:
            numbers = file.read().rpartition(")")[2].split()
        return (int(numbers[11]) + int(numbers[12])) / _TICKS

    async def end(self) -> None:
        """End the process."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


@dataclass
class Figures:
    """What one fault did to one subject. Times are seconds; None: not within the time given."""

    subject: str
    fault: str
    noticed: float | None = None
    recovered: float | None = None
    sent: int = 0
    delivered: int = 0
    missing: int = 0
    reported: int = 0
    unreported: int = 0
    uncertain: int = 0
    refused: int = 0
    duplicated: int = 0
    lag_ms: float | None = None
    cpu_down: float | None = None
    remark: str = ""


@dataclass
class Stage:
    """A subject with a receiver behind a proxy and a publisher behind another one."""

    subject: str
    server: Server
    proxy: Proxy
    publishers: Proxy
    receiver: Player
    publisher: Player
    broken: float = 0.0
    mended: float = 0.0
    cpu_broken: float = 0.0
    cpu_mended: float = 0.0
    remark: str = ""
    limit: float = 15.0
    """Seconds to recover in, after the fault is over."""
    victim: str = "receiver"
    """Whose notices count."""

    def breaks(self) -> None:
        """The fault begins now (and is over: call `mends` when it is not)."""
        self.receiver.tell("mark")
        self.broken = self.mended = time.monotonic()
        self.cpu_broken = self.cpu_mended = self.receiver.cpu()

    def mends(self) -> None:
        """The fault is over now: from here on a subject can recover."""
        self.mended = time.monotonic()
        self.cpu_mended = self.receiver.cpu()

    async def figures(self, fault: str) -> Figures:
        """Wait for the recovery, let traffic go on for a while, and add up."""
        figures = Figures(self.subject, fault, remark=self.remark)
        until = self.mended + self.limit
        heard: dict[str, Any] | None = {}
        said: dict[str, Any] | None = {}
        while time.monotonic() < until:
            await asyncio.sleep(0.5)
            heard, said = await self.receiver.report(), await self.publisher.report()
            if heard is None or said is None:
                break
            figures.recovered = self._recovery(heard, said)
            if figures.recovered is not None:
                break
        await asyncio.sleep(2.0)
        self.publisher.tell("halt")
        said = await self.publisher.report()
        await asyncio.sleep(1.0)
        heard = heard and await self.receiver.report()
        if self.mended - self.broken > 1:
            figures.cpu_down = round(self.cpu_mended - self.cpu_broken, 2)
        if said is None or heard is None:
            figures.remark = "its event loop does not answer any more"
            return figures
        self._add_up(figures, heard, said)
        return figures

    def _recovery(self, heard: dict[str, Any], said: dict[str, Any]) -> float | None:
        """When the first message came that was sent after the fault was over."""
        sent = {int(id): time for id, time in said["sent"].items()}
        times = [at for id, at in heard["arrived"] if sent.get(id, 0.0) > self.mended]
        return round(min(times) - self.mended, 2) if times else None

    def _add_up(self, figures: Figures, heard: dict[str, Any], said: dict[str, Any]) -> None:
        ids = [id for id, _ in heard["arrived"]]
        arrived, acknowledged = set(ids), set(said["acknowledged"])
        lost = acknowledged - arrived
        last = max(said["sent"].values()) - 1.0
        if not any(said["sent"][str(id)] > last for id in arrived & acknowledged):
            figures.recovered = None  # it went on for a moment, and stopped
        victim = heard if self.victim == "receiver" else said
        notices = [at for at, _ in victim["notices"] if at >= self.broken]
        figures.noticed = round(min(notices) - self.broken, 2) if notices else None
        figures.sent = len(acknowledged)
        figures.delivered = len(acknowledged & arrived)
        figures.missing = len(lost)
        figures.reported = heard["missed"]
        figures.unreported = max(0, len(lost) - heard["missed"])
        figures.uncertain, figures.refused = len(said["uncertain"]), len(said["refused"])
        figures.duplicated = len(ids) - len(arrived)
        figures.lag_ms = round(heard["lag"] * 1000, 1)


@asynccontextmanager
async def stage(
    subject: str, server: Server, *, login: str = "", url: str | None = None
) -> AsyncIterator[Stage]:
    """A subject at work, with traffic. `url`: not through the proxies, but there."""
    async with Proxy(server.port) as proxy, Proxy(server.port) as publishers:
        there = proxy.url.replace("://", f"://{login}", 1) if url is None else url
        receiver = await Player.start(subject, "receiver", there)
        publisher = await Player.start(subject, "publisher", publishers.url if url is None else url)
        try:
            set_up = Stage(subject, server, proxy, publishers, receiver, publisher)
            publisher.tell("go")
            await asyncio.sleep(1.5)
            yield set_up
        finally:
            await receiver.end()
            await publisher.end()
