"""Servers with a name, in a registry of the test's own; see the fixture `registry` in tests/conftest.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portexec.names.registry import VARIABLE, Entry, entries, find
from tests.support.processes import child, run
from tests.support.waiting import wait_for

LIGHT = child("light")
ON_FD = [*LIGHT, "fd={fd}"]

Result = subprocess.CompletedProcess[str]


def detach(name: str, *words: str, command: Sequence[str] = tuple(LIGHT), **options: Any) -> Result:
    """Start a server in the background, and wait until it is ready."""
    return run("--detach", "--name", name, *words, "--", *command, **options)


def started(name: str, *words: str, **options: Any) -> str:
    """The address of a server that was started in the background."""
    result = detach(name, *words, **options)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.removesuffix("\n")


def listed(**options: Any) -> dict[str, dict[str, Any]]:
    """What `--list --json` says, by name."""
    result = run("--list", "--json", **options)
    assert (result.returncode, result.stderr) == (0, "")
    return {each["name"]: each for each in json.loads(result.stdout)}


def entry_of(name: str, project: Path | None = None) -> Entry:
    """What the registry knows of a run of this project."""
    found = find(name, os.path.realpath(project or Path.cwd()), os.environ)
    assert found is not None
    return found


def has_ended(name: str) -> bool:
    return not entry_of(name).is_alive


def kill_all() -> None:
    """Kill what a test has left running."""
    for entry in entries(os.environ):
        if entry.pid == os.getpid():  # a test that has failed took the part of the run's portexec
            continue
        while entry.is_alive and not has_gone(entry):
            for pid in (entry.pid, entry.command_pid):
                if pid:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
            wait_for(lambda entry=entry: has_gone(entry))  # type: ignore[misc]


def has_gone(entry: Entry) -> bool:
    now = find(entry.name, entry.project, os.environ)
    return now is None or not now.is_alive


__all__ = ["LIGHT", "ON_FD", "VARIABLE", "Result", "detach", "entry_of", "has_ended", "kill_all", "listed", "started"]
