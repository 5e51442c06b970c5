"""The command's own sockets on one number: which they are, and where each can be had again.

We keep no duplicates, which would keep a listener alive that the command has closed.
"""

from __future__ import annotations

import _socket
import os

from portexec.admission import seccomp
from portexec.binding import tables
from portexec.binding.guard import overlap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_FEW = 32  # sockets that nobody has to look after


class Own:
    """Those of one number, by inode."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._seen: dict[int, _Seen] = {}
        self._limit = _FEW
        self._hidden: set[int] = set()  # descriptors of sockets that nobody showed us

    def add(self, inode: int, thread: int, fd: int, host: str, *, shares: bool) -> None:
        """Take up one that was bound by this thread, under this descriptor. `shares`: it has SO_REUSEPORT by itself."""
        self._seen[inode] = _Seen(thread, fd, host, shares)
        if len(self._seen) > self._limit:
            _close(self.duplicates())
            self.strangers(tables.listeners_on(self.port))
            self._limit = max(_FEW, 2 * len(self._seen))

    def add_hidden(self, fd: int) -> None:
        """Take up one of which only the descriptor is known."""
        self._hidden.add(fd)

    def has(self, inode: int, fd: int) -> bool:
        """Whether this is one of them. An inode of 0 is not known."""
        return inode in self._seen if inode else fd in self._hidden

    def duplicates(self, but: int = 0, *, is_thorough: bool = False) -> list[_socket.socket]:
        """Those that can be had, without one inode; to be closed soon.

        One that is where it was seen no more is closed, or somebody else has it. `is_thorough`: look for it in all processes.
        That is always done for one that shares, since a later socket could join it unasked.
        """
        found = []
        for inode, seen in list(self._seen.items()):
            if inode == but:
                continue
            socket = _have(seen, inode)
            if socket is None and (is_thorough or seen.shares):
                socket = self._look_for(inode, seen)
            seen.is_lost = socket is None
            if socket is not None:
                found.append(socket)
        return found

    def _look_for(self, inode: int, seen: _Seen) -> _socket.socket | None:
        place = tables.descriptor_of(inode)
        if place is not None:
            seen.thread, seen.fd = place
            return _have(seen, inode)
        if inode not in tables.listeners_on(self.port):
            del self._seen[inode]
        return None

    def joins(self, socket: _socket.socket, host: str, *, is_tidy: bool) -> bool:
        """Whether the flip would let a socket that does not share join a listener that does; if not tidy, any listener.

        The kernel would refuse that without us, and afterwards they would share the clients in silence.
        """
        if socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT):
            return False
        own = os.fstat(socket.fileno()).st_ino
        suspects = {
            inode
            for inode, seen in self._seen.items()
            if (seen.shares or not is_tidy) and inode != own and overlap(host, seen.host)
        }
        return bool(suspects) and not suspects.isdisjoint(tables.listeners_on(self.port))

    def strangers(self, listening: Iterable[int], but: int = 0) -> set[int]:
        """Those among the inodes that listen that are neither the command's nor this one.

        A socket of the command that could not be had, and does not listen, is gone.
        """
        alive = {*listening}
        self._seen = {inode: seen for inode, seen in self._seen.items() if inode in alive or not seen.is_lost}
        return alive - self._seen.keys() - {but}


class Others:
    """The duplicates that a flip may need: made when it asks for them, and closed after it."""

    def __init__(self, own: Own, but: int) -> None:
        self._own = own
        self._but = but
        self._made: list[_socket.socket] | None = None
        self._was_thorough = False

    def __call__(self, is_thorough: bool) -> list[_socket.socket]:
        if self._made is None or (is_thorough and not self._was_thorough):
            _close(self._made or ())
            self._was_thorough = is_thorough
            self._made = self._own.duplicates(self._but, is_thorough=is_thorough)
        return self._made

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        _close(self._made or ())


class _Seen:
    """Where a socket was seen last, and how it was bound."""

    __slots__ = ("fd", "host", "is_lost", "shares", "thread")

    def __init__(self, thread: int, fd: int, host: str, shares: bool) -> None:
        self.thread = thread
        self.fd = fd
        self.host = host
        self.shares = shares
        self.is_lost = False  # it could not be had: it is closed, or somebody else has it


def _have(seen: _Seen, inode: int) -> _socket.socket | None:
    try:
        duplicate = seccomp.duplicate(seen.thread, seen.fd)
    except OSError:
        return None
    if os.fstat(duplicate).st_ino == inode:
        return _socket.socket(-1, -1, -1, duplicate)
    os.close(duplicate)
    return None


def _close(sockets: Iterable[_socket.socket]) -> None:
    for socket in sockets:
        socket.close()
