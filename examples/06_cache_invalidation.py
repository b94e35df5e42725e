"""Cache invalidation: when data changes, every node drops its local copy.

A missed invalidation would leave an old value in a cache for ever. So each gap clears all of it: a
cold cache is slow, a stale one is wrong.

It prints:

    node 2 reads product-42: 10
    node 2 reads product-42: 11
    a burst of 100 overflowed the queue of 10: some are missed, the cache is cleared
"""

import asyncio
import os

from eventbus import Event, EventBus, Gap

URL = os.environ.get("EVENTBUS_URL", "memory://cache")
DATABASE = {"product-42": 10}


class Invalidate(Event, channel="cache:invalidate:{key}"):
    key: str


class Node:
    def __init__(self) -> None:
        self.cache: dict[str, int] = {}
        self.bus = EventBus(URL)
        # echo=False: the node that wrote has the new value already.
        self.bus.on("cache:invalidate:{key}", echo=False, max_queue=10)(self.drop)
        self.bus.on_gap("cache:invalidate:*")(self.clear)
        self.dropped, self.cleared = asyncio.Event(), asyncio.Event()

    def read(self, key: str) -> int:
        if key not in self.cache:
            self.cache[key] = DATABASE[key]
        return self.cache[key]

    async def write(self, key: str, value: int) -> None:
        DATABASE[key] = self.cache[key] = value
        await self.bus.publish(Invalidate(key=key))

    async def drop(self, event: Invalidate, key: str) -> None:
        self.cache.pop(key, None)
        self.dropped.set()

    async def clear(self, gap: Gap) -> None:
        self.cache.clear()
        self.cleared.set()


async def main() -> None:
    one, two = Node(), Node()
    async with one.bus, two.bus:
        print("node 2 reads product-42:", two.read("product-42"))
        await one.write("product-42", 11)
        await two.dropped.wait()
        print("node 2 reads product-42:", two.read("product-42"))

        for number in range(100):
            one.bus.publish_nowait(Invalidate(key=f"product-{number}"))
        await two.cleared.wait()
        print("a burst of 100 overflowed the queue of 10: some are missed, the cache is cleared")
        assert not two.cache


asyncio.run(main())
