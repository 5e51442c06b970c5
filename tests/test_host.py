"""`--host`: the name or address of this machine that others are told, and what is said where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import portexec
from portexec.binding.known_as import require_host
from tests.support import child, get, names, run, running
from tests.support.installed import need, needs_ipv6

pytestmark = pytest.mark.once

LIGHT = child("light")
FORMS = "write a name or an address of this machine: node1, 10.0.0.5, [fd00::5]"
ELSEWHERE = "listen on every address, with -l '*', or on the one that the host has"
BRACKETS = "an IPv6 address goes in brackets: [::1]"
NUMBER = "the number is that of the listener: leave :80 out"
NO_HOST = [
    (" ", FORMS),
    ("a b", FORMS),
    ("node1\n", FORMS),
    ("[]", FORMS),
    ("[::1", FORMS),
    ("[node1]", FORMS),
    ("[127.0.0.1]", FORMS),
    ("[fe80::1%eth0]", FORMS),
    ("1.2.3", FORMS),
    ("256.0.0.1", FORMS),
    ("a..b", FORMS),
    ("-x", FORMS),
    ("a,b", FORMS),
    ("a/b", FORMS),
    ("n\N{LATIN SMALL LETTER O WITH DIAERESIS}de", FORMS),
    ("\udcff", FORMS),
    ("::1", BRACKETS),
    ("node1:80", NUMBER),
    ("[::1]:80", NUMBER),
    ("http://me@node1:80/x", "it is a host, not a URL: node1"),
    ("http://[::1]/", "it is a host, not a URL: [::1]"),
]


@pytest.mark.parametrize(("host", "hint"), NO_HOST)
def test_what_is_no_host(host: str, hint: str) -> None:
    with pytest.raises(portexec.UsageError) as caught:
        require_host(host)
    assert (caught.value.message, caught.value.hint) == (f"--host {host!r} is not a host", hint)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]"])
def test_where_only_a_server_can_be(host: str) -> None:
    with pytest.raises(portexec.UsageError) as caught:
        require_host(host)
    message = f"--host {host} is where a server listens, and no client can connect to it"
    assert (caught.value.message, caught.value.hint) == (message, FORMS)


def test_nothing_is_begun(tmp_path: Path) -> None:
    files = ["--port-file", str(tmp_path / "p"), "--export", str(tmp_path / "e"), "-l", f"s=unix:{tmp_path}/s"]
    done = run(*files, "-l", "*", "--host=node 1", "--", "touch", str(tmp_path / "started"))
    assert (done.returncode, done.stderr) == (125, f"portexec: error: --host 'node 1' is not a host\nportexec: hint: {FORMS}\n")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_host() -> None:
    done = run("--host", "", "--", "true")
    assert done.stderr == f"portexec: error: --host is empty\nportexec: hint: {FORMS}; is a variable unset?\n"


# where it listens, the host, and where that does not lead to
MISFITS = [
    (["0"], "node1", "127.0.0.1"),
    (["127.0.0.7:0", "b=0"], "10.0.0.5", "127.0.0.7, 127.0.0.1"),
    (["0"], "[fd00::5]", "127.0.0.1"),
    (["0"], "127.0.0.2", "127.0.0.1"),
    (["0.0.0.0:0"], "[fd00::5]", "0.0.0.0"),
    (["udp:0"], "node1", "127.0.0.1"),
    pytest.param(["[::1]:0"], "node1", "::1", marks=needs_ipv6),
    pytest.param(["[::1]:0"], "127.0.0.1", "::1", marks=needs_ipv6),
    pytest.param(["[::]:0"], "10.0.0.5", "::", marks=needs_ipv6),
]


@pytest.mark.parametrize(("specs", "host", "where"), MISFITS)
def test_a_host_that_does_not_lead_there(specs: list[str], host: str, where: str, tmp_path: Path) -> None:
    files = ["--port-file", str(tmp_path / "p"), "--export", str(tmp_path / "e")]
    listen = [word for spec in specs for word in ("-l", spec)]
    done = run(*files, *listen, "--host", host, "--", "touch", str(tmp_path / "started"))
    message = f"portexec: error: --host {host} does not lead to {where}, where this listens\n"
    assert (done.returncode, done.stderr) == (125, f"{message}portexec: hint: {ELSEWHERE}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_unix_socket_alone(tmp_path: Path) -> None:
    done = run("-l", f"unix:{tmp_path}/s", "--host", "node1", "--", "true")
    message = "portexec: error: --host node1: a unix socket cannot be reached from another machine\n"
    assert (done.returncode, done.stderr) == (125, f"{message}portexec: hint: listen on a port, as with -l '*'\n")
    assert list(tmp_path.iterdir()) == []


# where it listens, a host that fits
FITTING = [
    ("*", "node1"),
    ("*", "10.0.0.5"),
    ("*", "[fd00::5]"),
    ("0.0.0.0:0", "node1.example.org"),
    ("127.0.0.1:0", "web.localhost"),
    ("127.0.0.1:0", "LOCALHOST"),
    ("127.0.0.2:0", "127.0.0.2"),
    ("*", "127.0.0.1"),
    ("[::]:0", "[fd00::5]"),
    ("[::1]:0", "localhost"),
    ("*", "[::1]"),
]


@pytest.mark.parametrize(
    ("hand_off", "spec", "host"), [("fd", *FITTING[0]), ("guard", *FITTING[0]), *(("hold", *each) for each in FITTING)]
)
def test_everybody_is_told(hand_off: str, spec: str, host: str, tmp_path: Path) -> None:
    """The command, people, and files; the number is the same for all."""
    need(["ipv6"] if "[" in spec + host else [])
    exported, numbered = tmp_path / "e", tmp_path / "p"
    words = ["-l", spec, "--host", host, "-H", hand_off, "--export", str(exported), "--port-file", str(numbered)]
    show = f'echo {{host}} {{url}} $E "${{HOST-none}}"; cat {exported} {numbered}'
    done = run(*words, "-e", "E={listener1.url}", "--", "sh", "-c", show)
    port = done.stderr.splitlines()[0].rpartition(":")[2]
    assert done.stderr.splitlines()[0] == f"portexec: http://{host}:{port}"
    told, *files = done.stdout.splitlines()
    assert told == f"{host} http://{host}:{port} http://{host}:{port} none"
    assert files == [f"PORT={port}", f"HOST={host}", port]


def test_listeners_that_it_does_not_lead_to_keep_their_own(tmp_path: Path) -> None:
    listen = ["-l", "web=*", "-l", "admin=0", "-l", "news=udp:*:0", "-l", f"s=unix:{tmp_path}/s"]
    done = run(*listen, "--host", "node1", "--json", "--export", str(tmp_path / "e"), "--", "cat", str(tmp_path / "e"))
    found = {each["name"]: each for each in json.loads(done.stderr)["listeners"]}
    assert [each.get("host") for each in found.values()] == ["node1", "127.0.0.1", "node1", None]
    assert found["news"]["url"] == f"udp://node1:{found['news']['port']}"
    lines = dict(line.split("=") for line in done.stdout.splitlines())
    assert set(lines) == {"PORT", "HOST", "WEB_PORT", "WEB_HOST", "ADMIN_PORT", "NEWS_PORT", "NEWS_HOST"}
    assert (lines["HOST"], lines["WEB_HOST"], lines["NEWS_HOST"]) == ("node1", "node1", "node1")


def test_without_it_nothing_is_said_of_a_host(tmp_path: Path) -> None:
    done = run("-l", "*", "--export", str(tmp_path / "e"), "--", "cat", str(tmp_path / "e"))
    assert done.stdout.startswith("PORT=")
    assert "HOST" not in done.stdout


def test_a_dry_run_shows_it() -> None:
    done = run("-n", "-l", "*", "--host", "node1", "--", "echo", "{url}")
    assert "listener  listener1  http://node1:" in done.stdout
    assert "/echo http://node1:" in done.stdout


@pytest.mark.parametrize("ready", ["listen", "accept", "http"])
def test_readiness_does_not_need_the_name(ready: str) -> None:
    """The name may lead here from other machines only."""
    words = ["-q", "-l", "*", "--host", "nosuch.invalid", "--ready", ready, "--then", "echo {url} $PORT"]
    done = run(*words, "--", *LIGHT, "host=0.0.0.0")
    assert (done.returncode, done.stderr) == (0, "")
    [told] = [line for line in done.stdout.splitlines() if "serving" not in line]  # the server may say that last
    url, port = told.split()
    assert url == f"http://nosuch.invalid:{port}"


def test_a_command_that_other_machines_do_not_reach() -> None:
    """It listens on 127.0.0.1 only: people and tests are told the address that is true."""
    with running("-l", "*", "--host", "node1", "--ready", "listen", "--", *LIGHT) as started:
        url = started.url()
        assert url.startswith("http://node1:")
        assert started.url() == url.replace("node1", "127.0.0.1")
        started.line("^portexec: note: node1 does not lead there: the command listens where other machines cannot reach it$")
    done = run("-q", "-l", "*", "--host", "node1", "--then", "echo {url}", "--", *LIGHT)
    [told] = [line for line in done.stdout.splitlines() if "serving" not in line]  # the server may say that last
    assert told.startswith("http://127.0.0.1:")


@pytest.mark.usefixtures("registry")
def test_a_server_with_a_name() -> None:
    url = names.started("web", "-l", "*", "--host", "node1", command=names.ON_FD)
    port = url.rpartition(":")[2]
    assert url == f"http://node1:{port}"
    assert run("--url", "web").stdout == f"{url}\n"
    assert names.listed()["web"]["listeners"][0]["host"] == "node1"
    assert portexec.find("web").url == url
    assert get(f"http://127.0.0.1:{port}")


def test_from_python() -> None:
    with portexec.serve([*LIGHT, "fd={fd}"], listen="*", host="node1") as server:
        assert (server.host, server.url) == ("node1", f"http://node1:{server.port}")
        assert get(f"http://127.0.0.1:{server.port}")
    with pytest.raises(portexec.UsageError, match=r"^host node1 does not lead to 127\.0\.0\.1"):
        portexec.serve(LIGHT, host="node1").__enter__()
