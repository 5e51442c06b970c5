"""The hand-off `guard` where it is refused, where only its gated form is left, and where things go wrong under way.

What other kernels and containers refuse, a real seccomp filter refuses here (children/refuse.py). Yama 2 and 3 need another
kernel: scripts/try_kernels.sh. Threads before Linux 6.9 are in test_admission.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from portexec.admission.diagnosis import Diagnosis
from portexec.admission.elsewhere import inspected
from portexec.kernel import STDERR
from tests.support import (
    CHILDREN,
    DEADLINE,
    PORTEXEC,
    ROOT,
    STRANGER,
    Running,
    child,
    descriptors_of,
    get,
    is_gone,
    kill_group,
    read_line,
    run,
    running,
    status_of,
    tell,
    wait_for,
)
from tests.support.installed import has_ipv6, program
from tests.support.network import THEFTS, steal
from tests.support.proc import children_of
from tests.support.processes import NO_SOCK_DIAG, refusing
from tests.support.waiting import SLOW

pytestmark = pytest.mark.once

GUARD = ("-q", "-H", "guard", "--")
FAULTS = child("faults")
PLAIN = [*child("binder"), "plain"]
PLAIN_IS_WELL = ["ok", "ok", True, "ok"]

FLAG_WAIT_KILLABLE_RECV = 1 << 5
NO_IO_URING = 77  # the status of children/uring.py
NO_SECCOMP = {name: [["seccomp", getattr(errno, name)]] for name in ("EINVAL", "EPERM", "ENOSYS")}
DOCKER = [["pidfd_getfd", errno.EPERM]]  # Docker's default profile, as far as it concerns us
UNKNOWN = [["pidfd_getfd", errno.ENOSYS]]  # what other profiles answer to calls that they do not know
NARROW = "pidfd_getfd(2): Operation not permitted; the guard gives way to SO_REUSEADDR while the command binds this number"
BEFORE_5_19 = [["seccomp", errno.EINVAL, 1, FLAG_WAIT_KILLABLE_RECV]]

# How the text for each refusal begins.
WORDS = {
    "EBUSY": "another supervisor has the notifications already",
    "EINVAL": "this kernel, or the sandbox around it, has no seccomp notifications",
    "EPERM": "seccomp is denied here",
    "ENOSYS": "this kernel has no seccomp",
}
OUTER = [*PORTEXEC, *GUARD]
PRIVILEGES = (*GUARD, "grep", "NoNewPrivs", "/proc/self/status")


def around(name: str) -> list[str]:
    """The words that make seccomp(2) fail with this errno for whatever follows them."""
    return OUTER if name == "EBUSY" else refusing(*NO_SECCOMP[name])


def out(started: Running) -> str:
    """The next line of the command's standard output."""
    return read_line(started.process)


def asked(started: Running) -> str:
    """Give the command an empty line and read the one that it answers."""
    assert started.process.stdin is not None
    print(file=started.process.stdin, flush=True)
    return out(started)


def answer(port: int, host: str = "127.0.0.1") -> str:
    with socket.create_connection((host, port), DEADLINE) as client:
        return client.recv(100).decode()


# The gated form


@pytest.mark.parametrize("more", [[], [NO_SOCK_DIAG]], ids=["sock_diag", "proc"])
def test_gated_where_a_container_denies_duplicates(more: list[list[object]]) -> None:
    with running("-v", "-H", "guard", "--", *FAULTS, "serve", "127.0.0.1", "0", prefix=refusing(*DOCKER, *more)) as started:
        port = int(out(started).split()[1])
        started.line(r"the command listens on 127\.0\.0\.1:\d+$")  # now the gate is closed
        assert answer(port) == str(port)
        assert {theft: steal(theft[0], port, *theft[1:]) for theft in THEFTS} == dict.fromkeys(THEFTS, "EADDRINUSE")


def test_the_gate_is_for_whoever_sets_reuseaddr() -> None:
    done = run(*GUARD, *PLAIN, prefix=refusing(*DOCKER))
    assert json.loads(done.stdout)[:2] == ["EADDRINUSE", "ok"]


def test_a_gate_without_a_listener_closes_by_itself() -> None:
    """The command binds and never listens: after a while the number is the guard's alone again."""
    script = (
        "import os, socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "s.bind(('127.0.0.1', int(os.environ['PORT']))); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with running(*GUARD, sys.executable, "-c", script, prefix=refusing(*DOCKER), stdin=subprocess.PIPE) as started:
        port = int(out(started))
        assert wait_for(lambda: steal("127.0.0.9", port, socket.SO_REUSEADDR) == "EADDRINUSE")


def test_gated_says_so() -> None:
    done = run("-v", "-H", "guard", "--", "true", prefix=refusing(*DOCKER))
    assert done.returncode == 0
    assert f"gated: {NARROW}" in done.stderr


@pytest.mark.parametrize("hand_off", ["auto", "guard"])
def test_gated_cannot_remap(hand_off: str) -> None:
    done = run("-H", hand_off, "--remap", "8000", "--", "true", prefix=refusing(*DOCKER))
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("portexec: error: hand-off guard cannot be had here: --remap needs pidfd_getfd(2)")


# Refused altogether


@pytest.mark.parametrize("name", WORDS)
def test_auto_turns_to_hold(name: str) -> None:
    done = run("-v", "--", *child("greeter"), "alone", prefix=around(name))
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert f"portexec: hand-off hold: hand-off guard cannot be had: {WORDS[name]}" in done.stderr


@pytest.mark.parametrize("name", WORDS)
def test_guard_by_name_is_an_error(name: str) -> None:
    done = run("-H", "guard", "--", "echo", "started", prefix=around(name))
    assert (done.returncode, done.stdout) == (125, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"portexec: error: hand-off guard cannot be had here: {WORDS[name]}")
    assert error.endswith(f"({os.strerror(getattr(errno, name))})")
    assert hint.startswith("portexec: hint: ")


@pytest.mark.parametrize("name", WORDS)
def test_a_refused_attempt_leaves_nothing(name: str) -> None:
    """The command has the same descriptors, signals and attributes as when `hold` was asked for."""
    states = [run("-q", *words, "--", *FAULTS, "state", prefix=around(name)) for words in ((), ("-H", "hold"))]
    assert [done.returncode for done in states] == [0, 0]
    assert states[0].stdout == states[1].stdout
    assert json.loads(states[0].stdout)[0] == 0


# --check


CHECKS = {
    "plain": ([], "user notification", "available: ", "guard"),
    "docker": (refusing(*DOCKER), "user notification", f"available, gated: {NARROW}; no --remap", "guard"),
    "unknown": (
        refusing(*UNKNOWN),
        "user notification",
        "available, gated: pidfd_getfd(2): Function not implemented;",
        "guard",
    ),
    "old": (refusing(*BEFORE_5_19), "user notification; not wait-killable", "available: ", "guard"),
    "EBUSY": (around("EBUSY"), "user notification", f"not available: {WORDS['EBUSY']}", "hold"),
    "EINVAL": (around("EINVAL"), "no user notification", f"not available: {WORDS['EINVAL']}", "hold"),
    "EPERM": (around("EPERM"), "refused: Operation not permitted", f"not available: {WORDS['EPERM']}", "hold"),
    "ENOSYS": (around("ENOSYS"), "refused: Function not implemented", f"not available: {WORDS['ENOSYS']}", "hold"),
}


@pytest.mark.parametrize("where", CHECKS)
def test_check_tells_what_can_be_had(where: str) -> None:
    prefix, seccomp, guard, chosen = CHECKS[where]
    text, data = (run("--check", *words, prefix=prefix) for words in ((), ("--json",)))
    assert (text.returncode, text.stderr, data.returncode, data.stderr) == (0, "", 0, "")
    found = json.loads(data.stdout)
    assert found["seccomp"].startswith(seccomp)
    assert found["hand_off_guard"].startswith(guard)
    assert found["auto"].endswith(f"else {chosen}")
    assert {"same_user", "closefrom", "io_uring"} < found.keys()
    for name, value in found.items():
        assert re.search(rf"^{name.replace('_', '.')} +{re.escape(value)}$", text.stdout, re.MULTILINE)


@pytest.mark.root
def test_check_tells_what_the_same_user_can_do_below_a_root_that_may_not_give_sockets_away() -> None:
    """With CAP_CHOWN root's sockets are nobody's while they go past the guard; without it they are as open as anybody's."""
    for prefix, whose in (
        ([], "on a socket that shares by itself or is MPTCP"),
        (child("without_rights"), "listen of the command"),
    ):
        assert json.loads(run("--check", "--json", prefix=prefix).stdout)["same_user"].endswith(whose)


# Deaths


@pytest.mark.parametrize("lifetime", [(), ("--restart", "always")], ids=["plain", "under a lifetime"])
def test_a_command_that_binds_without_a_pause_is_stopped_all_the_same(lifetime: tuple[str, ...]) -> None:
    with running("-q", "-H", "guard", *lifetime, "--", *child("spin")) as started:
        assert read_line(started.process) == "spins"
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM


def test_killed_after_the_bind_it_takes_the_command_along() -> None:
    """The command hears TERM. Its shim still answers, so a bind of its own works."""
    with running(*GUARD, *FAULTS, "serve", "127.0.0.1", "0") as started:
        command = int(out(started).split()[2])
        started.process.kill()
        assert out(started) == "SIGTERM ok"
        assert wait_for(lambda: is_gone(command))


def test_killed_before_the_bind_it_takes_the_command_along() -> None:
    with running(*GUARD, *FAULTS, "wait", stdin=subprocess.PIPE) as started:
        command = int(out(started).split()[1])
        started.process.kill()
        assert out(started) == "SIGTERM ok"
        assert wait_for(lambda: is_gone(command))


def test_the_command_is_killed_before_its_bind() -> None:
    with running(*GUARD, *FAULTS, "wait", stdin=subprocess.PIPE) as started:
        os.kill(int(out(started).split()[1]), signal.SIGKILL)
        assert started.process.wait(DEADLINE) == -signal.SIGKILL
        assert started.process.stderr is not None
        assert started.process.stderr.read() == ""


def test_killed_during_the_rehearsal_it_leaves_no_child() -> None:
    """KILL at any moment of the start: the pipe that everybody holds comes to its end."""
    for delay in range(20):
        process = subprocess.Popen([*PORTEXEC, *GUARD, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            try:
                process.wait(0.01 + delay * 0.008)
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.communicate(timeout=DEADLINE)[0] == b""


def test_what_fails_in_the_parent_fails_no_other_bind() -> None:
    """Without a free descriptor the parent cannot find out anything: other binds go on, and ours is refused, not stolen."""
    script = (
        "import os, socket, sys\n"
        "def attempt(port):\n"
        "    s = socket.socket()\n"
        "    try: s.bind(('127.0.0.1', port)); s.listen()\n"
        "    except OSError as error: return error.errno\n"
        "    return 0\n"
        "for _ in sys.stdin: print(attempt(0), attempt(int(os.environ['PORT'])), flush=True)"
    )
    with running(*GUARD, sys.executable, "-c", script, stdin=subprocess.PIPE) as started:
        assert asked(started) == "0 0"
        (shim,) = children_of(started.process.pid)
        limits = resource.prlimit(shim, resource.RLIMIT_NOFILE)
        resource.prlimit(shim, resource.RLIMIT_NOFILE, (3, limits[1]))
        assert asked(started) == f"0 {errno.EADDRINUSE}"
        resource.prlimit(shim, resource.RLIMIT_NOFILE, limits)
        assert asked(started) == "0 0"


def test_a_low_limit_of_descriptors_is_the_commands_alone() -> None:
    """The command may raise it, and bind by many threads at once. The shim takes descriptors for each call that waits."""
    prefix = ["sh", "-c", 'ulimit -Sn 16; exec "$@"', "sh"]
    with running(*GUARD, sys.executable, "-c", "print(flush=True); input()", stdin=subprocess.PIPE, prefix=prefix) as started:
        assert read_line(started.process) == ""
        (shim,) = children_of(started.process.pid)
        (command,) = children_of(shim)
        limits = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in (shim, command)]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert limits == [(hard, hard), (16, hard)]


@pytest.mark.parametrize("options", [[], ["-H", "guard"]], ids=" ".join)
@pytest.mark.parametrize("limit", range(5, 10))
def test_too_few_descriptors_are_no_bug(limit: int, options: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *PORTEXEC, *options, "--", "true"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Address already in use" not in done.stderr
    assert done.returncode in (0, 125)


def test_a_fork_that_is_refused_is_no_bug() -> None:
    done = run(*GUARD, "true", prefix=refusing(["clone", errno.EAGAIN]))
    assert done.returncode == 125
    assert done.stderr.startswith("portexec: error: ")


def test_a_death_by_a_signal_that_no_program_may_handle() -> None:
    """The C library keeps 32 and 33 to itself, but the kernel delivers them, unless whoever runs the tests ignores them."""
    words = ("sh", "-c", "kill -32 $$")
    bare = subprocess.run(words, timeout=DEADLINE).returncode
    done = run(*GUARD, *words)
    assert (done.returncode, done.stderr) in ((bare, ""), (128 - bare if bare < 0 else bare, ""))


def test_what_the_command_closes_is_closed() -> None:
    """A reader sees the end of a pipe as soon as the command has let go of it, not only when portexec ends."""
    with running(*GUARD, "sh", "-c", "exec >&-; read line", stdin=subprocess.PIPE) as started:
        assert started.process.stdout is not None
        readable, _, _ = select.select([started.process.stdout], [], [], DEADLINE / 3)
        assert readable
        assert started.process.poll() is None


def test_a_command_that_ignores_term_is_killed_in_time() -> None:
    script = "trap '' TERM; echo ready; while :; do read line; done"
    with running("-k", "100ms", *GUARD, "sh", "-c", script, stdin=subprocess.PIPE) as started:
        assert out(started) == "ready"
        started.process.terminate()
        try:
            assert started.process.wait(DEADLINE / 3) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            pytest.fail("the command still runs")
        finally:
            kill_group(started.process.pid)


def test_told_to_stop_it_stops_what_has_no_main_thread_any_more() -> None:
    if os.uname().machine not in ("x86_64", "aarch64", "riscv64"):
        pytest.skip("the number of exit(2) is not known here")
    with running(*GUARD, *FAULTS, "headless") as started:
        left = int(out(started).split()[1])
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM
        try:
            # The main thread is a zombie all the time; what is to be gone is the other one.
            assert wait_for(lambda: not Path(f"/proc/{left}").exists() or status_of(left)["Threads"] == "1")
        finally:
            kill_group(started.process.pid)


@pytest.mark.parametrize("kind", ["restart", "interrupt"])
def test_a_storm_of_signals_loses_no_bind(kind: str) -> None:
    done = run(*GUARD, *FAULTS, "storm", kind, str(0.00005 * SLOW), "300")
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == [[], True]


@pytest.mark.parametrize("kind", ["restart", "interrupt"])
def test_signals_on_a_kernel_where_they_interrupt_a_bind(kind: str) -> None:
    """Before Linux 5.19 a signal takes the caller away from its notification, and the bind comes once more."""
    done = run(*GUARD, *FAULTS, "storm", kind, str(0.0007 * SLOW), "300", prefix=refusing(*BEFORE_5_19))
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == [[], True]


def test_many_servers_below_one_parent() -> None:
    words = [word for _ in range(300) for word in ("-l", "0")]
    with running(*words, "-H", "guard", "--", *FAULTS, "many") as started:
        assert out(started) == "ready"
        ports = [int(started.url().rpartition(":")[2]) for _ in range(300)]
        assert len(set(ports)) == 300
        assert [answer(port) for port in ports] == [str(port) for port in ports]


def test_the_parent_keeps_no_descriptor_of_the_command() -> None:
    """A duplicate that stays open would keep a listener alive that the command has closed."""
    with running(*GUARD, *FAULTS, "serve", "127.0.0.1", "0") as started:
        command = int(out(started).split()[2])
        sockets = {target for target in descriptors_of(command).values() if target.startswith("socket:")}
        assert len(sockets) == 1
        assert wait_for(lambda: not sockets & set(descriptors_of(started.process.pid).values()))


# Other supervisors, filters and tracers


@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_guard_inside_others(hand_off: str) -> None:
    done = run("-q", "-H", hand_off, "--", *PORTEXEC, *GUARD, *PLAIN)
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == PLAIN_IS_WELL


@pytest.mark.parametrize("words", [["-H", "fd"], ["-H", "hold"], []], ids=["fd", "hold", "auto"])
def test_others_inside_guard(words: list[str]) -> None:
    done = run(*GUARD, *PORTEXEC, "-q", *words, "--", *child("greeter"), "alone")
    assert (done.stdout, done.stderr, done.returncode) == ("served\n", "", 0)


def test_a_filter_inside_that_allows_all() -> None:
    done = run(*GUARD, *refusing(), *PLAIN)
    assert json.loads(done.stdout) == PLAIN_IS_WELL


def test_a_filter_inside_that_refuses_is_heeded() -> None:
    done = run(*GUARD, *refusing(["bind", errno.EACCES]), *PLAIN)
    assert json.loads(done.stdout)[:1] == ["EACCES"]


def test_strace_around_the_server() -> None:
    strace = program("strace")
    done = run(*GUARD, strace, "-f", "-o", os.devnull, *PLAIN)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace cannot trace here: {done.stderr}")
    assert (json.loads(done.stdout), done.returncode) == (PLAIN_IS_WELL, 0)


def test_gdb_around_the_server() -> None:
    gdb = program("gdb")
    options = ["-nx", "-q", "-batch", "-iex", "set debuginfod enabled off", "-ex", "set auto-load off", "-ex", "run", "--args"]
    done = run(*GUARD, gdb, *options, *PLAIN)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"gdb cannot trace here: {done.stderr}")
    assert json.dumps(PLAIN_IS_WELL) in done.stdout.splitlines()


# Privileges


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that another user can look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_stranger(*words: str) -> subprocess.CompletedProcess[str]:
    """Run portexec as an ordinary user, with a Python that this user may execute."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        probe = [python, "-c", "import sys; assert sys.version_info >= (3, 10); import portexec.cli, portexec.parent"]
        options = {"user": STRANGER, "group": STRANGER, "extra_groups": [], "cwd": "/", "env": environment}
        try:
            if subprocess.run(probe, capture_output=True, timeout=DEADLINE, check=False, **options).returncode == 0:  # type: ignore[call-overload]
                return subprocess.run(  # type: ignore[call-overload, no-any-return]
                    [python, "-m", "portexec", *words],
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE,
                    check=False,
                    **options,
                )
        except OSError:
            continue
    return pytest.skip("another user can execute no Python from 3.10 on that sees this checkout")


def copy_of_id(directory: Path) -> str:
    copy = str(directory / "id")
    shutil.copy(program("id"), copy)
    return copy


@pytest.mark.root
def test_set_uid_programs_keep_their_rights_under_auto(shared_directory: Path) -> None:
    """As sudo does. Under `guard`, asked for by name, they cannot."""
    program = copy_of_id(shared_directory)
    Path(program).chmod(0o4755)
    if os.statvfs(program).f_flag & os.ST_NOSUID:
        pytest.skip("the temporary directory is mounted nosuid")
    done = as_stranger("-v", "--", program, "-u")
    assert (done.stdout, done.returncode) == ("0\n", 0)
    assert "portexec: hand-off hold: " in done.stderr
    assert f"no-new-privileges would take its rights from {program}" in done.stderr
    assert as_stranger(*GUARD, program, "-u").stdout == f"{STRANGER}\n"


@pytest.mark.root
def test_programs_with_file_capabilities_keep_them_under_auto(shared_directory: Path) -> None:
    program = copy_of_id(shared_directory)
    try:
        # struct vfs_ns_cap_data, revision 2: effective; permitted and inheritable, CAP_NET_BIND_SERVICE
        os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    except OSError as error:
        pytest.skip(f"no file capabilities here: {error}")
    done = as_stranger("-v", "--", program, "-u")
    assert (done.stdout, done.returncode) == (f"{STRANGER}\n", 0)
    assert "which has file capabilities" in done.stderr


def test_no_new_privileges_where_the_kernel_demands_it() -> None:
    done = run(*PRIVILEGES, prefix=child("without_rights"))
    assert done.stdout.split()[1] == "1"


@pytest.mark.root
def test_no_new_privileges_only_where_the_kernel_demands_it() -> None:
    if status_of("self")["NoNewPrivs"] == "0":
        assert run(*PRIVILEGES).stdout.split()[1] == "0"
    assert as_stranger(*PRIVILEGES).stdout.split()[1] == "1"


@pytest.mark.root
def test_an_ordinary_user_is_served() -> None:
    done = as_stranger(*GUARD, "/usr/bin/env", "python3", "-c", "print('started')")
    assert done.returncode in (0, 126, 127)
    program = (
        "import os, socket; s = socket.socket(); s.bind(('127.0.0.1', int(os.environ['PORT']))); s.listen(); print(os.getuid())"
    )
    done = as_stranger(*GUARD, "/usr/bin/python3", "-c", program)
    assert (done.stdout, done.stderr) == (f"{STRANGER}\n", "")


@pytest.mark.root
@pytest.mark.parametrize("kind", ["plain", "reuseport", "mptcp", "dual"])
def test_a_command_that_gives_up_root_before_its_bind(kind: str) -> None:
    """The socket stays the other user's, too."""
    done = run(*GUARD, *FAULTS, "dropped", kind)
    if "ENOPROTOOPT" in done.stderr or "Protocol not" in done.stderr:
        pytest.skip("no MPTCP here")
    assert (done.stdout, done.stderr) == (f"ok ok {STRANGER}\n", "")


@pytest.mark.root
def test_a_command_that_gives_up_root_where_nobody_may_chown() -> None:
    """A container that keeps CAP_SETUID and not CAP_CHOWN: what cannot be proxied is gated."""
    state = json.dumps(
        {
            "command": [*PORTEXEC, *GUARD, *FAULTS, "dropped", "plain"],
            "environment": {**os.environ},
            "state": {"drop_capability": 0},
        }
    )
    done = subprocess.run([*child("start"), state], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.stdout, done.stderr) == (f"ok ok {STRANGER}\n", "")


# Other system call tables


@pytest.fixture(scope="session")
def program_of_32_bits(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = program("gcc")
    if os.uname().machine != "x86_64":
        pytest.skip("the 32-bit program is for x86")
    built = str(tmp_path_factory.mktemp("32") / "bind32")
    options = ["-m32", "-O1", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-fno-builtin", "-fno-stack-protector"]
    words = [compiler, *options, "-o", built, str(CHILDREN / "bind32.c")]
    if subprocess.run(words, capture_output=True, timeout=DEADLINE, check=False).returncode:
        pytest.skip("this gcc cannot build 32-bit programs")
    try:
        subprocess.run([built, "0", "1"], capture_output=True, timeout=DEADLINE, check=False)
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    return built


@pytest.mark.parametrize("direct", ["1", "0"], ids=["bind", "socketcall"])
def test_a_32_bit_program(program_of_32_bits: str, direct: str) -> None:
    with running("-H", "guard", "--", program_of_32_bits, "{port}", direct) as started:
        port = int(started.url().rpartition(":")[2])
        assert out(started) == "serving"
        assert answer(port) == "32"
        assert started.process.wait(DEADLINE) == 0


def test_a_ring_gets_no_further_than_the_guard() -> None:
    """No filter sees io_uring's own bind: it fails, loudly, rather than take the number without us."""
    done = run(*GUARD, *FAULTS, "io_uring")
    if done.stdout.strip() in ("EINVAL", "EOPNOTSUPP") or done.stdout.startswith("cannot"):
        pytest.skip(f"no bind by io_uring here: {done.stdout}")
    assert done.stdout == "EADDRINUSE\n"


# --remap


def test_remap_for_several_listeners() -> None:
    words = ["-l", "web=0", "-l", "api=0", "--remap", "8000", "--remap", "9000=api"]
    with running(*words, "-H", "guard", "--", *FAULTS, "serve", "127.0.0.1", "8000", "9000") as started:
        web, api = (int(started.url().rpartition(":")[2]) for _ in range(2))
        assert [int(out(started).split()[1]) for _ in range(2)] == [web, api]
        assert (answer(web), answer(api)) == (str(web), str(api))


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "::", "*"])
def test_remap_on_other_addresses(host: str) -> None:
    with running("--remap", "8000", "-v", "--", *FAULTS, "serve", host, "8000") as started:
        port = int(started.url().rpartition(":")[2])
        shown = f"[{host}]" if ":" in host else host
        started.line(rf"the command listens on {re.escape(shown)}:{port}$")
        assert int(out(started).split()[1]) == port
        if ":" in host or host == "*":
            assert answer(port, "::1") == str(port)
        if ":" not in host:
            assert answer(port) == str(port)


def test_remap_of_a_real_server() -> None:
    with running("-v", "--remap", "8000", "--", sys.executable, "-m", "http.server", "8000", cwd=CHILDREN) as started:
        started.line(r"hand-off guard: --remap was given")
        url = started.url()
        started.line("the command listens on ")
        assert "faults.py" in get(url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--remap", "8000", "--remap", "8000"], "--remap has port 8000 twice"),
        (["--remap", "8000", "--remap", "8000=listener1"], "--remap has port 8000 twice"),
        (["--remap", "8000=web"], "--remap 8000=web: there is no listener 'web'"),
        (["--remap", "8000="], "--remap 8000=: there is no listener ''"),
        *((["--remap", text], f"--remap {text!r} names no port") for text in ("0", "65536", "x", "-1", "", "=web", "8e3", "٣")),
        (["--remap", "8000", "-H", "fd"], "--remap needs hand-off guard, and this is fd: as asked for"),
        (["--remap", "8000", "-H", "hold"], "--remap needs hand-off guard, and this is hold: as asked for"),
    ],
)
def test_remap_that_cannot_be(words: list[str], message: str) -> None:
    done = run(*words, "--", "echo", "started")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.splitlines()[0] == f"portexec: error: {message}"


def test_remap_of_a_command_that_names_the_descriptor() -> None:
    done = run("--remap", "8000", "--", "echo", "{fd}")
    assert (done.returncode, done.stdout) == (125, "")
    assert "--remap needs hand-off guard, and this is fd" in done.stderr


# Diagnosis


def notes(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("portexec: note: ")]


@pytest.mark.parametrize("quiet", [False, True], ids=["loud", "quiet"])
def test_it_is_said_once_when_the_command_listens_elsewhere(quiet: bool) -> None:
    """Of two wrong numbers the first is named, and the failure at the end is no further news."""
    script = (
        "import socket, sys\n"
        "kept = [socket.create_server(('', 0)) for _ in range(2)]\n"
        "for s in kept: print(s.getsockname()[1], flush=True)\n"
        "sys.stdin.read(); sys.exit(3)"
    )
    words = ["-q"] * quiet + ["-H", "guard", "--", sys.executable, "-c", script]
    with running(*words, stdin=subprocess.PIPE) as started:
        other = out(started)
        if quiet:
            out(started)
        else:
            port = started.url().rpartition(":")[2]
            started.line(rf"^portexec: note: the command listens on port {other}, not on {port}$")
            # The system chose the number, and will choose another one the next time: there is nothing to remap.
            assert started.line("^portexec: hint: ").string == "portexec: hint: pass the number in its words as {port}"
        assert started.process.stdin is not None
        started.process.stdin.close()
        started.process.stdin = None
        assert started.process.wait(DEADLINE) == 3
        assert started.process.stderr is not None
        assert started.process.stderr.read() == ""


def test_it_is_said_when_the_command_failed_right_after_it_listened_elsewhere() -> None:
    script = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1]); raise SystemExit(3)"
    done = run("-H", "guard", "--", sys.executable, "-c", script)
    assert len(notes(done.stderr)) == 1
    assert done.stdout.strip() in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_listener_for_a_program_of_its_own_is_no_server_elsewhere(host: str) -> None:
    """varnishd has one for its child, and a test for its browser: on the loopback interface, on a number that nobody chose."""
    if ":" in host and not has_ipv6():
        pytest.skip("the loopback interface has no IPv6 address")
    family = "AF_INET6" if ":" in host else "AF_INET"
    script = f"import socket; s = socket.create_server(({host!r}, 0), family=socket.{family}); raise SystemExit(3)"
    done = run("-H", "guard", "--", sys.executable, "-c", script)
    assert "listens on port" not in done.stderr
    assert "never listened on port" in done.stderr


def test_an_inspector_is_no_server_elsewhere() -> None:
    """`node --inspect` listens on 9229, or the numbers after that, before the program is read."""
    done = run("-H", "guard", "--", program("node"), "--inspect=127.0.0.1:0", "-e", "setTimeout(() => process.exit(3), 500)")
    assert "Debugger listening" in done.stderr
    assert "listens on port" not in done.stderr


def test_a_server_that_goes_to_the_background_under_a_lifetime_gets_a_hint() -> None:
    daemon = "sleep 1000 & exit 0"
    done = run("--ready", "none", "-H", "guard", "--", "sh", "-c", daemon)
    lines = done.stderr.splitlines()[1:]
    assert lines == [
        "portexec: note: the command ended, so what it left running is stopped",
        "portexec: hint: a server that goes to the background has to stay in front: use its foreground mode",
    ]
    assert run("-q", "--ready", "none", "-H", "guard", "--", "sh", "-c", daemon).stderr == ""
    script = "sleep 1000 & trap 'exit 0' TERM; echo up; wait"
    with running("--ready", "none", "--", "sh", "-c", script, stderr=subprocess.PIPE) as started:
        assert read_line(started.process) == "up"
        os.killpg(started.process.pid, signal.SIGTERM)  # as timeout(1) does: the command has it before portexec can say so
        assert "foreground mode" not in started.process.communicate(timeout=DEADLINE)[1]
    for ended in ("true", "sleep 1000 & exit 3"):
        assert "foreground mode" not in run("--ready", "none", "-H", "guard", "--", "sh", "-c", ended).stderr
    tests = run("--then", daemon, "-H", "fd", "--", *child("obeying"))
    assert (tests.returncode, "foreground mode" in tests.stderr) == (0, False)


def test_it_is_said_once_when_the_command_failed_without_a_bind() -> None:
    done = run("-H", "guard", "--", "sh", "-c", "exit 3", "{port}")
    port = done.stderr.splitlines()[0].rpartition(":")[2]
    assert notes(done.stderr) == [f"portexec: note: the command failed (status 3) and never listened on port {port}"]
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("script", "is_advised"),
    [
        ("pass", False),
        ("socket.socket(socket.AF_UNIX).bind(chr(0) + str(os.getpid()))", False),
        ("socket.socket().connect_ex(('127.0.0.1', 9))", False),
        ("socket.socket().bind(('127.0.0.1', 0))", True),
        ("socket.socket().listen()", True),
    ],
    ids=["nothing", "unix", "client", "bind", "listen"],
)
def test_advice_about_ports_is_for_commands_that_have_to_do_with_ports(script: str, is_advised: bool) -> None:
    """A linter that fails, and a program that lacks a module, have no use for it."""
    done = run("-H", "guard", "--", sys.executable, "-c", f"import os, socket; {script}; raise SystemExit(3)")
    assert ("never listened on port" in done.stderr) is is_advised
    assert done.returncode == 3


HOLD = "see its output above; if another program binds for it, as docker's does, use --hand-off hold"


@pytest.mark.parametrize(
    ("tried", "named", "hint"),
    [
        ((), True, HOLD),
        ((0,), False, "pass the number in its words as {port}"),
        ((80,), False, "pass the number in its words as {port}, or replace its own with --remap 80"),
        ((0, 80, 81), False, "pass the number in its words as {port}, or replace its own with --remap 80"),
        ((9229,), False, "pass the number in its words as {port}"),
        ((80,), True, "replace its own with --remap 80"),
        ((0,), True, ""),
        ((1,), True, ""),
        ((80, 1), False, ""),
    ],
    ids=["hold", "any", "fixed", "first", "inspector", "named", "named, any", "ours", "ours after another"],
)
def test_the_hint_after_a_failure_is_what_the_command_did_not_do(
    tried: tuple[int, ...], named: bool, hint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = Diagnosis([1], is_named=named, quiet=False, verbose=False)
    for port in tried:
        seen.tried(port)
    seen.ended(3)
    lines = ["note: the command failed (status 3) and never listened on port 1", *[f"hint: {hint}"] * bool(hint)]
    assert capfd.readouterr().err.splitlines() == [f"portexec: {line}" for line in lines]


def test_a_number_that_the_words_give_to_the_inspector_is_not_the_servers(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "node",
        "--inspect=9337",
        "--inspect-brk=0.0.0.0:80",
        "--inspect-wait=[::1]:81",
        "--inspect",
        "--inspect=x",
        "--port=82",
    ]
    assert inspected(words) == {9337, 80, 81}
    seen = Diagnosis([1], is_named=False, quiet=False, verbose=False, inner=inspected(words))
    seen.tried(80)
    seen.listened(80, "0.0.0.0")
    seen.ended(3)
    assert "the command failed (status 3) and never listened on port 1" in capfd.readouterr().err
    seen.listened(82, "0.0.0.0")
    seen.ended(3)
    assert "the command listens on port 82, not on 1" in capfd.readouterr().err


def test_a_fixed_number_that_a_command_cannot_have_is_named() -> None:
    """Whether anybody has it or not: the kernel refuses an address that is not the machine's."""
    script = "import socket; socket.socket().bind(('192.0.2.1', 8000))"
    done = run("-H", "guard", "--", sys.executable, "-c", script)
    hint = "portexec: hint: pass the number in its words as {port}, or replace its own with --remap 8000"
    assert done.stderr.splitlines()[-1] == hint


@pytest.mark.parametrize("words", [("-e", "ORIGIN={url}"), ("--remap", "8000")], ids=["variable", "remap"])
def test_a_number_that_an_option_names_is_a_matter_of_ports_too(words: tuple[str, ...]) -> None:
    assert "never listened on port" in run("-H", "guard", *words, "--", "sh", "-c", "exit 3").stderr


def test_a_ring_that_cannot_bind_explains_nothing() -> None:
    """Before Linux 6.11, as which the kernel gives itself out here, whatever failed did not fail of the guard."""
    setarch = shutil.which("setarch")
    if setarch is None:
        pytest.skip("needs setarch(8)")
    command = ["-H", "guard", "--", sys.executable, "-c", OPEN_A_RING]
    assert "io_uring" not in run(*command, prefix=[setarch, "--uname-2.6"]).stderr


OPEN_A_RING = "import ctypes; ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)); raise SystemExit(3)"


def test_a_bind_by_io_uring_is_refused_and_the_hint_names_what_helps() -> None:
    done = run("-H", "guard", "--", *child("uring"))
    if done.returncode == NO_IO_URING:
        pytest.skip("io_uring cannot bind here")
    assert (done.returncode, done.stdout) == (1, "bind EADDRINUSE\n")
    assert "hint: the guard refuses a bind by io_uring, which portexec cannot see; --hand-off hold does not" in done.stderr
    held = run("-q", "-H", "hold", "--", *child("uring"))
    assert (held.returncode, held.stdout) == (0, "bind ok\nlisten ok\n")


@pytest.mark.parametrize("lifetime", [(), ("--ready", "none")], ids=["alone", "under a lifetime"])
@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_a_command_that_closes_what_it_does_not_know_drops_a_guard_of_which_a_parent_keeps_another(
    hand_off: str, lifetime: tuple[str, ...]
) -> None:
    script = f"import os; os.closerange({STDERR + 1}, 1 << 16); print(flush=True); os.read(0, 1)"
    with running("-H", hand_off, *lifetime, "--", sys.executable, "-c", script, stdin=subprocess.PIPE) as started:
        port = int(started.url().rpartition(":")[2])
        assert read_line(started.process) == ""
        if lifetime:
            assert steal("127.0.0.2", port) == "EADDRINUSE"
        else:
            assert wait_for(lambda: steal("127.0.0.2", port) == "stolen")  # another process may be given the number first
        tell(started.process, "")


@pytest.mark.parametrize(
    "words",
    [["-H", "guard", "--", "true"], ["-H", "guard", "--", *PLAIN], ["-H", "guard", "--", "sh", "-c", "kill -TERM $$"]],
    ids=["true", "served", "killed"],
)
def test_what_ended_well_is_not_talked_about(words: list[str]) -> None:
    assert re.fullmatch(r"portexec: http://127\.0\.0\.1:\d+\n", run(*words).stderr)


def test_quiet_says_nothing_of_a_failure() -> None:
    assert run(*GUARD, "sh", "-c", "exit 3").stderr == ""


def test_a_failure_after_serving_is_the_commands_own() -> None:
    with running("-H", "guard", "--", *FAULTS, "serve", "127.0.0.1", "0") as started:
        started.url()
        os.kill(int(out(started).split()[2]), signal.SIGTERM)
        assert started.process.wait(DEADLINE) == 3
        assert started.process.stderr is not None
        assert started.process.stderr.read() == ""


def test_verbose_tells_the_address_that_was_really_bound() -> None:
    with running("-v", "-H", "guard", "--", *FAULTS, "serve", "::1", "0") as started:
        port = started.url().rpartition(":")[2]
        started.line(rf"^portexec: the command listens on \[::1\]:{port}$")
        with pytest.raises(ConnectionRefusedError):
            answer(int(port))
        assert answer(int(port), "::1") == port
