"""Be a network namespace while standard input is open. Each word sets something up in it: `lo=up|down|bare` or a sysctl.

`bare` is the loopback interface without an address, so that 127.0.0.1 is nowhere.
"""

from __future__ import annotations

import fcntl
import struct
import sys

import quick_socket as socket  # type: ignore[import-not-found]

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8913, 0x8914, 0x8916, 1


def set_loopback(state: str) -> None:
    with socket.socket() as sock:
        if state == "bare":
            fcntl.ioctl(sock, SIOCSIFADDR, struct.pack("16sH22x", b"lo", socket.AF_INET))
            return
        request = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sH22x", b"lo", 0))
        flags = struct.unpack_from("16sH", request)[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | IFF_UP if state == "up" else flags & ~IFF_UP))


def main() -> None:
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        if name == "lo":
            set_loopback(value)
        else:
            with open("/proc/sys/" + name.replace(".", "/"), "w") as file:
                file.write(value)
    print("ready", flush=True)
    sys.stdin.read()


main()
