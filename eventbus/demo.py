"""The main job, live: three server processes, one Redis, one outage, and the sums at the end.

`python -m eventbus.demo` starts a server of its own and three processes that each listen to
`chat:*`, `chat:{room}`, `presence:{user}` and `cache:invalidate:{key}`, and publish on all these
channels all the time. It kills the server while they go on publishing, starts it again, and asks
every process for its counts. For each handler this must hold, and nothing may have come twice:

    acknowledged <= delivered + dropped + missed <= acknowledged + uncertain + refused

The first and the last message of every publisher on every channel are acknowledged (the opening and
the closing round), so that a loss at either end is counted too. The processes do not know the plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from asyncio import create_subprocess_exec as spawn
from asyncio.subprocess import PIPE
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from eventbus import BusUnavailable, Event, EventBus, Gap, Message, PublishUncertain
from eventbus.server import Server

NAMES = ("server-1", "server-2", "server-3")
ROOMS, USERS = ("attic", "hall", "lobby", "yard"), ("ana", "ben", "cleo", "dev")
KEYS = ("front-page", "price-list", "product-7", "product-42")
LINES = ("more tea?", "ship it!", "lunch?", "on my way", "it works", "who is in?")
SETS = ("chat", "presence", "cache")  # of four channels each
PATTERNS = {  # by handler; what is before the first ":" is the set
    "audit": "chat:*",
    "show": "chat:{room}",
    "status": "presence:{user}",
    "forget": "cache:invalidate:{key}",
}
OUTCOMES = {
    "acknowledged": "Redis has it",
    "uncertain": "PublishUncertain, may have arrived",
    "refused": "BusUnavailable, certainly not sent",
}
GREEN = dict.fromkeys(("ready", "live again", "good"), 32)
COLOURS = {"server-1": 36, "server-2": 35, "server-3": 34, "": 1, "heard": 0, **GREEN}  # else red
PAUSE, SAMPLE = 0.1, 0.9  # seconds: between two messages on a channel, between two that are shown
BEGAN = time.monotonic()


class Said(Event, channel="chat:{room}"):
    """Somebody wrote into a room."""

    room: str
    user: str
    text: str


class SignedIn(Event, channel="presence:{user}"):
    """Somebody came or went."""

    user: str
    status: str


class Changed(Event, channel="cache:invalidate:{key}"):
    """What is cached under this key is old."""

    key: str
    version: int


def make_events() -> list[Event]:
    """One event for every channel, in the order of SETS."""
    said = [Said(room=r, user=random.choice(USERS), text=random.choice(LINES)) for r in ROOMS]
    signed = [SignedIn(user=user, status=random.choice(("online", "away"))) for user in USERS]
    return [*said, *signed, *(Changed(key=k, version=random.randrange(100)) for k in KEYS)]


def tell(kind: str, text: str = "", **facts: object) -> None:
    """One JSON line to the parent."""
    print(json.dumps({"kind": kind, "text": text, **facts}), flush=True)


class Ledger:
    """What one process published and heard. A count is named by two words: "delivered audit"."""

    def __init__(self, bus: EventBus, name: str) -> None:
        self.counts: Counter[str] = Counter()
        self._bus, self._name = bus, name
        self._news: dict[str, list[str | None]] = {}  # what happened, and on which channels
        self._seen: set[tuple[str, str, str | None, int | None]] = set()
        self._turn, self._due = random.randrange(4), BEGAN + SAMPLE

    def hear(self, handler: str, message: Message[Any]) -> None:
        """A handler was called."""
        key = (handler, message.channel, message.source, message.sequence)
        self.counts[f"{'twice' if key in self._seen else 'delivered'} {handler}"] += 1
        self._seen.add(key)
        source = str(message.source).partition("/")[0]
        its_turn = handler == list(PATTERNS)[self._turn % 4] and time.monotonic() > self._due
        if its_turn and source != self._name:
            self._turn, self._due = self._turn + 1, time.monotonic() + SAMPLE
            place = " ".join(f"{name}={value}" for name, value in message.captures.items())
            words = [place or message.channel, *list(message.event.model_dump().values())[1:]]
            tell("heard", f"{PATTERNS[handler]:<22} <- {source}: {' '.join(map(str, words))}")

    async def miss(self, gap: Gap) -> None:
        """A gap was reported."""
        if gap.missed is None:
            tell("bad", f"Gap({gap.reason!r}): deaf since {gap.since:%H:%M:%S.%f} UTC")
        else:
            self._news.setdefault(f"Gap({gap.reason!r})", []).extend([gap.channel] * gap.missed)
        if gap.reason == "sequence":
            self.counts[f"missed {str(gap.channel).partition(':')[0]}"] += gap.missed or 0

    async def publish(self, place: int) -> bool:
        """Publish on one of the channels, note the outcome, wait a little."""
        outcome, event = "acknowledged", make_events()[place]
        try:
            await self._bus.publish(event)
        except (BusUnavailable, PublishUncertain) as error:
            outcome = "refused" if isinstance(error, BusUnavailable) else "uncertain"
            self._news.setdefault(OUTCOMES[outcome], []).append(error.channel)
        self.counts[f"{outcome} {SETS[place // 4]}"] += 1
        await asyncio.sleep(random.uniform(0, PAUSE))
        return outcome == "acknowledged"

    async def watch(self) -> None:
        """Say how the bus is, at every change, and what went wrong, once a second."""
        state, since, due = "live", BEGAN, BEGAN
        while True:
            now, health = time.monotonic(), self._bus.health()
            if health.state != state:
                why = health.reason or f"after {now - since:.1f} s"
                tell(f"{health.state} again", f"health: {state} -> {health.state}, {why}")
                state, since = health.state, now
            if now > due:
                self.speak()
                due = now + 1.0
            await asyncio.sleep(0.02)

    def speak(self) -> None:
        """Say what went wrong since the last time."""
        for what, channels in self._news.items():
            tell("bad", f"{what}: {len(channels)} messages on {len(set(channels))} channels")
        self._news = {}


async def serve(name: str, url: str) -> int:
    """Be one of the three: listen, publish, report, until the parent says so or goes away."""
    bus = EventBus(url, name=name, heartbeat=1.0)
    ledger = Ledger(bus, name)
    bus.on_gap()(ledger.miss)
    publishing, tasks = True, list[asyncio.Task[None]]()

    @bus.on("chat:*", max_queue=20 if name == NAMES[-1] else 10_000)
    async def audit(message: Message[Said]) -> None:
        ledger.hear("audit", message)
        if name == NAMES[-1] and ledger.counts["delivered audit"] == 300:
            tell("bad", "my handler of chat:* stalls for 0.5 s; its queue holds 20")
            await asyncio.sleep(0.5)

    @bus.on("chat:{room}")
    async def show(message: Message[Said]) -> None:
        ledger.hear("show", message)

    @bus.on("presence:{user}")
    async def status(message: Message[SignedIn]) -> None:
        ledger.hear("status", message)

    @bus.on("cache:invalidate:{key}")
    async def forget(message: Message[Changed]) -> None:
        ledger.hear("forget", message)

    async def chatter(place: int) -> None:
        while publishing:  # the first is the opening round
            await ledger.publish(place)
        while not await ledger.publish(place):
            pass  # the closing round

    async with bus:
        tell("ready", f"is live: {', '.join(bus.health().subscriptions)}")
        watcher = asyncio.create_task(ledger.watch())
        async for word in commands():
            if word == "go":
                tasks = [asyncio.create_task(chatter(place)) for place in range(12)]
            elif word == "closing":
                publishing = False
                await asyncio.gather(*tasks)
                tell("closed")
            else:
                break
        for task in (watcher, *tasks):
            task.cancel()
    # The bus has stopped: it has read its subscriptions to their end, and told every gap.
    ledger.speak()
    stats, counts = bus.stats(), ledger.counts
    counts.update({f"dropped {handler}": stats.handlers[handler].dropped for handler in PATTERNS})
    words = (*OUTCOMES, "missed", "delivered")
    ours = [sum(n for key, n in counts.items() if key.startswith(word)) for word in words]
    theirs = [stats.published, stats.uncertain, stats.refused, stats.missed, stats.delivered]
    tell("report", counts=counts, agrees=ours == theirs)
    return 0


async def commands() -> AsyncIterator[str]:
    """The parent's words; they end at SIGTERM and when the parent is gone."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, reader.feed_eof)
    while line := await reader.readline():
        yield line.decode().strip()


def paint(text: str, kind: str) -> str:
    """The text in the colour of its kind, on a terminal."""
    is_plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if is_plain else f"\x1b[{COLOURS.get(kind, 31)}m{text}\x1b[0m"


def say(who: str, text: str, kind: str = "") -> None:
    """A line of at most 80 columns: the seconds, who (nobody: what happens next), and what."""
    text = text if len(text) <= 63 else text[:60] + "..."
    start = f"{time.monotonic() - BEGAN:5.1f}  "
    start = f"{start}{paint(who, who)}  " if who else f"\n{start}"
    print(start + paint(text, kind), flush=True)


class Process:
    """One of the three, as the parent sees it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name, self._process = name, process
        self.last: dict[str, Any] = {}  # what it said last; and of which kinds it said something
        self.said: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._reading = asyncio.create_task(self._read())

    async def do(self, word: str = "", until: str = "") -> None:
        """Send one word, and return when it has said so. Raises RuntimeError when it never does."""
        if word and self._process.stdin:
            self._process.stdin.write(f"{word}\n".encode())
        if until:
            said = asyncio.create_task(self.said[until].wait())
            await asyncio.wait({said, self._reading}, timeout=20.0, return_when="FIRST_COMPLETED")
            if not self.said[until].is_set():
                raise RuntimeError(f"{self.name} ended, or hangs, and never came to {until!r}")

    async def stop(self) -> None:
        """End it, whatever it is doing: its words end, and so does it; else by force."""
        if self._process.stdin:
            self._process.stdin.close()
        if not (await asyncio.wait({self._reading}, timeout=5.0))[0]:
            self._process.kill()
        await self._process.wait()

    async def _read(self) -> None:
        while self._process.stdout and (line := await self._process.stdout.readline()):
            self.last = json.loads(line)
            if self.last["text"]:
                say(self.name, self.last["text"], self.last["kind"])
            self.said[self.last["kind"]].set()


def judge(processes: Sequence[Process]) -> int:
    """Print the sums; returns the exit code."""
    all_counts = [Counter[str](process.last["counts"]) for process in processes]
    sent = sum(all_counts, Counter[str]())
    print(f"\n{'published':<29}" + "".join(f"{outcome:>17}" for outcome in OUTCOMES))
    for name in SETS:
        print(f"  {name:<27}" + "".join(f"{sent[f'{it} {name}']:>17}" for it in OUTCOMES))
    print(f"\n{'received':<25}acked <= delivered + dropped + missed <= at most  twice")
    faults = [f"bus.stats() of {it.name}" for it in processes if not it.last["agrees"]]
    for process, got in zip(processes, all_counts, strict=True):
        print(paint(process.name, process.name))
        for it, pattern in PATTERNS.items():
            name, twice = pattern.partition(":")[0], got[f"twice {it}"]
            least, most = sent[f"acknowledged {name}"], sum(sent[f"{o} {name}"] for o in OUTCOMES)
            one, two, three = got[f"delivered {it}"], got[f"dropped {it}"], got[f"missed {name}"]
            row = f"{least:>6} <= {one:>9} + {two:>7} + {three:>6} <= {most:>7}{twice:>7}"
            print(f"  {pattern:<22}{row}")
            if twice or not least <= one + two + three <= most:
                faults.append(f"{process.name}, {pattern}")
    for fault in faults:
        print(paint(f"DOES NOT HOLD: {fault}", "bad"))
    print("" if faults else paint("\nAll 12 sums hold, and nothing came twice.", "good"))
    return 1 if faults else 0


async def direct(seconds: float) -> int:
    """The whole play. However it ends, nothing is left running."""
    loop, task, processes = asyncio.get_running_loop(), asyncio.current_task(), list[Process]()

    async def everybody(word: str = "", until: str = "") -> None:
        await asyncio.gather(*(process.do(word, until) for process in processes))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: task and (task.cancelling() or task.cancel()))
    with Server() as server:
        try:
            say("", "A Redis server, and three processes that know only its URL.")
            for name in NAMES:
                words = [sys.executable, "-m", "eventbus.demo", "--serve", name, server.url]
                child = await spawn(*words, stdin=PIPE, stdout=PIPE, start_new_session=True)
                processes.append(Process(name, child))
            await everybody(until="ready")
            say("", "All three publish on 12 channels, all the time. A sample:")
            await everybody("go")
            await asyncio.sleep(seconds * 0.4)
            say("", "The server freezes and is killed (-9). They go on publishing.")
            for process in processes:
                process.said.clear()
            server.freeze()
            await asyncio.sleep(0.2)
            server.kill()
            await asyncio.sleep(seconds * 0.2)
            say("", "A new server on the same socket.")
            server.start()
            await everybody(until="live again")
            await asyncio.sleep(seconds * 0.15)
            say("", "A last message from everybody on every channel, and the sums.")
            await everybody("closing", "closed")
            await everybody("report", "report")
        finally:
            await asyncio.gather(*(process.stop() for process in processes))
    return judge(processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 when the sums hold."""
    parser = argparse.ArgumentParser("python -m eventbus.demo", description="see the outage")
    parser.add_argument("--seconds", type=float, default=15.0, help="about how long (15)")
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "URL"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        return asyncio.run(serve(*given.serve) if given.serve else direct(given.seconds))
    except RuntimeError as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("\nstopped; nothing is left running")
        return 130


if __name__ == "__main__":
    sys.exit(main())
