"""However a run ends, nothing of it is left: no process, no file, no socket.

Everything that is started has a variable of its own, $MARK, so that it is found in /proc whoever its parent is and whatever it
did to get away; portexec's own processes have it, too. See tests/children/stubborn.py for what they do.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import DEADLINE, PORTEXEC, child, is_gone, status_of, wait_for
from tests.support.installed import program
from tests.support.proc import children_of, is_pending, processes_with, state
from tests.support.processes import tell_again
from tests.support.terminals import Terminal, terminal_with

pytestmark = pytest.mark.once

HAND_OFFS = pytest.mark.parametrize("hand_off", ["fd", "guard"])
TEMPERS = pytest.mark.parametrize("temper", ["calm", "ignoring"])
RESTART = ("--restart", "always")


class Run:
    """One run with a folder for the files that portexec makes, and the means to look for what is left of it."""

    def __init__(self, folder: Path, temper: str, hand_off: str) -> None:
        self.mark = os.urandom(16).hex()
        self.report = folder / "report"
        self.errors = folder / "errors"
        self.files = folder / "files"
        self.files.mkdir()
        self.temper = temper
        self.hand_off = hand_off
        self.kill_after = "100ms"
        self.pid = 0  # portexec's

    def words(self, *options: str, tests: str | None = "", server: str = "") -> list[str]:
        """The words that start it. `tests` and `server` are further words for stubborn.py; without tests there is no --then."""
        listen = ["-l", "web=0", "-l", f"side=unix:{self.files / 'socket'}"] if self.hand_off == "fd" else []
        then = [] if tests is None else ["--then", "exec " + shlex.join(self.command("tests", tests))]
        return [
            *("env", f"MARK={self.mark}", f"REPORT={self.report}"),
            *(*PORTEXEC, "-q", "-H", self.hand_off, "-k", self.kill_after, *listen),
            *("--ready", f"notify:{self.files / 'notify'}", "--port-file", str(self.files / "port")),
            *("--export", str(self.files / "export"), *then, *options, "--", *self.command("server", server)),
        ]

    def command(self, role: str, word: str) -> list[str]:
        return [*child("stubborn"), self.temper, role, *word.split()]

    @contextmanager
    def started(self, *options: str, tests: str | None = "", server: str = "") -> Iterator[subprocess.Popen[bytes]]:
        """Run it until the end of the block; everything that is left then is killed."""
        words = self.words(*options, tests=tests, server=server)
        pipe = subprocess.DEVNULL
        with (
            self.cleaned_up(),
            subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process,
        ):
            self.pid = process.pid
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        try:
            yield
        finally:
            for pid in self.living():
                with suppress(ProcessLookupError):  # it was about to end
                    os.kill(pid, signal.SIGKILL)

    def living(self) -> set[int]:
        """The processes that have the mark."""
        return processes_with(f"MARK={self.mark}")

    def pid_of(self, role: str, count: int = 1) -> int:
        """Wait until so many of the role run, with all that is below them; the pid of the newest."""

        def pids() -> list[int]:
            lines = [line.split() for line in self.report.read_text().splitlines()]
            found = [int(pid) for name, pid in lines if name == role]
            return found if len(found) >= count else []

        return wait_for(pids)[-1]

    def shim_of(self, role: str) -> int:
        """The child of portexec below which the role runs."""
        pid = self.pid_of(role)
        while (parent := int(status_of(pid)["PPid"])) != self.pid:
            pid = parent
        return pid

    def require_all_there(self) -> None:
        """What is to be gone in the end is there now."""
        names = {"port", "export", "notify"} | ({"socket"} if self.hand_off == "fd" else set())
        assert {path.name for path in self.files.iterdir()} == names
        assert len(self.living()) >= 3  # portexec, a shim, a command

    def is_nothing_left(self) -> bool:
        """Returns true, or says what there is."""
        assert sorted(status_of(pid)["Name"] for pid in self.living()) == []
        assert sorted(path.name for path in self.files.iterdir()) == []
        return True


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str, str], Run]:
    return lambda temper, hand_off: Run(tmp_path, temper, hand_off)


MakeRun = Callable[[str, str], Run]


# The ends. When portexec has ended, everything has; where it was killed, soon after.


@HAND_OFFS
@TEMPERS
@pytest.mark.parametrize("status", [0, 3])
def test_the_tests_end(make_run: MakeRun, temper: str, hand_off: str, status: int) -> None:
    run = make_run(temper, hand_off)
    with run.started(tests=f"{status}") as process:
        run.pid_of("server")
        assert process.wait(DEADLINE) == status
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
def test_the_server_dies(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        run.require_all_there()
        os.kill(run.pid_of("server"), signal.SIGUSR1)
        assert process.wait(DEADLINE) == 125
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
def test_the_server_is_not_ready_in_time(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.started("--ready-timeout", "500ms", server="never") as process:  # in which all of it may be there, or not yet
        assert process.wait(DEADLINE) == 124
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(make_run: MakeRun, temper: str, hand_off: str, number: signal.Signals) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        run.require_all_there()
        process.send_signal(number)
        assert process.wait(DEADLINE) == -number
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
def test_the_whole_group_is_told_to_stop(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(DEADLINE) == -signal.SIGTERM
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
def test_ctrl_c(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.cleaned_up(), terminal_with("/usr/bin/env", *run.words()[1:]) as terminal:
        run.pid_of("tests")
        terminal.press(b"\x03")
        assert terminal.status() == -signal.SIGINT
        assert run.is_nothing_left()


@HAND_OFFS
@TEMPERS
def test_the_terminal_is_closed(make_run: MakeRun, temper: str, hand_off: str) -> None:
    """The session's leader is portexec itself, as in a terminal window that runs nothing else."""
    run = make_run(temper, hand_off)
    with run.cleaned_up(), terminal_with("/usr/bin/env", *run.words()[1:]) as terminal:
        run.pid_of("tests")
        terminal.hang_up()
        assert terminal.status() == -signal.SIGHUP
        assert run.is_nothing_left()


@contextmanager
def job_in_a_shell(run: Run, words: list[str]) -> Iterator[Terminal]:
    shell = program("bash")
    with run.cleaned_up(), terminal_with(shell, "--norc", "--noprofile", "-i") as terminal:
        terminal.press(shlex.join(words).encode() + b"\n")
        yield terminal


@HAND_OFFS
@TEMPERS
@pytest.mark.parametrize("options", [(), RESTART], ids=["", "restarted"])
def test_the_terminal_of_the_shell_is_closed(make_run: MakeRun, temper: str, hand_off: str, options: tuple[str, ...]) -> None:
    run = make_run(temper, hand_off)
    with job_in_a_shell(run, run.words(*options)) as terminal:
        run.pid_of("tests")
        terminal.hang_up()
        assert wait_for(run.is_nothing_left)


def test_the_terminal_of_a_shell_in_a_shell_is_closed(make_run: MakeRun) -> None:
    """The inner one, which has it as a job, passes the hang-up on. It leads no session."""
    run = make_run("calm", "fd")
    with job_in_a_shell(run, ["bash", "--norc", "--noprofile", "-i"]) as terminal:
        terminal.press(f"{shlex.join(run.words(*RESTART, tests=None))} </dev/null &\n".encode())
        run.pid_of("server")
        terminal.press(b"echo busy; cat\n")
        terminal.find(r"busy\r")
        terminal.hang_up()
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@pytest.mark.parametrize("end", ["kill %1", ""], ids=["told to stop", "terminal closed"])
def test_it_ends_when_it_was_stopped_by_ctrl_z(make_run: MakeRun, hand_off: str, end: str) -> None:
    run = make_run("ignoring", hand_off)
    with job_in_a_shell(run, run.words()) as terminal:
        tests = run.pid_of("tests")
        terminal.press(b"\x1a")
        terminal.find("Stopped")
        assert wait_for(lambda: status_of(tests)["State"].startswith("T"))
        if end:
            terminal.press(end.encode() + b"\n")
        else:
            terminal.hang_up()
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@TEMPERS
def test_portexec_is_killed(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        run.require_all_there()
        process.kill()
        assert wait_for(run.is_nothing_left)


def test_portexec_is_killed_around_a_plain_command_that_ignores_term(make_run: MakeRun) -> None:
    """It would have all the time it takes if portexec were told to stop. Here nobody could tell portexec once more."""
    run = make_run("ignoring", "guard")
    words = [*("env", f"MARK={run.mark}", f"REPORT={run.report}"), *PORTEXEC, "-q", "-H", "guard", "-k", "100ms", "--"]
    with run.cleaned_up(), subprocess.Popen([*words, *run.command("server", "")], start_new_session=True) as process:
        run.pid_of("server")
        process.kill()
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@TEMPERS
def test_portexec_is_killed_while_its_shims_are_stopped(make_run: MakeRun, temper: str, hand_off: str) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        shims = [run.shim_of(role) for role in ("server", "tests")]
        for shim in shims:
            os.kill(shim, signal.SIGSTOP)
        assert wait_for(lambda: all(status_of(shim)["State"].startswith("T") for shim in shims))
        process.kill()
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@TEMPERS
@pytest.mark.parametrize("role", ["server", "tests"])
def test_a_shim_is_killed(make_run: MakeRun, temper: str, hand_off: str, role: str) -> None:
    run = make_run(temper, hand_off)
    with run.started() as process:
        run.pid_of("tests")
        os.kill(run.shim_of(role), signal.SIGKILL)
        status = process.wait(DEADLINE)
        assert status == 125 if role == "server" else status != 0
        assert run.is_nothing_left()


# Moments in which there is less, or more, than one server that is ready and its tests.


def stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    assert process.wait(DEADLINE) == -number


STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])


@HAND_OFFS
@TEMPERS
@STOPS
def test_before_the_server_is_ready(make_run: MakeRun, temper: str, hand_off: str, number: signal.Signals) -> None:
    run = make_run(temper, hand_off)
    with run.started(server="never") as process:
        run.pid_of("server")
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_soon_as_something_is_there(make_run: MakeRun, number: signal.Signals) -> None:
    """The socket's file comes long before there is a parent that hears signals."""
    run = make_run("calm", "fd")
    for _ in range(5):
        with run.started() as process:
            while not any(run.files.iterdir()):
                pass
            process.send_signal(number)
            assert process.wait(DEADLINE) == -number
            assert wait_for(run.is_nothing_left)


@HAND_OFFS
@STOPS
def test_without_tests(make_run: MakeRun, hand_off: str, number: signal.Signals) -> None:
    run = make_run("calm", hand_off)
    with run.started(tests=None) as process:
        run.pid_of("server")
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@STOPS
@pytest.mark.parametrize("before", [[], [signal.SIGHUP]], ids=["", "after HUP"])
def test_before_a_lazy_server_was_started(make_run: MakeRun, number: signal.Signals, before: list[signal.Signals]) -> None:
    run = make_run("calm", "fd")
    with run.started("--lazy") as process:
        run.pid_of("tests")  # they do not connect
        run.require_all_there()
        for earlier in before:
            process.send_signal(earlier)
            assert wait_for(lambda: not any(is_pending(process.pid, number) for number in before))
        stop(process, number)
        assert wait_for(run.is_nothing_left)
        assert "server" not in run.report.read_text()


@STOPS
def test_after_a_lazy_start(make_run: MakeRun, number: signal.Signals) -> None:
    run = make_run("calm", "fd")
    with run.started("--lazy", tests=None) as process:
        assert wait_for((run.files / "port").exists)
        with socket.create_connection(("127.0.0.1", int((run.files / "port").read_text()))):
            run.pid_of("server")
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@STOPS
def test_between_two_starts(make_run: MakeRun, hand_off: str, number: signal.Signals) -> None:
    """The server ends again and again, so that the pause before the next start gets long, and we come in the middle of it."""
    run = make_run("calm", hand_off)
    with run.started(*RESTART, tests=None) as process:
        for count in range(1, 4):
            os.kill(run.pid_of("server", count), signal.SIGUSR1)
        assert wait_for(lambda: len(children_of(process.pid)) == 1 and not children_of(children_of(process.pid)[0]))
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@STOPS
def test_after_a_restart(make_run: MakeRun, hand_off: str, number: signal.Signals) -> None:
    run = make_run("calm", hand_off)
    with run.started(*RESTART) as process:
        run.pid_of("tests")
        os.kill(run.pid_of("server"), signal.SIGUSR1)
        run.pid_of("server", 2)
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@TEMPERS
@STOPS
def test_in_the_middle_of_a_replacement(make_run: MakeRun, temper: str, number: signal.Signals) -> None:
    """The old one ignores that it is told to end, or the new one is not ready yet: there are two."""
    run = make_run(temper, "fd")
    with run.started(*RESTART) as process:
        run.pid_of("tests")
        process.send_signal(signal.SIGHUP)
        run.pid_of("server", 2)
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@STOPS
def test_after_a_replacement(make_run: MakeRun, number: signal.Signals) -> None:
    run = make_run("calm", "fd")
    with run.started(*RESTART) as process:
        run.pid_of("tests")
        old = run.pid_of("server")
        process.send_signal(signal.SIGHUP)
        assert run.pid_of("server", 2) != old
        assert wait_for(lambda: len(children_of(process.pid)) == 2)  # the parents of the new one and of the tests
        assert is_gone(old)
        run.require_all_there()
        stop(process, number)
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
def test_while_the_tree_is_being_stopped_portexec_is_killed(make_run: MakeRun, hand_off: str) -> None:
    run = make_run("ignoring", hand_off)
    run.kill_after = "1s"
    with run.started() as process:
        run.pid_of("tests")
        process.terminate()
        assert wait_for(lambda: not is_pending(process.pid, signal.SIGTERM))
        process.kill()
        assert wait_for(run.is_nothing_left)


@HAND_OFFS
@pytest.mark.parametrize("role", ["server", "tests"])
def test_a_second_request_kills_at_once_what_a_killed_shim_has_left(make_run: MakeRun, hand_off: str, role: str) -> None:
    run = make_run("ignoring", hand_off)
    run.kill_after = "1h"
    with run.started() as process:
        run.pid_of("tests")
        left = run.pid_of(role)
        os.kill(run.shim_of(role), signal.SIGKILL)
        assert wait_for(lambda: int(status_of(left)["PPid"]) == process.pid)  # and not a process outside
        process.terminate()
        assert wait_for(lambda: not is_pending(process.pid, signal.SIGTERM))
        tell_again(process, signal.SIGTERM)
        process.wait(DEADLINE)
        assert run.is_nothing_left()


@HAND_OFFS
def test_a_shim_that_stops_late_goes_on(make_run: MakeRun, hand_off: str) -> None:
    """It was told to stop its tree, and finds only then that Ctrl-Z has stopped its command."""
    run = make_run("ignoring", hand_off)
    run.kill_after = "1h"
    with run.started() as process:
        run.pid_of("tests")
        shim = run.shim_of("server")
        process.terminate()
        assert wait_for(lambda: not is_pending(process.pid, signal.SIGTERM))
        for _ in range(3):
            os.kill(shim, signal.SIGSTOP)
            assert wait_for(lambda: not is_pending(shim, signal.SIGSTOP))
            assert wait_for(lambda: state(shim) in "SR")
        tell_again(process, signal.SIGTERM)
        process.wait(DEADLINE)
        assert run.is_nothing_left()


def test_with_hold_as_well(make_run: MakeRun) -> None:
    run = make_run("calm", "hold")
    with run.started() as process:
        run.pid_of("tests")
        run.require_all_there()
        process.kill()
        assert wait_for(run.is_nothing_left)


ESCAPING = """
import os, signal, sys
def escape(number, frame):
    for _ in range(3):
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
    os._exit(0)
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGTERM, escape)
open(sys.argv[1], "w").close()
os.read(reader, 1)
"""


@HAND_OFFS
@pytest.mark.parametrize("turn", range(3))
def test_what_forks_while_it_is_stopped(make_run: MakeRun, hand_off: str, turn: int, tmp_path: Path) -> None:
    """Its children leave it, and it ends, between two looks at who is there."""
    run = make_run("calm", hand_off)
    up = tmp_path / "up"
    then = f"until [ -e {up} ]; do sleep 0.01; done; exit 5"
    servers = " & ".join(2 * [shlex.join([sys.executable, "-c", ESCAPING, str(up)])])
    words = [*PORTEXEC, "-q", "-H", hand_off, "-k", "200ms", "--ready", "none", "--then", then, "--", "sh", "-c", servers]
    with run.cleaned_up():
        assert subprocess.run(["env", f"MARK={run.mark}", *words], timeout=DEADLINE, stdin=subprocess.DEVNULL).returncode == 5
        assert run.is_nothing_left()


# What is not ours stays.


def test_what_others_wrote_meanwhile_stays(make_run: MakeRun) -> None:
    run = make_run("calm", "guard")
    with run.started() as process:
        run.pid_of("tests")
        (run.files / "port").write_text("1\n")
        with (run.files / "export").open("a") as file:
            file.write("OTHER=1\n")
        stop(process, signal.SIGTERM)
        assert sorted(path.name for path in run.files.iterdir()) == ["export", "port"]
        assert run.living() == set()


def test_another_socket_at_the_path_of_ours_stays(make_run: MakeRun) -> None:
    """As with the port file: somebody who has replaced it means it."""
    run = make_run("calm", "fd")
    with run.started() as process, socket.socket(socket.AF_UNIX) as other:
        run.pid_of("tests")
        (run.files / "socket").unlink()
        other.bind(str(run.files / "socket"))
        stop(process, signal.SIGTERM)
        assert [path.name for path in run.files.iterdir()] == ["socket"]


def test_processes_that_are_not_below_it_live_on(make_run: MakeRun) -> None:
    """A process of the same group and session, and one that portexec was given as a child before it was portexec."""
    run = make_run("calm", "guard")
    words = run.words(tests="0")
    script = 'sleep 1000 & echo $!; exec "$@"'
    shell = ["sh", "-c", script, "sh", *words]
    with run.cleaned_up(), subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        other = int(process.stdout.readline())
        try:
            assert process.wait(DEADLINE) == 0
            assert not is_gone(other)
        finally:
            os.kill(other, signal.SIGKILL)
        assert run.is_nothing_left()
