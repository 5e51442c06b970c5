"""A light HTTP server, quick to start: `light.py [WORD]...`. It answers each GET with a line of text and closes.

    /               hello from PID
    /variable/NAME  the value of a variable, `unset` without one
    /place          the working directory
    /status/N       an answer with this status
    /write/N        after it has written N bytes to standard output and a line `written`, to standard error
    /burst/N        nothing: it writes as much and ends with status 7 at once
    /exit/N         nothing: it ends with this status
    /kill/N         nothing: it ends by this signal

fd=N port=N         serves on this descriptor, on this number; each as often as you like. Else as LISTEN_FDS says, else on $PORT
host=ADDRESS        binds these numbers there; default 127.0.0.1
ignore              ignores TERM
silent              serves nobody, ever
log                 writes a line for each GET to standard error
if=FILE:WORD        WORD, or `exit=N`, if there is such a file

It prints `serving PID` when it is about to serve, `waiting PID` where it never will. A datagram is answered as `/` is.
"""

from __future__ import annotations

import _signal as signal
import os
import select
import sys

import quick_socket as socket  # type: ignore[import-not-found]


def words() -> list[str]:
    """The words that count."""
    found = []
    for word in sys.argv[1:]:
        file, _, then = word.removeprefix("if=").partition(":")
        if not word.startswith("if="):
            found.append(word)
        elif os.path.exists(file):
            found.append(then)
    return found


def values(name: str) -> list[str]:
    return [word.partition("=")[2] for word in words() if word.startswith(f"{name}=")]


def say(text: str, fd: int = 1) -> None:
    os.write(fd, text.encode() + b"\n")


def open_sockets() -> list[socket.socket]:
    numbers = values("port")
    passed = [int(fd) for fd in values("fd")]
    if not numbers and not passed:
        passed = list(range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))))
    if not numbers and not passed:
        numbers = [os.environ["PORT"]]
    return [socket.socket(fileno=fd) for fd in passed] + [bind(int(number)) for number in numbers]


def bind(number: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(((values("host") or ["127.0.0.1"])[0], number))
    made.listen(128)
    return made


def write(count: int) -> None:
    """So many bytes, in lines of a hundred."""
    data = (b"x" * 99 + b"\n") * (count // 100) + b"x" * (count % 100)
    while data:
        data = data[os.write(1, data) :]
    say("written", 2)


def answer(path: str) -> tuple[int, str]:
    what, _, argument = path.strip("/").partition("/")
    if what == "variable":
        return 200, os.environ.get(argument, "unset")
    if what == "place":
        return 200, os.getcwd()
    if what == "status":
        return int(argument), argument
    if what in ("write", "burst"):
        write(int(argument))
    if what in ("exit", "burst"):
        os._exit(int(argument) if what == "exit" else 7)
    if what == "kill":
        os.kill(os.getpid(), int(argument))
    return 200, f"hello from {os.getpid()}"


def serve(connection: socket.socket) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        data = connection.recv(10000)
        if not data:
            return  # a probe
        request += data
    path = request.split()[1].decode()
    if "log" in words():
        say(f"GET {path}", 2)
    status, text = answer(path)
    head = f"HTTP/1.1 {status} -\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
    connection.sendall(head.encode() + text.encode())


def turn(ready: socket.socket) -> None:
    if ready.type == socket.SOCK_DGRAM:
        ready.sendto(f"hello from {os.getpid()}".encode(), ready.recvfrom(10000)[1])
        return
    connection = ready.accept()[0]
    with connection:
        try:
            serve(connection)
        except ConnectionError:
            pass  # the client has left again


def main() -> None:
    if "ignore" in words():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for status in values("exit"):
        os._exit(int(status))
    if "silent" in words():
        say(f"waiting {os.getpid()}")
        while True:
            signal.pause()
    sockets = open_sockets()
    say(f"serving {os.getpid()}")
    while True:
        for ready in select.select(sockets, [], [])[0]:
            turn(ready)


main()
