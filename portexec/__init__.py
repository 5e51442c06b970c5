"""Bind a free port first, then run a command with it. The Python API; `portexec.cli` is the command line.

Everything is imported when it is first used: the command line's start passes through here, too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.api.driver import Listener
    from portexec.api.listen import GuardedSocket, listen
    from portexec.api.serve import AsyncServer, Server, Serving, serve
    from portexec.errors import (
        AlreadyEntered,
        CannotExecute,
        CommandNotAList,
        CommandNotFound,
        Exited,
        ListenError,
        NotReady,
        NotRunning,
        PortexecError,
        UnknownHandOff,
        UnknownReady,
        UsageError,
    )

__version__ = "0.1.0"

_HOMES = ("portexec.errors", "portexec.api.listen", "portexec.api.serve")  # of the names below, the cheapest first

__all__ = [
    "AlreadyEntered",
    "AsyncServer",
    "CannotExecute",
    "CommandNotAList",
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
    "UnknownHandOff",
    "UnknownReady",
    "UsageError",
    "__version__",
    "listen",
    "serve",
]


if not TYPE_CHECKING:  # else a checker takes every name for one of ours

    def __getattr__(name: str) -> object:
        if name in __all__:
            import importlib

            for home in map(importlib.import_module, _HOMES):
                if hasattr(home, name):
                    return getattr(home, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
