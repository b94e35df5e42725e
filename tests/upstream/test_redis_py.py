"""What redis-py does that we work around, each in its smallest form (docs/upstream.md).

A test here holds while the defect is there. When one fails, upstream has mended it: read the page,
and take the workaround out once the oldest supported redis-py has the repair too.
"""

from __future__ import annotations

import asyncio

from anyio.lowlevel import checkpoint
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError


async def test_two_tasks_that_ask_sentinels_at_once_lose_one_of_them() -> None:
    """`Sentinel.discover_master` swaps by an index from before its await: one client is twice in
    the list, another one is gone, neither asked again nor closed."""
    sentinels = Sentinel([("localhost", 1), ("localhost", 2), ("localhost", 3)])
    first, second, third = sentinels.sentinels

    async def fails() -> None:
        await checkpoint()
        raise RedisConnectionError

    async def answers() -> dict[str, dict[str, object]]:
        await checkpoint()
        state = {"is_master": True, "is_sdown": False, "is_odown": False, "ip": "::1", "port": 1}
        return {"main": state | {"num-other-sentinels": 2}}

    first.sentinel_masters = fails
    second.sentinel_masters = third.sentinel_masters = answers
    await asyncio.gather(sentinels.discover_master("main"), sentinels.discover_master("main"))

    assert first not in sentinels.sentinels
