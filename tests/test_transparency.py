"""The wrapper is not there: a command run bare and run by portexec, from many states, compared by what the kernel says of it.

The command is `wc` reading a pipe that the test opens: while it waits, /proc tells its state, and nothing that it does itself
(as Python does, which ignores SIGPIPE and sets LC_CTYPE) blurs the picture.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, PORTEXEC, child, kill_group, status_of, wait_for
from tests.support.installed import program

# Those that replace portexec by the command come first in both; one that stays as the parent is in the first list only.
HAND_OFFS = ["fd", "guard", "hold"]
EXEC_HAND_OFFS = ["fd", "hold"]

ADDED = {
    "fd": {b"PORT", b"LISTEN_FDS", b"LISTEN_PID", b"LISTEN_PIDFDID", b"LISTEN_FDNAMES"},
    "hold": {b"PORT"},
    "guard": {b"PORT"},
}
SOCKETS = {"fd": 2, "hold": 1, "guard": 0}  # the listener and the guard; the guard; neither
DIFFERENT = {"guard": {"Seccomp", "Seccomp_filters", "NoNewPrivs"}}  # what a hand-off cannot do without

# Matters of memory and time, and what is compared elsewhere with the pids taken out.
VOLATILE = re.compile(
    r"State|Vm\w+|Rss\w+|HugetlbPages|FDSize|SigQ|\w*voluntary_ctxt_switches|Tgid|NStgid|P?Pid|NSpid|NSsid|NSpgid"
)
GROUP, SESSION, TERMINAL, FOREGROUND = 5, 6, 7, 8  # fields of /proc/PID/stat, as proc(5) numbers them
STAT_FIELDS = {"priority": 18, "nice": 19, "exit_signal": 38, "realtime_priority": 40, "policy": 41}
PLAIN_FILES = ("limits", "timerslack_ns", "personality", "oom_score_adj", "coredump_filter", "cgroup", "loginuid", "setgroups")

STREAMS = {"stdin": "in", "stdout": "out", "stderr": "out"}
WC = shutil.which("wc") or "wc"

STARTS: list[Any] = [
    pytest.param({}, id="nothing special"),
    pytest.param({"umask": 0o077}, id="umask"),
    pytest.param({"directory": "/"}, id="directory"),
    pytest.param({"removed_directory": "gone"}, id="removed directory"),
    pytest.param({"limits": {"RLIMIT_NOFILE": [128, 256], "RLIMIT_CORE": [0, 4096], "RLIMIT_CPU": [500, 600]}}, id="limits"),
    pytest.param({"limits": {"RLIMIT_NOFILE": [40, 40]}}, id="hardly any descriptors"),
    pytest.param({"block": ["SIGUSR1", "SIGTERM", "SIGINT", "SIGCHLD", "SIGRTMIN"]}, id="blocked signals"),
    pytest.param({"ignore": ["SIGHUP"]}, id="nohup"),
    pytest.param({"ignore": ["SIGINT", "SIGQUIT"]}, id="in the background of a shell without job control"),
    pytest.param({"ignore": ["SIGCHLD", "SIGTERM", "SIGUSR2", "SIGTSTP", "SIGRTMAX"]}, id="more ignored signals"),
    pytest.param({"pending": ["SIGUSR1", "SIGINT"]}, id="pending signals"),
    pytest.param({"nice": 3}, id="nice"),
    pytest.param({"batch": True}, id="scheduling policy"),
    pytest.param({"affinity": sorted(os.sched_getaffinity(0))[-1:]}, id="affinity"),
    pytest.param({"timer_slack": 123456}, id="timer slack"),
    pytest.param({"personality": 0x0040000}, id="personality without address randomization"),
    pytest.param({"oom": 700}, id="out of memory score"),
    pytest.param({"no_new_privileges": True}, id="no new privileges"),
    pytest.param({"filter": True}, id="a seccomp filter"),
    pytest.param({"session": True}, id="a session of its own"),
    pytest.param({"gid": 65534, "groups": [5, 6, 65534]}, id="groups", marks=pytest.mark.root),
    pytest.param({"drop_capability": 21}, id="fewer capabilities", marks=pytest.mark.root),
    pytest.param({"open": {"7": ["in", os.O_RDONLY, 3], "9": ["out", os.O_RDWR | os.O_APPEND, 1]}}, id="descriptors 7 and 9"),
    pytest.param({"open": {"0": ["in", os.O_RDWR | os.O_NONBLOCK, 2], "2": ["out", os.O_WRONLY, 4]}}, id="other streams"),
    pytest.param({"open": {"70": ["in", os.O_RDONLY, 3], "64": ["out", os.O_RDWR, 1]}}, id="descriptors 64 and 70"),
    *(pytest.param({"close": closed}, id=f"closed {closed}") for closed in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])),
]

ENVIRONMENTS: list[Any] = [
    pytest.param({}, id="no locale"),
    pytest.param({"LC_ALL": "C"}, id="LC_ALL=C"),
    pytest.param({"LANG": "C"}, id="LANG=C"),
    pytest.param({"LANG": "POSIX", "LC_CTYPE": ""}, id="an empty LC_CTYPE"),
    pytest.param({"LC_CTYPE": "C"}, id="LC_CTYPE=C"),
    pytest.param({"LC_CTYPE": "C.UTF-8"}, id="LC_CTYPE=C.UTF-8"),
    pytest.param({"LC_ALL": "C", "LC_CTYPE": "C.UTF-8"}, id="LC_ALL=C LC_CTYPE=C.UTF-8"),
    pytest.param({"LANG": "xx_XX.ISO-8859-15"}, id="a locale that does not exist"),
    pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, id="Python told not to coerce"),
    pytest.param({"A": "", "B": "=", "C": "a\nb", "D": "{port}", "_": "/x"}, id="odd values"),
    pytest.param({"BYTES": "\udcff\udc80", "\udcfe": "ä", "LC_ALL": "C"}, id="bytes that are no UTF-8, in the C locale"),
    pytest.param({"BYTES": "\udcff\udc80", "\udcfe": "ä", "LANG": "C.UTF-8"}, id="bytes that are no UTF-8"),
    pytest.param({"PYTHONHASHSEED": "7", "PYTHONUNBUFFERED": "1", "PYTHONHOME": ""}, id="variables of Python"),
    pytest.param({"z": "1", "a": "2", "Z": "3", "PORT_": "4", "XPORT": "5", "LISTEN": "6"}, id="order and likenesses"),
    pytest.param({"PORT": "1", "LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x"}, id="what is overwritten"),
]

ARGUMENTS = ["", " ", "\udcff\udc80", "ä", "a\nb", "--", "-n", "{", "{}", "{none}", '{"a": 1}', "$HOME", "*", "'"]


def environment(**more: str) -> dict[str, str]:
    """As little as portexec itself needs to be found, and more."""
    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ} | more


def wrapped(hand_off: str) -> list[str]:
    return [*PORTEXEC, "-q", "-H", hand_off, "--"]


def start(state: dict[str, Any], command: Sequence[str], environ: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command from that state. Its pid is the pid of the process that the state was made for."""
    told = json.dumps({"command": list(command), "environment": environ, "state": state})
    return subprocess.Popen([*child("start"), told], **options)


class Place:
    """A directory with files for the standard streams and the pipe by which the test and the command meet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pipe = directory / "pipe"
        os.mkfifo(self.pipe)
        for name in ("in", "out"):
            (directory / name).write_text("some text\n")

    @contextmanager
    def waiting(
        self,
        prefix: Sequence[str],
        state: dict[str, Any],
        environ: dict[str, str],
        arguments: Sequence[str] = (),
        **streams: Any,
    ) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """Run `wc` on the pipe; yield what was started, and the pid of `wc`, which waits for input."""
        command = [*prefix, WC, "--", *arguments, str(self.pipe)]
        with ExitStack() as opened:
            for stream, name in STREAMS.items() if not streams else ():
                streams[stream] = opened.enter_context((self.directory / name).open("rb+"))
            process = start(state, command, environ, cwd=self.directory, **streams)
        try:
            writer = wait_for(lambda: self._meet(process))
            yield process, wait_for(lambda: self._reader(process.pid))
            os.close(writer)
            process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()

    def _meet(self, process: subprocess.Popen[bytes]) -> int:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode}: {(self.directory / 'out').read_text()}")
        return os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails until somebody reads

    def _reader(self, pid: int) -> int:
        """The process with the pipe open, among this one and those below it."""
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        if str(self.pipe) in links:
            return pid
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next((found for found in map(self._reader, map(int, below)) if found), 0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def state_of(pid: int, launched: int) -> dict[str, Any]:
    """All that the kernel tells of a process, but for memory, time and its own pid. `launched` is the pid that was started."""
    directory = Path(f"/proc/{pid}")
    stat = dict(enumerate((directory / "stat").read_text().rpartition(")")[2].split(), 3))
    state: dict[str, Any] = {name: value for name, value in status_of(pid).items() if not VOLATILE.fullmatch(name)}
    state |= {name: stat[field] for name, field in STAT_FIELDS.items()}
    state["group"], state["session"] = ("launched" if stat[n] == str(launched) else stat[n] for n in (GROUP, SESSION))
    state["has terminal"] = stat[TERMINAL] != "0"
    state["in the foreground"] = stat[FOREGROUND] == stat[GROUP]
    state |= {name: _text(directory / name) for name in PLAIN_FILES}
    state |= {name: os.readlink(directory / name) for name in ("cwd", "root", "exe")}
    state |= {f"ns/{entry.name}": os.readlink(entry) for entry in (directory / "ns").iterdir()}
    state["cmdline"] = (directory / "cmdline").read_bytes()
    return state


def compared(state: dict[str, Any], hand_off: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in DIFFERENT.get(hand_off, ())}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:  # not in every kernel, and not in every process
        return errno.errorcode[error.errno or 0]


def files_of(pid: int, pipe: Path) -> dict[int, tuple[str, str, str]]:
    """The open descriptors but for the pipe of the test: what each is, with flags and position."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        link = os.readlink(entry)
        if link != str(pipe):
            info = dict(line.split(":\t") for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()[:2])
            found[int(entry.name)] = (link, info["flags"], info["pos"])
    return found


def environ_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def without(environ: list[bytes], names: set[bytes]) -> list[bytes]:
    return [entry for entry in environ if entry.partition(b"=")[0] not in names]


def is_socket(file: tuple[str, str, str]) -> bool:
    return file[0].startswith("socket:")


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("state", STARTS)
def test_state_is_the_same(place: Place, hand_off: str, state: dict[str, Any]) -> None:
    with place.waiting([], state, environment()) as (process, pid):
        bare, bare_files = state_of(pid, process.pid), files_of(pid, place.pipe)
        environ = environ_of(pid)
    with place.waiting(wrapped(hand_off), state, environment()) as (process, pid):
        assert compared(state_of(pid, process.pid), hand_off) == compared(bare, hand_off)
        files = files_of(pid, place.pipe)
        assert {fd: file for fd, file in files.items() if not is_socket(file)} == bare_files
        assert sum(map(is_socket, files.values())) == SOCKETS[hand_off]
        assert without(environ_of(pid), ADDED[hand_off]) == environ


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_the_comparison_sees_what_it_compares(place: Place, hand_off: str) -> None:
    state = {"umask": 0o123, "nice": 2, "block": ["SIGUSR1"], "ignore": ["SIGHUP"], "limits": {"RLIMIT_CORE": [0, 0]}}
    with place.waiting([], {}, environment()) as (process, pid):
        bare = state_of(pid, process.pid)
    with place.waiting(wrapped(hand_off), state, environment()) as (process, pid):
        other = state_of(pid, process.pid)
    differing = {name for name in bare if bare[name] != other[name]} - DIFFERENT.get(hand_off, set())
    assert differing == {"Umask", "nice", "priority", "SigBlk", "SigIgn", "limits"}


@pytest.mark.parametrize("hand_off", EXEC_HAND_OFFS)
def test_pid_and_parent_are_the_same(place: Place, hand_off: str) -> None:
    with place.waiting(wrapped(hand_off), {}, environment()) as (process, pid):
        assert pid == process.pid
        assert status_of(pid)["PPid"] == str(os.getpid())


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("variables", ENVIRONMENTS)
def test_environment_is_the_same_byte_for_byte(place: Place, hand_off: str, variables: dict[str, str]) -> None:
    added = ADDED["fd"] if hand_off == "fd" or "LISTEN_FDS" in variables else ADDED[hand_off]
    with place.waiting([], {}, environment(**variables)) as (_, pid):
        bare = without(environ_of(pid), added)
    with place.waiting(wrapped(hand_off), {}, environment(**variables)) as (_, pid):
        found = environ_of(pid)
    assert without(found, added) == bare
    assert {entry.partition(b"=")[0] for entry in found} - {e.partition(b"=")[0] for e in bare} <= ADDED[hand_off]


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_arguments_are_the_same_byte_for_byte(place: Place, hand_off: str, locale: str) -> None:
    with place.waiting([], {}, environment(LC_ALL=locale), ARGUMENTS) as (process, pid):
        bare = state_of(pid, process.pid)["cmdline"]
    with place.waiting(wrapped(hand_off), {}, environment(LC_ALL=locale), ARGUMENTS) as (process, pid):
        assert state_of(pid, process.pid)["cmdline"] == bare
    assert bare.split(b"\0")[2:5] == [b"", b" ", b"\xff\x80"]


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_a_sigpipe_that_the_parent_ignores_is_default(place: Place, hand_off: str) -> None:
    with place.waiting(wrapped(hand_off), {"ignore": ["SIGPIPE", "SIGXFSZ", "SIGHUP"]}, environment()) as (_, pid):
        ignored = int(status_of(pid)["SigIgn"], 16)
    assert [bool(ignored >> (number - 1) & 1) for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP)] == [
        False,
        False,
        True,
    ]


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A new pseudo-terminal: the test's end and the command's."""
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def on_terminal(place: Place, prefix: Sequence[str], act: Callable[[int, int, subprocess.Popen[bytes]], Any]) -> Any:
    """Run `wc` as the leader of a session with a controlling terminal, and let the test act on it meanwhile."""
    with terminal() as (master, slave):
        options: dict[str, Any] = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        with place.waiting(prefix, {"terminal": 0}, environment(), **options) as (process, pid):
            return act(master, pid, process)


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_terminal_is_the_same(place: Place, hand_off: str) -> None:
    def look(_: int, pid: int, process: subprocess.Popen[bytes]) -> Any:
        files = {fd: (file[0].startswith("/dev/pts/"), file[1]) for fd, file in files_of(pid, place.pipe).items() if fd < 3}
        return compared(state_of(pid, process.pid), hand_off), files

    bare = on_terminal(place, [], look)
    assert bare[0]["has terminal"]
    assert on_terminal(place, wrapped(hand_off), look) == bare


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)], ids=["INT", "QUIT"])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_keys_kill_the_command_by_their_signal(place: Place, hand_off: str, key: bytes, number: signal.Signals) -> None:
    def press(master: int, _: int, process: subprocess.Popen[bytes]) -> int:
        os.write(master, key)
        return process.wait(DEADLINE)

    assert on_terminal(place, [], press) == -number
    assert on_terminal(place, wrapped(hand_off), press) == -number


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_job_control_stops_and_continues_the_command(place: Place, hand_off: str) -> None:
    line = " ".join(f"'{word}'" for word in [*wrapped(hand_off), WC, str(place.pipe)])
    with terminal() as (master, slave):
        shell = start(
            {"terminal": 0},
            [program("bash"), "--norc", "--noprofile", "-i"],
            environment(TERM="dumb", PS1="> "),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        try:
            os.write(master, line.encode() + b"\n")
            writer = wait_for(lambda: place._meet(shell))
            pid = wait_for(lambda: place._reader(shell.pid))
            os.write(master, b"\x1a")
            wait_for(lambda: status_of(pid)["State"].startswith("T"))
            os.write(master, b"fg\n")
            wait_for(lambda: status_of(pid)["State"].startswith("S"))
            os.write(master, b"\x03")
            wait_for(lambda: not Path(f"/proc/{pid}").exists())
            os.write(master, b"exit $?\n")
            assert shell.wait(DEADLINE) == 128 + signal.SIGINT
            os.close(writer)
        finally:
            kill_group(shell.pid)
            shell.wait()


def status_after(hand_off: str, script: str, directory: Path) -> int:
    return subprocess.run([*wrapped(hand_off), "sh", "-c", script], cwd=directory, timeout=DEADLINE).returncode


@pytest.mark.once
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_every_exit_status_comes_through(tmp_path: Path, hand_off: str) -> None:
    # The hand-offs share the statuses out among them, but for those that could mean something else.
    shared = set(range(HAND_OFFS.index(hand_off), 256, len(HAND_OFFS)))
    expected = sorted(shared | {0, 1, 2, 3, *range(122, 132), 137, 143, 254, 255})
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda status: status_after(hand_off, f"exit {status}", tmp_path), expected)) == expected


HARMLESS = {"SIGCHLD", "SIGCLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU"}
DEADLY = [number for number in signal.valid_signals() if getattr(number, "name", "") not in HARMLESS]


@pytest.mark.once
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_every_death_by_signal_comes_through(tmp_path: Path, hand_off: str) -> None:
    # A core limit of 1 writes no file, and unlike 0 it keeps a crash collector behind a pipe from being started (core(5)).
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (min(1, before[0]) if before[0] >= 0 else 1, before[1]))
    try:
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(lambda number: status_after(hand_off, f"kill -{int(number)} $$", tmp_path), DEADLY))
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert statuses == [-number for number in DEADLY]
    assert signal.SIGKILL in DEADLY
