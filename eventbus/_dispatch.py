"""One call of one handler: decode, middleware, call, and what went wrong.

A lane's worker runs `Dispatcher.serve`. What goes wrong hurts this call only: it is counted and
reported, and the worker goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from eventbus._envelope import Frame, message_of
from eventbus._errors import InvalidEvent
from eventbus._handlers import SKIP
from eventbus._lanes import TURN, Item, Lane, Target
from eventbus._messages import EMPTY, Message
from eventbus._reports import Reports, inside, was_cancelled

Middleware = Callable[[Message[Any], Callable[[Message[Any]], Awaitable[Any]]], Awaitable[Any]]


class Dispatcher:
    """How the handlers of a bus are called. `on_fatal` hears of KeyboardInterrupt and
    SystemExit."""

    def __init__(
        self,
        reports: Reports,
        middleware: Sequence[Middleware],
        *,
        bare: bool,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.invalid = 0
        self._reports = reports
        self._middleware = tuple(middleware)
        self._bare = bare
        self._on_fatal = on_fatal

    async def serve(self, lane: Lane) -> None:
        """The life of a worker. Gives the loop back by elapsed time."""
        plan, done = lane.plan, lane.queue.done
        if plan is None:
            return
        call, popleft = plan.fn, lane.queue.popleft
        simple = (
            plan.takes_event_first
            and not plan.threaded
            and not self._middleware
            and lane.options.timeout is None
        )
        inside.set(asyncio.current_task())
        turn = monotonic()
        while not lane.closed:
            try:
                item = popleft()
            except IndexError:
                await lane.wait()
                turn = monotonic()
                continue
            target, payload, start, reader, _ = item
            lane.bytes -= len(payload)
            try:
                if reader is not None and simple:
                    # The short way, for nearly every message: our own layout, one handler.
                    try:
                        event = reader.direct(payload[start:-1])
                    except Exception:
                        await self._work(item)  # the long way judges
                    else:
                        lane.delivered += 1
                        try:
                            await call(event, **target.static)
                        except BaseException as error:
                            await self._failed(item, event, error)
                else:
                    await self._work(item)
            finally:
                if done is not None:
                    done(item)
            if monotonic() - turn > TURN:
                await asyncio.sleep(0)
                turn = monotonic()

    # -- The event -------------------------------------------------------------------------------

    async def read(self, item: Item) -> tuple[Any, Frame]:
        """The event of an item (SKIP when it is not one for its route) and its frame."""
        target, payload, _, _, shared = item
        frame = shared if shared is not None else Frame(target.channel, payload)
        lane = target.lane
        try:
            event = lane.body.decode(frame) if target.converts else SKIP
            if event is not SKIP and lane.plan is not None:
                lane.plan.check(frame)
        except InvalidEvent as error:
            await self.judge(frame, error, target)
            return SKIP, frame
        if event is SKIP:
            lane.skipped += 1
        return event, frame

    def message(self, target: Target, frame: Frame, event: Any) -> Message[Any]:
        """The message around an event, as this route sees it."""
        bare = self._bare or target.lane.body.bare
        return message_of(frame, event, target.pattern, target.captures, bare=bare)

    async def judge(self, frame: Frame, error: InvalidEvent, target: Target | None) -> None:
        """Count and report a frame that is no event, once."""
        if frame.judged:
            return
        frame.judged = True
        self.invalid += 1
        error.channel = frame.channel
        pattern: str | None = None
        captures: Mapping[str, str] = EMPTY
        if target is not None:
            pattern, captures = target.pattern, target.captures
        message = message_of(frame, frame.payload, pattern, captures, bare=self._bare)
        await self._reports.report(error, message, target.lane.name if target else "")

    # -- The call --------------------------------------------------------------------------------

    async def _work(self, item: Item) -> None:
        target = item[0]
        plan = target.lane.plan
        event, frame = await self.read(item)
        if event is SKIP or plan is None:
            return
        target.lane.delivered += 1
        try:
            if self._middleware:
                message = self.message(target, frame, event)
                await self._through(0, target, frame, message)
            elif plan.needs_message:
                await self._call(target, frame, event, self.message(target, frame, event))
            else:
                await self._call(target, frame, event, None)
        except BaseException as error:
            await self._failed(item, event, error)

    async def _through(
        self, depth: int, target: Target, frame: Frame, message: Message[Any]
    ) -> Any:
        """The middleware from `depth` on, and at last the handler."""
        if depth == len(self._middleware):
            return await self._call(target, frame, message.event, message)
        call_next = partial(self._through, depth + 1, target, frame)
        return await self._middleware[depth](message, call_next)

    async def _call(
        self, target: Target, frame: Frame, event: Any, message: Message[Any] | None
    ) -> Any:
        plan, timeout = target.lane.plan, target.lane.options.timeout
        if plan is None:
            return None  # a stream calls nothing
        call = partial(plan.call, event, frame, target.static, message)
        if plan.threaded:
            return await self._call_thread(target, frame, event, call, timeout)
        if timeout is None:
            return await call()
        clock = asyncio.timeout(timeout)
        try:
            async with clock:
                return await call()
        except TimeoutError:
            if not clock.expired():
                raise
            raise TimeoutError(f"took longer than {timeout} s and was cancelled") from None

    async def _call_thread(
        self,
        target: Target,
        frame: Frame,
        event: Any,
        call: Callable[[], Any],
        timeout: float | None,
    ) -> Any:
        """A thread cannot be cancelled: one that overruns has failed, and keeps its place."""
        from anyio import to_thread

        running = asyncio.ensure_future(
            to_thread.run_sync(call, abandon_on_cancel=True, limiter=target.lane.limiter)
        )
        try:
            done, _ = await asyncio.wait({running}, timeout=timeout)
            if done:
                return running.result()
            overrun = TimeoutError(f"took longer than {timeout} s; its thread goes on")
            await self._report_failure(target, frame, event, overrun)
            await asyncio.wait({running})
            if not running.cancelled():
                running.exception()  # it was reported as the overrun that it is
        finally:
            running.cancel()
        return None

    async def _failed(self, item: Item, event: Any, error: BaseException) -> None:
        """Count and report the failure of one call. Raises it again when the worker is to end: it
        was cancelled (by the lane, or by the handler itself: another takes its place), or the
        process is to end."""
        target, payload, _, _, shared = item
        fatal = _fatal(error)
        if fatal is not None:
            target.lane.failed += 1
            self._on_fatal(fatal)
            raise fatal
        cancelled = was_cancelled(error)
        if not (cancelled and target.lane.closed):
            frame = shared if shared is not None else Frame(target.channel, payload)
            await self._report_failure(target, frame, event, error)
        if cancelled:
            raise error

    async def _report_failure(
        self, target: Target, frame: Frame, event: Any, error: BaseException
    ) -> None:
        target.lane.failed += 1
        await self._reports.report(error, self.message(target, frame, event), target.lane.name)


def _fatal(error: BaseException) -> BaseException | None:
    """What is to end the process: no Exception and no cancellation, or an exit in a group."""
    if isinstance(error, BaseExceptionGroup):
        exits = error.subgroup((KeyboardInterrupt, SystemExit))
        return None if exits is None else _fatal(exits.exceptions[0])
    return None if isinstance(error, Exception | asyncio.CancelledError) else error
