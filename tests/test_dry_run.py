"""A dry run is refused what the run is refused, in the same words, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from portexec import foresee
from portexec.command.publish import publish_files
from portexec.command.undo import Undo
from portexec.errors import PortexecError
from portexec.lifetime.log import Log
from tests import support

pytestmark = pytest.mark.once

PLACES = (
    "new", "file", "directory/new", "directory", "directory/", "missing/new", "missing/", "file/new", "x" * 300,
    "read-only/new", "read-only file", "no entry/new", "link", "dangling", "dangling far", "loop", "socket", "open/link",
    "open/linked", "open/new", "open/file", "/dev/null", "/dev/full",
)  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with all that a path may lead to. To root some of it is no hindrance, in a dry run and in a run."""
    monkeypatch.chdir(tmp_path)
    for name, mode in (("directory", 0o755), ("open", 0o777), ("read-only", 0o555), ("no entry", 0o000)):
        Path(name).mkdir()
        Path(name).chmod(mode)
    for name, mode in (("file", 0o644), ("read-only file", 0o444), ("open/file", 0o644), ("mine", 0o644)):
        Path(name).write_text("as it was\n")
        Path(name).chmod(mode)
    for name, target in (("link", "file"), ("dangling", "gone"), ("dangling far", "missing/x"), ("loop", "loop")):
        Path(name).symlink_to(target)
    Path("open/link").symlink_to("../file")
    Path("open/linked").hardlink_to("mine")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    yield tmp_path
    for name in ("read-only", "no entry"):
        Path(name).chmod(0o755)


def seen(directory: Path) -> dict[str, tuple[int, ...]]:
    """All that is there, and when it was written to."""
    found: dict[str, tuple[int, ...]] = {}
    for folder, _, files in os.walk(directory):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            status = os.lstat(path)
            found[path] = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def said_by(call: Callable[[], object]) -> str:
    try:
        call()
    except PortexecError as error:
        return str(error)
    return ""


def write_log(path: str) -> None:
    os.close(Log(path, Undo()).fd)


FILES: dict[str, tuple[Callable[[str], object], Callable[[str], object]]] = {
    "log": (foresee.log, write_log),
    "port file": (lambda path: foresee.port_file(path, 1), lambda path: publish_files(path, None, 1, {}, Undo())),
    "export file": (foresee.export, lambda path: publish_files(None, path, 1, {"PORT": "1"}, Undo())),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_refused_as_by_the_run(kind: str, places: Path) -> None:
    look, write = FILES[kind]
    before = seen(places)
    foreseen = {path: said_by(partial(look, path)) for path in PLACES}
    assert seen(places) == before
    assert foreseen == {path: said_by(partial(write, path)) for path in PLACES}
    refused = {path for path in PLACES if foreseen[path]}
    assert refused >= {
        "directory",
        "directory/",
        "missing/new",
        "missing/",
        "file/new",
        "x" * 300,
        "loop",
        "socket",
        "open/link",
    }
    assert not refused & {"new", "file", "directory/new", "open/new", "open/file"}


def what_is_said(*words: str) -> tuple[int, str]:
    result = support.run(*words, "--", "touch", "started")
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--log", "missing/new", "--port-file", "missing/new"],
        ["--export", "directory", "-H", "fd"],
        ["--port-file", "new", "-l", "unix:new.sock"],
        ["--ready", "notify:{}/file", "--log", "missing/new"],
        ["--name", "web", "--detach", "--log", "missing/new", "-l", "unix:missing/new"],
    ],
    ids=" ".join,
)
def test_a_dry_run_is_refused_as_the_run(words: list[str], places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTEXEC_DIR", f"{places}/registry")
    words = [word.format(places) for word in words]
    before = set(seen(places))
    foreseen = what_is_said("-n", *words)
    assert set(seen(places)) == before
    assert foreseen == what_is_said(*words)
    assert (foreseen[0], Path("started").exists()) == (125, False)


@pytest.mark.parametrize("first", [b"#!/no/such -x", b"#! /bin/sh\r", b"#!/bin/sh"])
def test_a_script_without_its_interpreter(first: bytes, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(first + b"\n")
    script.chmod(0o755)
    foreseen, done = (support.run(*option, "-q", "-H", "fd", "--", str(script)) for option in (["-n"], []))
    assert (foreseen.returncode, foreseen.stderr) == (done.returncode, done.stderr)
    assert done.returncode == (0 if first == b"#!/bin/sh" else 126)


def test_a_registry_that_cannot_be_made(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTEXEC_DIR", f"{places}/file/registry")
    foreseen = what_is_said("-n", "--name", "web")
    assert foreseen == what_is_said("--name", "web")
    assert foreseen[1].startswith(f"portexec: error: cannot make the registry {places}/file/registry: Not a directory\n")


def test_a_directory_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    for look, write in FILES.values():
        assert said_by(partial(look, "file")) == said_by(partial(write, "file")) != ""


def test_what_is_written_and_remapped_is_shown(tmp_path: Path) -> None:
    words = ["-n", "-H", "guard", "--remap", "80", "--port-file", f"{tmp_path}/p", "--export", f"{tmp_path}/e", "--", "true"]
    rows = support.run(*words).stdout.splitlines()
    assert f"write     {tmp_path}/p, the first listener's number" in rows
    assert f"append    {tmp_path}/e, the numbers" in rows
    assert any(row.startswith("remap     port 80 becomes ") for row in rows)
    planned = json.loads(support.run("--json", *words).stdout)
    assert (planned["port_file"], planned["export"]) == (f"{tmp_path}/p", f"{tmp_path}/e")
    assert planned["remap"] == {"80": planned["listeners"][0]["port"]}


def test_a_socket_goes_when_nobody_reads_the_plan(tmp_path: Path) -> None:
    """The plan is written to a pipe that has no reader, which ends portexec by a signal."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        command = [*support.PORTEXEC, "-n", "-l", f"unix:{tmp_path}/s", "--", "true"]
        assert subprocess.run(command, stdout=stdout, timeout=support.DEADLINE).returncode == -signal.SIGPIPE
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["-e", "PORT=3000", "true"], "-e sets PORT to 3000, and portexec has NUMBER; -l 3000 asks for 3000"),
        (["-e", "PORT={port}", "true"], ""),
        (["-e", "PORT=3000", "-H", "guard", "--remap", "3000", "true"], ""),
        (
            ["true", "--ready=http"],
            "--ready=http comes after the command, which gets it; options of portexec come before the command",
        ),
        (["sh", "-c", "portexec --then", "--then"], ""),
    ],
)
def test_what_may_be_meant_otherwise_is_noted(words: list[str], note: str) -> None:
    """At the start, too."""
    lines = support.run("-n", *words).stdout.splitlines()
    notes = [re.sub(r"has \d+", "has NUMBER", line) for line in lines if line.startswith("note")]
    assert notes[:-1] == ([f"note      {note}"] if note else [])
    said = [line for line in support.run(*words, "x").stderr.splitlines() if "note: " in line]
    assert (len(said) == 1) is bool(note)


def test_the_names_of_what_the_user_sets_are_shown(tmp_path: Path) -> None:
    """Not the values: they may be secret."""
    file = tmp_path / "env"
    file.write_text("B=secret\nC=secret\nPORT=1\n")
    shown = support.run("-n", "-e", "A=secret", "-e", "C=secret", "--env-file", str(file), "true").stdout
    assert "set       B, from env files\nset       A, C, from -e\n" in shown
    assert "secret" not in shown


def test_a_file_without_end_is_no_env_file() -> None:
    done = support.run("--env-file", "/dev/zero", "true")
    assert (done.returncode, done.stderr) == (
        125,
        "portexec: error: env file /dev/zero is too large\nportexec: hint: all that a command gets is shorter than 8 MiB\n",
    )
