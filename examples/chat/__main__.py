"""The chat on three nodes, with a Redis of its own; here scrolls by what crosses between them.

    python -m examples.chat --port 8001

Ctrl-c ends everything that it has started.
"""

import argparse
import asyncio
import json
import logging
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress

from eventbus import EventBus, EventBusError, Gap, Message
from eventbus.presence import UserOffline, UserOnline
from eventbus.server import Server, ServerFailed, ServerNotFound
from examples.chat.node import Typing

NAMES = ("node-1", "node-2", "node-3")
PATIENCE, FROZEN = 30.0, 8.0  # s: until a node is ready; what `f` does to Redis
HELP = "1, 2, 3: kill a node (-9), or start it again. f: freeze Redis for 8 s."


def show(who: str, what: str) -> None:
    """One line, whatever strangers have written into it."""
    line = f"{who:<8} {what}"
    line = "".join(letter if letter.isprintable() else " " for letter in line)
    print(line if len(line) <= 80 else f"{line[:79]}…", flush=True)


def free_ports(first: int) -> list[int]:
    """Three ports that nobody uses, from this one on."""
    found: list[int] = []
    for port in range(first, 65_536):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == len(NAMES):
            return found
    raise RuntimeError(f"there are no three free ports above {first}")


def listener(url: str) -> EventBus:
    """A bus that shows what the nodes tell each other."""
    bus = EventBus(url, name="terminal", heartbeat=1.0)

    @bus.on("rooms:/:in:{room}")
    async def said(message: Message, room: str) -> None:
        data = json.loads(message.event["text"])["data"]
        show(data["node"], f"#{room} {data['user']}: {data['text']}")

    @bus.on(Typing, overflow="latest")
    async def typing(event: Typing) -> None:
        show(event.node, f"#{event.room} {event.user} is typing")

    @bus.on(UserOnline)
    async def online(event: UserOnline) -> None:
        show(event.meta.get("node", "?"), f"{event.user} is online")

    @bus.on(UserOffline)
    async def offline(event: UserOffline) -> None:
        show("", f"{event.user} is offline")

    @bus.on_gap()
    async def missed(gap: Gap) -> None:
        show("", f"what was said since {gap.since:%H:%M:%S} UTC may have been missed")

    return bus


class Nodes:
    """The three processes, as their parent sees them."""

    def __init__(self, server: Server, ports: Sequence[int]) -> None:
        self.server = server
        self.urls = {f"node-{n}": f"http://127.0.0.1:{port}" for n, port in enumerate(ports, 1)}
        self.processes: dict[str, Process] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, name: str) -> None:
        """Start a node; returns when it is ready."""
        url, urls = self.urls[name], ",".join(self.urls.values())
        words = ["-m", "examples.chat.node", "--name", name, "--redis", self.server.url]
        words += ["--port", url.rpartition(":")[2], "--nodes", urls, "--quiet"]
        # In a session of its own: a ctrl-c is for the parent, which ends it in order.
        self.processes[name] = process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=PIPE, start_new_session=True
        )
        async with asyncio.timeout(PATIENCE):
            if process.stdout is None or not await process.stdout.readline():
                raise RuntimeError(f"{name} did not start")
        show(name, url)
        self.tasks.append(asyncio.create_task(self.relay(name, process.stdout)))

    async def relay(self, name: str, words: asyncio.StreamReader) -> None:
        """Show what a node says of itself."""
        async for line in words:
            show(name, line.decode().strip().removeprefix(name).strip())

    async def stop(self, name: str, force: bool = False) -> None:
        """End a node: in order, or as a crash would."""
        if (process := self.processes.pop(name, None)) is None:
            return
        with suppress(ProcessLookupError, TimeoutError):
            process.kill() if force else process.terminate()
            async with asyncio.timeout(10.0):
                await process.wait()
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def obey(self, word: str) -> None:
        """Do what somebody has typed."""
        if word == "f":
            show("", f"Redis is frozen for {FROZEN:.0f} s")
            self.server.freeze()
            await asyncio.sleep(FROZEN)
            self.server.thaw()
        elif (name := f"node-{word}") in self.processes:
            show(name, "is killed (-9)")
            await self.stop(name, force=True)
        elif name in self.urls:
            await self.start(name)
        else:
            show("", HELP)


async def play(port: int) -> None:
    """Run until a signal. However it ends, nothing is left running."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: task and (task.cancelling() or task.cancel()))
    with Server() as server:
        nodes = Nodes(server, free_ports(port))
        try:
            await asyncio.gather(*map(nodes.start, nodes.urls))
            words: asyncio.Queue[str] = asyncio.Queue(16)

            def typed() -> None:
                if not (line := sys.stdin.readline()):
                    loop.remove_reader(sys.stdin)  # nothing more will come
                with suppress(asyncio.QueueFull):
                    words.put_nowait(line.strip())

            if sys.stdin.isatty():
                loop.add_reader(sys.stdin, typed)
                show("", HELP)
            show("", "Open these in a browser. Ctrl-c ends it.")
            async with listener(server.url):
                while True:
                    await nodes.obey(await words.get())
        finally:
            await asyncio.gather(*map(nodes.stop, nodes.urls))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.chat", description="a chat on three nodes")
    parser.add_argument("--port", type=int, default=8001, help="of the first node (8001)")
    given = parser.parse_args(argv)
    logging.getLogger("eventbus").setLevel(logging.ERROR)  # the lines here say it shorter
    try:
        asyncio.run(play(given.port))
    except asyncio.CancelledError:
        print("\nended; nothing is left running")
    except (EventBusError, OSError, RuntimeError, ServerFailed, ServerNotFound) as error:
        print(f"the chat could not go on: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
