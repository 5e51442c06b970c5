"""Readiness: that each form of `--ready` tells the truth, with each hand-off it is for, and what comes of it.

What portexec says when the command is ready (`--ready-fd 1`) and what the server says go to one pipe, so their order is that of
what happened. The server (children/obedient.py) does what the test tells it. That portexec still waits, although it had the
turn, is shown by signals that it forwards: `Server.is_awaited`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portexec.admission.elsewhere import likeliest
from portexec.binding import unix
from portexec.binding.listeners import Listener
from portexec.command.undo import Undo
from portexec.lifetime import get
from portexec.lifetime.notify import NotifySocket
from portexec.lifetime.probe import Probe
from portexec.parent import loop
from portexec.parent.loop import first, readable, sleep
from tests.support import (
    DEADLINE,
    PORTEXEC,
    STRANGER,
    child,
    descriptors_of,
    kill_group,
    run,
    running,
    status_of,
    wait_for,
    within,
)
from tests.support.installed import program
from tests.support.network import connect, port_of
from tests.support.obedience import BY_NUMBER, HAND_OFFS, Server, launched, serving
from tests.support.proc import is_at_rest
from tests.support.processes import NO_PASSPIDFD, NO_SOCK_DIAG, refusing, stop_where_it_waits

pytestmark = pytest.mark.once

OK = b"HTTP/1.1 200 OK\r\n\r\n"


# listen


@pytest.mark.parametrize("form", [[], ["--ready", "listen"]], ids=["default", "listen"])
@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_listen_is_not_before_the_server_listens(hand_off: str, form: list[str]) -> None:
    with serving("-H", hand_off, *form) as server:
        assert server.is_awaited()
        server.do("bind PORT 127.0.0.1")
        assert server.is_awaited()
        server.do("listen PORT")
        assert server.ready()["hand_off"] == hand_off


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_listen_never_connects(hand_off: str) -> None:
    with serving("-H", hand_off, "--ready", "listen") as server:
        server.listens(hand_off)
        server.ready()
        assert server.says("pending PORT 0") == "waiting 0"


def test_listen_where_sock_diag_is_refused() -> None:
    with serving("-H", "hold", "--ready", "listen", prefix=refusing(NO_SOCK_DIAG)) as server:
        server.do("bind PORT 127.0.0.1")
        assert server.is_awaited()
        server.do("listen PORT")
        server.ready()


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_listening_elsewhere_is_not_ready(hand_off: str) -> None:
    with serving("-H", hand_off, "--ready", "listen") as server:
        server.do("bind 0 127.0.0.1", "listen 0")
        assert server.is_awaited()
        server.listens(hand_off)
        server.ready()


@pytest.mark.parametrize(("call", "options"), [("pidfd_getfd", ["-H", "guard"]), ("seccomp", [])], ids=["gated", "auto"])
def test_listen_where_guard_is_refused_or_gated(call: str, options: list[str]) -> None:
    with serving(*options, prefix=refusing([call, errno.EPERM])) as server:
        assert server.is_awaited()
        server.listens("guard")
        assert server.ready()["hand_off"] == (options[1] if options else "hold")


# Where the server binds, and what a client is to use then, which was told 127.0.0.1.
FOLLOWED = [
    ("127.0.0.1", "127.0.0.1"),
    ("0.0.0.0", "127.0.0.1"),
    ("*", "127.0.0.1"),
    ("::ffff:127.0.0.1", "127.0.0.1"),
    ("127.0.0.9", "127.0.0.9"),
    ("::1", "[::1]"),
    ("::", "[::1]"),
]


@pytest.mark.parametrize("form", ["listen", "accept", "http", "notify"])
@pytest.mark.parametrize(("host", "told"), FOLLOWED, ids=[host for host, _ in FOLLOWED])
@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_the_address_that_was_really_bound_is_told(hand_off: str, host: str, told: str, form: str) -> None:
    become_ready = {"accept": "accept PORT", "http": f"reply PORT {OK.hex()}", "notify": "notify READY=1"}
    with serving("-H", hand_off, "--ready", form) as server:
        port = port_of(server.started.url())
        server.listens(hand_off, host)
        if form in become_ready:
            server.do(become_ready[form])
        if form == "http":
            server.heard()
        assert server.where() == [f"http://{told}:{port}"]


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_several_listeners_have_to_listen_all(hand_off: str) -> None:
    with serving("-H", hand_off, "-l", "web=0", "-l", "admin=[::1]:0", "--ready", "listen") as server:
        server.do("bind ADMIN_PORT ::1", "listen ADMIN_PORT")
        assert server.is_awaited()
        server.do("bind WEB_PORT 127.0.0.1", "listen WEB_PORT")
        assert server.where() == [server.started.url() for _ in range(2)]


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_two_listeners_on_one_number_have_to_listen_both(hand_off: str) -> None:
    for number in range(20000, 30000, 7):  # one that nobody has
        pair = ["-l", f"web=127.0.0.1:{number}", "-l", f"admin=[::1]:{number}"]
        with launched("-H", hand_off, *pair, "--ready", "listen") as server:
            server.started.line("^portexec: ")
            if "cannot listen" in server.started.lines[0]:
                continue
            server.comes_up()
            server.do("bind PORT 127.0.0.1", "listen PORT")
            assert server.is_awaited()
            server.do("bind ADMIN_PORT ::1", "listen ADMIN_PORT")
            assert server.where() == [f"http://127.0.0.1:{number}", f"http://[::1]:{number}"]
            return


# accept


@pytest.mark.parametrize("where", [[], ["-l", "[::1]:0"], ["-l", "*:0"]], ids=["127.0.0.1", "[::1]", "all"])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_accept_is_not_before_the_server_accepts(hand_off: str, where: list[str]) -> None:
    with serving("-H", hand_off, *where, "--ready", "accept") as server:
        url = server.started.url()
        server.listens(hand_off, "*" if "*:0" in where else url.partition("//")[2].rpartition(":")[0].strip("[]"))
        assert server.says("pending PORT 1") == "waiting 1"
        assert server.is_awaited()
        server.do("accept PORT")
        assert server.where() == [url]


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_accept_is_the_truth_where_sock_diag_is_refused(hand_off: str) -> None:
    with serving("-H", hand_off, "--ready", "accept", prefix=refusing(NO_SOCK_DIAG)) as server:
        server.listens(hand_off)
        server.says("pending PORT 1")
        assert server.is_awaited()
        server.do("accept PORT")
        server.ready()


def test_accept_is_the_default_with_a_descriptor() -> None:
    with serving("-H", "fd") as server:
        server.listens("fd")
        server.says("pending PORT 1")
        assert server.is_awaited()
        server.do("accept PORT")
        server.ready()


@pytest.mark.parametrize("way", ["accept", "reset", "keep"])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_what_the_server_does_with_the_connection_is_no_matter(hand_off: str, way: str) -> None:
    """Also when it is over before it can be looked at."""
    with serving("-H", hand_off, "--ready", "accept") as server:
        server.listens(hand_off)
        server.do(f"{way} PORT")
        server.ready()


def test_other_clients_in_the_backlog_do_not_blur_it() -> None:
    """Ours is the second of three: ready is when it was accepted, neither after the first nor after the last."""
    with launched("--lazy", "-H", "fd", "--ready", "accept") as server:
        url = server.started.url()
        with connect(url) as first:
            server.comes_up()
            server.listens("fd")
            server.says("pending PORT 2")
            with connect(url):
                server.says("pending PORT 3")
                server.do("accept PORT")
                assert first.recv(100) == b"accepted"
                assert server.is_awaited()
                server.do("accept PORT")
                server.ready()
                assert server.says("pending PORT 1") == "waiting 1"


def test_what_has_ended_is_not_ready_any_more() -> None:
    """It has accepted and ended while portexec could not look, which then finds both at once."""
    for _ in range(5):
        with serving("-H", "fd") as server:
            parent = int(status_of(server.pid)["PPid"])
            server.listens("fd")
            server.says("pending PORT 1")
            stop_where_it_waits(server.process.pid)
            server.do("accept PORT", "exit 3")
            assert wait_for(lambda pid=server.pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
            assert wait_for(lambda pid=parent: is_at_rest(pid))  # type: ignore[misc]  # it has told
            server.process.send_signal(signal.SIGCONT)
            server.started.line("^portexec: note: the command ended before it was ready: exit status 3$")
            assert server.ended() == 3


def test_other_clients_in_the_backlog_where_sock_diag_is_refused() -> None:
    """The backlog as a whole is counted: ready when it is empty."""
    with (
        launched("--lazy", "-H", "fd", "--ready", "accept", prefix=refusing(NO_SOCK_DIAG)) as server,
        connect(server.started.url()) as first,
    ):
        server.comes_up()
        server.listens("fd")
        server.says("pending PORT 2")
        server.do("accept PORT")
        assert first.recv(100) == b"accepted"
        assert server.is_awaited()
        server.do("accept PORT")
        server.ready()


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_another_client_that_was_first_does_not_blur_it(hand_off: str) -> None:
    with serving("-H", hand_off, "--ready", "accept") as server:
        url = server.started.url()
        stop_where_it_waits(server.process.pid)
        server.listens(hand_off)
        server.says("pending PORT 0")
        with connect(url) as first:
            server.says("pending PORT 1")
            server.process.send_signal(signal.SIGCONT)
            server.says("pending PORT 2")
            server.do("accept PORT")
            assert first.recv(100) == b"accepted"
            assert server.is_awaited()
            server.do("accept PORT")
            server.ready()


@pytest.mark.parametrize("hand_off", BY_NUMBER)
def test_a_listener_that_was_closed_again_has_accepted_nothing(hand_off: str) -> None:
    """The connection is gone, as after an accept, but by a reset from the kernel."""
    with serving("-H", hand_off, "--ready", "accept") as server:
        server.listens(hand_off)
        server.says("pending PORT 1")
        server.do("close PORT")
        assert server.is_awaited()
        server.listens(hand_off)
        server.says("pending PORT 1")
        assert server.is_awaited()
        server.do("accept PORT")
        server.ready()


def test_a_listener_that_was_shut_down_has_accepted_nothing() -> None:
    with serving("-H", "fd", "--ready", "accept") as server:
        server.listens("fd")
        server.says("pending PORT 1")
        server.do("shutdown PORT")
        assert server.is_awaited()
        server.do("exit 3")
        assert server.ended() == 3


@pytest.mark.parametrize("name", ["server.sock", "with space.sock", "@abstract"])
def test_accept_on_a_unix_socket(name: str, tmp_path: Path) -> None:
    name = f"@portexec-test-{tmp_path}" if name.startswith("@") else name
    with serving("-l", f"unix:{name}", "-H", "fd", "--ready", "accept", cwd=tmp_path) as server:
        server.listens("fd")
        server.says("pending PORT 1")
        assert server.is_awaited()
        server.do("accept PORT")
        assert server.where() == [f"unix:{name}"]


def test_other_clients_of_a_unix_socket_do_not_make_it_ready(tmp_path: Path) -> None:
    """The backlog as a whole is counted: ready when it is empty."""
    path = f"unix:{tmp_path}/s"
    with launched("--lazy", "-l", path, "-H", "fd", "--ready", "accept") as server:
        server.started.url()
        with connect(path) as first:
            server.comes_up()
            server.listens("fd")
            server.says("pending PORT 2")
            server.do("accept PORT")
            assert first.recv(100) == b"accepted"
            assert server.is_awaited()
            server.do("accept PORT")
            server.ready()


def test_a_unix_socket_whose_backlog_is_full(tmp_path: Path) -> None:
    """There connect(2) gives EAGAIN at once, which is no connection."""
    path = f"unix:{tmp_path}/s"
    with launched("--lazy", "-b", "1", "-l", path, "-H", "fd", "--ready", "accept") as server:
        server.started.url()
        stop_where_it_waits(server.process.pid)  # the first client starts it, and its own connection may be no second one
        with connect(path), connect(path):
            server.process.send_signal(signal.SIGCONT)
            server.comes_up()
            server.listens("fd")
            assert server.says("pending PORT 2") == "waiting 2"
            assert server.is_awaited()
            server.do("accept PORT", "accept PORT", "accept PORT")
            server.ready()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_several_listeners_have_to_accept_all(last: int, tmp_path: Path) -> None:
    """But for UDP, which has nothing to accept."""
    listen = ["-l", "a=0", "-l", "b=[::1]:0", "-l", f"c=unix:{tmp_path}/s", "-l", "d=udp:0"]
    with serving(*listen, "-H", "fd", "--ready", "accept") as server:
        server.do("take 0 3", "take 1 4", "take 2 5")
        for one in {0, 1, 2} - {last}:
            server.do(f"accept {one}")
        server.says(f"pending {last} 1")
        assert server.is_awaited()
        server.do(f"accept {last}")
        assert [url.partition(":")[0] for url in server.where()] == ["http", "http", "unix", "udp"]


@pytest.mark.parametrize("form", [[], ["--ready", "none"]], ids=["default", "none"])
def test_udp_is_ready_at_once(form: list[str]) -> None:
    with launched("-l", "udp:0", "-H", "fd", *form) as server:
        assert sorted(server.heard().partition(" ")[0] for _ in range(2)) == ["up", '{"pid":']


# http


@pytest.mark.parametrize(
    ("form", "path", "bad"),
    [
        ("http", "/", (503, 500)),
        ("http:/", "/", (500, 404)),
        ("http:/health?a=1:2", "/health?a=1:2", (404, 401)),
        ("http:/ready", "/ready", (400, 499)),
    ],
)
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_http_is_not_before_a_status_that_counts(hand_off: str, form: str, path: str, bad: tuple[int, ...]) -> None:
    """Any status under 500; for a path that was given 2xx or 3xx."""
    with serving("-H", hand_off, "--ready", form) as server:
        port = port_of(server.started.url())
        server.listens(hand_off)
        assert server.is_awaited()
        for status in (*bad, 200):
            request = server.replies(b"HTTP/1.1 %d Status\r\n\r\n" % status)
            assert request[0] == f"GET {path} HTTP/1.1"
            assert f"host: 127.0.0.1:{port}" in map(str.lower, request)
        server.ready()


@pytest.mark.parametrize("status", [200, 204, 301, 399])
def test_http_with_a_path_and_a_status_that_is_an_answer(status: int) -> None:
    with serving("-H", "guard", "--ready", "http:/x") as server:
        server.listens("guard")
        server.replies(b"HTTP/1.1 %d x\r\nLocation: /elsewhere\r\n\r\n" % status)
        server.ready()


def test_http_is_asked_less_and_less() -> None:
    """Each GET is a line in a server's log. In two seconds there is time for 13, and for 30 with the pause of the first."""

    def attempt(seconds: int) -> None:
        done = run("--ready", "http:/status/503", "--ready-timeout", f"{seconds}s", "--", *child("light"), "log")
        *log, error, hint = done.stderr.splitlines()
        assert done.returncode == 124
        assert 1 < log.count("GET /status/503") < 7.5 * seconds
        assert error.endswith("/status/503 with 2xx or 3xx; it answered with status 503")
        assert hint == "portexec: hint: --ready http:PATH asks for another path, --ready listen waits for no answer"

    within(2, attempt)


def test_http_with_informational_answers_first() -> None:
    """RFC 9110 section 15.2: they come before the answer itself."""
    with serving("-H", "guard", "--ready", "http:/x") as server:
        server.listens("guard")
        server.replies(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\n")
        assert server.is_awaited()
        server.replies(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK)
        server.ready()


@pytest.mark.parametrize("status", [200, 204, 302, 401, 404, 499])
def test_http_with_a_status_that_is_an_answer(status: int) -> None:
    with serving("-H", "guard", "--ready", "http") as server:
        server.listens("guard")
        server.replies(b"HTTP/1.0 %d x\r\n\r\n" % status)
        server.ready()


NO_ANSWERS = {
    "empty line": b"\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "no number": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "negative": b"HTTP/1.1 -200 OK\r\n\r\n",
    "number that is too long": b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\n\r\n",
    "another protocol": b"ICY 200 OK\r\n\r\n",
    "a word in front": b"200 HTTP/1.1 200\r\n\r\n",
    "bytes": bytes(range(128, 256)) + b"\r\n",
    "500": b"HTTP/1.1 500 Internal Server Error\r\n\r\n",
    "599": b"HTTP/1.1 599\r\n\r\n",
    "1000": b"HTTP/1.1 1000 x\r\n\r\n",
    "cut off": b"HTTP/1.1 20",
}


async def exchange(answer: bytes | None, *, is_over: bool) -> str:
    """What is said of a GET that got these bytes of an answer, None where nobody took its connection."""

    async def reply(server: socket.socket) -> None:
        if answer is None:
            return
        with server.accept()[0] as connection:
            await readable(connection)
            connection.recv(1000)
            connection.sendall(answer)
            if is_over:
                connection.shutdown(socket.SHUT_RDWR)
            await sleep(0)  # what was sent is there, and is read
            await sleep(0)

    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener("web", "tcp", host="127.0.0.1", port=server.getsockname()[1])
        with Probe(listener) as probe:
            await probe.connect()
            asked = get.Get(probe, "/", is_tls=False)
            await first(asked.ask(), reply(server))
        return asked.text()


HALF = "sent an answer that it did not finish"
NO_HTTP = "sent what is not HTTP/1.1"


@pytest.mark.parametrize(
    ("answer", "while_open", "in_the_end"),
    [
        (None, "", ""),
        (b"", "took the connection and sent nothing", "closed the connection without an answer"),
        (b"HT", HALF, HALF),
        (b"HTTP/1.1 20", HALF, HALF),
        (b"HTTP/1.1 100", HALF, HALF),
        (b"HTTP/1.1 100 Continue\r\n\r\n", HALF, HALF),
        (b"HTTP/1.1 200 OK\r\nA: b\r\n", HALF, HALF),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", NO_HTTP, NO_HTTP),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", NO_HTTP, NO_HTTP),
        (b"\x00\x00\x12\x04", NO_HTTP, NO_HTTP),
        (b"HTTP/1.1 503 x\r\n\r\n", "answered with status 503", "answered with status 503"),
    ],
    ids=str,
)
def test_what_is_said_of_an_answer(answer: bytes | None, while_open: str, in_the_end: str) -> None:
    assert loop.run(exchange(answer, is_over=False)) == while_open
    assert loop.run(exchange(answer, is_over=True)) == in_the_end


@pytest.mark.parametrize("hand_off", ["fd", "guard"])
@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_http_with_an_answer_that_is_none(answer: bytes, hand_off: str) -> None:
    with serving("-H", hand_off, "--ready", "http") as server:
        server.listens(hand_off)
        server.replies(answer)
        assert server.is_awaited()
        server.replies(OK)
        server.ready()


@pytest.mark.parametrize("answer", [b"", bytes.fromhex("15030100020246")], ids=["nothing", "TLS alert"])
def test_http_with_an_answer_that_may_come_of_tls(answer: bytes) -> None:
    """It is asked whether it speaks TLS, on another connection, which may do no harm."""
    with serving("-H", "guard", "--ready", "http") as server:
        server.listens("guard")
        server.replies(answer)
        server.do("reset PORT")
        assert server.is_awaited()
        server.replies(OK)
        server.ready()


@pytest.mark.parametrize("way", ["reset", "accept"])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_http_with_a_server_that_ends_the_connection_first(hand_off: str, way: str) -> None:
    with serving("-H", hand_off, "--ready", "http") as server:
        server.listens(hand_off)
        server.do(*[f"{way} PORT"] * (2 if way == "reset" else 1))  # one that says nothing is asked whether it speaks TLS
        server.replies(OK)
        server.ready()


def test_http_on_other_listeners(tmp_path: Path) -> None:
    with serving("-l", f"unix:{tmp_path}/s", "-H", "fd", "--ready", "http:/x") as server:
        server.listens("fd")
        assert server.replies(OK)[:2] == ["GET /x HTTP/1.1", "Host: localhost"]
        server.ready()
    with serving("-l", "[::1]:0", "-l", "0", "-H", "fd", "--ready", "http:/x") as server:
        port = port_of(server.started.url())
        server.listens("fd")
        assert f"Host: [::1]:{port}" in server.replies(OK)
        server.ready()


# https


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with a key and a certificate that nobody has signed, for another name and a day in the past."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    make = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=nobody.invalid", "-days", "1"]
    subprocess.run([program("openssl"), *make, "-keyout", file, "-out", file], check=True, capture_output=True)
    return str(file)


@pytest.mark.parametrize("form", ["https", "https:/"])
def test_https_is_asked_over_tls_and_so_is_its_url(form: str, certificate: str) -> None:
    words = ["--ready", form, "--then", "curl -skS {url}", "--", *child("secure"), certificate]
    done = run(*words)
    announced, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout, rest) == (0, "secure\n", [])
    assert announced.startswith("portexec: https://127.0.0.1:")


@pytest.mark.parametrize(
    ("form", "said", "hint"),
    [
        (
            "https:/no",
            "GET https://{}/no with 2xx or 3xx; it answered with status 404",
            "--ready https takes any status under 500",
        ),
        ("http", "GET http://{}/ with a status under 500; it speaks TLS there", "--ready https asks over TLS"),
        ("http:/x", "GET http://{}/x with 2xx or 3xx; it speaks TLS there", "--ready https asks over TLS"),
    ],
)
def test_a_server_with_tls_that_is_asked_in_the_wrong_way(form: str, said: str, hint: str, certificate: str) -> None:
    def attempt(seconds: int) -> None:
        done = run("--ready", form, "--ready-timeout", f"{seconds}s", "--", *child("secure"), certificate)
        announced, error, hinted = done.stderr.splitlines()
        assert done.returncode == 124
        place = announced.rpartition("/")[2]
        assert error == f"portexec: error: the command was not ready after {seconds} s: it did not answer {said.format(place)}"
        assert hinted == f"portexec: hint: {hint}"

    within(3, attempt)


def test_https_where_there_is_no_tls() -> None:
    def attempt(seconds: int) -> None:
        with serving("--ready", "https", "-H", "guard", "--ready-timeout", f"{seconds}s") as server:
            server.listens("guard")
            server.do("accept PORT")
            server.started.line("/ with a status under 500; it does not speak TLS there$")
            server.started.line("^portexec: hint: --ready http asks without TLS$")
            assert server.process.wait(DEADLINE) == 124

    within(3, attempt)


def test_https_with_a_server_that_hangs_up() -> None:
    def attempt(seconds: int) -> None:
        with serving("--ready", "https", "-H", "guard", "--ready-timeout", f"{seconds}s") as server:
            server.listens("guard")
            server.do("reset PORT", "reset PORT")
            server.started.line("; it closed the connection when it was asked for TLS$")
            assert server.process.wait(DEADLINE) == 124

    within(3, attempt)


def test_the_modules_of_readiness_are_imported_for_their_form_only() -> None:
    """None of them costs a run that does not need it."""
    script = (
        "import sys; from portexec import cli; from portexec.lifetime import run, readiness, events; "
        "print(*sorted({'h11', 'ssl', 'http', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"


# notify


def test_whoever_sends_without_a_pause_leaves_signals_and_time_limits_their_turn() -> None:
    """Everybody can send to an abstract name: there is always one more message here."""
    notify = NotifySocket("", Undo())
    with closing(notify.socket), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for _ in range(2):  # turns
            sender.sendto(b"STATUS=busy", unix.address(notify.name))
            for number, _ in enumerate(notify.received()):
                assert number < 10_000
                sender.sendto(b"STATUS=busy", unix.address(notify.name))


@pytest.fixture(params=["abstract", "path"])
def notify(request: pytest.FixtureRequest) -> Iterator[str]:
    """The form, by a name or by a path in a directory that everybody can enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield "notify" if request.param == "abstract" else f"notify:{directory}/notify"


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_notify_is_not_before_the_server_says_so(hand_off: str, notify: str) -> None:
    with serving("-H", hand_off, "--ready", notify) as server:
        server.listens(hand_off)
        for text in (
            "READY=0",
            "READY=",
            "READY",
            "READY=11",
            "XREADY=1",
            "ready=1",
            "_READY=1",
            "STATUS=READY=1",
            "A=1\\n\\n",
        ):
            server.do(f"notify {text}")
        assert server.is_awaited()
        server.do("notify STATUS=well\\nREADY=1\\nA=B=C")
        assert server.ready()["command_pid"] == server.pid


def test_notify_says_which_process_is_the_main_one(notify: str) -> None:
    with serving("-H", "fd", "--ready", notify) as server:
        server.do("notify MAINPID=4711", "notify MAINPID=x\\nREADY=1")
        assert server.ready()["command_pid"] == 4711


@pytest.mark.parametrize("number", ["9" * 5000, "12345678901", "\u0661", "-1", "0x1", ""])
def test_notify_with_a_main_process_that_is_none(number: str) -> None:
    with serving("-H", "fd", "--ready", "notify") as server:
        server.do(f"notify MAINPID={number}\\nREADY=1")
        assert server.ready()["command_pid"] == server.pid


def test_the_name_of_the_notify_socket(tmp_path: Path) -> None:
    """An abstract one of its own, or the path, which is gone at the end. Below root, a command may become any user."""
    words = ["-q", "--ready", "notify", "-H", "hold", "--", "printenv", "NOTIFY_SOCKET"]
    first, second = (run(*words).stdout for _ in range(2))
    assert first.startswith("@")
    assert first != second
    path = tmp_path / "notify"
    with serving("-H", "fd", "--ready", f"notify:{path}") as server:
        assert path.stat().st_mode & 0o777 == (0o600 if os.geteuid() else 0o666)
        server.do("notify READY=1")
        server.ready()
        assert path.exists()
    assert not path.exists()


def test_without_notify_the_variable_is_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": "/somewhere/else"}
    done = run("-q", "--ready", "none", "-H", "hold", "--", "printenv", "NOTIFY_SOCKET", env=environment)
    assert done.stdout == "/somewhere/else\n"


@pytest.mark.root  # becomes another user
@pytest.mark.parametrize("hand_off", ["fd", "guard"])
def test_a_process_of_the_command_counts_whatever_user_it_became(hand_off: str, notify: str) -> None:
    with serving("-H", hand_off, "--ready", notify) as server:
        assert server.says(f"notify-as {STRANGER} STATUS=nearly") == "sent"
        assert server.is_awaited()
        server.do(f"notify-as {STRANGER} READY=1")
        assert sorted(server.heard()[0] for _ in range(2)) == ["s", "{"]


@pytest.mark.root  # becomes another user
@pytest.mark.parametrize("old_kernel", [False, True], ids=["pidfd", "proc"])
def test_a_process_of_the_command_counts_by_its_pid_too(old_kernel: bool) -> None:
    """Before Linux 6.5 the kernel hands out no pidfd of the sender."""
    prefix = refusing(NO_PASSPIDFD) if old_kernel else []
    with serving("-H", "fd", "--ready", "notify", prefix=prefix) as server:
        server.do(f"notify-as {STRANGER} READY=1")
        assert sorted(server.heard()[0] for _ in range(2)) == ["s", "{"]


@pytest.mark.root  # becomes another user
def test_a_stranger_cannot_say_that_it_is_ready(notify: str) -> None:
    """It is not below portexec, although it can send."""
    with serving("-H", "fd", "--ready", notify) as server:
        environ = Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
        name = next(value for key, _, value in (item.partition(b"=") for item in environ) if key == b"NOTIFY_SOCKET")
        stranger = [*child("obedient"), f"notify-as {STRANGER} READY=1", "exit 0"]
        said = subprocess.run(stranger, env={**os.environb, b"NOTIFY_SOCKET": name}, capture_output=True, check=True).stdout
        assert said.splitlines()[1:] == [b"notify-as", b"sent", b"exit"]
        assert server.is_awaited()
        server.do("notify READY=1")
        server.ready()


@contextmanager
def service_manager(tmp_path: Path, kind: str) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The notification socket of whoever started portexec, and the environment that names it."""
    name = f"{tmp_path}/manager" if kind == "path" else f"@portexec-test-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if kind == "abstract" else name)
        manager.settimeout(DEADLINE)
        yield manager, {**os.environ, "NOTIFY_SOCKET": name}


@pytest.mark.parametrize("kind", ["abstract", "path"])
def test_our_own_service_manager_is_told(tmp_path: Path, kind: str) -> None:
    """READY=1 and STATUS= as they come; the rest is between the command and us."""
    with (
        service_manager(tmp_path, kind) as (manager, environment),
        serving("-H", "fd", "--ready", "notify", env=environment) as server,
    ):
        server.do("notify MAINPID=4711", "notify WATCHDOG=1\\nFDSTORE=1", "notify STATUS=nearly\\nMAINPID=4712")
        assert manager.recv(1000) == b"STATUS=nearly\n"
        server.do("notify READY=1\\nSTATUS=well")
        assert sorted(manager.recv(1000).decode().split()) == ["READY=1", "STATUS=well"]
        server.ready()


def test_a_service_manager_that_has_gone_is_nobodys_failure(tmp_path: Path) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/nobody"}
    with serving("-H", "fd", "--ready", "notify", env=environment) as server:
        server.do("notify READY=1")
        server.ready()


def test_systemd_notify(notify: str) -> None:
    """The program has ended, or waits for our answer to its barrier, when its message is read.

    Its shell goes on: what ends in the same moment is not told ready.
    """
    script = f"{program('systemd-notify')} --ready --status=well && echo told; read line"
    words = ["-q", "--ready-fd", "1", "--ready", notify, "-H", "fd", "--", "sh", "-c", script]
    with running(*words, stdin=subprocess.PIPE) as started:
        assert started.process.stdout is not None
        lines = [started.process.stdout.readline() for _ in range(2)]
        assert sorted(line[0] for line in lines) == ["t", "{"]


# none, and what all forms have in common


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_none_is_at_once(hand_off: str) -> None:
    with launched("-H", hand_off, "--ready", "none") as server:
        assert sorted(server.heard().partition(" ")[0] for _ in range(2)) == ["up", '{"pid":']


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_what_is_told_when_it_is_ready(hand_off: str) -> None:
    """The announcement, and who runs."""
    with serving("-H", hand_off, "--json", "-l", "web=0", "-l", "admin=[::1]:0", "--ready", "accept") as server:
        announced = json.loads(server.started.line("^{").string)
        for key, fd, host in (("WEB_PORT", 3, "127.0.0.1"), ("ADMIN_PORT", 4, "::1")):
            server.do(*([f"take {key} {fd}"] if hand_off == "fd" else [f"bind {key} {host}", f"listen {key}"]))
            server.do(f"accept {key}")
        assert server.ready() == {**announced, "command_pid": server.pid}
        assert announced["pid"] == server.process.pid


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_the_descriptor_is_closed_when_all_is_told(hand_off: str) -> None:
    """It is portexec's alone, and nobody who reads it waits for the command."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        script = "echo up; exec cat"
        words = ["--ready-fd", str(writer), "--ready", "none", "-H", hand_off, "--", "sh", "-c", script]
        with running(*words, pass_fds=[writer], stdin=subprocess.PIPE) as started:
            os.close(writer)
            assert json.loads(told.read())["pid"] == started.process.pid
            assert started.process.poll() is None


def test_the_command_does_not_get_the_descriptor() -> None:
    with launched_with_pipe("-H", "fd", "--ready", "accept") as (server, told):
        assert os.fstat(told).st_ino not in inodes_of_pipes(server.pid)
        server.listens("fd")
        server.do("accept PORT")
        assert json.loads(os.read(told, 10000))["command_pid"] == server.pid


def inodes_of_pipes(pid: int) -> set[int]:
    texts = descriptors_of(pid).values()
    return {int(text.removeprefix("pipe:[").rstrip("]")) for text in texts if text.startswith("pipe:[")}


@contextmanager
def launched_with_pipe(*options: str, fd: int | None = None) -> Iterator[tuple[Server, int]]:
    """The server, and the reading end of a pipe of its own for `--ready-fd`."""
    reader, writer = os.pipe()
    try:
        words = ["--ready-fd", str(writer), *options, "--", *child("obedient")]
        with running(*words, pass_fds=[writer], stdin=subprocess.PIPE) as started:
            os.close(writer)
            writer = -1
            server = Server(started)
            server.comes_up()
            yield server, reader
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_descriptor_whose_number_the_listener_is_to_have(number: int) -> None:
    """As in `portexec --ready-fd 3 ... 3>ready.json`."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        prefix = [*child("place"), str(writer), str(number)]
        words = ["--ready-fd", str(number), "--ready", "accept", "-H", "fd", "--", *child("obedient"), "take PORT 3"]
        with running(*words, prefix=prefix, pass_fds=[writer], stdin=subprocess.PIPE) as started:
            os.close(writer)
            server = Server(started)
            server.comes_up()
            assert server.heard() == "take"
            server.do("accept PORT")
            assert json.loads(told.read())["hand_off"] == "fd"


def test_standard_error_as_the_descriptor() -> None:
    with running("-q", "--ready-fd", "2", "--ready", "none", "-H", "hold", "--", "sleep", "100") as started:
        assert json.loads(started.line("^{").string)["pid"] == started.process.pid
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM


def test_a_reader_that_does_not_read_keeps_nobody_waiting() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
        words = ["-q", "--ready-fd", str(writer), "--ready", "none", "-H", "hold", "--then", "exit 7", "--", "sleep", "100"]
        assert run(*words, pass_fds=[writer]).returncode == 7
    finally:
        os.close(reader)
        os.close(writer)


def test_a_line_that_is_longer_than_the_pipe_is_told() -> None:
    """Hundreds of listeners, and a reader that takes its time."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as told:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        listen = [word for _ in range(200) for word in ("-l", "0")]
        words = ["-q", *listen, "--ready-fd", str(writer), "--ready", "none", "-H", "fd", "--", "sleep", "1000"]
        with running(*words, pass_fds=[writer]):
            os.close(writer)
            assert len(json.loads(told.read())["listeners"]) == 200


def test_a_reader_that_has_gone_is_nobodys_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = ["-q", "--ready-fd", str(writer), "--ready", "none", "-H", "hold", "--then", "exit 7", "--", "sleep", "100"]
        assert run(*words, pass_fds=[writer]).returncode == 7
    finally:
        os.close(writer)


TAKE_IT = "with hand-off fd portexec listens, and the command has to take descriptor 3, {fd} in its words"
OR_NOT = "; leave --hand-off out if it binds the number itself"


@pytest.mark.parametrize("hand_off", HAND_OFFS)
@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", -9), ("kill -TERM $$", -15)])
def test_a_command_that_ends_before_it_is_ready(script: str, status: int, hand_off: str) -> None:
    """Ends the wait at once, with its own status; nothing is told."""
    done = run("--ready-fd", "1", "--ready-timeout", "1h", "-H", hand_off, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (status, "")
    assert "portexec: note: the command ended before it was ready: " in done.stderr
    assert (f"portexec: hint: {TAKE_IT}{OR_NOT}" in done.stderr) is (hand_off == "fd")


@pytest.mark.parametrize("form", ["http", "notify", "accept"])
@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_a_server_that_ends_while_it_is_asked(hand_off: str, form: str) -> None:
    with serving("-H", hand_off, "--ready", form, "--ready-timeout", "1h") as server:
        server.listens(hand_off)
        if form != "notify":
            server.says("pending PORT 1")
        server.do("exit 3")
        assert server.ended() == 3


# The time is over

NEVER = {
    "listen": "listen on {}",
    "accept": "accept a connection on {}",
    "http": "answer GET http://{}/ with a status under 500",
    "http:/health": "answer GET http://{}/health with 2xx or 3xx",
    "notify": "send READY=1 to $NOTIFY_SOCKET",
}


@pytest.mark.parametrize(
    ("form", "hand_off"),
    [(form, hand_off) for form in NEVER for hand_off in HAND_OFFS if (form, hand_off) != ("listen", "fd")],
)
def test_the_time_is_over(form: str, hand_off: str) -> None:
    words = ["--ready-fd", "1", "--ready", form, "--ready-timeout", "100ms", "-H", hand_off, "--", "sleep", "100"]
    done = run(*words)
    announced, error, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (124, "")
    missing = NEVER[form].format(announced.rpartition("/")[2])
    assert error == f"portexec: error: the command was not ready after 0.1 s: it did not {missing}"
    nobody_takes = hand_off == "fd" and form != "notify"
    usual = "--ready-timeout gives it more time, --ready says what to wait for"
    assert hint == f"portexec: hint: {TAKE_IT + OR_NOT if nobody_takes else usual}"


@pytest.mark.parametrize(
    ("words", "command", "hint"),
    [
        (["-H", "fd"], ["true", "--fd", "3"], []),
        (["-H", "fd", "-q", "--then", "true"], ["false"], [TAKE_IT + OR_NOT]),
        (["--no-pid"], ["true"], [TAKE_IT]),
        (["-H", "fd", "-l", "0", "-l", "unix:@portexec-{}"], ["true"], [TAKE_IT]),
        (["--first-fd", "5"], ["true"], [TAKE_IT.replace("3", "5")]),
    ],
    ids=["named", "tests", "by another reason", "unix", "another descriptor"],
)
def test_how_to_take_a_descriptor_is_said_to_a_command_whose_words_name_none(
    words: list[str], command: list[str], hint: list[str]
) -> None:
    own = [word.replace("{}", str(os.getpid())) for word in words]
    done = run("--ready-timeout", "1h", *own, "--", *command)
    assert [line for line in done.stderr.splitlines() if "hint: " in line] == [f"portexec: hint: {line}" for line in hint]


def test_no_time_at_all() -> None:
    done = run("-q", "--ready", "notify", "--ready-timeout", "0", "-H", "fd", "--", "sleep", "100")
    assert done.returncode == 124
    assert done.stderr.startswith("portexec: error: the command was not ready after 0 s: ")


def test_what_the_command_said_last_is_told() -> None:
    def attempt(seconds: int) -> None:
        with serving("--ready", "notify", "--ready-timeout", f"{seconds}s", "-H", "fd") as server:
            server.do("notify STATUS=loading 3 of 7")
            server.started.line(
                rf"not ready after {seconds} s: it did not send READY=1 to \$NOTIFY_SOCKET \(it says: loading 3 of 7\)$"
            )
            assert server.process.wait(DEADLINE) == 124

    within(3, attempt)


def test_only_what_is_missing_is_named() -> None:
    """And the number that the command has instead, but none that is probably for the command itself."""

    def attempt(seconds: int) -> None:
        with serving(
            "-l", "web=0", "-l", "admin=0", "--ready", "listen", "--ready-timeout", f"{seconds}s", "-H", "guard"
        ) as server:
            _, admin = (server.started.url().partition("//")[2] for _ in range(2))
            for key, host in (("WEB_PORT", "127.0.0.1"), ("HELPERS", "127.0.0.1"), ("OTHER", "0.0.0.0")):
                server.do(f"bind {key} {host}", f"listen {key}")
            server.started.line(rf"it did not listen on admin \({re.escape(admin)}\); it listens on port \d+$")
            server.started.line("^portexec: hint: pass the number in its words as {admin.port}$")

    within(3, attempt)


INNER, OUTER = "127.0.0.1", "0.0.0.0"


@pytest.mark.parametrize(
    ("words", "hosts"),
    [(["-H", "guard"], [INNER]), (["-H", "hold"], [OUTER, INNER]), (["-H", "guard", "--ready", "http"], [OUTER])],
    ids=["guard", "hold", "http"],
)
def test_the_number_that_it_has_instead_is_named(words: list[str], hosts: list[str]) -> None:
    """The error is the last that people see, and the first that they read: it says all that is known.

    On the loopback interface it may be for the command itself, which is better than none.
    """

    def attempt(seconds: int) -> None:
        script = (
            "import signal, socket, sys; all = [socket.create_server((host, 0)) for host in sys.argv[1:]]; "
            "print(all[0].getsockname()[1], flush=True); signal.pause()"
        )
        done = run(
            *words, "-q", "--ready-timeout", f"{seconds}s", "--then", "true", "--", sys.executable, "-S", "-c", script, *hosts
        )
        error, hint = (line for line in done.stderr.splitlines() if line.startswith("portexec:"))
        assert done.returncode == 124
        assert error.endswith(f"; it listens on port {done.stdout.strip() or done.stderr.split()[0]}")
        assert hint == "portexec: hint: pass the number in its words as {port}"

    within(2, attempt)


ANY = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])  # the first that the system chooses


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({80: INNER, 9229: INNER, ANY: INNER}, [80]),
        ({80: INNER, ANY: OUTER}, [80, ANY]),
        ({ANY + 1: "::1", 9230: INNER, ANY: INNER}, [ANY, ANY + 1]),
        ({9229: INNER}, [9229]),
        ({}, []),
    ],
)
def test_the_likeliest_number_of_a_server(found: dict[int, str], expected: list[int]) -> None:
    assert likeliest(found) == expected


def test_a_server_that_never_answers() -> None:
    """Whether it has taken the connection is said, since much else follows from that."""

    def attempt(seconds: int) -> None:
        words = ["--ready", "http", "--ready-timeout", f"{seconds}s"]  # in which the other one has to come up, too
        with serving("-H", "fd", *words) as server, serving("-H", "guard", *words) as deaf:
            deaf.listens("guard")
            server.listens("fd")
            server.do("keep PORT")
            deaf.started.line("it did not answer GET .*; it listens there and has taken no connection$")
            server.started.line(
                rf"not ready after {seconds} s: it did not answer GET .*; it took the connection and sent nothing$"
            )
            server.started.line("^portexec: hint: --ready-timeout gives it more time, --ready accept waits for no answer$")
            assert server.process.wait(DEADLINE) == 124

    within(4, attempt)


# What a person sees meanwhile


@contextmanager
def on_a_terminal(*words: str, columns: int = 200, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Portexec with a terminal as its standard error; yields the terminal's other end."""
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options.setdefault("stdout", subprocess.DEVNULL)
    process = subprocess.Popen([*PORTEXEC, *words], stderr=theirs, start_new_session=True, **options)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        kill_group(process.pid)
        process.communicate()
        os.close(ours)


def read_to_end(terminal: int) -> str:
    seen = b""
    while True:
        try:
            data = os.read(terminal, 10000)
        except OSError:  # EIO: nobody has it any more
            return seen.decode()
        seen += data


@pytest.mark.parametrize("quiet", [False, True], ids=["loud", "quiet"])
def test_who_waits_is_told_for_what(quiet: bool) -> None:
    """After 5 s, by a whole line: nothing is redrawn over what a server writes, on a terminal neither.

    A listener that is probably for the command itself is named in the end alone.
    """
    words = ["-q"] * quiet + ["--ready", "listen", "--ready-timeout", "6s", "-H", "hold", "--", *child("light"), "port=0"]
    with on_a_terminal(*words) as (process, terminal):
        seen = read_to_end(terminal)
        assert process.wait(DEADLINE) == 124
    told = [line for line in seen.splitlines() if "waiting for" in line]
    place = re.search(r"did not listen on (\S+); it listens on port \d+\r", seen)
    assert place
    assert told == ([] if quiet else [f"portexec: note: 5 s: waiting for the command to listen on {place[1]}"])
    assert "\x1b" not in seen


@pytest.mark.parametrize("hand_off", HAND_OFFS)
def test_verbose_says_how_long_it_took(hand_off: str) -> None:
    with serving("-v", "-H", hand_off, "--ready", "accept") as server:
        server.listens(hand_off)
        server.do("accept PORT")
        server.started.line(r"^portexec: ready after \d+\.\d\ds$")
