"""What the tests share: starting portexec and other real processes, waiting without sleeping, and reading /proc."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
CHILDREN = Path(__file__).resolve().parent / "children"
PORTEXEC = [sys.executable, "-m", "portexec"]
STRANGER = 65534  # nobody: the other user of the tests
DEADLINE = 30.0  # seconds after which a wait has failed; nothing is asserted about speed
ANNOUNCED = re.compile(r"^portexec: (?:([\w-]+) )?((?:http|udp|unix):\S+)$")


def child(name: str) -> list[str]:
    """The words that run one of the programs in tests/children with this Python."""
    return [sys.executable, str(CHILDREN / f"{name}.py")]


def run(*words: str, input: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run portexec with these words to its end."""
    return subprocess.run(
        [*PORTEXEC, *words], input=input, capture_output=True, text=True, timeout=DEADLINE, check=False, **options
    )


def wait_for(condition: Callable[[], T]) -> T:
    """Call until the result is true and return it; the last failure is the one that is raised."""
    end = time.monotonic() + DEADLINE
    while True:
        failure: Exception | None = None
        try:
            result = condition()
            if result:
                return result
        except (OSError, AssertionError, ValueError) as error:
            failure = error
        if time.monotonic() > end:
            raise failure or AssertionError(f"still not true: {condition}")
        time.sleep(0.01)


def get(url: str) -> str:
    """The body that a GET answers, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return str(error.read().decode())


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


def kill_group(pid: int) -> None:
    """Kill what is left of a process group that a test made."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


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


def descriptors_of(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what each of them is."""
    directory = Path(f"/proc/{pid}/fd")
    found = {}
    for entry in directory.iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


def status_of(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
