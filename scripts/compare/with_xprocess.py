"""With pytest-xprocess: choose a number, and wait until the server says that it runs."""

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from xprocess import ProcessStarter, XProcess

SCRIPTS = str(Path(__file__).resolve().parent.parent)
PORT = os.environ.get("FIXED_PORT", "8000")


@pytest.fixture
def url(xprocess: XProcess) -> Iterator[str]:
    class Starter(ProcessStarter):
        args = ["uvicorn", "--app-dir", SCRIPTS, "demo_app:app", "--port", PORT]
        env = {**os.environ, "PORT": PORT}
        pattern = "Uvicorn running on"
        timeout = 15

    xprocess.ensure("demo", Starter)
    yield f"http://127.0.0.1:{PORT}"
    xprocess.getinfo("demo").terminate()


def test_hello(url: str) -> None:
    with urllib.request.urlopen(f"{url}/hello") as response:
        assert b"hello" in response.read()
