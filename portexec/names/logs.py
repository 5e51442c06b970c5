"""`--logs`: print the log of a run, and follow it to the end of the run."""

from __future__ import annotations

import os
import stat

from portexec.errors import PortexecError, reason
from portexec.names.missing import LISTED, Missing
from portexec.names.wait import pauses
from portexec.say import print_out

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.names.naming import Wanted
    from portexec.names.registry import Entry

_AT_ONCE = 1 << 16  # bytes


class NoLog(PortexecError):
    """There is nothing to print."""

    status = 1


def run(wanted: Wanted, look: Callable[[], Entry | None], here: str, *, follow: bool) -> int:
    """Print the log of the run that is meant. Returns an exit status. Raises PortexecError."""
    entry = look()
    if entry is None:
        near = Missing(wanted, None, here).clue(ended=True)
        raise NoLog(f"no run of the name {wanted.text} is known", near or LISTED)
    if not entry.log:
        raise NoLog(
            f"{wanted.text} keeps no log: it writes to the terminal or file that it was started with",
            "--log FILE keeps one, and --detach always does",
        )
    try:
        if not stat.S_ISREG(os.stat(entry.log).st_mode):  # before open(2), which would make us the reader of a FIFO
            raise NoLog(f"the log {entry.log} is no regular file, and cannot be read again", "read it where it goes to")
        fd = os.open(entry.log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NoLog(f"cannot read the log {entry.log}: {reason(error)}") from error
    try:
        _print(fd, lambda: follow and _goes_on(entry, look()))
    finally:
        os.close(fd)
    return 0


def _print(fd: int, goes_on: Callable[[], bool]) -> None:
    sleep = pauses()
    is_last = False
    while True:
        while data := os.read(fd, _AT_ONCE):
            print_out(data)
        if is_last:
            return
        is_last = not goes_on()  # after the end, one more read gets what was written before it
        if not is_last:
            sleep()


def _goes_on(entry: Entry, now: Entry | None) -> bool:
    return now is not None and now.is_alive and now.is_same_run(entry)
