"""Listens on a free port, on 127.0.0.1 or the address that is given, prints its number, and stays until stdin ends."""

from __future__ import annotations

import sys

import quick_socket as socket  # type: ignore[import-not-found]


def main() -> None:
    with socket.create_server((sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()


main()
