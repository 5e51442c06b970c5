"""The server over several starts: each from its beginning until it is ready and to its end, and what follows from that.

restart      the command has ended, or a program asks for it: another start follows, after a pause
replacement  HUP: another start begins beside the old one, which is told to end when the new one is ready (`replacement`)

One task decides what comes next, so that only one thing happens at a time. The number is guarded all the time.
"""

from __future__ import annotations

import time

from portexec.command.plan import GUARD
from portexec.errors import CloseOnError, PortexecError, cannot, how_it_ended
from portexec.lifetime.backoff import Backoff, is_wanted
from portexec.lifetime.readiness import Readiness
from portexec.lifetime.replacement import replace
from portexec.lifetime.start import ENDED, GONE, IDLE, PREPARING, READY, RUNNING, Start
from portexec.lifetime.unready import Unready
from portexec.parent.loop import Event, first, readable, sleep, spawn
from portexec.procfs import descendants
from portexec.request import NO, NONE
from portexec.server_errors import NotReady

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.events import Reporter

# What may be asked of a server.
RESTART = "restart"
REPAIR = "repair"  # a restart for which no program has asked
REPLACE = "replace"
GIVE_UP = "give up"

_OTHER_ADDRESSES = 0.1  # seconds in which a server that listens on one address takes others, too
_REPLACEMENT_TIMEOUT = 60.0  # seconds for a new start beside an old one to become ready, without --ready-timeout


class Server:
    """The starts of one server, of which `current` is the one that counts.

    `make_start` makes another start by a plan, and the run follows it. It raises OSError when resources run out. `starts` are
    those of which something is alive.
    `stopped` happens when it is decided that the run ends: no start follows then.
    `listeners` are those of the launch, at the addresses where the command was last seen to listen.
    """

    def __init__(
        self,
        launch: Launch,
        reporter: Reporter,
        make_start: Callable[[Plan], Start],
        current: Start,
        starts: Callable[[], list[Start]],
        stopped: Event,
    ) -> None:
        self.launch = launch
        self.lifetime = launch.request.lifetime
        self.reporter = reporter
        self.make_start = make_start
        self.current = current
        self.starts = starts
        self.stopped = stopped
        self.listeners = list(launch.bound.listeners)
        self.is_ready = Event()  # for the first time
        self.is_last = False  # a program that is about to stop it has asked for the end of the command
        self.has_given_up = False  # the command has ended too often before it was ready; people were told
        self._ready = self.lifetime.ready_for(launch.choice.hand_off)
        self._asked: dict[str, PortexecError | None] = {}  # what others have asked for, in order
        self._news = Event()
        self._is_over = False  # no other start is to follow

    def can_replace(self) -> bool:
        """Whether HUP means a replacement: two starts can share sockets that we pass on, but cannot bind the same number."""
        return self.lifetime.restart != NO and self.launch.first_fd is not None

    def ask(self, what: str, error: PortexecError | None = None) -> None:
        """Ask for something to be done next. Two requests for the same thing before it is done are one."""
        self._asked.setdefault(what, error)
        self._news.set()

    def start_of(self, pid: int) -> Start:
        """The start below whose shim the process is; the newest where that is not known."""
        starts = self.starts() or [self.current]
        if len(starts) < 2:
            return starts[0]
        return next((each for each in starts if pid in descendants(root=each.shim.pid)), starts[-1])

    async def run(self) -> PortexecError | None:
        """Live until no other start is to follow. Returns what went wrong; None if the command has just ended."""
        self.follow(self.current)
        backoff = Backoff()
        while True:
            await first(self.current.reaches(ENDED), self._is_asked())
            await self._unless_stopped()
            if self.current.has_reached(ENDED):
                backoff, error = await self._go_on(backoff)
            elif GIVE_UP in self._asked:
                return self._asked[GIVE_UP]
            elif RESTART in self._asked or REPAIR in self._asked:
                self._take(REPAIR)
                error = await self._restart(is_asked_for=self._take(RESTART))
            else:
                self._take(REPLACE)
                self.current, problem = await replace(self.current, self._begin_beside, self.reporter)
                await self._unless_stopped()
                if problem is not None:
                    self.reporter.error(problem)
                error = None
            if error is not None or self._is_over:
                return error

    async def _unless_stopped(self) -> None:
        """Return if the run goes on. If it is stopping, wait until the run closes this task."""
        if self.stopped.is_set():
            await Event().wait()

    async def _is_asked(self) -> None:
        while not self._asked:
            self._news = Event()
            await self._news.wait()

    def _take(self, what: str) -> bool:
        if what not in self._asked:
            return False
        del self._asked[what]
        return True

    # What follows an end.

    async def _go_on(self, backoff: Backoff) -> tuple[Backoff, PortexecError | None]:
        """After the end of the current start: begin another one, or end the server."""
        end = self.current.end
        assert end is not None  # noqa: S101  # that is what ENDED means
        since = self.current.course.since.get(READY)
        backoff = backoff.after_end(None if since is None else end.at - since)
        if end.failure is not None or not self._is_another_wanted(backoff):
            self._is_over = True
            return backoff, end.failure
        self.reporter.note(f"the command ended ({how_it_ended(end.wait_status)}); restart in {backoff.delay:g} s")
        await self.current.reaches(GONE)
        error = await self._make_next()  # before the pause: if portexec is killed in the pause, its shim undoes what was made
        if error is None:
            await first(self.current.reaches(ENDED), self._is_asked(), sleep(backoff.delay))
            await self._unless_stopped()
            self._take(REPLACE)
            self._take(REPAIR)
            self.current.is_asked_for = self._take(RESTART)
            self._begin_next()
        return backoff.after_delay(), error

    def _is_another_wanted(self, backoff: Backoff) -> bool:
        end = self.current.end
        if end is None or self.is_last or not is_wanted(self.lifetime.restart, end.wait_status):
            return False
        if self._is_left_alone():
            return False
        if backoff.has_had_enough():
            self.has_given_up = True
            how_often = f"{backoff.failures} times in a row before it was ready, so there is no restart"
            hint = "" if self.is_ready.is_set() else self.launch.how_to_take()
            self.reporter.note(f"the command ended {how_often}: {how_it_ended(end.wait_status)}", hint)
            return False
        return True

    def _is_left_alone(self) -> bool:
        """Whether the shim of the current start was killed. Another start would run beside the processes that it has left."""
        if self.current.is_orphaned and self.lifetime.restart != NO:
            self.reporter.note("the process that looked after the command was killed, so there is no restart")
        return self.current.is_orphaned

    async def _restart(self, *, is_asked_for: bool) -> PortexecError | None:
        """Stop the whole tree, and start the command again with all that is bound."""
        self.current.stop()
        await self.current.reaches(GONE)
        if self._is_left_alone():
            self._is_over = True
            return None if self.current.end is None else self.current.end.failure
        error = await self._make_next()
        if error is None:
            self.current.is_asked_for = is_asked_for
            self._begin_next()
        return error

    def _begin_beside(self) -> Start:
        """Begin another start beside the current one, with listeners of its own where that is possible. Raises OSError."""
        from portexec.binding.succession import Succession

        succession = Succession(self.launch.bound)
        with CloseOnError(succession):
            start = self.make_start(self.launch.plan.passing(succession.descriptors()))
        for name, why in succession.why_not.items():
            self.reporter.detail(f"the new start shares listener {name} with the old one: {why}")
        start.succession = succession
        self.launch.bound.undo.leave_to(start.shim)
        start.begin()
        self.follow(start)
        return start

    async def _make_next(self) -> PortexecError | None:
        """Make the next start, which is the current one from now on, and does not begin yet. Returns what prevents that."""
        try:
            self.listen_again()
            if self.launch.bound.is_unix_listener_dead():
                await self._end_all()  # they have copies, which keep the name
                self.launch.bound.make_unix_listeners_anew()
            old, self.current = self.current, self.make_start(self.launch.plan)
        except OSError as error:
            return cannot("start the command again", error)
        except PortexecError as error:
            return error
        self.launch.bound.undo.leave_to(self.current.shim)
        old.dismiss()
        return None

    async def _end_all(self) -> None:
        """Wait until nothing is left of any start, nor its shim."""
        starts = [*self.starts(), self.current]
        for start in starts:
            if not start.has_reached(GONE):
                start.stop()
        for start in starts:
            await start.reaches(GONE)
            start.dismiss()
            await start.is_dismissed()

    def _begin_next(self) -> None:
        if self.lifetime.is_lazy:
            self.reporter.tell_idle(is_asked_for=self.current.is_asked_for)
            self.current.is_asked_for = False
        elif not self.current.has_reached(ENDED):
            self.current.begin()
        self.follow(self.current)

    def listen_again(self) -> None:
        """Let our sockets listen again that a server has shut down at its end, as some do. Raises PortexecError."""
        try:
            self.launch.bound.listen_again()
        except OSError as error:
            raise cannot("listen again", error) from error

    # One start.

    def follow(self, start: Start) -> None:
        """Look after a start, beside the others, until nothing of it is left."""
        spawn(self._look_after(start))
        if self.launch.choice.hand_off == GUARD and self.reporter.has_announced:
            spawn(self._announce_again(start))

    async def _announce_again(self, start: Start) -> None:
        """Announce another address when the command serves, but cannot be reached at the announced one."""
        await start.addresses.grow()
        await sleep(_OTHER_ADDRESSES)
        self.reporter.announce_others(self.launch.bound.listeners, self._readiness_of(start).followed())

    async def _look_after(self, start: Start) -> None:
        if start.course.state == IDLE and await first(start.reaches(ENDED), self._hears_client()) == 1:
            start.begin()
        if self._ready.form != NONE:
            await self._make_ready(start)
        await start.reaches(GONE)
        if start is not self.current and not self._is_over:
            self._repair_listeners()

    def _repair_listeners(self) -> None:
        """After the end of a start that shared listeners with the current one, and may have shut them down."""
        try:
            self.listen_again()
        except PortexecError as error:
            self.ask(GIVE_UP, error)
            return
        if self.launch.bound.is_unix_listener_dead() and not self.current.has_reached(ENDED):
            self.reporter.note("the command that ended has shut down a unix socket that the other one serves on, too; restart")
            self.ask(REPAIR)

    async def _hears_client(self) -> None:
        """Wait for the first connection to any listener."""
        sockets = [listener.socket for listener in self.launch.bound.listeners if listener.socket is not None]
        await first(*(readable(socket) for socket in sockets))

    def has_begun(self, start: Start) -> None:
        """The command runs. With `--ready none` it is ready at once, before anything else can come from it."""
        if self._ready.form == NONE:
            self._become_ready(start, self._readiness_of(start))

    def _readiness_of(self, start: Start) -> Readiness:
        return Readiness(
            self._ready,
            self.listeners if start.succession is None else start.succession.listeners,
            start,
            is_admitted=self.launch.choice.hand_off == GUARD,
            is_shared=lambda: len(self.starts()) > 1 and start.shares_listeners(),
        )

    async def _make_ready(self, start: Start) -> None:
        """Wait until the start is ready, has ended, or has had its time."""
        readiness, patience = self._readiness_of(start), self._patience_with(start)
        unready, who = Unready(readiness), "the command" if start is self.current else "the new start"
        progress = self.reporter.show_progress(who, unready.awaited, patience)
        found = await first(start.reaches(ENDED), self._is_ready(start, readiness), progress, within=patience)
        if found == 1:
            self._become_ready(start, readiness)
        elif found is None:
            message = f"{who} was not ready after {patience:g} s: it did not {unready.missed()}"
            hint = unready.hint(self.launch.how_to_take(), names_port=self.launch.request.names_port())
            self._give_up(start, NotReady(message, hint))

    async def _is_ready(self, start: Start, readiness: Readiness) -> None:
        await start.reaches(RUNNING)
        await readiness.wait()

    def _patience_with(self, start: Start) -> float | None:
        """The seconds that a start has to become ready; None for no limit."""
        if self.lifetime.ready_timeout is None and start is not self.current:
            return _REPLACEMENT_TIMEOUT
        return self.lifetime.ready_timeout

    def _give_up(self, start: Start, error: NotReady) -> None:
        """The time is over. That ends the server, unless there is another start to go on with, or will be."""
        if start is self.current and (not self.is_ready.is_set() or self.lifetime.restart == NO):
            self.ask(GIVE_UP, error)
        else:
            self.reporter.note(error.message)
            start.stop()

    def _become_ready(self, start: Start, readiness: Readiness) -> None:
        if start.succession is None:  # else our sockets are passed on, whose addresses stay
            self.listeners = readiness.followed()
        start.become_ready()
        self.reporter.tell_ready(start.pid, self.listeners)
        if self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
            self.reporter.detail(f"ready after {time.monotonic() - start.course.since[PREPARING]:.2f}s")
        if not self.is_ready.is_set():
            self.is_ready.set()
            spawn(self.reporter.announce_ready(start.pid, self.listeners))
