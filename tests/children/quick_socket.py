"""What these programs need of `socket`, whose import takes them as long as all of Python's start: `quick_socket as socket`.

The constants are numbers here, not members of an enumeration.
"""

from __future__ import annotations

import _socket
from _socket import *  # noqa: F403  # the constants, by their names


class socket(_socket.socket):  # type: ignore[no-redef]  # noqa: N801  # as in the library
    """A socket that can be the subject of `with`."""

    def __enter__(self) -> socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self):
        fd, address = self._accept()  # type: ignore[attr-defined]
        return socket(fileno=fd), address

    def dup(self) -> socket:
        return socket(fileno=_socket.dup(self.fileno()))


def create_server(address: tuple[str, int]) -> socket:
    made = socket()
    made.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    made.bind(address)
    made.listen()
    return made


def create_connection(address: tuple[str, int]) -> socket:
    made = socket(_socket.AF_INET6 if ":" in address[0] else _socket.AF_INET)
    made.connect(address)
    return made
