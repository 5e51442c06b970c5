"""A listener in front of another one on the same IPv4 address and number, so that a server is replaced without a lost request.

Two starts that share one listener both accept from it, and the old start may be told to end when it has just accepted. So the
new start gets a listener of its own, and clients go to the old listener until the new start waits for them. The kernel decides
which listener gets a connection: compute_score() and inet_lhash2_lookup() in net/ipv4/inet_hashtables.c.

- A listener that is bound to the device comes before one that is not. So the old one is bound to the loopback device before
  the new one listens, and gets all clients as before.
- Of two equal listeners, the one that began to listen later comes first. So when the new one is bound to the device, too, it
  gets all further clients at once. The old one keeps the clients in its queue.

The new one has to share with the old one until it listens. In that time another rule comes first: the lookup ends at the
newest listener that shares (inet_lookup_reuseport()). A client would go to the new one, and be lost if its server failed. So
the new one begins deaf, and shares no more as soon as it listens. A client that connects between these two system calls tries
again after a second, which TCP does by itself.

A process may bind a socket to a device once, and only root can undo it. So we do it for loopback addresses alone, to which no
other device leads. IPv6 listeners are in another order, and unix sockets have one listener for a name.
"""

from __future__ import annotations

import _socket
import fcntl
import os

from portexec.binding.guard import DEVICE_SIZE, Flip, make_deaf
from portexec.binding.listeners import Bound, Listener, tcp_socket
from portexec.errors import CloseOnError, reason
from portexec.kernel import STDERR

_LOOPBACK = b"lo"
_LOOPBACK_NET = "127."


class Succession:
    """The listeners of a new start. It owns those that are the new start's alone, until they replace the old ones.

    `why_not` says, by name, why a listener is shared with the old start. `elders` are duplicates of the old listeners.
    """

    def __init__(self, bound: Bound) -> None:
        self.why_not: dict[str, str] = {}
        self.elders: list[_socket.socket] = []
        self._bound = bound
        self.listeners = [self._successor(listener) or listener for listener in bound.listeners]

    def _successor(self, listener: Listener) -> Listener | None:
        why = _why_not(listener)
        if not why:
            try:
                return listener.changed(socket=self._in_front_of(listener))
            except OSError as error:
                why = reason(error)
        self.why_not[listener.name] = why
        return None

    def _in_front_of(self, listener: Listener) -> _socket.socket:
        old = listener.socket
        assert old is not None  # noqa: S101  # _why_not() has seen it
        _bind_to_loopback(old)
        address = old.getsockname()
        socket = tcp_socket(_socket.AF_INET)
        others = self._bound.sockets_on(listener.port)
        beside = [old, *self._bound.elders_at(address)]
        with CloseOnError(socket), Flip(self._bound.guards[listener.port], socket, address[0], lambda _: others, beside):
            socket.bind(address)
            make_deaf(socket)
            socket.listen(self._bound.backlog)
            socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT, 0)
            make_deaf(socket, is_deaf=False)
            self.elders.append(_duplicate(old))
        return socket

    def own(self) -> list[tuple[Listener, Listener]]:
        """The old and the new listener, for each that the new start has for itself."""
        return [(old, new) for old, new in zip(self._bound.listeners, self.listeners, strict=True) if new is not old]

    def descriptors(self) -> dict[int, int]:
        """The descriptors of the new listeners, by those of the old ones."""
        return {_fileno(old): _fileno(new) for old, new in self.own()}

    def take_clients(self) -> None:
        """Let further clients come to the new listeners. A second call does nothing."""
        for _, new in self.own():
            if new.socket is not None:
                _bind_to_loopback(new.socket)

    def finish(self) -> None:
        """Put the new sockets in the place of the old ones, under their descriptors. The old ones become elders."""
        for old, new in self.own():
            assert new.socket is not None  # noqa: S101
            os.dup2(new.socket.fileno(), _fileno(old), inheritable=False)
            new.socket.close()
        self._bound.elders += self.elders
        self.listeners = list(self._bound.listeners)

    def forget_elders(self) -> None:
        """Close them: their server has ended."""
        for elder in self.elders:
            if elder in self._bound.elders:
                self._bound.elders.remove(elder)
            elder.close()
        self.elders.clear()

    def close(self) -> None:
        """Give up the new listeners: their server has failed."""
        for _, new in self.own():
            if new.socket is not None:
                new.socket.close()
        self.forget_elders()


def _why_not(listener: Listener) -> str:
    """Why a start cannot have this listener for itself."""
    socket = listener.socket
    if listener.kind != "tcp" or socket is None:
        return f"{listener.kind} sockets have one owner for a name"
    if socket.family != _socket.AF_INET:
        return "the kernel puts a new IPv6 listener behind an old one"
    if not socket.getsockname()[0].startswith(_LOOPBACK_NET):
        return "clients come from other devices than the loopback one"
    return ""


def _bind_to_loopback(socket: _socket.socket) -> None:
    """Bind it to the loopback device, unless it is bound already: only root may do so twice. Raises OSError."""
    if socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_BINDTODEVICE, DEVICE_SIZE).rstrip(b"\0") != _LOOPBACK:
        socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_BINDTODEVICE, _LOOPBACK)


def _fileno(listener: Listener) -> int:
    return -1 if listener.socket is None else listener.socket.fileno()


def _duplicate(socket: _socket.socket) -> _socket.socket:
    fd = fcntl.fcntl(socket.fileno(), fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
    return _socket.socket(socket.family, socket.type, socket.proto, fd)
