"""Plain code: several web frameworks, and redis."""

from __future__ import annotations

import socket

import httpx
import pytest
from conftest import APPS, PATIENCE

COMMANDS = {
    "flask": ["flask", "--app", "flask_app", "run", "--port", "{port}"],
    "django": ["python", "manage.py", "runserver", "--noreload", "{port}"],
    "node": ["node", "server.js"],
}


@pytest.fixture
def client(fastapi_server):
    with httpx.Client(base_url=fastapi_server.url, timeout=PATIENCE) as client:
        yield client


def test_fastapi(client, fastapi_server):
    assert client.get("/").text == f"hello from {fastapi_server.pid}"


@pytest.fixture(scope="module", params=COMMANDS)
def server(request, portexec_server_any_scope):
    return portexec_server_any_scope(COMMANDS[request.param], cwd=APPS)


def test_hello(server):
    assert httpx.get(server.url, timeout=PATIENCE).text.startswith("hello from")


def test_not_found(server):
    assert httpx.get(f"{server.url}/no/such/page", timeout=PATIENCE).status_code in (200, 404)  # two applications have one page


def test_redis(portexec_server):
    server = portexec_server(["redis-server", "--port", "{port}", "--save", ""])
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100) == b"+PONG\r\n"
        connection.sendall(b"SHUTDOWN NOSAVE\r\n")
        assert server.wait() == 0
