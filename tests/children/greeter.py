"""A real server: greets every connection with its number and closes first. It ends when its standard input does.

It takes descriptor 3 if LISTEN_FDS says so, and else binds $PORT with SO_REUSEADDR, as servers do. With the word `alone`
it is its own only client and ends at once, leaving a connection in TIME_WAIT.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress

import quick_socket as socket  # type: ignore[import-not-found]


def listen() -> socket.socket:
    if "LISTEN_FDS" in os.environ:
        return socket.socket(fileno=3)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", int(os.environ["PORT"])))
    sock.listen(128)
    return sock


def greet(listener: socket.socket, text: bytes) -> None:
    connection, _ = listener.accept()
    with connection, suppress(ConnectionError):  # a client that has left again is no reason to end
        connection.sendall(text)


def main() -> None:
    listener = listen()
    name = listener.getsockname()
    text = f"{name[1] if isinstance(name, tuple) else name}".encode()
    if "alone" in sys.argv:
        with socket.create_connection(("127.0.0.1", name[1])) as client:
            greet(listener, text)
            assert client.recv(100) == text
            assert client.recv(100) == b""
        print("served", flush=True)
        return
    print("ready", text.decode(), flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:
            return
        greet(listener, text)


main()
