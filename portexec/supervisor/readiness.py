"""Readiness: when a command counts as ready, and waiting for it. One function for each form of `--ready`.

listen  with `guard` the moment of the admitted listen(2); else the kernel's own list, never by connecting
accept  a connection of ours waits in the backlog until the command has accepted it. Without a protocol, and exactly: until
        then the kernel shows a connection with inode 0 (sock_diag(7)), so other clients do not blur it; where that is
        refused, the listener's TCP_INFO counts its backlog
http    a GET on the first listener is answered with a status under 500
notify  READY=1 on NOTIFY_SOCKET, sd_notify(3)
none    at once
"""

from __future__ import annotations

import _socket
import os
import sys
import time
from functools import partial

import anyio
from anyio.abc import ByteStream, SocketAttribute

from portexec import supervision, tcp_table, unix_sockets
from portexec.sockets import Listener
from portexec.supervisor import tree
from portexec.supervisor.generation import Generation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_RETRY = 0.05  # seconds between two attempts of which the first has shown that it is too early
_LONGEST_ANSWER = 30.0  # seconds for one GET; then another is tried
_SHORTEST_POLL = 0.002
_POLLS = 1000  # the pause between two looks is this part of what was waited so far, so that long waits cost little
_TCP_INFO_SIZE = 104
_TCP_INFO_UNACKED = 24  # of tcpi_unacked in struct tcp_info, linux/tcp.h; of a listener, the connections in its backlog


class Readiness:
    """How one generation of a command becomes ready.

    `is_shared`: another generation accepts from the same sockets, so that it matters who has accepted.
    """

    def __init__(
        self,
        ready: supervision.Ready,
        listeners: Sequence[Listener],
        generation: Generation,
        *,
        is_admitted: bool,
        is_shared: bool,
    ) -> None:
        self.ready = ready
        self.listeners = [listener for listener in listeners if listener.kind != "udp"]
        self.generation = generation
        self.is_admitted = is_admitted
        self.is_shared = is_shared
        self._began = time.monotonic()

    async def wait(self) -> None:
        """Return when the command is ready."""
        form = self.ready.form
        if form == supervision.NOTIFY:
            await self.generation.said_ready.wait()
        elif form == supervision.LISTEN:
            await self._all_listen()
        elif form == supervision.ACCEPT:
            await self._all_accept()
        elif form == supervision.HTTP:
            await self._answers(self.listeners[0])
        for listener in self.listeners:
            if listener.socket is None:
                listener.follow(self._hosts(listener))

    def what(self) -> str:
        """What is waited for, in words that follow `waiting for the command to`."""
        where = ", ".join(listener.path or f"{listener.host}:{listener.port}" for listener in self.listeners)
        if self.ready.form == supervision.NOTIFY:
            said = f" (it says: {self.generation.status_text})" if self.generation.status_text else ""
            return f"send READY=1 to $NOTIFY_SOCKET{said}"
        if self.ready.form == supervision.HTTP:
            return f"answer GET {self.listeners[0].url}{self.ready.argument} with a status under 500"
        return f"{'accept a connection' if self.ready.form == supervision.ACCEPT else 'listen'} on {where}"

    async def _all_listen(self) -> None:
        for listener in self.listeners:
            await self._listens(listener)

    async def _listens(self, listener: Listener) -> None:
        """Wait until somebody listens; for the descriptors that we pass on, that is so from the start."""
        if listener.socket is not None:
            return
        if self.is_admitted:
            await self.generation.listens_on(listener.port)
        while not (hosts := self._hosts(listener)):
            await self._pause()
        listener.follow(hosts)

    def _hosts(self, listener: Listener) -> list[str]:
        """Where the command listens, as admission saw, or else the kernel tells."""
        seen = [host for host in self.generation.hosts.get(listener.port, ()) if host]
        return seen or tcp_table.listening_hosts(listener.port)

    async def _all_accept(self) -> None:
        async with anyio.create_task_group() as tasks:
            for listener in self.listeners:
                tasks.start_soon(self._accepts, listener)

    async def _accepts(self, listener: Listener) -> None:
        await (await self._accepted(listener)).aclose()

    async def _accepted(self, listener: Listener) -> ByteStream:
        """A connection that the command, this generation of it, has accepted."""
        await self._listens(listener)
        while True:
            stream = await self._connected(listener)
            is_taken = False
            try:
                is_taken = await self._is_taken(stream, listener)
            finally:
                if not is_taken:  # nor when we are cancelled: a server with one worker would wait for us
                    await anyio.aclose_forcefully(stream)
            if is_taken:
                return stream
            await anyio.sleep(_RETRY)

    async def _connected(self, listener: Listener) -> ByteStream:
        while True:
            try:
                if listener.path:
                    return await anyio.connect_unix(unix_sockets.address(listener.path))
                return await anyio.connect_tcp(listener.host.strip("[]"), listener.port)
            except OSError:
                await anyio.sleep(_RETRY)

    async def _is_taken(self, stream: ByteStream, listener: Listener) -> bool:
        """Wait until the connection was accepted. False: by another generation, or by nobody who can be told."""
        find = self._finder(stream, listener)
        while (inode := find()) is None:
            await self._pause()
        return not self.is_shared or tcp_table.has_open(tree.descendants(root=self.generation.shim.pid), inode)

    def _finder(self, stream: ByteStream, listener: Listener) -> Callable[[], int | None]:
        """A function that tells the inode of the connection's other end, 0 if nobody knows, None until it was accepted.

        The first of these that this machine allows; what only counts a backlog does not know who has accepted.
        """
        if listener.path:
            ours = os.fstat(stream.extra(SocketAttribute.raw_socket).fileno()).st_ino
            ways: list[Callable[[], int | None]] = [
                lambda: tcp_table.accepted_unix_inode(ours),
                lambda: None if tcp_table.unix_backlog(listener.path) else 0,
            ]
        else:
            server, client = _end(stream, SocketAttribute.remote_address), _end(stream, SocketAttribute.local_address)
            ways = [
                lambda: tcp_table.accepted_inode(server, client),
                lambda: tcp_table.accepted_inode_in_proc(server, client),
            ]
            if listener.socket is not None and not self.is_shared:
                ways.insert(1, partial(_none_while_waiting, listener.socket))
        for way in ways:
            try:
                way()
            except OSError:
                continue
            return way
        return lambda: 0

    async def _answers(self, listener: Listener) -> None:
        await self._listens(listener)
        while True:
            stream = await (self._accepted(listener) if listener.socket is not None else self._connected(listener))
            with anyio.move_on_after(_LONGEST_ANSWER):
                if await _status_of_get(stream, listener, self.ready.argument) < 500:
                    return
            await anyio.sleep(_RETRY)

    async def _pause(self) -> None:
        await anyio.sleep(max(_SHORTEST_POLL, (time.monotonic() - self._began) / _POLLS))


async def _status_of_get(stream: ByteStream, listener: Listener, path: str) -> int:
    """The status that a GET is answered with; 599 where the answer is no HTTP."""
    host = "localhost" if listener.path else f"{listener.host}:{listener.port}"
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: portexec\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    answer = b""
    async with stream:
        try:
            await stream.send(request.encode())
            while b"\r\n" not in answer:
                answer += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass
    words = answer.split(None, 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 599


def _end(stream: ByteStream, attribute: tuple[str, int] | str) -> tuple[str, int]:
    """The address and the number of one end of a TCP connection."""
    address = stream.extra(attribute)
    return str(address[0]), int(address[1])


def _none_while_waiting(socket: _socket.socket) -> int | None:
    return None if _backlog_of(socket) else 0


def _backlog_of(socket: _socket.socket) -> int:
    info = socket.getsockopt(_socket.IPPROTO_TCP, _socket.TCP_INFO, _TCP_INFO_SIZE)
    return int.from_bytes(info[_TCP_INFO_UNACKED : _TCP_INFO_UNACKED + 4], sys.byteorder)
