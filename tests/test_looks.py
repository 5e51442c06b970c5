"""Readiness is a state: a command that listens to look whether its number is free, and closes, is not ready by that."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support import child, get, run, running
from tests.support.installed import needs_ipv6, program

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


def test_a_command_that_looks_and_crashes_is_started_five_times_and_then_given_up() -> None:
    done = run("--restart", "on-failure", "-H", "guard", "--", *child("looks"), "crash")
    assert (done.returncode, done.stdout) == (1, 5 * "looked\n")
    given_up = "portexec: note: the command ended 5 times in a row without being ready, so there is no restart"
    assert given_up in done.stderr.splitlines()


def test_who_looked_at_its_number_and_serves_elsewhere_is_told_so() -> None:
    script = (
        "const net = require('net'), look = net.createServer();"
        "look.listen(+process.env.PORT, '127.0.0.1', () => look.close(() => net.createServer().listen(0, '127.0.0.1')))"
    )
    with running("-H", "guard", "--", program("node"), "-e", script) as run:
        run.line(r"^portexec: note: the command listens on port \d+, not on \d+$")
