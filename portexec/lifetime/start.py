"""One start of a command, from fork to the last process gone, as portexec hears of it from the shim.

    IDLE -> PREPARING -> RUNNING -> READY -> ENDED -> GONE

IDLE is a start that waits: a lazy one for its first connection, any other for the end of the pause before it.
READY may be left out, and so may all that comes before ENDED.
ENDED is the end of the command itself, GONE that of all that it has started.
"""

from __future__ import annotations

import _signal
import time

from portexec.errors import PortexecError
from portexec.parent import link as links
from portexec.parent import shim as words
from portexec.parent import signals, supervisor
from portexec.parent.child import failure_of
from portexec.parent.loop import Event
from portexec.parent.witness import ALONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from portexec.parent.shim import Shim

IDLE = "idle"
PREPARING = "preparing"
RUNNING = "running"
READY = "ready"
ENDED = "ended"
GONE = "gone"
_ORDER = (IDLE, PREPARING, RUNNING, READY, ENDED, GONE)


class End:
    """How a command ended: a wait status of waitpid(2), or the `failure` that it could not be executed.

    `by_itself`: nobody had told it to. `is_left`: something of it goes on, and its shim with it. `at` is a time.monotonic().
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


class Start:
    """A start, and the owner of its shim. `hosts` has the addresses at which it listens by number, as far as admission saw.

    `began` is the time of the start, `ready_since` that of readiness, both time.monotonic() and None before.
    """

    def __init__(self, shim: Shim) -> None:
        self.shim = shim
        self.state = IDLE
        self.began: float | None = None
        self.ready_since: float | None = None
        self.said = Said()
        self.hosts: dict[int, dict[str, None]] = {}  # by number; dicts for their order
        self.end: End | None = None
        self.was_shim_killed = False
        self.signalled: list[int] = []  # numbers of signals that reached the shim alone, and that nobody has taken yet
        self.news: list[str] = []  # the states that it has reached, and that nobody has reported yet
        self._pid = 0
        self._failure: PortexecError | None = None
        self._is_stopped = False  # we have told it to end
        self._heard = Event()
        self._reached = {state: Event() for state in (RUNNING, READY, ENDED, GONE)}

    @property
    def pid(self) -> int:
        """The pid of the process that counts: what the command said by MAINPID=, or its own; 0 until it runs."""
        return self.said.main_pid or self._pid

    def has_reached(self, state: str) -> bool:
        """Whether it is, or was, in this state."""
        return self._reached[state].is_set()

    async def reaches(self, state: str) -> None:
        """Return when it has reached this state."""
        await self._reached[state].wait()

    def is_running(self) -> bool:
        """Whether the command runs, or is about to: somebody is there to get signals."""
        return self.state in (PREPARING, RUNNING, READY)

    def prepare(self) -> None:
        """Have the child forked, and wait until it is ready to execute the command. Raises as `Shim.prepare`."""
        self.began = time.monotonic()
        self.state = PREPARING
        self.shim.prepare()

    def go(self) -> None:
        """Let a prepared start execute the command."""
        self.shim.link.say(words.GO)

    def begin(self) -> None:
        """Have the shim start the command, from the beginning."""
        self.began = time.monotonic()
        self.state = PREPARING
        self.shim.link.say(words.PREPARE)

    def become_ready(self) -> None:
        """It is ready from now on."""
        self.ready_since = time.monotonic()
        self._reach(READY)

    def forward(self, number: int, sender: int) -> None:
        """Pass on a signal that portexec was sent."""
        self._say(supervisor.SIGNAL, number, sender)

    def forward_early(self, early: Iterable[signals.Received]) -> None:
        """Pass on signals that portexec was sent when it had no shim yet."""
        for signal in early:
            if signals.is_to_be_forwarded(signal):
                self.forward(signal.number, ALONE)

    def drain(self) -> None:
        """Tell the command to end, which may take its time."""
        self._is_stopped = True
        self._say(supervisor.DRAIN)

    def stop(self, number: int = _signal.SIGTERM, sender: int = ALONE) -> None:
        """Stop its tree; portexec was sent this signal, or nothing."""
        if self.state == IDLE:
            self._has_ended(End(0, by_itself=False))
            self._reach(GONE)
        else:
            self._is_stopped = True
            self._say(supervisor.STOP, number, sender)

    def kill(self) -> None:
        """End all of it at once."""
        self._say(supervisor.KILL)

    def dismiss(self) -> None:
        """Let the shim of a start that is gone end: from now on somebody else undoes what was made, should we be killed."""
        if self.shim.link.is_open:
            self.shim.leave()

    def take(self) -> None:
        """Take all that the shim has said."""
        for kind, fields in self.shim.link.received():
            self._take(kind, fields)

    async def hears_more(self) -> None:
        """Wait until the command listens somewhere else, too, as far as admission sees."""
        await self._heard.wait()

    def _say(self, kind: bytes, *fields: object) -> None:
        self.shim.link.say(kind, *fields)
        if self.shim.link.is_open:
            signals.send(self.shim.pid, _signal.SIGCONT)  # Ctrl-Z may have stopped it

    def _take(self, kind: bytes, fields: list[str]) -> None:
        if kind == words.PREPARED:
            self.shim.link.say(words.GO)
        elif kind == supervisor.STARTED:
            self._pid = int(fields[0])
            self._reach(RUNNING)
        elif kind == supervisor.LISTENING:
            self.hosts.setdefault(int(fields[0]), {})[fields[1]] = None
            heard, self._heard = self._heard, Event()
            heard.set()
        elif kind == supervisor.SIGNALLED:
            self.signalled.append(int(fields[0]))
        elif kind == supervisor.FAILED:
            self._failure = failure_of(fields)
        elif kind == supervisor.ENDED:
            end = End(int(fields[0]), by_itself=not fields[1], failure=self._failure, is_left=bool(fields[2]))
            self._has_ended(end)
        else:
            self._take_last(kind, fields)

    def _take_last(self, kind: bytes, fields: list[str]) -> None:
        """The shim has nothing more to do, could not prepare the start, or was killed."""
        if self.state == GONE:
            return  # the end of the link, which came with the last word
        if kind in (words.REFUSED, words.EXHAUSTED):
            self.was_shim_killed = True  # by itself, perhaps in the middle of its work, so that its tree is ours
            failure = PortexecError(f"cannot {'look after' if self._pid else 'start'} the command: {fields[0]}")
            self._has_ended(End(0, by_itself=True, failure=failure))
        elif kind == links.ENDED and not (self.end and self.end.is_left):
            self.was_shim_killed = True
            self._has_ended(End(_signal.SIGKILL, by_itself=not self._is_stopped))
        else:
            self._has_ended(End(0, by_itself=False))
        self._reach(GONE)

    def _has_ended(self, end: End) -> None:
        if self.end is None:
            self.end = end
            self._reach(ENDED)

    def _reach(self, state: str) -> None:
        self.state = max(self.state, state, key=_ORDER.index)  # it may be told ready when it has ended already
        self.news.append(state)
        self._reached[state].set()
