"""Looks whether its number is free, and goes on: looks.py [busy] ( serve | crash ).

busy    another thread computes all the time, so that the look waits for the interpreter's lock between listen and close
serve   an HTTP server on the number, when a line has come on standard input
crash   ends with status 1
"""

import _thread
import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]


def compute():
    while True:
        sum(range(1000))


def serve(listener):
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                if connection.recv(10000):
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nserved\n")
            except ConnectionError:
                pass  # the client has left again


port = int(os.environ["PORT"])
if "busy" in sys.argv:
    _thread.start_new_thread(compute, ())
for host in ("127.0.0.1", "::1"):
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.bind((host, port))
    probe.listen()
    probe.close()
print("looked", flush=True)
if "crash" in sys.argv:
    sys.exit(1)
sys.stdin.readline()
serve(socket.create_server(("127.0.0.1", port)))
