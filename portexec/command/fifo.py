"""Reading a FIFO: we say what we wait for, and the wait ends when the program that drives the run ends.

open(2) would wait for a writer in silence, and nothing could end the wait. So the FIFO is opened with O_NONBLOCK. Until the
first writer comes, poll(2) of Linux then tells nothing, and a read is empty. When all writers have gone, poll(2) tells the end.
"""

from __future__ import annotations

import os
import select
import time

from portexec.say import moments, say
from portexec.server_errors import Abandoned

_AT_ONCE = 1 << 16


def content(fd: int, what: str, most: int, *, is_quiet: bool, driver: int | None) -> bytes:
    """All that is written to a FIFO, which was opened with O_NONBLOCK, but `most` bytes at most.

    `driver` is the descriptor of the program that drives the run.

    Raises Abandoned when that program has gone, and OSError.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if driver is not None:
        poll.register(driver, select.POLLRDHUP)
    data, began, times = b"", time.monotonic(), moments()
    moment = next(times)
    while len(data) < most:
        ready = dict(poll.poll(1000 * max(0.0, began + moment - time.monotonic())))
        if driver in ready:
            raise Abandoned(f"nobody waits for a writer of {what} any more")
        part = _part(fd)
        if part:
            data += part
        elif fd in ready:
            return data
        else:
            if part is not None and not is_quiet:
                say(f"note: {moment} s: waiting for a writer of {what}")
            moment = next(times)
    return data[:most]


def _part(fd: int) -> bytes | None:
    """What can be read now; empty where there is no writer, None where a writer has written nothing yet."""
    try:
        return os.read(fd, _AT_ONCE)
    except BlockingIOError:
        return None
