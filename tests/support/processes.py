"""Start portexec and other real programs, in whatever surroundings, and talk to them."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.proc import is_polling, state
from tests.support.waiting import DEADLINE, wait_for

ONE_REQUEST = 0.1  # seconds in which the same signal to end, twice, is one request

ROOT = Path(__file__).resolve().parent.parent.parent
CHILDREN = ROOT / "tests" / "children"
# The installed script, as users start it; `-m` imports more before portexec begins. test_guard_state.py is one that uses `-m`.
PORTEXEC = [sys.executable, str(Path(sys.executable).with_name("portexec"))]
STRANGER = 65534  # nobody: the other user of the tests
# A rule for `refusing`: no netlink. 16 is AF_NETLINK, and has no bit in common with the other families.
NO_SOCK_DIAG = ["socket", errno.EAFNOSUPPORT, 0, 16]
NO_PASSPIDFD = ["setsockopt", errno.ENOPROTOOPT, 2, 64]  # SO_PASSPIDFD is 76
# What portexec says from time to time while it waits, the first time after 5 s.
_WAITING = re.compile(r"^portexec: note: \d+ s: waiting for .*\n", re.MULTILINE)
ANNOUNCED = re.compile(r"^portexec: (?:([\w-]+) )?((?:http|udp|unix):\S+)$")


def child(name: str) -> list[str]:
    """The words that run one of the programs in tests/children with this Python.

    Without `site`: none of them needs an installed package, and a run of all tests starts thousands of them.
    """
    return [sys.executable, "-S", str(CHILDREN / f"{name}.py")]


def refusing(*rules: Sequence[object]) -> list[str]:
    """The words that put a seccomp filter with these rules around a command; see tests/children/refuse.py."""
    return [*child("refuse"), json.dumps(rules)]


def run(*words: str, prefix: Sequence[str] = (), input: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run portexec with these words to its end, below the program that `prefix` names."""
    done = subprocess.run(
        [*prefix, *PORTEXEC, *words], input=input, capture_output=True, text=True, timeout=DEADLINE, check=False, **options
    )
    done.stderr = without_waiting(done.stderr)
    return done


def without_waiting(errors: str) -> str:
    """What portexec wrote, without the lines that are there only where the machine was slow."""
    return _WAITING.sub("", errors)


class Running:
    """A portexec that was started, with its stderr read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def line(self, pattern: str) -> re.Match[str]:
        """Read stderr up to a line that matches."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.lines.append(text.rstrip("\n"))
            found = re.search(pattern, self.lines[-1])
            if found:
                return found
        raise AssertionError(f"no line like {pattern!r} before the end of stderr:\n" + "\n".join(self.lines))

    def url(self) -> str:
        """The address that is announced next."""
        return self.line(ANNOUNCED.pattern).group(2)

    def stop(self) -> int:
        """TERM to the process, KILL to its group if need be, and its status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(DEADLINE)
        finally:
            kill_group(self.process.pid)
        self.process.communicate(timeout=DEADLINE)
        return self.process.returncode


def tell_again(process: subprocess.Popen[Any], number: int) -> None:
    """Send a signal once more, when so much time has passed that it is another request."""
    now = time.monotonic()
    wait_for(lambda: time.monotonic() > now + ONE_REQUEST)
    process.send_signal(number)


def stop_where_it_waits(pid: int) -> None:
    """Stop a process of portexec in its poll(2), so that when it goes on it finds all that has happened meanwhile at once."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: state(pid) == "T")
        if is_polling(pid):
            return
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: state(pid) != "T")


def kill_group(pid: int) -> None:
    """Kill what is left of a process group that a test made."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@contextmanager
def session(words: Sequence[str], *, within: float, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run words in a session of their own, of which nothing is left afterwards, nor after so many seconds."""
    with subprocess.Popen([*words], text=True, start_new_session=True, **options) as process:
        timer = threading.Timer(within, kill_group, [process.pid])
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            kill_group(process.pid)


@contextmanager
def running(*words: str, prefix: Sequence[str] = (), **options: Any) -> Iterator[Running]:
    """Run portexec with these words, in a process group of its own, for as long as the block lasts."""
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    process = subprocess.Popen([*prefix, *PORTEXEC, *words], text=True, start_new_session=True, **options)
    started = Running(process)
    try:
        yield started
    finally:
        started.stop()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line of a process's stdout; empty at its end."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Give a process a line on its stdin."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
