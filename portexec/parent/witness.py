"""One request is told once: who has a signal already, when portexec was sent it.

timeout(1), honcho, systemd and many more send a signal to the whole process group, or to each process of a tree. Then the
command has it already, and a copy from us would be a second request: `process.once("SIGTERM")` dies of that. portexec cannot
see what the command was sent. But its shim is in the same group and below the same parent, and sees what it is sent itself.

- portexec and the shim got the same signal from the same sender within a short time: so did the command.
- portexec alone got it: it is for the command, and is forwarded when the time is over in which the shim's copy could come.
- The shim alone got it (`pkill -P`): it counts as one to portexec.

In doubt a signal is forwarded: twice is better than never.
"""

from __future__ import annotations

from portexec.kernel import ENDING_SIGNALS
from portexec.parent.loop import after

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds in which the other copy comes. A signal to a group reaches all of it at once. What ends programs is also sent to one
# process of a tree after the other, by many tools; those copies were seen 13 ms apart on busy cores.
_WINDOW = 0.005
_WINDOW_OF_ENDS = 0.05
ALONE = -1  # stands for the sender of a signal that one process got, as is known

_Key = tuple[int, int]  # number and sender


class Witness:
    """What the shim was sent itself (`seen`), and what portexec was (`told`), as far as one waits for the other."""

    __slots__ = ("_seen", "_told", "report")

    def __init__(self, report: Callable[[int], None]) -> None:
        """`report` is called with the number of a signal that reached the shim alone."""
        self.report = report
        self._seen: list[_Key] = []
        self._told: list[tuple[_Key, Callable[[bool], None]]] = []

    def see(self, number: int, sender: int) -> None:
        """The shim was sent this."""
        key = (number, sender)
        for waiting in self._told:
            if waiting[0] == key:
                self._told.remove(waiting)
                waiting[1](True)
                return
        self._seen.append(key)
        after(_window(number), lambda: self._give_up_on_portexec(key))

    def hear(self, number: int, sender: int, decide: Callable[[bool], None]) -> None:
        """portexec was sent this. `decide` is called once, with whether the whole group was."""
        key = (number, sender)
        if sender == ALONE:
            decide(False)
        elif key in self._seen:
            self._seen.remove(key)
            decide(True)
        else:
            waiting = (key, decide)
            self._told.append(waiting)
            after(_window(number), lambda: self._give_up_on_shim(waiting))

    def _give_up_on_portexec(self, key: _Key) -> None:
        if key in self._seen:
            self._seen.remove(key)
            self.report(key[0])

    def _give_up_on_shim(self, waiting: tuple[_Key, Callable[[bool], None]]) -> None:
        if waiting in self._told:
            self._told.remove(waiting)
            waiting[1](False)


def _window(number: int) -> float:
    return _WINDOW_OF_ENDS if number in ENDING_SIGNALS else _WINDOW
