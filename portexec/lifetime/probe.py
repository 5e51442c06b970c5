"""One connection of ours to a listener: whether the command has accepted it, and bytes over it. Accepting needs no protocol.

Until a connection is accepted, the kernel shows its other end with inode 0 (sock_diag(7)). So other clients do not disturb us.
Where sock_diag is refused, we count the listener's backlog by TCP_INFO. Where that does not work either, we read /proc.

Our own end tells the rest. If the other end closes the connection, it had been accepted. If the listener goes away, the
connections in its backlog are reset (inet_csk_listen_stop() in the kernel's net/ipv4/inet_connection_sock.c). So a reset means
that the connection was accepted only if the listener is still there.
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

_UNKNOWN = -1  # in place of an inode: the connection was accepted, and we cannot see by which process
_LONGEST_READ = 1 << 14
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

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    async def connect(self) -> None:
        """Connect. Raises OSError where nobody listens, or a unix socket's backlog is full.

        A connection that was reset at once is no failure: somebody may have accepted it.
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
        """Whether the command has accepted the connection; None as long as it waits.

        Where others accept from the same listener, `processes` are those that count. False also means that the connection is
        over, and that we cannot tell.
        """
        is_answered = self._is_answered()
        if self._is_reset:
            return processes is None and bool(self._listened & self._listening())
        inode = self._find()
        if not inode and not is_answered:
            return None  # it may have ended since we looked at our end; then the next look shows that
        return processes is None or (bool(inode) and tables.has_open(processes(), inode or 0))

    def _is_answered(self) -> bool:
        """Whether anything has come, or the end: only a process that has accepted sends them. Also notices a reset."""
        try:
            self._socket.recv(1, _socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            self._is_reset = True
        return True

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        while data:
            await writable(self._socket)
            data = data[self._socket.send(data) :]

    async def receive(self) -> bytes:
        """Some of what has come; empty at the end. Raises OSError."""
        await readable(self._socket)
        return self._socket.recv(_LONGEST_READ)

    def _listening(self) -> set[int]:
        """The inodes of the sockets that listen where we connect."""
        socket = self.listener.socket
        if socket is None:
            return tables.listening_inodes(self.listener.port)
        is_listening = socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
        return {os.fstat(socket.fileno()).st_ino} if is_listening else set()

    def _finder(self) -> Callable[[], int | None]:
        """A function that tells the inode of the connection's other end, None until it was accepted, 0 if it is over.

        It is the first way that this machine allows. A way that only counts the backlog does not see who has accepted.
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


def _none_while_waiting(socket: _socket.socket) -> int | None:
    info = socket.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, _TCP_INFO_SIZE)
    waiting = int.from_bytes(info[_TCP_INFO_UNACKED : _TCP_INFO_UNACKED + 4], sys.byteorder)
    return None if waiting else _UNKNOWN
