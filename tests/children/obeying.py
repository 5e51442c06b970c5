"""A server that does what its clients tell it, one line each, and answers with a line: `obeying.py [NAME=VALUE]...`.

It takes the descriptors that LISTEN_FDS or fd= announces, and else binds $PORT itself. Lines:

    stdin       what descriptor 0 is, and what can be read from it; `silent pipe` for one where there is nothing yet
    variable N  the value of the variable N, `unset` without one
    exit N      ends with this status; nothing is answered
    kill N      ends by this signal; nothing is answered

host=HOST      where it binds, 127.0.0.1 by default; `*` is both families
fd=N           serves on this descriptor
gate=FIFO      prints `waiting` and does not serve before somebody has opened the FIFO for writing
notify=yes     says READY=1 when it serves
on=NAME:WAY    what it does at the signal NAME: `ignore` it, `stay` after printing its name, `end` after printing its name

It prints `serving PID` right before it accepts for the first time, or listens if it binds itself.
"""

from __future__ import annotations

import _signal as signal
import _thread
import os
import select
import sys

import quick_socket as socket  # type: ignore[import-not-found]

NAMES: dict[int, str] = {}  # of the signals that it says
OPTIONS = [(name, value) for name, _, value in (word.partition("=") for word in sys.argv[1:])]


def option(name: str, default: str = "") -> str:
    return dict(OPTIONS).get(name, default)


def say(*words: object) -> None:
    """A line in one piece, however Python was told to buffer: others write to the same pipe."""
    if sys.stdout is not None:
        os.write(1, " ".join(map(str, words)).encode() + b"\n")


def act_on_signals(ends: list[int]) -> None:
    while True:
        number = signal.sigwait(NAMES)
        say(NAMES[number])
        if number in ends:
            os._exit(0)


def set_signals() -> None:
    """Have a thread wait for signals: a handler in Python waits, too, if the signal comes just before a call that blocks."""
    ends = []
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, value in OPTIONS:
        if name == "on":
            told, _, way = value.partition(":")
            number = getattr(signal, told)
            if way == "ignore":
                signal.signal(number, signal.SIG_IGN)
            else:
                NAMES[number] = told
                ends += [number] if way == "end" else []
    signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
    _thread.start_new_thread(act_on_signals, (ends,))


def wait_at_gate() -> None:
    if option("gate"):
        say("waiting")
        with open(option("gate")):
            pass


def open_sockets() -> list[socket.socket]:
    first = int(option("fd", "3"))
    count = 1 if option("fd") else int(os.environ.get("LISTEN_FDS", "0"))
    if count:
        say("serving", os.getpid())
        return [socket.socket(fileno=number) for number in range(first, first + count)]
    host = option("host", "127.0.0.1").strip("[]")
    family = socket.AF_INET6 if host == "*" or ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
    listener.bind(("" if host == "*" else host, int(os.environ["PORT"])))
    say("serving", os.getpid())
    listener.listen()
    return [listener]


def notify() -> None:
    if option("notify"):
        name = os.environ["NOTIFY_SOCKET"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", f"\0{name[1:]}" if name.startswith("@") else name)


def describe_stdin() -> str:
    try:
        kind = os.readlink("/proc/self/fd/0")
        if kind.startswith("pipe:") and not select.select([0], [], [], 0)[0]:
            return "silent pipe"
        return f"{kind} {os.read(0, 1000)!r}"
    except OSError as error:
        return str(error)


def read_line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        data = connection.recv(1000)
        if not data:
            break
        line += data
    return line.decode()


def obey(word: str, argument: str) -> str:
    if word == "stdin":
        return describe_stdin()
    if word == "variable":
        return os.environ.get(argument, "unset")
    if word == "exit":
        os._exit(int(argument))
    if word == "kill":
        if int(argument) != signal.SIGKILL:
            signal.signal(int(argument), signal.SIG_DFL)
        os.kill(os.getpid(), int(argument))
    return ""


def main() -> None:
    set_signals()
    wait_at_gate()
    listeners = open_sockets()
    notify()
    while True:
        for ready in select.select(listeners, [], [])[0]:
            connection = ready.accept()[0]
            with connection:
                line = read_line(connection)
                if line:  # a probe says nothing
                    connection.sendall(obey(*line.rstrip("\n").partition(" ")[::2]).encode() + b"\n")


main()
