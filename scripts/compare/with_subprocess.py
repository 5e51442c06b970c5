"""By hand: ask for a free number, let it go, start the server with it, and ask until somebody answers there."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).resolve().parent.parent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def url() -> Iterator[str]:
    port = free_port()
    command = ["uvicorn", "--app-dir", SCRIPTS, "demo_app:app", "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, "PORT": str(port)}) as server:
        try:
            while not is_open(port):
                assert server.poll() is None, "the server ended"
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def test_hello(url: str) -> None:
    with urllib.request.urlopen(f"{url}/hello") as response:
        assert b"hello" in response.read()
