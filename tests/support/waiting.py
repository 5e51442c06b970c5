"""Wait for a condition, without a sleep that stands for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DEADLINE = 30.0  # seconds after which a wait has failed; nothing is asserted about speed
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
