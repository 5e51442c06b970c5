"""portexec, to which something happens at some moments: `moment.py PROCESS:NUMBER:WHAT,... WORD...`.

A moment is just before a call, by a line of portexec's own, that may enter the kernel: they are counted in each process from
its beginning. Python's profiler tells of them, so it needs no right to trace, and nothing is replaced.

PROCESS  `.` is the front, `1` what it forks first, `2` what it forks second, `1.1` what `1` forks first
NUMBER   which moment of that process; or `FUNCTION/N`: the first in this function when it has forked N times
WHAT     what happens to the process
    TERM, KILL, ...  a signal; STOP: somebody has to send CONT
    full             it can open no more descriptors, unless it closes some
    memory           MemoryError, as if there had been no memory for this call

With $MOMENTS, all moments of all processes are appended to that file: the process, and the functions that it was in.
"""

from __future__ import annotations

import _signal
import _socket
import os
import resource
import select
import sys

from portexec import cli

EVENTS, *WORDS = sys.argv[1:]
HAPPENS = {(process, number): what for process, number, what in (event.split(":") for event in EVENTS.split(",") if event)}
LOG = os.environ.pop("MOMENTS", "")
PACKAGE = os.path.dirname(cli.__file__)
KERNEL = os.path.join(PACKAGE, "kernel.py")
MODULES = {"posix", "_signal", "fcntl", "select", "resource"}
OBJECTS = (_socket.socket, type(select.poll()))


class Process:
    """Which process this is, what it has forked, and at which moment it is."""

    name = "."
    forks = 0
    count = 0


def may_enter_the_kernel(event, frame, called):
    if event == "call":  # by way of ctypes, of which the profiler does not tell
        return frame.f_code.co_name == "call" and frame.f_code.co_filename == KERNEL
    is_own = event == "c_call" and frame.f_code.co_filename.startswith(PACKAGE)
    owner = getattr(called, "__self__", None)
    return is_own and (getattr(called, "__module__", None) in MODULES or isinstance(owner, OBJECTS) or called is _socket.socket)


def look(frame, event, called):
    if not may_enter_the_kernel(event, frame, called):
        return
    Process.count += 1
    if LOG:
        write_down(frame, called)
    for number in (str(Process.count), f"{frame.f_code.co_name}/{Process.forks}"):
        if what := HAPPENS.pop((Process.name, number), ""):
            happen(what)


def write_down(frame, called):
    name = getattr(called, "__name__", "ctypes")
    functions: list[str] = []
    while frame is not None and len(functions) < 8:
        functions.append(frame.f_code.co_name)
        frame = frame.f_back
    fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{Process.name} {name} {' '.join(functions)}\n".encode())
    os.close(fd)


def fill():
    """Take every number up to the highest that is in use, which is the limit from now on."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pass


def happen(what):
    if what == "memory":
        raise MemoryError
    if what == "full":
        fill()
    else:
        os.kill(os.getpid(), getattr(_signal, f"SIG{what}"))


def count_fork():
    Process.forks += 1


def become_fork():
    Process.name = f"{Process.name}.{Process.forks}".removeprefix("..")
    Process.forks = 0
    Process.count = 0


os.register_at_fork(before=count_fork, after_in_child=become_fork)
sys.setprofile(look)
sys.exit(cli.main(WORDS))
