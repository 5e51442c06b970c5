"""A signal, no more descriptors, or no more memory, at any moment of a run. Nothing hangs, and nothing is left.

A moment is just before a call of portexec's own that may enter the kernel, in any of its processes; tests/children/moment.py
makes things happen there. A run has some hundred moments, and each is tried in a run of its own. So a few of them are tried,
the same ones every time. PORTEXEC_MOMENTS=7 tries those of another seed, 7, and PORTEXEC_MOMENTS=all tries all of them.
"""

from __future__ import annotations

import compileall
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import DEADLINE, ROOT, child, status_of, wait_for
from tests.support.proc import children_of, processes_with, state
from tests.support.processes import PORTEXEC

CHOSEN = os.environ.get("PORTEXEC_MOMENTS", "1")
IS_ALL = CHOSEN == "all"
COUNT = 5  # moments that are tried of each mode and each thing that happens
AT_ONCE = 2
FAILURE = 125
TIMEOUT = 124
FRONT = "."
# A machine that stands still for some seconds is to end no run in another way: what is told to end may get no turn meanwhile.
KILL_AFTER, READY_TIMEOUT = "5s", "20s"

pytestmark = [pytest.mark.once, *([pytest.mark.timeout(7200)] if IS_ALL else [])]

SERVER = """
import _signal, _socket, os, sys  # the modules without `_` take as long as all the rest
if "LISTEN_FDS" not in os.environ:
    made = _socket.socket()
    made.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", int(os.environ["PORT"])))
    made.listen()
if sys.argv[1] == "stay":
    if sys.argv[2:] != ["alone"]:
        os.fork()
    _signal.pause()
try:
    os.mkdir(sys.argv[1])
except FileExistsError:
    os._exit(0)
os._exit(4)
"""
# Nobody answers where portexec and the shim have ended meanwhile: that is no news, and the client says nothing of it.
CLIENT = "import _socket, os; _socket.socket().connect_ex(('127.0.0.1', int(os.environ['PORT']))); os._exit(3)"
STATUS = {"guard": 4, "then": 3, "restart": 0, "fd": 3, "lazy": 3, "hold": 4}  # when nothing happens
SUPERVISED = [mode for mode in STATUS if mode != "hold"]
PUBLISHED = {"port", "export"}
SIGNALS = {"TERM", "INT", "HUP"}
SHORTAGES = {"full", "memory"}

Moment = tuple[str, int]  # a process, and which of its moments


class Expected(NamedTuple):
    """What may be when a run is over. `is_undone`: somebody was there to undo what was made and not finished."""

    statuses: set[int]
    files: set[str]
    is_undone: bool = True


class Run:
    """One run in a folder of its own. `alone`: the server has no child."""

    def __init__(self, mode: str, folder: Path, *, alone: bool = False) -> None:
        folder.mkdir(parents=True)
        self.mode = mode
        self.folder = folder
        self.files = folder / "files"
        self.files.mkdir()
        self.mark = os.urandom(16).hex()
        self.stay = ["stay", "alone"] if alone else ["stay"]

    def words(self) -> list[str]:
        times = ["-q", "-k", KILL_AFTER, "--ready-timeout", READY_TIMEOUT]
        published = ["--port-file", str(self.files / "port"), "--export", str(self.files / "export")]
        listen = ["-l", "web=0", "-l", f"side=unix:{self.files / 'socket'}"]
        silently = ["sh", "-c", 'exec "$@" 2>/dev/null', "sh"]  # the stderr of the test is portexec's own
        server = ["--", *silently, sys.executable, "-S", "-c", SERVER]
        marker = str(self.folder / "was there")
        client = shlex.join(["exec", sys.executable, "-S", "-c", CLIENT])
        return [
            *published,
            *{
                "guard": ["-q", "-k", KILL_AFTER, "-H", "guard", *server, marker],
                "then": [*times, "-H", "guard", "--then", "exit 3", *server, *self.stay],
                "restart": [*times, "-H", "guard", "--restart", "on-failure", *server, marker],
                "fd": [*times, "-H", "fd", *listen, "--ready", "none", "--then", "exit 3", *server, *self.stay],
                "lazy": [*times, "-H", "fd", *listen, "--lazy", "--ready", "none", "--then", client, *server, *self.stay],
                "hold": ["-q", "-H", "hold", *server, marker],
            }[self.mode],
        ]

    @contextmanager
    def started(self, events: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """Run it, with things happening at some moments; kill what is left at the end of the block."""
        words = [sys.executable, child("moment")[-1], events, *self.words()]
        environment = {**os.environ, **variables, "MARK": self.mark}
        stdin = subprocess.DEVNULL
        with (
            (self.folder / "errors").open("w") as log,
            subprocess.Popen(words, env=environment, stdin=stdin, stdout=log, stderr=log, text=True) as started,
        ):
            try:
                yield started
            finally:
                for pid in self.living():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def living(self) -> set[int]:
        return processes_with(f"MARK={self.mark}")

    def is_nothing_running(self) -> bool:
        """Returns true, or says what there is."""
        assert sorted(status_of(pid)["Name"] for pid in self.living()) == []
        return True

    def left(self) -> set[str]:
        """The files that are left."""
        return {path.name for path in self.files.iterdir()}

    def half_written(self) -> set[str]:
        """Those of the published files that are not whole."""
        port = self.files / "port"
        export = self.files / "export"
        is_whole = {"port": lambda: port.read_text().endswith("\n"), "export": lambda: export.read_text().endswith("\n")}
        return {name for name in self.left() & is_whole.keys() if not is_whole[name]()}

    def said(self) -> str:
        return (self.folder / "errors").read_text()


class Moments:
    """All moments of a run in which nothing happens."""

    def __init__(self, mode: str, folder: Path) -> None:
        run = Run(mode, folder)
        log = folder / "moments"
        with run.started("", MOMENTS=str(log)) as process:
            assert process.wait(DEADLINE) == STATUS[mode], run.said()
        assert run.left() == ({"port", "export"} if mode == "hold" else set())
        self.mode = mode
        self.of: dict[str, list[str]] = {}  # by process: in which functions it is at each moment
        for line in log.read_text().splitlines():
            process_name, where = line.split(" ", 1)
            self.of.setdefault(process_name, []).append(where)
        inherited = [at for at, where in enumerate(self.of[FRONT], 1) if "leave_to" in where.split()]
        self.inherited = max(inherited, default=0)  # from then on the shim knows what there is to undo

    def all(self, processes: Iterable[str]) -> list[Moment]:
        return [(name, number) for name in sorted(processes) for number in range(1, len(self.of[name]) + 1)]


@cache
def moments_of(mode: str, folder: Path) -> Moments:
    return Moments(mode, folder / f"usual {mode}")


@pytest.fixture
def moments(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Moments:
    return moments_of(mode, tmp_path_factory.getbasetemp())


def chosen(every: list[Moment], *what: str, count: int = COUNT) -> list[Moment]:
    """Those that are tried."""
    return every if IS_ALL else random.Random(" ".join((CHOSEN, *what))).sample(every, count)


def outcome(run: Run, events: str, expected: Expected) -> str:
    """Let things happen; say what is wrong with the outcome."""
    try:
        with run.started(events) as process:
            status = process.wait(DEADLINE)
            wait_for(run.is_nothing_running)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return f"{failure}".splitlines()[0] + f" ({run.said()})"
    said = run.said()
    is_ours, is_error = status in (FAILURE, TIMEOUT), "portexec: error: " in said
    if status not in expected.statuses:
        return f"status {status}: {said}"
    was_killed_after_it = is_error and status == -signal.SIGKILL
    if "Traceback" in said or "bug" in said or (is_ours != is_error and not was_killed_after_it):
        return f"status {status}, said {said!r}"
    may_stay = set() if run.mode == "hold" and is_ours else expected.files
    left = {name for name in run.left() - may_stay if expected.is_undone or not name.startswith(".")}
    half = run.half_written() if expected.is_undone else set()
    return f"status {status}, left {left}, half written {half}: {said}" if left or half else ""


def expected(moments: Moments, process_name: str, number: int, what: str) -> Expected:
    """What may be after this happened at this moment of this process."""
    statuses = {STATUS[moments.mode], FAILURE}
    if what in SHORTAGES and process_name != FRONT:
        statuses |= {1}  # a bind of the command's that could not be admitted went on without us
    if what in {*SHORTAGES, "KILL"} and process_name != FRONT:
        statuses |= {4}  # the end of the first start was told, and then there was no other
    if what in SHORTAGES and "." in process_name[1:]:
        statuses |= {127}  # the command cannot have what it needs
    if what not in SHORTAGES:
        statuses |= {-getattr(signal, f"SIG{what}")}
    if what in SIGNALS:
        statuses |= {0, 4}  # the first start's, where it ends by itself at the same time
    if what == "INT":
        statuses |= {1, -signal.SIGTERM}  # Python's own at its beginning; what a command under a lifetime is told
    if moments.mode == "hold":
        statuses |= {2} if what == "full" else set()  # the shell that is the command wants a descriptor
        return Expected(statuses, PUBLISHED, is_undone=what != "KILL")
    has_no_heir = process_name == FRONT and what == "KILL" and number <= moments.inherited
    return Expected(statuses, {"socket"} if has_no_heir else set())


def sweep(runs: list[tuple[Run, str, Expected]]) -> dict[str, str]:
    """What is wrong, by what happened."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda run: outcome(*run), runs))
    return {events: problem for (_, events, _), problem in zip(runs, found, strict=True) if problem}


@pytest.mark.parametrize("mode", STATUS)
@pytest.mark.parametrize("what", sorted({*SIGNALS, *SHORTAGES, "KILL"}))
def test_at_any_moment(mode: str, what: str, moments: Moments, tmp_path: Path) -> None:
    tried = chosen(moments.all(moments.of), mode, what)
    runs = [
        (Run(mode, tmp_path / f"{name} {number}"), f"{name}:{number}:{what}", expected(moments, name, number, what))
        for name, number in tried
    ]
    assert sweep(runs) == {}


@pytest.mark.parametrize("mode", SUPERVISED)
def test_portexec_and_a_shim_are_killed_in_turn(mode: str, moments: Moments, tmp_path: Path) -> None:
    """In any order, at any moments of both. The kernel itself ends the command then (PR_SET_PDEATHSIG), and nobody undoes."""
    shims = [name for name in moments.of if name != FRONT and "." not in name]
    fronts, others = (chosen(moments.all(names), mode, str(names)) for names in ([FRONT], shims))
    statuses = {STATUS[mode], FAILURE, -signal.SIGKILL, 4}
    expected = Expected(statuses, {*PUBLISHED, "socket"}, is_undone=False)
    runs = [
        (Run(mode, tmp_path / str(position), alone=True), f".:{front[1]}:KILL,{other[0]}:{other[1]}:KILL", expected)
        for position, (front, other) in enumerate(zip(fronts, others, strict=False))
    ]
    assert sweep(runs) == {}


@pytest.mark.parametrize("mode", ["fd", "guard"])
def test_a_child_that_fails_at_once_does_not_go_on_as_its_shim(mode: str, tmp_path: Path) -> None:
    """Its shim stands still meanwhile. A child that went on in the shim's code would talk to portexec in its place."""
    run = Run(mode, tmp_path / "run")
    with run.started("1.1:1:memory,1:close/1:STOP") as process:
        (shim,) = wait_for(lambda: [pid for pid in children_of(process.pid) if state(pid) == "T"])
        (child_of_the_shim,) = children_of(shim)
        wait_for(lambda: state(child_of_the_shim) == "Z")
        os.kill(shim, signal.SIGCONT)
        assert process.wait(DEADLINE) == FAILURE
        assert wait_for(run.is_nothing_running)
    assert run.said() == "portexec: error: cannot start the command: out of memory\n"


def test_a_shim_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """It has no memory just when it is to stop the command, which has a child. portexec does it instead, before it ends."""
    run = Run("then", tmp_path / "run")
    with run.started("1:send/1:memory") as process:
        assert process.wait(DEADLINE) in (STATUS["then"], FAILURE)
        assert run.is_nothing_running()


# Real limits, from the beginning.

LIMITED = {
    "guard": ["-H", "guard", "--", "sh", "-c", "exit 3"],
    "then": ["-H", "guard", "--ready", "none", "--then", "exit 3", "--", "sleep", "1000"],
    "fd": ["-H", "fd", "--ready", "none", "--then", "exit 3", "--", "sleep", "1000"],
    "hold": ["-H", "hold", "--", "sh", "-c", "exit 3"],
}

LITTLE = {"NOFILE": 0, "AS": 500_000}  # what Python takes from its start to our first look at how much there is
ALL = 32_000_000  # bytes on top with which every run works
STEP = 1 << 16  # bytes


def limited(mode: str, folder: Path, name: str, limit: int) -> tuple[bool, str]:
    """Run under a limit; whether it has worked, and what is wrong with the outcome."""
    run = Run(mode, folder)
    words = [*child("limited"), name, str(limit), *PORTEXEC, "-q", "--port-file", str(run.files / "port"), *LIMITED[mode]]
    environment = {**os.environ, "MARK": run.mark}
    result = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE)
    assert wait_for(run.is_nothing_running)
    has_worked = result.returncode == 3
    is_error = result.stderr.startswith("portexec: error: ") and "Traceback" not in result.stderr
    is_right = is_error if result.returncode == FAILURE else has_worked and not result.stderr
    left = [] if mode == "hold" and has_worked else run.left()  # whoever executes the command undoes nothing
    return has_worked, "" if is_right and not left else f"status {result.returncode}, left {left}: {result.stderr}"


def can_start(name: str, limit: int) -> bool:
    """Whether Python can run a part of portexec under a limit a little lower. Else it may not come to what says so."""
    words = [*child("limited"), name, str(limit - LITTLE[name]), sys.executable, "-m", "portexec.errors"]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE).returncode == 0


@cache
def lowest(name: str, limits: range) -> int:
    """The first of these limits under which Python can start."""
    compileall.compile_dir(ROOT / "portexec", quiet=1)  # short of memory, Python's compiler does not always say so
    return next(limit for limit in limits if can_start(name, limit))


@pytest.mark.parametrize("mode", LIMITED)
def test_with_few_descriptors(mode: str, tmp_path: Path) -> None:
    """From the first limit under which Python can start."""
    limits = range(lowest("NOFILE", range(4, 16)), 16)
    found = {limit: limited(mode, tmp_path / str(limit), "NOFILE", limit) for limit in limits}
    assert {limit: problem for limit, (_, problem) in found.items() if problem} == {}
    assert any(has_worked for has_worked, _ in found.values())


def test_too_few_descriptors_for_a_start_get_a_hint() -> None:
    told = []
    for limit in range(4, 16):
        words = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *PORTEXEC, "-q", "-H", "guard", "--", "true"]
        told.append(subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False).stderr)
    error = "portexec: error: cannot start the command: Too many open files\n"
    found = [said for said in told if said.startswith(error)]
    assert found
    assert set(found) == {f"{error}portexec: hint: raise the limit with `ulimit -n`\n"}


@pytest.mark.parametrize("mode", LIMITED)
def test_with_just_enough_memory_or_not(mode: str, tmp_path: Path) -> None:
    """Where the lowest limit is under which it works is found by halves."""
    low = lowest("AS", range(13_000_000, 100_000_000, 500_000))
    high = low + ALL
    assert limited(mode, tmp_path / str(high), "AS", high) == (True, "")
    while high - low > STEP:
        limit = (low + high) // 2
        has_worked, problem = limited(mode, tmp_path / str(limit), "AS", limit)
        assert not problem
        low, high = (low, limit) if has_worked else (limit, high)


def test_with_far_too_little_memory(tmp_path: Path) -> None:
    """Python may not be able to start under a limit above one under which it is: then no line of ours was reached."""
    low = lowest("AS", range(13_000_000, 100_000_000, 500_000))
    found = {limit: limited("hold", tmp_path / str(limit), "AS", limit) for limit in range(low, low + 4_000_000, 500_000)}
    wrong = {limit: what for limit, what in found.items() if what != (False, "")}
    assert {limit: what for limit, what in wrong.items() if can_start("AS", limit + LITTLE["AS"])} == {}
    assert len(wrong) < len(found)
