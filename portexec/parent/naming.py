"""What ps(1) and killall(1) show of portexec's processes, so that a signal by name reaches the command once.

The front is called `portexec`, and so is a host. A shim is called `shim`, which is neither portexec's name nor the command's.
The words of a shim are those of its command, behind its own name.

    killall portexec, pidof -x portexec     the front alone, which forwards
    killall node, pkill -x node             the command alone, as without us
    pkill -f server.js                      the front, the shim and the command: all of them, as a signal to the group
"""

from __future__ import annotations

import os

from portexec.procfs import argument_area

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_FRONT = "portexec"
_SHIM = "shim"


def name_front() -> None:
    """Name this process, which may have been started as `python -m portexec`. Its words stay."""
    _set_name(_FRONT)


def name_shim(command: Sequence[str]) -> None:
    """Name this process, a shim for a command with these words. They are cut to the length of our own command line."""
    _set_name(_SHIM)
    try:
        start, end = argument_area()
        words = os.fsencode("\0".join([_SHIM, *command]))[: end - start - 1]
        _write("/proc/self/mem", words.ljust(end - start, b"\0"), start)
    except OSError:
        pass  # an imitation of Linux, or a process that may not write to its own memory


def _set_name(name: str) -> None:
    try:
        _write("/proc/self/comm", name.encode())
    except OSError:
        pass


def _write(path: str, data: bytes, offset: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if offset:
            os.lseek(fd, offset, os.SEEK_SET)
        os.write(fd, data)
    finally:
        os.close(fd)
