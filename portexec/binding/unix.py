"""Unix sockets: listen on a path without stealing a live one, also when several launches want it at once.

The socket is bound under its own path, not under a temporary one that is renamed, since getsockname(2) keeps the name for
good and socket-activation clients compare it (sd_is_socket_unix(3)). From the look at what is in the way until the socket
listens, a launch holds the mutex of that path, so that none takes another's fresh socket for a dead one.
"""

from __future__ import annotations

import _signal
import _socket
import binascii
import errno
import os
import stat
import time

from portexec.command.undo import Undo, file_at
from portexec.errors import ListenError
from portexec.kernel import ENDING_SIGNALS

_MUTEX_TRIES = 400
_MUTEX_PAUSE = 0.005  # seconds


def listen(socket: _socket.socket, path: str, backlog: int, undo: Undo) -> None:
    """Bind and listen on a path, or on an abstract name for `@NAME`. Access is what the umask leaves.

    A file that was made is recorded in `undo`.
    Raises ListenError when something that is alive, or is no socket, is in the way; OSError for the rest.
    """
    if path.startswith("@"):
        socket.bind(address(path))
        socket.listen(backlog)
        return
    mutex = _take_mutex(path)
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING_SIGNALS)  # while there may be a file of which nobody knows
    try:
        _bind_path(socket, path)
        try:
            made = file_at(path)
            if made is not None:
                undo.record_socket(path, *made)
        except MemoryError:
            os.unlink(path)  # of which nobody knows
            raise
        socket.listen(backlog)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        mutex.close()


def address(name: str) -> str:
    """What the kernel takes for a path, or for `@NAME`."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _take_mutex(path: str) -> _socket.socket:
    """An abstract socket that stands for the path: the kernel gives its name to one process, and takes it back at any end.

    Not a lock file or flock(2) on the directory, with which another user could make us wait for ever.
    """
    directory = os.stat(os.path.dirname(path) or ".")
    name = f"\0portexec:{directory.st_dev:x}:{directory.st_ino:x}:{binascii.crc32(os.fsencode(os.path.basename(path))):x}"
    mutex = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    for _ in range(_MUTEX_TRIES):
        try:
            mutex.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                mutex.close()
                raise
            time.sleep(_MUTEX_PAUSE)
        else:
            return mutex
    mutex.close()
    raise ListenError(f"cannot listen on unix:{path}: another launch is at it", "try again")


def _bind_path(socket: _socket.socket, path: str) -> None:
    try:
        socket.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _require_dead(path)
        os.unlink(path)
        socket.bind(path)


def _require_dead(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenError(f"cannot listen on unix:{path}: there is a file that is no socket", "choose another path")
    if _somebody_accepts(path):
        raise ListenError(
            f"cannot listen on unix:{path}: Address already in use", "stop the server that has it, or choose another path"
        )


def _somebody_accepts(path: str) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except OSError as error:
        # Refused: nobody listens. Anything else (a full backlog, a datagram socket, no permission) is a living owner.
        return error.errno != errno.ECONNREFUSED
    finally:
        probe.close()
    return True
