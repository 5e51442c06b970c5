"""The delays before restarts, and how many failures are enough: values in, values out."""

from __future__ import annotations

import pytest

from portexec.lifetime.backoff import FAILURES, GOOD_TIME, LONGEST_DELAY, Backoff, is_wanted

NEVER = None  # it was not ready
SHORT = GOOD_TIME  # seconds
LONG = GOOD_TIME + 0.1


@pytest.mark.parametrize(
    ("ends", "delays"),
    [
        ([NEVER], [0.1]),
        ([0.0], [0.1]),
        ([NEVER, NEVER, NEVER, NEVER, NEVER], [0.1, 0.2, 0.4, 0.8, 1.6]),
        ([SHORT, NEVER, SHORT, SHORT], [0.1, 0.2, 0.4, 0.8]),
        ([LONG, LONG, LONG], [0.1, 0.1, 0.1]),
        ([NEVER, NEVER, LONG, NEVER], [0.1, 0.2, 0.1, 0.2]),
        ([SHORT] * 9, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, LONGEST_DELAY, LONGEST_DELAY]),
        ([SHORT] * 9 + [LONG, SHORT], [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, LONGEST_DELAY, LONGEST_DELAY, 0.1, 0.2]),
    ],
)
def test_delays(ends: list[float | None], delays: list[float]) -> None:
    """Before each restart, by how long each command was ready before its end."""
    backoff, found = Backoff(), []
    for ready_for in ends:
        backoff = backoff.after_end(ready_for)
        found.append(backoff.delay)
        backoff = backoff.after_delay()
    assert found == pytest.approx(delays)


@pytest.mark.parametrize(
    ("ends", "failures"),
    [
        ([], 0),
        ([NEVER], 1),
        ([NEVER, NEVER, NEVER], 3),
        ([NEVER, NEVER, SHORT], 0),
        ([NEVER, NEVER, 0.0, NEVER], 1),
        ([LONG, NEVER, NEVER], 2),
        ([NEVER] * (FAILURES - 1), FAILURES - 1),
        ([NEVER] * FAILURES, FAILURES),
        ([NEVER] * (FAILURES - 1) + [0.0, NEVER], 1),
    ],
)
def test_failures(ends: list[float | None], failures: int) -> None:
    """How many ends in a row there were of commands that were not ready. The delays between them change nothing."""
    with_delays = without = Backoff()
    for ready_for in ends:
        with_delays, without = with_delays.after_end(ready_for).after_delay(), without.after_end(ready_for)
    assert (with_delays.failures, without.failures) == (failures, failures)
    assert with_delays.has_had_enough() == (failures == FAILURES)


def test_a_value_does_not_change() -> None:
    backoff = Backoff()
    backoff.after_end(NEVER).after_delay()
    assert (backoff.delay, backoff.failures) == (0.1, 0)


@pytest.mark.parametrize("wait_status", [0, 3 << 8, 15])
def test_what_asks_for_another_start(wait_status: int) -> None:
    wanted = {restart: is_wanted(restart, wait_status) for restart in ("no", "on-failure", "always")}
    assert wanted == {"no": False, "on-failure": wait_status != 0, "always": True}
