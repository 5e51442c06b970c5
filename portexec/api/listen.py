"""`portexec.listen`: a guarded, listening socket for a server in the caller's own process."""

from __future__ import annotations

import os
import socket

from portexec.binding.listeners import MAX_BACKLOG, Bound, bind_all
from portexec.binding.spec import parse_listen
from portexec.binding.stable import settled
from portexec.errors import PortexecError, UsageError, reason


class GuardedSocket(socket.socket):
    """A listening `socket.socket` whose number nobody else can have as long as it is open.

    It owns the guard, and gives the guard back when it is closed (or collected). `detach` gives up the guard's protection. Code
    that takes a `socket.socket` but no subclass, as trio and multiprocessing do, gets a `dup`.
    """

    def __init__(self, bound: Bound) -> None:
        """Take over the one listener of `bound` and its guard."""
        listener = bound.listeners[0]
        assert listener.socket is not None  # noqa: S101  # bound with listening=True
        super().__init__(fileno=listener.socket.detach())
        self._bound = bound
        self._owner = os.getpid()
        self._url = listener.url

    @property
    def url(self) -> str:
        """Where a client finds it: `http://HOST:PORT`, `udp://HOST:PORT` or `unix:PATH`."""
        return self._url

    def close(self) -> None:
        """Close the socket and give back its number; a unix socket is removed from the file system.

        In a forked child this closes only the child's copies: guard and file are the parent's.
        """
        super().close()
        if os.getpid() == self._owner:
            self._bound.close()
        else:
            self._bound.release_guards()

    def dup(self) -> socket.socket:  # type: ignore[override]  # the guard has one owner
        """A plain socket for the same listener. The guard stays with this object, and protects as long as it is open."""
        return socket.fromfd(self.fileno(), self.family, self.type, self.proto)

    def detach(self) -> int:
        """Give the descriptor to the caller, and the guard back to the system."""
        fd = super().detach()
        self._bound.release_guards()
        return fd


def listen(spec: str = "127.0.0.1:0", *, backlog: int = 0) -> GuardedSocket:
    """A listening socket for this listen spec, with its number guarded; for a server in this process.

    Give it to `uvicorn.Server.serve(sockets=[...])`, `asyncio.start_server(sock=...)`, or a `http.server`. A `spec` is what
    `portexec --listen` takes, without a name: `127.0.0.1:0`, `3000,0`, `*:0`, `unix:PATH`; `backlog` 0 is the greatest.
    Blocking, close-on-exec, with TCP_NODELAY. Raises `UsageError` for a malformed spec, `ListenError` when none can be had.
    """
    if not isinstance(backlog, int) or not 0 <= backlog <= MAX_BACKLOG:
        raise UsageError(f"backlog={backlog!r} is not a number from 0 to {MAX_BACKLOG}", "0 is the greatest")
    if not isinstance(spec, str):
        raise UsageError(f"listen takes one spec as text, not {spec!r}", "call it once for each socket: listen('127.0.0.1:0')")
    try:
        specs = settled(parse_listen([spec]), None, os.environ)
        return GuardedSocket(bind_all(specs, listening=True, backlog=backlog))
    except OSError as error:
        raise PortexecError(f"cannot listen on {spec}: {reason(error)}") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"listen: {spec!r} cannot be encoded: {error.reason}", "no file can have such a name") from error
