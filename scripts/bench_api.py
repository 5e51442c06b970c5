"""What a server costs that `portexec.serve` starts and stops, beside Popen and polling by hand.

Ratios are of medians of interleaved rounds, on the same machine and with the same server. The rest is counted: processor time,
memory (PSS, of portexec's own processes), processes, and this program's threads and descriptors, each for one more server. At
last a suite is timed in which each test has a server of its own, on eight pytest-xdist workers.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from bench_common import environment, interleaved, print_table

import portexec
from portexec.api import host

LIGHT = [sys.executable, "-S", str(Path(__file__).resolve().parent.parent / "tests" / "children" / "light.py")]
UVICORN = [str(Path(sys.executable).parent / "uvicorn"), "demo_app:app", "--log-level", "warning"]
HERE = Path(__file__).resolve().parent
SLEEP = ["sleep", "1000"]
SUITE = """
import urllib.request
import pytest

@pytest.mark.parametrize("number", range(200))
def test_own_server(number, portexec_server):
    server = portexec_server({command!r})
    assert str(server.pid) in urllib.request.urlopen(server.url).read().decode()
"""


def free_number() -> int:
    """As helpers for tests choose one, which anybody may take before the server does."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        number: int = chosen.getsockname()[1]
        return number


def wait_for_server(number: int) -> None:
    """Connect until somebody accepts."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", number)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.005)


def by_hand(words: Callable[[int], list[str]]) -> float:
    """Start it, poll, stop it; the seconds that it took."""
    began = time.monotonic()
    number = free_number()
    with subprocess.Popen(words(number), cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for_server(number)
        process.terminate()
    return time.monotonic() - began


def served(words: list[str]) -> float:
    """The same with portexec."""
    began = time.monotonic()
    with portexec.serve(words, cwd=HERE):
        pass
    return time.monotonic() - began


def first() -> float:
    """The same, where the host has to be started, too: the one before has ended, which is not a part of this start."""
    before, host._current = host._current, None
    if before is not None:
        before.retire()
        before.process.wait()
    return served(LIGHT)


def compare(rounds: int) -> list[list[str]]:
    """The ratios."""
    light = [*LIGHT, "port={port}"]
    subjects: Mapping[str, Callable[[], float]] = {
        "light by hand": lambda: by_hand(lambda number: [*LIGHT, f"port={number}"]),
        "light, the first": first,
        "light, a further one": lambda: served(light),
        "light, by descriptor": lambda: served([*LIGHT, "fd={fd}"]),
        "uvicorn by hand": lambda: by_hand(lambda number: [*UVICORN, "--port", str(number)]),
        "uvicorn, by number": lambda: served([*UVICORN, "--port", "{port}"]),
        "uvicorn, by descriptor": lambda: served([*UVICORN, "--fd", "{fd}"]),
    }
    found = {name: statistics.median(values) for name, values in interleaved(rounds, subjects).items()}
    rows = []
    for name, seconds in found.items():
        floor = found[f"{name.partition(' ')[0].rstrip(',')} by hand"]
        rows.append([name, f"{seconds * 1000:.0f} ms", f"{seconds / floor:.2f}"])
    return rows


def pss(pid: int) -> int:
    """The proportional memory of a process, in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def processor_time(pid: int) -> float:
    """The seconds that a process, and those below it that have ended, have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def own() -> list[int]:
    """portexec's processes: the host and its shims."""
    running = host.current()
    assert running is not None
    pid = running.process.pid
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def count(number: int) -> list[str]:
    """What each of so many servers costs beyond the first."""
    with ExitStack() as stack:
        stack.enter_context(portexec.serve(SLEEP, ready="none"))
        before = [sum(map(pss, own())), len(own()), threading.active_count(), len(os.listdir("/proc/self/fd"))]
        used = sum(map(processor_time, own())) + time.process_time()
        servers = [stack.enter_context(portexec.serve(SLEEP, ready="none")) for _ in range(number)]
        after = [sum(map(pss, own())), len(own()), threading.active_count(), len(os.listdir("/proc/self/fd"))]
        memory, *counts = [(later - earlier) / number for earlier, later in zip(before, after, strict=True)]
        began = time.monotonic()
        for server in servers:
            server.stop()
        stopping = (time.monotonic() - began) / number
        used = (sum(map(processor_time, own())) + time.process_time() - used) / number
    return [
        str(number),
        f"{memory / 1024:.1f} MiB",
        f"{used * 1000:.0f} ms",
        *(f"{each:g}" for each in counts),
        f"{stopping * 1000:.1f} ms",
    ]


def suite() -> list[str]:
    """How long 200 tests take, on eight workers."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_suite.py").write_text(SUITE.format(command=[*LIGHT, "port={port}"]))
        began = time.monotonic()
        words = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-p", "no:cacheprovider", folder]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        return [done.stdout.splitlines()[-1], f"{time.monotonic() - began:.1f} s"]


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    surroundings = environment()
    os.environ.clear()
    os.environ.update(surroundings)
    print_table(["start and stop", "median", "ratio"], compare(rounds))
    print()
    header = ["servers", "PSS", "CPU", "processes", "threads", "descriptors", "stop"]
    print_table(header, [count(number) for number in (10, 50, 100)])
    print()
    print_table(["200 tests, 8 workers", "seconds"], [suite()])


if __name__ == "__main__":
    main()
