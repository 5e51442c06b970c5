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

import _socket
import json
import os
import select
import stat
import time
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_STREAM

from portexec.errors import PortexecError, UsageError

RESTART = "restart"
STOP = "stop"

_MAX_REQUEST = 1 << 16  # bytes; what is longer is none
_MAX_WORDS = 1 << 25  # bytes; more than a command line can have, however JSON writes it
_MAX_UNSENT = 1 << 20  # bytes; a program that leaves so much unread is told no more
_AT_ONCE = 1 << 16  # bytes
_PATIENCE = 1.0  # seconds for a program that does not read, where nothing else is to be done meanwhile


def why_not(fd: int) -> str:
    """Why no program can drive portexec over this descriptor; empty if one can."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return "this descriptor is no socket"
    except OSError:
        return "this descriptor is not open"
    end = _socket.socket(fileno=fd)
    try:
        if end.type != SOCK_STREAM:
            return "this descriptor is no stream socket"
        end.getpeername()
    except OSError:
        return "this socket is not connected"
    finally:
        end.detach()
    return ""


def usable(text: str | None) -> int | None:
    """The descriptor that was given as text, if a program can be told of an error over it."""
    is_number = text is not None and text.isascii() and text.isdigit() and len(text) < 9
    return int(text) if text is not None and is_number and not why_not(int(text)) else None


class Events:
    """What is told over the descriptor. A program that does not read keeps nobody waiting: its events wait, within bounds."""

    __slots__ = ("_fd", "_unsent")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unsent = b""

    def tell(self, event: str, **fields: object) -> bool:
        """Send an event, as much of it as goes at once; whether nothing waits. Nobody has to be there any more."""
        if len(self._unsent) <= _MAX_UNSENT:
            self._unsent += json.dumps({"event": event, **fields}).encode() + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Send as much as goes at once of what waits; whether nothing does any more."""
        try:
            while self._unsent:
                self._unsent = self._unsent[_send(self._fd, self._unsent) :]
        except BlockingIOError:
            return False
        except OSError:
            self._unsent = b""
        return True

    def finish(self) -> None:
        """Give a program that is slow a last chance to read."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        deadline = time.monotonic() + _PATIENCE
        while not self.flush() and time.monotonic() < deadline:
            poll.poll(max(0, deadline - time.monotonic()) * 1000)


def tell(fd: int, event: str, **fields: object) -> None:
    """Send an event where nothing else is to be done meanwhile."""
    events = Events(fd)
    if not events.tell(event, **fields):
        events.finish()


def tell_error(fd: int, error: PortexecError) -> None:
    """Send an error, by the name of its class. A usage error names its option apart from the rest of its message."""
    about = error.about if isinstance(error, UsageError) else ""
    message = error.what if isinstance(error, UsageError) else error.message
    tell(fd, "error", kind=type(error).__name__, message=message, hint=error.hint, about=about)


def words(fd: int) -> list[str]:
    """The words of portexec's command line, where the program sends them as a first line: `ps` shows the others to everybody.

    None at all when the program has gone, or sends something else.
    """
    line = b""
    while not line.endswith(b"\n"):
        try:
            data = os.read(fd, _MAX_WORDS)
        except ConnectionResetError:
            return []
        line += data
        if not data or len(line) > _MAX_WORDS:
            return []
    told = _parsed(line)
    return told if isinstance(told, list) and all(isinstance(word, str) for word in told) else []


class Requests:
    """What is asked for over the descriptor, which may come in pieces."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._is_too_long = False  # what the rest would be the rest of

    def receive(self) -> list[str]:
        """What is asked for next; what is not understood, or too long, is left out. The end of the socket asks to stop."""
        try:
            data = _receive(self._fd)
        except BlockingIOError:
            return []
        except OSError:  # it was closed with something unread
            data = b""
        if not data:
            return [STOP]
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._is_too_long and lines:
            del lines[0]
            self._is_too_long = False
        if self._is_too_long or len(self._rest) > _MAX_REQUEST:
            self._rest = b""
            self._is_too_long = True
        return [_request(line) for line in lines]


def _request(line: bytes) -> str:
    request = _parsed(line)
    asked = request.get("do") if isinstance(request, dict) else ""
    return asked if isinstance(asked, str) else ""


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the latter of [[[[...
        return None


def _send(fd: int, data: bytes) -> int:
    """Send what goes at once. The descriptor may be a blocking one: its mode belongs to who else has it. Raises OSError."""
    end = _socket.socket(fileno=fd)
    try:
        return end.send(data[:_AT_ONCE], MSG_DONTWAIT | MSG_NOSIGNAL)
    finally:
        end.detach()


def _receive(fd: int) -> bytes:
    end = _socket.socket(fileno=fd)
    try:
        return end.recv(_AT_ONCE, MSG_DONTWAIT)
    finally:
        end.detach()
