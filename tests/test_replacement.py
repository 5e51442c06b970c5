"""A running server replaced by HUP, under constant load: no request is lost by it, and a new process that fails costs none.

The old process and the new one share the listening descriptor; the old one is told to end when the new one is ready. Each
replacement is over when a new process has answered and the old one is gone. scripts/bench_replace.py makes a hundred of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, Running, child, descriptors_of, get, running, status_of, wait_for
from tests.support.installed import APPS, need

BIN = Path(sys.executable).parent
RATE = 250  # requests per second
GOES_ON = "^portexec: error: .*old"
BROKEN = "raise ImportError('this version does not work')\n"

GUNICORN = [str(BIN / "gunicorn"), "--no-control-socket", "--log-level", "warning", "-b", "fd://{fd}", "wsgi:app"]
UVICORN = [str(BIN / "uvicorn"), "--log-level", "warning", "--no-access-log", "--fd", "{fd}", "asgi:app"]
WORKERS = pytest.mark.parametrize(
    "workers", [["-w", "2"], ["-k", "gthread", "--threads", "4"]], ids=["sync workers", "threads"]
)


class Site:
    """A server below portexec, with constant load on it."""

    def __init__(self, started: Running, url: str, folder: Path, load: subprocess.Popen[bytes], output: Path) -> None:
        self.process = started.process
        self.started = started
        self.url = url
        self.folder = folder
        self._load = load
        self._output = output

    def answered(self) -> set[int]:
        """The processes that have answered so far."""
        lines = self._output.read_text().splitlines(keepends=True)
        return {int(line.split()[-1]) for line in lines if line.startswith("answered by ") and line.endswith("\n")}

    def answers(self) -> set[int]:
        """The generation that answers a request of ours now."""
        return self.generations({int(get(self.url).removeprefix("hello from "))})

    def generations(self, pids: set[int]) -> set[int]:
        """The children of portexec to whose trees these processes belong, for as long as they are there."""
        return {self._generation_of(pid) for pid in pids} - {0}

    def _generation_of(self, pid: int) -> int:
        while pid > 1:
            try:
                parent = int(status_of(pid)["PPid"])
            except (FileNotFoundError, ProcessLookupError):
                return 0
            if parent == self.process.pid:
                return pid
            pid = parent
        return 0

    def replace(self) -> None:
        """HUP, and wait until a new process has answered and the old one is gone."""
        known = self.answered()
        old = self.generations(known)
        assert len(old) == 1
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.generations(self.answered() - known) - old)
        wait_for(lambda: not self.generations(old))

    def summary(self) -> dict[str, Any]:
        """End the load; what became of its requests."""
        self._load.communicate(timeout=DEADLINE)
        summary: dict[str, Any] = json.loads(self._output.read_text().splitlines()[-1])
        return summary


@contextmanager
def loaded_site(tmp_path: Path, *words: str, options: Sequence[str] = ()) -> Iterator[Site]:
    """Run the server with `--restart`, and the load generator, until the block ends."""
    need([words[0]])
    folder = Path(shutil.copytree(APPS, tmp_path / "apps"))
    output = tmp_path / "load"
    with running("--restart", "on-failure", *options, "--", *words, cwd=folder) as started, output.open("wb") as file:
        url = started.url()
        port = url.rpartition(":")[2]
        load = subprocess.Popen([*child("load"), "127.0.0.1", port, str(RATE)], stdin=subprocess.PIPE, stdout=file)
        try:
            site = Site(started, url, folder, load, output)
            wait_for(site.answered)
            yield site
        finally:
            load.kill()
            load.communicate()
            started.stop()


@WORKERS
def test_replacements_of_gunicorn_lose_no_request(workers: list[str], tmp_path: Path) -> None:
    with loaded_site(tmp_path, *GUNICORN, *workers) as site:
        for _ in range(5):
            site.replace()
        summary = site.summary()
    assert (summary["failures"], summary["refused"]) == ({}, 0)
    assert summary["requests"] > RATE


def test_replacements_of_uvicorn_refuse_no_connection(tmp_path: Path) -> None:
    """When it is told to end, uvicorn closes connections that it has accepted and not yet read from, whoever replaces it.

    That is all that may happen to a request here.
    """
    with loaded_site(tmp_path, *UVICORN) as site:
        for _ in range(3):
            site.replace()
        summary = site.summary()
    assert set(summary["failures"]) <= {"reset", "closed without an answer"}
    assert summary["requests"] > RATE


def test_many_hups_at_once_are_no_harm(tmp_path: Path) -> None:
    """Those that come while one is being replaced may be one replacement together."""
    with loaded_site(tmp_path, *GUNICORN) as site:
        old = site.generations(site.answered())
        for _ in range(5):
            site.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not site.generations(old))
        assert site.answers()
        assert site.summary()["failures"] == {}


@pytest.mark.parametrize(("words", "module"), [(GUNICORN, "wsgi.py"), (UVICORN, "asgi.py")], ids=["gunicorn", "uvicorn"])
def test_a_new_one_that_fails_leaves_the_old_one_serving(words: list[str], module: str, tmp_path: Path) -> None:
    with loaded_site(tmp_path, *words) as site:
        old = site.generations(site.answered())
        (site.folder / module).write_text(BROKEN)
        for _ in range(2):  # it may be tried again
            site.process.send_signal(signal.SIGHUP)
            site.started.line(GOES_ON)
            assert site.answers() == old
        summary = site.summary()
        assert site.generations(set(summary["pids"])) == old
    assert (summary["failures"], summary["refused"]) == ({}, 0)


def test_after_one_that_failed_the_next_one_takes_over(tmp_path: Path) -> None:
    with loaded_site(tmp_path, *GUNICORN) as site:
        file = site.folder / "wsgi.py"
        working = file.read_text()
        file.write_text(BROKEN)
        site.process.send_signal(signal.SIGHUP)
        site.started.line(GOES_ON)
        file.write_text(working)
        site.replace()
        assert site.summary()["failures"] == {}


def test_one_that_fails_leaves_no_connection_behind(tmp_path: Path) -> None:
    """A server that takes one connection at a time would wait for what portexec has to say on it.

    The first generation accepts one connection, which makes it ready, and no more. The next one ends when one waits for it.
    """
    script = (
        "import os, select, signal, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "if os.path.exists('first'): select.select([listener], [], []), sys.exit(3)\n"
        "os.mkdir('first'), listener.accept()[0].close(), print('ready', flush=True), signal.pause()\n"
    )
    words = ["-v", "-H", "fd", "--restart", "on-failure", "--", sys.executable, "-c", script]
    with running(*words, cwd=tmp_path) as started:
        port = int(started.url().rpartition(":")[2])
        started.line("^portexec: ready")
        started.process.send_signal(signal.SIGHUP)
        started.line(GOES_ON)
        assert wait_for(lambda: not connections_to(port, started.process.pid))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:site.sock"])
def test_what_the_old_one_accepts_does_not_make_the_new_one_ready(listen: str, tmp_path: Path) -> None:
    """The new one is up, but does not accept before it fails; the old one accepts all that comes, portexec's own, too."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = (
        "import os, socket, sys\n"
        "listener = socket.socket(fileno=3)\n"
        "if os.path.exists('first'): open('gate').read(), sys.exit(3)\n"
        "os.mkdir('first')\n"
        "while True: listener.accept()[0].close(), print('accepted', flush=True)\n"
    )
    words = ["-v", "-l", listen, "-H", "fd", "--restart", "on-failure", "--", sys.executable, "-c", script]
    with running(*words, cwd=tmp_path) as started:
        started.line("^portexec: ready")
        assert started.process.stdout is not None
        assert started.process.stdout.readline() == "accepted\n"
        started.process.send_signal(signal.SIGHUP)
        writer = wait_for(lambda: os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        assert started.process.stdout.readline() == "accepted\n"
        os.close(writer)
        assert started.line("the old one (is told to end|goes on)").group(1) == "goes on"


def connections_to(port: int, pid: int) -> set[str]:
    """The connections of a process to this number on 127.0.0.1, by their inodes."""
    remote = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {match.group(1) for link in descriptors_of(pid).values() if (match := re.match(r"socket:\[(\d+)\]$", link))}
    return {row[9] for row in rows if row[2] == remote} & inodes


def test_told_to_stop_in_the_middle_both_end(tmp_path: Path) -> None:
    """The new one hangs in its import, so the old one still serves."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with loaded_site(tmp_path, *GUNICORN, options=["--kill-after", "1s"]) as site:
        (site.folder / "wsgi.py").write_text(f"open({str(gate)!r}).read()\n")
        site.process.send_signal(signal.SIGHUP)
        # A FIFO can be opened for writing, without waiting, when somebody has come to read it.
        writer = wait_for(lambda: os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        try:
            assert site.summary()["failures"] == {}
            site.process.terminate()
            assert site.process.wait(DEADLINE) == -signal.SIGTERM
        finally:
            os.close(writer)
        with pytest.raises(ProcessLookupError):
            os.killpg(site.process.pid, 0)


@pytest.mark.parametrize("option", [["--ready", "none"], ["--ready-timeout", "10s"]], ids=" ".join)
def test_without_restart_a_hup_is_the_commands(option: list[str]) -> None:
    with running(*option, "-H", "guard", "--", *child("signals")) as started:
        assert started.process.stdout is not None
        assert started.process.stdout.readline().startswith("ready")
        started.process.send_signal(signal.SIGHUP)
        assert started.process.stdout.readline() == "SIGHUP\n"


def test_without_restart_gunicorn_makes_its_worker_anew(tmp_path: Path) -> None:
    need([GUNICORN[0]])
    folder = Path(shutil.copytree(APPS, tmp_path / "apps"))
    with running("--ready", "accept", "--", *GUNICORN, cwd=folder) as started:
        url = started.url()

        def answer() -> tuple[int, int]:
            pid = int(get(url).removeprefix("hello from "))
            return pid, int(status_of(pid)["PPid"])

        worker, command = answer()

        def parent_of_another() -> int:
            pid, parent = answer()
            return parent if pid != worker else 0

        started.process.send_signal(signal.SIGHUP)
        assert wait_for(parent_of_another) == command
