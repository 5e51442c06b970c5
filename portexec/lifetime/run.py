"""The life of a run whose parent stays: the server until it is ready, the tests, and the end of it all.

Every command has a shim as its parent (`shim`); here is what they are told and when. It runs on anyio, which the parent that
merely waits (`run`) has no need of.
"""

from __future__ import annotations

import _signal
import os
import time

import anyio

from portexec import control
from portexec import request as supervision
from portexec.errors import PortexecError, how_it_ended, reason
from portexec.lifetime.notify import NotifySocket, pass_on
from portexec.lifetime.server import Succession
from portexec.lifetime.start import Generation
from portexec.parent import shim as words
from portexec.parent import signals, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.launch import Launch
    from portexec.lifetime.events import Reporter
    from portexec.lifetime.pool import Pool
    from portexec.request import Supervision


class Outcome:
    """How a run ended: what to end with, as a wait status of waitpid(2), and an error to print, if it is one."""

    __slots__ = ("error", "wait_status")

    def __init__(self, wait_status: int, error: PortexecError | None = None) -> None:
        self.wait_status = wait_status
        self.error = error

    @classmethod
    def failed(cls, error: PortexecError) -> Outcome:
        """A failure of the run rather than the end of a command."""
        return cls(error.status << 8, error)


class Lifetime:
    """One run. The first shim of the pool is prepared, and told to go unless the start is lazy.

    `shells` are the processes that may pass on the hang-up of the terminal that it had at its begin, if it had one.
    """

    def __init__(
        self,
        launch: Launch,
        asked: Supervision,
        pool: Pool,
        inbox: signals.Inbox,
        notify: NotifySocket | None,
        reporter: Reporter,
        *,
        shells: set[int],
    ) -> None:
        self.launch = launch
        self.asked = asked
        self.pool = pool
        self.inbox = inbox
        self.notify = notify
        self.reporter = reporter
        self.outcome = Outcome(0)  # not before it is over
        self.tests: Generation | None = None
        self._shells = shells
        self._over = anyio.Event()  # the outcome is known
        self._hurry = anyio.Event()  # told twice to stop
        self._is_graceful = False  # what runs was told by the terminal to stop
        self._quit_at = 0.0  # by the terminal; some take it for a question (JVMs print their threads) and go on

    async def run(self) -> Outcome:
        """From the first start to the last process gone."""
        async with anyio.create_task_group() as tasks:
            self.tasks = tasks
            self.server = Succession(
                self.launch,
                self.asked,
                self.pool,
                self.reporter,
                tasks,
                on_ready=self._start_tests,
                on_each_end=self._look_for_reason,
                on_end=self._server_ended,
            )
            tasks.start_soon(self._follow_signals)
            if self.notify is not None:
                tasks.start_soon(self._follow_notifications, self.notify)
            if self.asked.control_fd is not None:
                tasks.start_soon(self._follow_requests, self.asked.control_fd)
            if self.asked.is_lazy:
                self._start_tests()  # which are likely to make the first connection
            await self._over.wait()
            await self._stop_all()
            tasks.cancel_scope.cancel()
        return self.outcome

    def _end(self, outcome: Outcome) -> None:
        """Decide how the run ends. Whoever comes first does."""
        self.server.is_over = True
        if not self._over.is_set():
            self.outcome = outcome
            self._over.set()

    def _look_for_reason(self, generation: Generation) -> None:
        """End the run when a command has ended of what the terminal sent to all of us, whichever ended first."""
        self._take_signals()
        was_quit = generation.began is not None and generation.began < self._quit_at
        if was_quit and signals.has_died_of(generation.wait_status, _signal.SIGQUIT):
            self._end(Outcome(generation.wait_status))

    def _server_ended(self, last: Generation, error: PortexecError | None) -> None:
        if error is None and self.asked.then:
            when = "before the tests did" if self.tests is not None else "before it was ready"
            error = PortexecError(f"the server ended {when}: {how_it_ended(last.wait_status)}")
        elif error is None and not self.server.was_ready and self.asked.ready_for("") != supervision.Ready(supervision.NONE):
            self.reporter.note(f"the command ended before it was ready: {how_it_ended(last.wait_status)}")
        self._end(Outcome.failed(error) if error else Outcome(last.wait_status))

    # The tests.

    def _start_tests(self) -> None:
        if not self.asked.then or self.tests is not None or self._over.is_set():
            return
        try:
            self.tests = Generation(self.pool.new_shim(self.launch.plan_shell(self.asked.then)))
            self.tests.begin()
        except OSError as error:
            self._end(Outcome.failed(PortexecError(f"cannot start the tests: {reason(error)}")))
            return
        self.pool.live.append(self.tests)
        self.tasks.start_soon(self._follow_tests, self.tests)

    async def _follow_tests(self, tests: Generation) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tests.listen)
            await tests.ended.wait()
            self._look_for_reason(tests)
            self._end(Outcome.failed(tests.failure) if tests.failure else Outcome(tests.wait_status))
        self.pool.live.remove(tests)

    # The end.

    async def _stop_all(self) -> None:
        """Stop every tree: TERM, and KILL later, or at once when we are told a second time."""
        with anyio.CancelScope() as scope:
            self.tasks.start_soon(self._hurry_up, scope)
            interrupted = self.tests or self.server.current
            if self._is_graceful and interrupted.is_running():
                with anyio.move_on_after(self.asked.kill_after):
                    await interrupted.ended.wait()
            await self._stop_each(words.STOP, self.asked.kill_after)
        if self._hurry.is_set():
            await self._stop_each(words.KILL, 0)
        self.pool.dismiss_all()

    async def _stop_each(self, word: bytes, kill_after: float) -> None:
        self.pool.stop_all(word)
        await self.pool.all_gone()
        await self.pool.clear_away(kill_after)

    async def _hurry_up(self, waiting: anyio.CancelScope) -> None:
        await self._hurry.wait()
        waiting.cancel()

    # What comes from outside.

    async def _follow_signals(self) -> None:
        while True:
            await anyio.wait_readable(self.inbox)
            self._take_signals()

    def _take_signals(self) -> None:
        for signal in self.inbox.read():
            self._handle(signal)

    def _handle(self, signal: signals.Received) -> None:
        if signal.number == _signal.SIGQUIT and signal.from_terminal:
            self._quit_at = time.monotonic()
        if signal.number == _signal.SIGCHLD:
            self._reap()
        elif self._is_to_stop(signal) and not signals.is_ignored(signal.number):
            self._stop_by(signal)
        elif signal.number == _signal.SIGHUP and self.server.can_replace():
            self.server.replace()
        elif self.server.current.is_running() and signals.is_to_be_forwarded(signal):
            signals.send(self.server.current.shim.pid, signal.number)
        elif signal.from_terminal and not any(generation.is_running() for generation in self.pool.live):
            signals.stop_with(signal.number)  # nobody is there with whom we would stop

    def _stop_by(self, signal: signals.Received) -> None:
        if self._over.is_set():
            self._hurry.set()
        self._is_graceful = signal.from_terminal and signal.number == _signal.SIGINT
        self._end(Outcome(signal.number))

    def _is_to_stop(self, signal: signals.Received) -> bool:
        """TERM, INT, and the hang-up of a terminal, from the kernel or passed on by a shell.

        Who lives on when the terminal has gone may still be sent a HUP by others, who mean a replacement.
        """
        has_hung_up = signal.from_terminal or (signal.sender in self._shells and not signals.has_terminal())
        return signal.number in signals.STOP_REQUESTS or (signal.number == _signal.SIGHUP and has_hung_up)

    def _reap(self) -> None:
        for pid, status in signals.reap():
            self.pool.others.discard(pid)  # another process may get its number
            if os.WIFSTOPPED(status) and not self._over.is_set():
                signals.stop_with(_signal.SIGTSTP)  # a shim stopped because its command was

    async def _follow_requests(self, fd: int) -> None:
        """Do what the program at the control descriptor asks for; its end is the end of all."""
        requests = control.Requests(fd)
        while not self._over.is_set():
            await anyio.wait_readable(fd)
            for request in requests.receive():
                if request == control.RESTART:
                    self.server.restart()
                elif request == control.STOP:
                    self._end(Outcome(0))

    async def _follow_notifications(self, notify: NotifySocket) -> None:
        own = self.launch.request.given.get("NOTIFY_SOCKET", "")
        while True:
            await anyio.wait_readable(notify.socket)
            received = notify.receive()
            if received is not None:
                pid, fields = received
                self.server.generation_of(pid, _is_below).take_notification(fields)
                pass_on(fields, own)


def _is_below(pid: int, root: int) -> bool:
    return pid in tree.descendants(root=root)


def run(lifetime: Lifetime) -> Outcome:
    """Run it to its end, in this process."""
    return anyio.run(lifetime.run)
