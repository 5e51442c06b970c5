"""A server that does what the test says, children/obedient.py, and what the tests of its lifetime share."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.processes import Running, child, kill_group, running
from tests.support.waiting import DEADLINE

HAND_OFFS = ["fd", "guard", "hold"]
BY_NUMBER = ["guard", "hold"]
TURNS = 12


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

    def stopped(self, number: int = signal.SIGTERM) -> int:
        """Send portexec a signal that ends it; the status. Standard input stays open till then: its end is the server's."""
        self.process.send_signal(number)
        self.process.wait(DEADLINE)
        return self.ended()

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
