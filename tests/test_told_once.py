"""One request is told once: what was sent to the whole group, or to each process of it, is not forwarded on top."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import pytest

from tests.support import DEADLINE, running, wait_for
from tests.support.proc import children_of, is_at_rest, name_of, words_of
from tests.support.processes import Running, stop_where_it_waits

pytestmark = pytest.mark.once

MODES = {
    "guard": ["-H", "guard"],
    "ready": ["--ready", "none", "-H", "guard"],
    "restart": ["--restart", "on-failure", "-H", "guard"],
    "fd": ["--ready", "none", "-H", "fd"],
}
# Tells every signal, and ends at QUIT. That is the barrier of these tests: it is forwarded after all that came before it, since
# the other copy of any signal is waited for no longer than that of QUIT. It reads a pipe, since a signal just before pause(2)
# would be kept until the next one comes.
PROGRAM = """
import os, signal
def tell(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number == signal.SIGQUIT:
        os._exit(0)
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR2", "SIGQUIT"):
    signal.signal(getattr(signal, name), tell)
os.write(1, b"ready\\n")
while True:
    os.read(reader, 1)
"""


IN_TIME = 0.02  # seconds; portexec waits 0.05 s for the other copies of a signal


def tell_all(pids: Sequence[int], number: int) -> bool:
    """Tell one process after the other. False if that took too long, since we had to wait for a processor: it says nothing."""
    begin = time.monotonic()
    for pid in pids:
        os.kill(pid, number)
    return len(pids) < 2 or time.monotonic() - begin < IN_TIME


def to_portexec(run: Running, number: int) -> bool:
    return tell_all([run.process.pid], number)


def to_the_group(run: Running, number: int) -> bool:
    os.killpg(run.process.pid, number)
    return True


def to_each(run: Running, number: int) -> bool:
    return tell_all(tree(run.process.pid), number)


def to_each_from_below(run: Running, number: int) -> bool:
    return tell_all(tree(run.process.pid)[::-1], number)


def to_the_shim(run: Running, number: int) -> bool:
    """As `pkill -P` does: it counts as one to portexec."""
    return tell_all(children_of(run.process.pid)[:1], number)


def to_those_named_portexec(run: Running, number: int) -> bool:
    """As `killall portexec` and `pidof` do: the front alone."""
    return to_those_below(run, number, lambda pid: name_of(pid) == "portexec")


def to_those_named_as_the_command(run: Running, number: int) -> bool:
    """As `killall node` does: the command alone."""
    name = name_of(tree(run.process.pid)[2])
    return to_those_below(run, number, lambda pid: name_of(pid) == name)


def to_those_with_the_commands_words(run: Running, number: int) -> bool:
    """As `pkill -f server.js` does: portexec has the words among its own."""
    return to_those_below(run, number, lambda pid: "set_wakeup_fd" in words_of(pid))


def to_those_below(run: Running, number: int, is_meant: Callable[[int], bool]) -> bool:
    return tell_all([pid for pid in tree(run.process.pid) if is_meant(pid)], number)


def tree(pid: int) -> list[int]:
    return [pid, *(each for kid in children_of(pid) for each in tree(kid))]


def told(run: Running) -> str:
    assert run.process.stdout is not None
    return run.process.stdout.readline().strip()


def end(run: Running) -> None:
    """Have the command end, which ends at nothing else, whatever it was told before."""
    run.process.send_signal(signal.SIGQUIT)
    while told(run) not in ("SIGQUIT", ""):
        pass


BY_NAME = [to_those_named_portexec, to_those_named_as_the_command, to_those_with_the_commands_words]
TO_ALL = [to_portexec, to_the_group, to_each, to_each_from_below, to_the_shim, *BY_NAME]
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
# Only what ends programs is waited for as long as it takes a program to tell one process after the other.
WAYS = [(number, send) for number in ENDING for send in TO_ALL]
WAYS += [(signal.SIGUSR2, send) for send in (to_portexec, to_the_group, to_the_shim)]


@pytest.mark.parametrize(("number", "send"), WAYS, ids=lambda each: getattr(each, "name", None) or each.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_is_told_once(mode: str, number: signal.Signals, send: Callable[[Running, int], bool]) -> None:
    while True:
        with running("-q", *MODES[mode], "--", sys.executable, "-S", "-c", PROGRAM) as run:
            assert told(run).startswith("ready")
            if send(run, number):
                is_told_once(run, mode, number, send)
                return
            end(run)


def is_told_once(run: Running, mode: str, number: signal.Signals, send: Callable[[Running, int], bool]) -> None:
    """Hold that the command is told it, and then the barrier."""
    # Where portexec stops a command, it says TERM, unless the command was told otherwise by whoever told all of them.
    to_us_alone = (to_portexec, to_the_shim, to_those_named_portexec)
    says_term = mode != "guard" and number == signal.SIGINT and send in to_us_alone
    assert told(run) == ("SIGTERM" if says_term else number.name)
    run.process.send_signal(signal.SIGQUIT)
    assert told(run) == "SIGQUIT"


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)], ids=["TERM INT", "INT TERM"]
)
@pytest.mark.parametrize("mode", ["ready", "fd", "restart"])
def test_term_and_int_together_are_one_request(mode: str, numbers: tuple[signal.Signals, ...]) -> None:
    """As some say who stop a server. It is killed when it is told again, and not by that."""
    with running("-q", "-k", "1h", *MODES[mode], "--", sys.executable, "-S", "-c", PROGRAM) as run:
        assert told(run).startswith("ready")
        stop_where_it_waits(run.process.pid)  # so that it finds both at once, also on a busy machine
        for number in (*numbers, signal.SIGCONT):
            run.process.send_signal(number)
        assert told(run) == "SIGTERM"
        os.kill(tree(run.process.pid)[2], signal.SIGQUIT)
        assert told(run) == "SIGQUIT"
        assert run.process.wait(DEADLINE) == 0


def test_where_portexec_merely_waits_the_command_gets_both() -> None:
    with running("-q", *MODES["guard"], "--", sys.executable, "-S", "-c", PROGRAM) as run:
        assert told(run).startswith("ready")
        for number in (signal.SIGTERM, signal.SIGINT):
            run.process.send_signal(number)
        assert {told(run), told(run)} == {"SIGTERM", "SIGINT"}
        run.process.send_signal(signal.SIGQUIT)
        assert told(run) == "SIGQUIT"


@pytest.mark.parametrize("mode", MODES)
def test_the_command_of_a_killed_shim_is_told_once(mode: str) -> None:
    """By the kernel, which portexec knows. The rest is told by portexec."""
    helper = '(sleep 1000 & trap "echo helper; exit" TERM; echo ready; while :; do wait; done) & exec "$@"'
    words = ["sh", "-c", helper, "sh", sys.executable, "-S", "-c", PROGRAM]
    with running("-q", "-k", "1h", *MODES[mode], "--", *words) as run:
        assert [told(run), told(run)] == ["ready", "ready"]
        _, shim, command, *_ = tree(run.process.pid)
        wait_for(lambda: is_at_rest(shim))  # it has told which process the command is
        os.kill(shim, signal.SIGKILL)
        assert {told(run), told(run)} == {"SIGTERM", "helper"}
        os.kill(command, signal.SIGQUIT)
        assert told(run) == "SIGQUIT"
        assert run.process.wait(DEADLINE) == -signal.SIGKILL


@pytest.mark.parametrize("send", [to_portexec, to_the_group, to_each])
def test_with_tests_the_server_is_told_once(send: Callable[[Running, int], bool]) -> None:
    """The shim of the tests is in the group, too."""
    tests = "trap '' USR2; echo tests; exec sleep 1000"
    while True:
        with running("-q", "--ready", "none", "--then", tests, "--", sys.executable, "-S", "-c", PROGRAM) as run:
            assert {told(run), told(run)} == {"ready", "tests"}
            if send(run, signal.SIGUSR2):
                assert told(run) == "SIGUSR2"
                run.process.send_signal(signal.SIGQUIT)
                assert told(run) == "SIGQUIT"
                return
            end(run)


def test_names_and_words() -> None:
    """What ps(1) shows. As much of the command's words as portexec had room for in its own."""
    with running("-q", "-H", "guard", "--", "sh", "-c", "sleep 1000; :", "x" * 3000) as run:
        shim = wait_for(lambda: children_of(run.process.pid))[0]
        command = wait_for(lambda: children_of(shim))[0]
        wait_for(lambda: name_of(command) == "sh")
        assert [name_of(run.process.pid), name_of(shim)] == ["portexec", "shim"]
        assert words_of(shim).split() == ["shim", *words_of(command).split()]
        assert "portexec -q -H guard -- sh" in words_of(run.process.pid)
