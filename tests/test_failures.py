"""A portexec that cannot go on: a bug in any of its processes, and what cannot be started later for lack of descriptors."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import portexec
from tests.support import DEADLINE, is_gone, read_line, running
from tests.support.proc import children_of

_BROKEN = """
import sys
import portexec.{module} as module
from portexec.cli import main

def break_here(*_, **__):
    raise {error}

{owner}.{function} = break_here
sys.exit(main(sys.argv[1:]))
"""
BUG = "portexec: error: this is a bug in portexec; please report it with the lines above\n"
HINT = "portexec: hint: raise the limit with `ulimit -n`\n"
REASON = "this is a bug in portexec, see the output\n"

COMMAND = ("parent.child", "execute", "execute")
FILTER = ("parent.child", "seccomp", "install")
PREPARING = ("parent.shim", "module", "_prepare")
BEGINNING = ("parent.supervisor", "module.Supervisor", "run")
SUPERVISING = ("parent.supervisor", "module.Supervisor", "_has_ended")


def run_broken(
    where: tuple[str, str, str], *words: str, error: str = "ZeroDivisionError('the bug of the test')"
) -> subprocess.CompletedProcess[str]:
    """Run portexec with a function of it that raises this, by default what no code expects."""
    module, owner, function = where
    owner = owner if owner.startswith("module") else f"module.{owner}"
    code = _BROKEN.format(module=module, owner=owner, function=function, error=error)
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=DEADLINE)


@pytest.mark.parametrize("lifetime", [(), ("--restart", "on-failure")], ids=["guard", "restart"])
@pytest.mark.parametrize("where", [COMMAND, FILTER, PREPARING, BEGINNING, SUPERVISING], ids=lambda where: where[2])
def test_a_bug_below_portexec_is_said_with_its_traceback_and_nothing_is_left(
    where: tuple[str, str, str], lifetime: tuple[str, ...]
) -> None:
    """The run ends when all who have its pipes have ended: what is left would keep `subprocess.run` waiting."""
    result = run_broken(where, "-q", "-H", "guard", *lifetime, "--", "sh", "-c", "sleep 1000 & exit 3")
    said = "look after" if where is SUPERVISING else "start"
    assert (result.returncode, result.stdout) == (portexec.PortexecError.status, "")
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    last = f"portexec: error: cannot {said} the command: {REASON}"
    assert result.stderr.endswith(f"ZeroDivisionError: the bug of the test\n{BUG}{last}")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (f"OSError({errno.EMFILE}, 'none left')", "none left"),
        (f"OSError({errno.ENOMEM}, 'full')", "full"),
        ("MemoryError", "out of memory"),
    ],
    ids=["descriptors", "memory", "Python's memory"],
)
def test_a_filter_that_cannot_be_had_for_a_shortage_takes_no_weaker_hand_off(error: str, why: str) -> None:
    """It says nothing of what this machine can do."""
    result = run_broken(FILTER, "-q", "--", "echo", "runs", error=error)
    assert (result.returncode, result.stdout) == (portexec.PortexecError.status, "")
    assert result.stderr.splitlines()[0] == f"portexec: error: cannot start the command: {why}"


@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_a_bug_on_the_way_to_exec_is_said_with_its_traceback(hand_off: str) -> None:
    result = run_broken(("become", "module.execute", "execute"), "-q", "-H", hand_off, "--", "true")
    assert result.returncode == portexec.PortexecError.status
    assert result.stderr.endswith(f"ZeroDivisionError: the bug of the test\n{BUG}")


def test_a_portexec_that_cannot_go_on_leaves_nothing_behind() -> None:
    """It has no descriptor left to ask the server with. It ends after what it has started."""
    options = ["-q", "-H", "fd", "-k", "100ms", "--ready", "http"]
    with running(*options, "--", "sh", "-c", "trap '' TERM; echo runs; sleep 1000") as started:
        assert read_line(started.process) == "runs"
        (shim,) = children_of(started.process.pid)
        (command,) = children_of(shim)
        hard = resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        assert started.process.wait(DEADLINE) == portexec.PortexecError.status
        assert is_gone(shim)
        assert is_gone(command)
        assert started.process.stderr is not None
        assert os.strerror(errno.EMFILE) in started.process.stderr.read()  # the hint takes modules, and so a descriptor


_DISMISSAL = """
import os, sys
from portexec.command.plan import Plan
from portexec.command.undo import Undo
from portexec.parent.protocol import Job
from portexec.parent.shim import Shim
from portexec.parent.signals import Inbox

job = Job(
    Plan("/bin/true", ["true"], {}), kill_after=1.0, patience=None, guards={}, remap={}, leaves_daemons=False, kept={1},
    names_port=False, advised=set(), quiet=True, verbose=False, tell_end=lambda: os.write(1, b"told"),
)
shim = Shim(job, Inbox())
undo = Undo()
undo.leave_to(shim)
undo.record_file(sys.argv[1], b"8000")
if sys.argv[2] == "prepared":
    shim.ask_to_prepare()
    shim.wait_until_prepared()
shim.leave()
shim.wait()
"""


@pytest.mark.parametrize("state", ["idle", "prepared"])
def test_a_shim_that_is_to_leave_undoes_nothing(state: str, tmp_path: Path) -> None:
    made = tmp_path / "port"
    made.write_text("8000")
    words = [sys.executable, "-c", _DISMISSAL, str(made), state]
    assert subprocess.run(words, capture_output=True, timeout=DEADLINE, check=True).stdout == b""
    assert made.read_text() == "8000"


_SERVER = """
import os, signal, socket, sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("runs", flush=True)
signal.sigwait([signal.SIGUSR1])
if "NOTIFY_SOCKET" in os.environ:
    name = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", name)
    signal.pause()
"""
LATER = {
    "tests": (["--then", "echo never", "--ready", "notify"], signal.SIGUSR1, "cannot start the tests"),
    "restart": (["--restart", "always", "--ready", "none"], signal.SIGUSR1, "cannot start the command again"),
    "replacement": (
        ["--restart", "always", "--ready", "none"],
        signal.SIGHUP,
        "cannot begin a new start, the old one goes on",
    ),
}


@pytest.mark.parametrize("later", LATER)
def test_what_cannot_be_started_later_for_lack_of_descriptors_says_how_to_get_more(later: str) -> None:
    options, asked, what = LATER[later]
    with running(*options, "-q", "-H", "fd", "--", sys.executable, "-c", _SERVER) as started:
        assert read_line(started.process) == "runs"
        soft, hard = resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.kill(started.process.pid, asked)
        assert started.process.stderr is not None
        said = [started.process.stderr.readline()]
        while said[-1] not in ("", HINT):
            said.append(started.process.stderr.readline())
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        if later == "replacement":
            started.process.send_signal(signal.SIGTERM)
        rest = started.process.communicate(timeout=DEADLINE)
    assert said[-2:] == [f"portexec: error: {what}: {os.strerror(errno.EMFILE)}\n", HINT]
    assert rest == ("", "")
