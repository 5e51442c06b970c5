"""The kernel's numbers that several modules need, and calls into the C library that Python does not offer.

The calls go by way of `_ctypes`, the core of ctypes: the package around it takes longer to import than everything else that
happens before the command starts. It is loaded at the first call: where portexec becomes the command, there is none.
"""

from __future__ import annotations

import _signal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

STDIN, STDOUT, STDERR = 0, 1, 2
ENDING_SIGNALS = (_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM)  # by which people and programs end us

# The system calls that wait for clients, by machine and number.
_X86_64 = {43: "accept", 288: "accept", 7: "poll", 271: "poll", 23: "select", 270: "select"}
_X86_64 |= {232: "epoll", 281: "epoll", 441: "epoll", 426: "io_uring"}
_AARCH64 = {202: "accept", 242: "accept", 73: "poll", 72: "select", 22: "epoll", 441: "epoll", 426: "io_uring"}
WAITS = {"x86_64": _X86_64, "aarch64": _AARCH64}

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_SIGSET_SIZE = 128  # sigset_t of the C libraries; the signals are in its first 64 bits

_functions: dict[str, Callable[..., int]] = {}


def why_no_calls() -> str:
    """Why this Python has no way to the C library; empty if it has."""
    try:
        if not _functions:
            _load()
    except (ImportError, AttributeError, TypeError, OSError) as error:
        _functions.clear()
        return f"this Python cannot call the C library ({error})"
    return ""


def syscall(number: int, *arguments: int | bytes) -> int:
    """Make a system call; the result. Raises OSError.

    Numbers are passed as wide as a register: varargs would leave rubbish in the upper half of narrower ones.
    """
    return _call("syscall", number, *arguments)


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process. Raises OSError."""
    _call("prctl", option, value, 0, 0, 0)


def signalfd(numbers: Iterable[int]) -> int:
    """A descriptor, close-on-exec and non-blocking, from which these signals can be read. Raises OSError."""
    signal_set = sum(1 << number - 1 for number in numbers).to_bytes(8, sys.byteorder).ljust(_SIGSET_SIZE, b"\0")
    return _call("signalfd", -1, signal_set, os.O_CLOEXEC | os.O_NONBLOCK)


def bind(fd: int, address: bytes) -> None:
    """bind(2) with the bytes as they are. Raises OSError."""
    _call("bind", fd, address, len(address))


def listen(fd: int, backlog: int) -> None:
    """listen(2) with the backlog as it is, negative ones too. Raises OSError."""
    _call("listen", fd, backlog)


def pointer_to(data: bytes) -> tuple[object, int]:
    """The address of the bytes in memory, where they stay for as long as the first value lives."""
    import _ctypes

    pointer_type = type("_Pointer", (_ctypes._SimpleCData,), {"_type_": "z"})
    pointer = pointer_type(data)
    return pointer, int.from_bytes(pointer, sys.byteorder)


def ephemeral_range() -> tuple[int, int] | None:
    """The lowest and the highest number that the kernel chooses by itself, ip(7); None where it does not tell."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            lowest, highest = map(int, file.read().split())
    except (OSError, ValueError):
        return None
    return lowest, highest


def keep_only(keep: set[int]) -> None:
    """Close all other descriptors. The standard streams become /dev/null rather than free numbers. Raises OSError."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} | set(range(STDERR + 1)):
        if fd in keep or fd == null:
            continue
        if fd <= STDERR:
            os.dup2(null, fd, inheritable=False)
        else:
            try:
                os.close(fd)
            except OSError:
                pass  # the listing's own descriptor
    if null > STDERR:
        os.close(null)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one. What this process has forked before keeps its own limit."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def die_by(number: int) -> NoReturn:
    """End by this signal, without a second core file. Where that is impossible, as for PID 1, end with the status of shells."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except ImportError:
        pass  # there is no descriptor to load it with
    try:
        _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [number])
    except (OSError, ValueError):
        pass  # KILL, and the signals that the C library keeps for itself
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _call(name: str, *arguments: int | bytes) -> int:
    if not _functions:
        _load()
    return _functions[name](*arguments)


def _load() -> None:
    import _ctypes

    class Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "i"

    class Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "l"

    class Function(_ctypes.CFuncPtr):
        """A function that returns an int, negative with errno set for a failure."""

        _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
        _restype_ = Int

    library = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]  # the program itself, dlopen(3)

    def checked(function: Function) -> Callable[..., int]:
        def call(*arguments: int | bytes) -> int:
            result: int = function(*[a if isinstance(a, bytes) else Long(a) for a in arguments])
            if result < 0:
                code = _ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return result

        return call

    for name in ("syscall", "prctl", "signalfd", "bind", "listen"):
        _functions[name] = checked(Function(_ctypes.dlsym(library, name)))
