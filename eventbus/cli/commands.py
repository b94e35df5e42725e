"""The words of the command line: every command with its options, for typer to read.

Each one imports what it needs when it is called: `eventbus --help` imports no redis. Errors of
typer take the same three lines as ours, without the login of a URL that stood among the words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from eventbus.cli.terminal import USAGE, Failure, guard

app = typer.Typer(
    name="eventbus",
    help="Look at an event bus, speak on it, and find out what is wrong with it.",
    epilog="Where: --url, else EVENTBUS_URL, else redis://localhost:6379.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
server_app = typer.Typer(
    help="Start, stop or look for your embedded server (embedded://).",
    rich_markup_mode=None,
)
app.add_typer(server_app, name="server")

Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Where Redis is; default EVENTBUS_URL."),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", metavar="NAME", help="What goes before every name on the wire."),
]
App = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:BUS", help="Your bus: its place, and its event classes."),
]
Bus = Annotated[str, typer.Argument(metavar="MODULE:BUS", show_default=False)]
Patterns = Annotated[
    list[str], typer.Argument(metavar="PATTERN", show_default=False, help="As in 'chat:*'.")
]
AnyPatterns = Annotated[list[str] | None, typer.Argument(metavar="PATTERN", help="Default '*'.")]
Publishes = Annotated[
    list[str] | None,
    typer.Option("--publishes", metavar="MODULE:EVENT", help="An event class that it publishes."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


@app.callback(invoke_without_command=True)
def top_level(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Look at an event bus, speak on it, and find out what is wrong with it."""
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"eventbus {version_of('eventbus-redis')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def tail(
    patterns: Patterns,
    url: Url = None,
    namespace: Namespace = None,
    app: App = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The payloads' bytes, as they are.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Cut no line to the screen.")] = False,
    rate: Annotated[bool, typer.Option("--rate", help="Only how many, once a second.")] = False,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many messages.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", "-t", min=0.0, help="End after so many seconds.")
    ] = None,
) -> None:
    """Show what passes on channels, with gaps and reconnects."""

    def work() -> int:
        from eventbus.cli.apps import drive
        from eventbus.cli.tail import Asked, tail

        if sum((as_json, raw, rate)) > 1:
            raise _only_one("--json, --raw and --rate")
        form: Literal["json", "raw", "text"] = "json" if as_json else "raw" if raw else "text"
        asked = Asked(tuple(patterns), form, count, timeout, rate, full)
        return drive(tail(asked, url, namespace, app))

    _end(work)


@app.command()
def publish(
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", show_default=False)],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A JSON object.", show_default=False)
    ] = None,
    type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="The event's type on the wire.")
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Each line of stdin is one.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The data as it is, no envelope.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="So many times.")] = 1,
    url: Url = None,
    namespace: Namespace = None,
    app: App = None,
) -> None:
    """Publish an event, and say how many copies Redis handed out."""

    def work() -> int:
        from eventbus.cli.apps import drive
        from eventbus.cli.publish import Asked, publish

        return drive(publish(Asked(channel, data, type, stdin, raw, count), url, namespace, app))

    _end(work)


@app.command()
def top(
    patterns: AnyPatterns = None,
    url: Url = None,
    namespace: Namespace = None,
    app: App = None,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between tables.")
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many tables.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Channels in a table.")] = None,
    sort: Annotated[
        Literal["rate", "bytes", "total", "channel", "seen"], typer.Option("--sort")
    ] = "rate",
) -> None:
    """A live table of the channels: rate, bytes, last seen."""

    def work() -> int:
        from eventbus.cli.apps import drive
        from eventbus.cli.top import Asked, top

        asked = Asked(tuple(patterns or ("*",)), interval, count, rows, sort)
        return drive(top(asked, url, namespace, app))

    _end(work)


@app.command()
def doctor(
    url: Url = None,
    namespace: Namespace = None,
    app: App = None,
    publishes: Publishes = None,
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="NAME", help="Try the rules of this user (needs +acl)."),
    ] = None,
) -> None:
    """Look for what a bus would suffer from, and say what to do."""

    def work() -> int:
        from eventbus.cli.apps import drive
        from eventbus.cli.doctor import Asked, doctor

        return drive(doctor(Asked(app, tuple(publishes or ()), user), url, namespace))

    _end(work)


@app.command()
def run(
    bus: Bus,
    reload: Annotated[
        bool, typer.Option("--reload", help="Again when a file changes (needs watchfiles).")
    ] = False,
) -> None:
    """Run a bus until SIGTERM or ctrl-c, then drain it."""

    def work() -> int:
        from eventbus.cli.programs import run

        return run(bus, reload)

    _end(work)


@app.command()
def schema(
    bus: Bus,
    publishes: Publishes = None,
    title: Annotated[str | None, typer.Option("--title", help="Default: the module.")] = None,
    release: Annotated[
        str | None, typer.Option("--release", help="Default: the version of its package.")
    ] = None,
) -> None:
    """Print the AsyncAPI 3 document of a bus."""

    def work() -> int:
        from eventbus.cli.schema import schema

        return schema(bus, publishes or [], title, release)

    _end(work)


@app.command()
def acl(
    bus: Bus,
    publishes: Publishes = None,
    role: Annotated[Literal["publisher", "subscriber", "both"], typer.Option("--role")] = "both",
    user: Annotated[str, typer.Option("--user", metavar="NAME")] = "NAME",
) -> None:
    """Print the least ACL rules that a bus needs."""

    def work() -> int:
        from eventbus.cli.programs import acl

        return acl(bus, publishes or [], role, user)

    _end(work)


@app.command()
def bench(
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=60.0)] = 2.0,
    url: Url = None,
    namespace: Namespace = None,
    app: App = None,
) -> None:
    """Measure publishing and receiving here, for a moment."""

    def work() -> int:
        from eventbus.cli.apps import drive
        from eventbus.cli.bench import bench

        return drive(bench(seconds, url, namespace, app))

    _end(work)


@app.command()
def demo(seconds: Annotated[float, typer.Option("--seconds", min=1.0)] = 15.0) -> None:
    """Three processes, one server, one outage, and the sums."""

    def work() -> int:
        from eventbus.cli.programs import demo

        return demo(seconds)

    _end(work)


@server_app.command()
def start(name: Name = "default") -> None:
    """Start it in the background, or find it running; print its URL."""
    _end(lambda: _server("start", name))


@server_app.command()
def stop(name: Name = "default") -> None:
    """End it."""
    _end(lambda: _server("stop", name))


@server_app.command()
def status(name: Name = "default") -> None:
    """Say whether it runs; the exit code is 1 when not."""
    _end(lambda: _server("status", name))


def _server(action: Literal["start", "stop", "status"], name: str) -> int:
    from eventbus.cli.programs import server

    return server(action, name)


def _only_one(options: str) -> Failure:
    return Failure("these do not go together", options, "name one of them", USAGE)


def _end(work: Callable[[], int]) -> None:
    raise SystemExit(guard(work))


def main_words() -> int:
    """Read the words of the command line and do what they say. Returns the exit code."""
    return guard(_typer)


def _typer() -> int:
    try:
        done: Any = app(prog_name="eventbus", standalone_mode=False)
    except typer.Abort:
        return 130
    except Exception as error:
        # typer's own errors, in the version with click and in the one without it
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "eventbus"
        code = getattr(error, "exit_code", USAGE)
        what = str(show()).replace("\n", " ")
        raise Failure(what, command, f"{command} --help", code) from None
    return done if isinstance(done, int) else 0
