"""Testing a handler: `memory://` has the same patterns and semantics, and needs no server.

A handler is still a plain function: call it. To test it with its routing, start a bus in memory.

It prints:

    called directly: ok
    called by the bus: ok
    nothing for other channels: ok
"""

import asyncio

from eventbus import Event, EventBus, Router


class OrderPlaced(Event, channel="order:{number}"):
    number: int
    total: int


class DiscountGranted(Event, channel="discount:{number}"):
    number: int
    percent: int


# What is to be tested.
orders = Router()


@orders.on("order:{number}")
async def grant(event: OrderPlaced, number: int, bus: EventBus) -> None:
    if event.total >= 100:
        await bus.publish(DiscountGranted(number=number, percent=10))


# The tests, as a test runner would call them.
async def test_directly() -> None:
    async with EventBus("memory://test-1") as bus, bus.subscribe(DiscountGranted) as granted:
        await grant(OrderPlaced(number=7, total=100), 7, bus)
        message = await anext(granted)
        assert message.event == DiscountGranted(number=7, percent=10)
    print("called directly: ok")


async def test_by_the_bus() -> None:
    bus = EventBus("memory://test-2")
    bus.include_router(orders)
    async with bus, bus.subscribe(DiscountGranted) as granted:
        await bus.publish(OrderPlaced(number=8, total=250))
        assert (await anext(granted)).event.number == 8
    print("called by the bus: ok")


async def test_other_channels() -> None:
    bus = EventBus("memory://test-3")
    bus.include_router(orders)
    async with bus:
        await bus.publish("orders-of-last-year:8", OrderPlaced(number=8, total=250))
    assert bus.stats().delivered == 0  # leaving the block waited for every handler
    print("nothing for other channels: ok")


async def main() -> None:
    await test_directly()
    await test_by_the_bus()
    await test_other_channels()


asyncio.run(main())
