#!/usr/bin/env python3
"""Many servers with a name at once: started in the background, listed, stopped; and what is left.

All of them are started at the same time with `--detach`, in a registry of their own. The time of `--list` has a target, and is
compared with a bare interpreter's. On a busy machine only the CPU time tells.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_common import PORTEXEC, print_table

TARGET_LIST = 0.3  # seconds
LOOKS = 10

SERVER = """
import os, socket
made = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    made.accept()[0].close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=200, help="how many (default 200)")
    servers = parser.parse_args().servers
    with tempfile.TemporaryDirectory() as place:
        os.environ["PORTEXEC_DIR"] = str(Path(place, "registry"))
        os.chdir(place)
        try:
            rows = measure(servers)
        finally:
            portexec("--stop", "--all", "-q")
    print_table(["", "figure", "target"], rows)


def measure(servers: int) -> list[list[str]]:
    """The rows of the table."""
    began = time.monotonic()
    words = [PORTEXEC, "--detach", "--ready-timeout", "10m"]
    command = ["--", sys.executable, "-S", "-c", SERVER]
    processes = [
        subprocess.Popen([*words, "--name", f"server{number}", *command], stdout=subprocess.PIPE, text=True)
        for number in range(servers)
    ]
    urls = [process.communicate()[0].strip() for process in processes]
    started = time.monotonic() - began
    failed = sum(process.returncode != 0 for process in processes)
    bare = times([sys.executable, "-c", ""])
    listed = times([PORTEXEC, "--list"])
    lines = portexec("--list", "-q").count("\n")
    began = time.monotonic()
    portexec("--stop", "--all", "-q")
    stopped = time.monotonic() - began
    left = portexec("--list", "--json").count('"state": "ready"') + len(running(os.environ["PORTEXEC_DIR"]))
    return [
        ["servers", str(servers), ""],
        ["failed starts", str(failed), "0"],
        ["different addresses", str(len(set(urls))), str(servers)],
        ["all started after", f"{started:.1f} s", ""],
        ["bare interpreter", f"{bare[0]:.3f} s", ""],
        ["CPU of it", f"{bare[1]:.3f} s", ""],
        ["--list", f"{listed[0]:.3f} s", f"{TARGET_LIST} s"],
        ["CPU of it", f"{listed[1]:.3f} s", ""],
        ["lines of --list -q", str(lines), str(servers)],
        ["all stopped after", f"{stopped:.1f} s", ""],
        ["left running", str(left), "0"],
    ]


def portexec(*words: str) -> str:
    """What it prints."""
    return subprocess.run([PORTEXEC, *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def times(words: list[str]) -> tuple[float, float]:
    """Seconds of one run, and of CPU time in it."""
    found = [timed(words) for _ in range(LOOKS)]
    return median(seconds for seconds, _ in found), median(cpu for _, cpu in found)


def timed(words: list[str]) -> tuple[float, float]:
    """The same of a single run."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def running(registry: str) -> list[int]:
    """The processes that were started with this registry, but for this one and its children of the moment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"PORTEXEC_DIR={registry}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


if __name__ == "__main__":
    main()
