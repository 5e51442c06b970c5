"""Stopping what is below a subreaper. As long as there is anything, one of its processes is a child of the subreaper.

A look at /proc can miss who forks and ends meanwhile. A child stays there until it is waited for, dead or alive, so it is over
when there is no child.
"""

from __future__ import annotations

import _signal
import os
import time

from portexec.parent.loop import Event, first, sleep
from portexec.parent.signals import has_children, send
from portexec.procfs import Processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Set

_SHORTEST_PAUSE = 0.005  # seconds between two rounds of KILL, for what forks meanwhile; the deaths of children end it earlier
_LONGEST_PAUSE = 0.2
_LONGER = 1.5


def tell(pids: Iterable[int], number: int, processes: Processes) -> None:
    """Send a signal to each of these. One that was stopped by Ctrl-Z can act on it only when it goes on."""
    for pid in pids:
        send(pid, number)
        if pid in processes.stopped:
            send(pid, _signal.SIGCONT)


async def kill_below(is_childless: Event, spare: Set[int] = frozenset()) -> None:
    """KILL to all that is below this process, but for those of `spare` and what is below them, until nothing is left."""
    pause = _SHORTEST_PAUSE
    while not is_childless.is_set():
        for pid in Processes().below(os.getpid(), spare):
            send(pid, _signal.SIGKILL)
        await first(is_childless.wait(), within=pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)


async def clear_away(spare: Set[int], kill_after: float, is_hurried: Event) -> None:
    """TERM, and KILL so many seconds later, to all that is below this process, until only those of `spare` are left.

    Cheap where nothing is. For the process that has children which are not its own to stop.
    """
    deadline = time.monotonic() + kill_after
    told: set[int] = set()
    pause = _SHORTEST_PAUSE
    while has_children():
        processes = Processes()
        if spare >= set(processes.children.get(os.getpid(), ())):
            return
        is_over = is_hurried.is_set() or time.monotonic() > deadline
        below = processes.below(os.getpid(), spare)
        tell(below if is_over else below - told, _signal.SIGKILL if is_over else _signal.SIGTERM, processes)
        told |= below
        await sleep(pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)
