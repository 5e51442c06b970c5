"""Unix sockets: listen on a path without stealing a live one, also when several launches want it at once.

The socket is bound under its own path, not under a temporary one that is renamed, since getsockname(2) keeps the name for
good and socket-activation clients compare it (sd_is_socket_unix(3)). bind(2) gives a path that is free to exactly one launch,
and who has it is alive from that moment on, listening or not: `_is_dead` can tell. So a lock is needed for one thing only,
the removal of a dead socket, in which two launches could look at the dead one, the first remove it and bind, and the second
remove the first one's fresh socket.

The lock is a file beside the socket that nobody else can open (0600, ours), so that nobody else can hold it; an abstract name
or a lock on the directory could be held by anybody. Where somebody else has put something in its place, or a launch of ours
was stopped with it, the removal goes without: it renames first, looks at what it has got, and puts back what is not the dead
one. Without the lock a fresh socket is lost only if, in that moment, a third launch binds the path.
"""

from __future__ import annotations

import _signal
import _socket
import errno
import os
import stat
import time

from portexec.command.undo import Undo, file_at
from portexec.errors import ListenError
from portexec.kernel import ENDING_SIGNALS

_TRIES = 400  # to bind, while other launches do and end
_PATIENT_TRIES = 200  # in which the lock may be somebody else's, who needs it for less than one pause
_PAUSE = 0.005  # seconds


def listen(socket: _socket.socket, path: str, backlog: int, undo: Undo) -> None:
    """Bind and listen on a path, or on an abstract name for `@NAME`. Access is what the umask leaves.

    A file that was made is recorded in `undo`.
    Raises ListenError when something that is alive, or is no socket, is in the way; OSError for the rest.
    """
    if path.startswith("@"):
        socket.bind(address(path))
        socket.listen(backlog)
        return
    for tries in range(_TRIES):
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING_SIGNALS)  # while there may be a file of which nobody knows
        try:
            if _is_bound(socket, path, backlog, undo):
                return
            is_clear = _is_way_clear(path, is_patient=tries < _PATIENT_TRIES)
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        if not is_clear:
            time.sleep(_PAUSE)
    raise ListenError(f"cannot listen on unix:{path}: other launches are at it", "try again")


def address(name: str) -> str:
    """What the kernel takes for a path, or for `@NAME`."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _is_bound(socket: _socket.socket, path: str, backlog: int, undo: Undo) -> bool:
    """Bind and listen on a path that is free; False if it is not."""
    try:
        socket.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    try:
        made = file_at(path)
        if made is not None:
            undo.record_socket(path, *made)
    except MemoryError:
        os.unlink(path)  # of which nobody knows
        raise
    socket.listen(backlog)
    return True


def _is_way_clear(path: str, *, is_patient: bool) -> bool:
    """Remove the dead socket that is in the way; False when another launch is at it. Raises ListenError if another thing is."""
    if _dead_at(path) is None:
        return True
    lock, is_busy = _take_lock(path)
    if is_busy and is_patient:
        return False
    try:
        dead = _dead_at(path)  # another launch may have been here
        if dead is not None:
            _remove(path, dead)
    finally:
        if lock is not None:
            _remove_lock(path, lock)
    return True


def _dead_at(path: str) -> tuple[int, int] | None:
    """The dead socket at a path; None if nothing is there any more. Raises ListenError if something else is there."""
    there = file_at(path)
    if there is None:
        return None
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None
    if not is_socket:
        raise ListenError(f"cannot listen on unix:{path}: there is a file that is no socket", "choose another path")
    if not _is_dead(path):
        raise ListenError(
            f"cannot listen on unix:{path}: Address already in use", "stop the server that has it, or choose another path"
        )
    return there


def _is_dead(path: str) -> bool:
    """Whether no process has the socket at this path.

    Asked by a datagram socket, the kernel looks whether there is a socket before it looks at the kind, and answers EPROTOTYPE
    for one that is bound and does not listen yet. A stream socket asks again, for systems that play Linux.
    """
    return all(_refuses(path, kind) for kind in (_socket.SOCK_DGRAM, _socket.SOCK_STREAM))


def _refuses(path: str, kind: int) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, kind)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except OSError as error:
        # Anything else (a full backlog, another kind of socket, no permission) is a living owner. Gone: see what is there now.
        return error.errno in (errno.ECONNREFUSED, errno.ENOENT)
    finally:
        probe.close()
    return False


def _remove(path: str, dead: tuple[int, int]) -> None:
    """Remove this dead socket and no other."""
    aside = _beside(path, os.urandom(6).hex())
    try:
        os.rename(path, aside)
        if file_at(aside) != dead:
            _put_back(aside, path)
        os.unlink(aside)
    except FileNotFoundError:
        pass  # somebody else has removed it


def _put_back(aside: str, path: str) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        pass  # it has a successor
    except OSError:
        os.rename(aside, path)  # of another user, where no link can be made


def _take_lock(path: str) -> tuple[int | None, bool]:
    """The lock file, locked, if it can be had; and whether that is because another launch has it."""
    import fcntl

    fd = _open_lock(path)
    if fd is None:
        return None, False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(_beside(path, "lock"))):
            return fd, False
        is_busy = True
    except OSError as error:
        is_busy = error.errno in (errno.EWOULDBLOCK, errno.ENOENT)  # who had it removes it
    os.close(fd)
    return None, is_busy


def _open_lock(path: str) -> int | None:
    """Open the lock file, or make it; None if it is not ours alone, as a link to something that others can open."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(_beside(path, "lock"), flags, 0o600)
    except OSError:
        return None
    status = os.fstat(fd)
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if is_ours and not status.st_size:
        return fd
    os.close(fd)
    return None


def _remove_lock(path: str, fd: int) -> None:
    """Remove the file while it is locked, so that who waits for it sees that it is nobody's any more."""
    try:
        os.unlink(_beside(path, "lock"))
    except OSError:
        pass
    os.close(fd)


def _beside(path: str, ending: str) -> str:
    directory, base = os.path.split(path)
    return os.path.join(directory, f".{base}.portexec-{ending}")
