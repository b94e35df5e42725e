"""What the tests of `make cluster` share: the folder of Node programs, with its packages installed,
and the browser.

Nothing here skips: who asks for these tests gets them, or one sentence that says what is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser

ARGUMENTS = """
--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync
""".split()
LIMIT = 30_000
"""Milliseconds that the browser waits for what must become true."""
NODE = Path(__file__).parent / "node"
OLDEST = 20
"""The oldest Node.js that the pinned client of Redis runs on."""


def lacking(node: str | None, npm: str | None) -> str:
    """The sentence that says what is missing of Node.js; empty when all is there."""
    advice = f"install Node.js {OLDEST} or newer with npm (Debian: apt install nodejs npm)"
    for name, found in (("node", node), ("npm", npm)):
        if found is None:
            return f"{name} is not on the PATH: {advice}"
    said = subprocess.run(
        [str(node), "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    major = said.stdout.strip().removeprefix("v").partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST:
        return f"{node} says that it is {said.stdout.strip() or said.stderr.strip()!r}: {advice}"
    return ""


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The folder tests/cluster/node, its packages installed as package-lock.json pins them.

    Installed once for each state of the lock file; processes that test at the same time wait for
    the one that installs.
    """
    if missing := lacking(shutil.which("node"), npm := shutil.which("npm")):
        pytest.fail(missing, pytrace=False)
    wanted = hashlib.sha256((NODE / "package-lock.json").read_bytes()).hexdigest()
    stamp = NODE / "node_modules" / ".installed"
    with (NODE / ".npmrc").open("rb") as lock:  # any file of the folder that npm leaves alone
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            done = subprocess.run(
                [str(npm), "ci", "--no-audit", "--no-fund"],
                cwd=NODE,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            if done.returncode:
                pytest.fail(f"npm ci failed in {NODE}:\n{done.stderr[-2000:]}", pytrace=False)
            stamp.write_text(wanted)
    return NODE


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium, without a window."""
    try:
        from playwright.async_api import async_playwright, expect
    except ModuleNotFoundError:
        pytest.fail("playwright is missing: pip install 'eventbus-redis[cluster]'")
    if (path := shutil.which("chromium")) is None:
        pytest.fail("chromium is missing: apt install chromium")
    expect.set_options(timeout=LIMIT)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        await browser.close()
