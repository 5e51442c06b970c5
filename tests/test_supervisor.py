"""The parent that stays: signals, statuses, job control, the tree below it, and what happens when it is killed."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from portexec.procfs import descendants
from tests.support import DEADLINE, PORTEXEC, ROOT, child, is_gone, kill_group, run, running, status_of, wait_for
from tests.support.installed import program
from tests.support.proc import is_at_rest, state
from tests.support.processes import tell_again
from tests.support.terminals import on_a_terminal

GUARD = ("-q", "-H", "guard", "--")


def read_until(terminal: int, text: str, end: str = "") -> str:
    """Read up to this text, and on to this end; return it from the text on."""
    seen = ""
    while text not in seen or end not in seen.partition(text)[2]:
        try:
            data = os.read(terminal, 1000)
        except OSError:  # EIO: the other end was closed
            data = b""
        assert data, f"the terminal closed after {seen!r}"
        seen += data.decode()
    return seen[seen.index(text) :]


@pytest.mark.parametrize("status", [0, 1, 2, 77, 124, 125, 126, 127, 128, 255])
def test_the_exit_status_comes_through(status: int) -> None:
    assert run(*GUARD, "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGALRM]
)
def test_it_dies_as_the_command_died(number: signal.Signals) -> None:
    assert run(*GUARD, "sh", "-c", f"kill -{number.value} $$").returncode == -number


def test_a_death_leaves_no_second_core(tmp_path: Path) -> None:
    words = [*PORTEXEC, *GUARD, "sh", "-c", "ulimit -c unlimited; kill -SEGV $$"]
    done = subprocess.run(words, cwd=tmp_path, timeout=DEADLINE, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert len(list(tmp_path.iterdir())) <= 1


@pytest.mark.parametrize(("words", "status"), [(("nowhere/to-be-found",), 127), (("/",), 126)])
def test_what_cannot_be_executed(words: tuple[str, ...], status: int) -> None:
    done = run(*GUARD, *words)
    assert done.returncode == status
    assert done.stderr.startswith("portexec: error: ")


def test_a_failing_exec_is_reported_by_the_parent(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = run(*GUARD, str(script))
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        126,
        f"portexec: error: cannot run {script}: its interpreter /no/such/interpreter does not exist",
    )


@pytest.mark.parametrize(
    "name", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIGRTMIN", "SIGRTMAX"]
)
def test_a_signal_to_the_parent_reaches_the_command_once(name: str) -> None:
    with running(*GUARD, *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready")
        started.process.send_signal(getattr(signal, name))
        assert started.process.stdout.readline() == f"{name}\n"
        started.process.terminate()
        assert started.process.stdout.readline() == "SIGTERM\n"
        assert started.process.wait(DEADLINE) == 3


def test_ctrl_c_reaches_the_command_once_and_the_parent_waits_for_it() -> None:
    with on_a_terminal(*PORTEXEC, *GUARD, *child("signals")) as (pid, terminal):
        read_until(terminal, "ready")
        os.write(terminal, b"\x03")
        read_until(terminal, "SIGINT", "\n")
        os.kill(pid, signal.SIGUSR1)  # had INT come twice, it would be there before this one
        assert read_until(terminal, "SIG", "\n").startswith("SIGUSR1")
        os.kill(pid, signal.SIGTERM)
        read_until(terminal, "SIGTERM")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


def test_ctrl_z_stops_both_and_fg_continues_both() -> None:
    """In a real shell: the kernel stops nobody in a process group that has no shell to continue it."""
    shell = program("bash")
    with on_a_terminal(shell, "--norc", "--noprofile", "-i") as (_, terminal):
        os.write(terminal, shlex.join([*PORTEXEC, *GUARD, *child("signals")]).encode() + b"\n")
        command = int(read_until(terminal, "ready", "\n").split()[1])
        parent = int(status_of(command)["PPid"])
        os.write(terminal, b"\x1a")
        read_until(terminal, "Stopped")
        assert (state(command), state(parent)) == ("T", "T")
        os.write(terminal, b"fg\n")
        read_until(terminal, "SIGCONT")
        assert wait_for(lambda: state(parent) in "SR")
        os.kill(parent, signal.SIGTERM)
        read_until(terminal, "SIGTERM")
        os.write(terminal, b"echo status=$?\n")
        read_until(terminal, "status=3")


def test_ctrl_c_kills_a_plain_command_and_the_shell_can_tell() -> None:
    with on_a_terminal(*PORTEXEC, *GUARD, "sh", "-c", "echo ready; exec cat") as (pid, terminal):
        read_until(terminal, "ready")
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_a_ctrl_c_that_the_command_has_a_use_for_stops_no_tree() -> None:
    # In a session of its own before the shell ends: the kernel would end it by HUP when the terminal loses its session.
    leave = "echo left $(setsid -f sh -c 'echo $$.; exec sleep 100 >/dev/null 2>&1 </dev/null'); exit 0"
    script = f"leave() {{ {leave}; }}; trap leave INT; echo ready; while :; do sleep 1; done"
    with on_a_terminal(*PORTEXEC, *GUARD, "sh", "-c", script) as (pid, terminal):
        read_until(terminal, "ready")
        os.write(terminal, b"\x03")
        left = int(read_until(terminal, "left", ".").removeprefix("left ").partition(".")[0])
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert not is_gone(left)
        finally:
            os.kill(left, signal.SIGKILL)


def test_told_to_stop_it_stops_the_whole_tree() -> None:
    with running(*GUARD, *child("tree"), "plain") as started:
        assert started.process.stdout is not None
        left = [int(pid) for pid in started.process.stdout.readline().split()]
        assert started.process.stdout.readline() == "ready\n"
        assert not any(is_gone(pid) for pid in left)
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM
        assert all(is_gone(pid) for pid in left)


def test_what_was_there_before_it_lives_on() -> None:
    """A child that portexec was given: of the shell that became portexec."""
    script = 'sleep 1000 & exec "$@"'
    words = [*PORTEXEC, *GUARD, "sh", "-c", "echo $$; exec sleep 1000"]
    shell = ["sh", "-c", script, "sh", *words]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            command = int(process.stdout.readline())
            (other,) = descendants(root=process.pid) - {command, int(status_of(command)["PPid"])}
            process.terminate()
            assert process.wait(DEADLINE) == -signal.SIGTERM
            assert is_gone(command)
            assert not is_gone(other)
        finally:
            kill_group(process.pid)


def test_what_ignores_term_is_killed() -> None:
    with running("-k", "100ms", *GUARD, *child("tree"), "ignore") as started:
        assert started.process.stdout is not None
        left = [int(pid) for pid in started.process.stdout.readline().split()]
        assert started.process.stdout.readline() == "ready\n"
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM
        assert all(is_gone(pid) for pid in left)


def test_a_second_request_kills_at_once() -> None:
    with running("-k", "1h", *GUARD, *child("tree"), "ignore") as started:
        assert started.process.stdout is not None
        left = [int(pid) for pid in started.process.stdout.readline().split()]
        assert started.process.stdout.readline() == "ready\n"
        started.process.terminate()
        assert wait_for(lambda: is_gone(left[1]))
        tell_again(started.process, signal.SIGTERM)
        assert started.process.wait(DEADLINE) == -signal.SIGTERM
        assert all(is_gone(pid) for pid in left)


def test_a_daemon_runs_on_and_can_still_bind(tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    done = run("-H", "guard", "--", *child("tree"), "daemon", str(go))  # returns: the shim holds none of our pipes
    assert done.returncode == 0
    daemon = int(done.stdout)
    try:
        assert not is_gone(daemon)
        go.write_text("")
        port = int(done.stderr.rpartition(":")[2])
        with wait_for(lambda: socket.create_connection(("127.0.0.1", port))) as client:
            assert client.recv(100) == b"served"
        assert wait_for(lambda: is_gone(daemon))
    finally:
        if not is_gone(daemon):
            os.kill(daemon, signal.SIGKILL)


def test_killed_it_takes_the_command_along() -> None:
    with running(*GUARD, *child("signals")) as started:
        assert started.process.stdout is not None
        command = int(started.process.stdout.readline().split()[1])
        started.process.kill()
        assert started.process.stdout.readline() == "SIGTERM\n"
        assert wait_for(lambda: is_gone(command))


@pytest.mark.parametrize("end", ["continue", "kill"])
def test_stopped_in_the_middle_of_a_bind(tmp_path: Path, end: str) -> None:
    """While the parent is stopped, the command waits in bind(2), and can be killed there."""
    go = tmp_path / "go"
    os.mkfifo(go)
    script = (
        "import os, socket; print(os.getpid(), flush=True); open(os.environ['GO']).close()\n"
        "s = socket.socket(); s.bind(('127.0.0.1', int(os.environ['PORT']))); s.listen(); print('bound', flush=True)"
    )
    with running("-e", f"GO={go}", *GUARD, sys.executable, "-c", script) as started:
        assert started.process.stdout is not None
        command = int(started.process.stdout.readline())
        parent = int(status_of(command)["PPid"])
        os.kill(parent, signal.SIGSTOP)
        assert wait_for(lambda: state(parent) == "T")
        go.write_text("")
        assert wait_for(lambda: "seccomp" in Path(f"/proc/{command}/wchan").read_text() or state(command) in "SD")
        if end == "continue":
            os.kill(parent, signal.SIGCONT)
            assert started.process.stdout.readline() == "bound\n"
        else:
            os.kill(command, signal.SIGTERM)
            os.kill(parent, signal.SIGCONT)
            assert started.process.wait(DEADLINE) == -signal.SIGTERM


@pytest.mark.root  # makes a pid namespace
def test_as_pid_1_it_reaps_and_ends_with_the_status() -> None:
    words = ["unshare", "--pid", "--fork", "--mount-proc", *PORTEXEC, *GUARD]
    script = "(true &) ; sh -c 'kill -KILL $$'; exit 9"
    assert subprocess.run([*words, "sh", "-c", script], timeout=DEADLINE, check=False).returncode == 9
    assert subprocess.run([*words, "sh", "-c", "kill -9 $$"], timeout=DEADLINE, check=False).returncode == 128 + 9


def test_sigchld_ignored_by_the_caller_is_no_trouble() -> None:
    script = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-c", script, *PORTEXEC, *GUARD, "grep", "SigIgn", "/proc/self/status"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0
    assert int(done.stdout.split()[1], 16) & 1 << signal.SIGCHLD - 1


@pytest.mark.parametrize("options", [("-H", "guard"), ("-H", "fd", "--restart", "always"), ("-H", "hold", "--ready", "none")])
def test_a_stderr_that_nobody_reads_keeps_it_from_no_signal(options: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
    words = [*PORTEXEC, "-v", *options, "--", "sh", "-c", "echo up; exec sleep 1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=writer, text=True, start_new_session=True) as process:
        os.close(writer)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            process.terminate()
            assert process.wait(DEADLINE) == -signal.SIGTERM
        finally:
            kill_group(process.pid)
            os.close(reader)


@pytest.mark.parametrize("options", [("-H", "guard"), ("-H", "guard", "--ready", "listen")])
def test_int_that_is_ignored_starts_no_clock(options: tuple[str, ...]) -> None:
    """As of what a shell runs in the background."""
    script = shlex.join(["exec", *PORTEXEC, "-q", "-k", "0", *options, "--", *child("signals")])
    words = ["sh", "-c", f"trap '' INT; {script}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGUSR1)
            assert "SIGUSR1\n" in [process.stdout.readline(), process.stdout.readline()]
        finally:
            kill_group(process.pid)


def test_a_shim_that_is_killed_is_said() -> None:
    """It takes its command along, which nobody would understand."""
    with running("-H", "guard", "--", *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready")
        pid = started.process.pid
        (shim,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        wait_for(lambda: is_at_rest(shim))  # it has told that the command runs
        os.kill(shim, signal.SIGKILL)
        started.line("^portexec: note: the process that looked after the command was killed, so the command is ended$")
        assert started.process.wait(DEADLINE) == -signal.SIGKILL


AT_THE_WORD = """
import os, signal, sys
from portexec.command.plan import Plan
from portexec.parent import protocol
from portexec.parent.protocol import Job
from portexec.parent.shim import Shim
from portexec.parent.signals import Inbox
job = Job(Plan("/bin/mkdir", ["mkdir", "made"], {}), kill_after=1.0, patience=None, guards={}, remap={}, leaves_daemons=False,
          kept=set(), names_port=False, advised=set(), quiet=True, verbose=False)
shim = Shim(job, Inbox())
os.kill(shim.pid, signal.SIGSTOP)
os.waitpid(shim.pid, os.WUNTRACED)
shim.ask_to_prepare()
shim.ask_to_go()
if sys.argv[1] == "dies":
    shim.link.close()  # as at the end of this process
os.kill(shim.pid, signal.SIGCONT)
while shim.link.is_open and shim.link.receive()[0] != protocol.GONE:
    pass
shim.leave()
os.waitpid(shim.pid, 0)
"""


@pytest.mark.parametrize("portexec", ["lives", "dies"])
def test_no_command_begins_after_the_death_of_its_portexec(portexec: str, tmp_path: Path) -> None:
    """Though the word to go was said before: the shim has not read the word yet."""
    words = [sys.executable, "-c", AT_THE_WORD, portexec]
    subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=DEADLINE, check=True)
    assert (tmp_path / "made").exists() is (portexec == "lives")
