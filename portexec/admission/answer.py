"""Answers the notifications: each bind(2) and listen(2) below the command comes here before the kernel acts on it.

A TCP socket that goes for a number of ours is *proxied*. We take a duplicate of the command's own socket (pidfd_getfd(2)). We
make the call on it beside the guard, by the flip of `binding.guard`, and answer with the result. A socket is bound, and not a
process, so options, dup'ed descriptors, epoll registrations, IPV6_V6ONLY and workers behave as ever.

A socket is *gated* (see `gates`) where we get no duplicate, and where the socket is another user's. We get none under some
containers' profiles, under Yama, of a process that is not dumpable, and, before Linux 6.9, of a thread with descriptors of its
own.

A call that is not about a number of ours goes on in the kernel untouched. So does a call when we cannot find out what it is
about: an exception here never makes a bind fail.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import sys

from portexec import kernel
from portexec.admission import gates, seccomp
from portexec.admission.own import NOWHERE, Others, Own
from portexec.admission.settle import Settling
from portexec.binding import tables
from portexec.binding.guard import IPPROTO_MPTCP, Flip, Guard, Traits, can_flip, host_of
from portexec.parent.loop import first, readable
from portexec.procfs import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONTINUE: int | None = None  # the answer that lets the kernel go on; any other is an errno, 0 for success

_SO_COOKIE = 57
_SO_NETNS_COOKIE = 71  # Linux 5.14
_MAX_SOCKADDR = 128  # struct sockaddr_storage; the kernel refuses longer ones
_LENGTHS = (16, 28, _MAX_SOCKADDR)  # of the addresses that programs give for a TCP socket: struct sockaddr_in, _in6, _storage
_FAMILIES = (_socket.AF_UNSPEC, _socket.AF_INET, _socket.AF_INET6)  # bind(2) takes 0 for AF_INET, for old programs
_MAX_UNHEARD = 64

# What keeps the caller's memory or its socket from us: a rule (EPERM, EACCES), /proc that hides a process (ENOENT), a profile
# (ENOSYS), or a thread with descriptors of its own (ESRCH).
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOSYS, errno.ESRCH)


class Observer:
    """What admission has to tell. Every method may be called often; a subclass decides what is said, and says it once."""

    def tried(self, port: int) -> None:
        """The command has tried to bind this number, or to listen on it; 0 is any that the system chooses."""

    def listened(self, port: int, host: str) -> None:
        """The command has called listen(2) for this number, at this address, if only to see whether the number is free."""

    def listening(self, port: int, host: str) -> None:
        """The command serves on a number of ours, at this address; the address is empty where it could not be seen."""

    def elsewhere(self, port: int) -> None:
        """The command serves on a number that is not ours."""

    def opened_ring(self) -> None:
        """The command can make calls by io_uring, which nobody sees."""

    def in_the_way(self, port: int, owner: str) -> None:
        """Somebody else's listener is on a number of ours. The command got EADDRINUSE, unless its call was gated."""

    def not_clean(self, port: int) -> None:
        """Until the next scrub or wash, a process of the command's user with SO_REUSEPORT can share this number."""


class Admission:
    """The state of one command's admission: which numbers are ours, whose sockets are on them, which gates are open.

    The caller owns `notify_fd` and the guards, and lets `answer` run. `was_gated`: a socket has been gated, and `why_gated`
    says why.
    """

    def __init__(self, notify_fd: int, guards: Mapping[int, Guard], remap: Mapping[int, int], observer: Observer) -> None:
        self.notify_fd = notify_fd
        self.guards = guards
        self.remap = remap
        self.observer = observer
        self.was_gated = False
        self.why_gated = ""
        self._threads = seccomp.Threads()
        self._own = {port: Own(port, self._threads) for port in guards}
        self._network = _network_of(next(iter(guards.values())).socket) if guards else b""
        self._gates = gates.Gates()
        self._settling = Settling()
        self._poll = select.poll()
        self._poll.register(notify_fd, select.POLLIN)
        # Binds that were made, but of whose answer the caller did not hear because of a signal; a dict for its order.
        self._unheard: dict[tuple[int, bytes], None] = {}
        # Before Linux 5.19 a signal can take the caller away after the answer, too, and the call comes again.
        self._is_heard_for_good = seccomp.has_flags(seccomp.FLAG_NEW_LISTENER | seccomp.FLAG_WAIT_KILLABLE_RECV)
        seccomp.wake_at_once(notify_fd)
        for guard in guards.values():
            guard.is_tidy = False  # an earlier start, in another process, may have left something

    async def answer(self) -> None:
        """Answer until nothing is left below the filter."""
        found = 0
        while not found & select.POLLHUP:
            if self._gates:
                await first(readable(self.notify_fd), within=gates.PAUSE)
                found = self._found()
            else:
                found = await readable(self.notify_fd)
            self.serve()
            self._look_behind(self._gates.close_left() if self._gates else ())
        self.close_gates()
        self._threads.close()
        for guard in self.guards.values():
            guard.tidy(guard.last_owner)

    def serve(self) -> None:
        """Answer all calls that are pending. Calls that arrive meanwhile are received first: then no signal interrupts them.

        This ends, however fast the command calls: later calls wait, because the loop has other tasks, too.
        Another task may have served before, so that nothing is pending. To receive would block then, so a poll comes first.
        """
        pending = self._received()
        for _ in range(len(pending)):
            self._handle(pending.pop(0))
            pending += self._received()
        for notification in pending:
            self._handle(notification)

    def _received(self) -> list[seccomp.Notification]:
        received = []
        while self._found() & select.POLLIN:
            notification = seccomp.receive(self.notify_fd)
            if notification is not None:
                received.append(notification)
        return received

    def descriptors(self) -> set[int]:
        """The descriptors that answering needs, without those of the guards."""
        return {self.notify_fd, *self._threads.descriptors()}

    def close(self) -> None:
        """Answer no more."""
        for fd in self.descriptors():
            os.close(fd)

    def close_gates(self) -> None:
        """Close all gates, also those whose call goes on."""
        self._gates.close_all()

    def _found(self) -> int:
        found = self._poll.poll(0)
        return found[0][1] if found else 0

    def _handle(self, notification: seccomp.Notification) -> None:
        try:
            if self._gates:
                self._look_behind(self._gates.close_left(notification.thread))
            code, made = self._decide(notification)
        except Exception:
            code, made = CONTINUE, None
        heard = seccomp.answer(self.notify_fd, notification.id, code)
        if made is not None and not (heard and self._is_heard_for_good):
            self._unheard[made] = None
            if len(self._unheard) > _MAX_UNHEARD:
                del self._unheard[next(iter(self._unheard))]

    def _decide(self, notification: seccomp.Notification) -> tuple[int | None, tuple[int, bytes] | None]:
        """What to answer; and what we have bound, if we have: the socket's cookie and the address."""
        machine = seccomp.machine_of(notification)
        if machine is None:
            return CONTINUE, None
        call, arguments = _call_of(notification, machine)
        if call == seccomp.RING:
            self.observer.opened_ring()
            return CONTINUE, None
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
            return self._gate_unread(notification, fd, length, error), None
        asked = int.from_bytes(address[2:4], "big")
        port = self.remap.get(asked, asked)
        if not self._concerns_us(address, port):
            return CONTINUE, None
        try:
            socket = self._duplicate(notification, fd)
        except OSError as error:
            if asked != port:
                return CONTINUE, None  # only on a duplicate could we bind another number
            return self._gate(notification, fd, [port], _why_refused("pidfd_getfd(2)", error)), None
        try:
            return self._bind_socket(notification, fd, socket, port, address[:2] + port.to_bytes(2, "big") + address[4:])
        finally:
            socket.close()

    def _concerns_us(self, address: bytes, port: int) -> bool:
        if int.from_bytes(address[:2], sys.byteorder) not in _FAMILIES:
            return False
        self.observer.tried(port)
        return port in self.guards

    def _bind_socket(
        self, notification: seccomp.Notification, fd: int, socket: _socket.socket, port: int, address: bytes
    ) -> tuple[int | None, tuple[int, bytes] | None]:
        guard = self._guard_for(notification, socket, port)
        if guard is None:
            return CONTINUE, None
        made = (int.from_bytes(socket.getsockopt(_socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder), address)
        if made in self._unheard:
            del self._unheard[made]
            return 0, made
        if _port_of(socket) and (code := _errno_of_bind(socket, address)) != errno.EADDRINUSE:
            return code, None  # it is bound already
        traits = Traits(socket)
        if not can_flip(guard, traits.owner):
            return self._gate(notification, fd, [port], "the socket is another user's"), None
        self._own[port].place(traits.inode, notification.thread, fd)
        code = self._bind_past(guard, socket, traits, address)
        if code == 0:
            self._take_up(notification, fd, socket, traits, port)
        return code, made if code == 0 else None

    def _bind_past(self, guard: Guard, socket: _socket.socket, traits: Traits, address: bytes) -> int:
        host = _host_in(address, socket)
        own = self._own[guard.port]
        if own.joins(traits, host_of(socket, host), is_tidy=guard.is_tidy):
            return errno.EADDRINUSE
        try:
            with Others(own, traits.inode) as others, Flip(guard, socket, host, others, traits=traits) as flip:
                kernel.bind(socket.fileno(), address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self._report_strangers(guard.port, own.strangers(tables.listeners_on(guard.port)))
            return error.errno or errno.EADDRINUSE
        if not flip.is_clean:
            self.observer.not_clean(guard.port)
        return 0

    def _listen(self, notification: seccomp.Notification, fd: int, backlog: int) -> int | None:
        try:
            socket = self._duplicate(notification, fd)
        except OSError as error:
            return self._gate(notification, fd, self.guards, _why_refused("pidfd_getfd(2)", error), is_bind=False)
        try:
            return self._listen_socket(notification, fd, socket, backlog)
        finally:
            socket.close()

    def _listen_socket(self, notification: seccomp.Notification, fd: int, socket: _socket.socket, backlog: int) -> int | None:
        if not _is_tcp(socket) or socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN):
            return CONTINUE
        (host, port, *_), traits = socket.getsockname(), Traits(socket)
        self.observer.tried(port)
        if port and port not in self.guards and _network_of(socket) == self._network:
            self.observer.listened(port, host_of(socket, host))
            self._settling.add(notification.thread, port, traits.inode, lambda: self.observer.elsewhere(port))
        guard = self._guard_for(notification, socket, port)
        if guard is None:
            return CONTINUE
        if not can_flip(guard, traits.owner):
            return self._gate(notification, fd, [port], "the socket is another user's", is_bind=False)
        self._own[port].place(traits.inode, notification.thread, fd)
        # Before the call, whatever its result: if our own code fails, the kernel's listen follows, and has to be noticed, too.
        self._notice(notification.thread, port, traits.inode, host_of(socket, host))
        code = self._listen_past(guard, socket, host, traits, backlog)
        if code == 0:
            self._take_up(notification, fd, socket, traits, port)
            self.observer.listened(port, host_of(socket, host))
        return code

    def _notice(self, thread: int, port: int, inode: int, host: str) -> None:
        """Tell of a listener, if it is a server's."""
        self._settling.add(thread, port, inode, lambda: self.observer.listening(port, host))

    def _listen_past(self, guard: Guard, socket: _socket.socket, host: str, traits: Traits, backlog: int) -> int:
        own = self._own[guard.port]
        try:
            with Others(own, traits.inode) as others, Flip(guard, socket, host, others, traits=traits) as flip:
                kernel.listen(socket.fileno(), backlog)
        except OSError as error:
            self._report_strangers(guard.port, own.strangers(tables.listeners_on(guard.port)))
            return error.errno or errno.EADDRINUSE
        if self._report_strangers(guard.port, own.strangers(tables.listeners_on(guard.port), traits.inode)):
            # Never two servers on one number in silence: take the listen back, which leaves the socket bound.
            socket.shutdown(_socket.SHUT_RDWR)
            return errno.EADDRINUSE
        if not flip.is_clean:
            self.observer.not_clean(guard.port)
        return 0

    def _take_up(self, notification: seccomp.Notification, fd: int, socket: _socket.socket, traits: Traits, port: int) -> None:
        self._own[port].add(traits.inode, notification.thread, fd, host_of(socket), shares=traits.shares)

    def _duplicate(self, notification: seccomp.Notification, fd: int) -> _socket.socket:
        """The caller's own socket, as a duplicate that we have to close. Raises OSError, ENOTSOCK for other files."""
        duplicate = self._threads.duplicate(notification.thread, fd)
        try:
            return _socket.socket(-1, -1, -1, duplicate)
        except OSError:
            os.close(duplicate)
            raise

    def _guard_for(self, notification: seccomp.Notification, socket: _socket.socket, port: int) -> Guard | None:
        """The guard that a call has to get past; None when the call is about no number of ours, or when its caller has gone."""
        guard = self.guards.get(port)
        if guard is None or not _is_tcp(socket) or _network_of(socket) != self._network:
            return None
        return guard if seccomp.is_waiting(self.notify_fd, notification.id) else None

    def _report_strangers(self, port: int, strangers: Iterable[int]) -> bool:
        """Report each listener on the number that is not the command's. False: there is none."""
        for inode in strangers:
            owner = tables.process_of(inode)
            self.observer.in_the_way(
                port, f"pid {owner[0]}, {owner[1]}" if owner else "a process that has ended, or that /proc does not show"
            )
        return bool(strangers)

    def _gate_unread(self, notification: seccomp.Notification, fd: int, length: int, error: OSError) -> int | None:
        """Answer a bind whose address cannot be read. Where the socket cannot be seen either, the address' length decides."""
        if gates.is_tcp(notification.thread, fd) is None and length not in _LENGTHS:
            return CONTINUE
        return self._gate(notification, fd, self.guards, _why_refused("/proc/PID/mem", error), is_read=False)

    def _gate(
        self,
        notification: seccomp.Notification,
        fd: int,
        ports: Iterable[int],
        why: str,
        *,
        is_bind: bool = True,
        is_read: bool = True,
    ) -> int | None:
        """Open a gate: the kernel's own bind or listen passes if the command's socket has SO_REUSEADDR. Returns CONTINUE."""
        thread = notification.thread
        if not why or gates.is_tcp(thread, fd) is False or not gates.is_in_our_network(thread):
            return CONTINUE
        inode = gates.inode_of(thread, fd)
        if not is_bind:
            ports = [port for port in ports if self._own[port].has(inode, fd)]
        if not seccomp.is_waiting(self.notify_fd, notification.id):
            return CONTINUE
        for port in ports:
            self._gates.open(self.guards[port], notification, inode, is_bind=is_bind)
            self.was_gated, self.why_gated = True, self.why_gated or _why_gated(why, is_read=is_read)
            if inode:
                self._own[port].add(inode, thread, fd, "", shares=False)
            else:
                self._own[port].add_hidden(fd)
        return CONTINUE

    def _look_behind(self, closed: Iterable[gates.Gate]) -> None:
        """Report the listeners that have come through gates that are closed again: the command's, or somebody else's."""
        for gate in closed:
            port, own = gate.guard.port, self._own[gate.guard.port]
            new = {inode: host for inode, host in tables.listeners_on(port).items() if inode not in gate.before}
            for inode, host in new.items():
                if not gate.is_bind and (inode == gate.inode or not gate.inode):
                    own.add(inode, gate.thread, NOWHERE, host, shares=False)
                    self.observer.listened(port, host)
                    self._notice(gate.thread, port, inode, host)
            self._report_strangers(port, own.strangers(new))


def _call_of(notification: seccomp.Notification, machine: seccomp.Machine) -> tuple[str, tuple[int, ...]]:
    """BIND with descriptor, pointer and length, LISTEN with descriptor and backlog, or RING."""
    arguments = notification.args
    if notification.nr == seccomp.IO_URING_SETUP:
        return seccomp.RING, ()
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
    """Read the memory of the caller. Raises OSError; EFAULT when fewer bytes can be read."""
    data = memory(thread, address, length)
    if len(data) < length:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data


def _is_tcp(socket: _socket.socket) -> bool:
    return (
        socket.family in (_socket.AF_INET, _socket.AF_INET6)
        and socket.type == _socket.SOCK_STREAM
        and socket.proto in (_socket.IPPROTO_TCP, IPPROTO_MPTCP)
    )


def _network_of(socket: _socket.socket) -> bytes:
    """The cookie of a socket's network namespace: the same number in another namespace is not ours.

    Before Linux 5.14 all namespaces look the same, and a bind in another one fails with EADDRINUSE at the worst.
    """
    try:
        return socket.getsockopt(_socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return b""


def _port_of(socket: _socket.socket) -> int:
    return int(socket.getsockname()[1])


def _errno_of_bind(socket: _socket.socket, address: bytes) -> int:
    """The kernel's answer to a bind without a flip.

    A socket that is bound gets EINVAL. A socket that was bound, and was shut down since, still tells its number: the guard
    gives it EADDRINUSE.
    """
    try:
        kernel.bind(socket.fileno(), address)
    except OSError as error:
        return error.errno or errno.EADDRINUSE
    return 0


def _host_in(address: bytes, socket: _socket.socket) -> str:
    """The address in a struct sockaddr, as text."""
    at, length = (8, 16) if socket.family == _socket.AF_INET6 else (4, 4)
    return _socket.inet_ntop(socket.family, address[at : at + length].ljust(length, b"\0"))


def _why_gated(why: str, *, is_read: bool) -> str:
    """Why a gate was opened, and for which binds the guard gives way."""
    bound = "this number" if is_read else "any number, since it cannot be seen which"
    return f"{why}; the guard gives way to SO_REUSEADDR while the command binds {bound}"


def _why_refused(what: str, error: OSError) -> str:
    """Why we are refused what it takes to proxy a call; empty for an error that the call itself has."""
    return f"{what}: {error.strerror}" if error.errno in _REFUSED else ""
