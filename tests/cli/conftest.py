"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from tests.cli.tool import Tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """The command line in this process, on no server unless a test names one."""
    monkeypatch.delenv("EVENTBUS_URL", raising=False)
    return Tool(monkeypatch, capfd)
