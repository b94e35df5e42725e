"""A server of python-socketio in a process of its own, which runs what it is told over HTTP.

    python -m tests.socketio.worker URL OPTIONS

OPTIONS is JSON: `bus`, the options of the bus; `start`, what starts it ("bus", "manager", or
"nobody"), and after what `patience` it goes on without Redis; `fork`, how many children serve what
the parent has built; `theirs`, for the manager that comes with python-socketio, to compare. Each
server prints its port. POST /run takes a line of Python, which may await and knows `sio`,
`manager`, `bus`, `left` (who disconnected), `gaps` and `log`; the answer is JSON, `[value, null]`
or `[null, error]`. What a client says, all others are told. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

import socketio
from aiohttp import web

import eventbus.socketio.manager as module
from eventbus import EventBus, Gap
from eventbus.socketio import Manager
from tests.helpers import evaluate


class Stage:
    """What is built before the loop runs, and before a fork."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.start = options.get("start", "bus")
        module._PATIENCE = options.get("patience", module._PATIENCE)
        self.bus = EventBus(url, **options.get("bus", {}))
        self.manager: Any = Manager(self.bus)
        if options.get("theirs"):
            self.start = "nobody"
            self.manager = socketio.AsyncRedisManager(url)
        self.sio = socketio.AsyncServer(
            client_manager=self.manager, async_mode="aiohttp", namespaces="*"
        )
        self.left: list[str] = []
        self.gaps: list[str] = []
        self.log: list[str] = []
        self.names = {"asyncio": asyncio} | vars(self)
        self.names["names"] = self.names
        self.sio.on("connect", self.connected, namespace="*")
        self.sio.on("say", self.said, namespace="*")
        self.sio.on("disconnect", self.disconnected, namespace="*")
        handler = logging.Handler()
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("eventbus").addHandler(handler)
        logging.getLogger("eventbus").setLevel(logging.INFO)
        if not options.get("theirs"):
            self.manager.on_gap(self.missed)

    async def missed(self, gap: Gap) -> None:
        self.gaps.append(gap.reason)

    async def connected(self, namespace: str, sid: str, _: object, auth: Any = None) -> None:
        for room in (auth or {}).get("rooms", []):
            await self.sio.enter_room(sid, room, namespace=namespace)

    async def said(self, namespace: str, sid: str, *data: Any) -> str:
        await self.sio.emit("said", data, skip_sid=sid, namespace=namespace)
        return "heard"

    async def disconnected(self, namespace: str, sid: str, reason: str) -> None:
        self.left.append(sid)
        if "hold" in self.names:  # a handler that waits until it is told
            await self.names["hold"].wait()

    async def run(self, request: web.Request) -> web.Response:
        source = await request.text()
        try:
            answer = [await evaluate(source, self.names), None]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        return web.Response(text=json.dumps(answer, default=repr))

    async def serve(self, over: asyncio.Event) -> None:
        app = web.Application()
        self.sio.attach(app)
        app.router.add_post("/run", self.run)
        if self.start != "nobody":
            await {"bus": self.bus, "manager": self.manager}[self.start].start()
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        # In one write: two children share the pipe.
        os.write(sys.stdout.fileno(), b"%d\n" % runner.addresses[0][1])
        await over.wait()
        await self.sio.shutdown()
        await runner.cleanup()
        if self.start != "nobody":
            await {"bus": self.bus, "manager": self.manager}[self.start].stop()


async def serve(stage: Stage) -> None:
    """Serve until there is no stdin any more: a child sees that too, whatever became of its
    parent."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    await stage.serve(over)


def main(url: str, options: str) -> None:
    """One server, or a parent and as many as it forks."""
    chosen = json.loads(options)
    stage = Stage(url, chosen)
    children = []
    for _ in range(chosen.get("fork", 0)):
        pid = os.fork()
        if not pid:
            asyncio.run(serve(stage))
            os._exit(0)
        children.append(pid)
    if not children:
        asyncio.run(serve(stage))
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
