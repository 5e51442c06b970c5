"""The scenario that portexec is made for: copies of one end-to-end suite at the same time, each against a server of its own.

tests/apps/page is a small FastAPI application and a Playwright suite for it, run by `--then` as its users run it: npx, the test
runner, a real Chromium. The suite sees to it that the instance it was given answers; here the servers' access logs are read,
too, because a request that a neighbour's suite made would stand there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import PORTEXEC, wait_for
from tests.support.installed import APPS, PATH, lack, need
from tests.support.names import listed
from tests.support.proc import processes_of

pytestmark = [pytest.mark.once, pytest.mark.recipes]

PATIENCE = 120  # seconds until a suite has hung; a browser is slow to start where others start, too
SUITE = "npx playwright test || exit 3"  # the runner's own status is 1, as that of much else
FAILED = 3

COMMANDS = {"fd": "uvicorn page:app --fd {fd}", "guard": "uvicorn page:app --port {port}"}


class Copy:
    """A run of portexec with the server and the suite below it, and what they have written."""

    def __init__(self, process: subprocess.Popen[bytes], instance: str, folder: Path) -> None:
        self.process = process
        self.instance = instance
        self.folder = folder

    def status(self) -> int:
        """Wait for the end; the status, or the negative number of the signal."""
        return self.process.wait(PATIENCE)

    def written(self) -> str:
        """All that portexec, the server and the suite have written so far."""
        return (self.folder / "output").read_text()

    def lines(self, *parts: str) -> list[str]:
        """The written lines that have all of these in them."""
        return [line for line in self.written().splitlines() if all(part in line for part in parts)]

    def has_written(self, text: str) -> bool:
        """Whether a line with this has been written; says what was, if it is asked for the last time."""
        assert self.lines(text), self.written()
        return True

    def is_gone(self) -> bool:
        """Whether nothing of it runs any more; says what does, if it is asked for the last time."""
        left = {pid: command_line(pid) for pid in processes_of(self.folder)}
        assert not left, f"left running: {left}"
        return True


def command_line(pid: int) -> str:
    """What a process was started as; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(scope="module")
def modules() -> Path:
    """Where npm keeps what is installed for everybody, the Playwright test runner among it."""
    need(["node", "npm", "npx", "chromium", "uvicorn", "fastapi"])
    asked = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    root = Path(asked.stdout.strip())
    if not (root / "@playwright" / "test" / "cli.js").exists():
        lack("@playwright/test")
    return root


@contextmanager
def copies(modules: Path, place: Path, *instances: tuple[str, dict[str, str]]) -> Iterator[list[Copy]]:
    """Start all of them, each by a hand-off and with variables of its own, and see to it that none is left running."""
    with ExitStack() as stack:
        started = []
        for hand_off, variables in instances:
            folder = prepare(modules, place / variables["INSTANCE"])
            started.append(start(folder, hand_off, variables))
            stack.callback(end, started[-1])
        yield started


def prepare(modules: Path, folder: Path, application: str = "page") -> Path:
    """A copy of the application, with the test runner where `npm install` would put it."""
    shutil.copytree(APPS / application, folder, dirs_exist_ok=True)
    programs = folder / "node_modules" / ".bin"
    programs.mkdir(parents=True)
    (programs.parent / "@playwright").symlink_to(modules / "@playwright")
    (programs / "playwright").symlink_to("../@playwright/test/cli.js")
    return folder


def start(folder: Path, hand_off: str, variables: dict[str, str]) -> Copy:
    """Start portexec as one does in a project's folder, with the instance's own variables by `-e`."""
    given = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    words = [*PORTEXEC, "-H", hand_off, *given, "-e", "BASE_URL={url}", "--then", SUITE, "--", *COMMANDS[hand_off].split()]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment_in(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Copy(process, variables["INSTANCE"], folder)


def environment_in(folder: Path) -> dict[str, str]:
    """A home of its own keeps npm and the browser out of the user's, and tells their processes from a neighbour's."""
    environment = os.environ | {"PATH": PATH, "HOME": str(folder), "NPM_CONFIG_OFFLINE": "true", "NO_COLOR": "1"}
    return environment | {"NPM_CONFIG_UPDATE_NOTIFIER": "false", "CHROMIUM": shutil.which("chromium") or "chromium"}


def end(copy: Copy) -> None:
    """Kill what a test that has failed left running."""
    for pid in processes_of(copy.folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    copy.process.wait()


def check_passed(copy: Copy) -> None:
    """The suite passed, and its own server answered it and nobody else."""
    assert copy.status() == 0, copy.written()
    assert "3 passed" in copy.written(), copy.written()
    for check in ("the script of {0} asks {0}", "a guest is added at {0}", "the guest is still there at {0}"):
        assert copy.lines("✓", check.format(copy.instance)), copy.written()
    assert len(copy.lines('"GET / HTTP/1.1" 200')) == 3, copy.written()
    assert len(copy.lines('"POST /guests HTTP/1.1"')) == 1, copy.written()


def check_failed(copy: Copy) -> None:
    """The suite found what is broken, at its own server, and its status is portexec's."""
    assert copy.status() == FAILED, copy.written()
    assert copy.lines("✓", f"the script of {copy.instance} asks {copy.instance}"), copy.written()
    assert copy.lines("✘", f"a guest is added at {copy.instance}"), copy.written()
    assert len(copy.lines('"POST /guests HTTP/1.1" 500')) == 1, copy.written()


def test_copies_side_by_side(modules: Path, tmp_path: Path) -> None:
    """Copies pass beside one that fails, by either hand-off; none sees another's server, and nothing is left running."""
    passing = [("fd", {"INSTANCE": "a"}), ("fd", {"INSTANCE": "b"}), ("guard", {"INSTANCE": "c"})]
    with copies(modules, tmp_path, *passing, ("guard", {"INSTANCE": "broken", "BROKEN": "1"})) as started:
        for copy in started[:-1]:
            check_passed(copy)
        check_failed(started[-1])
        for copy in started:
            wait_for(copy.is_gone)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_interrupted(signal_number: int, modules: Path, tmp_path: Path) -> None:
    """A signal in the middle of a check ends the browser, the runner and the server, and portexec dies of it."""
    with copies(modules, tmp_path, ("fd", {"INSTANCE": "a", "BROKEN": "silent"})) as (copy,):
        wait_for(lambda: copy.has_written("Running 3 tests"))
        wait_for(lambda: copy.has_written("the script of a asks a"))
        wait_for(lambda: copy.has_written("a friend of a waits at a"))
        assert any("chromium" in command_line(pid) for pid in processes_of(copy.folder))
        copy.process.send_signal(signal_number)
        assert copy.status() == -signal_number, copy.written()
        wait_for(copy.is_gone)


# Servers with names: tests/apps/pair is a page and its API, started before the suite, each by its name.


def npm(folder: Path, *commands: Sequence[str]) -> str:
    """Run these in a project, one after another, as a person does; all that they have written."""
    written = ""
    for words in commands:
        done = subprocess.run(words, cwd=folder, env=environment_in(folder), capture_output=True, text=True, timeout=PATIENCE)
        written += done.stdout + done.stderr
        assert done.returncode == 0, written
    return written


@pytest.mark.usefixtures("registry")
def test_several_servers_in_two_worktrees_at_once(modules: Path, tmp_path: Path) -> None:
    """The same scripts of one package.json: each page asks the API of its own worktree, and nothing is left running."""
    need(["git"])
    one, other = tmp_path / "one", tmp_path / "other"
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    subprocess.run(["git", "init", "-q", str(one)], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=one, check=True)
    subprocess.run(["git", "worktree", "add", "-q", str(other)], cwd=one, check=True)
    scripts = [["npm", "run", "--silent", name] for name in ("api", "web", "test", "stop")]
    with ThreadPoolExecutor() as threads:
        folders = [prepare(modules, place, "pair") for place in (one, other)]
        for place, written in zip(folders, threads.map(lambda place: npm(place, *scripts), folders), strict=True):
            assert f"the page of {place} asks its own API" in written
            assert "2 passed" in written
            assert {"portexec: api has ended", "portexec: web has ended"} <= set(written.splitlines())
            wait_for(lambda place=place: not processes_of(place))  # type: ignore[misc]


@pytest.mark.usefixtures("registry")
def test_servers_that_run_are_taken_again(modules: Path, tmp_path: Path) -> None:
    """`--reuse` in the runner's configuration: what its `reuseExistingServer` does, with a number of its own."""
    folder = prepare(modules, tmp_path / "pair", "pair")
    found = []
    for more, expected in (["--list"], "Total: 2 tests"), ([], "2 passed"):
        assert expected in npm(folder, ["npx", "playwright", "test", *more])
        found.append({name: entry["command_pid"] for name, entry in listed(cwd=folder).items()})
    assert found[0] == found[1]
    assert set(found[0]) == {"api", "web"}
    npm(folder, ["npm", "run", "--silent", "stop"])
    wait_for(lambda: not processes_of(folder))
