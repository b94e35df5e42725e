"""Presence: every server knows who is online, wherever they signed in.

Pub/Sub has no memory, so a server that starts late, or that had a gap, asks the others, and each
tells what it knows from its own clients.

It prints:

    server-1 sees: ana, ben
    server-2 sees: ana, ben
    server-3 came late, and sees: ana, ben
    server-1 sees: ben
"""

import asyncio
import os

from eventbus import Event, EventBus, Gap

URL = os.environ.get("EVENTBUS_URL", "memory://presence")


class StatusChanged(Event, channel="presence:{user}"):
    user: str
    online: bool


class RosterWanted(Event, channel="presence-roster"):
    pass


class Node:
    def __init__(self, name: str) -> None:
        self.name = name
        self.here: set[str] = set()  # signed in on this server
        self.online: set[str] = set()  # signed in anywhere
        self.news = asyncio.Event()
        self.bus = EventBus(URL, name=name)
        self.bus.on("presence:{user}")(self.changed)
        self.bus.on(RosterWanted, echo=False)(self.tell_all)  # its own question is for the others
        self.bus.on_gap("presence:*")(self.missed)

    async def start(self) -> None:
        await self.bus.start()
        await self.bus.publish(RosterWanted())

    async def sign_in(self, user: str) -> None:
        self.here.add(user)
        await self.bus.publish(StatusChanged(user=user, online=True))

    async def sign_out(self, user: str) -> None:
        self.here.discard(user)
        await self.bus.publish(StatusChanged(user=user, online=False))

    async def changed(self, event: StatusChanged, user: str) -> None:
        (self.online.add if event.online else self.online.discard)(user)
        self.news.set()

    async def tell_all(self, event: RosterWanted) -> None:
        for user in self.here:
            await self.bus.publish(StatusChanged(user=user, online=True))

    async def missed(self, gap: Gap) -> None:
        self.online = set(self.here)
        await self.bus.publish(RosterWanted())

    async def sees(self, *users: str) -> str:
        while self.online != set(users):
            self.news.clear()
            await self.news.wait()
        return ", ".join(sorted(self.online))


async def main() -> None:
    one, two, three = (Node(f"server-{n}") for n in (1, 2, 3))
    await one.start()
    await two.start()
    await one.sign_in("ana")
    await two.sign_in("ben")
    print("server-1 sees:", await one.sees("ana", "ben"))
    print("server-2 sees:", await two.sees("ana", "ben"))
    await three.start()
    print("server-3 came late, and sees:", await three.sees("ana", "ben"))
    await one.sign_out("ana")
    print("server-1 sees:", await one.sees("ben"))
    for node in (one, two, three):
        await node.bus.stop()


asyncio.run(main())
