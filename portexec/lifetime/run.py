"""A run from its first start to the last process gone: signals, the tests, what programs ask for, and how it ends.

    portexec (this) -> a shim for each start -> the command

It is the same run for plain `guard` and for every option under Lifetime; what differs are values of the request.

**The order of simultaneous events** is written in `Run._take`, which reads everything at once: what a command said counts
before its end, its start before its end, and all of that before what we are told. What follows is decided by tasks that run
after that: the end of a start before its readiness (`Server._make_ready`), a request to stop before a restart (`Run.live`).
"""

from __future__ import annotations

import _signal
import os
import time

from portexec.errors import PortexecError, how_it_ended, reason
from portexec.lifetime.notify import NotifySocket, pass_on
from portexec.lifetime.server import REPLACE, RESTART, Server
from portexec.lifetime.start import ENDED, GONE, RUNNING, Start
from portexec.parent import signals, tree
from portexec.parent.loop import Event, first, readable, spawn
from portexec.parent.witness import ALONE
from portexec.request import NONE, Ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.events import Reporter
    from portexec.parent.shim import Shim
    from portexec.parent.signals import Inbox

_ONE_REQUEST = 0.1  # seconds in which the same signal to end counts as one request: timeout(1) sends it to us and to our group


class Outcome:
    """How a run ended: what to end with, as a wait status of waitpid(2), and an error to print, if it is one.

    `is_by_signal`: a signal to portexec decided it, at the time `at`, which is a time.monotonic().
    """

    __slots__ = ("at", "error", "is_by_signal", "wait_status")

    def __init__(self, wait_status: int, error: PortexecError | None = None, *, is_by_signal: bool = False) -> None:
        self.wait_status = wait_status
        self.error = error
        self.is_by_signal = is_by_signal
        self.at = time.monotonic()

    @classmethod
    def failed(cls, error: PortexecError) -> Outcome:
        """A failure of the run rather than the end of a command."""
        return cls(error.status << 8, error)


class Family:
    """The processes around portexec: `others` are children from before it was portexec, which are not ours to stop.

    `shells` may pass on the hang-up of the terminal that portexec had at its beginning, if it had one. `has_orphans`: a shim
    was killed, and has left its tree to us.
    """

    __slots__ = ("has_orphans", "others", "shells")

    def __init__(self, others: set[int], shells: set[int]) -> None:
        self.others = others
        self.shells = shells
        self.has_orphans = False


class Run:
    """One run. Its first start is prepared, and told to go unless it is lazy."""

    def __init__(
        self,
        launch: Launch,
        current: Start,
        make_shim: Callable[[Plan], Shim],
        inbox: Inbox,
        notify: NotifySocket | None,
        reporter: Reporter,
        family: Family,
    ) -> None:
        self.launch = launch
        self.lifetime = launch.request.lifetime
        self.make_shim = make_shim
        self.inbox = inbox
        self.notify = notify
        self.reporter = reporter
        self.family = family
        self.server = Server(launch, reporter, lambda: self._follow_start(Start(make_shim(launch.plan))), current)
        self.starts = [current]  # of which a shim is alive, the tests' too
        self.tests: Start | None = None
        self.stopping = _Stopping()

    async def live(self, early: Iterable[signals.Received]) -> Outcome:
        """Live to the last process gone. `early` are the signals that came when there was no shim yet."""
        for signal in early:
            self._take_signal(signals.Received(signal.number, ALONE, from_terminal=signal.from_terminal))
        self._follow_start(self.server.current)
        spawn(self._follow_signals())
        if self.notify is not None:
            spawn(self._follow_notifications(self.notify))
        if self.lifetime.control_fd is not None:
            spawn(self._follow_requests(self.lifetime.control_fd))
        await first(self.stopping.is_decided.wait(), self._serve(), self._test())
        await self._stop_all()
        return self._outcome()

    async def _serve(self) -> None:
        """The server's life. Its end is the end of the run."""
        error = await self.server.run()
        last = self.server.current.end
        wait_status = last.wait_status if last is not None else 0
        if error is None and self.lifetime.then:
            when = "before the tests did" if self.tests is not None else "before it was ready"
            error = PortexecError(f"the server ended {when}: {how_it_ended(wait_status)}")
        elif error is None and not self.server.is_ready.is_set() and self.lifetime.ready_for("") != Ready(NONE):
            self.reporter.note(f"the command ended before it was ready: {how_it_ended(wait_status)}")
        self.stopping.decide(Outcome.failed(error) if error else Outcome(wait_status))

    async def _test(self) -> None:
        """The tests, when the server is ready. A lazy one gets its first connection from them."""
        if not self.lifetime.then:
            await Event().wait()
        if not self.lifetime.is_lazy:
            await self.server.is_ready.wait()
        try:
            plan = self.launch.plan_shell(self.lifetime.then, self.server.listeners)
            self.tests = self._follow_start(Start(self.make_shim(plan)))
        except OSError as error:
            self.stopping.decide(Outcome.failed(PortexecError(f"cannot start the tests: {reason(error)}")))
            return
        self.tests.begin()
        await self.tests.reaches(ENDED)
        end = self.tests.end
        assert end is not None  # noqa: S101  # that is what ENDED means
        self.stopping.decide(Outcome.failed(end.failure) if end.failure else Outcome(end.wait_status))

    # What happens.

    def _follow_start(self, start: Start) -> Start:
        if start not in self.starts:
            self.starts.append(start)
        spawn(self._follow_shim(start))
        return start

    async def _follow_shim(self, start: Start) -> None:
        while start.state != GONE:
            await readable(start.shim.link)
            self._take()

    async def _follow_signals(self) -> None:
        while True:
            await readable(self.inbox)
            self._take()

    async def _follow_notifications(self, notify: NotifySocket) -> None:
        while True:
            await readable(notify.socket)
            self._take_notifications()

    def _take(self) -> None:
        """Take all that has come."""
        for start in self.starts:
            start.take()
        if self.notify is not None:
            self._take_notifications()  # before anything follows from an end: it was said before that
        for signal in self.inbox.read():
            self._take_signal(signal)
        for start in list(self.starts):
            self._take_news(start)

    def _take_news(self, start: Start) -> None:
        numbers, start.signalled = start.signalled, []
        for number in numbers:
            self._take_signal(signals.Received(number, ALONE, from_terminal=False))
        news, start.news = start.news, []
        is_server = start is not self.tests
        if RUNNING in news and is_server:
            self.reporter.tell("started", pid=start.pid)
            self.server.has_begun(start)
        if ENDED in news and start.end is not None:
            if is_server and start.has_reached(RUNNING):
                self.reporter.tell("ended", status=start.end.wait_status, by_itself=start.end.by_itself)
            self._look_for_reason(start)
        if GONE in news:
            self.starts.remove(start)
            self.family.has_orphans = self.family.has_orphans or start.was_shim_killed
            if start is not self.server.current:
                start.dismiss()
            if start.end is not None and start.end.is_left:
                self.family.others.add(start.shim.pid)  # it stays with its daemon

    def _look_for_reason(self, start: Start) -> None:
        """End the run when a command has ended of the terminal's Ctrl-\\ to all of us, whichever ended first."""
        was_quit = start.began is not None and start.began < self.stopping.quit_at
        if was_quit and start.end is not None and signals.has_died_of(start.end.wait_status, _signal.SIGQUIT):
            self.stopping.decide(Outcome(start.end.wait_status))

    def _take_notifications(self) -> None:
        assert self.notify is not None  # noqa: S101  # asked for only then
        own = self.launch.request.given.get("NOTIFY_SOCKET", "")
        for pid, fields in self.notify.received():
            self.server.start_of(pid).said.take(fields)
            pass_on(fields, own)

    async def _follow_requests(self, fd: int) -> None:
        """Do what the program at the control descriptor asks for; its end is the end of all."""
        from portexec import control

        requests = control.Requests(fd)
        while not self.stopping.is_decided.is_set():
            await readable(fd)
            for request in requests.receive():
                if request == control.RESTART:
                    self.server.ask(RESTART)
                elif request == control.STOP:
                    self.stopping.decide(Outcome(0))

    # Signals.

    def _take_signal(self, signal: signals.Received) -> None:
        current = self.server.current
        if signal.number == _signal.SIGQUIT and signal.from_terminal:
            self.stopping.quit_at = time.monotonic()
        if signal.number == _signal.SIGCHLD:
            self._reap()
        elif self._is_to_stop(signal) and not signals.is_ignored(signal.number):
            self._stop_by(signal)
        elif signal.number == _signal.SIGHUP and self.server.can_replace():
            self.server.ask(REPLACE)
        elif current.is_running() and signals.is_to_be_forwarded(signal):
            current.forward(signal.number, signal.sender)
        elif signal.from_terminal and not any(start.is_running() for start in self.starts):
            signals.stop_with(signal.number)  # nobody is there with whom we would stop

    def _is_to_stop(self, signal: signals.Received) -> bool:
        """TERM, INT, and the hang-up of a terminal, from the kernel or passed on by a shell.

        Who lives on when the terminal has gone may still be sent a HUP by others, who mean a replacement. Where portexec merely
        waits, what the terminal sends is for the command alone: some have a use for Ctrl-C.
        """
        if not self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
            return signal.number in signals.STOP_REQUESTS and not signal.from_terminal
        has_hung_up = signal.from_terminal or (signal.sender in self.family.shells and not signals.has_terminal())
        return signal.number in signals.STOP_REQUESTS or (signal.number == _signal.SIGHUP and has_hung_up)

    def _stop_by(self, signal: signals.Received) -> None:
        """Stop by a signal; at once when it is told again."""
        now = time.monotonic()
        last, self.stopping.signal = self.stopping.signal, signal
        is_soon = last is not None and last.number == signal.number and now - self.stopping.signal_at < _ONE_REQUEST
        self.stopping.signal_at = now
        if is_soon and not signal.from_terminal:
            return
        if last is None and not self.stopping.is_decided.is_set():
            self.stopping.decide(Outcome(signal.number, is_by_signal=True))
        elif self.lifetime.patience is None and self.server.current.is_running():
            self.server.current.forward(signal.number, signal.sender)
        else:
            self.stopping.is_hurried.set()

    def _reap(self) -> None:
        for pid, status in signals.reap():
            self.family.others.discard(pid)  # another process may get its number
            if os.WIFSTOPPED(status) and not self.stopping.is_decided.is_set():
                signals.stop_with(_signal.SIGTSTP)  # a shim stopped because its command was

    # The end.

    async def _stop_all(self) -> None:
        """Stop every tree: TERM, and KILL later, or at once when we are told a second time."""
        signal = self.stopping.signal
        if signal is not None and signal.from_terminal and signal.number == _signal.SIGINT:
            # Ctrl-C has told all of them. What runs has its time to end by itself.
            interrupted = self.tests or self.server.current
            if interrupted.is_running():
                await first(interrupted.reaches(ENDED), self.stopping.is_hurried.wait(), within=self.lifetime.kill_after)
            signal = None
        for start in list(self.starts):
            if signal is None:
                start.stop()
            else:
                start.stop(signal.number, signal.sender)
        self._take()
        await first(self._all_gone(), self.stopping.is_hurried.wait())
        for start in self.starts:
            start.kill()
        await self._all_gone()
        await self._clear_away()

    async def _all_gone(self) -> None:
        for start in list(self.starts):
            await start.reaches(GONE)

    async def _clear_away(self) -> None:
        """Stop what is below us and below no shim: one that was killed has left it behind."""
        if not self.family.has_orphans:
            return
        spare = self.family.others | {self.server.current.shim.pid}  # which waits to be dismissed
        await tree.clear_away(spare, self.lifetime.kill_after, self.stopping.is_hurried)

    def _outcome(self) -> Outcome:
        """How to end. Where a signal told us to, it is as the command ended of that: 0 after a clean stop."""
        outcome, end = self.stopping.outcome, self.server.current.end
        if outcome.is_by_signal and not self.lifetime.then and end is not None and end.at >= outcome.at:
            return Outcome(end.wait_status, end.failure) if self.server.current.has_reached(RUNNING) else outcome
        return outcome


class _Stopping:
    """The end of a run: how it was decided, and by which signal, if by one."""

    __slots__ = ("is_decided", "is_hurried", "outcome", "quit_at", "signal", "signal_at")

    def __init__(self) -> None:
        self.outcome = Outcome(0)  # not before it is decided
        self.is_decided = Event()
        self.is_hurried = Event()  # told twice to stop
        self.signal: signals.Received | None = None  # that told us to stop
        self.signal_at = 0.0
        self.quit_at = 0.0  # by the terminal; some take it for a question (JVMs print their threads) and go on

    def decide(self, outcome: Outcome) -> None:
        """Decide how the run ends. Whoever comes first does."""
        if not self.is_decided.is_set():
            self.outcome = outcome
            self.is_decided.set()
