"""The processes below this one: who they are, and how they are stopped. Found in /proc, so whatever they did to hide."""

from __future__ import annotations

import _signal
import os
import time

from portexec.supervisor import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Set

_SHORTEST_PAUSE = 0.005  # seconds between two looks at a tree that is being stopped; the deaths of children wake us earlier
_LONGEST_PAUSE = 0.2
_LONGER = 1.5


class Stop:
    """Stops all that is below this process: TERM to each as soon as it is seen, KILL when the time is over.

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
        """Send what is due. Returns whether anything is left; then to be called again, `pause` later at the latest."""
        tree = descendants(self._spare)
        is_over = time.monotonic() > self._deadline
        for pid in tree if is_over else tree - self._told:
            signals.send(pid, _signal.SIGKILL if is_over else _signal.SIGTERM)
            signals.send(pid, _signal.SIGCONT)  # one that Ctrl-Z has stopped can act on TERM only when it goes on
        self._told |= tree
        return bool(tree)

    def pause(self) -> float:
        """Seconds until the next step; longer each time, so that a long wait costs little."""
        self._pause = min(_LONGER * self._pause, _LONGEST_PAUSE)
        return min(self._pause, max(0.0, self._deadline - time.monotonic()) or _SHORTEST_PAUSE)


def children() -> set[int]:
    """The pids of this process' own children; cheap where there are none, as mostly before the first is started.

    Whoever became portexec by exec may have had some, which are not ours to stop.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return set(_children_by_parent().get(os.getpid(), ()))


def descendants(spare: Set[int] = frozenset(), root: int = 0) -> set[int]:
    """The pids of all processes below `root`, by default below this process, without `spare` and what is below those.

    Those that are dead and wait for their parent are not among them.
    """
    by_parent = _children_by_parent()
    found: set[int] = set()
    level = [root or os.getpid()]
    while level:
        level = [pid for parent in level for pid in by_parent.get(parent, ()) if pid not in found and pid not in spare]
        found.update(level)
    return found


def _children_by_parent() -> dict[int, list[int]]:
    """All processes of the machine that /proc shows, by the pid of their parent."""
    by_parent: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                state, parent, threads = fields[0], fields[1], fields[17]
            except OSError:
                continue
            if state != b"Z" or int(threads) > 1:  # a main thread that has ended is a zombie while others go on
                by_parent.setdefault(int(parent), []).append(int(name))
    return by_parent
