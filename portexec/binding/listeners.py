"""Listeners: from a `ListenSpec` to a number of our own, guarded, with a socket that listens on it or without one."""

from __future__ import annotations

import _socket
import errno
import os
import sys
from _socket import AF_INET, AF_INET6, AF_UNIX, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET

from portexec.binding.guard import Flip, Guard, has_ipv6, knows_flips, make_deaf, new_socket
from portexec.binding.spec import ListenSpec
from portexec.command.undo import Undo
from portexec.errors import CloseOnError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType
    from typing import Any

    Address = tuple[str, int] | tuple[str, int, int, int]

LINUX = sys.platform == "linux"

MAX_BACKLOG = 2**31 - 1  # what listen(2) takes; the kernel allows less
_CLIENT_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
ALL_ADDRESSES = frozenset(_CLIENT_HOST)
_NUMBER_TAKEN = (errno.EADDRINUSE, errno.EACCES)


class Listener:
    """A number, with the address and the name it goes by, and the socket that listens on it. It does not change.

    `kind` is "tcp", "udp" or "unix". `address` is where it listens, `*` for both families. `host` is what a client on this
    machine should use, in brackets if it is IPv6, and `known_as` what other machines should use, if `--host` said so. For unix
    all three are empty, `path` is set and `port` is 0. There is no `socket` when the command is to bind the number itself.
    `named`: its name was given. `scheme` is for the URL of a TCP listener.
    """

    __slots__ = ("address", "host", "kind", "known_as", "name", "named", "path", "port", "scheme", "socket")

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        address: str = "",
        host: str = "",
        known_as: str = "",
        port: int = 0,
        path: str = "",
        socket: _socket.socket | None = None,
        named: bool = True,
        scheme: str = "http",
    ) -> None:
        self.name = name
        self.kind = kind
        self.address = address
        self.host = host
        self.known_as = known_as
        self.port = port
        self.path = path
        self.socket = socket
        self.named = named
        self.scheme = scheme

    def at(self, hosts: Sequence[str]) -> Listener:
        """The listener as it is when the command listens at these addresses. Its host stays if one of them covers the host.

        Where all of them are of the loopback interface, other machines do not reach the listener by any name.
        """
        hosts = [host for host in hosts if host]
        is_hidden = bool(hosts) and not is_loopback(self.known_as) and all(map(is_loopback, hosts))
        known_as = "" if is_hidden else self.known_as
        if any(covers(host, self.host.strip("[]")) for host in hosts):
            return self if known_as == self.known_as else self.changed(known_as=known_as)
        host = next((in_url(_CLIENT_HOST.get(host, host)) for host in hosts), self.host)
        return self.changed(host=host, known_as=known_as)

    def changed(self, **changes: Any) -> Listener:
        """The same listener with other values of these attributes."""
        return Listener(**{name: getattr(self, name) for name in self.__slots__} | changes)

    @property
    def told_host(self) -> str:
        """The host that everybody is told."""
        return self.known_as or self.host

    @property
    def url(self) -> str:
        """Where a client finds it: `http://HOST:PORT`, with https where that is known, `udp://HOST:PORT` or `unix:PATH`."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"{'udp' if self.kind == 'udp' else self.scheme}://{self.told_host}:{self.port}"


class Bound:
    """All that one run has bound, and the owner of its sockets until the command gets them.

    `guards` has one guard for each number; listeners may share a number on different addresses. `socket_mode` is the mode of
    unix sockets, None for what the umask leaves. `elders` are earlier listeners of the same addresses, whose server is about to
    end.
    """

    __slots__ = ("backlog", "elders", "guards", "listeners", "socket_mode", "undo")

    def __init__(self, backlog: int, socket_mode: int | None, undo: Undo) -> None:
        self.backlog = backlog
        self.socket_mode = socket_mode
        self.undo = undo
        self.listeners: list[Listener] = []
        self.guards: dict[int, Guard] = {}
        self.elders: list[_socket.socket] = []

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
        """Replace those that were shut down, under their descriptors. No other process must have these open.

        Raises ListenError, OSError.
        """
        for listener in self.listeners:
            if listener.kind == "unix" and listener.socket is not None and _has_hung_up(listener.socket):
                unbound = new_socket(AF_UNIX)
                os.dup2(unbound.fileno(), listener.socket.fileno(), inheritable=False)  # which gives up the name
                unbound.close()
                _listen_unix(listener.socket, listener.path, self)

    def listen_again(self) -> None:
        """Let TCP listeners listen again that a server has shut down at its end, as some do (shutdown(2)). Raises OSError."""
        for listener in self.listeners:
            socket = listener.socket
            if listener.kind == "tcp" and socket is not None and not socket.getsockopt(SOL_SOCKET, _socket.SO_ACCEPTCONN):
                self._listen_again(listener.port, socket)

    def _listen_again(self, port: int, socket: _socket.socket) -> None:
        guard = self.guards.get(port)
        if guard is None:
            self._revive(socket)
            return
        address = socket.getsockname()
        with Flip(guard, socket, address[0], lambda _: self.sockets_on(port, but=socket), self.elders_at(address)):
            self._revive(socket)

    def _revive(self, socket: _socket.socket) -> None:
        """Let a listener listen that was shut down, perhaps twice: then each connection that it accepts begins shut down, too.

        Only the shutdown of a socket that listens clears that: tcp_disconnect() in the kernel's net/ipv4/tcp.c. So this one
        listens for an instant before, deaf.
        """
        make_deaf(socket)
        socket.listen(0)
        socket.shutdown(_socket.SHUT_RDWR)
        make_deaf(socket, is_deaf=False)
        socket.listen(self.backlog)

    def elders_at(self, address: object) -> list[_socket.socket]:
        """The earlier listeners of this address."""
        return [elder for elder in self.elders if elder.getsockname() == address]

    def sockets_on(self, port: int, but: _socket.socket | None = None) -> list[_socket.socket]:
        """The TCP listeners of this number that we have, without one."""
        found = (listener.socket for listener in self.listeners if listener.kind == "tcp" and listener.port == port)
        return [socket for socket in found if socket is not None and socket is not but]

    def close(self) -> None:
        """Give everything back: close the sockets, and remove the unix sockets that were made."""
        for guard in self.guards.values():
            guard.close()
        for socket in (*self.elders, *(listener.socket for listener in self.listeners)):
            if socket is not None:
                socket.close()
        self.undo.run()
        self.listeners.clear()
        self.guards.clear()


def bind_all(
    specs: Iterable[ListenSpec],
    *,
    listening: bool,
    backlog: int = 0,
    socket_mode: int | None = None,
    undo: Undo | None = None,
) -> Bound:
    """Choose and guard a number for every spec.

    `listening`: make a listening socket for each, with this backlog (0 for the greatest), a unix one with this mode. Otherwise
    the command is to bind the number itself. What is made in the file system is recorded in `undo`.
    Raises ListenError, with nothing left bound, when any of them cannot be had.
    """
    bound = Bound(backlog or _socket.SOMAXCONN, socket_mode, undo or Undo())
    try:
        with CloseOnError(bound):
            for spec in specs:
                bound.listeners.append(_bind(spec, bound, is_listening=listening))
    except OSError as error:  # all is closed by now, so that there is a descriptor to import the words with
        raise _refusals().exhausted(error) from error
    return bound


def _bind(spec: ListenSpec, bound: Bound, *, is_listening: bool) -> Listener:
    backlog = bound.backlog if is_listening else None
    if spec.kind == "unix":
        socket = new_socket(AF_UNIX)
        with CloseOnError(socket):
            _listen_unix(socket, spec.address, bound)
        return Listener(spec.name, "unix", path=spec.address, socket=socket, named=spec.named)
    family, address = _resolve(spec)
    if spec.kind == "udp":
        socket = _first_free(spec, lambda number: _bind_udp(family, address(number), spec))
    else:
        socket = _first_free(spec, lambda number: _bind_tcp(family, address, number, spec, bound, backlog))
    host, port = socket.getsockname()[:2]
    if backlog is None:
        socket.close()
    listening_at = "*" if spec.address == "*" else host
    return Listener(
        spec.name,
        spec.kind,
        address=listening_at,
        host=in_url(_CLIENT_HOST.get(listening_at, host)),
        port=port,
        socket=None if backlog is None else socket,
        named=spec.named,
    )


def _refusals() -> ModuleType:
    """The module with the words of errors, which most launches do not need."""
    from portexec.binding import refusals

    return refusals


def _has_hung_up(socket: _socket.socket | None) -> bool:
    import select

    poll = select.poll()
    poll.register(-1 if socket is None else socket.fileno(), 0)
    return bool(poll.poll(0))


def _listen_unix(socket: _socket.socket, path: str, bound: Bound) -> None:
    from portexec.binding import unix

    try:
        unix.listen(socket, path, bound.backlog, bound.socket_mode, bound.undo)
    except OSError as error:
        raise _refusals().cannot_listen(f"unix:{path}", error) from error


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
        raise _refusals().cannot_resolve(spec, why) from error
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
    with CloseOnError(socket):
        socket.bind(address)
    return socket


def _bind_tcp(
    family: int,
    address: Callable[[int], Address],
    number: int,
    spec: ListenSpec,
    bound: Bound,
    backlog: int | None,
) -> _socket.socket:
    """Guard the number, unless we do already, and get a socket of ours past the guard. With a backlog the socket listens."""
    if not LINUX:
        return _bind_unguarded(family, address(number), spec, backlog)
    known = bound.guards.get(number)
    if known is not None:
        return _bind_past(known, family, address, spec, bound, backlog)
    guard = Guard(number)
    with CloseOnError(guard):
        socket = _bind_past(guard, family, address, spec, bound, backlog)
    bound.guards[guard.port] = guard
    return socket


def _bind_past(
    guard: Guard,
    family: int,
    address: Callable[[int], Address],
    spec: ListenSpec,
    bound: Bound,
    backlog: int | None,
) -> _socket.socket:
    sockaddr = address(guard.port)
    socket = _inet_socket(family, spec)
    with CloseOnError(socket):
        try:
            _flip_past(guard, socket, sockaddr, bound, backlog)
        except OSError:
            if knows_flips():
                raise
            guard.bind_open()
            _flip_past(guard, socket, sockaddr, bound, backlog)
    return socket


def _flip_past(guard: Guard, socket: _socket.socket, address: Address, bound: Bound, backlog: int | None) -> None:
    with Flip(guard, socket, address[0], lambda _: bound.sockets_on(guard.port)):
        socket.bind(address)
        if backlog is not None:
            socket.listen(backlog)


def _bind_unguarded(family: int, address: Address, spec: ListenSpec, backlog: int | None) -> _socket.socket:
    """A listener where the kernel has no guard to offer: exclusive on its own address, as far as the system makes it so."""
    socket = _inet_socket(family, spec)
    with CloseOnError(socket):
        socket.bind(address)
        if backlog is not None:
            socket.listen(backlog)
    return socket


def _inet_socket(family: int, spec: ListenSpec) -> _socket.socket:
    socket = tcp_socket(family) if spec.kind == "tcp" else new_socket(family, SOCK_DGRAM)
    if family == AF_INET6:
        socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, spec.address != "*")
    return socket


def tcp_socket(family: int) -> _socket.socket:
    """A TCP socket with the options of a listener of ours.

    Accepted connections inherit both. Without SO_REUSEADDR, a number that was served on could not be bound again for a minute
    (TIME_WAIT); beside the guard the option lets nobody in. Without TCP_NODELAY, servers that take the descriptor for a unix
    socket, as uvicorn does, answer each keep-alive request 40 ms late.
    """
    socket = new_socket(family)
    socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    socket.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    return socket


def in_url(host: str) -> str:
    """An address as it stands in a URL: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one of the loopback interface, which other machines do not reach."""
    host = host.strip("[]").lower().removeprefix("::ffff:")
    return host.startswith("127.") or host == "::1" or f".{host}".endswith(".localhost")


def covers(one: str, other: str) -> bool:
    """Whether a listener on one address gets what is sent to the other; `*` stands for both families."""
    return one in (other, "*") or (one == "0.0.0.0" and ":" not in other) or (one == "::" and ":" in other)
