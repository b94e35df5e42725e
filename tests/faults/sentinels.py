"""Servers with a master that can move: one master, one replica, and three Sentinels over them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import redis.asyncio
from redis.exceptions import ResponseError

from tests.faults.controller import Controller

CONFIG = """
sentinel monitor main 127.0.0.1 {port} 2
sentinel down-after-milliseconds main 1000
sentinel failover-timeout main 2000
"""
FAST = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


class Watched:
    """A master and a replica, and the Sentinels over them. `url` leads a bus to the master of now;
    tests that move it ask `roles` where it is."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.master = stack.enter_context(Controller(port=0, options=FAST))
        port = str(self.master.port)
        self.replica = stack.enter_context(
            Controller(port=0, options=(*FAST, "--replicaof", "127.0.0.1", port))
        )
        self.sentinels: list[Controller] = []
        for number in range(3):
            config = folder / f"sentinel{number}.conf"
            config.write_text(CONFIG.format(port=port))
            options = (str(config), "--sentinel")
            sentinel = Controller(folder / f"s{number}", port=0, options=options)
            self.sentinels.append(stack.enter_context(sentinel))
        hosts = ",".join(f"localhost:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/main"

    async def roles(self) -> tuple[Controller, Controller]:
        """The master of now and the replica, when every Sentinel knows them and the others."""
        async with asyncio.timeout(30):
            for sentinel in self.sentinels:
                async with redis.asyncio.Redis(port=sentinel.port or 0) as client:
                    events = client.pubsub()
                    await events.psubscribe("*")
                    while not await self._healthy(client):
                        await events.get_message(timeout=0.2)  # the next event, or have a look
                    await events.aclose()
            _, port = await self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
        servers = (self.master, self.replica)
        return servers if int(port) == self.master.port else servers[::-1]

    async def fail_over(self) -> None:
        """Have the replica promoted, gracefully; returns when a Sentinel has taken the order."""
        await self.sentinels[0].ask("SENTINEL", "FAILOVER", "main")

    async def _healthy(self, client: redis.asyncio.Redis) -> bool:
        try:
            await client.execute_command("SENTINEL", "CKQUORUM", "main")
        except ResponseError:
            return False
        master = (await client.sentinel_masters())["main"]
        known = master["num-other-sentinels"] == 2 and master["num-slaves"] == 1
        # A Sentinel itself looks every 10 s only.
        servers = (self.master, self.replica)
        [replica] = [server for server in servers if server.port != master["port"]]
        async with redis.asyncio.Redis(port=replica.port or 0) as direct:
            return known and (await direct.info()).get("master_link_status") == "up"
