"""A server behind a cable that can be pulled: a network namespace, a pair of ends, and a route.

A proxy ends every TCP connection itself, so the kernel of the bus always hears from somebody. Only
a peer that vanishes without FIN or RST shows what a dead network does: nothing arrives, nothing is
refused, and the kernel's own timers decide when a socket is over. This needs root on Linux, and
nothing that is not in every kernel (no netem).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

from eventbus.server import Server, find_binary
from tests.conftest import IN_CI

_TRIES = 5
_IP_TIMEOUT = 20


class Cable:
    """`with Cable(tmp_path) as cable: EventBus(cable.url)`. Its server lives in a namespace of its
    own; `pull` makes every answer vanish on its way, `plug` lets them come again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""
        self.here = self.there = ""
        self.server: Server | None = None

    @property
    def url(self) -> str:
        """Where the server is, seen from here."""
        return f"redis://{self.there}:6379"

    def __enter__(self) -> Self:
        for left in reversed(range(_TRIES)):
            try:
                self._lay()
                break
            except subprocess.CalledProcessError:  # a name or a subnet that somebody has
                self._remove()
                if not left:
                    raise
        try:
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.server is not None:
                self.server.stop()
        finally:
            self._remove()

    def pull(self) -> None:
        """From now on nothing that the server says arrives, and nobody is told."""
        ip("-n", self.name, "route", "add", "blackhole", f"{self.here}/32")

    def plug(self) -> None:
        """What the server says arrives again."""
        ip("-n", self.name, "route", "del", "blackhole", f"{self.here}/32")

    def _lay(self) -> None:
        token = secrets.token_hex(4)
        self.name = f"eventbus-{token}"
        net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        self.here, self.there = f"{net}.1", f"{net}.2"
        near, far = f"eb{token}a", f"eb{token}b"
        if net in ip("-o", "-4", "address"):
            raise subprocess.CalledProcessError(1, ["ip"], f"{net} is taken")
        ip("netns", "add", self.name)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
        ip("address", "add", f"{self.here}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", self.name, "address", "add", f"{self.there}/30", "dev", far)
        ip("-n", self.name, "link", "set", far, "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    def _serve(self) -> None:
        """Start the server inside. Its unix socket is a file, and answers from outside too."""
        wrapper = self._folder / "server"
        wrapper.write_text(
            f'#!/bin/sh\nexec {shutil.which("ip")} netns exec {self.name} {find_binary()} "$@"\n'
        )
        wrapper.chmod(0o700)
        self.server = Server(
            binary=str(wrapper),
            port=6379,
            options=("--bind", self.there, "--protected-mode", "no"),
        )
        self.server.start()

    def _remove(self) -> None:
        """The namespace takes its end of the pair with it, and that end the other one."""
        if self.name:
            near = f"eb{self.name.removeprefix('eventbus-')}a"
            ip("netns", "delete", self.name, check=False)
            ip("link", "delete", near, check=False)


def ip(*words: str, check: bool = True) -> str:
    """Run `ip`, for a bounded time, and return what it prints."""
    done = subprocess.run(
        ["ip", *words], check=check, capture_output=True, text=True, timeout=_IP_TIMEOUT
    )
    return done.stdout


def need_namespaces() -> None:
    """Skip the test where no namespace can be made: that takes root, and Linux."""
    if os.getuid() == 0 and shutil.which("ip"):
        try:
            probe = f"eventbus-probe-{secrets.token_hex(4)}"
            ip("netns", "add", probe)
            ip("netns", "delete", probe)
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            return
    missing = "network namespaces need root, and `ip` of iproute2"
    pytest.fail(missing) if IN_CI else pytest.skip(missing)
