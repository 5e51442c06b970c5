"""Clients, addresses, and a socket that asks for somebody else's number."""

from __future__ import annotations

import errno
import socket
import urllib.error
import urllib.request

from tests.support.waiting import DEADLINE, wait_for

THEFTS = [
    (host, *options)
    for host in ("127.0.0.1", "127.0.0.9", "0.0.0.0", "::1", "::")
    for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT))
]


def get(url: str) -> str:
    """The body that a GET answers, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return str(error.read().decode())


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def connect(url: str) -> socket.socket:
    """A client. What it connects to is there."""
    if url.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX)
        path = url.removeprefix("unix:")
        client.settimeout(DEADLINE)
        client.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        return client
    return socket.create_connection((url.partition("//")[2].rpartition(":")[0].strip("[]"), port_of(url)), DEADLINE)


def can_bind(number: int) -> bool:
    """Whether anybody can have this number now. Connections that have ended are not in the way of who sets SO_REUSEADDR."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def is_given_back(number: int) -> bool:
    """Whether a number becomes anybody's. It may be another process' just now: the kernel gives free numbers to all who ask."""
    return wait_for(lambda: can_bind(number))


def steal(host: str, port: int, *options: int) -> str:
    """Name the number explicitly, as a thief would: the error's name, or `stolen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as thief:
        for option in options:
            thief.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            thief.bind((host, port))
            thief.listen()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "stolen"
