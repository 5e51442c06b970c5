"""Who was sent a signal: portexec, its shim, or both, in every order in which the two can say so.

Nothing depends on how fast the machine is: what follows something at once does so between two polls of the loop, and what
follows later waits until the first has been decided.
"""

from __future__ import annotations

import signal

import pytest

from portexec.parent import loop
from portexec.parent.loop import Event
from portexec.parent.protocol import ALONE
from portexec.parent.witness import Witness

TERM, INT = signal.SIGTERM, signal.SIGINT
SENDER, OTHER = 4711, 4712

SEEN = ("seen", TERM, SENDER)  # the shim was sent it
TOLD = ("told", TERM, SENDER)  # portexec was
PASSED_ON = ("told", TERM, ALONE)  # portexec does what the shim has reported
REPORTED = ("reported", TERM, 0)  # to portexec: the shim alone was sent it
KNOWN = ("known", TERM, 0)  # the command has it
FOR_COMMAND = ("for the command", TERM, 0)  # it has not, and is sent it

# What happens, in this order, up to a result that is waited for; and so on.
ORDERS = {
    "portexec, then the shim": [SEEN, TOLD, KNOWN],
    "the shim, then portexec": [TOLD, SEEN, KNOWN],
    "portexec alone": [TOLD, FOR_COMMAND],
    "the shim alone": [SEEN, REPORTED, PASSED_ON, FOR_COMMAND],
    "portexec too late, and had it already": [SEEN, REPORTED, TOLD, KNOWN, PASSED_ON, KNOWN],
    "portexec too late, after it did what was reported": [SEEN, REPORTED, PASSED_ON, FOR_COMMAND, TOLD, FOR_COMMAND],
    "twice to both": [SEEN, TOLD, KNOWN, TOLD, SEEN, KNOWN],
    "twice to both, at once": [SEEN, SEEN, TOLD, TOLD, KNOWN, KNOWN],
    "to both, then to portexec": [SEEN, TOLD, KNOWN, TOLD, FOR_COMMAND],
    "by two senders": [("seen", TERM, OTHER), TOLD, REPORTED, FOR_COMMAND],
    "two signals": [("seen", INT, SENDER), TOLD, ("reported", INT, 0), FOR_COMMAND],
    "the shim too late": [TOLD, FOR_COMMAND, SEEN, REPORTED],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_an_order(order: list[tuple[str, int, int]]) -> None:
    happened: list[tuple[str, int, int]] = []
    expected: list[tuple[str, int, int]] = []
    one_more = Event()

    def note(what: str, number: int) -> None:
        nonlocal one_more
        happened.append((what, number, 0))
        before, one_more = one_more, Event()
        before.set()

    async def live() -> None:
        witness = Witness(lambda number: note("reported", number))
        for step in order:
            what, number, sender = step
            if what == "seen":
                witness.see(number, sender)
            elif what == "told":
                witness.hear(number, sender, lambda is_known: note("known" if is_known else "for the command", TERM))
            else:
                expected.append(step)
                while len(happened) < len(expected):
                    await one_more.wait()

    loop.run(live())
    assert sorted(happened) == sorted(expected)
