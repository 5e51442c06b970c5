"""`--restart`, replacement by HUP, `--lazy`, and that what was published is withdrawn at the end.

The server is children/obedient.py, as in test_readiness.py: what it does, the test decides. Of the delays only what is said of
them is looked at.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from portexec import server_errors
from portexec.parent.family import Family
from portexec.parent.signals import Inbox
from tests.support import (
    DEADLINE,
    PORTEXEC,
    child,
    descriptors_of,
    is_gone,
    read_line,
    run,
    running,
    status_of,
    wait_for,
    within,
)
from tests.support.installed import program
from tests.support.network import THEFTS, connect, port_of, steal
from tests.support.obedience import BY_NUMBER, HAND_OFFS, TURNS, Server, obeying
from tests.support.proc import children_of, state
from tests.support.processes import NO_SOCK_DIAG, refusing, stop_where_it_waits
from tests.support.terminals import terminal_with

pytestmark = pytest.mark.once

RESTARTED = r"^portexec: note: the command ended \((.*)\); restart in (\S+) s$"


@contextmanager
def serving(*options: str, prefix: Sequence[str] = (), **more: Any) -> Iterator[Server]:
    """The same when it runs."""
    with obeying(*options, prefix=prefix, **more) as server:
        server.comes_up()
        yield server


def restarts(server: Server, how: str = "") -> str:
    """Wait until it is said that the command is to be started again, and how it ended."""
    found = server.started.line(rf"{RESTARTED}|^portexec: error: ")
    assert found.group(1), found.string
    if how:
        assert found.group(1) == how
    return found.group(2)


REHEARSED = [
    # the starts that were rehearsed, one that follows, and whether it need not be: their limits, and their guards
    ([], ({}, 1), False),
    ([({}, 1)], ({}, 1), True),
    ([({}, 1)], ({}, 2), False),
    ([({}, 2)], ({}, 1), True),
    ([({7: 64}, 1)], ({}, 1), False),
    ([({}, 1)], ({7: 64}, 1), False),
    ([({7: 64}, 1)], ({7: 65}, 1), False),
    ([({7: 64}, 1), ({}, 3), ({7: 64}, 2)], ({7: 64}, 2), True),
    ([({7: 64}, 1), ({}, 3), ({7: 64}, 2)], ({7: 64}, 3), False),
]


@pytest.mark.parametrize(("before", "start", "is_rehearsed"), REHEARSED)
def test_which_start_needs_no_rehearsal(
    before: list[tuple[dict[int, int], int]], start: tuple[dict[int, int], int], is_rehearsed: bool
) -> None:
    inbox = Inbox()
    try:
        family = Family(inbox, set(), set())
        for limits, guards in before:
            family.note_rehearsal(limits, guards)
        assert family.is_rehearsed(*start) is is_rehearsed
    finally:
        inbox.restore()
        inbox.close()


def test_the_first_start_is_rehearsed_and_no_other(tmp_path: Path) -> None:
    """A rehearsal is a bind of the child's to an address that nobody uses, before the command is executed."""
    script = "echo >>starts; test $(wc -l <starts) -ge 3"
    words = ["-q", "-H", "guard", "--restart", "on-failure", "--", "sh", "-c", script]
    trace = [program("strace"), "-f", "-o", "log", "-e", "trace=bind,listen", *PORTEXEC, *words]
    done = subprocess.run(trace, cwd=tmp_path, timeout=DEADLINE, check=False)
    assert (done.returncode, (tmp_path / "starts").read_text()) == (0, "\n" * 3)
    bound = re.findall(r'\bbind\(.*inet_addr\("(127\.[^"]*)"\)', (tmp_path / "log").read_text())
    assert len({address for address in bound if address != "127.0.0.1"}) == 1


def steal_all(port: int) -> dict[Any, str]:
    """What comes of naming the number, without the one option that the same user could have luck with."""
    return {theft: steal(theft[0], port, *theft[1:]) for theft in THEFTS if socket.SO_REUSEPORT not in theft}


def test_a_signal_while_a_start_is_prepared_is_for_its_command(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"test -e {mark} && exec sleep 1000; touch {mark}; echo up; read line; exit 3"
    words = ["--restart", "on-failure", "--ready", "listen", "--", "sh", "-c", script]
    with running(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        process = started.process
        assert read_line(process) == "up"
        (old,) = children_of(process.pid)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        started.line(RESTARTED)
        (new,) = wait_for(lambda: [pid for pid in children_of(process.pid) if pid != old])
        os.kill(new, signal.SIGSTOP)
        assert wait_for(lambda: state(new) == "T")

        def is_forwarded() -> bool:
            process.send_signal(signal.SIGUSR1)
            try:
                return state(new) != "T"
            except (FileNotFoundError, ProcessLookupError):
                return True  # all is over meanwhile

        assert wait_for(is_forwarded)
        assert started.line(RESTARTED).group(1) == "killed by SIGUSR1"


def test_quit_ends_a_lazy_one_that_waits() -> None:
    with running("--lazy", "-H", "fd", "--", "true", stderr=subprocess.PIPE) as started:
        started.url()
        started.process.send_signal(signal.SIGQUIT)
        assert started.process.wait(DEADLINE) == -signal.SIGQUIT


def test_a_restart_is_not_announced_when_ctrl_backslash_ends_the_run() -> None:
    with terminal_with(*PORTEXEC, "--restart", "on-failure", "-H", "fd", "--", "sh", "-c", "echo up; exec sleep 9") as terminal:
        terminal.find("up")
        terminal.press(b"\x1c")
        assert "restart in" not in terminal.rest()
        assert terminal.status() == -signal.SIGQUIT


# When it is restarted


@pytest.mark.parametrize(
    ("restart", "end", "status"),
    [
        ([], "exit 0", 0),
        ([], "exit 3", 3),
        (["--restart", "no"], "exit 3", 3),
        (["--restart", "no"], "exit 0", 0),
        (["--restart", "no"], "kill -KILL $$", -signal.SIGKILL),
        (["--restart", "on-failure"], "exit 0", 0),
    ],
)
def test_an_end_that_is_the_end(restart: list[str], end: str, status: int) -> None:
    done = run("--ready", "none", *restart, "-H", "fd", "--", "sh", "-c", f"echo started; {end}")
    assert (done.returncode, done.stdout) == (status, "started\n")
    assert "restart" not in done.stderr


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize(
    ("restart", "end", "how"),
    [
        ("on-failure", "exit 3", "exit status 3"),
        ("on-failure", "KILL", "killed by SIGKILL"),
        ("on-failure", "TERM", "killed by SIGTERM"),
        ("always", "exit 0", "exit status 0"),
        ("always", "exit 3", "exit status 3"),
        ("always", "KILL", "killed by SIGKILL"),
    ],
)
def test_an_end_that_is_not(restart: str, end: str, how: str, hand_off: str) -> None:
    """By a signal of another's, too. Told to stop, portexec starts nothing any more."""
    with serving("--restart", restart, "-H", hand_off) as server:
        first = server.pid
        if end.startswith("exit"):
            server.do(end)
        else:
            os.kill(first, getattr(signal, f"SIG{end}"))
        assert restarts(server, how) == "0.1"
        server.comes_up()
        assert server.pid != first
        assert server.stopped() == -signal.SIGTERM
        assert is_gone(server.pid)


@pytest.mark.parametrize(
    ("options", "end", "status"),
    [
        (["-H", "fd"], "exit 3", 3),
        (["-H", "guard"], "kill -TERM $$", -signal.SIGTERM),
        (["-H", "hold", "-q"], "exit 0", 0),
        (["-H", "fd", "--then", "echo tests"], "exit 3", 125),
    ],
    ids=["status", "signal", "quiet", "then"],
)
def test_five_ends_without_ever_being_ready_are_enough(options: list[str], end: str, status: int) -> None:
    done = run("--restart", "always", *options, "--", "sh", "-c", f"echo started; {end}")
    assert (done.returncode, done.stdout) == (status, 5 * "started\n")
    if "-q" in options:
        assert done.stderr == ""
        return
    told = [found.group(2) for line in done.stderr.splitlines() if (found := re.match(RESTARTED, line))]
    assert told == ["0.1", "0.2", "0.4", "0.8"]
    notes = [line for line in done.stderr.splitlines() if "before it was ready" in line and "error: " not in line]
    how = "killed by SIGTERM" if status < 0 else "exit status 3"
    assert notes == [f"portexec: note: the command ended 5 times in a row before it was ready, so there is no restart: {how}"]


def test_advice_is_given_once_in_a_run() -> None:
    done = run("--restart", "always", "-H", "guard", "--", "sh", "-c", "exit 3", "{port}")
    assert done.stderr.count("portexec: note: the command ended (exit status 3); restart in ") == 4
    assert done.stderr.count("hint: see its output above; if another program binds for it") == 1


def test_ends_after_it_was_ready_are_never_enough() -> None:
    with serving("--restart", "always", "-H", "fd", "-v") as server:
        for delay in ("0.1", "0.2", "0.4", "0.8", "1.6"):
            server.do("take PORT 3", "accept PORT")
            server.started.line("^portexec: ready after ")
            server.do("exit 0")
            assert restarts(server) == delay
            if delay != "1.6":
                server.comes_up()
        # told to stop, it does not wait for the rest of the delay
        assert server.stopped() == -signal.SIGTERM


def test_one_that_is_not_ready_in_time_is_started_again() -> None:
    """Where it is not the first start: that would be the end of it."""

    def attempt(seconds: int) -> None:
        with serving(
            "--restart", "on-failure", "--ready", "notify", "--ready-timeout", f"{seconds}s", "-v", "-H", "fd"
        ) as server:
            server.do("notify READY=1")
            server.started.line("^portexec: ready after ")
            server.do("exit 3")
            restarts(server)
            server.comes_up()
            second = server.pid
            server.started.line(rf"^portexec: note: the command was not ready after {seconds} s: it did not send READY=1 to ")
            restarts(server, "killed by SIGTERM")
            server.comes_up()
            assert is_gone(second)

    within(2, attempt)


def test_a_first_one_that_is_not_ready_in_time_ends_it() -> None:
    done = run("--restart", "always", "--ready", "notify", "--ready-timeout", "100ms", "-H", "fd", "--", "sleep", "100")
    assert done.returncode == 124
    assert "restart in" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--lazy"], ["--then", "true"]], ids=["plain", "lazy", "then"])
@pytest.mark.parametrize(("command", "status"), [("nowhere/to-be-found", 127), ("/", 126)])
def test_what_cannot_be_executed_is_not_tried_again(command: str, status: int, more: list[str]) -> None:
    done = run("--restart", "always", *more, "-H", "fd", "--", command)
    assert (done.returncode, done.stdout) == (status, "")
    assert "restart in" not in done.stderr
    assert done.stderr.count("portexec: error: ") == 1


def test_an_interpreter_that_is_missing_is_not_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = run("--restart", "always", "-H", "guard", "--", str(script))
    assert done.returncode == 126
    assert "restart in" not in done.stderr
    assert "its interpreter /no/such/interpreter does not exist" in done.stderr


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_a_command_that_is_gone_when_it_is_to_be_started_again(hand_off: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\nrm {shlex.quote(str(script))}\nexit 3\n")
    script.chmod(0o755)
    done = run("--restart", "always", "-H", hand_off, "--", str(script))
    assert done.returncode == 127
    assert done.stderr.count("restart in") == 1


# What is the same after a restart


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_every_start_is_like_the_first(hand_off: str) -> None:
    """The same numbers, descriptors, signals and filters; LISTEN_PID is that of the new process."""
    script = (
        'echo "$PORT $LISTEN_FDS $LISTEN_FDNAMES" $(test "${LISTEN_PID-$$}" = $$ && echo pid) $(ls /proc/self/fd | wc -l)'
        " $(grep -E '^(SigBlk|SigIgn|SigPnd|ShdPnd|Seccomp|NoNewPrivs)' /proc/self/status); exit 3"
    )
    done = run("--restart", "always", "-H", hand_off, "--", "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert " pid " in lines[0]
    assert set(lines) == {lines[0]}


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_nothing_piles_up_in_portexec(hand_off: str) -> None:
    with serving("--restart", "always", "-H", hand_off, "-l", "*:0", "--ready", "none") as server:
        counts = []
        for _ in range(4):
            server.listens(hand_off, "*")
            server.says("pending PORT 0")
            ours = [server.process.pid, int(status_of(server.pid)["PPid"])]
            for pid in ours:
                stop_where_it_waits(pid)  # where nothing is open for a moment only
            counts.append([len(descriptors_of(pid)) for pid in ours])
            for pid in ours:
                os.kill(pid, signal.SIGCONT)
            server.do("exit 0")
            restarts(server)
            server.comes_up()
        assert counts[1:] == [counts[1]] * 3


def test_the_tree_of_the_last_start_is_gone_before_the_next() -> None:
    script = "setsid sleep 1000 >/dev/null 2>&1 & echo $!; kill -KILL $$"
    with running("--restart", "always", "-H", "fd", "--", "sh", "-c", script) as started:
        assert started.process.stdout is not None
        left = int(started.process.stdout.readline())
        started.process.stdout.readline()
        assert is_gone(left)


LISTENERS = {
    "127.0.0.1": "127.0.0.1:0",
    "[::1]": "[::1]:0",
    "all": "*:0",
    "all of IPv4": "0.0.0.0:0",
    "all of IPv6": "[::]:0",
    "unix": "unix:{}/s",
    "abstract": "unix:@portexec-test-{}",
}
WITH_DESCRIPTOR = pytest.mark.parametrize("listen", LISTENERS.values(), ids=LISTENERS.keys())


@WITH_DESCRIPTOR
def test_who_connects_while_it_is_down_is_served_by_the_next(listen: str, tmp_path: Path) -> None:
    with serving("-l", listen.format(tmp_path), "--restart", "always", "--ready", "none", "-H", "fd") as server:
        url = server.started.url()
        first = server.pid
        server.do("exit 0")
        assert wait_for(lambda: is_gone(first))
        with connect(url) as client:
            server.comes_up()
            server.do("take PORT 3", "accept PORT")
            assert client.recv(100) == b"accepted"


def test_datagrams_that_come_while_it_is_down_are_for_the_next() -> None:
    script = (
        "import os, socket; s = socket.socket(fileno=3); print(os.getpid(), flush=True)\n"
        "data, sender = s.recvfrom(100); s.sendto(b'%s by %d' % (data, os.getpid()), sender)"
    )
    words = ["-l", "udp:0", "--restart", "always", "--ready", "none", "-H", "fd", "--", sys.executable, "-c", script]
    with running(*words) as started, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert started.process.stdout is not None
        client.connect(("127.0.0.1", port_of(started.url())))
        client.settimeout(DEADLINE)
        for text in ("1", "2", "3"):
            client.send(text.encode())
        for text in ("1", "2", "3"):
            pid = started.process.stdout.readline().strip()
            assert client.recv(100).decode() == f"{text} by {pid}"


@pytest.mark.parametrize(
    ("listen", "host"),
    [("127.0.0.1:0", "127.0.0.1"), ("127.0.0.1:0", "*"), ("*:0", "*"), ("[::]:0", "::"), ("0.0.0.0:0", "0.0.0.0")],
)
@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_the_number_stays_while_it_is_down(hand_off: str, listen: str, host: str) -> None:
    """Nobody else can have it, with `guard`; and the next start can."""
    with serving("-l", listen, "--restart", "always", "-H", hand_off, "-v") as server:
        url = server.started.url()
        for _ in range(3):
            server.listens(hand_off, host)
            server.started.line("^portexec: ready after ")
            with connect(url) as client:
                server.do("accept PORT")
                assert client.recv(100) == b"accepted"
                assert client.recv(100) == b""  # the server closed first, and so its end stays for a while, in TIME_WAIT
            server.do("exit 1")
            restarts(server)
            if hand_off == "guard":
                stolen = steal_all(port_of(url))
                assert stolen == dict.fromkeys(stolen, "EADDRINUSE")
            server.comes_up()


@WITH_DESCRIPTOR
def test_a_server_that_shut_the_listener_down_can_be_restarted(listen: str, tmp_path: Path) -> None:
    """As some do at their end; it is shut down for everybody who has it."""
    with serving("-l", listen.format(tmp_path), "--restart", "always", "--ready", "none", "-H", "fd") as server:
        url = server.started.url()
        for _ in range(3):
            server.do("take PORT 3", "shutdown PORT", "exit 0")
            restarts(server)
            server.comes_up()
            if not url.startswith("unix:"):
                stolen = steal_all(port_of(url))
                assert stolen == dict.fromkeys(stolen, "EADDRINUSE")
        with connect(url) as client:
            server.do("take PORT 3", "accept PORT")
            assert client.recv(100) == b"accepted"


# With tests


def test_the_tests_go_on_while_the_server_is_restarted(tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    script = f"echo tests; read line < {shlex.quote(str(go))}; exit 7"
    words = ["--restart", "always", "--ready", "none", "-H", "fd", "-e", f"ORDERS={tmp_path}", "--then", script]
    with obeying(*words) as server:
        lines = sorted([server.heard(), server.heard()])
        assert lines[0] == "tests"
        tell(tmp_path, 1, "exit 0")
        assert server.heard() == "exit"
        restarts(server, "exit status 0")
        server.comes_up()
        go.write_text("\n")
        assert server.process.wait(DEADLINE) == 7


def test_a_server_that_is_not_restarted_ends_the_tests(tmp_path: Path) -> None:
    words = ["--restart", "on-failure", "--ready", "none", "-H", "fd", "-e", f"ORDERS={tmp_path}", "--then", "sleep 1000"]
    with obeying(*words) as server:
        server.comes_up()
        tell(tmp_path, 1, "exit 0")
        assert server.heard() == "exit"
        assert server.ended() == 125


def test_nothing_is_started_while_all_is_stopped(tmp_path: Path) -> None:
    """The tests take their time to end, longer than the delay before the next restart."""
    at_term = "trap 'echo stopping; trap \"\" TERM; sleep 1000 & wait; wait' TERM"
    script = f"{at_term}; echo tests; sleep 1000 & wait; while :; do :; done"  # sleep may be told before the shell is
    words = ["-k", "1500ms", "--restart", "always", "--ready", "none", "-H", "fd", "-e", f"ORDERS={tmp_path}"]
    with obeying(*words, "--then", script) as server:
        assert "tests" in [server.heard(), server.heard()]
        for number in range(1, 5):
            wait_for((tmp_path / str(number)).is_fifo)
            tell(tmp_path, number, "exit 0")
            assert server.heard() == "exit"
            delay = restarts(server)
            if number < 4:
                server.comes_up()
        assert delay == "0.8"
        server.process.terminate()
        heard = server.process.communicate(timeout=DEADLINE)[0].splitlines()
        assert server.process.returncode == -signal.SIGTERM
        assert "stopping" in heard
        assert heard[heard.index("stopping") :] == ["stopping"]


# HUP


@contextmanager
def with_orders(tmp_path: Path, *options: str, **more: Any) -> Iterator[Server]:
    """The server, each start of which has its own lines to follow: see `order`."""
    with obeying("-v", "-H", "fd", "-e", f"ORDERS={tmp_path}", *options, **more) as server:
        yield server


def tell(directory: Path, number: int, line: str) -> None:
    """Give the start with this number a line. One that has gone is an error: ENXIO."""
    fd = os.open(directory / str(number), os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, f"{line}\n".encode())
    os.close(fd)


def order(server: Server, directory: Path, number: int, *lines: str) -> None:
    """Have the start with this number do one thing after the other."""
    for line in lines:
        tell(directory, number, line)
        assert server.heard() == line.split()[0]


@pytest.mark.parametrize(
    "options", [["--ready", "none"], ["--restart", "no"], ["--ready-timeout", "1h"], ["--restart", "always"]]
)
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_a_hup_that_is_the_commands(hand_off: str, options: list[str]) -> None:
    """Without `--restart`, and with it where the command binds the number itself."""
    if "always" in options and hand_off == "fd":
        options = ["-k", "5s"]
    with running(*options, "-H", hand_off, "--", *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready")
        started.process.send_signal(signal.SIGHUP)
        assert started.process.stdout.readline() == "SIGHUP\n"
        started.process.terminate()
        assert started.process.stdout.readline() == "SIGTERM\n"


PROBED = {
    "tcp": ("0.0.0.0:0", [], "accept"),  # on 127.0.0.1 each has a listener of its own
    "all": ("*:0", [], "accept"),
    "unix": ("unix:{}/s", [], "accept"),
    "abstract": ("unix:@portexec-test-{}", [], "accept"),
    "tcp without sock_diag": ("0.0.0.0:0", refusing(NO_SOCK_DIAG), "accept"),
    "http": ("0.0.0.0:0", [], "http"),
}


@pytest.mark.parametrize(("listen", "prefix", "form"), PROBED.values(), ids=PROBED.keys())
def test_what_the_old_one_accepts_does_not_make_the_new_one_ready(
    listen: str, prefix: list[str], form: str, tmp_path: Path
) -> None:
    """Both accept from one listener. The new one, which never does, fails: the old one has to be there still."""
    take = ["take PORT 3", "reply PORT 485454502f312e3120323030204f4b0d0a0d0a" if form == "http" else "accept PORT"]
    with with_orders(
        tmp_path, "-l", listen.format(tmp_path), "--restart", "on-failure", "--ready", form, prefix=prefix
    ) as server:
        server.comes_up()
        order(server, tmp_path, 1, *take[:1])
        tell(tmp_path, 1, take[1])
        server.started.line("^portexec: ready after ")
        assert server.heard() in ("accept", "reply")
        if form == "http":
            server.heard()
        old = server.pid
        order(server, tmp_path, 1, "accept PORT")
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 1, "pending PORT 0")  # and so it has accepted something, which was not a client's
        server.heard()
        assert server.is_awaited()
        order(server, tmp_path, 2, "exit 3")
        found = server.started.line(r"old one goes on|old one is told|restart in")
        assert "(exit status 3), the old one goes on" in found.string
        assert not is_gone(old)


@pytest.mark.parametrize("form", ["accept", "notify"])
def test_a_hup_replaces_the_old_one_when_the_new_one_is_ready(form: str, tmp_path: Path) -> None:
    become_ready = ["take PORT 3", "keep PORT"] if form == "accept" else ["notify READY=1"]
    with with_orders(tmp_path, "--restart", "on-failure", "--ready", form) as server:
        server.comes_up()
        order(server, tmp_path, 1, *become_ready)
        server.started.line("^portexec: ready after ")
        for number in (2, 3):
            old = server.pid
            server.process.send_signal(signal.SIGHUP)
            server.comes_up()
            assert server.is_awaited()
            assert not is_gone(old)
            order(server, tmp_path, number, *become_ready)
            server.started.line("^portexec: ready after ")
            assert wait_for(lambda pid=old: is_gone(pid))  # type: ignore[misc]
        order(server, tmp_path, 3, "exit 3")
        restarts(server, "exit status 3")
        server.comes_up()


def test_what_the_new_one_accepts_does_not_make_the_old_one_ready(tmp_path: Path) -> None:
    """The old one never accepts anything, and is replaced for that."""
    with with_orders(tmp_path, "--restart", "on-failure", "--ready", "accept") as server:
        server.comes_up()
        old = server.pid
        order(server, tmp_path, 1, "take PORT 3")
        order(server, tmp_path, 1, "pending PORT 1")
        server.heard()
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 2, "take PORT 3", "keep PORT", "keep PORT")
        server.started.line("^portexec: ready after ")
        assert "the new start is ready" in server.started.line("ready").string
        assert wait_for(lambda: is_gone(old))


def test_a_new_one_that_is_not_ready_in_time_leaves_the_old_one(tmp_path: Path) -> None:
    def attempt(seconds: int) -> None:
        orders = tmp_path / str(seconds)
        orders.mkdir()
        with with_orders(orders, "--restart", "on-failure", "--ready", "notify", "--ready-timeout", f"{seconds}s") as server:
            server.comes_up()
            old = server.pid
            order(server, orders, 1, "notify READY=1")
            server.started.line("^portexec: ready after ")
            server.process.send_signal(signal.SIGHUP)
            server.comes_up()
            server.started.line(rf"^portexec: note: the new start was not ready after {seconds} s: it did not send READY=1 ")
            line = r"^portexec: error: the new start was not ready \(killed by SIGTERM\), the old one goes on$"
            server.started.line(line)
            assert is_gone(server.pid)
            assert not is_gone(old)
            order(server, orders, 1, "exit 0")
            assert server.ended() == 0

    within(2, attempt)


def test_a_hup_while_another_one_is_being_followed(tmp_path: Path) -> None:
    """Whoever changed the files once more wants to see them used: one more start follows."""
    with with_orders(tmp_path, "--restart", "on-failure", "--ready", "notify") as server:
        server.comes_up()
        order(server, tmp_path, 1, "notify READY=1")
        server.started.line("^portexec: ready after ")
        first = server.pid
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        second = server.pid
        for _ in range(3):
            server.process.send_signal(signal.SIGHUP)
        assert server.is_awaited()
        order(server, tmp_path, 2, "notify READY=1")
        server.comes_up()
        assert wait_for(lambda: is_gone(first))
        order(server, tmp_path, 3, "notify READY=1")
        assert wait_for(lambda: is_gone(second))
        assert server.is_awaited()
        assert not (tmp_path / "4").exists()


@pytest.mark.parametrize("outcome", ["ready", "failed"])
def test_the_old_one_ends_before_the_new_one_is_ready(outcome: str, tmp_path: Path) -> None:
    """Then the new one goes on alone, or if it fails there is a restart."""
    with with_orders(tmp_path, "--restart", "on-failure", "--ready", "notify") as server:
        server.comes_up()
        order(server, tmp_path, 1, "notify READY=1")
        server.started.line("^portexec: ready after ")
        old = server.pid
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 1, "exit 3")
        assert wait_for(lambda: is_gone(old))
        if outcome == "failed":
            order(server, tmp_path, 2, "exit 4")
            server.started.line(RESTARTED)
            server.comes_up()
            order(server, tmp_path, 3, "notify READY=1", "exit 0")
            assert not any("the old one goes on" in line for line in server.started.lines)
        else:
            order(server, tmp_path, 2, "notify READY=1")
            server.started.line("^portexec: ready after ")
            order(server, tmp_path, 2, "exit 0")
        assert server.ended() == 0
        assert not (tmp_path / ("4" if outcome == "failed" else "3")).exists()


@pytest.mark.parametrize("times", [1, 2])
def test_the_listener_serves_after_a_restart_when_it_was_shut_down(times: int, tmp_path: Path) -> None:
    """Each worker of a server may do that. After a second time every connection would be over at once."""
    with with_orders(tmp_path, "--restart", "always", "--ready", "notify") as server:
        url = server.started.url()
        server.comes_up()
        order(server, tmp_path, 1, "take PORT 3", *["shutdown PORT"] * times, "exit 3")
        server.started.line(RESTARTED)
        server.comes_up()
        order(server, tmp_path, 2, "take PORT 3", "notify READY=1")
        with connect(url) as client:
            order(server, tmp_path, 2, "accept PORT")
            assert client.recv(100) == b"accepted"


def test_the_listener_lives_on_when_the_old_one_shuts_it_down(tmp_path: Path) -> None:
    """The new one may fail over it; then it is restarted, and serves."""
    with with_orders(tmp_path, "--restart", "always", "--ready", "notify") as server:
        url = server.started.url()
        server.comes_up()
        order(server, tmp_path, 1, "take PORT 3", "notify READY=1")
        server.started.line("^portexec: ready after ")
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 1, "shutdown PORT")
        order(server, tmp_path, 2, "notify READY=1")
        server.started.line("old one is told to end")
        with wait_for(lambda: connect(url)) as client:
            order(server, tmp_path, 2, "take PORT 3", "accept PORT")
            assert client.recv(100) == b"accepted"


def test_an_old_start_whose_shim_is_killed_is_ended_at_once(tmp_path: Path) -> None:
    """Whatever it ignores: the run may go on for long."""
    with with_orders(tmp_path, "--restart", "always", "--ready", "notify", "-k", "100ms") as server:
        server.comes_up()
        order(server, tmp_path, 1, "ignore SIGTERM", "notify READY=1")
        server.started.line("^portexec: ready after ")
        old = server.pid
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 2, "notify READY=1")
        server.started.line("old one is told to end")
        os.kill(int(status_of(old)["PPid"]), signal.SIGKILL)
        assert wait_for(lambda: is_gone(old))
        order(server, tmp_path, 2, "notify STATUS=goes-on")


def test_the_time_to_become_ready_runs_when_the_shim_is_stopped() -> None:
    """Then portexec does not even hear that the command runs."""
    options = ["-q", "-H", "fd", "-k", "100ms", "--ready", "accept", "--ready-timeout", "1s"]
    done = run(*options, "--", "sh", "-c", "kill -STOP $PPID; sleep 1000")
    assert done.returncode == server_errors.NotReady.status
    assert "portexec: error: the command was not ready after 1 s" in done.stderr


@pytest.mark.parametrize("who", ["old", "new", "both"])
def test_a_unix_socket_that_two_starts_share_is_made_anew_when_one_shuts_it_down(who: str, tmp_path: Path) -> None:
    """That cannot be undone. So the start that is left is restarted, on a new socket at the same path."""
    listen = ["-l", f"unix:{tmp_path / 'socket'}"]
    with with_orders(tmp_path, "--restart", "always", "--ready", "notify", "-k", "100ms", *listen) as server:
        url = server.started.url()
        server.comes_up()
        order(server, tmp_path, 1, "take PORT 3", "notify READY=1")
        server.started.line("^portexec: ready after ")
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 2, "take PORT 3")
        if who == "new":
            order(server, tmp_path, 2, "shutdown PORT", "exit 3")
        else:
            order(server, tmp_path, 1, "shutdown PORT", *(["ignore SIGTERM"] if who == "both" else []))
            order(server, tmp_path, 2, "notify READY=1")
        if who == "both":  # the old one is told to end, and has not ended, when the new one ends
            server.started.line("old one is told to end")
            order(server, tmp_path, 2, "exit 3")
        server.comes_up()
        order(server, tmp_path, 3, "take PORT 3", "notify READY=1")
        with wait_for(lambda: connect(url)) as client:
            order(server, tmp_path, 3, "accept PORT")
            assert client.recv(100) == b"accepted"
        assert not (tmp_path / "4").exists()


# --lazy


@WITH_DESCRIPTOR
def test_lazy_starts_at_the_first_connection_which_is_served(listen: str, tmp_path: Path) -> None:
    with obeying("--lazy", "-H", "fd", "-l", listen.format(tmp_path)) as server:
        url = server.started.url()
        assert is_not_started(server.process.pid)
        with connect(url) as client:
            server.comes_up()
            server.do("take PORT 3", "accept PORT")
            assert client.recv(100) == b"accepted"


def is_not_started(portexec: int) -> bool:
    """Whether portexec and its shims are still all that there is, after portexec had the turn several times."""
    wait_for(lambda: are_shims(tree_of(portexec)[1:]))  # which are named a moment after the fork
    for _ in range(TURNS):
        before = switches(portexec)
        os.kill(portexec, signal.SIGWINCH)  # which nobody minds
        wait_for(lambda before=before: switches(portexec) > before)  # type: ignore[misc]
    return are_shims(tree_of(portexec)[1:])


def are_shims(pids: list[int]) -> bool:
    return bool(pids) and all(Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"shim\0") for pid in pids)


def tree_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for word in children for below in tree_of(int(word)))]


def switches(pid: int) -> int:
    return int(status_of(pid)["voluntary_ctxt_switches"])


def test_lazy_with_datagrams() -> None:
    script = "import socket; s = socket.socket(fileno=3); print('up', flush=True); s.sendto(*s.recvfrom(100))"
    with running("--lazy", "-l", "udp:0", "-H", "fd", "--", sys.executable, "-c", script) as started:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("127.0.0.1", port_of(started.url())))
            client.settimeout(DEADLINE)
            assert is_not_started(started.process.pid)
            client.send(b"first")
            assert client.recv(100) == b"first"
        assert started.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("which", [0, 1])
def test_lazy_with_several_listeners(which: int, tmp_path: Path) -> None:
    with obeying("--lazy", "-H", "fd", "-l", "a=0", "-l", f"b=unix:{tmp_path}/s") as server:
        urls = [server.started.url(), server.started.url()]
        with connect(urls[which]) as client:
            server.comes_up()
            server.do(f"take PORT {3 + which}", "accept PORT")
            assert client.recv(100) == b"accepted"


def test_lazy_counts_a_client_that_has_left_again() -> None:
    with obeying("--lazy", "-H", "fd") as server:
        connect(server.started.url()).close()
        server.comes_up()


def test_lazy_tells_when_it_is_ready() -> None:
    with (
        obeying("--lazy", "-H", "fd", "--ready-fd", "1", "--ready-timeout", "1h") as server,
        connect(server.started.url()) as client,
    ):
        server.comes_up()
        server.do("take PORT 3", "accept PORT")
        assert client.recv(100) == b"accepted"
        assert server.is_awaited()
        server.do("accept PORT")
        assert server.ready()["command_pid"] == server.pid


def test_lazy_gives_the_time_from_the_start() -> None:
    """Before the first connection it does not run out."""
    with obeying("--lazy", "-H", "fd", "--ready", "notify", "--ready-timeout", "0") as server:
        url = server.started.url()
        assert is_not_started(server.process.pid)
        with suppress(ConnectionResetError), connect(url):  # it may be over before we know that we are connected
            pass
        server.started.line("^portexec: error: the command was not ready after 0 s")


CLIENT = "import os, socket; s = socket.create_connection(('127.0.0.1', int(os.environ['PORT']))); print(s.recv(100).decode())"


def test_lazy_with_tests_that_make_the_first_connection(tmp_path: Path) -> None:
    tests = f"echo begin; {shlex.quote(sys.executable)} -c {shlex.quote(CLIENT)}; exit 7"
    words = [*child("obedient"), "take PORT 3", "accept PORT"]
    done = run("--lazy", "-H", "fd", "-e", f"ORDERS={tmp_path}", "--then", tests, "--", *words)
    lines = done.stdout.splitlines()
    assert lines[0] == "begin"
    assert "accepted" in lines
    assert done.returncode == 7


def test_lazy_with_tests_that_make_none() -> None:
    done = run("--lazy", "-H", "fd", "--then", "echo tests; exit 7", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (7, "tests\n")


def test_lazy_is_restarted() -> None:
    with obeying("--lazy", "-H", "fd", "--restart", "always", "--ready", "none") as server:
        url = server.started.url()
        for _ in range(3):
            with connect(url) as client:
                server.comes_up()
                server.do("take PORT 3", "accept PORT")
                assert client.recv(100) == b"accepted"
            server.do("exit 0")
            restarts(server)


def test_lazy_is_replaced_by_a_hup(tmp_path: Path) -> None:
    with with_orders(tmp_path, "--lazy", "--restart", "on-failure", "--ready", "notify") as server:
        url = server.started.url()
        with connect(url) as first:
            server.comes_up()
            order(server, tmp_path, 1, "notify READY=1", "take PORT 3", "accept PORT")
            assert first.recv(100) == b"accepted"
        server.started.line("^portexec: ready after ")
        old = server.pid
        server.process.send_signal(signal.SIGHUP)
        server.comes_up()
        order(server, tmp_path, 2, "notify READY=1")
        server.started.line("old one is told to end")
        assert wait_for(lambda: is_gone(old))
        for _ in range(2):
            with connect(url) as client:
                assert server.is_awaited()
                order(server, tmp_path, 2, "take PORT 3", "accept PORT")
                assert client.recv(100) == b"accepted"


def test_a_hup_before_a_lazy_start(tmp_path: Path) -> None:
    """There is nothing to be replaced; one server serves."""
    with with_orders(tmp_path, "--lazy", "--restart", "on-failure") as server:
        url = server.started.url()
        server.process.send_signal(signal.SIGHUP)
        assert is_not_started(server.process.pid)
        with connect(url) as client:
            server.comes_up()
            order(server, tmp_path, 1, "take PORT 3", "accept PORT")
            assert client.recv(100) == b"accepted"
            assert server.is_awaited()
        assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_lazy_told_to_stop_before_it_starts(number: int, tmp_path: Path) -> None:
    port_file, path = tmp_path / "port", tmp_path / "s"
    words = ["--lazy", "-H", "fd", "-l", "0", "-l", f"unix:{path}", "--port-file", str(port_file)]
    with running(*words, "--", "echo", "started") as started:
        started.url(), started.url()
        assert port_file.exists()
        assert path.exists()
        started.process.send_signal(number)
        assert started.process.communicate(timeout=DEADLINE)[0] == ""
        assert started.process.returncode == -number
    assert list(tmp_path.iterdir()) == []


def test_lazy_ends_when_nobody_is_left_to_start_it(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    with running("--lazy", "-H", "fd", "--port-file", str(port_file), "--", "echo", "started") as started:
        started.url()
        (shim,) = wait_for(lambda: tree_of(started.process.pid)[1:])
        os.kill(shim, signal.SIGKILL)
        told, said = started.process.communicate(timeout=DEADLINE)
        assert (started.process.returncode, told) == (125, "")
        assert said == "portexec: error: cannot start the command: the process that was to start it was killed\n"
    assert not port_file.exists()


def test_lazy_with_a_command_that_cannot_be_executed(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with running("--lazy", "-H", "fd", "--", str(script)) as started, connect(started.url()):
        assert started.process.wait(DEADLINE) == 126


@pytest.mark.parametrize("when", ["before it starts", "when it runs"])
def test_lazy_killed_leaves_no_file(when: str, tmp_path: Path) -> None:
    port_file, export, path = tmp_path / "port", tmp_path / "export", tmp_path / "s"
    words = ["--port-file", str(port_file), "--export", str(export), "-l", "0", "-l", f"unix:{path}"]
    with obeying("--lazy", "-H", "fd", *words) as server:
        url = server.started.url()
        server.started.url()
        assert all(file.exists() for file in (port_file, export, path))
        if when == "when it runs":
            with connect(url):
                server.comes_up()
        server.process.kill()
        assert wait_for(lambda: not list(tmp_path.iterdir()))


# What is published is withdrawn


def files(directory: Path) -> list[str]:
    return ["--port-file", str(directory / "port"), "--export", str(directory / "export")]


ENDS = {
    "by itself": (["--ready", "none"], "exit 3", 3),
    "by a signal": (["--ready", "none"], "kill -KILL $$", -9),
    "before it was ready": (["--ready-timeout", "1h"], "exit 3", 3),
    "with its tests": (["--ready", "none", "--then", "exit 7"], "exec sleep 1000", 7),
    "too late": (["--ready", "notify", "--ready-timeout", "100ms"], "exec sleep 1000", 124),
}


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize(("options", "script", "status"), ENDS.values(), ids=ENDS.keys())
def test_the_files_are_removed_at_the_end(hand_off: str, options: list[str], script: str, status: int, tmp_path: Path) -> None:
    """They are there, complete, when the command starts."""
    check = f"grep -q $PORT {tmp_path}/port && grep -q PORT=$PORT {tmp_path}/export && echo there; {script}"
    done = run(*files(tmp_path), *options, "-H", hand_off, "--", "sh", "-c", check)
    assert done.returncode == status
    if "too late" not in done.stderr and status not in (7, 124):  # there the command may have come no further
        assert done.stdout == "there\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_the_files_are_removed_when_it_cannot_be_executed(hand_off: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert run(*files(tmp_path), "--restart", "always", "-H", hand_off, "--", str(script)).returncode == 126
    assert [path.name for path in tmp_path.iterdir()] == ["script"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_the_files_are_removed_when_it_is_told_to_stop(hand_off: str, number: int, tmp_path: Path) -> None:
    with serving(*files(tmp_path), "--ready", f"notify:{tmp_path}/notify", "-H", hand_off) as server:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "notify", "port"]
        assert server.stopped(number) == -signal.SIGTERM  # as the server ended
    assert list(tmp_path.iterdir()) == []


def test_they_stay_during_a_restart(tmp_path: Path) -> None:
    with serving(*files(tmp_path), "--restart", "always", "--ready", "none", "-H", "fd") as server:
        before = [(tmp_path / name).read_text() for name in ("port", "export")]
        server.do("exit 0")
        server.comes_up()
        assert [(tmp_path / name).read_text() for name in ("port", "export")] == before


def test_files_that_somebody_else_wrote_stay(tmp_path: Path) -> None:
    port, export = tmp_path / "port", tmp_path / "export"
    with serving(*files(tmp_path), "--ready", "none", "-H", "fd") as server:
        ours = export.read_text()
        port.write_text("4711\n")
        export.write_text(f"{ours}OTHER=4711\n")
        server.do("exit 0")
        assert server.ended() == 0
    assert port.read_text() == "4711\n"
    assert export.read_text() == f"{ours}OTHER=4711\n"


@pytest.mark.parametrize("before", ["", "KEPT=1\n", "KEPT=1"], ids=["empty", "a line", "a line without its end"])
def test_an_export_file_that_was_there_before_stays(before: str, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.write_text(before)
    with serving(*files(tmp_path), "--ready", "none", "-H", "fd") as server:
        port = port_of(server.started.url())
        server.do("exit 0")
        assert server.ended() == 0
    assert export.read_text() == (before and f"{before.rstrip()}\n") + f"PORT={port}\n"
    assert not (tmp_path / "port").exists()


def test_what_somebody_else_put_in_the_place_of_our_unix_socket_stays(tmp_path: Path) -> None:
    path, notify = tmp_path / "s", tmp_path / "notify"
    with serving("-l", f"unix:{path}", "--ready", f"notify:{notify}", "-H", "fd") as server:
        path.unlink()
        notify.unlink()
        with socket.socket(socket.AF_UNIX) as others, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another:
            others.bind(str(path))
            others.listen()
            another.bind(str(notify))
            server.do("exit 0")
            assert server.ended() == 0
            assert path.exists()
            assert notify.exists()


def test_the_port_file_of_another_run_stays(tmp_path: Path) -> None:
    words = [*files(tmp_path), "--ready", "none", "-H", "fd"]
    with serving(*words) as first, serving(*words) as second:
        port = port_of(second.started.url())
        first.do("exit 0")
        assert first.ended() == 0
        assert (tmp_path / "port").read_text() == f"{port}\n"
        assert f"PORT={port}\n" in (tmp_path / "export").read_text()
