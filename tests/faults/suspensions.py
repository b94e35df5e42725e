"""Cancellation at every suspension: run an operation, cancelled when it waits for the k-th time.

An operation can only be cancelled where it waits. So each of its waits is tried in turn: k = 0 (it
has not begun), 1, 2, … until it ends before its k-th wait. The waits of the tasks that it starts
count too (`deep`): they are the moments at which a cancellation meets a half-open connection.

    "task"    task.cancel(), at the k-th wait
    "twice"   again at the next wait: somebody is impatient, or a timeout meets a shutdown
    "late"    as the answer arrives: what it waited for is there, and it has not seen it yet
    "scope"   an anyio CancelScope around it
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import anyio
from anyio.lowlevel import checkpoint

How = Literal["task", "twice", "late", "scope"]
LIMIT = 20.0
"""Seconds until a wait has failed: far more than a slow machine needs."""

_counter: ContextVar[_Counter | None] = ContextVar("counter", default=None)


@dataclass
class Outcome:
    """How an operation ended. `hit`: a cancellation reached it; `begun`: it ran at all."""

    hit: bool
    begun: bool
    value: Any = None
    error: BaseException | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it ended as cancelled."""
        return isinstance(self.error, asyncio.CancelledError)


class _Counter:
    """Counts waits, and tells at the k-th, and at every later one while `more` says so."""

    def __init__(self, k: int, *, deep: bool, hit: Callable[[Any], None], more: int) -> None:
        self.deep = deep
        self.begun = False
        self._numbers = range(k, k + more)
        self._count = 0
        self._hit = hit

    def suspended(self, waits_for: Any) -> None:
        self._count += 1
        if self._count in self._numbers:
            self._hit(waits_for)


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine whose waits are counted."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], counter: _Counter) -> None:
        self._coroutine = coroutine
        self._counter = counter

    def send(self, value: Any) -> Any:
        self._counter.begun = True
        waits_for = self._coroutine.send(value)
        self._counter.suspended(waits_for)
        return waits_for

    def throw(self, *error: Any) -> Any:
        waits_for = self._coroutine.throw(*error)
        self._counter.suspended(waits_for)
        return waits_for

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # anyio asks for `cr_frame` and its kin


def _factory(
    loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
) -> asyncio.Future[Any]:
    counter = _counter.get()
    if counter is not None and counter.deep:
        coroutine = _Counted(coroutine, counter)
    return asyncio.Task(coroutine, loop=loop, **options)


@contextmanager
def counting() -> Iterator[None]:
    """Count in the tasks that operations start, too (they inherit the context)."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(_factory)
    try:
        yield
    finally:
        loop.set_task_factory(None)


async def cancel_at(
    k: int,
    operation: Coroutine[Any, Any, Any],
    how: How = "task",
    *,
    deep: bool = False,
    instead: Callable[[], object] | None = None,
) -> Outcome:
    """Run an operation in a task of its own, cancelled at its k-th wait (or `instead` is called
    then). Fails when it hangs."""
    scope = anyio.CancelScope()
    outcome = Outcome(hit=False, begun=False)

    def hit(waits_for: Any) -> None:
        if instead is not None:
            outcome.hit = True
            instead()
        elif how == "scope":
            outcome.hit = True
            scope.cancel()
        elif how == "late" and isinstance(waits_for, asyncio.Future) and not waits_for.done():
            waits_for.add_done_callback(lambda _: cancel())
        else:
            cancel()

    def cancel() -> None:
        outcome.hit = task.cancel() or outcome.hit

    async def run() -> None:
        with scope if how == "scope" else nullcontext():
            try:
                outcome.value = await operation
            except BaseException as error:
                outcome.error = error
                raise

    counter = _Counter(k, deep=deep, hit=hit, more=2 if how == "twice" else 1)
    token = _counter.set(counter)
    try:
        task: asyncio.Future[None] = asyncio.Task(_Counted(run(), counter))
    finally:
        _counter.reset(token)
    if k == 0:
        hit(None)
    await asyncio.wait({task}, timeout=LIMIT)
    assert task.done(), f"cancelled at wait {k} ({how}), it hangs"
    outcome.begun = counter.begun
    if not outcome.begun:
        operation.close()
        outcome.error = asyncio.CancelledError()
    elif not task.cancelled():
        task.exception()  # it is in the outcome
    return outcome


class Census(NamedTuple):
    """What must be the same before and after: tasks, connections, file descriptors."""

    tasks: frozenset[asyncio.Task[Any]]
    clients: int
    descriptors: int

    @classmethod
    def take(cls, clients: Callable[[], int]) -> Census:
        """Count now. `clients` asks the server how many connections it has."""
        return cls(frozenset(asyncio.all_tasks()), clients(), len(os.listdir("/proc/self/fd")))

    async def again(self, clients: Callable[[], int], what: str) -> None:
        """Return when everything is as it was; fail when something stays."""
        now = self
        try:
            async with asyncio.timeout(LIMIT):
                while True:
                    now = Census.take(clients)
                    left = now.tasks - self.tasks
                    if not left and now[1] <= self[1] and now[2] <= self[2]:
                        return  # fewer: what an earlier test closed was still closing then
                    await checkpoint()
        except TimeoutError:
            left = [task.get_name() for task in now.tasks - self.tasks]
            raise AssertionError(f"{what}: left {left}, {self[1:]} became {now[1:]}") from None
