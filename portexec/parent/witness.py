"""The command gets each request once: whether it has a signal already, when portexec was sent the signal.

timeout(1), honcho, systemd and many more send a signal to the whole process group, or to each process of a tree. Then the
command has it already, and a copy from us would be a second request: `process.once("SIGTERM")` dies of that. portexec cannot
see what the command was sent. But its shim is in the same group and below the same parent, and sees what it is sent itself.

- portexec and the shim got the same signal from the same sender within a short time: so did the command.
- portexec alone got it: it is for the command, and is forwarded when the time is over in which the shim's copy could come.
- The shim alone got it (`pkill -P`): it counts as a signal to portexec. On a busy machine portexec may report its own copy too
  late. That is no second request.

In doubt a signal is forwarded: twice is better than never.
"""

from __future__ import annotations

from portexec.parent.loop import after
from portexec.parent.protocol import ALONE
from portexec.parent.signals import LATE_FRONT, WHOLE_GROUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _T = TypeVar("_T")

_Key = tuple[int, int]  # number and sender


class Witness:
    """The signals that the shim was sent (`_seen`) and those that portexec was sent (`_told`), while their copies may come."""

    __slots__ = ("_late", "_reported", "_seen", "_told", "report")

    def __init__(self, report: Callable[[int], None]) -> None:
        """`report` is called with the number of a signal that reached the shim alone."""
        self.report = report
        self._seen: list[_Key] = []
        self._told: list[tuple[_Key, Callable[[bool], None]]] = []
        self._reported: list[_Key] = []  # seen, and reported to portexec as signals to the shim alone
        self._late: list[int] = []  # numbers of signals of which portexec reported its own copy too late

    def see(self, number: int, sender: int) -> None:
        """The shim was sent this signal."""
        key = (number, sender)
        for waiting in self._told:
            if waiting[0] == key:
                self._told.remove(waiting)
                waiting[1](True)
                return
        self._seen.append(key)
        after(WHOLE_GROUP, lambda: self._give_up_on_portexec(key))

    def hear(self, number: int, sender: int, decide: Callable[[bool], None]) -> None:
        """portexec was sent this signal. `decide` is called once, and told whether the whole group was sent it."""
        key = (number, sender)
        if sender == ALONE:
            decide(self._is_late_report(number))
        elif key in self._seen:
            self._seen.remove(key)
            decide(True)
        elif key in self._reported:
            self._reported.remove(key)
            self._late.append(number)
            _forget_later(self._late, number)
            decide(True)
        else:
            waiting = (key, decide)
            self._told.append(waiting)
            after(WHOLE_GROUP, lambda: self._give_up_on_shim(waiting))

    def _give_up_on_portexec(self, key: _Key) -> None:
        if key in self._seen:
            self._seen.remove(key)
            self._reported.append(key)
            _forget_later(self._reported, key)
            self.report(key[0])

    def _is_late_report(self, number: int) -> bool:
        """Whether this is only the answer to a report of the shim, after portexec has reported its own copy."""
        if number in self._late:
            self._late.remove(number)
            return True
        self._reported[:] = [key for key in self._reported if key[0] != number]
        return False

    def _give_up_on_shim(self, waiting: tuple[_Key, Callable[[bool], None]]) -> None:
        if waiting in self._told:
            self._told.remove(waiting)
            waiting[1](False)


def _forget_later(things: list[_T], thing: _T) -> None:
    """Remove the thing from the list after a while, if it is still there."""
    after(LATE_FRONT, lambda: things.remove(thing) if thing in things else None)
