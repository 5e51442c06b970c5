"""When a server is started again, and how long after its end. Values in, values out."""

from __future__ import annotations

from portexec.request import ALWAYS, ON_FAILURE

FIRST_DELAY = 0.1  # seconds before the first restart; each further one waits twice as long
LONGEST_DELAY = 10.0
GOOD_TIME = 10.0  # seconds; after a command that was ready for longer, the delays begin anew
FAILURES = 5  # ends in a row, each before the command was ready; then it is not started again


class Backoff:
    """What the ends so far mean for the next one. `delay` is in seconds, `failures` counts the ends without being ready."""

    __slots__ = ("delay", "failures")

    def __init__(self, delay: float = FIRST_DELAY, failures: int = 0) -> None:
        self.delay = delay
        self.failures = failures

    def after_end(self, ready_for: float | None) -> Backoff:
        """After one more end, of a command that had been ready for so many seconds; None if it never was."""
        failures = self.failures + 1 if ready_for is None else 0
        is_good = ready_for is not None and ready_for > GOOD_TIME
        return Backoff(FIRST_DELAY if is_good else self.delay, failures)

    def after_delay(self) -> Backoff:
        """After the delay was waited for."""
        return Backoff(min(2 * self.delay, LONGEST_DELAY), self.failures)

    def has_had_enough(self) -> bool:
        """Whether the command ended too often before it was ready."""
        return self.failures >= FAILURES


def is_wanted(restart: str, wait_status: int) -> bool:
    """Whether `--restart` asks for another start after this end."""
    return restart == ALWAYS or (restart == ON_FAILURE and wait_status != 0)
