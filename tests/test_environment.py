"""The environment of the command: env files, injected numbers, `-e`, and which of them wins. Through the real command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from portexec.command import env_files
from portexec.command import fifo as reading
from portexec.errors import PortexecError
from tests import support


def run_raw(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run portexec in bytes, since an environment is made of bytes."""
    return subprocess.run(
        [*support.PORTEXEC, "-q", *words], env=os.environ | (env or {}), capture_output=True, timeout=support.DEADLINE
    )


def environment_of(*words: str, env: dict[str, str] | None = None) -> dict[bytes, bytes]:
    """What the command finds in its environment when portexec gets these options."""
    result = run_raw(*words, "--", "env", "-0", env=env)
    assert (result.returncode, result.stderr) == (0, b"")
    return dict(entry.split(b"=", 1) for entry in result.stdout.split(b"\0") if entry)


def env_file(directory: Path, text: str | bytes, name: str = "the.env") -> str:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# the file, the variable A of the command
SYNTAX = [
    ("A=1", b"1"),
    ("A=1\n", b"1"),
    ("A = 1\n", b"1"),
    ("A=", b""),
    ("A=one two\n", b"one two"),
    ("A=one # said\n", b"one"),
    ("A=one#said\n", b"one#said"),
    ("A='one # said'\n", b"one # said"),
    ('A="one two"\n', b"one two"),
    ('A="one\\ntwo"\n', b"one\ntwo"),
    ("A='one\\ntwo'\n", b"one\\ntwo"),
    ('A="one\ntwo"\n', b"one\ntwo"),
    ('A="say \\"hi\\""\n', b'say "hi"'),
    ("export A=1\n", b"1"),
    ("  export   A=1\n", b"1"),
    ("# a comment\n\n  \nA=1\n", b"1"),
    ("A=1\nA=2\n", b"2"),
    ("A=1\r\nB=2\r\n", b"1"),
    ("A=x=y\n", b"x=y"),
    ("A={port}\n", b"{port}"),
    ("A=${B:-fallback}\n", b"fallback"),
    ("A=${B}\n", b""),
    ("A=<${B:-}>\n", b"<>"),
    ("B=1\nA=${B}${B:-2}3\n", b"113"),
    ("B=\nA=<${B:-x}>\n", b"<>"),
    ("A=$B\n", b"$B"),
    ("A='${PORT}'\n", b"${PORT}"),
    ("A= '${PORT}' # said\n", b"${PORT}"),
    ("export A='x${B:-y}'\n", b"x${B:-y}"),
    ("A='\\${PORT}'\n", b"\\${PORT}"),
    ("A='it\\'s \\$5'\n", b"it's \\$5"),
    ("A=\\${PORT}\n", b"${PORT}"),
    ('A="\\${PORT} \\$5"\n', b"${PORT} $5"),
    ('B=1\nA="\\\\${B}"\n', b"\\1"),
    ('B=1\nA="\\\\\\${B}"\n', b"\\${B}"),
    ("A=${B:-\\$5}\n", b"$5"),
    ("B='${C}'\nC=1\nA=${B}\n", b"${C}"),
    ("A=pa\\$\\$word\n", b"pa$$word"),
    ("A=ü\n", "ü".encode()),
    (b"A=\xff\xfe\n", b"\xff\xfe"),
    (b"\xef\xbb\xbfA=1\n", b"1"),
    (b"\xef\xbb\xbfexport A=1\n", b"1"),
]


@pytest.mark.parametrize(("text", "value"), SYNTAX)
def test_syntax(text: str | bytes, value: bytes, tmp_path: Path) -> None:
    assert environment_of("--env-file", env_file(tmp_path, text))[b"A"] == value


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "A\n", "export A\n"])
def test_files_that_set_nothing(text: str, tmp_path: Path) -> None:
    plain = environment_of()
    found = environment_of("--env-file", env_file(tmp_path, text))
    assert found | {b"PORT": b""} == plain | {b"PORT": b""}


def test_numbers_are_known_in_files(tmp_path: Path) -> None:
    path = env_file(tmp_path, 'A=http://127.0.0.1:${PORT}/\nB=${API_PORT}\nC="${WEB_PORT:-none}"\nD=${DB_PORT:-5432}\n')
    found = environment_of("-l", "api=0", "-l", "web=0", "--env-file", path, env={"PORT": "99"})
    port, web = found[b"PORT"], found[b"WEB_PORT"]
    assert port.isdigit()
    assert port != web != b"99"
    assert found[b"API_PORT"] == port
    assert (found[b"A"], found[b"B"]) == (b"http://127.0.0.1:%s/" % port, port)
    assert (found[b"C"], found[b"D"]) == (web, b"5432")


def test_variables_of_the_environment_are_known_in_files(tmp_path: Path) -> None:
    path = env_file(tmp_path, "B=file\nA=${B}\nC=${HOME_OF_IT}/x\n")
    found = environment_of("--env-file", path, env={"B": "given", "HOME_OF_IT": "/h"})
    assert (found[b"A"], found[b"C"]) == (b"given", b"/h/x")


def test_several_files_the_later_wins(tmp_path: Path) -> None:
    first = env_file(tmp_path, "A=1\nB=1\n", "first")
    second = env_file(tmp_path, "B=2\nC=${A}${B}\n", "second")
    found = environment_of("--env-file", first, f"--env-file={second}")
    assert [found[name] for name in (b"A", b"B", b"C")] == [b"1", b"2", b"12"]


def test_precedence(tmp_path: Path) -> None:
    """Environment, then files for what it does not have, then the numbers, then `-e`."""
    path = env_file(tmp_path, "A=file\nB=file\nPORT=file\nAPI_PORT=file\nC=file\n")
    found = environment_of(
        "-l", "api=0", "--env-file", path, "-e", "C=option", "-e", "D={port}", "-e", "E=1", "-e", "E=2",
        env={"A": "given", "PORT": "given", "D": "given"},
    )  # fmt: skip
    assert [found[name] for name in (b"A", b"B", b"C", b"E")] == [b"given", b"file", b"option", b"2"]
    assert found[b"PORT"] == found[b"API_PORT"] == found[b"D"]
    assert found[b"PORT"].isdigit()


def test_option_wins_over_the_numbers() -> None:
    assert environment_of("-e", "PORT=mine")[b"PORT"] == b"mine"


def test_a_variable_that_is_set_to_nothing_is_set(tmp_path: Path) -> None:
    found = environment_of("--env-file", env_file(tmp_path, "A=file\n"), env={"A": ""})
    assert found[b"A"] == b""


def test_file_does_not_win_over_the_injected_listen_variables(tmp_path: Path) -> None:
    path = env_file(tmp_path, "LISTEN_PID=1\nLISTEN_FDS=7\nLISTEN_FDNAMES=x\nLISTEN_PIDFDID=1\n")
    show = 'echo "$$ $LISTEN_PID $LISTEN_FDS $LISTEN_FDNAMES"'
    result = run_raw("-H", "fd", "-l", "api=0", "--env-file", path, "--", "sh", "-c", show)
    pid, *listen = result.stdout.split()
    assert listen == [pid, b"1", b"api"]


def test_everything_else_comes_through() -> None:
    """Odd names and values, and bytes that are no UTF-8."""
    given = {b"ODD.NAME-x": b"1", b"EMPTY": b"", b"LINES": b"a\nb", b"BYTES": b"\xff\x80", b"\xfe": b"name"}
    result = subprocess.run(
        [*support.PORTEXEC, "-q", "--", "env", "-0"],
        env=os.environb | given,
        stdout=subprocess.PIPE,
        timeout=support.DEADLINE,
    )
    entries = result.stdout.split(b"\0")
    assert all(name + b"=" + value in entries for name, value in given.items())


def test_bytes_of_an_option_come_through() -> None:
    assert environment_of("-e", os.fsdecode(b"A=\xff{port}"))[b"A"].startswith(b"\xff")


def test_nothing_is_added_but_the_number() -> None:
    """Not even in the C locale, where Python itself sets LC_CTYPE."""
    names = ("PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV")
    bare = {name: os.environ[name] for name in names if name in os.environ}
    result = subprocess.run(
        [*support.PORTEXEC, "-q", "--", "env", "-0"], env=bare, stdout=subprocess.PIPE, timeout=support.DEADLINE
    )
    found = dict(entry.split(b"=", 1) for entry in result.stdout.split(b"\0") if entry)
    assert found.pop(b"PORT").isdigit()
    assert found == {os.fsencode(name): os.fsencode(value) for name, value in bare.items()}


NO_EQUALS = ("it has no =", "write NAME=VALUE; a comment begins with #")
NO_NAME = ("there is no name before the =", "write NAME=VALUE; a comment begins with #")
NO_EXPORT = ("export has no name", "write export NAME=VALUE")
A_SPACE = ("there is a space in the name", "write NAME=VALUE; only export may stand before it")
OPEN = ('the quote " is not closed', 'write NAME="VALUE", with \\" for a quote within')
OPEN_SINGLE = ("the quote ' is not closed", "write NAME='VALUE', with \\' for a quote within")
MORE = ("there is text after the closing quote", 'put all of the value between the quotes, with \\" for a quote within')
MORE_LATER = (
    'the quote " is closed in a later line, with text after it',
    'close it where the value ends, with \\" for a quote within',
)
A_NUL = ("it has a NUL byte", "is it UTF-16? save the file as UTF-8 text")
ODD = ("it is no NAME=VALUE", "write NAME=VALUE, with quotes around a value that has spaces")

# the file, the line, what is said
MALFORMED: list[tuple[str | bytes, int, tuple[str, str]]] = [
    ('A="open\n', 1, OPEN),
    ("A='open\n", 1, OPEN_SINGLE),
    ('A="open\\"\n', 1, OPEN),
    ('A="one\ntwo"\nB="\n', 3, OPEN),
    ('A="one\nB="two"\n', 1, MORE_LATER),
    ('A="a" b\n', 1, MORE),
    ('\nexport A="a"b\n', 2, MORE),
    ("A=1\n=2\n", 2, NO_NAME),
    ("export =2\n", 1, NO_NAME),
    ("A=1\n\n# said\nB C=2\n", 4, A_SPACE),
    ("A=1\nsome words\n", 2, NO_EQUALS),
    ("A=1\r\nsome words\r\n", 2, NO_EQUALS),
    ("A=1\nB: 2\n", 2, NO_EQUALS),
    ('{"A": 1}\n', 1, NO_EQUALS),
    ("A=1\nexport\n", 2, NO_EXPORT),
    ("export \nA=1\n", 1, NO_EXPORT),
    (b"A=1\nB=x\0y\n", 2, A_NUL),
    (b'A=1\nB="x\n\0y"\n', 3, A_NUL),
    (b"\xff\xfeA\0=\0001\0\n\0", 1, A_NUL),
    ("'A=B'=1\n", 1, ODD),
]


def test_malformed_line(tmp_path: Path) -> None:
    result = support.run("--env-file", env_file(tmp_path, "A=1\n=2\n"), "--", "touch", str(tmp_path / "started"))
    expected = f"portexec: error: malformed line in env file {tmp_path}/the.env:2: {NO_NAME[0]}\nportexec: hint: {NO_NAME[1]}\n"
    assert (result.returncode, result.stdout, result.stderr) == (125, "", expected)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(("text", "line", "said"), MALFORMED)
def test_what_is_said_of_a_malformed_line(text: str | bytes, line: int, said: tuple[str, str], tmp_path: Path) -> None:
    path = env_file(tmp_path, text)
    with pytest.raises(PortexecError) as caught:
        env_files.read([path], {})
    what, hint = said
    assert (caught.value.message, caught.value.hint) == (f"malformed line in env file {path}:{line}: {what}", hint)


@pytest.mark.parametrize(
    ("kind", "why", "hint"),
    [
        ("missing", "No such file or directory", "the file has to exist; leave --env-file out where there is none"),
        ("directory", "Is a directory", "name a file in it: {}/.env"),
        ("below a file", "Not a directory", ""),
        ("loop", "Too many levels of symbolic links", ""),
        ("long name", "File name too long", ""),
    ],
)
def test_file_that_cannot_be_read(kind: str, why: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    name = {"below a file": "file/x", "long name": "x" * 300}.get(kind, kind)
    path = str(tmp_path / name)
    result = support.run("--env-file", path, "--", "touch", str(tmp_path / "started"))
    assert (result.returncode, result.stdout) == (125, "")
    advice = f"portexec: hint: {hint.format(path)}\n" if hint else ""
    assert result.stderr == f"portexec: error: cannot read env file {path}: {why}\n{advice}"
    assert not (tmp_path / "started").exists()


def test_second_of_two_files_is_missing(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = support.run("--env-file", env_file(tmp_path, "A=1\n"), "--env-file", missing, "--", "true")
    assert result.returncode == 125
    assert re.search(rf"cannot read env file {re.escape(missing)}: ", result.stderr)


def test_file_may_be_a_pipe(tmp_path: Path) -> None:
    """As `--env-file <(command)` of a shell gives it."""
    reading, writing = os.pipe()
    os.write(writing, b"A=piped\n")
    os.close(writing)
    try:
        result = subprocess.run(
            [*support.PORTEXEC, "-q", "--env-file", f"/dev/fd/{reading}", "--", "sh", "-c", "echo $A"],
            pass_fds=[reading],
            stdout=subprocess.PIPE,
            timeout=support.DEADLINE,
        )
    finally:
        os.close(reading)
    assert result.stdout == b"piped\n"


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def test_file_may_be_a_fifo(fifo: Path) -> None:
    """To open it is to wait for portexec; what is written comes in two pieces."""
    with support.running("-q", "--env-file", str(fifo), "--", "sh", "-c", "echo $A") as portexec:
        with fifo.open("wb", buffering=0) as writer:
            writer.write(b"A=to")
            writer.write(b"gether\n")
        assert portexec.process.communicate(timeout=support.DEADLINE) == ("together\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wait_for_what_is_written_is_ended_by_a_signal(number: int, fifo: Path) -> None:
    with support.running("-l", f"unix:{fifo}.sock", "--env-file", str(fifo), "--", "true") as portexec, fifo.open("wb"):
        portexec.process.send_signal(number)
        assert portexec.process.wait(support.DEADLINE) == -number
    assert os.listdir(fifo.parent) == [fifo.name]


@pytest.mark.parametrize("is_there", [False, True])
def test_only_of_a_writer_that_is_yet_to_come_something_is_said(
    is_there: bool, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writers = [fifo.open("wb")] if is_there else []

    def moments() -> Iterator[int]:
        """The first is now. In place of the next one the file is written."""
        yield 0
        with writers.pop() if is_there else fifo.open("wb") as writer:
            writer.write(b"A=1\n")
        yield 60

    monkeypatch.setattr(reading, "say", said.append)
    monkeypatch.setattr(reading, "moments", moments)
    assert reading.content(reader, "the file", 1000, is_quiet=False, driver=None) == b"A=1\n"
    os.close(reader)
    assert said == ([] if is_there else ["note: 0 s: waiting for a writer of the file"])


def test_path_of_a_file_finds_the_command(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "a-tool-of-mine"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    path = env_file(tmp_path, f"PATH={tmp_path}/bin:/bin:/usr/bin\n")
    without_path = {name: value for name, value in os.environ.items() if name != "PATH"}
    result = support.run("-q", "--env-file", path, "--", "a-tool-of-mine", env=without_path)
    assert result.stdout == "found\n"
