"""An application with a handler that takes as long as somebody else says."""

from __future__ import annotations

from eventbus import Event, EventBus


class Work(Event, channel="work:{job}"):
    job: str


class Done(Event, channel="done:{job}"):
    job: str


bus = EventBus(name="slow")


@bus.on(Work)
async def work(event: Work, bus: EventBus) -> None:
    """Say that it began, wait for the list, and say that it is done."""
    await bus.publish("began", event)
    if event.job == "boom":
        raise RuntimeError(event.job)
    await bus.redis().blpop(["go"], timeout=30)
    await bus.publish(Done(job=event.job))
