"""The control descriptor: how a program drives portexec, such as the Python API. JSON lines over a stream socket.

    portexec -> program   {"event": "bound", "hand_off": ..., "listeners": [...]}     before the command starts
                          {"event": "started", "pid": ...}
                          {"event": "ready", "pid": ..., "listeners": [...]}          where it really listens
                          {"event": "ended", "status": ..., "by_itself": ...}         the command; as waitpid(2) gives it, and
                                                                                      whether nobody had told it to
                          {"event": "error", "kind": ..., "message": ..., "hint": ..., "about": ...}   the option
    program -> portexec   {"do": "restart"}                                           stop the tree, start it anew
                          {"do": "stop"}                                              so does the end of the socket

A program whose words for the command line are nobody else's business sends them as its first line, a list (`words`), and
nothing else before the first event.

The end of the socket is the news that portexec has ended, and that nothing of the command is left. Should portexec be killed,
that comes when its shim has stopped the tree.
"""

from __future__ import annotations

import json
import os

from portexec.errors import PortexecError, UsageError

RESTART = "restart"
STOP = "stop"

_MAX_REQUEST = 1 << 16
_MAX_WORDS = 1 << 20  # at once


def tell(fd: int, event: str, **fields: object) -> None:
    """Send an event. Nobody has to be there any more."""
    try:
        os.write(fd, json.dumps({"event": event, **fields}).encode() + b"\n")
    except OSError:
        pass


def tell_error(fd: int, error: PortexecError) -> None:
    """Send an error, by the name of its class. A usage error names its option apart from the rest of its message."""
    about = error.about if isinstance(error, UsageError) else ""
    message = error.what if isinstance(error, UsageError) else error.message
    tell(fd, "error", kind=type(error).__name__, message=message, hint=error.hint, about=about)


def words(fd: int) -> list[str]:
    """The words of portexec's command line, where the program sends them as a first line: `ps` shows the others to everybody.

    None at all when the program has gone.
    """
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(fd, _MAX_WORDS)
        if not data:
            return []
        line += data
    return list(json.loads(line))


class Requests:
    """What is asked for over the descriptor, which may come in pieces."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def receive(self) -> list[str]:
        """What is asked for next; what is not understood is left out. The end of the socket asks to stop."""
        try:
            data = os.read(self._fd, _MAX_REQUEST)
        except ConnectionResetError:  # it was closed with something unread
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_request(line) for line in lines] if data else [STOP]


def _request(line: bytes) -> str:
    try:
        request = json.loads(line)
    except ValueError:
        return ""
    return str(request.get("do")) if isinstance(request, dict) else ""
