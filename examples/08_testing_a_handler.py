"""Testing a handler: the application's own bus in memory, and what arrived on it.

With pytest the fixtures `bus` and `recorder` do what the blocks here do. It prints:

    called directly: ok
    called by the bus: ok
    nothing for other channels: ok
    after an outage: ok
"""

import asyncio
from contextlib import suppress

from eventbus import BusUnavailable, Event, EventBus
from eventbus.testing import away, on_memory, record, settled


class OrderPlaced(Event, channel="order:{number}"):
    number: int
    total: int


class DiscountGranted(Event, channel="discount:{number}"):
    number: int
    percent: int


# The application, with its bus where the application is used.
bus = EventBus("redis://redis.internal:6379", publish_timeout=0.1)


@bus.on("order:{number}")
async def grant(event: OrderPlaced, number: int) -> None:
    if event.total >= 100:
        await bus.publish(DiscountGranted(number=number, percent=10))


# The tests, as a test runner would call them.
async def test_directly() -> None:
    """A handler is still a plain function."""
    async with on_memory(bus), record(bus) as recorder:
        await grant(OrderPlaced(number=7, total=100), 7)
        granted = await recorder.expect(DiscountGranted)
        assert granted.event == DiscountGranted(number=7, percent=10)
    print("called directly: ok")


async def test_by_the_bus() -> None:
    async with on_memory(bus), record(bus) as recorder:
        await bus.publish(OrderPlaced(number=8, total=250))
        granted = await recorder.expect(DiscountGranted, channel="discount:*")
        assert granted.event.number == 8
    print("called by the bus: ok")


async def test_other_channels() -> None:
    async with on_memory(bus), record(bus) as recorder:
        await bus.publish("orders-of-last-year:8", OrderPlaced(number=8, total=250))
        await settled(bus)  # nothing waits, no handler runs
        assert recorder.of(DiscountGranted) == []
    print("nothing for other channels: ok")


async def test_an_outage() -> None:
    async with on_memory(bus), record(bus) as recorder:
        async with away(bus):
            with suppress(BusUnavailable):
                await bus.publish(OrderPlaced(number=9, total=250))
        await bus.publish(OrderPlaced(number=10, total=250))
        assert (await recorder.expect(DiscountGranted)).event.number == 10
    print("after an outage: ok")


async def main() -> None:
    await test_directly()
    await test_by_the_bus()
    await test_other_channels()
    await test_an_outage()


asyncio.run(main())
