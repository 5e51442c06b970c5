"""A command that leaves others running: `tree.py WAY`, where WAY says how. Prints the pids that it left, then `ready`.

daemon   ends by itself at once and leaves a process in a session of its own, which binds $PORT when it is told to
ignore   stays, with a grandchild in another session; both ignore TERM
plain    stays, with a child and an orphaned grandchild
"""

import _signal as signal
import os
import sys

import quick_socket as socket  # type: ignore[import-not-found]


def fork(work):
    pid = os.fork()
    if pid:
        return pid
    work()
    os._exit(0)


def wait():
    while True:
        signal.pause()


def daemon():
    def serve():
        os.setsid()
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        with open(sys.argv[2]):  # a FIFO: goes on when the test opens it
            pass
        made = socket.socket()
        made.bind(("127.0.0.1", int(os.environ["PORT"])))
        made.listen()
        made.accept()[0].sendall(b"served")

    print(fork(serve), flush=True)


def ignore():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def child():
        os.setsid()
        wait()

    print(fork(child), os.getpid(), flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("ready", flush=True)
    wait()


def plain():
    reader, writer = os.pipe()

    def child():
        os.write(writer, b"%d" % fork(wait))

    os.waitpid(fork(child), 0)
    print(os.read(reader, 20).decode(), fork(wait), flush=True)
    print("ready", flush=True)
    wait()


{"daemon": daemon, "ignore": ignore, "plain": plain}[sys.argv[1]]()
