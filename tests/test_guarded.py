"""The Python API: `portexec.listen`, a guarded socket for a server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import portexec
from tests.support import DEADLINE, descriptors_of, get, read_line, wait_for
from tests.support.installed import need
from tests.support.network import can_bind, is_given_back
from tests.support.serving import PACKAGE_HOME, caller
from tests.support.thieves import every_attempt, every_user, identity_of


def answer_with(text: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text.encode())
        writer.close()
        await writer.wait_closed()

    return answer


def read_all(address: Any, family: int = socket.AF_INET) -> str:
    with socket.socket(family) as client:
        client.settimeout(DEADLINE)
        client.connect(address)
        return client.makefile().read()


def test_listen_gives_a_listening_socket() -> None:
    with portexec.listen() as sock:
        assert isinstance(sock, socket.socket)
        assert isinstance(sock, portexec.GuardedSocket)
        host, number = sock.getsockname()
        assert (host, sock.url) == ("127.0.0.1", f"http://127.0.0.1:{number}")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.get_inheritable()
        assert sock.getblocking()
        with socket.create_connection(sock.getsockname()) as client, sock.accept()[0] as connection:
            assert type(connection) is socket.socket
            assert connection.getpeername() == client.getsockname()
        with sock.dup() as copy:
            assert type(copy) is socket.socket
            assert copy.getsockname() == sock.getsockname()


@pytest.mark.parametrize("spec", ["127.0.0.1:0", "*:0"])
@every_user
def test_nobody_else_has_the_number_of_listen(spec: str, user: str) -> None:
    with portexec.listen(spec) as sock:
        tried = every_attempt(identity_of(user), sock.getsockname()[1])
    assert len(tried) > 50
    assert [one for one in tried if one["got"]] == []


@pytest.mark.parametrize("way", ["close", "with", "detach"])
def test_the_number_is_given_back(way: str) -> None:
    before = descriptors_of().keys()
    sock = portexec.listen()
    number = sock.getsockname()[1]
    assert not can_bind(number)
    if way == "close":
        sock.close()
        sock.close()
    elif way == "detach":
        os.close(sock.detach())
    else:
        with sock:
            pass
    assert descriptors_of().keys() == before
    assert is_given_back(number)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_socket_that_is_collected_gives_the_number_back() -> None:
    gc.collect()  # what earlier tests left
    before = descriptors_of().keys()
    number = portexec.listen().getsockname()[1]
    gc.collect()
    assert is_given_back(number)
    assert descriptors_of().keys() == before


def test_a_unix_socket_is_removed_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with portexec.listen(f"unix:{path}") as sock:
        assert (sock.url, sock.getsockname()) == (f"unix:{path}", str(path))
        assert path.is_socket()
    assert list(tmp_path.iterdir()) == []


def test_a_unix_socket_that_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with portexec.listen(f"unix:{path}"):
        path.unlink()
        path.touch()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # there may be threads
def test_a_forked_child_that_closes_its_copies_takes_nothing_from_the_parent(tmp_path: Path) -> None:
    """As children do that do not serve."""
    with portexec.listen() as sock, portexec.listen(f"unix:{tmp_path}/s") as local:
        for each in (sock, local):
            process = multiprocessing.get_context("fork").Process(target=each.close)
            process.start()
            process.join(DEADLINE)
            assert process.exitcode == 0
        assert (tmp_path / "s").is_socket()
        tried = every_attempt([], sock.getsockname()[1])
    assert [one for one in tried if one["got"]] == []


def test_listen_udp() -> None:
    with portexec.listen("udp:0") as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert sock.url.startswith("udp://127.0.0.1:")
        client.sendto(b"hello", sock.getsockname())
        assert sock.recv(100) == b"hello"


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_listen_for_asyncio(way: str, tmp_path: Path) -> None:
    """Which closes it, and gives everything back."""

    async def main() -> Any:
        sock = portexec.listen("0" if way == "tcp" else f"unix:{tmp_path}/s")
        address, family = sock.getsockname(), sock.family
        start: Any = asyncio.start_server if way == "tcp" else asyncio.start_unix_server
        async with await start(answer_with("hello"), sock=sock):
            assert await asyncio.to_thread(read_all, address, family) == "hello"
        return address

    address = asyncio.run(main())
    assert list(tmp_path.iterdir()) == []
    assert way == "unix" or is_given_back(address[1])


def test_listen_for_trio() -> None:
    need(["trio"])
    import trio

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")
        await stream.aclose()

    async def main() -> str:
        with portexec.listen() as sock:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
            async with trio.open_nursery() as tasks:
                tasks.start_soon(trio.serve_listeners, answer, [listener])
                said = await trio.to_thread.run_sync(read_all, sock.getsockname())
                tasks.cancel_scope.cancel()
        return said

    assert trio.run(main) == "hello"


UVICORN = """
import asyncio, sys, uvicorn, portexec
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
async def main():
    with portexec.listen() as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        print(sock.url, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        server.should_exit = True
        await serving
asyncio.run(main())
"""


def test_listen_for_uvicorn() -> None:
    need(["uvicorn"])
    with caller(UVICORN) as calling:
        url = read_line(calling)
        assert get(url) == "hello"
        assert calling.stdin is not None
        calling.stdin.write("\n")
        calling.stdin.flush()
        assert calling.wait(DEADLINE) == 0
        assert is_given_back(int(url.rpartition(":")[2]))


WORKER = """
import multiprocessing, sys
sys.path.insert(0, {home!r})
import portexec
def serve(sock):
    connection, _ = sock.accept()
    with connection:
        connection.sendall(b"hello")
if __name__ == "__main__":
    with portexec.listen() as sock:
        with sock.dup() as copy:
            worker = multiprocessing.get_context("spawn").Process(target=serve, args=(copy,))
            worker.start()
        import socket
        with socket.create_connection(sock.getsockname()) as client:
            print(client.makefile().read())
        worker.join()
"""


def test_it_can_be_given_to_a_worker_process(tmp_path: Path) -> None:
    """As uvicorn and hypercorn do for several workers: multiprocessing sends a copy of the socket."""
    script = tmp_path / "workers.py"
    script.write_text(WORKER.format(home=PACKAGE_HOME))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("hello\n", "")


LISTEN_ERRORS: dict[str, tuple[dict[str, Any], type[portexec.PortexecError], str, str]] = {
    "number": ({"spec": 8000}, portexec.UsageError, "8000", "."),
    "list": ({"spec": ["0"]}, portexec.UsageError, r"\['0'\]", "once for each"),
    "port": ({"spec": "127.0.0.1:65536"}, portexec.UsageError, "65536", "65535"),
    "url": ({"spec": "http://127.0.0.1:0"}, portexec.UsageError, "http", "not a URL"),
    "host": ({"spec": "no-such-host.invalid:0"}, portexec.ListenError, "no-such-host", "."),
    "folder": ({"spec": "unix:/no/such/s"}, portexec.ListenError, "/no/such/s: No such file", ""),
    "surrogate": ({"spec": "unix:/tmp/\ud800"}, portexec.UsageError, "cannot be encoded", ""),
    "file": ({"spec": "unix:/etc/passwd"}, portexec.ListenError, "no socket", "another path"),
    "backlog": ({"backlog": -1}, portexec.UsageError, "-1", "."),
    "great": ({"backlog": 2**40}, portexec.UsageError, str(2**40), "."),
}


@pytest.mark.parametrize("case", LISTEN_ERRORS)
def test_errors_of_listen(case: str) -> None:
    arguments, kind, message, hint = LISTEN_ERRORS[case]
    before = descriptors_of().keys()
    with pytest.raises(kind) as caught:
        portexec.listen(**arguments)
    assert type(caught.value) is kind
    assert caught.match(f"(?s).*{message}")
    assert not hint or re.search(hint, caught.value.hint)
    del caught
    gc.collect()  # warns of what was not closed, which is an error
    assert descriptors_of().keys() == before


def test_a_spec_that_is_taken() -> None:
    with portexec.listen() as sock:
        number = sock.getsockname()[1]
        with pytest.raises(portexec.ListenError) as caught:
            portexec.listen(f"127.0.0.1:{number}")
        assert f"127.0.0.1:{number}: Address already in use (pid {os.getpid()}" in caught.value.message
        with portexec.listen(f"{number},0") as other:
            assert other.getsockname()[1] != number


def test_the_backlog_is_the_one_that_was_asked_for() -> None:
    """A listener with room for one has at most two in its queue (listen(2)); the third client has to wait."""
    with portexec.listen(backlog=1) as sock, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(5)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(sock.getsockname())

        def waiting() -> int:
            unacked = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[24:28]  # of a listener, what waits in it
            return int.from_bytes(unacked, sys.byteorder)

        wait_for(lambda: waiting() >= 2)
        assert waiting() == 2
