"""What a run has made in the file system and has to take back: one list, for the process that ends last.

A file is recorded just before it is made. A socket is recorded just after that, since its inode is not known before. Where
portexec executes the command, nothing is undone, since no process of ours is left. Where portexec stays, its shim is the heir
of the list: it is told each entry, and undoes them all if portexec is killed. A file that is another launch's by now stays.
"""

from __future__ import annotations

import os

from portexec.errors import is_shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Heir(Protocol):
        """The process that undoes what is on the list if this process is killed, as seen from here."""

        def record(self, entry: Sequence[str]) -> None:
            """There is one more entry."""

        def forget(self, entry: Sequence[str]) -> None:
            """There is one less."""


_SOCKET = "socket"  # path, device, inode
_FILE = "file"  # path, content, the name that it has while it is removed
_TEMPORARY = "temporary"  # path


class Undo:
    """The list. `entries` are lists of text, so that another process can be told of them."""

    __slots__ = ("entries", "heir")

    def __init__(self) -> None:
        self.entries: list[list[str]] = []
        self.heir: Heir | None = None

    def leave_to(self, heir: Heir) -> None:
        """Make this the heir from now on. It is told all entries that are on the list already."""
        self.heir = heir
        for entry in self.entries:
            heir.record(entry)

    def record_socket(self, path: str, device: int, inode: int) -> None:
        """A unix socket was bound at this path. It is known again by its device and its inode."""
        self._record(_SOCKET, _absolute(path), str(device), str(inode))

    def record_file(self, path: str, content: bytes) -> list[str]:
        """A file is about to be made. It will be removed if it has this content and no other. Returns the entry."""
        path = _absolute(path)
        return self._record(_FILE, path, os.fsdecode(content), hidden_name(path))

    def record_temporary(self, path: str) -> None:
        """A file is about to be made under a name that nobody else takes. If it is there, it will be removed."""
        self._record(_TEMPORARY, _absolute(path))

    def forget(self, entry: list[str]) -> None:
        """Take an entry off the list: the thing was not made, or is to stay."""
        self.entries.remove(entry)
        if self.heir is not None:
            self.heir.forget(entry)

    def run(self) -> None:
        """Take everything back, the last first. A second call does nothing.

        Raises OSError where there is no descriptor or no memory to look at a file with. A later call goes on from there.
        """
        while self.entries:
            kind, path, *known = self.entries[-1]
            if kind == _SOCKET:
                _remove_socket(path, known)
            elif kind == _FILE:
                _remove_file(path, os.fsencode(known[0]), known[1])
            else:
                _remove(path)
            self.entries.pop()

    def _record(self, *entry: str) -> list[str]:
        self.entries.append(list(entry))
        if self.heir is not None:
            self.heir.record(entry)
        return self.entries[-1]


def hidden_name(path: str) -> str:
    """A name beside this path that nobody else takes."""
    directory, base = os.path.split(path)
    return os.path.join(directory, f".{base[:200]}.{os.urandom(6).hex()}")


def file_at(path: str) -> tuple[int, int] | None:
    """Device and inode of what is at a path now; None if nothing is."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _absolute(path: str) -> str:
    """The process that undoes it may be in another directory. Where our directory has gone, the path stays as it is."""
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:
        return path


def _remove_socket(path: str, known: Sequence[str]) -> None:
    if file_at(path) == tuple(map(int, known)):
        _remove(path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _remove_file(path: str, content: bytes, aside: str) -> None:
    """Remove a file that has just this content.

    The file is renamed before the last look, and renamed back if it has more. What another launch appends meanwhile is in the
    renamed file, or that launch sees that the file has gone. A lock would not do: everybody who may read a file can hold one.
    The process that undid before us may have been killed after the first rename; then only the renamed file is there.
    """
    try:
        if _content(path, len(content)) == content:
            os.rename(path, aside)
        if _content(aside, len(content)) != content:
            _bring_back(aside, path)
        os.unlink(aside)
    except OSError as error:
        if is_shortage(error):
            raise


def _bring_back(aside: str, path: str) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        if not os.path.samefile(aside, path):
            raise  # else the lines in the renamed file would be lost


def _content(path: str, length: int) -> bytes | None:
    """The first bytes of a file, one more than `length` if there are so many; None if unreadable. Raises OSError as `run`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if is_shortage(error):
            raise
        return None
    try:
        return os.read(fd, length + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
