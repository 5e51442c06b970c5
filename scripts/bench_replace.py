#!/usr/bin/env python3
"""Replaces a server under constant load, many times, and counts the requests that this cost.

Each replacement is a HUP to `portexec --restart`: a new process of the server starts on the same descriptor beside the old
one, and when it is ready the old one is told to end. It is over when a new process has answered and the old one is gone.
Beside it is the floor: the same done by hand, with the descriptor kept by this script, and the old process told to end when
the new one has answered. What fails there is the server's own doing, whoever replaces it.

A load generator in another process makes every request on a connection of its own, or with --keep-alive on eight that it keeps;
see tests/children/load.py. A server that ends closes those that are idle, and a request that was on its way then has failed.
"""

from __future__ import annotations

import argparse
import json
import os
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
from statistics import median
from typing import Any

from bench_common import BIN, PORTEXEC, environment, print_table

TESTS = Path(__file__).resolve().parent.parent / "tests"
DEADLINE = 60.0
POLL = 0.01
BY_HAND = "by hand"
BY_PORTEXEC = "portexec"

GUNICORN = [str(BIN / "gunicorn"), "--no-control-socket", "--log-level", "warning", "-b", "fd://{fd}", "wsgi:app"]
UVICORN = [str(BIN / "uvicorn"), "--log-level", "warning", "--no-access-log", "--fd", "{fd}", "asgi:app"]
HYPERCORN = [str(BIN / "hypercorn"), "--log-level", "warning", "-b", "fd://{fd}", "asgi:app"]
NODE = ["node", "drains.js", "{fd}"]
SERVERS = {
    "gunicorn, 2 sync workers": [*GUNICORN, "-w", "2"],
    "gunicorn, 4 threads": [*GUNICORN, "-k", "gthread", "--threads", "4"],
    "uvicorn": UVICORN,
    "hypercorn": HYPERCORN,
    "node": NODE,
    "node on [::]": NODE,  # where both starts share the listener
}
ON_ALL = ["-l", "*:0"]


class Site:
    """A server that is up: its number, its main process, and how that is replaced.

    `keeper` is the parent of its main processes. `begin` starts a new one, and `finish` is called when that has answered.
    """

    def __init__(self, port: int, keeper: int, begin: Callable[[], Any], finish: Callable[[], None]) -> None:
        self.port = port
        self.keeper = keeper
        self.begin = begin
        self.finish = finish

    def main_of(self, pid: int) -> int:
        """The main process that this one belongs to; 0 if there is none, or it has gone."""
        while pid > 1:
            parent = parent_of(pid)
            if parent == self.keeper:
                return pid
            pid = parent
        return 0


class Load:
    """The load generator, while it runs; what it prints goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self.output = output

    def pids(self) -> set[int]:
        """The processes that have answered so far."""
        lines = self.output.read_text().splitlines(keepends=True)
        return {int(line.split()[-1]) for line in lines if line.startswith("answered by") and line.endswith("\n")}

    def summary(self) -> dict[str, Any]:
        """Stop it and return what became of its requests."""
        self.process.communicate(timeout=DEADLINE)
        summary: dict[str, Any] = json.loads(self.output.read_text().splitlines()[-1])
        return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replacements", type=int, default=100, help="of each server (default %(default)s)")
    parser.add_argument("--rate", type=int, default=300, help="requests per second (default %(default)s)")
    parser.add_argument("--only", choices=(BY_PORTEXEC, BY_HAND), help="replace by these means only")
    parser.add_argument("--keep-alive", action="store_true", help="many requests on one connection")
    parser.add_argument("servers", nargs="*", help="whose names begin so (default: all)")
    chosen = parser.parse_args()
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load average {load} at the beginning;\n"
        f"{chosen.replacements} replacements each, at {chosen.rate} requests per second\n"
    )
    rows, reasons = [], []
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(shutil.copytree(TESTS / "apps", Path(directory, "apps")))
        for name, words in SERVERS.items():
            if (chosen.servers and not name.startswith(tuple(chosen.servers))) or shutil.which(words[0]) is None:
                continue
            for means, start in ((BY_PORTEXEC, by_portexec), (BY_HAND, by_hand)):
                if chosen.only in (None, means):
                    options = ON_ALL if "[::]" in name else []
                    with start(words, options) as site:
                        row, failures = measure(site, chosen.replacements, chosen.rate, chosen.keep_alive)
                    rows.append([f"{name}: {means}", *row])
                    reasons += [f"{name}: {means}: {count} times {failure}" for failure, count in failures.items()]
    header = ["", "replacements", "requests", "per second", "failed", "refused", "slowest ms", "seconds of one"]
    print_table(header, rows)
    print("\n" + ("\n".join(reasons) or "nothing failed"))


def measure(site: Site, count: int, rate: int, keeps: bool) -> tuple[list[str], dict[str, int]]:
    """The cells of one row, and how often it failed in which way."""
    ask(site.port)
    with loaded(site.port, rate, keeps) as load:
        wait_for(load.pids)
        times = [replace(site, load) for _ in range(count)]
        summary = load.summary()
    per_second = summary["requests"] / summary["seconds"]
    cells = [count, summary["requests"], f"{per_second:.0f}", summary["failed"], summary["refused"]]
    return [*map(str, cells), f"{summary['slowest'] * 1e3:.0f}", f"{median(times):.2f}"], summary["failures"]


def ask(port: int) -> int:
    """The process that answers on a new connection: the descriptor listens already."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while received := connection.recv(1000):
            answer += received
    return int(answer.rpartition(b" ")[2] or 0)


def replace(site: Site, load: Load) -> float:
    """One replacement, from its beginning until a new process has answered and the old one is gone; its seconds."""
    old = {site.main_of(pid) for pid in load.pids()} - {0}
    begin = time.monotonic()
    site.begin()
    wait_for(lambda: site.main_of(ask(site.port)) not in {0, *old})
    site.finish()
    wait_for(lambda: not any(map(site.main_of, old)))
    return time.monotonic() - begin


@contextmanager
def by_portexec(words: list[str], options: list[str]) -> Iterator[Site]:
    """The server below `portexec --restart`, replaced by HUP."""
    port_file = Path("port")
    port_file.unlink(missing_ok=True)
    process = start([PORTEXEC, "-q", "--restart", "on-failure", "--port-file", str(port_file), *options, "--", *words])
    try:
        port = wait_for(lambda: port_file.exists() and int(port_file.read_text()))
        yield Site(port, process.pid, lambda: process.send_signal(signal.SIGHUP), lambda: None)
    finally:
        end(process)


@contextmanager
def by_hand(words: list[str], options: list[str]) -> Iterator[Site]:
    """The server as a child of ours, on a descriptor of ours."""
    family, host = (socket.AF_INET6, "::") if options else (socket.AF_INET, "127.0.0.1")
    with socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=bool(options)) as listener:
        fd = listener.fileno()
        mine = [word.replace("{fd}", str(fd)) for word in words]
        processes = [start(mine, fd)]

        def begin() -> None:
            processes.append(start(mine, fd))

        def finish() -> None:
            processes[-2].terminate()

        try:
            yield Site(listener.getsockname()[1], os.getpid(), begin, finish)
        finally:
            for process in processes:
                end(process)


def parent_of(pid: int) -> int:
    """The parent of a living process, or 0."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state in "ZX" else int(parent)


@contextmanager
def loaded(port: int, rate: int, keeps: bool) -> Iterator[Load]:
    output = Path("load")
    words = [sys.executable, str(TESTS / "children" / "load.py"), "127.0.0.1", str(port), str(rate), *["keep"] * keeps]
    with output.open("wb") as file:
        process = subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=file, start_new_session=True)
    try:
        yield Load(process, output)
    finally:
        end(process)


def start(words: Sequence[str], fd: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=() if fd is None else (fd,),
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """TERM to the process, and KILL to what is left of its group."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(DEADLINE)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError("a replacement did not come to its end")
        time.sleep(POLL)
    return result


if __name__ == "__main__":
    main()
