"""Replacement: a new start beside the old one. When it is ready the old one is told to end, and may drain.

Where the new start has listeners of its own (`binding.succession`), the old one gets no more clients by then. The old one is
told to end when it has accepted those that wait, and has read what they sent: a server that is told to end may close a
connection that it has not read from yet, and the request is lost.
"""

from __future__ import annotations

from portexec.binding import tables
from portexec.errors import PortexecError, cannot, how_it_ended
from portexec.lifetime.start import ENDED, GONE, IDLE, READY, RUNNING
from portexec.parent.loop import first, sleep, spawn
from portexec.procfs import is_ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.binding.succession import Succession
    from portexec.lifetime.events import Reporter
    from portexec.lifetime.start import Start

_LONGEST_HAND_OVER = 5.0  # seconds in which an old start accepts and reads what waits for it
_PAUSE = 0.01
_SHORT_PAUSE = 0.001
_FROM_READ_TO_REQUEST = 0.1  # seconds in which a server makes a request of what it has read


async def replace(old: Start, begin: Callable[[], Start], reporter: Reporter) -> tuple[Start, PortexecError | None]:
    """Begin a new start, and return the one that counts from now on: the new one when it is ready, else the old one.

    With it comes what went wrong, None where nothing did.
    `begin` raises OSError when resources run out. The old start counts until the new one is ready. An idle start has read
    nothing yet, and is kept. One that is about to run may have read what has changed since, and is replaced when it runs.
    """
    if old.course.state == IDLE:
        return old, None
    await first(old.reaches(ENDED), old.reaches(RUNNING))
    if old.has_reached(ENDED):
        return old, None
    try:
        new = begin()
    except OSError as error:
        return old, cannot("begin a new start, the old one goes on", error)
    await first(new.reaches(ENDED), new.reaches(READY))
    if new.has_reached(READY):
        reporter.detail("the new start is ready, the old one is told to end")
        if new.succession is not None:
            await _hand_over(new.succession)
            spawn(_end_of(old, new.succession))
        old.drain()
        return new, None
    if new.succession is not None:
        new.succession.close()
    return old, PortexecError(f"the new start was not ready ({_why(new)}), {_what_now(old)}")


async def _hand_over(succession: Succession) -> None:
    """Give further clients to the new start, and wait until the old one has accepted and read those before them."""
    succession.take_clients()
    succession.finish()
    if succession.elders:
        await first(_all_read([elder.getsockname() for elder in succession.elders]), within=_LONGEST_HAND_OVER)


async def _all_read(addresses: list[tuple[str, int]]) -> None:
    """Wait until nothing is left to accept or to read of the connections that are there now.

    What was read last needs time to become a request. Then some clients may have asked again over the same connection. So we
    wait for a moment in which nothing is unread.
    """
    try:
        before = set(_connections(addresses))
        left = before
        while left := left & _unread(addresses):
            await sleep(_PAUSE)
        await sleep(_FROM_READ_TO_REQUEST)
        while before & _unread(addresses):
            await sleep(_SHORT_PAUSE)
    except OSError:
        await sleep(_FROM_READ_TO_REQUEST)  # where the kernel does not tell, a pause has to do


def _unread(addresses: list[tuple[str, int]]) -> set[bytes]:
    return {client for client, was_read in _connections(addresses).items() if not was_read}


def _connections(addresses: list[tuple[str, int]]) -> dict[bytes, bool]:
    found: dict[bytes, bool] = {}
    for host, port in addresses:
        found.update(tables.connections_to(host, port))
    return found


async def _end_of(old: Start, succession: Succession) -> None:
    await old.reaches(GONE)
    succession.forget_elders()


def _what_now(old: Start) -> str:
    # The message of its end may still be on its way from its shim.
    has_ended = old.has_reached(ENDED) or is_ending(old.pid)
    return "and the old one has ended meanwhile" if has_ended else "the old one goes on"


def _why(new: Start) -> str:
    end = new.end
    if end is None or end.failure is None:
        return how_it_ended(end.wait_status if end else 0)
    return end.failure.message
