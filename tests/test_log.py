"""`--log`: the file is the command's stdout and stderr, and its end is shown when the server fails."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import PORTEXEC, STRANGER, child, read_line, run, running, wait_for, within
from tests.support.proc import children_of, descriptors_of
from tests.support.terminals import terminal_with

HAND_OFFS = pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
SHOWN = "portexec: the last lines of "
SERVER = child("obeying")
NO_SERVER = ["sh", "-c", "exit 3"]


def refused(log: Path | str, reason: str, hint: str, directory: Path) -> None:
    """Hold that portexec fails with exactly this and leaves nothing behind."""
    before = sorted(os.listdir(directory))
    result = run("--log", str(log), "--port-file", str(directory / "port"), "--", "touch", str(directory / "started"))
    expected = f"portexec: error: cannot write log {log}: {reason}\n" + (f"portexec: hint: {hint}\n" if hint else "")
    assert (result.returncode, result.stdout, result.stderr) == (125, "", expected)
    assert sorted(os.listdir(directory)) == before


def shown(stderr: str) -> list[str]:
    """The lines below the title."""
    lines = stderr.splitlines()
    titles = [number for number, line in enumerate(lines) if line.startswith(SHOWN)]
    return lines[titles[-1] + 1 :] if titles else []


# The file.


@HAND_OFFS
def test_the_file_has_both_streams_in_their_order_and_we_write_nothing_there(hand_off: str, tmp_path: Path) -> None:
    log = tmp_path / "web.log"
    result = run("--log", str(log), "-H", hand_off, "--", "sh", "-c", "echo one; echo two >&2; echo three")
    assert (result.returncode, result.stdout) == (0, "")
    assert log.read_text() == "one\ntwo\nthree\n"
    assert result.stderr.startswith("portexec: http://")
    assert len(result.stderr.splitlines()) == 1


@HAND_OFFS
def test_the_descriptors_are_the_file_itself_as_a_shell_would_open_it(hand_off: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    look = "readlink /proc/self/fd/1 /proc/self/fd/2; grep flags: /proc/self/fdinfo/1 /proc/self/fdinfo/2; ls /proc/self/fd"
    words = ["sh", "-c", look]
    run("--log", str(log), "-H", hand_off, "--", *words)
    bare = tmp_path / "bare"
    with open(bare, "ab") as file:
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=True)
    ours, plain = log.read_text().splitlines(), bare.read_text().splitlines()
    assert ours[:2] == [str(log)] * 2
    assert ours[2:4] == plain[2:4]
    assert len(ours) - len(plain) == {"fd": 2, "guard": 0, "hold": 1}[hand_off]  # the listener and the guard


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert run("--log", str(tmp_path / "log"), "--", "true").returncode == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_what_is_there_stays_and_is_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    log.chmod(0o644)
    result = run("--log", str(log), "--", "sh", "-c", "echo now; exit 3")
    assert (result.returncode, shown(result.stderr)) == (3, ["now"])
    assert log.read_text() == "before\nnow\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o644


def test_tests_write_where_they_would(tmp_path: Path) -> None:
    words = ["--log", str(tmp_path / "log"), "--then", "echo tests"]
    result = run("-q", *words, "--", *SERVER)
    assert (result.returncode, result.stdout, result.stderr) == (0, "tests\n", "")
    assert (tmp_path / "log").read_text().startswith("serving ")


def test_every_start_appends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"echo start; [ $(grep -c start {log}) -ge 3 ]"
    result = run("--log", str(log), "--restart", "on-failure", "--ready", "none", "--", "sh", "-c", script)
    assert result.returncode == 0
    assert log.read_text() == "start\n" * 3
    assert shown(result.stderr) == []


def test_a_replacement_appends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running("--log", str(log), "--restart", "on-failure", "-H", "fd", "--", *SERVER) as run:
        wait_for(lambda: log.read_text().count("serving") == 1)
        run.process.send_signal(signal.SIGHUP)
        wait_for(lambda: log.read_text().count("serving") == 2)
    assert log.read_text().count("serving") == 2


def test_the_log_survives_kill_of_portexec(tmp_path: Path) -> None:
    log, script = tmp_path / "log", "trap 'echo cleaned; exit' TERM; echo up; while :; do sleep 0.1; done"
    with running("--log", str(log), "--", "sh", "-c", script) as run:
        wait_for(lambda: log.read_text() == "up\n")
        run.process.kill()
        wait_for(lambda: log.read_text() == "up\ncleaned\n")


def test_nobody_else_has_the_file_open(tmp_path: Path) -> None:
    """Who rotates a log looks for that; and the tests are not to write there."""
    log = tmp_path / "log"
    with running("-q", "--log", str(log), "--then", "echo up; exec sleep 1000", "--", *SERVER) as run:
        assert read_line(run.process) == "up"
        shims = children_of(run.process.pid)
        commands = [pid for shim in shims for pid in children_of(shim)]
        holders = {pid for pid in [run.process.pid, *shims, *commands] if str(log) in descriptors_of(pid).values()}
        tests = next(pid for pid in commands if "sleep" in Path(f"/proc/{pid}/cmdline").read_text())
        assert tests not in holders
        assert len(holders & set(commands)) == 1


@pytest.mark.parametrize("closed", [[0], [0, 1], [1, 2], [0, 1, 2]])
def test_with_closed_streams(closed: list[int], tmp_path: Path) -> None:
    redirections = " ".join(f"{number}>&-" for number in closed)
    words = [
        *PORTEXEC,
        "--log",
        "log",
        "--then",
        "true",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exec " + shlex.join(SERVER),
    ]
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(words)} {redirections}"], cwd=tmp_path, env=repository())
    assert done.returncode == 0
    assert (tmp_path / "log").read_text().startswith("out\nerr\nserving ")


def repository() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


# What is no regular file.


def test_a_device_is_written_to_and_not_shown() -> None:
    result = run("--log", "/dev/null", "--", "sh", "-c", "echo out; exit 3")
    assert (result.returncode, result.stdout) == (3, "")
    assert SHOWN not in result.stderr


def test_a_full_disk_is_the_commands_affair() -> None:
    words = ["import os, sys", "try: os.write(1, b'x')", "except OSError as error: sys.exit(error.errno)"]
    result = run("-q", "--log", "/dev/full", "--", sys.executable, "-c", "\n".join(words))
    assert (result.returncode, result.stderr) == (28, "")


def test_a_fifo_with_a_reader(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    result = run("-q", "--log", str(fifo), "--", "sh", "-c", "echo out; grep flags: /proc/self/fdinfo/1")
    assert result.returncode == 0
    text = os.read(reader, 1000).decode()
    os.close(reader)
    assert text.startswith("out\n")
    assert not int(text.split()[-1], 8) & os.O_NONBLOCK


def test_a_fifo_that_nobody_reads_is_an_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "No such device or address", "a FIFO needs a reader before portexec starts", tmp_path)


def test_a_terminal() -> None:
    look = "test -t 1 && test -t 2 && echo it is one"
    with terminal_with(*PORTEXEC, "-q", "--log", "/dev/tty", "--", "sh", "-c", look) as terminal:
        terminal.find("it is one\r\n")


def test_our_own_stderr_is_not_shown_twice(tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "ab") as file:
        words = [*PORTEXEC, "--log", "/dev/stderr", "--", "sh", "-c", "echo out; exit 3"]
        assert subprocess.run(words, stdin=subprocess.DEVNULL, stderr=file, env=repository()).returncode == 3
    text = (tmp_path / "stderr").read_text()
    assert (text.count("out\n"), SHOWN in text) == (1, False)


# What cannot be opened.


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "log", "No such file or directory", "the directory has to exist", tmp_path)


def test_a_directory(tmp_path: Path) -> None:
    refused(tmp_path, "Is a directory", f"name a file in it: {tmp_path}/NAME", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    directory = tmp_path / "read-only"
    directory.mkdir(mode=0o555)
    refused(directory / "log", "Permission denied", "choose a directory that you may write to", tmp_path)


def test_a_file_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "log", "Not a directory", "", tmp_path)


def test_an_empty_name() -> None:
    result = run("--log", "", "--", "echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr == "portexec: error: --log names no file\nportexec: hint: its value is empty; is a variable unset?\n"


@pytest.mark.parametrize("mistake", [["--port-file", "none/port"], ["-H", "hold", "--remap", "8000"], ["-l", "nosuch:host:0"]])
def test_another_mistake_leaves_no_log(mistake: Sequence[str], tmp_path: Path) -> None:
    result = run("--log", "log", *mistake, "--", "touch", "started", cwd=tmp_path, env=repository())
    assert result.returncode == 125
    assert os.listdir(tmp_path) == []


def test_another_mistake_leaves_a_log_of_before(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    result = run("--log", "log", "--port-file", "none/port", "--", "true", cwd=tmp_path, env=repository())
    assert result.returncode == 125
    assert os.listdir(tmp_path) == ["log"]


def test_a_dry_run_makes_no_log(tmp_path: Path) -> None:
    assert run("-n", "--log", str(tmp_path / "log"), "--", "true").returncode == 0
    assert os.listdir(tmp_path) == []


# Places where a stranger can have put something.


@pytest.fixture
def open_to_all(tmp_path: Path) -> Path:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o777)  # without the sticky bit, so that no setting of the kernel's protects us
    return path


PLANTED = "remove it, or choose a directory that only you may write to"


def test_a_link_is_not_followed_where_anybody_can_have_planted_it(open_to_all: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious\n")
    (open_to_all / "log").symlink_to(tmp_path / "mine")
    hint = "a symbolic link is not followed; name the file itself"
    refused(open_to_all / "log", "it is a symbolic link", hint, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious\n"


def test_a_second_name_of_another_file_is_no_log_there(open_to_all: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious\n")
    os.link(tmp_path / "mine", open_to_all / "log")
    refused(open_to_all / "log", "somebody else may have put it there", PLANTED, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious\n"


@pytest.mark.root
def test_another_users_file_is_no_log_there(open_to_all: Path, tmp_path: Path) -> None:
    (open_to_all / "log").touch()
    os.chown(open_to_all / "log", STRANGER, STRANGER)
    refused(open_to_all / "log", "somebody else may have put it there", PLANTED, tmp_path)


@pytest.mark.root
def test_another_users_directory_is_such_a_place(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "log").symlink_to("/etc/passwd")
    os.chown(directory, STRANGER, STRANGER)
    result = run("--log", str(directory / "log"), "--", "true")
    assert result.returncode == 125
    assert "it is a symbolic link" in result.stderr


def test_our_own_file_there_is_appended_to(open_to_all: Path) -> None:
    log = open_to_all / "log"
    for _ in range(2):
        assert run("--log", str(log), "--", "echo", "line").returncode == 0
    assert log.read_text() == "line\nline\n"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_of_ours_is_followed_elsewhere(is_there: bool, tmp_path: Path) -> None:
    if is_there:
        (tmp_path / "today").write_text("before\n")
    (tmp_path / "log").symlink_to("today")
    assert run("--log", str(tmp_path / "log"), "--", "echo", "line").returncode == 0
    assert (tmp_path / "today").read_text().endswith("line\n")


# What is shown.

LINES = [*SERVER[:1], "-c", "for number in range(100): print('line', number)\nraise SystemExit(3)"]


@pytest.mark.parametrize("way", [["--then", "true"], ["--ready", "listen"], ["--restart", "no"], ["-H", "fd"]])
def test_the_end_of_the_log_is_shown_when_the_command_fails(way: Sequence[str], tmp_path: Path) -> None:
    result = run("--log", str(tmp_path / "log"), *way, "--", *LINES)
    assert result.returncode == (125 if "--then" in way else 3)
    assert shown(result.stderr) == [f"line {number}" for number in range(60, 100)]
    assert f"{SHOWN}{tmp_path}/log:\n" in result.stderr


def test_it_comes_after_the_error_and_its_hint(tmp_path: Path) -> None:
    def attempt(seconds: int) -> None:
        words = ["--log", str(tmp_path / f"{seconds}"), "--ready", "listen", "--ready-timeout", f"{seconds}s", "-H", "hold"]
        result = run(*words, "--", "sh", "-c", "echo waiting for the database; exec sleep 1000")
        assert result.returncode == 124
        error, hint, *rest = result.stderr.splitlines()[1:]
        assert error.startswith(f"portexec: error: the command was not ready after {seconds} s")
        assert hint.startswith("portexec: hint: ")
        assert rest == [f"{SHOWN}{tmp_path}/{seconds}:", "waiting for the database"]

    within(1, attempt)


def test_after_five_ends_it_is_shown_once(tmp_path: Path) -> None:
    words = ["--log", str(tmp_path / "log"), "--restart", "on-failure", "--ready", "listen", "-H", "hold"]
    result = run(*words, "--", "sh", "-c", "echo no; exit 3")
    assert (result.returncode, result.stderr.count(SHOWN), shown(result.stderr)) == (3, 1, ["no"] * 5)


def test_a_server_that_ends_before_the_tests_do(tmp_path: Path) -> None:
    ask = shlex.join([*child("ask"), "{url}", "exit 4"])
    words = ["--log", str(tmp_path / "log"), "--then", f"{ask}; exec sleep 1000"]
    result = run(*words, "--", *SERVER)
    assert result.returncode == 125
    assert shown(result.stderr)[0].startswith("serving ")


@pytest.mark.parametrize("way", ["the tests fail", "a clean end", "told to end"])
def test_it_is_not_shown_when_the_server_did_well(way: str, tmp_path: Path) -> None:
    words = ["--log", str(tmp_path / "log")]
    if way == "told to end":
        with running(*words, "--ready", "none", "--", "sh", "-c", "echo up; exec sleep 1000") as started:
            wait_for(lambda: (tmp_path / "log").read_text() == "up\n")
            started.process.terminate()
            _, stderr = started.process.communicate()
    elif way == "a clean end":
        stderr = run(*words, "--", "echo", "x").stderr
    else:
        stderr = run(*words, "--then", "exit 3", "--", *SERVER).stderr
    assert SHOWN not in stderr


def test_quiet_shows_it_below_an_error_only(tmp_path: Path) -> None:
    words = ["-q", "--log", str(tmp_path / "log")]
    script = ["sh", "-c", "echo no; exit 3"]
    assert run(*words, "--", *script).stderr == ""
    assert shown(run(*words, "--then", "true", "--", *script).stderr) == ["no"]


WRITTEN = {
    "colours": (b"\x1b[1;31mred\x1b[0m end\n", ["red end"]),
    "a progress bar": (b"10 %\r50 %\rdone\r\n", ["done"]),
    "control characters": (b"a\tb\x1b]0;title\x07\xff\n", ["a\tb\\x1b]0;title\\x07\\xff"]),
    "no line end": (b"one\ntwo", ["one", "two"]),
    "empty lines": (b"one\n\ntwo\n\n\n", ["one", "", "two"]),
    "a long line": (b"x" * 100_000 + b"\n", ["x" * 1000]),
    "nothing": (b"", []),
    "empty lines alone": (b"\n\n", []),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_fit_for_a_terminal(name: str, tmp_path: Path) -> None:
    data, lines = WRITTEN[name]
    (tmp_path / "data").write_bytes(data)
    result = run("--log", str(tmp_path / "log"), "--", "sh", "-c", f"cat {tmp_path}/data; exit 3")
    assert shown(result.stderr) == lines
    assert (tmp_path / "log").read_bytes() == data


def test_a_log_that_was_emptied_meanwhile(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a long line from before\n")
    result = run("--log", str(log), "--", "sh", "-c", f"echo lost; : >{log}; echo new; exit 3")
    assert shown(result.stderr) == ["new"]


def test_a_unix_socket_is_no_log(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    refused(tmp_path / "s", "No such device or address", "name a file, or a place where there is nothing yet", tmp_path)
