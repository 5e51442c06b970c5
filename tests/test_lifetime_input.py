"""Lifetime options that cannot be meant, or cannot be had: the message, the hint, the status, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, ROOT, child, run, running
from tests.support.processes import refusing

Result = subprocess.CompletedProcess[str]

DURATION_HINT = "write a number and a unit: 500ms, 5s, 2m"
FORMS_HINT = "one of listen, accept, http, http:PATH, https, https:PATH, notify, none"
RESTART_HINT = "one of no, on-failure, always"
FD_HINT = "name the descriptor in the command as {fd}, or say -H fd if it reads LISTEN_FDS"
OPEN_FILES = os.sysconf("SC_OPEN_MAX")


def lifetime(directory: Path, *words: str, command: Sequence[str] = (), **options: Any) -> Result:
    """Run portexec with these words, files of ours in the directory, and a command that would leave another one there."""
    files = ["--port-file", str(directory / "port"), "--export", str(directory / "export")]
    return run(*files, *words, "--", *(command or ["touch", str(directory / "started")]), **options)


def assert_nothing_happened(result: Result, directory: Path, *, before: Sequence[str] = ()) -> None:
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(os.listdir(directory)) == sorted(before)


def said(message: str, hint: str) -> str:
    return f"portexec: error: {message}\nportexec: hint: {hint}\n"


# words, message, hint
REFUSED = [
    (["--ready", "up"], "--ready 'up' is no known form", FORMS_HINT),
    (["--ready", ""], "--ready '' is no known form", FORMS_HINT),
    (
        ["--log", "-"],
        "--log takes a file, and - is none",
        "leave it out: the command writes to portexec's own stdout and stderr; ./- is a file of that name",
    ),
    (["--ready", "HTTP"], "--ready 'HTTP' is no known form", FORMS_HINT),
    (["--ready", " http"], "--ready ' http' is no known form", FORMS_HINT),
    (["--ready", "listen:0"], "--ready 'listen:0' is no known form", FORMS_HINT),
    (["--ready", "accept:"], "--ready 'accept:' is no known form", FORMS_HINT),
    (["--ready", "/health"], "--ready '/health' is no known form", "write http:/health"),
    (["--ready", "http:"], "--ready 'http:' has no path", "write http alone, or http:/"),
    (["--then", "a", "--then", "b"], "option --then is given twice", "write both in one: --then 'npm run lint && npm test'"),
    (["--then", "curl", "-s", "{url}"], "unknown option -s", "if -s belongs to --then, quote it: --then 'curl -s ...'"),
    (["--then", "curl -s", "-s"], "unknown option -s", "portexec --help lists the options"),
    (["--ready", "none:"], "--ready 'none:' is no known form", FORMS_HINT),
    (["--ready", "ftp:/"], "--ready 'ftp:/' is no known form", FORMS_HINT),
    (
        ["--ready", "http://127.0.0.1:80/health?a=b//"],
        "--ready 'http://127.0.0.1:80/health?a=b//' is a URL, and takes a path alone",
        "write http:/health?a=b//",
    ),
    (["--ready", "https://localhost"], "--ready 'https://localhost' is a URL, and takes a path alone", "write https:/"),
    *(
        (["--ready", given], f"--ready {given!r} {why}", f"write {right}")
        for given, why, right in (
            ("http:http://x/", "is a URL, and takes a path alone", "http:/"),
            ("https:http://[::1]:80/a?b=c//", "is a URL, and takes a path alone", "https:/a?b=c//"),
            ("http:localhost:3000/health", "has an address, and takes a path alone", "http:/health"),
            ("http::8000", "has an address, and takes a path alone", "http:/"),
            ("https:127.0.0.1/", "has an address, and takes a path alone", "https:/"),
            ("http:health", "has a path that does not begin with a slash", "http:/health"),
            ("https:?a=b", "has a path that does not begin with a slash", "https:/?a=b"),
        )
    ),
    (["--ready", "notify:"], "--ready 'notify:' names no socket", "write an absolute path, or @ and an abstract name"),
    (
        ["--ready", "notify:run/s"],
        "--ready 'notify:run/s' names no socket",
        "write an absolute path, or @ and an abstract name",
    ),
    *(
        (["--ready-timeout", text], f"--ready-timeout {text!r} is no duration", DURATION_HINT)
        for text in ("soon", "", " ", "-1", "-1s", "5 s", "s", ".", ".s", "1d", "5S", "1e3", "inf", "nan", "0x5", "٣", "1.2.3")
    ),
    (["--restart", "yes"], "--restart 'yes' is not known", RESTART_HINT),
    (["--restart", ""], "--restart '' is not known", RESTART_HINT),
    (["--restart", "on_failure"], "--restart 'on_failure' is not known", RESTART_HINT),
    *(
        (["--then", text], "--then has an empty command", "write what is to run when the server is ready: --then 'npm test'")
        for text in ("", " ", "\t\n")
    ),
    (
        ["--lazy", "-H", "guard"],
        "--lazy needs hand-off fd: with guard (as asked for) nobody listens before the command runs",
        FD_HINT,
    ),
    (
        ["--lazy", "-H", "hold"],
        "--lazy needs hand-off fd: with hold (as asked for) nobody listens before the command runs",
        FD_HINT,
    ),
    (
        ["--lazy"],
        "--lazy needs hand-off fd: with guard (the command names no descriptor) nobody listens before the command runs",
        FD_HINT,
    ),
    (
        ["--ready", "listen", "-H", "fd"],
        "--ready listen says nothing with hand-off fd: its sockets listen before the command runs",
        "--ready accept waits until the command takes connections",
    ),
    (
        ["--ready", "listen", "-H", "fd", "-l", "0", "-l", "udp:0"],
        "--ready listen says nothing with hand-off fd: its sockets listen before the command runs",
        "--ready accept waits until the command takes connections",
    ),
    (
        ["--ready", "accept", "-H", "fd", "-l", "udp:0"],
        "--ready accept needs a listener that takes connections, and UDP has none",
        "use --ready notify or none",
    ),
    (
        ["--ready", "https:/x", "-H", "fd", "-l", "udp:0"],
        "--ready https asks the first listener, which is UDP",
        "list the TCP listener first",
    ),
    (
        ["--ready", "http", "-H", "fd", "-l", "udp:0", "-l", "0"],
        "--ready http asks the first listener, which is UDP",
        "list the TCP listener first",
    ),
    (["--then", "echo {web.port}"], "{web.port} names no listener of this run", "the listeners are: listener1"),
]


@pytest.mark.parametrize(("words", "message", "hint"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_refused(words: list[str], message: str, hint: str, tmp_path: Path) -> None:
    result = lifetime(tmp_path, *words)
    assert (result.returncode, result.stderr) == (125, said(message, hint))
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize(("words", "message", "hint"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_the_words_of_a_message(words: list[str], message: str, hint: str) -> None:
    for text in (message, hint):
        assert text[0] == text[0].lower()
        assert not text.endswith(".")


@pytest.mark.parametrize("option", ["--then", "--ready", "--ready-timeout", "--ready-fd", "--restart"])
def test_option_without_its_value(option: str) -> None:
    result = run(option)
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: option {option} needs a value\nportexec: hint: write {option} ")


def test_switch_with_a_value(tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--lazy=yes")
    assert (result.returncode, result.stderr) == (125, said("option --lazy takes no value", "write --lazy alone"))


@pytest.mark.parametrize("amount", ["1" * 30, "9" * 400, "9" * 5000, f"{'9' * 400}h"], ids=["30", "400", "5000", "400 hours"])
@pytest.mark.parametrize("option", ["--ready-timeout", "--kill-after"])
def test_a_time_that_is_very_long(option: str, amount: str) -> None:
    """An eternity, or an error; not a crash."""
    result = run("-q", option, amount, "-H", "fd", "--ready", "none", "--then", "exit 7", "--", "sleep", "1000")
    assert "Traceback" not in result.stderr
    assert result.returncode == 7 or (
        result.returncode == 125 and f"{option} '{amount}' is no duration" in result.stderr.splitlines()[0]
    )


@pytest.mark.parametrize("options", [[], ["--ready", "none"]], ids=["alone", "with a lifetime"])
@pytest.mark.parametrize("amount", ["1000h", "9" * 400], ids=["1000 hours", "400 digits"])
def test_a_command_has_a_very_long_time_to_end(amount: str, options: list[str]) -> None:
    """More milliseconds than poll(2) takes."""
    with running("-q", "-k", amount, *options, "-H", "guard", "--", *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready ")
        started.process.terminate()
        assert started.process.stdout.readline() == "SIGTERM\n"
        out, errors = started.process.communicate(timeout=DEADLINE)
        assert (out, errors) == ("", "")
        assert started.process.returncode in (3, -signal.SIGTERM)


# Characters in a path that would end up in a request, or in the name of a socket


@pytest.mark.parametrize(
    "path",
    [
        "/a b",
        " /",
        "/\n",
        "/x\r\nHost: evil",
        "/\t",
        "/\x7f",
        "/\x1b[2J",
        "/é",
        "/\udc80",
        "/ü x",
        "/\u2028",
        "/\u00a0",
        "/\x85",
        "/\x01",
    ],
    ids=repr,
)
def test_a_path_that_no_request_may_have(path: str, tmp_path: Path) -> None:
    """It is refused with a message that a terminal can show, rather than sent as another request."""
    result = lifetime(tmp_path, "--ready", f"http:{path}")
    first, hint = result.stderr.splitlines()
    assert result.returncode == 125
    assert first.startswith("portexec: error: --ready 'http:")
    assert hint.startswith("portexec: hint: ")
    assert first.isprintable()
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("path", ["/a%20b", "/?q=1&r=2", "/~x/;y,z", "/a//b", "/:8000", "/{}", "/%", "/#top", "/http://x/"])
def test_a_path_that_a_request_may_have(path: str) -> None:
    """It is for the server to say what it thinks of it; a command that ends is the end of the wait."""
    result = run("--ready", f"http:{path}", "-H", "fd", "--", "sh", "-c", "exit 7")
    assert result.returncode == 7


# Names of the notify socket


def test_a_notify_socket_whose_name_is_taken(tmp_path: Path) -> None:
    for name in (str(tmp_path / "taken"), f"@portexec-test-{tmp_path}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(f"\0{name[1:]}" if name.startswith("@") else name)
            result = lifetime(tmp_path, "--ready", f"notify:{name}", "-H", "fd")
            message = f"cannot make the notify socket {name}: Address already in use"
            assert (result.returncode, result.stderr) == (125, said(message, "choose another name"))
            assert_nothing_happened(result, tmp_path, before=["taken"])


def test_a_notify_socket_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    result = lifetime(tmp_path, "--ready", f"notify:{tmp_path}/file", "-H", "fd")
    assert result.returncode == 125
    assert_nothing_happened(result, tmp_path, before=["file"])
    assert (tmp_path / "file").read_text() == "kept"


def test_a_notify_socket_where_there_is_no_directory(tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--ready", f"notify:{tmp_path}/none/s", "-H", "fd")
    message = f"cannot make the notify socket {tmp_path}/none/s: No such file or directory"
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: {message}\nportexec: hint: ")
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("kind", ["/", "@"])
def test_a_notify_socket_whose_name_is_too_long(kind: str, tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--ready", f"notify:{kind}{'x' * 200}", "-H", "fd")
    assert result.returncode == 125
    assert re.match("portexec: error: cannot make the notify socket .*: .*too long\nportexec: hint: ", result.stderr)
    assert_nothing_happened(result, tmp_path)


def test_a_notify_socket_at_a_path_is_as_open_as_it_has_to_be(tmp_path: Path) -> None:
    """Below root a command may become any user, and has to reach it then."""
    path = tmp_path / "notify"
    result = run("--ready", f"notify:{path}", "--", "stat", "-c", "%a", str(path))
    assert result.stdout == ("666\n" if os.geteuid() == 0 else "600\n")


@pytest.mark.parametrize("form", ["http", "https:/x"])
def test_without_the_parser_that_it_takes(form: str, tmp_path: Path) -> None:
    """Said before anything starts. A Python without its site directory has none."""
    main = "import sys; sys.path.insert(0, sys.argv.pop(1)); from portexec.__main__ import main; sys.exit(main())"
    words = [sys.executable, "-S", "-c", main, str(ROOT), "--ready", form, "--", "touch", str(tmp_path / "started")]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert (result.returncode, list(tmp_path.iterdir())) == (125, [])
    assert result.stderr == (
        f"portexec: error: --ready {form.partition(':')[0]} needs the package h11, which is not there\n"
        "portexec: hint: install h11\n"
    )


@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
def test_a_failure_after_the_notify_socket_was_made_leaves_none(hand_off: str, tmp_path: Path) -> None:
    notify = ["--ready", f"notify:{tmp_path}/notify", "-H", hand_off]
    result = run(*notify, "--port-file", str(tmp_path / "none" / "port"), "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert result.stderr.startswith("portexec: error: cannot write port file ")
    assert_nothing_happened(result, tmp_path)


def test_a_hand_off_that_cannot_be_had_leaves_none(tmp_path: Path) -> None:
    words = ["--ready", f"notify:{tmp_path}/notify", "-H", "guard", "--", "touch", str(tmp_path / "started")]
    result = run(*words, prefix=refusing(["seccomp", 1]))
    assert result.returncode == 125
    assert result.stderr.startswith("portexec: error: hand-off guard cannot be had here: ")
    assert_nothing_happened(result, tmp_path)


def test_a_command_that_never_notifies(tmp_path: Path) -> None:
    """Its time runs out; when it ends first, so does the wait."""
    never = ["--ready", f"notify:{tmp_path}/notify", "-H", "fd"]
    result = lifetime(tmp_path, *never, "--ready-timeout", "100ms", command=["sleep", "1000"])
    assert result.returncode == 124
    assert "it did not send READY=1 to $NOTIFY_SOCKET" in result.stderr
    assert_nothing_happened(result, tmp_path)
    result = lifetime(tmp_path, *never, "--then", "echo tests", command=["true"])
    assert (result.returncode, result.stdout) == (125, "")
    assert "the server ended before it was ready: exit status 0" in result.stderr
    assert_nothing_happened(result, tmp_path)


# --ready-fd


@pytest.mark.parametrize("text", ["x", "", "-1", "1.5", "0x1", " 1", "٣", "99999999999", "1048577"])
def test_a_descriptor_that_is_no_number(text: str, tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--ready-fd", text)
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: --ready-fd {text!r} is not a number from 0 to ")
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("number", [3, 9, 200, OPEN_FILES, 1048576])
def test_a_descriptor_that_is_not_open(number: int, tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--ready-fd", str(number))
    first, hint = result.stderr.splitlines()
    assert result.returncode == 125
    assert first == f"portexec: error: --ready-fd {number}: this descriptor is not open"
    assert hint.startswith("portexec: hint: open it in the shell: ")
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("number", [1, 2])
def test_a_standard_stream_that_is_closed(number: int, tmp_path: Path) -> None:
    words = ["--ready-fd", str(number), "-H", "fd", "--", "touch", str(tmp_path / "started")]
    result = run(*words, prefix=["sh", "-c", f'exec "$@" {number}>&-', "sh"])
    assert result.returncode == 125
    assert not (tmp_path / "started").exists()


def test_a_descriptor_for_reading_only(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    anything = os.open(tmp_path, os.O_PATH)
    try:
        for fd in (0, reader, directory, anything):
            result = lifetime(tmp_path, "--ready-fd", str(fd), pass_fds=[reader, directory, anything])
            message = f"--ready-fd {fd}: this descriptor is open for reading only"
            assert (result.returncode, result.stderr) == (125, said(message, "open it for writing"))
            assert_nothing_happened(result, tmp_path)
    finally:
        for fd in (reader, writer, directory, anything):
            os.close(fd)


def test_a_disk_that_is_full_is_no_failure_of_the_command() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        words = ["-q", "--ready-fd", str(fd), "--ready", "none", "-H", "fd", "--then", "exit 7", "--", "sleep", "1000"]
        result = run(*words, pass_fds=[fd])
    finally:
        os.close(fd)
    assert (result.returncode, result.stderr) == (7, "")


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    try:
        while True:
            os.write(pipe, bytes(4096))
    except BlockingIOError:
        os.set_blocking(pipe, True)


# What is asked for together


@pytest.mark.parametrize("restart", ["on-failure", "always"])
@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
def test_restart_of_a_command_that_is_not_found(hand_off: str, restart: str, tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--restart", restart, "-H", hand_off, command=["no-such-command"])
    message, hint = "command not found: no-such-command", "is it installed, and on the PATH?"
    assert (result.returncode, result.stderr) == (127, said(message, hint))
    assert_nothing_happened(result, tmp_path)


def test_tests_that_are_not_found(tmp_path: Path) -> None:
    """The shell says so, and its status is that of the run."""
    result = lifetime(tmp_path, "--ready", "none", "--then", "no-such-command", "-H", "fd", command=["sleep", "1000"])
    assert result.returncode == 127
    assert "no-such-command" in result.stderr
    assert_nothing_happened(result, tmp_path)


def test_tests_that_are_no_shell_command(tmp_path: Path) -> None:
    result = lifetime(tmp_path, "--ready", "none", "--then", "echo 'not closed", "-H", "fd", command=["sleep", "1000"])
    assert result.returncode == 2
    assert_nothing_happened(result, tmp_path)


def test_every_lifetime_option_in_a_dry_run(tmp_path: Path) -> None:
    """Nothing is started, waited for or written."""
    words = [
        "--then",
        "touch then",
        "--ready",
        f"notify:{tmp_path}/n",
        "--ready-timeout",
        "1s",
        "--restart",
        "always",
        "--lazy",
    ]
    result = lifetime(tmp_path, "-n", *words, "--ready-fd", "1", "-H", "fd", cwd=tmp_path)
    assert result.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--ready", "up"], ["--then", ""], ["--restart", "yes"], ["--ready-timeout", "soon"]])
def test_a_dry_run_refuses_the_same(words: list[str], tmp_path: Path) -> None:
    result = lifetime(tmp_path, "-n", *words)
    assert result.returncode == 125
    assert_nothing_happened(result, tmp_path)


def test_the_last_of_an_option_counts(tmp_path: Path) -> None:
    words = ["--ready", "up", "--ready", "none", "--restart", "yes", "--restart", "no", "--then", "exit 7"]
    result = lifetime(tmp_path, *words, "-H", "fd", command=["sleep", "1000"])
    assert result.returncode == 7
