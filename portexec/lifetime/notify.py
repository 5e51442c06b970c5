"""The notification socket of sd_notify(3): datagrams with `NAME=VALUE` lines, READY=1 above all.

https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html

Everybody can send to it, so we ask the kernel who has sent a message (SO_PASSCRED, unix(7)). Our own user and root are
believed. Another user's process is believed where it is below us: a server that gives up root, or that runs as another user
(runuser, sudo). We look for its pid in /proc, and the pid could be another process' by then. Where the kernel gives us the
sender's pidfd (Linux 6.5), the pidfd tells whether the sender is still there.
"""

from __future__ import annotations

import _socket
import os
import struct

from portexec.binding import unix
from portexec.command.undo import Undo, file_at
from portexec.errors import cannot
from portexec.procfs import is_below

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

VARIABLE = "NOTIFY_SOCKET"
PASSED_ON = ("READY", "STATUS")  # what our own service manager is told, too

_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid
_SO_PASSCRED = 16
_SO_PASSPIDFD = 76  # Linux 6.5
_SCM_RIGHTS = 1
_SCM_CREDENTIALS = 2
_SCM_PIDFD = 4
_INT = struct.Struct("i")
_MAX_DESCRIPTORS = 253  # SCM_MAX_FD, which a message can bring
_AT_ONCE = 256  # messages, before signals and time limits have their turn; the kernel's queue is shorter by default
_MAX_DATAGRAM = 1 << 16
_MASK = 0o177  # umask for a socket at a path: whoever may write to it may send to it
_MASK_OF_ROOT = 0o111  # everybody may send, since the command may become any user


class NotifySocket:
    """Our end of the notification socket. The command finds its `name` in $NOTIFY_SOCKET.

    Without a given name it is a random abstract one, which leaves no file behind. A path is for commands in another network
    namespace, from which abstract names cannot be reached.
    """

    def __init__(self, name: str, undo: Undo) -> None:
        """Raises PortexecError when the name cannot be had. A file is recorded in `undo`."""
        self.name = name or f"@portexec-{os.urandom(16).hex()}"
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        self.socket.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)
        try:
            self.socket.setsockopt(_socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
        except OSError:
            pass  # an older kernel
        self.socket.setblocking(False)
        mask = os.umask(_MASK_OF_ROOT if os.geteuid() == 0 else _MASK)
        try:
            self.socket.bind(unix.address(self.name))
        except OSError as error:
            self.socket.close()
            raise cannot(f"make the notify socket {self.name}", error, "choose another name") from error
        finally:
            os.umask(mask)
        made = None if self.name.startswith("@") else file_at(self.name)
        if made is not None:
            undo.record_socket(self.name, *made)

    def received(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The messages that have come, from senders whom we believe, each with the pid of its sender.

        It ends after so many messages, however fast anybody sends: everybody can send to an abstract name.
        The descriptors that come with a message are closed when it was handled: that answers BARRIER=1.
        """
        size = sum(map(_socket.CMSG_SPACE, (_CREDENTIALS.size, _INT.size, _MAX_DESCRIPTORS * _INT.size)))
        for _ in range(_AT_ONCE):
            try:
                data, ancillary, _, _ = self.socket.recvmsg(_MAX_DATAGRAM, size, _socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            sender = _Sender(ancillary)
            try:
                if sender.counts():
                    yield sender.pid, _fields(data)
            finally:
                sender.close()


class _Sender:
    """The sender of a message, as the kernel tells with it. Owns the descriptors that came with the message."""

    __slots__ = ("descriptors", "pid", "pidfd", "uid")

    def __init__(self, ancillary: Iterable[tuple[int, int, bytes]]) -> None:
        self.pid = 0
        self.uid = -1
        self.pidfd: int | None = None
        self.descriptors: list[int] = []
        for level, kind, content in ancillary:
            if level != _socket.SOL_SOCKET:
                continue
            if kind == _SCM_CREDENTIALS:
                self.pid, self.uid, _ = _CREDENTIALS.unpack(content)
            elif kind in (_SCM_RIGHTS, _SCM_PIDFD):
                found = [fd for (fd,) in _INT.iter_unpack(content[: len(content) // _INT.size * _INT.size]) if fd >= 0]
                self.descriptors += found
                if kind == _SCM_PIDFD and found:
                    self.pidfd = found[0]

    def counts(self) -> bool:
        """Whether we believe the sender."""
        if self.uid in (0, os.geteuid()):
            return True
        return self.pid > 0 and is_below(self.pid, os.getpid()) and not self._has_gone()

    def _has_gone(self) -> bool:
        """Whether the sender is known to have ended: then its pidfd shows the pid -1 (proc_pid_fdinfo(5))."""
        if self.pidfd is None:
            return False
        with open(f"/proc/self/fdinfo/{self.pidfd}") as info:
            return f"\nPid:\t{self.pid}\n" not in info.read()

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


def pass_on(fields: Mapping[str, str], name: str) -> None:
    """Tell our own service manager what concerns it. It is no error if there is none."""
    lines = "".join(f"{field}={fields[field]}\n" for field in PASSED_ON if field in fields)
    if not lines or not name.startswith(("/", "@")):
        return
    socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        socket.setblocking(False)
        socket.sendto(os.fsencode(lines), unix.address(name))
    except OSError:
        pass
    finally:
        socket.close()


def _fields(data: bytes) -> dict[str, str]:
    lines = (line.partition("=") for line in os.fsdecode(data).split("\n"))
    return {field: value for field, equals, value in lines if equals}
