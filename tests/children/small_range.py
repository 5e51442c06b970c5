"""Run a command in a network namespace whose ephemeral range is the one number 40000; the namespace is ours already."""

from __future__ import annotations

import fcntl
import os
import struct
import sys

import quick_socket as socket  # type: ignore[import-not-found]

SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # netdevice(7)


def main() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
        file.write("40000 40000")
    os.execv(sys.argv[1], sys.argv[1:])


main()
