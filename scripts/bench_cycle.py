#!/usr/bin/env python3
"""How long it takes to start a server, wait until it is ready, run a test of one request, and stop the server.

`portexec --then` is compared with the floor, which is the same done by hand: start the server, ask it every 10 ms until it
answers, run the test, send TERM, wait. start-server-and-test is beside it, as it comes and with its polls as quick as the
floor's. All run the same server and the same test, in turn, one of each per round. The floor and start-server-and-test need a
number: this script keeps one for each of them with a guard that gives way to SO_REUSEADDR, which costs them nothing.

Then the time from the server's readiness to the line that `--ready-fd` gets: a small server notes when its listen(2) or
accept(2) returned, on the clock that all processes share, and this script notes when it has read the line.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

from bench_common import BIN, PORTEXEC, environment, interleaved, print_table

from portexec.binding.listeners import Bound, bind_all
from portexec.binding.spec import parse_listen

APPS = Path(__file__).resolve().parent.parent / "tests" / "apps"
FLOOR = "floor"
RIVAL = "start-server-and-test"
TARGET_RATIOS = {"uvicorn": 1.1, "node": 1.3}  # to the floor
TARGET_LATENCY = 5  # milliseconds
POLL = 0.01  # seconds between two questions of the floor
DEADLINE = 60.0
START = (0.2, 0.3)  # seconds that the small servers take to start, at random so that no poll is in step with them
AT_ONCE = (0.0, 0.0)
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"

# All print the nanoseconds of the moment in which they were ready. WORDS are the seconds before and what else they need.
LISTENING = """
import os, socket, sys, time
time.sleep(float(sys.argv[1]))
made = socket.socket()
made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
made.bind(("127.0.0.1", int(os.environ["PORT"])))
made.listen()
print(time.monotonic_ns(), flush=True)
made.accept()
"""
ACCEPTING = """
import signal, socket, sys, time
time.sleep(float(sys.argv[1]))
accepted = socket.socket(fileno=int(sys.argv[2])).accept()
print(time.monotonic_ns(), flush=True)
signal.pause()
"""
ANSWERING = """
import signal, socket, sys, time
time.sleep(float(sys.argv[1]))
accepted, _ = socket.socket(fileno=int(sys.argv[2])).accept()
while b"\\r\\n\\r\\n" not in accepted.recv(1 << 16, socket.MSG_PEEK):
    pass
accepted.recv(1 << 16)
accepted.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
print(time.monotonic_ns(), flush=True)
accepted.close()
signal.pause()
"""
NOTIFYING = """
import os, signal, socket, sys, time
time.sleep(float(sys.argv[1]))
address = os.environ["NOTIFY_SOCKET"]
made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
made.connect("\\0" + address[1:] if address.startswith("@") else address)
made.sendall(b"READY=1")
print(time.monotonic_ns(), flush=True)
signal.pause()
"""
WRITING = """
import os, signal, sys, time
time.sleep(float(sys.argv[1]))
os.write(int(sys.argv[2]), b"{}\\n")
print(time.monotonic_ns(), flush=True)
signal.pause()
"""


class Way:
    """A way to become ready: portexec's options, the small server, and between what times it is ready."""

    def __init__(
        self, options: str, program: str, word: str = "", start: tuple[float, float] = START, *, has_target: bool = False
    ) -> None:
        self.options = options.split()
        self.program = program
        self.word = word
        self.start = start
        self.has_target = has_target

    def words(self) -> list[str]:
        """Those of the server."""
        return [sys.executable, "-c", self.program, f"{random.uniform(*self.start):.4f}", *[self.word] * bool(self.word)]


WAYS = {
    "guard, listen": Way("-H guard --ready listen", LISTENING, has_target=True),
    "fd, accept": Way("-H fd --ready accept", ACCEPTING, "{fd}", has_target=True),
    "hold, listen": Way("-H hold --ready listen", LISTENING),
    "fd, http": Way("-H fd --ready http", ANSWERING, "{fd}"),
    "fd, notify": Way("-H fd --ready notify", NOTIFYING),
    "guard, listen at once": Way("-H guard --ready listen", LISTENING, start=AT_ONCE),
}


class Server:
    """A server: its words, with `{port}` or `{fd}` for what it gets from portexec, and those for a number."""

    def __init__(self, words: Sequence[str], *, got: Sequence[str], number: Sequence[str]) -> None:
        self.program = words[0]
        self.by_portexec = [*words, *got]
        self._by_number = [*words, *number]

    def by_number(self, port: int) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self._by_number]


def servers() -> dict[str, Server]:
    uvicorn = [str(BIN / "uvicorn"), "asgi:app", "--log-level", "warning"]
    number = ["--port", "{port}"]
    return {
        "uvicorn, by descriptor": Server(uvicorn, got=["--fd", "{fd}"], number=number),
        "uvicorn, by number": Server(uvicorn, got=number, number=number),
        "node, by number": Server(["node", "server.js"], got=[], number=[]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each form has its turn (default %(default)s)")
    parser.add_argument("--starts", type=int, default=100, help="of each small server, for the latency (default %(default)s)")
    chosen = parser.parse_args()
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load average {load} at the beginning")
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(shutil.copytree(APPS, Path(directory, "apps")))
        print(f"\nSeconds of the whole cycle, {chosen.rounds} rounds; the test is {' '.join(test_words('URL'))}.\n")
        rows = [row for name, server in servers().items() for row in cycle_rows(name, server, chosen.rounds)]
        print_table(["", "median", "least", "to the floor", "target"], rows)
        compare_latencies(chosen.starts)


def test_words(url: str) -> list[str]:
    """The test: one request, which fails unless it is answered well."""
    if shutil.which("curl"):
        return ["curl", "-sf", url]
    script = "import sys, urllib.request as r; r.urlopen(sys.argv[1]).read()"
    return [sys.executable, "-c", f'"{script}"', url]


def cycle_rows(name: str, server: Server, rounds: int) -> list[list[str]]:
    if shutil.which(server.program) is None:
        return [[name, "not installed", "", "", ""]]
    rows = []
    with guarded(2) as (of_floor, of_rival):
        subjects = {
            FLOOR: lambda: by_hand(server.by_number(of_floor), of_floor),
            "portexec --then": cycle([PORTEXEC, "-q", "--then", " ".join(test_words("{url}")), "--", *server.by_portexec]),
            "portexec --then --ready http": cycle(
                [PORTEXEC, "-q", "--then", " ".join(test_words("{url}")), "--ready", "http", "--", *server.by_portexec]
            ),
        }
        if shutil.which(RIVAL):
            words = rival_words(server, of_rival)
            subjects[RIVAL] = cycle(words, PORT=str(of_rival))
            subjects[f"{RIVAL}, polling quickly"] = cycle(words, PORT=str(of_rival), WAIT_ON_INTERVAL=f"{POLL * 1e3:.0f}")
        else:
            rows = [[f"{name}: {RIVAL}", "not installed", "", "", ""]]
        for run in subjects.values():
            run()
        results = interleaved(rounds, subjects)
    floor = median(results[FLOOR])
    return [cycle_row(f"{name}: {form}", times, floor) for form, times in results.items()] + rows


def cycle_row(name: str, times: Sequence[float], floor: float) -> list[str]:
    target = f"<= {TARGET_RATIOS[name.partition(',')[0]]}" if name.endswith("portexec --then") else ""
    return [name, f"{median(times):.3f}", f"{min(times):.3f}", f"{median(times) / floor:.2f}", target]


def rival_words(server: Server, port: int) -> list[str]:
    url = f"http://127.0.0.1:{port}/"
    return [RIVAL, " ".join(server.by_number(port)), f"http-get://127.0.0.1:{port}/", " ".join(test_words(url))]


@contextmanager
def guarded(count: int) -> Iterator[list[int]]:
    """So many numbers that only those get who name them and set SO_REUSEADDR, which servers do."""
    bound: Bound = bind_all(parse_listen(["127.0.0.1:0"] * count), listening=False)
    try:
        bound.open_to_reusers()
        yield [listener.port for listener in bound.listeners]
    finally:
        bound.close()


def cycle(words: Sequence[str], **variables: str) -> Callable[[], float]:
    """A function that runs a program which does the whole cycle, and says for how many seconds."""

    def run() -> float:
        begin = time.perf_counter()
        with started(words, **variables) as process:
            status = ended(process)
        elapsed = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{' '.join(words)}: ended with {status}")
        return elapsed

    return run


def by_hand(words: Sequence[str], port: int) -> float:
    """The whole cycle as a careful person would write it; its seconds."""
    begin = time.perf_counter()
    with started(words, PORT=str(port)) as server:
        while not answers(port):
            if server.poll() is not None or time.perf_counter() > begin + DEADLINE:
                raise RuntimeError(f"{' '.join(words)}: did not start")
            time.sleep(POLL)
        with started(["sh", "-c", " ".join(test_words(f"http://127.0.0.1:{port}/"))]) as test:
            if ended(test):
                raise RuntimeError("the test failed")
        server.terminate()
        ended(server)
    return time.perf_counter() - begin


def ended(process: subprocess.Popen[bytes]) -> int:
    """The status of a process, as soon as it has one: `Popen.wait` with a time limit looks every 50 ms only."""
    pidfd = os.pidfd_open(process.pid)
    try:
        if not select.select([pidfd], [], [], DEADLINE)[0]:
            raise RuntimeError(f"{process.args!r}: does not end")
    finally:
        os.close(pidfd)
    return process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
            connection.sendall(REQUEST)
            return bool(connection.recv(1 << 16))
    except OSError:
        return False


@contextmanager
def started(words: Sequence[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; if the block fails, so that it is left running, the group is killed."""
    process = subprocess.Popen(
        words,
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        process.wait()


def compare_latencies(starts: int) -> None:
    """From the moment of readiness, as the server knows it, to the line that tells of it."""
    subjects: dict[str, Callable[[], float]] = {name: latency(way) for name, way in WAYS.items()}
    subjects["a pipe, without portexec"] = pipe_latency
    for run in subjects.values():
        run()
    results = interleaved(starts, subjects)
    rows = []
    for name, times in results.items():
        target = f"< {TARGET_LATENCY}" if name in WAYS and WAYS[name].has_target else ""
        rows.append([name, f"{median(times):.2f}", f"{quantiles(times, n=20)[-1]:.2f}", f"{max(times):.2f}", target])
    print(
        f"\nMilliseconds from readiness to the line of --ready-fd, {starts} starts of a server that takes {START[0]} to\n"
        f"{START[1]} s; one that listens at once is ready before portexec itself is. Below 0: the line was read before the\n"
        "system call had returned to the server; with guard it is portexec that answers the call.\n"
    )
    print_table(["hand-off, --ready", "median", "95th percentile", "most", "target"], rows)


def latency(way: Way) -> Callable[[], float]:
    """A function that starts the small server under portexec and returns milliseconds."""

    def run() -> float:
        reader, writer = os.pipe()
        return told([PORTEXEC, "-q", *way.options, "--ready-fd", str(writer), "--", *way.words()], reader, writer)

    return run


def pipe_latency() -> float:
    """The same with a server that writes the line itself: what it costs this script to read one."""
    reader, writer = os.pipe()
    return told(Way("", WRITING, str(writer)).words(), reader, writer)


def told(words: Sequence[str], reader: int, writer: int) -> float:
    """Milliseconds from the moment that the server prints to the one in which its line was read here."""
    process = subprocess.Popen(
        words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[writer], start_new_session=True
    )
    os.close(writer)
    try:
        line = os.read(reader, 1 << 16)
        heard = time.monotonic_ns()
        assert process.stdout is not None
        stamp = process.stdout.readline()
        if not line or not stamp:
            raise RuntimeError(f"{' '.join(words[:8])}: never ready")
        return (heard - int(stamp)) / 1e6
    finally:
        os.close(reader)
        process.terminate()
        process.communicate(timeout=DEADLINE)


if __name__ == "__main__":
    main()
