"""The control descriptor: how a program drives portexec, such as the Python API. JSON lines over a stream socket.

    portexec -> program   {"event": "bound", "hand_off": ..., "listeners": [...]}     before the command starts
                          {"event": "started", "pid": ..., "asked_for": ...}          whether "restart" has asked for it
                          {"event": "idle", "asked_for": ...}                         with --lazy, the next one waits
                          {"event": "ready", "pid": ..., "listeners": [...]}          where it really listens
                          {"event": "ended", "status": ..., "by_itself": ...}         the command: a status of waitpid(2), and
                                                                                      whether nobody had told it to end
                          {"event": "error", "kind": ..., "message": ..., "hint": ..., "about": ...}   about an option
    program -> portexec   {"do": "restart"}                                           stop the tree, start it anew
                          {"do": "signal", "number": ..., "last": ...}                send the command this signal; `true`: no
                                                                                      start is to follow its end
                          {"do": "kill"}                                              stop the tree by KILL
                          {"do": "stop"}                                              the end of the socket asks for that, too
                          {"do": "let go"}                                            go on alone; no more events are sent

The end of the socket is the news that portexec has ended, and that nothing of the command is left. If portexec is killed, the
end comes when its shim has stopped the tree.

A *host* (`portexec.host`, which the Python API starts) runs several servers over one such socket. Then each event and each
request has the server's number as its `id`, and there are three more:

    program -> host       {"do": "serve"}           comes with three descriptors: a file with the order, see below; the end of a
                                                    pipe, for the output of the command; the directory that it is to run in. A
                                                    fourth is its standard input, else that is a silent pipe
    host -> program       {"event": "gone"}         nothing of this server is left, or there is no such server
                          {"event": "failed", "text": ...}   the host itself has failed, with all its servers; has no `id`

"ended" has one more field, `unread`: how many bytes of the output were in the pipe then. So a program that reads later can tell
them from those of the next start.

When the host is killed, the shim of each of its servers stops it, and then sends "gone" with the field `orphaned`. That line
may come after the beginning of another one that the host could not finish.

The order is a JSON object: the `id` again, the `words` of portexec's command line, the `environment`, the `umask`, and soft
`limits` by their numbers in setrlimit(2). A malformed order is answered by an error.

A server may have a `name`, which is empty for none. `group` is empty, or [number, size] of a group of servers that are started
together. Each of them waits until all are bound, and has templates such as `{name.url}` for all. When one cannot be bound, all
are gone. `others` are more templates, by what stands between the braces.
"""

from __future__ import annotations

import _socket
import os
import select
import stat
import sys
import time
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_STREAM

from portexec.errors import PortexecError, UsageError
from portexec.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

RESTART = "restart"
STOP = "stop"
LET_GO = "let go"
SIGNAL = "signal"
KILL = "kill"
SERVE = "serve"

_MAX_SIGNAL = 64
_MAX_ID = 1 << 62
_MAX_DESCRIPTORS = 253  # SCM_MAX_FD, which a message can bring
_INT = 4  # bytes
_RIGHTS = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)

_MAX_REQUEST = 1 << 16  # bytes; a longer line is no request
_MAX_ORDER = 1 << 25  # bytes; more than words and environment of a command can have, however JSON writes them
_MAX_UNSENT = 1 << 20  # bytes; a program that leaves so much unread is told no more
_AT_ONCE = 1 << 16  # bytes
_PATIENCE = 1.0  # seconds that we wait for a program that does not read, where there is nothing else to do


def why_not(fd: int) -> str:
    """Why no program can drive portexec over this descriptor; empty if one can."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return "this descriptor is no socket"
    except OSError:
        return "this descriptor is not open"
    end = _socket.socket(fileno=fd)
    try:
        if end.type != SOCK_STREAM:
            return "this descriptor is no stream socket"
        end.getpeername()
    except OSError:
        return "this socket is not connected"
    finally:
        end.detach()
    return ""


def usable(text: str | None) -> int | None:
    """The descriptor that was given as text, if a program can be told of an error over it."""
    is_number = text is not None and text.isascii() and text.isdigit() and len(text) < 9
    return int(text) if text is not None and is_number and not why_not(int(text)) else None


def is_heard(fd: int) -> bool:
    """Whether the other end is open."""
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)


class Events:
    """The events for the descriptor. If the program does not read, they wait here, up to a limit, and nothing else does."""

    __slots__ = ("_fd", "_unsent", "is_full")

    def __init__(self, fd: int, unsent: bytes = b"") -> None:
        self.is_full = False  # the limit was reached, and an event was dropped
        self._fd = fd
        self._unsent = bytearray(unsent)  # not bytes, of which each event would copy all that waits

    def tell(self, event: str, **fields: object) -> bool:
        """Send an event, as much of it as goes at once. Whether nothing waits. It is no error if the program has gone."""
        self.is_full = len(self._unsent) > _MAX_UNSENT
        if not self.is_full:
            self._unsent += dumps({"event": event, **fields}).encode() + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Send what waits, as much of it as goes at once. Whether nothing waits any more."""
        try:
            while self._unsent:
                del self._unsent[: _send(self._fd, self._unsent)]
        except BlockingIOError:
            return False
        except OSError:
            self._unsent.clear()
        return True

    def finish(self) -> None:
        """Give a program that is slow a last chance to read."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        deadline = time.monotonic() + _PATIENCE
        while not self.flush() and time.monotonic() < deadline:
            poll.poll(max(0, deadline - time.monotonic()) * 1000)


def tell(fd: int, event: str, **fields: object) -> None:
    """Send an event, and give the program a moment to read."""
    events = Events(fd)
    if not events.tell(event, **fields):
        events.finish()


def tell_gone(fd: int, id: int) -> None:
    """Send `gone` for a server whose host was killed, perhaps in the middle of a line."""
    events = Events(fd, unsent=b"\n")
    if not events.tell("gone", id=id, orphaned=True):
        events.finish()


def tell_error(fd: int, error: PortexecError) -> None:
    """Send an error, and give the program a moment to read."""
    tell(fd, "error", **error_fields(error))


def kind_of(event: Mapping[str, Any]) -> type[PortexecError]:
    """The class of an error that was told: the inverse of `error_fields`."""
    from portexec import errors, server_errors

    kind: type[PortexecError] = {**vars(errors), **vars(server_errors)}.get(event["kind"], PortexecError)
    return kind


def error_fields(error: PortexecError) -> dict[str, str]:
    """The fields of an error: the name of its class, and its text. A usage error has its option in a field of its own."""
    about = error.about if isinstance(error, UsageError) else ""
    message = error.what if isinstance(error, UsageError) else error.message
    return {"kind": type(error).__name__, "message": message, "hint": error.hint, "about": about}


class Request:
    """One request. `asked` is empty where it is not understood.

    `number` is that of a signal, `id` that of a server, and 0 is none. `is_last`: the command is not to be started again.
    """

    __slots__ = ("asked", "id", "is_last", "number")

    def __init__(self, asked: str, number: int = 0, id: int = 0, *, is_last: bool = False) -> None:
        self.asked = asked
        self.number = number
        self.id = id
        self.is_last = is_last


class Requests:
    """The requests that come over the descriptor, perhaps in pieces. `is_over`: no more will come."""

    def __init__(self, fd: int) -> None:
        self.is_over = False
        self._fd = fd
        self._rest = b""
        self._is_too_long = False  # the line that is being received; what comes of it is dropped
        self._descriptors: list[list[int]] = []  # descriptors that have come, and that no request has taken yet

    def receive(self) -> list[Request]:
        """The next requests. The end of the socket is a request to stop.

        A line that is too long is left out.
        """
        try:
            data, descriptors = _receive(self._fd)
        except BlockingIOError:
            return []
        except OSError:  # the other end was closed before it had read all
            data, descriptors = b"", []
        if descriptors:
            self._descriptors.append(descriptors)
        if not data:
            self.is_over = True
            return [Request(STOP)]
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._is_too_long and lines:
            del lines[0]
            self._is_too_long = False
        if self._is_too_long or len(self._rest) > _MAX_REQUEST:
            self._rest = b""
            self._is_too_long = True
        return [_request(line) for line in lines]

    def take_descriptors(self) -> list[int]:
        """The descriptors that have come with the request. The caller has to close them."""
        return self._descriptors.pop(0) if self._descriptors else []

    def drop_descriptors(self) -> None:
        """Close the descriptors that came with requests that take none."""
        while self._descriptors:
            for fd in self._descriptors.pop():
                os.close(fd)


def _request(line: bytes) -> Request:
    request = _parsed(line)
    if not isinstance(request, dict):
        return Request("")
    asked = request.get("do")
    return Request(
        asked if isinstance(asked, str) else "",
        _in_range(request.get("number"), _MAX_SIGNAL),
        _in_range(request.get("id"), _MAX_ID),
        is_last=request.get("last") is True,
    )


def _in_range(number: object, highest: int) -> int:
    return number if isinstance(number, int) and 0 < number <= highest else 0


class Order:
    """An order to a host: the words of a command line, and all that portexec would otherwise inherit."""

    __slots__ = ("environment", "group", "id", "limits", "name", "others", "umask", "words")

    def __init__(
        self,
        id: int,
        words: list[str],
        environment: dict[str, str],
        umask: int,
        limits: dict[int, int],
        name: str,
        group: list[int],
        others: dict[str, str],
    ) -> None:
        self.id = id
        self.words = words
        self.environment = environment
        self.umask = umask
        self.limits = limits
        self.name = name
        self.group = group
        self.others = others

    def write(self) -> bytes:
        """The order as it is sent."""
        return dumps({name: getattr(self, name) for name in self.__slots__}).encode()

    @classmethod
    def read(cls, fd: int, id: int) -> Order | None:
        """The order in a file; None where there is none for this server."""
        try:
            size = os.fstat(fd).st_size
            told = _parsed(os.pread(fd, size, 0)) if size <= _MAX_ORDER else None
        except OSError:
            return None
        if not isinstance(told, dict) or set(told) != set(cls.__slots__) or told["id"] != id:
            return None
        words, environment, others, limits = (told[name] for name in ("words", "environment", "others", "limits"))
        name, group, umask = told["name"], told["group"], told["umask"]
        are_lists = isinstance(words, list) and isinstance(group, list) and len(group) in (0, 2)
        if not are_lists or not all(isinstance(each, dict) for each in (environment, others, limits)):
            return None
        texts = (name, *words, *environment, *environment.values(), *others, *others.values())
        are_texts = all(isinstance(text, str) and "\0" not in text for text in texts)
        are_numbers = all(isinstance(number, int) for number in (umask, *group, *limits.values()))
        if not (are_texts and are_numbers and all(map(str.isdigit, limits))):
            return None
        soft_limits = {int(number): soft for number, soft in limits.items()}
        return cls(id, words, environment, umask & 0o777, soft_limits, name, group, others)


def _parsed(line: bytes) -> object:
    try:
        return loads(line)
    except (ValueError, RecursionError):  # RecursionError: of [[[[...
        return None


def _send(fd: int, data: bytearray) -> int:
    """Send what goes at once. The descriptor may be blocking, and stays so: other processes may have it. Raises OSError."""
    end = _socket.socket(fileno=fd)
    try:
        return end.send(data[:_AT_ONCE], MSG_DONTWAIT | MSG_NOSIGNAL)
    finally:
        end.detach()


def _receive(fd: int) -> tuple[bytes, list[int]]:
    """What has come, and the descriptors with it, close-on-exec. Raises OSError."""
    end = _socket.socket(fileno=fd)
    try:
        room = _socket.CMSG_SPACE(_MAX_DESCRIPTORS * _INT)
        data, ancillary, _, _ = end.recvmsg(_AT_ONCE, room, MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC)
    finally:
        end.detach()
    content = b"".join(content for level, kind, content in ancillary if (level, kind) == _RIGHTS)
    return data, [int.from_bytes(content[at : at + _INT], sys.byteorder) for at in range(0, len(content) - _INT + 1, _INT)]
