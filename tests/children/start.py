"""Start a command from a state of the test's choosing: argv[1] is JSON with the `command`, its `environment` and the `state`.

It puts back what Python itself changed, so that the command begins as any shell would have it begin.
"""

from __future__ import annotations

import _signal as signal
import ctypes
import fcntl
import os
import resource
import sys
import termios
from _collections_abc import Callable

import quick_json as json  # type: ignore[import-not-found]

PR_CAPBSET_DROP = 24
PR_SET_TIMERSLACK = 29
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
SOCKET_CALL = {"x86_64": 41, "aarch64": 198, "riscv64": 198}

libc = ctypes.CDLL(None, use_errno=True)


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))


def prctl(*arguments: object) -> None:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if libc.prctl(*words, *[ctypes.c_ulong(0)] * (5 - len(words))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


def install(*program: tuple[int, int, int, int]) -> None:
    instructions = (Instruction * len(program))(*(Instruction(*line) for line in program))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(program), instructions)))


def refuse_family(family: list[int]) -> None:
    """Make socket(2) fail for one address family, with the errno of a kernel that was built without it."""
    number, error = family
    install(
        (LOAD, 0, 0, 0),
        (EQUAL, 0, 3, SOCKET_CALL[os.uname().machine]),
        (LOAD, 0, 0, 16),
        (EQUAL, 0, 1, number),
        (RETURN, 0, 0, SECCOMP_RET_ERRNO | error),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
    )


def limit(limits: dict[str, list[int]]) -> None:
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))


def ignore(names: list[str]) -> None:
    for name in names:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def block(names: list[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in names])


def leave_pending(names: list[str]) -> None:
    block(names)
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def open_at(files: dict[str, tuple[str, int, int]]) -> None:
    """Open path with flags and offset at a number that the command inherits."""
    for number, (path, flags, offset) in files.items():
        fd = os.open(path, flags)
        os.lseek(fd, offset, os.SEEK_SET)
        if fd != int(number):
            os.dup2(fd, int(number))
            os.close(fd)
        os.set_inheritable(int(number), True)


def close(numbers: list[int]) -> None:
    for number in numbers:
        os.close(number)


def enter_and_remove(directory: str) -> None:
    os.mkdir(directory)
    os.chdir(directory)
    os.rmdir(f"../{directory}")


def adjust_oom(score: int) -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))


STEPS: dict[str, Callable[..., object]] = {
    "umask": os.umask,
    "directory": os.chdir,
    "removed_directory": enter_and_remove,
    "limits": limit,
    "ignore": ignore,
    "block": block,
    "pending": leave_pending,
    "nice": os.nice,
    "affinity": lambda processors: os.sched_setaffinity(0, processors),
    "batch": lambda _: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
    "timer_slack": lambda nanoseconds: prctl(PR_SET_TIMERSLACK, nanoseconds),
    "personality": libc.personality,
    "oom": adjust_oom,
    "groups": os.setgroups,
    "gid": os.setgid,
    "drop_capability": lambda number: prctl(PR_CAPBSET_DROP, number),
    "no_new_privileges": lambda _: prctl(PR_SET_NO_NEW_PRIVS, 1),
    "filter": lambda _: install((RETURN, 0, 0, SECCOMP_RET_ALLOW)),
    "refuse_family": refuse_family,
    "terminal": lambda fd: fcntl.ioctl(fd, termios.TIOCSCTTY, 0),
    "session": lambda _: os.setsid(),
    "open": open_at,
    "close": close,
}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    for step, value in wanted["state"].items():
        STEPS[step](value)
    os.execve(wanted["command"][0], wanted["command"], wanted["environment"])


main()
