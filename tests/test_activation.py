"""Socket activation, checked from both sides by programs that are not ours.

Read by libsystemd (tests/children/systemd_reader.py calls nothing else), and handed to portexec by systemd-socket-activate or
by a small activator (tests/children/hand_on.py) that can also get every variable wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM
from typing import Any

import pytest

from tests.support import DEADLINE, PORTEXEC, child, wait_for
from tests.support.installed import lack, program

PIDFS = "50494446"  # PIDFS_MAGIC in linux/magic.h: where a pidfd has an inode of its own (Linux 6.9)
ANY = -1


@pytest.fixture(autouse=True)
def _reader() -> None:
    """The library that the tests read with."""
    try:
        ctypes.CDLL("libsystemd.so.0")
    except OSError:
        lack("libsystemd.so.0")


def has_pidfs() -> bool:
    """Whether pidfds have inode numbers that tell one process from a later one with the same pid."""
    return bool(heard(child("systemd_reader"))["pidfd_file_system"] == PIDFS)


def heard(words: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run a command that ends in the reader, and return what the reader printed."""
    options.setdefault("stdin", subprocess.DEVNULL)
    completed = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, **options)
    assert completed.returncode == 0, completed.stderr
    return dict(json.loads(completed.stdout))


def activated(*options: str, calls: Sequence[str] = (), prefix: Sequence[str] = ()) -> dict[str, Any]:
    """What the reader hears, and what libsystemd answers to the calls, under portexec with these options."""
    return heard([*prefix, *PORTEXEC, *options, "--", *child("systemd_reader"), *calls])


def inet(fd: int | str, port: str, family: int = AF_INET, kind: int = SOCK_STREAM, listening: int = 1) -> str:
    """The call that asks whether a descriptor is this internet socket; 0 is any port."""
    return f"sd_is_socket_inet,{fd},{int(family)},{int(kind)},{listening},{port}"


def unix(fd: int, path: str, kind: int = SOCK_STREAM) -> str:
    """The call that asks whether a descriptor is the listening unix socket of this very path."""
    return f"sd_is_socket_unix,{fd},{int(kind)},1,{path}"


def test_listeners_arrive_in_order_with_their_names() -> None:
    """Two listeners are two descriptors, each with its own name and number."""
    yes = [inet(3, "{web.port}"), inet(4, "{admin.port}")]
    no = [inet(3, "{admin.port}"), inet(3, "{web.port}", AF_INET6), inet(3, "{web.port}", listening=0)]
    told = activated("-H", "fd", "-l", "web=0", "-l", "admin=0", calls=yes + no)
    assert (told["count"], told["names"]) == (2, ["web", "admin"])
    assert told["answers"] == [1, 1, 0, 0, 0]
    assert told["variables"]["LISTEN_PID"] == told["pid"]


def test_listeners_without_a_name_are_named_by_position() -> None:
    """No listener is left without a name."""
    assert activated("-H", "fd", "-l", "0", "-l", "web=0", "-l", "0")["names"] == ["listener1", "web", "listener3"]


def test_kinds_of_sockets_mix(tmp_path: Path) -> None:
    """TCP, UDP and unix sockets keep the order in which they were asked for."""
    path = str(tmp_path / "s")
    yes = [
        inet(3, "{web.port}"),
        inet(4, "{dns.port}", kind=SOCK_DGRAM, listening=ANY),
        unix(5, path),
        inet(6, "{both.port}", AF_INET6),
    ]
    no = [inet(4, "{dns.port}"), unix(5, path + "t"), unix(5, path, SOCK_DGRAM), unix(3, path)]
    words = ["-l", "web=0", "-l", "dns=udp:0", "-l", f"local=unix:{path}", "-l", "both=*"]
    told = activated("-H", "fd", *words, calls=yes + no)
    assert (told["count"], told["names"]) == (4, ["web", "dns", "local", "both"])
    assert told["answers"] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_abstract_unix_socket() -> None:
    """It has its name from its first to its last byte."""
    name = f"@portexec-{uuid.uuid4()}"
    told = activated("-l", f"unix:{name}", calls=[unix(3, name), unix(3, name + "0")])
    assert (told["count"], told["answers"]) == (1, [1, 0])


def test_a_command_that_names_the_descriptor_is_not_told_twice() -> None:
    """The descriptor is there, but no variable speaks of it."""
    told = activated("-l", "web=0", calls=[inet("{fd}", "{port}")])
    assert (told["count"], told["variables"], told["answers"]) == (0, {}, [1])


def test_descriptors_elsewhere_are_not_announced() -> None:
    """The protocol begins at 3, so it cannot speak of descriptor 10."""
    told = activated("-H", "fd", "--first-fd", "10", calls=[inet(10, "{port}")])
    assert (told["count"], told["variables"], told["answers"]) == (0, {}, [1])


def test_pid_is_not_that_of_a_process_behind_a_wrapper() -> None:
    """LISTEN_PID is the process that portexec becomes; one that it starts is not meant."""
    told = heard([*PORTEXEC, "-H", "fd", "--", "timeout", str(DEADLINE), *child("systemd_reader")])
    assert told["count"] == 0
    assert told["variables"]["LISTEN_PID"] != told["pid"]


def test_no_pid_leaves_the_process_to_the_wrapper() -> None:
    """With --no-pid nothing names a process, and one behind a wrapper that says it is meant finds its sockets."""
    behind = ["timeout", str(DEADLINE), "sh", "-c", '"$@" && LISTEN_PID=$$ exec "$@"', "sh", *child("systemd_reader")]
    words = [*PORTEXEC, "--no-pid", "-l", "web=0", "--", *behind, inet(3, "{web.port}")]
    completed = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL)
    before, meant = (json.loads(line) for line in completed.stdout.splitlines())
    assert before["variables"] == {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
    assert (meant["count"], meant["names"], meant["answers"]) == (1, ["web"], [1])


def test_pidfd_id_is_the_commands_own() -> None:
    """LISTEN_PIDFDID is the inode of the command's pidfd, and is left out where all pidfds have the same."""
    told = activated("-H", "fd")
    expected = told["pidfd_inode"] if told["pidfd_file_system"] == PIDFS else None
    assert told["variables"].get("LISTEN_PIDFDID") == expected


MEANT_FOR_US = ["LISTEN_FDS=1", "LISTEN_PID=PID", "LISTEN_FDNAMES=outer"]


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        (MEANT_FOR_US, ["outer", "web"]),
        ([*MEANT_FOR_US, "LISTEN_PIDFDID=PIDFDID"], ["outer", "web"]),
        (["LISTEN_FDS=1", "LISTEN_PID=PID"], ["unknown", "web"]),
        (["LISTEN_FDS=1", "LISTEN_PID=1", "LISTEN_FDNAMES=outer"], ["web"]),
        (["LISTEN_FDS=1", "LISTEN_FDNAMES=outer"], ["web"]),
        (["LISTEN_FDS=0", "LISTEN_PID=PID"], ["web"]),
        (["LISTEN_FDS=", "LISTEN_PID=PID"], ["web"]),
        (["LISTEN_FDS=-1", "LISTEN_PID=PID"], ["web"]),
        (["LISTEN_FDS=one", "LISTEN_PID=PID"], ["web"]),
        (["LISTEN_FDS=500", "LISTEN_PID=PID"], ["web"]),
        (["LISTEN_PID=PID"], ["web"]),
    ],
    ids=" ".join,
)
def test_inherited_sockets(variables: list[str], names: list[str]) -> None:
    """Sockets that were handed to portexec come first, with their names; what is stale or wrong gives its place to ours."""
    ours = 3 + names.index("web")
    calls = [inet(ours, "{web.port}"), inet(3, "0")]
    told = activated("-H", "fd", "-l", "web=0", calls=calls, prefix=hand_on(*variables))
    assert (told["count"], told["names"], told["answers"]) == (len(names), names, [1, 1])
    assert told["variables"]["LISTEN_PID"] == told["pid"]


def hand_on(*variables: str) -> list[str]:
    """The words that make the small activator run what follows, with a socket at descriptor 3."""
    return [*child("hand_on"), *variables, "--"]


def test_sockets_for_an_earlier_process_with_our_pid_are_stale() -> None:
    """LISTEN_PIDFDID tells it, though LISTEN_PID is ours; the command's own is told anew."""
    if not has_pidfs():
        pytest.skip("before Linux 6.9 all pidfds have one inode number")
    told = activated("-H", "fd", "-l", "web=0", prefix=hand_on(*MEANT_FOR_US, "LISTEN_PIDFDID=1"))
    assert told["names"] == ["web"]
    assert told["variables"]["LISTEN_PIDFDID"] == told["pidfd_inode"]


@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_stale_variables_go_even_if_nothing_is_announced(hand_off: str) -> None:
    """A command that serves by number, or that names its descriptor, does not see what was meant for another process."""
    calls = [inet("{fd}", "{port}")] if hand_off == "fd" else []
    stale = hand_on("LISTEN_FDS=1", "LISTEN_PID=1", "LISTEN_PIDFDID=1", "LISTEN_FDNAMES=outer")
    told = activated("-H", hand_off, calls=calls, prefix=stale)
    assert (told["variables"], told["answers"]) == ({}, [1] * len(calls))


def test_inherited_sockets_are_announced_to_a_command_that_names_ours() -> None:
    """It was told of ours in its words, of the others only by the variables."""
    told = activated("-l", "web=0", calls=[inet("{fd}", "{port}"), inet(4, "{port}")], prefix=hand_on(*MEANT_FOR_US))
    assert (told["count"], told["names"], told["answers"]) == (1, ["outer"], [1, 1])


def test_inherited_sockets_are_announced_to_a_command_that_binds_the_number() -> None:
    """With hold there is nothing of ours to pass on, but what was handed to us is."""
    told = activated("-H", "hold", calls=[inet(3, "0"), inet(3, "{port}")], prefix=hand_on(*MEANT_FOR_US))
    assert (told["count"], told["names"], told["answers"]) == (1, ["outer"], [1, 0])


def test_portexec_in_portexec() -> None:
    """The outer one is an activator like any other; the command gets the sockets of both."""
    outer = [*PORTEXEC, "-H", "fd", "-l", "a=0", "-l", "b=0", "--"]
    inner = [*PORTEXEC, "-H", "fd", "-l", "web=0", "--"]
    # The outer one would replace templates of the inner one, so the numbers come by the environment.
    calls = " ".join([inet(5, "$WEB_PORT"), inet(4, "$B_PORT"), inet(3, "$A_PORT"), inet(3, "$WEB_PORT")])
    told = heard([*outer, *inner, "sh", "-c", f'exec "$@" {calls}', "sh", *child("systemd_reader")])
    assert (told["count"], told["names"], told["answers"]) == (3, ["a", "b", "web"], [1, 1, 1, 0])


def test_a_real_activators_socket_comes_first(tmp_path: Path) -> None:
    """systemd-socket-activate starts portexec at the first connection; the command gets its socket, then ours."""
    path = str(tmp_path / "s")
    calls = [unix(3, path), inet(4, "{web.port}"), unix(4, path)]
    activate = [program("systemd-socket-activate"), "-l", path, "--fdname=outer", *passing_on("PYTHONPATH", "VIRTUAL_ENV")]
    words = [*activate, *PORTEXEC, "-H", "fd", "-l", "web=0", "--", *child("systemd_reader"), *calls]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process:
        try:
            with wait_for(lambda: connection(path)):
                output, errors = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    told = json.loads(output)
    assert (told["count"], told["names"], told["answers"]) == (2, ["outer", "web"], [1, 1, 0])


def passing_on(*names: str) -> list[str]:
    """Options for systemd-socket-activate, which clears the environment but for a handful of names."""
    return [f"--setenv={name}" for name in names if name in os.environ]


def connection(path: str) -> socket.socket:
    """A connection to a unix socket."""
    client = socket.socket(socket.AF_UNIX, SOCK_STREAM)
    try:
        client.connect(path)
    except BaseException:
        client.close()
        raise
    return client
