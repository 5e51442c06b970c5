#!/usr/bin/env python3
"""What portexec's own processes cost: the CPU time of a whole run, and the memory while a server serves.

Both are compared with a bare interpreter, the one of the console script with the same flags, in turns on the same machine. CPU
time is user and system time of the whole tree, of what outlives its parent too; the command itself takes next to none.

Memory is PSS: a page that n processes share counts for 1/n in each of them. So the bare interpreter is measured beside
portexec, at the same time, and every other Python on the machine takes its share of the interpreter's code, which raises the
ratio. The last ratio is the one of a machine where nobody else runs this interpreter: the code is divided among the bare
interpreter, portexec and its server only. The processes of portexec are all below it but the commands and what these started:
the front, and a shim for the server and for the tests of --then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench_common import PORTEXEC, environment, interleaved, print_table

DEADLINE = 60.0
POLL = 0.01  # seconds between two looks
TARGET_CPU = 3.5
TARGET_MEMORY = 2.4
BARE = "bare interpreter"
READY_FD = "READY_FD"  # in the words of a run: the descriptor of which a line means that it is to be stopped

# Runs WORDS in a fresh parent, to which all that outlives its own parent comes back. Prints what the tree took.
MEASURE = """
import ctypes, json, os, resource, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
words, passed = sys.argv[1:], []
if "READY_FD" in words:
    reader, writer = os.pipe()
    passed, words[words.index("READY_FD")] = [writer], str(writer)
process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=passed)
if passed:
    os.close(writer)
    if os.read(reader, 1):
        process.terminate()
status = process.wait()
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, used.ru_utime + used.ru_stime]))
"""

# Serves on $PORT and takes no CPU time of its own to start.
LISTENING = r"""
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <unistd.h>
int main(void) {
    const char *port = getenv("PORT");
    int made = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    struct sockaddr_in address = {AF_INET, htons(port ? atoi(port) : 0), {htonl(INADDR_LOOPBACK)}};
    setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(made, (struct sockaddr *) &address, sizeof address) || listen(made, 16)) return 1;
    for (;;) close(accept(made, 0, 0));
}
"""

# Answers each connection with its pid, on $PORT or on the descriptor that is its word.
SERVER = """
import os, socket, sys
if len(sys.argv) > 1:
    made = socket.socket(fileno=int(sys.argv[1]))
else:
    made = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    connection, _ = made.accept()
    try:
        connection.sendall(b"%d" % os.getpid())
    except OSError:
        pass  # portexec looked whether it is served
    connection.close()
"""
WAITING = 'import os; os.write(1, b"ready\\n"); os.read(0, 1)'
TESTS = "echo $$; exec sleep 3600"

# Options of the runs whose memory is measured.
SUPERVISED = [
    "-H guard",
    "-H guard --ready listen",
    "-H hold --ready listen",
    "-H fd --ready accept",
    *(f"-H {hand_off} --restart on-failure" for hand_off in ("guard", "hold", "fd")),
    *(f"-H {hand_off} --then" for hand_off in ("guard", "hold", "fd")),
    "-H fd --lazy",
]


class Memory(NamedTuple):
    """KiB of PSS: of a bare interpreter, of the front, and of the other processes of portexec, how many these are, and what
    all of them would have beside nobody else's."""

    bare: int
    front: int
    others: int
    how_many: int
    bare_alone: float
    own_alone: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often each run has its turn for CPU (default %(default)s)")
    parser.add_argument("--memory-rounds", type=int, default=5, help="and for memory (default %(default)s)")
    chosen = parser.parse_args()
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load average {load} at the beginning")
    with tempfile.TemporaryDirectory() as directory:
        compare_cpu(chosen.rounds, directory)
        compare_memory(chosen.memory_rounds)


def interpreter() -> list[str]:
    """The interpreter of the console script, with its flags."""
    line = Path(PORTEXEC).read_text().partition("\n")[0]
    return line.removeprefix("#!").split() if line.startswith("#!/") and "python" in line else [sys.executable]


# CPU time.


def compare_cpu(rounds: int, directory: str) -> None:
    server, note = listening_server(directory)
    forms = {
        BARE: [*interpreter(), "-c", "pass"],
        "-q -H fd -- true": [PORTEXEC, "-q", "-H", "fd", "--", "true"],
        "-q -H guard -- true": [PORTEXEC, "-q", "-H", "guard", "--", "true"],
        "-q -H guard --ready none -- true": [PORTEXEC, "-q", "-H", "guard", "--ready", "none", "--", "true"],
        f"-q -H guard --ready listen -- SERVER{note}": [
            *[PORTEXEC, "-q", "-H", "guard", "--ready", "listen", "--ready-fd", READY_FD, "--", *server],
        ],
    }
    subjects = {name: cpu_time(words) for name, words in forms.items()}
    for run in subjects.values():
        run()
    results = interleaved(rounds, subjects)
    rows = []
    for name, times in results.items():
        ratios = [time / plain for time, plain in zip(times, results[BARE], strict=True)]
        target = "" if name == BARE else f"<= {TARGET_CPU}"
        rows.append([name, f"{median(times) * 1e3:.1f}", f"{min(times) * 1e3:.1f}", f"{median(ratios):.2f}", target])
    print("\nMilliseconds of CPU time, user and system, of the whole tree; a SERVER is stopped when it is ready.\n")
    print_table(["portexec", "median", "least", "to bare", "target"], rows)


def cpu_time(words: Sequence[str]) -> Callable[[], float]:
    """A function that runs this to its end and returns the CPU seconds of the whole tree."""
    stopped = (0, 128 + signal.SIGTERM, -signal.SIGTERM) if READY_FD in words else (0,)

    def run() -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *words], env=environment(), capture_output=True, text=True, timeout=DEADLINE
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        status, seconds = json.loads(done.stdout)
        if status not in stopped:
            raise RuntimeError(f"{' '.join(words)}: ended with {status}\n{done.stderr}")
        return float(seconds)

    return run


def listening_server(directory: str) -> tuple[list[str], str]:
    """The words of a small server, and a note for the table where no compiler makes a small one."""
    file = Path(directory, "listening")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is not None:
        file.with_suffix(".c").write_text(LISTENING)
        if subprocess.run([compiler, "-O2", "-o", file, file.with_suffix(".c")], capture_output=True).returncode == 0:
            return [str(file)], ""
    return [sys.executable, "-c", SERVER], ", in Python, whose own time is in it"


# Memory.


def compare_memory(rounds: int) -> None:
    found: dict[str, list[Memory]] = {options: [] for options in SUPERVISED}
    failures: dict[str, str] = {}

    def measurement(options: str) -> Callable[[], float]:
        def run() -> float:
            if options not in failures:
                try:
                    found[options].append(memory_under(options))
                except RuntimeError as error:
                    failures[options] = str(error)
            return 0.0

        return run

    interleaved(rounds, {options: measurement(options) for options in SUPERVISED})
    print(
        "\nMiB of PSS while the server serves, and the ratio of all of portexec's own processes to a bare interpreter,\n"
        "here and where nobody else runs the interpreter.\n"
    )
    header = ["portexec", "bare", "front", "others", "how many", "to bare", "alone", "target"]
    print_table(header, [memory_row(options, samples) for options, samples in found.items() if options not in failures])
    for options, failure in failures.items():
        print(f"{options}: {failure}")


def memory_row(options: str, samples: Sequence[Memory]) -> list[str]:
    sizes = [median(sizes) / 1024 for sizes in zip(*((one.bare, one.front, one.others) for one in samples), strict=True)]
    counts = "/".join(map(str, sorted({one.how_many for one in samples})))
    here = median((one.front + one.others) / one.bare for one in samples)
    alone = median(one.own_alone / one.bare_alone for one in samples)
    return [options, *(f"{size:.1f}" for size in sizes), counts, f"{here:.2f}", f"{alone:.2f}", f"<= {TARGET_MEMORY}"]


def memory_under(options: str) -> Memory:
    """Start a server with these options beside a bare interpreter, and measure when it serves. Raises RuntimeError."""
    words = [PORTEXEC, *options.split(), *[TESTS] * options.endswith("--then"), "--", sys.executable, "-c", SERVER]
    with bare_interpreter() as bare, served(words + ["{fd}"] * ("-H fd" in options)) as (front, commands):
        wait_until_settled(front, commands)
        return measure(bare, front, commands)


def measure(bare: int, front: int, commands: set[int]) -> Memory:
    own = own_processes(front, commands)
    alone = sizes_alone([bare, *own, *commands])
    others = sum(map(kib, own[1:]))
    return Memory(kib(bare), kib(front), others, len(own) - 1, alone[bare], sum(alone[pid] for pid in own))


def wait_until_settled(front: int, commands: set[int]) -> None:
    """Return when two looks, one after the other, see the same processes with the same memory. Raises RuntimeError."""
    end = time.monotonic() + DEADLINE
    last: dict[int, int] | None = None
    while time.monotonic() < end:
        try:
            now = {pid: kib(pid, "Rss") for pid in own_processes(front, commands)}  # PSS depends on what others do
        except FileNotFoundError:  # one of them has ended meanwhile
            now = None
        if now is not None and now == last:
            return
        last = now
        time.sleep(10 * POLL)
    raise RuntimeError("its memory never stays the same")


@contextmanager
def bare_interpreter() -> Iterator[int]:
    """An interpreter that waits for its standard input; its pid."""
    words = [*interpreter(), "-c", WAITING]
    with subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{words!r} did not start")
        yield process.pid
        process.stdin.close()


@contextmanager
def served(words: Sequence[str]) -> Iterator[tuple[int, set[int]]]:
    """A portexec whose server has answered: its pid, and those of its commands."""
    process = subprocess.Popen(
        words,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        told = process.stderr.readline()
        announced = re.fullmatch(r"portexec: http://127\.0\.0\.1:(\d+)\n", told)
        if announced is None:
            raise RuntimeError(told.rstrip() or "it ended without a word")
        commands = {pid_of_server(process, int(announced[1]))}
        if TESTS in words:
            commands.add(int(process.stdout.readline()))
        yield process.pid, commands
    finally:
        process.terminate()
        try:
            process.communicate(timeout=DEADLINE)
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def pid_of_server(process: subprocess.Popen[str], port: int) -> int:
    """Ask the server until it answers."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
                if answer := connection.recv(100):
                    return int(answer)
        except OSError:
            pass
        time.sleep(POLL)
    raise RuntimeError("its server never answered")


def own_processes(front: int, commands: set[int]) -> list[int]:
    """The front and all below it, without the commands and what is below them."""
    children = children_of_all()
    found = [front]
    for pid in found:
        found += [child for child in children.get(pid, ()) if child not in commands]
    return found


def children_of_all() -> Mapping[int, list[int]]:
    """The children of every process, by /proc/PID/stat."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(read_of(int(name), "stat").rpartition(")")[2].split()[1])
        except FileNotFoundError:
            continue
        children.setdefault(parent, []).append(int(name))
    return children


def kib(pid: int, kind: str = "Pss") -> int:
    """What a process has of this, by /proc/PID/smaps_rollup."""
    lines = read_of(pid, "smaps_rollup").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def sizes_alone(pids: Sequence[int]) -> dict[int, float]:
    """KiB of PSS, as if nobody but these had mapped the files that they have. Other memory is shared among them anyway."""
    files = {pid: file_pages(pid) for pid in pids}
    users = Counter(file for mapped in files.values() for file in mapped)
    return {pid: kib(pid, "Pss_Anon") + sum(size / users[file] for file, size in files[pid].items()) for pid in pids}


def file_pages(pid: int) -> dict[str, int]:
    """KiB in memory of each mapped piece of a file, by /proc/PID/smaps, without the pages that were written to."""
    found: dict[str, int] = {}
    for line in read_of(pid, "smaps").splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # FROM-TO PERMISSIONS OFFSET DEVICE INODE [FILE]
            piece = " ".join(words[2:5]) if words[4] != "0" else ""
        elif piece and words[0] in ("Rss:", "Anonymous:"):
            found[piece] = found.get(piece, 0) + (int(words[1]) if words[0] == "Rss:" else -int(words[1]))
    return found


def read_of(pid: int, name: str) -> str:
    """A file of /proc/PID. Raises FileNotFoundError when the process has gone, at whatever moment."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except ProcessLookupError as error:
        raise FileNotFoundError from error


if __name__ == "__main__":
    main()
