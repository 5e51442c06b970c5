"""The guard: a number that nobody else can have, and the way past it.

A *guard* is a socket bound to `[::]:P` for both families, exclusive, never serving. While it is open the kernel gives P to
nobody, whatever address or option they use. A holder of 127.0.0.1 alone is not enough: by way of the bucket's cache another
user can get a dual-stack listener past it. The guard is the only thing that keeps other users out, so it is never closed
before the run ends, whatever happens to a flip.

Our own sockets get past the guard by the *flip*: SO_REUSEPORT on guard and socket, bind or listen, SO_REUSEPORT off again.
The kernel reads the option live and shares SO_REUSEPORT within one user only, so even in between strangers stay out.

The flip leaves a trace. The kernel caches (user, address) of the last socket with SO_REUSEPORT that was bound to a number.
A socket of that user that *matches* the cache is bound without any check (sk_reuseport_match() in the kernel's
net/ipv4/inet_connection_sock.c). Left alone, the cache would let the same user past the guard. It would let a second socket
of the command join its first one in silence, too. So each flip ends with a *scrub*: a throw-away socket is bound to a random
address that nobody uses, which replaces what the cache holds.

- A scrub must not match the cache, or nothing is replaced. A cached wildcard matches its own family, so the scrub after it
  is of the other family. A cached `[::]` for both families matches everything, and no scrub replaces that.
- So before a socket for both families is bound, the cache gets a *seed*: `[::]` for IPv6 alone. The seed matches the socket,
  and then the kernel leaves the cache as it is. An IPv4 scrub does not match the seed, and replaces it. But the kernel checks
  nothing when the cache matches. The seeds take the check instead: one for each family, with the options of the socket.
- A scrub needs room. Where other sockets of the command have all addresses of its family, these sockets have to share in the
  flip, too. Where we cannot get them, the bind stands, the flip is not *clean*, and a scrub is tried again later.
- The *wash* is for what no scrub replaces: the guard listens for an instant. A socket without SO_REUSEPORT empties the cache
  when it is bound or listens. The kernel refuses that while anything else overlaps the guard.

gVisor knows no flip: it fixes what a socket shares when the socket is bound. A guard there is *open*: it is born with
SO_REUSEADDR, and anybody who sets SO_REUSEADDR gets past it.

Sockets are made by `_socket`, not by `socket`: importing the latter takes longer than all the rest of portexec, for
enumerations that are not needed here.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
from _socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPV6_V6ONLY,
    SO_REUSEADDR,
    SO_REUSEPORT,
    SOCK_STREAM,
    SOL_SOCKET,
)

from portexec.errors import CloseOnError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Others = Callable[[bool], Iterable[_socket.socket]]

IPPROTO_MPTCP = 262
IP_FREEBIND = 15  # ip(7): an address can be bound that no interface has, also while the loopback interface is down
WEAKLY = "weakly: a program that sets SO_REUSEADDR can take the number where the command does not listen"  # an open guard
_FIRST_FREE_FD = 3  # a closed standard stream stays closed: no socket of ours becomes descriptor 0, 1 or 2
_SCRUBS = 3  # how often each family is tried while a process of the same user interferes
DEVICE_SIZE = 16  # IFNAMSIZ
_IP_MINTTL = 21  # ip(7)
_IPV6_MINHOPCOUNT = 73  # linux/in6.h
_GREATEST = 255  # hop limit
_FAMILIES = (AF_INET, AF_INET6)
_EVERY_FOUR = "0.0.0.0"
_EVERY_SIX = "::"


def _none(_: bool) -> tuple[_socket.socket, ...]:
    return ()


class Guard:
    """The guard of one number, and the owner of its one socket.

    Several processes may have copies of the socket; nothing that is done with a guard depends on closing one.
    `is_tidy`: as far as this process knows, no earlier flip has left a way past the guard. A process that takes a guard over
    from another one knows nothing. `last_owner` is the user that the last flip made the guard belong to, None for our own.
    `is_open`: it lets SO_REUSEADDR pass from its beginning, as the kernel knows no flip.
    """

    __slots__ = ("_is_named", "is_open", "is_tidy", "last_owner", "port", "socket")

    def __init__(self, number: int) -> None:
        """Guard this number, 0 for any that is free. Raises OSError when it cannot be had."""
        self.is_open = False
        self.is_tidy = True
        self.last_owner: int | None = None
        self.socket, address = _any_socket()
        with CloseOnError(self):
            _bind_guard(self.socket, address, number)
            self.port: int = self.socket.getsockname()[1]
            self._is_named = bool(number) or self._bind_by_name(address)

    def _bind_by_name(self, address: str) -> bool:
        """Replace our socket by one that has asked for the number.

        A socket that did not ask for its number loses it when it has listened and is shut down. Such a guard cannot be washed.
        """
        named, _ = _any_socket()
        try:
            with Flip(self, named, address):
                named.bind((address, self.port))
        except OSError:
            named.close()  # the kernel knows no flip; the number is ours, which is what counts
            return False
        self.socket.close()
        self.socket = named
        return True

    def bind_open(self) -> None:
        """Bind anew, open. In between anybody can take the number. Raises OSError when somebody has taken it."""
        self.socket.close()
        self.socket, address = _any_socket()
        self.set(SO_REUSEADDR, 1)
        self.socket.bind((address, self.port))
        self.is_open = True

    def fileno(self) -> int:
        """Its descriptor."""
        return self.socket.fileno()

    def set(self, option: int, value: int) -> None:
        """Set an option of SOL_SOCKET."""
        self.socket.setsockopt(SOL_SOCKET, option, value)

    def close(self) -> None:
        """Give up the number, or this process' copy of the guard."""
        self.socket.close()

    def tidy(self, owner: int | None = None, others: Others = _none) -> bool:
        """Scrub or wash what an earlier flip may have left. False: a process of `owner` with SO_REUSEPORT can still pass.

        `others` gives the sockets that may have to make room for a scrub, as for a flip.
        """
        if not self.is_tidy:
            before = owner_of(self.socket)
            _give(self.socket, before if owner is None else owner)
            try:
                self.is_tidy = not self._lets_in(owner) or _scrub(self, _FAMILIES, owner, others) or self._wash(owner)
            finally:
                _give(self.socket, before)
        return self.is_tidy

    def give_way(self) -> None:
        """Let everybody pass who sets SO_REUSEADDR, other users too."""
        self.set(SO_REUSEADDR, 1)

    def give_way_no_more(self) -> None:
        """Let nobody pass any more. Who has passed may be in the kernel's cache, as a user whom we do not know: so scrub.

        Beside a listener for both families no scrub is possible. None is needed there: nobody could pass beside it.
        """
        self.set(SO_REUSEADDR, 0)
        if not _scrub(self, _FAMILIES, None, _none):
            self._wash(None)

    def _lets_in(self, owner: int | None) -> bool:
        """Whether the cache matches whole families: then an address that nobody has asked for can be bound."""
        return any(_can_bind(self.port, _random_address(family), owner) for family in _FAMILIES)

    def _wash(self, owner: int | None) -> bool:
        """Listen for an instant, deaf."""
        if not self._is_named:
            return False
        try:
            make_deaf(self.socket)
            self.socket.listen(0)
            self.socket.shutdown(_socket.SHUT_RDWR)
        except OSError:
            return False  # something overlaps the guard: a socket of the command, or connections that are left of one
        return not self._lets_in(owner)


def _bind_guard(guard: _socket.socket, address: str, number: int) -> None:
    try:
        guard.bind((address, number))
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not number:
            raise
        from portexec.binding import tables  # few starts come here

        if not tables.may_have_connections(number):
            raise
        _bind_beside_old_connections(guard, (address, number))
        if tables.is_bound_by_others(number, os.fstat(guard.fileno()).st_ino):
            raise


def _bind_beside_old_connections(guard: _socket.socket, address: tuple[str, int]) -> None:
    """Bind a guard to a number on which only connections of an earlier server are left, in TIME_WAIT or still open.

    SO_REUSEADDR gets past them, but also past another guard of hand-off `hold`, so a mutex comes first: an exclusive socket
    on one address of this number that nobody uses. The mutex cannot be bound while anybody holds the number on all addresses.
    While we hold the mutex, no other launch gets here. The mutex is bound without SO_REUSEADDR. That also keeps the kernel
    from caching that the option suffices on this number (tb->fastreuse, Linux up to 6.1).

    SO_REUSEADDR also gets past whoever has bound one address with that option, and does not listen. The caller looks for such
    sockets, as far as the kernel shows them.
    """
    mutex = new_socket(AF_INET)
    try:
        mutex.setsockopt(IPPROTO_IP, IP_FREEBIND, 1)
        mutex.bind(("127.255.255.253", address[1]))
        mutex.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        guard.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        guard.bind(address)
    finally:
        guard.setsockopt(SOL_SOCKET, SO_REUSEADDR, 0)
        mutex.close()


class Traits:
    """What the kernel tells of a socket: its inode, the user whom it belongs to, and whether it has SO_REUSEPORT by itself.

    A flip changes the last two for its time, so they are read before it.
    """

    __slots__ = ("inode", "owner", "shares")

    def __init__(self, socket: _socket.socket) -> None:
        status = os.fstat(socket.fileno())
        self.inode = status.st_ino
        self.owner = status.st_uid
        self.shares = bool(socket.getsockopt(SOL_SOCKET, SO_REUSEPORT))


class Flip:
    """The time in which `socket` may be bound to `host`, or may listen there, beside the guard; see the module's text.

    `others` gives the sockets of the command, or ours, that are bound to the number already. It is called when they are needed;
    its argument says whether the search may take long. `beside` are listeners of ours on the same address: they share, too,
    during the flip, so that the socket gets in beside them. `traits` are those of the socket, if the caller has read them.
    `is_clean`, after the flip: it has left no way past the guard. False where no scrub succeeded.

    Root can do better than share with one user. During the flip the sockets belong to a random user id, which no process has
    and nobody can guess: fchown(2) on a socket changes the user whom the kernel compares. Then the kernel makes the whole
    check, and what it caches matches nobody.

    Two kinds of sockets keep their owner: one that shares by itself, with its user's other sockets, and one of MPTCP, where
    the kernel compares the user of an inner socket. Then guard, seeds and scrubs become that user's.
    """

    __slots__ = (
        "_beside",
        "_guard",
        "_host",
        "_is_hidden",
        "_others",
        "_owner",
        "_owners",
        "_socket",
        "_traits",
        "is_clean",
    )

    def __init__(
        self,
        guard: Guard,
        socket: _socket.socket,
        host: str,
        others: Others = _none,
        beside: Sequence[_socket.socket] = (),
        traits: Traits | None = None,
    ) -> None:
        self._guard = guard
        self._beside = beside
        self._socket = socket
        self._host = host
        self._others = others
        self._traits = traits or Traits(socket)
        self._owner: int | None = None  # of seeds and scrubs; None for our own user
        self._owners: list[tuple[_socket.socket, int]] = []  # the sockets whose owner we have changed, and their former owners
        self._is_hidden = False
        self.is_clean = False

    def __enter__(self) -> Flip:
        if self._guard.is_open:
            return self
        if os.geteuid() == 0:
            self._hide()
        try:
            if not self._is_hidden:
                self._refuse_to_join(is_tidy=self._guard.tidy(self._owner, self._others))
            self._share(1, *self._beside, self._socket)
            self._guard.set(SO_REUSEPORT, 1)
            if not self._is_hidden and is_on_both_families(self._socket, self._host):
                self._seed()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._guard.is_open:
            self._end()

    def _end(self) -> None:
        self._share(0, *self._beside)
        try:
            self.is_clean = self._is_hidden or _scrub(self._guard, self._families(), self._owner, self._others)
            self._guard.is_tidy, self._guard.last_owner = self.is_clean, self._owner
        finally:
            self._guard.set(SO_REUSEPORT, 0)
            self._socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, self._traits.shares)
            self._show()

    def _share(self, value: int, *sockets: _socket.socket) -> None:
        for socket in sockets:
            socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, value)

    def _seed(self) -> None:
        """Make the kernel cache `[::]` for IPv6 alone, and check what it will not check of the socket. Raises OSError.

        What is cached can be scrubbed at each moment. The first address shows that there is room for an IPv6 scrub, which can
        replace the IPv4 seed. The IPv4 seed shows that there is room for an IPv4 scrub, which can replace the IPv6 seed.
        """
        reuse_address = self._socket.getsockopt(SOL_SOCKET, SO_REUSEADDR)
        device = self._socket.getsockopt(SOL_SOCKET, _socket.SO_BINDTODEVICE, DEVICE_SIZE)
        for address in (_random_address(AF_INET6), _EVERY_FOUR, _EVERY_SIX):
            _bind_briefly(self._guard.port, address, self._owner, reuse_address=reuse_address, device=device)

    def _families(self) -> tuple[int, ...]:
        """The families of scrubs that what is cached now does not match."""
        if is_on_both_families(self._socket, self._host):
            return (AF_INET, AF_INET6)  # the second where the seed for IPv6 was refused, and that for IPv4 is cached
        if self._host == _EVERY_SIX:
            return (AF_INET,)
        if "." not in self._host:
            return (AF_INET6, AF_INET)
        return (AF_INET6,) if self._host.endswith(_EVERY_FOUR) else (AF_INET, AF_INET6)

    def _refuse_to_join(self, *, is_tidy: bool) -> None:
        """Refuse to join another socket that shares by itself: without the flip, the kernel would. Raises OSError.

        Where the guard is not tidy, the cache may match too much. Then refuse to join any other socket.
        """
        if self._traits.shares:
            return
        for other in self._others(False):
            if other in self._beside:
                continue
            if (not is_tidy or other.getsockopt(SOL_SOCKET, SO_REUSEPORT)) and self._conflicts_with(other):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _conflicts_with(self, other: _socket.socket) -> bool:
        reuse = self._socket.getsockopt(SOL_SOCKET, SO_REUSEADDR) and other.getsockopt(SOL_SOCKET, SO_REUSEADDR)
        if reuse and not other.getsockopt(SOL_SOCKET, _socket.SO_ACCEPTCONN):
            return False
        return overlap(host_of(self._socket, self._host), host_of(other))

    def _hide(self) -> None:
        is_bare = not self._traits.shares and self._socket.proto != IPPROTO_MPTCP
        user = _random_user() if is_bare else self._traits.owner
        try:
            self._lend(self._socket, self._traits.owner, user)
            for socket in (self._guard.socket, *self._beside):
                self._lend(socket, owner_of(socket), user)
        except OSError:  # in a container without CAP_CHOWN, or without that user
            self._show()
        else:
            self._is_hidden = is_bare
            self._owner = user or None

    def _lend(self, socket: _socket.socket, owner: int, user: int) -> None:
        """Make a socket of this owner another user's, until `_show`. Raises OSError."""
        if owner != user:
            os.fchown(socket.fileno(), user, -1)
            self._owners.append((socket, owner))

    def _show(self) -> None:
        for socket, owner in self._owners:
            os.fchown(socket.fileno(), owner, -1)
        self._owners.clear()


def _scrub(guard: Guard, families: tuple[int, ...], owner: int | None, others: Others) -> bool:
    """Replace what the cache holds. Afterwards the guard does not share. False: nothing that we can bind replaces it."""
    if any(_replace(guard, family, owner) for family in families * _SCRUBS):
        return True
    opened = [socket for socket in others(True) if not socket.getsockopt(SOL_SOCKET, SO_REUSEPORT)]
    try:
        for socket in opened:
            socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
        return bool(opened) and any(_replace(guard, family, owner) for family in families)
    finally:
        for socket in opened:
            socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, 0)


def _replace(guard: Guard, family: int, owner: int | None) -> bool:
    """Bind one scrub, and find out whether the cache holds it now.

    It does not if the scrub matched what was cached, or if a process of the same user has bound after it.
    """
    address = _random_address(family)
    guard.set(SO_REUSEPORT, 1)
    try:
        _bind_briefly(guard.port, address, owner, reuse_address=1)
    except OSError:
        return False
    finally:
        guard.set(SO_REUSEPORT, 0)
    return _is_cached(guard.port, address, owner)


def _is_cached(port: int, address: str, owner: int | None) -> bool:
    """Whether the cache matches this address and no other one of its family. The guard lets nothing else through."""
    family = _family_of(address)
    try:
        socket = _make_sharer(family, owner)
    except OSError:
        return False
    try:
        return not _try_to_bind(socket, _random_address(family), port) and _try_to_bind(socket, address, port)
    finally:
        socket.close()


def _try_to_bind(socket: _socket.socket, address: str, port: int) -> bool:
    try:
        socket.bind((address, port))
    except OSError:
        return False
    return True


def _can_bind(port: int, address: str, owner: int | None) -> bool:
    try:
        _bind_briefly(port, address, owner)
    except OSError:
        return False
    return True


def _bind_briefly(port: int, address: str, owner: int | None, *, reuse_address: int = 0, device: bytes = b"") -> None:
    """Bind a throw-away socket that shares, and close it. It gets these options, where they are set. Raises OSError."""
    socket = _make_sharer(_family_of(address), owner)
    try:
        if device:
            socket.setsockopt(SOL_SOCKET, _socket.SO_BINDTODEVICE, device)
        if reuse_address:
            socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        socket.bind((address, port))
    finally:
        socket.close()


def _make_sharer(family: int, owner: int | None) -> _socket.socket:
    """A throw-away socket with SO_REUSEPORT, of one family alone, that can be bound to any address."""
    socket = new_socket(family)
    with CloseOnError(socket):
        if family == AF_INET6:
            socket.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 1)
        socket.setsockopt(IPPROTO_IP, IP_FREEBIND, 1)
        socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
        if owner is not None:
            os.fchown(socket.fileno(), owner, -1)
    return socket


def _family_of(address: str) -> int:
    return AF_INET6 if ":" in address else AF_INET


def _random_address(family: int) -> str:
    """An address that nobody has: of 240.0.0.0/4, which is reserved, or of fd00::/8, for networks that choose at random."""
    if family == AF_INET6:
        return _socket.inet_ntop(AF_INET6, b"\xfd" + os.urandom(15))
    first, *rest = os.urandom(4)
    return "{}.{}.{}.{}".format(240 + first % 15, *rest)


def can_flip(guard: Guard, owner: int) -> bool:
    """Whether the kernel can be made to see the guard and a socket of this owner as one user's.

    They are, or we may change the guard's owner.
    """
    ours = os.geteuid()
    if owner == ours:
        return True
    try:
        os.fchown(guard.fileno(), owner, -1)
        os.fchown(guard.fileno(), ours, -1)
    except OSError:
        return False
    return True


def can_hide() -> bool:
    """Whether a flip of ours can hide: sockets can be made to belong to a user that nobody is."""
    socket = new_socket(AF_INET)
    try:
        os.fchown(socket.fileno(), _random_user(), -1)
    except OSError:
        return False
    finally:
        socket.close()
    return True


def _random_user() -> int:
    """A user that nobody is."""
    return 1 << 31 | int.from_bytes(os.urandom(4), "big") >> 2


def knows_flips() -> bool:
    """Whether this kernel heeds what a socket shares now, rather than what it shared when it was bound."""
    holder, sharer = new_socket(AF_INET), new_socket(AF_INET)
    try:
        holder.bind((_EVERY_FOUR, 0))
        for socket in (holder, sharer):
            socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)
        return _try_to_bind(sharer, *holder.getsockname())
    finally:
        holder.close()
        sharer.close()


def has_ipv6() -> bool:
    """Whether the kernel knows IPv6 at all. Where it is merely switched off, a dual-stack socket still works for IPv4."""
    socket, address = _any_socket()
    socket.close()
    return address == _EVERY_SIX


def _any_socket() -> tuple[_socket.socket, str]:
    """A socket for all addresses of both families, or of IPv4 where there is no IPv6, and the address it is to bind."""
    try:
        socket = new_socket(AF_INET6)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return new_socket(AF_INET), _EVERY_FOUR
    socket.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
    return socket, _EVERY_SIX


def make_deaf(socket: _socket.socket, *, is_deaf: bool = True) -> None:
    """Make a listener deaf: a client is neither accepted nor refused, and tries again within a second or so.

    A deaf listener drops packets whose hop limit is below the greatest, and senders use a lower one. Raises OSError.
    """
    least = _GREATEST if is_deaf else 0
    socket.setsockopt(IPPROTO_IP, _IP_MINTTL, least)
    if socket.family == AF_INET6:
        socket.setsockopt(IPPROTO_IPV6, _IPV6_MINHOPCOUNT, least)


def owner_of(socket: _socket.socket) -> int:
    """The user that a socket belongs to."""
    return os.fstat(socket.fileno()).st_uid


def _give(socket: _socket.socket, owner: int) -> int:
    """Make a socket this user's. Returns the owner before. Raises OSError."""
    before = owner_of(socket)
    if before != owner:
        os.fchown(socket.fileno(), owner, -1)
    return before


def is_on_both_families(socket: _socket.socket, host: str) -> bool:
    """Whether a socket serves both families when it is bound to this address."""
    return host == _EVERY_SIX and socket.family == AF_INET6 and not socket.getsockopt(IPPROTO_IPV6, IPV6_V6ONLY)


def host_of(socket: _socket.socket, host: str = "") -> str:
    """The address that a socket is bound to, or is to be: `*` for both families, a mapped IPv4 one in its own form."""
    host = host or socket.getsockname()[0]
    if is_on_both_families(socket, host):
        return "*"
    return host.removeprefix("::ffff:") if "." in host else host


def overlap(one: str, other: str) -> bool:
    """Whether two addresses, `*` for both families, have one in common."""
    if "*" in (one, other) or one == other:
        return True
    return (":" in one) == (":" in other) and not {one, other}.isdisjoint((_EVERY_FOUR, _EVERY_SIX))


def new_socket(family: int, kind: int = SOCK_STREAM) -> _socket.socket:
    """A socket that becomes none of the standard streams."""
    socket = _socket.socket(family, kind)
    if socket.fileno() >= _FIRST_FREE_FD:
        return socket
    fd = fcntl.fcntl(socket.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    socket.close()
    return _socket.socket(family, kind, 0, fd)
