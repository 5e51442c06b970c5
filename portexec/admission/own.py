"""The command's own sockets on one number: which they are, and where a duplicate of each can be got.

We keep no duplicate: it would keep a listener alive that the command has closed.
"""

from __future__ import annotations

import _socket
import os

from portexec.admission.gates import inode_of
from portexec.binding import tables
from portexec.binding.guard import overlap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from portexec.admission.seccomp import Threads
    from portexec.binding.guard import Traits

_FEW = 128  # sockets; only when there are more, we look which of them are where they were seen
_MANY = 1024  # lost ones; only when there are more, we look in all processes, which takes some 10 ms, for those that are left
NOWHERE = -1  # in place of a descriptor


class Own:
    """The command's sockets on one number, by inode."""

    def __init__(self, port: int, threads: Threads) -> None:
        self.port = port
        self._threads = threads
        self._seen: dict[int, _Seen] = {}
        self._lost: dict[int, _Seen] = {}  # not where they were seen: closed, or another process has them
        self._few, self._many = _FEW, _MANY
        self._hidden: set[int] = set()  # descriptors of sockets whose inode we may not see

    def add(self, inode: int, thread: int, fd: int, host: str, *, shares: bool) -> None:
        """Add a socket that this thread bound, under this descriptor. `shares`: it has SO_REUSEPORT by itself."""
        self._lost.pop(inode, None)
        self._seen[inode] = _Seen(thread, fd, host, shares)
        if len(self._seen) > self._few or len(self._lost) > self._many:
            _close(self.duplicates(is_thorough=len(self._lost) > self._many))
            self._few, self._many = max(_FEW, 2 * len(self._seen)), max(_MANY, 2 * len(self._lost))

    def add_hidden(self, fd: int) -> None:
        """Add a socket of which only the descriptor is known."""
        self._hidden.add(fd)

    def has(self, inode: int, fd: int) -> bool:
        """Whether this is one of them. An inode of 0 is not known."""
        return inode in self._seen or inode in self._lost if inode else fd in self._hidden

    def place(self, inode: int, thread: int, fd: int) -> None:
        """Learn which socket is at this place now: a socket that was seen there before is there no more."""
        gone = [other for other, seen in self._seen.items() if other != inode and seen.fd == fd and seen.thread == thread]
        for other in gone:
            self._lose(other)

    def duplicates(self, but: int = 0, *, is_thorough: bool = False) -> list[_socket.socket]:
        """Duplicates of those that can be had, without the inode `but`. The caller closes them soon.

        A socket that is not where it was seen is closed, or another process has it. `is_thorough`: look in all processes.
        For a socket that shares we always look there, since a later socket could join it unasked.
        """
        found = []
        for inode, seen in list(self._seen.items()):
            if inode == but:
                continue
            socket = self._have(inode, seen)
            if socket is not None:
                found.append(socket)
            elif not seen.is_there(inode):
                self._lose(inode)
        missing = {inode for inode, seen in self._seen.items() if seen.fd == NOWHERE}
        if is_thorough:
            missing |= self._lost.keys()
        missing.discard(but)
        return found + self._look_for(missing) if missing else found

    def _lose(self, inode: int) -> None:
        """The socket is not where it was seen."""
        if self._seen[inode].shares:
            self._seen[inode].fd = NOWHERE
        else:
            self._lost[inode] = self._seen.pop(inode)

    def _look_for(self, missing: set[int]) -> list[_socket.socket]:
        """Duplicates of those that any process has. One that nobody has, and that does not listen, is gone, and forgotten."""
        places = tables.descriptors_of(missing)
        gone = missing - places.keys() - tables.listeners_on(self.port).keys()
        found = []
        for inode, (thread, fd) in places.items():
            if inode in self._lost:
                self._seen[inode] = self._lost.pop(inode)
            seen = self._seen[inode]
            seen.thread, seen.fd = thread, fd
            socket = self._have(inode, seen)
            if socket is not None:
                found.append(socket)
        for inode in gone:
            self._seen.pop(inode, None)
            self._lost.pop(inode, None)
        return found

    def _have(self, inode: int, seen: _Seen) -> _socket.socket | None:
        if seen.fd == NOWHERE:
            return None
        try:
            duplicate = self._threads.duplicate(seen.thread, seen.fd)
        except OSError:
            return None
        if os.fstat(duplicate).st_ino == inode:
            return _socket.socket(-1, -1, -1, duplicate)
        os.close(duplicate)
        return None

    def joins(self, traits: Traits, host: str, *, is_tidy: bool) -> bool:
        """Whether the flip would let this socket join a listener that shares, or, if the guard is not tidy, any listener.

        Without the flip the kernel would refuse that. After it the two would share the clients in silence. A socket that
        shares by itself may join.
        """
        if traits.shares:
            return False
        others = self._seen if is_tidy else {**self._seen, **self._lost}
        suspects = {
            other
            for other, seen in others.items()
            if (seen.shares or not is_tidy) and other != traits.inode and overlap(host, seen.host)
        }
        return bool(suspects) and not suspects.isdisjoint(tables.listeners_on(self.port))

    def strangers(self, listening: Iterable[int], but: int = 0) -> set[int]:
        """The inodes in `listening` that are neither the command's nor `but`."""
        return {*listening} - self._seen.keys() - self._lost.keys() - {but}


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

    __slots__ = ("fd", "host", "shares", "thread")

    def __init__(self, thread: int, fd: int, host: str, shares: bool) -> None:
        self.thread = thread
        self.fd = fd
        self.host = host
        self.shares = shares

    def is_there(self, inode: int) -> bool:
        """Whether the socket is still where it was seen. A gated socket may be, though we get no duplicate of it."""
        return self.fd != NOWHERE and inode_of(self.thread, self.fd) == inode


def _close(sockets: Iterable[_socket.socket]) -> None:
    for socket in sockets:
        socket.close()
