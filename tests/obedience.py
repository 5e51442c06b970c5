"""A server that does what the test says, children/obedient.py, and what the tests of its lifetime share."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    DEADLINE,
    PORTEXEC,
    Running,
    child,
    descriptors_of,
    kill_group,
    running,
)

HAND_OFFS = ["fd", "guard", "hold"]
BY_NUMBER = ["guard", "hold"]
NO_SOCK_DIAG = [["socket", errno.EAFNOSUPPORT, 0, 16]]  # 16 is AF_NETLINK, and has no bit in common with the other families
TURNS = 12
OK = b"HTTP/1.1 200 OK\r\n\r\n"


def refusing(rules: Sequence[object]) -> list[str]:
    """The words that put a filter with these rules around portexec."""
    return [*child("refuse"), json.dumps(rules)]


class Server:
    """The obedient server below a portexec whose readiness goes to the same pipe."""

    def __init__(self, started: Running) -> None:
        self.started = started
        self.process = started.process
        self.pid = 0

    def heard(self) -> str:
        """The next line of the pipe. If it has ended, what stderr says is the failure."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(
                f"no further line; status {self.process.wait(DEADLINE)}:\n{self.process.communicate(timeout=DEADLINE)[1]}"
            )
        return line.rstrip("\n")

    def ended(self) -> int:
        """The status of portexec, which has to say nothing more on the pipe."""
        out, _ = self.process.communicate(timeout=DEADLINE)
        assert out == ""
        return self.process.returncode

    def comes_up(self) -> None:
        """Wait until it runs."""
        word, _, pid = self.heard().partition(" ")
        assert word == "up", word
        self.pid = int(pid)

    def do(self, *lines: str) -> None:
        """Have it do one thing after the other; each is about to be done when this returns."""
        for line in lines:
            assert self.process.stdin is not None
            print(line, file=self.process.stdin, flush=True)
            assert self.heard() == line.split()[0]

    def says(self, line: str) -> str:
        """Have it do what is answered with a line."""
        self.do(line)
        answer = self.heard()
        assert not answer.startswith("{"), f"ready before {line!r} was done"
        return answer

    def replies(self, answer: bytes) -> list[str]:
        """Have it answer the next question with these bytes; the lines of the question."""
        return self.says(f"reply PORT {answer.hex()}").removeprefix("asked ").split("|")

    def is_awaited(self) -> bool:
        """Whether portexec still waits for it, after it has had the turn several times."""
        for _ in range(TURNS):
            self.process.send_signal(signal.SIGUSR1)
            assert self.heard() == "turn"
        return True

    def ready(self) -> dict[str, Any]:
        """What portexec says next, which has to be that it is ready."""
        line = self.heard()
        assert line.startswith("{"), line
        told: dict[str, Any] = json.loads(line)
        return told

    def where(self) -> list[str]:
        """The addresses that it tells when it is ready."""
        return [listener["url"] for listener in self.ready()["listeners"]]

    def listens(self, hand_off: str, host: str = "127.0.0.1") -> None:
        """Have it listen on $PORT, if it does not already."""
        self.do(*(["take PORT 3"] if hand_off == "fd" else [f"bind PORT {host}", "listen PORT"]))


@contextmanager
def obeying(*options: str, prefix: Sequence[str] = (), **more: Any) -> Iterator[Server]:
    """The server below portexec with these options. What goes on for too long is killed, and so all its pipes end."""
    words = [*options, "--", *child("obedient")]
    with running(*words, prefix=prefix, stdin=subprocess.PIPE, **more) as started:
        watch = threading.Timer(2 * DEADLINE, kill_group, [started.process.pid])
        watch.start()
        try:
            yield Server(started)
        finally:
            watch.cancel()


@contextmanager
def launched(*options: str, prefix: Sequence[str] = (), **more: Any) -> Iterator[Server]:
    """The same, and it is told on standard output when it is ready."""
    with obeying("--ready-fd", "1", *options, prefix=prefix, **more) as server:
        yield server


@contextmanager
def serving(*options: str, prefix: Sequence[str] = (), **more: Any) -> Iterator[Server]:
    """The same when it runs."""
    with launched(*options, prefix=prefix, **more) as server:
        server.comes_up()
        yield server


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def connect(url: str) -> socket.socket:
    """A client. What it connects to is there."""
    if url.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX)
        path = url.removeprefix("unix:")
        client.settimeout(DEADLINE)
        client.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        return client
    return socket.create_connection((url.partition("//")[2].rpartition(":")[0].strip("[]"), port_of(url)), DEADLINE)


# listen


# Where the server binds, and what a client is to use then, which was told 127.0.0.1.
FOLLOWED = [
    ("127.0.0.1", "127.0.0.1"),
    ("0.0.0.0", "127.0.0.1"),
    ("*", "127.0.0.1"),
    ("::ffff:127.0.0.1", "127.0.0.1"),
    ("127.0.0.9", "127.0.0.9"),
    ("::1", "[::1]"),
    ("::", "[::1]"),
]


# accept


# http


NO_ANSWERS = {
    "nothing": b"",
    "empty line": b"\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "no number": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "negative": b"HTTP/1.1 -200 OK\r\n\r\n",
    "number that is too long": b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\n\r\n",
    "another protocol": b"ICY 200 OK\r\n\r\n",
    "a word in front": b"200 HTTP/1.1 200\r\n\r\n",
    "bytes": bytes(range(128, 256)) + b"\r\n",
    "TLS alert": bytes.fromhex("15030100020246"),
    "500": b"HTTP/1.1 500 Internal Server Error\r\n\r\n",
    "599": b"HTTP/1.1 599\r\n\r\n",
    "1000": b"HTTP/1.1 1000 x\r\n\r\n",
    "cut off": b"HTTP/1.1 20",
}


# notify


@pytest.fixture(params=["abstract", "path"])
def notify(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "notify" if request.param == "abstract" else f"notify:{tmp_path}/notify"


@contextmanager
def service_manager(tmp_path: Path, kind: str) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The notification socket of whoever started portexec, and the environment that names it."""
    name = f"{tmp_path}/manager" if kind == "path" else f"@portexec-test-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if kind == "abstract" else name)
        manager.settimeout(DEADLINE)
        yield manager, {**os.environ, "NOTIFY_SOCKET": name}


# none, and what all forms have in common


def inodes_of_pipes(pid: int) -> set[int]:
    texts = descriptors_of(pid).values()
    return {int(text.removeprefix("pipe:[").rstrip("]")) for text in texts if text.startswith("pipe:[")}


@contextmanager
def launched_with_pipe(*options: str, fd: int | None = None) -> Iterator[tuple[Server, int]]:
    """The server, and the reading end of a pipe of its own for `--ready-fd`."""
    reader, writer = os.pipe()
    try:
        words = ["--ready-fd", str(writer), *options, "--", *child("obedient")]
        with running(*words, pass_fds=[writer], stdin=subprocess.PIPE) as started:
            os.close(writer)
            writer = -1
            server = Server(started)
            server.comes_up()
            yield server, reader
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


# The time is over

NEVER = {
    "listen": "listen on {}",
    "accept": "accept a connection on {}",
    "http:/health": "answer GET http://{}/health with a status under 500",
    "notify": "send READY=1 to $NOTIFY_SOCKET",
}


# What a person sees meanwhile


ERASE = "\r\x1b[K"


@contextmanager
def on_a_terminal(*words: str, columns: int = 200, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Portexec with a terminal as its standard error; yields the terminal's other end."""
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options.setdefault("stdout", subprocess.DEVNULL)
    process = subprocess.Popen([*PORTEXEC, *words], stderr=theirs, start_new_session=True, **options)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        kill_group(process.pid)
        process.communicate()
        os.close(ours)


def read_to_end(terminal: int) -> str:
    seen = b""
    while True:
        try:
            data = os.read(terminal, 10000)
        except OSError:  # EIO: nobody has it any more
            return seen.decode()
        seen += data


def read_until(terminal: int, pattern: str) -> str:
    seen = ""
    while not re.search(pattern, seen):
        data = os.read(terminal, 10000)
        assert data, seen
        seen += data.decode()
    return seen


WAITING = re.escape(ERASE) + r"portexec: (\d+) s: waiting for the command to send READY=1 to \$NOTIFY_SOCKET"
