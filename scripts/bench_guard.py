#!/usr/bin/env python3
"""What the hand-off `guard` costs: a bind, the start, other system calls, memory, and many numbers in one tree.

Everything is compared with the same thing done plainly, in turns, on the same machine. A plain bind of the same number is
that under the hand-off `hold`, where nothing is between the command and the kernel. What a server's throughput loses is in
bench_serving.py.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

from bench_common import PORTEXEC, environment, interleaved, print_table

DEADLINE = 60.0
TARGET_BIND = 200  # microseconds at the median
TARGET_START = 2.0
TARGET_MEMORY = 2.0
TARGET_CALL = "1.00 +- 0.02"
BINDS = 400  # in each process
CALLS = 2_000_000  # in each process
NUMBERS = 300
INTERRUPTIBLE = 5000  # binds in each process, and as many listens
BLOCKS = 20  # of the cycles

FIRST_INSTRUCTION = r"""
#include <stdio.h>
#include <time.h>
int main(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return printf("%lld\n", now.tv_sec * 1000000000LL + now.tv_nsec) < 0;
}
"""

OTHER_CALLS = r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int main(int count, char **words) {
    long calls = count > 1 ? atol(words[1]) : 1;
    if (count > 2) {
        struct sock_filter allow = {BPF_RET, 0, 0, SECCOMP_RET_ALLOW};
        struct sock_fprog program = {1, &allow};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 1;
    }
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (long i = 0; i < calls; i++) syscall(SYS_getppid);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double elapsed = (end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec);
    return printf("%f\n", elapsed / calls) < 0;
}
"""

OTHER_CALLS_IN_PYTHON = """
import os, sys, time
calls = range(int(sys.argv[1]))
begin = time.perf_counter_ns()
for _ in calls: os.getppid()
print((time.perf_counter_ns() - begin) / len(calls))
"""

# Prints pairs of nanoseconds, of bind and of listen: WORDS are address and count.
BIND = """
import json, os, socket, sys, time
host, count, port, clock, taken = sys.argv[1], int(sys.argv[2]), int(os.environ["PORT"]), time.perf_counter_ns, []
for _ in range(count):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        begin = clock()
        made.bind((host, port))
        bound = clock()
        made.listen()
        taken.append((bound - begin, clock() - bound))
print(json.dumps(taken))
"""

# Binds the numbers of all listeners and listens; prints the nanoseconds that took.
BIND_ALL = """
import os, socket, sys, time
ports = [int(os.environ[f"N{index}_PORT"]) for index in range(int(sys.argv[1]))]
made = [socket.socket() for _ in ports]
begin = time.perf_counter_ns()
for one, port in zip(made, ports):
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", port))
    one.listen()
print(time.perf_counter_ns() - begin)
"""

# Binds and listens below a timer whose handler was set without SA_RESTART. Prints how many calls failed, and those of EINTR.
INTERRUPTED = """
import errno, json, os, signal, socket, sys
count, port, found = int(sys.argv[1]), int(os.environ["PORT"]), [0, 0, 0]
signal.signal(signal.SIGALRM, lambda *_: found.__setitem__(2, found[2] + 1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def tried(call, *arguments):
    while True:
        try:
            return call(*arguments)
        except OSError as error:
            found[0] += 1
            found[1] += error.errno == errno.EINTR
            if error.errno != errno.EINTR:
                return None
for _ in range(count):
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried(made.bind, ("127.0.0.1", port))
        tried(made.listen)
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps(found))
"""

# Binds, listens and closes that often, and prints after each of the blocks the microseconds that a cycle took.
CYCLES = """
import os, socket, sys, time
blocks, block, port = int(sys.argv[1]), int(sys.argv[2]), int(os.environ["PORT"])
for _ in range(blocks):
    begin = time.perf_counter_ns()
    for _ in range(block):
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("127.0.0.1", port))
            made.listen()
    print((time.perf_counter_ns() - begin) / block / 1e3, flush=True)
    os.read(0, 1)
"""

WAITING = 'import os; os.write(1, b"ready\\n"); os.read(0, 1)'
WAITING_SERVER = """
import os, socket
made = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
os.write(1, b"ready\\n")
os.read(0, 1)
"""
WAITING_LOOP = """
import os, anyio
async def main():
    os.write(1, b"ready\\n")
    await anyio.wait_readable(0)
anyio.run(main)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often each form has its turn (default %(default)s)")
    parser.add_argument("--cycles", type=int, help="only this: what so many cycles of bind, listen and close do to the shim")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, {rounds} rounds, load average {load} at the beginning"
    )
    if arguments.cycles:
        watch_cycles(arguments.cycles)
        return
    with tempfile.TemporaryDirectory() as directory:
        compare_binds(rounds)
        compare_interrupted(max(1, rounds // 10))
        compare_starts(rounds, directory)
        compare_other_calls(rounds, directory)
        compare_memory()
        compare_many_numbers(max(3, rounds // 6))


def compare_binds(rounds: int) -> None:
    """A bind and a listen as the command sees them, in processes that do little else."""
    rows = []
    for host in [host for host in ("127.0.0.1", "0.0.0.0", "::1", "::") if has_address(host)]:
        samples: dict[str, list[list[list[int]]]] = {"guard": [], "hold": []}

        def measurement(hand_off: str, host: str, found: list[list[list[int]]]) -> Callable[[], float]:
            words = portexec(hand_off, [sys.executable, "-c", BIND, host, str(BINDS)])

            def run() -> float:
                found.append(json.loads(output_of(words)))
                return 0.0

            return run

        interleaved(max(3, rounds // 4), {name: measurement(name, host, found) for name, found in samples.items()})
        for hand_off, found in samples.items():
            rows.append([f"{host}, {'admitted' if hand_off == 'guard' else 'plain'}", *bind_row(hand_off, found)])
    print("\nMicroseconds of a bind and of a listen as the command sees them; the first ones are those of each process.\n")
    print_table(["", "bind", "target", "p99", "first", "listen", "p99", "first", "samples"], rows)


def bind_row(hand_off: str, processes: list[list[list[int]]]) -> list[str]:
    cells = []
    for which in (0, 1):
        warm = [pair[which] / 1e3 for pairs in processes for pair in pairs[1:]]
        first = median(pairs[0][which] / 1e3 for pairs in processes)
        target = [f"< {TARGET_BIND}" if hand_off == "guard" else ""] if which == 0 else []
        cells += [f"{median(warm):.1f}", *target, f"{quantiles(warm, n=100)[98]:.1f}", f"{first:.1f}"]
    return [*cells, str(sum(map(len, processes)))]


def compare_interrupted(rounds: int) -> None:
    """Below a 1 kHz timer without SA_RESTART, how many binds and listens fail. A call that was interrupted is made again."""
    found = {"guard": [0, 0, 0], "hold": [0, 0, 0]}

    def measurement(hand_off: str) -> Callable[[], float]:
        words = portexec(hand_off, [sys.executable, "-c", INTERRUPTED, str(INTERRUPTIBLE)])

        def run() -> float:
            found[hand_off] = [old + new for old, new in zip(found[hand_off], json.loads(output_of(words)), strict=True)]
            return 0.0

        return run

    interleaved(rounds, {name: measurement(name) for name in found})
    calls = 2 * rounds * INTERRUPTIBLE
    rows = []
    for hand_off, (failed, interrupted, signals) in found.items():
        name = "admitted" if hand_off == "guard" else "plain"
        rows.append([name, str(calls), str(signals), str(interrupted), f"{interrupted / calls:.3%}", str(failed - interrupted)])
    print("\nBinds and listens of a command with a 1 kHz timer whose handler does not restart calls.\n")
    print_table(["", "calls", "signals", "EINTR", "", "other failures"], rows)


def has_address(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def compare_starts(rounds: int, directory: str) -> None:
    """From just before the start of the launcher to the first instruction of the command, on the clock both share."""
    program, clock = first_instruction(directory)
    bare = [sys.executable, "-c", f"import os; os.execvp({program[0]!r}, {program!r})"]
    forms = {"bare interpreter": bare} | {f"portexec, {name}": portexec(name, program) for name in ("guard", "fd", "hold")}

    def measurement(words: list[str]) -> Callable[[], float]:
        def run() -> float:
            begin = clock()
            return int(output_of(words)) - begin

        return run

    subjects = {name: measurement(words) for name, words in forms.items()}
    for run in subjects.values():
        run()
    results = interleaved(rounds, subjects)
    plain = median(results["bare interpreter"])
    rows = []
    for name, times in results.items():
        target = f"<= {TARGET_START}" if name == "portexec, guard" else ""
        cells = [f"{median(times) / 1e6:.2f}", f"{min(times) / 1e6:.2f}", f"{median(times) / plain:.2f}", target]
        rows.append([name, *cells])
    print("\nMilliseconds to the first instruction of the command, and the ratio.\n")
    print_table(["", "median", "least", "to bare", "target"], rows)


def first_instruction(directory: str) -> tuple[list[str], Callable[[], int]]:
    """A program that prints the time of its first instruction, and the clock that it reads."""
    program = compiled(FIRST_INSTRUCTION, f"{directory}/first")
    return ([program], time.monotonic_ns) if program else (["date", "+%s%N"], time.time_ns)


def compiled(source: str, file: str) -> str:
    """A static program made of this C source; empty where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return ""
    Path(f"{file}.c").write_text(source)
    done = subprocess.run([compiler, "-O2", "-static", "-o", file, f"{file}.c"], capture_output=True)
    return "" if done.returncode else file


def compare_other_calls(rounds: int, directory: str) -> None:
    """getppid(2), which is none of our business, under the filter and without it.

    A filter of one line, which allows everything, shows what the kernel takes for having any filter at all.
    """
    program = compiled(OTHER_CALLS, f"{directory}/calls")
    calls = CALLS if program else CALLS // 10
    words = [program, str(calls)] if program else [sys.executable, "-c", OTHER_CALLS_IN_PYTHON, str(calls)]
    forms = {"bare": words, "portexec, guard": portexec("guard", words), "bare again": words}
    if program:
        forms["a filter of one line"] = [*words, "filtered"]
    results = interleaved(rounds, {name: (lambda form=form: float(output_of(form))) for name, form in forms.items()})
    rows = []
    for name, times in results.items():
        ratios = [time / plain for time, plain in zip(times, results["bare"], strict=True)]
        target = TARGET_CALL if name == "portexec, guard" else ""
        cells = [f"{median(times):.1f}", f"{min(times):.1f}", f"{median(ratios):.3f}"]
        rows.append([name, *cells, f"{min(times) / min(results['bare']):.3f}", target])
    print("\nNanoseconds of an unrelated system call, and the ratio.\n")
    print_table(["", "median", "least", "to bare", "least to least", "target"], rows)


def compare_memory() -> None:
    """Of processes that wait, all at the same time, so that they share what they can."""
    forms = {
        "bare interpreter": [sys.executable, "-c", WAITING],
        "portexec, guard": portexec("guard", [sys.executable, "-c", WAITING_SERVER]),
        "anyio and its loop": [sys.executable, "-c", WAITING_LOOP],
    }
    with ExitStack() as stack:
        pids = {name: stack.enter_context(waiting(words)) for name, words in forms.items()}
        sizes = {name: {kind: memory(pid, kind) for kind in ("Pss", "Rss")} for name, pid in pids.items()}
    plain = sizes["bare interpreter"]
    rows = []
    for name, size in sizes.items():
        target = f"<= {TARGET_MEMORY}" if name == "portexec, guard" else ""
        cells = [cell for kind in ("Pss", "Rss") for cell in (f"{size[kind] / 1024:.1f}", f"{size[kind] / plain[kind]:.2f}")]
        rows.append([name, *cells, target])
    print("\nMiB of a process that waits, and the ratio.\n")
    print_table(["", "PSS", "to bare", "RSS", "to bare", "target"], rows)


@contextmanager
def waiting(words: list[str]) -> Iterator[int]:
    """A process whose command has said `ready`, and which sleeps; yields its pid."""
    process = subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], DEADLINE)[0] or process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{words!r} did not start")
        while state_of(process.pid) != "S":
            time.sleep(0.01)
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(DEADLINE)
        process.stdout.close()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def memory(pid: int, kind: str) -> int:
    """KiB of a process, by /proc/PID/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def compare_many_numbers(rounds: int) -> None:
    """One command that binds the numbers of all listeners, one after the other."""
    names = [word for index in range(NUMBERS) for word in ("-l", f"n{index}=0")]
    words = [sys.executable, "-c", BIND_ALL, str(NUMBERS)]
    inside: dict[str, list[float]] = {"guard": [], "hold": []}

    def measurement(hand_off: str) -> Callable[[], float]:
        def run() -> float:
            begin = time.perf_counter()
            inside[hand_off].append(float(output_of(portexec(hand_off, words, names))))
            return time.perf_counter() - begin

        return run

    results = interleaved(rounds, {name: measurement(name) for name in inside})
    rows = []
    for name, times in results.items():
        each = median(inside[name]) / NUMBERS / 1e3
        rows.append([f"portexec, {name}", f"{median(times) * 1e3:.0f}", f"{median(inside[name]) / 1e6:.1f}", f"{each:.0f}"])
    print(f"\n{NUMBERS} numbers of one launch, bound by one command: milliseconds, and microseconds for each of them.\n")
    print_table(["", "whole launch", "all binds", "each"], rows)


def watch_cycles(cycles: int) -> None:
    """One command that binds, listens and closes for ever: the memory of what answers, and the time of a cycle."""
    words = portexec("guard", [sys.executable, "-c", CYCLES, str(BLOCKS), str(cycles // BLOCKS)])
    print("\nKiB (RSS) of the shim after so many cycles, and microseconds of a cycle since the line before.\n")
    print(f"{'cycles':>8}  {'memory':>6}  {'each':>7}")
    with subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, line in enumerate(process.stdout, 1):
            [shim] = children_of(process.pid)
            print(f"{number * (cycles // BLOCKS):8}  {memory(shim, 'Rss'):6}  {float(line):7.1f}", flush=True)
            process.stdin.write("\n")
            process.stdin.flush()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def portexec(hand_off: str, words: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    return [PORTEXEC, "-q", "-H", hand_off, *options, "--", *words]


def output_of(words: list[str]) -> str:
    """What a process prints. Raises RuntimeError when it fails."""
    done = subprocess.run(
        words, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:6])}: ended with {done.returncode}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
