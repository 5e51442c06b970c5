"""The control descriptor: what a program asks for is done in every state of the run, and the end of the socket ends it all."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import DEADLINE, PORTEXEC, child, kill_group

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
        assert greets(run, run.next("ready")["listeners"][0]["url"])


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
            run.ours.sendall(RESTART)
        run.ours.shutdown(socket.SHUT_WR)
        assert run.ended() in ((3, ""), (0, ""))


def test_a_program_that_leaves_with_something_unread() -> None:
    with controlled("-k", "1h") as run:
        assert run.next("bound")
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
