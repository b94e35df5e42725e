"""What importing a bus costs a program that would import its ingredients anyway.

Whole-process CPU (user and system) of `python FILE`, read from the kernel when the child ends. Runs
of the two files alternate, and each run starts its file several times, since one start differs from
the next by more than the target allows.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = {
    "ingredients": """\
import asyncio

import anyio
import orjson
from pydantic import BaseModel, TypeAdapter


class Sent(BaseModel):
    room: str
    user: str
    text: str
""",
    "eventbus": "from eventbus import Event, EventBus\n",
}


def start(path: Path) -> float:
    """Seconds of CPU of one Python that runs this file."""
    child = subprocess.Popen([sys.executable, str(path)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {path.name} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def starts(name: str, times: int) -> list[float]:
    """``times`` starts of a file, after one that fills the caches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}_start.py")
        path.write_text(FILES[name])
        start(path)
        return [start(path) for _ in range(times)]
