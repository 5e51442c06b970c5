"""Fixtures that every test may use."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every command with none of the variables that are under test."""
    for name in ("PORT", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "MAKEFLAGS", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
