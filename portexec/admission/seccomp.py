"""The kernel's numbers and layouts for seccomp user notification, and thin calls around them. Nothing is decided here.

Sources: seccomp(2), seccomp_unotify(2), pidfd_getfd(2), include/uapi/linux/{seccomp,filter,audit,prctl}.h, and each machine's
syscall table. `struct seccomp_notif` is `<Q id> <I pid> <I flags>` and `struct seccomp_data`, which is `<i nr> <I arch>
<Q instruction pointer> <6Q args>`; `struct seccomp_notif_resp` is `<Q id> <q val> <i error> <I flags>`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from _struct import Struct  # what struct has it from

from portexec import kernel, procfs

SET_MODE_FILTER = 1
FLAG_SPEC_ALLOW = 1 << 2  # Linux 4.17; before 5.16 a filter without it slows down every task that has the filter
FLAG_NEW_LISTENER = 1 << 3  # Linux 5.0
FLAG_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19
RESPONSE_CONTINUE = 1  # Linux 5.5

RET_ALLOW = 0x7FFF0000
RET_USER_NOTIF = 0x7FC00000

_BUFFER_SIZE = 256  # a later kernel's notification may be longer; RECV wants zeros up to its own length
_NOTIFICATION = Struct("=QIIiIQ6Q")
_INSTRUCTION = Struct("=HBBI")  # struct sock_filter; a struct sock_fprog is their number and, aligned, a pointer to them
_RESPONSE = Struct("=QqiI")
_RECV = 0xC0502100
_SEND = 0xC0182101
_SET_FLAGS = 0x40082104
_SYNC_WAKE_UP = 1  # SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
_ID_VALID = 0x80082102  # the number that Linux 5.0 gave it; later kernels accept it beside the corrected one


# By number: a Python that was built for old systems, as uv's were until 2026, has no os.pidfd_open.
_PIDFD_OPEN = 434
_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL  # Linux 6.9
SOCKETCALL_BIND = 2
SOCKETCALL_LISTEN = 4

IO_URING_SETUP = 425  # Linux 5.1; the same in every table, but for x32

BIND = "bind"
LISTEN = "listen"
RING = "ring"


class Machine:
    """One system call table: its audit number, the numbers of bind, listen and socketcall (0: none), and how
    many bytes socketcall's arguments have each."""

    def __init__(self, arch: int, bind: int, listen: int, socketcall: int = 0, word: int = 8) -> None:
        self.arch = arch
        self.bind = bind
        self.listen = listen
        self.socketcall = socketcall
        self.word = word


_I386 = Machine(0x40000003, 361, 363, 102, word=4)
_ARM = Machine(0x40000028, 282, 284)
_X86_64 = Machine(0xC000003E, 49, 50)
_X32 = Machine(0xC000003E, 0x40000031, 0x40000032)
_S390 = Machine(0x00000016, 361, 363, 102, word=4)

# uname -m: the number of seccomp(2), and the tables that a process may use, the native one first.
_MACHINES: dict[str, tuple[int, tuple[Machine, ...]]] = {
    "x86_64": (317, (_X86_64, _X32, _I386)),
    "i686": (354, (_I386,)),
    "aarch64": (277, (Machine(0xC00000B7, 200, 201), _ARM)),
    "armv7l": (383, (_ARM,)),
    "riscv64": (277, (Machine(0xC00000F3, 200, 201),)),
    "loongarch64": (277, (Machine(0xC0000102, 200, 201),)),
    "ppc64le": (358, (Machine(0xC0000015, 327, 329, 102),)),
    "s390x": (348, (Machine(0x80000016, 361, 363, 102), _S390)),
}

_NUMBER, _TABLES = _MACHINES.get(os.uname().machine, (0, ()))

# linux/bpf_common.h: load a word, compare, return; struct seccomp_data: offsets of nr, arch and the arguments' low halves.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NR, _ARCH = 0, 4
_ARGS = 16 if sys.byteorder == "little" else 20
_POINTER = 8 if sys.maxsize > 1 << 32 else 4
_MIN_SOCKADDR = 16  # sockaddr_in; netlink's 12 bytes, which glibc binds at each name lookup, need not stop here


def _block(machine: Machine) -> list[tuple[int, int, int, int]]:
    """The instructions for one table, as (code, jump if true, jump if false, operand). They end in a return."""
    notify, allow = (_RETURN, 0, 0, RET_USER_NOTIF), (_RETURN, 0, 0, RET_ALLOW)
    block = [
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 4, machine.bind),
        (_LOAD, 0, 0, _ARGS + 2 * 8),
        (_AT_LEAST, 0, 1, _MIN_SOCKADDR),
        notify,
        allow,
        (_EQUAL, 1, 0, machine.listen),
        (_EQUAL, 0, 1, IO_URING_SETUP),
        notify,
    ]
    if machine.socketcall:
        block += [
            (_EQUAL, 0, 5, machine.socketcall),
            (_LOAD, 0, 0, _ARGS),
            (_EQUAL, 1, 0, SOCKETCALL_BIND),
            (_EQUAL, 0, 1, SOCKETCALL_LISTEN),
            notify,
            allow,
        ]
    return block


def program(machines: tuple[Machine, ...]) -> list[tuple[int, int, int, int]]:
    """The whole filter: bind and listen of every table are notified, all else is allowed, as are unknown tables.

    io_uring_setup is notified, too. We do not see a bind by a ring. But that there is a ring explains why a bind was refused.
    """
    instructions: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _ARCH)]
    for arch in dict.fromkeys(machine.arch for machine in machines):
        tables = [_block(machine) for machine in machines if machine.arch == arch]
        block = [instruction for table in tables for instruction in table] + [(_RETURN, 0, 0, RET_ALLOW)]
        instructions += [(_EQUAL, 0, len(block), arch), *block]
    return [*instructions, (_RETURN, 0, 0, RET_ALLOW)]


_PROGRAM = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program(_TABLES))


def is_known_machine() -> bool:
    """Whether the numbers of this machine are in the table."""
    return bool(_TABLES)


def has_flags(flags: int) -> bool:
    """Whether this kernel knows all these flags. Raises OSError where seccomp itself is refused. Nothing is installed.

    A filter that is a null pointer is EFAULT with flags that are known, EINVAL with others.
    """
    try:
        kernel.syscall(_NUMBER, SET_MODE_FILTER, flags, 0)
    except OSError as error:
        if error.errno not in (errno.EFAULT, errno.EINVAL):
            raise
        return error.errno == errno.EFAULT
    return False


def install() -> int:
    """Filter this process and all that it will become or start; return the notify fd, close-on-exec.

    No-new-privileges is set only where the kernel demands it, that is without CAP_SYS_ADMIN. Raises OSError, with nothing
    installed: EBUSY under another notifier, EINVAL, EPERM or ENOSYS where the kernel has none or refuses it.
    """
    if not _TABLES:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    memory, address = kernel.pointer_to(_PROGRAM)
    count = len(_PROGRAM) // _INSTRUCTION.size
    compiled = count.to_bytes(2, sys.byteorder).ljust(_POINTER, b"\0") + address.to_bytes(_POINTER, sys.byteorder)
    flags = FLAG_NEW_LISTENER | FLAG_SPEC_ALLOW
    if has_flags(flags | FLAG_WAIT_KILLABLE_RECV):
        flags |= FLAG_WAIT_KILLABLE_RECV
    try:
        return kernel.syscall(_NUMBER, SET_MODE_FILTER, flags, compiled)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        return kernel.syscall(_NUMBER, SET_MODE_FILTER, flags, compiled)
    finally:
        del memory  # not before the kernel has read it


class Notification:
    """A system call of the command that waits for an answer. `thread` is the caller's thread id."""

    __slots__ = ("arch", "args", "id", "nr", "thread")

    def __init__(self, data: bytes | bytearray) -> None:
        self.id, self.thread, _, self.nr, self.arch, _, *arguments = _NOTIFICATION.unpack_from(data)
        self.args = tuple(arguments)


def receive(notify_fd: int) -> Notification | None:
    """Take the next notification; None when its caller has gone in the meantime or a signal came first."""
    buffer = bytearray(_BUFFER_SIZE)
    try:
        fcntl.ioctl(notify_fd, _RECV, buffer, True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    return Notification(buffer)


def wake_at_once(notify_fd: int) -> None:
    """Have the kernel wake us on the caller's own processor, as the caller sleeps until we answer (Linux 6.6)."""
    try:
        fcntl.ioctl(notify_fd, _SET_FLAGS, _SYNC_WAKE_UP)
    except OSError:
        pass


def is_waiting(notify_fd: int, identifier: int) -> bool:
    """Whether the caller still waits, so that what was read of it meanwhile was really its own."""
    try:
        fcntl.ioctl(notify_fd, _ID_VALID, identifier.to_bytes(8, sys.byteorder))
    except OSError:
        return False
    return True


def answer(notify_fd: int, identifier: int, code: int | None) -> bool:
    """Let the call return 0 or fail with this errno, or with None go on in the kernel. False: the caller has gone."""
    error, flags = (0, RESPONSE_CONTINUE) if code is None else (-code, 0)
    try:
        fcntl.ioctl(notify_fd, _SEND, _RESPONSE.pack(identifier, 0, error, flags))
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.EINPROGRESS):
            raise
        return False
    return True


def machine_of(notification: Notification) -> Machine | None:
    """The table that the notified call is from."""
    for machine in _TABLES:
        calls = (machine.bind, machine.listen, IO_URING_SETUP, machine.socketcall)
        if machine.arch == notification.arch and notification.nr in calls:
            return machine
    return None


class Threads:
    """The command's threads, whose descriptors we duplicate.

    A pidfd of the last one is kept, as one thread mostly makes several calls. The pidfd tells when its thread has ended.
    """

    def __init__(self) -> None:
        self._thread = 0
        self._pidfd = -1

    def duplicate(self, thread: int, fd: int) -> int:
        """A duplicate, close-on-exec, of a descriptor of a thread. Raises OSError: EPERM, EBADF, ESRCH, ENOSYS.

        A thread that is not the leader has a pidfd of its own from Linux 6.9 on.
        """
        if thread == self._thread:
            try:
                return _duplicate_by(self._pidfd, fd)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise  # with ESRCH it was another thread's, which had this id before
        try:
            pidfd = kernel.syscall(_PIDFD_OPEN, thread, _PIDFD_THREAD)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return _duplicate_of_leader(thread, fd)
        self.close()
        self._thread, self._pidfd = thread, pidfd
        return _duplicate_by(pidfd, fd)

    def descriptors(self) -> set[int]:
        """The descriptors that others must not close."""
        return {self._pidfd} if self._thread else set()

    def close(self) -> None:
        """Close the pidfd that is kept."""
        if self._thread:
            os.close(self._pidfd)
        self._thread = 0


def _duplicate_by(pidfd: int, fd: int) -> int:
    return kernel.syscall(_PIDFD_GETFD, pidfd, fd, 0)


def _duplicate_of_leader(thread: int, fd: int) -> int:
    """A duplicate from the descriptor table of the process' first thread, which is mostly this thread's, too.

    It is not when the first thread has ended, or when this thread has a table of its own (unshare(2)). Then it raises ESRCH.
    """
    pidfd = kernel.syscall(_PIDFD_OPEN, _process_of(thread), 0)
    try:
        duplicate = _duplicate_by(pidfd, fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise _other_table() from error
    finally:
        os.close(pidfd)
    try:
        if os.fstat(duplicate).st_ino == os.stat(f"/proc/{thread}/fd/{fd}").st_ino:
            return duplicate
    except OSError:
        pass
    os.close(duplicate)
    raise _other_table()


def _other_table() -> OSError:
    return ProcessLookupError(errno.ESRCH, "the thread has descriptors of its own")


def _process_of(thread: int) -> int:
    process = procfs.status(thread, "Tgid")
    if not process:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return int(process)
