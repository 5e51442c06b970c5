"""The log of a run: a file that is the stdout and stderr of the command itself, and its last lines for people.

The file is opened once, before the command starts, and every start of the command appends to it. So it has all that the command
wrote when portexec is killed, and a full disk is the command's own affair.
"""

from __future__ import annotations

import errno
import os
import stat

from portexec.command import execute
from portexec.command.publish import cannot_write, is_open_to_strangers
from portexec.command.undo import Undo
from portexec.errors import PortexecError
from portexec.kernel import STDERR

_MODE = 0o600
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TRIES = 100
_LINES = 40
_BYTES = 1 << 16
_WIDEST = 1000  # characters of a line
_COLOUR = "\x1b["


class Log:
    """An open log. `fd` is close-on-exec, and none of the standard streams."""

    __slots__ = ("_began", "_entry", "_seen", "_undo", "fd", "path")

    def __init__(self, path: str, undo: Undo) -> None:
        """Open the file for appending, or make it. Raises PortexecError.

        A file that was made is recorded in `undo`, until `keep` is called.
        """
        self.path = path
        self._undo = undo
        try:
            opened, is_new = _open(path)
            self.fd = execute.duplicate(opened, STDERR + 1, inheritable=False)
            os.close(opened)
            os.set_blocking(self.fd, True)
        except OSError as error:
            raise cannot_open(path, error) from error
        self._entry = undo.record_file(path, b"") if is_new else None
        self._began = self._seen = os.fstat(self.fd).st_size

    def keep(self) -> None:
        """The command is going to run: the file stays from now on, also an empty one."""
        if self._entry is not None:
            self._undo.forget(self._entry)
            self._entry = None

    def last_lines(self) -> list[str]:
        """The last lines that were written since the log was opened.

        No lines where the log is no regular file, or where it is our stderr: then people have seen them.
        """
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode) or os.path.samestat(status, os.fstat(STDERR)):
                return []
            began = self._began if status.st_size >= self._began else 0  # it was emptied meanwhile
            return _last_lines(self._read(max(began, status.st_size - _BYTES)))
        except OSError:
            return []  # it may be written and not read

    def new_lines(self) -> list[str]:
        """The whole lines that were written since the last call; no lines where the log is no regular file."""
        lines: list[str] = []
        try:
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                return []
            while data := self._read(self._seen):
                whole = data.rfind(b"\n") + 1 or (len(data) if len(data) == _BYTES else 0)
                if not whole:
                    break
                self._seen += whole
                lines += os.fsdecode(data[:whole]).split("\n")
        except OSError:
            pass  # it may be written and not read
        return [_shown(line) for line in lines if line]

    def _read(self, start: int) -> bytes:
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, _BYTES, start)
        finally:
            os.close(fd)


def _last_lines(data: bytes) -> list[str]:
    lines = os.fsdecode(data).rstrip("\r\n").split("\n")
    return [_shown(line) for line in lines[-_LINES:]] if data.strip() else []


def _shown(line: str) -> str:
    """What a terminal would show of a line in the end, without colours."""
    first, *parts = line.rstrip("\r").rpartition("\r")[2].split(_COLOUR)
    return (first + "".join(map(_without_colour, parts)))[:_WIDEST]


def _without_colour(text: str) -> str:
    rest = text.lstrip("0123456789;")
    return rest[1:] if rest.startswith("m") else _COLOUR + text


def _open(path: str) -> tuple[int, bool]:
    """Open a file, and tell whether it was made. Raises OSError.

    Links are followed, except where a stranger can have put one. A FIFO that nobody reads is an error and no wait.
    """
    directory, base = os.path.split(path)
    if not base:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    at = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            try:
                return os.open(base, _FLAGS | os.O_CREAT | os.O_EXCL, _MODE, dir_fd=at), True
            except FileExistsError:
                pass
            if not is_open_to_strangers(os.fstat(at)):
                return os.open(base, _FLAGS | os.O_CREAT, _MODE, dir_fd=at), False
            try:
                return _open_our_own(base, at), False
            except FileNotFoundError:
                pass  # somebody has removed it meanwhile
        raise BlockingIOError(errno.EAGAIN, "it is made and removed all the time")
    finally:
        os.close(at)


def _open_our_own(base: str, at: int) -> int:
    """Open an existing file in a directory where strangers may put files. The file has to be our own, and no link."""
    fd = os.open(base, _FLAGS | os.O_NOFOLLOW, dir_fd=at)
    try:
        require_our_own(os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd


def require_our_own(status: os.stat_result) -> None:
    """Refuse a file that a stranger may have put there, in a directory where strangers may. Raises OSError."""
    if status.st_uid not in (0, os.geteuid()) or status.st_nlink > 1:
        raise PermissionError(errno.EPERM, "somebody else may have put it there")


def cannot_open(path: str, error: OSError) -> PortexecError:
    """The error that the log cannot be opened."""
    failure = cannot_write("log", path, error)
    if error.errno == errno.ENXIO and _is_fifo(path):
        failure.hint = "a FIFO needs a reader before portexec starts"
    return failure


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False
