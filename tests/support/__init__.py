"""What test modules share, one topic to a module. Test modules import from here and never from each other.

    waiting     wait for a condition; the one patience of all tests
    processes   start programs and portexec, in whatever surroundings, and talk to them
    proc        read /proc
    terminals   programs on a terminal of their own
    network     clients, addresses, a socket that asks for somebody else's number
    thieves     tests/children/thief.py, which tries every way to a number
    installed   what is on this machine, and what a test needs
    obedience   tests/children/obedient.py, a server that does what the test says
    guard_world a command below portexec and bare, step by step, and probers after each step
    names       servers with a name, and their registry
    serving     servers of `portexec.serve`, and programs that call it

The names that nearly every module uses can be imported from the package itself.
"""

from tests.support.network import get
from tests.support.proc import descriptors_of, is_gone, status_of
from tests.support.processes import (
    ANNOUNCED,
    CHILDREN,
    PORTEXEC,
    ROOT,
    STRANGER,
    Running,
    child,
    kill_group,
    read_line,
    run,
    running,
    tell,
)
from tests.support.waiting import DEADLINE, wait_for, within

__all__ = [
    "ANNOUNCED",
    "CHILDREN",
    "DEADLINE",
    "PORTEXEC",
    "ROOT",
    "STRANGER",
    "Running",
    "child",
    "descriptors_of",
    "get",
    "is_gone",
    "kill_group",
    "read_line",
    "run",
    "running",
    "status_of",
    "tell",
    "wait_for",
    "within",
]
