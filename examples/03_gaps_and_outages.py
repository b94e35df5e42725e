"""Gaps and outages: Redis dies under a running bus, and nothing is silent about it.

It starts a server of its own, freezes it, kills it, and starts it again.

It prints:

    heard number 1
    3 x PublishUncertain: may have arrived, is not sent again
    health: down
    BusUnavailable: certainly not sent
    buffered, for when Redis is back
    gap: reconnect, missed None
    gap: sequence, missed 3
    heard number 5
    missed 3, uncertain 3, refused 1, reconnects 1
"""

import asyncio

from eventbus import Buffer, BusUnavailable, Event, EventBus, Gap, Message, PublishUncertain
from eventbus.server import Server

server = Server()
bus = EventBus(server.url, publish_timeout=0.2)
patient = EventBus(server.url, outage=Buffer(max_age=30.0, latest=True))


class Tick(Event, channel="clock"):
    pass


class Tock(Event, channel="other-clock"):
    pass


@bus.on(Tick)
async def heard(message: Message[Tick]) -> None:
    print("heard number", message.sequence)


@bus.on_gap()
async def on_gap(gap: Gap) -> None:
    # The place to ask the source of truth again: drop a cache, reload a roster.
    print(f"gap: {gap.reason}, missed {gap.missed}")


async def until(state: str) -> None:
    while bus.health().state != state:  # noqa: ASYNC110  # health is something to ask for
        await asyncio.sleep(0.05)


async def main() -> None:
    async with bus, patient:
        await bus.publish(Tick())
        await asyncio.sleep(0.05)

        server.freeze()  # its connections stay open, it answers nothing
        calls = [bus.publish(Tick()) for _ in range(3)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        uncertain = [error for error in outcomes if isinstance(error, PublishUncertain)]
        print(f"{len(uncertain)} x PublishUncertain: may have arrived, is not sent again")

        server.kill()
        await until("down")
        print("health:", bus.health().state)
        await asyncio.sleep(0.05)  # the publishing connection notices, too
        try:
            await bus.publish(Tick())
        except BusUnavailable:
            print("BusUnavailable: certainly not sent")
        receipt = await patient.publish(Tock())
        print("buffered, for when Redis is back" if receipt.receivers is None else "sent")

        server.start()
        await until("live")
        await bus.publish(Tick())
    stats = bus.stats()
    print(
        f"missed {stats.missed}, uncertain {stats.uncertain}, refused {stats.refused},"
        f" reconnects {stats.reconnects}"
    )


with server:
    asyncio.run(main())
