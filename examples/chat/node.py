"""One node of the chat: a page, and a WebSocket for each browser. Any number of nodes are one chat.

    python -m examples.chat.node --name node-1 --port 8001 --redis redis://localhost:6379

`/ws?user=ana` speaks JSON text, ``{"event": ..., "data": ...}``. What a browser sends with an
``"ack"`` is answered: ``{"ack": <the same>, "data": ...}``, or by an `error` that names the ack.

    a browser sends   data              answer
    join              room              {"room", "live"}: live is false while Redis is away
    leave             room              {"room"}
    say               room, text        {"outcome", "time"}: "sent", "maybe", or "not sent", which
                                        means that only the people on this node have it
    typing            room              none; lost when Redis is away, and nobody will mind
    ping              anything          null

    a browser hears   data
    welcome           {"node", "nodes", "user", "away", "online": {user: node}, "count"}
    message           {"room", "user", "node", "text", "time"}, from everybody but itself
    typing            {"room", "user", "node"}, also its own
    online            {"came": {user: node}, "went": [user], "count"}: what changed, on all nodes
    redis             {"away": bool, "node"}: this node has lost Redis, or has it again
    gap               {"room" (null: any), "reason", "missed" (null: unknown), "since", "node"}:
                      messages were, or may have been, missed
    error             {"text", "about", "ack"}: what it sent had no effect

A node ends a WebSocket with 1008 (no good name), 1009 (more than 16 KiB at once), 1012 (it stops)
or 1013 (too slow, or too many are here). There is no history and no login: it is an example.
"""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, StringConstraints, ValidationError

from eventbus import BusUnavailable, Event, EventBus, EventBusError, Gap, PublishUncertain
from eventbus.presence import Presence, UserOnline, View
from eventbus.rooms import Client, Rooms

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'eventbus-redis[chat]'") from None

MAX_CLIENTS, MAX_ROOMS, MAX_ONLINE = 5_000, 20, 200  # a node; a browser; names in a welcome
MAX_FRAME = 16 * 1024  # bytes of one message of a browser
RATE, BURST = 10.0, 30.0  # messages of one browser: each second, and at once
TICK = 0.25  # s between two looks at what changed
FILES = {"": "page.html", "chat.js": "chat.js", "chat.css": "chat.css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

# Letters and digits of any script; no colon, which would end a part of a channel, no controls.
Name = Annotated[
    str, StringConstraints(strip_whitespace=True, max_length=32, pattern=r"^\w[\w .-]*$")
]
Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x09\x0b-\x1f\x7f-\x9f]+$"),
]
RULES = {
    "user": "a name is 1 to 32 letters, digits, blanks, '.', '_' and '-'",
    "room": "the name of a room is 1 to 32 letters, digits, blanks, '.', '_' and '-'",
    "text": "a message has 1 to 1,000 characters, and no control characters",
}


class Typing(Event, channel="typing:{room}:{user}"):
    """Somebody is writing. Only the newest of each room and user is worth anything."""

    room: str
    user: str
    node: str


class ByName(BaseModel):
    user: Name


class InRoom(BaseModel):
    room: Name


class Said(InRoom):
    text: Text


class Refused(Exception):
    """What a browser sent has no effect; the text is for its user."""


class Node:
    """The browsers of this process, and what they hear of the others."""

    def __init__(
        self,
        url: str,
        name: str,
        nodes: Sequence[str] = (),
        heartbeat: float = 1.0,
        ttl: float = 6.0,
    ) -> None:
        self.name, self.nodes = name, list(nodes)
        self.bus = EventBus(url, name=name, heartbeat=heartbeat)
        self.rooms = Rooms(self.bus)
        self.presence = Presence(self.bus, ttl=ttl)
        self.clients = 0
        self.away = False
        self.online: dict[str, str] = {}  # users on all nodes, and the node where each came
        self.news: dict[str, str | None] = {}  # users who came there, or went (None), since a tick
        self.bus.on(Typing, overflow="latest")(self.show_typing)
        self.bus.exception_handler(EventBusError)(self.forget)
        self.rooms.on_gap(self.show_gap)

    def app(self) -> Starlette:
        """The web application; it works inside `running`."""
        files = [Route(f"/{path}", self.file) for path in FILES]
        return Starlette(
            routes=[*files, Route("/health", self.health), WebSocketRoute("/ws", self.talk)]
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connected, and telling the browsers what happens. Raises what `EventBus.start` does."""
        async with self.bus, self.rooms, self.presence, self.presence.watch() as view:
            tasks = [asyncio.create_task(self.look(view)), asyncio.create_task(self.tell())]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)

    # -- HTTP --------------------------------------------------------------------------------------

    async def file(self, request: Request) -> Response:
        path = Path(__file__).with_name(FILES[request.url.path.removeprefix("/")])
        return FileResponse(path, headers=HEADERS)

    async def health(self, request: Request) -> Response:
        health = self.bus.health()
        body = {"node": self.name, "state": health.state, "clients": self.clients}
        return JSONResponse(body, 200 if health else 503)

    # -- A browser ---------------------------------------------------------------------------------

    async def talk(self, ws: WebSocket) -> None:
        """The life of one WebSocket."""
        await ws.accept()
        try:
            user = ByName.model_validate(ws.query_params).user
        except ValidationError:
            await ws.send_json({"event": "error", "data": {"text": RULES["user"], "about": "user"}})
            return await ws.close(1008)
        if self.clients >= MAX_CLIENTS:
            return await ws.close(1013, "this node is full")
        self.clients += 1
        try:
            meta = {"node": self.name}
            async with self.presence.track(user, meta=meta), self.rooms.connect(ws) as client:
                await client.emit("welcome", self.picture(user))
                await self.listen(ws, client, user)
            if client.closed == "slow":
                await ws.close(1013, "too slow")
        finally:
            self.clients -= 1

    def picture(self, user: str) -> dict[str, Any]:
        """What a browser is told first."""
        online = dict(islice(self.online.items(), MAX_ONLINE)) | {user: self.name}
        return {
            "node": self.name, "nodes": self.nodes, "user": user, "away": self.away,
            "online": online, "count": max(len(self.online), len(online)),
        }  # fmt: skip

    async def listen(self, ws: WebSocket, client: Client, user: str) -> None:
        """Do what a browser says, until it goes."""
        clock, left = asyncio.get_running_loop().time, BURST
        then = clock()
        while (frame := await ws.receive())["type"] == "websocket.receive":
            about = ack = None
            left, then = min(BURST, left + (clock() - then) * RATE), clock()
            try:
                if left < 1:
                    raise Refused("not so fast: ten messages a second are enough")
                left -= 1
                if (text := frame.get("text")) is None:
                    raise Refused("send text, not bytes")
                message = client.receive(text)
                if message is None:
                    continue
                about, ack = message.event, message.ack
                answer = await self.do(client, user, about, message.data)
                if ack is not None:
                    await client.reply(ack, answer)
            except ValidationError as error:
                where = error.errors()[0]["loc"]
                rule = RULES[str(where[0])] if where else "data is an object, and has a room"
                await client.emit("error", {"text": rule, "about": about, "ack": ack})
            except (Refused, EventBusError) as error:
                await client.emit("error", {"text": str(error), "about": about, "ack": ack})

    async def do(self, client: Client, user: str, event: str, data: Any) -> Any:
        """Do one thing; returns the answer."""
        if event == "ping":
            return None
        if event not in ("join", "leave", "say", "typing"):
            raise Refused("a browser may join, leave, say, type and ping")
        room = InRoom.model_validate(data).room
        if event == "join":
            if len(client.rooms | {room}) > MAX_ROOMS + 1:  # its id is a room, too
                raise Refused(f"you are in {MAX_ROOMS} rooms: leave one first")
            return {"room": room, "live": await client.join(room)}
        if event == "leave":
            await client.leave(room)
            return {"room": room}
        if room not in client.rooms:
            raise Refused(f"join {room} first")
        if event == "say":
            return await self.say(client, user, room, Said.model_validate(data).text)
        with suppress(BusUnavailable):
            self.bus.publish_nowait(Typing(room=room, user=user, node=self.name))
        return None

    async def say(self, client: Client, user: str, room: str, text: str) -> dict[str, str]:
        """To everybody in the room but this browser, on all nodes; and how that went."""
        time, outcome = datetime.now(UTC).isoformat(), "sent"
        message = {"room": room, "user": user, "node": self.name, "text": text, "time": time}
        try:
            await client.to(room).emit("message", message)
        except BusUnavailable:
            outcome = "not sent"
        except PublishUncertain:
            outcome = "maybe"
        return {"outcome": outcome, "time": time}

    # -- What all browsers here hear ---------------------------------------------------------------

    async def show_typing(self, event: Typing) -> None:
        await self.rooms.local.to(event.room).emit("typing", event.model_dump())

    async def show_gap(self, gap: Gap, room: str | None) -> None:
        target = self.rooms.local if room is None else self.rooms.local.to(room)
        since = gap.since.isoformat()
        notice = {"room": room, "reason": gap.reason, "missed": gap.missed, "since": since}
        await target.emit("gap", notice | {"node": self.name})

    async def forget(self, error: EventBusError, message: object) -> None:
        """A `typing` that failed later: nothing to be done."""

    async def look(self, view: View) -> None:
        """Keep the picture of who is online, and where."""
        for user in view:
            self.online[user] = self.news[user] = await self.place(user)
        async for change in view:
            if isinstance(change, UserOnline):
                place = change.meta.get("node") or await self.place(change.user)
                self.online[change.user] = self.news[change.user] = place
            else:
                self.online.pop(change.user, None)
                self.news[change.user] = None

    async def place(self, user: str) -> str:
        """On which node a user came last."""
        with suppress(EventBusError, IndexError):
            return str((await self.presence.get(user))[-1].meta.get("node", ""))
        return ""

    async def tell(self) -> None:
        """At each tick: who came and went, in one message; and whether Redis is away."""
        while True:
            await asyncio.sleep(TICK)
            if self.news:
                news, self.news = self.news, {}
                came = {user: node for user, node in news.items() if node is not None}
                went = [user for user, node in news.items() if node is None]
                more = {"came": came, "went": went, "count": len(self.online)}
                await self.rooms.local.emit("online", more)
            if self.away is bool(health := self.bus.health()):
                self.away = not health
                await self.rooms.local.emit("redis", {"away": self.away, "node": self.name})
                with suppress(OSError):  # whoever read this may be gone
                    print(
                        self.name, "has lost Redis" if self.away else "has Redis again", flush=True
                    )


async def serve(node: Node, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        node.app(), lifespan="off", log_config=None, access_log=False, ws_max_size=MAX_FRAME,
        ws_ping_interval=10.0, ws_ping_timeout=10.0, timeout_graceful_shutdown=2,
    )  # fmt: skip
    web = uvicorn.Server(config)
    # It would end this process before the bus could leave: the signals are ours.
    web.capture_signals = nullcontext  # type: ignore[assignment]
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, web.handle_exit, number, None)
    async with node.running():
        print(f"{node.name} is ready", flush=True)
        await web.serve(sockets=[listening])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.chat.node", description="one node")
    parser.add_argument("--name", default="node-1")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--redis", help="its URL (EVENTBUS_URL, else redis://localhost:6379)")
    parser.add_argument("--nodes", default="", help="URLs of all nodes, for the page: a,b,c")
    parser.add_argument("--heartbeat", type=float, default=1.0, help="of the bus, seconds")
    parser.add_argument("--ttl", type=float, default=6.0, help="of presence; alike on all nodes")
    parser.add_argument("--quiet", action="store_true", help="no warnings, only errors")
    given = parser.parse_args(argv)
    level = logging.ERROR if given.quiet else logging.WARNING
    logging.basicConfig(format=f"{given.name}: %(message)s", level=level)
    try:
        nodes = [node for node in given.nodes.split(",") if node]
        node = Node(given.redis, given.name, nodes, given.heartbeat, given.ttl)
        with socket.create_server((given.host, given.port), backlog=2048) as listening:
            asyncio.run(serve(node, listening))
    except (EventBusError, OSError, ValueError) as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
