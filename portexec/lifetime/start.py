"""One start of a command, from fork until its last process has gone, as portexec hears of it from the shim.

    IDLE -> PREPARING -> RUNNING -> READY -> ENDED -> GONE

IDLE is a start that waits: a lazy one for its first connection, any other for the end of the pause before it.
READY may be left out, and so may all states between IDLE and ENDED.
ENDED is the end of the command itself, GONE the end of all that it has started.
"""

from __future__ import annotations

import _signal
import time

from portexec.errors import PortexecError, cannot, how_it_ended
from portexec.parent import link as links
from portexec.parent import protocol, signals
from portexec.parent.child import failure_of
from portexec.parent.loop import Event
from portexec.parent.protocol import ALONE, KILLED_EARLY
from portexec.procfs import is_stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from portexec.binding.succession import Succession
    from portexec.parent.shim import Shim

IDLE = "idle"
PREPARING = "preparing"
RUNNING = "running"
READY = "ready"
ENDED = "ended"
GONE = "gone"
_ORDER = (IDLE, PREPARING, RUNNING, READY, ENDED, GONE)


class End:
    """How a command ended: a wait status of waitpid(2), or the `failure` if it could not be executed.

    `by_itself`: nobody had told it to end. `is_left`: a daemon of it lives on, and its shim. `at` is a time.monotonic().
    """

    __slots__ = ("at", "by_itself", "failure", "is_left", "wait_status")

    def __init__(
        self, wait_status: int, *, by_itself: bool, failure: PortexecError | None = None, is_left: bool = False
    ) -> None:
        self.wait_status = wait_status
        self.by_itself = by_itself
        self.failure = failure
        self.is_left = is_left
        self.at = time.monotonic()


class Said:
    """What a command said of itself by sd_notify(3): its main process (0 for none), a text, and whether it is ready."""

    __slots__ = ("is_ready", "main_pid", "status")

    def __init__(self) -> None:
        self.main_pid = 0
        self.status = ""
        self.is_ready = Event()

    def take(self, fields: Mapping[str, str]) -> None:
        """Take one message."""
        self.status = "".join(filter(str.isprintable, fields.get("STATUS", self.status)))
        pid = fields.get("MAINPID", "")
        if pid.isascii() and pid.isdecimal() and len(pid) <= 10:
            self.main_pid = int(pid)
        if fields.get("READY") == "1":
            self.is_ready.set()


class Course:
    """The states that a start has reached, with the time of each, as time.monotonic().

    `news` are the states that it has reached, and that the run has not taken yet.
    """

    __slots__ = ("_reached", "news", "since")

    def __init__(self) -> None:
        self.since: dict[str, float] = {}
        self.news: list[str] = []
        self._reached = {state: Event() for state in _ORDER[1:]}

    def reach(self, state: str) -> None:
        """Note that the start has reached this state. It may be in a later one already, and stays in that."""
        self.since[state] = time.monotonic()
        self.news.append(state)
        self._reached[state].set()

    @property
    def state(self) -> str:
        """The one that it is in."""
        return max(self.since, key=_ORDER.index, default=IDLE)

    def has_reached(self, state: str) -> bool:
        """Whether it is, or was, in this state."""
        return state in self.since

    async def reaches(self, state: str) -> None:
        """Return when it has reached this state."""
        await self._reached[state].wait()


class Addresses:
    """Where a command listens, by number, as far as admission saw."""

    __slots__ = ("_one_more", "hosts")

    def __init__(self) -> None:
        self.hosts: dict[int, dict[str, None]] = {}  # dicts for their order
        self._one_more = Event()

    def add(self, port: int, host: str) -> None:
        """The command listens at this address, too."""
        self.hosts.setdefault(port, {})[host] = None
        happened, self._one_more = self._one_more, Event()
        happened.set()

    async def grow(self) -> None:
        """Return when the command listens at one more address."""
        await self._one_more.wait()


class Start:
    """A start, and the owner of its shim. `is_orphaned`: the shim ended too early, and has left its tree to portexec.

    `signalled` are the numbers of signals that reached the shim alone, and that the run has not taken yet. `is_asked_for`: a
    program has asked for the start, by a restart. `command_pid` is the pid of the command, 0 until it runs.
    """

    def __init__(self, shim: Shim) -> None:
        self.shim = shim
        self.succession: Succession | None = None  # beside an old start: its own listeners
        self.course = Course()
        self.said = Said()
        self.addresses = Addresses()
        self.end: End | None = None
        self.is_orphaned = False
        self.is_asked_for = False
        self.signalled: list[int] = []
        self.command_pid = 0
        self._failure: PortexecError | None = None
        self._is_stopped = False  # we have told it to end
        self._forwarded: set[int] = set()  # numbers of signals

    @property
    def pid(self) -> int:
        """The pid of the main process: the one that the command named by MAINPID=, or its own; 0 until it runs."""
        return self.said.main_pid or self.command_pid

    def has_reached(self, state: str) -> bool:
        """Whether it is, or was, in this state."""
        return self.course.has_reached(state)

    async def reaches(self, state: str) -> None:
        """Return when it has reached this state."""
        await self.course.reaches(state)

    def shares_listeners(self) -> bool:
        """Whether other starts may accept from one of its listeners, too."""
        return self.succession is None or bool(self.succession.why_not)

    def is_running(self) -> bool:
        """Whether the command runs, or is about to, so that signals can be passed on to it."""
        return self.course.state in (PREPARING, RUNNING, READY)

    def is_stopped(self) -> bool:
        """Whether the command was stopped, as by Ctrl-Z; also true where we have not heard yet that it runs."""
        return not self.command_pid or is_stopped(self.command_pid)

    def go(self, early: Iterable[signals.Received]) -> None:
        """Let a prepared start execute the command, which also gets the signals from before portexec had a shim."""
        self.shim.ask_to_go(signal.number for signal in early if signals.is_to_be_forwarded(signal))

    def begin(self) -> None:
        """Have the shim prepare and start the command."""
        self.shim.ask_to_prepare()
        self.shim.ask_to_go()
        self.has_begun()

    def has_begun(self) -> None:
        """The shim was told to prepare."""
        self.course.reach(PREPARING)

    def become_ready(self) -> None:
        """It is ready from now on."""
        self.course.reach(READY)

    def forward(self, number: int, sender: int) -> None:
        """Pass on a signal that portexec was sent."""
        self._forwarded.add(number)
        self._say(protocol.SIGNAL, number, sender)

    def how_it_ended(self) -> str:
        """How its command ended, in words."""
        if self.is_orphaned or self.end is None:
            return "the process that looked after it was killed"
        return how_it_ended(self.end.wait_status)

    def has_died_of_forwarded(self) -> bool:
        """Whether a signal that we passed on has ended it. Its sender knows then why the command has ended."""
        status = 0 if self.end is None else self.end.wait_status
        return any(signals.has_died_of(status, number) for number in self._forwarded)

    def drain(self) -> None:
        """Tell the command to end, and give it as much time as it takes."""
        self._is_stopped = True
        self._say(protocol.DRAIN)

    def stop(self, number: int = _signal.SIGTERM, sender: int = ALONE) -> None:
        """Stop its tree; portexec was sent this signal, or nothing."""
        if self.course.state == IDLE:
            self._has_ended(End(0, by_itself=False))
            self.course.reach(GONE)
        else:
            self._is_stopped = True
            self._say(protocol.STOP, number, sender)

    def kill(self) -> None:
        """End all of it at once."""
        self._say(protocol.KILL)

    def dismiss(self) -> None:
        """Let the shim of a start that is gone end. If we are killed from now on, another shim undoes what was made."""
        if self.shim.link.is_open:
            self.shim.leave()

    async def is_dismissed(self) -> None:
        """Return when the shim has ended."""
        await self.shim.has_gone.wait()

    def take(self) -> None:
        """Take all that the shim has said."""
        for kind, fields in self.shim.link.received():
            self._take(kind, fields)

    def _say(self, kind: bytes, *fields: object) -> None:
        self.shim.link.say(kind, *fields)
        if self.shim.link.is_open:
            signals.send(self.shim.pid, _signal.SIGCONT)  # Ctrl-Z may have stopped it

    def _take(self, kind: bytes, fields: list[str]) -> None:
        if kind == protocol.PREPARED:
            pass  # it was told to go right behind the word to prepare
        elif kind == protocol.STARTED:
            self.command_pid = int(fields[0])
            self.course.reach(RUNNING)
        elif kind == protocol.LISTENING:
            self.addresses.add(int(fields[0]), fields[1])
        elif kind == protocol.ADVISED:
            self.shim.advised.add(fields[0])
        elif kind == protocol.SIGNALLED:
            self.signalled.append(int(fields[0]))
        elif kind == protocol.FAILED:
            self._failure = failure_of(fields)
        elif kind == protocol.ENDED:
            end = End(int(fields[0]), by_itself=not fields[1], failure=self._failure, is_left=bool(fields[2]))
            self._has_ended(end)
        else:
            self._take_last(kind, fields)

    def _take_last(self, kind: bytes, fields: list[str]) -> None:
        """The shim has nothing more to do, could not prepare the start, or was killed."""
        if self.has_reached(GONE):
            return  # the end of the link, after the last word
        if kind in (protocol.REFUSED, protocol.UNABLE):
            self.is_orphaned = True  # the shim has ended by itself, perhaps amid its work: its tree is ours
            why = links.error_of(fields) if kind == protocol.UNABLE else OSError(0, fields[0])
            failure = cannot(f"{'look after' if self.command_pid else 'start'} the command", why)
            self._has_ended(End(0, by_itself=True, failure=failure))
        elif kind == links.ENDED and not (self.end and self.end.is_left):
            self.is_orphaned = True
            self._has_ended(End(_signal.SIGKILL, by_itself=not self._is_stopped, failure=self._killed_early()))
        else:
            self._has_ended(End(0, by_itself=False))
        self.course.reach(GONE)

    def _killed_early(self) -> PortexecError | None:
        """The failure, if the shim was killed before it has told that the command runs."""
        if self.command_pid or self._is_stopped:
            return None
        return PortexecError(f"cannot start the command: {KILLED_EARLY}")

    def _has_ended(self, end: End) -> None:
        if self.end is None:
            self.end = end
            self.course.reach(ENDED)
