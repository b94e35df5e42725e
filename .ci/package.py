"""What users install, tried as they get it: `python .ci/package.py`.

It builds the sdist, and the wheel from the sdist, then installs the wheel into empty environments,
far from this tree: bare (every door opens, or says in one sentence which extra is missing), then
with each extra alone, then with the server, where the demo does its job. Last, a user's project of
one file is checked by mypy and basedpyright against the installed package. Standard library, pip
and `build` only; the type checkers are those of the environment that runs it.
"""

import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What each extra is for: a program that works with it, and what says that it is missing.
EXTRAS = {
    "cache": "import eventbus.cache as c, eventbus as e; c.LocalCache(e.EventBus('memory://x'))",
    "chat": "import starlette, uvicorn, websockets",
    "cli": (
        "import sys; sys.argv = ['eventbus', '--help']; from eventbus.cli import main;"
        " sys.exit(main())"
    ),
    "otel": "import eventbus.otel as o, eventbus as e; o.instrument(e.EventBus('memory://x'))",
    "prometheus": "import eventbus.prometheus as p, eventbus as e; p.Collector(e.EventBus('memory://x'))",
    "server": "from eventbus.server import Server; Server(port=0).start().stop()",
    "socketio": (
        "import eventbus.socketio as s, eventbus as e; b = e.EventBus('memory://x');"
        " s.Emitter(b); s.Manager(b)"
    ),
}
# Never installed by users alone: tools of this tree.
OURS = {"dev", "bench", "fuzz", "cluster"}
SILENT = {"chat"}  # the example's packages: nothing of ours imports them
BARE = """
import eventbus, eventbus.blocking, eventbus.presence, eventbus.rooms
import eventbus.server, eventbus.testing
assert "site-packages" in eventbus.__file__, eventbus.__file__
"""
USER = """
from eventbus import Event, EventBus, Gap, Message, Receipt


class OrderPaid(Event, channel="orders:{region}"):
    region: str
    cents: int


bus = EventBus()


@bus.on("orders:{region}")
async def paid(event: OrderPaid, region: str, message: Message[OrderPaid]) -> None:
    total: int = event.cents + message.event.cents
    print(region.upper(), total, message.sequence)


@bus.on_gap("orders:*")
async def lost(gap: Gap) -> None:
    print(gap.reason, gap.missed)


async def pay() -> Receipt:
    return await bus.publish(OrderPaid(region="eu", cents=12))
"""


def run(*words: object, cwd: Path, ok: bool = True, **more: str) -> str:
    """What a program prints; it must end well, or must not."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=known | {"NO_COLOR": "1"} | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    if (done.returncode == 0) != ok:
        sys.exit(f"{' '.join(map(str, words))}\nended with {done.returncode}:\n{said}")
    return said


def environment(folder: Path, requirement: str) -> Path:
    """A new environment with one requirement; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check", requirement, cwd=folder
    )
    return python


def main() -> None:
    """Build, then try."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"]) - OURS
    if extras != set(EXTRAS):
        sys.exit(f"these extras have no program here: {sorted(extras ^ set(EXTRAS))}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(sys.executable, "-m", "build", "--outdir", work, ROOT, cwd=work)
        (wheel,) = work.glob("*.whl")
        (sdist,) = work.glob("*.tar.gz")
        print(f"built {wheel.name} ({wheel.stat().st_size // 1024} kB), {sdist.name}")

        bare = environment(work / "bare", str(wheel))
        run(bare, "-W", "error", "-c", BARE, cwd=work)
        for extra, program in sorted(EXTRAS.items()):
            if extra in SILENT:
                continue
            said = run(bare, "-c", program, cwd=work, ok=False, PATH="").strip().splitlines()
            if f"eventbus-redis[{extra}]" not in said[-1] or (extra == "cli" and len(said) > 3):
                sys.exit(f"without [{extra}] it must say how to get it, and says: {said}")
            print(f"without [{extra}]: {said[-1]}")

        for extra, program in sorted(EXTRAS.items()):
            python = environment(work / extra, f"{wheel}[{extra}]")
            run(python, "-W", "error", "-c", program, cwd=work)
            print(f"with [{extra}] alone: works")

        said = run(
            work / "server" / "bin" / "python", "-m", "eventbus.demo", "--seconds", 6, cwd=work
        )
        print("the demo, from the wheel:", said.strip().splitlines()[-1].strip())

        user = work / "user"
        user.mkdir()
        (user / "app.py").write_text(USER, encoding="utf-8")
        run(
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--python-executable",
            bare,
            "app.py",
            cwd=user,
        )
        run(sys.executable, "-m", "basedpyright", "--pythonpath", bare, "app.py", cwd=user)
        print("a user's project: no word from mypy --strict, none from basedpyright")


if __name__ == "__main__":
    main()
