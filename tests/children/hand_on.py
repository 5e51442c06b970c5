"""A socket activator: opens a listener at descriptor 3, sets the variables it is given, and becomes a command.

NAME=VALUE... -- COMMAND [ARG]..., where the values PID and PIDFDID stand for this very process.
"""

from __future__ import annotations

import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]

separator = sys.argv.index("--")
itself = {"PID": str(os.getpid()), "PIDFDID": str(os.fstat(os.pidfd_open(os.getpid())).st_ino)}
for assignment in sys.argv[1:separator]:
    name, _, value = assignment.partition("=")
    os.environ[name] = itself.get(value, value)

listener = socket.create_server(("127.0.0.1", 0))
if listener.fileno() != 3:
    os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.execvp(sys.argv[separator + 1], sys.argv[separator + 1 :])
