"""Messages between two processes of portexec, over a pair of sockets that keeps them apart (SOCK_SEQPACKET, unix(7)).

A message is one byte that says of what kind it is, then fields with NUL between them. Each module that speaks over a link lists
its kinds. The end of the socket is news, too: the other process has ended.
"""

from __future__ import annotations

import _socket
import os

from portexec.command import execute
from portexec.errors import reason

_MAX_MESSAGE = 1 << 16
_SEPARATOR = "\0"
ENDED = b""  # stands for the end of the other process


class Link:
    """One end. The owner closes it."""

    __slots__ = ("is_open", "socket")

    def __init__(self, socket: _socket.socket) -> None:
        self.socket = socket
        self.is_open = True

    def fileno(self) -> int:
        """The descriptor, readable when there is a message."""
        return self.socket.fileno()

    def say(self, kind: bytes, *fields: object) -> None:
        """Send a message. It is lost without an error if the other process has ended."""
        self._send(kind, fields, 0)

    def mention(self, kind: bytes, *fields: object) -> None:
        """Send a message that says no more than others before it. It is lost where the other process leaves many unread."""
        try:
            self._send(kind, fields, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass

    def receive(self) -> tuple[bytes, list[str]]:
        """Wait for the next message: its kind and its fields; ENDED when there will be none."""
        return self._receive(0) if self.is_open else (ENDED, [])

    def received(self) -> list[tuple[bytes, list[str]]]:
        """All messages that are there by now."""
        messages = []
        while self.is_open:
            try:
                messages.append(self._receive(_socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        return messages

    def is_at_end(self) -> bool:
        """Whether the other process has ended, and there is no message of it any more."""
        try:
            return not self.is_open or not self.socket.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return self.is_at_end()  # it has ended without reading all, which is told once

    def close(self) -> None:
        """Close this end. A second call does nothing."""
        self.is_open = False
        self.socket.close()

    def _send(self, kind: bytes, fields: tuple[object, ...], flags: int) -> None:
        if self.is_open:
            try:
                self.socket.send(kind + os.fsencode(_SEPARATOR.join(map(str, fields))), flags)
            except (BrokenPipeError, ConnectionResetError):
                pass

    def _receive(self, flags: int) -> tuple[bytes, list[str]]:
        try:
            message = self.socket.recv(_MAX_MESSAGE, flags)
        except ConnectionResetError:
            return self._receive(flags)  # the other process has ended without reading all; what it said can still be read
        if not message:
            self.close()
        return message[:1], fields_in(message)


def fields_in(message: bytes) -> list[str]:
    """The fields of a message."""
    return os.fsdecode(message[1:]).split(_SEPARATOR)


def fields_of(error: OSError | MemoryError) -> tuple[int, str]:
    """The fields by which an error is told: errno and reason. `error_of` makes it again."""
    return getattr(error, "errno", None) or 0, reason(error)


def error_of(fields: list[str]) -> OSError:
    """The error that another process has told."""
    return OSError(int(fields[0]), fields[1])


def pair(lowest: int) -> tuple[Link, Link]:
    """Two linked ends, close-on-exec, under numbers from `lowest` on, which are above the descriptors for the command."""
    one, other = (_moved_up(end, lowest) for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET))
    return Link(one), Link(other)


def _moved_up(socket: _socket.socket, lowest: int) -> _socket.socket:
    fd = execute.duplicate(socket.fileno(), lowest, inheritable=False)
    socket.close()
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
