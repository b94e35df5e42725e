"""The faults of the campaign: each sets a stage, breaks something, and returns the figures."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from tests.faults.campaign.stage import Figures, stage
from tests.faults.controller import Controller
from tests.faults.netns import Cable
from tests.faults.sentinels import Watched

OUTAGE = 30.0
FREEZE = 8.0
PULLED = 20.0
LINUX_ROOT = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None


async def killed(subject: str) -> Figures:
    """The server dies (kill -9) and is started again at once."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            server.restart()
            scene.mends()
            return await scene.figures("server killed, started at once")


async def away(subject: str) -> Figures:
    """No server for half a minute."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            server.kill()
            await asyncio.sleep(OUTAGE)
            server.start()
            scene.mends()
            return await scene.figures(f"no server for {OUTAGE:.0f} s")


async def frozen(subject: str) -> Figures:
    """The server stands still (SIGSTOP) for a while: it accepts, and does not answer."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            server.freeze()
            await asyncio.sleep(FREEZE)
            server.thaw()
            scene.mends()
            return await scene.figures(f"server frozen for {FREEZE:.0f} s")


async def half_open(subject: str) -> Figures:
    """The receiver's connections are dead and nobody says so; new ones would work."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            for pair in scene.proxy.living():
                pair.mode = "hole"
            return await scene.figures("receiver's connections half-open")


async def answers_lost(subject: str) -> Figures:
    """What the server says is lost on the receiver's connections, what it is told arrives."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            for pair in scene.proxy.living():
                pair.mode = "down_hole"
            return await scene.figures("answers to the receiver lost")


async def publisher_answers_lost(subject: str) -> Figures:
    """The publisher's answers are lost, then its connections are cut: was it sent, or not?"""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.victim = "publisher"
            scene.breaks()
            for pair in scene.publishers.living():
                pair.mode = "down_hole"
            await asyncio.sleep(1.5)
            scene.publishers.cut()
            scene.mends()
            return await scene.figures("answers to the publisher lost, then cut")


async def cut(subject: str) -> Figures:
    """The server closes the subscribing connections (CLIENT KILL TYPE pubsub)."""
    with Controller(port=0) as server:
        async with stage(subject, server) as scene:
            scene.breaks()
            await server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            return await scene.figures("subscriber closed by the server")


async def buffer_full(subject: str) -> Figures:
    """The receiver's loop blocks for three seconds, and Redis drops its output buffer."""
    with Controller(port=0) as server:
        await server.config("client-output-buffer-limit", "pubsub 1mb 256kb 2")
        async with stage(subject, server) as scene:
            scene.breaks()
            scene.receiver.tell("block 3")
            scene.publisher.tell("burst 1600 8000")
            await asyncio.sleep(3.0)
            scene.mends()
            return await scene.figures("output buffer overrun")


async def narrowed(subject: str) -> Figures:
    """The user loses the right to one of its two patterns while it runs."""
    rules = ("resetchannels", "&__eventbus__:*", "&c:*")
    with Controller(port=0) as server:
        await server.acl("app", "reset", "on", ">secret", "+@all", "~*", *rules, "&d:*")
        async with stage(subject, server, login="app:secret@") as scene:
            scene.breaks()
            await server.acl("app", *rules)
            return await scene.figures("one of two patterns denied")


async def wrong_node(subject: str) -> Figures:
    """All connections move to another server but the subscribing one, which lives on at the old."""
    with Controller(port=0) as server, Controller(port=0) as other:
        async with stage(subject, server) as scene:
            scene.breaks()
            for proxy in (scene.proxy, scene.publishers):
                proxy.retarget(other.port)
            scene.publishers.cut()
            for pair in scene.proxy.living():
                if pair.role != "subscriber":
                    pair.cut()
            return await scene.figures("subscriber left on the wrong node")


async def master_frozen(subject: str) -> Figures:
    """Sentinel: the master freezes and the replica is promoted."""
    if subject == "faststream":
        return Figures(subject, "Sentinel: master frozen", remark="takes no Sentinel address")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        watched = Watched(stack, Path(folder))
        master, _ = await watched.roles()
        async with stage(subject, master, url=watched.url) as scene:
            scene.limit = 20.0
            scene.breaks()
            master.freeze()
            figures = await scene.figures("Sentinel: master frozen")
            master.thaw()
            return figures


async def pulled(subject: str) -> Figures:
    """The network to the server is gone, without a word, for a while (a namespace's black hole)."""
    title = f"network gone for {PULLED:.0f} s"
    if not LINUX_ROOT:
        return Figures(subject, title, remark="not measured: needs root on Linux")
    with tempfile.TemporaryDirectory() as folder, Cable(Path(folder)) as cable:
        async with stage(subject, cable.server, url=cable.url) as scene:
            scene.breaks()
            cable.pull()
            await asyncio.sleep(PULLED)
            cable.plug()
            scene.mends()
            return await scene.figures(title)


FAULTS: dict[str, Callable[[str], Awaitable[Figures]]] = {
    "killed": killed,
    "away": away,
    "frozen": frozen,
    "half_open": half_open,
    "answers_lost": answers_lost,
    "publisher_answers_lost": publisher_answers_lost,
    "cut": cut,
    "buffer_full": buffer_full,
    "narrowed": narrowed,
    "wrong_node": wrong_node,
    "master_frozen": master_frozen,
    "pulled": pulled,
}
