"""Processes, as /proc shows them (proc(5)): who is below whom, who is about to end, where a shell is above us.

Everything here is a look: a process can have ended, and its number can be another's, when the answer is read.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, proc_pid_stat(5): set before a process closes its sockets
_KILLED = 1 << 8  # SIGKILL, into which the kernel turns what is to end a process (complete_signal() in kernel/signal.c)


class Processes:
    """One look at all processes: the children of each, those that have ended but are there, those that are stopped."""

    __slots__ = ("children", "dead", "stopped")

    def __init__(self) -> None:
        self.children: dict[int, list[int]] = {}
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    fields = _stat(f"/proc/{name}")
                except OSError:
                    continue
                self._add(int(name), fields[0], int(fields[1]), threads=int(fields[17]))

    def _add(self, pid: int, state: bytes, parent: int, threads: int) -> None:
        self.children.setdefault(parent, []).append(pid)
        if state == b"Z" and threads == 1:  # a main thread that has ended is a zombie while others go on
            self.dead.add(pid)
        elif state == b"T":
            self.stopped.add(pid)

    def below(self, root: int, spare: Set[int] = frozenset()) -> set[int]:
        """The living processes below this one, but for those of `spare` and what is below them."""
        return _below(root, self.children, spare) - self.dead


def descendants(root: int) -> set[int]:
    """The pids of all living processes below `root`."""
    return Processes().below(root)


def children() -> set[int]:
    """The pids of this process' own children, dead ones too."""
    return set(Processes().children.get(os.getpid(), ()))


def is_ending(pid: int) -> bool:
    """Whether a process is about to end, or has ended, as far as the kernel lets us know."""
    try:
        return all(_is_task_ending(f"/proc/{pid}/task/{task}") for task in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def shells() -> set[int]:
    """The processes of our session from which we descend, and its leader: who may pass on the hang-up of its terminal."""
    session = os.getsid(0)
    found = {session}
    pid = os.getppid()
    try:
        while os.getsid(pid) == session:
            found.add(pid)
            pid = int(_stat(f"/proc/{pid}")[1])
    except OSError:
        pass  # it has ended, or cannot be seen
    return found


def _stat(directory: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on. The one before, the name, is in parentheses and can hold anything."""
    with open(f"{directory}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2].split()


def _is_task_ending(task: str) -> bool:
    flags = int(_stat(task)[6])
    with open(f"{task}/status", "rb") as status:
        _, is_told, rest = status.read().partition(b"\nSigPnd:")  # not everybody who plays Linux tells
    return bool(flags & _PF_EXITING or (is_told and int(rest.split()[0], 16) & _KILLED))


def _below(root: int, children: Mapping[int, Iterable[int]], spare: Set[int]) -> set[int]:
    found: set[int] = set()
    level = [root]
    while level:
        level = [pid for parent in level for pid in children.get(parent, ()) if pid not in found and pid not in spare]
        found.update(level)
    return found
