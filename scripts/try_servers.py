#!/usr/bin/env python3
"""Restarts real servers by KILL below `guard --restart always`, and says which came back and whether the number was lost.

    try_servers.py [--restarts 4] [--cache DIR] [--user UID] [SERVER]...

Everything runs as an ordinary user: started by root, as the user UID. Then a second user asks for the number while the server
is down, on seven addresses with every option; an ordinary user cannot try that. Before each KILL a client connects, is
answered, and keeps the connection open until the end.
The last row is `portexec.serve(["vite", ...])` with one GET and one `restart()`.

The servers are installed into DIR, by default below ~/.cache or, for the other user, /var/tmp: Debian's packages are unpacked
there, npm and pip get directories of their own. What cannot be had is a row that says so. Prints a table; fails when a server
did not come back, or a number was lost. It is not a part of continuous integration.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench_common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.guard_world import EVERY_OPTION, STRANGER, Actor, as_user, house
from tests.support.proc import children_of, is_gone, words_of

PATIENCE = 300.0  # seconds for one start of a server
PAUSE = 0.02
PORTEXEC = "-m portexec"
HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"  # and a frame of no settings
HOSTS = ("127.0.0.1", "::1")
CLIENTS = ("NPM_", "PIP_")  # how this machine's package clients are set up
APT, NPM, PIP, NOTHING = "apt", "npm", "pip", ""


class Server(NamedTuple):
    """How to get a server and how to start it.

    `words` may have `{port}` and `{files}`, the directory with what `files` says. `request` is answered with any byte.
    """

    name: str
    source: str
    packages: tuple[str, ...]
    words: tuple[str, ...]
    files: dict[str, str] = {}  # noqa: RUF012
    request: bytes = HTTP
    options: tuple[str, ...] = ()


WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
"""
NODE = 'require("http").createServer((_, answer) => answer.end("ok")).listen(process.env.PORT)'
HONO = """
import { serve } from "@hono/node-server"
import { Hono } from "hono"
serve({ fetch: new Hono().get("/", (c) => c.text("ok")).fetch, port: Number(process.env.PORT) })
"""
NEST = """
require("reflect-metadata")
const { Module } = require("@nestjs/common")
const { NestFactory } = require("@nestjs/core")
class App {}
Module({})(App)
NestFactory.create(App).then((app) => app.listen(process.env.PORT))
"""
NEXT_LAYOUT = "export default function Layout({ children }) { return <html><body>{children}</body></html> }"
NEXT_PAGE = "export default function Page() { return <p>ok</p> }"
BUN = 'Bun.serve({ port: process.env.PORT, fetch: () => new Response("ok") })'
GRPC = """
import os
from concurrent import futures
import grpc
server = grpc.server(futures.ThreadPoolExecutor(2))
assert server.add_insecure_port(f"[::]:{os.environ['PORT']}")
server.start()
server.wait_for_termination()
"""
THRIFT = """
import os
from thrift.server.TServer import TThreadedServer
from thrift.transport.TSocket import TServerSocket
class Echo:
    def process(self, given, answer):
        given.trans.read(1)
        answer.trans.write(b"!")
        answer.trans.flush()
TThreadedServer(Echo(), TServerSocket(port=int(os.environ["PORT"]))).serve()
"""
CADDY = "{\n\tadmin off\n}\n:{$PORT} {\n\trespond ok\n}\n"
NGINX = """
daemon off; pid {files}/pid; error_log stderr; worker_processes 2;
events { }
http {
    access_log off; client_body_temp_path {files}/a; proxy_temp_path {files}/b; fastcgi_temp_path {files}/c;
    uwsgi_temp_path {files}/d; scgi_temp_path {files}/e;
    server { LISTEN location / { return 200 ok; } }
}
"""
TWO_SOCKETS = "listen PORT; listen [::]:PORT ipv6only=on;"
ONE_SOCKET = "listen [::]:PORT ipv6only=off;"


def nginx(name: str, listen: str) -> Server:
    configure = (
        'sed "s/PORT/$PORT/g" {files}/given >{files}/nginx.conf && exec nginx -e stderr -p {files} -c {files}/nginx.conf'
    )
    return Server(name, APT, ("nginx-light",), ("sh", "-c", configure), {"given": NGINX.replace("LISTEN", listen)})


SERVERS = (
    Server("node", NOTHING, ("node",), ("node", "{files}/server.js"), {"server.js": NODE}),
    Server("hono", NPM, ("hono", "@hono/node-server"), ("node", "server.mjs"), {"server.mjs": HONO}),
    Server(
        "nest",
        NPM,
        ("@nestjs/common@11", "@nestjs/core@11", "@nestjs/platform-express@11", "reflect-metadata", "rxjs"),
        ("node", "server.js"),
        {"server.js": NEST},
    ),
    Server(
        "next dev",
        NPM,
        ("next@15", "react", "react-dom"),
        ("next", "dev", "-p", "{port}"),
        {"app/layout.js": NEXT_LAYOUT, "app/page.js": NEXT_PAGE},
    ),
    Server("bun", NPM, ("bun",), ("bun", "server.js"), {"server.js": BUN}),
    Server("vite", NPM, ("vite",), ("vite", "--port", "{port}", "--strictPort"), {"index.html": "ok"}),
    Server("vite --host", NPM, ("vite",), ("vite", "--host", "--port", "{port}", "--strictPort"), {"index.html": "ok"}),
    Server("caddy", APT, ("caddy",), ("caddy", "run", "--adapter", "caddyfile", "--config", "{files}/C"), {"C": CADDY}),
    Server("grpcio", PIP, ("grpcio",), ("python", "{files}/server.py"), {"server.py": GRPC}, HTTP2),
    Server("gunicorn", PIP, ("gunicorn",), ("gunicorn", "-b", "[::]:{port}", "-w", "2", "wsgi:app"), {"wsgi.py": WSGI}),
    Server("uvicorn", PIP, ("uvicorn",), ("uvicorn", "--host", "::", "--port", "{port}", "asgi:app"), {"asgi.py": ASGI}),
    Server("thrift", PIP, ("thrift",), ("python", "{files}/server.py"), {"server.py": THRIFT}, b"!"),
    Server(
        "twisted",
        PIP,
        ("twisted",),
        ("python", "-m", "twisted", "web", "--path", "{files}", "--listen", r"tcp6:{port}"),
        {"index.html": "ok"},
    ),
    Server(
        "tensorboard",
        PIP,
        ("tensorboard", "setuptools<81"),
        ("tensorboard", "--bind_all", "--logdir", "{files}", "--port", "{port}"),
    ),
    Server("nats", APT, ("nats-server",), ("nats-server", "-p", "{port}"), request=b"PING\r\n"),
    Server(
        "etcd",
        APT,
        ("etcd-server",),
        (
            *("etcd", "--data-dir", "{files}/data", "--logger", "zap"),
            *("--listen-client-urls", "http://0.0.0.0:{port}", "--advertise-client-urls", "http://127.0.0.1:{port}"),
            *("--listen-peer-urls", "http://127.0.0.1:{peer.port}"),
            *("--initial-advertise-peer-urls", "http://127.0.0.1:{peer.port}"),
            *("--initial-cluster", "default=http://127.0.0.1:{peer.port}"),
        ),
        options=("-l", "main=0", "-l", "peer=0"),
    ),
    Server("php", APT, ("php-cli",), ("php", "-S", "[::]:{port}", "-t", "{files}"), {"index.php": "ok"}),
    Server("redis", APT, ("redis-server",), ("redis-server", "--port", "{port}", "--save", ""), request=b"PING\r\n"),
    nginx("nginx, two sockets", TWO_SOCKETS),
    nginx("nginx, one socket", ONE_SOCKET),
)

API = """
import sys, urllib.request
import portexec
with portexec.serve(["vite", "--host", "--port", "{port}", "--strictPort"], cwd=sys.argv[1]) as server:
    urllib.request.urlopen(server.url).read()
    server.restart()
    urllib.request.urlopen(server.url).read()
"""


class Unavailable(Exception):
    """A server that cannot be had here, and why."""


class Workshop:
    """Where the servers are installed and started, as one ordinary user."""

    def __init__(self, cache: Path, user: int, home: str) -> None:
        self.cache = cache
        self.user = user
        self.home = home  # a copy of portexec that everybody can read
        self.python = str(cache / "venv/bin/python")
        self.path = f"{cache}/venv/bin:{cache}/npm/node_modules/.bin:{cache}/apt/usr/bin:{cache}/apt/usr/sbin"
        self.path += ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.upper().startswith(CLIENTS) or "_CERT" in name},
            "HOME": str(cache),
            "PATH": self.path,
            "PYTHONPATH": home,
            "PYTHONDONTWRITEBYTECODE": "1",
            "NEXT_TELEMETRY_DISABLED": "1",
            "LANG": "C.UTF-8",
        }

    def install(self, server: Server) -> None:
        """Have the packages of a server. Raises Unavailable."""
        mark = self.cache / f"installed/{server.name.replace(' ', '-')}"
        if mark.exists():
            return
        {APT: self._unpack, NPM: self._npm, PIP: self._pip, NOTHING: self._find}[server.source](server.packages)
        self.run("touch", str(mark))

    def prepare(self) -> None:
        """Make the directories, and a virtual environment."""
        for name in ("apt", "npm", "installed", "work"):
            self.run("mkdir", "-p", f"{self.cache}/{name}")
        if not Path(self.python).exists():
            self.run("/usr/bin/python3", "-m", "venv", f"{self.cache}/venv")

    def run(self, *words: str, within: float = 900) -> str:
        """Run a command as the user, in the cache directory. Raises Unavailable when it fails."""
        try:
            done = subprocess.run(
                words,
                env=self.environment,
                cwd=self.cache,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=within,
                **as_user(self.user),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{words[0]}: {error}") from error
        if done.returncode:
            raise Unavailable(f"{words[0]}: {(done.stdout.strip().splitlines() or ['failed'])[-1]}")
        return done.stdout

    def _find(self, programs: tuple[str, ...]) -> None:
        for program in programs:
            if not shutil.which(program, path=self.path):
                raise Unavailable(f"no {program} here")

    def _unpack(self, packages: tuple[str, ...]) -> None:
        """What is installed already, or else Debian's package, unpacked without being installed."""
        for package in packages:
            program = package.removesuffix("-cli").removesuffix("-light").replace("etcd-server", "etcd")
            if shutil.which(program, path=self.path):
                continue
            self.run("sh", "-c", f"cd {self.cache}/apt && apt-get -q download {package} && dpkg -x {package}_*.deb .")
            self._find((program,))

    def _npm(self, packages: tuple[str, ...]) -> None:
        self.run("npm", "install", "--loglevel", "error", "--no-audit", "--no-fund", "--prefix", f"{self.cache}/npm", *packages)

    def _pip(self, packages: tuple[str, ...]) -> None:
        self.run(self.python, "-m", "pip", "install", "--quiet", *packages)

    def lay_out(self, server: Server) -> Path:
        """A fresh directory with the files of a server, which finds npm's packages upwards from there."""
        parent = self.cache / ("npm" if server.source == NPM else "work")
        files = Path(tempfile.mkdtemp(prefix=f"{server.name.split()[0]}-", dir=parent))
        for name, text in server.files.items():
            file = files / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(
                text.replace("{files}", str(files)).replace("{{", "{").replace("}}", "}") if "{files}" in text else text
            )
        if os.geteuid() == 0:
            for each in (files, *files.rglob("*")):
                os.chown(each, self.user, self.user)
        return files


class Trial:
    """What came of one server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.back = 0
        self.tried = 0
        self.stolen = 0
        self.trouble = ""

    def row(self, restarts: int, *, is_probed: bool) -> list[str]:
        """Its row of the table."""
        stolen = f"{self.stolen} of {self.tried}" if is_probed else "-"
        return [self.name, f"{self.back} of {restarts}", stolen, self.trouble]


@contextmanager
def started(words: list[str], workshop: Workshop, files: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A portexec that is stopped at the end, by TERM and then by KILL of what it is."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            env=workshop.environment,
            cwd=files,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **as_user(workshop.user),
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command_of(front: int) -> int:
    """The pid of the command's first process: the child of a shim, which is a child of portexec. 0: there is none now."""
    try:
        commands = [pid for shim in children_of(front) for pid in children_of(shim)]
        return next((pid for pid in commands if PORTEXEC not in words_of(pid) and not is_gone(pid)), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def connect(port: int, request: bytes) -> socket.socket | None:
    """A connection that was answered; None when there is none yet."""
    for host in HOSTS:
        try:
            client = socket.create_connection((host, port), timeout=10)
        except OSError:
            continue
        try:
            client.sendall(request)
            if client.recv(1):
                return client
        except OSError:
            pass
        client.close()
    return None


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """The first result that is true; None when portexec has ended, or after a long while."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if result := condition():
            return result
        time.sleep(PAUSE)
    return None


def try_one(server: Server, workshop: Workshop, restarts: int, prober: Actor | None) -> Trial:
    """Restart a server as often as that, and see what comes of it."""
    trial = Trial(server.name)
    try:
        workshop.install(server)
    except Unavailable as unavailable:
        trial.trouble = f"cannot be had: {unavailable}"
        return trial
    files = workshop.lay_out(server)
    log = files / "log"
    port_file = files / "port"
    options = ["-H", "guard", "--restart", "always", "--kill-after", "3s", "--port-file", str(port_file), *server.options]
    words = [
        workshop.python,
        *PORTEXEC.split(),
        *options,
        "--",
        *(word.replace("{files}", str(files)) for word in server.words),
    ]
    with started(words, workshop, files, log) as process, ExitStack() as clients:
        trial.trouble = restart(server, process, port_file, clients, trial, restarts, prober)
    if trial.trouble:
        trial.trouble += f": {' | '.join(log.read_text(errors='replace').splitlines()[-4:])}"
    else:
        shutil.rmtree(files, ignore_errors=True)
    return trial


def restart(
    server: Server,
    process: subprocess.Popen[bytes],
    port_file: Path,
    clients: ExitStack,
    trial: Trial,
    restarts: int,
    prober: Actor | None,
) -> str:
    """Meet, kill, probe and wait, in turns. What went wrong, if anything did."""
    if not wait_until(port_file.exists, process):
        return "did not start"
    port = int(port_file.read_text())

    def meet() -> bool:
        client = connect(port, server.request)
        return client is not None and clients.enter_context(client) is client

    def probe() -> None:
        if prober is not None:
            tried, got = prober.ask(port)
            trial.tried += tried
            trial.stolen += len(got)

    if not wait_until(meet, process):
        return "did not serve at the first start"
    for number in range(1, restarts + 1):
        killed = command_of(process.pid)
        os.kill(killed, signal.SIGKILL)

        def is_back(killed: int = killed) -> bool:
            probe()
            return command_of(process.pid) not in (0, killed) and meet()

        if not wait_until(is_back, process):
            ended = process.poll()
            return f"restart {number}: {'portexec has ended' if ended is not None else 'does not serve'}"
        trial.back += 1
    return "" if not trial.stolen else "the number was lost"


def try_api(workshop: Workshop) -> Trial:
    """vite by `portexec.serve`, one GET, one restart."""
    trial = Trial('serve(["vite"]), restart()')
    vite = next(server for server in SERVERS if server.name == "vite")
    try:
        workshop.install(vite)
        workshop.run(workshop.python, "-c", API, str(workshop.lay_out(vite)), within=4 * PATIENCE)
        trial.back = 1
    except Unavailable as failure:
        trial.trouble = str(failure)
    return trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--user", type=int, default=1000, help="whom root runs everything as (default %(default)s)")
    parser.add_argument("servers", nargs="*", metavar="SERVER")
    arguments = parser.parse_args()
    is_root = os.geteuid() == 0
    user = arguments.user if is_root else os.geteuid()
    cache = (
        arguments.cache or Path(f"/var/tmp/portexec-servers-{user}" if is_root else "~/.cache/portexec-servers")
    ).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    if is_root:
        os.chown(cache, user, user)
    chosen = [server for server in SERVERS if not arguments.servers or server.name in arguments.servers]
    trials = []
    with house() as home:
        workshop = Workshop(cache, user, home)
        workshop.prepare()
        words = [sys.executable, f"{home}/tests/children/prober.py", str(STRANGER), EVERY_OPTION]
        prober = Actor(words) if is_root else None
        for server in chosen:
            print(f"{server.name} ...", file=sys.stderr, flush=True)
            trials.append(try_one(server, workshop, arguments.restarts, prober))
            print(trials[-1].row(arguments.restarts, is_probed=is_root), file=sys.stderr, flush=True)
        rows = [trial.row(arguments.restarts, is_probed=is_root) for trial in trials]
        if not arguments.servers or "api" in arguments.servers:
            trials.append(try_api(workshop))
            rows.append(trials[-1].row(1, is_probed=False))
        if prober is not None:
            prober.close()
    print_table(["server", "came back", "taken by another user", ""], rows)
    return int(any(trial.trouble and not trial.trouble.startswith("cannot be had") for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
