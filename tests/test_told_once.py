"""One request is told once: what was sent to the whole group, or to each process of it, is not forwarded on top."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import pytest

from tests.support import running
from tests.support.proc import children_of
from tests.support.processes import Running

MODES = {
    "guard": ["-H", "guard"],
    "ready": ["--ready", "none", "-H", "guard"],
    "restart": ["--restart", "on-failure", "-H", "guard"],
    "fd": ["--ready", "none", "-H", "fd"],
}
# Tells every signal, and ends at QUIT. That is the barrier of these tests: it is forwarded after all that came before it, since
# the other copy of any signal is waited for no longer than that of QUIT.
PROGRAM = """
import os, signal
def tell(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number == signal.SIGQUIT:
        os._exit(0)
for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR2", "SIGQUIT"):
    signal.signal(getattr(signal, name), tell)
print("ready", flush=True)
while True:
    signal.pause()
"""


def to_portexec(run: Running, number: int) -> None:
    run.process.send_signal(number)


def to_the_group(run: Running, number: int) -> None:
    os.killpg(run.process.pid, number)


def to_each(run: Running, number: int) -> None:
    for pid in tree(run.process.pid):
        os.kill(pid, number)


def to_each_from_below(run: Running, number: int) -> None:
    for pid in reversed(tree(run.process.pid)):
        os.kill(pid, number)


def to_the_shim(run: Running, number: int) -> None:
    """As `pkill -P` does: it counts as one to portexec."""
    os.kill(children_of(run.process.pid)[0], number)


def tree(pid: int) -> list[int]:
    return [pid, *(each for kid in children_of(pid) for each in tree(kid))]


def told(run: Running) -> str:
    assert run.process.stdout is not None
    return run.process.stdout.readline().strip()


TO_ALL = [to_portexec, to_the_group, to_each, to_each_from_below, to_the_shim]
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
# Only what ends programs is waited for as long as it takes a program to tell one process after the other.
WAYS = [(number, send) for number in ENDING for send in TO_ALL]
WAYS += [(signal.SIGUSR2, send) for send in (to_portexec, to_the_group, to_the_shim)]


@pytest.mark.parametrize(("number", "send"), WAYS, ids=lambda each: getattr(each, "name", None) or each.__name__)
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_is_told_once(mode: str, number: signal.Signals, send: Callable[[Running, int], None]) -> None:
    with running("-q", *MODES[mode], "--", sys.executable, "-S", "-c", PROGRAM) as run:
        assert told(run).startswith("ready")
        send(run, number)
        # Where portexec stops a command, it says TERM, unless the command was told otherwise by whoever told all of them.
        says_term = mode != "guard" and number == signal.SIGINT and send in (to_portexec, to_the_shim)
        assert told(run) == ("SIGTERM" if says_term else number.name)
        run.process.send_signal(signal.SIGQUIT)
        assert told(run) == "SIGQUIT"
