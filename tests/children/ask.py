"""A client of obeying.py: `ask.py URL LINE` sends the line and prints the answer. It tries once: the server must be there."""

from __future__ import annotations

import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]

url, line = sys.argv[1:]
if url.startswith("unix:"):
    path = url.removeprefix("unix:")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
else:
    host, _, number = url.split("/")[2].rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(number)))
with connection:
    connection.sendall(line.encode() + b"\n")
    while data := connection.recv(1000):
        os.write(1, data)
