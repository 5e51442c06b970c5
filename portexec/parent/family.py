"""The process in which one or several runs live: its signals, and the processes around it."""

from __future__ import annotations

import os

from portexec.parent import signals
from portexec.parent.shim import shims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.parent.shim import Shim
    from portexec.parent.signals import Inbox


class Family:
    """The inbox of this process, and its relatives.

    `others` are children that are not ours to stop: those from before this process was portexec, and shims that stay with a
    daemon. `shells` are processes that may pass on the hang-up of the terminal that portexec began with, if there was one.
    `is_shared`: several runs live in this process, a host, which takes the signals itself.
    """

    __slots__ = ("_rehearsed", "inbox", "is_shared", "others", "shells")

    def __init__(self, inbox: Inbox, others: set[int], shells: set[int], *, is_shared: bool = False) -> None:
        self.inbox = inbox
        self.others = others
        self.shells = shells
        self.is_shared = is_shared
        self._rehearsed: list[tuple[Mapping[int, int], int]] = []  # limits, and the most guards

    def is_rehearsed(self, limits: Mapping[int, int], guards: int) -> bool:
        """Whether a start with these limits and so many guards need not be rehearsed any more.

        All else that decides about admission is the same for all starts below one portexec: kernel, users, profiles.
        """
        return any(limits == known and guards <= most for known, most in self._rehearsed)

    def note_rehearsal(self, limits: Mapping[int, int], guards: int) -> None:
        """A start with these limits and so many guards was prepared, and its binds need no gate."""
        if not self.is_rehearsed(limits, guards):
            self._rehearsed.append((limits, guards))

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
