"""The processes below this one: who they are, and how they are stopped. Found in /proc, so whatever they did to hide."""

from __future__ import annotations

import _signal
import os
import time

from portexec.parent import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

_SHORTEST_PAUSE = 0.005  # seconds between two looks at a tree that is being stopped; the deaths of children wake us earlier
_LONGEST_PAUSE = 0.2
_LONGER = 1.5

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, proc_pid_stat(5): set before a process closes its sockets
_KILLED = 1 << 8  # SIGKILL, into which the kernel turns what is to end a process (complete_signal() in kernel/signal.c)


class Stop:
    """Stops all that is below this subreaper: TERM to each as soon as it is seen, KILL when the time is over.

    `kill_after` is the time in seconds between the two, from now on. The processes of `spare`, and what is below them, are
    left alone.
    """

    def __init__(self, kill_after: float, spare: Set[int] = frozenset()) -> None:
        self._deadline = time.monotonic() + kill_after
        self._spare = spare
        self._told: set[int] = set()
        self._pause = _SHORTEST_PAUSE

    def hurry(self) -> None:
        """KILL from now on."""
        self._deadline = 0.0

    def step(self) -> bool:
        """Send what is due. Returns whether anything is left; then to be called again, `pause` later at the latest.

        A look at /proc can miss who forks and ends meanwhile. But as long as there is anything below us, something is our own
        child, and that stays in /proc until we wait for it: so it is over when there is no child, not even a dead one.
        """
        by_parent, dead, stopped = _processes()
        tree = _below(os.getpid(), by_parent, self._spare)
        is_over = time.monotonic() > self._deadline
        for pid in tree - dead if is_over else tree - dead - self._told:
            signals.send(pid, _signal.SIGKILL if is_over else _signal.SIGTERM)
            if pid in stopped:  # by Ctrl-Z: it can act on TERM only when it goes on
                signals.send(pid, _signal.SIGCONT)
        self._told |= tree
        return not self._spare >= set(by_parent.get(os.getpid(), ()))

    def pause(self) -> float:
        """Seconds until the next step; longer each time, so that a long wait costs little."""
        self._pause = min(_LONGER * self._pause, _LONGEST_PAUSE)
        return min(self._pause, max(0.0, self._deadline - time.monotonic()) or _SHORTEST_PAUSE)


def children() -> set[int]:
    """The pids of this process' own children, dead ones too; cheap where there are none, as mostly before the first is started.

    Whoever became portexec by exec may have had some, which are not ours to stop.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return set(_processes()[0].get(os.getpid(), ()))


def descendants(root: int) -> set[int]:
    """The pids of all living processes below `root`."""
    by_parent, dead, _ = _processes()
    return _below(root, by_parent, frozenset()) - dead


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


def _is_task_ending(task: str) -> bool:
    with open(f"{task}/stat", "rb") as stat, open(f"{task}/status", "rb") as status:
        # The second field is the program's name in parentheses, in which anything may stand.
        flags = int(stat.read().rpartition(b")")[2].split()[6])
        _, is_told, rest = status.read().partition(b"\nSigPnd:")  # not everybody who plays Linux tells
        return bool(flags & _PF_EXITING or (is_told and int(rest.split()[0], 16) & _KILLED))


def shells() -> set[int]:
    """The processes of our session from which we descend, and its leader: who may pass on the hang-up of its terminal."""
    session = os.getsid(0)
    found = {session}
    pid = os.getppid()
    try:
        while os.getsid(pid) == session:
            found.add(pid)
            with open(f"/proc/{pid}/stat", "rb") as stat:
                pid = int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        pass  # it has ended, or cannot be seen
    return found


def continue_if_stopped(pid: int) -> None:
    """CONT to a process if it was stopped."""
    if pid in _processes()[2]:
        signals.send(pid, _signal.SIGCONT)


def _below(root: int, by_parent: Mapping[int, Iterable[int]], spare: Set[int]) -> set[int]:
    found: set[int] = set()
    level = [root]
    while level:
        level = [pid for parent in level for pid in by_parent.get(parent, ()) if pid not in found and pid not in spare]
        found.update(level)
    return found


def _processes() -> tuple[dict[int, list[int]], set[int], set[int]]:
    """All processes of the machine that /proc shows, by the pid of their parent; the dead ones, not waited for; the stopped."""
    by_parent: dict[int, list[int]] = {}
    dead, stopped = set(), set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                state, parent, threads = fields[0], fields[1], fields[17]
            except OSError:
                continue
            by_parent.setdefault(int(parent), []).append(int(name))
            if state == b"Z" and int(threads) == 1:  # a main thread that has ended is a zombie while others go on
                dead.add(int(name))
            elif state == b"T":
                stopped.add(int(name))
    return by_parent, dead, stopped
