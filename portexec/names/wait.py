"""Waiting for runs with a name: until one is ready, and what its addresses are."""

from __future__ import annotations

import os
import time

from portexec.errors import PortexecError, how_it_ended
from portexec.names import registry
from portexec.names.registry import STOPPING, Entry
from portexec.say import moments, say
from portexec.server_errors import NotReady

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from portexec.names.missing import Missing

DEFAULT = 60.0  # seconds
AT_LAST = 10.0  # seconds for KILL to have ended everything

_SHORTEST = 0.005  # seconds between two looks
_LONGEST = 0.1
_LONGER = 1.2


def pauses() -> Callable[[], None]:
    """A function that sleeps for some time, each time longer, within bounds."""
    pause = _SHORTEST

    def sleep() -> None:
        nonlocal pause
        time.sleep(pause)
        pause = min(_LONGER * pause, _LONGEST)

    return sleep


def reporter(what: str, *, is_quiet: bool) -> Callable[[], None]:
    """A function that says from time to time what is waited for, unless it is to be quiet. It is called again and again."""
    began, times = time.monotonic(), moments()
    moment = next(times)

    def report() -> None:
        nonlocal moment
        if time.monotonic() >= began + moment and not is_quiet:
            say(f"note: {moment} s: waiting for {what}")
            moment = next(times)

    return report


def until_ready(
    name: str,
    look: Callable[[], Entry | None],
    timeout: float,
    *,
    run: Entry | None = None,
    missing: Callable[[Entry | None], Missing] | None = None,
    is_quiet: bool = True,
) -> Entry:
    """Look until the run is ready, and return its entry. `run` is the run that we wait for, None for any that begins.

    Unless `is_quiet`, say once what is known of a `missing` run, and from time to time what we wait for.
    Raises NotReady when the time is over, PortexecError when the run ends.
    """
    deadline = time.monotonic() + timeout
    sleep, report = pauses(), reporter(f"{name} to be ready", is_quiet=is_quiet)
    while True:
        entry = look()
        if run is not None and (entry is None or not entry.is_alive or not entry.is_same_run(run)):
            raise _ended(name, entry if entry is not None and entry.is_same_run(run) else None)
        if entry is not None and entry.is_ready:
            return entry
        if entry is not None and entry.is_alive and entry.state != STOPPING:
            run = entry
        elif missing is not None and not is_quiet:
            is_quiet = True
            again = "" if entry is None else " again"
            say(*missing(entry).lines(f"; waiting for it to start{again}"))
        if time.monotonic() > deadline:
            after = f" after {timeout:g} s"
            if run is None and missing is not None:
                raise NotReady(missing(entry).text(after), missing(entry).hint())
            raise NotReady(f"{name} is not ready{after}", "--ready-timeout waits longer")
        sleep()
        report()


def _ended(name: str, entry: Entry | None) -> PortexecError:
    hint = f"`portexec --logs {name}` shows what it wrote" if entry is not None and entry.log else ""
    if entry is not None and entry.is_stopped:
        return PortexecError(f"{name} was stopped before it was ready", hint)
    how = f": {how_it_ended(entry.wait_status)}" if entry is not None and entry.wait_status is not None else ""
    return PortexecError(f"{name} ended before it was ready{how}", hint)


def last_of(run: Entry) -> Callable[[], Entry | None]:
    """A look for this run, or a later one of its name."""
    return lambda: registry.find(run.name, run.project, os.environ)


def until_over(run: Entry, timeout: float, report: Callable[[], None]) -> Entry | None:
    """Look until nothing of the run is left. Returns None then, or its entry if the time is over before."""
    deadline = time.monotonic() + timeout
    sleep = pauses()
    while (now := now_of(run)) is not None and time.monotonic() < deadline:
        sleep()
        report()
    return now


def now_of(run: Entry) -> Entry | None:
    """What is known of a run now; None when nothing of it is left."""
    now = last_of(run)()
    return now if now is not None and now.is_alive and now.is_same_run(run) else None


def addresses(listeners: Sequence[Mapping[str, object]]) -> str:
    """The address of each listener on a line; with the name before it where there are several."""
    lines = (f"{listener['name']} {listener['url']}\n" for listener in listeners)
    return "".join(lines) if len(listeners) > 1 else f"{listeners[0]['url']}\n"
