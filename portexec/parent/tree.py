"""Stopping the processes below a subreaper. As long as there are any, one of them is a child of the subreaper.

A look at /proc can miss a process that forks and ends meanwhile. A child remains, dead or alive, until it is waited for. So
all have ended when there is no child.
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
    from collections.abc import Callable, Iterable, Set

_SHORTEST_PAUSE = 0.005  # seconds between two rounds, for processes that fork meanwhile
_LONGEST_PAUSE = 0.2
_LONGER = 1.5


def tell(pids: Iterable[int], number: int, processes: Processes) -> None:
    """Send a signal to each of these, and CONT to those that Ctrl-Z has stopped: else they could not act on it."""
    for pid in pids:
        send(pid, number)
        if pid in processes.stopped:
            send(pid, _signal.SIGCONT)


async def kill_below(is_childless: Event, spare: Set[int] = frozenset()) -> None:
    """Send KILL to all below this process, except those in `spare` and those below them, until nothing is left."""
    pause = _SHORTEST_PAUSE
    while not is_childless.is_set():
        for pid in Processes(os.getpid()).below(os.getpid(), spare):
            send(pid, _signal.SIGKILL)
        await first(is_childless.wait(), within=pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)


async def clear_away(spared: Callable[[], Set[int]], kill_after: float, is_hurried: Event, told: set[int]) -> None:
    """Send TERM, and KILL `kill_after` seconds later, to all below this process, until only `spared()` ones are left.

    For a process with children that are not its own to stop. `told` are those that have had TERM already; it grows. Cheap
    where there is nothing to stop.
    """
    deadline = time.monotonic() + kill_after
    pause = _SHORTEST_PAUSE
    while has_children():
        spare, processes = spared(), Processes()
        if spare >= set(processes.children.get(os.getpid(), ())):
            return
        is_over = is_hurried.is_set() or time.monotonic() > deadline
        below = processes.below(os.getpid(), spare)
        tell(below if is_over else below - told, _signal.SIGKILL if is_over else _signal.SIGTERM, processes)
        told |= below
        await sleep(pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)
