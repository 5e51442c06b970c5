"""Constant load on a web server: `load.py HOST PORT RATE [keep]`, RATE in requests per second, until stdin ends.

Every request has a connection of its own, with `keep` one that it shares with those before it, as long as the server leaves it
open. It sends at once what it wants, and reads the whole answer. One that is not answered
in full is a failure and is not made again. Prints `ready`, a line `answered by PID` for every process that answers for the
first time ("hello from PID"), and in the end a JSON line with what became of the requests.
"""

from __future__ import annotations

import collections
import errno
import json
import select
import socket
import sys
import threading
import time

CONNECTIONS = 8  # at the most at a time; each of them is one thread's
PATIENCE = 20.0  # seconds without an answer after which a request has failed
REQUEST = b"GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n"
KEEPING = b"GET / HTTP/1.1\r\nHost: load\r\n\r\n"
GREETING = b"hello from "


class Load:
    """The requests that were made, counted by what became of them."""

    def __init__(self, address: tuple[str, int], rate: float, keeps: bool) -> None:
        self.kept = threading.local() if keeps else None
        self.address = address
        self.interval = CONNECTIONS / rate
        self.is_over = threading.Event()
        self.lock = threading.Lock()
        self.requests = 0
        self.failures: collections.Counter[str] = collections.Counter()
        self.pids: collections.Counter[int] = collections.Counter()
        self.slowest = 0.0

    def run(self, first: float) -> None:
        """What each thread does: one request after the other, each at its time or as soon as the one before it is over."""
        at = first
        while not self.is_over.wait(max(0.0, at - time.monotonic())):
            begin = time.monotonic()
            failure, pid = self.request()
            self.count(failure, pid, time.monotonic() - begin)
            at += self.interval

    def request(self) -> tuple[str, int]:
        """Make one request. Returns what went wrong, which may be nothing, and the process that answered, which may be 0."""
        if self.kept is not None:
            return self.request_again(self.kept)
        answer = b""
        try:
            with socket.create_connection(self.address, timeout=PATIENCE) as connection:
                connection.sendall(REQUEST)
                while received := connection.recv(1 << 16):
                    answer += received
        except OSError as error:
            return describe(error, answer), 0
        return judge(answer)

    def request_again(self, kept: threading.local) -> tuple[str, int]:
        """The same on the connection that this thread has kept."""
        answer = b""
        try:
            connection = getattr(kept, "connection", None)
            if connection is None or select.select([connection], [], [], 0)[0]:  # closed while it was idle, as clients notice
                connection = kept.connection = socket.create_connection(self.address, timeout=PATIENCE)
            connection.sendall(KEEPING)
            while not is_whole(answer) and (received := connection.recv(1 << 16)):
                answer += received
            failure, pid = judge(answer)
        except OSError as error:
            failure, pid = describe(error, answer), 0
        if failure or b"\nconnection: close" in answer.lower():
            kept.connection.close()
            kept.connection = None
        return failure, pid

    def count(self, failure: str, pid: int, seconds: float) -> None:
        with self.lock:
            self.requests += 1
            self.slowest = max(self.slowest, seconds)
            if failure:
                self.failures[failure] += 1
                return
            self.pids[pid] += 1
            if self.pids[pid] == 1:
                print(f"answered by {pid}", flush=True)

    def summary(self, seconds: float) -> dict[str, object]:
        return {
            "requests": self.requests,
            "seconds": seconds,
            "failed": sum(self.failures.values()),
            "refused": self.failures["refused"],
            "failures": dict(self.failures),
            "slowest": self.slowest,
            "pids": list(self.pids),
        }


def describe(error: OSError, answer: bytes) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if error.errno == errno.ECONNREFUSED:
        return "refused"
    name = "reset" if error.errno in (errno.ECONNRESET, errno.EPIPE) else errno.errorcode.get(error.errno or 0, str(error))
    return f"{name} within the answer" if answer else name


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length:")
    return bool(end) and len(body) >= int(length.partition(b"\r")[0] or 0)


def judge(answer: bytes) -> tuple[str, int]:
    """What is wrong with an answer that ended in an orderly way, if anything, and who gave it."""
    if not answer:
        return "closed without an answer", 0
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    if status.split(b" ")[1:2] != [b"200"]:
        return f"answered {status.decode(errors='replace')}", 0
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if fields.get(b"content-length") != b"%d" % len(body):
        return "cut short", 0
    if not body.startswith(GREETING):
        return "another answer", 0
    return "", int(body.removeprefix(GREETING))


def main() -> None:
    load = Load((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]), keeps=sys.argv[4:] == ["keep"])
    begin = time.monotonic()
    threads = [
        threading.Thread(target=load.run, args=(begin + number * load.interval / CONNECTIONS,)) for number in range(CONNECTIONS)
    ]
    print("ready", flush=True)
    for thread in threads:
        thread.start()
    sys.stdin.read()
    load.is_over.set()
    for thread in threads:
        thread.join()
    print(json.dumps(load.summary(time.monotonic() - begin)), flush=True)


main()
