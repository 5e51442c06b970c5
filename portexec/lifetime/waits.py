"""Whether a process waits for clients on a listener, without a client: what its threads sleep in, as /proc shows it.

accept          the call names the descriptor
poll, select    the descriptors are in the caller's memory
epoll           /proc/PID/fdinfo lists them
io_uring        what it waits for cannot be seen; it counts that the process has the listener open
"""

from __future__ import annotations

import os
import sys
from _struct import Struct  # what struct has it from

from portexec.kernel import WAITS
from portexec.procfs import content, is_ending, memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_POLLFD = Struct("=ihh")  # poll(2)
_MANY = 1 << 16  # descriptors of one call; more are not looked at


def can_tell() -> bool:
    """Whether this machine's system calls are known. On other machines no process is seen to wait."""
    return os.uname().machine in WAITS


def is_awaited(processes: Iterable[int], inode: int) -> bool:
    """Whether one of these processes waits for clients of the listener with this inode.

    A process that /proc hides from us is taken to wait: then only a client finds out. A process that has ended belongs to root
    in /proc, so /proc hides it from other users, too; but it waits for nobody.
    """
    return any(_waits(process, inode) for process in processes)


def _waits(process: int, inode: int) -> bool:
    try:
        descriptors = {int(name) for name in os.listdir(f"/proc/{process}/fd") if _inode(process, name) == inode}
        return bool(descriptors) and any(
            _is_asleep_for(process, thread, descriptors) for thread in os.listdir(f"/proc/{process}/task")
        )
    except PermissionError:
        return not is_ending(process)
    except OSError:
        return False  # it has ended


def _inode(process: int, descriptor: str) -> int:
    try:
        text = os.readlink(f"/proc/{process}/fd/{descriptor}")
    except FileNotFoundError:
        return 0  # it was closed since
    return int(text[8:-1]) if text.startswith("socket:[") else 0


def _is_asleep_for(process: int, thread: str, descriptors: set[int]) -> bool:
    number, *words = content(f"/proc/{process}/task/{thread}/syscall").split()
    if not words or not number.isdigit():  # it runs, or sleeps outside of a system call
        return False
    kind = WAITS.get(os.uname().machine, {}).get(int(number), "")
    look = _LOOKS.get(kind)
    return look is not None and look(process, [int(word, 16) for word in words], descriptors)


def _accepts(_: int, arguments: list[int], descriptors: set[int]) -> bool:
    return arguments[0] in descriptors


def _polls(process: int, arguments: list[int], descriptors: set[int]) -> bool:
    table = memory(process, arguments[0], _POLLFD.size * min(arguments[1], _MANY))
    return any(fd in descriptors for fd, _, _ in _POLLFD.iter_unpack(table))


def _selects(process: int, arguments: list[int], descriptors: set[int]) -> bool:
    count, readers = arguments[0], arguments[1]
    size = (min(count, _MANY) + 63) // 64 * 8
    bits = int.from_bytes(memory(process, readers, size), sys.byteorder) if readers else 0
    return any(fd < count and bits >> fd & 1 for fd in descriptors)


def _waits_by_epoll(process: int, arguments: list[int], descriptors: set[int]) -> bool:
    lines = content(f"/proc/{process}/fdinfo/{arguments[0]}").splitlines()
    return any(line.startswith(b"tfd:") and int(line.split()[1]) in descriptors for line in lines)


def _may_wait(*_: object) -> bool:
    return True


_LOOKS: dict[str, Callable[[int, list[int], set[int]], bool]] = {
    "accept": _accepts,
    "poll": _polls,
    "select": _selects,
    "epoll": _waits_by_epoll,
    "io_uring": _may_wait,
}
