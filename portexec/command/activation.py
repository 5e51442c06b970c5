"""Socket activation: the LISTEN_FDS protocol, as its reader (what was handed to us) and its writer (what we hand on).

Source: sd_listen_fds(3) and systemd's src/libsystemd/sd-daemon/sd-daemon.c. The descriptors are 3, 4, ...

LISTEN_FDS       how many there are
LISTEN_PID       the process that they are meant for
LISTEN_FDNAMES   their names, between colons
LISTEN_PIDFDID   since systemd 259: the inode number of that process' pidfd, which unlike a pid is never used again
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FIRST_FD = 3
VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES")


def inherited(environment: Mapping[str, str]) -> list[str]:
    """Names of the sockets that another activator handed to this very process, at descriptors 3, 4, ...; mostly none.

    Variables that are stale, malformed or meant for another process count as none, as in libsystemd.
    """
    count_text = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not (count_text.isascii() and count_text.isdigit()):
        return []
    ours = pidfd_id(os.getpid())
    if ours and environment.get("LISTEN_PIDFDID", ours) != ours:
        return []
    count = int(count_text) if len(count_text) < 8 else 0
    if not all(_is_open(fd) for fd in range(FIRST_FD, FIRST_FD + count)):
        return []
    names = environment.get("LISTEN_FDNAMES", "unknown").split(":")
    return names if len(names) == count else ["unknown"] * count


def variables(names: Sequence[str]) -> dict[str, str]:
    """The variables that announce sockets with these names, but for those about the pid; none for no sockets."""
    return {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)} if names else {}


def pid_variables(pid: int) -> dict[str, str]:
    """The variables that say for which process the sockets are meant."""
    pidfd_inode = pidfd_id(pid)
    return {"LISTEN_PID": str(pid)} | ({"LISTEN_PIDFDID": pidfd_inode} if pidfd_inode else {})


def pidfd_id(pid: int) -> str:
    """The inode number of the process' pidfd, empty where it is not unique to the process.

    It is on pidfs (Linux 6.9). Before, all pidfds had one inode, on the same file system as an eventfd.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return ""
    try:
        event = os.eventfd(0)
    except OSError:
        os.close(pidfd)
        return ""
    try:
        status = os.fstat(pidfd)
        return str(status.st_ino) if status.st_dev != os.fstat(event).st_dev else ""
    finally:
        os.close(pidfd)
        os.close(event)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
