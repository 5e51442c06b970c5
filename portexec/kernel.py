"""Calls into the C library that Python does not offer: prctl(2), signalfd(2), syscall(2), and bind and listen with raw values.

By way of `_ctypes`, the core of ctypes: the package around it takes longer to import than everything else that happens before
the command starts. Every function raises OSError.
"""

from __future__ import annotations

import _ctypes
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SIGSET_SIZE = 128  # sigset_t of the C libraries; the signals are in its first 64 bits


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "B"


class _Function(_ctypes.CFuncPtr):
    """A function that returns an int, negative with errno set for a failure."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_LIBRARY = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]  # the program itself, dlopen(3)
_bind = _Function(_ctypes.dlsym(_LIBRARY, "bind"))
_listen = _Function(_ctypes.dlsym(_LIBRARY, "listen"))
_prctl = _Function(_ctypes.dlsym(_LIBRARY, "prctl"))
_signalfd = _Function(_ctypes.dlsym(_LIBRARY, "signalfd"))
_syscall = _Function(_ctypes.dlsym(_LIBRARY, "syscall"))


def syscall(number: int, *arguments: int | bytes) -> int:
    """Make a system call. Numbers are as wide as a register, as varargs leave rubbish in the upper halves of narrower ones."""
    return _check(_syscall(_Long(number), *(a if isinstance(a, bytes) else _Long(a) for a in arguments)))


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process."""
    _check(_prctl(option, _Long(value), _Long(0), _Long(0), _Long(0)))


def signalfd(numbers: Iterable[int]) -> int:
    """A descriptor, close-on-exec and non-blocking, from which these signals can be read."""
    signal_set = sum(1 << number - 1 for number in numbers).to_bytes(8, sys.byteorder).ljust(_SIGSET_SIZE, b"\0")
    return _check(_signalfd(-1, signal_set, os.O_CLOEXEC | os.O_NONBLOCK))


def bind(fd: int, address: bytes) -> None:
    """bind(2) with the bytes as they are."""
    _check(_bind(fd, address, len(address)))


def listen(fd: int, backlog: int) -> None:
    """listen(2) with the backlog as it is, negative ones too."""
    _check(_listen(fd, backlog))


def pointer_to(data: bytes) -> tuple[object, int]:
    """A copy of the bytes in memory that stays where it is for as long as the first value lives, and its address."""
    buffer_type = type("_Buffer", (_ctypes.Array,), {"_type_": _Byte, "_length_": len(data)})
    buffer = buffer_type(*data)
    return buffer, _ctypes.addressof(buffer)


def _check(result: int) -> int:
    if result < 0:
        code = _ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
