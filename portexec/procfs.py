"""Processes, as /proc shows them (proc(5)): which is below which, which is about to end, which shells are above us.

Each answer may be out of date at once: the process may have ended, and its pid may be another's by now.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

_PF_EXITING = 0x4  # of the flags in /proc/PID/stat, proc_pid_stat(5): set before a process closes its sockets
_LISTINGS = 5  # the most listings of the processes below one, until two in a row are the same
_PIECE = 1 << 16  # bytes
_KILLED = 1 << 8  # SIGKILL: the kernel turns each signal that ends a process into it (complete_signal() in kernel/signal.c)


class Processes:
    """One look at all processes: the children of each, those that have ended but still have an entry, those that are stopped.

    With a `root` it may be a look at the processes below the root only, which costs less on a machine with many.
    """

    __slots__ = ("children", "dead", "stopped")

    def __init__(self, root: int = 0) -> None:
        self.children: dict[int, list[int]] = {}
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        listed = _listed_below(root) if root else None
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if listed is None else listed:
            try:
                fields = _stat(f"/proc/{pid}")
            except OSError:
                continue
            self._add(pid, fields[0], int(fields[1]), threads=int(fields[17]))

    def _add(self, pid: int, state: bytes, parent: int, threads: int) -> None:
        self.children.setdefault(parent, []).append(pid)
        if state == b"Z" and threads == 1:  # a main thread that has ended is a zombie while others go on
            self.dead.add(pid)
        elif state == b"T":
            self.stopped.add(pid)

    def below(self, root: int, spare: Set[int] = frozenset()) -> set[int]:
        """The living processes below `root`, without those in `spare` and those below them."""
        return _below(root, self.children, spare) - self.dead


def content(path: str) -> bytes:
    """All that a file of /proc has. Raises OSError. open() would take twice the time: it asks what kind of file it is."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = [os.read(fd, _PIECE)]
        while pieces[-1]:
            pieces.append(os.read(fd, _PIECE))
    finally:
        os.close(fd)
    return b"".join(pieces)


def status(process: int | str, field: str) -> str:
    """A field of /proc/PID/status, proc_pid_status(5); empty where this kernel has no such field. Raises OSError.

    `process` is a process, a thread, or `self`.
    """
    _, _, rest = content(f"/proc/{process}/status").partition(f"\n{field}:".encode())
    return rest.partition(b"\n")[0].decode().strip()


def memory(thread: int, address: int, size: int) -> bytes:
    """What is at this address in the memory of a process; less than `size` where there is no more. Raises OSError."""
    fd = os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, address)
    except OverflowError:
        return b""  # there is no such address
    finally:
        os.close(fd)


def descendants(root: int) -> set[int]:
    """The pids of all living processes below `root`."""
    return Processes(root).below(root)


def is_below(pid: int, root: int) -> bool:
    """Whether a process, alive or dead, descends from `root`. It looks at the processes between the two only."""
    try:
        while pid > 1:
            pid = int(_stat(f"/proc/{pid}")[1])
            if pid == root:
                return True
    except OSError:
        pass  # it has gone, or cannot be seen
    return False


def started(pid: int) -> int:
    """When a process was started, in the kernel's own unit; 0 if there is none. With the pid it identifies the process."""
    try:
        return int(_stat(f"/proc/{pid}")[19])
    except OSError:
        return 0


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by Ctrl-Z."""
    try:
        return _stat(f"/proc/{pid}")[0] == b"T"
    except OSError:
        return False


def is_told_by_terminal(pid: int, number: int) -> bool:
    """Whether a process gets this signal when the terminal sends it to our process group, and does not ignore it."""
    try:
        is_ignored = int(status(pid, "SigIgn"), 16) >> (number - 1) & 1
        return os.getpgid(pid) == os.getpgrp() and not is_ignored
    except (OSError, ValueError):
        return False


def credentials(pid: int) -> list[str]:
    """The users and groups of a process: real, effective, saved, of files. Empty where it cannot be seen."""
    try:
        return [status(pid, "Uid"), status(pid, "Gid")]
    except OSError:
        return []


def children() -> set[int]:
    """The pids of this process' own children, dead ones too."""
    return set(Processes().children.get(os.getpid(), ()))


def is_ending(pid: int) -> bool:
    """Whether a process is about to end, or has ended, as far as the kernel lets us know."""
    try:
        return all(_is_task_ending(f"{pid}/task/{task}") for task in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def is_any_ending(root: int) -> bool:
    """Whether a process below `root` is about to end, or has ended and was not waited for."""
    return any(map(is_ending, _below(root, Processes().children, frozenset())))


def shells() -> set[int]:
    """The leader of our session, and our ancestors in it: they may pass on the hang-up of its terminal."""
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


def argument_area() -> tuple[int, int]:
    """The addresses in this process' memory at which its command line, shown by /proc/PID/cmdline, begins and ends."""
    fields = _stat("/proc/self")
    return int(fields[45]), int(fields[46])


def _stat(directory: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on. The name before it is in parentheses, and can have any characters."""
    return content(f"{directory}/stat").rpartition(b")")[2].split()


def _listed_below(root: int) -> set[int] | None:
    """The pids below this process, from the kernel's lists of children; None without such lists, or if they keep changing.

    A list can leave out a child while another one is waited for (proc_tid_children(5)). So two in a row have to be the same.
    """
    before: set[int] | None = None
    try:
        for _ in range(_LISTINGS):
            found, level = set[int](), _listed_children(root)
            while level:
                found.update(level)
                level = [child for pid in level for child in _listed_children(pid, is_root=False) if child not in found]
            if found == before:
                return found
            before = found
    except OSError:
        pass  # a kernel without such lists, or the root has gone
    return None


def _listed_children(pid: int, *, is_root: bool = True) -> list[int]:
    """The children of all threads of a process. Raises OSError for the root; a process below it may have ended."""
    try:
        children = list[int]()
        for task in os.listdir(f"/proc/{pid}/task"):
            children += map(int, content(f"/proc/{pid}/task/{task}/children").split())
    except OSError:
        if is_root:
            raise
        return []
    return children


def _is_task_ending(task: str) -> bool:
    flags = int(_stat(f"/proc/{task}")[6])
    pending = status(task, "SigPnd")  # some imitations of Linux have no such field
    return bool(flags & _PF_EXITING or (pending and int(pending, 16) & _KILLED))


def _below(root: int, children: Mapping[int, Iterable[int]], spare: Set[int]) -> set[int]:
    found: set[int] = set()
    level = [root]
    while level:
        level = [pid for parent in level for pid in children.get(parent, ()) if pid not in found and pid not in spare]
        found.update(level)
    return found
