"""Start the command of a launch and stay as its parent. Fall back to `hold` where `guard` is not possible.

    fork a shim [-> rehearse] -> publish -> live

So it is with hand-off `guard`, which rehearses, and with options under Lifetime. All else becomes the command: `become.py`.
"""

from __future__ import annotations

import gc
import os

from portexec.become import announce, become, publish_files
from portexec.command import execute
from portexec.command.plan import GUARD, HOLD
from portexec.errors import PortexecError, RefusedError, cannot, spare
from portexec.kernel import STDERR, STDIN, STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.log import Log
    from portexec.lifetime.notify import NotifySocket
    from portexec.lifetime.program import Program
    from portexec.lifetime.run import Outcome, Run
    from portexec.lifetime.start import Start
    from portexec.names.registry import Claim
    from portexec.parent.family import Family
    from portexec.parent.protocol import Job
    from portexec.parent.shim import Shim
    from portexec.parent.signals import Received


def start(launch: Launch, claim: Claim | None = None) -> int:
    """Run the command of a launch that stays; `claim` is its name, if any. Returns a wait status of waitpid(2).

    Becomes the command where portexec cannot stay, and need not. Raises PortexecError. The caller then undoes what was made in
    the file system.
    """
    launch = as_possible(launch)
    if not launch.stays():
        become(launch)
    from portexec.parent import loop

    family = _family()
    parent = Parent(launch, family, claim=claim, program=_program(launch))
    try:
        outcome = loop.run(parent.run())
    except _MerelyHold as fallback:
        _take_back(family)
        become(fallback.launch)
    except BaseException:
        spare.clear()
        loop.run(parent.give_up())
        raise
    parent.tell_outcome(outcome)
    return outcome.wait_status


def _family() -> Family:
    """This process, which stays, and those around it."""
    from portexec import procfs
    from portexec.parent import naming, signals
    from portexec.parent.family import Family

    naming.name_front()
    inbox = signals.Inbox()  # first: from now on no signal ends us with something left behind
    shells = procfs.shells() if signals.has_terminal() else set()
    others = procfs.children() if signals.has_children() else set()
    return Family(inbox, others, shells)


def _program(launch: Launch) -> Program | None:
    fd = launch.request.lifetime.control_fd
    if fd is None:
        return None
    from portexec.lifetime.program import ProgramOfItsOwn

    return ProgramOfItsOwn(fd)


def _take_back(family: Family) -> None:
    """Make this process again what it was before it became a parent."""
    from portexec import kernel

    family.inbox.restore()
    family.inbox.close()
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 0)


def as_possible(launch: Launch) -> Launch:
    """The launch as it is possible here: with `hold` where portexec cannot be a parent and nothing insists on one.

    A program that drives the run insists, and so does an option that needs a parent.
    """
    from portexec.parent import possible

    why = possible.why_not()
    if not why:
        return launch
    if launch.request.lifetime.control_fd is not None:
        raise no_parent(why)
    if launch.request.lifetime.is_asked_for_with(HOLD):
        raise possible.refusal(launch.request.chosen.lifetime()[0], why)
    if launch.choice.is_final:
        raise _no_guard(why)
    return launch.held(f"hand-off guard cannot be had: {why}")


def no_parent(why: str) -> PortexecError:
    """The error where portexec cannot be a parent, and nothing can be had without one. `why` is that of `possible.why_not`."""
    return PortexecError(f"portexec cannot be the parent of a command here: {why}")


def _no_guard(why: object) -> PortexecError:
    return PortexecError(
        f"hand-off guard cannot be had here: {why}", "portexec --check shows what can; --hand-off hold needs nothing"
    )


class _MerelyHold(Exception):  # not an error: it turns portexec back into a program that executes
    """`guard` is not possible, and with `hold` portexec does not have to stay."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch


class Parent:
    """A portexec that stays, or the part of a host for one server. It makes the run, and undoes what was made for the run.

    `claim` is the name of the run, if it has one; `program` drives it, if one does. `limits` are soft limits for the command.
    `before_start` is called before each start. It raises OSError where the command cannot be started.
    """

    def __init__(
        self,
        launch: Launch,
        family: Family,
        *,
        claim: Claim | None = None,
        program: Program | None = None,
        limits: Mapping[int, int] | None = None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.launch = launch
        self.family = family
        self.claim = claim
        self.advised: set[str] = set()
        self.program = program
        self.limits = limits or {}
        self.lifetime = launch.request.lifetime
        self.before_start = before_start
        self.shims: list[Shim] = []  # those that may not have ended
        self.living: Run | None = None
        fd = self.lifetime.ready_fd
        if fd is not None and fd > STDERR:
            os.set_inheritable(fd, False)  # it is for us, not for the command
        self.notify = self._make_notify_socket()
        self.log = self._open_log()
        if self.lifetime.then:
            self._give(_open_input())

    async def run(self) -> Outcome:
        """Start the command, live, and undo what was made. Raises PortexecError, or _MerelyHold with nothing started."""
        early = self._early()
        try:
            first = await self._first_start()
        except OSError as error:
            raise cannot("start the command", error) from error
        except RefusedError as refusal:
            raise _no_guard(refusal) from refusal
        try:
            publish_files(self.launch)
        except BaseException:
            await self._undo(first.shim)
            raise
        if self.log is not None:
            self.log.keep()
        self._register()
        announce(self.launch, self.program)
        is_for_command = not self.lifetime.is_asked_for_with(self.launch.choice.hand_off)
        if not (self.lifetime.is_lazy or self._starts_at_once()):
            first.go(early if is_for_command else ())
        return await self._live(first, () if is_for_command else early)

    def _early(self) -> list[Received]:
        """The signals that came before there was a shim, and that no shim can have seen."""
        return [] if self.family.is_shared else self.family.inbox.read()

    async def _live(self, first: Start, early: Iterable[Received]) -> Outcome:
        gc.enable()
        from portexec.lifetime.events import Reporter
        from portexec.lifetime.run import Run

        reporter = Reporter(self.launch, self.claim, self.program)
        if not self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
            self._keep_little(first)
        run = self.living = Run(self.launch, first, self._make_shim, self.notify, reporter, self.family)
        outcome = await run.live(early)
        reporter.finish(outcome.wait_status, is_told=outcome.is_told)
        if first.end is None or not first.end.is_left:
            await self._undo(run.server.current.shim)  # else the shim that stays with its daemon undoes it
        for shim in self.shims:
            if shim.pid not in self.family.others:  # `others` has the shim that stays with its daemon
                shim.leave()  # one is still there if its server ended while another was about to replace it
                await self.family.gone(shim)
        return outcome

    async def _undo(self, heir: Shim) -> None:
        """Undo what was made, and let the heir end. If we have no descriptor left to look at a file with, the heir undoes."""
        try:
            self.launch.bound.undo.run()
        except OSError:
            heir.undo()
        else:
            heir.leave()
        await self.family.gone(heir)

    def _keep_little(self, first: Start) -> None:
        """Let go of what we need no more: then the directory can be unmounted, and pipes of the command end with it."""
        from portexec import kernel

        os.chdir("/")
        guards = self.launch.bound.guard_descriptors()
        kernel.keep_only({STDERR, self.family.inbox.fileno(), first.shim.link.fileno(), *guards})

    async def _first_start(self) -> Start:
        """The first start, prepared or idle; with `hold` where `guard` is not possible and was not asked for."""
        try:
            return await self._prepared_start()
        except RefusedError as refusal:
            if self.launch.choice.is_final:
                raise
            self.launch = self.launch.held(f"hand-off guard cannot be had: {refusal}")
        if self.launch.stays():
            return await self._prepared_start()
        raise _MerelyHold(self.launch)

    async def _prepared_start(self) -> Start:
        if self.launch.choice.hand_off == GUARD and not self.launch.choice.is_final:
            require_no_danger(self.launch)
        if not self.family.is_shared:
            gc.freeze()  # a collection would write to all that was made so far, in pages that our processes share
        shim = self._make_shim(self.launch.plan)
        self.launch.bound.undo.leave_to(shim)
        if not self.lifetime.is_lazy:
            shim.ask_to_prepare()
            if self._starts_at_once():
                shim.ask_to_go()
        # While the shim and its child prepare. All else is imported when the command has begun to start: see `_live`.
        from portexec.lifetime.start import Start

        first = Start(shim)
        if not self.lifetime.is_lazy:
            first.has_begun()
            if self.family.is_shared:
                from portexec.parent.loop import readable

                await readable(shim.link)  # other servers go on meanwhile
            try:
                shim.wait_until_prepared()
            except (RefusedError, OSError):
                await self.family.gone(shim)
                raise
        if why := first.shim.why_gated:
            self.launch = self.launch.chosen(self.launch.choice.noting(f"gated: {why}"))
        elif self.launch.choice.hand_off == GUARD:
            self.family.note_rehearsal(self.limits, len(self.launch.bound.guards))
        return first

    def _starts_at_once(self) -> bool:
        """Whether the command may start before others are told: in a host there is no file to write."""
        return self.family.is_shared

    def _make_shim(self, plan: Plan) -> Shim:
        from portexec.parent.shim import Shim

        self.before_start()
        shim = Shim(self._job_for(plan), self.family.inbox)
        self.shims = [*(each for each in self.shims if not each.has_gone.is_set()), shim]
        return shim

    def _job_for(self, plan: Plan) -> Job:
        """The job for a start of the server, or for the tests."""
        from portexec.parent.protocol import Job

        is_server = plan.argv is self.launch.plan.argv
        lifetime = self.lifetime
        guards = self.launch.bound.guards if is_server and self.launch.choice.hand_off == GUARD else {}
        return Job(
            plan,
            kill_after=lifetime.kill_after,
            patience=lifetime.patience,
            guards=guards,
            remap=self.launch.remap,
            leaves_daemons=not lifetime.is_asked_for_with(self.launch.choice.hand_off),
            kept=self._kept(),
            names_port=self.launch.request.names_port(),
            advised=self.advised,
            quiet=self.launch.request.chosen.quiet or not is_server,
            verbose=self.launch.request.chosen.verbose,
            is_apart=self.family.is_shared,
            is_rehearsed=self.family.is_rehearsed(self.limits, len(guards)),
            limits=self.limits,
            tell_end=(lambda: None) if self.program is None else self.program.tell_end,
        )

    def _kept(self) -> set[int]:
        """The descriptors that stay open as long as anything of the run lives."""
        kept = set() if self.program is None else self.program.kept
        return kept if self.claim is None else {*kept, self.claim.lock}

    def _register(self) -> None:
        """Let others find the run by its name. A lazy run is ready at once."""
        if self.claim is None:
            return
        from portexec.command import publish

        listeners = publish.described(self.launch.bound.listeners, None)
        if self.lifetime.is_lazy:
            self.claim.tell_ready(0, listeners)
        else:
            self.claim.tell_starting(listeners)

    def _make_notify_socket(self) -> NotifySocket | None:
        from portexec.request import NOTIFY

        ready = self.lifetime.ready
        if ready is None or ready.form != NOTIFY:
            return None
        from portexec.lifetime.notify import VARIABLE, NotifySocket

        notify = NotifySocket(ready.argument, self.launch.bound.undo)
        self.launch = self.launch.chosen(self.launch.choice, self.launch.plan.with_variable(VARIABLE, notify.name))
        return notify

    def _open_log(self) -> Log | None:
        if self.lifetime.log is None:
            return None
        from portexec.lifetime.log import Log

        log = Log(self.lifetime.log, self.launch.bound.undo)
        self._give({STDOUT: log.fd, STDERR: log.fd})
        return log

    def _give(self, streams: Mapping[int, int]) -> None:
        """Give the server these standard streams instead of ours."""
        plan = self.launch.plan
        self.launch = self.launch.chosen(self.launch.choice, plan.with_streams({**plan.streams, **streams}))

    async def give_up(self) -> None:
        """After a failure: have the shims stop what runs, and wait until they have. They do so when their links end."""
        left = [shim for shim in self.shims if not shim.has_gone.is_set()]
        for shim in left:
            shim.link.close()
        for shim in left:
            await self.family.gone(shim)

    def close(self) -> None:
        """Close what else only the end of the process would close."""
        if self.notify is not None:
            self.notify.socket.close()

    def tell_outcome(self, outcome: Outcome) -> None:
        """Tell the program, or people, what went wrong."""
        if outcome.error is not None:
            self._tell_error(outcome.error)
        self._show_log(outcome)

    def _tell_error(self, error: PortexecError) -> None:
        """Tell the program that drives the run, or people on stderr where there is no such program any more."""
        if self.program is None or not self.program.tell_error(error):
            from portexec.say import say_error

            say_error(error)

    def _show_log(self, outcome: Outcome) -> None:
        """Show the end of the log when the server has failed, below the error."""
        is_said = outcome.error is not None or not self.launch.request.chosen.quiet
        if self.log is not None and outcome.blames_server and is_said:
            from portexec.say import say_output

            if lines := self.log.last_lines():
                say_output(f"the last lines of {self.log.path}:", lines)


def _open_input() -> dict[int, int]:
    """Standard input for a server that shares ours with the tests: a pipe that is silent and ends with us.

    Some servers end when their standard input does: esbuild, and all that watch for their parent in that way.
    """
    ends = os.pipe()
    read_end, _ = [execute.duplicate(end, STDERR + 1, inheritable=False) for end in ends]
    for end in ends:
        os.close(end)
    return {STDIN: read_end}


def require_no_danger(launch: Launch) -> None:
    """Refuse hand-off guard where it would take rights from the command. Raises RefusedError."""
    from portexec.admission import privileges

    if danger := privileges.lost_by(launch.plan.file):
        raise RefusedError(danger)
