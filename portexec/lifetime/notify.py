"""The notification socket of sd_notify(3): datagrams with `NAME=VALUE` lines, READY=1 above all.

https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import _socket
import os
import struct

from portexec.binding import unix
from portexec.command.undo import Undo, file_at
from portexec.errors import PortexecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VARIABLE = "NOTIFY_SOCKET"
PASSED_ON = ("READY", "STATUS")  # what our own service manager is told, too

_CREDENTIALS = struct.Struct("iII")  # struct ucred, unix(7): pid, uid, gid
_SO_PASSCRED = 16
_SCM_CREDENTIALS = 2
_MAX_DATAGRAM = 1 << 16


class NotifySocket:
    """Our end: what the command sends to `name`, which it finds in $NOTIFY_SOCKET, arrives here.

    Without a name it is a random abstract one, which leaves no file behind. A path is for commands in another network
    namespace, which abstract names do not reach; only our own user can send there.
    """

    def __init__(self, name: str, undo: Undo) -> None:
        """Raises PortexecError when the name cannot be had. A file is recorded in `undo`."""
        self.name = name or f"@portexec-{os.urandom(16).hex()}"
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        self.socket.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)
        self.socket.setblocking(False)
        mask = os.umask(0o177)
        try:
            self.socket.bind(unix.address(self.name))
        except OSError as error:
            self.socket.close()
            raise PortexecError(f"cannot make the notify socket {self.name}: {reason(error)}", "choose another name") from error
        finally:
            os.umask(mask)
        made = None if self.name.startswith("@") else file_at(self.name)
        if made is not None:
            undo.record_socket(self.name, *made)

    def received(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The messages that are there by now, each with the pid of its sender: those of our own user or root."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(_MAX_DATAGRAM, _socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:
                return
            for level, kind, credentials in ancillary:
                if (level, kind) == (_socket.SOL_SOCKET, _SCM_CREDENTIALS):
                    pid, uid, _ = _CREDENTIALS.unpack(credentials)
                    if uid in (0, os.geteuid()):
                        yield pid, _fields(data)


def pass_on(fields: Mapping[str, str], name: str) -> None:
    """Tell our own service manager what concerns it; one that is not there hears nothing."""
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
