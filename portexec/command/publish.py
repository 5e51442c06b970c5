"""Telling others the address: the announcement on stderr, the port file, the export file.

Both files are written when the number is bound and before the command starts. Neither is ever half written, world-writable,
or written through a symbolic link that somebody planted.
"""

from __future__ import annotations

import _signal
import errno
import fcntl
import os
import stat

from portexec.binding.listeners import Listener
from portexec.errors import PortexecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MODE = 0o644
_STDERR = 2
_PATIENCE = 1000  # milliseconds
_ENDING_SIGNALS = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM)


def say(text: str) -> None:
    """Write lines to stderr, in one piece; a stderr that is closed or full is nobody's failure."""
    data = os.fsencode(text)
    try:
        while data:
            data = data[os.write(_STDERR, data) :]
    except OSError:
        pass


def say_if_heard(text: str) -> None:
    """The same for a parent, who has to hear signals meanwhile: it waits for room for a second, and then says nothing."""
    import select

    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    data = os.fsencode(text)
    try:
        while data and poll.poll(_PATIENCE):
            data = data[os.write(_STDERR, data[: select.PIPE_BUF]) :]  # so much goes in without blocking, pipe(7)
    except OSError:
        pass


def announcement(listeners: Sequence[Listener]) -> str:
    """`portexec: http://127.0.0.1:41507`; with several listeners a line each, the name before the address."""
    named = len(listeners) > 1
    return "".join(f"portexec: {listener.name + ' ' if named else ''}{listener.url}\n" for listener in listeners)


def announcement_json(listeners: Sequence[Listener], hand_off: str, first_fd: int | None) -> str:
    """The same as one JSON line."""
    import json

    return json.dumps({"pid": os.getpid(), "hand_off": hand_off, "listeners": described(listeners, first_fd)}) + "\n"


def described(listeners: Sequence[Listener], first_fd: int | None) -> list[dict[str, str | int]]:
    """Listeners as plain values. What a listener does not have is left out."""
    described = []
    for position, listener in enumerate(listeners):
        fields: dict[str, str | int] = {"name": listener.name, "url": listener.url}
        if listener.port:
            fields |= {"host": listener.host, "port": listener.port}
        if listener.path:
            fields["path"] = listener.path
        if first_fd is not None:
            fields["fd"] = first_fd + position
        described.append(fields)
    return described


class Published:
    """The files that were written, so that they can be withdrawn.

    `lines` is what was appended to the export file if that is a file of ours, which was not there before; else it is empty.
    """

    __slots__ = ("export", "lines", "port", "port_file")

    def __init__(self, port_file: str | None, port: int, export: str | None, lines: bytes) -> None:
        self.port_file = port_file
        self.port = port
        self.export = export
        self.lines = lines

    def withdraw(self) -> None:
        """Remove the files that are still ours: a port file with our number, an export file with nothing but our lines."""
        if self.port_file is not None:
            _remove_if_it_has(self.port_file, b"%d\n" % self.port)
        if self.export is not None and self.lines:
            _remove_if_it_has(self.export, self.lines)


def publish_files(port_file: str | None, export: str | None, port: int, variables: Mapping[str, str]) -> Published:
    """Write the port file and append to the export file; raise PortexecError with neither changed if one cannot be.

    Signals that would end us wait until it is done.
    """
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        temporary = _prepare_port_file(port_file, port) if port_file is not None else None
        lines = lines_of(variables)
        try:
            appended, is_new = _append(export, lines) if export else (0, False)
        except PortexecError:
            if temporary is not None:
                os.unlink(temporary)
            raise
        if port_file is not None and temporary is not None:
            try:
                os.rename(temporary, port_file)
            except OSError as error:
                os.unlink(temporary)
                _take_back(export, appended)
                raise _cannot_write("port file", port_file, error) from error
        return Published(port_file, port, export, lines if is_new else b"")
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


def lines_of(variables: Mapping[str, str]) -> bytes:
    """What is appended to an export file."""
    return os.fsencode("".join(f"{name}={value}\n" for name, value in variables.items()))


def _remove_if_it_has(path: str, content: bytes) -> None:
    """Remove a file that has this content and no other."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _lock(fd)
        if os.read(fd, len(content) + 1) == content and os.path.samestat(os.fstat(fd), os.lstat(path)):
            os.unlink(path)
    except OSError:
        pass
    finally:
        os.close(fd)


def _prepare_port_file(path: str, port: int) -> str:
    """Write the number to a temporary file beside `path`, ready to be renamed, and return its name."""
    if not port:
        raise PortexecError("--port-file: the first listener is a unix socket and has no number", "list a TCP listener first")
    directory, base = os.path.split(path)
    temporary = os.path.join(directory, f".{base[:200]}.{os.urandom(6).hex()}")
    try:
        _require_replaceable(path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise _cannot_write("port file", path, error) from error
    try:
        _write_all(fd, b"%d\n" % port)
    except OSError as error:
        os.unlink(temporary)
        raise _cannot_write("port file", path, error) from error
    finally:
        os.close(fd)
    return temporary


def _write_all(fd: int, data: bytes) -> None:
    """One write(2) that has to take everything, as it does unless the disk or a limit is full."""
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _require_replaceable(path: str) -> None:
    """Refuse to rename over anything but a regular file: /dev/stdout, a device or a link would be gone for good."""
    if not os.path.basename(path):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "there is something that is no regular file")


def _append(path: str, lines: bytes) -> tuple[int, bool]:
    """Append whole lines in one write(2), which O_APPEND keeps apart from those of other launches.

    Returns how many bytes that were, and whether the file is new.
    """
    try:
        fd, is_new = _open_to_append(path)
    except OSError as error:
        raise _cannot_write("export file", path, error) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        unfinished = status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n"
        data = b"\n" + lines if unfinished else lines
        try:
            _write_all(fd, data)
        except OSError:
            os.ftruncate(fd, status.st_size)
            raise
    except OSError as error:
        raise _cannot_write("export file", path, error) from error
    finally:
        os.close(fd)
    return len(data), is_new


def _open_to_append(path: str) -> tuple[int, bool]:
    """Open and lock a file, and tell whether it was made. One that another launch withdraws meanwhile is made anew."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            fd, is_new = os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE), True
        except FileExistsError:
            try:
                fd, is_new = os.open(path, flags), False
            except FileNotFoundError:
                continue
        _lock(fd)
        if os.fstat(fd).st_nlink:
            return fd, is_new
        os.close(fd)


def _lock(fd: int) -> None:
    """Keep other launches out until the descriptor is closed, where the file system can."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        pass


def _take_back(path: str | None, length: int) -> None:
    """Cut off the last bytes of the export file, which nobody has been told of yet."""
    if path is not None and length:
        try:
            os.truncate(path, os.stat(path).st_size - length)
        except OSError:
            pass


def _cannot_write(what: str, path: str | None, error: OSError) -> PortexecError:
    hints = {
        errno.ENOENT: "the directory has to exist",
        errno.ELOOP: "a symbolic link is not followed; name the file itself",
        errno.EACCES: "choose a directory that you may write to",
        errno.EROFS: "choose a directory that can be written to",
    }
    return PortexecError(f"cannot write {what} {path}: {reason(error)}", hints.get(error.errno or 0, ""))
