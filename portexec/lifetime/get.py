"""A GET over a connection of ours, with TLS or without it, on our own loop.

h11 knows HTTP/1.1 and ssl knows TLS. Both work on bytes alone and do no I/O, so that a probe never blocks. Both are imported
only when they are needed. The standard library's http.client takes longer to import than h11, and reads from a blocking file.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from portexec.lifetime.probe import Probe

    T = TypeVar("T")

_MAX_HEAD = 1 << 18  # of an answer, in bytes
_HTTP = b"HTTP/"  # what an answer begins with, RFC 9112 section 4
_TLS_RECORDS = range(0x14, 0x18)  # content types, RFC 8446 section 5.1: the first byte of every TLS record


class Get:
    """One GET over a connection of ours, and what has come of it so far. The certificate is not checked.

    `status` is the answer's, 0 while there is none.
    """

    def __init__(self, probe: Probe, path: str, *, is_tls: bool) -> None:
        self.status = 0
        self._probe = probe
        self._path = path
        self._tls = _Tls(probe) if is_tls else None
        self._began = time.monotonic()
        self._why_no_tls = ""
        self._begin = b""  # of the bytes that have come
        self._is_malformed = False
        self._is_closed = False  # by the other end
        self._is_over = False  # the connection is about to be closed: we cannot look at it any more
        self._was_taken = False

    async def ask(self) -> None:
        """Ask, and wait for the head of the answer, or for the end of the connection."""
        try:
            if self._tls is not None:
                self._why_no_tls = await self._tls.handshake()
            if not self._why_no_tls:
                await self._ask(self._tls or self._probe)
        finally:
            self._was_taken = self.is_taken()
            self._is_over = True

    async def _ask(self, stream: Probe | _Tls) -> None:
        import h11

        connection = h11.Connection(h11.CLIENT, _MAX_HEAD)
        host = "localhost" if self._probe.listener.path else f"{self._probe.listener.host}:{self._probe.listener.port}"
        headers = [("Host", host), ("User-Agent", "portexec"), ("Accept", "*/*"), ("Connection", "close")]
        question = connection.send(h11.Request(method="GET", target=self._path, headers=headers))
        try:
            await stream.send(question or b"")
            while (event := connection.next_event()) is h11.NEED_DATA or isinstance(event, h11.InformationalResponse):
                if event is h11.NEED_DATA:
                    connection.receive_data(await self._receive(stream))
        except OSError:
            self._is_closed = True
        except h11.RemoteProtocolError:
            self._is_malformed = not self._is_closed  # where the connection was closed, the answer is only cut off
        else:
            self.status = event.status_code if isinstance(event, h11.Response) else 0

    async def _receive(self, stream: Probe | _Tls) -> bytes:
        data = await stream.receive()
        self._begin = (self._begin + data)[: len(_HTTP)]
        self._is_closed = not data
        return data

    def seconds(self) -> float:
        """How long ago the GET was begun."""
        return time.monotonic() - self._began

    def is_taken(self) -> bool:
        """Whether somebody has taken the connection: accepted it, or answered."""
        if self._is_over or self._begin:
            return self._was_taken or bool(self._begin)
        try:
            return bool(self._probe.is_taken())
        except OSError:
            return False

    def text(self) -> str:
        """What has come so far, in words that follow `the command`. Empty where nobody has taken the connection."""
        if self.status:
            return f"answered with status {self.status}"
        if self._why_no_tls:
            return self._why_no_tls
        if self._begin:
            return "sent an answer that it did not finish" if self.is_missing() else "sent what is not HTTP/1.1"
        if self._is_closed:
            return "closed the connection without an answer"
        return self._text_of_silence() if self.is_taken() else ""

    def _text_of_silence(self) -> str:
        if self._tls is None or not self._tls.has_begun():
            return "took the connection and sent nothing"
        return "sent no answer" if self._tls.is_agreed else "did not finish the TLS handshake"

    def is_missing(self) -> bool:
        """Whether an answer may still come, now or to the next GET: so far nothing has come, or the beginning of an answer."""
        return not self.status and not self._is_malformed and _HTTP.startswith(self._begin)

    def may_be_tls(self) -> bool:
        """Whether the GET was without TLS, and the server may expect TLS. Most such servers just close the connection."""
        is_plain = self._tls is None and not self.status
        return is_plain and (self._begin[0] in _TLS_RECORDS if self._begin else self._is_closed)

    def has_spoken_tls(self) -> bool:
        """Whether anything of TLS has come, if only that the server refuses."""
        return self._tls is not None and self._tls.has_begun()


def prepare(*, is_tls: bool) -> None:
    """Import what a GET needs, while the command starts."""
    import h11  # noqa: F401

    if is_tls:
        import ssl  # noqa: F401


async def speaks_tls(probe: Probe) -> bool:
    """Whether the other end of the connection answers a TLS handshake."""
    tls = _Tls(probe)
    return not await tls.handshake()


class _Tls:
    """The client's side of TLS over a probe's connection."""

    def __init__(self, probe: Probe) -> None:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        self._probe = probe
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._arrived, self._to_send, server_hostname=probe.listener.host.strip("[]") or None)
        self._want_read = ssl.SSLWantReadError
        self._first = b""  # byte that has come
        self.is_agreed = False

    def has_begun(self) -> bool:
        """Whether something has come, and it is TLS."""
        return bool(self._first) and self._first[0] in _TLS_RECORDS

    async def handshake(self) -> str:
        """Agree on keys. Returns why that failed, in words as those of `Get.text`; empty if it did not."""
        try:
            await self._do(self._session.do_handshake)
        except OSError as error:
            if not self._first:
                return "closed the connection when it was asked for TLS"
            if not self.has_begun():
                return "does not speak TLS there"
            return f"refused the TLS handshake ({_reason(error)})"
        self.is_agreed = True
        return ""

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError."""
        await self._do(lambda: self._session.write(data))

    async def receive(self) -> bytes:
        """Some of what has come; empty at the end. Raises OSError."""
        return await self._do(lambda: self._session.read(1 << 14))

    async def _do(self, step: Callable[[], T]) -> T:
        while True:
            try:
                done = step()
            except self._want_read:
                await self._flush()
                data = await self._probe.receive()
                self._first = self._first or data[:1]
                if data:
                    self._arrived.write(data)
                else:
                    self._arrived.write_eof()
            else:
                await self._flush()
                return done

    async def _flush(self) -> None:
        if data := self._to_send.read():
            await self._probe.send(data)


def _reason(error: OSError) -> str:
    """The words of an error of ssl, which are in capitals, or of the system."""
    reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
    return str(reason).replace("_", " ").lower()
