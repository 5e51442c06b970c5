"""The process in which one or several runs live: its signals, and the processes around it."""

from __future__ import annotations

import os

from portexec.parent import signals
from portexec.parent.shim import shims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.parent.shim import Shim
    from portexec.parent.signals import Inbox


class Family:
    """The inbox of this process, and its relatives.

    `others` are children that are not ours to stop: those from before this process was portexec, and shims that stay with a
    daemon. `shells` are processes that may pass on the hang-up of the terminal that portexec began with, if there was one.
    `is_shared`: several runs live in this process, a host, which takes the signals itself.
    """

    __slots__ = ("inbox", "is_shared", "others", "shells")

    def __init__(self, inbox: Inbox, others: set[int], shells: set[int], *, is_shared: bool = False) -> None:
        self.inbox = inbox
        self.others = others
        self.shells = shells
        self.is_shared = is_shared

    async def gone(self, shim: Shim) -> None:
        """Wait for the end of a shim that was told to end. Other runs in this process go on meanwhile."""
        if self.is_shared:
            await shim.has_gone.wait()
        else:
            shim.wait()

    def reap(self) -> list[int]:
        """Take the status of every child that has news. Returns the pids of those that were stopped."""
        stopped = []
        for pid, status in signals.reap():
            self.others.discard(pid)  # another process may get its number
            if os.WIFSTOPPED(status):
                stopped.append(pid)
            elif pid in shims:
                shims[pid].take_end()
        return stopped
