"""A server, or tests, with processes below it that are hard to get rid of: `stubborn.py TEMPER ROLE [WORD]...`.

It has a child with a child of its own, a daemon (the child of a child that has ended), a child in a session of its own, and one
that has stopped itself, so that no TERM reaches it. /proc/PID/comm says which is which. With the temper `calm` all of
them end at a signal, with `ignoring` they ignore TERM, INT and HUP.

When all run, a line `ROLE PID` is appended to the file $REPORT. At USR1 it ends with status 9, and leaves them.
A `server` takes the descriptors of LISTEN_FDS, or binds $PORT, and says READY=1, but not with the word `never`.
With a number as word it ends with that status as soon as all run.
"""

from __future__ import annotations

import _signal as signal
import os
import sys
from _collections_abc import Callable

import quick_socket as socket  # type: ignore[import-not-found]

TEMPER, ROLE, *WORDS = sys.argv[1:]


def wait() -> None:
    while True:
        signal.pause()


def wait_for_usr1() -> None:
    """It is blocked, so that it can come at any time. A handler in Python misses one that comes just before pause(2)."""
    signal.sigwait([signal.SIGUSR1])
    os._exit(9)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    wait()


def fork(name: str, *work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    with open("/proc/self/comm", "w") as file:
        file.write(name)
    for step in work:
        step()
    os._exit(0)


def have_children() -> None:
    ready, tell = os.pipe()

    def is_there() -> None:
        os.write(tell, b"1")

    fork("child", lambda: fork("grandchild", is_there, wait), wait)
    daemon = fork("parent", lambda: fork("daemon", os.setsid, is_there, wait))
    fork("session", os.setsid, is_there, wait)
    stopped = fork("stopped", stop)
    os.waitpid(daemon, 0)
    os.waitpid(stopped, os.WUNTRACED)
    for _ in range(3):
        os.read(ready, 1)
    os.close(ready)
    os.close(tell)


def serve() -> list[socket.socket]:
    count = int(os.environ.get("LISTEN_FDS", "0"))
    if count:
        return [socket.socket(fileno=number) for number in range(3, 3 + count)]
    return [socket.create_server(("127.0.0.1", int(os.environ["PORT"])))]


def notify() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


def report() -> None:
    fd = os.open(os.environ["REPORT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{ROLE} {os.getpid()}\n".encode())
    os.close(fd)


def main() -> None:
    if TEMPER == "ignoring":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    have_children()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    sockets = serve() if ROLE == "server" else []
    report()
    if sockets and "never" not in WORDS:
        notify()
    for word in WORDS:
        if word.isdigit():
            os._exit(int(word))
    wait_for_usr1()


main()
