"""tests/children/thief.py, which tries every way to a number that somebody else has."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.processes import STRANGER, child
from tests.support.waiting import DEADLINE

Attempt = dict[str, Any]

SAME_USER = "same user"
A_STRANGER = pytest.param("stranger", marks=pytest.mark.root)
every_user = pytest.mark.parametrize("user", [SAME_USER, A_STRANGER])


def identity_of(user: str) -> list[str]:
    """The words that make a thief this user."""
    return [] if user == SAME_USER else ["--as", str(STRANGER)]


def every_attempt(identity: list[str], number: int) -> list[Attempt]:
    """What a thief gets by every way: first without SO_REUSEADDR, so that none profits from what the others left behind."""
    tried: list[Attempt] = attempts(identity, "all", number, "-,p", "a,ap")
    return tried


def attempts(identity: list[str], *words: object) -> Any:
    """Run a thief to its end, and what it printed."""
    done = subprocess.run(
        [*child("thief"), *identity, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def thief(identity: list[str], *words: object, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A thief that goes on until its stdin ends."""
    command = [*prefix, *child("thief"), *identity, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)
