#!/usr/bin/env python3
"""Tells a server below portexec to stop, in every way that people and programs do, and counts the clean-ups that finish.

The server is a Node program as most are written: `process.once("SIGTERM")`, and a clean-up of half a second. A second TERM ends
it at once, and one that gets lost never ends it. Beside it is the same without portexec. Each row is a way to tell, each column
a mode, and a cell says how many of the runs finished their clean-up; then how many ended with another status than they should.

Everything runs in a PID namespace of its own, so that `killall` finds nothing else. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import PORTEXEC, environment, print_table

DEADLINE = 20.0
POLL = 0.01
IN_NAMESPACE = "PORTEXEC_TRY_IN_NAMESPACE"
PROGRAM = """
const { appendFileSync } = require("fs");
require("http").createServer((q, r) => r.end("x")).listen(+process.env.PORT, "127.0.0.1", () => appendFileSync("out", "up\\n"));
process.once("SIGTERM", () => setTimeout(() => { appendFileSync("out", "cleaned up\\n"); process.exit(0); }, 500));
"""
SERVER = "node server.js"
MODES = {
    "bare": None,
    "guard": [],
    "ready": ["--ready", "listen"],
    "restart": ["--restart", "on-failure"],
    "then": ["--then", "exec sleep 1000"],
}
RUN_ID = {"PORT": "0"}


class Run:
    """One server that was started in some way, in a directory of its own."""

    def __init__(self, directory: Path, words: list[str]) -> None:
        self.directory = directory
        (directory / "server.js").write_text(PROGRAM)
        with open(directory / "messages", "wb") as messages:
            self.process = subprocess.Popen(
                words,
                cwd=directory,
                env=environment() | RUN_ID,
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
            )

    def output(self) -> str:
        try:
            return (self.directory / "out").read_text()
        except FileNotFoundError:
            return ""

    def wait_until_up(self) -> None:
        end = time.monotonic() + DEADLINE
        while "up\n" not in self.output():
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"the server did not start: {(self.directory / 'messages').read_text()}")
            time.sleep(POLL)

    def end(self) -> int | None:
        """Its status; None if it had to be killed."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for pid in below(os.getpid()):
                kill(pid, signal.SIGKILL)
            self.process.wait()

    @property
    def pid(self) -> int:
        return self.process.pid


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def below(pid: int) -> list[int]:
    return [each for kid in children(pid) for each in (kid, *below(kid))]


def tree(run: Run) -> list[int]:
    return [run.pid, *below(run.pid)]


# How it is told.


def to_the_process(run: Run) -> None:
    run.process.terminate()


def to_the_group(run: Run) -> None:
    os.killpg(run.pid, signal.SIGTERM)


def to_each(run: Run) -> None:
    for pid in tree(run):
        kill(pid, signal.SIGTERM)


def to_each_from_below(run: Run) -> None:
    for pid in reversed(tree(run)):
        kill(pid, signal.SIGTERM)


def by(command: str) -> Callable[[Run], None]:
    """By a shell command, which knows the process as $PID."""

    def tell(run: Run) -> None:
        subprocess.run(["sh", "-c", command], env=os.environ | {"PID": str(run.pid)}, check=False, stderr=subprocess.DEVNULL)

    return tell


def done(run: Run) -> None:
    """The other command of `concurrently` ends."""
    (run.directory / "done").touch()


class Way:
    """A way to tell. `around` is the words around it all, with COMMAND for what is told; `inside` is what portexec runs."""

    def __init__(
        self,
        name: str,
        tell: Callable[[Run], None],
        *,
        around: list[str] | None = None,
        inside: str = SERVER,
        needs: tuple[str, ...] = (),
        is_bare: bool = True,
        status: int | None = None,
    ) -> None:
        self.name = name
        self.tell = tell
        self.around = around or ["sh", "-c", "exec COMMAND"]
        self.inside = inside
        self.needs = needs
        self.is_bare = is_bare
        self.status = status

    def words(self, mode: str) -> list[str]:
        options = MODES[mode]
        words = self.inside if options is None else shlex.join([PORTEXEC, "-q", *options, "--"]) + " " + self.inside
        return [word.replace("COMMAND", words) for word in self.around]


HONCHO = 'printf "web: %s\\n" "COMMAND" >Procfile; exec honcho start'
CONCURRENTLY = ["concurrently", "-k", "COMMAND", "until [ -e done ]; do sleep 0.05; done"]
WAYS = [
    Way("TERM to portexec", to_the_process),
    Way("to its group", to_the_group),
    Way("to each process", to_each),
    Way("to each, from below", to_each_from_below),
    Way("timeout", to_the_process, around=["sh", "-c", "exec timeout 1000 COMMAND"]),
    Way("honcho", to_the_process, around=["sh", "-c", HONCHO], needs=("honcho",)),
    Way("concurrently -k", done, around=CONCURRENTLY, needs=("concurrently",)),
    Way("killall portexec", by("exec killall portexec"), needs=("killall",), is_bare=False),
    Way("pidof -x portexec", by("kill $(pidof -x portexec)"), needs=("pidof",), is_bare=False),
    Way("pkill portexec", by("exec pkill portexec"), needs=("pkill",), is_bare=False),
    Way("killall node", by("exec killall node"), needs=("killall",)),
    Way("pidof node", by("kill $(pidof node)"), needs=("pidof",)),
    Way("pkill -f server.js", by("exec pkill -f server.js"), needs=("pkill",)),
    Way("pkill -P portexec", by("exec pkill -P $PID"), needs=("pkill",), is_bare=False),
    Way("behind setsid", to_the_process, inside=f"setsid {SERVER}", is_bare=False),
    Way("behind setsid, to its group", to_the_group, inside=f"setsid {SERVER}", is_bare=False),
    Way("behind sudo", to_the_process, inside=f"sudo -E {SERVER}", needs=("sudo",)),
    Way("behind sudo, to its group", to_the_group, inside=f"sudo -E {SERVER}", needs=("sudo",)),
]


def try_once(way: Way, mode: str) -> tuple[bool, bool]:
    """Whether the clean-up finished, and whether the status was the right one: 0, but for those who tell by their own."""
    with tempfile.TemporaryDirectory() as directory:
        run = Run(Path(directory), way.words(mode))
        try:
            run.wait_until_up()
            way.tell(run)
        finally:
            status = run.end()
        is_status_kept = way.around[-1] == "exec COMMAND" and mode != "then"
        return "cleaned up" in run.output(), status == 0 if is_status_kept else status is not None


def missing(way: Way) -> list[str]:
    return [name for name in way.needs if not shutil.which(name, path=environment()["PATH"])]


def cell(way: Way, mode: str, runs: int) -> str:
    if mode == "bare" and not way.is_bare:
        return "-"
    results = [try_once(way, mode) for _ in range(runs)]
    wrong = sum(not is_right for _, is_right in results)
    return f"{sum(is_clean for is_clean, _ in results)}" + (f" ({wrong})" if wrong else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--runs", type=int, default=20)
    parser.add_argument("--way", help="only the ways with this in their name")
    parser.add_argument("--mode", action="append", choices=MODES, help="only this mode; repeatable")
    arguments = parser.parse_args()
    modes = arguments.mode or list(MODES)
    if not os.environ.get(IN_NAMESPACE):
        os.environ[IN_NAMESPACE] = "yes"
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        words = ["unshare", *as_root, "--pid", "--fork", "--mount-proc", sys.executable, *sys.argv]
        os.execvp(words[0], words)
    print(f"clean-ups that finished, of {arguments.runs}; in brackets the wrong statuses\n")
    rows = []
    for way in WAYS:
        if arguments.way and arguments.way not in way.name:
            continue
        if missing(way):
            print(f"not installed: {', '.join(missing(way))}", file=sys.stderr)
            continue
        rows.append([way.name, *(cell(way, mode, arguments.runs) for mode in modes)])
        print(" ".join(rows[-1]), file=sys.stderr)
    print_table(["", *modes], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
