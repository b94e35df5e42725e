"""A message on its way out has one end, whatever is reported of it."""

from __future__ import annotations

import asyncio
from typing import Any

from eventbus.transports.base import Outcome, Outgoing


class Owner:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.published = 0
        self.unwatched: dict[Outgoing, Any] = {}
        self.ends: list[Outcome] = []

    def ended(self, outgoing: Outgoing, outcome: Outcome) -> None:
        self.ends.append(outcome)


def outgoing(owner: Owner) -> Outgoing:
    """A message that somebody awaits."""
    made = Outgoing(b"c", b"before", b"after", True, "id", owner)
    made.future = asyncio.get_running_loop().create_future()
    return made


async def test_the_first_end_counts() -> None:
    """What was acknowledged cannot fail, and what failed cannot be acknowledged."""
    owner = Owner()
    good, bad = outgoing(owner), outgoing(owner)
    good.acknowledge(3)
    good.finish(ValueError())
    good.acknowledge(4)
    bad.finish("dropped")
    bad.acknowledge(1)

    assert good.future is not None
    assert bad.future is not None
    assert (good.future.result(), bad.future.result()) == (3, None)
    assert (owner.published, owner.ends) == (1, ["dropped"])


async def test_a_buffered_message_has_its_end_later() -> None:
    """Who waits hears of the buffering at once; the end is counted when it comes."""
    owner = Owner()
    kept = outgoing(owner)
    kept.buffered()
    assert kept.future is not None
    assert kept.future.result() is None
    kept.buffered()
    kept.acknowledge(2)

    assert (kept.future.result(), owner.published) == (None, 1)


async def test_nobody_has_to_wait() -> None:
    """Without a future, and with one that was cancelled, the outcome is counted all the same."""
    owner = Owner()
    left, cancelled = outgoing(owner), outgoing(owner)
    left.future = None
    assert cancelled.future is not None
    cancelled.future.cancel()
    owner.unwatched[left] = "x"
    left.buffered()
    left.acknowledge(1)
    cancelled.finish("conflated")

    assert (owner.published, owner.ends, owner.unwatched) == (1, ["conflated"], {})
