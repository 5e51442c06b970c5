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
from portexec.command.undo import Undo
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


def publish_files(port_file: str | None, export: str | None, port: int, variables: Mapping[str, str], undo: Undo) -> None:
    """Write the port file and append to the export file; raise PortexecError with neither changed if one cannot be.

    What was made is recorded in `undo`. Signals that would end us wait until it is done.
    """
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        temporary = _prepare_port_file(port_file, port) if port_file is not None else None
        lines = os.fsencode("".join(f"{name}={value}\n" for name, value in variables.items()))
        try:
            if export is not None and _append(export, lines):
                _record_or_take_back(export, lines, undo)
        except (PortexecError, MemoryError):
            if temporary is not None:
                os.unlink(temporary)
            raise
        if port_file is not None and temporary is not None:
            _put_in_place(temporary, port_file, export, lines)
            undo.record_file(port_file, b"%d\n" % port)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)


def _record_or_take_back(export: str, lines: bytes, undo: Undo) -> None:
    try:
        undo.record_file(export, lines)
    except MemoryError:
        _take_back(export, lines)
        raise


def _put_in_place(temporary: str, port_file: str, export: str | None, lines: bytes) -> None:
    try:
        os.rename(temporary, port_file)
    except (OSError, MemoryError) as error:
        os.unlink(temporary)
        if export is not None:
            _take_back(export, lines)
        raise _cannot_write("port file", port_file, error) from error


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
    except (OSError, MemoryError) as error:
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


def _append(path: str, lines: bytes) -> bool:
    """Append whole lines in one write(2), which O_APPEND keeps apart from those of other launches. Whether the file is new.

    Another launch may withdraw the file meanwhile. Then the lines went into a file that is nobody's, and are written again.
    """
    try:
        for _ in range(_TRIES):
            fd, is_new = _open_to_append(path)
            try:
                _append_to(fd, lines)
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return is_new
            except FileNotFoundError:
                pass
            finally:
                os.close(fd)
        raise OSError(errno.EAGAIN, "other launches withdraw it all the time")
    except OSError as error:
        raise _cannot_write("export file", path, error) from error


def _append_to(fd: int, lines: bytes) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    is_unfinished = status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n"
    try:
        _write_all(fd, b"\n" + lines if is_unfinished else lines)
    except OSError:
        os.ftruncate(fd, status.st_size)
        raise


def _open_to_append(path: str) -> tuple[int, bool]:
    """Open a file, and tell whether it was made."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE), True
        except FileExistsError:
            try:
                return os.open(path, flags), False
            except FileNotFoundError:
                continue  # another launch has withdrawn it


def _take_back(path: str, lines: bytes) -> None:
    """Cut our lines off the export file, which nobody has been told of yet, if they are the last."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rest = os.fstat(fd).st_size - len(lines)
        if os.pread(fd, len(lines), rest) == lines:
            os.ftruncate(fd, rest)
            if not rest:
                os.unlink(path)
    except OSError:
        pass
    finally:
        os.close(fd)


def _cannot_write(what: str, path: str | None, error: OSError | MemoryError) -> PortexecError:
    hints = {
        errno.ENOENT: "the directory has to exist",
        errno.ELOOP: "a symbolic link is not followed; name the file itself",
        errno.EACCES: "choose a directory that you may write to",
        errno.EROFS: "choose a directory that can be written to",
    }
    return PortexecError(f"cannot write {what} {path}: {reason(error)}", hints.get(getattr(error, "errno", None) or 0, ""))
