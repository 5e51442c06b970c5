"""Listeners: from a `ListenSpec` to a number of our own, guarded, with a socket that listens on it or without one."""

from __future__ import annotations

import _socket
import errno
import os
import sys
from _socket import AF_INET, AF_INET6, AF_UNIX, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET

from portexec.binding.guard import Flip, Guard, has_ipv6, new_socket
from portexec.binding.spec import ListenSpec
from portexec.command.undo import Undo
from portexec.errors import ListenError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType

    Address = tuple[str, int] | tuple[str, int, int, int]

LINUX = sys.platform == "linux"

MAX_BACKLOG = 2**31 - 1  # what listen(2) takes; the kernel allows less
_CLIENT_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
_NUMBER_TAKEN = (errno.EADDRINUSE, errno.EACCES)


class Listener:
    """A number, with the address and the name it goes by, and the socket that listens on it.

    `kind` is "tcp", "udp" or "unix". `host` is what a client should use, in brackets if it is IPv6; for unix it is empty,
    `path` is set and `port` is 0. There is no `socket` when the command is to bind
    the number itself.
    """

    __slots__ = ("host", "kind", "name", "named", "path", "port", "socket")

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        host: str = "",
        port: int = 0,
        path: str = "",
        socket: _socket.socket | None = None,
        named: bool = True,
    ) -> None:
        self.name = name
        self.kind = kind
        self.host = host
        self.port = port
        self.path = path
        self.socket = socket
        self.named = named

    def at(self, hosts: Sequence[str]) -> Listener:
        """The listener as it is once the command listens at these addresses: at its own, if one of them covers that."""
        if any(covers(host, self.host.strip("[]")) for host in hosts if host):
            return self
        host = next((in_url(_CLIENT_HOST.get(host, host)) for host in hosts if host), self.host)
        return Listener(self.name, self.kind, host=host, port=self.port, path=self.path, socket=self.socket, named=self.named)

    @property
    def url(self) -> str:
        """Where a client finds it: `http://HOST:PORT`, `udp://HOST:PORT` or `unix:PATH`."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"{'udp' if self.kind == 'udp' else 'http'}://{self.host}:{self.port}"


class Bound:
    """All that one run has bound, and the owner of its sockets until the command gets them.

    `guards` has one guard for each number; listeners may share a number on different addresses.
    """

    __slots__ = ("backlog", "guards", "listeners", "undo")

    def __init__(self, backlog: int, undo: Undo) -> None:
        self.backlog = backlog
        self.undo = undo
        self.listeners: list[Listener] = []
        self.guards: dict[int, Guard] = {}

    def guard_descriptors(self) -> tuple[int, ...]:
        """The descriptors of all guards."""
        return tuple(guard.fileno() for guard in self.guards.values())

    def open_to_reusers(self) -> None:
        """Let the guards give way to whoever sets SO_REUSEADDR. Never before a guard is bound: two of them could then have
        the same number.
        """
        for guard in self.guards.values():
            guard.set(SO_REUSEADDR, 1)

    def release_guards(self) -> None:
        """Close our copies of the guards."""
        for guard in self.guards.values():
            guard.close()

    def is_unix_listener_dead(self) -> bool:
        """Whether a server has shut down a unix listener when it ended; that cannot be undone (unix(7), shutdown(2))."""
        return any(_has_hung_up(listener.socket) for listener in self.listeners if listener.kind == "unix")

    def make_unix_listeners_anew(self) -> None:
        """Replace those that were shut down, under their descriptors. Nobody else may have them open. Raises as `bind_all`."""
        for listener in self.listeners:
            if listener.kind == "unix" and listener.socket is not None and _has_hung_up(listener.socket):
                fd = listener.socket.detach()
                os.close(fd)
                listener.socket = _listen_unix(listener.path, self.backlog, self.undo)
                if listener.socket.fileno() != fd:
                    os.dup2(listener.socket.fileno(), fd, inheritable=False)
                    listener.socket.close()
                    listener.socket = _socket.socket(AF_UNIX, SOCK_STREAM, 0, fd)

    def listen_again(self) -> None:
        """Let the TCP listeners listen that a server has shut down when it ended, as some do (shutdown(2)). Raises OSError."""
        for listener in self.listeners:
            socket = listener.socket
            if listener.kind == "tcp" and socket is not None and not socket.getsockopt(SOL_SOCKET, _socket.SO_ACCEPTCONN):
                self._listen_again(listener.port, socket)

    def _listen_again(self, port: int, socket: _socket.socket) -> None:
        guard = self.guards.get(port)
        if guard is None:
            socket.listen(self.backlog)
            return
        with Flip(guard, socket, socket.getsockname()[0], lambda _: self.sockets_on(port, but=socket)):
            socket.listen(self.backlog)

    def sockets_on(self, port: int, but: _socket.socket | None = None) -> list[_socket.socket]:
        """The TCP listeners of this number that we have, without one."""
        found = (listener.socket for listener in self.listeners if listener.kind == "tcp" and listener.port == port)
        return [socket for socket in found if socket is not None and socket is not but]

    def close(self) -> None:
        """Give everything back: close the sockets, and remove the unix sockets that were made."""
        for guard in self.guards.values():
            guard.close()
        for listener in self.listeners:
            if listener.socket is not None:
                listener.socket.close()
        self.undo.run()
        self.listeners.clear()
        self.guards.clear()


def bind_all(specs: Iterable[ListenSpec], *, listening: bool, backlog: int = 0, undo: Undo | None = None) -> Bound:
    """Choose and guard a number for every spec.

    `listening`: make a listening socket for each, with this backlog (0 for the greatest). Otherwise the command is to bind
    the number itself. What is made in the file system is recorded in `undo`.
    Raises ListenError, with nothing left bound, when any of them cannot be had.
    """
    bound = Bound(backlog or _socket.SOMAXCONN, undo or Undo())
    try:
        for spec in specs:
            bound.listeners.append(_bind(spec, bound, is_listening=listening))
    except OSError as error:
        bound.close()
        raise _refusals().exhausted(error) from error
    except BaseException:
        bound.close()
        raise
    return bound


def _bind(spec: ListenSpec, bound: Bound, *, is_listening: bool) -> Listener:
    backlog = bound.backlog if is_listening else None
    if spec.kind == "unix":
        socket = _listen_unix(spec.address, bound.backlog, bound.undo)
        return Listener(spec.name, "unix", path=spec.address, socket=socket, named=spec.named)
    family, address = _resolve(spec)
    if spec.kind == "udp":
        socket = _first_free(spec, lambda number: _bind_udp(family, address(number), spec))
    else:
        socket = _first_free(spec, lambda number: _bind_tcp(family, address, number, spec, bound, backlog))
    host, port = socket.getsockname()[:2]
    if backlog is None:
        socket.close()
    host = _CLIENT_HOST.get(host if spec.address != "*" else "*", host)
    return Listener(
        spec.name,
        spec.kind,
        host=in_url(host),
        port=port,
        socket=None if backlog is None else socket,
        named=spec.named,
    )


def _refusals() -> ModuleType:
    """The words for what cannot be had, which most launches have no need of."""
    from portexec.binding import refusals

    return refusals


def _has_hung_up(socket: _socket.socket | None) -> bool:
    import select

    poll = select.poll()
    poll.register(-1 if socket is None else socket.fileno(), 0)
    return bool(poll.poll(0))


def _listen_unix(path: str, backlog: int, undo: Undo) -> _socket.socket:
    from portexec.binding import unix

    socket = new_socket(AF_UNIX)
    try:
        unix.listen(socket, path, backlog, undo)
    except OSError as error:
        socket.close()
        raise _refusals().cannot_listen(f"unix:{path}", error) from error
    except BaseException:
        socket.close()
        raise
    return socket


def _resolve(spec: ListenSpec) -> tuple[int, Callable[[int], Address]]:
    """The family of the spec's address, and a function from a number to what bind(2) takes."""
    if spec.address == "*":
        return (AF_INET6, lambda number: ("::", number)) if has_ipv6() else (AF_INET, lambda number: ("0.0.0.0", number))
    try:
        # As bytes: for a str Python imports its codec for international names, which takes as long as all the rest.
        host_name = spec.address.encode() if spec.address.isascii() else spec.address
        found = _socket.getaddrinfo(host_name, None, 0, SOCK_STREAM, 0, _socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "not a host name"
        raise ListenError(
            f"cannot resolve {spec.address!r}: {why}", "give an address of this machine, such as 127.0.0.1, [::1] or *"
        ) from error
    family, _, _, _, sockaddr = found[0]
    host, rest = sockaddr[0], sockaddr[2:]
    return family, lambda number: (host, number, *rest)


def _first_free(spec: ListenSpec, bind: Callable[[int], _socket.socket]) -> _socket.socket:
    """Bind the first candidate that can be bound."""
    failures: list[tuple[int, OSError]] = []
    for number in spec.numbers():
        try:
            return bind(number)
        except OSError as error:
            if error.errno not in _NUMBER_TAKEN:
                raise _refusals().cannot_listen(spec, error) from error
            failures.append((number, error))
    raise _refusals().none_free(spec, failures)


def _bind_udp(family: int, address: Address, spec: ListenSpec) -> _socket.socket:
    """A UDP socket, exclusive on its address. It has no guard: a guard on the same address would swallow its datagrams."""
    socket = _inet_socket(family, spec)
    try:
        socket.bind(address)
    except BaseException:
        socket.close()
        raise
    return socket


def _bind_tcp(
    family: int,
    address: Callable[[int], Address],
    number: int,
    spec: ListenSpec,
    bound: Bound,
    backlog: int | None,
) -> _socket.socket:
    """Guard the number, unless we do already, and get a socket of ours past the guard; it listens if it is to."""
    if not LINUX:
        return _bind_unguarded(family, address(number), spec, backlog)
    guard = bound.guards.get(number) or Guard(number)
    socket = None
    try:
        socket = _inet_socket(family, spec)
        sockaddr = address(guard.port)
        with Flip(guard, socket, sockaddr[0], lambda _: bound.sockets_on(guard.port)):
            socket.bind(sockaddr)
            if backlog is not None:
                socket.listen(backlog)
    except BaseException:
        if socket is not None:
            socket.close()
        if guard.port not in bound.guards:
            guard.close()
        raise
    bound.guards[guard.port] = guard
    return socket


def _bind_unguarded(family: int, address: Address, spec: ListenSpec, backlog: int | None) -> _socket.socket:
    """A listener where the kernel has no guard to offer: exclusive on its own address, as far as the system makes it so."""
    socket = _inet_socket(family, spec)
    try:
        socket.bind(address)
        if backlog is not None:
            socket.listen(backlog)
    except BaseException:
        socket.close()
        raise
    return socket


def _inet_socket(family: int, spec: ListenSpec) -> _socket.socket:
    socket = new_socket(family, SOCK_DGRAM if spec.kind == "udp" else SOCK_STREAM)
    if family == AF_INET6:
        socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, spec.address != "*")
    if spec.kind == "tcp":
        # Accepted connections inherit both. Without the first, a number that was served on could not be had again for a
        # minute (TIME_WAIT); under the guard it lets nobody in. Without the second, servers that take the descriptor for a
        # unix socket, as uvicorn does, answer each keep-alive request 40 ms late.
        socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        socket.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    return socket


def in_url(host: str) -> str:
    """An address as it stands in a URL: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def covers(one: str, other: str) -> bool:
    """Whether a listener on one address gets what is sent to the other; `*` stands for both families."""
    return one in (other, "*") or (one == "0.0.0.0" and ":" not in other) or (one == "::" and ":" in other)
