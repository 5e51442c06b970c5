"""Bind a free port first, then run a command with it. The Python API; `portexec.cli` is the command line.

Everything is imported when it is first used, since the command line imports this module, too.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.api.driver import Listener
    from portexec.api.factories import AsyncServerFactory, ServerFactory
    from portexec.api.listen import GuardedSocket, listen
    from portexec.api.named import NamedServer, find, running
    from portexec.api.serve import AsyncServer, Server, Serving, ServingAll, serve, serve_all
    from portexec.errors import CannotExecute, CommandNotFound, ListenError, PortexecError, UsageError
    from portexec.server_errors import (
        AlreadyEntered,
        CommandNotAList,
        Exited,
        NotReady,
        NotRunning,
        StillRunning,
        UnknownHandOff,
        UnknownReady,
    )

__version__ = "0.1.0"

_HOMES = (
    "portexec.errors",
    "portexec.server_errors",
    "portexec.api.listen",
    "portexec.api.serve",
    "portexec.api.named",
    "portexec.api.factories",
)  # where the names below are defined, the cheapest module first

__all__ = [
    "AlreadyEntered",
    "AsyncServer",
    "AsyncServerFactory",
    "CannotExecute",
    "CommandNotAList",
    "CommandNotFound",
    "Exited",
    "GuardedSocket",
    "ListenError",
    "Listener",
    "NamedServer",
    "NotReady",
    "NotRunning",
    "PortexecError",
    "Server",
    "ServerFactory",
    "Serving",
    "ServingAll",
    "StillRunning",
    "UnknownHandOff",
    "UnknownReady",
    "UsageError",
    "__version__",
    "find",
    "listen",
    "running",
    "serve",
    "serve_all",
]


if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> object:
        if name in __all__:
            import importlib

            for home in map(importlib.import_module, _HOMES):
                if hasattr(home, name):
                    return getattr(home, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
