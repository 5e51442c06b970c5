"""Gates: where only the kernel can bind the command's socket, the guard gives way for one call of one thread, and for no other.

What denies us a duplicate of a socket, a container's profile or an older kernel, is a seccomp filter here (children/refuse.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import STRANGER, Running, child, read_line, tell, wait_for
from tests.support.guard_world import DROPPED, house, python_for
from tests.support.network import steal
from tests.support.processes import refusing, running
from tests.support.thieves import thief

DOCKER = ["pidfd_getfd", errno.EPERM]  # Docker's default profile, as far as it concerns us
UNKNOWN = ["pidfd_getfd", errno.ENOSYS]  # what a profile answers to calls that it does not know
BEFORE_6_9 = ["pidfd_open", errno.EINVAL, 1, os.O_EXCL]  # PIDFD_THREAD
REFUSALS = {"EPERM": DOCKER, "ENOSYS": UNKNOWN}
GUARD = ("-q", "-H", "guard", "--")


@contextmanager
def gate_user(rule: list[object]) -> Iterator[tuple[Running, int]]:
    """tests/children/gate_user.py below a guard, where a call is refused, and its number."""
    with running(*GUARD, *child("gate_user"), prefix=refusing(rule), stdin=subprocess.PIPE) as started:
        yield started, int(read_line(started.process))


def do(started: Running, case: str) -> str:
    """Have the command do something, and what it says of it."""
    tell(started.process, case)
    return read_line(started.process)


def is_closed(port: int) -> bool:
    return steal("127.0.0.9", port, socket.SO_REUSEADDR) == "EADDRINUSE"


@pytest.mark.root
def test_a_gate_opens_for_no_other_socket() -> None:
    """While the command opens hundreds of others, a stranger with SO_REUSEADDR spins and gets nothing."""
    with gate_user(DOCKER) as (started, port):
        with thief(["--as", str(STRANGER)], "hammer", port, 20_000, "a,ap") as spinning:
            assert read_line(spinning) == "ready"
            while spinning.poll() is None:
                assert do(started, "others") == "done"
            assert read_line(spinning).endswith('"got": []}')
        assert do(started, "serve") == "serving"


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_gate_is_closed_when_the_call_is_over(refusal: str) -> None:
    with gate_user(REFUSALS[refusal]) as (started, port):
        assert is_closed(port)
        assert do(started, "serve") == "serving"
        wait_for(lambda: is_closed(port))


@pytest.mark.parametrize("case", ["again", "together"])
def test_a_gate_opens_for_each_of_many_sockets_of_the_number(case: str) -> None:
    with gate_user(DOCKER) as (started, port):
        assert do(started, case) == "done"
        wait_for(lambda: is_closed(port))


@pytest.mark.parametrize("case", ["serve", "thread", "own_table"])
def test_threads_before_linux_6_9(case: str) -> None:
    """A pidfd is a process' there, and that may have other descriptors than the thread, or none any more."""
    with gate_user(BEFORE_6_9) as (started, port):
        assert do(started, case) == "serving"
        wait_for(lambda: is_closed(port))


@pytest.mark.root
@pytest.mark.parametrize("options", ["hidepid=0", "hidepid=invisible"])
def test_a_program_that_nobody_may_look_into(options: str) -> None:
    """It is not dumpable, and portexec an ordinary user's; /proc refuses to show it, or hides it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare(1)")
    with house() as home:
        python = python_for(DROPPED, home)
        script = (
            f'mount -t proc -o {options} proc /proc && exec setpriv --reuid {DROPPED} --regid {DROPPED} --clear-groups "$@"'
        )
        words = [unshare, "--mount", "sh", "-c", script, "sh", python, "-m", "portexec", *GUARD, python]
        command = [*words, f"{home}/tests/children/gate_user.py"]
        process = subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            port = int(read_line(process))
            for case, answer in (("hidden", "done"), ("others", "done"), ("serve", "serving")):
                tell(process, case)
                assert read_line(process) == answer
            wait_for(lambda: is_closed(port))
        finally:
            process.kill()
            process.communicate()
