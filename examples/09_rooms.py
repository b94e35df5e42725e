"""Rooms: two WebSocket servers, one chat. The browsers are simulated; everything else is real.

With Starlette or FastAPI, `chat` takes the WebSocket itself: `rooms.connect(websocket)`, and
`async for text in websocket.iter_text()`.

It prints:

    dora got {"event":"message","data":"bob: hi"}
    eve got {"event":"message","data":"bob: hi"}
    bob got {"event":"rating","ack":"...","data":"this talk?"}
    dora got {"event":"rating","ack":"...","data":"this talk?"}
    eve got {"event":"rating","ack":"...","data":"this talk?"}
    5 stars from bob, dora and eve; nobody is missing
    who is here: bob, dora, eve
"""

import asyncio
import json
import os
import re

from eventbus import EventBus
from eventbus.rooms import Rooms

URL = os.environ.get("EVENTBUS_URL", "memory://rooms")


class Browser:
    def __init__(self, user: str) -> None:
        self.user = user
        self.said: asyncio.Queue[str] = asyncio.Queue()  # on its way to the server
        self.ready = asyncio.Event()
        self.heard = asyncio.Event()

    async def send(self, text: str) -> None:
        """What the server sends arrives here."""
        print(self.user, "got", re.sub('"ack":"[^"]*"', '"ack":"..."', text))
        message = json.loads(text)
        if "ack" in message:
            self.said.put_nowait(json.dumps({"ack": message["ack"], "data": 5}))
        self.heard.set()


async def chat(rooms: Rooms, browser: Browser) -> None:
    """The server's side of one WebSocket."""
    async with rooms.connect(browser.send, id=browser.user) as client:
        await client.join("talk")
        browser.ready.set()
        while True:
            message = client.receive(await browser.said.get())
            if message is not None:  # None: the answer to a call, which is counted
                await client.to("talk").emit("message", f"{browser.user}: {message.data}")


async def main() -> None:
    buses = EventBus(URL), EventBus(URL)
    one, two = Rooms(buses[0]), Rooms(buses[1])
    bob, dora, eve = Browser("bob"), Browser("dora"), Browser("eve")
    async with buses[0], buses[1], one, two, asyncio.TaskGroup() as tasks:
        seats = [(one, bob), (one, dora), (two, eve)]
        open_ = [tasks.create_task(chat(rooms, browser)) for rooms, browser in seats]
        for _, browser in seats:
            await browser.ready.wait()

        bob.said.put_nowait('{"event": "say", "data": "hi"}')
        await dora.heard.wait()
        await eve.heard.wait()

        replies, missing, _ = await two.to("talk").call("rating", "this talk?", timeout=10)
        assert not missing
        print(replies["eve"], "stars from bob, dora and eve; nobody is missing")

        found = await one.fetch()
        print("who is here:", ", ".join(sorted(member.id for member in found.clients)))
        for task in open_:
            task.cancel()


asyncio.run(main())
