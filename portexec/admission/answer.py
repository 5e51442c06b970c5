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
import select
import sys
import time

from portexec import kernel
from portexec.admission import seccomp
from portexec.binding import tables
from portexec.binding.guard import IPPROTO_MPTCP, Flip, Guard, can_flip, listen_past
from portexec.binding.listeners import covers
from portexec.parent.loop import first, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONTINUE: int | None = None  # the answer that lets the kernel go on; any other is an errno, 0 for success

_SO_COOKIE = 57
_SO_NETNS_COOKIE = 71  # Linux 5.14
_MAX_SOCKADDR = 128  # struct sockaddr_storage; the kernel refuses longer ones
_FAMILIES = (_socket.AF_UNSPEC, _socket.AF_INET, _socket.AF_INET6)  # bind(2) takes 0 for AF_INET, for old programs
_REFUSED = (errno.EPERM, errno.EACCES)
_GATE_TIME = 1.0  # seconds from bind(2) or listen(2) until the listener must have shown
_GATE_POLL = 0.002  # seconds between two looks for it


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

    The caller owns `notify_fd` and the guards, and runs `answer`.
    """

    def __init__(self, notify_fd: int, guards: Mapping[int, Guard], remap: Mapping[int, int], observer: Observer) -> None:
        self.notify_fd = notify_fd
        self._notifications = select.poll()
        self._notifications.register(notify_fd, select.POLLIN)
        self.guards = guards
        self.remap = remap
        self.observer = observer
        self.was_gated = False  # whether anything had to be gated so far
        self._admitted: dict[int, set[int]] = {port: set() for port in guards}  # inodes of the command's own listeners
        self._sharing: dict[int, str] = {}  # those among them that have SO_REUSEPORT by themselves, and their addresses
        self._gates: dict[int, tuple[float, set[int]]] = {}  # when each closes, and the listeners from before
        self._unheard: set[tuple[int, bytes]] = set()  # binds that were made, but whose caller a signal had taken away
        # Before Linux 5.19 a signal can take it away after the answer, too, and the call comes again.
        self._is_heard_for_good = seccomp.has_flags(seccomp.FLAG_NEW_LISTENER | seccomp.FLAG_WAIT_KILLABLE_RECV)

    async def answer(self) -> None:
        """Answer until nothing is left that could ask: POLLHUP says so."""
        while True:
            if self._gates:
                await first(readable(self.notify_fd), within=_GATE_POLL)
            else:
                await readable(self.notify_fd)
            self.serve()
            self._look_at_gates()
            if self._is_over():
                return

    def serve(self) -> None:
        """Answer all that is pending now. What arrives meanwhile is received first: only then can no signal interrupt it."""
        pending: list[seccomp.Notification] = []
        while True:
            while self._poll() & select.POLLIN:
                notification = seccomp.receive(self.notify_fd)
                if notification is not None:
                    pending.append(notification)
            if not pending:
                return
            self._handle(pending.pop(0))

    def _is_over(self) -> bool:
        return self._poll() == select.POLLHUP

    def _poll(self) -> int:
        return next((found for _, found in self._notifications.poll(0)), 0)

    def _handle(self, notification: seccomp.Notification) -> None:
        try:
            code, made = self._decide(notification)
        except Exception:
            code, made = CONTINUE, None
        heard = seccomp.answer(self.notify_fd, notification.id, code)
        if made is not None and not (heard and self._is_heard_for_good):
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
        guard = self._guard_for(notification, socket, port)
        if guard is None:
            return CONTINUE, None
        made = (int.from_bytes(socket.getsockopt(_socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder), address)
        if made in self._unheard:
            self._unheard.discard(made)
            return 0, made
        if _port_of(socket):
            return CONTINUE, None  # a second bind: the kernel's to refuse
        if not can_flip(guard, socket):
            return self._open_gates([port]), None
        code = self._bind_past(guard, socket, address)
        return code, made if code == 0 else None

    def _bind_past(self, guard: Guard, socket: _socket.socket, address: bytes) -> int:
        if self._shares_unasked(socket, guard.port, address):
            return errno.EADDRINUSE
        try:
            with Flip(guard, socket):
                kernel.bind(socket.fileno(), address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self._report_strangers(guard.port)
            return error.errno or errno.EADDRINUSE
        return 0

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
        if port and port not in self.guards and _same_network(socket, next(iter(self.guards.values()))):
            self.observer.elsewhere(port)
        guard = self._guard_for(notification, socket, port)
        if guard is None:
            return CONTINUE
        return self._listen_past(guard, socket, backlog) if can_flip(guard, socket) else self._open_gates([port])

    def _listen_past(self, guard: Guard, socket: _socket.socket, backlog: int) -> int:
        try:
            listen_past(guard, socket, lambda: kernel.listen(socket.fileno(), backlog))
        except OSError as error:
            if socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
                socket.shutdown(_socket.SHUT_RDWR)
            self._report_strangers(guard.port)
            return error.errno or errno.EADDRINUSE
        if self._report_strangers(guard.port, socket):
            # Never two servers on one number in silence: take the listen back, which leaves the socket bound.
            socket.shutdown(_socket.SHUT_RDWR)
            return errno.EADDRINUSE
        inode = os.fstat(socket.fileno()).st_ino
        host = _host_of(socket.getsockname()[0], socket)
        self._admitted[guard.port].add(inode)
        if socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT):
            self._sharing[inode] = host
        self.observer.listening(guard.port, host)
        return 0

    def _guard_for(self, notification: seccomp.Notification, socket: _socket.socket, port: int) -> Guard | None:
        """The guard that a call is to get past; None when it is not about a number of ours, or its caller has gone."""
        guard = self.guards.get(port)
        if guard is None or not _is_tcp(socket) or not _same_network(socket, guard):
            return None
        return guard if seccomp.is_waiting(self.notify_fd, notification.id) else None

    def _shares_unasked(self, socket: _socket.socket, port: int, address: bytes) -> bool:
        """Whether the flip would let a socket without SO_REUSEPORT join a listener of the command that has it.

        The kernel would refuse that without us, and afterwards they would share the clients in silence.
        """
        if not self._sharing or socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEPORT):
            return False
        at, length = (8, 16) if socket.family == _socket.AF_INET6 else (4, 4)
        host = _host_of(_socket.inet_ntop(socket.family, address[at : at + length].ljust(length, b"\0")), socket)
        alive = tables.listening_inodes(port)
        return any(_overlap(host, other) for inode, other in self._sharing.items() if inode in alive)

    def _report_strangers(self, port: int, socket: _socket.socket | None = None) -> bool:
        """Whether somebody listens on the number who is neither `socket` nor a listener of the command; report them."""
        own = {os.fstat(socket.fileno()).st_ino} if socket is not None else set()
        strangers = tables.listening_inodes(port) - self._admitted[port] - own
        for inode in strangers:
            owner = tables.process_of(inode)
            self.observer.in_the_way(
                port, f"pid {owner[0]}, {owner[1]}" if owner else "a process that has ended, or that /proc does not show"
            )
        return bool(strangers)

    def _gate_if_refused(self, error: OSError, ports: Iterable[int]) -> int | None:
        return self._open_gates(ports) if error.errno in _REFUSED else CONTINUE

    def _open_gates(self, ports: Iterable[int]) -> int | None:
        """Let the kernel's own bind or listen pass, if the command's socket has SO_REUSEADDR. Returns CONTINUE."""
        self.was_gated = True
        for port in ports:
            before = self._gates[port][1] if port in self._gates else tables.listening_inodes(port)
            self._gates[port] = (time.monotonic() + _GATE_TIME, before)
            self.guards[port].set(_socket.SO_REUSEADDR, 1)
        return CONTINUE

    def _look_at_gates(self) -> None:
        """Close each gate whose listener has shown, or whose time is over."""
        for port, (end, before) in list(self._gates.items()):
            new = tables.listening_inodes(port) - before
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
        self.guards[port].set(_socket.SO_REUSEADDR, 0)
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
        and socket.proto in (_socket.IPPROTO_TCP, IPPROTO_MPTCP)
    )


def _same_network(socket: _socket.socket, guard: Guard) -> bool:
    """Whether both sockets are in one network namespace: elsewhere the number is another's."""
    try:
        cookies = [s.getsockopt(_socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8) for s in (socket, *guard.sockets[:1])]
    except OSError:
        return True  # before Linux 5.14; a bind in another namespace then fails with EADDRINUSE at the worst
    return len(set(cookies)) == 1


def _port_of(socket: _socket.socket) -> int:
    return int(socket.getsockname()[1])


def _host_of(host: str, socket: _socket.socket) -> str:
    """The address a socket is bound to: `*` for both families, an IPv4 one in its own form."""
    if host == "::" and not socket.getsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY):
        return "*"
    return host.removeprefix("::ffff:") if "." in host else host


def _overlap(one: str, other: str) -> bool:
    return covers(one, other) or covers(other, one)
