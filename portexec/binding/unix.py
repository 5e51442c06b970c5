"""Unix sockets: listen on a path without stealing a live one, also when several launches want it at once.

The socket is bound under its own path, not under a temporary one that is renamed: getsockname(2) keeps the first name for
good, and socket-activation clients compare it (sd_is_socket_unix(3)). bind(2) gives a free path to exactly one launch. From
that moment on the socket is alive, listening or not: `_is_dead` can tell.

So a lock is needed for one thing only, the removal of a dead socket. Two launches could both look at the dead one. The first
would remove it and bind. The second would then remove the first one's fresh socket.

The lock is a file beside the socket that nobody else can open (0600, ours), so that nobody else can hold it. An abstract name,
or a lock on the directory, could be held by anybody. Somebody else may have put another file in the place of the lock, and a
launch of ours may have been stopped while it held the lock. Then the removal does without the lock: it renames first, looks at
what it has renamed, and puts back what is not the dead socket. A fresh socket is lost then only if a third launch binds the
path in that moment.
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

_TRIES = 400  # to bind, while other launches bind and end
_PATIENT_TRIES = 200  # in which another launch may hold the lock, which it needs for less than one pause
_PAUSE = 0.005  # seconds
_EVERYTHING = 0o777


def listen(socket: _socket.socket, path: str, backlog: int, mode: int | None, undo: Undo) -> None:
    """Bind and listen on a path, or on an abstract name for `@NAME`. Without a mode, access is what the umask leaves.

    A file that was made is recorded in `undo`.
    Raises ListenError when something that is alive, or is no socket, is in the way; OSError for the rest.
    """
    if path.startswith("@"):
        socket.bind(address(path))
        socket.listen(backlog)
        return
    for tries in range(_TRIES):
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING_SIGNALS)  # while there may be a file that is not in `undo`
        try:
            if _try_to_bind(socket, path, backlog, mode, undo):
                return
            is_clear = _clear_way(path, is_patient=tries < _PATIENT_TRIES)
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        if not is_clear:
            time.sleep(_PAUSE)
    raise ListenError(f"cannot listen on unix:{path}: other launches bind and remove it all the time", "try again")


def address(name: str) -> str:
    """What the kernel takes for a path, or for `@NAME`."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _try_to_bind(socket: _socket.socket, path: str, backlog: int, mode: int | None, undo: Undo) -> bool:
    """Bind and listen on a path that is free; False if it is not."""
    try:
        _bind(socket, path, mode)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    try:
        made = file_at(path)
        if made is not None:
            undo.record_socket(path, *made)
    except MemoryError:
        os.unlink(path)  # since `undo` does not know it
        raise
    socket.listen(backlog)
    return True


def _bind(socket: _socket.socket, path: str, mode: int | None) -> None:
    """Bind with this mode from the first moment on: a chmod(2) after it would come too late, and follow a link."""
    if mode is None:
        socket.bind(path)
        return
    umask = os.umask(_EVERYTHING & ~mode)
    try:
        socket.bind(path)
    finally:
        os.umask(umask)


def _clear_way(path: str, *, is_patient: bool) -> bool:
    """Remove the dead socket that is in the way; False while another launch does. Raises ListenError if it is not dead."""
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

    We ask with a datagram socket. The kernel looks whether there is a socket before it looks at the kind. So it answers
    EPROTOTYPE for a living socket, even if that does not listen yet. A stream socket asks again, for imitations of Linux.
    """
    return all(_refuses(path, kind) for kind in (_socket.SOCK_DGRAM, _socket.SOCK_STREAM))


def _refuses(path: str, kind: int) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, kind)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except OSError as error:
        # Any other error (a full backlog, another kind of socket, no permission) means a living owner. ENOENT: it has gone.
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
        os.rename(aside, path)  # it is another user's, and no link to it can be made


def _take_lock(path: str) -> tuple[int | None, bool]:
    """The lock file, locked, None if it cannot be; and whether another launch has it."""
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
        is_busy = error.errno in (errno.EWOULDBLOCK, errno.ENOENT)  # the launch that had it has removed it
    os.close(fd)
    return None, is_busy


def _open_lock(path: str) -> int | None:
    """Open the lock file, or make it; None if it is not ours alone, such as a link to something that others can open."""
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
    """Remove the file while it is locked, so that a launch that waits for the lock sees that it has gone."""
    try:
        os.unlink(_beside(path, "lock"))
    except OSError:
        pass
    os.close(fd)


def _beside(path: str, ending: str) -> str:
    directory, base = os.path.split(path)
    return os.path.join(directory, f".{base}.portexec-{ending}")
