"""Answers the notifications: each bind(2) and listen(2) below the command comes here before the kernel acts on it.

A TCP socket that goes for a number of ours is *proxied*: we take a duplicate of the command's own socket (pidfd_getfd(2)), make
the call on it beside the guard, by the flip of `sockets`, and answer with the result. Binding is a property of the socket and
not of the process, so options, dup'ed descriptors, epoll registrations, IPV6_V6ONLY and workers behave as ever.
Where a duplicate or the caller's memory is refused (a container's profile, Yama, a process that is not dumpable, another
user's socket) it is *gated*: the guard takes SO_REUSEADDR from the command's bind until its listener shows, and the kernel
goes on by itself.
Whatever is not ours goes on in the kernel untouched, and so does everything about which we fail to find out: an exception
here never makes a bind fail.
"""

from __future__ import annotations

import _socket
import errno
import os
import sys
import time

from portexec import tcp_table
from portexec.sockets import Flip
from portexec.supervisor import seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

CONTINUE: int | None = None  # the answer that lets the kernel go on; any other is an errno, 0 for success

_SO_COOKIE = 57
_SO_NETNS_COOKIE = 71  # Linux 5.14
_IPPROTO_MPTCP = 262
_MAX_SOCKADDR = 128  # struct sockaddr_storage; the kernel refuses longer ones
_FAMILIES = (_socket.AF_UNSPEC, _socket.AF_INET, _socket.AF_INET6)  # bind(2) takes 0 for AF_INET, for old programs
_REFUSED = (errno.EPERM, errno.EACCES)
_GATE_TIME = 1.0  # seconds from bind(2) or listen(2) until the listener must have shown
GATE_POLL = 0.002  # seconds between two looks for it


class Observer:
    """What admission has to tell. Every method may be called often; whoever overrides them decides what is said, and once."""

    def listening(self, port: int, host: str) -> None:
        """The command listens on a number of ours, at this address; the address is empty where it could not be seen."""

    def elsewhere(self, port: int) -> None:
        """The command listens on a number that is not ours."""

    def in_the_way(self, port: int, owner: str) -> None:
        """Somebody else's listener is on a number of ours; the command got EADDRINUSE."""


class Admission:
    """The state of one command's admission: which numbers are ours, who listens on them, which gates are open.

    The caller owns `notify_fd` and the guards, and calls `serve` when the former is readable and `look_at_gates` every
    GATE_POLL seconds while `has_open_gate`.
    """

    def __init__(
        self, notify_fd: int, guards: Mapping[int, _socket.socket], remap: Mapping[int, int], observer: Observer
    ) -> None:
        self.notify_fd = notify_fd
        self.guards = guards
        self.remap = remap
        self.observer = observer
        self.was_gated = False  # whether anything had to be gated so far
        self._admitted: dict[int, set[int]] = {port: set() for port in guards}  # inodes of the command's own listeners
        self._gates: dict[int, tuple[float, set[int]]] = {}  # when each closes, and the listeners from before
        self._unheard: set[tuple[int, bytes]] = set()  # binds that were made, but whose caller a signal had taken away

    @property
    def has_open_gate(self) -> bool:
        return bool(self._gates)

    def serve(self, is_readable: Callable[[], bool]) -> None:
        """Answer all that is pending. What arrives meanwhile is received first: only then can no signal interrupt it."""
        pending: list[seccomp.Notification] = []
        while True:
            while is_readable():
                notification = seccomp.receive(self.notify_fd)
                if notification is not None:
                    pending.append(notification)
            if not pending:
                return
            self._handle(pending.pop(0))

    def _handle(self, notification: seccomp.Notification) -> None:
        try:
            code, made = self._decide(notification)
        except Exception:
            code, made = CONTINUE, None
        heard = seccomp.answer(self.notify_fd, notification.id, code)
        if made is not None and not heard:
            self._unheard.add(made)

    def _decide(self, notification: seccomp.Notification) -> tuple[int | None, tuple[int, bytes] | None]:
        """What to answer, and what was bound by that: the socket's cookie and the address."""
        machine = seccomp.machine_of(notification)
        if machine is None:
            return CONTINUE, None
        call, arguments = _call_of(notification, machine)
        if call == seccomp.BIND:
            return self._bind(notification, *arguments)
        return self._listen(notification, *arguments), None

    def _bind(
        self, notification: seccomp.Notification, fd: int, pointer: int, length: int
    ) -> tuple[int | None, tuple[int, bytes] | None]:
        if length > _MAX_SOCKADDR:
            return CONTINUE, None
        try:
            address = _read_memory(notification.thread, pointer, length)
        except OSError as error:
            return self._gate_if_refused(error, self.guards), None
        asked = int.from_bytes(address[2:4], "big")
        port = self.remap.get(asked, asked)
        if int.from_bytes(address[:2], sys.byteorder) not in _FAMILIES or port not in self.guards:
            return CONTINUE, None
        try:
            socket = _duplicate(notification, fd)
        except OSError as error:
            return self._gate_if_refused(error, [port]), None
        try:
            return self._bind_socket(notification, socket, port, address[:2] + port.to_bytes(2, "big") + address[4:])
        finally:
            socket.close()

    def _bind_socket(
        self, notification: seccomp.Notification, socket: _socket.socket, port: int, address: bytes
    ) -> tuple[int | None, tuple[int, bytes] | None]:
        guard = self.guards[port]
        if not _is_tcp(socket) or not _same_network(socket, guard) or not self._still_waits(notification):
            return CONTINUE, None
        made = (int.from_bytes(socket.getsockopt(_socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder), address)
        if made in self._unheard:
            self._unheard.discard(made)
            return 0, made
        if _port_of(socket):
            return CONTINUE, None  # a second bind: the kernel's to refuse
        if not _may_share(socket, guard):
            return self._open_gates([port]), None
        with Flip(guard, socket, port):
            code = seccomp.bind(socket.fileno(), address)
        if code == errno.EADDRINUSE:
            self._report_strangers(port)
        return code, made if code == 0 else None

    def _listen(self, notification: seccomp.Notification, fd: int, backlog: int) -> int | None:
        try:
            socket = _duplicate(notification, fd)
        except OSError as error:
            return self._gate_if_refused(error, self.guards)
        try:
            return self._listen_socket(notification, socket, backlog)
        finally:
            socket.close()

    def _listen_socket(self, notification: seccomp.Notification, socket: _socket.socket, backlog: int) -> int | None:
        if not _is_tcp(socket) or socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
            return CONTINUE
        port = _port_of(socket)
        guard = self.guards.get(port)
        if guard is None or not _same_network(socket, guard):
            if port:
                self.observer.elsewhere(port)
            return CONTINUE
        if not self._still_waits(notification):
            return CONTINUE
        if not _may_share(socket, guard):
            return self._open_gates([port])
        with Flip(guard, socket, port):
            code = seccomp.listen(socket.fileno(), backlog)
        if self._report_strangers(port, socket) and code == 0:
            # Never two servers on one number in silence: take the listen back, which leaves the socket bound.
            socket.shutdown(_socket.SHUT_RDWR)
            return errno.EADDRINUSE
        if code == 0:
            self._admitted[port].add(os.fstat(socket.fileno()).st_ino)
            self.observer.listening(port, _host_of(socket))
        return code

    def _report_strangers(self, port: int, socket: _socket.socket | None = None) -> bool:
        """Whether somebody listens on the number who is neither `socket` nor a listener of the command; report them."""
        own = {os.fstat(socket.fileno()).st_ino} if socket is not None else set()
        strangers = tcp_table.listening_inodes(port) - self._admitted[port] - own
        for inode in strangers:
            owner = tcp_table.process_of(inode)
            self.observer.in_the_way(port, f"pid {owner[0]}, {owner[1]}" if owner else "a process that has ended")
        return bool(strangers)

    def _still_waits(self, notification: seccomp.Notification) -> bool:
        return seccomp.is_waiting(self.notify_fd, notification.id)

    def _gate_if_refused(self, error: OSError, ports: Iterable[int]) -> int | None:
        return self._open_gates(ports) if error.errno in _REFUSED else CONTINUE

    def _open_gates(self, ports: Iterable[int]) -> int | None:
        """Let the kernel's own bind or listen pass, if the command's socket has SO_REUSEADDR. Returns CONTINUE."""
        self.was_gated = True
        for port in ports:
            before = self._gates[port][1] if port in self._gates else tcp_table.listening_inodes(port)
            self._gates[port] = (time.monotonic() + _GATE_TIME, before)
            self.guards[port].setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        return CONTINUE

    def look_at_gates(self) -> None:
        """Close each gate whose listener has shown, or whose time is over."""
        for port, (end, before) in list(self._gates.items()):
            new = tcp_table.listening_inodes(port) - before
            if new or time.monotonic() > end:
                self._close_gate(port)
            if new:
                self._admitted[port] |= new
                self.observer.listening(port, "")

    def close_gates(self) -> None:
        """Close them all, whoever waits."""
        for port in list(self._gates):
            self._close_gate(port)

    def _close_gate(self, port: int) -> None:
        self.guards[port].setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 0)
        del self._gates[port]


def _call_of(notification: seccomp.Notification, machine: seccomp.Machine) -> tuple[str, tuple[int, ...]]:
    """BIND with descriptor, pointer and length, or LISTEN with descriptor and backlog."""
    arguments = notification.args
    call = seccomp.BIND if notification.nr == machine.bind else seccomp.LISTEN
    if machine.socketcall and notification.nr == machine.socketcall:
        call = seccomp.BIND if arguments[0] == seccomp.SOCKETCALL_BIND else seccomp.LISTEN
        words = _read_memory(notification.thread, arguments[1], 3 * machine.word)
        arguments = tuple(
            int.from_bytes(words[at : at + machine.word], sys.byteorder) for at in range(0, len(words), machine.word)
        )
    fd, second, third = _as_int(arguments[0]), arguments[1], arguments[2]
    return (call, (fd, second, third & 0xFFFFFFFF)) if call == seccomp.BIND else (call, (fd, _as_int(second)))


def _as_int(value: int) -> int:
    """The C int in the low half of a register."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low & 0x80000000 else low


def _read_memory(thread: int, address: int, length: int) -> bytes:
    """Read the memory of the caller. Raises OSError; EFAULT when there is less than that to read."""
    fd = os.open(f"/proc/{thread}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, length, address)
    except OverflowError:
        data = b""
    finally:
        os.close(fd)
    if len(data) < length:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data


def _duplicate(notification: seccomp.Notification, fd: int) -> _socket.socket:
    """The caller's own socket, as a duplicate that we have to close. Raises OSError, ENOTSOCK for other files."""
    duplicate = seccomp.duplicate(notification.thread, fd)
    try:
        return _socket.socket(-1, -1, -1, duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _is_tcp(socket: _socket.socket) -> bool:
    return (
        socket.family in (_socket.AF_INET, _socket.AF_INET6)
        and socket.type == _socket.SOCK_STREAM
        and socket.proto in (_socket.IPPROTO_TCP, _IPPROTO_MPTCP)
    )


def _same_network(socket: _socket.socket, guard: _socket.socket) -> bool:
    """Whether both sockets are in one network namespace: elsewhere the number is another's."""
    try:
        cookies = [s.getsockopt(_socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8) for s in (socket, guard)]
    except OSError:
        return True  # before Linux 5.14; a bind in another namespace then fails with EADDRINUSE at the worst
    return cookies[0] == cookies[1]


def _may_share(socket: _socket.socket, guard: _socket.socket) -> bool:
    """Whether the flip can work: the kernel shares SO_REUSEPORT within one user, and only root can change a socket's."""
    return os.geteuid() == 0 or os.fstat(socket.fileno()).st_uid == os.fstat(guard.fileno()).st_uid


def _port_of(socket: _socket.socket) -> int:
    return int(socket.getsockname()[1])


def _host_of(socket: _socket.socket) -> str:
    host = str(socket.getsockname()[0])
    if host == "::" and not socket.getsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY):
        return "*"
    return host
