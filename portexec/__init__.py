"""Bind a free port first, then run a command with it. The Python API; `portexec.cli` is the command line.

Everything is imported when it is first used: the command line's start passes through here, too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.errors import (
        CannotExecute,
        CommandNotFound,
        ListenError,
        NotReady,
        PortexecError,
        UsageError,
    )
    from portexec.guarded import GuardedSocket, listen
    from portexec.server import AlreadyEntered, AsyncServer, Exited, Listener, NotRunning, Server, Serving, serve

__version__ = "0.1.0"

_HOMES = {
    "portexec.errors": ("CannotExecute", "CommandNotFound", "ListenError", "NotReady", "PortexecError", "UsageError"),
    "portexec.guarded": ("GuardedSocket", "listen"),
    "portexec.server": ("AlreadyEntered", "AsyncServer", "Exited", "Listener", "NotRunning", "Server", "Serving", "serve"),
}

__all__ = [
    "AlreadyEntered",
    "AsyncServer",
    "CannotExecute",
    "CommandNotFound",
    "Exited",
    "GuardedSocket",
    "ListenError",
    "Listener",
    "NotReady",
    "NotRunning",
    "PortexecError",
    "Server",
    "Serving",
    "UsageError",
    "__version__",
    "listen",
    "serve",
]


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            import importlib

            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
