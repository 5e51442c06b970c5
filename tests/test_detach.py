"""`--detach` and `--reuse`: a server in the background, and whose it is until it is ready."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from portexec.names.registry import STOPPING
from tests.support import DEADLINE, PORTEXEC, descriptors_of, get, is_gone, run, wait_for
from tests.support.installed import need
from tests.support.names import LIGHT, ON_FD, Result, detach, entry_of, has_ended, listed, started
from tests.support.proc import is_caught, members
from tests.support.processes import without_waiting
from tests.support.terminals import CTRL_C, on_a_terminal

pytestmark = pytest.mark.usefixtures("registry")

SILENT = [*LIGHT, "silent"]


def starting(*words: str, command: list[str] = SILENT, **options: Any) -> subprocess.Popen[str]:
    """A `--detach` that waits for a server which never serves."""
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    started_words = [*PORTEXEC, "--detach", "--name", "web", "-k", "1m", *words, "--", *command]
    process: subprocess.Popen[str] = subprocess.Popen(started_words, text=True, **options)
    wait_for(lambda: "waiting" in log_of("web"))
    wait_for(lambda: is_caught(process.pid, signal.SIGTERM))  # else the signal would end it, without a wait
    return process


def said_by(process: subprocess.Popen[str]) -> tuple[str, str]:
    """All that it writes up to its end."""
    output, errors = process.communicate(timeout=DEADLINE)
    return output, without_waiting(errors)


def log_of(name: str) -> str:
    return Path(entry_of(name).log).read_text()


def last_pid() -> int:
    """The server that has said so in the log."""
    return int(log_of("web").split()[-1])


# Ready


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["-H", "fd"], ON_FD),
        (["-H", "guard"], LIGHT),
        (["-H", "hold"], LIGHT),
        (["--restart", "always"], LIGHT),
        (["--lazy"], ON_FD),
        (["-l", "unix:sock"], ON_FD),
        (["--ready", "http"], LIGHT),
        (["--ready", "none"], LIGHT),
    ],
    ids=lambda words: " ".join(words[:2]) if words[0].startswith("-") else "",
)
def test_ready(words: list[str], command: list[str]) -> None:
    """One line on stdout, nothing on stderr, and it goes on."""
    result = detach("web", *words, command=command)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    url = result.stdout.strip()
    assert url == run("--url", "web").stdout.strip()
    if url.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(url.removeprefix("unix:") if os.path.isabs(url[5:]) else "sock")
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"hello from" in client.recv(1000)
    else:
        assert "hello from" in wait_for(lambda: get(url))
    assert run("--stop", "web").returncode == 0


def test_several_listeners() -> None:
    result = detach("web", "-l", "site=0", "-l", "admin=0", "-H", "fd")
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert list(lines) == ["site", "admin"]
    assert all(get(url).startswith("hello") for url in lines.values())


def test_as_json() -> None:
    """What is printed is the entry of the run, as it is in the list."""
    for words in ([], ["--reuse"]):
        result = detach("web", "--json", *words, "-l", "a=0", "-l", "b=0", "-H", "fd")
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout) == listed()["web"]
        assert result.stdout.count("\n") == 1


def test_it_has_a_session_of_its_own_and_nothing_of_the_callers(tmp_path: Path) -> None:
    """A pipe to the caller would keep `URL=$(...)` and bats waiting."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        started("web", pass_fds=[writer])
    finally:
        os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)
    entry = entry_of("web")
    assert os.getsid(entry.pid) == entry.pid == os.getsid(entry.command_pid)
    for pid in (entry.pid, entry.command_pid):
        links = descriptors_of(pid)
        assert links[0].startswith("pipe:")
        assert links[1] == links[2] == entry.log
    assert os.stat(entry.log).st_mode & 0o7777 == 0o600
    assert len(set(members(entry.pid))) == 3


def test_its_standard_input_is_open_and_silent() -> None:
    code = "import sys, socket, os; s = socket.create_server(('127.0.0.1', int(os.environ['PORT']))); sys.stdin.read()"
    started("web", command=[sys.executable, "-c", code])
    wchan = Path(f"/proc/{entry_of('web').command_pid}/syscall")
    wait_for(lambda: wchan.read_text().split()[:2] == ["0", "0x0"])  # it is in read(0, ...)
    assert not has_ended("web")


def test_sockets_of_an_activator_are_handed_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='given', LISTEN_PID=str(os.getpid()));"
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        prefix = [sys.executable, "-c", code, str(given.fileno())]
        server = [*LIGHT, "fd=3", "fd=4"]
        started("web", "-H", "fd", command=server, prefix=prefix, pass_fds=[given.fileno()])
        url = f"http://127.0.0.1:{given.getsockname()[1]}"
    assert get(url).startswith("hello from ")
    assert get(f"{url}/variable/LISTEN_FDNAMES").strip() == "given:listener1"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_with_streams_closed(closed: str) -> None:
    result = detach("web", prefix=["sh", "-c", f'exec "$@" {closed}', "sh"])
    assert result.returncode == 0
    assert result.stdout == ("" if "1>&-" in closed else f"{run('--url', 'web').stdout}")
    assert get(run("--url", "web").stdout.strip()).startswith("hello from ")
    assert descriptors_of(entry_of("web").command_pid)[1] == entry_of("web").log


def test_from_cron() -> None:
    """No HOME, no TERM, no terminal, nearly no PATH."""
    environment = {name: os.environ[name] for name in ("PORTEXEC_DIR", "PYTHONPATH")} | {"PATH": "/usr/bin:/bin"}
    words = [*PORTEXEC, "--detach", "--name", "web", "--", *LIGHT]
    result = subprocess.run(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=DEADLINE,
    )
    assert (result.returncode, without_waiting(result.stderr)) == (0, "")
    assert get(result.stdout.strip()).startswith("hello from ")


def test_inside_of_make() -> None:
    """make waits for whoever has its jobserver or its output open; below the server there is no jobserver any more."""
    need(["make"])
    words = " ".join([*PORTEXEC, "--detach", "--name", "web", "--", *LIGHT])
    Path("Makefile").write_text(f"all: one two\none:\n\t+{words}\ntwo:\n\t@echo two\n")
    result = subprocess.run(["make", "-sj4"], capture_output=True, text=True, timeout=DEADLINE)
    assert (result.returncode, without_waiting(result.stderr)) == (0, "")
    url = next(line for line in result.stdout.splitlines() if line.startswith("http"))
    assert "jobserver" not in get(f"{url}/variable/MAKEFLAGS")


def in_a_container(*words: str) -> Result:
    """Run this as the first process of a PID namespace."""
    need(["unshare"])
    rights = [] if os.geteuid() == 0 else ["-r"]
    if subprocess.run(["unshare", *rights, "-pf", "--mount-proc", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces")
    whole = ["unshare", *rights, "-pf", "--mount-proc", *words]
    return subprocess.run(whole, capture_output=True, text=True, timeout=DEADLINE)


def test_below_the_first_process_of_a_container() -> None:
    script = f"{' '.join([*PORTEXEC])} --detach --name web -- {' '.join(LIGHT)} && {' '.join(PORTEXEC)} --stop web && echo done"
    result = in_a_container("sh", "-c", script)
    assert without_waiting(result.stderr) == "portexec: web has ended\n"
    assert result.stdout.splitlines()[1:] == ["done"]


@pytest.mark.once
def test_as_the_first_process_of_a_container() -> None:
    """Nothing would be left of what it started, when it has said where that is."""
    result = in_a_container(*PORTEXEC, "--detach", "--name", "web", "--", *LIGHT)
    error, hint = result.stderr.splitlines()
    assert error.startswith("portexec: error: cannot go to the background as the first process of a container")
    assert hint.startswith("portexec: hint: leave out --detach")
    assert (result.returncode, result.stdout) == (125, "")
    assert listed() == {}


def test_with_a_log_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    started("web", "--log", str(tmp_path / "log"))
    assert re.fullmatch(r"before\nserving \d+\n", (tmp_path / "log").read_text())
    assert run("--logs", "web").stdout == (tmp_path / "log").read_text()


# Not ready


@pytest.mark.parametrize(
    ("command", "status"), [("echo why; exit 3", 3), ("echo why; exit 0", 125), ("echo why; kill -9 $$", -9)]
)
def test_a_command_that_ends(command: str, status: int) -> None:
    result = detach("web", command=["sh", "-c", command])
    assert (result.returncode, result.stdout) == (status, "")
    how = {3: "exit status 3", 125: "exit status 0", -9: "killed by SIGKILL"}[status]
    lines = result.stderr.splitlines()
    assert lines[0] == f"portexec: error: the command ended before it was ready: {how}"
    assert lines[1] == f"portexec: the last lines of {entry_of('web').log}:"
    assert "why" in lines
    assert result.stderr.count("before it was ready") == 1
    assert listed()["web"]["state"] == "ended"


@pytest.mark.parametrize(
    ("words", "command", "status", "message"),
    [
        ([], ["no-such-command"], 127, "command not found: no-such-command"),
        ([], ["/etc/passwd"], 126, "cannot run /etc/passwd: Permission denied"),
        (["--ready-timeout", "50ms"], SILENT, 124, "the command was not ready after 0.05 s: it did not listen on 127.0.0.1:"),
        (["-l", "x:y"], ["true"], 125, "malformed port 'y' in listen spec 'x:y'"),
        (["--port-file", "no/such"], ["true"], 125, "cannot write port file no/such: No such file or directory"),
    ],
    ids=["127", "126", "124", "usage", "publish"],
)
def test_a_run_that_fails(words: list[str], command: list[str], status: int, message: str) -> None:
    result = detach("web", *words, command=command)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.splitlines()[0].startswith(f"portexec: error: {message}")
    started("web")


def test_a_log_that_cannot_be_opened() -> None:
    os.mkfifo("fifo")
    for log, why in (("no/such", "No such file or directory"), ("fifo", "No such device or address")):
        result = detach("web", "--log", log)
        assert result.stderr.splitlines()[0] == f"portexec: error: cannot write log {log}: {why}"
        assert (result.returncode, entry_of("web").state, entry_of("web").wait_status) == (125, "ended", 125 << 8)


def test_a_number_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = detach("web", "-l", str(other.getsockname()[1]))
    assert result.returncode == 125
    assert f"Address already in use (pid {os.getpid()}, " in result.stderr


@pytest.mark.once
def test_what_the_background_has_to_say_is_said_while_it_is_waited_for() -> None:
    """Each line once, and nothing of what the command wrote; that is shown at the end."""
    result = detach("web", "--restart", "on-failure", command=["sh", "-c", "echo why; exit 3"])
    assert result.returncode == 3
    lines = result.stderr.splitlines()
    said = [line for line in lines if "; restart in " in line]
    assert said[0] == "portexec: note: the command ended (exit status 3); restart in 0.1 s"
    assert len(set(said)) == len(said) > 1
    failed = lines.index("portexec: error: the command ended before it was ready: exit status 3")
    assert lines.index(said[0]) < failed < lines.index("why")


# The caller


def test_its_end_ends_the_run_that_waits_for_an_env_file(tmp_path: Path) -> None:
    """A FIFO, of which the run in the background has opened its end, and reads."""
    os.mkfifo(tmp_path / "fifo")
    words = [*PORTEXEC, "--detach", "--name", "web", "--env-file", str(tmp_path / "fifo"), "--", *LIGHT]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process, (tmp_path / "fifo").open("wb"):
        process.terminate()
        assert said_by(process) == ("", "")
    assert process.returncode == -signal.SIGTERM
    wait_for(lambda: has_ended("web"))
    assert listed()["web"]["stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_the_caller_is_told_to_end(number: signal.Signals) -> None:
    """Nothing is left, and the caller has waited for that, unless it was killed."""
    with starting() as process:
        server = last_pid()
        process.send_signal(number)
        assert process.wait(DEADLINE) == -number
        if number == signal.SIGKILL:
            wait_for(lambda: has_ended("web"))
        assert is_gone(server)
        assert has_ended("web")
        assert said_by(process) == ("", "")
        assert re.search(r"^web +stopped before it was ready, \d+ s ago ", run("--list").stdout, re.MULTILINE)
        assert listed()["web"]["signal"] == signal.SIGTERM, "of the command, which portexec has told to end"


TOLD_AFTER = """
import os, signal, sys
from portexec import cli
from portexec.names import detach
owner, name = {"printed": (detach, "print_out"), "let go": (detach.Waiting, "_tell_person")}[sys.argv[1]]
call = getattr(owner, name)

def call_and_be_told(*arguments):
    call(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)

setattr(owner, name, call_and_be_told)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("moment", "status"), [("printed", -signal.SIGTERM), ("let go", 0)])
def test_the_caller_is_told_to_end_when_it_is_ready(moment: str, status: int) -> None:
    """Its status says whether there is a server."""
    words = [sys.executable, "-c", TOLD_AFTER, moment, "--detach", "--name", "web", "--", *LIGHT]
    result = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
    assert (result.returncode, without_waiting(result.stderr), result.stdout.count("\n")) == (status, "", 1)
    assert has_ended("web") == (status != 0)


def test_ctrl_c() -> None:
    words = [*PORTEXEC, "--detach", "--name", "web", "--", *SILENT]
    with on_a_terminal(*words) as (pid, terminal):
        wait_for(lambda: "waiting" in log_of("web"))
        wait_for(lambda: is_caught(pid, signal.SIGTERM))
        server = last_pid()
        os.write(terminal, CTRL_C)
        assert os.waitpid(pid, 0)[1] == signal.SIGINT
        assert is_gone(server)


def test_the_background_is_killed() -> None:
    with starting() as process:
        server = last_pid()
        os.kill(entry_of("web").pid, signal.SIGKILL)
        _, errors = said_by(process)
        assert process.returncode == 125
        assert errors.splitlines()[0] == "portexec: error: web could not start: it was killed"
        assert is_gone(server)


def test_stopped_by_name_while_it_is_waited_for() -> None:
    with starting() as process:
        run("--stop", "web")
        _, errors = said_by(process)
        assert process.returncode == -signal.SIGTERM
        assert errors.splitlines()[0] == "portexec: error: web was stopped before it was ready"


def test_the_hang_up_of_a_terminal_stops_nothing() -> None:
    """As when an ssh session ends."""
    words = " ".join([*PORTEXEC, "--detach", "--name", "web", "--", *LIGHT])
    shell = shutil.which("bash") or "/bin/sh"
    with on_a_terminal(shell, "-c", f"{words}; echo done; cat") as (_, terminal):
        seen = b""
        while b"done" not in seen:
            seen += os.read(terminal, 1000)
    assert get(run("--url", "web").stdout.strip()).startswith("hello from ")


# At once


def test_many_of_one_name_at_once() -> None:
    """One wins; the others say so, and none of them has started anything."""
    processes = [
        subprocess.Popen(
            [*PORTEXEC, "--detach", "--name", "web", "--", *LIGHT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=DEADLINE) for process in processes]
    statuses = Counter(process.returncode for process in processes)
    assert statuses == {0: 1, 125: 5}
    assert sum(errors.startswith("portexec: error: web runs already, since ") for _, errors in outputs) == 5
    assert log_of("web").count("serving") == 1


def test_many_that_reuse_it_at_once() -> None:
    """All have the one address, whoever started it."""
    words = [*PORTEXEC, "--detach", "--reuse", "--name", "web", "--", *LIGHT]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    outputs = {process.communicate(timeout=DEADLINE)[0] for process in processes}
    assert {process.returncode for process in processes} == {0}
    assert outputs == {run("--url", "web").stdout}
    assert log_of("web").count("serving") == 1


# Reuse


def test_reuse(tmp_path: Path) -> None:
    url = started("web", "--reuse")
    assert started("web", "--reuse") == url
    other = detach("web", "--reuse", command=[*LIGHT, "x"])
    assert other.returncode == 125
    assert other.stderr.startswith("portexec: error: web runs already, and is not the same: `")
    Path("below").mkdir()
    Path(".git").mkdir()
    elsewhere = detach("web", "--reuse", cwd="below")
    assert elsewhere.returncode == 125
    assert f"in {Path.cwd()}" in elsewhere.stderr
    assert get(url).startswith("hello from ")


def test_reuse_waits_until_it_is_ready() -> None:
    words = ["--reuse", "--ready-timeout", "100ms"]
    with starting() as process:
        result = detach("web", *words, command=SILENT)
        assert (result.returncode, result.stderr.splitlines()[0]) == (
            124,
            "portexec: error: web is not ready after 0.1 s",
        )
        process.terminate()


@pytest.mark.parametrize("words", [["--detach"], ["--detach", "--reuse"]], ids=" ".join)
def test_one_that_is_stopping_is_waited_for(words: list[str]) -> None:
    """It serves no more, so it is not taken. The next one starts when nothing of it is left."""
    started("web", "-k", "1m", command=[*LIGHT, "ignore"])
    old = entry_of("web")
    os.kill(old.pid, signal.SIGTERM)
    wait_for(lambda: entry_of("web").state == STOPPING)
    asked = run("--url", "-q", "--ready-timeout", "10ms", "web")
    assert (asked.returncode, asked.stdout) == (124, "")
    words = [*PORTEXEC, *words, "--name", "web", "-k", "1m", "--", *LIGHT, "ignore"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "portexec: note: web is stopping; waiting for its end\n"
        os.kill(old.command_pid, signal.SIGKILL)
        url, errors = said_by(process)
        assert (process.returncode, errors) == (0, "")
    assert get(url.strip()) == f"hello from {entry_of('web').command_pid}"
    assert not entry_of("web").is_same_run(old)
