#!/usr/bin/env python3
"""Tries portexec in the place where this runs: a kernel, a container, a sandbox. Needs Python 3.10 and this checkout, no more.

    try_cases.py [--as UID] [--only WORD]
    try_cases.py --table NAME=FILE...       prints what was printed in several places as one table

`--as` makes portexec and its commands another user's, while thieves are a third one's; it is for root. Prints a line for each
case, its name, a tab and the outcome. The first lines are what `portexec --check` says there; the cases are held against it.

    yes         as on any Linux
    gated       yes, with a command that sets SO_REUSEADDR, as `--check` says
    weak        yes, but for thieves that set SO_REUSEADDR, as `--check` says
    refused     not to be had here, as `--check` says; portexec says so before the command starts, with status 125
    -           cannot be tried here, and why
    NO          anything else, and what was seen

try_kernels.sh and try_containers.sh run this in many places and print one table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHILDREN = ROOT / "tests" / "children"
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the package around it needs pytest

from binds import CASES, GATED_BEFORE_6_9, kernel_version  # type: ignore[import-not-found]  # noqa: E402

DEADLINE = float(os.environ.get("TRY_DEADLINE", "60"))  # seconds for one case; an emulated machine is slow
STRANGER = 65534
HAMMERED = 3000  # how often a thief names the number during restarts
YES, GATED, WEAK, REFUSED = "yes", "gated", "weak", "refused"
PLACE = "check: "  # before what --check says, which is about the place
PORTEXEC = [sys.executable, "-m", "portexec"]
LIGHT = [sys.executable, "-S", str(CHILDREN / "light.py")]
BINDER = [sys.executable, "-S", str(CHILDREN / "binder.py")]
MARK = "PORTEXEC_TRY_CASES"  # a variable by which what a case has started is known
ASK = "import sys, urllib.request; sys.exit(7 * urllib.request.urlopen(sys.argv[1]).read().startswith(b'hello'))"
TESTS = f'{sys.executable} -c "{ASK}" {{url}}'  # end with 7 when the server answers
NOT_ROOT = "-: for root, with other users"
NEEDS_ROOT = {"drop_before_socket", "drop_after_socket", "other_network"}
GATED_WITHOUT_PTRACE = {"drop_before_socket", "drop_after_socket"}  # root may not look into other users' processes
CAP_SYS_PTRACE = 1 << 19
REFUSALS = {
    "guard": "portexec: error: hand-off guard cannot be had here: ",
    "lifetime": " makes portexec stay as the parent, which it cannot here: ",
}


class Seen(Exception):  # a state: what was seen was not what was to be
    """What was seen in place of what was wanted."""


class Here:
    """The place: whose portexec runs in it, and what it says of it."""

    def __init__(self, user: int) -> None:
        self.user = user
        self.is_other = user != os.geteuid()
        done = self.run("--check", "--json")
        if done.returncode:
            raise Seen(f"--check: {done.stderr.strip()}")
        self.found: dict[str, str] = json.loads(done.stdout)

    @property
    def has_guard(self) -> bool:
        return self.found["hand_off_guard"].startswith("available")

    @property
    def is_gated(self) -> bool:
        return self.found["hand_off_guard"].startswith("available, gated")

    @property
    def has_lifetime(self) -> bool:
        return self.found["lifetime"].startswith("available")

    @property
    def is_weak(self) -> bool:
        return "weakly" in self.found["hand_off_fd"]

    def start(self, words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program as portexec's user, in a session of its own."""
        if self.is_other:
            options |= {"user": self.user, "group": self.user, "extra_groups": []}
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: "1",
        }
        return subprocess.Popen(words, env=environment, cwd="/", text=True, start_new_session=True, **options)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run portexec to its end."""
        process = self.start([*PORTEXEC, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, error = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            output, error = process.communicate()
            raise Seen(f"no end in {DEADLINE:g} s: {output} {error}") from None
        return subprocess.CompletedProcess(words, process.returncode, output, error)


class Server:
    """A portexec with a server below it that has begun to serve."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self.errors = errors
        self.pid = self.serving()

    def serving(self) -> int:
        """The pid of the server that begins to serve, or to wait, next."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, pid = line.partition(" ")
            if word in ("serving", "waiting"):
                return int(pid)
        raise Seen(f"status {self.process.wait()}, {self.said()}")

    def said(self) -> str:
        return " / ".join(self.errors.read_text().splitlines()[-2:])

    @property
    def port(self) -> int:
        """The number that was announced."""
        urls = [line.rpartition(":")[2] for line in self.errors.read_text().splitlines() if "http://" in line]
        if not urls:
            raise Seen(f"no number was told: {self.said()}")
        return int(urls[0])

    def get(self, path: str = "/") -> str:
        return get(self.port, path)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@contextmanager
def serving(here: Here, *words: str) -> Iterator[Server]:
    """Run portexec with these words for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as place:
        errors = Path(place) / "errors"
        with errors.open("w") as stream:
            process = here.start([*PORTEXEC, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stream)
        try:
            with alarm():
                yield Server(process, errors)
        finally:
            kill_group(process.pid)
            process.communicate()


@contextmanager
def alarm() -> Iterator[None]:
    """Interrupt what takes too long."""

    def ring(*_: object) -> None:
        raise Seen(f"nothing in {DEADLINE:g} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def get(port: int, path: str = "/") -> str:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer = b""
        while data := client.recv(10000):
            answer += data
    return answer.decode().rpartition("\r\n\r\n")[2]


def require(wanted: object, seen: object, what: str = "") -> None:
    if wanted != seen:
        raise Seen(f"{what}{seen!r}, not {wanted!r}")


def can_be_stranger() -> bool:
    """Whether we can make a process another user's: as root, and where there is another user."""
    try:
        return os.geteuid() == 0 and any(
            int(line.split()[2]) > 1 for line in Path("/proc/self/uid_map").read_text().splitlines()
        )
    except OSError:
        return os.geteuid() == 0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def has_mptcp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    except OSError:
        return False
    return True


def thefts(port: int, user: int, options: str) -> list[str]:
    """How a user gets a number."""
    identity = [] if user == os.geteuid() else ["--as", str(user)]
    words = [sys.executable, "-S", str(CHILDREN / "thief.py"), *identity, "all", str(port), options]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise Seen(f"thief.py: {done.stderr.splitlines()[-1:]}")
    names = ("reuse_addr", "reuse_port")
    return [
        " ".join([attempt["way"], attempt["address"], *(name for name in names if attempt[name])])
        for attempt in json.loads(done.stdout)
        if attempt["got"]
    ]


def hammered_with(here: Here, hand_off: str) -> str:
    """The options with which nobody gets it: SO_REUSEADDR passes `hold` and gates, the same user's SO_REUSEPORT a flip."""
    is_open = hand_off == "hold" or (hand_off == "guard" and here.is_gated)
    if can_be_stranger():
        return "-,p" if is_open else "-,a,p,ap"
    return "-" if is_open else "-,a"


@contextmanager
def hammering(port: int, options: str) -> Iterator[subprocess.Popen[str]]:
    """A thief who names the number again and again, a stranger where we can make one. It ends by itself."""
    identity = ["--as", str(STRANGER)] if can_be_stranger() else []
    words = [sys.executable, "-S", str(CHILDREN / "thief.py"), *identity, "hammer", str(port), str(HAMMERED), options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as thief:
        assert thief.stdout is not None
        thief.stdout.readline()
        try:
            yield thief
        finally:
            thief.kill()


def left() -> list[int]:
    """What a case has started that still runs."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if f"\0{MARK}=1\0".encode() in b"\0" + Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
            except OSError:
                pass
    return found


def is_seen() -> bool:
    """Whether /proc shows our own processes, so that `left` can tell."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def require_nothing_left() -> None:
    if not is_seen():
        return
    end = time.monotonic() + DEADLINE / 4
    while (pids := left()) and time.monotonic() < end:
        time.sleep(0.05)
    if pids:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise Seen(f"{len(pids)} processes were left")


# The cases


def admitted(here: Here, case: str) -> str:
    """A program's own bind of the number, in one of many ways."""
    if case in NEEDS_ROOT and (here.user or not can_be_stranger()):
        return NOT_ROOT
    if case == "both_families" and not has_ipv6():
        return "-: there is no ::1"
    if case == "mptcp" and not has_mptcp():
        return "-: this kernel has no MPTCP"
    words = [case, "reuse"] if here.is_gated else [case]
    done = here.run("-q", "-H", "guard", "--", *BINDER, *words)
    if not here.has_guard:
        return refusal(done, "guard")
    if done.returncode or not done.stdout:
        raise Seen(f"status {done.returncode}, {done.stderr.splitlines()[-1:]}")
    if json.loads(done.stdout) != CASES[case] and is_gated_here(case):
        done = here.run("-q", "-H", "guard", "--", *BINDER, case, "reuse")
        require(CASES[case], json.loads(done.stdout))
        return GATED
    require(CASES[case], json.loads(done.stdout))
    return GATED if here.is_gated else YES


def is_gated_here(case: str) -> bool:
    """Whether we can get no duplicate of this case's socket, where we get those of others."""
    if case in GATED_WITHOUT_PTRACE:
        return not may_trace()
    return case in GATED_BEFORE_6_9 and kernel_version() < (6, 9)


def may_trace() -> bool:
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(fields["CapEff"], 16) & CAP_SYS_PTRACE)


def refusal(done: subprocess.CompletedProcess[str], what: str) -> str:
    if done.returncode != 125 or REFUSALS[what] not in done.stderr.splitlines()[0]:
        raise Seen(f"not refused: status {done.returncode}, {done.stderr.strip()}")
    return REFUSED


def served(here: Here, hand_off: str) -> str:
    """A server answers, ends when it is told to, and leaves nothing."""
    words = ["-H", hand_off, "--", *LIGHT]
    if hand_off == "guard" and not here.has_guard:
        return refusal(here.run(*words), "guard")
    with serving(here, *words) as server:
        require(f"hello from {server.pid}", server.get())
        require(-signal.SIGTERM, server.end(), "status ")
    require_nothing_left()
    return GATED if here.is_gated and hand_off in ("guard", "auto") else YES


def stolen(here: Here, hand_off: str, word: str, user: int, options: str) -> str:
    """Nobody else gets the number, before the server has it (`silent`), or while it serves."""
    if user != here.user and not can_be_stranger():
        return NOT_ROOT
    if hand_off == "guard" and not here.has_guard:
        return REFUSED
    is_weak = hand_off == "fd" and here.is_weak
    if is_weak:
        options = "-,p"
    words = [word] if word == "silent" else []
    with serving(here, "-H", hand_off, "--", *LIGHT, *words) as server:
        if got := thefts(server.port, user, options):
            raise Seen(f"got it in {len(got)} ways: {', '.join(got[:3])}")
    return WEAK if is_weak else YES


def then(here: Here, hand_off: str) -> str:
    """Tests run when the server is ready, and their status is ours. Nothing is left, not even what has left the session."""
    command = ["sh", "-c", 'setsid sleep 1000 & exec "$@"', "sh", *LIGHT]
    done = here.run("-H", hand_off, "--then", TESTS, "--", *command)
    if not here.has_lifetime:
        return refusal(done, "lifetime")
    if hand_off == "guard" and not here.has_guard:
        return refusal(done, "guard")
    require((7, ""), (done.returncode, error_in(done.stderr)))
    require_nothing_left()
    return GATED if here.is_gated and hand_off == "guard" else YES


def error_in(text: str) -> str:
    """What was said but the number, and that somebody waits for it."""
    return " / ".join(line for line in text.splitlines() if "http://" not in line and ": waiting for " not in line)


def restarted(here: Here, hand_off: str) -> str:
    """The server ends and is started again, with the same number, while strangers try to get it."""
    words = ["--restart", "always", "-H", hand_off, "--", *LIGHT]
    if not here.has_lifetime:
        return refusal(here.run(*words), "lifetime")
    if hand_off == "guard" and not here.has_guard:
        return refusal(here.run(*words), "guard")
    with serving(here, *words) as server, hammering(server.port, hammered_with(here, hand_off)) as thief:
        for _ in range(2):
            require("", server.get("/exit/3"))
            pid = server.serving()
            require(f"hello from {pid}", server.get())
        require([], json.loads(thief.communicate()[0])["got"], "stolen: ")
        server.end()
    require_nothing_left()
    return GATED if here.is_gated and hand_off == "guard" else YES


def killed(here: Here) -> str:
    """KILL of portexec leaves nothing running."""
    words = ["--restart", "always", "-H", "fd", "--", *LIGHT]
    if not here.has_lifetime:
        return refusal(here.run(*words), "lifetime")
    with serving(here, *words) as server:
        server.end(signal.SIGKILL)
        require_nothing_left()
    return YES


def replaced(here: Here) -> str:
    """HUP replaces the server; the socket stays."""
    words = ["--restart", "always", "-H", "fd", "--", *LIGHT]
    if not here.has_lifetime:
        return refusal(here.run(*words), "lifetime")
    with serving(here, *words) as server:
        server.process.send_signal(signal.SIGHUP)
        pid = server.serving()
        while server.get() != f"hello from {pid}":
            pass
        server.end()
    require_nothing_left()
    return YES


def lazy(here: Here) -> str:
    """The server starts at the first connection."""
    words = ["--lazy", "-H", "fd", "--port-file", "{}", "--", *LIGHT]
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        file = Path(place) / "port"
        words = [word.format(file) for word in words]
        if not here.has_lifetime:
            return refusal(here.run(*words), "lifetime")
        with alarm():
            process = here.start([*PORTEXEC, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                while not file.exists() and process.poll() is None:
                    time.sleep(0.05)
                if not file.exists():
                    raise Seen((process.communicate()[1] or "").strip())
                require("hello", get(int(file.read_text())).split()[0])
            finally:
                process.terminate()
                process.communicate()
        require(False, file.exists(), "the port file is there: ")
    require_nothing_left()
    return YES


def remapped(here: Here) -> str:
    """A program with a number of its own gets another."""
    done = here.run("-q", "--remap", "8000", "--then", TESTS, "--", *LIGHT, "port=8000")
    if not here.has_lifetime:
        return refusal(done, "lifetime")
    if not here.has_guard:
        return refusal(done, "guard")
    if here.is_gated:
        require((125, True), (done.returncode, "--remap needs pidfd_getfd(2)" in done.stderr))
        return REFUSED
    require((7, ""), (done.returncode, error_in(done.stderr)))
    return YES


def driven(here: Here) -> str:
    """`portexec.serve` in a Python program."""
    script = (
        "import portexec, sys, urllib.request\n"
        "try:\n"
        "    with portexec.serve(sys.argv[1:]) as server: print(urllib.request.urlopen(server.url).read().decode())\n"
        "except portexec.PortexecError as error: print(error)\n"
    )
    process = here.start([sys.executable, "-c", script, *LIGHT], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    said, _ = process.communicate(timeout=DEADLINE)
    if not here.has_lifetime:
        require("portexec cannot be the parent of a command here", said.partition(":")[0])
        return REFUSED
    require("hello", (said.split() or [""])[0])
    require_nothing_left()
    return YES


def cases(here: Here) -> dict[str, Callable[[], str]]:
    """The whole table, by name."""
    table: dict[str, Callable[[], str]] = {}
    for hand_off in ("fd", "guard", "hold", "auto"):
        table[f"serve {hand_off}"] = lambda h=hand_off: served(here, h)
    for hand_off, options in (("fd", "-,a,p,ap"), ("guard", "-,a,p,ap"), ("hold", "-,p")):
        for word in ("silent", "serving"):
            for who, user in (("stranger", STRANGER), ("same user", here.user)):
                name = f"theft {hand_off}, {word}, {who}"
                table[name] = lambda h=hand_off, w=word, u=user, o=options: stolen(here, h, w, u, o)
    for hand_off in ("fd", "guard", "hold"):
        table[f"--then, {hand_off}"] = lambda h=hand_off: then(here, h)
        table[f"--restart, {hand_off}"] = lambda h=hand_off: restarted(here, h)
    table |= {
        "portexec killed": lambda: killed(here),
        "HUP": lambda: replaced(here),
        "--lazy": lambda: lazy(here),
        "--remap": lambda: remapped(here),
        "portexec.serve": lambda: driven(here),
    }
    for case in CASES:
        table[f"bind {case}"] = lambda c=case: admitted(here, c)
    return table


def outcome_of(case: Callable[[], str]) -> str:
    """What came of a case, in one line."""
    try:
        return case()
    except Seen as seen:
        text = str(seen)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return "NO: " + " ".join(text.split())


def table_of(places: dict[str, list[str]]) -> Iterator[str]:
    """One table: a row for each case and a column for each place, and below it what does not fit into a word."""
    outcomes = {name: dict(line.split("\t", 1) for line in lines if "\t" in line) for name, lines in places.items()}
    rows = list(dict.fromkeys(case for found in outcomes.values() for case in found if not case.startswith(PLACE)))
    widths = [max(map(len, rows), default=0), *(max(len(name), len(REFUSED)) for name in outcomes)]
    for row in ["", *rows]:
        cells = [found.get(row, "?").partition(":")[0] if row else name for name, found in outcomes.items()]
        yield "  ".join(cell.ljust(width) for cell, width in zip([row, *cells], widths, strict=True)).rstrip()
    for name, found in outcomes.items():
        yield f"\n{name}"
        yield from (
            f"  {case}: {text}" for case, text in found.items() if case.startswith(PLACE) or text.startswith(("NO", "-"))
        )


def main() -> int:
    """Try the cases, or print a table. 1 if one of them is a NO."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", type=int, dest="user", default=os.geteuid(), metavar="UID", help="whose portexec it is")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their names")
    parser.add_argument("--table", nargs="+", metavar="NAME=FILE", help="print the table of these files")
    arguments = parser.parse_args()
    if arguments.table:
        files = {name: Path(file) for name, _, file in (word.partition("=") for word in arguments.table)}
        lines = {name: file.read_text(errors="replace").splitlines() for name, file in files.items()}
        print("\n".join(table_of(lines)))
        return int(any("\tNO" in line for found in lines.values() for line in found))
    try:
        here = Here(arguments.user)
    except Exception as error:
        print(f"{PLACE}\tNO: {error}", flush=True)
        return 1
    for name, text in here.found.items():
        print(f"{PLACE}{name}\t{text}", flush=True)
    outcomes = []
    for name, case in cases(here).items():
        if arguments.only in name:
            outcomes.append(outcome_of(case))
            print(f"{name}\t{outcomes[-1]}", flush=True)
    return int(any(outcome.startswith("NO") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
