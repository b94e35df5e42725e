"""WebSocket fan-out: two servers, clients on both, one room. The sockets are simulated.

Each server has one bus. A message from a client goes to the channel of its room; every server,
this one too, hands it to its own clients in that room. So everybody sees the same order.

It prints:

    alice@server-1 <- bob: anyone here?
    carol@server-2 <- bob: anyone here?
    bob@server-2 <- bob: anyone here?
    alice@server-1 <- alice: hi bob
    carol@server-2 <- alice: hi bob
    bob@server-2 <- alice: hi bob
"""

import asyncio
import os

from eventbus import Event, EventBus

URL = os.environ.get("EVENTBUS_URL", "memory://sockets")


class RoomMessage(Event, channel="room:{room}"):
    room: str
    user: str
    text: str


class Socket:
    """A client's connection. A real one would have its own bounded queue, too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.received: list[str] = []

    def send(self, text: str) -> None:
        self.received.append(f"{self.name} <- {text}")


class ChatServer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.bus = EventBus(URL, name=name)
        self.rooms: dict[str, dict[str, Socket]] = {}
        self.bus.on("room:{room}")(self.deliver)

    def connect(self, room: str, user: str) -> Socket:
        socket = Socket(f"{user}@{self.name}")
        self.rooms.setdefault(room, {})[user] = socket
        return socket

    async def receive(self, room: str, user: str, text: str) -> None:
        """A client said something: tell everybody, everywhere."""
        await self.bus.publish(RoomMessage(room=room, user=user, text=text))

    async def deliver(self, event: RoomMessage, room: str) -> None:
        for socket in self.rooms.get(room, {}).values():
            socket.send(f"{event.user}: {event.text}")


async def main() -> None:
    one, two = ChatServer("server-1"), ChatServer("server-2")
    async with one.bus, two.bus:
        sockets = [
            one.connect("general", "alice"),
            two.connect("general", "carol"),
            two.connect("general", "bob"),
            two.connect("private", "dave"),  # hears nothing of it
        ]
        await two.receive("general", "bob", "anyone here?")
        await one.receive("general", "alice", "hi bob")
    for lines in zip(*(socket.received for socket in sockets[:3]), strict=True):
        print(*lines, sep="\n")
    assert not sockets[3].received


asyncio.run(main())
