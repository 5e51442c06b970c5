"""Holds a number as a launch with hand-off `fd` does: prints the number, waits for the end of stdin.

    holder.py USER LISTEN    USER is the number of who is to hold it, or `-` to stay who we are

A whole launch cannot be another user's where that user may not run this Python; the sockets are the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from portexec.binding import listeners as sockets
from portexec.binding import spec


def main() -> None:
    user, listen = sys.argv[1:]
    if user != "-":
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    bound = sockets.bind_all(spec.parse_listen([f"{listen}:0"]), listening=True)
    print(bound.listeners[0].port, flush=True)
    sys.stdin.read()
    bound.close()


if __name__ == "__main__":
    main()
