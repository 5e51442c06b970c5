"""A client of obeying.py: `ask.py URL LINE` sends the line and prints the answer. It tries once: the server must be there."""

from __future__ import annotations

import socket
import sys
from urllib.parse import urlsplit

url, line = sys.argv[1:]
if url.startswith("unix:"):
    path = url.removeprefix("unix:")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
else:
    host, _, number = urlsplit(url).netloc.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(number)))
with connection, connection.makefile("rw") as stream:
    print(line, file=stream, flush=True)
    print(stream.read(), end="", flush=True)
