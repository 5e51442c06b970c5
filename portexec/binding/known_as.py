"""`--host`: the name or address by which clients on other machines know this one.

NAME     node1   node1.example.org   10.0.0.5   [fd00::5]      and for clients here   web.localhost   [::1]

A name is not looked up: other machines may know names and addresses of this one that it does not know itself.
"""

from __future__ import annotations

import _socket
from _socket import AF_INET, AF_INET6

from portexec.binding.listeners import ALL_ADDRESSES, covers, is_loopback
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from portexec.binding.listeners import Listener

_OPTION = "--host"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")
_ADDRESS_CHARACTERS = frozenset("0123456789.")
_FORMS = "write a name or an address of this machine: node1, 10.0.0.5, [fd00::5]"


def require_host(text: str) -> str:
    """The text, if it is a name or an address that a client can connect to. Raises UsageError if it is none."""
    if not text:
        raise UsageError("is empty", f"{_FORMS}; is a variable unset?", about=_OPTION)
    if hint := _mistaken(text):
        raise UsageError(f"{text!r} is not a host", hint, about=_OPTION)
    if text.strip("[]") in ALL_ADDRESSES:
        raise UsageError(f"{text} is where a server listens, and no client can connect to it", _FORMS, about=_OPTION)
    return text


def _mistaken(text: str) -> str:
    """What to write instead of a text that is no host; empty for one that is."""
    if text == "*" or _is_host(text):
        return ""
    if "://" in text:
        bare = text.partition("://")[2].partition("/")[0].rpartition("@")[2]
        return f"it is a host, not a URL: {bare if bare.endswith(']') else bare.partition(':')[0]}"
    if _is_address(AF_INET6, text):
        return f"an IPv6 address goes in brackets: [{text}]"
    host, colon, number = text.rpartition(":")
    if colon and number.isdigit() and _is_host(host):
        return f"the number is that of the listener: leave :{number} out"
    return _FORMS


def _is_host(text: str) -> bool:
    if text.startswith("[") and text.endswith("]"):
        return _is_address(AF_INET6, text[1:-1])
    if _ADDRESS_CHARACTERS.issuperset(text):
        return _is_address(AF_INET, text)
    return _NAME_CHARACTERS.issuperset(text) and text[:1] not in "-." and ".." not in text


def _is_address(family: int, text: str) -> bool:
    try:
        _socket.inet_pton(family, text)
    except (OSError, ValueError):
        return False
    return True


def known_as(listeners: Sequence[Listener], host: str) -> list[Listener]:
    """The listeners, known by the host where clients can reach them by it. Raises UsageError if that is nowhere."""
    if not any(_is_reachable(listener, host) for listener in listeners):
        raise _unreachable(listeners, host)
    return [listener.changed(known_as=host) if _is_reachable(listener, host) else listener for listener in listeners]


def _is_reachable(listener: Listener, host: str) -> bool:
    """Whether a listener gets what is sent to the host, as far as the host itself tells."""
    address = host.strip("[]")
    if listener.kind == "unix":
        return False
    if is_loopback(host) and _is_literal(address):
        return covers(listener.address, address)
    if is_loopback(host) or is_loopback(listener.address):
        return listener.address in ALL_ADDRESSES or is_loopback(host) == is_loopback(listener.address)
    return not _is_literal(address) or listener.address == "*" or (":" in address) == (":" in listener.address)


def _is_literal(address: str) -> bool:
    return _is_address(AF_INET, address) or _is_address(AF_INET6, address)


def _unreachable(listeners: Sequence[Listener], host: str) -> UsageError:
    numbered = [listener for listener in listeners if listener.kind != "unix"]
    if not numbered:
        return UsageError(
            f"{host}: a unix socket cannot be reached from another machine", "listen on a port, as with -l '*'", about=_OPTION
        )
    where = ", ".join(listener.address for listener in numbered)
    return UsageError(
        f"{host} does not lead to {where}, where this listens",
        "listen on every address, with -l '*', or on the one that the host has",
        about=_OPTION,
    )
