"""`--stop`: tell a run to end, and wait until nothing of it is left."""

from __future__ import annotations

import _signal
import errno
import os

from portexec import procfs
from portexec.errors import STATUS_FAILURE, PortexecError
from portexec.names.naming import short
from portexec.names.registry import STOPPING
from portexec.names.wait import AT_LAST, now_of, reporter, until_over
from portexec.say import say, say_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portexec.names.registry import Entry


def run(entries: Sequence[Entry], here: str, *, is_quiet: bool) -> int:
    """Stop these runs: all are told at once, and then waited for. Returns an exit status."""
    told, has_failed = [], False
    for entry in entries:
        try:
            ask(entry)
            told.append(entry)
        except PortexecError as error:
            say_error(error)
            has_failed = True
    for entry in told:
        name = short(entry.name, entry.project, here)
        try:
            wait(entry, reporter(f"{name} to end", is_quiet=is_quiet))
        except PortexecError as error:
            say_error(error)
            has_failed = True
        else:
            if not is_quiet:
                say(f"{name} has ended")
    return STATUS_FAILURE if has_failed else 0


def ask(entry: Entry) -> None:
    """Tell a run to end, unless it is stopping: told a second time, it would kill its tree. Raises PortexecError."""
    now = now_of(entry)
    if now is None or now.state == STOPPING or tell(now):
        return
    now = now_of(entry)
    if now is not None and now.state != STOPPING:  # its portexec lives, and has another pid here
        raise PortexecError(f"{entry.name} cannot be told to end from here", "it runs in another container; stop it there")


def tell(entry: Entry) -> bool:
    """Send TERM to the run's portexec; whether that is there. Where it was killed, its shim stops the rest by itself."""
    try:
        process = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return False
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        process = -1
    try:
        if procfs.started(entry.pid) != entry.pid_started:
            return False  # another process has its number
        for number in (_signal.SIGTERM, *([_signal.SIGCONT] if procfs.is_stopped(entry.pid) else [])):
            _send(process, entry.pid, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        if process >= 0:
            os.close(process)


def _send(process: int, pid: int, number: int) -> None:
    if process >= 0:
        _signal.pidfd_send_signal(process, number)
    else:
        os.kill(pid, number)


def wait(entry: Entry, report: Callable[[], None]) -> None:
    """Wait until nothing is left of a run that was told to end. When its time is over, tell it again, and it kills.

    Raises PortexecError if that fails, too.
    """
    left = until_over(entry, entry.kill_after, report)
    if left is not None:
        tell(left)
        left = until_over(entry, AT_LAST, report)
    if left is not None:
        raise PortexecError(
            f"{entry.name} does not end: pid {entry.pid}", "does a process of it wait in the kernel, as for a disk?"
        )
