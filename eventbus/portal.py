"""One bus in a thread of its own, for programs without an event loop: what `blocking` stands on.

In each process a `Portal` is one daemon thread that runs an event loop with one `EventBus`; other
threads hand it work and wait. It is made for one start, and thrown away when that ends or fails.

Forks. A thread does not survive a fork, and a connection must not be shared by two processes. So
around a fork every loop stands still (no lock of its own is held then), the parent goes on with
what it has, and in the child the portal is of no use any more. The child closes the sockets that it
inherited and keeps the objects for ever: their clean-up would reach into what the parent still uses
(the epoll set, the pipe that wakes the loop).
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from eventbus import BusClosed, BusUnavailable, EventBus, PublishUncertain

__all__ = ["Portal", "guard"]

T = TypeVar("T")

_PAUSE = 1.0
"""Seconds after a failed start in which the next one fails at once, as a publish in an outage."""
_STILL = 1.0
"""Seconds that a fork waits for a loop to stand still; one that does not is busy in user code."""

guard = threading.RLock()
"""Held while a portal is made, ended or handed something, and by a fork: then none is half done."""
_portals: set[Portal] = set()  # those that run in this process
_inherited: list[Portal] = []  # of a parent: never cleaned up


class Portal:
    """One thread with one event loop in which the bus runs, from its start to its end."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._pid = os.getpid()
        self._ready: Future[None] = Future()
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._over = asyncio.Event()
        self._ended = False
        self._failed_at = 0.0
        self._answers: set[Future[Any]] = set()
        self._go_on = threading.Event()
        self._thread = threading.Thread(target=self._main, name="eventbus publisher", daemon=True)
        with guard:
            try:
                self._thread.start()
            except RuntimeError as error:
                self._loop.close()
                raise BusClosed("the interpreter is ending: no publisher can start") from error
            _portals.add(self)

    # -- In the calling threads --------------------------------------------------------------------

    def is_here(self) -> bool:
        """Whether the caller is in the thread of the portal itself."""
        return threading.get_ident() == self._thread.ident

    def is_ready(self) -> bool:
        """Whether its bus was started in this process, and has not ended."""
        done = self._ready.done() and self._ready.exception() is None
        return done and not self._ended and self._pid == os.getpid()

    def may_be_used(self) -> bool:
        """False: begin anew. A start that failed is not tried again for a moment."""
        if self._pid != os.getpid():
            return False
        if self._ready.done() and self._ready.exception() is not None:
            return monotonic() - self._failed_at < _PAUSE
        return not self._ended

    def wait_ready(self) -> None:
        """Return when the bus was started. Raises what its start raised."""
        is_old = self._ready.done()
        error = self._ready.exception()
        if isinstance(error, BusUnavailable) and is_old:
            raise BusUnavailable(f"{error} (tried a moment ago)") from error
        if error is not None:
            raise error

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work returns or raises, on the loop and in the caller's context. Whoever is
        interrupted cancels it, wherever that is. Raises BusClosed when the portal is closed."""
        answer: Future[T] = Future()  # made first: an interrupt may come between any two lines
        try:
            with guard:
                if self._ended:
                    raise BusClosed("the publisher was closed meanwhile; certainly not sent")
                self._answers.add(answer)
                self._loop.call_soon_threadsafe(self._begin, work, answer)
            return answer.result()
        except CancelledError:
            raise BusClosed("the publisher was closed meanwhile") from None
        finally:
            self._answers.discard(answer)
            answer.cancel()  # does nothing when there is an outcome

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]], answer: Future[T]) -> None:
        """In the loop: do the work for whoever waits for the answer."""
        if answer.cancelled():
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(work())

        def withdraw(answer: Future[T]) -> None:
            if answer.cancelled():
                with suppress(RuntimeError):  # the loop has ended, and the task with it
                    loop.call_soon_threadsafe(task.cancel)

        def settle(task: asyncio.Task[T]) -> None:
            error = CancelledError() if task.cancelled() else task.exception()
            if answer.done() or not answer.set_running_or_notify_cancel():
                return  # nobody waits any more
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(task.result())

        answer.add_done_callback(withdraw)
        task.add_done_callback(settle)

    def end(self) -> None:
        """Ask the loop to come to its end. Takes no lock: the garbage collector may ask, in a
        thread that is just being started by one that holds the guard."""
        if self._pid == os.getpid():
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._over.set)

    def close(self, patience: float) -> None:
        """End, and return when the thread is gone, or after `patience` seconds."""
        self.end()
        if self._pid == os.getpid() and not self.is_here():
            self._thread.join(patience)

    # -- In its own thread -------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._live())
        finally:
            self._leave()
            for answer in [self._ready, *self._answers]:
                if not answer.done():
                    answer.set_exception(BusClosed("the publisher was closed meanwhile"))

    async def _live(self) -> None:
        try:
            await self._bus.start()
        except BaseException as error:
            self._failed_at = monotonic()
            self._leave()
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            await self._over.wait()
            await self._bus.stop()
        finally:
            self._leave()  # before the loop is closed: nobody may hand it anything then

    def _leave(self) -> None:
        with guard:
            self._ended = True
            _portals.discard(self)

    # -- Around a fork ---------------------------------------------------------------------------

    def stand_still(self) -> None:
        """Halt the loop between two callbacks, where no lock is held, until `go_on`."""
        still, go_on = threading.Event(), threading.Event()
        self._go_on = go_on

        def stand() -> None:
            still.set()
            go_on.wait()

        if not self.is_here():
            self._loop.call_soon_threadsafe(stand)
            still.wait(_STILL)

    def go_on(self) -> None:
        """The fork is over."""
        self._go_on.set()

    def leave_behind(self) -> None:
        """In the child: close what is shared with the parent, and touch nothing else of it. The
        numbers of the descriptors stay taken, as the objects that hold them may close them."""
        null = os.open(os.devnull, os.O_RDWR)
        for key in list((self._selector.get_map() or {}).values()):
            os.dup2(null, key.fd, inheritable=False)
        os.close(null)
        self._selector.close()
        for answer in [self._ready, *self._answers]:  # of a fork inside a signal handler
            if not answer.done():
                answer.set_exception(PublishUncertain("the process forked in the middle"))


# A fork in one thread while another makes a portal waits for that; the three belong together.


def _before_fork() -> None:
    guard.acquire()
    for portal in list(_portals):
        portal.stand_still()


def _after_in_parent() -> None:
    for portal in list(_portals):
        portal.go_on()
    guard.release()


def _after_in_child() -> None:
    for portal in list(_portals):
        portal.leave_behind()
    _inherited.extend(_portals)
    _portals.clear()
    guard.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_in_parent,
        after_in_child=_after_in_child,
    )
