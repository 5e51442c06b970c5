"""Does with sockets what each line on stdin says, and answers each with a line: `puppet.py [OPTION]... NUMBER...`.

    puppet.py --own-network --as 1000 --inherited 4 20000,20001,...

First it says its pid and the numbers. Then a line is a JSON list: a word of `Worker` and its arguments. `begin N` starts a
process for the N-th number, which has all the sockets of one sequence, and `end` ends it. `restart` does both, as a reloader
would, for the same number. `exit STATUS` is the end of all, and so is `fail`, said while a sequence is under way.
`--own-network`: in a network namespace, with nobody else. `--as UID`: become that user first. `--inherited FD`: for the N-th
number a listener comes as descriptor FD + N.
"""

from __future__ import annotations

import _signal as signal
import ctypes
import errno
import fcntl
import os
import select
import struct
import sys

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]

MPTCP = 262
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
RESTART = 77  # the exit status of a worker that another one is to follow
FAIL = 78  # that of one which may not kill its parent
PATIENCE = 5.0
FAMILIES = {"4": socket.AF_INET, "6": socket.AF_INET6, "46": socket.AF_INET6}


def read_line():
    """A line of stdin. Not through a buffer, which one process would fill with what is meant for the next one."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(0)
        line += byte
    return json.loads(line)


def say(value):
    os.write(1, json.dumps(value).encode() + b"\n")


def outcome(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def become(user):
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


class Worker:
    """The sockets of one sequence. Each word returns what came of it."""

    def __init__(self, port, inherited):
        self.port = port
        self.sockets = {}
        self.connections = {}
        self.keepers = {}
        if inherited is not None:
            self.sockets[0] = socket.socket(fileno=os.dup(inherited))

    def make(self, name, family, reuse_address, reuse_port, is_mptcp):
        made = socket.socket(FAMILIES[family], socket.SOCK_STREAM, MPTCP if is_mptcp else 0)
        if family != "4":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, family == "6")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        self.sockets[name] = made
        return "ok"

    def bind(self, name, host):
        made = self.sockets[name]
        done = outcome(made.bind, (host, self.port))
        return [done, *self.look(made)]

    def listen(self, name):
        made = self.sockets[name]
        done = outcome(made.listen)
        return [done, *self.look(made)]

    def look(self, made):
        """What the socket is now, without the number, which differs."""
        address, port = made.getsockname()[:2]
        options = [
            made.getsockopt(socket.SOL_SOCKET, name)
            for name in (socket.SO_REUSEADDR, socket.SO_REUSEPORT, socket.SO_ACCEPTCONN)
        ]
        return [address, port == self.port, *options]

    def meet(self, name, host):
        """Connect to the number, and accept at whichever socket it is."""
        client = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        client.settimeout(PATIENCE)
        done = outcome(client.connect, (host, self.port))
        if done == "ok":
            here = [made for name, made in self.sockets.items() if name not in self.keepers]
            listening = [made for made in here if made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
            ready, _, _ = select.select(listening, [], [], 0)  # a connection is in the queue when connect(2) returns
            self.connections[name] = [client, ready[0].accept()[0] if ready else None]
        return done

    def take(self, name, listener):
        """Accept the connection of somebody else that waits at this socket."""
        self.connections[name] = [None, self.sockets[listener].accept()[0]]
        return "ok"

    def part(self, name, side):
        """Close one end of a connection, the client's 0 or the server's 1."""
        end, self.connections[name][side] = self.connections[name][side], None
        if end is not None:
            end.close()
        return "ok"

    def shut(self, name):
        return outcome(self.sockets[name].shutdown, socket.SHUT_RDWR)

    def close(self, name):
        self.sockets.pop(name).close()
        if name in self.keepers:
            pid, pipe = self.keepers.pop(name)
            os.close(pipe)
            os.waitpid(pid, 0)
        return "ok"

    def hand_on(self, name):
        """Let another process have the socket, and close it here."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            for _, other in self.keepers.values():
                os.close(other)
            for other, made in self.sockets.items():
                if other != name:
                    made.close()
            for end in (end for ends in self.connections.values() for end in ends if end is not None):
                end.close()
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        self.keepers[name] = (pid, writer)
        self.sockets[name].close()
        return "ok"

    def drop(self, user):
        become(user)
        return "ok"

    def leave(self):
        """Close what keepers have, and wait for them."""
        for pid, pipe in self.keepers.values():
            os.close(pipe)
            os.waitpid(pid, 0)


def work(port, inherited):
    worker = Worker(port, inherited)
    say("ok")
    while True:
        word, *arguments = read_line()
        if word in ("end", "restart"):
            worker.leave()
            os._exit(RESTART if word == "restart" else 0)
        if word == "fail":
            fail()
        try:
            done = getattr(worker, word)(*arguments)
        except Exception as error:
            done = repr(error)
        say(done)


def fail():
    """End the first process, and leave it to whoever looks after us to end this one, which has the sockets."""
    try:
        os.kill(os.getppid(), signal.SIGKILL)
    except PermissionError:
        os._exit(FAIL)
    while True:
        signal.pause()


def enter_own_network():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket() as made:
        fcntl.ioctl(made, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))


def main():
    words = sys.argv[1:]
    inherited = None
    while words[0].startswith("--"):
        option = words.pop(0)
        if option == "--own-network":
            enter_own_network()
        elif option == "--as":
            become(int(words.pop(0)))
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        else:
            inherited = int(words.pop(0))
    ports = [int(port) for port in words[0].split(",")]
    say([os.getpid(), ports])
    while True:
        word, number = read_line()
        if word == "exit":
            os._exit(number)
        status = RESTART
        while status == RESTART:
            pid = os.fork()
            if pid == 0:
                work(ports[number], None if inherited is None else inherited + number)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == FAIL:
            os._exit(1)
        say("ok")


if __name__ == "__main__":
    main()
