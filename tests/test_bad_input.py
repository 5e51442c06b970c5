"""What portexec says and does when something is wrong: the message, the hint, the status, and that nothing was started."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import portexec
from portexec.binding import tables
from portexec.binding.refusals import cannot_resolve
from portexec.binding.spec import parse_listen
from tests import support

Result = subprocess.CompletedProcess[str]

USAGE_HINT = "it comes last: portexec [OPTION]... [--] COMMAND [ARG]...; see portexec --help"
FORMS_HINT = "a spec is ADDRESS, ADDRESS:PORTS, PORTS, unix:PATH or udp:[ADDRESS:]PORTS; see portexec --help"
PORTS_HINT = "ports are numbers, ranges and lists: 8000 or 8000-8099 or 3000,0; or stable"
NAME_HINT = "a name has no spaces, and its first character is no digit"
ENV_HINT = "write --env NAME=VALUE, where VALUE may have templates: {port}"


def run_without_rights(*words: str) -> Result:
    result = support.run(*words, prefix=support.child("without_rights"))
    if result.stderr.startswith("cannot drop"):
        pytest.skip(result.stderr.strip())
    return result


def run_limited(limit: int, *words: str) -> Result:
    """Run portexec with so many descriptors and no more."""
    return support.run(*words, prefix=[*support.child("limited"), "NOFILE", str(limit)])


def said(message: str, hint: str = "") -> str:
    """What stderr is to be."""
    return f"portexec: error: {message}\n" + (f"portexec: hint: {hint}\n" if hint else "")


def assert_nothing_happened(result: Result, directory: Path, before: Sequence[str] = ()) -> None:
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(os.listdir(directory)) == sorted(before)


# Words that portexec itself refuses: before the command, message, hint
REFUSED = [
    (["--lissten", "8000"], "unknown option --lissten", "did you mean --listen?"),
    (["-z"], "unknown option -z", "portexec --help lists the options"),
    (["--quiet=yes"], "option --quiet takes no value", "write --quiet alone"),
    (["-l", ""], "malformed listen spec ''", FORMS_HINT),
    (["-l", "::1"], "malformed listen spec '::1'", "an IPv6 address goes in brackets: [::1]"),
    (["-l", "-1"], "malformed listen spec '-1'", FORMS_HINT),
    (["-l", "localhost:http"], "malformed port 'http' in listen spec 'localhost:http'", PORTS_HINT),
    (["-l", "8000,"], "malformed port '' in listen spec '8000,'", PORTS_HINT),
    (["-l", "99999"], "port 99999 in '99999' is too high", "the highest is 65535"),
    (["-l", "9000-8000"], "reversed port range 9000-8000 in '9000-8000'", "write 8000-9000"),
    (["-l", "=0"], "empty listener name in '=0'", "write NAME=SPEC, or the spec alone"),
    (["-l", "a=0", "-l", "a=0"], "the listener name 'a' is used twice", "every listener has a name of its own"),
    (["-l", "a-b=0", "-l", "a_b=0"], "the names 'a-b' and 'a_b' would both be A_B_PORT", "rename one of them"),
    (["-l", "unix:"], "no path in listen spec 'unix:'", "write unix:PATH, or unix:@NAME for an abstract one"),
    (
        ["-l", "unix:/nonexistent/s"],
        "cannot listen on unix:/nonexistent/s: No such file or directory",
        "the directory has to exist",
    ),
    (["-e", "FOO"], "--env 'FOO' sets nothing", ENV_HINT),
    (["-e", "=x"], "--env '=x' sets nothing", ENV_HINT),
    (["-e", "1A=x"], "--env '1A' is no name of a variable", NAME_HINT),
    (["-e", "A =x"], "--env 'A ' is no name of a variable", NAME_HINT),
    (["-e", "A={web.port}"], "{web.port} names no listener of this run", "the listeners are: listener1"),
    (
        ["-l", "api=0", "-l", "0", "-e", "A={web.port}"],
        "{web.port} names no listener of this run",
        "the listeners are: api, listener2",
    ),
    (
        ["-H", "hold", "-e", "A={fd}"],
        "{fd} is only known with hand-off fd",
        "leave --hand-off out, or say --hand-off fd, or use {port}",
    ),
    (
        ["-H", "hold", "--no-pid"],
        "--no-pid needs hand-off fd, and this is hold: as asked for",
        "leave one of the two out",
    ),
    (["--remap", "0"], "--remap '0' names no port", "write --remap PORT or --remap PORT=NAME"),
    (["--remap", "80=db"], "--remap 80=db: there is no listener 'db'", "the listeners are: listener1"),
    (["-k", "soon"], "--kill-after 'soon' is no duration", "write a number and a unit: 500ms, 5s, 2m"),
    (
        ["-H", "hold", "-l", "udp:0"],
        "hand-off hold is for TCP ports, and udp:127.0.0.1:0 is none",
        "leave --hand-off out, or say --hand-off fd",
    ),
    (
        ["-l", "192.0.2.1"],
        "cannot listen on 192.0.2.1:0: Cannot assign requested address",
        "this machine does not have that address; `ip address` shows those it has",
    ),
]


@pytest.mark.parametrize(
    ("words", "message", "hint"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_refused(words: list[str], message: str, hint: str, tmp_path: Path) -> None:
    result = support.run("--port-file", str(tmp_path / "p"), *words, "--", "touch", str(tmp_path / "started"))
    assert (result.returncode, result.stderr) == (125, said(message, hint))
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize(
    ("words", "message", "hint"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_words_of_a_message(words: list[str], message: str, hint: str) -> None:
    """Lower case and no full stop, so that it reads as one line of a log."""
    for text in (message, hint):
        assert text[0] == text[0].lower()
        assert not text.endswith(".")


@pytest.mark.parametrize("option", ["-b", "--backlog", "--first-fd"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "99999999999999"])
def test_number_that_is_none(option: str, value: str, tmp_path: Path) -> None:
    result = support.run(option, value, "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert f" {value!r} is not a number from 0 to " in result.stderr
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("value", ["fdd", "FD", ""])
def test_hand_off_that_is_unknown(value: str, tmp_path: Path) -> None:
    """What was asked for by name and cannot be had is an error, never something else in silence."""
    result = support.run("-H", value, "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert result.stderr.startswith("portexec: error: ")
    assert repr(value) in result.stderr.splitlines()[0]
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("words", [[], ["--"], ["-q"], ["-l", "0", "--"], ["-n"]])
def test_no_command(words: list[str]) -> None:
    result = support.run(*words)
    assert (result.returncode, result.stdout, result.stderr) == (125, "", said("no command to run", USAGE_HINT))


@pytest.mark.parametrize("option", ["-l", "--env-file", "--port-file"])
def test_option_without_its_value(option: str) -> None:
    result = support.run(option)
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: option {option} needs a value\nportexec: hint: write {option} ")


@pytest.mark.parametrize(
    ("word", "message"),
    [("{web.port}", "{web.port} names no listener of this run"), ("{{web.fd}}", "{web.fd} names no listener of this run")],
)
def test_template_in_the_command_without_a_value(word: str, message: str, tmp_path: Path) -> None:
    result = support.run("-H", "fd", "--", "touch", str(tmp_path / "started"), word)
    assert (result.returncode, result.stderr) == (125, said(message, "the listeners are: listener1"))
    assert_nothing_happened(result, tmp_path)


def test_descriptor_with_hand_off_hold(tmp_path: Path) -> None:
    result = support.run("-H", "hold", "--", "touch", str(tmp_path / "started"), "{fd}")
    hint = "leave --hand-off out, or say --hand-off fd, or use {port}"
    assert (result.returncode, result.stderr) == (125, said("{fd} is only known with hand-off fd", hint))
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("words", [['{"a": 1}', "{foo}", "{print $1}"], ["{PORT}", "${HOME:-x}", "{}"]])
def test_braces_that_mean_nothing_to_us(words: list[str]) -> None:
    result = support.run("-q", "--", "printf", "%s\n", *words)
    assert (result.returncode, result.stdout.splitlines()) == (0, words)


LONG = "x" * 64


# Looked up without a question to a name server: a label has 63 characters at the most.
@pytest.mark.parametrize("name", ["ü" * 64, "a..b"])
def test_host_name_that_is_unknown(name: str, tmp_path: Path) -> None:
    result = support.run("-l", f"{name}:0", "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    first, second = result.stderr.splitlines()
    assert first.startswith(f"portexec: error: cannot resolve {name!r}: ")
    assert second == "portexec: hint: give an address of this machine, such as 127.0.0.1, [::1] or *"
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("stabel", "did you mean stable?"),
        ("stable1", "did you mean stable?"),
        (f"{LONG}:0", f"a name is written {LONG}=0; an address is such as 127.0.0.1, [::1] or *"),
        (f"{LONG}:3000,0", f"a name is written {LONG}=3000,0; an address is such as 127.0.0.1, [::1] or *"),
        (f"udp:{LONG}:0", f"a name is written {LONG}=udp:0; an address is such as 127.0.0.1, [::1] or *"),
        (f"{LONG}", f"a name is written {LONG}=0; an address is such as 127.0.0.1, [::1] or *"),
    ],
    ids=["slip", "one more", "name", "name and numbers", "udp", "word"],
)
def test_a_word_that_is_no_address_may_be_something_else(spec: str, hint: str) -> None:
    (parsed,) = parse_listen([spec])
    assert cannot_resolve(parsed, "Name or service not known").hint == hint


def test_a_name_before_a_colon_is_told_so() -> None:
    result = support.run("-l", f"{LONG}:0", "--", "true")
    assert result.returncode == 125
    assert f"hint: a name is written {LONG}=0; " in result.stderr


# Numbers that cannot be had


def test_port_that_needs_a_right(tmp_path: Path) -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every user may bind every port here")
    port = lowest - 1
    result = run_without_rights("-l", str(port), "--", "touch", str(tmp_path / "started"))
    hint = "ports below net.ipv4.ip_unprivileged_port_start, mostly 1024, need root or CAP_NET_BIND_SERVICE"
    assert (result.returncode, result.stderr) == (125, said(f"cannot listen on 127.0.0.1:{port}: Permission denied", hint))
    assert_nothing_happened(result, tmp_path)


def test_a_port_that_needs_a_right_gives_way_to_the_next_candidate() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every user may bind every port here")
    result = run_without_rights("-q", "-l", f"{lowest - 1},0", "--", "sh", "-c", "echo $PORT")
    assert result.returncode == 0
    assert int(result.stdout) >= lowest


@contextmanager
def a_server(*address: str) -> Iterator[tuple[int, str, int]]:
    """The number, and how a message names the process that has it."""
    words = [*support.child("listening"), *address]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        name = Path(f"/proc/{server.pid}/comm").read_text().strip()
        yield port, f"pid {server.pid}, {name}", server.pid
        server.communicate(timeout=support.DEADLINE)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_port_in_use_names_who_has_it(address: str, hand_off: str, tmp_path: Path) -> None:
    port_file = str(tmp_path / "p")
    with a_server(address) as (port, owner, _):
        words = ("-H", hand_off, "-l", str(port), "--port-file", port_file)
        result = support.run(*words, "--", "touch", str(tmp_path / "started"))
    message = f"cannot listen on 127.0.0.1:{port}: Address already in use ({owner})"
    assert (result.returncode, result.stderr) == (125, said(message, f"`{port},0` takes any other free port instead"))
    assert_nothing_happened(result, tmp_path)


@pytest.mark.root  # has a process that portexec may not look at
def test_port_in_use_by_somebody_whom_proc_does_not_show() -> None:
    with a_server() as (port, _, _):
        result = run_without_rights("-l", str(port), "--", "true")
    owner = "a process that /proc does not show to you"
    message = f"cannot listen on 127.0.0.1:{port}: Address already in use ({owner})"
    assert result.stderr.splitlines()[0] == f"portexec: error: {message}"


@contextmanager
def a_guarded_number(hand_off: str) -> Iterator[tuple[int, str]]:
    """A number on which nobody listens, and the words of a message for who keeps it."""
    words = ["-H", hand_off, "--", "sh", "-c", "echo runs; sleep 1000; :", "a long word " * 9]
    with support.running(*words) as running:
        port = int(running.url().rpartition(":")[2])
        assert support.read_line(running.process) == "runs"  # portexec announces, and then becomes the command
        name = f"portexec {' '.join(words)}"[:60] + "..." if hand_off == "guard" else "sh"
        yield port, f"pid {running.process.pid}, {name}"


@pytest.mark.parametrize("hand_off", ["guard", "hold"])
def test_a_guarded_number_in_use_names_who_keeps_it(hand_off: str) -> None:
    need_bound_sockets()
    with a_guarded_number(hand_off) as (port, owner):
        result = support.run("-l", str(port), "--", "true")
    message = f"cannot listen on 127.0.0.1:{port}: Address already in use ({owner})"
    assert result.stderr.splitlines()[0] == f"portexec: error: {message}"


@pytest.mark.root
@pytest.mark.parametrize("hand_off", ["guard", "hold"])
def test_a_guarded_number_of_another_user(hand_off: str) -> None:
    need_bound_sockets()
    code = "import os, pwd, sys; from portexec.binding import tables; os.setgid({0}); os.setuid({0}); "
    code = code.format(support.STRANGER) + "print(tables.who_has(int(sys.argv[1])))"
    with a_guarded_number(hand_off) as (port, _):
        words = [sys.executable, "-c", code, str(port)]
        told = subprocess.run(words, cwd=support.ROOT, stdout=subprocess.PIPE, text=True, timeout=support.DEADLINE)
    assert told.stdout == f"a process of user {pwd.getpwuid(os.geteuid()).pw_name} that /proc does not show to you\n"


@pytest.mark.root  # has a process that portexec may not look at
def test_a_guarded_number_of_whom_proc_does_not_show() -> None:
    need_bound_sockets()
    with a_guarded_number("hold") as (port, _):
        result = run_without_rights("-l", str(port), "--", "true")
    owner = "a process that /proc does not show to you"
    message = f"cannot listen on 127.0.0.1:{port}: Address already in use ({owner})"
    assert result.stderr.splitlines()[0] == f"portexec: error: {message}"


def need_bound_sockets() -> None:
    """The kernel tells of sockets that are merely bound since Linux 6.8."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.2", 0))
        if not tables.who_has(bound.getsockname()[1]):
            pytest.skip("this kernel does not tell of sockets that are merely bound")


def test_udp_port_in_use(tmp_path: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        result = support.run("-l", f"udp:{port}", "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert result.stderr.startswith(f"portexec: error: cannot listen on udp:127.0.0.1:{port}: Address already in use")
    assert_nothing_happened(result, tmp_path)


def test_preferred_port_in_use() -> None:
    with a_server() as (port, _, _):
        result = support.run("-q", "-l", f"{port},0", "--", "sh", "-c", "echo $PORT")
    assert result.returncode == 0
    assert int(result.stdout) != port


@pytest.mark.parametrize("count", [2, 4, 6])
def test_every_candidate_is_taken(count: int, tmp_path: Path) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    with ExitStack() as stack:
        holders = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        ports = [holder.getsockname()[1] for holder in holders]
        spec = f"127.0.0.1:{','.join(str(port) for port in ports)}"
        result = support.run("-l", spec, "--", "touch", str(tmp_path / "started"))
    told = "; ".join(f"{port}: Address already in use (pid {os.getpid()}, {name})" for port in ports[:4])
    more = f"; and {count - 4} more" if count > 4 else ""
    hint = f"add `,0` for any other free port: {spec},0"
    assert (result.returncode, result.stderr) == (125, said(f"no free port for {spec}: {told}{more}", hint))
    assert_nothing_happened(result, tmp_path)


def test_one_of_two_listeners_cannot_be_had(tmp_path: Path) -> None:
    """The other one, and its file, are given back."""
    with a_server() as (port, _, _):
        words = ("-l", f"unix:{tmp_path}/s", "-l", str(port))
        result = support.run(*words, "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert_nothing_happened(result, tmp_path)


def test_unix_socket_in_use(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        result = support.run("-l", f"unix:{path}", "--", "touch", str(tmp_path / "started"))
    hint = "stop the server that has it, or choose another path"
    assert (result.returncode, result.stderr) == (125, said(f"cannot listen on unix:{path}: Address already in use", hint))
    assert_nothing_happened(result, tmp_path, ["s"])


def test_unix_path_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    result = support.run("-l", f"unix:{path}", "--", "touch", str(tmp_path / "started"))
    message = f"cannot listen on unix:{path}: there is a file that is no socket"
    assert (result.returncode, result.stderr) == (125, said(message, "choose another path"))
    assert path.read_text() == "precious"
    assert_nothing_happened(result, tmp_path, ["s"])


def test_ephemeral_range_is_exhausted(tmp_path: Path) -> None:
    """One portexec has the only number there is, and a second one inside it asks for any."""
    namespace = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    prefix = [*namespace, *support.child("small_range")]
    try:
        probe = subprocess.run([*prefix, "/bin/true"], capture_output=True, text=True, timeout=support.DEADLINE)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if probe.returncode:
        pytest.skip(f"no network namespace of our own: {probe.stderr.strip().splitlines()[-1]}")
    inner = [*support.PORTEXEC, "--port-file", str(tmp_path / "p"), "--", "touch", str(tmp_path / "started")]
    result = support.run("-q", "-H", "fd", "--", *inner, prefix=prefix)
    message = "no free port for 127.0.0.1:0: 0: none is left in the ephemeral range (40000-40000)"
    assert (result.returncode, result.stderr) == (125, said(message))
    assert_nothing_happened(result, tmp_path)


# Descriptors


@pytest.mark.parametrize("hand_off", ["fd", "hold"])
@pytest.mark.parametrize("limit", range(3, 12))
def test_few_descriptors(hand_off: str, limit: int, tmp_path: Path) -> None:
    """The command runs, or there is an error and nothing else."""
    program = ["-c", "import portexec.cli; portexec.cli.options.parse([])"]
    bare = [*support.child("limited"), "NOFILE", str(limit), support.PORTEXEC[0], *program]
    if subprocess.run(bare, capture_output=True, timeout=support.DEADLINE).returncode:
        pytest.skip("Python itself does not start")
    command = ("--port-file", str(tmp_path / "p"), "--", "/bin/sh", "-c", "echo started")
    result = run_limited(limit, "-q", "-H", hand_off, *command)
    if result.returncode == 0:
        assert (result.stdout, result.stderr) == ("started\n", "")
        return
    assert result.returncode == 125
    assert result.stderr.startswith("portexec: error: cannot ")
    assert_nothing_happened(result, tmp_path)


def test_descriptors_run_out(tmp_path: Path) -> None:
    listeners = ["-l0"] * 100
    words = [*listeners, "--port-file", str(tmp_path / "p"), "--", "touch", str(tmp_path / "started")]
    result = run_limited(100, *words)
    hint = "raise the limit with `ulimit -n`; every listener takes two descriptors"
    assert (result.returncode, result.stderr) == (125, said("cannot open another socket: Too many open files", hint))
    assert_nothing_happened(result, tmp_path)


def test_first_descriptor_beyond_the_limit(tmp_path: Path) -> None:
    port_file = str(tmp_path / "p")
    result = run_limited(100, "--first-fd", "200", "--port-file", port_file, "--", "touch", str(tmp_path / "started"))
    assert result.returncode == 125
    assert result.stderr.splitlines()[-1].startswith("portexec: hint: ")
    assert_nothing_happened(result, tmp_path)


# Commands that cannot be run


def script(directory: Path, text: str | bytes, mode: int = 0o755, name: str = "tool") -> str:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def env_status(*words: str) -> int:
    """What env says to the same command."""
    return subprocess.run(["env", *words], capture_output=True, timeout=support.DEADLINE).returncode


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("a-command-that-is-missing", "command not found: a-command-that-is-missing", "is it installed, and on the PATH?"),
        ("-", "command not found: -", "is it installed, and on the PATH?"),
        ("echo hello", "command not found: echo hello", "write it as separate words: portexec -- echo hello"),
        ("echo {fd} a", "command not found: echo 3 a", "write it as separate words: portexec -- echo {fd} a"),
        ("A={fd}", "command not found: A=3", "a variable is set with -e: portexec -e A={fd} -- ..."),
        ("cd", "command not found: cd", "cd is a word of the shell: portexec -- sh -c 'cd ...'"),
        ("source", "command not found: source", "source is a word of the shell: portexec -- sh -c 'source ...'"),
        ("PORT=3000", "command not found: PORT=3000", "a number is asked for with -l: portexec -l 3000 -- ..."),
        ("A=1", "command not found: A=1", "a variable is set with -e: portexec -e A=1 -- ..."),
        ("./a-file-that-is-missing", "cannot run ./a-file-that-is-missing: No such file or directory", "is the path right?"),
        ("/dev/null/x", "cannot run /dev/null/x: Not a directory", "is the path right?"),
    ],
)
def test_command_not_found(name: str, message: str, hint: str, tmp_path: Path) -> None:
    result = support.run("--port-file", str(tmp_path / "p"), "--", name)
    assert (result.returncode, result.stderr) == (127, said(message, hint))
    assert_nothing_happened(result, tmp_path)


def test_empty_command_word(tmp_path: Path) -> None:
    result = support.run("--port-file", str(tmp_path / "p"), "--", "", "x")
    assert (result.returncode, result.stderr.splitlines()[0]) == (127, "portexec: error: command not found: ''")
    assert_nothing_happened(result, tmp_path)


@pytest.mark.parametrize("name", ["not executable", "directory", "loop", "x" * 256])
def test_command_that_cannot_be_executed(name: str, tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\n", 0o644, "not executable")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = os.listdir(tmp_path)
    path = str(tmp_path / name)
    why, hint = {
        "not executable": ("Permission denied", f"make it executable: chmod +x {path}"),
        "directory": ("Is a directory", f"name a program in it: {path}/NAME"),
        "loop": ("Too many levels of symbolic links", ""),
    }.get(name, ("File name too long", ""))
    result = support.run("--port-file", str(tmp_path / "p"), "--", path)
    assert (result.returncode, result.stderr) == (126, said(f"cannot run {path}: {why}", hint))
    assert env_status(path) == 126
    assert_nothing_happened(result, tmp_path, before)


def test_command_on_the_path_that_is_not_executable(tmp_path: Path) -> None:
    path = script(tmp_path, "#!/bin/sh\n", 0o644)
    result = support.run("-e", f"PATH={tmp_path}", "--", "tool")
    expected = said(f"cannot run {path}: Permission denied", f"make it executable: chmod +x {path}")
    assert (result.returncode, result.stderr) == (126, expected)


# a file that the kernel refuses, and what is said of it
UNRUNNABLE: list[tuple[str | bytes, str, str]] = [
    (
        "#!/nonexistent/python3 -u\n",
        "its interpreter /nonexistent/python3 does not exist",
        "correct its first line, or install the interpreter",
    ),
    (
        "#! /nonexistent/x\n",
        "its interpreter /nonexistent/x does not exist",
        "correct its first line, or install the interpreter",
    ),
    ("#!/nonexistent/x", "its interpreter /nonexistent/x does not exist", "correct its first line, or install the interpreter"),
    (
        "#!\t/nonexistent/x\t-u\n",
        "its interpreter /nonexistent/x does not exist",
        "correct its first line, or install the interpreter",
    ),
    ("#!/bin/sh\r\ntrue\r\n", "its first line has a Windows line end", "convert it: sed -i 's/\\r$//' {}"),
    ("#!/\n", "Permission denied", ""),
]


@pytest.mark.parametrize(("text", "why", "hint"), UNRUNNABLE)
def test_interpreter_that_is_missing(text: str, why: str, hint: str, tmp_path: Path) -> None:
    path = script(tmp_path, text)
    result = support.run("-q", "--", path)
    assert (result.returncode, result.stdout, result.stderr) == (126, "", said(f"cannot run {path}: {why}", hint.format(path)))


def test_loader_that_is_missing(tmp_path: Path) -> None:
    """A program for another C library: the kernel says that it does not exist, though it is there."""
    program = bytearray(Path("/bin/true").resolve().read_bytes())
    at = program.find(b"/ld-")
    if at < 0:
        pytest.skip("/bin/true has no dynamic loader")
    program[at + 1 : at + 4] = b"no-"
    path = script(tmp_path, bytes(program))
    result = support.run("-q", "--", path)
    hint = "is it built for another system or C library?"
    assert (result.returncode, result.stderr) == (126, said(f"cannot run {path}: its dynamic loader is missing", hint))


def test_words_that_are_too_long(tmp_path: Path) -> None:
    """They are as long as can be before the templates are replaced, and longer after it."""
    longest = 32 * os.sysconf("SC_PAGE_SIZE") - 1  # MAX_ARG_STRLEN, execve(2)
    word = "x" * (longest - len("{url}")) + "{url}"
    result = support.run("-q", "--", "true", word)
    assert (result.returncode, result.stdout) == (126, "")
    assert result.stderr.startswith("portexec: error: cannot run ")
    assert result.stderr.splitlines()[0].endswith("/true: Argument list too long")


@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
@pytest.mark.parametrize("text", ["#!/nonexistent/x\n", "#!/bin/sh\r\n", "#!/\n"])
def test_no_file_is_left_when_the_kernel_refuses(text: str, hand_off: str, tmp_path: Path) -> None:
    """A port file that stayed would lead others to a server that never was."""
    path = script(tmp_path, text)
    unix = ("-l", f"unix:{tmp_path}/s") if hand_off == "fd" else ()
    result = support.run("-H", hand_off, "-l", "0", *unix, "--port-file", str(tmp_path / "p"), "--", path)
    if "hand-off guard cannot be had here" in result.stderr:
        pytest.skip("no hand-off guard here")
    assert result.returncode == 126
    assert_nothing_happened(result, tmp_path, ["tool"])


# Commands that can be run, though it takes a second look


@pytest.mark.parametrize(
    "text",
    ['echo "$0 $1 $#"\n', "exit 7\n", "", "\n# a comment\necho ok\n", "#!\necho x\n", '#!/bin/sh -eu\necho "$0 $1"\n'],
)
@pytest.mark.parametrize("by_path", [True, False])
def test_script_runs_as_under_env(text: str, by_path: bool, tmp_path: Path) -> None:
    path = script(tmp_path, text)
    path_variable = f"PATH={tmp_path}:{os.environ['PATH']}"
    command = [path if by_path else "tool", "one", "two words"]
    expected = subprocess.run(["env", path_variable, *command], capture_output=True, text=True, timeout=support.DEADLINE)
    result = support.run("-q", "-e", path_variable, "--", *command)
    assert (result.returncode, result.stdout) == (expected.returncode, expected.stdout)


def test_path_of_an_option_is_honoured(tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\necho ours\n", name="ls")
    assert support.run("-q", "-e", f"PATH={tmp_path}:/bin:/usr/bin", "--", "ls").stdout == "ours\n"
    assert support.run("-e", f"PATH={tmp_path}", "--", "cat").returncode == 127


@pytest.mark.parametrize("path", ["", ":", "/nonexistent:", ":/nonexistent", ".", "/nonexistent::/bin"])
def test_empty_entry_of_the_path_is_the_working_directory(path: str, tmp_path: Path) -> None:
    script(tmp_path, "#!/bin/sh\necho here\n")
    environment = os.environ | {"PYTHONPATH": str(support.ROOT)}
    result = support.run("-q", "-e", f"PATH={path}", "--", "tool", cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout) == (0, "here\n")


def test_executable_further_on_the_path_is_found(tmp_path: Path) -> None:
    """As execvp(3) does: a file that is not executable, or a directory, is passed over."""
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    script(tmp_path / "first", "#!/bin/sh\necho first\n", 0o644)
    (tmp_path / "second" / "tool").mkdir()
    script(tmp_path / "third", "#!/bin/sh\necho third\n")
    path = ":".join(str(tmp_path / name) for name in ("first", "second", "third"))
    assert support.run("-q", "-e", f"PATH={path}", "--", "tool").stdout == "third\n"


def test_command_keeps_the_name_it_was_called_by() -> None:
    result = support.run("-q", "--", "sh", "-c", "cat /proc/$$/cmdline | tr '\\0' ' '")
    assert result.stdout.split()[0] == "sh"


# Where the messages go


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--version"], ["-n", "--", "true"], ["-n", "--json", "--", "true"]])
def test_stdout_that_is_full(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*support.PORTEXEC, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=support.DEADLINE
        )
    assert (result.returncode, result.stderr) == (125, said("cannot write to stdout: No space left on device"))


@pytest.mark.parametrize("words", [["--help"], ["-n", "--", "true"]])
def test_stdout_that_is_closed(words: list[str]) -> None:
    result = support.run(*words, prefix=["/bin/sh", "-c", 'exec "$@" >&-', "sh"])
    assert (result.returncode, result.stderr) == (125, said("cannot write to stdout: Bad file descriptor"))


def test_stderr_that_is_closed() -> None:
    result = support.run("-l", "x:y", "--", "true", prefix=["/bin/sh", "-c", 'exec "$@" 2>&-', "sh"])
    assert (result.returncode, result.stdout) == (125, "")


WHILE_LOADING = """
import builtins, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where our caller has it ignored
load = builtins.__import__
def hooked(name, *rest):
    if name == "portexec.launch":
        os.kill(os.getpid(), signal.SIGINT)
    return load(name, *rest)
builtins.__import__ = hooked
import portexec.cli
"""


def test_ctrl_c_while_portexec_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", WHILE_LOADING], capture_output=True, text=True, timeout=support.DEADLINE)
    assert (done.stderr, done.returncode) == ("", -signal.SIGINT)


def test_message_is_one_line_whatever_the_words() -> None:
    result = support.run("--", "no\nsuch command\nportexec: error: x")
    assert result.returncode == 127
    hint = "write it as separate words: portexec -- no\\nsuch command\\nportexec: error: x"
    assert result.stderr == said("command not found: no\\nsuch command\\nportexec: error: x", hint)


def test_message_about_bytes_that_are_no_text() -> None:
    """They are spelled out: a terminal of another encoding can take 0x9b for the begin of a sequence."""
    result = subprocess.run([*support.PORTEXEC, "--", b"\x9b\xff"], stderr=subprocess.PIPE, timeout=support.DEADLINE)
    assert result.returncode == 127
    assert result.stderr.startswith(b"portexec: error: command not found: \\x9b\\xff\n")


TRICK = "\x1b[2J\x9b\nportexec: error: x"
SHOWN = r"\x1b[2J\x9b\nportexec: error: x"


@contextmanager
def busy_port_of(name: str) -> Iterator[int]:
    """A port that is in use by a process of this name, of which the kernel keeps 15 bytes."""
    program = (
        "import socket, sys; open('/proc/self/comm', 'wb').write(sys.argv[1].encode()); s = socket.create_server(('', 0));"
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-S", "-c", program, name]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(support.read_line(process))
        finally:
            process.kill()


def test_name_of_a_process_that_plays_tricks() -> None:
    with busy_port_of("\x1b[2J\nportexec:") as port:
        result = support.run("-l", str(port), "--", "true")
        shown = r"\x1b[2J\nportexec"
        assert result.stderr.splitlines()[0].endswith(f", {shown})") or f", {shown}:)" in result.stderr
        assert len(result.stderr.splitlines()) == 2
        with pytest.raises(portexec.ListenError) as refused:
            portexec.listen(str(port))
        assert shown in str(refused.value)
        assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--", TRICK],
        ["--", f"./{TRICK}"],
        ["-l", TRICK, "--", "true"],
        ["-l", f"unix:/nonexistent/{TRICK}", "--", "true"],
        [f"--{TRICK}", "--", "true"],
        ["--ready", TRICK, "--", "true"],
        ["--env-file", TRICK, "--", "true"],
        ["--export", f"/nonexistent/{TRICK}", "--", "true"],
        ["-e", TRICK, "--", "true"],
        ["-v", "-e", f"X={TRICK}", "-l", f"unix:{{place}}/{TRICK}", "--", "true", TRICK, "{fd}"],
        ["-n", "-e", f"X={TRICK}", "--", "echo", TRICK],
        ["-n", "-l", f"unix:{{place}}/{TRICK}", "--", "echo", f"{TRICK}{{fd}}"],
    ],
)
def test_no_word_plays_tricks_on_a_terminal(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = support.run(*(word.replace("{place}", ".") for word in words), env=os.environ | {"PYTHONPATH": str(support.ROOT)})
    said = result.stdout + result.stderr
    assert SHOWN[:8] in said
    assert [character for character in said if not character.isprintable() and character != "\n"] == []
    assert not any(line.startswith("portexec: error: x") for line in said.splitlines())


@pytest.mark.parametrize("given", [{"listen": TRICK}, {"listen": f"unix:/nonexistent/{TRICK}"}, {"ready": TRICK}, {}])
def test_no_message_of_the_python_api_plays_tricks(given: dict[str, str]) -> None:
    """A traceback shows it on a terminal as it is."""
    with pytest.raises(portexec.PortexecError) as raised, portexec.serve([f"./{TRICK}"], **given):  # type: ignore[arg-type]
        pass
    assert "\x1b" not in str(raised.value)
    assert "\nportexec: error: x" not in str(raised.value)


# Advice before the command starts.


@pytest.mark.parametrize(
    ("name", "words", "is_said"),
    [
        ("npx", ["-H", "fd"], True),
        ("yarn", ["-l", "unix:@{place}/socket"], True),
        ("npx", ["-H", "guard"], False),
        ("npx", ["-q", "-H", "fd"], False),
        ("npx", ["--json", "-H", "fd"], True),
        ("other", ["-H", "fd"], False),
    ],
)
def test_a_descriptor_behind_what_closes_it(name: str, words: list[str], is_said: bool, tmp_path: Path) -> None:
    path = script(tmp_path, "#!/bin/sh\n", 0o755)
    tool = Path(path).rename(tmp_path / name)
    result = support.run(*(word.replace("{place}", str(tmp_path)) for word in words), "--", str(tool))
    note = (
        f"portexec: note: {name} does not pass descriptors on to what it starts; give the server its number: {{port}}, or $PORT"
    )
    assert (result.returncode, note in result.stderr.splitlines()) == (0, is_said)


@pytest.mark.parametrize("command", [["sh", "-c", ": sudo x"], ["env", "X=1", "/usr/bin/sudo", "--version"]])
def test_sudo_below_guard(command: list[str]) -> None:
    note = "portexec: note: sudo has no effect below hand-off guard (no-new-privileges): use -H hold, or portexec below sudo"
    for words, is_said in ((["-H", "guard"], os.geteuid() != 0), (["-q", "-H", "guard"], False), (["-H", "hold"], False)):
        assert (note in support.run(*words, "--", *command).stderr.splitlines()) == is_said
