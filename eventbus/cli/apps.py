"""From `module:bus` and `--url` to a bus, and the one way to run a command's coroutine."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from eventbus import Event, EventBus
from eventbus.cli.terminal import TERMINATED, USAGE, Failure, place_of

CONNECT_TIMEOUT = 3.0
"""Seconds until a command says that Redis is away: a person waits."""
_FORM = "write it as module:name, as in `eventbus run shop:bus`"


def load(spec: str) -> Any:
    """What `module:name` names, imported as if from the current folder. Raises Failure."""
    module_name, colon, path = spec.partition(":")
    if not colon or not module_name or not path:
        raise Failure(f"{spec!a:.200} names nothing", "the argument module:bus", _FORM, USAGE)
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            where, do = f"no module {module_name} in {here} or on PYTHONPATH", _FORM
        else:
            where, do = place_of(error), f"make `python -c 'import {module_name}'` work"
        raise Failure(
            f"{module_name} cannot be imported: {type(error).__name__}: {error}"[:400],
            where,
            do,
            USAGE,
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            where = str(getattr(found, "__file__", None) or module_name)
            raise Failure(f"{module_name} has no {path!a:.100}", where, _FORM, USAGE)
        found = getattr(found, part)
    return found


def load_bus(spec: str) -> EventBus:
    """The bus that `module:name` names. Raises Failure."""
    found = load(spec)
    if not isinstance(found, EventBus):
        raise Failure(
            f"{spec} is a {type(found).__name__}, not an EventBus",
            str(sys.modules[spec.partition(":")[0]].__file__),
            "name the variable that holds the bus: `bus = EventBus()` is module:bus",
            USAGE,
        )
    return found


def load_events(specs: list[str]) -> list[type[Event]]:
    """The event classes that these `module:Class` name. Raises Failure."""
    found = [load(spec) for spec in specs]
    for spec, item in zip(specs, found, strict=True):
        if not (isinstance(item, type) and issubclass(item, Event)):
            where = "the option --publishes"
            raise Failure(f"{spec} is no Event class", where, "name one: module:Class", USAGE)
    return found


def place(bus: EventBus) -> str:
    """Where the bus goes, without a secret."""
    return repr(bus).partition(" at ")[2].removesuffix(">")


def open_bus(
    url: str | None, namespace: str | None, app: EventBus | None = None, **settings: Any
) -> EventBus:
    """A bus for one command: at the URL, else where the application's bus goes, else at
    EVENTBUS_URL, else at localhost. Raises Failure for a place that no other process shares."""
    settings = {"name": "cli", "connect_timeout": CONNECT_TIMEOUT, **settings}
    if namespace is None:
        namespace = app.namespace if app is not None else ""
    if app is not None and url is None:
        bus = app.beside(namespace=namespace, **settings)
    else:
        bus = EventBus(url, namespace=namespace, **settings)
    if place(bus).startswith("memory://"):
        raise Failure(
            "a memory:// bus lives in one process, and this is another",
            place(bus),
            "use embedded:// or redis:// in --url, EVENTBUS_URL or the application",
            USAGE,
        )
    return bus


def drive(work: Coroutine[Any, Any, int]) -> int:
    """Run a command to its exit code. SIGTERM ends it as ctrl-c does: all is closed first."""
    terminated = False
    # What the bus logs is shown where a command wants it, and not by logging's last resort.
    logging.getLogger("eventbus").addHandler(logging.NullHandler())

    async def run() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop() -> None:
            nonlocal terminated
            terminated = True
            if task is not None:
                task.cancel()

        with suppress(NotImplementedError):  # Windows has no such signals
            loop.add_signal_handler(signal.SIGTERM, stop)
        return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        if terminated:
            return TERMINATED
        raise KeyboardInterrupt from None
