#!/usr/bin/env python3
"""Requests per second of real servers behind portexec, against the same server started plainly.

All forms of a server run side by side, idle but for the one that is measured: in every round each has its turn, in which a
load generator in another process keeps a few connections busy, one request at a time on each. The turns are short, so that
whatever else the machine does hits all forms alike. They are compared with the first plain server in the same round; a second
plain one shows the noise. A server on a descriptor made by hand, bound and listening but without TCP_NODELAY, is beside it
for uvicorn, which does not set it on such sockets.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench_common import BIN, PORTEXEC, environment, interleaved, print_table

HAND_OFFS = ("fd", "guard", "hold")
PLAIN = "plain"
PLAIN_AGAIN = "plain again"
BY_HAND = "fd by hand"
DEADLINE = 20.0  # seconds for a server to start or to stop
WARM_UP = 100  # requests
REQUEST = b"GET /hello HTTP/1.1\r\nHost: bench\r\n\r\n"

APPS = """
BODY = b"hello, world"

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))])
    return [BODY]

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(BODY)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": BODY})
    elif scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({"type": event + ".complete"})
            if event == "lifespan.shutdown":
                return
"""

NODE_APP = """
const answer = {"Content-Type": "text/plain", "Content-Length": 12}
const server = require("http").createServer((_, response) => { response.writeHead(200, answer); response.end("hello, world") })
server.listen(process.argv[2] ? {fd: Number(process.argv[2])} : {port: Number(process.env.PORT), host: "127.0.0.1"})
"""


class Server:
    """A server program: its words when it gets a descriptor, and when it gets a number; `{}` stands for either."""

    def __init__(self, words: list[str], *, descriptor: list[str], number: list[str]) -> None:
        self.program = words[0]
        self.by_descriptor = [*words, *descriptor]
        self.by_number = [*words, *number]


def servers(node: str) -> dict[str, Server]:
    uvicorn = [str(BIN / "uvicorn"), "bench_apps:asgi", "--no-access-log", "--log-level", "warning"]
    gunicorn = [str(BIN / "gunicorn"), "bench_apps:wsgi", "-k", "gthread", "--threads", "4", "--keep-alive", "60"]
    hypercorn = [str(BIN / "hypercorn"), "bench_apps:asgi", "--keep-alive", "60"]
    return {
        "uvicorn": Server(uvicorn, descriptor=["--fd", "{fd}"], number=["--port", "{port}"]),
        "gunicorn": Server(gunicorn, descriptor=["-b", "fd://{fd}"], number=["-b", "127.0.0.1:{port}"]),
        "hypercorn": Server(hypercorn, descriptor=["-b", "fd://{fd}"], number=["-b", "127.0.0.1:{port}"]),
        "node": Server([node, "bench_app.js"], descriptor=["{fd}"], number=[]),
    }


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        port, connections, requests, seconds = sys.argv[2:]
        print(generate_load(int(port), int(connections), int(requests), float(seconds)))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each form has its turn (default %(default)s)")
    parser.add_argument("--connections", type=int, default=8, help="how many at once (default %(default)s)")
    parser.add_argument("--requests", type=int, default=20_000, help="at the most, in each turn (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="at the most, in each turn (default %(default)s)")
    parser.add_argument("servers", nargs="*", help="uvicorn, gunicorn, hypercorn, node (default: all)")
    chosen = parser.parse_args()
    load = [str(value) for value in (chosen.connections, chosen.requests, chosen.seconds)]
    print(
        f"{chosen.rounds} rounds, {chosen.connections} connections, up to {chosen.requests} requests or {chosen.seconds} s each"
    )
    script = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        Path("bench_apps.py").write_text(APPS)
        Path("bench_app.js").write_text(NODE_APP)
        for name, server in servers(shutil.which("node") or "node").items():
            if not chosen.servers or name in chosen.servers:
                compare(name, server, chosen.rounds, [sys.executable, script, "--load"], load)


def compare(name: str, server: Server, rounds: int, generator: list[str], load: list[str]) -> None:
    print(f"\n{name}")
    if shutil.which(server.program) is None:
        print("  not installed")
        return
    with ExitStack() as stack:
        ports = {form: stack.enter_context(started(form, server)) for form in forms(name)}
        results = interleaved(rounds, {form: measurement([*generator, str(port), *load]) for form, port in ports.items()})
    rows = []
    for form, rates in results.items():
        ratios = [rate / plain for rate, plain in zip(rates, results[PLAIN], strict=True)]
        target = "1.00" if form.startswith("portexec") else ""
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([form, f"{median(rates):.0f}", f"{median(ratios):.2f}", spread, target])
    print_table(["", "requests/s", "to plain", "from round to round", "target"], rows)


def forms(name: str) -> list[str]:
    by_hand = [BY_HAND] if name == "uvicorn" else []
    return [PLAIN, *(f"portexec, {hand_off}" for hand_off in HAND_OFFS), *by_hand, PLAIN_AGAIN]


def measurement(generator: list[str]) -> Callable[[], float]:
    """A function that puts load on a server, and returns requests per second."""

    def run() -> float:
        done = subprocess.run(generator, capture_output=True, text=True, timeout=DEADLINE * 3)
        if done.returncode:
            raise RuntimeError(f"the load generator failed:\n{done.stderr}")
        return float(done.stdout)

    return run


@contextmanager
def started(form: str, server: Server) -> Iterator[int]:
    """A server that answers, for as long as the block lasts; yields its number."""
    if form.startswith("portexec"):
        with portexec_server(form.partition(", ")[2], server) as port:
            yield port
    elif form == BY_HAND:
        with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as listener:
            fd = listener.fileno()
            words = [word.replace("{fd}", str(fd)) for word in server.by_descriptor]
            with running(words, pass_fds=[fd]):
                yield answering(listener.getsockname()[1])
    else:
        # Any free number: the server asks the kernel for one, and we ask the kernel which it was.
        words = [word.replace("{port}", "0") for word in server.by_number]
        with running(words, PORT="0") as process:
            yield answering(wait_for(lambda: listening_port(process.pid), process))


@contextmanager
def portexec_server(hand_off: str, server: Server) -> Iterator[int]:
    words = server.by_descriptor if hand_off == "fd" else server.by_number
    port_file = Path("port")
    with running([PORTEXEC, "-q", "-H", hand_off, "--port-file", str(port_file), "--", *words]) as process:
        port = wait_for(lambda: port_file.exists() and int(port_file.read_text()), process)
        port_file.unlink()
        yield answering(port)


@contextmanager
def running(words: list[str], pass_fds: list[int] | None = None, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds or (),
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace"))
            raise
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, and the workers it started: they are all in its process group."""
    process.terminate()
    try:
        process.wait(DEADLINE)
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()


def wait_for(condition: Callable[[], int], process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + DEADLINE
    while not (result := condition()):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{process.args!r} did not start")
        time.sleep(0.01)
    return result


def answering(port: int) -> int:
    """The number, once it answers: requests wait until then, or are refused and made again."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
                connection.sendall(REQUEST)
                if connection.recv(1 << 16):
                    return port
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


def listening_port(pid: int) -> int:
    """The number on which this process listens, or 0: its descriptors, looked up in the kernel's table (proc(5))."""
    try:
        targets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    except FileNotFoundError:
        return 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in targets:
            return int(local.rpartition(":")[2], 16)
    return 0


def generate_load(port: int, count: int, requests: int, seconds: float) -> float:
    """Requests per second, over so many connections, each with one request on its way."""
    connections = [socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) for _ in range(count)]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    length = len(read_response(connections[0]))
    drive(connections, length, WARM_UP, seconds)
    done, elapsed = drive(connections, length, requests, seconds)
    return done / elapsed


def read_response(connection: socket.socket) -> bytes:
    """One whole response. Every later one is as long, which spares the generator from parsing them."""
    connection.sendall(REQUEST)
    response = b""
    while not response.endswith(b"hello, world"):
        received = connection.recv(1 << 16)
        if not received:
            raise RuntimeError("the server closed the connection")
        response += received
    return response


def drive(connections: list[socket.socket], length: int, requests: int, seconds: float) -> tuple[int, float]:
    """Keep every connection busy; returns how many requests were answered, and in how many seconds."""
    poll = select.epoll()
    by_fd = {connection.fileno(): connection for connection in connections}
    missing = dict.fromkeys(by_fd, length)
    done = 0
    begin = time.perf_counter()
    for fd, connection in by_fd.items():
        poll.register(fd, select.EPOLLIN)
        connection.sendall(REQUEST)
    in_flight = len(by_fd)
    is_over = False
    while in_flight:
        for fd, _ in poll.poll():
            received = len(by_fd[fd].recv(1 << 16))
            if not received:
                raise RuntimeError("the server closed a connection")
            missing[fd] -= received
            if missing[fd]:
                continue
            done += 1
            missing[fd] = length
            is_over = is_over or done + in_flight > requests or time.perf_counter() - begin > seconds
            if is_over:
                in_flight -= 1
            else:
                by_fd[fd].sendall(REQUEST)
    elapsed = time.perf_counter() - begin
    poll.close()
    return done, elapsed


if __name__ == "__main__":
    main()
