"""`run`, `server` and `demo`: what is started, and how it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from eventbus import EventBus
from eventbus import demo as played
from eventbus.server import Server
from tests.cli.slow import Done, Work
from tests.cli.tool import LIMIT, ROOT, Tool, ended, started
from tests.helpers import soon


async def test_run_drains(valkey: Server) -> None:
    """SIGTERM ends a bus when its handlers have ended: nothing new comes in, what runs goes on and
    may publish."""
    with started(
        "run", "tests.cli.slow:bus", url=valkey.url, ready="1 handler on 1 pattern"
    ) as run:
        async with (
            EventBus(valkey.url) as bus,
            Redis(unix_socket_path=valkey.socket_path) as redis,
            bus.subscribe("began", Work) as began,
            bus.subscribe("done:1", Done) as done,
        ):
            await bus.publish(Work(job="1"))
            await soon(anext(aiter(began)))
            run.send_signal(signal.SIGTERM)
            while await redis.pubsub_numpat():  # until the application has unsubscribed
                pass
            await redis.rpush("go", "now")
            message = await soon(anext(aiter(done)))
        shown = ended(run)
    assert message.event == Done(job="1")
    assert message.source.startswith("slow/")
    assert shown.code == 0
    assert "stopped tests.cli.slow:bus: 1 received, 1 delivered, 0 failed, 2 published" in shown.err


async def test_run_does_not_drain_twice(valkey: Server) -> None:
    """A second ctrl-c does not wait for the handlers: the code is 130."""
    with started("run", "tests.cli.slow:bus", url=valkey.url, ready="running") as run:
        async with (
            EventBus(valkey.url) as bus,
            Redis(unix_socket_path=valkey.socket_path) as redis,
            bus.subscribe("began", Work) as began,
        ):
            await bus.publish(Work(job="2"))
            await soon(anext(aiter(began)))
            run.send_signal(signal.SIGINT)
            while await redis.pubsub_numpat():
                pass
            run.send_signal(signal.SIGINT)
            run.communicate(timeout=LIMIT)
            assert run.returncode == 130


def test_run_is_interrupted(valkey: Server) -> None:
    """ctrl-c drains too, and ends with 0."""
    with started("run", "tests.cli.shop:bus", url=valkey.url, ready="running") as run:
        run.send_signal(signal.SIGINT)
        assert ended(run).code == 0


async def test_run_logs_what_handlers_raise(valkey: Server) -> None:
    """An error of a handler is logged with its traceback, and the bus goes on."""
    with started("run", "tests.cli.slow:bus", url=valkey.url, ready="running") as run:
        async with EventBus(valkey.url) as bus, bus.subscribe("began", Work) as began:
            await bus.publish(Work(job="boom"))
            await soon(anext(aiter(began)))
            run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 0
    assert b"RuntimeError: boom" in err
    assert b'tests/cli/slow.py", line' in err
    assert b"1 received, 1 delivered, 1 failed" in err


def test_run_without_redis() -> None:
    """A bus that cannot start ends with 3 and three lines."""
    url = "redis://me:geheim@127.0.0.1:1"
    with started("run", "tests.cli.impatient:bus", url=url) as run:
        shown = ended(run)
    assert shown.code == 3
    assert "eventbus: Redis could not be reached" in shown.err
    assert "geheim" not in shown.err


def test_reload_needs_watchfiles(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without watchfiles --reload says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shown = tool("run", "tests.cli.shop:bus", "--reload")
    assert shown.code == 2
    assert "pip install watchfiles" in shown.err


def test_reload_is_watchfiles(tmp_path: Path) -> None:
    """With it --reload becomes watchfiles, which runs the same command without the option."""
    (tmp_path / "watchfiles.py").write_text("import sys\nprint(sys.argv[1:])\n")
    with started("run", "tests.cli.shop:bus", "--reload", PYTHONPATH=f"{tmp_path}:{ROOT}") as run:
        shown = ended(run)
    assert shown.code == 0
    assert "-m eventbus run tests.cli.shop:bus', '.'" in shown.out


def test_server(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts once, is found by `embedded://` and `status`, and stops; only its URL is on
    standard output."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = f"unix://{tmp_path}/eventbus/cli-test/server.sock\n"
    assert tool("server", "status", "cli-test")[:2] == (1, f"stopped {url}")
    try:
        first, second = tool("server", "start", "cli-test"), tool("server", "start", "cli-test")
        assert first[:2] == second[:2] == (0, url)
        assert "export EVENTBUS_URL=embedded://cli-test" in first.err
        assert tool("server", "status", "cli-test")[:2] == (0, f"running {url}")
        assert tool("publish", "x", "{}", "--url", "embedded://cli-test").code == 0
    finally:
        stopped = tool("server", "stop", "cli-test")
    assert stopped[:2] == (0, "stopped\n")
    assert tool("server", "stop", "cli-test").code == 0
    assert tool("server", "status", "cli-test").code == 1


def test_server_cannot_start(tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that is missing, and a name that is none, are told in three lines."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("EVENTBUS_SERVER", "/nowhere")
    for name in ("default", "../x"):
        shown = tool("server", "start", name)
        assert (shown.code, shown.err.count("\n")) == (1, 3)
        assert "the embedded server cannot start" in shown.err


def test_demo(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` is the demo of the package, with its exit code."""
    monkeypatch.setattr(played, "main", lambda words: print(words) or 7)
    assert tool("demo", "--seconds", "5") == (7, "['--seconds', '5.0']\n", "")
