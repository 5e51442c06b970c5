"""Fixtures that every test may use."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every command with none of the variables that are under test."""
    listen = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
    for name in ("PORT", *listen, "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # `make test` sets the last three
        monkeypatch.delenv(name, raising=False)
