"""One connection of ours to a listener: whether the command has accepted it, and a GET over it. Accepting needs no protocol.

Until a connection is accepted, the kernel shows its other end with inode 0 (sock_diag(7)), so other clients do not blur it.
Where that is refused, the listener's TCP_INFO counts its backlog, and after that /proc is asked.

Our own end tells the rest. An end that was closed had been accepted: what waits in the backlog of a listener that goes away is
reset (inet_csk_listen_stop() in the kernel's net/ipv4/inet_connection_sock.c). So a reset means that it was accepted only if
the listener is still there.
"""

from __future__ import annotations

import _socket
import errno
import os
import sys

from portexec.binding import tables, unix
from portexec.binding.listeners import Listener
from portexec.parent.loop import readable, writable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NO_ANSWER = 599  # stands for the status of an answer that is not HTTP, or that never came
FIRST_BAD_STATUS = 500
_UNKNOWN = -1  # stands for the inode of an end of which only so much is known that it was accepted
_MAX_STATUS_LINE = 1 << 13
_TCP_INFO_SIZE = 104
_TCP_INFO_UNACKED = 24  # of tcpi_unacked in struct tcp_info, linux/tcp.h; of a listener, the connections in its backlog


class Probe:
    """A connection to this listener, closed at the end of the `with`."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._host = listener.host.strip("[]")
        family = _socket.AF_INET6 if ":" in self._host else _socket.AF_INET
        self._socket = _socket.socket(_socket.AF_UNIX if listener.path else family, _socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._listened = self._listening()
        self._is_reset = False
        self.status = NO_ANSWER

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    async def connect(self) -> None:
        """Connect. Raises OSError where nobody listens, or a unix socket's backlog is full.

        That it was reset already is no failure: somebody may have accepted it.
        """
        path = self.listener.path
        code = self._socket.connect_ex(unix.address(path) if path else (self._host, self.listener.port))
        if code == errno.EINPROGRESS:
            await writable(self._socket)
            code = self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if code not in (0, errno.ECONNRESET):
            raise OSError(code, os.strerror(code))
        self._is_reset = code == errno.ECONNRESET
        try:
            self._find = self._finder()
        except OSError:
            self._is_reset = True

    def is_taken(self, processes: Callable[[], Iterable[int]] | None = None) -> bool | None:
        """Whether the command has accepted it; None as long as it waits.

        With `processes`, whether one of those has, where others accept from the same listener. False is also the answer where
        the connection is over and nobody can tell.
        """
        is_answered = self._is_answered()
        if self._is_reset:
            return processes is None and bool(self._listened & self._listening())
        inode = self._find()
        if not inode and not is_answered:
            return None  # or it was over just after we looked at our end, which tells the next time
        return processes is None or (bool(inode) and tables.has_open(processes(), inode or 0))

    def _is_answered(self) -> bool:
        """Whether anything has come, the end at least; only who has accepted sends that. Also finds out about a reset."""
        try:
            self._socket.recv(1, _socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            self._is_reset = True
        return True

    async def get(self, path: str) -> None:
        """Send a GET for this path, and note the `status` of the answer."""
        host = "localhost" if self.listener.path else f"{self.listener.host}:{self.listener.port}"
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: portexec\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        try:
            await self._send(request.encode())
            self.status = _status_of(await self._receive_line())
        except OSError:
            pass

    async def _send(self, data: bytes) -> None:
        while data:
            await writable(self._socket)
            data = data[self._socket.send(data) :]

    async def _receive_line(self) -> bytes:
        """The first line of the answer; what comes of it where it is cut off or endless."""
        answer = b""
        while b"\n" not in answer and len(answer) < _MAX_STATUS_LINE:
            await readable(self._socket)
            data = self._socket.recv(_MAX_STATUS_LINE)
            if not data:
                break
            answer += data
        line, end, _ = answer.partition(b"\n")
        return line + end

    def _listening(self) -> set[int]:
        """The inodes of those that listen where we connect to."""
        socket = self.listener.socket
        if socket is None:
            return tables.listening_inodes(self.listener.port)
        is_listening = socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
        return {os.fstat(socket.fileno()).st_ino} if is_listening else set()

    def _finder(self) -> Callable[[], int | None]:
        """A function that tells the inode of the connection's other end, None until it was accepted, 0 if it is over.

        The first of these that this machine allows; what only counts a backlog does not know who has accepted.
        """
        ways: list[Callable[[], int | None]]
        if self.listener.path:
            ways = [
                lambda: tables.accepted_unix_inode(os.fstat(self._socket.fileno()).st_ino),
                lambda: None if tables.unix_backlog(self.listener.path) else _UNKNOWN,
            ]
        else:
            socket = self.listener.socket
            server, client = self._socket.getpeername()[:2], self._socket.getsockname()[:2]
            ways = [
                lambda: tables.accepted_inode(server, client),
                *([lambda: _none_while_waiting(socket)] if socket is not None else []),
                lambda: tables.accepted_inode_in_proc(server, client),
            ]
        for way in ways:
            try:
                is_blind = way() == 0 and not self._is_answered()
            except OSError:
                continue
            if not is_blind:
                return way
        return lambda: _UNKNOWN


def _status_of(line: bytes) -> int:
    """The status in a status line, RFC 9112 section 4."""
    words = line.split(b" ", 2)
    is_whole = line.endswith(b"\n") and len(words) > 1 and words[0].startswith(b"HTTP/1.")
    digits = words[1].rstrip() if is_whole else b""
    return int(digits) if len(digits) == 3 and digits.isdigit() else NO_ANSWER


def _none_while_waiting(socket: _socket.socket) -> int | None:
    info = socket.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, _TCP_INFO_SIZE)
    waiting = int.from_bytes(info[_TCP_INFO_UNACKED : _TCP_INFO_UNACKED + 4], sys.byteorder)
    return None if waiting else _UNKNOWN
