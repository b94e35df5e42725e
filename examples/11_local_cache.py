"""A cache in each process: invalidated everywhere by one call, and never stale after a loss.

It prints:

    loading product 42
    10 and 10: loaded once, then served from memory
    loading product 42
    node 2 reads 11
    a lost message is noticed: node 2 flushes, and loads again
    loading product 42
    hits 1, misses 3, flushes 1
"""

import asyncio
import os

from eventbus import EventBus
from eventbus.cache import LocalCache

URL = os.environ.get("EVENTBUS_URL", "memory://local-cache")
DATABASE = {42: 10}

one, two = EventBus(URL), EventBus(URL)
writer, cache = LocalCache(one), LocalCache(two)


@cache.cached("product-{id}")
async def price(id: int) -> int:
    print("loading product", id)
    return DATABASE[id]


async def until(counter: str, number: int) -> None:
    while True:
        if getattr(cache.stats(), counter) >= number:
            return
        await asyncio.sleep(0.01)


async def numbered(number: int) -> None:
    """An invalidation of another key, by a publisher that says how many it has sent."""
    data = (
        b'{"specversion":"1.0","id":"%d","source":"shop/1","type":"Invalidated","busseq":%d,'
        b'"data":{"key":"product-7"}}' % (number, number)
    )
    await one.publish_raw("cache:invalidate:product-7", data)


async def main() -> None:
    async with one, two:
        print(await price(42), "and", await price(42), end=": ")
        print("loaded once, then served from memory")

        DATABASE[42] = 11
        await writer.invalidate("product-42")
        await until("invalidated", 1)
        print("node 2 reads", await price(42))

        await numbered(1)
        await numbered(3)  # number 2 got lost
        await until("flushes", 1)
        print("a lost message is noticed: node 2 flushes, and loads again")
        await price(42)
        stats = cache.stats()
        print(f"hits {stats.hits}, misses {stats.misses}, flushes {stats.flushes}")


asyncio.run(main())
