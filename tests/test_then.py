"""`--then`: the tests begin when the server is ready, and the server ends when they do, or the other way round.

The servers are tests/children/obeying.py, which does what a client tells it, and the tests are shell commands that ask it by
way of tests/children/ask.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, PORTEXEC, Running, child, is_gone, run, running, status_of, wait_for
from tests.support.installed import needs_ipv6, program
from tests.support.network import port_of
from tests.support.proc import children_of, is_pending, state
from tests.support.processes import ONE_REQUEST, tell_again
from tests.support.terminals import CTRL_C, terminal_with

HAND_OFFS = ["fd", "guard", "hold"]
TOGETHER = pytest.mark.parametrize("hand_off", HAND_OFFS)
BY_NUMBER = pytest.mark.parametrize("hand_off", ["guard", "hold"])
SERVER = child("obeying")
ENDED = r"^portexec: error: .*ended.*"
WITHOUT_CORE_FILES = ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh"]
STAY = "exec sleep 1000"  # tests that go on until they are stopped


def stay_after(script: str) -> str:
    """The same for tests with traps, which the script sets before it says something.

    A shell's `read` would not end by a signal that comes just before it begins to block. And a child that is forked with traps
    set loses a signal that comes before it has dropped them. So the sleep comes first.
    """
    return f"sleep 1000 & {script}; while :; do wait; done"


def ask(line: str, url: str = "{url}") -> str:
    """The shell command that tells the server this."""
    return shlex.join([*child("ask"), url, line])


@pytest.mark.parametrize(
    ("words", "status", "message", "quoted"),
    [
        (["echo", "test", "--", "true"], 125, "the server ended before it was ready: exit status", "'echo test'"),
        (["echo", "run-it", "now", "--", "true"], 127, "command not found: run-it", "'echo run-it now'"),
    ],
    ids=["a command", "none"],
)
def test_quotes_that_were_forgotten(words: list[str], status: int, message: str, quoted: str) -> None:
    done = run("--then", *words)
    assert done.returncode == status
    assert f"portexec: error: {message}" in done.stderr
    assert f"portexec: hint: if the words before -- belong to --then, quote them: --then {quoted}\n" in done.stderr


def run_then(then: str, *words: str, server: Sequence[str] = SERVER, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("-q", "--then", then, *words, "--", *server, **options)


def lines_of(text: str) -> list[str]:
    """The lines of stdout without the one with which the server says that it serves."""
    return [line for line in text.splitlines() if not line.startswith("serving ")]


def next_line(started: Running) -> str:
    assert started.process.stdout is not None
    return started.process.stdout.readline().rstrip("\n")


def pid_in(line: str, word: str) -> int:
    found = re.fullmatch(rf"{word} (\d+)", line)
    assert found, line
    return int(found[1])


# Statuses.


@TOGETHER
@pytest.mark.parametrize("status", [0, 7])
def test_the_status_is_that_of_the_tests(hand_off: str, status: int) -> None:
    done = run_then(f"echo tests; exit {status}", "-H", hand_off)
    assert (done.returncode, lines_of(done.stdout), done.stderr) == (status, ["tests"], "")


@pytest.mark.parametrize("status", [1, 2, 124, 125, 126, 127, 128, 255])
def test_every_status_of_the_tests_comes_through(status: int) -> None:
    done = run_then(f"exit {status}")
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_it_dies_as_the_tests_died(number: signal.Signals) -> None:
    done = run_then(f"kill -{number.value} $$")
    assert (done.returncode, done.stderr) == (-number, "")


def test_tests_that_cannot_be_found_are_the_shells_affair() -> None:
    done = run_then("nosuch-test-runner")
    assert done.returncode == 127
    assert "nosuch-test-runner" in done.stderr
    assert "Traceback" not in done.stderr


@TOGETHER
def test_the_servers_own_status_does_not_matter_when_the_tests_have_ended(hand_off: str) -> None:
    server = ["sh", "-c", f"trap 'exit 9' TERM; {shlex.join(SERVER)} & wait $!"]
    assert (
        run_then(ask("variable PORT"), "-H", hand_off, "--no-pid" if hand_off == "fd" else "-q", server=server).returncode == 0
    )


@TOGETHER
@pytest.mark.parametrize(
    ("make", "status"),
    [
        pytest.param(None, 127, id="not found"),
        pytest.param("#!/no/such/interpreter\n", 126, id="no interpreter"),
    ],
)
def test_a_server_that_cannot_be_executed(make: str | None, status: int, hand_off: str, tmp_path: Path) -> None:
    script = tmp_path / "server"
    if make is not None:
        script.write_text(make)
        script.chmod(0o755)
    done = run_then("echo tests", "-H", hand_off, server=[str(script)])
    assert (done.returncode, done.stdout) == (status, "")
    assert re.match(r"portexec: error: cannot run \S+", done.stderr)
    assert "Traceback" not in done.stderr


# What the tests are given.


def report_of_tests(*words: str, server: Sequence[str] = SERVER, **options: Any) -> dict[str, Any]:
    done = run_then(shlex.join(child("report")), *words, server=server, **options)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(lines_of(done.stdout)[0])
    return report


@TOGETHER
def test_the_tests_have_the_variables_of_the_command_and_its_sockets_not(hand_off: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("FROM_FILE=<${PORT}>\n")
    words = ["-e", "BASE={url}", "-e", "API={api.url}/v1", "--env-file", str(file), "-l", "web=0", "-l", "api=0"]
    report = report_of_tests("-H", hand_off, "--ready", "none", *words)
    seen = report["environment"]
    port, api = seen["PORT"], seen["API_PORT"]
    assert seen["WEB_PORT"] == port != api
    assert seen["BASE"] == f"http://127.0.0.1:{port}"
    assert seen["API"] == f"http://127.0.0.1:{api}/v1"
    assert seen["FROM_FILE"] == f"<{port}>"
    assert [name for name in seen if name.startswith("LISTEN_") or name == "NOTIFY_SOCKET"] == []
    assert [fd for fd, it in report["descriptors"].items() if "family" in it] == []


def test_the_tests_words_have_templates_and_the_shells_braces_stay() -> None:
    then = "A=1; echo {port} {{port}} ${A} {host} {url} {listener1.url} '{\"a\": 1}' ${PORT}"
    done = run_then(then)
    assert done.returncode == 0
    port = lines_of(done.stdout)[0].split()[0]
    url = f"http://127.0.0.1:{port}"
    assert lines_of(done.stdout) == [f'{port} {port} 1 127.0.0.1 {url} {url} {{"a": 1}} {port}']


def test_a_variable_with_the_descriptor_is_for_the_server_and_does_not_stop_the_tests() -> None:
    """The tests have no such descriptor, whatever they see."""
    server = [*SERVER, "fd=3"]
    done = run("-q", "-e", "SOCKET={fd}", "--then", f"{ask('variable SOCKET')}; exit 5", "--", *server)
    assert (done.returncode, done.stderr) == (5, "")
    assert lines_of(done.stdout) == ["3"]


@pytest.mark.parametrize(
    ("then", "named"),
    [("echo {fd}", "{fd}"), ("echo {nosuch.port}", "{nosuch.port}"), ("echo {listener1.fd}", "{listener1.fd}")],
)
def test_a_template_that_the_tests_cannot_have_is_refused_before_the_server_starts(then: str, named: str) -> None:
    done = run_then(then, "-H", "fd")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("portexec: error: ")
    assert named in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@needs_ipv6
@BY_NUMBER
@pytest.mark.parametrize("ready", ["listen", "accept", "notify"])
@pytest.mark.parametrize(
    ("listen", "host", "expected"),
    [
        ("127.0.0.1:0", "[::1]", "[::1]"),
        ("127.0.0.1:0", "127.0.0.2", "127.0.0.2"),
        ("127.0.0.1:0", "*", "127.0.0.1"),
        ("127.0.0.1:0", "0.0.0.0", "127.0.0.1"),
        ("[::1]:0", "127.0.0.1", "127.0.0.1"),
        ("*:0", "[::1]", "[::1]"),
    ],
)
def test_the_tests_are_told_the_address_that_was_really_bound(
    hand_off: str, ready: str, listen: str, host: str, expected: str
) -> None:
    server = [*SERVER, f"host={host}", "notify=yes" if ready == "notify" else "notify="]
    then = f'echo "$BASE {{host}} $PORT"; {ask("variable PORT")}'
    done = run_then(then, "-H", hand_off, "--ready", ready, "-l", listen, "-e", "BASE={url}", server=server)
    assert (done.returncode, done.stderr) == (0, "")
    told, answer = lines_of(done.stdout)
    assert told == f"http://{expected}:{answer} {expected} {answer}"


STATES = [
    pytest.param({}, id="nothing special"),
    pytest.param({"ignore": ["SIGHUP", "SIGUSR2"], "umask": 0o027}, id="ignored signals"),
    pytest.param({"block": ["SIGUSR1", "SIGRTMIN"]}, id="blocked signals"),
    pytest.param({"ignore": ["SIGCHLD", "SIGPIPE"], "nice": 3}, id="SIGCHLD ignored"),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("who", ["server", "tests"])
def test_server_and_tests_start_as_from_a_shell(state: dict[str, Any], who: str, tmp_path: Path) -> None:
    """Signals, umask and the like are what they are without portexec. But SIGPIPE is always the default."""
    look = f"grep -E '^(Sig(Blk|Ign|Cgt)|NoNewPrivs|Umask)' /proc/self/status; nice; pwd; readlink /proc/self/fd/1 >{tmp_path}/"
    ended = f"{shlex.join(SERVER)}"
    server, then = (
        (f"({look}a) >{tmp_path}/b; exec {ended}", "true") if who == "server" else (f"exec {ended}", f"({look}a) >{tmp_path}/b")
    )

    def started(command: list[str]) -> str:
        told = json.dumps({"command": command, "environment": dict(os.environ), "state": state})
        done = subprocess.run([*child("start"), told], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
        return (tmp_path / "b").read_text()

    wrapped = started([*PORTEXEC, "-q", "-H", "hold", "--then", then, "--", "/bin/sh", "-c", server])
    bare = started(["/bin/sh", "-c", f"({look}a) >{tmp_path}/b"])
    sigpipe = 1 << signal.SIGPIPE - 1

    def without_sigpipe(text: str) -> str:
        return re.sub(r"(?m)^(SigIgn:\s+)(\w+)$", lambda found: f"{found[1]}{int(found[2], 16) & ~sigpipe:016x}", text)

    assert wrapped == without_sigpipe(bare)


# Standard streams.


@TOGETHER
def test_the_tests_get_our_stdin_and_the_server_a_silent_pipe(hand_off: str) -> None:
    """esbuild and some others end when their standard input does."""
    done = run_then(f"{ask('stdin')}; cat", "-H", hand_off, input="a line\n")
    assert (done.returncode, lines_of(done.stdout)) == (0, ["silent pipe", "a line"])


def test_a_server_that_ends_with_its_stdin_lives_until_the_tests_have_ended(tmp_path: Path) -> None:
    server = ["sh", "-c", f"exec 3<&0; {shlex.join(SERVER)} <&3 & cat <&3; touch {tmp_path}/ended; kill $!"]
    done = run_then(f"{ask('stdin')}; ls {tmp_path}", server=server)
    assert (done.returncode, lines_of(done.stdout)) == (0, ["silent pipe"])


def test_the_pipe_ends_when_portexec_does() -> None:
    """Also for what has got away from the run, and for what KILL of portexec leaves to the shim."""
    with running("-q", "--then", STAY, "--", *child("obeying"), "on=SIGTERM:ignore") as started:
        assert next_line(started).startswith("serving ")
        server = children_of(children_of(started.process.pid)[0])[0]
        read_end = os.open(f"/proc/{server}/fd/0", os.O_RDONLY)
        started.process.kill()
        assert os.read(read_end, 1) == b""  # it would wait for as long as anybody could write
        os.close(read_end)


@TOGETHER
def test_every_start_has_it(hand_off: str) -> None:
    words = ["-q", "-H", hand_off, "--restart", "on-failure"]
    then = f"{ask('stdin')}; {ask('exit 3')}; until {ask('stdin')} 2>/dev/null; do sleep 0.1; done"
    done = run(*words, "--then", then, "--", *SERVER)
    assert (done.returncode, [line for line in lines_of(done.stdout) if line]) == (0, ["silent pipe"] * 2)


def test_elsewhere_the_command_keeps_the_stdin_that_it_was_given(tmp_path: Path) -> None:
    done = run("-q", "--ready", "none", "--log", str(tmp_path / "log"), "--", "cat", input="a line\n")
    assert (done.returncode, (tmp_path / "log").read_text()) == (0, "a line\n")


def test_a_server_that_reads_its_stdin_takes_nothing_from_the_tests() -> None:
    server = ["sh", "-c", f"exec 3<&0; cat >&2 <&3 & exec {shlex.join(SERVER)}"]
    done = run_then("cat", "-H", "guard", server=server, input="for the tests\n")
    assert (done.returncode, lines_of(done.stdout), done.stderr) == (0, ["for the tests"], "")


@TOGETHER
def test_with_a_closed_stdin_the_server_has_its_pipe_all_the_same(hand_off: str) -> None:
    """A server with nothing at descriptor 0 would have a socket of its own there, sooner or later."""
    words = [*PORTEXEC, "-q", "-H", hand_off, "--then", f"{ask('stdin')}; exit 5", "--", *SERVER]
    told = json.dumps({"command": words, "environment": dict(os.environ), "state": {"close": [0]}})
    done = subprocess.run([*child("start"), told], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (5, "")
    assert lines_of(done.stdout) == ["silent pipe"]


@TOGETHER
@pytest.mark.parametrize("closed", [[0, 1], [1, 2], [0, 1, 2]])
def test_with_closed_streams_the_tests_run_and_end(hand_off: str, closed: list[int], tmp_path: Path) -> None:
    words = [*PORTEXEC, "-q", "-H", hand_off, "--then", f"{ask('variable PORT')} >{tmp_path}/answer; exit 5", "--", *SERVER]
    told = json.dumps({"command": words, "environment": dict(os.environ), "state": {"close": closed}})
    done = subprocess.run([*child("start"), told], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 5
    assert (tmp_path / "answer").read_text().strip().isdigit()


@TOGETHER
def test_stdout_and_stderr_are_shared_and_portexec_says_nothing_on_stdout(hand_off: str) -> None:
    server = ["sh", "-c", f"echo server; echo server >&2; exec {shlex.join(SERVER)}"]
    done = run("-v", "--json", "-H", hand_off, "--then", "echo tests; echo tests >&2", "--", *server)
    assert (done.returncode, lines_of(done.stdout)) == (0, ["server", "tests"])
    said = [line for line in done.stderr.splitlines() if not line.startswith(("portexec: ", "{"))]
    assert said == ["server", "tests"]
    assert re.search(r"(?m)^portexec: ready after \d+\.\d\ds$", done.stderr)


# The order of things.


@TOGETHER
def test_the_tests_start_when_the_server_is_ready_and_not_before(hand_off: str, tmp_path: Path) -> None:
    """Stdout is one pipe, so its lines are in the order in which they were written."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    then = f"echo tests; {ask('variable PORT')}"
    with running("-q", "-H", hand_off, "--then", then, "--", *SERVER, f"gate={gate}") as started:
        assert next_line(started) == "waiting"
        assert wait_for(lambda: len(children_of(started.process.pid)) == 1)  # the server's parent; the tests have none yet
        gate.write_text("")
        assert pid_in(next_line(started), "serving")
        assert next_line(started) == "tests"
        assert next_line(started).isdigit()
        assert started.process.wait(DEADLINE) == 0


@TOGETHER
def test_the_server_is_told_to_end_once_after_the_tests_and_waited_for(hand_off: str) -> None:
    then = ask("variable PORT")
    words = ["-q", "-k", "1h", "-H", hand_off, "--then", then, "--", *SERVER, "on=SIGTERM:stay", "on=SIGUSR1:end"]
    with running(*words) as started:
        server = pid_in(next_line(started), "serving")
        assert next_line(started).isdigit()
        assert next_line(started) == "SIGTERM"
        assert started.process.poll() is None
        os.kill(server, signal.SIGUSR1)  # had TERM come twice, it would be there before this one
        assert next_line(started) == "SIGUSR1"
        assert next_line(started) == ""
        assert started.process.wait(DEADLINE) == 0


@TOGETHER
def test_a_server_that_ignores_term_is_killed_after_the_tests(hand_off: str) -> None:
    with running("-q", "-k", "100ms", "-H", hand_off, "--then", "exit 7", "--", *SERVER, "on=SIGTERM:ignore") as started:
        server = pid_in(next_line(started), "serving")
        assert started.process.wait(DEADLINE) == 7
        assert is_gone(server)


def test_what_the_tests_leave_running_is_stopped() -> None:
    with running("-q", "--then", "setsid sleep 1000 & echo left $!; exit 3", "--", *SERVER) as started:
        assert pid_in(next_line(started), "serving")
        left = pid_in(next_line(started), "left")
        assert started.process.wait(DEADLINE) == 3
        assert is_gone(left)


def test_a_unix_socket_is_served_and_gone_after_the_tests(tmp_path: Path) -> None:
    path = tmp_path / "a socket"
    done = run_then(f"{ask('variable LISTEN_FDS')}; echo '{{url}}'", "-l", f"unix:{path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert lines_of(done.stdout) == ["1", f"unix:{path}"]
    assert list(tmp_path.iterdir()) == []


def test_an_abstract_socket_is_served() -> None:
    done = run_then(ask("variable LISTEN_FDS"), "-l", f"unix:@portexec-test-{os.urandom(8).hex()}")
    assert (done.returncode, lines_of(done.stdout), done.stderr) == (0, ["1"], "")


def test_several_listeners_and_both_kinds(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    then = f"{ask('variable PORT')}; {ask('variable API_PORT', '{api.url}')}; {ask('variable LISTEN_FDS', '{side.url}')}"
    done = run_then(then, "-H", "fd", "-l", "web=0", "-l", "api=0", "-l", f"side=unix:{path}")
    assert (done.returncode, done.stderr) == (0, "")
    web, api, count = lines_of(done.stdout)
    assert web != api
    assert count == "3"


# The server ends first.


@TOGETHER
@pytest.mark.parametrize(
    ("script", "how"),
    [("exit 3", "exit status 3"), ("exit 0", "exit status 0"), ("kill -KILL $$", "SIGKILL"), ("kill -SEGV $$", "SIGSEGV")],
)
def test_a_server_that_ends_before_it_is_ready(hand_off: str, script: str, how: str) -> None:
    done = run_then("echo tests", "-H", hand_off, server=["sh", "-c", script])
    assert (done.returncode, done.stdout) == (125, "")
    assert re.search(f"(?m){ENDED}{how}", done.stderr), done.stderr


@TOGETHER
@pytest.mark.parametrize(
    ("line", "how"), [("exit 3", "exit status 3"), ("exit 0", "exit status 0"), ("kill 9", "SIGKILL"), ("kill 15", "SIGTERM")]
)
def test_a_server_that_ends_during_the_tests(hand_off: str, line: str, how: str) -> None:
    then = f"trap 'echo stopped; exit 0' TERM; {ask(line)} 2>/dev/null; echo asked; read line; echo went on"
    with running("-q", "-H", hand_off, "--then", then, "--", *SERVER, stdin=subprocess.PIPE) as started:
        assert pid_in(next_line(started), "serving")
        assert next_line(started) in ("asked", "stopped")
        assert next_line(started) in ("stopped", "")
        assert started.process.wait(DEADLINE) == 125
        started.line(ENDED + how)


ENDED_BY_A_REQUEST = """
import os, socket, sys
made = socket.socket(fileno=int(sys.argv[1])) if sys.argv[1:] else socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    client = made.accept()[0]
    if client.recv(1):
        os._exit(3)
"""


@TOGETHER
def test_a_server_that_ends_of_the_last_request(hand_off: str) -> None:
    """The tests end when it does, of the connection that it has closed, and take no notice."""
    server = [sys.executable, "-S", "-c", ENDED_BY_A_REQUEST, *(["{fd}"] if hand_off == "fd" else [])]
    for _ in range(5):
        then = "exec 3<>/dev/tcp/127.0.0.1/$PORT; echo >&3; read -r line <&3; exit 0"
        done = run("-q", "-H", hand_off, "--then", shlex.join(["exec", "bash", "-c", then]), "--", *server)
        assert done.returncode == 125
        assert done.stderr == "portexec: error: the server ended before the tests did: exit status 3\n"


def test_tests_that_ignore_term_are_killed_when_the_server_has_ended() -> None:
    then = f"trap '' TERM; echo tests $$; {ask('exit 3')} 2>/dev/null; exec sleep 1000"
    with running("-q", "-k", "100ms", "--then", then, "--", *SERVER) as started:
        assert pid_in(next_line(started), "serving")
        tests = pid_in(next_line(started), "tests")
        started.line(ENDED + "exit status 3")
        assert started.process.wait(DEADLINE) == 125
        assert is_gone(tests)


def test_the_tests_are_stopped_before_all_that_the_server_leaves_is(tmp_path: Path) -> None:
    """What it leaves ignores TERM, and has an hour. The tests do not run on meanwhile against a server that has gone."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = ["sh", "-c", f"trap '' TERM; sleep 1000 & read line <{gate}; exit 3"]
    then = stay_after("trap 'echo told; exit 0' TERM; echo tests")
    with running("-q", "-k", "1h", "-H", "fd", "--ready", "none", "--then", then, "--", *server) as started:
        assert next_line(started) == "tests"
        gate.write_text("a line\n")
        assert next_line(started) == "told"
        started.process.terminate()  # at once
        _, said = started.process.communicate(timeout=DEADLINE)
        assert started.process.returncode == 125
        assert re.search(ENDED + "exit status 3$", said, re.MULTILINE)


def test_a_server_that_goes_into_the_background_has_ended() -> None:
    """What it leaves behind has no parent that could tell how it ends."""
    done = run_then(STAY, "-H", "guard", server=["sh", "-c", f"{shlex.join(SERVER)} & exit 0"])
    assert done.returncode == 125
    assert re.search(f"(?m){ENDED}exit status 0", done.stderr), done.stderr


# Told to stop.


@TOGETHER
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_stops_both_and_dies_of_it(hand_off: str, number: signal.Signals) -> None:
    then = stay_after("trap 'echo tests stopped; exit 3' TERM; echo tests $$")
    server = [*SERVER, "on=SIGTERM:end"]
    with running("-q", "-H", hand_off, "--then", then, "--", *server, stdin=subprocess.PIPE) as started:
        served = pid_in(next_line(started), "serving")
        tests = pid_in(next_line(started), "tests")
        started.process.send_signal(number)
        assert {next_line(started), next_line(started), next_line(started)} == {"tests stopped", "SIGTERM", ""}
        assert started.process.wait(DEADLINE) == -number
        assert is_gone(served)
        assert is_gone(tests)


def test_the_tests_end_the_run_although_the_main_process_has_ended() -> None:
    """Some servers name a process that ends before they do. The tests' status is that of the run."""
    with subprocess.Popen(["true"]) as gone:
        pass
    server = [*child("obedient"), rf"notify MAINPID={gone.pid}\nREADY=1"]
    assert run("-q", "-H", "fd", "--ready", "notify", "--then", "exit 3", "--", *server).returncode == 3


@TOGETHER
def test_told_to_stop_before_the_server_is_ready(hand_off: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with running("-q", "-H", hand_off, "--then", "echo tests", "--", *SERVER, f"gate={gate}") as started:
        assert next_line(started) == "waiting"
        started.process.terminate()
        assert started.process.wait(DEADLINE) == -signal.SIGTERM
        assert next_line(started) == ""


@BY_NUMBER
def test_a_server_that_becomes_ready_while_it_is_stopped_gets_no_tests(hand_off: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = [*SERVER, f"gate={gate}", "on=SIGTERM:stay", "on=SIGUSR1:end"]
    with running("-v", "-k", "1h", "-H", hand_off, "--then", "echo tests", "--", *server) as started:
        assert next_line(started) == "waiting"
        started.process.terminate()
        assert next_line(started) == "SIGTERM"
        gate.write_text("")
        served = pid_in(next_line(started), "serving")
        address = ("127.0.0.1", port_of(started.url()))
        with wait_for(lambda: socket.create_connection(address, DEADLINE)) as client:
            client.sendall(b"variable PORT\n")
            assert client.recv(100)
        os.kill(served, signal.SIGUSR1)
        out, _ = started.process.communicate(timeout=DEADLINE)
        assert (out, started.process.returncode) == ("SIGUSR1\n", -signal.SIGTERM)


@TOGETHER
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_twice_it_kills_at_once(hand_off: str, number: signal.Signals) -> None:
    server = [*SERVER, "on=SIGTERM:stay"]
    with running("-q", "-k", "1h", "-H", hand_off, "--then", f"trap '' TERM; echo tests $$; {STAY}", "--", *server) as started:
        pid = pid_in(next_line(started), "serving")
        tests = pid_in(next_line(started), "tests")
        started.process.send_signal(number)
        assert next_line(started) == "SIGTERM"
        assert not is_gone(tests)
        tell_again(started.process, number)
        assert started.process.wait(DEADLINE) == -number
        assert is_gone(pid)
        assert is_gone(tests)


def test_told_to_stop_while_the_server_drains_it_kills_at_once_and_keeps_the_tests_status() -> None:
    with running("-q", "-k", "1h", "--then", "exit 7", "--", *SERVER, "on=SIGTERM:stay") as started:
        server = pid_in(next_line(started), "serving")
        assert next_line(started) == "SIGTERM"
        started.process.terminate()
        assert started.process.wait(DEADLINE) == 7
        assert is_gone(server)


def test_a_signal_to_the_whole_group_stops_gently() -> None:
    """As from a shell's `kill %1`, a supervisor or a cancelled CI job: nothing is killed before its time."""
    then = stay_after("trap 'echo tests stopped; exit 3' TERM; echo tests")
    server = [*SERVER, "on=SIGTERM:stay", "on=SIGUSR1:end"]
    with running("-q", "-k", "1h", "--then", then, "--", *server, stdin=subprocess.PIPE) as started:
        served = pid_in(next_line(started), "serving")
        assert next_line(started) == "tests"
        os.killpg(started.process.pid, signal.SIGTERM)
        lines: set[str] = set()
        while lines != {"tests stopped", "SIGTERM"}:  # TERM may come twice: from the group, and from us
            lines.add(next_line(started))
        os.kill(served, signal.SIGUSR1)
        while (line := next_line(started)) == "SIGTERM":
            pass
        assert line == "SIGUSR1"
        assert started.process.wait(DEADLINE) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_server_that_dies_of_a_signal_to_portexec_is_no_failure_of_the_server(number: signal.Signals) -> None:
    """portexec ends as the server did, whose sender knows why."""
    with running("--then", f"echo tests; {STAY}", "--", *SERVER, stderr=subprocess.PIPE) as started:
        next_line(started)
        assert next_line(started) == "tests"
        started.process.send_signal(number)
        assert started.process.wait(DEADLINE) == -number
        assert started.process.stderr is not None
        assert "error" not in started.process.stderr.read()


def test_when_its_shim_was_killed_that_is_what_is_said() -> None:
    with running("-q", "--then", f"echo tests; {STAY}", "--", *SERVER, stderr=subprocess.PIPE) as started:
        served = pid_in(next_line(started), "serving")
        assert next_line(started) == "tests"
        os.kill(int(status_of(served)["PPid"]), signal.SIGKILL)
        assert started.process.wait(DEADLINE) == 125
        assert started.process.stderr is not None
        how = "the process that looked after it was killed"
        assert started.process.stderr.read() == f"portexec: error: the server ended before the tests did: {how}\n"


# On a terminal.


@TOGETHER
def test_ctrl_c_ends_both_and_dies_by_int(hand_off: str) -> None:
    server = [*SERVER, "on=SIGINT:end", "on=SIGTERM:ignore"]  # the tests' end is TERM to it, which may come first
    with terminal_with(*PORTEXEC, "-q", "-H", hand_off, "--then", f"echo tests $$; {STAY}", "--", *server) as terminal:
        pids = terminal.pids()
        terminal.press(CTRL_C)
        terminal.find("SIGINT")
        assert terminal.status() == -signal.SIGINT
        assert all(is_gone(pid) for pid in pids)


@TOGETHER
def test_ctrl_c_while_the_server_starts(hand_off: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with terminal_with(*PORTEXEC, "-q", "-H", hand_off, "--then", "echo tests", "--", *SERVER, f"gate={gate}") as terminal:
        terminal.find("waiting")
        terminal.press(CTRL_C)
        assert terminal.status() == -signal.SIGINT
        assert "tests" not in terminal.unread


@pytest.mark.parametrize("options", [(), ("--restart", "always")], ids=["", "restarted"])
def test_ctrl_backslash_ends_both_whoever_is_first(options: Sequence[str]) -> None:
    for _ in range(5):
        words = ["-q", *options, "-H", "fd", "--then", f"echo tests $$; {STAY}", "--", *SERVER]
        with terminal_with(*WITHOUT_CORE_FILES, *PORTEXEC, *words) as terminal:
            pids = terminal.pids()
            terminal.press(b"\x1c")
            assert terminal.status() == -signal.SIGQUIT
            assert all(is_gone(pid) for pid in pids)


def test_ctrl_backslash_is_a_question_to_some() -> None:
    trap = "trap 'echo threads; exit 131' QUIT"
    server = [*SERVER, "on=SIGQUIT:stay", "on=SIGTERM:end"]  # TERM, as the tests end, may come before it has said the other
    then = stay_after(f"{trap}; echo tests $$")
    with terminal_with(*PORTEXEC, "-q", "-H", "fd", "--then", then, "--", *server) as terminal:
        terminal.pids()
        terminal.press(b"\x1c")
        terminal.find("threads", "SIGQUIT")
        assert terminal.status() == 131


def test_tests_that_end_well_after_ctrl_c_end_by_it_all_the_same() -> None:
    then = stay_after("trap 'echo cleaned up; exit 0' INT; echo tests $$")
    with terminal_with(*PORTEXEC, "-q", "--then", then, "--", *SERVER) as terminal:
        terminal.pids()
        terminal.press(CTRL_C)
        terminal.find("cleaned up")
        assert terminal.status() == -signal.SIGINT


def test_ctrl_c_reaches_both_once_and_nothing_else_does_before_they_end() -> None:
    trap = "trap 'echo tests INT' INT; trap 'echo tests TERM' TERM; trap 'echo tests USR1; exit 0' USR1"
    then = stay_after(f"{trap}; echo tests $$")
    server = [*SERVER, "on=SIGINT:stay", "on=SIGTERM:stay", "on=SIGUSR1:end"]
    with terminal_with(*PORTEXEC, "-q", "-k", "1h", "--then", then, "--", *server) as terminal:
        served, tests = terminal.pids()
        terminal.press(CTRL_C)
        terminal.find("tests INT", "SIGINT")
        os.kill(served, signal.SIGUSR1)  # what came in between would be there before this
        terminal.find(r"\A(?s:(?!.*(INT|TERM)).*)SIGUSR1")
        os.kill(tests, signal.SIGUSR1)
        terminal.find(r"\A(?s:(?!.*(INT|TERM)).*)tests USR1")
        assert terminal.status() == -signal.SIGINT


def test_ctrl_c_is_all_that_a_server_is_told_when_it_ends_by_it() -> None:
    """Though the tests have ended before it."""
    server = [*SERVER, "on=SIGINT:stay", "on=SIGTERM:stay", "on=SIGUSR1:end"]
    with terminal_with(*PORTEXEC, "-q", "-k", "1h", "--then", f"echo tests $$; {STAY}", "--", *server) as terminal:
        _, tests = terminal.pids()
        shim = int(status_of(tests)["PPid"])
        terminal.press(CTRL_C)
        assert wait_for(lambda: is_gone(shim))  # by then portexec has decided what follows
        terminal.find("SIGINT")
        os.kill(terminal.pid, signal.SIGUSR1)  # is passed on after what was decided
        assert terminal.find(r"SIG\w+")[0][0] == "SIGUSR1"
        assert terminal.status() == -signal.SIGINT


SUMMARY = """\
import os, signal, sys
def interrupted(number, frame):
    os.write(1, b"interrupted\\n")
    open(sys.argv[1]).close()
    os.write(1, b"2 passed, 1 interrupted\\n")
    sys.exit(2)
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGINT, interrupted)
print("tests", flush=True)
os.read(reader, 1)
"""


def test_tests_with_a_summary_at_ctrl_c_get_to_finish_it(tmp_path: Path) -> None:
    """The server dies of the Ctrl-C at once; the tests are not stopped for that."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    then = shlex.join([sys.executable, "-c", SUMMARY, str(gate)])
    with terminal_with(*PORTEXEC, "-q", "-k", "1h", "--then", then, "--", *SERVER) as terminal:
        served = int(terminal.find(r"serving (\d+)\r", "tests")[0][1])
        terminal.press(CTRL_C)
        terminal.find("interrupted")
        assert wait_for(lambda: is_gone(served))
        gate.write_text("")
        terminal.find("2 passed, 1 interrupted")
        assert terminal.status() == -signal.SIGINT


@pytest.mark.parametrize("way", ["ignore", "stay"])
def test_a_second_ctrl_c_kills_at_once(way: str) -> None:
    server = [*SERVER, f"on=SIGTERM:{way}", f"on=SIGINT:{way}"]
    then = stay_after("trap 'echo tests INT' INT; trap '' TERM; echo tests $$")
    with terminal_with(*PORTEXEC, "-q", "-k", "1h", "--then", then, "--", *server) as terminal:
        pids = terminal.pids()
        terminal.press(CTRL_C)
        terminal.find("tests INT")
        assert not any(is_gone(pid) for pid in pids)
        assert wait_for(lambda: not is_pending(terminal.pid, signal.SIGINT))  # two that wait are one
        while not is_gone(terminal.pid):  # one that portexec hears too soon after the one before belongs to that
            now = time.monotonic()
            wait_for(lambda now=now: is_gone(terminal.pid) or time.monotonic() > now + 2 * ONE_REQUEST)  # type: ignore[misc]
            terminal.press(CTRL_C)
        assert terminal.status() == -signal.SIGINT
        assert all(is_gone(pid) for pid in pids)


def test_a_server_that_only_knows_term_gets_one_when_ctrl_c_has_ended_the_tests() -> None:
    """The tests' end is TERM to the server, also when Ctrl-C was what ended them; nobody has to wait for --kill-after."""
    server = [*SERVER, "on=SIGINT:ignore", "on=SIGTERM:end"]
    with terminal_with(*PORTEXEC, "-q", "-k", "1h", "--then", f"echo tests $$; {STAY}", "--", *server) as terminal:
        _, tests = terminal.pids()
        terminal.press(CTRL_C)
        assert wait_for(lambda: is_gone(tests))
        terminal.find("SIGTERM")
        assert terminal.status() == -signal.SIGINT


def test_the_tests_can_read_from_the_terminal() -> None:
    then = "test -t 0 && echo asking && read line && echo got $line"
    with terminal_with(*PORTEXEC, "-q", "--then", then, "--", *SERVER) as terminal:
        terminal.find("asking")
        terminal.press(b"an answer\n")
        terminal.find("got an answer")
        assert terminal.status() == 0


@TOGETHER
def test_ctrl_z_stops_all_and_fg_continues_all(hand_off: str) -> None:
    shell = program("bash")
    then = f"echo tests $$; read line; {ask('variable PORT')}; echo asked; exit 3"
    words = [*PORTEXEC, "-q", "-H", hand_off, "--then", then, "--", *SERVER]
    with terminal_with(shell, "--norc", "--noprofile", "-i") as terminal:
        terminal.press(shlex.join(words).encode() + b"\n")
        pids = terminal.pids()
        shims = [int(status_of(pid)["PPid"]) for pid in pids]
        everybody = [*pids, int(status_of(shims[0])["PPid"])]
        terminal.press(b"\x1a")
        terminal.find("Stopped")
        assert wait_for(lambda: [state(pid) for pid in everybody] == ["T"] * 3)
        terminal.press(b"fg\n")
        assert wait_for(lambda: all(state(pid) in "SR" for pid in [*everybody, *shims]))
        terminal.press(b"a line\n")
        terminal.find(r"asked\r")
        terminal.press(b"echo status=$?\n")
        terminal.find("status=3")


@pytest.mark.once
def test_a_shim_that_has_stopped_goes_on_with_its_command() -> None:
    """As one that stops with its command when that was continued already: nobody else continues the shim."""
    with terminal_with(*PORTEXEC, "-q", "--then", f"echo tests $$; {STAY}", "--", *SERVER) as terminal:
        shim = int(status_of(terminal.pids()[0])["PPid"])
        os.kill(shim, signal.SIGSTOP)
        assert wait_for(lambda: not is_pending(shim, signal.SIGSTOP) and state(shim) in "SR")
        terminal.press(CTRL_C)
        assert terminal.status() == -signal.SIGINT


def test_the_tests_may_be_an_interactive_shell() -> None:
    """It has the terminal, with job control and a Ctrl-C of its own, and gives it back."""
    shell = program("bash")
    then = f"PS1='ask: ' exec {shell} --norc --noprofile -i"
    with terminal_with(shell, "--norc", "--noprofile", "-i") as terminal:
        terminal.press(shlex.join([*PORTEXEC, "-q", "-e", "BASE={url}", "--then", then, "--", *SERVER]).encode() + b"\n")
        served = int(terminal.find(r"serving (\d+)\r", "ask: ")[0][1])
        terminal.press(b"sh -c 'echo running; exec cat'\n")
        terminal.find(r"\nrunning\r|\rrunning\r")
        terminal.press(CTRL_C)
        terminal.find("ask: ")
        terminal.press(shlex.join([*child("ask"), "$BASE", "variable BASE"]).replace("'$BASE'", "$BASE").encode() + b"\n")
        terminal.find(r"[\r\n]http://127.0.0.1:\d+\r")  # bash turns off its bracketed paste in front of it
        terminal.press(b"exit 4\n")
        terminal.press(b"echo status=$?\n")
        terminal.find("status=4")
        assert is_gone(served)


# Signals that whoever started portexec ignores.


def ignoring(*names: str) -> list[str]:
    """The words that start a command with these signals ignored, as nohup(1) does with HUP and sh with INT for `&`."""
    script = (
        "import os, signal, sys\nfor name in sys.argv[1].split(','): signal.signal(getattr(signal, name), signal.SIG_IGN)\n"
    )
    return [sys.executable, "-c", f"{script}os.execv(sys.argv[2], sys.argv[2:])", ",".join(names)]


@TOGETHER
def test_a_ctrl_c_that_the_caller_ignores_stops_nobody(hand_off: str, tmp_path: Path) -> None:
    """`portexec ... &` in a shell without job control, and then Ctrl-C for something else."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    then = f"echo tests $$; read line <{gate}; echo went on"
    words = [*ignoring("SIGINT", "SIGQUIT"), *PORTEXEC, "-q", "-H", hand_off, "--then", then, "--", *SERVER]
    with terminal_with(*words) as terminal:
        terminal.pids()
        terminal.press(CTRL_C)
        terminal.find(r"\^C")
        gate.write_text("a line\n")
        terminal.find("went on")
        assert terminal.status() == 0


@TOGETHER
def test_below_nohup_it_survives_its_terminal(hand_off: str, tmp_path: Path) -> None:
    gate, output = tmp_path / "gate", tmp_path / "output"
    os.mkfifo(gate)
    then = f"echo tests; read line <{gate}; echo went on"
    inner = shlex.join([*PORTEXEC, "-q", "-H", hand_off, "--then", then, "--", *SERVER])
    with terminal_with(*ignoring("SIGHUP"), "/bin/sh", "-c", f"exec {inner} >{output} 2>&1 </dev/null") as terminal:
        assert wait_for(lambda: "tests" in output.read_text())
        terminal.hang_up()
        gate.write_text("a line\n")
        assert terminal.status() == 0
        assert lines_of(output.read_text()) == ["tests", "went on"]


def test_a_hup_for_what_has_survived_its_terminal_is_from_somebody_else(tmp_path: Path) -> None:
    """The shell that left it running has gone. Who sends a HUP now means a replacement."""
    shell = program("bash")
    output = tmp_path / "output"
    words = shlex.join([*PORTEXEC, "-v", "-H", "fd", "--restart", "on-failure", "--ready", "none", "--", *SERVER])
    with terminal_with(shell, "--norc", "--noprofile", "-i") as terminal:
        terminal.press(f"{words} </dev/null >{output} 2>&1 & disown; echo dis''owned\n".encode())
        pid = int(terminal.find(r"\[1\] (\d+)", r"disowned\r")[0][1])  # else the shell would pass on its HUP
        try:
            assert wait_for(lambda: "ready after" in output.read_text())
            terminal.hang_up()
            terminal.status()
            os.kill(pid, signal.SIGHUP)
            assert wait_for(lambda: "the new start is ready" in output.read_text())
            os.kill(pid, signal.SIGTERM)
            assert wait_for(lambda: is_gone(pid))
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@TOGETHER
def test_an_int_that_the_caller_ignores_stops_nobody(hand_off: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    then = f"echo tests $$; read line <{gate}; echo went on"
    with running("-q", "-H", hand_off, "--then", then, "--", *SERVER, prefix=ignoring("SIGINT")) as started:
        assert pid_in(next_line(started), "serving")
        assert pid_in(next_line(started), "tests")
        started.process.send_signal(signal.SIGINT)
        gate.write_text("a line\n")
        assert next_line(started) == "went on"
        assert started.process.wait(DEADLINE) == 0


@TOGETHER
def test_a_closed_terminal_ends_both(hand_off: str) -> None:
    words = [*PORTEXEC, "-q", "-H", hand_off, "--then", f"echo tests $$; {STAY}", "--", *SERVER]
    with terminal_with(*words) as terminal:
        pids = terminal.pids()
        terminal.hang_up()
        assert terminal.status() == -signal.SIGHUP
        assert all(is_gone(pid) for pid in pids)
