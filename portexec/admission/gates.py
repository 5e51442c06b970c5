"""Gates: a guard gives way to SO_REUSEADDR for one call of one thread, which the kernel makes by itself.

A gate is for a socket of which we get no duplicate, or that is another user's. While a gate is open, anybody with SO_REUSEADDR
can pass. So it opens only for a TCP socket that goes for a number of ours, and it closes when the thread has left its call. Who
has passed with SO_REUSEPORT is in the kernel's cache, and could come again (see `binding.guard`). So a scrub follows.
Nothing tells us when the thread has left. /proc shows the call in which a thread sleeps. Where /proc does not, there are two
signs: a thread in bind(2) neither sleeps nor computes for long. A thread that has done one of them has left the call.
"""

from __future__ import annotations

import os
import time

from portexec.binding import tables
from portexec.procfs import content

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from portexec.admission.seccomp import Notification
    from portexec.binding.guard import Guard

PAUSE = 0.0005  # seconds between two looks at an open gate
_LONGEST = 1.0  # seconds; after this a thread has left its call even if nothing of it can be seen
_WORK = 1_000_000  # nanoseconds; a thread that has computed longer has left its call, which takes a few thousand
_TCP = {"TCP", "TCPv6", "MPTCP", "MPTCPv6"}
_RUNNING = "running"
_LOOKS = 100  # at a thread that waits for us, until it sleeps


class Gate:
    """One open gate: whose call it is for, and who listened on the number before.

    `inode` is that of the caller's socket, 0 where /proc does not tell.
    """

    __slots__ = ("_call", "_end", "_sleeps", "_work", "before", "guard", "inode", "is_bind", "thread")

    def __init__(self, guard: Guard, notification: Notification, inode: int, *, is_bind: bool) -> None:
        self.guard = guard
        self.thread = notification.thread
        self.inode = inode
        self.is_bind = is_bind
        self.before = set(tables.listeners_on(guard.port))
        self._call = _call_of(self.thread)
        self._sleeps = _sleeps_of(self.thread, is_asleep=True)
        self._work = _work_of(self.thread)
        self._end = time.monotonic() + _LONGEST

    def has_left(self) -> bool:
        """Whether the thread has left its call, or is about to since the call has had its effect."""
        if self._is_heard() or _has_ended(self.thread):
            return True
        call = _call_of(self.thread)
        if call and self._call and call != _RUNNING:
            return call != self._call
        if _sleeps_of(self.thread) > self._sleeps or _work_of(self.thread) - self._work > _WORK:
            return True
        return time.monotonic() > self._end

    def _is_heard(self) -> bool:
        """Whether the socket of a listen(2) listens by now."""
        if self.is_bind:
            return False
        listening = tables.listeners_on(self.guard.port)
        return self.inode in listening if self.inode else not self.before.issuperset(listening)


class Gates:
    """All gates that are open. A guard gives way for as long as one of its gates is open."""

    def __init__(self) -> None:
        self._open: list[Gate] = []

    def __bool__(self) -> bool:
        return bool(self._open)

    def open(self, guard: Guard, notification: Notification, inode: int, *, is_bind: bool) -> None:
        """Open a gate, before the call goes on."""
        self._open.append(Gate(guard, notification, inode, is_bind=is_bind))
        guard.give_way()

    def close_left(self, caller: int = 0) -> list[Gate]:
        """Close the gates whose thread has left its call, and return them. `caller` has left: it makes another call now."""
        left = [gate for gate in self._open if gate.thread == caller or gate.has_left()]
        self._close(left)
        return left

    def close_all(self) -> None:
        """Close all gates, also those whose call goes on."""
        self._close(list(self._open))

    def _close(self, gates: Iterable[Gate]) -> None:
        for gate in gates:
            self._open.remove(gate)
            if all(other.guard is not gate.guard for other in self._open):
                gate.guard.give_way_no_more()


def is_tcp(thread: int, fd: int) -> bool | None:
    """Whether a descriptor of another thread is a TCP socket; None where we may not look."""
    try:
        name = os.getxattr(f"/proc/{thread}/fd/{fd}", "system.sockprotoname")
    except PermissionError:
        return None
    except OSError:
        return None if not os.path.exists(f"/proc/{thread}/fd") else False
    return name.rstrip(b"\0").decode(errors="replace") in _TCP


def inode_of(thread: int, fd: int) -> int:
    """The inode of the file that a descriptor of another thread is; 0 where we may not look."""
    try:
        return os.stat(f"/proc/{thread}/fd/{fd}").st_ino
    except OSError:
        return 0


def is_in_our_network(thread: int) -> bool:
    """Whether a thread is in our network namespace, true where we may not look. In another one the number is not ours.

    Where we may not look, the link cannot be read; on Linux 5.10 it reads as empty, and leads to the directory that it is in.
    """
    try:
        return os.readlink(f"/proc/{thread}/ns/net") in ("", os.readlink("/proc/self/ns/net"))
    except OSError:
        return True


def _has_ended(thread: int) -> bool:
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(thread: int, name: str) -> str:
    try:
        return content(f"/proc/{thread}/{name}").decode(errors="replace")
    except OSError:
        return ""


def _call_of(thread: int) -> str:
    """The call in which a thread sleeps, with its arguments; nothing where we may not look."""
    return _read(thread, "syscall").strip()


def _sleeps_of(thread: int, *, is_asleep: bool = False) -> int:
    """How often a thread has gone to sleep by itself; `is_asleep`, with the sleep that it is about to begin."""
    status = _read(thread, "status")
    for _ in range(_LOOKS if is_asleep else 0):
        if "\nState:\tR" not in status:
            break
        status = _read(thread, "status")
    _, _, rest = status.partition("\nvoluntary_ctxt_switches:")
    return int(rest.split(None, 1)[0]) if rest else 0


def _work_of(thread: int) -> int:
    """For how many nanoseconds a thread has run; where /proc hides that, for how many its process has."""
    text = _read(thread, "schedstat")
    if text:
        return int(text.split()[0])
    try:
        return time.clock_gettime_ns(~thread << 3 | 2)  # clock_getcpuclockid(3)
    except OSError:
        return 0  # it is not the first thread of its process
