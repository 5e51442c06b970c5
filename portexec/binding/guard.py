"""The guard: a number that nobody else can have, and the way past it.

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
from _socket import AF_INET, AF_INET6, SO_REUSEADDR, SO_REUSEPORT, SOCK_STREAM, SOL_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

IPPROTO_MPTCP = 262
IP_FREEBIND = 15  # ip(7); the scrub works where the loopback interface is down, too
_FIRST_FREE_FD = 3  # a closed standard stream stays closed: no socket of ours becomes descriptor 0, 1 or 2
_SCRUBS = 3


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
    mutex = new_socket(AF_INET)
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


def listen_past(guard: Guard, socket: _socket.socket, listen: Callable[[], None]) -> None:
    """Let a bound socket listen beside the guard, by calling `listen`. Raises what that raises.

    A socket on all addresses of both families is different, since no scrub can undo its flip. But it guards the number by
    itself, so the guard steps aside meanwhile. That is exclusive without SO_REUSEADDR only, which may be missed where old
    connections are left; then it is the flip, after all.
    """
    if not _is_on_all_addresses(socket) or socket.getsockopt(SOL_SOCKET, SO_REUSEPORT):
        with Flip(guard, socket):
            return listen()
    four, six = new_socket(AF_INET), new_socket(AF_INET6)
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


def has_ipv6() -> bool:
    """Whether the kernel knows IPv6 at all. Where it is merely switched off, a dual-stack socket still works for IPv4."""
    socket, address = _any_socket()
    socket.close()
    return address == "::"


def _any_socket() -> tuple[_socket.socket, str]:
    """A socket for all addresses of both families, or of IPv4 where there is no IPv6, and the address it is to bind."""
    try:
        socket = new_socket(AF_INET6)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return new_socket(AF_INET), "0.0.0.0"
    socket.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
    return socket, "::"


def _owner_of(socket: _socket.socket) -> int:
    return os.fstat(socket.fileno()).st_uid


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
        scrub = new_socket(AF_INET6 if family == AF_INET else AF_INET)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        scrub = new_socket(AF_INET)
    scrub.setsockopt(_socket.IPPROTO_IP, IP_FREEBIND, 1)
    scrub.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
    if scrub.family == AF_INET6:
        scrub.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        return scrub, _socket.inet_ntop(AF_INET6, b"\xfd" + os.urandom(15))
    return scrub, "127.{}.{}.{}".format(*os.urandom(3))


def _is_on_all_addresses(socket: _socket.socket) -> bool:
    return (
        socket.family == AF_INET6
        and socket.getsockname()[0] == "::"
        and not socket.getsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY)
    )


def _is_mptcp(socket: _socket.socket) -> bool:
    return socket.proto == IPPROTO_MPTCP


def new_socket(family: int, kind: int = SOCK_STREAM) -> _socket.socket:
    socket = _socket.socket(family, kind)
    if socket.fileno() >= _FIRST_FREE_FD:
        return socket
    fd = fcntl.fcntl(socket.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    socket.close()
    return _socket.socket(family, kind, 0, fd)
