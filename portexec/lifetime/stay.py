"""How portexec becomes a parent that stays: the first shim, and then the lifetime. anyio is imported beside the command."""

from __future__ import annotations

import os
import time

from portexec import kernel
from portexec import request as supervision
from portexec.admission import seccomp
from portexec.command import publish
from portexec.command.plan import GUARD
from portexec.lifetime.events import Reporter
from portexec.lifetime.notify import VARIABLE, NotifySocket
from portexec.parent import tree
from portexec.parent.shim import GO, PREPARE, Job, Shim
from portexec.parent.signals import Inbox, has_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.command.plan import Plan
    from portexec.launch import Launch
    from portexec.lifetime.run import Outcome
    from portexec.request import Supervision

_STDERR = 2


class Stay:
    """A run whose parent stays, before it has begun."""

    def __init__(self, launch: Launch, asked: Supervision, *, quiet: bool, verbose: bool) -> None:
        self.launch = launch
        self.asked = asked
        self.reporter = Reporter(
            launch, ready_fd=asked.ready_fd, control_fd=asked.control_fd, is_quiet=quiet, is_verbose=verbose
        )
        self.inbox = Inbox()  # first: from now on no signal ends us with something left behind
        self.shells = tree.shells() if has_terminal() else set()
        self.notify = self._make_notify_socket()
        self.began: float | None = None
        self.others = tree.children()
        kernel.prctl(seccomp.PR_SET_CHILD_SUBREAPER, 1)  # what a shim leaves behind that is killed becomes ours
        export = launch.request.chosen.export
        self._export_was_there = export is not None and os.path.lexists(export)
        for fd in (asked.ready_fd, asked.control_fd):
            if fd is not None and fd > _STDERR:
                os.set_inheritable(fd, False)  # it is for us, not for the command

    def start(self) -> Shim:
        """Start the first shim, up to where it waits for the word; a lazy one forks its child at the first connection only.

        Raises RefusedError where binds cannot be admitted, OSError where resources run out.
        """
        shim = Shim(self._job_for(self.launch.plan), self.inbox)
        if not self.asked.is_lazy:
            self._prepare(shim)
        self.shim = shim
        if self.launch.choice.hand_off == GUARD:
            self.launch.bound.release_guards()  # the shim has them, and sometimes has to step aside with them
        return shim

    def _prepare(self, shim: Shim) -> None:
        shim.tell(PREPARE)
        try:
            shim.require_prepared()
        except BaseException:
            shim.leave()
            raise
        self.began = time.monotonic()

    def run(self, published: publish.Published) -> Outcome:
        """Run to the end, and withdraw what was published."""
        self.reporter.tell_bound()
        if not self.asked.is_lazy:
            self.shim.tell(GO)
        try:
            return self._live()
        finally:
            published.withdraw()
            self.clean_up()

    def _live(self) -> Outcome:
        """anyio and what needs it is imported while the command starts."""
        from portexec.lifetime import pool
        from portexec.lifetime import run as lifetime

        shims = pool.Pool(self.shim, self.began, self._job_for, self.inbox, self.others)
        ours = (self.launch, self.asked, shims, self.inbox, self.notify, self.reporter)
        return lifetime.run(lifetime.Lifetime(*ours, shells=self.shells))

    def _make_notify_socket(self) -> NotifySocket | None:
        ready = self.asked.ready
        if ready is None or ready.form != supervision.NOTIFY:
            return None
        notify = NotifySocket(ready.argument)
        self.launch.plan.environment[VARIABLE] = notify.name
        return notify

    def _job_for(self, plan: Plan) -> Job:
        """The server's, or that of the tests, which have our standard input and nothing to withdraw."""
        is_server = plan is self.launch.plan
        return Job(
            plan,
            self.asked.kill_after,
            guards=self.launch.bound.guards if is_server and self.launch.choice.hand_off == GUARD else {},
            remap=self.launch.remap,
            is_killed=self.asked.is_killed,
            has_stdin=not (is_server and self.asked.then),
            kept=set() if self.asked.control_fd is None else {self.asked.control_fd},
            quiet=self.reporter.is_quiet,
            verbose=self.reporter.is_verbose,
            farewell=self._say_farewell if is_server else _do_nothing,
        )

    def _say_farewell(self) -> None:
        """Withdraw everything in the place of a portexec that was killed."""
        chosen, launch = self.launch.request.chosen, self.launch
        lines = b"" if self._export_was_there else publish.lines_of(launch.variables)
        publish.Published(chosen.port_file, launch.bound.listeners[0].port, chosen.export, lines).withdraw()
        self.clean_up()

    def clean_up(self) -> None:
        """Remove the sockets that we have made from the file system."""
        self.launch.bound.remove_paths()
        if self.notify is not None:
            self.notify.remove_path()


def _do_nothing() -> None:
    """The tests' farewell."""
