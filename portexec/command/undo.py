"""What a run has made in the file system and has to take back: one list, for whoever ends last.

An entry is recorded in the moment in which the thing is made. Where portexec executes the command, nothing is undone, since
nobody is left to do it. Where portexec stays, its shim gets the list with the word to go, and undoes it when portexec was
killed. Nothing is removed that has become somebody else's meanwhile.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SOCKET = "socket"  # path, device, inode
_FILE = "file"  # path, content, the name that it has while it is removed


class Undo:
    """The list. `entries` are lists of text, so that another process can be told of them."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: list[list[str]] = []

    def record_socket(self, path: str, device: int, inode: int) -> None:
        """A unix socket was bound at this path, as this file. It is known again by both numbers."""
        self.entries.append([_SOCKET, _absolute(path), str(device), str(inode)])

    def record_file(self, path: str, content: bytes) -> None:
        """A file was made. It is to be removed if it has this content and no other."""
        directory, base = os.path.split(_absolute(path))
        aside = os.path.join(directory, f".{base[:200]}.{os.urandom(6).hex()}")
        self.entries.append([_FILE, os.path.join(directory, base), os.fsdecode(content), aside])

    def run(self) -> None:
        """Take everything back, the last first. Once more does nothing."""
        while self.entries:
            kind, path, *known = self.entries.pop()
            if kind == _SOCKET:
                _remove_socket(path, known)
            else:
                _remove_file(path, os.fsencode(known[0]), known[1])


def file_at(path: str) -> tuple[int, int] | None:
    """Device and inode of what is at a path now; None if nothing is."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _absolute(path: str) -> str:
    """Who undoes it may be elsewhere. Where the working directory has gone, the path stays as it is."""
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:
        return path


def _remove_socket(path: str, known: Sequence[str]) -> None:
    if file_at(path) == tuple(map(int, known)):
        try:
            os.unlink(path)
        except OSError:
            pass


def _remove_file(path: str, content: bytes, aside: str) -> None:
    """Remove a file that has just this content.

    The file is renamed before the last look, and comes back if it has more: what another launch appends meanwhile is in the
    renamed file, or that launch sees that the file has gone. A lock would not do: whoever may read a file can hold one.
    Whoever undoes it before us may have been killed with the file aside.
    """
    try:
        if _content(path, len(content)) == content:
            os.rename(path, aside)
        if _content(aside, len(content)) != content:
            _bring_back(aside, path)
        os.unlink(aside)
    except OSError:
        pass


def _bring_back(aside: str, path: str) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        if not os.path.samefile(aside, path):
            raise  # what is in it is not to be lost


def _content(path: str, length: int) -> bytes | None:
    """One byte more than so many of a regular file, if it has them; None of anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, length + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
