"""Rooms: one emit to many clients on each of three nodes, beside python-socketio; and many joins.

    python -m benchmarks.rooms [--clients 10000] [--emits 20] [--runs 3] [--out FILE]

A node is a process. Its clients are simulated at the last step: what counts is the call of the
WebSocket's own `send`, which does nothing. Up to there each contestant runs its real code, with a
queue and a writer for each client: `eventbus.rooms`, and python-socketio's server with its own
`AsyncRedisManager` and engineio's own socket. Both emit the same event, encode JSON, and deliver
on the emitting node directly.

The first node emits when all clients on all nodes have the emit before (paced like that, no queue
overflows and nothing is lost), so a rate is deliveries between the first emit and the last
delivery. Contestants alternate; the median counts. Needs python-socketio, from the extra `bench`.
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from . import runs
from .meter import Board, costs, spent
from .runs import Run, RunFailed, children, new_server
from .workload import ROOMS, USER, text

NODES = 3
WARM = 2  # emits that are not counted
DATA = {"room": ROOMS[0], "user": USER, "text": text(ROOMS[0])}
DEADLINE = 300.0  # seconds for one run: thirty thousand connections come and go
STALL = 30.0  # seconds for one emit to arrive everywhere

Emit = Callable[[], Awaitable[object]]


class Count:
    """What the clients of one node were sent, shown to all nodes at each full round."""

    def __init__(self, board: Board, clients: int) -> None:
        self._board = board
        self._clients = clients
        self._sent = 0

    def hit(self) -> None:
        self._sent += 1
        if not self._sent % self._clients:
            self._board.write(self._sent)


@asynccontextmanager
async def eventbus(port: int, clients: int, count: Count) -> AsyncIterator[Emit]:
    """`Rooms`, its defaults."""
    from eventbus import EventBus
    from eventbus.rooms import Rooms

    async def send(frame: str | bytes) -> None:
        count.hit()

    bus = EventBus(f"redis://127.0.0.1:{port}", publish_timeout=10.0)
    rooms = Rooms(bus)
    async with bus, rooms, AsyncExitStack() as stack:
        connections = [rooms.connect(send) for _ in range(clients)]
        await asyncio.gather(*(hold(connection, stack) for connection in connections))
        yield lambda: rooms.emit("message", DATA)


async def hold(connection: Any, stack: AsyncExitStack) -> None:
    """Enter a connection in a task that stays in it: each client has its own, as in a server."""
    entered = asyncio.Event()

    async def stay() -> None:
        async with connection:
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stay())
    stack.callback(task.cancel)
    await entered.wait()


@asynccontextmanager
async def socketio(port: int, clients: int, count: Count) -> AsyncIterator[Emit]:
    """python-socketio, its defaults but for timeouts: nobody here answers a heartbeat."""
    import socketio
    from engineio.async_socket import AsyncSocket
    from redis.asyncio import Redis

    class WebSocket:
        async def send(self, data: str | bytes) -> None:
            count.hit()

        async def wait(self) -> None:
            await asyncio.Event().wait()

        async def close(self) -> None:
            pass

    # Its client gives a connection up after 5 s by default; a busy machine must not cost it that.
    patient = {"socket_timeout": 120, "socket_connect_timeout": 120}
    manager = socketio.AsyncRedisManager(f"redis://127.0.0.1:{port}", redis_options=patient)
    server = socketio.AsyncServer(
        async_mode="asgi", client_manager=manager, ping_interval=600, monitor_clients=False
    )
    manager.initialize()
    tasks = []
    for n in range(clients):
        sid = f"engine-{n}"
        server.eio.sockets[sid] = socket = AsyncSocket(server.eio, sid)
        tasks.append(asyncio.create_task(socket._websocket_handler(WebSocket())))
        await manager.connect(sid, "/")
    async with Redis.from_url(f"redis://127.0.0.1:{port}", **patient) as client:
        while (await client.pubsub_numsub("socketio"))[0][1] < NODES:  # noqa: ASYNC110  # its only sign
            await asyncio.sleep(0.05)
    yield lambda: server.emit("message", DATA)
    for task in tasks:
        task.cancel()


async def joins(port: int, rooms_: int) -> Run:
    """What it takes to join many rooms on one node: all in one call, and one after the other."""
    from eventbus import EventBus
    from eventbus.rooms import Rooms

    async def send(frame: str | bytes) -> None:
        pass

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    found: Run = {"rooms": rooms_}
    bus = EventBus(f"redis://127.0.0.1:{port}")
    rooms = Rooms(bus)
    async with bus, rooms, rooms.connect(send) as client:
        for way in ("at_once", "one_by_one"):
            names = [f"{way}-{n}" for n in range(rooms_)]
            before, begin = resident(), perf_counter()
            if way == "at_once":
                await client.join(*names)
            else:
                for name in names:
                    await client.join(name)
            found[f"{way}_join_seconds"] = perf_counter() - begin
            if way == "at_once":  # later ones find memory that was used before
                found["bytes_per_room"] = (resident() - before) / rooms_
            begin = perf_counter()
            await client.leave(*names)
            found[f"{way}_leave_seconds"] = perf_counter() - begin
    return found


CONTESTANTS = {"eventbus": eventbus, "socketio": socketio}


async def node(options: argparse.Namespace) -> Run:
    """One node; the first one emits, and tells the time."""
    if options.role == "joins":
        return await joins(options.port, options.clients)
    boards = [Board(Path(options.folder, f"board-{n}")) for n in range(NODES)]
    count = Count(boards[options.number], options.clients)
    contestant = CONTESTANTS[options.role]
    loop = asyncio.get_running_loop()
    async with contestant(options.port, options.clients, count) as emit:
        print("ready", flush=True)
        if options.number:
            await loop.run_in_executor(None, input)
            return {}
        await loop.run_in_executor(None, input)
        begin = end = spent()
        for number in range(WARM + options.emits):
            if number == WARM:
                begin = spent()
            await emit()
            due, late = (number + 1) * options.clients, loop.time() + STALL
            while any(board.read() < due for board in boards) and loop.time() < late:  # noqa: ASYNC110
                await asyncio.sleep(0.0005)
            end = spent()
            if loop.time() >= late:
                break  # something was lost: the run is incomplete
        await asyncio.sleep(0.2)  # a copy too many would come now
        received = sum(board.read() for board in boards)
    deliveries = options.emits * options.clients * NODES
    expected = (WARM + options.emits) * options.clients * NODES
    found = {"messages": deliveries, "received": received, "complete": received == expected}
    return found | costs(begin, end, deliveries)


def fanned_out(name: str, clients: int, emits: int) -> Run:
    """One contestant: a fresh server, three fresh nodes."""
    with new_server() as server, tempfile.TemporaryDirectory() as folder, children() as start:
        for number in range(NODES):
            Board.create(Path(folder, f"board-{number}"))
        words = ("--folder", folder, "--clients", clients, "--emits", emits)
        nodes = [start("rooms", name, server.port, "--number", n, *words) for n in range(NODES)]
        for child in nodes:
            child.ready()
        nodes[0].go()
        result = nodes[0].result()
        for child in nodes[1:]:
            child.go()
            child.result()
    return result


def joined(rooms: int) -> Run:
    """Joins, on a fresh server."""
    with new_server() as server, children() as start:
        return start("rooms", "joins", server.port, "--clients", rooms).result()


def main() -> None:
    """Without a role: run everything, and print it."""
    parser = argparse.ArgumentParser("python -m benchmarks.rooms")
    parser.add_argument("role", nargs="?", choices=[*CONTESTANTS, "joins"])
    parser.add_argument("port", nargs="?", type=int)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--emits", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs.DEADLINE = DEADLINE
    if options.role:
        print(json.dumps(asyncio.run(node(options))))
        return
    done: dict[str, list[Run]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.runs):
        for name, results in done.items():
            try:
                results.append(fanned_out(name, options.clients, options.emits))
            except RunFailed as error:
                results.append({"complete": False, "error": str(error), "per_second": 0.0})
    rates = {name: median(run["per_second"] for run in results) for name, results in done.items()}
    for name, results in done.items():
        complete = all(run["complete"] for run in results)
        print(f"{name:10} {rates[name]:12,.0f} deliveries/s, everything arrived once: {complete}")
    if rates["socketio"]:
        print(f"ratio      {rates['eventbus'] / rates['socketio']:12.1f}")
    many = joined(options.clients)
    print(json.dumps(many, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"fan_out": done, "joins": many}, indent=1) + "\n")


if __name__ == "__main__":
    main()
