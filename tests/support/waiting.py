"""Wait for a condition, without a sleep that stands for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")

SLOW = float(os.environ.get("PORTEXEC_SLOW") or 1)  # how many times longer everything takes; an emulated machine is slow
DEADLINE = 30.0 * SLOW  # seconds after which a wait has failed; nothing is asserted about speed
LIMITS = (1.0, 5.0, DEADLINE)  # to try one after the other, where what comes before a time limit is too late on a busy machine


def wait_for(condition: Callable[[], T]) -> T:
    """Call until the result is true and return it; the last failure is the one that is raised."""
    end = time.monotonic() + DEADLINE
    while True:
        failure: Exception | None = None
        try:
            result = condition()
            if result:
                return result
        except (OSError, AssertionError, ValueError) as error:
            failure = error
        if time.monotonic() > end:
            raise failure or AssertionError(f"still not true: {condition}")
        time.sleep(0.01)


def within(seconds: int, attempt: Callable[[int], object]) -> None:
    """Make an attempt with a time limit of so many seconds, in which its programs have to come as far as it takes.

    On a machine that stalls they may not. So one that fails is made again with more time, and the last one counts.
    """
    for longer in (1, 3):
        try:
            attempt(longer * seconds)
        except (OSError, AssertionError, ValueError, pytest.fail.Exception):
            continue
        return
    attempt(6 * seconds)
