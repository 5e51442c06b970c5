"""Replacement: a new start beside the old one. When it is ready the old one is told to end, and may drain."""

from __future__ import annotations

from portexec.errors import how_it_ended, reason
from portexec.lifetime.start import ENDED, READY, RUNNING
from portexec.parent.loop import first
from portexec.procfs import is_ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.lifetime.events import Reporter
    from portexec.lifetime.start import Start


async def replace(old: Start, begin: Callable[[], Start], reporter: Reporter) -> Start:
    """Begin a new start, and return the one that counts from now on: the new one when it is ready, else the old one.

    `begin` raises OSError when resources run out. The old start counts until the new one is ready.
    """
    if not old.has_reached(RUNNING) or old.has_reached(ENDED):
        return old
    try:
        new = begin()
    except OSError as error:
        reporter.error(f"cannot begin a new start, the old one goes on: {reason(error)}")
        return old
    await first(new.reaches(ENDED), new.reaches(READY))
    if new.has_reached(READY):
        reporter.detail("the new start is ready, the old one is told to end")
        old.drain()
        return new
    reporter.error(f"the new start was not ready, {_what_now(old)}: {_why(new)}")
    return old


def _what_now(old: Start) -> str:
    # Its end may be on its way to us, by way of another shim.
    has_ended = old.has_reached(ENDED) or is_ending(old.pid)
    return "and the old one has ended meanwhile" if has_ended else "the old one goes on"


def _why(new: Start) -> str:
    end = new.end
    if end is None or end.failure is None:
        return how_it_ended(end.wait_status if end else 0)
    return end.failure.message
