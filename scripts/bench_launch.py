#!/usr/bin/env python3
"""How long it takes to start `true` behind portexec, against the bare interpreter and against other launchers.

Measured is the wall time of the whole process, from its start to the end of `true`. The forms are run in turn, one of each per
round. The bare interpreter, `python -c` that executes `true`, is what any Python launcher costs at least. Other launchers are
run as their users run them; those that merely print a number are run in a shell that then executes the command.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from bench_common import PORTEXEC, environment, interleaved, print_table

BARE = "bare interpreter"
TARGET_RATIO = 1.3
TARGET_LISTENER = 100  # microseconds for each further listener
COUNTS = (1, 10, 100, 500)
WARM_UP = 2

OURS = {
    "portexec, fd": ["-q", "--hand-off", "fd", "--", "true"],
    "portexec, hold": ["-q", "--hand-off", "hold", "--", "true"],
    "portexec, fd, 2 listeners, -e": ["--hand-off", "fd", "-l", "a=0", "-l", "b=0", "-e", "X={a.url}", "--", "true"],
}
HAVE_TARGET = {"portexec, fd", "portexec, hold"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="how often each form is run (default %(default)s)")
    rounds = parser.parse_args().rounds
    print(f"Python {sys.version.split()[0]}, byte code caches allowed, {rounds} rounds, stderr to /dev/null\n")
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        compare_launchers(rounds)
    compare_listeners(rounds)


def compare_launchers(rounds: int) -> None:
    subjects: dict[str, Callable[[], float]] = {
        BARE: runner([sys.executable, "-c", 'import os; os.execvp("true", ["true"])']),
    }
    subjects |= {name: runner([PORTEXEC, *words]) for name, words in OURS.items()}
    peers, missing = other_launchers()
    results = measure(rounds, subjects | peers)
    bare = median(results[BARE])
    rows = []
    for name, times in results.items():
        target = f"<= {TARGET_RATIO}" if name in HAVE_TARGET else ""
        rows.append([name, f"{median(times) * 1e3:.2f}", f"{min(times) * 1e3:.2f}", f"{median(times) / bare:.2f}", target])
    rows += [[name, "not installed", "", "", ""] for name in missing]
    print_table(["", "median ms", "least ms", "to bare", "target"], rows)


def compare_listeners(rounds: int) -> None:
    forms = {count: [PORTEXEC, "-q", "-H", "fd", *["-l", "0"] * count, "--", "true"] for count in COUNTS}
    results = measure(rounds, {str(count): runner(words) for count, words in forms.items()})
    middle = {count: median(results[str(count)]) for count in COUNTS}
    least = {count: min(results[str(count)]) for count in COUNTS}
    rows = [[str(COUNTS[0]), f"{middle[COUNTS[0]] * 1e3:.2f}", "", "", "", ""]]
    for before, count in pairwise(COUNTS):
        costs = [further(middle, before, count), further(middle, COUNTS[0], count), further(least, COUNTS[0], count)]
        rows.append([str(count), f"{middle[count] * 1e3:.2f}", *costs, f"< {TARGET_LISTENER}"])
    print("\nMicroseconds for each further listener; of a few listeners it is lost in the noise of the whole.\n")
    print_table(["listeners", "median ms", "since the line above", "since the first", "by the least times", "target"], rows)


def further(times: dict[int, float], before: int, count: int) -> str:
    return f"{(times[count] - times[before]) / (count - before) * 1e6:.0f}"


def measure(rounds: int, subjects: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    for run in subjects.values():
        for _ in range(WARM_UP):
            run()
    return interleaved(rounds, subjects)


def runner(words: Sequence[str]) -> Callable[[], float]:
    """A function that runs the words once and says for how many seconds. Raises RuntimeError when they fail."""
    variables = environment()
    program = shutil.which(words[0], path=variables["PATH"]) or words[0]  # posix_spawnp looks in the PATH of this process
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]

    def run() -> float:
        begin = time.perf_counter()
        pid = os.posix_spawn(program, words, variables, file_actions=quiet)
        _, status = os.waitpid(pid, 0)
        elapsed = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{' '.join(words[:8])}: ended with {os.waitstatus_to_exitcode(status)}")
        return elapsed

    return run


def other_launchers() -> tuple[dict[str, Callable[[], float]], list[str]]:
    """The launchers that are installed here, and the names of those that are not."""
    path = environment()["PATH"]
    forms: dict[str, tuple[bool, Callable[[], float]]] = {
        "ephemeral-port-reserve": (
            shutil.which("ephemeral-port-reserve", path=path) is not None,
            runner(["sh", "-c", "PORT=$(ephemeral-port-reserve) exec true"]),
        ),
        "portpicker": (
            importlib.util.find_spec("portpicker") is not None,
            runner(["sh", "-c", f"PORT=$({sys.executable} -m portpicker $$) exec true"]),
        ),
        "honcho run": (shutil.which("honcho", path=path) is not None, runner(["honcho", "run", "true"])),
        "systemd-socket-activate": (shutil.which("systemd-socket-activate", path=path) is not None, run_socket_activate),
    }
    installed = {name: run for name, (is_there, run) in forms.items() if is_there}
    return installed, [name for name in forms if name not in installed]


def run_socket_activate() -> float:
    """It takes no port 0 and starts the command at the first connection only: give it a unix socket and connect at once."""
    path = os.path.abspath("activate.sock")
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    words = ["systemd-socket-activate", "-l", path, shutil.which("true") or "true"]
    begin = time.perf_counter()
    pid = os.posix_spawnp(words[0], words, environment(), file_actions=quiet)
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(path):
            if time.perf_counter() - begin > 10:
                os.kill(pid, 9)
                break
            os.sched_yield()
        _, status = os.waitpid(pid, 0)
    elapsed = time.perf_counter() - begin
    os.unlink(path)
    if status:
        raise RuntimeError(f"systemd-socket-activate: ended with {os.waitstatus_to_exitcode(status)}")
    return elapsed


if __name__ == "__main__":
    main()
