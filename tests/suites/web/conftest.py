"""Servers that all files of the suite share. $APPS has the applications."""

from __future__ import annotations

import os

import pytest

APPS = os.environ["APPS"]
PATIENCE = 60  # seconds; httpx gives up after 5, in which a busy machine may have done nothing


@pytest.fixture(scope="session")
def fastapi_server(portexec_server_any_scope):
    return portexec_server_any_scope(["uvicorn", "asgi:app", "--fd", "{fd}"], cwd=APPS)
