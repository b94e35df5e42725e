"""The ledger: every message of every (source, channel) is delivered once, or reported missing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from eventbus import EventBus, Message
from eventbus.server import Server
from tests.faults.ledger import CHANNELS, Entry, Ledger, receiver, source_of
from tests.helpers import soon


@pytest.mark.scenario(1)
async def test_every_loss_of_channels_heard_before_and_after_is_exact(
    say: Callable[[str], None],
) -> None:
    """Over 1,000 channels and two sources, cuts of the subscriber and a killed server: what was
    delivered and what was reported missing add up exactly, and nothing comes twice."""
    ledger, chance = Ledger(), random.Random(7)
    with Server() as server:
        bus = receiver(server.url, ledger)
        publishers = [
            EventBus(server.url, name=f"pub-{n}", heartbeat=0.5, publish_timeout=0.5)
            for n in range(2)
        ]
        async with bus, publishers[0], publishers[1], EventBus(server.url) as admin:
            sources = {source_of(publisher): publisher for publisher in publishers}
            pairs = [(source, channel) for source in sources for channel in CHANNELS]

            async def round_of(channels: list[str]) -> None:
                for source, publisher in sources.items():
                    await ledger.publish(publisher, source, channels)

            await round_of(CHANNELS)
            await ledger.until(lambda: len(ledger.last) == len(pairs))
            for cut in range(3):
                reconnects = bus.stats().reconnects
                if cut < 2:
                    await admin.redis().client_kill_filter(_type="pubsub")
                else:
                    server.kill()
                    server.start()
                async with asyncio.timeout(20):
                    while bus.stats().reconnects == reconnects:
                        await round_of(chance.sample(CHANNELS, 300))
                await round_of(chance.sample(CHANNELS, 300))
            before = {pair: ledger.last[pair] for pair in pairs}
            while any(ledger.last[pair] == before[pair] for pair in pairs):
                await round_of(CHANNELS)
            await soon(bus.stop(), 20)
    found = ledger.verdicts(pairs)
    say(
        f"ledger over {len(pairs)} (source, channel): {found['exact']} exact,"
        f" {found['unknown']} unknown, {found['over-reported']} over-reported;"
        f" {sum(ledger.delivered.values())} delivered, {sum(ledger.missed.values())} missing,"
        f" {sum(ledger.uncertain.values())} uncertain, {ledger.refused} refused,"
        f" {ledger.twice} twice"
    )

    assert found == {"exact": len(pairs), "outside the bounds": 0}
    assert ledger.twice == 0
    assert sum(ledger.missed.values()) > 0


async def test_a_channel_first_heard_after_the_loss_is_unknown_and_never_over_reported() -> None:
    """Promise 4 speaks of channels heard before and after: a first sight reports nothing."""
    ledger = Ledger()
    with Server() as server:
        bus = receiver(server.url, ledger)
        async with bus, EventBus(server.url) as admin:
            source = source_of(admin)
            await admin.redis().client_kill_filter(_type="pubsub")
            async with asyncio.timeout(20):
                while not bus.stats().reconnects:
                    await ledger.publish(admin, source, ["led:new"])
            while (source, "led:new") not in ledger.last:
                await ledger.publish(admin, source, ["led:new"])

    assert not ledger.missed
    verdicts = ledger.verdicts([(source, "led:new")])
    assert verdicts["over-reported"] == 0
    assert verdicts["exact"] + verdicts["unknown"] == 1


async def test_a_restarted_publisher_is_no_gap(url: str) -> None:
    """A bus that stops and starts again numbers from 1 under a new source: nothing is reported."""
    ledger = Ledger()
    bus = receiver(url, ledger)
    async with bus:
        for _ in range(3):
            async with EventBus(url) as publisher:
                await ledger.publish(publisher, source_of(publisher), ["led:1", "led:1", "led:2"])
        await ledger.until(lambda: sum(ledger.delivered.values()) == 9)

        assert bus.stats().missed == 0


async def test_a_channel_that_nobody_listened_to_meanwhile_has_no_gap(url: str) -> None:
    """What was published while no subscription matched the channel is nobody's loss."""
    ledger = Ledger()
    async with EventBus(url) as bus, EventBus(url) as publisher:
        source = source_of(publisher)

        async def keep(message: Message[Entry]) -> None:
            ledger.hear(message)

        for _ in range(2):
            route = await bus.attach(keep, "led:*")
            due = sum(ledger.delivered.values()) + 2
            await ledger.publish(publisher, source, ["led:1", "led:1"])
            await ledger.until(lambda due=due: sum(ledger.delivered.values()) == due)
            await route.detach()
            await ledger.publish(publisher, source, ["led:1"] * 5)

        assert bus.stats().missed == 0
