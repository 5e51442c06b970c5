"""Servers of `portexec.serve`, tests/children/light.py among them, and programs that call it.

Every process of a test can carry a mark in its environment, by which it is found in /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import portexec
from portexec.api.host import current
from tests.support.network import get
from tests.support.proc import children_of, descriptors_of, is_gone, processes_with, status_of, words_of
from tests.support.processes import child
from tests.support.waiting import DEADLINE

MARK = "PORTEXEC_TEST_MARK"
LIGHT = child("light")
ON_FD = [*LIGHT, "fd={fd}"]
# LIGHT says that it serves when it listens already, so it may be stopped first. This one has said it before it can be ready.
SAYS_FIRST = ["sh", "-c", 'echo "serving $$"; exec "$@" >/dev/null', "sh", *LIGHT]
PACKAGE_HOME = str(Path(portexec.__file__).parent.parent)
HAND_OFFS = ["fd", "guard", "hold"]
TOGETHER = pytest.mark.parametrize("hand_off", HAND_OFFS)
IN_ASYNC_CODE = pytest.mark.anyio  # on asyncio and on trio; see tests/api/conftest.py
# A program that never gets beyond the start, with a command that never serves.
WAIT_FOR_EVER = """
import sys, portexec
try:
    with portexec.serve(sys.argv[1:]):
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@contextmanager
def marking() -> Iterator[str]:
    """Mark all that is started in the block; what is left of it afterwards is killed."""
    text = uuid.uuid4().hex
    os.environ[MARK] = text
    try:
        yield text
    finally:
        del os.environ[MARK]
        for pid in marked(text):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def marked(text: str) -> set[int]:
    """The living processes that have the mark, but for this one and its host, which stays. The shims of that are marked, too.

    A host has the environment of the test that was the first to need it, and so have its shims.
    """
    ours = current()
    if ours is None:
        return processes_with(f"{MARK}={text}")
    family = {ours.process.pid, *_shims(ours.process.pid)}
    return (processes_with(f"{MARK}={text}") - family) | (family - {ours.process.pid})


def is_host(pid: int) -> bool:
    """Whether the process is the host of a caller."""
    return "from portexec import host" in words_of(pid)


def _shims(host: int) -> set[int]:
    try:
        return {pid for pid in children_of(host) if not is_gone(pid)}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def descriptors() -> dict[int, str]:
    """The open descriptors of this process, but for the socket to its host, which stays."""
    ours = current()
    return {fd: what for fd, what in descriptors_of().items() if ours is None or fd != ours.fileno()}


def describe(pids: set[int]) -> list[str]:
    """What these processes are, for a message. Those that have ended meanwhile, waited for or not, are left out."""
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            status, words = status_of(pid), words_of(pid)  # the words last: a process that ends in between has none
            if words:
                found.append(f"{pid} {status['State']} {words}")
    return found


def hook(process: portexec.Server | portexec.AsyncServer) -> int:
    """The pid of the portexec of a server: the one whose parent we are."""
    pid = process.pid
    while (parent := int(status_of(pid)["PPid"])) != os.getpid():
        pid = parent
    return pid


def greeting(server: portexec.Server | portexec.AsyncServer) -> str:
    """What it answers to everybody."""
    return f"hello from {server.pid}"


def ask(server: portexec.Server | portexec.AsyncServer, path: str) -> str:
    """What it answers to a GET on this path."""
    return get(f"{server.url}/{path}")


def tell(server: portexec.Server | portexec.AsyncServer, path: str) -> None:
    """A GET that is not answered, since the server ends."""
    with socket.create_connection((server.host, server.port), timeout=DEADLINE) as connection:
        connection.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while connection.recv(10000):
                pass


@contextmanager
def caller(code: str, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program that calls portexec, with these words."""
    options.setdefault("env", os.environ | {"PYTHONPATH": PACKAGE_HOME})
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def run_caller(code: str, *words: str, **options: Any) -> str:
    """Run one to its end, and what it printed."""
    options.setdefault("env", os.environ | {"PYTHONPATH": PACKAGE_HOME})
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
