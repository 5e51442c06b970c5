"""Print as JSON what a command was given: words, environment, and what every open descriptor is. argv[1] may name a file."""

from __future__ import annotations

import fcntl
import os
import stat
import sys

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]

FAMILIES = {socket.AF_INET: "AF_INET", socket.AF_INET6: "AF_INET6", socket.AF_UNIX: "AF_UNIX", socket.AF_NETLINK: "AF_NETLINK"}


def describe(fd: int) -> dict[str, object]:
    described: dict[str, object] = {"link": os.readlink(f"/proc/self/fd/{fd}")}
    if stat.S_ISREG(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        described["rest"] = os.pread(fd, 100, os.lseek(fd, 0, os.SEEK_CUR)).decode()
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return described
    sock = socket.socket(fileno=fd)
    described["family"] = FAMILIES[sock.family]
    described["name"] = sock.getsockname()
    if isinstance(described["name"], bytes):
        described["name"] = os.fsdecode(described["name"])
    described["listening"] = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    described["reuse_address"] = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR))
    described["blocking"] = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    described["close_on_exec"] = not os.get_inheritable(fd)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        described["reuse_port"] = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
        described["no_delay"] = bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    if sock.family == socket.AF_INET6:
        described["v6_only"] = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    sock.detach()
    return described


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def pidfd_inode() -> int:
    fd = os.pidfd_open(os.getpid())
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def main() -> None:
    report = {
        "pid": os.getpid(),
        "pidfd_inode": pidfd_inode() if hasattr(os, "pidfd_open") else 0,
        "argv": sys.argv[1:],
        "environment": dict(os.environ),
        "descriptors": {fd: describe(fd) for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")) if is_open(fd)},
    }
    text = json.dumps(report)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            file.write(text)
    else:
        sys.stdout.write(text + "\n")  # at once, also where Python is unbuffered: others write to the same pipe


main()
