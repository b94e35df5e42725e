"""The commands that start something or print something: `run`, `acl`, `server`, `demo`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import logging
import os
import shlex
import sys
from typing import Literal

from eventbus import EventBus
from eventbus.cli.apps import load_bus, load_events, place
from eventbus.cli.terminal import FAILED, OK, USAGE, Failure, Terminal, count_of

Role = Literal["publisher", "subscriber", "both"]


def run(app: str, reload: bool) -> int:
    """Run a bus until SIGTERM or ctrl-c, then drain it."""
    if reload:
        watch(app)
    bus = load_bus(app)
    # Errors of its handlers are the application's own, with their tracebacks. This does nothing
    # when the application has set up logging itself.
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    return asyncio.run(serve(app, bus))


async def serve(app: str, bus: EventBus) -> int:
    """Say when it is live, and afterwards what it did."""
    routes = bus.routes
    patterns = {pattern for route in routes for pattern in route.patterns}
    what = f"{count_of(len(routes), 'handler')} on {count_of(len(patterns), 'pattern')}"
    running = asyncio.ensure_future(bus.run())
    while not running.done() and bus.health().state in ("starting", "closed"):
        await asyncio.wait({running}, timeout=0.02)
    if not running.done():
        Terminal.note(f"running {app}: {what} at {place(bus)}; SIGTERM and ctrl-c drain it")
    await running
    stats = bus.stats()
    Terminal.note(
        f"stopped {app}: {stats.received:,} received, {stats.delivered:,} delivered,"
        f" {stats.failed:,} failed, {stats.published:,} published"
    )
    return OK


def watch(app: str) -> None:
    """Become watchfiles, which runs this command anew when a file changes."""
    if importlib.util.find_spec("watchfiles") is None:
        raise Failure(
            "--reload needs watchfiles, which is not installed",
            f"the Python of {sys.executable}",
            "pip install watchfiles, or run without --reload",
            USAGE,
        )
    # More patience than a bus needs to drain (10 s), then SIGKILL.
    again = shlex.join([sys.executable, "-m", "eventbus", "run", app])
    words = ["--sigint-timeout", "15", "--filter", "python", "--target-type", "command", again, "."]
    os.execv(sys.executable, [sys.executable, "-m", "watchfiles", *words])  # noqa: S606 (no shell is wanted)


def acl(app: str, publishes: list[str], role: Role, user: str) -> int:
    """Print the ACL rules of an application, one line for Redis."""
    bus = load_bus(app)
    routes = bus.routes
    if not routes and not publishes:
        raise Failure(
            "this bus has no handlers, so nothing says what it needs",
            app,
            "name what it publishes: --publishes module:Event",
            USAGE,
        )
    rules = bus.acl(*load_events(publishes))
    terminal = Terminal()
    terminal.line(f"ACL SETUSER {user} on '>PASSWORD' {' '.join(getattr(rules, role))}")
    terminal.note("put a long password for PASSWORD; docs/security.md explains the rules")
    return OK


def server(action: Literal["start", "stop", "status"], name: str) -> int:
    """Start, stop or look for the shared embedded server of this user."""
    from eventbus import server as embedded

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = embedded.main([action, name])
    said, wrong = out.getvalue().strip(), err.getvalue().strip()
    if wrong:
        raise Failure(
            f"the embedded server cannot {action}",
            wrong[:600],
            "correct what it names; `eventbus server status` says how things stand",
        )
    terminal = Terminal()
    terminal.line(said)
    suffix = "" if name == "default" else name
    if action == "start":
        terminal.note(f"use it:  export EVENTBUS_URL=embedded://{suffix}")
        terminal.note(f"stop it: eventbus server stop {suffix}".rstrip())
    return FAILED if code else OK


def is_running(name: str) -> bool:
    """Whether the shared embedded server of this name runs; it is not started by the question."""
    from eventbus import server as embedded

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return embedded.main(["status", name]) == OK


def demo(seconds: float) -> int:
    """Run the demo."""
    from eventbus import demo as play

    return play.main(["--seconds", str(seconds)])
