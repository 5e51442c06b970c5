"""A program whose binds can only be gated. It prints $PORT, and then does what each line on stdin says.

others      opens many sockets that are not for the number, unix and TCP; `done` when it has
serve       binds the number and listens, prints `serving` or the error, and answers for ever
again       binds the number, listens and closes, many times; `done`, or the error
together    binds many sockets of it before they listen; `done`, or the error
hidden      is not dumpable from now on; `done`
thread      serves in a thread whose process has lost its first one
own_table   serves in a thread with a table of descriptors of its own
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading

import quick_socket as socket  # type: ignore[import-not-found]

CLONE_FILES = 0x400
PR_SET_DUMPABLE = 4
MANY = 300
MANY_TIMES = 40  # more than portexec keeps of sockets that are gone
libc = ctypes.CDLL(None, use_errno=True)


def serve():
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = int(os.environ["PORT"])
    for call in (lambda: made.bind(("127.0.0.1", port)), made.listen):
        try:
            call()
        except OSError as error:
            say(errno.errorcode[error.errno or 0])
            return
    say("serving")
    while True:
        made.accept()[0].close()


def say(text):
    print(text, flush=True)


def others():
    for n in range(MANY):
        local, other = socket.socket(socket.AF_UNIX), socket.socket()
        local.bind(f"\0portexec-test-{os.getpid()}-{n}")
        other.bind(("127.0.0.1", 0))
        for made in (local, other):
            made.listen()
            made.close()
    say("done")


def again():
    report(lambda: [listening(bound(1)).close() for _ in range(MANY_TIMES)])


def together():
    report(lambda: [listening(made) for made in [bound(n) for n in range(1, MANY_TIMES)]])


def report(act):
    try:
        act()
    except OSError as error:
        say(errno.errorcode[error.errno or 0])
    else:
        say("done")


def bound(n):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((f"127.0.0.{n}", int(os.environ["PORT"])))
    return made


def listening(made):
    made.listen()
    return made


def hidden():
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    say("done")


def thread():
    first = threading.main_thread().native_id

    def work():
        while open(f"/proc/{os.getpid()}/task/{first}/stat").read().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
        serve()

    threading.Thread(target=work).start()
    libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)


def own_table():
    def work():
        libc.unshare(CLONE_FILES)
        serve()

    threading.Thread(target=work, daemon=True).start()


def main():
    say(os.environ["PORT"])
    while line := sys.stdin.readline():
        globals()[line.strip()]()


main()
