"""`--socket-mode`: who may use a unix socket, from the moment on in which it is there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from portexec.cli import main
from tests.support import run

LOOK = ["sh", "-c", "stat -c %a s; umask"]


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("umask", "mode", "seen"), [(0o077, "666", "666"), (0o000, "0600", "600"), (0o022, "200", "200")])
def test_the_mode_is_as_asked_whatever_the_umask_which_the_command_keeps(umask: int, mode: str, seen: str) -> None:
    before = os.umask(umask)
    try:
        result = run("-q", "--socket-mode", mode, "-l", "unix:s", "--", *LOOK)
    finally:
        os.umask(before)
    assert (result.returncode, result.stdout.split()) == (0, [seen, f"{umask:04o}"])


def test_without_it_the_umask_decides() -> None:
    before = os.umask(0o027)
    try:
        result = run("-q", "-l", "unix:s", "--", *LOOK)
    finally:
        os.umask(before)
    assert result.stdout.split() == ["750", "0027"]


def test_a_socket_that_is_made_anew_has_it_too() -> None:
    shut = "import socket; socket.socket(fileno=3).shutdown(2); raise SystemExit(1)"
    script = f"stat -c %a s; [ -e again ] && exit; touch again; exec python3 -c '{shut}'"
    words = ["-q", "--socket-mode", "640", "-l", "unix:s", "--ready", "none", "--restart", "on-failure"]
    result = run(*words, "--", "sh", "-c", script)
    assert (result.returncode, result.stdout.split()) == (0, ["640", "640"])


def test_it_is_for_all_unix_sockets_with_a_path() -> None:
    abstract = f"c=unix:@portexec-test-mode-{os.getpid()}"  # a name that all who run these tests would share
    words = ["--socket-mode", "600", "-l", "a=unix:a", "-l", "b=unix:b", "-l", abstract, "-l", "0"]
    assert run("-q", *words, "--", "true").returncode == 0
    assert {stat.S_IMODE(os.stat(name).st_mode) for name in "ab"} == {0o600}


@pytest.mark.parametrize("text", ["", "8", "888", "rw", "-1", "1777", "00660", "0o660", "6 6", "u=rw"])
def test_what_is_no_mode(text: str) -> None:
    result = run("--socket-mode", text, "-l", "unix:s", "--", "touch", "started")
    hint = "write an octal number, such as 660 for owner and group"
    assert (result.returncode, os.listdir()) == (125, [])
    assert result.stderr == f"portexec: error: --socket-mode {text!r} is no mode\nportexec: hint: {hint}\n"


@pytest.mark.parametrize("text", ["0", "444", "066", "0577"])
def test_a_mode_that_shuts_the_owner_out(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket-mode", text, "-l", "unix:s", "--", "touch", "started"]) == 125
    hint = "write 600 for the owner alone, 660 for the group too"
    message = f"--socket-mode {text} does not let the owner connect, which takes the right to write"
    assert (capfd.readouterr().err, os.listdir()) == (f"portexec: error: {message}\nportexec: hint: {hint}\n", [])


@pytest.mark.parametrize("specs", [[], ["-l", "0"], ["-l", "unix:@portexec-test-mode"]])
def test_without_such_a_socket_it_is_a_mistake(specs: list[str]) -> None:
    result = run("--socket-mode", "660", *specs, "--", "touch", "started")
    assert (result.returncode, os.listdir()) == (125, [])
    assert result.stderr.startswith("portexec: error: --socket-mode is for unix sockets with a path\n")
