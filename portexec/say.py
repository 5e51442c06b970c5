"""Every line of portexec's own, to stderr: written in one piece, and with nothing in it that could play tricks on a terminal.

What comes from elsewhere (names of processes and files, arguments) can hold control characters. They are shown as `\\x1b` or
`\\n`, so that nobody can write into another user's terminal by a file name, or fake a second line.
"""

from __future__ import annotations

import os

from portexec.errors import PortexecError, escaped
from portexec.kernel import STDERR

_PATIENCE = 1000  # milliseconds
_PIPE_BUF = 512  # so much goes into a pipe with room without blocking, wherever that is; pipe(7)
_BUG = "error: this is a bug in portexec; please report it with the lines above"


def say(*lines: str) -> None:
    """Write these lines, each after `portexec: `, in one piece. A stderr that is closed or full is nobody's failure.

    It waits for room for a second, so that a parent hears signals meanwhile, and then says nothing.
    """
    _write("".join(f"portexec: {escaped(line)}\n" for line in lines))


def say_error(error: PortexecError) -> None:
    """Write an error, and its hint."""
    say(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []))


def say_bug() -> None:
    """Write what follows a traceback that nobody expected."""
    say(_BUG)


def say_json(line: str) -> None:
    """Write a line of JSON, which escapes what is in it by itself."""
    _write(line)


def _write(text: str) -> None:
    data = os.fsencode(text)
    try:
        while data and _has_room():
            data = data[os.write(STDERR, data[:_PIPE_BUF]) :]
    except OSError:
        pass


def _has_room() -> bool:
    """Wait until stderr takes a piece. Where there is no descriptor left to load `select` with, nobody can know."""
    try:
        import select
    except ImportError:
        return True
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    return bool(poll.poll(_PATIENCE))
