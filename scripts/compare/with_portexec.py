"""With portexec."""

import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import portexec

SCRIPTS = str(Path(__file__).resolve().parent.parent)


@pytest.fixture
def url(portexec_server: Callable[..., portexec.Server]) -> str:
    return portexec_server(["uvicorn", "--app-dir", SCRIPTS, "demo_app:app", "--fd", "{fd}"]).url


def test_hello(url: str) -> None:
    with urllib.request.urlopen(f"{url}/hello") as response:
        assert b"hello" in response.read()
