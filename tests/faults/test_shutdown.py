"""Stopping, whatever the bus is doing; and the bus in a process, a loop or a thread not its own.

A stop ends by itself: here it has a drain timeout of a minute where nothing has to be waited for,
and one of a fraction of a second where something is stuck. Both must end within `LIMIT`.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from anyio.lowlevel import checkpoint

from eventbus import BusClosed, Event, EventBus, EventBusError
from eventbus.server import Server
from tests.faults.proxy import Proxy
from tests.faults.suspensions import LIMIT, Census, cancel_at, counting
from tests.helpers import Seen, soon

ROOT = Path(__file__).parents[2]
STATES = ["quiet", "busy", "stuck", "frozen", "reconnecting", "away"]
WAYS = ["once", "twice", "together", "cancelled", "impatiently", "in a handler"]


class Count(Event):
    n: int = 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that the tests of this file may freeze."""
    with Server(port=0) as server:
        yield server


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    """Another connection to it, which counts the connections."""
    with redis.Redis(unix_socket_path=server.socket_path) as admin:
        admin.ping()
        yield admin
        server.thaw()


async def until(condition: Callable[[], object]) -> None:
    """Return when it is true: for what has no event of its own, such as `health()`."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await checkpoint()


# Stop


@asynccontextmanager
async def started(state: str, proxy: Proxy, server: Server, *, hurried: bool) -> AsyncIterator[Any]:
    """A started bus in this state, and an event that makes its handler call a function. A stop
    that is `hurried` may not need the drain timeout."""
    waits = state in ("stuck", "frozen") and not hurried
    bus = EventBus(proxy.url, drain_timeout=0.2 if waits else 60.0, publish_timeout=0.2)
    entered: Seen[int] = Seen()
    todo: list[Callable[[], Any]] = []
    gate, call = asyncio.Event(), asyncio.Event()

    @bus.on("work")
    async def work(event: Count) -> None:
        entered.append(event.n)
        if state == "stuck":
            await gate.wait()
        await checkpoint()

    @bus.on("wait")
    async def caller(event: Count) -> None:
        entered.append(-1)
        await call.wait()
        for function in todo:
            await function()

    await bus.start()
    await bus.publish("wait", Count())
    await entered.reach(1)
    if state in ("busy", "stuck"):
        for n in range(20):
            await bus.publish("work", Count(n=n))
        await entered.reach(2)
    elif state == "frozen":
        server.freeze()
        bus.publish_nowait("work", Count())
    elif state != "quiet":
        if state == "away":
            proxy.retarget(None)
        proxy.cut()
        await until(lambda: bus.health().state == "down")
    yield bus, todo, call
    gate.set()
    call.set()
    if state == "frozen":
        server.thaw()


@pytest.mark.scenario(33)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
async def test_stop(state: str, way: str, server: Server, admin: redis.Redis) -> None:
    """In whatever state, and however often and from wherever it is stopped, a bus ends, with no
    task, no connection and no descriptor left, and can be started again."""
    async with Proxy(server.port) as proxy:
        before = Census.take(lambda: len(admin.client_list()))
        hurried = way in ("cancelled", "impatiently")
        async with started(state, proxy, server, hurried=hurried) as (bus, todo, call):
            todo.append(checkpoint if way != "in a handler" else bus.stop)
            if way != "in a handler":
                call.set()
            if way == "once":
                await soon(bus.stop(), LIMIT)
            elif way == "twice":
                await soon(bus.stop(), LIMIT)
                await soon(bus.stop(), LIMIT)
            elif way == "together":
                await soon(asyncio.gather(bus.stop(), bus.stop(), bus.stop()), LIMIT)
            elif way == "cancelled":
                with anyio.fail_after(LIMIT), anyio.CancelScope() as scope:
                    scope.cancel()
                    await bus.stop()
                assert scope.cancelled_caught
            elif way == "impatiently":
                stopping = asyncio.create_task(bus.stop())
                async with asyncio.timeout(LIMIT):
                    while not stopping.done():
                        await checkpoint()
                        stopping.cancel()
                assert stopping.cancelled()
            else:
                call.set()
                await until(lambda bus=bus: bus._run is None)  # type: ignore[misc]
        assert bus.health().state == "closed"
        await bus.stop()
        proxy.retarget(server.port)
        await before.again(lambda: len(admin.client_list()), f"{state}, {way}")
        async with bus:
            assert (await soon(bus.publish("work", Count()), LIMIT)).receivers == 1
        await before.again(lambda: len(admin.client_list()), "a second stop")
    del bus, todo
    gc.collect()  # what was not closed says so now, and warnings are errors


@pytest.mark.scenario(33)
async def test_stop_during_a_start(server: Server, admin: redis.Redis) -> None:
    """A stop at any moment of a start ends both: the start returns or raises BusClosed, nothing is
    left, no timer goes on, and the bus can be started again."""
    before = Census.take(lambda: len(admin.client_list()))
    url = f"unix://{server.socket_path}"
    with counting():
        for k in range(1, 400):
            bus = EventBus(url)

            @bus.on("a:*", "b")
            async def handler(event: Count) -> None: ...

            stops: list[asyncio.Task[None]] = []

            def stop(bus: EventBus = bus, stops: list[asyncio.Task[None]] = stops) -> None:
                stops.append(asyncio.get_running_loop().create_task(bus.stop()))

            outcome = await cancel_at(k, bus.start(), deep=True, instead=stop)
            run = bus._last
            await asyncio.gather(*stops)
            assert outcome.error is None or isinstance(outcome.error, BusClosed), k
            if outcome.hit:
                assert bus.health().state == "closed"
                assert run is not None
                assert run._retry is None or run._retry.cancelled(), k
                await before.again(lambda: len(admin.client_list()), f"a stop at wait {k}")
            async with asyncio.timeout(LIMIT):
                if outcome.hit:
                    await bus.start()
                await bus.publish("b", Count())
                await bus.stop()
            if not outcome.hit:
                return
    raise AssertionError("a start that does not end")


@pytest.mark.scenario(33)
async def test_fire_and_forget_stop(url: str) -> None:
    """A handler may leave the stop to a task and return: the bus does not wait for a handler that
    has returned."""
    bus = EventBus(url, drain_timeout=60.0)
    tasks: list[asyncio.Task[None]] = []

    @bus.on("stop")
    async def handler(event: Count) -> None:
        tasks.append(asyncio.create_task(bus.stop()))

    await bus.start()
    await bus.publish("stop", Count())
    await until(lambda: tasks)
    done, _ = await asyncio.wait(tasks, timeout=5.0)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert done


@pytest.mark.scenario(33)
async def test_stop_in_a_task_of_an_earlier_call(url: str) -> None:
    """A task that a handler started long ago passes for the call of now when it stops the bus: that
    call is not waited for, what waits behind it is dropped and counted, and the stop ends."""
    bus = EventBus(url)
    tasks: list[asyncio.Task[None]] = []
    handled: list[int] = []
    gate, go_on = asyncio.Event(), asyncio.Event()

    async def supervise() -> None:
        await gate.wait()
        await bus.stop()

    @bus.on("x")
    async def handler(event: Count) -> None:
        if event.n == 0:
            tasks.append(asyncio.create_task(supervise()))
            return
        gate.set()
        await go_on.wait()
        handled.append(event.n)

    await bus.start()
    for n in range(4):
        await bus.publish("x", Count(n=n))
    await soon(gate.wait())
    await until(lambda: bus.health().state == "closed")
    for _ in range(20):
        await checkpoint()
    await asyncio.wait(tasks, timeout=LIMIT)
    await until(lambda: bus._run is None)
    go_on.set()
    await until(lambda: handled == [1])
    stats = bus.stats()
    assert 0 < stats.dropped == stats.received - stats.delivered


# A signal

PROGRAM = """
import asyncio, sys
from eventbus import Event, EventBus
class Count(Event):
    n: int = 0
bus = EventBus(sys.argv[1], drain_timeout=float(sys.argv[2]), heartbeat=0.5)
@bus.on("x")
async def handler(event: Count) -> None:
    print("handling", flush=True)
    await asyncio.Event().wait()
@bus.on("y")
async def other(event: Count) -> None: ...
async def main():
    running = asyncio.create_task(bus.run())
    while not bus.health():
        await asyncio.sleep(0)
    await bus.publish("x", Count())
    await running
    print(bus.health().state, flush=True)
asyncio.run(main())
"""


@pytest.fixture
def program(server: Server, admin: redis.Redis) -> Iterator[Callable[[float], Any]]:
    """Starts the program with a drain timeout; it is in its handler when this returns."""
    started: list[subprocess.Popen[str]] = []

    def start(drain_timeout: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-X", "dev", "-c", PROGRAM]
        process = subprocess.Popen(
            [*command, f"unix://{server.socket_path}", str(drain_timeout)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "handling\n"
        return process

    yield start
    server.thaw()
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.scenario(33)
@pytest.mark.parametrize("state", ["connected", "frozen"])
def test_signal(state: str, program: Any, server: Server, admin: redis.Redis) -> None:
    """A program that gets SIGTERM while a handler hangs, with Redis there or frozen, ends by itself
    after the drain timeout, with nothing unclosed and no connection left."""
    process = program(0.3)
    if state == "frozen":
        server.freeze()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT)
    server.thaw()
    shown = [line for line in err.splitlines() if "reconnecting" not in line]
    assert (out, shown, process.returncode) == ("closed\n", [], 0)
    while len(admin.client_list()) != 1:
        pass  # until the server has seen it


@pytest.mark.scenario(33)
def test_second_signal(program: Any, server: Server, admin: redis.Redis) -> None:
    """Who does not want to wait for the drain sends the signal again: that ends the program."""
    process = program(60.0)
    process.send_signal(signal.SIGTERM)
    while admin.pubsub_numsub("y")[0][1]:
        pass  # until it has let go: the drain has begun
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGTERM


STARTING = """
import asyncio
from eventbus import EventBus
bus = EventBus("redis://127.0.0.1:1", connect_timeout=60)
async def main():
    running = asyncio.ensure_future(bus.run())
    while bus.health().state != "starting":
        await asyncio.sleep(0)
    print("starting", flush=True)
    await running
    print(bus.health().state)
asyncio.run(main())
"""


@pytest.mark.scenario(33)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start(number: int) -> None:
    """SIGTERM and SIGINT end a `run` that still waits for Redis, in order, as they do later."""
    command = [sys.executable, "-W", "error", "-c", STARTING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, "closed\n")


async def test_run_leaves_a_running_bus_alone() -> None:
    """`run` of a bus that is running already raises, and the bus goes on."""
    async with EventBus("memory://run") as bus:
        with pytest.raises(EventBusError, match="running already"):
            await bus.run()
        assert bus.health()


# Elsewhere


@pytest.mark.scenario(34)
@pytest.mark.parametrize("where", ["memory", "valkey"])
def test_fork(where: str, server: Server) -> None:
    """In a forked child a started bus refuses every use, naming the process, and is not healthy;
    one that was only built works there; and the parent's bus does not notice."""
    url = "memory://x" if where == "memory" else f"unix://{server.socket_path}"
    code = f"""
import asyncio, os
from eventbus import BusClosed, Event, EventBus
class Count(Event):
    n: int = 0
started, built = EventBus("{url}"), EventBus("{url}")
@started.on("x")
async def handler(event: Count) -> None:
    seen.set()
async def refuse() -> bool:
    refused = 0
    for use in (
        lambda: started.publish("x", Count()),
        lambda: started.publish_raw("x", b""),
        lambda: started.expect("x", timeout=1),
        lambda: route.add("y"),
        started.stop,
    ):
        try:
            await use()
        except BusClosed as error:
            refused += str(os.getppid()) in str(error)
    return refused == 5 and not started.health() and "closed" in repr(started)
async def works() -> bool:
    async with built:
        async with built.subscribe("z") as messages:
            await built.publish("z", Count())
            await anext(messages)
    return True
async def main() -> None:
    global seen, route
    seen = asyncio.Event()
    async with started:
        route = await started.attach(handler, "y:*")
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 2 - asyncio.run(refuse()) - asyncio.run(works())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        await started.publish("x", Count())
        async with asyncio.timeout(5):
            await seen.wait()
        assert started.health() and not started.stats().reconnects
        print(os.waitstatus_to_exitcode(status))
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


_bus: EventBus | None = None


async def _in_a_worker(results: Any) -> None:
    assert _bus is not None
    try:
        await _bus.publish("x", Count())
    except EventBusError as error:
        results.append(str(error))
    results.append(bool(_bus.health()))


def _worker(pipe: Any) -> None:
    """A worker of a pool: a forked process with the bus of its parent in a global name."""
    results: list[Any] = []
    asyncio.run(_in_a_worker(results))
    pipe.send(results)


@pytest.mark.scenario(34)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_multiprocessing(server: Server) -> None:
    """A worker process of `multiprocessing` that uses its parent's bus gets an error that names the
    parent's process, at once."""
    global _bus  # noqa: PLW0603 - what a worker inherits
    context = multiprocessing.get_context("fork")
    async with EventBus(f"unix://{server.socket_path}") as bus:
        _bus = bus
        ours, theirs = context.Pipe()
        worker = context.Process(target=_worker, args=(theirs,))
        worker.start()
        answered = await anyio.to_thread.run_sync(ours.poll, LIMIT)
        results = ours.recv() if answered else None
        worker.kill()
        worker.join()
        await bus.publish("x", Count())
        _bus = None
        ours.close()
        theirs.close()
    assert results is not None
    assert f"process {multiprocessing.current_process().pid}" in results[0]
    assert results[1] is False


@pytest.mark.scenario(34)
async def test_everything_elsewhere(url: str) -> None:
    """In the loop of another thread every use of a bus, its routes and its streams is a BusClosed
    that names the loop; none hangs, and none does harm."""

    async def handler(event: Count) -> None: ...

    async with EventBus(url) as bus, bus.subscribe("x") as messages:
        route = await bus.attach(handler, "y")
        uses: dict[str, Callable[[], Any]] = {
            "publish": lambda: bus.publish("x", Count()),
            "publish_raw": lambda: bus.publish_raw("x", b""),
            "expect": lambda: bus.expect("x", timeout=1.0),
            "stop": bus.stop,
            "add": lambda: route.add("z"),
            "discard": lambda: route.discard("y"),
            "detach": route.detach,
            "messages.add": lambda: messages.add("z"),
            "iterate": messages.__anext__,
        }

        async def attempt(use: Callable[[], Any]) -> str:
            try:
                async with asyncio.timeout(2.0):
                    await use()
            except BusClosed as error:
                return "loop" if "loop" in str(error) else str(error)
            except TimeoutError:
                return "hangs"
            return "works"

        def elsewhere() -> dict[str, str]:
            return {name: asyncio.run(attempt(use)) for name, use in uses.items()}

        found = await asyncio.to_thread(elsewhere)
        assert found == dict.fromkeys(uses, "loop")
        await bus.publish("x", Count())
        await soon(anext(messages))
        assert route.patterns == ("y",)


@pytest.mark.scenario(34)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_second_loop(stopped: bool, server: Server) -> None:
    """A bus may be started in one `asyncio.run` after another. One that was left running is not
    healthy when its loop is gone; it can be started again, and its old handles say so."""
    code = f"""
import asyncio
from eventbus import BusClosed, Event, EventBus
class Count(Event):
    n: int = 0
bus = EventBus("unix://{server.socket_path}")
async def handler(event: Count) -> None: ...
async def first():
    await bus.start()
    route = await bus.attach(handler, "x")
    if {stopped}:
        await bus.stop()
    return route
async def second(route):
    assert not bus.health(), bus.health()
    try:
        await bus.publish("x", Count())
    except BusClosed as error:
        print("not running" in str(error) or "loop" in str(error))
    try:
        await route.add("y")
    except BusClosed as error:
        print("stopped" in str(error) or "loop" in str(error))
    async with bus:
        print((await bus.publish("x", Count())).receivers)
route = asyncio.run(first())
asyncio.run(second(route))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("True\nTrue\n0\n", 0), done.stderr
