"""The line that a person on a terminal sees while something is waited for; nothing of it reaches a log file."""

from __future__ import annotations

import os
import time

import anyio

from portexec.command import publish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_STDERR = 2
_ERASE = "\r\x1b[K"  # to the line's begin, and what is right of it away: ECMA-48, EL
_REDRAW = 1.0  # seconds; also the time that may pass without a word


async def show(what: Callable[[], str]) -> None:
    """Redraw one line with the elapsed seconds, each second, until cancelled; then it is gone. `what` is asked each time."""
    if not os.isatty(_STDERR):
        return
    began = time.monotonic()
    await anyio.sleep(_REDRAW)
    try:
        while True:
            line = f"portexec: {time.monotonic() - began:.0f} s: waiting for the command to {what()}"
            publish.say_if_heard(_ERASE + line[: _columns() - 1])
            await anyio.sleep(_REDRAW)
    finally:
        publish.say_if_heard(_ERASE)


def _columns() -> int:
    try:
        return os.get_terminal_size(_STDERR).columns or 80
    except OSError:
        return 80
