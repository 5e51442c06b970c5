"""The order of simultaneous events: what counts when one look of portexec, or of a shim, finds several of them.

The process that is to look is stopped, before its first poll (tests/children/moment.py) or by the test. All that it is to find
happens meanwhile. So it finds all of that at once, every time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import DEADLINE, child, is_gone, kill_group, read_line, tell, wait_for
from tests.support.proc import children_of, is_at_rest, is_pending, state
from tests.support.processes import stop_where_it_waits

pytestmark = pytest.mark.once

FRONT = ".:wait_for_news/1:STOP"  # before the first poll of portexec, which has told its shim to go
SHIM = "1:wait_for_news/1:STOP"  # the same of the shim
IN_THE_PAUSE = ".:wait_for_news/2:STOP"  # portexec has made the shim of the next start, and waits
DELAY = 0.1  # seconds before the first restart
Told = tuple[str, object]
LISTENS = {"x86_64": "50 ", "aarch64": "201 "}  # how /proc/PID/syscall begins in listen(2)


@contextmanager
def stopping(event: str, *words: str, pass_fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """portexec with these words, of which one process stops at a moment."""
    command = [sys.executable, child("moment")[-1], event, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True, pass_fds=pass_fds
    ) as process:
        try:
            yield process
        finally:
            kill_group(process.pid)


@contextmanager
def controlled(event: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[Told]]]:
    """The same, and what it tells a program: each event, with the pid or the status in it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    with ours, theirs, stopping(event, "--control-fd", str(theirs.fileno()), *words, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        events = map(json.loads, ours.makefile("rb"))
        yield process, ((one["event"], one.get("pid", one.get("status"))) for one in events if one["event"] != "bound")


def is_stopped(pid: int) -> bool:
    return state(pid) == "T"


def shim_of(process: subprocess.Popen[str]) -> int:
    (shim,) = wait_for(lambda: children_of(process.pid))
    return shim


def wait_until_told(process: subprocess.Popen[str]) -> None:
    """Wait until the command has ended, and the shim has told so: it is at rest again, and has no child any more."""
    shim = shim_of(process)
    wait_for(lambda: not children_of(shim) and is_at_rest(shim))


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("hand_off", ["fd", "guard"])
def test_the_end_counts_before_readiness(hand_off: str) -> None:
    """READY=1 and the end. Who has ended serves nobody."""
    words = ["-q", "-H", hand_off, "--ready", "notify", "--", *child("obedient")]
    with controlled("", *words) as (process, told):
        assert next(told)[0] == "started"
        stop_where_it_waits(process.pid)
        tell(process, "notify READY=1")
        tell(process, "exit 0")
        assert [read_line(process).split()[0] for _ in range(3)] == ["up", "notify", "exit"]
        wait_until_told(process)
        go_on(process.pid)
        assert list(told) == [("ended", 0)]


OUTLIVED_BY_ITS_CHILD = """
import os, signal, socket, sys
sys.stdin.readline()
made = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, f"{os.getpid()}\\n".encode())
    made.accept()
sys.stdin.readline()
"""


def test_the_end_counts_before_an_admitted_listen() -> None:
    """The news that the command listens, and its end. What it has left behind still listens when portexec looks."""
    words = ["-v", "-H", "guard", "-k", "1h", "--ready", "listen", "--", sys.executable, "-S", "-c", OUTLIVED_BY_ITS_CHILD]
    with controlled("", *words) as (process, told):
        command = next(told)[1]
        assert isinstance(command, int)
        stop_where_it_waits(process.pid)
        tell(process, "listen")
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("portexec: the command listens on "))
        left = int(read_line(process))
        tell(process, "end")
        wait_for(lambda: not Path(f"/proc/{command}").exists() and is_at_rest(shim_of(process)))
        go_on(process.pid)
        assert next(told) == ("ended", 0)
        os.kill(left, signal.SIGKILL)  # it ignores TERM
        assert list(told) == []


@pytest.mark.parametrize("options", [["-H", "guard"], ["-H", "fd", "--restart", "on-failure"]], ids=" ".join)
def test_a_request_to_stop_counts_with_the_end(options: list[str]) -> None:
    """Both happen at once. So portexec ends as the sender of the signal expects."""
    with stopping(FRONT, "-q", *options, "--", *child("obedient"), "exit 3") as process:
        assert [read_line(process).split()[0] for _ in range(2)] == ["up", "exit"]
        wait_until_told(process)
        wait_for(lambda: is_stopped(process.pid))
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: is_pending(process.pid, signal.SIGTERM))
        go_on(process.pid)
        assert process.wait(DEADLINE) == -signal.SIGTERM


def test_what_a_command_said_counts_before_what_follows_from_its_start() -> None:
    """Its start, and which its main process is. So that is the process that is told of."""
    server = [*child("obedient"), "notify MAINPID=4711", "exit 3"]
    with controlled(FRONT, "-q", "-H", "fd", "--ready", "notify", "--", *server) as (process, told):
        assert [read_line(process).split()[0] for _ in range(3)] == ["up", "notify", "exit"]
        wait_until_told(process)
        wait_for(lambda: is_stopped(process.pid))
        go_on(process.pid)
        assert list(told) == [("started", 4711), ("ended", 3 << 8)]


@pytest.mark.parametrize("event", [FRONT, SHIM])
@pytest.mark.parametrize("ready", ["none", "accept"])
def test_the_start_counts_before_the_end(ready: str, event: str) -> None:
    """Where nothing is to be waited for, the command was ready in between."""
    server = ["sh", "-c", "echo $$; exit 3"]
    with controlled(event, "-q", "-H", "fd", "--ready", ready, "--", *server) as (process, told):
        pid = int(read_line(process))
        wait_for(lambda: is_gone(pid))
        stopped = process.pid if event == FRONT else shim_of(process)
        wait_for(lambda: is_stopped(stopped))
        if event == FRONT:
            wait_until_told(process)
        go_on(stopped)
        was_ready = [("ready", pid)] if ready == "none" else []
        assert list(told) == [("started", pid), *was_ready, ("ended", 3 << 8)]


ENDS_BEFORE_ITS_CHILD = """
import os, socket, sys
made = socket.socket()
made.bind(("127.0.0.1", int(os.environ["PORT"])))
print("bound", os.getppid(), flush=True)
sys.stdin.readline()
pid = os.fork()
if pid == 0:
    made.listen()
    os._exit(0)
print(pid, os.getpid(), flush=True)
sys.stdin.readline()
os._exit(1)
"""


@pytest.mark.skipif(os.uname().machine not in LISTENS, reason="the number of listen(2) on this machine is not known")
def test_an_admission_counts_before_the_end() -> None:
    """A process of the command listens, and the command ends, and fails: nobody is told that it never listened."""
    words = ["-H", "guard", "--ready", "none", "--", sys.executable, "-S", "-c", ENDS_BEFORE_ITS_CHILD]
    with stopping("", *words) as process:
        shim = int(read_line(process).removeprefix("bound "))
        stop_where_it_waits(shim)
        tell(process, "fork")
        pid, command = map(int, read_line(process).split())
        wait_for(lambda: Path(f"/proc/{pid}/syscall").read_text().startswith(LISTENS[os.uname().machine]))
        tell(process, "end")
        wait_for(lambda: is_gone(command))
        go_on(shim)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert re.fullmatch(r"portexec: http://127\.0\.0\.1:\d+\n", errors)


def test_a_replacement_that_is_asked_for_before_the_start_is_told(tmp_path: Path) -> None:
    """The command runs, and may have read what is to be read anew. It is replaced when its shim has said that it runs."""
    report = tmp_path / "starts"
    server = ["sh", "-c", 'echo started >>"$0"; exec sleep 1000', str(report)]
    with stopping(SHIM, "-q", "-H", "fd", "--ready", "none", "--restart", "always", "--", *server) as process:
        wait_for(lambda: report.read_text() and is_stopped(shim_of(process)))
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: not is_pending(process.pid, signal.SIGHUP) and is_at_rest(process.pid))
        go_on(shim_of(process))
        wait_for(lambda: report.read_text() == 2 * "started\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_counts_before_a_restart(number: signal.Signals, tmp_path: Path) -> None:
    """A restart is due, and portexec is told to stop."""
    report = tmp_path / "starts"
    server = ["sh", "-c", 'echo started >>"$0"', str(report)]
    with stopping(IN_THE_PAUSE, "-q", "-H", "fd", "--ready", "none", "--restart", "always", "--", *server) as process:
        wait_for(lambda: is_stopped(process.pid))
        stopped_at = time.monotonic()
        process.send_signal(number)
        wait_for(lambda: time.monotonic() > stopped_at + DELAY)
        go_on(process.pid)
        assert process.wait(DEADLINE) == -number
        assert report.read_text() == "started\n"
