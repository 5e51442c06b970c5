"""A server that is slow to start: prints `ready`, waits for a line on stdin, serves, prints `serving PID`.

    late_server.py HOST    `*` for both families on one socket

Given LISTEN_FDS it serves on descriptor 3; otherwise it binds $PORT on HOST itself, with SO_REUSEADDR as servers do, and an
error ends it as it ends them. Every connection is answered with the process id.
"""

from __future__ import annotations

import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]


def open_listener(host: str) -> socket.socket:
    if "LISTEN_FDS" in os.environ:
        return socket.socket(fileno=3)
    family = socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
    listener.bind(("::" if host == "*" else host.strip("[]"), int(os.environ["PORT"])))
    listener.listen()
    return listener


def main() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    with open_listener(sys.argv[1]) as listener:
        print("serving", os.getpid(), flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(str(os.getpid()).encode())


if __name__ == "__main__":
    main()
