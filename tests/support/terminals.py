"""Programs on a terminal of their own, as a person starts them."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.processes import kill_group

CTRL_C = b"\x03"


@contextmanager
def on_a_terminal(*words: str) -> Iterator[tuple[int, int]]:
    """Run words as the foreground job of a new terminal; yields the pid and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    try:
        yield pid, terminal
    finally:
        kill_group(pid)
        os.close(terminal)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass


class Terminal:
    """A portexec, or the shell that has it as a job, on a terminal of its own."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.unread = ""

    def find(self, *patterns: str) -> list[re.Match[str]]:
        """Read until all of these have come, in whatever order, and drop what was read up to the last of them."""
        while not all(found := [re.search(pattern, self.unread) for pattern in patterns]):
            try:
                data = os.read(self.fd, 1000)
            except OSError:  # EIO: the other end was closed
                data = b""
            assert data, f"the terminal closed after {self.unread!r}"
            self.unread += data.decode()
        matches = [match for match in found if match is not None]
        self.unread = self.unread[max(match.end() for match in matches) :]
        return matches

    def rest(self) -> str:
        """All that comes until the other end is closed."""
        with suppress(OSError):
            while data := os.read(self.fd, 1000):
                self.unread += data.decode()
        return self.unread

    def pids(self) -> tuple[int, int]:
        """Read until server and tests have said that they run; return their pids."""
        server, tests = self.find(r"serving (\d+)\r", r"tests (\d+)\r")
        return int(server[1]), int(tests[1])

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def hang_up(self) -> None:
        """Close our end; something harmless takes its number."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self.fd)
        os.close(null)

    def status(self) -> int:
        """Wait until it ends. What it still writes is read, as a terminal does."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal_with(*words: str) -> Iterator[Terminal]:
    """Run words as the foreground job of a new terminal."""
    with on_a_terminal(*words) as (pid, fd):
        yield Terminal(pid, fd)
