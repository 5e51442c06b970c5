"""Unix sockets: listen on a path without stealing a live one, and without leaving the path empty-handed.

The socket is bound under its own path, not under a temporary one that is renamed, since getsockname(2) keeps the name for
good and socket-activation clients compare it (sd_is_socket_unix(3)). A dead socket in the way is moved aside first and looked
at again there, so that of two launches at once neither can remove the other's.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat

from portexec.errors import PortexecError


def listen(socket: _socket.socket, path: str, backlog: int) -> None:
    """Bind and listen on a path, or on an abstract name for `@NAME`. Access is what the umask leaves.

    Raises PortexecError when something that is alive, or is no socket, is in the way; OSError for the rest.
    """
    if path.startswith("@"):
        socket.bind("\0" + path[1:])
    else:
        _bind_path(socket, path)
    try:
        socket.listen(backlog)
    except BaseException:
        remove(path)
        raise


def remove(path: str) -> None:
    """Remove a unix socket of ours from its path, if it has one."""
    if not path.startswith("@"):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def _bind_path(socket: _socket.socket, path: str) -> None:
    try:
        socket.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _clear_dead(path)
        socket.bind(path)


def _clear_dead(path: str) -> None:
    """Remove a socket that nobody serves any more; raise PortexecError if it is anything else."""
    _require_dead(path, path)
    aside = f"{path}.{os.getpid()}.dead"
    os.rename(path, aside)
    try:
        _require_dead(aside, path)
    except PortexecError:
        os.link(aside, path)  # another launch was faster: give it its place back
        raise
    finally:
        os.unlink(aside)


def _require_dead(place: str, path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(place).st_mode):
            raise PortexecError(f"cannot listen on unix:{path}: there is a file that is no socket", "choose another path")
    except FileNotFoundError:
        raise PortexecError(f"cannot listen on unix:{path}: another launch is at it", "try again") from None
    if _somebody_accepts(place) or _is_bound(path):
        raise PortexecError(
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


def _is_bound(path: str) -> bool:
    """Whether a living process has bound the path and is about to listen: the kernel lists it (proc(5), /proc/net/unix)."""
    try:
        with open("/proc/net/unix", "rb") as table:
            wanted = os.fsencode(path)
            return any(line.rstrip(b"\n").split(None, 7)[7:] == [wanted] for line in table)
    except OSError:
        return False
