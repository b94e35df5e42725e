"""The chat under load: many browsers on three nodes, and Redis taken away in the middle.

    python -m examples.chat.load --clients 2000 --rate 60 --seconds 8

It starts a Redis and three nodes, connects the clients (ten to a room, in turn on all nodes), and
sends at a fixed rate: before, while Redis is away (killed), while it returns (started again on its
port; some nodes are back before others), and after. A message that was sent is owed to everybody
else in its room, one that was not sent to those on the same node. Each copy that was owed was
delivered, or that client was told that it may miss something; nothing comes twice. It prints the
sums, and ends with 1 when they do not hold.
"""

import argparse
import asyncio
import json
import platform
import resource
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from eventbus.server import Server
from examples.chat.__main__ import NAMES, free_ports

ROOM, AT_ONCE, PATIENCE = 10, 50, 60.0  # clients to a room; connecting at a time; seconds
PHASES = ("before", "away", "returning", "after")
MEASURES = {
    "sent": "messages: sent",
    "maybe": "  maybe sent",
    "not sent": "  not sent",
    "delivered": "copies: delivered",
    "missed, told": "  missed, client told",
    "missed, untold": "  missed, client not told",
    "twice": "  delivered twice",
}


@dataclass
class Said:
    """A message: what became of it, and who has it."""

    phase: str
    room: str
    sender: int
    at: float
    outcome: str = "no answer"
    heard: Counter[int] = field(default_factory=Counter)


@dataclass
class Browser:
    """One client: where it is, what it was told, and who waits for its answers."""

    number: int
    node: int
    room: str
    ws: ClientConnection
    warned: list[tuple[str | None, float]] = field(default_factory=list)
    asked: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    closed: bool = False


class Load:
    """What was said and heard."""

    def __init__(self) -> None:
        self.browsers: list[Browser] = []
        self.rooms: dict[str, list[Browser]] = defaultdict(list)
        self.said: dict[str, Said] = {}
        self.latency: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.gaps: Counter[str] = Counter()
        self.strange: Counter[str] = Counter()
        self.all_told = asyncio.Event()
        """Every client was told that it may have missed something."""
        self._acks = count(1)

    async def enter(self, number: int, ports: list[int], stack: AsyncExitStack) -> None:
        """One client more, in its room."""
        node, room = number % len(ports), f"room-{number // ROOM}"
        url = f"ws://127.0.0.1:{ports[node]}/ws?user=user-{number}"
        options: Any = {"compression": None, "ping_interval": None, "max_queue": None}
        ws = await stack.enter_async_context(connect(url, open_timeout=PATIENCE, **options))
        browser = Browser(number, node, room, ws)
        reader = asyncio.create_task(self.read(browser))
        stack.callback(reader.cancel)
        self.browsers.append(browser)
        self.rooms[room].append(browser)
        await self.ask(browser, "join", {"room": room})

    async def ask(self, browser: Browser, event: str, data: dict[str, str]) -> Any:
        """Say something to the node, and wait for its answer."""
        ack = next(self._acks)
        answer = browser.asked[ack] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(PATIENCE):
                await browser.ws.send(json.dumps({"event": event, "data": data, "ack": ack}))
                return await answer
        finally:
            del browser.asked[ack]

    async def read(self, browser: Browser) -> None:
        """All that one client hears."""
        with suppress(WebSocketException):
            async for frame in browser.ws:
                now, message = time.perf_counter(), json.loads(frame)
                event, data = message.get("event"), message.get("data")
                if event == "message":
                    if (said := self.said.get(data["text"])) is None or said.room != browser.room:
                        self.strange["messages of nobody"] += 1
                        continue
                    said.heard[browser.number] += 1
                    self.latency[said.phase].append(now - said.at)
                elif event == "gap":
                    self.gaps[data["reason"]] += 1
                    browser.warned.append((data["room"], now))
                    if all(browser.warned for browser in self.browsers):
                        self.all_told.set()
                elif event == "error":
                    self.strange[f"error: {data['text']}"] += 1
                elif event is None and message["ack"] in browser.asked:
                    browser.asked[message["ack"]].set_result(data)
        browser.closed = True

    async def say(self, browser: Browser, phase: str) -> None:
        """One message, and what its node says of it."""
        text = f"message {len(self.said)}"
        said = self.said[text] = Said(phase, browser.room, browser.number, time.perf_counter())
        answer = await self.ask(browser, "say", {"room": browser.room, "text": text})
        said.outcome = answer["outcome"]

    async def talk(self, phase: str, rate: float, seconds: float, turn: Iterable[int]) -> None:
        """So many messages a second, whether they are answered or not, and then all the answers."""
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, who in zip(range(int(rate * seconds)), turn, strict=False):
                await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
                group.create_task(self.say(self.browsers[who], phase))

    def owed(self, said: Said) -> list[Browser]:
        """Who should have a message: everybody else in the room, or on the node when it was not
        sent. Nobody knows of one whose outcome is not known."""
        here = self.browsers[said.sender].node
        others = (b for b in self.rooms[said.room] if b.number != said.sender)
        if said.outcome == "sent":
            return list(others)
        return [browser for browser in others if browser.node == here]

    def sums(self, phase: str) -> Counter[str]:
        """The table's row of one phase."""
        row: Counter[str] = Counter()
        for said in (said for said in self.said.values() if said.phase == phase):
            row[said.outcome] += 1
            row["delivered"] += len(said.heard)
            row["twice"] += sum(times - 1 for times in said.heard.values())
            for browser in self.owed(said):
                if browser.number not in said.heard:
                    told = any(
                        room in (None, said.room) and at >= said.at for room, at in browser.warned
                    )
                    row["missed, told" if told else "missed, untold"] += 1
        return row


def milliseconds(sorted_seconds: list[float], share: float) -> str:
    if not sorted_seconds:
        return "-"
    return f"{1000 * sorted_seconds[int(share * (len(sorted_seconds) - 1))]:.1f}"


def report(load: Load) -> bool:
    """Print the table; whether the sums hold."""
    rows = {phase: load.sums(phase) for phase in PHASES}
    print(f"\n{'':<26}" + "".join(f"{phase:>12}" for phase in PHASES))
    for name, meaning in MEASURES.items():
        print(f"{meaning:<26}" + "".join(f"{rows[phase][name]:>12,}" for phase in PHASES))
    for share in (0.5, 0.99):
        cells = [milliseconds(sorted(load.latency[phase]), share) for phase in PHASES]
        print(f"latency p{100 * share:.0f}, ms{'':<11}" + "".join(f"{cell:>12}" for cell in cells))
    closed = sum(browser.closed for browser in load.browsers)
    warned = sum(bool(browser.warned) for browser in load.browsers)
    gaps = ", ".join(f"{times:,} x {reason}" for reason, times in sorted(load.gaps.items()))
    print(f"\n{warned:,} of {len(load.browsers):,} clients were told that they may miss something")
    print(f"notices: {gaps or 'none'}; connections that were lost: {closed}")
    for what, times in load.strange.items():
        print(f"strange: {times} x {what}")
    bad = [row[name] for row in rows.values() for name in ("twice", "missed, untold", "no answer")]
    good = rows["before"]["sent"] > 0 < rows["after"]["sent"]
    good = good and not (any(bad) or closed or load.strange)
    print("The sums hold." if good else "THE SUMS DO NOT HOLD.")
    return good


async def start(name: str, port: int, url: str) -> Process:
    """A node that is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "examples.chat.node", "--name", name, "--port", str(port),
        "--redis", url, "--heartbeat", "1", stdout=PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        await process.stdout.readline()
    return process


async def end(process: Process) -> None:
    """Of our own process, by its handle."""
    if process.returncode is None:
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE / 4):
                await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def run(clients: int, rate: float, seconds: float) -> bool:
    load, ports = Load(), free_ports(8011)
    async with AsyncExitStack() as stack:
        server = stack.enter_context(Server(port=0))
        for name, port in zip(NAMES, ports, strict=True):
            stack.push_async_callback(end, await start(name, port, server.url))
        began = time.perf_counter()
        for first in range(0, clients, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, clients))
            await asyncio.gather(*(load.enter(number, ports, stack) for number in numbers))
        load.browsers.sort(key=lambda browser: browser.number)
        print(f"{clients:,} clients in {time.perf_counter() - began:.1f} s", flush=True)
        # Each message from somebody else, and every room has its turn.
        turn = (number * 7919 % clients for number in count())

        await load.talk("before", rate, seconds, turn)
        print("Redis is killed", flush=True)
        await asyncio.to_thread(server.kill)
        await load.talk("away", rate, seconds / 2, turn)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.talk("returning", rate, seconds / 2, turn))
            await asyncio.to_thread(server.start)
            print("Redis is back", flush=True)
        async with asyncio.timeout(PATIENCE):  # a node may be later than the others
            await load.all_told.wait()
        await load.talk("after", rate, seconds, turn)
        await asyncio.sleep(1.0)  # what is under way
        return report(load)


def main() -> int:
    parser = argparse.ArgumentParser("python -m examples.chat.load", description="the chat, loaded")
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=60.0, help="messages a second, in all (60)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=8.0,
        help="of the first and the last phase; the others have half (8)",
    )
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    packages = ", ".join(f"{name} {version(name)}" for name in ("redis", "uvicorn", "websockets"))
    print(f"Python {platform.python_version()}, {packages}", flush=True)
    return 0 if asyncio.run(run(options.clients, options.rate, options.seconds)) else 1


if __name__ == "__main__":
    sys.exit(main())
