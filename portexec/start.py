"""From a launch to the command: become it, or stay as its parent. Fall back to `hold` where `guard` cannot be had.

rehearse -> publish -> execute            hand-offs `fd` and `hold`: portexec becomes the command
fork a shim, rehearse -> publish -> live  hand-off `guard`, and every option under Lifetime: portexec stays
"""

from __future__ import annotations

import os

from portexec.command import execute
from portexec.command.plan import GUARD, HOLD
from portexec.errors import PortexecError, RefusedError, UsageError, reason
from portexec.kernel import STDERR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.notify import NotifySocket
    from portexec.lifetime.run import Outcome
    from portexec.lifetime.start import Start
    from portexec.parent.shim import Shim
    from portexec.parent.signals import Inbox, Received
    from portexec.parent.supervisor import Job


def start(launch: Launch) -> int:
    """Run the command of a launch. Returns a wait status of waitpid(2), or becomes the command.

    Raises PortexecError, with what was made in the file system still to be undone by the caller.
    """
    if launch.stays():
        launch = _possible(launch)
    if not launch.stays():
        _become(launch)
    parent = _Parent(launch)
    try:
        outcome = parent.run()
    except _MerelyHold as fallback:
        _become(fallback.launch)
    if outcome.error is not None:
        say_error_of(launch, outcome.error)
    return outcome.wait_status


def _possible(launch: Launch) -> Launch:
    """The launch as it can be had here: with `hold` where there can be no parent and nobody insists on one."""
    from portexec.parent import possible

    why = possible.why_not()
    if not why:
        return launch
    if launch.request.lifetime.control_fd is not None:
        raise PortexecError(f"portexec cannot be the parent of a command here: {why}")
    if launch.request.lifetime.is_asked_for_with(HOLD):
        given = launch.request.chosen.lifetime()[0]
        raise UsageError(f"makes portexec stay as the parent, which it cannot here: {why}", "leave it out", about=given)
    if launch.choice.is_final:
        raise _no_guard(why)
    return launch.held(f"hand-off guard cannot be had: {why}")


def _no_guard(why: object) -> PortexecError:
    return PortexecError(
        f"hand-off guard cannot be had here: {why}", "portexec --check shows what can; --hand-off hold needs nothing"
    )


def say_error_of(launch: Launch, error: PortexecError) -> None:
    """Tell an error to whoever is to know: the program at the control descriptor, or people."""
    fd = launch.request.lifetime.control_fd
    if fd is None:
        from portexec.say import say_error

        say_error(error)
    else:
        from portexec import control

        control.tell_error(fd, error)


def _become(launch: Launch) -> NoReturn:
    _publish_files(launch)
    _announce(launch)
    execute.execute(launch.plan)


class _MerelyHold(Exception):  # not an error: it turns portexec back into a program that executes
    """`guard` cannot be had, and with `hold` nobody has to stay."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch


class _Parent:
    """A portexec that stays, before its run has begun. What a shim leaves behind that is killed becomes its own."""

    def __init__(self, launch: Launch) -> None:
        from portexec import procfs
        from portexec.parent import signals

        self.launch = launch
        self.lifetime = launch.request.lifetime
        self.inbox: Inbox = signals.Inbox()  # first: from now on no signal ends us with something left behind
        self.shells = procfs.shells() if signals.has_terminal() else set()
        self.others = procfs.children() if signals.has_children() else set()
        for fd in (self.lifetime.ready_fd, self.lifetime.control_fd):
            if fd is not None and fd > STDERR:
                os.set_inheritable(fd, False)  # it is for us, not for the command
        self.notify = self._make_notify_socket()

    def run(self) -> Outcome:
        """Start the command, live, and undo what was made. Raises PortexecError, or _MerelyHold with everything as it was."""
        try:
            early = self.inbox.read()  # pending before there was a shim, which cannot have seen them
            first = self._first_start()
            try:
                _publish_files(self.launch)
            except BaseException:
                first.shim.leave()
                raise
            first.shim.share(self.launch.bound.undo)  # before anybody is told
            _announce(self.launch)
            if not self.lifetime.is_lazy:
                first.go()
            if not self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
                first.forward_early(early)  # at once: the command may look whether one is pending
                early = []
            return self._live(first, early)
        except OSError as error:
            raise PortexecError(f"cannot start the command: {reason(error)}") from error
        except RefusedError as refusal:
            raise _no_guard(refusal) from refusal

    def _live(self, first: Start, early: list[Received]) -> Outcome:
        """What needs more modules than the start is imported while the command starts."""
        from portexec.lifetime.events import Reporter
        from portexec.lifetime.run import Family, Run
        from portexec.parent import loop

        reporter = Reporter(self.launch)
        if not self.lifetime.is_asked_for_with(self.launch.choice.hand_off):
            self._keep_little(first)
        family = Family(self.others, self.shells)
        run = Run(self.launch, first, self._make_shim, self.inbox, self.notify, reporter, family)
        outcome = loop.run(run.live(early))
        reporter.finish()
        end = first.end
        if end is None or not end.is_left:
            self.launch.bound.undo.run()  # else the shim that is left does it
        run.server.current.dismiss()
        return outcome

    def _keep_little(self, first: Start) -> None:
        """Nothing else is to be started: the directory can be unmounted, and a pipe of the command's ends with the command."""
        from portexec import kernel

        os.chdir("/")
        guards = self.launch.bound.guard_descriptors()
        kernel.keep_only({STDERR, self.inbox.fileno(), first.shim.link.fileno(), *guards})

    def _first_start(self) -> Start:
        """The first start, ready to execute the command; with `hold` where `guard` cannot be had and nobody insists on it."""
        try:
            return self._prepared_start()
        except RefusedError as refusal:
            if self.launch.choice.is_final:
                raise
            self.launch = self.launch.held(f"hand-off guard cannot be had: {refusal}")
        if self.launch.stays():
            return self._prepared_start()
        self._take_back()
        raise _MerelyHold(self.launch)

    def _prepared_start(self) -> Start:
        from portexec.lifetime.start import Start

        if self.launch.choice.hand_off == GUARD and not self.launch.choice.is_final:
            _require_no_danger(self.launch)
        first = Start(self._make_shim(self.launch.plan))
        if not self.lifetime.is_lazy:
            first.prepare()
        if why := first.shim.why_gated:
            self.launch = self.launch.chosen(self.launch.choice.noting(f"gated: {why}"))
        return first

    def _make_shim(self, plan: Plan) -> Shim:
        from portexec.parent.shim import Shim

        return Shim(self._job_for(plan), self.inbox)

    def _job_for(self, plan: Plan) -> Job:
        """The server's, or that of the tests, which have our standard input."""
        from portexec.parent.supervisor import Job

        is_server = plan.argv is self.launch.plan.argv
        lifetime = self.lifetime
        return Job(
            plan,
            kill_after=lifetime.kill_after,
            patience=lifetime.patience,
            guards=self.launch.bound.guards if is_server and self.launch.choice.hand_off == GUARD else {},
            remap=self.launch.remap,
            leaves_daemons=not lifetime.is_asked_for_with(self.launch.choice.hand_off),
            has_stdin=not (is_server and lifetime.then),
            kept=set() if lifetime.control_fd is None else {lifetime.control_fd},
            quiet=self.launch.request.chosen.quiet,
            verbose=self.launch.request.chosen.verbose,
        )

    def _make_notify_socket(self) -> NotifySocket | None:
        from portexec.request import NOTIFY

        ready = self.lifetime.ready
        if ready is None or ready.form != NOTIFY:
            return None
        from portexec.lifetime.notify import VARIABLE, NotifySocket

        notify = NotifySocket(ready.argument, self.launch.bound.undo)
        self.launch = self.launch.chosen(self.launch.choice, self.launch.plan.with_variable(VARIABLE, notify.name))
        return notify

    def _take_back(self) -> None:
        """Make this process again what it was before it became a parent."""
        from portexec import kernel

        self.inbox.restore()
        self.inbox.close()
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 0)


def _require_no_danger(launch: Launch) -> None:
    from portexec.admission import privileges

    if danger := privileges.lost_by(launch.plan.file):
        raise RefusedError(danger)


def _publish_files(launch: Launch) -> None:
    """Write the files that are to tell others the number. Raises PortexecError."""
    chosen = launch.request.chosen
    if chosen.port_file is not None or chosen.export is not None:
        from portexec.command.publish import publish_files

        port = launch.bound.listeners[0].port
        publish_files(chosen.port_file, chosen.export, port, launch.variables, launch.bound.undo)


def _announce(launch: Launch) -> None:
    """Tell people on stderr, or the program at the control descriptor."""
    if launch.request.chosen.quiet and not launch.request.chosen.verbose and launch.request.lifetime.control_fd is None:
        return
    from portexec.command import publish
    from portexec.say import say, say_json

    chosen, listeners = launch.request.chosen, launch.bound.listeners
    if chosen.verbose:
        from portexec import explain

        say(*explain.verbose(launch))
    fd = launch.request.lifetime.control_fd
    if fd is not None:
        from portexec import control

        described = publish.described(listeners, launch.first_fd)
        control.tell(fd, "bound", hand_off=launch.choice.hand_off, listeners=described)
    elif chosen.json and not chosen.quiet:
        say_json(publish.announcement_json(listeners, launch.choice.hand_off, launch.first_fd))
    elif not chosen.quiet:
        say(*publish.announcement(listeners, named=len(listeners) > 1))
