"""A server that does what it is told, line by line on its standard input, so that a test decides what happens when.

    obedient.py [LINE]...    does these lines first

It prints `up PID`, and before it does what a line says, the word of it, so that in a pipe that portexec writes to as well, what
comes of a line is behind its word. KEY names a socket: the variable with its number, or any word for a descriptor.

    bind KEY HOST       a socket bound to the number in $KEY; HOST `*` for both families on one socket
    take KEY FD         the socket that was passed as this descriptor
    listen KEY          close KEY    shutdown KEY
    pending KEY COUNT   wait until so many connections wait to be accepted
    accept KEY          take one, send `accepted`, close it
    reset KEY           take one, and end it by a reset
    keep KEY            take one, and leave it open without a word
    reply KEY HEX       take one, read what it asks, print `asked` and its first line, answer with these bytes, close it
    notify TEXT         send TEXT, `\\n` for a new line, to $NOTIFY_SOCKET, if need be as another user: `notify-as UID TEXT`,
                        which is over when it was taken: that user's process sends a barrier, sd_notify_barrier(3)
    ignore SIGNAL
    exit STATUS

It prints `turn` for each SIGUSR1, whatever it is at: a thread waits for it, since a handler written in Python can come too late
for a system call that begins to block just then. Each line is one write. With $ORDERS, a directory, it makes a FIFO there,
named 1 for the first start, 2 for the second, and reads that instead of standard input.
"""

from __future__ import annotations

import _signal as signal
import _thread
import os
import struct
import sys
import time
from _collections_abc import Callable

import quick_socket as socket  # type: ignore[import-not-found]

TCP_INFO_UNACKED = 24  # of a listener, the connections that wait, linux/tcp.h

sockets: dict[str, socket.socket] = {}
kept: list[socket.socket] = []


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode(errors="replace") + b"\n")


def bind(key: str, host: str) -> None:
    made = socket.socket(socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if made.family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*" and not host.startswith("::ffff:"))
    made.bind(("::" if host == "*" else host, int(os.environ.get(key, "0"))))
    sockets[key] = made


def take(key: str, fd: str) -> None:
    if key not in sockets:
        sockets[key] = socket.socket(fileno=int(fd))


def waiting(listener: socket.socket) -> int:
    if listener.family != socket.AF_UNIX:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int.from_bytes(info[TCP_INFO_UNACKED : TCP_INFO_UNACKED + 4], sys.byteorder)
    name = listener.getsockname()
    shown = b"@" + name[1:] if isinstance(name, bytes) else os.fsencode(name)
    with open("/proc/net/unix", "rb") as table:
        return sum(line.rstrip(b"\n").endswith(b" " + shown) and line.split(None, 7)[6] == b"0" for line in table)


def pending(key: str, count: str) -> None:
    while waiting(sockets[key]) < int(count):
        time.sleep(0.002)
    say("waiting", waiting(sockets[key]))


def accepted(key: str) -> socket.socket:
    return sockets[key].accept()[0]


def accept(key: str) -> None:
    with accepted(key) as connection:
        try:
            connection.sendall(b"accepted")
        except ConnectionError:
            pass  # the client has left again


def reset(key: str) -> None:
    with accepted(key) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def keep(key: str) -> None:
    kept.append(accepted(key))


def reply(key: str, hexadecimal: str = "") -> None:
    with accepted(key) as connection:
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += connection.recv(1000) or b"\r\n\r\n"
        say("asked", asked.decode(errors="replace").rstrip("\r\n").replace("\r\n", "|"))
        connection.sendall(bytes.fromhex(hexadecimal))


def notify(text: str, *, with_barrier: bool = False) -> None:
    name = os.environ["NOTIFY_SOCKET"]
    address = f"\0{name[1:]}" if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(text.replace("\\n", "\n").encode(), address)
        if with_barrier:
            reader, writer = os.pipe()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", writer))
            sender.sendmsg([b"BARRIER=1"], [rights], 0, address)
            os.close(writer)
            os.read(reader, 1)


def notify_as(uid: str, text: str) -> None:
    """In a child; says how that went, when it is over."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setuid(int(uid))
            notify(text, with_barrier=True)
            status = 0
        finally:
            os._exit(status)
    say("sent" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "failed")


KNOWN: dict[str, Callable[..., None]] = {
    "bind": bind,
    "take": take,
    "pending": pending,
    "accept": accept,
    "reset": reset,
    "keep": keep,
    "reply": reply,
}


def obey(line: str) -> None:
    word, *rest = line.split()
    say(word)
    if word in ("notify", "notify-as"):
        words = line.split(None, 1 if word == "notify" else 2)[1:]
        (notify if word == "notify" else notify_as)(*words)
    elif word == "exit":
        os._exit(int(rest[0]))
    elif word in ("listen", "close"):
        getattr(sockets[rest[0]], word)()
    elif word == "ignore":
        signal.signal(getattr(signal, rest[0]), signal.SIG_IGN)
    elif word == "shutdown":
        try:
            sockets[rest[0]].shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was shut down before, which has its effect all the same
    else:
        KNOWN[word](*rest)


def source() -> int:
    """Where the lines come from."""
    if "ORDERS" not in os.environ:
        return 0
    for number in range(1, 100):
        path = f"{os.environ['ORDERS']}/{number}"
        try:
            os.mkfifo(path)
        except FileExistsError:
            continue
        return os.open(path, os.O_RDWR)  # for writing as well, so that it does not end
    raise AssertionError("too many starts")


def answer_signals() -> None:
    while True:
        signal.sigwait([signal.SIGUSR1])
        say("turn")


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    _thread.start_new_thread(answer_signals, ())
    lines_from = source()
    say("up", os.getpid())
    for line in sys.argv[1:]:
        obey(line)
    with open(lines_from, "rb", buffering=0) as lines:  # byte by byte: what follows may be for another process
        while line := lines.readline().decode():
            obey(line)


if __name__ == "__main__":
    main()
