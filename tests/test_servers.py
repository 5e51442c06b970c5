"""Real servers, each started as its users start it, under portexec: it answers on the announced address and stops whole.

Two tables: servers that take the descriptor, and servers that bind the number themselves, which run in every hand-off that
gives them one.
"""

from __future__ import annotations

import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import DEADLINE, Running, get, kill_group, running, wait_for
from tests.support.installed import APPS, PATH, need
from tests.support.proc import is_session_gone, listening_numbers, members

pytestmark = pytest.mark.once

BY_NUMBER_HAND_OFFS = ["guard", "hold"]


class Served:
    """A server that is being run: the portexec that started it, its address, its folder, and how to ask it."""

    def __init__(self, started: Running, url: str, folder: Path, ask: Callable[[str], str]) -> None:
        self.process = started.process
        self.url = url
        self.number = int(url.rpartition(":")[2])
        self.folder = folder
        self._ask = ask

    def answer(self) -> str:
        """What it answers now; a server that has ended ends the test, and need not be waited for."""
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}:\n{''.join(self.process.communicate())}")
        try:
            return self._ask(self.url)
        except http.client.HTTPException as error:
            raise ConnectionError("the process that answered died over it") from error

    def pid(self) -> int:
        """The process that answers now."""
        return int(self.answer().removeprefix("hello from "))


class Server(NamedTuple):
    """A row of the tables: a command of the user's, and the names of all that must be installed for it.

    `options` are portexec's, `build` makes the program, `ask` asks for an answer, in which `expected` must be, and `act` is
    what it has to live through.
    """

    name: str
    command: str
    needs: str
    options: str = ""
    build: str = ""
    ask: Callable[[str], str] = get
    expected: str = "hello"
    act: Callable[[Served], None] | None = None


def ping(url: str) -> str:
    """What a redis server answers to PING."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(100).decode()


def wait_for_another(served: Served, known: set[int], before_asking_again: Callable[[], None] = lambda: None) -> int:
    """Ask until a process answers that is none of the known ones."""

    def another() -> int:
        pid = served.pid()
        if pid in known:
            before_asking_again()
            return 0
        return pid

    return wait_for(another)


def reload_twice(served: Served) -> None:
    """Change the application until a new process answers, as a reloader has to notice; then again."""
    known = {served.pid()}

    def touch() -> None:
        for file in served.folder.glob("*.py"):
            file.touch()

    # A change that comes before the reloader's first look is one that it cannot see, so the old process is changed anew.
    for _ in range(2):
        known.add(wait_for_another(served, known, touch))


def hang_up(served: Served) -> None:
    """HUP makes it start workers anew, on the same number."""
    known = {served.pid()}
    served.process.send_signal(signal.SIGHUP)
    wait_for_another(served, known)


def answer_by_two(served: Served) -> None:
    """Both workers answer."""
    wait_for_another(served, {served.pid()})


def replace_a_worker(served: Served) -> None:
    """Both workers answer, and when they are killed, others do. One that seemed to hang, their server may have replaced."""
    known = {served.pid()}
    known.add(wait_for_another(served, known))
    for pid in known & set(members(served.process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for_another(served, known)


def answer_on_ipv6(served: Served) -> None:
    """The same number answers on the other family's loopback address, too, and still after a HUP."""
    assert "hello" in get(f"http://[::1]:{served.number}/")
    hang_up(served)
    assert "hello" in get(f"http://[::1]:{served.number}/")


NGINX = "exec nginx -p . -c made.conf -e stderr"

BY_DESCRIPTOR = [
    Server("uvicorn --fd 3", "uvicorn asgi:app --fd 3", "uvicorn fastapi"),
    Server("uvicorn --fd {fd}", "uvicorn plain:app --fd {fd}", "uvicorn"),
    Server("uvicorn --workers", "uvicorn plain:app --fd {fd} --workers 2", "uvicorn", act=answer_by_two),
    Server("uvicorn --reload", "uvicorn plain:app --fd {fd} --reload", "uvicorn", act=reload_twice),
    Server("gunicorn LISTEN_FDS", "gunicorn wsgi:app", "gunicorn", options="-H fd", act=hang_up),
    Server("gunicorn fd://", "gunicorn -b fd://{fd} -w 2 wsgi:app", "gunicorn", act=replace_a_worker),
    Server("hypercorn fd://3", "hypercorn -b fd://3 plain:app", "hypercorn"),
    Server("hypercorn fd://{fd}", "hypercorn -b fd://{fd} plain:app", "hypercorn"),
    Server("daphne", "daphne --fd {fd} plain:app", "daphne"),
    Server(
        "flask",
        "flask --app flask_app run",
        "flask",
        options="-e WERKZEUG_SERVER_FD={fd} -e WERKZEUG_RUN_MAIN=true",
    ),
    Server("node", "node server.js {fd}", "node"),
    Server("node cluster", "node cluster.js {fd}", "node", act=answer_by_two),
    Server(
        "go LISTEN_FDS",
        "./server",
        "go",
        options="-H fd",
        build="env CGO_ENABLED=0 go build -o server server.go",
    ),
    Server("java inheritedChannel", "java Inherited.java", "java javac", options="-H fd --first-fd 0"),
    Server("puma LISTEN_FDS", "puma -b tcp://127.0.0.1:{port} --bind-to-activated-sockets config.ru", "puma", options="-H fd"),
    Server(
        "nginx",
        f"sh -c 'sed -e s/PORT/{{port}}/ -e /::1/d nginx.conf > made.conf; {NGINX}'",
        "nginx",
        options="-e NGINX={fd};",
    ),
]

BY_NUMBER = [
    Server("uvicorn", "uvicorn asgi:app --port {port}", "uvicorn fastapi"),
    Server("uvicorn --reload", "uvicorn plain:app --port {port} --reload", "uvicorn", act=reload_twice),
    Server("uvicorn --workers", "uvicorn plain:app --port {port} --workers 2", "uvicorn", act=replace_a_worker),
    Server("gunicorn $PORT", "gunicorn wsgi:app", "gunicorn", act=hang_up),
    Server("gunicorn -b", "gunicorn -b 127.0.0.1:{port} -w 2 wsgi:app", "gunicorn", act=replace_a_worker),
    Server("gunicorn --reuse-port", "gunicorn -b 127.0.0.1:{port} --reuse-port -w 2 wsgi:app", "gunicorn", act=answer_by_two),
    Server("hypercorn", "hypercorn -b 127.0.0.1:{port} -w 2 plain:app", "hypercorn", act=answer_by_two),
    Server("granian", "granian --interface asgi --port {port} --workers 2 plain:app", "granian", act=answer_by_two),
    Server("http.server", "python -m http.server {port} --bind 127.0.0.1", "python"),
    Server("flask --debug", "flask --app flask_app run --debug --port {port}", "flask", act=reload_twice),
    Server("django runserver", "python manage.py runserver {port}", "python django", act=reload_twice),
    Server("node $PORT", "node server.js", "node"),
    Server("node cluster", "node cluster.js", "node", act=answer_by_two),
    Server("vite", "vite --host {host} --port {port} --strictPort", "vite node"),
    Server("php -S", "php -S 127.0.0.1:{port}", "php"),
    Server("webrick", "ruby -run -e httpd . -b 127.0.0.1 -p {port}", "ruby webrick"),
    Server("puma", "puma -b tcp://127.0.0.1:{port} config.ru", "puma"),
    Server(
        "nginx",
        f"sh -c 'sed s/PORT/$PORT/ nginx.conf > made.conf; {NGINX}'",
        "nginx ipv6",
        act=answer_on_ipv6,
    ),
    Server("redis", "redis-server --port {port} --bind 127.0.0.1 --save ''", "redis-server", ask=ping, expected="+PONG"),
    Server("go, static", "./server", "go", build="env CGO_ENABLED=0 go build -o server server.go"),
    Server("java", "java Server.java", "java javac"),
]


@pytest.mark.parametrize("server", BY_DESCRIPTOR, ids=lambda server: server.name)
def test_by_descriptor(server: Server, tmp_path: Path) -> None:
    """It answers on the descriptor, which portexec finds named in the command or was told to hand over."""
    with serving(server, tmp_path) as served:
        check(server, served)


@pytest.mark.parametrize("hand_off", BY_NUMBER_HAND_OFFS)
@pytest.mark.parametrize("server", BY_NUMBER, ids=lambda server: server.name)
def test_by_number(server: Server, hand_off: str, tmp_path: Path) -> None:
    """It binds the number itself, and is reached there."""
    with serving(server, tmp_path, "-H", hand_off) as served:
        check(server, served)


def check(server: Server, served: Served) -> None:
    """It answers, lives through what it has to, and answers as before."""
    wait_for(lambda: answers_there(server, served))
    if server.act:
        server.act(served)
        wait_for(lambda: answers_there(server, served))


def answers_there(server: Server, served: Served) -> bool:
    """Whether it answers as expected, and listens on the announced number and no other; says what is not so."""
    answer = served.answer()
    assert server.expected in answer, answer
    numbers = listening_numbers(served.process.pid)
    assert numbers == {served.number}, numbers
    return True


@contextmanager
def serving(server: Server, tmp_path: Path, *options: str) -> Iterator[Served]:
    """Run the server in a folder with all the applications; afterwards, see to it that its whole tree is gone."""
    need(server.needs.split())
    folder = Path(shutil.copytree(APPS, tmp_path / "apps"))
    # gunicorn has a control socket there, which several at once would take from each other.
    environment = os.environ | {"PATH": PATH, "XDG_RUNTIME_DIR": str(tmp_path)}
    if server.build:
        subprocess.run(shlex.split(server.build), cwd=folder, env=environment, check=True)
    words = [*options, *shlex.split(server.options), "--", *shlex.split(server.command)]
    with running(*words, cwd=folder, env=environment) as started:
        try:
            yield Served(started, started.url(), folder, server.ask)
            started.process.terminate()
            started.process.wait(DEADLINE)
            wait_for(lambda: is_session_gone(started.process.pid))
        finally:
            kill_group(started.process.pid)
