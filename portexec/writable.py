"""Whether a file could be written or made, without doing it. A full disk is not noticed, nor a FIFO that nobody reads.

Each function raises the OSError that writing or making the file would raise.
"""

from __future__ import annotations

import errno
import os
import stat


def require_openable(path: str, access: int, *, follows: bool) -> None:
    """Require that a file can be opened for this access (`os.W_OK`), or be made where there is none. Raises OSError."""
    try:
        mode = os.stat(path, follow_symlinks=follows).st_mode
    except FileNotFoundError:
        require_makeable(os.path.realpath(path) if os.path.islink(path) else path)
        return
    if stat.S_ISLNK(mode):
        raise _failure(errno.ELOOP)
    if stat.S_ISDIR(mode):
        raise _failure(errno.EISDIR)
    _require_access(path, access)
    if stat.S_ISSOCK(mode):
        raise _failure(errno.ENXIO)


def require_makeable(path: str) -> None:
    """Require that a file can be made at a path where there is none. Raises OSError."""
    directory, base = os.path.split(path)
    if not base:
        raise _failure(errno.EISDIR)
    directory = os.path.join(directory or ".", "")
    _require_access(directory, os.W_OK | os.X_OK)
    if os.stat(directory).st_nlink == 0:  # it was removed, and is still some process' directory
        raise _failure(errno.ENOENT)


def _require_access(path: str, access: int) -> None:
    if os.access(path, access, effective_ids=True):
        return
    os.stat(path)  # raises an error of its own where the path does not exist
    raise _failure(errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES)


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))
