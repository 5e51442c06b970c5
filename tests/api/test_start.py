"""A server of `portexec.serve` that has started: what it tells of itself, on each kind of listener, however it is ready."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import portexec
from tests.support import DEADLINE, child, get, wait_for
from tests.support.installed import needs_ipv6
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    ON_FD,
    TOGETHER,
    ask,
    describe,
    descriptors,
    greeting,
    marked,
)

# What a server tells


@TOGETHER
def test_in_plain_code(hand_off: str, mark: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off) as server:
        assert isinstance(server, portexec.Server)
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert (server.host, server.returncode, server.died()) == ("127.0.0.1", None, None)
        assert server.listeners == {"listener1": portexec.Listener("listener1", server.url, "127.0.0.1", server.port)}
        assert get(server.url) == greeting(server)
        wait_for(lambda: server.output == f"serving {server.pid}\n")
    assert describe(marked(mark)) == []
    assert server.returncode == -signal.SIGTERM
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server.died() is None


def test_standard_input_is_open_and_silent() -> None:
    """Some servers end when theirs does: esbuild, and whatever watches for its parent in that way."""
    looks = "import select; print('silent' if not select.select([0], [], [], 0)[0] else 'ended', flush=True)"
    script = f"import os, socket; s = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); {looks}; s.accept()"
    with portexec.serve([sys.executable, "-c", script]) as server:
        assert wait_for(lambda: server.output) == "silent\n"


@IN_ASYNC_CODE
async def test_in_async_code(mark: str) -> None:
    async with portexec.serve(LIGHT) as server:
        assert isinstance(server, portexec.AsyncServer)
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert get(server.url) == greeting(server)
        assert list(server.listeners) == ["listener1"]
        before = (server.port, server.pid)
        await server.restart()
        assert server.port == before[0]
        assert server.pid != before[1]
        assert get(server.url) == greeting(server)
        await server.stop()
        assert describe(marked(mark)) == []
        await server.stop()
        assert await server.wait() == server.returncode == -signal.SIGTERM
        with pytest.raises(portexec.NotRunning):
            await server.restart()


def test_nothing_happens_before_it_is_entered(mark: str) -> None:
    before = descriptors()
    portexec.serve(LIGHT)
    assert describe(marked(mark)) == []
    assert descriptors() == before


@pytest.mark.parametrize("listen", [{"web": "0", "the-admin": "127.0.0.1:0"}, ["web=0", "the-admin=127.0.0.1:0"]])
def test_several_listeners_have_names(listen: Any) -> None:
    command = [*LIGHT, "port={web.port}", "port={the-admin.port}"]
    with portexec.serve(command, listen=listen) as server:
        assert list(server.listeners) == ["web", "the-admin"]
        web, admin = server.listeners.values()
        assert (server.url, server.port) == (web.url, web.port)
        assert web.port != admin.port
        assert [get(each.url) for each in (web, admin)] == [greeting(server)] * 2
        assert ask(server, "variable/THE_ADMIN_PORT") == str(admin.port)
        server.listeners.clear()  # of a copy
        assert list(server.listeners) == ["web", "the-admin"]


@needs_ipv6
def test_the_address_is_where_it_really_listens() -> None:
    with portexec.serve([*child("obeying"), "host=::1"], hand_off="guard", listen="127.0.0.1:0") as server:
        assert (server.url, server.listeners["listener1"].host) == (f"http://[::1]:{server.port}", "[::1]")


def ask_unix(address: str) -> str:
    """What is answered on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return client.makefile().read().rpartition("\n")[2]


def test_a_unix_listener(tmp_path: Path) -> None:
    """Its path is the command's, which a client finds from the caller's directory, too; and it survives a restart."""
    with portexec.serve(ON_FD, listen="unix:app.sock", cwd=tmp_path) as server:
        path = f"{tmp_path}/app.sock"
        assert (server.port, server.host, server.url) == (0, "", f"unix:{path}")
        assert server.listeners["listener1"].path == path
        assert ask_unix(path) == greeting(server)
        server.restart()
        assert ask_unix(path) == greeting(server)
    assert list(tmp_path.iterdir()) == []


def test_an_abstract_unix_listener(mark: str, tmp_path: Path) -> None:
    with portexec.serve(ON_FD, listen=f"unix:@portexec-{mark}", cwd=tmp_path) as server:
        assert server.url == f"unix:@portexec-{mark}"
        assert ask_unix(f"\0portexec-{mark}") == greeting(server)


def test_a_udp_listener() -> None:
    with portexec.serve(ON_FD, listen="udp:0", ready="none") as server:
        assert server.url == f"udp://127.0.0.1:{server.port}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE)
            client.sendto(b"?", (server.host, server.port))
            assert client.recv(100).decode() == greeting(server)


# Readiness


@pytest.mark.parametrize(("hand_off", "ready"), [("fd", "accept"), ("guard", "http:/status/301"), ("hold", "listen")])
def test_forms_of_readiness(hand_off: str, ready: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off, ready=ready) as server:
        assert get(server.url) == greeting(server)
