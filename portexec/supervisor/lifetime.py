"""The life of a run whose parent stays: until ready, then the tests, restarts, replacements, and the end of it all.

Every command has a shim as its parent (`shim`); here is what they are told and when. It runs on anyio, which the parent that
merely waits (`run`) has no need of.
"""

from __future__ import annotations

import _signal
import json
import os
import time

import anyio

from portexec import control, publish, supervision
from portexec.errors import NotReady, PortexecError, reason
from portexec.handoff import GUARD, Plan
from portexec.supervisor import progress, signals, tree
from portexec.supervisor import shim as words
from portexec.supervisor.generation import Generation
from portexec.supervisor.notify import NotifySocket, pass_on
from portexec.supervisor.readiness import Readiness
from portexec.supervisor.shim import Job, Shim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.launch import Launch
    from portexec.supervision import Supervision

_FIRST_DELAY = 0.1  # seconds before the first restart; each further one waits twice as long
_LONGEST_DELAY = 10.0
_GOOD_TIME = 10.0  # seconds: a command that was ready for so long begins anew with the delays
_FAILURES = 5  # so many ends in a row without ever being ready are enough
_REPLACEMENT_TIMEOUT = 60.0  # seconds for a new generation to become ready, where nothing else was said


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
    """One run. `first` is the shim of the command, prepared, and told to go unless the start is lazy."""

    def __init__(
        self,
        launch: Launch,
        asked: Supervision,
        first: Shim,
        inbox: signals.Inbox,
        job_for: Callable[[Plan], Job],
        notify: NotifySocket | None,
        *,
        quiet: bool,
        verbose: bool,
    ) -> None:
        self.launch = launch
        self.asked = asked
        self.inbox = inbox
        self.job_for = job_for
        self.notify = notify
        self.quiet = quiet
        self.verbose = verbose
        self.ready = asked.ready_for(launch.choice.hand_off)
        self.outcome = Outcome(0)  # not before it is over
        self._shims = [first]
        self._began = time.monotonic()
        self._had_terminal = signals.has_terminal()
        self._over = anyio.Event()  # the outcome is known
        self._hurry = anyio.Event()  # told twice to stop
        self._is_graceful = False  # what runs was told by the terminal to stop
        self._changing = anyio.Lock()  # held while one generation follows another
        self._is_replacement_due = False
        self._was_ready = False
        self._ends_without_ready = 0
        self._delay = _FIRST_DELAY
        self._tests: Generation | None = None
        self._live: list[Generation] = []

    async def run(self) -> Outcome:
        """From the first start to the last process gone."""
        self.current = Generation(self._shims[0])
        async with anyio.create_task_group() as tasks:
            self.tasks = tasks
            tasks.start_soon(self._follow_signals)
            if self.notify is not None:
                tasks.start_soon(self._follow_notifications, self.notify)
            if self.asked.control_fd is not None:
                tasks.start_soon(self._follow_requests, self.asked.control_fd)
            self._begin(self.current)
            await self._over.wait()
            await self._stop_all()
            tasks.cancel_scope.cancel()
        return self.outcome

    def _end(self, outcome: Outcome) -> None:
        """Decide how the run ends. Whoever comes first does."""
        if not self._over.is_set():
            self.outcome = outcome
            self._over.set()

    # A generation, from its start to its end.

    def _begin(self, generation: Generation) -> None:
        self._live.append(generation)
        self.tasks.start_soon(self._look_after, generation)
        if self.asked.is_lazy:
            self.tasks.start_soon(self._start_lazily, generation)

    async def _look_after(self, generation: Generation) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(generation.listen)
            with anyio.CancelScope() as waiting:
                tasks.start_soon(self._wait_for_end, generation, waiting)
                await self._wait_until_ready(generation)
        self._live.remove(generation)
        async with self._changing:
            if generation.shim is not self.current.shim:
                self._dismiss(generation.shim)
            elif generation is self.current and not self._over.is_set():
                await self._follow_up(generation)

    async def _wait_for_end(self, generation: Generation, waiting: anyio.CancelScope) -> None:
        await generation.ended.wait()
        self._tell("ended", status=generation.wait_status)
        waiting.cancel()

    async def _start_lazily(self, generation: Generation) -> None:
        """Start the command at the first connection. `--then` is likely to make it, so that does not wait."""
        if self.asked.then and self._tests is None:
            self._start_tests()
        async with anyio.create_task_group() as tasks:
            for listener in self.launch.bound.listeners:
                if listener.socket is not None:
                    tasks.start_soon(self._wait_for_client, listener.socket.fileno(), tasks.cancel_scope)
        generation.shim.tell(words.GO)

    async def _wait_for_client(self, fd: int, waiting: anyio.CancelScope) -> None:
        await anyio.wait_readable(fd)
        waiting.cancel()

    async def _wait_until_ready(self, generation: Generation) -> None:
        readiness = Readiness(
            self.ready,
            self.launch.bound.listeners,
            generation,
            is_admitted=self.launch.choice.hand_off == GUARD,
            is_shared=any(other not in (generation, self._tests) for other in self._live),
        )
        await generation.started.wait()
        self._tell("started", pid=generation.pid)
        with anyio.move_on_after(self._patience_with(generation)) as scope:
            async with anyio.create_task_group() as tasks:
                if not self.quiet:
                    tasks.start_soon(progress.show, readiness.what)
                await readiness.wait()
                tasks.cancel_scope.cancel()
        if scope.cancelled_caught:
            self._give_up(generation, readiness.what())
        else:
            self._become_ready(generation)

    def _patience_with(self, generation: Generation) -> float | None:
        """The seconds that it has to become ready; None for ever."""
        if self.asked.ready_timeout is None and generation is not self.current:
            return _REPLACEMENT_TIMEOUT
        return self.asked.ready_timeout

    def _give_up(self, generation: Generation, what: str) -> None:
        """The time is over. The first start ends the run; a later one counts as one that failed."""
        message = f"the command was not ready after {self._patience_with(generation):g} s: it did not {what}"
        if generation is self.current and not self._was_ready:
            self._end(Outcome.failed(NotReady(message, "--ready-timeout gives it more time, --ready says what to wait for")))
        else:
            self._say(f"portexec: note: {message}\n")
            generation.shim.tell(words.STOP)

    def _become_ready(self, generation: Generation) -> None:
        generation.ready_since = time.monotonic()
        generation.ready.set()
        self._ends_without_ready = 0
        self._tell("ready", pid=generation.pid, listeners=self._described())
        if self.verbose:
            publish.say(f"portexec: ready after {generation.ready_since - self._began:.2f}s\n")
        if not self._was_ready:
            self._was_ready = True
            self._announce(generation)
            if self.asked.then and self._tests is None:
                self._start_tests()

    def _announce(self, generation: Generation) -> None:
        """One JSON line to the descriptor of `--ready-fd`, which is closed then."""
        if self.asked.ready_fd is None:
            return
        told = {
            "pid": os.getpid(),
            "command_pid": generation.pid,
            "hand_off": self.launch.choice.hand_off,
            "listeners": self._described(),
        }
        try:
            os.write(self.asked.ready_fd, json.dumps(told).encode() + b"\n")
        except OSError:
            pass  # nobody wants to know any more
        if self.asked.ready_fd > 2:
            os.close(self.asked.ready_fd)

    def _described(self) -> list[dict[str, str | int]]:
        return publish.described(self.launch.bound.listeners, self.launch.first_fd)

    # What follows the end of a generation.

    async def _follow_up(self, generation: Generation) -> None:
        self._ends_without_ready += generation.ready_since is None
        if generation.failure is not None:
            self._end(Outcome.failed(generation.failure))
        elif self._is_to_be_restarted(generation):
            await self._restart(generation)
        elif self.asked.then:
            when = "before the tests did" if self._tests is not None else "before it was ready"
            self._end(Outcome.failed(PortexecError(f"the server ended {when}: {describe(generation.wait_status)}")))
        else:
            if generation.ready_since is None and self.ready.form != supervision.NONE:
                self._say(f"portexec: note: the command ended before it was ready: {describe(generation.wait_status)}\n")
            self._end(Outcome(generation.wait_status))

    def _is_to_be_restarted(self, generation: Generation) -> bool:
        if self.asked.restart == supervision.NO or generation.is_shim_gone():
            return False
        if self.asked.restart == supervision.ON_FAILURE and generation.wait_status == 0:
            return False
        return self._ends_without_ready < _FAILURES

    async def _restart(self, generation: Generation) -> None:
        if generation.ready_since is not None and time.monotonic() - generation.ready_since > _GOOD_TIME:
            self._delay = _FIRST_DELAY
        self._say(f"portexec: note: the command ended ({describe(generation.wait_status)}); restart in {self._delay:g} s\n")
        await anyio.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        await self._start_again(generation.shim)

    async def _start_again(self, shim: Shim) -> None:
        try:
            self.launch.bound.listen_again()
        except OSError as error:
            self._end(Outcome.failed(PortexecError(f"cannot listen again: {reason(error)}")))
            return
        shim.tell(words.AGAIN)
        self.current = Generation(shim, is_lazy=self.asked.is_lazy)
        self._begin(self.current)

    async def _restart_as_asked(self) -> None:
        """Stop the whole tree, and start the command again with all that is bound."""
        async with self._changing:
            old = self.current
            old.shim.tell(words.STOP)
            await old.gone.wait()
            if not self._over.is_set():
                await self._start_again(old.shim)

    async def _replace(self) -> None:
        """Start a new generation beside the old one; when it is ready the old one is told to end, and may drain."""
        async with self._changing:
            self._is_replacement_due = False
            old = self.current
            if self._over.is_set() or old.ended.is_set():
                return
            try:
                new = Generation(self._new_shim(self.launch.plan))
            except OSError as error:
                self._say(f"portexec: error: cannot start a new generation, the old one goes on: {reason(error)}\n")
                return
            self._begin(new)
            async with anyio.create_task_group() as tasks:
                for event in (new.ready, new.ended):
                    tasks.start_soon(self._wait_and_cancel, event, tasks.cancel_scope)
            if new.ready.is_set() and not new.ended.is_set():
                self.current = new
                if self.verbose:
                    publish.say("portexec: the new generation is ready, the old one is told to end\n")
                signals.send(old.shim.pid, _signal.SIGTERM)
            else:
                how = str(new.failure.message if new.failure else describe(new.wait_status))
                self._say(f"portexec: error: the new generation was not ready, the old one goes on: {how}\n")

    async def _wait_and_cancel(self, event: anyio.Event, scope: anyio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    # The tests.

    def _start_tests(self) -> None:
        try:
            self._tests = Generation(self._new_shim(self.launch.plan_shell(self.asked.then)))
        except OSError as error:
            self._end(Outcome.failed(PortexecError(f"cannot start the tests: {reason(error)}")))
            return
        self._live.append(self._tests)
        self.tasks.start_soon(self._follow_tests, self._tests)

    async def _follow_tests(self, tests: Generation) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tests.listen)
            await tests.ended.wait()
            self._end(Outcome.failed(tests.failure) if tests.failure else Outcome(tests.wait_status))
        self._live.remove(tests)

    # The end.

    async def _stop_all(self) -> None:
        """Stop every tree: TERM, and KILL later, or at once when we are told a second time."""
        with anyio.CancelScope() as scope:
            self.tasks.start_soon(self._wait_and_cancel, self._hurry, scope)
            if self._is_graceful:
                with anyio.move_on_after(self.asked.kill_after):
                    await self._all_ended()
            self._tell_all(words.STOP)
            await self._all_gone()
        if self._hurry.is_set():
            self._tell_all(words.KILL)
            await self._all_gone()
        await self._stop_orphans()
        for shim in list(self._shims):
            self._dismiss(shim)

    async def _all_ended(self) -> None:
        for generation in list(self._live):
            await generation.ended.wait()

    async def _all_gone(self) -> None:
        for generation in list(self._live):
            await generation.gone.wait()

    def _tell_all(self, word: bytes) -> None:
        for generation in self._live:
            generation.shim.tell(word)

    async def _stop_orphans(self) -> None:
        """Whoever is still below us, but for the shims, was left behind by a shim that was killed."""
        spare = {shim.pid for shim in self._shims}
        stop = tree.Stop(0 if self._hurry.is_set() else self.asked.kill_after, spare=spare)
        while stop.step():
            await anyio.sleep(tree.POLL)

    def _new_shim(self, plan: Plan) -> Shim:
        shim = Shim(self.job_for(plan), self.inbox)
        self._shims.append(shim)
        return shim

    def _dismiss(self, shim: Shim) -> None:
        """End a shim whose tree is gone."""
        if shim in self._shims:
            self._shims.remove(shim)
            shim.leave()

    # What comes from outside.

    async def _follow_signals(self) -> None:
        while True:
            await anyio.wait_readable(self.inbox)
            for signal in self.inbox.read():
                self._handle(signal)

    def _handle(self, signal: signals.Received) -> None:
        if signal.number == _signal.SIGCHLD:
            self._reap()
        elif signal.number in signals.STOP_REQUESTS or self._has_lost_its_terminal(signal):
            self._stop_by(signal)
        elif signal.number == _signal.SIGHUP and self._can_replace():
            if not self._is_replacement_due:
                self._is_replacement_due = True
                self.tasks.start_soon(self._replace)
        elif signals.is_to_be_forwarded(signal):
            signals.send(self.current.shim.pid, signal.number)

    def _stop_by(self, signal: signals.Received) -> None:
        if self._over.is_set():
            self._hurry.set()
        self._is_graceful = signal.from_terminal and signal.number == _signal.SIGINT
        self._end(Outcome(signal.number))

    def _has_lost_its_terminal(self, signal: signals.Received) -> bool:
        """Whether this is the hang-up of a terminal, from the kernel or passed on by the shell that was its leader."""
        return signal.number == _signal.SIGHUP and (signal.from_terminal or (self._had_terminal and not signals.has_terminal()))

    def _can_replace(self) -> bool:
        return self.asked.restart != supervision.NO and self.launch.first_fd is not None

    def _reap(self) -> None:
        for _, status in signals.reap():
            if os.WIFSTOPPED(status):
                signals.stop_with(_signal.SIGTSTP)  # a shim stopped because its command was

    async def _follow_requests(self, fd: int) -> None:
        """Do what the program at the control descriptor asks for; its end is the end of all."""
        while not self._over.is_set():
            await anyio.wait_readable(fd)
            data = os.read(fd, 1 << 16)
            for request in control.requests(data) if data else ["stop"]:
                if request == "restart":
                    self.tasks.start_soon(self._restart_as_asked)
                elif request == "stop":
                    self._end(Outcome(0))

    def _tell(self, event: str, **fields: object) -> None:
        if self.asked.control_fd is not None:
            control.tell(self.asked.control_fd, event, **fields)

    async def _follow_notifications(self, notify: NotifySocket) -> None:
        own = self.launch.request.given.get("NOTIFY_SOCKET", "")
        while True:
            await anyio.wait_readable(notify.socket)
            received = notify.receive()
            if received is not None:
                self._take_notification(*received)
                pass_on(received[1], own)

    def _take_notification(self, pid: int, fields: dict[str, str]) -> None:
        generation = self._generation_of(pid)
        generation.status_text = fields.get("STATUS", generation.status_text)
        if fields.get("MAINPID", "").isdecimal():
            generation.pid = int(fields["MAINPID"])
        if fields.get("READY") == "1":
            generation.said_ready.set()

    def _generation_of(self, pid: int) -> Generation:
        """The one below whose shim the sender is; the newest where it has ended already, as systemd-notify(1) has."""
        servers = [generation for generation in self._live if generation is not self._tests] or [self.current]
        return next((g for g in servers if pid in tree.descendants(root=g.shim.pid)), servers[-1])

    def _say(self, text: str) -> None:
        if not self.quiet or text.startswith("portexec: error"):
            publish.say(text)


def describe(wait_status: int) -> str:
    """How a command ended, in words."""
    if os.WIFSIGNALED(wait_status):
        import signal

        number = os.WTERMSIG(wait_status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return f"killed by {name}"
    return f"exit status {os.WEXITSTATUS(wait_status)}"


def run(lifetime: Lifetime) -> Outcome:
    """Run it to its end, in this process."""
    return anyio.run(lifetime.run)
