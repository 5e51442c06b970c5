"""Looks after one command, in its shim: from the word to go until nothing of it is left.

It tells portexec what happens, forwards signals, reaps orphans, and stops the tree. Simultaneous events count in this order,
which stands in `_take` and `_has_ended`: the start of the command, its binds, its end, and then what portexec tells us.
"""

from __future__ import annotations

import _signal
import os
import time

from portexec import kernel
from portexec.admission.diagnosis import Diagnosis
from portexec.admission.elsewhere import inspected
from portexec.errors import cannot
from portexec.kernel import STDERR
from portexec.parent import child as steps
from portexec.parent import link as links
from portexec.parent import protocol, signals, tree
from portexec.parent.loop import Event, after, first, readable, spawn
from portexec.parent.witness import Witness
from portexec.procfs import Processes, is_ending, is_stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from portexec.parent.child import Child
    from portexec.parent.link import Link
    from portexec.parent.protocol import Job
    from portexec.parent.signals import Inbox

# The states of a command.
_STARTING = "starting"  # told to go
_RUNNING = "running"
_ENDED = "ended"
_LEFT = "left"  # it has ended, and a daemon that it has left behind lives on

_COMMAND_FIRST = 1.0  # seconds from telling the command to end to telling the rest of its tree; a shell waits for its child


class Supervisor:
    """The supervisor of one command, and the owner of its child and of our end of the link to portexec.

    `note` is told each word that is not for the command; it is about the undo list.
    """

    def __init__(self, child: Child, job: Job, link: Link, inbox: Inbox, note: Callable[[bytes, list[str]], object]) -> None:
        self.child = child
        self.job = job
        self.link = link
        self.inbox = inbox
        self.note = note
        self.front = os.getppid()
        self.diagnosis = _SharedDiagnosis(job, link)
        self.witness = Witness(lambda number: link.say(protocol.SIGNALLED, number))
        self.state = _STARTING
        self.told = _Request()
        self.ended = Event()
        self.childless = Event()
        self.was_interrupted = False  # by Ctrl-C, which the command may have a use for
        self.may_be_told = False  # a signal that ends programs has come to us, and so perhaps to the command

    async def run(self) -> None:
        """Return when nothing is left of the command, which was told to go, and nothing of a daemon that has outlived it."""
        unfiltered = Event()
        if self.child.admission is not None:
            self.child.admission.observer = self.diagnosis
            spawn(self._answer(unfiltered))
        for source in (self.child.link, self.link, self.inbox):
            spawn(self._follow(source))
        await first(self.told.to_stop.wait(), self.ended.wait())
        if self.state == _LEFT:
            await unfiltered.wait()
        else:
            await self._stop()

    async def _answer(self, unfiltered: Event) -> None:
        assert self.child.admission is not None  # noqa: S101  # asked for by `run` only then
        await self.child.admission.answer()
        unfiltered.set()

    async def _follow(self, source: Link | Inbox) -> None:
        while isinstance(source, signals.Inbox) or source.is_open:
            await readable(source)
            self._take()

    def _take(self) -> None:
        """Take all that has come."""
        self._take_start()
        if self.child.admission is not None:
            self.child.admission.serve()
        for signal in self.inbox.read():
            self._take_signal(signal)
        for kind, fields in self.link.received():
            self._take_word(kind, fields)

    # The command.

    def _take_start(self) -> None:
        for kind, fields in self.child.link.received():
            if kind == steps.FAILED:
                self.link.say(protocol.FAILED, *fields)
            elif kind == steps.UNABLE:
                failure = cannot("start the command", links.error_of(fields))
                self.link.say(protocol.FAILED, failure.status, failure.message, failure.hint)
            elif self.state == _STARTING:
                self.link.say(protocol.STARTED, self.child.pid)
                if self.job.leaves_daemons:
                    # A process that waits for the end of a pipe of the command must not wait for us.
                    kernel.keep_only({*self._descriptors(), STDERR})
            self.state = _RUNNING

    def _has_ended(self, wait_status: int) -> None:
        """Act upon the end of the command, after all that it did before."""
        self._take_start()
        if self.child.admission is not None:
            self.child.admission.serve()
        was_interrupted = self.was_interrupted and signals.has_died_of(wait_status, _signal.SIGINT)
        is_told = self.told.was_alive or self.told.to_drain or was_interrupted
        if not is_told and os.WIFEXITED(wait_status):
            self.diagnosis.ended(os.WEXITSTATUS(wait_status))
        is_expected = is_told or self.may_be_told or self.job.leaves_daemons
        if not (is_expected or wait_status) and signals.has_children():
            self.diagnosis.went_to_the_background()
        is_left = self.job.leaves_daemons and not (is_told or self.told.to_stop.is_set()) and signals.has_children()
        self.state = _LEFT if is_left else _ENDED
        if is_left:
            self._let_go()
        self.link.say(protocol.ENDED, wait_status, "told" if is_told else "", "left" if is_left else "")
        if is_left:
            self.link.close()
        self.ended.set()

    def _let_go(self) -> None:
        """Keep only what it takes to answer the binds of a daemon: leave the session, the directory, and output pipes."""
        os.setsid()
        os.chdir("/")
        kernel.keep_only(self._descriptors())
        if self.child.admission is not None:
            self.child.admission.observer = Diagnosis((), is_named=False, quiet=True, verbose=False)

    def _descriptors(self) -> set[int]:
        """The descriptors that we need from now on, without standard error."""
        ours = {self.inbox.fileno(), self.link.fileno(), *self.job.guard_descriptors()}
        return ours if self.child.admission is None else ours | self.child.admission.descriptors()

    # What we are told.

    def _take_signal(self, signal: signals.Received) -> None:
        self.may_be_told = self.may_be_told or signal.number in kernel.ENDING_SIGNALS
        if signal.number == _signal.SIGCHLD:
            self._reap()
        elif signal.from_terminal:
            self.was_interrupted = self.was_interrupted or (signal.number == _signal.SIGINT and self.state != _ENDED)
        elif signal.sender != self.front and self.state != _LEFT:
            self.witness.see(signal.number, signal.sender)

    def _reap(self) -> None:
        """Take the status of every child that ended or stopped: the command, and orphans that became ours."""
        for pid, status in list(signals.reap()):  # take all, before `_has_ended` looks whether children are left
            if pid == self.child.pid and os.WIFSTOPPED(status):
                if not self.told.to_stop.is_set() and signals.is_to_stop_us(os.WSTOPSIG(status)) and is_stopped(pid):
                    signals.stop()
            elif pid == self.child.pid:
                self._has_ended(status)
        if not signals.has_children():
            self.childless.set()

    def _take_word(self, kind: bytes, fields: list[str]) -> None:
        if kind == protocol.SIGNAL:
            self._pass_on(int(fields[0]), int(fields[1]))
        elif kind == protocol.STOP:
            self._be_told(int(fields[0]), int(fields[1]))
        elif kind == protocol.DRAIN:
            self.told.to_drain = True
            self._send(_signal.SIGTERM)
        elif kind == protocol.KILL:
            self.told.at_once.set()
            self._be_told(_signal.SIGTERM, protocol.ALONE)
        elif kind == links.ENDED:
            self._be_told(_signal.SIGTERM, protocol.ALONE)
            after(self.job.kill_after, self.told.at_once.set)  # also for a plain command: nobody can tell it again
        else:
            self.note(kind, fields)

    def _be_told(self, number: int, sender: int) -> None:
        """Begin to stop the tree, once."""
        if self.told.to_stop.is_set():
            return
        self.told.begin()
        self.told.was_alive = not is_ending(self.child.pid)
        self._pass_on(number, sender, number if self.job.leaves_daemons else _signal.SIGTERM)

    def _pass_on(self, number: int, sender: int, sent: int | None = None) -> None:
        """Send the command the signal that portexec was sent, or `sent` instead, unless the whole group was sent it."""

        def decide(was_sent_to_all: bool) -> None:
            if was_sent_to_all and self._is_in_our_group():
                self.told.was_sent_to_all = True
            else:
                self._send(sent or number)

        self.witness.hear(number, sender, decide)

    def _is_in_our_group(self) -> bool:
        try:
            return os.getpgid(self.child.pid) == os.getpgrp() and os.getsid(self.child.pid) == os.getsid(0)
        except OSError:
            return True  # it has ended, and needs no signal any more

    def _send(self, number: int) -> None:
        if not self.ended.is_set():
            signals.send(self.child.pid, number)
            if self.told.to_stop.is_set() and self.child.pid in self.told.stopped:
                signals.send(self.child.pid, _signal.SIGCONT)  # Ctrl-Z has stopped it

    # The end.

    async def _stop(self) -> None:
        """Stop the tree. The command is told first. Then all processes that lived at the request are told, once each.

        KILL follows when the time is over or we are told again. Processes that started after the request are not told: they are
        the helpers by which a shell's trap cleans up.
        """
        if self.childless.is_set():
            return
        self.told.begin()
        deadline = None if self.job.patience is None else time.monotonic() + self.job.patience
        within = None if deadline is None else min(_COMMAND_FIRST, deadline - time.monotonic())
        await first(self.ended.wait(), self.told.at_once.wait(), within=within)
        if not self.told.at_once.is_set():
            self._tell_the_rest()
            deadline = deadline or time.monotonic() + self.job.kill_after
            await first(self.childless.wait(), self.told.at_once.wait(), within=max(0.0, deadline - time.monotonic()))
        await tree.kill_below(self.childless)

    def _tell_the_rest(self) -> None:
        if self.childless.is_set():
            return
        processes = Processes(os.getpid())
        rest = (processes.below(os.getpid()) & self.told.alive) - {self.child.pid}
        if self.told.was_sent_to_all:
            rest = {pid for pid in rest if not _is_in_group(pid)}
        tree.tell(rest, _signal.SIGTERM, processes)


class _Request:
    """The request to stop: when it has come, who was alive then, and whether there is more hurry."""

    __slots__ = ("alive", "at_once", "stopped", "to_drain", "to_stop", "was_alive", "was_sent_to_all")

    def __init__(self) -> None:
        self.to_stop = Event()
        self.at_once = Event()
        self.was_alive = False  # the command was not about to end by itself
        self.to_drain = False  # the command alone was told to end, and has no time limit
        self.alive: set[int] = set()
        self.stopped: set[int] = set()  # by job control
        self.was_sent_to_all = False  # the sender of the request has sent the signal to the whole group

    def begin(self) -> None:
        """Note which processes live now. A second call does nothing."""
        if not self.to_stop.is_set():
            self.to_stop.set()
            processes = Processes(os.getpid())
            self.alive, self.stopped = processes.below(os.getpid()), processes.stopped


class _SharedDiagnosis(Diagnosis):
    """Says on stderr what `Diagnosis` does, and to portexec where the command listens."""

    def __init__(self, job: Job, link: Link) -> None:
        inner = inspected(job.plan.argv)
        super().__init__(job.guards, is_named=job.names_port, quiet=job.quiet, verbose=job.verbose, inner=inner)
        self.link = link
        self.advised = job.advised

    def _advise(self, about: str, *lines: str) -> None:
        super()._advise(about, *lines)
        self.link.mention(protocol.ADVISED, about)

    def listening(self, port: int, host: str) -> None:
        """The command listens on a number of ours."""
        super().listening(port, host)
        self.link.mention(protocol.LISTENING, port, host)


def _is_in_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return True
