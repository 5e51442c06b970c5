"""Telling others the address: the announcement on stderr, the port file, the export file.

Both files are written when the number is bound and before the command starts. Neither is ever half written, world-writable,
or written through a symbolic link that somebody planted.
"""

from __future__ import annotations

import _signal
import errno
import os
import stat

from portexec.binding.listeners import Listener
from portexec.command.undo import Undo, hidden_name
from portexec.errors import PortexecError, reason
from portexec.kernel import ENDING_SIGNALS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MODE = 0o644
_TRIES = 100


def announcement(listeners: Sequence[Listener], *, named: bool) -> list[str]:
    """`http://127.0.0.1:41507`, a line for each listener; with the name before the address where there are several."""
    return [f"{listener.name + ' ' if named else ''}{listener.url}" for listener in listeners]


def announcement_json(listeners: Sequence[Listener], hand_off: str, first_fd: int | None) -> str:
    """The same as one JSON line."""
    from portexec.plainjson import dumps

    return dumps({"pid": os.getpid(), "hand_off": hand_off, "listeners": described(listeners, first_fd)}) + "\n"


def described(listeners: Sequence[Listener], first_fd: int | None) -> list[dict[str, str | int]]:
    """Listeners as plain values. What a listener does not have is left out."""
    described = []
    for position, listener in enumerate(listeners):
        fields: dict[str, str | int] = {"name": listener.name, "url": listener.url}
        if listener.port:
            fields |= {"host": listener.told_host, "port": listener.port}
        if listener.path:
            fields["path"] = listener.path
        if first_fd is not None:
            fields["fd"] = first_fd + position
        described.append(fields)
    return described


def publish_files(port_file: str | None, export: str | None, port: int, variables: Mapping[str, str], undo: Undo) -> None:
    """Write the port file and append to the export file; raise PortexecError with neither changed if one cannot be.

    What is made is recorded in `undo`. Signals that would end us wait until it is done.
    """
    lines = os.fsencode("".join(f"{name}={value}\n" for name, value in variables.items()))
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        temporary = None if port_file is None else _prepare_port_file(port_file, port, undo)
        is_new = export is None or _append(export, lines, undo)
        try:
            if port_file is not None and temporary is not None:
                _put_in_place(temporary, port_file, port, undo)
        except (PortexecError, MemoryError):
            if export is not None and not is_new:
                _take_back(export, lines)
            raise
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


def _prepare_port_file(path: str, port: int, undo: Undo) -> str:
    """Write the number to a temporary file beside `path`, ready to be renamed, and return its name."""
    require_number(port)
    temporary = hidden_name(path)
    try:
        require_replaceable(path)
        undo.record_temporary(temporary)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        try:
            _write_all(fd, b"%d\n" % port)
        finally:
            os.close(fd)
    except OSError as error:
        raise cannot_write("port file", path, error) from error
    return temporary


def _put_in_place(temporary: str, port_file: str, port: int, undo: Undo) -> None:
    made = undo.record_file(port_file, b"%d\n" % port)
    try:
        os.rename(temporary, port_file)
    except OSError as error:
        undo.forget(made)  # the file with this name is not ours
        raise cannot_write("port file", port_file, error) from error


def require_number(port: int) -> None:
    """Refuse a first listener that has no number for a port file. Raises PortexecError."""
    if not port:
        raise PortexecError("--port-file: the first listener is a unix socket and has no number", "list a TCP listener first")


def _write_all(fd: int, data: bytes) -> None:
    """One write(2) that has to take everything, as it does unless the disk or a limit is full."""
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def require_replaceable(path: str) -> None:
    """Refuse to rename over anything but a regular file, or over a stranger's file, which would be lost. Raises OSError."""
    if not os.path.basename(path):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EEXIST, "there is something that is no regular file")
    if is_open_to_strangers(os.stat(os.path.dirname(path) or ".")):
        _require_own(status)


def is_open_to_strangers(directory: os.stat_result) -> bool:
    """Whether another user may put files into this directory."""
    return bool(directory.st_mode & stat.S_IWOTH) or directory.st_uid not in (0, os.geteuid())


def _require_own(file: os.stat_result) -> None:
    """Refuse a file that is another user's; for a directory where another user may put files. Raises PermissionError."""
    if file.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, "somebody else may have put it there")


def _append(path: str, lines: bytes, undo: Undo) -> bool:
    """Append whole lines in one write(2), which O_APPEND keeps apart from those of other launches. Whether the file is new.

    Another launch may withdraw the file meanwhile. Then the lines went into a removed file, and are written again.
    """
    try:
        for _ in range(_TRIES):
            if _append_to_existing(path, lines):
                return False
            if _append_to_new(path, lines, undo):
                return True
        raise OSError(errno.EAGAIN, "other launches withdraw it all the time")
    except OSError as error:
        raise cannot_write("export file", path, error) from error


def _append_to_existing(path: str, lines: bytes) -> bool:
    """Append to a file that is there; False if there is none."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    return _append_and_close(fd, path, lines)


def _append_to_new(path: str, lines: bytes, undo: Undo) -> bool:
    """Make a file with these lines; False if there is one by now."""
    made = undo.record_file(path, lines)
    empty = undo.record_file(path, b"")  # the file is empty until the lines are in it
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
        is_made = _append_and_close(fd, path, lines)
    except FileExistsError:
        is_made = False
    undo.forget(empty)
    if not is_made:
        undo.forget(made)
    return is_made


def _append_and_close(fd: int, path: str, lines: bytes) -> bool:
    """Append to an open file, and close it. Whether it is still the file at its path."""
    try:
        require_appendable(path, os.fstat(fd))
        _append_to(fd, lines)
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)


def _append_to(fd: int, lines: bytes) -> None:
    status = os.fstat(fd)
    is_unfinished = status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n"
    try:
        _write_all(fd, b"\n" + lines if is_unfinished else lines)
    except OSError:
        os.ftruncate(fd, status.st_size)
        raise


def require_appendable(path: str, status: os.stat_result) -> None:
    """Refuse to append to what is no regular file, or to a stranger's in a directory like /tmp. Raises OSError.

    Where only its owner may put files, the file may be the owner's: in a container, root appends to the file of a runner.
    """
    if os.stat(os.path.dirname(path) or ".").st_mode & stat.S_IWOTH:
        _require_own(status)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _take_back(path: str, lines: bytes) -> None:
    """Cut our lines off an export file that was there before, if they are the last. Nobody has been told of them yet."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rest = os.fstat(fd).st_size - len(lines)
        if os.pread(fd, len(lines), rest) == lines:
            os.ftruncate(fd, rest)
    except OSError:
        pass
    finally:
        os.close(fd)


def cannot_write(what: str, path: str | None, error: OSError) -> PortexecError:
    """The error that a file of the user's choice cannot be written."""
    no_file = (errno.EEXIST, errno.EINVAL, errno.ENXIO)  # a FIFO, a device, a socket
    hints = dict.fromkeys(no_file, "name a file, or a place where there is nothing yet") | {
        errno.ENOENT: "the directory has to exist",
        errno.ELOOP: "a symbolic link is not followed; name the file itself",
        errno.EISDIR: f"name a file in it: {os.path.join(path or '', 'NAME')}",
        errno.EACCES: "choose a directory that you may write to",
        errno.EPERM: "remove it, or choose a directory that only you may write to",
        errno.EROFS: "choose a directory that can be written to",
    }
    why = "it is a symbolic link" if error.errno == errno.ELOOP and os.path.islink(path or "") else reason(error)
    return PortexecError(f"cannot write {what} {path}: {why}", hints.get(error.errno or 0, ""))
