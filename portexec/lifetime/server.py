"""The server's generations: each start, from the word to go until it is ready and to its end, and what follows it.

restart      the command has ended: the same shim starts it again, after a pause
replacement  HUP: another shim starts it beside the old one, which is told to end when the new one is ready
"""

from __future__ import annotations

import _signal
import time
from functools import partial

import anyio

from portexec import request as supervision
from portexec.command.plan import GUARD
from portexec.errors import NotReady, PortexecError, how_it_ended, reason
from portexec.lifetime import progress
from portexec.lifetime.readiness import Readiness
from portexec.lifetime.start import Generation
from portexec.parent import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from portexec.launch import Launch
    from portexec.lifetime.events import Reporter
    from portexec.lifetime.pool import Pool
    from portexec.parent.shim import Shim
    from portexec.request import Supervision

_FIRST_DELAY = 0.1  # seconds before the first restart; each further one waits twice as long
_LONGEST_DELAY = 10.0
_GOOD_TIME = 10.0  # seconds: a command that was ready for so long begins anew with the delays
_FAILURES = 5  # so many ends in a row without ever being ready are enough
_REPLACEMENT_TIMEOUT = 60.0  # seconds for a new generation to become ready, where nothing else was said


class Succession:
    """The generations of one server, of which `current` is the one that counts.

    `on_ready` is called when it is ready for the first time; `on_each_end` when a generation has ended, before anything follows
    from that; `on_end` when the server has ended for good, with the last generation or with the error that there is no other.
    """

    def __init__(
        self,
        launch: Launch,
        asked: Supervision,
        pool: Pool,
        reporter: Reporter,
        tasks: TaskGroup,
        *,
        on_ready: Callable[[], None],
        on_each_end: Callable[[Generation], None],
        on_end: Callable[[Generation, PortexecError | None], None],
    ) -> None:
        self.launch = launch
        self.asked = asked
        self.pool = pool
        self.reporter = reporter
        self.tasks = tasks
        self.on_ready = on_ready
        self.on_each_end = on_each_end
        self.on_end = on_end
        self.is_over = False  # no other generation is to follow
        self.was_ready = False
        self.current = Generation(pool.shims[0], pool.began)
        self._ready = asked.ready_for(launch.choice.hand_off)
        self._changing = anyio.Lock()  # held while one generation follows another
        self._is_replacement_due = False
        self._ends_without_ready = 0
        self._delay = _FIRST_DELAY
        self._generations: list[Generation] = []  # that are alive
        self._begin(self.current)

    def can_replace(self) -> bool:
        """Whether HUP means a replacement: two generations can share sockets that we pass on, and no number."""
        return self.asked.restart != supervision.NO and self.launch.first_fd is not None

    def replace(self) -> None:
        """Replace the generation by a new one, unless that is about to begin."""
        if not self._is_replacement_due:
            self._is_replacement_due = True
            self.tasks.start_soon(self._replace)

    def restart(self) -> None:
        """Stop the whole tree, and start the command again with all that is bound."""
        self.tasks.start_soon(self._restart_as_asked)

    def newest(self) -> Generation:
        """The generation that was started last."""
        return self._generations[-1] if self._generations else self.current

    def generation_of(self, pid: int, is_below: Callable[[int, int], bool]) -> Generation:
        """The one below whose shim the process is; the newest where nobody knows."""
        return next((each for each in self._generations if is_below(pid, each.shim.pid)), self.newest())

    # One generation, from its start to its end.

    def _begin(self, generation: Generation) -> None:
        self.pool.live.append(generation)
        self._generations.append(generation)
        self.tasks.start_soon(self._look_after, generation)

    async def _look_after(self, generation: Generation) -> None:
        if generation.began is None:
            await self._wait_for_client(generation)
        if not generation.gone.is_set():
            await self._follow(generation)
        self.pool.live.remove(generation)
        self._generations.remove(generation)
        async with self._changing:
            if generation.shim is not self.current.shim:
                self.pool.dismiss(generation.shim)
                self._listen_again()  # some shut the listener down at their end
            else:
                self._end_if_last(generation)
                if generation is self.current and not self.is_over:
                    await self._restart(generation)

    async def _wait_for_client(self, generation: Generation) -> None:
        """Begin at the first connection, unless it is stopped before, or the shim is killed, which is heard after that."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_wait_and_cancel, generation.gone.wait, tasks.cancel_scope)
            killed = partial(anyio.wait_readable, generation.shim.control)
            tasks.start_soon(_wait_and_cancel, killed, tasks.cancel_scope)
            for listener in self.launch.bound.listeners:
                if listener.socket is not None:
                    client = partial(anyio.wait_readable, listener.socket.fileno())
                    tasks.start_soon(_wait_and_cancel, client, tasks.cancel_scope)
        if not generation.gone.is_set():
            generation.begin()

    async def _follow(self, generation: Generation) -> None:
        """From its start to the end of its tree."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(generation.listen)
            with anyio.CancelScope() as waiting:
                tasks.start_soon(self._wait_for_end, generation, waiting)
                await self._wait_until_ready(generation)

    async def _wait_for_end(self, generation: Generation, waiting: anyio.CancelScope) -> None:
        await generation.ended.wait()
        if generation.started.is_set():
            self.reporter.tell("ended", status=generation.wait_status, by_itself=not generation.was_told)
        waiting.cancel()
        self.on_each_end(generation)
        if not self._changing.locked():
            self._end_if_last(generation)  # what is left of its tree takes its time, and nobody has to wait for that

    async def _wait_until_ready(self, generation: Generation) -> None:
        await generation.started.wait()
        self.reporter.tell("started", pid=generation.pid)
        readiness = Readiness(
            self._ready,
            self.launch.bound.listeners,
            generation,
            is_admitted=self.launch.choice.hand_off == GUARD,
            is_shared=lambda: len(self._generations) > 1,
        )
        if self._ready.form == supervision.NONE:
            readiness.follow()
            self._become_ready(generation)  # before anything else can come of it
            return
        patience = self._patience_with(generation)
        with anyio.move_on_after(patience) as scope:
            async with anyio.create_task_group() as tasks:
                if not self.reporter.is_quiet:
                    tasks.start_soon(progress.show, readiness.what)
                await readiness.wait()
                tasks.cancel_scope.cancel()
        if generation.ended.is_set() or self.is_over:
            return  # which comes first, though both may have been found at once
        if scope.cancelled_caught:
            self._give_up(generation, f"the command was not ready after {patience:g} s: it did not {readiness.what()}")
        else:
            self._become_ready(generation)

    def _patience_with(self, generation: Generation) -> float | None:
        """The seconds that it has to become ready; None for ever."""
        if self.asked.ready_timeout is None and generation is not self.current:
            return _REPLACEMENT_TIMEOUT
        return self.asked.ready_timeout

    def _give_up(self, generation: Generation, message: str) -> None:
        """The time is over. The end of all, unless there was or will be another generation to go on with."""
        is_alone = generation is self.current and (not self.was_ready or self.asked.restart == supervision.NO)
        if is_alone:
            hint = "--ready-timeout gives it more time, --ready says what to wait for"
            self.on_end(generation, NotReady(message, hint))
        else:
            self.reporter.note(message)
            generation.stop()

    def _become_ready(self, generation: Generation) -> None:
        generation.ready_since = time.monotonic()
        generation.ready.set()
        self._ends_without_ready = 0
        self.reporter.tell_ready(generation.pid)
        self.reporter.detail(f"ready after {generation.ready_since - (generation.began or 0):.2f}s")
        if not self.was_ready:
            self.was_ready = True
            self.tasks.start_soon(self.reporter.announce_ready, generation.pid)
            self.on_ready()

    # What follows its end.

    def _end_if_last(self, generation: Generation) -> None:
        """End everything with the generation that counts, unless there is to be another one."""
        if generation is not self.current or self.is_over or self._is_to_be_restarted(generation):
            return
        if generation.shim.is_gone and self.asked.restart != supervision.NO:
            self.reporter.note("the process that looked after the command was killed, so there is no restart")
        self.on_end(generation, generation.failure)

    def _is_to_be_restarted(self, generation: Generation) -> bool:
        is_failing = generation.ready_since is None and self._ends_without_ready + 1 >= _FAILURES
        if generation.failure is not None or generation.shim.is_gone or is_failing:
            return False
        has_failed = generation.wait_status != 0
        return self.asked.restart == supervision.ALWAYS or (self.asked.restart == supervision.ON_FAILURE and has_failed)

    async def _restart(self, generation: Generation) -> None:
        self._ends_without_ready += generation.ready_since is None
        if generation.ready_since is not None and generation.ended_at - generation.ready_since > _GOOD_TIME:
            self._delay = _FIRST_DELAY
        self.reporter.note(f"the command ended ({how_it_ended(generation.wait_status)}); restart in {self._delay:g} s")
        await anyio.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        if not self.is_over:
            self._start_again(generation.shim)

    async def _restart_as_asked(self) -> None:
        async with self._changing:
            if self.is_over:
                return
            old = self.current
            old.stop()
            await old.gone.wait()
            if not self.is_over:
                self._start_again(old.shim)

    def _listen_again(self) -> bool:
        try:
            self.launch.bound.listen_again()
        except OSError as error:
            self.on_end(self.current, PortexecError(f"cannot listen again: {reason(error)}"))
            return False
        return True

    def _start_again(self, shim: Shim) -> None:
        if not self._listen_again():
            return
        try:
            self.current = Generation(self._shim_for_restart(shim))
        except (OSError, PortexecError) as error:
            self.on_end(self.current, error if isinstance(error, PortexecError) else PortexecError(reason(error)))
            return
        if not self.asked.is_lazy:
            self.current.begin()
        self._begin(self.current)

    def _shim_for_restart(self, shim: Shim) -> Shim:
        """The same one, unless it was killed, or has descriptors that are of no use any more."""
        if not (shim.is_gone or self.launch.bound.is_unix_listener_dead()):
            return shim
        self.pool.dismiss(shim)
        self.launch.bound.make_unix_listeners_anew()
        return self.pool.new_shim(self.launch.plan)

    async def _replace(self) -> None:
        """Start a new generation beside the old one; when it is ready the old one is told to end, and may drain."""
        async with self._changing:
            self._is_replacement_due = False
            old = self.current
            if self.is_over or old.ended.is_set() or not old.started.is_set():
                return
            try:
                new = Generation(self.pool.new_shim(self.launch.plan))
            except OSError as error:
                self.reporter.error(f"cannot start a new generation, the old one goes on: {reason(error)}")
                return
            new.begin()
            self._begin(new)
            if await self._has_become_ready(new):
                self.current = new
                self.reporter.detail("the new generation is ready, the old one is told to end")
                signals.send(old.shim.pid, _signal.SIGTERM)
            elif not self.is_over:
                how = new.failure.message if new.failure else how_it_ended(new.wait_status)
                what_now = "and the old one has ended meanwhile" if old.ended.is_set() else "the old one goes on"
                self.reporter.error(f"the new generation was not ready, {what_now}: {how}")
                if old.ended.is_set():
                    self._end_if_last(old)

    async def _has_become_ready(self, generation: Generation) -> bool:
        async with anyio.create_task_group() as tasks:
            for event in (generation.ready, generation.ended):
                tasks.start_soon(_wait_and_cancel, event.wait, tasks.cancel_scope)
        return generation.ready.is_set()


async def _wait_and_cancel(wait: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
    await wait()
    scope.cancel()
