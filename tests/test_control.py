"""The control descriptor: what a program asks for is done in every state of the run, and the end of the socket ends it all."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from portexec import control
from tests.support import DEADLINE, PORTEXEC, child, kill_group, wait_for

SERVER = [*child("obeying"), "fd={fd}"]
RESTART = b'{"do": "restart"}\n'


class Controlled:
    """A portexec, and our end of the socket over which it is driven."""

    def __init__(self, process: subprocess.Popen[str], ours: socket.socket) -> None:
        self.process = process
        self.ours = ours
        self._lines = ours.makefile("rb")

    def next(self, event: str) -> dict[str, Any]:
        """The next event of this kind; others are skipped, but for an error."""
        for line in self._lines:
            told: dict[str, Any] = json.loads(line)
            assert told["event"] in (event, "bound", "started", "ready", "ended"), told
            if told["event"] == event:
                return told
        raise AssertionError(f"the end came before {event!r}: {self.ended()}")

    def ended(self) -> tuple[int, str]:
        """The status of portexec, and what it said."""
        _, said = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, said


@contextmanager
def controlled(*options: str, command: list[str] | None = None) -> Iterator[Controlled]:
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    with ours, theirs:
        words = [*PORTEXEC, "--control-fd", str(theirs.fileno()), *options, "--", *(command or SERVER)]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True, text=True, **streams)
        theirs.close()
        try:
            yield Controlled(process, ours)
        finally:
            kill_group(process.pid)
            process.communicate(timeout=DEADLINE)


def greets(run: Controlled, url: str) -> bool:
    """Whether the server that is ready answers."""
    host, _, number = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(number)), timeout=DEADLINE) as client:
        client.sendall(b"variable PORT\n")
        return client.makefile().read() == f"{number}\n"


@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
def test_the_end_of_a_command_that_ends_at_once(hand_off: str) -> None:
    """Its start and its end may be found by the same look at what happened; told are both, in this order, every time."""
    for _ in range(15):
        with controlled("-q", "-H", hand_off, command=["sh", "-c", "kill -9 $$"]) as run:
            told = [json.loads(line) for line in run.ours.makefile("rb")]
            assert [each["event"] for each in told] == ["bound", "started", "ended"]
            assert told[-1]["status"] == signal.SIGKILL


def test_two_restarts_at_once() -> None:
    with controlled() as run:
        first = run.next("ready")
        run.ours.sendall(2 * RESTART)
        second, third = run.next("ready"), None
        if second["pid"] == first["pid"]:
            third = run.next("ready")
        last = third or second
        assert greets(run, last["listeners"][0]["url"])
        run.ours.shutdown(socket.SHUT_WR)
        assert run.ended() == (0, "")


def test_a_request_in_pieces() -> None:
    with controlled() as run:
        first = run.next("ready")["pid"]
        for at in range(len(RESTART)):
            run.ours.sendall(RESTART[at : at + 1])
        assert run.next("ready")["pid"] != first


def test_a_restart_before_the_next_start() -> None:
    """In the pause after an end: it is not lost, and nothing breaks."""
    with controlled("--restart", "always", "-q") as run:
        ready = run.next("ready")
        host, _, number = ready["listeners"][0]["url"].removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(number)), timeout=DEADLINE) as client:
            client.sendall(b"exit 3\n")
        assert run.next("ended")["status"] == 3 << 8
        run.ours.sendall(RESTART)
        url = run.next("ready")["listeners"][0]["url"]
        # If the next start came before the request, that one is ready, and is about to be stopped.
        assert wait_for(lambda: greets(run, url))


@pytest.mark.parametrize("is_last", [True, False])
def test_a_signal_that_is_the_last(is_last: bool) -> None:
    """No start follows the end that it causes, though nobody has said yet that the run is to end."""
    with controlled("--restart", "always") as run:
        assert run.next("ready")
        run.ours.sendall(b'{"do": "signal", "number": 15, "last": %s}\n' % (b"true" if is_last else b"false"))
        assert run.next("ended")
        if is_last:
            assert run.process.wait(DEADLINE) is not None
        else:
            assert run.next("started")


def test_a_restart_of_what_has_not_started() -> None:
    with controlled("--lazy") as run:
        url = run.next("bound")["listeners"][0]["url"]
        run.ours.sendall(RESTART)
        assert greets(run, url)
        run.ours.shutdown(socket.SHUT_WR)
        assert run.ended() == (0, "")


@pytest.mark.parametrize("moment", range(8))
def test_a_restart_at_the_moment_of_the_end(moment: int) -> None:
    """Whoever is first: a restart, or the end with the status that the server has; never one that nobody has."""
    with controlled("-q") as run:
        ready = run.next("ready")
        host, _, number = ready["listeners"][0]["url"].removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(number)), timeout=DEADLINE) as client:
            client.sendall(b"exit 3\n")
            if moment % 2:
                client.recv(100)  # it has ended
            with suppress(BrokenPipeError):  # and so may portexec have
                run.ours.sendall(RESTART)
        run.ours.shutdown(socket.SHUT_WR)
        assert run.ended() in ((3, ""), (0, ""))


def test_a_program_that_leaves_with_something_unread() -> None:
    with controlled("-k", "1h") as run:
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: a buffer would read what comes after it
            line += run.ours.recv(1) or pytest.fail("no event")
        assert json.loads(line)["event"] == "bound"
        run.ours.recv(1, socket.MSG_PEEK)
        run.ours.close()
        run._lines.close()
        assert run.ended() == (0, "")


def test_what_is_no_request_is_left_out() -> None:
    with controlled() as run:
        first = run.next("ready")["pid"]
        run.ours.sendall(b'\n[]\nnonsense\n{"do": 1}\n{"do": "dance"}\n\xff\n' + RESTART)
        assert run.next("ready")["pid"] != first
        run.process.send_signal(signal.SIGTERM)
        assert run.ended() == (-signal.SIGTERM, "")


NONSENSE = {
    "deep": b"[" * 60_000 + b"\n",
    "deep inside": b'{"do": ' + b"[" * 900 + b"]" * 900 + b"}\n",
    "a long number": b'{"do": ' + b"9" * 60_000 + b"}\n",
    "long": b'{"do": "restart", "x": "' + b"x" * 20_000_000 + b'"}\n',
    "binary": bytes(range(256)) * 1000 + b"\n",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_left_out_whatever_its_size(kind: str) -> None:
    with controlled() as run:
        first = run.next("ready")["pid"]
        run.ours.sendall(NONSENSE[kind] + RESTART)
        assert run.next("ready")["pid"] != first
        run.ours.shutdown(socket.SHUT_WR)
        assert run.ended() == (0, "")


def test_what_never_ends_is_not_kept() -> None:
    with controlled() as run:
        assert run.next("ready")
        before = memory_of(run.process.pid)
        for _ in range(20):
            run.ours.sendall(b"x" * 1_000_000)
        run.ours.sendall(b"\n" + RESTART)
        assert run.next("ready")
        assert memory_of(run.process.pid) < before + 4096


def memory_of(pid: int) -> int:
    """The most that a process has ever used, in KiB."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def test_events_for_a_program_that_does_not_read_wait_for_it() -> None:
    """They keep nobody waiting, are bounded, and come whole and in order when it reads."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        events = control.Events(theirs.fileno())
        while events.tell("started", pid=0):
            pass
        for number in range(1, 2001):
            assert not events.tell("started", pid=number, padding="x" * 1000)
        received = b""
        while not events.flush():
            received += ours.recv(1 << 20)
        assert events.tell("ended")
        theirs.shutdown(socket.SHUT_WR)
        received += ours.makefile("rb").read()
        told = [json.loads(line) for line in received.splitlines()]
        kept = [each["pid"] for each in told[:-1] if each["pid"]]
        assert told[-1] == {"event": "ended"}
        assert kept == list(range(1, len(kept) + 1))
        assert 500 < len(kept) < 1500


def test_a_program_that_does_not_read_cannot_keep_the_run_alive() -> None:
    """Our end of its socket is full from the beginning."""
    with full_socket() as (ours, theirs):
        words = [*PORTEXEC, "-q", "--control-fd", str(theirs.fileno()), "--", "sh", "-c", "exit 3"]
        result = subprocess.run(words, pass_fds=[theirs.fileno()], timeout=DEADLINE)
        assert result.returncode == 3
        assert ours.fileno() >= 0


@contextmanager
def full_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets. The second takes nothing more, though it would wait for room."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        try:
            while True:
                theirs.send(b"\n")
        except BlockingIOError:
            theirs.setblocking(True)
        yield ours, theirs


BAD = {
    "closed": ("999", "999: this descriptor is not open"),
    "a file": ("0", "0: this descriptor is no socket"),
    "a pipe": ("1", "1: this descriptor is no socket"),
    "datagrams": ("{datagrams}", "{datagrams}: this descriptor is no stream socket"),
    "alone": ("{alone}", "{alone}: this socket is not connected"),
    "no number": ("x", "'x' is not a number from 0 to 1048576"),
    "a long number": ("9" * 5000, f"'{'9' * 5000}' is not a number from 0 to 1048576"),
    "another digit": ("\u0663", "'\u0663' is not a number from 0 to 1048576"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_descriptor_that_cannot_be_used(kind: str) -> None:
    """It is an error in words, for people, since no program can be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as alone:
        fds = {"datagrams": datagrams.fileno(), "alone": alone.fileno()}
        text, message = (part.format(**fds) for part in BAD[kind])
        words = [*PORTEXEC, "--control-fd", text, "--", "echo", "started"]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
        result = subprocess.run(words, text=True, timeout=DEADLINE, pass_fds=list(fds.values()), **streams)
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr.splitlines()[0] == f"portexec: error: --control-fd {message}"
    assert len(result.stderr.splitlines()) == 2
