"""Guards and listeners: from a `ListenSpec` to a number that nobody else can have.

A *guard* is a socket bound to `[::]:P` for both families, exclusive, never listening. While it is open the kernel gives P to
nobody, whatever address or option they use. A holder of 127.0.0.1 alone is not enough: by way of the bucket's
fastreuseport cache another user can get a dual-stack listener past it (sk_reuseport_match() in the kernel's
net/ipv4/inet_connection_sock.c).

Our own sockets get past the guard by the *flip*: SO_REUSEPORT on guard and socket, bind and listen, SO_REUSEPORT off again.
The kernel reads the option live and shares SO_REUSEPORT within one user only, so even in between strangers stay out. The
flip leaves (user, address) in that cache, which would let the same user bind the same address once more; the *scrub*, one
more flipped bind of a throw-away socket to a random address of the other family, overwrites it before the flip ends.

Sockets are made by `_socket`, not by `socket`: importing the latter takes longer than all the rest of portexec, for
enumerations that are not needed here.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import sys
from _socket import AF_INET, AF_INET6, AF_UNIX, SO_REUSEADDR, SO_REUSEPORT, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET

from portexec.binding.spec import ListenSpec
from portexec.errors import ListenError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Address = tuple[str, int] | tuple[str, int, int, int]

LINUX = sys.platform == "linux"

MAX_BACKLOG = 2**31 - 1  # what listen(2) takes; the kernel allows less
IPPROTO_MPTCP = 262
IP_FREEBIND = 15  # ip(7); the scrub works where the loopback interface is down, too
_FIRST_FREE_FD = 3  # a closed standard stream stays closed: no socket of ours becomes descriptor 0, 1 or 2
_CLIENT_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
_NUMBER_TAKEN = (errno.EADDRINUSE, errno.EACCES)
_SCRUBS = 3
_MAX_REASONS = 4  # how many candidates an error describes one by one


class Listener:
    """A number, with the address and the name it goes by, and the socket that listens on it.

    `kind` is "tcp", "udp" or "unix". `host` is what a client should use, in brackets if it is IPv6; for unix it is empty,
    `path` is set, with its `file` as `unix_sockets` tells it, and `port` is 0. There is no `socket` when the command is to bind
    the number itself.
    """

    __slots__ = ("file", "host", "kind", "name", "named", "path", "port", "socket")

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        host: str = "",
        port: int = 0,
        path: str = "",
        file: tuple[int, int] | None = None,
        socket: _socket.socket | None = None,
        named: bool = True,
    ) -> None:
        self.name = name
        self.kind = kind
        self.host = host
        self.port = port
        self.path = path
        self.file = file
        self.socket = socket
        self.named = named

    def follow(self, hosts: Sequence[str]) -> None:
        """Take the address at which the command really listens, unless one of them covers the one that it was given."""
        if not any(covers(host, self.host.strip("[]")) for host in hosts if host):
            self.host = next((in_url(_CLIENT_HOST.get(host, host)) for host in hosts if host), self.host)

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

    __slots__ = ("backlog", "guards", "listeners")

    def __init__(self, backlog: int) -> None:
        self.backlog = backlog
        self.listeners: list[Listener] = []
        self.guards: dict[int, Guard] = {}

    def guard_descriptors(self) -> tuple[int, ...]:
        """The descriptors of all guards."""
        return tuple(socket.fileno() for guard in self.guards.values() for socket in guard.sockets)

    def open_to_reusers(self) -> None:
        """Let the guards give way to whoever sets SO_REUSEADDR. Never before a guard is bound: two of them could then have
        the same number.
        """
        for guard in self.guards.values():
            guard.set(SO_REUSEADDR, 1)

    def release_guards(self) -> None:
        """Close our copies of guards that another process has."""
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
                listener.socket, listener.file = _listen_unix(listener.path, self.backlog)
                if listener.socket.fileno() != fd:
                    os.dup2(listener.socket.fileno(), fd, inheritable=False)
                    listener.socket.close()
                    listener.socket = _socket.socket(AF_UNIX, SOCK_STREAM, 0, fd)

    def listen_again(self) -> None:
        """Let the TCP listeners listen that a server has shut down when it ended, as some do (shutdown(2)). Raises OSError."""
        for listener in self.listeners:
            socket = listener.socket
            if listener.kind == "tcp" and socket is not None and not socket.getsockopt(SOL_SOCKET, _socket.SO_ACCEPTCONN):
                _listen_again(self.guards.get(listener.port), socket, self.backlog)

    def close(self) -> None:
        """Give everything back: close the sockets, and remove the unix sockets that were made."""
        for guard in self.guards.values():
            guard.close()
        for listener in self.listeners:
            if listener.socket is not None:
                listener.socket.close()
        self.remove_paths()
        self.listeners.clear()
        self.guards.clear()

    def remove_paths(self) -> None:
        """Remove the unix sockets that were made from the file system."""
        for listener in self.listeners:
            if listener.path:
                from portexec.binding import unix

                unix.remove(listener.path, listener.file)


def bind_all(specs: Iterable[ListenSpec], *, listening: bool, backlog: int = 0) -> Bound:
    """Choose and guard a number for every spec.

    `listening`: make a listening socket for each, with this backlog (0 for the greatest). Otherwise the command is to bind
    the number itself.
    Raises ListenError, with nothing left bound, when any of them cannot be had.
    """
    bound = Bound(backlog or _socket.SOMAXCONN)
    try:
        for spec in specs:
            bound.listeners.append(_bind(spec, bound.guards, bound.backlog if listening else None))
    except OSError as error:
        bound.close()
        raise _exhausted(error) from error
    except BaseException:
        bound.close()
        raise
    return bound


def _bind(spec: ListenSpec, guards: dict[int, Guard], backlog: int | None) -> Listener:
    if spec.kind == "unix":
        socket, file = _listen_unix(spec.address, backlog)
        return Listener(spec.name, "unix", path=spec.address, file=file, socket=socket, named=spec.named)
    family, address = _resolve(spec)
    if spec.kind == "udp":
        socket = _first_free(spec, lambda number: _bind_udp(family, address(number), spec))
    else:
        socket = _first_free(spec, lambda number: _bind_tcp(family, address, number, spec, guards, backlog))
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


def _has_hung_up(socket: _socket.socket | None) -> bool:
    import select

    poll = select.poll()
    poll.register(-1 if socket is None else socket.fileno(), 0)
    return bool(poll.poll(0))


def _listen_unix(path: str, backlog: int | None) -> tuple[_socket.socket, tuple[int, int] | None]:
    from portexec.binding import unix

    socket = _new_socket(AF_UNIX)
    try:
        return socket, unix.listen(socket, path, backlog or _socket.SOMAXCONN)
    except OSError as error:
        socket.close()
        raise _cannot_listen(f"unix:{path}", error) from error
    except BaseException:
        socket.close()
        raise


def _resolve(spec: ListenSpec) -> tuple[int, Callable[[int], Address]]:
    """The family of the spec's address, and a function from a number to what bind(2) takes."""
    if spec.address == "*":
        return (AF_INET6, lambda number: ("::", number)) if has_ipv6() else (AF_INET, lambda number: ("", number))
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


def has_ipv6() -> bool:
    """Whether the kernel knows IPv6 at all. Where it is merely switched off, a dual-stack socket still works for IPv4."""
    socket, address = _any_socket()
    socket.close()
    return address == "::"


def _any_socket() -> tuple[_socket.socket, str]:
    """A socket for all addresses of both families, or of IPv4 where there is no IPv6, and the address it is to bind."""
    try:
        socket = _new_socket(AF_INET6)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return _new_socket(AF_INET), "0.0.0.0"
    socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
    return socket, "::"


def _first_free(spec: ListenSpec, bind: Callable[[int], _socket.socket]) -> _socket.socket:
    """Bind the first candidate that can be bound."""
    failures: list[tuple[int, OSError]] = []
    for number in spec.numbers():
        try:
            return bind(number)
        except OSError as error:
            if error.errno not in _NUMBER_TAKEN:
                raise _cannot_listen(spec, error) from error
            failures.append((number, error))
    raise _none_free(spec, failures)


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
    guards: dict[int, Guard],
    backlog: int | None,
) -> _socket.socket:
    """Guard the number, unless we do already, and get a socket of ours past the guard; it listens if it is to."""
    if not LINUX:
        return _bind_unguarded(family, address(number), spec, backlog)
    guard = guards.get(number) or Guard(number)
    socket = None
    try:
        if backlog is None and spec.address == "*":
            # The guard itself shows that it can be had; a flip for this address could not be scrubbed.
            guards[guard.port] = guard
            return _socket.socket(-1, -1, -1, os.dup(guard.sockets[0].fileno()))
        socket = _inet_socket(family, spec)
        is_on_all_addresses = family == AF_INET6 and spec.address == "*"
        with Flip(guard, socket):
            socket.bind(address(guard.port))
            if backlog is not None and not is_on_all_addresses:
                socket.listen(backlog)
        if backlog is not None and is_on_all_addresses:
            listen_past(guard, socket, lambda: socket.listen(backlog))
    except BaseException:
        if socket is not None:
            socket.close()
        if guard.port not in guards:
            guard.close()
        raise
    guards[guard.port] = guard
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
    socket = _new_socket(family, SOCK_DGRAM if spec.kind == "udp" else SOCK_STREAM)
    if family == AF_INET6:
        socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, spec.address != "*")
    if spec.kind == "tcp":
        # Accepted connections inherit both. Without the first, a number that was served on could not be had again for a
        # minute (TIME_WAIT); under the guard it lets nobody in. Without the second, servers that take the descriptor for a
        # unix socket, as uvicorn does, answer each keep-alive request 40 ms late.
        socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        socket.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    return socket


class Guard:
    """The guard of one number, and the owner of its sockets: one for both families, or after `renew` one for each."""

    __slots__ = ("port", "sockets")

    def __init__(self, number: int) -> None:
        """Guard this number, 0 for any that is free. Raises OSError when it cannot be had."""
        socket, address = _any_socket()
        try:
            try:
                socket.bind((address, number))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not number:
                    raise
                _bind_beside_old_connections(socket, (address, number))
        except BaseException:
            socket.close()
            raise
        self.port: int = socket.getsockname()[1]
        self.sockets = [socket]

    def set(self, option: int, value: int) -> None:
        """Set an option of SOL_SOCKET on all its sockets."""
        for socket in self.sockets:
            socket.setsockopt(SOL_SOCKET, option, value)

    def close(self) -> None:
        """Give up the number."""
        for socket in self.sockets:
            socket.close()
        self.sockets = []

    def renew(self, listener: _socket.socket, unbound: Iterable[_socket.socket]) -> None:
        """Guard the number again beside a listener that has it on all addresses by itself.

        One of the `unbound` sockets for each family: after the flip of one for both, the cache would hold an address that
        equals every other. With SO_REUSEADDR meanwhile, for old connections in TIME_WAIT; the listener keeps everybody else
        out.
        """
        for socket in unbound:
            beside = Guard.__new__(Guard)
            beside.port, beside.sockets = self.port, [listener, *self.sockets]
            try:
                socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
                with Flip(beside, socket):
                    socket.bind(("0.0.0.0" if socket.family == AF_INET else "::", self.port))
            except OSError:
                socket.close()  # somebody got in beside the listener, which admission notices
            else:
                socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 0)
                self.sockets.append(socket)


def _bind_beside_old_connections(guard: _socket.socket, address: tuple[str, int]) -> None:
    """Bind a guard to a number on which only connections of an earlier server are left, in TIME_WAIT or still open.

    SO_REUSEADDR gets past them, but also past another guard of hand-off `hold`, so a mutex comes first: an exclusive socket
    on one address of this number that nobody uses. It cannot be had while anybody holds the number on all addresses, and
    while we hold it, no other launch gets here. Being bound without the option, it also keeps the kernel from caching that
    SO_REUSEADDR suffices on this number (tb->fastreuse, Linux up to 6.1).
    """
    mutex = _new_socket(AF_INET)
    try:
        mutex.setsockopt(_socket.IPPROTO_IP, IP_FREEBIND, 1)
        mutex.bind(("127.255.255.253", address[1]))
        mutex.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        guard.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        guard.bind(address)
    finally:
        guard.setsockopt(SOL_SOCKET, SO_REUSEADDR, 0)
        mutex.close()


class Flip:
    """The time in which `socket` may be bound, or may listen, beside the guard; see the module's text.

    What takes time is done before the guard opens, and the scrub while it is still open. Root can do better than share with
    one user: for this time the sockets belong to a user that nobody is and that nobody can guess (fchown(2) on a socket
    changes the user whom the kernel compares). A socket that shares by itself, with its user's other ones, keeps its owner,
    and so does one of MPTCP, where the kernel compares the user of an inner socket; then the guard becomes that user's.
    """

    __slots__ = ("disguise", "guard", "owners", "scrub", "scrub_address", "socket", "was_shared")

    def __init__(self, guard: Guard, socket: _socket.socket) -> None:
        self.guard = guard
        self.socket = socket
        self.was_shared = socket.getsockopt(SOL_SOCKET, SO_REUSEPORT)
        self.owners: list[tuple[_socket.socket, int]] = []
        self.disguise = 1 << 31 | int.from_bytes(os.urandom(4), "big") >> 2
        if self.was_shared or any(map(_is_mptcp, (socket, *guard.sockets))):
            self.disguise = _owner_of(socket)

    def __enter__(self) -> None:
        self.scrub, self.scrub_address = _make_scrub(self.socket.family)
        if os.geteuid() == 0:
            self._hide()
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
        self.guard.set(SO_REUSEPORT, 1)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        is_scrubbed = self._close()
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, self.was_shared)
        self._show()
        self.scrub.close()
        if not is_scrubbed and failed is None:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _close(self) -> bool:
        """Scrub, and end the sharing. False: a process of our own user got in, and what it bound could still listen.

        Between the two it may bind and replace what the scrub left; then once more. Where a listener of ours has the whole
        other family, there is no room for a scrub, and what the kernel caches stays: our own user, this very address.
        """
        for _ in range(_SCRUBS):
            has_room = _can_bind(self.scrub, self.scrub_address, self.guard.port)
            self.guard.set(SO_REUSEPORT, 0)
            if not has_room or self._is_scrubbed():
                return True
            self.scrub.close()
            self.scrub, self.scrub_address = _make_scrub(self.socket.family)
            self.guard.set(SO_REUSEPORT, 1)
        self.guard.set(SO_REUSEPORT, 0)
        return False

    def _is_scrubbed(self) -> bool:
        """Whether the kernel remembers the scrub: its address can be bound once more, and another one cannot.

        Not asked where nobody is of the same user, where the socket shares by itself, and where no scrub has an effect.
        """
        is_wildcard = self.socket.getsockname()[0] in ("0.0.0.0", "::")
        if self.owners or self.was_shared or (is_wildcard and self.scrub.family == self.socket.family):
            return True
        if _is_on_all_addresses(self.socket):
            return True
        try:
            again, _ = _make_scrub(self.socket.family)
            other, other_address = _make_scrub(self.socket.family)
        except OSError:
            return True  # no descriptors left to find out with
        try:
            return _can_bind(again, self.scrub_address, self.guard.port) and not _can_bind(
                other, other_address, self.guard.port
            )
        finally:
            again.close()
            other.close()

    def _hide(self) -> None:
        try:
            os.fchown(self.scrub.fileno(), self.disguise, -1)
            for socket in (self.socket, *self.guard.sockets):
                owner = _owner_of(socket)
                if owner != self.disguise:
                    os.fchown(socket.fileno(), self.disguise, -1)
                    self.owners.append((socket, owner))
        except OSError:  # in a container without CAP_CHOWN, or without that user
            self._show()

    def _show(self) -> None:
        for socket, owner in self.owners:
            os.fchown(socket.fileno(), owner, -1)
        self.owners.clear()


def in_url(host: str) -> str:
    """An address as it stands in a URL: an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def covers(one: str, other: str) -> bool:
    """Whether a listener on one address gets what is sent to the other; `*` stands for both families."""
    return one in (other, "*") or (one == "0.0.0.0" and ":" not in other) or (one == "::" and ":" in other)


def _owner_of(socket: _socket.socket) -> int:
    return os.fstat(socket.fileno()).st_uid


def can_flip(guard: Guard, socket: _socket.socket) -> bool:
    """Whether the kernel can be made to see guard and socket as one user's: they are, or we may change the guard's owner."""
    ours, owner = os.geteuid(), _owner_of(socket)
    if owner == ours:
        return True
    try:
        for each in guard.sockets:
            os.fchown(each.fileno(), owner, -1)
            os.fchown(each.fileno(), ours, -1)
    except OSError:
        return False
    return True


def _can_bind(socket: _socket.socket, address: str, port: int) -> bool:
    try:
        socket.bind((address, port))
    except OSError:
        return False
    return True


def _make_scrub(family: int) -> tuple[_socket.socket, str]:
    """A throw-away socket, and a random address that the kernel does not take for equal to one of this family.

    For the kernel an address is equal to a wildcard of its own family, so the scrub is of the other one.
    """
    try:
        scrub = _new_socket(AF_INET6 if family == AF_INET else AF_INET)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        scrub = _new_socket(AF_INET)
    scrub.setsockopt(_socket.IPPROTO_IP, IP_FREEBIND, 1)
    scrub.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
    if scrub.family == AF_INET6:
        scrub.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        return scrub, _socket.inet_ntop(AF_INET6, b"\xfd" + os.urandom(15))
    return scrub, "127.{}.{}.{}".format(*os.urandom(3))


def listen_past(guard: Guard, socket: _socket.socket, listen: Callable[[], None]) -> None:
    """Let a bound socket listen beside the guard, by calling `listen`. Raises what that raises.

    A socket on all addresses of both families is different, since no scrub can undo its flip. But it guards the number by
    itself, so the guard steps aside meanwhile. That is exclusive without SO_REUSEADDR only, which may be missed where old
    connections are left; then it is the flip, after all.
    """
    if not _is_on_all_addresses(socket) or socket.getsockopt(SOL_SOCKET, SO_REUSEPORT):
        with Flip(guard, socket):
            return listen()
    four, six = _new_socket(AF_INET), _new_socket(AF_INET6)
    six.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
    reuses_address = socket.getsockopt(SOL_SOCKET, SO_REUSEADDR)
    socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 0)
    guard.close()
    try:
        return listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not reuses_address:
            raise
    finally:
        guard.renew(socket, (four, six))
        socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuses_address)
    with Flip(guard, socket):
        return listen()


def _listen_again(guard: Guard | None, socket: _socket.socket, backlog: int) -> None:
    """Not by `listen_past`: others have copies of the guard, which could not step aside."""
    if guard is None:
        socket.listen(backlog)
        return
    with Flip(guard, socket):
        socket.listen(backlog)


def _is_on_all_addresses(socket: _socket.socket) -> bool:
    return (
        socket.family == AF_INET6
        and socket.getsockname()[0] == "::"
        and not socket.getsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY)
    )


def _is_mptcp(socket: _socket.socket) -> bool:
    return socket.proto == IPPROTO_MPTCP


def _new_socket(family: int, kind: int = SOCK_STREAM) -> _socket.socket:
    socket = _socket.socket(family, kind)
    if socket.fileno() >= _FIRST_FREE_FD:
        return socket
    fd = fcntl.fcntl(socket.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    socket.close()
    return _socket.socket(family, kind, 0, fd)


def _cannot_listen(spec: ListenSpec | str, error: OSError) -> ListenError:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return _exhausted(error)
    hints = {
        errno.EADDRNOTAVAIL: "this machine does not have that address; `ip address` shows those it has",
        errno.EAFNOSUPPORT: "this machine has no IPv6; use 127.0.0.1",
        errno.ENOENT: "the directory has to exist",
    }
    return ListenError(f"cannot listen on {spec}: {reason(error)}", hints.get(error.errno or 0, ""))


def _exhausted(error: OSError) -> ListenError:
    return ListenError(
        f"cannot open another socket: {reason(error)}",
        "raise the limit with `ulimit -n`; every listener takes two descriptors" if error.errno == errno.EMFILE else "",
    )


def _none_free(spec: ListenSpec, failures: list[tuple[int, OSError]]) -> ListenError:
    """Say which candidates were tried and why each failed; the common one-candidate case in the usual words."""
    number, error = failures[0]
    if len(failures) == 1 and number:
        hint = f"`{number},0` takes any other free port instead"
        if error.errno == errno.EACCES:
            hint = "ports below net.ipv4.ip_unprivileged_port_start, mostly 1024, need root or CAP_NET_BIND_SERVICE"
        return ListenError(f"cannot listen on {spec}: {_why_not(number, error, spec)}", hint)
    told = [f"{number}: {_why_not(number, error, spec)}" for number, error in failures[:_MAX_REASONS]]
    more = len(failures) - len(told)
    tail = f"; and {more} more" if more else ""
    return ListenError(
        f"no free port for {spec}: {'; '.join(told)}{tail}",
        "" if (0, 0) in spec.candidates else f"add `,0` for any other free port: {spec},0",
    )


def _why_not(number: int, error: OSError, spec: ListenSpec) -> str:
    if not number:
        return f"none is left in the ephemeral range ({_ephemeral_range()})"
    if error.errno != errno.EADDRINUSE or spec.kind != "tcp":
        return reason(error)
    from portexec.binding import tables

    owner = tables.who_has(number)
    return f"{reason(error)} ({owner})" if owner else reason(error)


def _ephemeral_range() -> str:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            return "-".join(file.read().split())
    except OSError:
        return "of this system"
