"""The fixture `portexec_server` at its limit: many tests, each with a server of its own, on many pytest-xdist workers.

    bench_pytest.py [--tests N] [--workers N] [COMMAND [ARG]...]

The server is the demo's FastAPI application unless a command is given. Its answer has to name its process, by which a test
knows that it talks to its own. In the middle one worker is killed, with KILL, while its server runs. Prints figures; the
status is 1 when a number was had twice, a test failed but for the one that was killed, or a process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bench_common import environment, print_table

HERE = Path(__file__).resolve().parent
DEMO = ["uvicorn", "--app-dir", str(HERE), "demo_app:app", "--log-level", "warning", "--fd", "{fd}"]
PATIENCE = 60.0  # seconds after which something that has to come is missing
MARK = "PORTEXEC_BENCH_MARK"
TESTS = """
import json, os, signal, time, urllib.request
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_own_server(number, portexec_server):
    begin = time.monotonic()
    server = portexec_server({command!r}, cwd={cwd!r})
    with urllib.request.urlopen(server.url + "/hello", timeout={patience}) as response:
        assert str(server.pid) in response.read().decode()
    if number == {tests} // 2:
        with open("victim.new", "w") as file:
            json.dump([os.getpid(), server.pid], file)
        os.rename("victim.new", "victim")
        signal.pause()
    server.stop()
    row = dict(worker=os.getpid(), pid=server.pid, port=server.port, begin=begin, end=time.monotonic())
    with open("rows", "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


def main() -> int:
    """Run the tests, kill, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = TESTS.format(tests=options.tests, command=options.command or DEMO, cwd=os.getcwd(), patience=PATIENCE)
        (place / "test_scale.py").write_text(source)
        begin = time.monotonic()
        with open(place / "output", "w") as file:
            process = start(place, options.workers, mark, file)
        gone = kill_one(process, place)
        process.wait()
        output = (place / "output").read_text()
        seconds = time.monotonic() - begin
        rows = [json.loads(line) for line in (place / "rows").read_text().splitlines()]
    left = wait_until(lambda: not marked(mark)) is None
    passed, failed = (int(found[1]) if (found := re.search(rf"(\d+) {word}", output)) else 0 for word in ("passed", "failed"))
    twice = collisions(rows)
    print_table(
        [
            "tests",
            "workers",
            "passed",
            "killed",
            "servers",
            "most at once",
            "collisions",
            "left running",
            "gone after KILL",
            "time",
        ],
        [
            [
                str(options.tests),
                str(len({row["worker"] for row in rows})),
                str(passed),
                str(failed),
                str(len({(row["pid"], row["begin"]) for row in rows})),
                str(max(sum(other["begin"] <= row["begin"] < other["end"] for other in rows) for row in rows)),
                str(twice),
                str(len(marked(mark)) if left else 0),
                f"{gone * 1000:.0f} ms",
                f"{seconds:.0f} s",
            ]
        ],
    )
    is_good = (passed, failed, twice, left) == (options.tests - 1, 1, 0, False)
    if not is_good:
        print(output)
    return 0 if is_good else 1


def start(place: Path, workers: int, mark: str, output: IO[str]) -> subprocess.Popen[bytes]:
    """Start pytest on the test file in this folder."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", "--rootdir", str(place)]
    return subprocess.Popen(
        [*words, str(place)],
        cwd=place,
        env=environment() | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def kill_one(process: subprocess.Popen[bytes], place: Path) -> float:
    """Kill the worker that offers itself. Returns the seconds until its server was gone."""
    if wait_until(lambda: (place / "victim").exists() or process.poll() is not None) is None or process.poll() is not None:
        process.terminate()
        raise SystemExit(f"no worker came to the middle:\n{(place / 'output').read_text()}")
    worker, server = json.loads((place / "victim").read_text())
    if parent_of(worker) != process.pid:
        raise SystemExit(f"{worker} is no worker of {process.pid}")
    os.kill(worker, signal.SIGKILL)
    return wait_until(lambda: not os.path.exists(f"/proc/{server}")) or float("nan")


def wait_until(condition: Callable[[], bool], patience: float = PATIENCE) -> float | None:
    """Ask until it is so. Returns the seconds that it took, or None when it never comes."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > patience:
            return None
        time.sleep(0.002)
    return time.monotonic() - begin


def parent_of(pid: int) -> int:
    """The parent's process id."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def marked(mark: str) -> list[int]:
    """The processes that were started, however indirectly, with this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def collisions(rows: list[dict[str, float]]) -> int:
    """How many pairs of servers had one number at one time."""
    return sum(
        one["port"] == other["port"] and one["begin"] < other["end"] and other["begin"] < one["end"]
        for index, one in enumerate(rows)
        for other in rows[:index]
    )


if __name__ == "__main__":
    sys.exit(main())
