"""A running server replaced by HUP, under constant load: no request is lost by it, and a new process that fails costs none.

The old process and the new one share the listening descriptor; the old one is told to end when the new one is ready. Each
replacement is over when a new process has answered and the old one is gone. scripts/bench_replace.py makes a hundred of them.
"""

from __future__ import annotations

import _socket
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portexec.binding.listeners import Bound, Listener, bind_all
from portexec.binding.spec import parse_listen
from portexec.binding.succession import Succession
from portexec.binding.tables import connections_to as known_connections
from portexec.lifetime.waits import is_awaited
from tests.support import DEADLINE, Running, child, descriptors_of, get, is_gone, running, status_of, wait_for
from tests.support.installed import APPS, need
from tests.support.network import THEFTS, connect, steal

pytestmark = pytest.mark.once

BIN = Path(sys.executable).parent
RATE = 250  # requests per second
GOES_ON = "^portexec: error: .*old"
BROKEN = "raise ImportError('this version does not work')\n"

GUNICORN = [str(BIN / "gunicorn"), "--no-control-socket", "--log-level", "warning", "-b", "fd://{fd}", "wsgi:app"]
UVICORN = [str(BIN / "uvicorn"), "--log-level", "warning", "--no-access-log", "--fd", "{fd}", "asgi:app"]
NODE = ["node", "drains.js", "{fd}"]
WORKERS = pytest.mark.parametrize(
    "workers", [["-w", "2"], ["-k", "gthread", "--threads", "4"]], ids=["sync workers", "threads"]
)


class Site:
    """A server below portexec, with constant load on it."""

    def __init__(self, started: Running, url: str, folder: Path, load: subprocess.Popen[bytes], output: Path) -> None:
        self.process = started.process
        self.started = started
        self.url = url
        self.folder = folder
        self._load = load
        self._output = output

    def answered(self) -> set[int]:
        """The processes that have answered so far."""
        lines = self._output.read_text().splitlines(keepends=True)
        return {int(line.split()[-1]) for line in lines if line.startswith("answered by ") and line.endswith("\n")}

    def answers(self) -> set[int]:
        """The start that answers a request of ours now."""
        return self.starts({int(get(self.url).removeprefix("hello from "))})

    def starts(self, pids: set[int]) -> set[int]:
        """The children of portexec to whose trees these processes belong, for as long as they are there."""
        return {self._start_of(pid) for pid in pids} - {0}

    def _start_of(self, pid: int) -> int:
        while pid > 1:
            try:
                parent = int(status_of(pid)["PPid"])
            except (FileNotFoundError, ProcessLookupError):
                return 0
            if parent == self.process.pid:
                return pid
            pid = parent
        return 0

    def replace(self) -> None:
        """HUP, and wait until a new process has answered and the old one is gone."""
        known = self.answered()
        old = self.starts(known)
        assert len(old) == 1
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.starts(self.answered() - known) - old)
        wait_for(lambda: not self.starts(old))

    def summary(self) -> dict[str, Any]:
        """End the load; what became of its requests."""
        self._load.communicate(timeout=DEADLINE)
        summary: dict[str, Any] = json.loads(self._output.read_text().splitlines()[-1])
        return summary


@contextmanager
def loaded_site(tmp_path: Path, *words: str, options: Sequence[str] = ()) -> Iterator[Site]:
    """Run the server with `--restart`, and the load generator, until the block ends."""
    need([words[0]])
    folder = Path(shutil.copytree(APPS, tmp_path / "apps"))
    output = tmp_path / "load"
    with running("--restart", "on-failure", *options, "--", *words, cwd=folder) as started, output.open("wb") as file:
        url = started.url()
        port = url.rpartition(":")[2]
        load = subprocess.Popen([*child("load"), "127.0.0.1", port, str(RATE)], stdin=subprocess.PIPE, stdout=file)
        try:
            site = Site(started, url, folder, load, output)
            wait_for(site.answered)
            yield site
        finally:
            load.kill()
            load.communicate()
            started.stop()


@WORKERS
def test_replacements_of_gunicorn_lose_no_request(workers: list[str], tmp_path: Path) -> None:
    with loaded_site(tmp_path, *GUNICORN, *workers) as site:
        for _ in range(5):
            site.replace()
        summary = site.summary()
    assert (summary["failures"], summary["refused"]) == ({}, 0)
    assert summary["requests"] > RATE


@pytest.mark.parametrize("words", [UVICORN, NODE], ids=["uvicorn", "node"])
def test_replacements_of_others_lose_no_request_either(words: list[str], tmp_path: Path) -> None:
    """Told to end, uvicorn closes connections that it has accepted and not read from yet; so it has to have read from all."""
    with loaded_site(tmp_path, *words) as site:
        for _ in range(8):  # node takes a quarter of a second for each, and the load is to be a second's
            site.replace()
        summary = site.summary()
    assert (summary["failures"], summary["refused"]) == ({}, 0)
    assert summary["requests"] > RATE


def test_many_hups_at_once_are_no_harm(tmp_path: Path) -> None:
    """Those that come while one is being replaced may be one replacement together."""
    with loaded_site(tmp_path, *GUNICORN) as site:
        old = site.starts(site.answered())
        for _ in range(5):
            site.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not site.starts(old))
        assert site.answers()
        assert site.summary()["failures"] == {}


@pytest.mark.parametrize(("words", "module"), [(GUNICORN, "wsgi.py"), (UVICORN, "asgi.py")], ids=["gunicorn", "uvicorn"])
def test_a_new_one_that_fails_leaves_the_old_one_serving(words: list[str], module: str, tmp_path: Path) -> None:
    with loaded_site(tmp_path, *words) as site:
        old = site.starts(site.answered())
        (site.folder / module).write_text(BROKEN)
        for _ in range(2):  # it may be tried again
            site.process.send_signal(signal.SIGHUP)
            site.started.line(GOES_ON)
            assert site.answers() == old
        summary = site.summary()
        assert site.starts(set(summary["pids"])) == old
    assert (summary["failures"], summary["refused"]) == ({}, 0)


def test_who_has_ended_waits_for_nobody() -> None:
    """Until its parent has waited for it, /proc shows what is left of it to root alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener, subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_awaited([process.pid], os.fstat(listener.fileno()).st_ino)


def test_after_one_that_failed_the_next_one_takes_over(tmp_path: Path) -> None:
    with loaded_site(tmp_path, *GUNICORN) as site:
        file = site.folder / "wsgi.py"
        working = file.read_text()
        file.write_text(BROKEN)
        site.process.send_signal(signal.SIGHUP)
        site.started.line(GOES_ON)
        file.write_text(working)
        site.replace()
        assert site.summary()["failures"] == {}


def test_one_that_fails_leaves_no_connection_behind(tmp_path: Path) -> None:
    """A server that takes one connection at a time would wait for what portexec has to say on it.

    The first start accepts one connection, which makes it ready, and no more. The next one ends when one waits for it.
    """
    script = (
        "import os, select, signal, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "if os.path.exists('first'): select.select([listener], [], []), sys.exit(3)\n"
        "os.mkdir('first'), listener.accept()[0].close(), print('ready', flush=True), signal.pause()\n"
    )
    words = ["-v", "-H", "fd", "--restart", "on-failure", "--", sys.executable, "-c", script]
    with running(*words, cwd=tmp_path) as started:
        port = int(started.url().rpartition(":")[2])
        started.line("^portexec: ready")
        started.process.send_signal(signal.SIGHUP)
        started.line(GOES_ON)
        assert wait_for(lambda: not connections_to(port, started.process.pid))


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ("[::1]:0", "the kernel puts a new IPv6 listener behind an old one"),
        ("unix:site.sock", "unix sockets have one owner for a name"),
        ("0.0.0.0:0", "clients come from other devices than the loopback one"),
    ],
)
def test_what_the_old_one_accepts_does_not_make_the_new_one_ready(listen: str, why: str, tmp_path: Path) -> None:
    """The new one is up, but does not accept before it fails; the old one accepts all that comes, portexec's own, too.

    They share the listener, which is said.
    """
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = (
        "import os, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "if os.path.exists('first'): open('gate').read(), sys.exit(3)\n"
        "os.mkdir('first')\n"
        "while True: listener.accept()[0].close(), print('accepted', flush=True)\n"
    )
    words = ["-v", "-l", listen, "-H", "fd", "--restart", "on-failure", "--", sys.executable, "-c", script]
    with running(*words, cwd=tmp_path) as started:
        started.line("^portexec: ready")
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == "accepted\n"
        started.process.send_signal(signal.SIGHUP)
        started.line(f"^portexec: the new start shares listener listener1 with the old one: {why}$")
        writer = wait_for(lambda: os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        assert started.process.stdout.readline() == "accepted\n"
        os.close(writer)
        assert started.line("the old one (is told to end|goes on)").group(1) == "goes on"


def test_clients_come_to_the_new_one_only_when_it_waits_for_them(tmp_path: Path) -> None:
    """It is up, and has its listener, but does something else before it fails; all go to the old one meanwhile."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = (
        "import os, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "if os.path.exists('first'): open('gate').read(), sys.exit(3)\n"
        "os.mkdir('first')\n"
        "while True: (one := listener.accept()[0]).sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nold'), one.close()\n"
    )
    words = ["-v", "-H", "fd", "--restart", "on-failure", "--", sys.executable, "-c", script]
    with running(*words, cwd=tmp_path) as started:
        url = started.url()
        started.line("^portexec: ready")
        started.process.send_signal(signal.SIGHUP)
        writer = wait_for(lambda: os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        for _ in range(50):
            with connect(url) as client:
                assert client.makefile("rb").read().endswith(b"old")
        os.close(writer)
        started.line(GOES_ON)
        with connect(url) as client:
            assert client.makefile("rb").read().endswith(b"old")


# What binding.succession does, without any server.


@contextmanager
def succession() -> Iterator[tuple[Bound, Succession]]:
    bound = bind_all(parse_listen(["127.0.0.1:0", "b=127.0.0.1:0", "[::1]:0"]), listening=True)
    succession = Succession(bound)
    try:
        yield bound, succession
    finally:
        succession.close()
        bound.close()


def waiting(listener: Listener) -> int:
    """The connections in a listener's queue."""
    assert listener.socket is not None
    info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[24:28], sys.byteorder)


def test_a_new_listener_gets_the_clients_from_one_moment_on() -> None:
    with succession() as (bound, new), ExitStack() as stack:
        assert [listener.name for listener, _ in new.own()] == ["listener1", "b"]
        assert list(new.why_not) == ["listener3"]
        old, listener = new.own()[0]
        for _ in range(20):
            stack.enter_context(connect(old.url))
        assert wait_for(lambda: (waiting(old), waiting(listener)) == (20, 0))
        new.take_clients()
        for _ in range(20):
            stack.enter_context(connect(old.url))
        assert wait_for(lambda: (waiting(old), waiting(listener)) == (20, 20))
        number = old.socket.fileno() if old.socket else -1
        new.finish()
        assert bound.listeners[0].socket is not None
        assert bound.listeners[0].socket.fileno() == number
        assert new.own() == []
        assert [waiting(bound.listeners[0]), *map(waiting_at, new.elders)] == [20, 20, 0]
        third = Succession(bound)
        stack.callback(third.close)
        stack.enter_context(connect(old.url))
        assert wait_for(lambda: [waiting(bound.listeners[0]), *map(waiting_at, new.elders)] == [21, 20, 0])


def test_no_client_comes_to_a_new_listener_at_any_moment_of_its_beginning() -> None:
    """Its server may fail, and who waits for it is lost then. Here a client comes after each system call."""
    with succession() as (bound, first), ExitStack() as stack:
        first.close()
        old = bound.listeners[0]
        clients = []

        def come(_: object, event: str, call: Any) -> None:
            if event == "c_return" and isinstance(getattr(call, "__self__", None), _socket.socket):
                clients.append(stack.enter_context(socket.socket()))
                clients[-1].setblocking(False)
                clients[-1].connect_ex(("127.0.0.1", old.port))

        sys.setprofile(come)
        try:
            new = Succession(bound)
        finally:
            sys.setprofile(None)
        stack.callback(new.close)
        for client in clients:
            assert select.select([], [client], [], DEADLINE)[1]
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert wait_for(lambda: (waiting(old), waiting(new.own()[0][1])) == (len(clients), 0))
        assert clients


def waiting_at(elder: Any) -> int:
    return waiting(Listener("elder", "tcp", socket=elder))


def test_a_succession_leaves_no_way_to_the_number() -> None:
    """For our own user neither, with whatever options; and the sockets belong to us and share no more."""
    with succession() as (bound, new):
        for _ in range(2):
            for listener in (*bound.listeners, *new.listeners):
                assert listener.socket is not None
                assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
                assert os.fstat(listener.socket.fileno()).st_uid == os.geteuid()
            for host, *options in THEFTS:
                assert steal(host, bound.listeners[0].port, *options) == "EADDRINUSE"
            new.take_clients()
            new.finish()


def test_what_nobody_has_accepted_or_read_is_unread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()

        def unread() -> list[bytes]:
            return [client for client, was_read in known_connections(host, port).items() if not was_read]

        with socket.create_connection((host, port)) as client:
            wait_for(unread)
            accepted, peer = server.accept()
            with accepted:
                assert unread() == [peer[1].to_bytes(2, "big") + socket.inet_aton(peer[0])]
                client.sendall(b"request")
                wait_for(lambda: select.select([accepted], [], [], 0)[0])
                assert unread()
                assert accepted.recv(100) == b"request"
                assert not unread()
                client.sendall(b"another")
                wait_for(unread)
                accepted.recv(100)
                client.shutdown(socket.SHUT_WR)
                assert accepted.recv(100) == b""
                assert not unread()
        assert not unread()


WAITERS = {
    "accept": "s.accept()",
    "select": "select.select([s], [], [])",
    "poll": "p = select.poll(); p.register(s); p.poll()",
    "epoll": "p = select.epoll(); p.register(s, select.EPOLLIN); p.poll()",
    "thread": "threading.Thread(target=s.accept).start(); threading.Event().wait()",
}
OTHERS = {
    "sleep": "time.sleep(1000)",
    "other socket": "select.select([o], [], [])",
    "other epoll": "p = select.epoll(); p.register(o, select.EPOLLIN); p.poll()",
    "busy": "exec('while True: pass')",
}


@pytest.mark.parametrize("call", [*WAITERS, *OTHERS])
def test_who_waits_for_clients_is_seen(call: str) -> None:
    begin = "import select, socket, threading, time; s = socket.socket(fileno=0); o = socket.create_server(('', 0))"
    script = f"{begin}; print(flush=True); {(WAITERS | OTHERS)[call]}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode, words = os.fstat(server.fileno()).st_ino, [sys.executable, "-c", script]
        with subprocess.Popen(words, stdin=server.fileno(), stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                if call in WAITERS:
                    assert wait_for(lambda: is_awaited([process.pid], inode))
                else:
                    assert call == "busy" or wait_for(lambda: status_of(process.pid)["State"].startswith("S"))
                    assert not any(is_awaited([process.pid], inode) for _ in range(50))
            finally:
                process.kill()


def connections_to(port: int, pid: int) -> set[str]:
    """The connections of a process to this number on 127.0.0.1, by their inodes."""
    remote = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {match.group(1) for link in descriptors_of(pid).values() if (match := re.match(r"socket:\[(\d+)\]$", link))}
    return {row[9] for row in rows if row[2] == remote} & inodes


def test_told_to_stop_in_the_middle_both_end(tmp_path: Path) -> None:
    """The new one hangs in its import, so the old one still serves."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with loaded_site(tmp_path, *GUNICORN, options=["--kill-after", "1h"]) as site:
        (site.folder / "wsgi.py").write_text(f"open({str(gate)!r}).read()\n")
        site.process.send_signal(signal.SIGHUP)
        # A FIFO can be opened for writing, without waiting, when somebody has come to read it.
        writer = wait_for(lambda: os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        try:
            summary = site.summary()
            assert summary["failures"] == {}
            site.process.terminate()
            assert wait_for(lambda: all(map(is_gone, summary["pids"])))
        finally:
            os.close(writer)  # the import ends, and so can the new one
        assert site.process.wait(DEADLINE) == 0  # as gunicorn ends
        with pytest.raises(ProcessLookupError):
            os.killpg(site.process.pid, 0)


@pytest.mark.parametrize("option", [["--ready", "none"], ["--ready-timeout", "10s"]], ids=" ".join)
def test_without_restart_a_hup_is_the_commands(option: list[str]) -> None:
    with running(*option, "-H", "guard", "--", *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready")
        started.process.send_signal(signal.SIGHUP)
        assert started.process.stdout.readline() == "SIGHUP\n"


def test_without_restart_gunicorn_makes_its_worker_anew(tmp_path: Path) -> None:
    need([GUNICORN[0]])
    folder = Path(shutil.copytree(APPS, tmp_path / "apps"))
    with running("--ready", "accept", "--", *GUNICORN, cwd=folder) as started:
        url = started.url()

        def answer() -> tuple[int, int]:
            pid = int(get(url).removeprefix("hello from "))
            return pid, int(status_of(pid)["PPid"])

        worker, command = answer()

        def parent_of_another() -> int:
            pid, parent = answer()
            return parent if pid != worker else 0

        started.process.send_signal(signal.SIGHUP)
        assert wait_for(parent_of_another) == command
