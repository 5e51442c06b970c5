"""Listens on a free port, on 127.0.0.1 or the address that is given, prints its number, and stays until stdin ends.

On a given address it has a number that nobody has on another one: the kernel gives 127.0.0.2 a number that is in use on
127.0.0.1. So it is a number below the ephemeral range, which nobody is given who asks for any.
"""

from __future__ import annotations

import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]

LOWEST = 10000


def open_alone(address: str) -> socket.socket:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        count = int(file.read().split()[0]) - LOWEST
    while count > 0:
        number = LOWEST + int.from_bytes(os.urandom(4), "big") % count
        try:
            socket.create_server(("0.0.0.0", number)).close()
            return socket.create_server((address, number))
        except OSError:  # somebody has it
            continue
    return socket.create_server((address, 0))


def main() -> None:
    with open_alone(sys.argv[1]) if len(sys.argv) > 1 else socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()


main()
