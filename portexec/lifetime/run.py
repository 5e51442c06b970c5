"""A run from its first start to the last process gone: signals, the tests, what programs ask for, and how it ends.

    portexec (this) -> a shim for each start -> the command

The same code serves plain `guard` and every option under Lifetime; only values of the request differ.

**The order of simultaneous events** is written in `Run._take`, which reads everything at once. What a command said counts
before its end, its start before its end, and all of these before the signals that we are sent. Tasks decide what follows, and
they run after that: the end of a start counts before its readiness (`Server._make_ready`), a request to stop before a restart
(`Run.live`). So a request to stop that is found together with the end of the command decides how portexec ends.
"""

from __future__ import annotations

import _signal
import time

from portexec.errors import PortexecError, cannot
from portexec.lifetime.server import REPLACE, RESTART, Server
from portexec.lifetime.start import ENDED, GONE, PREPARING, RUNNING, Start
from portexec.parent import child, signals, tree
from portexec.parent.loop import Event, first, readable, spawn
from portexec.parent.protocol import ALONE
from portexec.parent.shim import shims
from portexec.procfs import is_ending, is_told_by_terminal
from portexec.request import NO, NONE, Ready

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.events import Reporter
    from portexec.lifetime.notify import NotifySocket
    from portexec.lifetime.program import Program
    from portexec.parent.family import Family
    from portexec.parent.shim import Shim

_ONE_REQUEST = 0.1  # seconds in which signals to end are one request: timeout(1) signals first us, and then our group


class Outcome:
    """How a run ended: what to end with, as a wait status of waitpid(2), and an error to print, if there is one.

    `is_told`: somebody told portexec to stop. `at` is the time of the decision, as time.monotonic(). `blames_server`: the
    server has failed, or was not ready, so that people want to see what it wrote.
    """

    __slots__ = ("at", "blames_server", "error", "is_told", "wait_status")

    def __init__(
        self,
        wait_status: int,
        error: PortexecError | None = None,
        *,
        is_told: bool = False,
        blames_server: bool = False,
    ) -> None:
        self.wait_status = wait_status
        self.error = error
        self.is_told = is_told
        self.blames_server = blames_server
        self.at = time.monotonic()

    @classmethod
    def failed(cls, error: PortexecError, *, blames_server: bool = False) -> Outcome:
        """A failure of the run rather than the end of a command."""
        return cls(error.status << 8, error, blames_server=blames_server)


class Run:
    """One run. Its first start is prepared, and was told to go; that of a lazy run is idle."""

    def __init__(
        self,
        launch: Launch,
        current: Start,
        make_shim: Callable[[Plan], Shim],
        notify: NotifySocket | None,
        reporter: Reporter,
        family: Family,
    ) -> None:
        self.launch = launch
        self.lifetime = launch.request.lifetime
        self.make_shim = make_shim
        self.notify = notify
        self.reporter = reporter
        self.family = family
        self.orphaned: list[Start] = []  # starts whose shims have ended too early, and have left their trees to us
        self._told: set[int] = set()  # what these have left, and has had its TERM
        self.stopping = _Stopping()
        self.starts = [current]  # the starts of which something is alive, the tests' too
        self.tests: Start | None = None
        self.server = Server(launch, reporter, self._make_start, current, self._starts_of_server, self.stopping.is_decided)

    async def live(self, early: Iterable[signals.Received]) -> Outcome:
        """Live until the last process has gone. `early` are the signals that came when there was no shim yet."""
        for signal in early:
            self.take_signal(signals.Received(signal.number, ALONE, from_terminal=signal.from_terminal))
        self._follow_start(self.server.current)
        if not self.family.is_shared:
            spawn(self._follow_signals())
        if self.notify is not None:
            spawn(self._follow_notifications(self.notify))
        if self.reporter.program is not None:
            spawn(self._follow_requests(self.reporter.program))
        await first(self.stopping.is_decided.wait(), self._serve(), self._test())
        await self._stop_all()
        return self._outcome()

    async def _serve(self) -> None:
        """The server's life. Its end is the end of the run."""
        error = await self.server.run()
        last = self.server.current
        wait_status = last.end.wait_status if last.end is not None else 0
        if error is None and self.lifetime.then and not last.has_died_of_forwarded():
            when, hint = (
                ("before the tests did", "") if self.tests else ("before it was ready", self.launch.advice_after_early_end())
            )
            error = PortexecError(f"the server ended {when}: {last.how_it_ended()}", hint)
        is_early = not self.server.is_ready.is_set() and self.lifetime.ready_for("") != Ready(NONE)
        if error is None and is_early and not self.reporter.is_driven and not self.server.has_given_up:
            note = f"the command ended before it was ready: {last.how_it_ended()}"
            self.reporter.note(note, self.launch.how_to_take())
        if error is not None:
            self.stopping.decide(Outcome.failed(error, blames_server=True))
        else:
            self.stopping.decide(Outcome(wait_status, blames_server=is_early or wait_status != 0))

    async def _test(self) -> None:
        """Run the tests when the server is ready. A lazy server gets its first connection from the tests."""
        if not self.lifetime.then:
            await Event().wait()
        if not self.lifetime.is_lazy:
            await self.server.is_ready.wait()
        try:
            plan = self.launch.plan_shell(self.lifetime.then, self.server.listeners)
            self.tests = self._make_start(plan)
        except OSError as error:
            self.stopping.decide(Outcome.failed(cannot("start the tests", error)))
            return
        self.tests.begin()
        await self.tests.reaches(ENDED)
        end = self.tests.end
        assert end is not None  # noqa: S101  # that is what ENDED means
        if signals.has_died_of(end.wait_status, _signal.SIGINT):
            # Perhaps of Ctrl-C, which the terminal sends to one process after the other.
            await first(self.stopping.is_decided.wait(), within=signals.WHOLE_GROUP)
        if self._has_server_ended():
            await Event().wait()  # `_serve` says so
        self.stopping.decide(Outcome.failed(end.failure) if end.failure else Outcome(end.wait_status))

    def _has_server_ended(self) -> bool:
        """Whether the server has ended, which ends the run. Its shim may not have told yet: the last test may have ended it."""
        server = self.server.current
        return self.lifetime.restart == NO and server.has_reached(RUNNING) and is_ending(server.command_pid)

    # What happens.

    def _starts_of_server(self) -> list[Start]:
        return [start for start in self.starts if start is not self.tests]

    def _make_start(self, plan: Plan) -> Start:
        return self._follow_start(Start(self.make_shim(plan)))

    def _follow_start(self, start: Start) -> Start:
        if start not in self.starts:
            self.starts.append(start)
        spawn(self._follow_shim(start))
        return start

    async def _follow_shim(self, start: Start) -> None:
        while not start.has_reached(GONE):
            await readable(start.shim.link)
            self._take()

    async def _follow_signals(self) -> None:
        while True:
            await readable(self.family.inbox)
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
            self._take_notifications()  # before anything follows from an end: they were sent before the end
        for signal in self.family.inbox.read() if not self.family.is_shared else ():
            self.take_signal(signal)
        for start in list(self.starts):
            self._take_news(start)

    def _take_news(self, start: Start) -> None:
        numbers, start.signalled = start.signalled, []
        for number in numbers:
            # A signal to the shim of the tests, or of an earlier start, was for its group: the current shim reports it, too.
            if start is self.server.current or number in signals.STOP_REQUESTS:
                self.take_signal(signals.Received(number, ALONE, from_terminal=False))
        news, start.course.news = start.course.news, []
        is_server = start is not self.tests
        if RUNNING in news and is_server:
            self.reporter.tell_started(start.pid, is_asked_for=start.is_asked_for)
            self.server.has_begun(start)
        if ENDED in news and start.end is not None:
            if is_server and start.has_reached(RUNNING):
                is_current = start is self.server.current
                self.reporter.tell_ended(start.end.wait_status, by_itself=start.end.by_itself, is_current=is_current)
            self._look_for_reason(start)
        if GONE in news:
            self.starts.remove(start)
            self.orphaned += [start] if start.is_orphaned else []
            self._tell_if_orphaned(start)
            if start is not self.server.current:
                start.dismiss()
            if start.is_orphaned:
                spawn(self._clear_away())  # the run may go on for long
            if start.end is not None and start.end.is_left:
                self.family.others.add(start.shim.pid)  # it stays with its daemon

    def _tell_if_orphaned(self, start: Start) -> None:
        """Say why we end a command that nobody told to end. With `--restart`, the server says that there is no restart."""
        is_known = self.stopping.is_decided.is_set() or (start.end is not None and start.end.failure is not None)
        if start.is_orphaned and not is_known and self.lifetime.restart == NO:
            self.reporter.note("the process that looked after the command was killed, so the command is ended")

    def _look_for_reason(self, start: Start) -> None:
        """End the run when a command has ended of the terminal's Ctrl-\\ to all of us, whichever ended first."""
        began = start.course.since.get(PREPARING)
        was_quit = began is not None and began < self.stopping.quit_at
        if was_quit and start.end is not None and signals.has_died_of(start.end.wait_status, _signal.SIGQUIT):
            self.stopping.decide(Outcome(start.end.wait_status))

    def _take_notifications(self) -> None:
        from portexec.lifetime.notify import pass_on  # few runs need it, nor the rest of the module

        assert self.notify is not None  # noqa: S101  # asked for only then
        own = self.launch.request.given.get("NOTIFY_SOCKET", "")
        for pid, fields in self.notify.received():
            self.server.start_of(pid).said.take(fields)
            pass_on(fields, own)

    async def _follow_requests(self, program: Program) -> None:
        """Do what the program that drives us asks for. When it ends, the run ends."""
        from portexec import control

        while not self.stopping.is_decided.is_set():
            for request in await program.asked():
                if request.asked == control.RESTART:
                    self.server.ask(RESTART)
                elif request.asked == control.STOP:
                    self.stopping.decide(Outcome(0, is_told=True))
                elif request.asked == control.LET_GO:
                    self.reporter.let_go()
                    return
                elif request.asked == control.KILL:
                    self.stopping.decide(Outcome(0, is_told=True))
                    self.stopping.is_hurried.set()
                elif request.asked == control.SIGNAL and request.number and self.server.current.is_running():
                    self.server.is_last = self.server.is_last or request.is_last
                    self.server.current.forward(request.number, ALONE)

    # Signals.

    def take_signal(self, signal: signals.Received) -> None:
        """Do what follows from a signal to this process."""
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
        elif signal.number == _signal.SIGQUIT and not self._is_any_running() and not signals.is_ignored(signal.number):
            self.stopping.decide(Outcome(signal.number, is_told=True))  # there is no command that it could end
        elif signal.from_terminal and signals.is_to_stop_us(signal.number) and not self._is_any_running():
            signals.stop()  # there is no command with which we would stop

    def _is_any_running(self) -> bool:
        return any(start.is_running() for start in self.starts)

    def _is_to_stop(self, signal: signals.Received) -> bool:
        """Whether a signal asks us to stop: TERM, INT, and the hang-up of a terminal, from the kernel or passed on by a shell.

        A HUP from anybody else asks for a replacement, also when the terminal has gone. Where portexec merely waits, signals of
        the terminal are for the command alone: some commands have a use for Ctrl-C.
        """
        if not self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
            return signal.number in signals.STOP_REQUESTS and not signal.from_terminal
        has_hung_up = signal.from_terminal or (signal.sender in self.family.shells and not signals.has_terminal())
        return signal.number in signals.STOP_REQUESTS or (signal.number == _signal.SIGHUP and has_hung_up)

    def _stop_by(self, signal: signals.Received) -> None:
        """Stop by a signal; at once if this is a second request.

        A copy of the same signal is nothing new. Another signal shortly after it is part of the same request: some programs
        stop a server with INT and TERM. Where portexec merely waits, the other signal is for the command, which may treat it
        in another way.
        """
        within = signals.LATE_SHIM if signal.sender == ALONE else _ONE_REQUEST
        is_copy, is_same_request = self.stopping.hears(signal, within)
        if is_copy:
            return
        if not self.stopping.is_decided.is_set():
            self.stopping.signal = signal
            self.stopping.decide(Outcome(signal.number, is_told=True))
        elif self.lifetime.patience is None and self.server.current.is_running():
            self.server.current.forward(signal.number, signal.sender)
        elif not is_same_request:
            self.stopping.is_hurried.set()

    def _reap(self) -> None:
        stopped = self.family.reap()
        if self.stopping.is_decided.is_set():
            for pid in stopped:
                # The shim had our STOP, and CONT with it, and stopped afterwards with its command. Nobody else would wake it.
                signals.send(pid, _signal.SIGCONT)
        elif stopped and signals.has_terminal():
            self._stop_with([start for start in self.starts if start.shim.pid in stopped])

    def _stop_with(self, starts: list[Start]) -> None:
        """Stop with the commands of shims that have stopped. A shim whose command goes on already stopped too late: wake it."""
        late = [start for start in starts if not start.is_stopped()]
        for start in late:
            signals.send(start.shim.pid, _signal.SIGCONT)
        if late != starts:
            signals.stop()

    # The end.

    async def _stop_all(self) -> None:
        """Stop every tree: TERM, and later KILL, at once if we are told a second time."""
        self.reporter.tell_stopping()
        signal = self.stopping.signal
        if signal is not None and signal.from_terminal and signal.number == _signal.SIGINT:
            # The terminal has sent Ctrl-C to all commands. Those that were told have the time to end by themselves.
            running = [start for start in self.starts if start.is_running()]
            # A command whose pid we do not know yet has the signal pending: signals are blocked up to exec.
            interrupted = [start for start in running if not start.pid or is_told_by_terminal(start.pid, signal.number)]
            await first(_all_reach(interrupted, ENDED), self.stopping.is_hurried.wait(), within=self.lifetime.kill_after)
            signal = None
        for start in list(self.starts):
            if signal is None:
                start.stop()
            else:
                start.stop(signal.number, signal.sender)
        self._take()
        await first(_all_reach(list(self.starts), GONE), self.stopping.is_hurried.wait())
        for start in self.starts:
            start.kill()
        await _all_reach(list(self.starts), GONE)
        await self._clear_away()

    async def _clear_away(self) -> None:
        """Stop the processes that are below us and below no shim: a shim that was killed has left them behind."""
        if not self.orphaned:
            return
        for start in self.orphaned:
            start.shim.leave()  # it ends anyway; only after its end the processes below it become ours
            await start.shim.has_gone.wait()
        self._told |= {pid for pid in (start.command_pid for start in self.orphaned) if child.was_told_by_kernel(pid)}
        await tree.clear_away(self._spared, self.lifetime.kill_after, self.stopping.is_hurried, self._told)

    def _spared(self) -> set[int]:
        """Those of our children that are not to be stopped."""
        return self.family.others | shims.keys()

    def _outcome(self) -> Outcome:
        """How to end. Where a signal told us to, we end as the command did after that: 0 after a clean stop."""
        outcome, end = self.stopping.outcome, self.server.current.end
        if self.stopping.signal is not None and not self.lifetime.then and end is not None and end.at >= outcome.at:
            has_run = self.server.current.has_reached(RUNNING)
            return Outcome(end.wait_status, end.failure, is_told=True) if has_run else outcome
        return outcome


async def _all_reach(starts: Iterable[Start], state: str) -> None:
    for start in starts:
        await start.reaches(state)


class _Stopping:
    """The end of a run: what was decided, and by which signal, if by one."""

    __slots__ = ("_heard", "is_decided", "is_hurried", "outcome", "quit_at", "signal")

    def __init__(self) -> None:
        self.outcome = Outcome(0)  # means nothing before it is decided
        self.is_decided = Event()
        self.is_hurried = Event()  # told twice to stop
        self.signal: signals.Received | None = None  # that told us to stop
        self._heard: dict[int, float] = {}  # when each signal to end came last, by its number
        self.quit_at = 0.0  # when the terminal sent QUIT; some commands answer it (JVMs print their threads) and go on

    def hears(self, signal: signals.Received, within: float) -> tuple[bool, bool]:
        """Note a signal to end. Whether it is a copy of one in the last `within` seconds; whether there was any signal then."""
        now = time.monotonic()
        recent = {number for number, at in self._heard.items() if now - at < within}
        self._heard[signal.number] = now
        return signal.number in recent, bool(recent)

    def decide(self, outcome: Outcome) -> None:
        """Decide how the run ends. The first decision counts."""
        if not self.is_decided.is_set():
            self.outcome = outcome
            self.is_decided.set()
