"""The cases that break launchers: make's jobserver, closed streams, no IPv6, many listeners, old connections, many at once."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portexec.binding import unix
from tests.support import DEADLINE, PORTEXEC, STRANGER, child, descriptors_of, kill_group, run, status_of, wait_for
from tests.support.binds import kernel_version
from tests.support.installed import need, program

pytestmark = pytest.mark.once

HAND_OFFS = ["fd", "guard", "hold"]
TOGETHER = pytest.mark.parametrize("hand_off", HAND_OFFS)
GUARD_INHERITED = pytest.mark.parametrize("hand_off", ["fd", "hold"])  # with guard it stays with the parent


def report_of(*words: str, **options: Any) -> dict[str, Any]:
    """What a command sees that portexec runs with these options; descriptors by number."""
    result = run("-q", *words, "--", *child("report"), **options)
    assert (result.returncode, result.stderr) == (0, "")
    return parse_report(result.stdout)


def parse_report(text: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(text)
    report["descriptors"] = {int(fd): described for fd, described in report["descriptors"].items()}
    return report


def from_state(state: dict[str, Any], *words: str, **environment: str) -> list[str]:
    """The words that start portexec from that state; see tests/children/start.py."""
    told = {"command": [*PORTEXEC, *words], "environment": {**os.environ, **environment}, "state": state}
    return [*child("start"), json.dumps(told)]


def run_from(state: dict[str, Any], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(from_state(state, *words, **environment), capture_output=True, text=True, timeout=DEADLINE)


def sockets_in(report: dict[str, Any], *, listening: bool) -> dict[int, dict[str, Any]]:
    return {fd: it for fd, it in report["descriptors"].items() if "family" in it and it["listening"] == listening}


def guarded(report: dict[str, Any]) -> set[int]:
    """The numbers that are guarded: those of the sockets that do not listen. A number may have more than one."""
    return {it["name"][1] for it in sockets_in(report, listening=False).values()}


def port_of(report: dict[str, Any]) -> int:
    return int(report["environment"]["PORT"])


class Greeter:
    """A tiny server that runs under portexec, in a process group of its own; see tests/children/greeter.py."""

    def __init__(self, words: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, *PORTEXEC, "-q", *words, "--", *child("greeter")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def first_line(self) -> str:
        """Wait until it is ready, `ready PORT`, or has ended, an empty text."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def port(self) -> int:
        """Wait until it serves."""
        word, _, number = self.first_line().partition(" ")
        assert word == "ready", self.end()
        return int(number)

    def end(self) -> tuple[int, str]:
        """Close its input, which ends it; exit status and stderr."""
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        finally:
            kill_group(self.process.pid)
        return self.process.returncode, errors


@contextmanager
def greeters() -> Iterator[Callable[..., Greeter]]:
    """A function that starts greeters; they end with the block."""
    started: list[Greeter] = []

    def start(*words: str, prefix: Sequence[str] = ()) -> Greeter:
        started.append(Greeter(words, prefix))
        return started[-1]

    try:
        yield start
    finally:
        for greeter in started:
            if greeter.process.stdin is not None and not greeter.process.stdin.closed:
                greeter.end()


def greeting_of(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        return client.makefile().read()


@contextmanager
def namespace(*setup: str) -> Iterator[list[str]]:
    """A network namespace of the test's own; yields the words that run a command in it."""
    user = [] if os.geteuid() == 0 else ["-r"]
    need(["unshare", "nsenter"])
    holder = subprocess.Popen(
        ["unshare", "-n", *user, *child("namespace"), *setup],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no network namespace here: {holder.communicate()[1].strip()}")
        as_user = ["-U", "--preserve-credentials"] if user else []
        yield ["nsenter", "-t", str(holder.pid), *as_user, "-n"]
    finally:
        holder.communicate(timeout=DEADLINE)


# make


MAKEFILE = """
all:
\t+@$(WRAP) sh -c 'echo "$$MAKEFLAGS" >flags; ls -l /proc/$$$$/fd >outer; exec $(MAKE) -s inner'
inner: left right
left:
\t@echo parallel >pipe
right:
\t@cat pipe
"""


def make_with_pipe() -> list[str]:
    """GNU make with a jobserver on descriptors, which newer ones use on request only."""
    make = shutil.which("gmake") or program("make")
    told = subprocess.run([make, "--version"], capture_output=True, text=True).stdout
    version = re.match(r"GNU Make (\d+)\.(\d+)", told)
    if not version:
        pytest.skip("needs GNU make")
    return [make, "--jobserver-style=pipe"] if tuple(map(int, version.groups())) >= (4, 4) else [make]


def test_make_jobserver_is_moved_and_still_works(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    os.mkfifo(tmp_path / "pipe")  # the two halves of the inner make can only meet when they run at the same time
    wrap = " ".join([*PORTEXEC, "-q", "-H", "fd", "--"])
    make = subprocess.Popen(
        [*make_with_pipe(), "-j2", f"WRAP={wrap}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = make.communicate(timeout=DEADLINE)
    finally:
        kill_group(make.pid)
    assert (make.returncode, output, errors) == (0, "parallel\n", "")
    auth = re.search(r"--jobserver-auth=(\d+),(\d+)", (tmp_path / "flags").read_text())
    assert auth is not None
    opened = dict(re.findall(r" (\d+) -> (\w+):", (tmp_path / "outer").read_text()))
    assert opened["3"] == "socket"
    assert [opened[number] for number in auth.groups()] == ["pipe", "pipe"]
    assert min(map(int, auth.groups())) > 3


# Standard streams


@pytest.mark.parametrize("closed", [c for n in (1, 2, 3) for c in itertools.combinations((0, 1, 2), n)], ids=str)
@pytest.mark.parametrize("limit", [1024, 30], ids=["usual limit", "hardly any descriptors"])
@TOGETHER
def test_closed_streams_stay_closed(tmp_path: Path, hand_off: str, limit: int, closed: tuple[int, ...]) -> None:
    listing = tmp_path / "listing"
    script = f"(ls -l /proc/$$/fd >{listing}); exit 7"  # in a subshell: some shells redirect for themselves
    result = run_from({"limits": {"RLIMIT_NOFILE": [limit, limit]}, "close": closed}, "-H", hand_off, "--", "sh", "-c", script)
    assert result.returncode == 7
    numbers = {int(number) for number in re.findall(r" (\d+) -> ", listing.read_text())}
    assert numbers & {0, 1, 2} == {0, 1, 2} - set(closed)
    sockets = {int(number) for number in re.findall(r" (\d+) -> socket:", listing.read_text())}
    assert len(sockets) == {"fd": 2, "guard": 0, "hold": 1}[hand_off]
    assert (3 in sockets) == (hand_off == "fd")


@TOGETHER
def test_an_error_with_stderr_closed_keeps_its_status(hand_off: str) -> None:
    result = run_from({"close": [2]}, "-H", hand_off, "-l", "127.0.0.1:70000", "--", "true")
    assert (result.returncode, result.stdout) == (125, "")


@TOGETHER
def test_a_reader_that_ends_kills_the_command_by_sigpipe(hand_off: str) -> None:
    script = f'{" ".join(PORTEXEC)} -q -H {hand_off} -- yes | head -1; echo "${{PIPESTATUS[@]}}"'
    result = subprocess.run([program("bash"), "-c", script], capture_output=True, text=True, timeout=DEADLINE)
    assert result.stdout == "y\n141 0\n"


@TOGETHER
def test_sigchld_ignored_by_the_parent(hand_off: str) -> None:
    result = run_from({"ignore": ["SIGCHLD"]}, "-q", "-H", hand_off, "--", "sh", "-c", "true; true; exit 3")
    assert (result.returncode, result.stderr) == (3, "")


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["printf", "%s\\n", "a", "--", "b"], ["a", "--", "b"]),
        (["--", "printf", "%s\\n", "--", "-q", "--"], ["--", "-q", "--"]),
        (["--", "sh", "-c", 'printf "%s\\n" "$@"', "--", "--", "x"], ["--", "x"]),
        (["--", "env", "--", "printf", "%s\\n", "x"], ["x"]),
    ],
    ids=" ".join,
)
def test_two_dashes_inside_the_command_survive(words: list[str], printed: list[str]) -> None:
    result = run("-q", *words)
    assert result.stdout.splitlines() == printed
    assert (result.returncode, result.stderr) == (0, "")


# Descriptors


def test_passed_socket_is_ready_to_serve() -> None:
    report = report_of("-H", "fd")
    listener = report["descriptors"][3]
    assert listener == {
        "link": listener["link"],
        "family": "AF_INET",
        "name": ["127.0.0.1", port_of(report)],
        "listening": True,
        "blocking": True,
        "close_on_exec": False,
        "reuse_address": True,
        "reuse_port": False,
        "no_delay": True,
    }


@GUARD_INHERITED
def test_guard_travels_along(hand_off: str) -> None:
    report = report_of("-H", hand_off)
    ((fd, guard),) = sockets_in(report, listening=False).items()
    assert fd > 9
    assert guard["name"][:2] == ["::", port_of(report)]
    assert guard["v6_only"] is False
    assert guard["reuse_port"] is False
    assert guard["reuse_address"] is (hand_off == "hold")


def is_pidfd_inode_unique() -> bool:
    """Whether the kernel gives every process' pidfd an inode of its own; before Linux 6.9 all had one."""
    if not hasattr(os, "pidfd_open"):
        return False
    pidfds = [os.pidfd_open(pid) for pid in (os.getpid(), os.getppid())]
    inodes = {os.fstat(pidfd).st_ino for pidfd in pidfds}
    for pidfd in pidfds:
        os.close(pidfd)
    return len(inodes) == 2


def test_activation_variables_are_those_of_the_command() -> None:
    report = report_of("-H", "fd", "-l", "web=0", "-l", "0")
    found = {name: value for name, value in report["environment"].items() if name.startswith("LISTEN_")}
    expected = {"LISTEN_FDS": "2", "LISTEN_PID": str(report["pid"]), "LISTEN_FDNAMES": "web:listener2"}
    if is_pidfd_inode_unique():
        expected["LISTEN_PIDFDID"] = str(report["pidfd_inode"])
    assert found == expected


STALE = {"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x:y", "LISTEN_PIDFDID": "1"}


@pytest.mark.parametrize("names", [list(STALE), ["LISTEN_FDS"], ["LISTEN_PID", "LISTEN_PIDFDID"]], ids=" ".join)
@TOGETHER
def test_stale_activation_variables_are_removed(hand_off: str, names: list[str]) -> None:
    report = report_of("-H", hand_off, env={**os.environ, **{name: STALE[name] for name in names}})
    found = {name for name in report["environment"] if name.startswith("LISTEN_")}
    assert found == ({"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} | found & {"LISTEN_PIDFDID"} if hand_off == "fd" else set())
    if hand_off == "fd":
        assert report["environment"]["LISTEN_FDS"] == "1"
        assert report["environment"]["LISTEN_PID"] == str(report["pid"])
        assert report["environment"]["LISTEN_FDNAMES"] == "listener1"
        assert report["environment"].get("LISTEN_PIDFDID", str(report["pidfd_inode"])) == str(report["pidfd_inode"])


def test_nested_launches_compose() -> None:
    report = report_of("-H", "fd", "-l", "a=0", "--", *PORTEXEC, "-q", "-H", "fd", "-l", "b=0")
    environment = report["environment"]
    assert environment["LISTEN_FDS"] == "2"
    assert environment["LISTEN_FDNAMES"] == "a:b"
    assert environment["LISTEN_PID"] == str(report["pid"])
    assert environment["PORT"] == environment["B_PORT"] != environment["A_PORT"]
    listening = sockets_in(report, listening=True)
    assert {fd: it["name"][1] for fd, it in listening.items()} == {3: int(environment["A_PORT"]), 4: int(environment["B_PORT"])}
    assert guarded(report) == {int(environment["A_PORT"]), int(environment["B_PORT"])}


def test_a_nested_hold_keeps_the_outer_sockets() -> None:
    report = report_of("-H", "fd", "-l", "a=0", "--", *PORTEXEC, "-q", "-H", "hold", "-l", "b=0")
    environment = report["environment"]
    assert (environment["LISTEN_FDS"], environment["LISTEN_FDNAMES"]) == ("1", "a")
    assert environment["LISTEN_PID"] == str(report["pid"])
    assert [it["name"][1] for it in sockets_in(report, listening=True).values()] == [int(environment["A_PORT"])]
    assert guarded(report) == {int(environment["A_PORT"]), int(environment["B_PORT"])}


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 3), (1, 1), (2, 2), (3, 1), (10, 1), (62, 4), (200, 2)])
def test_first_descriptor(tmp_path: Path, first: int, count: int) -> None:
    file = tmp_path / "report"
    listeners = [word for _ in range(count) for word in ("-l", "0")]
    result = run("-q", "-H", "fd", "--first-fd", str(first), *listeners, "--", *child("report"), str(file))
    assert result.returncode == 0
    report = parse_report(file.read_text())
    assert list(sockets_in(report, listening=True)) == list(range(first, first + count))
    assert report["descriptors"][first]["name"][1] == port_of(report)
    assert ("LISTEN_FDS" in report["environment"]) == (first == 3)
    assert {0, 1, 2} <= report["descriptors"].keys()
    assert len(guarded(report)) == count


def test_an_error_reaches_the_stderr_that_a_socket_replaced(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/does/not/exist\n")
    script.chmod(0o755)
    result = run("-q", "-H", "fd", "--first-fd", "2", "--", str(script))
    assert result.returncode == 126
    assert "/does/not/exist" in result.stderr


@pytest.mark.parametrize("limit", [1024, 30], ids=["usual limit", "hardly any descriptors"])
@TOGETHER
def test_descriptors_in_the_way_are_moved_not_lost(tmp_path: Path, hand_off: str, limit: int) -> None:
    paths = {number: tmp_path / f"file{number}" for number in (3, 4, 5)}
    for path in paths.values():
        path.write_text("content")
    taken = {str(number): [str(path), os.O_RDONLY, 2] for number, path in paths.items()}
    state = {"limits": {"RLIMIT_NOFILE": [limit, limit]}, "open": taken}
    result = run_from(state, "-q", "-H", hand_off, "-l", "0", "-l", "0", "--", *child("report"))
    assert (result.returncode, result.stderr) == (0, "")
    report = parse_report(result.stdout)
    where = {number: [fd for fd, it in report["descriptors"].items() if it["link"] == str(paths[number])] for number in paths}
    assert {number: len(fds) for number, fds in where.items()} == {3: 1, 4: 1, 5: 1}
    assert [report["descriptors"][fds[0]].get("rest") for fds in where.values()] == ["ntent"] * 3
    assert where[5] == [5]
    if hand_off == "fd":
        assert list(sockets_in(report, listening=True)) == [3, 4]
    else:
        assert (where[3], where[4]) == ([3], [4])


@TOGETHER
def test_500_listeners_under_the_usual_limit(hand_off: str) -> None:
    listeners = [word for _ in range(500) for word in ("-l", "0")]
    state = {"limits": {"RLIMIT_NOFILE": [1024, 4096]}}
    result = run_from(state, "-q", "-H", hand_off, *listeners, "--", *child("report"))
    assert (result.returncode, result.stderr) == (0, "")
    report = parse_report(result.stdout)
    listening = sockets_in(report, listening=True)
    assert len(guarded(report)) == (0 if hand_off == "guard" else 500)
    if hand_off == "fd":
        assert list(listening) == list(range(3, 503))
        assert {it["name"][1] for it in listening.values()} == guarded(report)
        assert report["environment"]["LISTEN_FDS"] == "500"
    else:
        assert listening == {}


@TOGETHER
def test_too_many_listeners_for_the_limit_are_a_clean_error(hand_off: str) -> None:
    listeners = [word for _ in range(100) for word in ("-l", "0")]
    result = run_from({"limits": {"RLIMIT_NOFILE": [64, 64]}}, "-H", hand_off, *listeners, "--", "echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert "Too many open files" in result.stderr
    assert "ulimit -n" in result.stderr


# IPv6 and interfaces


def without_ipv6(*words: str) -> subprocess.CompletedProcess[str]:
    """Run portexec where socket(2) knows no IPv6, as on a kernel that was built or booted without it."""
    if os.uname().machine not in {"x86_64", "aarch64", "riscv64"}:
        pytest.skip("the test's filter does not know this machine's system calls")
    return run_from({"refuse_family": [int(socket.AF_INET6), errno.EAFNOSUPPORT]}, *words)


@pytest.mark.parametrize(("spec", "host"), [("0", "127.0.0.1"), ("*", "0.0.0.0"), ("0.0.0.0", "0.0.0.0")])
@TOGETHER
def test_without_ipv6_the_guard_is_ipv4(hand_off: str, spec: str, host: str) -> None:
    result = without_ipv6("-q", "-H", hand_off, "-l", spec, "--", *child("report"))
    assert (result.returncode, result.stderr) == (0, "")
    report = parse_report(result.stdout)
    port = port_of(report)
    assert [it["name"] for it in sockets_in(report, listening=False).values()] == [["0.0.0.0", port]] * (hand_off != "guard")
    assert [it["name"] for it in sockets_in(report, listening=True).values()] == [[host, port]] * (hand_off == "fd")


def test_without_ipv6_an_ipv6_address_is_a_clean_error() -> None:
    result = without_ipv6("-l", "[::1]:0", "--", "echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert "portexec: hint: this machine has no IPv6; use 127.0.0.1" in result.stderr


@pytest.mark.parametrize("spec", ["0", "*", "0.0.0.0"])
@TOGETHER
def test_ipv6_switched_off(hand_off: str, spec: str) -> None:
    with namespace("lo=up", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1") as inside:
        result = run("-q", "-H", hand_off, "-l", spec, "--", *child("greeter"), "alone", prefix=inside)
        assert (result.returncode, result.stdout, result.stderr) == (0, "served\n", "")
        refused = run("-l", "[::1]:0", "--", "echo", "started", prefix=inside)
    assert (refused.returncode, refused.stdout) == (125, "")
    assert refused.stderr.startswith("portexec: error: cannot listen on [::1]:0: Cannot assign requested address\n")


@pytest.mark.parametrize("setup", [[], ["lo=up", "lo=down"]], ids=["never up", "down"])
@pytest.mark.parametrize("spec", ["0", "*"])
@TOGETHER
def test_loopback_down(hand_off: str, spec: str, setup: list[str]) -> None:
    with namespace(*setup) as inside:
        result = run("-q", "-H", hand_off, "-l", spec, "--", *child("report"), prefix=inside)
    assert (result.returncode, result.stderr) == (0, "")
    report = parse_report(result.stdout)
    assert guarded(report) == (set() if hand_off == "guard" else {port_of(report)})


@TOGETHER
def test_no_loopback_address(hand_off: str) -> None:
    with namespace("lo=up", "lo=bare") as inside:
        every = run("-q", "-H", hand_off, "-l", "*", "--", *child("report"), prefix=inside)
        loopback = run("-H", hand_off, "--", "echo", "started", prefix=inside)
    assert (every.returncode, every.stderr) == (0, "")
    report = parse_report(every.stdout)
    assert guarded(report) == (set() if hand_off == "guard" else {port_of(report)})
    assert (loopback.returncode, loopback.stdout) == (125, "")
    assert loopback.stderr.startswith("portexec: error: cannot listen on 127.0.0.1:0: Cannot assign requested address\n")


# Numbers


def served(hand_off: str, spec: str, prefix: Sequence[str] = ()) -> None:
    """Serve one connection on a number; the server closes first, so the number is left in TIME_WAIT."""
    result = run("-q", "-H", hand_off, "-l", spec, "--", *child("greeter"), "alone", prefix=prefix)
    assert (result.returncode, result.stdout, result.stderr) == (0, "served\n", "")


def printed(words: Sequence[str]) -> str:
    """What a command prints."""
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout


def old_connections(port: int, prefix: Sequence[str]) -> int:
    """How many connections in TIME_WAIT there are on the number (state 06 in /proc/net/tcp)."""
    rows = [line.split() for line in printed([*prefix, "cat", "/proc/net/tcp"]).splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "06" for row in rows)


GREETED = "import socket, sys; print(end=socket.create_connection(('127.0.0.1', int(sys.argv[1]))).makefile().read())"


@pytest.mark.parametrize(("first", "second"), list(itertools.product(HAND_OFFS, HAND_OFFS)))
def test_a_number_that_was_served_on_can_be_had_again_at_once(first: str, second: str) -> None:
    with namespace("lo=up") as inside:  # where nobody else is given the number in between
        with greeters() as start:
            greeter = start("-H", first, prefix=inside)
            port = greeter.port()
            assert printed([*inside, sys.executable, "-c", GREETED, str(port)]) == str(port)
            assert greeter.end() == (0, "")
        assert old_connections(port, inside) > 0
        served(second, str(port), inside)
        served(second, str(port), inside)


BINDS_ONLY = (
    "import socket, sys; made = socket.socket(); made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
    " made.bind((sys.argv[1], 8000)); print('bound', flush=True); sys.stdin.read()"
)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "old connections"])
@TOGETHER
def test_a_number_that_somebody_has_bound_and_does_not_serve_is_in_use(hand_off: str, fresh: bool, host: str) -> None:
    """Somebody who has set SO_REUSEADDR does not count as an old connection, beside which a number can be had."""
    if not fresh and kernel_version() < (6, 8):
        pytest.skip("this kernel does not tell who has merely bound a number")
    with namespace("lo=up") as inside:
        if not fresh:
            served(hand_off, "8000", inside)
        words = [*inside, sys.executable, "-c", BINDS_ONLY, host]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "bound\n"
            refused = run("-H", hand_off, "-l", "8000", "--", "true", prefix=inside)
            other = run("-q", "-H", hand_off, "-l", "8000,0", "--", "printenv", "PORT", prefix=inside)
            holder.communicate()
    assert (refused.returncode, other.returncode) == (125, 0)
    assert refused.stderr.startswith("portexec: error: cannot listen on 127.0.0.1:8000: Address already in use")
    assert other.stdout != "8000\n"


def race(words: Sequence[str], prefix: Sequence[str], count: int) -> None:
    """Launch at once on one number: one serves, the others fail with a clean error."""
    with greeters() as start:
        launched = [start(*words, prefix=prefix) for _ in range(count)]
        first_lines = [greeter.first_line() for greeter in launched]
        losers = [greeter.end() for greeter, line in zip(launched, first_lines, strict=True) if not line]
        assert first_lines.count("ready 8000") == 1, losers
    assert len(losers) == count - 1
    for status, errors in losers:
        assert status == 125
        assert errors.startswith("portexec: error: cannot listen on 127.0.0.1:8000: Address already in use")


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "old connections"])
@TOGETHER
def test_of_two_launches_on_one_number_exactly_one_wins(hand_off: str, fresh: bool) -> None:
    with namespace("lo=up") as inside:  # where 8000 is nobody else's
        for _ in range(20):
            if not fresh:
                served(hand_off, "8000", inside)
            race(["-H", hand_off, "-l", "8000"], inside, 2)


def test_200_launches_at_once_have_200_numbers() -> None:
    with greeters() as start:
        ports: dict[int, Greeter] = {}
        for batch in range(0, 200, 8):
            launched = [start("-H", HAND_OFFS[number % len(HAND_OFFS)]) for number in range(batch, batch + 8)]
            ports |= {greeter.port(): greeter for greeter in launched}
        assert len(ports) == 200
        assert [greeter.process.poll() for greeter in ports.values()] == [None] * 200
        assert [greeting_of(port) for port in ports] == [str(port) for port in ports]


@TOGETHER
def test_an_exhausted_ephemeral_range(hand_off: str) -> None:
    with namespace("lo=up", "net.ipv4.ip_local_port_range=50000 50007") as inside, greeters() as start:
        launched = [start("-H", hand_off, prefix=inside) for _ in range(8)]
        assert sorted(greeter.port() for greeter in launched) == list(range(50000, 50008))
        refused = run("-H", hand_off, "--", "echo", "started", prefix=inside)
        assert (refused.returncode, refused.stdout) == (125, "")
        assert refused.stderr.startswith("portexec: error: ")
        assert "ephemeral range (50000-50007)" in refused.stderr
        assert launched[3].end() == (0, "")
        assert start("-H", hand_off, prefix=inside).port() in range(50000, 50008)


# Interrupted


@contextmanager
def paused(directory: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A portexec that has bound everything and waits, since nobody writes to its env file, which is a pipe."""
    os.mkfifo(directory / "env")
    process = subprocess.Popen(
        [*PORTEXEC, "--env-file", str(directory / "env"), *words, "--", "echo", "started"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=directory,
    )
    writer = wait_for(lambda: os.open(directory / "env", os.O_WRONLY | os.O_NONBLOCK))
    try:
        # A handler in Python is not called when the signal comes just before a system call that blocks.
        assert wait_for(lambda: str(directory / "env") in descriptors_of(process.pid).values())
        assert wait_for(lambda: status_of(process.pid)["State"].startswith("S"))
        yield process
    finally:
        process.kill()
        process.communicate()
        os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
@TOGETHER
def test_a_signal_before_publishing_leaves_no_file(tmp_path: Path, hand_off: str, number: signal.Signals) -> None:
    with paused(tmp_path, "-H", hand_off, "--port-file", "port", "--export", "export") as process:
        process.send_signal(number)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == -number
    assert sorted(os.listdir(tmp_path)) == ["env"]


def test_an_interrupt_removes_the_unix_socket(tmp_path: Path) -> None:
    with paused(tmp_path, "-l", "unix:socket") as process:
        assert (tmp_path / "socket").is_socket()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE) == (b"", b"")
        assert process.returncode == -signal.SIGINT
    assert sorted(os.listdir(tmp_path)) == ["env"]


def own_calls(log: str) -> list[tuple[str, int]]:
    """The system calls of portexec itself: from its first socket to the exec, each with the how-manieth of its name it is."""
    names = [line.partition("(")[0] for line in log.splitlines()]
    begin, end = names.index("socket"), names.index("execve", 1)
    return [(name, names[: at + 1].count(name)) for at, name in enumerate(names[:end]) if at >= begin]


def interrupted_at(directory: Path, call: str, number: int) -> str:
    """Interrupt a launch by a Ctrl-C that comes during this system call; say what is wrong with the outcome."""
    directory.mkdir()
    trace = ["strace", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=INT:when={number}"]
    words = [*PORTEXEC, "-q", "-H", "fd", "--port-file", "port", "--", "echo", "started"]
    result = subprocess.run([*trace, *words], capture_output=True, text=True, cwd=directory, timeout=DEADLINE)
    left = set(os.listdir(directory))
    if left - {"port"}:
        return f"left {left}"
    if left and not re.fullmatch(r"\d+\n", (directory / "port").read_text()):
        return "the port file is not whole"
    told = (result.returncode, result.stdout, result.stderr)
    return "" if told == (-signal.SIGINT, "", "") else str(told)


def need_strace() -> None:
    probe = [program("strace"), "-o", "/dev/null", "-e", "inject=rename:signal=INT", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("strace may not trace here")


def test_an_interrupt_at_any_system_call_leaves_no_temporary_file(tmp_path: Path) -> None:
    need_strace()
    words = [*PORTEXEC, "-q", "-H", "fd", "--port-file", "port", "--", "echo", "started"]
    trace = ["strace", "-o", str(tmp_path / "log"), *words]
    for _ in range(2):  # the first one may have modules to compile, which takes calls that no later one makes
        (tmp_path / "port").unlink(missing_ok=True)
        subprocess.run(trace, capture_output=True, check=True, cwd=tmp_path, timeout=DEADLINE)
    calls = own_calls((tmp_path / "log").read_text())
    assert {"bind", "listen", "write", "rename"} <= {name for name, _ in calls}
    with ThreadPoolExecutor(2) as pool:
        wrong = pool.map(lambda at: interrupted_at(tmp_path / f"{at[0]}{at[1]}", *at), calls)
        assert {call: what for call, what in zip(calls, wrong, strict=True) if what} == {}


# Unix sockets


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a unix socket, with the test in its directory: pytest's own paths are near the limit of 107 bytes."""
    monkeypatch.chdir(tmp_path)
    return Path(f"socket{os.getpid()}")


def leave_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def unix_greeting_of(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(str(path))
        return client.makefile().read()


def test_a_live_unix_socket_is_left_alone(path: Path) -> None:
    with greeters() as start:
        greeter = start("-l", f"unix:{path}")
        assert greeter.first_line() == f"ready {path}"
        inode = path.stat().st_ino
        refused = run("-l", f"unix:{path}", "--", "echo", "started")
        assert (refused.returncode, refused.stdout) == (125, "")
        assert refused.stderr.startswith(f"portexec: error: cannot listen on unix:{path}: Address already in use\n")
        assert path.stat().st_ino == inode
        assert unix_greeting_of(path) == str(path)
    assert os.listdir() == [str(path)]


def test_a_dead_unix_socket_is_replaced(path: Path) -> None:
    leave_dead_socket(path)
    with greeters() as start:
        assert start("-l", f"unix:{path}").first_line() == f"ready {path}"  # the name that getsockname(2) tells the server
        assert unix_greeting_of(path) == str(path)
        assert os.listdir() == [str(path)]


def test_a_bound_unix_socket_that_does_not_listen_yet_is_left_alone(path: Path) -> None:
    """Its owner is about to: another launch, between its bind and its listen, or a server that takes its time."""
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        refused = run("-l", f"unix:{path}", "--", "echo", "started")
        assert (refused.returncode, refused.stdout) == (125, "")
        assert refused.stderr.startswith(f"portexec: error: cannot listen on unix:{path}: Address already in use\n")
        owner.listen()
        assert path.is_socket()
    assert os.listdir() == [str(path)]


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_live_unix_socket_of_another_kind_is_left_alone(path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as owner:
        owner.bind(str(path))
        assert run("-l", f"unix:{path}", "--", "true").returncode == 125
        assert path.is_socket()


def test_a_live_unix_server_is_not_disturbed(path: Path) -> None:
    """It gets no connection that nobody means."""
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        assert run("-l", f"unix:{path}", "--", "true").returncode == 125
        owner.setblocking(False)
        with pytest.raises(BlockingIOError):
            owner.accept()


def test_a_live_socket_of_the_same_name_elsewhere_is_another(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with greeters() as start:
        os.chdir(elsewhere)
        assert start("-l", f"unix:{path}").first_line() == f"ready {path}"
        os.chdir(tmp_path)
        leave_dead_socket(path)
        assert start("-l", f"unix:{path}").first_line() == f"ready {path}"
        assert unix_greeting_of(path) == str(path)


@pytest.mark.parametrize("kind", ["file", "directory", "pipe", "link"])
def test_what_is_no_socket_is_never_removed(path: Path, kind: str) -> None:
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_text("precious"),
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("elsewhere"),
    }
    make[kind]()
    before = path.lstat()
    refused = run("-l", f"unix:{path}", "--", "echo", "started")
    assert (refused.returncode, refused.stdout) == (125, "")
    assert "that is no socket" in refused.stderr
    assert path.lstat() == before
    assert os.listdir() == [str(path)]


def squat_nothing(path: Path) -> None:
    """Nobody is in the way."""


def squat_the_lock(path: Path) -> None:
    """A stranger has made the lock file, which anybody can lock."""
    lock = Path(f".{path}.portexec-lock")
    lock.touch(0o666)
    os.chown(lock, STRANGER, STRANGER)


@pytest.mark.parametrize("squat", [squat_nothing, pytest.param(squat_the_lock, marks=pytest.mark.root)])
def test_of_20_launches_on_one_dead_unix_socket_exactly_one_wins(path: Path, squat: Callable[[Path], None]) -> None:
    squat(path)
    squatted = {name for name in os.listdir() if name.endswith("lock")}
    for _ in range(6):
        path.unlink(missing_ok=True)
        leave_dead_socket(path)
        with greeters() as start:
            launched = [start("-l", f"unix:{path}") for _ in range(20)]
            first_lines = [greeter.first_line() for greeter in launched]
            losers = [greeter.end() for greeter, line in zip(launched, first_lines, strict=True) if not line]
            assert first_lines.count(f"ready {path}") == 1, losers
            assert {status for status, _ in losers} == {125}
            assert all(errors.startswith("portexec: error: cannot listen on") for _, errors in losers), losers
            assert unix_greeting_of(path) == str(path)
        assert set(os.listdir()) == {str(path), *squatted}


def test_a_fresh_unix_socket_is_put_back(path: Path) -> None:
    """What a launch removes, in the moment in which somebody else has replaced the dead socket that it has seen."""
    leave_dead_socket(path)
    dead = path.stat()
    keeps_the_number = path.rename("kept")
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        fresh = path.stat()
        unix._remove(str(path), (dead.st_dev, dead.st_ino))
        assert os.path.samestat(path.stat(), fresh)
        assert sorted(os.listdir()) == sorted(["kept", str(path)])
        unix._remove(str(path), (fresh.st_dev, fresh.st_ino))
        assert os.listdir() == [str(keeps_the_number)]


LOCKS: dict[str, Callable[[Path], object]] = {
    "a file": lambda lock: lock.touch(0o600),
    "a file for all": lambda lock: lock.touch(0o666),
    "a file with something in it": lambda lock: lock.write_text("precious"),
    "a directory": lambda lock: lock.mkdir(),
    "a pipe": os.mkfifo,
    "a link": lambda lock: lock.symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("owner", [None, pytest.param(STRANGER, marks=pytest.mark.root)])
def test_nobody_blocks_a_unix_socket_by_its_lock(path: Path, kind: str, owner: int | None) -> None:
    """Whatever is in the place of the lock, and whoever holds it. What is not ours alone, or has a use, stays there."""
    leave_dead_socket(path)
    lock = Path(f".{path}.portexec-lock")
    LOCKS[kind](lock)
    if owner is not None:
        os.chown(lock, owner, owner, follow_symlinks=False)
    with ExitStack() as held:
        if kind.startswith("a file"):
            fcntl.flock(held.enter_context(open(lock)), fcntl.LOCK_EX)
        result = run("-q", "-l", f"unix:{path}", "--", "echo", "started")
    assert (result.returncode, result.stdout, result.stderr) == (0, "started\n", "")
    assert os.path.lexists(lock)
    assert sorted(os.listdir()) == sorted([str(path), str(lock)])


def test_nobody_blocks_a_unix_socket_by_an_abstract_name(path: Path) -> None:
    """Such a name can be had by everybody who finds it out."""
    need_strace()
    leave_dead_socket(path)
    log = subprocess.run(
        ["strace", "-f", "-e", "trace=bind", *PORTEXEC, "-q", "-l", f"unix:{path}", "--", "true"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    ).stderr
    assert f'sun_path="{path}"' in log
    assert 'sun_path=@"' not in log
