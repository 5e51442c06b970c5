"""Readiness is a state: a command that listens to look whether its number is free, and closes, is not ready by that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Running, child, get, run, running
from tests.support.installed import needs_ipv6, program
from tests.support.processes import read_line, tell

LOOKS = str(Path(__file__).parent / "apps" / "looks.js")
TIMES = 5

pytestmark = pytest.mark.once


@pytest.mark.parametrize("delay", ["0", "50", "500"])
@pytest.mark.parametrize("looks", [["127.0.0.1"], ["0.0.0.0", "::"], ["127.0.0.1"] * 5], ids=" ".join)
def test_a_look_is_not_taken_for_the_server(looks: list[str], delay: str) -> None:
    server = [program("node"), LOOKS, "127.0.0.1", delay, *looks]
    for _ in range(TIMES):
        done = run("-q", "--then", "exec curl -sS {url}", "--", *server)
        assert (done.returncode, done.stdout, done.stderr) == (0, "served on 127.0.0.1\n", "")


@needs_ipv6
@pytest.mark.parametrize("ready", ["listen", "http"])
def test_the_address_that_is_told_is_that_of_the_server_and_not_that_of_the_look(ready: str) -> None:
    server = [program("node"), LOOKS, "::1", "50", "0.0.0.0", "::"]
    for _ in range(TIMES):
        done = run("-q", "--ready", ready, "--then", "echo {url}; exec curl -sS {url}", "--", *server)
        assert done.returncode == 0
        url, answer = done.stdout.splitlines()
        assert url.startswith("http://[::1]:")
        assert answer == "served on ::1"


@needs_ipv6
def test_a_second_line_gives_the_address_where_the_announced_one_does_not_lead() -> None:
    with running("-H", "guard", "--", program("node"), LOOKS, "::1", "0") as run:
        announced = run.url()
        assert run.url() == announced.replace("127.0.0.1", "[::1]")
        assert get(run.lines[-1].removeprefix("portexec: ")) == "served on ::1\n"


def test_there_is_no_second_line_where_the_first_one_leads() -> None:
    """A server on all addresses of both families is at the announced one, too. What ends it is told after that line's time."""
    done = run("-H", "guard", "--then", "curl -sS {url}; exec sleep 0.3", "--", program("node"), LOOKS, "::", "0")
    assert (done.stdout, done.stderr.count("portexec: ")) == ("served on ::\n", 1)


@pytest.mark.parametrize("looks", [["127.0.0.1"], ["0.0.0.0", "::"]], ids=" ".join)
def test_a_look_is_not_taken_for_the_server_with_hold_either(looks: list[str]) -> None:
    server = [program("node"), LOOKS, "127.0.0.1", "500", *looks]
    for _ in range(TIMES):
        done = run("-q", "-H", "hold", "--then", "exec curl -sS {url}", "--", *server)
        assert (done.returncode, done.stdout, done.stderr) == (0, "served on 127.0.0.1\n", "")


def test_a_listener_that_stays_for_a_moment_is_a_look_with_hold() -> None:
    """It is found while it listens, and its process rests; but not twice in the same sleep. What stays longer is no look."""
    script = (
        "import os, socket, sys, time, http.server as h\n"
        "port, look = int(os.environ['PORT']), socket.socket()\n"
        "look.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), look.bind(('127.0.0.1', port)), look.listen()\n"
        "begin = time.monotonic()\n"
        "for _ in range(10): time.sleep(0.004)\n"
        "look.close(), print('looked' if time.monotonic() - begin < 0.2 else 'late', flush=True), sys.stdin.readline()\n"
        "h.HTTPServer(('127.0.0.1', port), h.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    words = ["-q", "--ready-fd", "1", "-H", "hold", "--", sys.executable, "-c", script]
    while True:
        with running(*words, stdin=subprocess.PIPE) as started:
            if has_looked(started):
                tell(started.process, "")
                assert json.loads(read_line(started.process))["hand_off"] == "hold"
                return


def has_looked(started: Running) -> bool:
    """Whether it has looked, before portexec has said that it is ready. False if it had to wait too long for a processor."""
    lines = [read_line(started.process)]
    if lines not in (["looked"], ["late"]):
        lines.append(read_line(started.process))  # it was ready before
    if lines[-1] == "late":
        return False
    assert lines == ["looked"]
    return True


@pytest.mark.parametrize("busy", [[], ["busy"]], ids=["idle", "busy"])
def test_a_look_by_python_beside_a_busy_thread(busy: list[str]) -> None:
    """It sleeps between its listen and its close, since it waits for the interpreter's lock."""
    for _ in range(TIMES):
        with running(
            "-q", "--ready-fd", "1", "-H", "guard", "--", *child("looks"), *busy, "serve", stdin=subprocess.PIPE
        ) as run:
            assert run.process.stdout is not None
            assert run.process.stdin is not None
            assert run.process.stdout.readline() == "looked\n"  # else it was ready before
            run.process.stdin.write("\n")
            run.process.stdin.flush()
            (listener,) = json.loads(run.process.stdout.readline())["listeners"]
            assert get(listener["url"]) == "served\n"


MANY = """
import os, signal, socket, sys, time
def opened(name):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", int(os.environ[f"{name}_PORT"])))
    made.listen()
    return made
count = int(sys.argv[1])
begin = time.monotonic()
served = [opened(f"S{number}") for number in range(count)]
looks = [opened(f"L{number}") for number in range(count)]
if sys.argv[2:] == ["slowly"]:
    for _ in range(10):
        time.sleep(0.004)
for look in looks:
    look.close()
print("late" if sys.argv[2:] and time.monotonic() - begin > 0.2 else "looked", flush=True)
sys.stdin.readline()
looks = [opened(f"L{number}") for number in range(count)]
signal.pause()
"""


def many(count: int, *how: str) -> list[str]:
    """The words for a program that serves on so many numbers, looks at as many others, and serves there when it is told."""
    listen = [word for kind in "sl" for number in range(count) for word in ("-l", f"{kind}{number}=0")]
    return [*listen, "--", sys.executable, "-c", MANY, str(count), *how]


def test_of_many_listeners_of_one_thread_each_is_told_that_is_a_servers() -> None:
    with running("-v", "-H", "guard", *many(30), stdin=subprocess.PIPE) as started:
        urls = [started.url() for _ in range(60)]
        assert read_line(started.process) == "looked"
        served = {started.line(r"the command listens on 127.0.0.1:(\d+)$")[1] for _ in range(30)}
        assert served == {url.rpartition(":")[2] for url in urls[:30]}
        tell(started.process, "")
        looked_at = {started.line(r"the command listens on 127.0.0.1:(\d+)$")[1] for _ in range(30)}
        assert looked_at == {url.rpartition(":")[2] for url in urls[30:]}


@pytest.mark.parametrize("hand_off", ["guard", "hold"])
def test_one_listener_of_many_that_was_a_look_is_waited_for(hand_off: str) -> None:
    how = ["slowly"] if hand_off == "hold" else []
    while True:
        with running("-q", "--ready-fd", "1", "-H", hand_off, *many(2, *how), stdin=subprocess.PIPE) as started:
            if has_looked(started):
                tell(started.process, "")
                assert len(json.loads(read_line(started.process))["listeners"]) == 4
                return


def test_a_command_that_looks_and_crashes_is_started_five_times_and_then_given_up() -> None:
    done = run("--restart", "on-failure", "-H", "guard", "--", *child("looks"), "crash")
    assert (done.returncode, done.stdout) == (1, 5 * "looked\n")
    how_often = "5 times in a row before it was ready, so there is no restart"
    assert f"portexec: note: the command ended {how_often}: exit status 1" in done.stderr.splitlines()


def test_who_looked_at_its_number_and_serves_elsewhere_is_told_so() -> None:
    script = (
        "const net = require('net'), look = net.createServer();"
        "look.listen(+process.env.PORT, '127.0.0.1', () => look.close(() => net.createServer().listen(0, '127.0.0.1')))"
    )
    with running("-H", "guard", "--", program("node"), "-e", script) as run:
        run.line(r"^portexec: note: the command listens on port \d+, not on \d+$")
