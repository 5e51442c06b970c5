"""A signal, no more descriptors, or no more memory, at every moment of a run. Nothing hangs, and nothing is left.

A moment is just before a call of portexec's own that may enter the kernel, in any of its processes; tests/children/moment.py
makes things happen there. A run has some hundred moments, and each is tried in a run of its own. So one of many is tried, the
same ones every time. PORTEXEC_MOMENTS=all tries all of them, and PORTEXEC_MOMENTS=7 those of another seed, 7.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import DEADLINE, child, status_of, wait_for
from tests.support.proc import processes_with
from tests.support.processes import PORTEXEC

CHOSEN = os.environ.get("PORTEXEC_MOMENTS", "")
SEED = int(CHOSEN) if CHOSEN.isdecimal() else 1
STEP = 1 if CHOSEN == "all" else 47  # from one moment that is tried to the next
AT_ONCE = 2
FAILURE = 125
TIMEOUT = 124
FILES = {"port", "export", "socket"}
FRONT = "."

pytestmark = [
    pytest.mark.once,
    # Not all moments are mended yet: with no descriptor left, --then sometimes waits for its time-out.
    pytest.mark.skipif(not CHOSEN, reason="a sweep that is asked for: PORTEXEC_MOMENTS=1, or all"),
    *([pytest.mark.timeout(7200)] if STEP == 1 else []),
]

SERVER = """
import os, signal, socket, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the stderr of the test is portexec's own
if "LISTEN_FDS" not in os.environ:
    made = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
if sys.argv[1] == "stay":
    os.fork()
    signal.pause()
try:
    os.mkdir(sys.argv[1])
except FileExistsError:
    os._exit(0)
os._exit(4)
"""
STATUS = {"guard": 4, "then": 3, "restart": 0, "fd": 3}  # when nothing happens
MODES = pytest.mark.parametrize("mode", STATUS)


class Run:
    """One run in a folder of its own."""

    def __init__(self, mode: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.mode = mode
        self.folder = folder
        self.files = folder / "files"
        self.files.mkdir()
        self.mark = os.urandom(16).hex()

    def words(self) -> list[str]:
        times = ["-q", "-k", "1s", "--ready-timeout", "5s"]
        files = [*times, "--port-file", str(self.files / "port"), "--export", str(self.files / "export")]
        listen = ["-l", "web=0", "-l", f"side=unix:{self.files / 'socket'}"]
        server = ["--", sys.executable, "-S", "-c", SERVER]
        marker = str(self.folder / "was there")
        return {
            "guard": [*files, "-H", "guard", *server, marker],
            "then": [*files, "-H", "guard", "--then", "exit 3", *server, "stay"],
            "restart": [*files, "-H", "guard", "--restart", "on-failure", *server, marker],
            "fd": [*files, "-H", "fd", *listen, "--ready", "none", "--then", "exit 3", *server, "stay"],
        }[self.mode]

    @contextmanager
    def started(self, process: str, number: int, what: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """Run it, with something happening in a process at a moment; kill what is left at the end of the block."""
        words = [sys.executable, child("moment")[-1], process, str(number), what, *self.words()]
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
                    os.kill(pid, signal.SIGKILL)

    def living(self) -> set[int]:
        return processes_with(f"MARK={self.mark}")

    def is_nothing_running(self) -> bool:
        """Returns true, or says what there is."""
        assert sorted(status_of(pid)["Name"] for pid in self.living()) == []
        return True

    def left(self) -> list[str]:
        """The files that are left."""
        return sorted(path.name for path in self.files.iterdir())

    def said(self) -> str:
        return (self.folder / "errors").read_text()


class Moments:
    """All moments of a run in which nothing happens."""

    def __init__(self, mode: str, folder: Path) -> None:
        run = Run(mode, folder)
        log = folder / "moments"
        with run.started(FRONT, 0, "", MOMENTS=str(log)) as process:
            assert process.wait(DEADLINE) == STATUS[mode], run.said()
        assert run.left() == []
        self.mode = mode
        self.of: dict[str, list[str]] = {}  # by process: in which functions it is at each moment
        for line in log.read_text().splitlines():
            process_name, where = line.split(" ", 1)
            self.of.setdefault(process_name, []).append(where)
        front = self.of[FRONT]
        self.shared = max(at for at, where in enumerate(front, 1) if "share" in where.split())

    def chosen(self) -> list[tuple[str, int]]:
        """Those that are tried, of all processes."""
        every = [(name, number) for name, found in sorted(self.of.items()) for number in range(1, len(found) + 1)]
        return every[SEED % STEP :: STEP]


def wrong(moments: Moments, folder: Path, process_name: str, number: int, what: str) -> str:
    """Let something happen at a moment; say what is wrong with the outcome."""
    run = Run(moments.mode, folder)
    try:
        with run.started(process_name, number, what) as process:
            status = process.wait(DEADLINE)
            wait_for(run.is_nothing_running)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return f"{failure}".splitlines()[0] + f" ({run.said()})"
    said, left = run.said(), run.left()
    number_of_signal = getattr(signal, f"SIG{what}", None)
    is_short = what in ("full", "memory")
    usual = {STATUS[moments.mode], FAILURE}
    if is_short and process_name != FRONT:
        usual |= {1, TIMEOUT}  # a bind of the command's that could not be admitted went on without us
        usual |= {4}  # the end of the first start was told, and then there was no other
    if is_short and "." in process_name[1:]:
        usual |= {127}  # the command cannot have what it needs
    if number_of_signal is not None:
        usual |= {-number_of_signal}
    if what == "TERM":
        usual |= {0, 4}  # the first start's, where it ends by itself at the same time
    if status not in usual:
        return f"status {status}: {said}"
    is_ours = status in (FAILURE, TIMEOUT)
    if "Traceback" in said or "bug" in said or is_ours != ("portexec: error: " in said):
        return f"status {status}, said {said!r}"
    # Who was killed was the only one to know, or there is no descriptor to look at the files with.
    may_stay = process_name == FRONT and (what == "full" or (what == "KILL" and number <= moments.shared))
    left = [name for name in left if not (may_stay and (name in FILES or (what == "KILL" and name.startswith(".port."))))]
    if left:
        return f"status {status}, left {left}: {said}"
    return ""


def sweep(mode: str, what: str, folder: Path) -> dict[str, str]:
    """What is wrong, by moment."""
    moments = Moments(mode, folder / "usual")
    chosen = moments.chosen()

    def tried(at: tuple[int, tuple[str, int]]) -> str:
        position, (process_name, number) = at
        return wrong(moments, folder / str(position), process_name, number, what)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(tried, enumerate(chosen)))
    print(f"{mode}, {what}: {len(chosen)} of {sum(map(len, moments.of.values()))} moments, seed {SEED}")
    return {
        f"{name} {number} {moments.of[name][number - 1]}": problem
        for (name, number), problem in zip(chosen, found, strict=True)
        if problem
    }


# Real limits, from the beginning.

LIMITED = {
    "guard": ["-H", "guard", "--", "sh", "-c", "exit 3"],
    "then": ["-H", "guard", "--ready", "none", "--then", "exit 3", "--", "sleep", "1000"],
    "fd": ["-H", "fd", "--ready", "none", "--then", "exit 3", "--", "sleep", "1000"],
    "hold": ["-H", "hold", "--", "sh", "-c", "exit 3"],
}


def limited(mode: str, folder: Path, name: str, limit: int) -> str:
    """Run under a limit; say what is wrong with the outcome."""
    run = Run(mode, folder)
    words = [*child("limited"), name, str(limit), *PORTEXEC, "-q", "--port-file", str(run.files / "port"), *LIMITED[mode]]
    environment = {**os.environ, "MARK": run.mark}
    result = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE)
    assert wait_for(run.is_nothing_running)
    is_error = result.stderr.startswith("portexec: error: ") and "Traceback" not in result.stderr
    is_right = is_error if result.returncode == FAILURE else result.returncode == 3 and not result.stderr
    left = [] if mode == "hold" and result.returncode == 3 else run.left()  # whoever executes the command undoes nothing
    return "" if is_right and not left else f"status {result.returncode}, left {left}: {result.stderr}"


def can_start(name: str, limit: int) -> bool:
    """Whether Python, and all that portexec needs to read its words, is there under this limit."""
    words = [*child("limited"), name, str(limit), *PORTEXEC, "--version"]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE).returncode == 0


@pytest.mark.parametrize("mode", LIMITED)
@pytest.mark.parametrize(("name", "limits"), [("NOFILE", range(4, 16)), ("AS", range(13_000_000, 22_000_000, 1_000_000))])
def test_under_a_limit(mode: str, name: str, limits: range, tmp_path: Path) -> None:
    possible = [limit for limit in limits if can_start(name, limit)]
    assert possible
    found = {limit: limited(mode, tmp_path / str(limit), name, limit) for limit in possible}
    assert {limit: what for limit, what in found.items() if what} == {}


@MODES
@pytest.mark.parametrize("what", ["TERM", "KILL", "full", "memory"])
def test_at_every_moment(mode: str, what: str, tmp_path: Path) -> None:
    assert sweep(mode, what, tmp_path) == {}


def test_a_shim_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """It has no memory just when it is to stop the command, which has a child. portexec does it instead, before it ends."""
    moments = Moments("then", tmp_path / "usual")
    stops = [number for number, where in enumerate(moments.of["1"], 1) if where.startswith("kill ")]
    run = Run("then", tmp_path / "run")
    with run.started("1", stops[0], "memory") as process:
        assert process.wait(DEADLINE) in (STATUS["then"], FAILURE)
        assert run.is_nothing_running()
