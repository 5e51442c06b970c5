"""What others are told: the announcement, the port file, the export file and the plan of `--dry-run`."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portexec import options
from tests import support

WHAT = {"--port-file": "port file", "--export": "export file"}
URL = re.compile(r"http://127\.0\.0\.1:(\d+)")


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*support.PORTEXEC, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_under(*prefix: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run portexec below another program."""
    return subprocess.run([*prefix, *support.PORTEXEC, *words], capture_output=True, text=True, timeout=support.DEADLINE)


def run_fd(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run portexec without a parent, for what is the same in every hand-off; one would withdraw the files at the end."""
    return support.run("-H", "fd", *words, **options)


def without_rights(*words: str) -> subprocess.CompletedProcess[str]:
    result = run_under(*support.child("without_rights"), words=list(words))
    if result.stderr.startswith("cannot drop"):
        pytest.skip(result.stderr.strip())
    return result


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory for the published files alone, so that a temporary file which is left there is seen."""
    path = tmp_path / "published"
    path.mkdir()
    return path


# The announcement


@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_announcement_is_one_line_on_stderr(hand_off: str) -> None:
    result = support.run("-H", hand_off, "--", "sh", "-c", "echo $PORT")
    port = result.stdout.strip()
    assert result.stderr == f"portexec: http://127.0.0.1:{port}\n"
    assert support.ANNOUNCED.match(result.stderr.strip())


@pytest.mark.parametrize(
    ("spec", "host"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("*", "127.0.0.1"), ("127.0.0.5", None)],
)
def test_announced_is_what_a_client_should_use(spec: str, host: str | None) -> None:
    result = support.run("-l", f"{spec}:0", "--", "sh", "-c", "echo $PORT {host} {url}")
    port, told_host, told_url = result.stdout.split()
    assert told_host == (host or spec)
    assert told_url == f"http://{host or spec}:{port}"
    assert result.stderr == f"portexec: {told_url}\n"


@pytest.mark.parametrize("spec", ["[::1]:0", "[::]:0"])
def test_announced_ipv6(spec: str) -> None:
    result = support.run("-l", spec, "--", "sh", "-c", "echo $PORT {host}")
    if "Cannot assign requested address" in result.stderr or "Address family not supported" in result.stderr:
        pytest.skip("no IPv6 here")
    port, host = result.stdout.split()
    assert (host, result.stderr) == ("[::1]", f"portexec: http://[::1]:{port}\n")


def test_several_listeners_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listeners = ("-l", "web=0", "-l", "0", "-l", "dns=udp:0", "-l", f"sock=unix:{path}")
    result = support.run(*listeners, "--", "sh", "-c", "echo $PORT $WEB_PORT $LISTENER2_PORT $DNS_PORT")
    port, web, second, dns = result.stdout.split()
    assert port == web
    assert result.stderr.splitlines() == [
        f"portexec: web http://127.0.0.1:{web}",
        f"portexec: listener2 http://127.0.0.1:{second}",
        f"portexec: dns udp://127.0.0.1:{dns}",
        f"portexec: sock unix:{path}",
    ]
    assert all(support.ANNOUNCED.match(line) for line in result.stderr.splitlines())


def test_json_announcement(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    words = ("--json", "-H", "fd", "-l", "web=0", "-l", f"unix:{path}", "--", "sh", "-c", "echo $PORT $$")
    result = support.run(*words)
    port, pid = result.stdout.split()
    assert result.stderr.endswith("}\n")
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stderr) == {
        "pid": int(pid),
        "hand_off": "fd",
        "listeners": [
            {"name": "web", "url": f"http://127.0.0.1:{port}", "host": "127.0.0.1", "port": int(port), "fd": 3},
            {"name": "listener2", "url": f"unix:{path}", "path": path, "fd": 4},
        ],
    }


def test_json_announcement_without_descriptors() -> None:
    told = json.loads(support.run("--json", "-H", "hold", "--", "true").stderr)
    assert told["hand_off"] == "hold"
    assert [set(listener) for listener in told["listeners"]] == [{"name", "url", "host", "port"}]


@pytest.mark.parametrize("words", [["-q"], ["--quiet"], ["-q", "--json"]])
def test_quiet(words: list[str]) -> None:
    result = support.run(*words, "--", "sh", "-c", "echo out; echo err >&2")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_verbose_says_what_was_chosen_and_why() -> None:
    result = support.run("-v", "--", "sh", "-c", "echo $PORT # --fd 3")
    lines = result.stderr.splitlines()
    assert lines[0] == "portexec: hand-off fd: the command names the descriptor (--fd 3)"
    assert f"portexec: guarding port {result.stdout.strip()} on every address" in lines
    assert lines[-1] == f"portexec: http://127.0.0.1:{result.stdout.strip()}"


# The port file


def test_port_file_is_there_before_the_command_starts(directory: Path) -> None:
    path = directory / "web.port"
    result = run_fd("--port-file", str(path), "--", "sh", "-c", f"cat {path}; echo $PORT")
    from_file, from_environment = result.stdout.splitlines()
    assert from_file == from_environment
    assert path.read_text() == f"{from_environment}\n"
    assert names_in(directory) == ["web.port"]


def test_port_file_has_the_first_listeners_number(directory: Path) -> None:
    path = directory / "p"
    result = run_fd("-l", "a=0", "-l", "b=0", f"--port-file={path}", "--", "sh", "-c", "echo $A_PORT")
    assert path.read_text() == result.stdout


def test_port_file_in_the_working_directory(directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(support.ROOT)}
    result = run_fd("--port-file", "p", "--", "cat", "p", cwd=directory, env=environment)
    assert result.stdout.strip().isdigit()
    assert names_in(directory) == ["p"]


def test_port_file_with_the_longest_name(directory: Path) -> None:
    path = directory / ("x" * 255)
    assert run_fd("--port-file", str(path), "--", "true").returncode == 0
    assert names_in(directory) == [path.name]


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("option", ["--port-file", "--export"])
def test_mode_of_a_file(option: str, umask: int, mode: int, directory: Path) -> None:
    path = directory / "p"
    result = run_under(
        "/bin/sh", "-c", f'umask {umask:o}; exec "$@"', "sh", words=["-H", "fd", option, str(path), "--", "true"]
    )
    assert result.returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_port_file_replaces_a_regular_file(directory: Path) -> None:
    """By another file: who has the old one open, or a second name for it, keeps what was in it."""
    path, second_name = directory / "p", directory / "kept"
    path.write_text("a longer text than a number\n")
    os.link(path, second_name)
    result = run_fd("--port-file", str(path), "--", "sh", "-c", "echo $PORT")
    assert path.read_text() == result.stdout
    assert second_name.read_text() == "a longer text than a number\n"
    assert names_in(directory) == ["kept", "p"]


@pytest.mark.root
def test_export_appends_to_no_strangers_file_where_anybody_may_put_one(directory: Path) -> None:
    """In a directory such as /tmp. Where only its owner may, as a runner's in a container, the file may be the owner's."""
    path = directory / "env"
    for owner, mode, status in ((support.STRANGER, 0o755, 0), (support.STRANGER, 0o1777, 125), (os.geteuid(), 0o1777, 0)):
        path.write_text("A=1\n")
        os.chown(path, owner, owner)
        path.chmod(0o666)
        directory.chmod(mode)
        foreseen = run_fd("-n", "--export", str(path), "--", "true")
        assert (foreseen.returncode, path.read_text()) == (status, "A=1\n")
        result = run_fd("--export", str(path), "--", "true")
        assert (result.returncode, "PORT=" in path.read_text()) == (status, not status)
        if status:
            hint = "remove it, or choose a directory that only you may write to"
            assert f"export file {path}: somebody else may have put it there\nportexec: hint: {hint}\n" in result.stderr
            assert foreseen.stderr == result.stderr


@pytest.mark.root
def test_port_file_replaces_no_strangers_file_where_strangers_may_put_one(directory: Path) -> None:
    path = directory / "p"
    path.write_text("theirs\n")
    os.chown(path, support.STRANGER, support.STRANGER)
    assert run_fd("--port-file", str(path), "--", "true").returncode == 0  # the directory is ours alone
    os.chown(path, support.STRANGER, support.STRANGER)
    directory.chmod(0o777)  # without the sticky bit, so that no setting of the kernel's protects us
    before = path.read_text()
    result = run_fd("--port-file", str(path), "--", "true")
    assert (result.returncode, path.read_text(), names_in(directory)) == (125, before, ["p"])
    hint = "remove it, or choose a directory that only you may write to"
    assert f"port file {path}: somebody else may have put it there\nportexec: hint: {hint}\n" in result.stderr


def test_port_file_is_never_seen_unfinished(directory: Path) -> None:
    """Read it over and over while launches replace it."""
    path = directory / "p"
    path.write_text("0\n")
    seen = {path.read_text()}
    while len(seen) < 4:  # all launches may end before we come to read
        launches = [start("-q", "-H", "fd", "--port-file", str(path), "--", "true") for _ in range(12)]
        while any(launch.poll() is None for launch in launches):
            seen.add(path.read_text())
        for launch in launches:
            assert (launch.communicate(timeout=support.DEADLINE), launch.returncode) == (("", ""), 0)
        seen.add(path.read_text())
    assert [text for text in seen if not re.fullmatch(r"\d+\n", text)] == []
    assert names_in(directory) == ["p"]


def refused(result: subprocess.CompletedProcess[str], message: str, hint: str = "") -> None:
    """Hold that portexec failed with exactly this."""
    expected = f"portexec: error: {message}\n" + (f"portexec: hint: {hint}\n" if hint else "")
    assert (result.returncode, result.stdout, result.stderr) == (125, "", expected)


@pytest.mark.parametrize("option", ["--port-file", "--export"])
@pytest.mark.parametrize("target", ["file", "missing"])
def test_a_planted_link_is_not_followed(option: str, target: str, directory: Path) -> None:
    (directory / "file").write_text("precious\n")
    link = directory / "link"
    link.symlink_to(target)
    result = run_fd(option, str(link), "--", "touch", str(directory / "started"))
    assert result.returncode == 125
    assert result.stderr.startswith(
        f"portexec: error: cannot write {option[2:].replace('-', ' ').replace('export', 'export file')} "
    )
    assert (directory / "file").read_text() == "precious\n"
    assert link.is_symlink()
    assert names_in(directory) == ["file", "link"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device"])
@pytest.mark.parametrize("option", ["--port-file", "--export"])
def test_what_is_no_regular_file_is_refused(kind: str, option: str, directory: Path) -> None:
    where = make_special(kind, directory / "p")
    before = [os.lstat(where).st_mode, names_in(directory)]
    result = run_fd(option, where, "--", "touch", str(directory / "started"))
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: cannot write {WHAT[option]} {where}: ")
    assert "portexec: hint: name a file" in result.stderr
    assert [os.lstat(where).st_mode, names_in(directory)] == before


def make_special(kind: str, path: Path) -> str:
    """Make something that is no regular file, or name a device that the system has."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        return "/dev/null"
    return str(path)


@pytest.mark.parametrize("option", ["--port-file", "--export"])
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_no_place_for_a_file(option: str, path: str) -> None:
    result = run_fd(option, path, "--", "echo", "started")
    assert (result.returncode, result.stdout) == (125, "")
    assert f" {path}: " in result.stderr
    assert "name a file" in result.stderr or "name the file itself" in result.stderr


@pytest.mark.parametrize(("option", "what"), WHAT.items())
@pytest.mark.parametrize(
    ("name", "why", "hint"),
    [
        ("missing/p", "No such file or directory", "the directory has to exist"),
        ("file/p", "Not a directory", ""),
    ],
)
def test_directory_that_is_none(option: str, what: str, name: str, why: str, hint: str, directory: Path) -> None:
    (directory / "file").write_text("")
    path = directory / name
    result = run_fd(option, str(path), "--", "touch", str(directory / "started"))
    refused(result, f"cannot write {what} {path}: {why}", hint)
    assert names_in(directory) == ["file"]


@pytest.mark.parametrize(("option", "what"), WHAT.items())
def test_directory_that_cannot_be_written(option: str, what: str, directory: Path) -> None:
    path = directory / "p"
    directory.chmod(0o555)
    result = without_rights("-H", "fd", option, str(path), "--", "touch", str(directory / "started"))
    refused(result, f"cannot write {what} {path}: Permission denied", "choose a directory that you may write to")
    assert names_in(directory) == []


def test_unix_listener_has_no_number_for_the_port_file(directory: Path) -> None:
    result = support.run("-l", f"unix:{directory}/s", "-l", "0", "--port-file", str(directory / "p"), "--", "true")
    message = "--port-file: the first listener is a unix socket and has no number"
    refused(result, message, "list a TCP listener first")
    assert names_in(directory) == []


# The export file


def test_export_appends_lines(directory: Path) -> None:
    path = directory / "env"
    path.write_text("A=1\n")
    words = ("-l", "api=0", "-l", "my-web=0", "--export", str(path), "--", "sh", "-c")
    result = support.run(*words, f"cat {path}; echo $PORT $MY_WEB_PORT")
    *lines, numbers = result.stdout.splitlines()
    port, web = numbers.split()
    assert lines == ["A=1", f"PORT={port}", f"API_PORT={port}", f"MY_WEB_PORT={web}"]
    assert path.read_text().splitlines() == lines


def test_export_makes_the_file(directory: Path) -> None:
    path = directory / "env"
    result = run_fd("--export", str(path), "--", "sh", "-c", "echo PORT=$PORT")
    assert path.read_text() == result.stdout
    assert names_in(directory) == ["env"]


@pytest.mark.parametrize(("before", "between"), [("A=1", "\n"), ("A=1\n", ""), ("", ""), ("\n", "")])
def test_export_adds_a_newline_that_is_missing(before: str, between: str, directory: Path) -> None:
    path = directory / "env"
    path.write_text(before)
    result = support.run("--export", str(path), "--", "sh", "-c", "echo PORT=$PORT")
    assert path.read_text() == before + between + result.stdout


def test_export_is_read_back_as_an_env_file(directory: Path) -> None:
    path = directory / "env"
    first = run_fd("-l", "api=0", "--export", str(path), "--", "sh", "-c", "echo $API_PORT")
    second = run_fd("-l", "other=0", "--env-file", str(path), "--", "sh", "-c", "echo $API_PORT")
    assert second.stdout == first.stdout


def test_exports_of_many_launches_do_not_mix(directory: Path) -> None:
    path = directory / "env"
    path.write_text("A=1")
    words = ("-q", "-l", "a=0", "-l", "b=0", "--export", str(path), "--", "sh", "-c", "echo $A_PORT $B_PORT")
    launches = [start(*words) for _ in range(20)]
    expected = set()
    for launch in launches:
        output, errors = launch.communicate(timeout=support.DEADLINE)
        assert (launch.returncode, errors) == (0, "")
        first, second = output.split()
        expected.add((f"PORT={first}", f"A_PORT={first}", f"B_PORT={second}"))
    head, *lines = filter(None, path.read_text().split("\n"))
    assert head == "A=1"
    assert {tuple(lines[at : at + 3]) for at in range(0, len(lines), 3)} == expected
    assert len(lines) == 60


@pytest.mark.parametrize("option", ["--port-file", "--export"])
@pytest.mark.parametrize("hand_off", ["fd", "guard"])
def test_a_reader_with_a_lock_is_in_nobodys_way(option: str, hand_off: str, directory: Path) -> None:
    """Whoever may read a file can lock it, in both ways that there are; neither the launch nor the withdrawal waits."""
    path = directory / "p"
    path.write_text("A=1\n")
    with open(path) as reader:
        fcntl.flock(reader, fcntl.LOCK_EX)
        fcntl.lockf(reader, fcntl.LOCK_SH)
        result = support.run("-q", "-H", hand_off, option, str(path), "--", "echo", "started")
    assert (result.returncode, result.stdout, result.stderr) == (0, "started\n", "")


def test_a_reader_that_locks_what_was_made_is_in_nobodys_way(directory: Path) -> None:
    """While the server runs."""
    words = ["--port-file", str(directory / "p"), "--export", str(directory / "env")]
    with support.running("-H", "guard", *words, "--", "sh", "-c", "read line", stdin=subprocess.PIPE) as started:
        started.url()
        with open(directory / "p") as port_file, open(directory / "env") as export:
            for reader in (port_file, export):
                fcntl.flock(reader, fcntl.LOCK_EX)
                fcntl.lockf(reader, fcntl.LOCK_SH)
            support.tell(started.process, "end")
            assert started.process.wait(support.DEADLINE) == 0
    assert names_in(directory) == []


def test_launches_that_append_and_withdraw_at_once_lose_no_line_of_each_other(directory: Path) -> None:
    """Some stay and withdraw their lines when they are alone in the file; what the others have written stays whole."""
    path = directory / "env"
    rounds = 6
    for _ in range(rounds):
        path.unlink(missing_ok=True)
        parents = [start("-q", "-H", "guard", "--export", str(path), "--", "true") for _ in range(4)]
        launches = [run_later(path) for _ in range(8)]
        expected = {f"PORT={launch.communicate(timeout=support.DEADLINE)[0].strip()}" for launch in launches}
        for parent in parents:
            assert parent.communicate(timeout=support.DEADLINE) == ("", "")
        assert expected <= set(path.read_text().splitlines())
        assert [line for line in path.read_text().splitlines() if not re.fullmatch(r"PORT=\d+", line)] == []
        # A file that was renamed to be withdrawn, and has more lines, stays where another launch has made a new one meanwhile.
        assert {name for name in names_in(directory) if not name.startswith(".env.")} == {"env"}


def run_later(path: Path) -> subprocess.Popen[str]:
    return start("-q", "-H", "fd", "--export", str(path), "--", "sh", "-c", "echo $PORT")


# Both or neither


def test_both_files(directory: Path) -> None:
    port_file, export = directory / "p", directory / "env"
    result = run_fd("--port-file", str(port_file), "--export", str(export), "--", "sh", "-c", "echo $PORT")
    assert port_file.read_text() == result.stdout
    assert export.read_text() == f"PORT={result.stdout}"
    assert names_in(directory) == ["env", "p"]


@pytest.mark.parametrize("end", ["exit 3", "kill -KILL $$"])
def test_both_files_are_withdrawn_by_a_parent(end: str, directory: Path) -> None:
    words = ["--port-file", str(directory / "p"), "--export", str(directory / "env")]
    result = support.run("-H", "guard", *words, "--", "sh", "-c", f"cat {directory}/p {directory}/env; {end}")
    number, variable = result.stdout.splitlines()
    assert variable == f"PORT={number}"
    assert names_in(directory) == []


def test_what_a_parent_withdraws_is_its_own(directory: Path) -> None:
    (directory / "env").write_text("A=1\n")
    words = ["--port-file", str(directory / "p"), "--export", str(directory / "env")]
    support.run("-H", "guard", *words, "--", "sh", "-c", f"echo 1 >{directory}/p")
    assert (directory / "p").read_text() == "1\n"
    assert (directory / "env").read_text().startswith("A=1\nPORT=")


def test_nothing_is_withdrawn_while_a_daemon_serves(directory: Path) -> None:
    script = "exec 9<&0; (read line <&9) >/dev/null 2>&1 &"
    with support.running(
        "-H", "guard", "--port-file", str(directory / "p"), "--", "sh", "-c", script, stdin=subprocess.PIPE
    ) as started:
        assert started.process.wait(support.DEADLINE) == 0
        assert names_in(directory) == ["p"]


@pytest.mark.parametrize("bad", ["--port-file", "--export"])
def test_neither_file_when_one_cannot_be_written(bad: str, directory: Path) -> None:
    (directory / "p").write_text("1\n")
    (directory / "env").write_text("A=1\n")
    paths = {"--port-file": directory / "p", "--export": directory / "env"} | {bad: directory / "missing" / "x"}
    words = [word for option, path in paths.items() for word in (option, str(path))]
    result = run_fd(*words, "--", "touch", str(directory / "started"))
    assert result.returncode == 125
    assert [(directory / name).read_text() for name in names_in(directory)] == ["A=1\n", "1\n"]
    assert names_in(directory) == ["env", "p"]


@pytest.mark.root  # makes a file of another user
def test_neither_file_when_the_port_file_is_somebody_elses(directory: Path) -> None:
    """In a directory such as /tmp, by somebody who could not rename over it either."""
    sticky, export = directory / "sticky", directory / "env"
    sticky.mkdir()
    theirs = sticky / "p"
    theirs.write_text("theirs\n")
    export.write_text("A=1\n")
    for path in (theirs, sticky):
        os.chown(path, support.STRANGER, support.STRANGER)
    sticky.chmod(0o1777)
    result = without_rights(
        "-H", "fd", "--port-file", str(theirs), "--export", str(export), "--", "touch", str(directory / "started")
    )
    hint = "remove it, or choose a directory that only you may write to"
    refused(result, f"cannot write port file {theirs}: somebody else may have put it there", hint)
    assert theirs.read_text() == "theirs\n"
    assert names_in(sticky) == ["p"]
    assert export.read_text() == "A=1\n"
    assert not (directory / "started").exists()


@pytest.mark.parametrize(
    ("option", "limit", "before"), [("--port-file", 1, ""), ("--port-file", 1, "1\n"), ("--export", 6, "A=1\n")]
)
def test_no_file_is_half_written(option: str, limit: int, before: str, directory: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel writes what fits, and says how much that was."""
    path = directory / "p"
    path.write_text(before)
    words = ["-q", "-H", "fd", option, str(path), "--", "touch", str(directory / "started")]
    result = run_under(*support.child("limited"), "FSIZE", str(limit), words=words)
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: cannot write {WHAT[option]} {path}: ")
    assert names_in(directory) == ["p"]
    assert path.read_text() == before


@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
def test_no_process_is_left_when_a_file_cannot_be_written(hand_off: str, directory: Path) -> None:
    """With hand-off guard a child waits already. It would keep stderr open, too, so that goes to a file."""
    words = ["-H", hand_off, "--port-file", str(directory / "missing" / "p"), "--", "touch", str(directory / "started")]
    with open(directory / "errors", "w") as errors:
        process = subprocess.Popen([*support.PORTEXEC, *words], stderr=errors, start_new_session=True)
    try:
        assert process.wait(support.DEADLINE) == 125
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        support.kill_group(process.pid)
    assert names_in(directory) == ["errors"]


# --dry-run


def everything(directory: Path) -> Iterator[str]:
    for option, name in (("--port-file", "p"), ("--export", "env")):
        yield option
        yield str(directory / name)
    for spec in ("api=0", f"sock=unix:{directory}/s"):
        yield "-l"
        yield spec


def test_dry_run_prints_the_plan_and_leaves_nothing(directory: Path) -> None:
    started = str(directory / "started")
    result = support.run("-n", *everything(directory), "-e", "X=a secret", "--", "touch", started, "{sock.fd} {port}")
    assert (result.returncode, result.stderr) == (0, "")
    assert names_in(directory) == []
    found = URL.search(result.stdout)
    assert found
    rows = [tuple(line.split(None, 1)) for line in result.stdout.splitlines()]
    assert ("hand-off", "fd (the command names the descriptor ({fd}))") in rows
    assert ("listener", f"api  {found[0]}  descriptor 3") in rows
    assert ("listener", f"sock  unix:{directory}/s  descriptor 4") in rows
    assert ("guard", f"port {found[1]}, on every address") in rows
    assert ("set", f"API_PORT={found[1]}") in rows
    assert ("set", f"PORT={found[1]}") in rows
    assert any(name == "run" and text.endswith(f"touch {started} '4 {found[1]}'") for name, text in rows)
    assert "secret" not in result.stdout


def test_dry_run_of_socket_activation() -> None:
    rows = support.run("-n", "-H", "fd", "--", "true").stdout
    assert "set       LISTEN_FDS=1\n" in rows
    assert "set       LISTEN_PID, to the command's pid\n" in rows
    assert "LISTEN_PID" not in support.run("-n", "-H", "fd", "--no-pid", "--", "true").stdout


def test_dry_run_as_json(directory: Path) -> None:
    result = support.run("--dry-run", "--json", *everything(directory), "--", "echo", "{port}", "{a}")
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    plan = json.loads(result.stdout)
    port = plan["listeners"][0]["port"]
    path = f"{directory}/s"
    assert plan["listeners"] == [
        {"name": "api", "url": f"http://127.0.0.1:{port}", "host": "127.0.0.1", "port": port, "fd": 3},
        {"name": "sock", "url": f"unix:{path}", "path": path, "fd": 4},
    ]
    assert (plan["hand_off"], plan["guards"], plan["argv"]) == ("fd", [port], ["echo", str(port), "{a}"])
    assert plan["why"] == f"unix:{path} can only be handed over as a descriptor"
    listen = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "api:sock"}
    assert plan["environment"] == {"PORT": str(port), "API_PORT": str(port)} | listen
    assert os.path.basename(plan["file"]) == "echo"
    assert names_in(directory) == []


def rows_of(*words: str) -> list[tuple[str, str]]:
    result = support.run("-n", *words)
    assert (result.returncode, result.stderr) == (0, "")
    return [(line[:10].rstrip(), line[10:]) for line in result.stdout.splitlines()]


LIFETIME_ROWS = [
    ([], []),
    (["--then", "curl {url}"], ["ready accept, within 60 s", "then sh -c 'curl URL'"]),
    (["--ready", "http:/up", "--ready-timeout", "500ms"], ["ready http:/up, within 0.5 s"]),
    (["--restart", "always", "--log", "web.log"], ["ready accept", "restart always", "log web.log, stdout and stderr"]),
    (["--lazy"], ["ready none", "lazy starts at the first connection"]),
    (["--ready-fd", "1", "--ready", "none"], ["ready none, within 60 s", "tell descriptor 1, when ready"]),
]


@pytest.mark.parametrize(("asked", "expected"), LIFETIME_ROWS)
def test_dry_run_shows_what_was_asked_for_under_lifetime(asked: list[str], expected: list[str]) -> None:
    rows = [f"{name} {URL.sub('URL', text)}" for name, text in rows_of("-H", "fd", *asked, "--", "true")]
    end = ["stop TERM, and KILL 5 s later, to all that it has started"] if asked else []
    at = next(number for number, row in enumerate(rows) if row.startswith("run "))
    assert rows[at + 1 : -1] == expected + end


def test_dry_run_has_a_row_for_each_option_under_lifetime() -> None:
    """That none is forgotten which comes later."""
    words = ["--then", "x", "--ready", "none", "--ready-timeout", "1s", "--ready-fd", "1", "--restart", "always", "--lazy"]
    words += ["--log", "x", "--kill-after", "1s", "-H", "fd"]
    group = next(group for title, group in options.GROUPS if title == options.LIFETIME)
    assert {option.long for option in group} == {word for word in words if word.startswith("--")} | {"--control-fd"}
    planned = json.loads(support.run("-n", "--json", *words, "--", "true").stdout)["lifetime"]
    assert planned == {
        "ready": "none",
        "ready_timeout": 1,
        "then": "x",
        "ready_fd": 1,
        "control_fd": None,
        "restart": "always",
        "lazy": True,
        "log": "x",
        "kill_after": 1,
    }


@pytest.mark.parametrize(
    ("spec", "opened"),
    [
        ("127.0.0.1:0", []),
        ("localhost:0", []),
        ("0.0.0.0:0", ["listener1: every IPv4 address of this machine, so that other machines can connect"]),
        ("web=*:0", ["web: every IPv4 and IPv6 address of this machine, so that other machines can connect"]),
    ],
)
def test_dry_run_shows_what_a_wildcard_opens(spec: str, opened: list[str]) -> None:
    assert [text for name, text in rows_of("-l", spec, "-H", "fd", "--", "true") if name == "opens"] == opened
    others = [text for name, text in rows_of("-l", spec, "-H", "guard", "--", "true") if name == "opens"]
    assert len(others) == len(opened)
    assert all("what the command binds" in text for text in others)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--", "a-command-that-is-missing"], 127, "command not found: a-command-that-is-missing"),
        (["--", "/"], 126, "cannot run /: Is a directory"),
        (["--", "echo", "{web.port}"], 125, "{web.port} names no listener of this run"),
    ],
)
def test_dry_run_finds_what_a_run_would(words: list[str], status: int, message: str) -> None:
    result = support.run("-n", *words)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.splitlines()[0] == f"portexec: error: {message}"


def test_dry_run_of_a_taken_port(directory: Path) -> None:
    with subprocess.Popen(support.child("listening"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        result = support.run("-n", "-l", port, "--", sys.executable, "-V")
        server.communicate(timeout=support.DEADLINE)
    assert result.returncode == 125
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
