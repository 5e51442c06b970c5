"""The kernel's own lists of sockets, and the processes that hold them: sock_diag(7), /proc/net/{tcp,tcp6,unix}, /proc/PID/fd.

Only for messages and for watching, never for choosing a number: a number is chosen by binding it. A socket that is bound
but neither listening nor connected is not in /proc (proc(5)); sock_diag(7) has those since Linux 6.8.
"""

from __future__ import annotations

import _socket
import os
import sys
from _struct import Struct, pack  # what struct has them from

from portexec.errors import is_shortage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

# include/net/tcp_states.h
_ESTABLISHED = 1
_SYN_RECV = 3
TIME_WAIT = 6
_CLOSE_WAIT = 8
LISTEN = 10
_NEW_SYN_RECV = 12
_CLOSE = 7  # the state of sockets that are merely bound
_BOUND_INACTIVE = 13  # the state by which they are asked for

_NETLINK_HEADER = Struct("=IHHII")  # length, kind, flags, sequence number, port id
_DIAG_REQUEST = Struct("=BBBBI48s")  # family, protocol, extensions, padding, states, struct inet_diag_sockid
_OLD_DIAG_REQUEST = Struct("=4x48sI4x")  # of both families at once: no address, struct inet_diag_sockid, states
_DIAG_CLIENT_PORT = slice(6, 8)
_DIAG_SERVER = slice(8, 12)  # of IPv4
_DIAG_CLIENT = slice(24, 28)
_DIAG_UNREAD = slice(56, 60)  # idiag_rqueue
_INFO = 2  # INET_DIAG_INFO, a struct tcp_info
_TCP_INFO_RECEIVED = slice(128, 136)  # tcpi_bytes_received
_DIAG_UID = 64  # of the u32 idiag_uid in struct inet_diag_msg
_DIAG_INODE = 68  # and of idiag_inode
_NETLINK_SOCK_DIAG = 4
_TCPDIAG_GETSOCK = 18
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = 0x1
_DUMP = 0x300
_NETLINK_ERROR = 2
_NETLINK_DONE = 3
_ATTRIBUTE = Struct("=HH")
_SKV6ONLY = 11  # INET_DIAG_SKV6ONLY
_SHOW_PEER = 4  # UDIAG_SHOW_PEER
_UNIX_DIAG_SIZE = 16
_UNIX_PEER = 2  # UNIX_DIAG_PEER
_UNIX_SHUTDOWN = 6  # UNIX_DIAG_SHUTDOWN
_SHUT_BOTH = b"\3"
_ANY_STATE = 0xFFFFFFFF
_ANY_PORT = 0
_NO_COOKIE = b"\xff" * 8
_OURS_AMONG = 5  # the first words of a command line, one of which is portexec: `python -I -m portexec`
_WIDEST = 60
# LOOPBACK_IFINDEX, net/net_namespace.h: connections within a machine use it; a socket that is bound to it is found only by it.
_LOOPBACK_DEVICE = pack("=I", 1)
_FAMILIES = {4: _socket.AF_INET, 16: _socket.AF_INET6}


class TcpSocket:
    """One row: its local address as bytes in network order, port, state, inode (0 when no process holds it), and user.

    `is_ipv6_only`: it does not serve both families. /proc does not tell that: no socket from there counts as serving both.
    """

    __slots__ = ("address", "inode", "is_ipv6_only", "port", "state", "uid")

    def __init__(self, address: bytes, port: int, state: int, inode: int, uid: int, *, is_ipv6_only: bool = True) -> None:
        self.is_ipv6_only = is_ipv6_only
        self.address = address
        self.port = port
        self.state = state
        self.inode = inode
        self.uid = uid

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
    """The inodes of the sockets that listen on this number, in this network namespace. Raises OSError as `listening_hosts`."""
    return {socket.inode for socket in _listening(port)}


def listeners_on(port: int) -> dict[int, str]:
    """The inode and the address, as in `listening_hosts`, of each socket that listens on this number, as far as can be seen."""
    try:
        return {socket.inode: socket.host for socket in _listening(port)}
    except OSError:
        return {}


def listening_hosts(port: int) -> list[str]:
    """The addresses at which somebody listens on this number, `*` for both families.

    Raises OSError where there is no descriptor or no memory to look with: that says nothing about who listens.
    """
    return [socket.host for socket in _listening(port)]


def listened_on_by(pids: Iterable[int]) -> dict[int, str]:
    """The numbers on which one of these processes listens, each with an address; none where that cannot be seen."""
    try:
        listening = _listening(_ANY_PORT)
    except OSError:
        return {}
    ours = {inode for pid in pids for _, inode in _sockets_of(pid)}
    return {socket.port: socket.host for socket in listening if socket.inode in ours}


def accepted_inode(server: tuple[str, int], client: tuple[str, int]) -> int | None:
    """The inode of the server's end of a connection on this machine, 0 if that end is closed; None until it was accepted.

    Until then the kernel shows that end with inode 0. Raises OSError where sock_diag(7) is refused or not built in.
    """
    family = _socket.AF_INET6 if ":" in server[0] else _socket.AF_INET
    numbers = server[1].to_bytes(2, "big") + client[1].to_bytes(2, "big")
    addresses = b"".join(_socket.inet_pton(family, host).ljust(16, b"\0") for host in (server[0], client[0]))
    try:
        found = list(_ask(family, _REQUEST, _ANY_STATE, numbers + addresses + _LOOPBACK_DEVICE + _NO_COOKIE))
    except FileNotFoundError:
        found = []
    for socket in found:
        if socket.state in (_ESTABLISHED, _SYN_RECV):
            return socket.inode or None
        if socket.state == LISTEN:
            return None
    return 0


def connections_to(host: str, port: int) -> dict[bytes, bool]:
    """The connections to this IPv4 address, by their clients, and of each whether it was read.

    A connection was read if it was accepted, if something has come, and if all of that was read. Raises OSError where
    sock_diag(7) is refused or not built in.
    """
    states = 1 << _ESTABLISHED | 1 << _SYN_RECV | 1 << _CLOSE_WAIT | 1 << _NEW_SYN_RECV
    identity = port.to_bytes(2, "big") + bytes(46)
    request = _DIAG_REQUEST.pack(_socket.AF_INET, _socket.IPPROTO_TCP, 1 << _INFO - 1, 0, states, identity)
    address = _socket.inet_aton(host)
    return {
        message[_DIAG_CLIENT_PORT] + message[_DIAG_CLIENT]: _was_read(message)
        for message in _exchange(request, _REQUEST | _DUMP)
        if message[_DIAG_SERVER] == address
    }


def _was_read(message: bytes) -> bool:
    """Whether a struct inet_diag_msg is of a connection that was accepted, on which something came, and all that was read."""
    unread, inode = message[_DIAG_UNREAD], message[_DIAG_INODE : _DIAG_INODE + 4]
    received = _attribute(message[_DIAG_INODE + 4 :], _INFO)[_TCP_INFO_RECEIVED]
    return any(inode) and not any(unread) and any(received)


def accepted_unix_inode(client: int) -> int | None:
    """The inode of the other end of a unix connection, given that of ours; None until it was accepted, 0 if it is closed.

    linux/unix_diag.h: struct unix_diag_req and _msg, asked for the peer. Raises OSError where sock_diag(7) has no unix sockets.
    """
    request = pack("=BBHIII", _socket.AF_UNIX, 0, 0, _ANY_STATE, client, _SHOW_PEER) + _NO_COOKIE
    for message in _exchange(request, _REQUEST):
        attributes = message[_UNIX_DIAG_SIZE:]
        is_closed = _attribute(attributes, _UNIX_SHUTDOWN) == _SHUT_BOTH
        return int.from_bytes(_attribute(attributes, _UNIX_PEER), sys.byteorder) or (0 if is_closed else None)
    return 0


def accepted_inode_in_proc(server: tuple[str, int], client: tuple[str, int]) -> int | None:
    """As `accepted_inode`, but from /proc, which lists every TCP socket of this network namespace."""
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
    """The sockets that listen on a number, or on any. We ask sock_diag(7), which looks at listening sockets only.

    Where it is refused or not built in, we read /proc, which tells of one number. Raises OSError where there is no descriptor
    or no memory to ask with.
    """
    request = _OLD_DIAG_REQUEST.pack(port.to_bytes(2, "big"), 1 << LISTEN)
    try:
        return list(map(_from_diag, _exchange(request, _REQUEST | _DUMP, _TCPDIAG_GETSOCK)))
    except OSError as error:
        if is_shortage(error):
            raise
        return [socket for socket in sockets_on(port) if socket.state == LISTEN]


def _ask(family: int, flags: int, states: int, identity: bytes) -> Iterator[TcpSocket]:
    """Ask for the TCP sockets of one family: linux/inet_diag.h (struct inet_diag_req_v2 and its answer)."""
    request = _DIAG_REQUEST.pack(family, _socket.IPPROTO_TCP, 0, 0, states, identity)
    return map(_from_diag, _exchange(request, flags))


def _exchange(request: bytes, flags: int, kind: int = _SOCK_DIAG_BY_FAMILY) -> Iterator[bytes]:
    """Ask the kernel over netlink(7), linux/netlink.h and linux/sock_diag.h; yield the bodies of the answers."""
    header = _NETLINK_HEADER.pack(_NETLINK_HEADER.size + len(request), kind, flags, 1, 0)
    socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    try:
        socket.send(header + request)
        while True:
            answer = socket.recv(1 << 16)
            at = 0
            while at + _NETLINK_HEADER.size <= len(answer):
                length, found, *_ = _NETLINK_HEADER.unpack_from(answer, at)
                if found == _NETLINK_DONE:
                    return
                if found == _NETLINK_ERROR:
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
    uid = int.from_bytes(message[_DIAG_UID : _DIAG_UID + 4], sys.byteorder)
    port = int.from_bytes(message[4:6], "big")
    return TcpSocket(message[8 : 8 + size], port, message[1], inode, uid, is_ipv6_only=is_ipv6_only)


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
                    yield TcpSocket(address, port, int(fields[3], 16), int(fields[9]), int(fields[7]))
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
    for pid, _ in descriptors_of([inode]).values():
        return pid, name_of(pid)
    return None


def descriptors_of(inodes: Collection[int]) -> dict[int, tuple[int, int]]:
    """Where each of these sockets is open: a pid and the descriptor there. Sockets that /proc does not show are left out."""
    found: dict[int, tuple[int, int]] = {}
    try:
        pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    except OSError:
        return found
    for pid in pids:
        for fd, inode in _sockets_of(pid):
            if inode in inodes:
                found.setdefault(inode, (pid, fd))
        if len(found) == len(inodes):
            break
    return found


def has_open(pids: Iterable[int], inode: int) -> bool:
    """Whether one of these processes has the socket open."""
    return any(one == inode for pid in pids for _, one in _sockets_of(pid))


def _sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """The descriptor and the inode of each socket that a process has open; none where /proc does not tell."""
    directory = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return
    for descriptor in descriptors:
        try:
            kind, _, inode = os.readlink(f"{directory}/{descriptor}").partition(":")
        except OSError:
            continue
        if kind == "socket":
            yield int(descriptor), int(inode[1:-1])


def name_of(pid: int) -> str:
    """The short name of a process, `?` when it is gone."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as comm:
            return comm.read().rstrip("\n")
    except OSError:
        return "?"


def who_has(port: int) -> str:
    """Say in a few words who keeps the number from us, as far as the kernel tells: `pid 4711, node`; else an empty text."""
    sockets = sorted(sockets_on(port), key=lambda socket: socket.state != LISTEN) + _merely_bound(port)
    for socket in sockets:
        owner = process_of(socket.inode) if socket.inode else None
        if owner is not None:
            return f"pid {owner[0]}, {_words_of_portexec(owner[0]) or owner[1]}"
    holder = next((socket for socket in sockets if socket.state in (LISTEN, _CLOSE)), None)
    if holder is not None:
        return f"a process {_of_user(holder.uid)}that /proc does not show to you"
    if any(socket.state == TIME_WAIT for socket in sockets):
        return "old connections in TIME_WAIT, for up to a minute"
    return ""


def may_have_connections(port: int) -> bool:
    """Whether connections of an earlier server may be left on a number: some are, or /proc does not tell."""
    return any(socket.state != LISTEN for socket in sockets_on(port)) or not os.access("/proc/net/tcp", os.R_OK)


def is_bound_by_others(port: int, inode: int) -> bool:
    """Whether another socket than this one is bound to a number, and does not listen, as far as Linux 6.8 and newer tell."""
    return any(socket.inode != inode for socket in _merely_bound(port))


def _merely_bound(port: int) -> list[TcpSocket]:
    """The sockets that keep a number and do not listen, as guards do. None where the kernel does not tell."""
    identity = port.to_bytes(2, "big") + bytes(46)
    found: list[TcpSocket] = []
    for family in (_socket.AF_INET6, _socket.AF_INET):
        try:
            found += _ask(family, _REQUEST | _DUMP, 1 << _BOUND_INACTIVE, identity)
        except OSError:
            pass
    return [socket for socket in found if socket.port == port and socket.state == _CLOSE]


def _words_of_portexec(pid: int) -> str:
    """The command line of a portexec, which says more than its name; empty for all other processes."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read()).rstrip("\0").split("\0")
    except OSError:
        return ""
    at = next((place for place, word in enumerate(words[:_OURS_AMONG]) if os.path.basename(word) == "portexec"), None)
    text = "" if at is None else " ".join(["portexec", *words[at + 1 :]])
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def _of_user(uid: int) -> str:
    """`of user alice `; empty for our own, and where nobody knows the name."""
    import pwd

    try:
        return "" if uid == os.geteuid() else f"of user {pwd.getpwuid(uid).pw_name} "
    except KeyError:
        return ""
