"""The kernel's own list of TCP sockets, and the processes that hold them: Linux' /proc/net/tcp, tcp6 and /proc/PID/fd.

Only for messages and for watching, never for choosing a number: a number is chosen by binding it. A socket that is bound
but neither listening nor connected is not in the list (proc(5)).
"""

from __future__ import annotations

import _socket
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# include/net/tcp_states.h
_ESTABLISHED = 1
_SYN_RECV = 3
TIME_WAIT = 6
LISTEN = 10

_NETLINK_HEADER = struct.Struct("=IHHII")  # length, kind, flags, sequence number, port id
_DIAG_REQUEST = struct.Struct("=BBBBI48s")  # family, protocol, extensions, padding, states, struct inet_diag_sockid
_DIAG_INODE = 68  # of the u32 idiag_inode in struct inet_diag_msg
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = 0x1
_DUMP = 0x300
_NETLINK_ERROR = 2
_NETLINK_DONE = 3
_ATTRIBUTE = struct.Struct("=HH")
_SKV6ONLY = 11  # INET_DIAG_SKV6ONLY
_SHOW_PEER = 4  # UDIAG_SHOW_PEER
_UNIX_DIAG_SIZE = 16
_UNIX_PEER = 2  # UNIX_DIAG_PEER
_UNIX_SHUTDOWN = 6  # UNIX_DIAG_SHUTDOWN
_SHUT_BOTH = b"\3"
_ANY_STATE = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_FAMILIES = {4: _socket.AF_INET, 16: _socket.AF_INET6}


class TcpSocket:
    """One row: its local address as bytes in network order, its port, state and inode (0 when no process holds it).

    `is_ipv6_only`: it does not serve the other family; /proc does not tell, and there nothing is taken for serving both.
    """

    __slots__ = ("address", "inode", "is_ipv6_only", "port", "state")

    def __init__(self, address: bytes, port: int, state: int, inode: int, *, is_ipv6_only: bool = True) -> None:
        self.is_ipv6_only = is_ipv6_only
        self.address = address
        self.port = port
        self.state = state
        self.inode = inode

    @property
    def host(self) -> str:
        """The address as text; `*` where it serves both families."""
        if not any(self.address) and not self.is_ipv6_only:
            return "*"
        host = _socket.inet_ntop(_FAMILIES[len(self.address)], self.address)
        return host.removeprefix("::ffff:") if "." in host else host


def sockets_on(port: int) -> list[TcpSocket]:
    """The TCP sockets of this network namespace whose local number is `port`; none where /proc does not tell."""
    return [socket for name in ("tcp", "tcp6") for socket in _rows(name, port)]


def listening_inodes(port: int) -> set[int]:
    """The inodes of the sockets that listen on this number, in this network namespace."""
    return {socket.inode for socket in _listening(port)}


def listeners_on(port: int) -> dict[int, str]:
    """The inode and the address, as in `listening_hosts`, of each socket that listens on this number."""
    return {socket.inode: socket.host for socket in _listening(port)}


def listening_hosts(port: int) -> list[str]:
    """The addresses at which somebody listens on this number, `*` for both families."""
    return [socket.host for socket in _listening(port)]


def accepted_inode(server: tuple[str, int], client: tuple[str, int]) -> int | None:
    """The inode of the server's end of a connection on this machine, 0 if it is closed again; None until it was accepted.

    Until then the kernel shows it with inode 0. Raises OSError where sock_diag(7) is refused or not built in.
    """
    family = _socket.AF_INET6 if ":" in server[0] else _socket.AF_INET
    numbers = server[1].to_bytes(2, "big") + client[1].to_bytes(2, "big")
    addresses = b"".join(_socket.inet_pton(family, host).ljust(16, b"\0") for host in (server[0], client[0]))
    try:
        found = list(_ask(family, _REQUEST, _ANY_STATE, numbers + addresses + bytes(4) + _NO_COOKIE))
    except FileNotFoundError:
        found = []
    for socket in found:
        if socket.state in (_ESTABLISHED, _SYN_RECV):
            return socket.inode or None
        if socket.state == LISTEN:
            return None
    return 0


def accepted_unix_inode(client: int) -> int | None:
    """The inode of the other end of a unix connection, given that of ours; None until it was accepted, 0 if nobody knows.

    linux/unix_diag.h: struct unix_diag_req and _msg, asked for the peer. Raises OSError where sock_diag(7) has no unix sockets.
    """
    request = struct.pack("=BBHIII", _socket.AF_UNIX, 0, 0, _ANY_STATE, client, _SHOW_PEER) + _NO_COOKIE
    for message in _exchange(request, _REQUEST):
        attributes = message[_UNIX_DIAG_SIZE:]
        is_closed = _attribute(attributes, _UNIX_SHUTDOWN) == _SHUT_BOTH
        return int.from_bytes(_attribute(attributes, _UNIX_PEER), sys.byteorder) or (0 if is_closed else None)
    return 0


def accepted_inode_in_proc(server: tuple[str, int], client: tuple[str, int]) -> int | None:
    """As `accepted_inode`, from /proc, where it is told for every connection of this number."""
    for name in ("tcp", "tcp6"):
        for socket in _rows(name, server[1], peer=client[1]):
            if socket.state in (_ESTABLISHED, _SYN_RECV):
                return socket.inode or None
    return 0


def unix_backlog(path: str) -> int:
    """How many connections to a unix socket, named as in /proc/net/unix, have not been accepted: those have inode 0 there."""
    suffix = b" " + os.fsencode(path) + b"\n"
    try:
        with open("/proc/net/unix", "rb") as table:
            return sum(line.endswith(suffix) and line.split(None, 7)[6] == b"0" for line in table)
    except OSError:
        return 0


def _listening(port: int) -> list[TcpSocket]:
    """Asked of sock_diag(7), which looks at listening sockets only; where that is refused or not built in, of /proc."""
    identity = port.to_bytes(2, "big") + bytes(46)
    try:
        return [
            socket
            for family in (_socket.AF_INET, _socket.AF_INET6)
            for socket in _ask(family, _REQUEST | _DUMP, 1 << LISTEN, identity)
        ]
    except OSError:
        return [socket for socket in sockets_on(port) if socket.state == LISTEN]


def _ask(family: int, flags: int, states: int, identity: bytes) -> Iterator[TcpSocket]:
    """Ask for the TCP sockets of one family: linux/inet_diag.h (struct inet_diag_req_v2 and its answer)."""
    request = _DIAG_REQUEST.pack(family, _socket.IPPROTO_TCP, 0, 0, states, identity)
    return map(_from_diag, _exchange(request, flags))


def _exchange(request: bytes, flags: int) -> Iterator[bytes]:
    """Ask the kernel over netlink(7), linux/netlink.h and linux/sock_diag.h; yield the bodies of the answers."""
    header = _NETLINK_HEADER.pack(_NETLINK_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0)
    socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    try:
        socket.send(header + request)
        while True:
            answer = socket.recv(1 << 16)
            at = 0
            while at + _NETLINK_HEADER.size <= len(answer):
                length, kind, *_ = _NETLINK_HEADER.unpack_from(answer, at)
                if kind == _NETLINK_DONE:
                    return
                if kind == _NETLINK_ERROR:
                    code = -int.from_bytes(answer[at + 16 : at + 20], sys.byteorder, signed=True)
                    raise OSError(code, os.strerror(code))
                yield answer[at + _NETLINK_HEADER.size : at + length]
                at += length + 3 & ~3
            if not flags & _DUMP:
                return
    finally:
        socket.close()


def _from_diag(message: bytes) -> TcpSocket:
    """From a struct inet_diag_msg: u8 family and state, from byte 4 on the ports and addresses; and what follows it."""
    size = 4 if message[0] == _socket.AF_INET else 16
    inode = int.from_bytes(message[_DIAG_INODE : _DIAG_INODE + 4], sys.byteorder)
    is_ipv6_only = size == 4 or _attribute(message[_DIAG_INODE + 4 :], _SKV6ONLY) != b"\0"
    return TcpSocket(message[8 : 8 + size], int.from_bytes(message[4:6], "big"), message[1], inode, is_ipv6_only=is_ipv6_only)


def _attribute(attributes: bytes, wanted: int) -> bytes:
    """The value of one attribute, struct nlattr: u16 length with this header, u16 kind, value, padding; empty if not there."""
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == wanted:
            return attributes[at + _ATTRIBUTE.size : at + length]
        at += max(length, _ATTRIBUTE.size) + 3 & ~3
    return b""


def _rows(name: str, port: int, peer: int | None = None) -> Iterator[TcpSocket]:
    """The sockets on a local number; with a `peer` only the connections to that number."""
    wanted = b":%04X" % port
    remote = b"" if peer is None else b":%04X" % peer
    try:
        with open(f"/proc/net/{name}", "rb") as table:
            next(table, None)
            for line in table:
                fields = line.split(None, 10)
                if fields[1].endswith(wanted) and fields[2].endswith(remote):
                    address = _address(fields[1].partition(b":")[0])
                    yield TcpSocket(address, port, int(fields[3], 16), int(fields[9]))
    except OSError:
        return


def _address(text: bytes) -> bytes:
    """Decode an address, which the kernel prints as 32-bit words in the machine's byte order."""
    raw = bytes.fromhex(text.decode())
    if sys.byteorder == "big":
        return raw
    return b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))


def process_of(inode: int) -> tuple[int, str] | None:
    """Pid and name of a process that has the socket open, or None where /proc does not tell."""
    found = descriptor_of(inode)
    return None if found is None else (found[0], name_of(found[0]))


def descriptor_of(inode: int) -> tuple[int, int] | None:
    """Pid and descriptor of a process that has the socket open, or None where /proc does not tell."""
    try:
        pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    except OSError:
        return None
    for pid in pids:
        fd = _descriptor(pid, inode)
        if fd is not None:
            return pid, fd
    return None


def has_open(pids: Iterable[int], inode: int) -> bool:
    """Whether one of these processes has the socket open."""
    return any(_descriptor(pid, inode) is not None for pid in pids)


def _descriptor(pid: int, inode: int) -> int | None:
    wanted = f"socket:[{inode}]"
    directory = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return None
    for descriptor in descriptors:
        try:
            if os.readlink(f"{directory}/{descriptor}") == wanted:
                return int(descriptor)
        except OSError:
            continue
    return None


def name_of(pid: int) -> str:
    """The short name of a process, `?` when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return "?"


def who_has(port: int) -> str:
    """Say in a few words who keeps the number from us, as far as /proc tells: `pid 4711, node`; else an empty text."""
    sockets = sockets_on(port)
    for socket in sorted(sockets, key=lambda s: s.state != LISTEN):
        owner = process_of(socket.inode) if socket.inode else None
        if owner is not None:
            return f"pid {owner[0]}, {owner[1]}"
    if any(socket.state == LISTEN for socket in sockets):
        return "a process that /proc does not show to you"
    if any(socket.state == TIME_WAIT for socket in sockets):
        return "old connections in TIME_WAIT, for up to a minute"
    return ""
