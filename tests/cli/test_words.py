"""The command line itself: its words, its errors, and what it prints of strangers' names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import BusUnavailable, EventBusError, PermissionDenied, PublishUncertain
from eventbus.cli import apps
from eventbus.cli.terminal import (
    Failure,
    amount,
    clean,
    count_of,
    cut,
    explain,
    guard,
    hide_login,
    pad,
    width_of,
)
from tests.cli.tool import LIMIT, ROOT, SHOP, Tool, environment

COMMANDS = "tail publish top doctor run schema acl bench demo server".split()


def python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What a program does in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(None, **more),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_help(tool: Tool) -> None:
    """Without words, and with --help, the commands are listed, in 80 columns."""
    shown = tool("--help")
    assert shown == tool("-h") == tool()
    assert shown.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(tool: Tool, command: str) -> None:
    """Every command explains itself in 80 columns, and tells no URL that the environment holds."""
    shown = tool(command, "--help")
    assert shown.code == 0
    assert "Usage: eventbus " + command in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_version(tool: Tool) -> None:
    """The version is that of the package."""
    assert tool("--version").out.startswith("eventbus 0.")


def test_help_is_light() -> None:
    """Help imports neither redis nor rich nor what a command needs."""
    done = python(
        "import sys; sys.argv = ['eventbus', '--help']; from eventbus.cli import main; main();"
        "print({n.split('.')[0] for n in sys.modules} & {'redis', 'hiredis', 'rich', 'valkey'},"
        "sorted(n for n in sys.modules if n.startswith('eventbus.cli.')))"
    )
    assert done.stdout.splitlines()[-1] == (
        "set() ['eventbus.cli.commands', 'eventbus.cli.terminal']"
    ), done.stderr


def test_without_the_extra(tmp_path: Path) -> None:
    """Without typer one sentence says which extra to install, and `import eventbus.cli` works."""
    missing = "raise ModuleNotFoundError('No module named typer', name='typer')"
    (tmp_path / "typer.py").write_text(missing)
    done = python(
        "import sys; from eventbus.cli import main; sys.exit(main())",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'eventbus-redis[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words, told",
    [
        (["tial"], "No such command 'tial'"),
        (["tail"], "Missing argument"),
        (["server"], "Missing command"),
        (["top", "--sort", "colour"], "'colour' is not one of"),
        (["tail", "x", "--count", "0"], "Invalid value for '--count'"),
        (["bench", "redis://me:geheim@there"], "unexpected extra argument"),
        (["tail", "x", "--raw", "--json"], "do not go together"),
        (["tail", "{x"], "brace that is not closed"),
        (["tail", "x", "--url", "ftp://me:geheim@there"], "no transport for 'ftp'"),
        (["tail", "x", "--url", "redis://me:geheim#@there"], "cannot be read"),
        (["tail", "x", "--url", "memory://x"], "lives in one process"),
        (["top", "--namespace", "a*"], "namespace must not hold"),
        (["publish", "x"], "nothing to publish"),
        (["publish", "x", "{}", "--stdin"], "too much to publish"),
        (["run", "tests.cli.shop"], "names nothing"),
        (["run", "nowhere:bus"], "nowhere cannot be imported"),
        (["run", "tests.cli.shop:nothing"], "has no 'nothing'"),
        (["run", "tests.cli.shop:router"], "is a Router, not an EventBus"),
        (["acl", f"{SHOP}:bus", "--publishes", f"{SHOP}:Cat"], "is no Event class"),
        (["publish", "pay:1", "{}", "--app", f"{SHOP}:bus"], "which type?"),
        (["publish", "pay:1", "{}", "--app", f"{SHOP}:bus", "--type", "x"], "of the type 'x'"),
        (["publish", "pay:1", "{}", "--app", f"{SHOP}:bus", "--type", "Payment"], "cents: Field"),
        (["publish", "pay:1", "[1]"], "it is no object"),
        (["publish", "pay:1", "{"], "this is no event"),
    ],
)
def test_wrong_words(tool: Tool, words: list[str], told: str) -> None:
    """Wrong words end with 2 and three lines: what, where, and what to do; no secret is in them."""
    shown = tool(*words, *(["--url", "redis://127.0.0.1:1"] if words[0] == "publish" else []))
    lines = shown.err.splitlines()
    assert (shown.code, shown.out, len(lines)) == (2, "", 3), shown.err
    assert told in shown.err
    assert lines[0].startswith("eventbus: ")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  do:    ")
    assert "geheim" not in shown.err


def test_broken_application(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that cannot be imported is told with the file and the line where it fails."""
    (tmp_path / "broken_app.py").write_text("x = 1\nraise RuntimeError('no \\x1b[2J luck')\n")
    monkeypatch.chdir(tmp_path)
    shown = tool("schema", "broken_app:bus")
    assert shown.code == 2
    assert "RuntimeError: no \\x1b[2J luck" in shown.err
    assert f"{tmp_path}/broken_app.py:2" in shown.err
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    "words", [["tail", "x"], ["top"], ["publish", "x", "{}"], ["doctor"], ["bench"]]
)
def test_redis_is_away(tool: Tool, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away ends every command with 3, after a short while, without a password."""
    monkeypatch.setattr(apps, "CONNECT_TIMEOUT", 0.2)
    shown = tool(*words, "--url", "redis://me:geheim@127.0.0.1:1/4")
    assert shown.code == 3
    said = " ".join((shown.out + shown.err).split())
    assert "redis://127.0.0.1:1 could not be reached" in said
    assert "eventbus server start" in said
    assert "geheim" not in shown.out + shown.err


@pytest.mark.parametrize(
    "error, code, told",
    [
        (BusUnavailable("x could not be reached. Is Redis running there? y"), 3, "where: x could"),
        (PermissionDenied("no"), 3, "eventbus acl"),
        (PublishUncertain("no", channel="c\x1b"), 1, "channel 'c\\x1b': no"),
        (EventBusError("redis://me:geheim@x"), 2, "where: redis://***@x"),
        (ValueError(), 2, "where: ValueError"),
        (KeyError("\x1b"), 1, "please report"),
        (Failure("a", "b", "c", 7), 7, "eventbus: a"),
    ],
)
def test_every_error_has_three_lines(
    error: Exception, code: int, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a command raises becomes three lines and an exit code."""

    def work() -> int:
        raise error

    assert guard(work) == code
    shown = capfd.readouterr().err
    assert told in shown
    assert shown.count("\n") == 3
    assert "\x1b" not in shown
    assert isinstance(explain(ValueError("x")), Failure)


@given(st.text())
def test_clean_text_obeys_nobody(text: str) -> None:
    """Cleaned text is printable, whatever it was, and printable text is left alone."""
    assert clean(text).isprintable()
    assert clean(clean(text)) == clean(text)
    if text.isprintable():
        assert clean(text) == text


@given(st.text(), st.integers(0, 40))
def test_cut_text_fits(text: str, columns: int) -> None:
    """Cut text is no wider than its place, padded text exactly as wide."""
    text = clean(text)
    assert width_of(cut(text, columns)) <= columns
    assert width_of(pad(text, columns)) == columns


def test_short_forms() -> None:
    """Sizes, numbers and URLs in their short forms."""
    assert [amount(n) for n in (0, 999, 1000, 15_400, 2_500_000, 3e9)] == [
        "0 B", "999 B", "1.0 kB", "15 kB", "2.5 MB", "3.0 GB",
    ]  # fmt: skip
    assert [count_of(1, "copy"), count_of(2000, "copy"), count_of(0, "event")] == [
        "1 copy",
        "2,000 copies",
        "0 events",
    ]
    assert (
        hide_login("redis://u:p@h:1/2 x rediss://:p%40@h") == "redis://***@h:1/2 x rediss://***@h"
    )
