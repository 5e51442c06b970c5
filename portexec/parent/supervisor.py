"""Looks after one command, in its shim: from the word to go until nothing of it is left.

It tells portexec what happens, forwards signals, reaps orphans, and stops the tree. What comes at once counts in this order,
which stands in `_take` and `_has_ended`: the start of the command, its binds, its end, and then what we are told.
"""

from __future__ import annotations

import _signal
import os
import time

from portexec import kernel
from portexec.admission.diagnosis import Diagnosis
from portexec.kernel import STDERR
from portexec.parent import child as steps
from portexec.parent import link as links
from portexec.parent import signals, tree
from portexec.parent.loop import Event, first, readable, spawn
from portexec.parent.witness import ALONE, Witness
from portexec.procfs import Processes, is_ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.binding.guard import Guard
    from portexec.command.plan import Plan
    from portexec.parent.child import Child
    from portexec.parent.link import Link
    from portexec.parent.signals import Inbox

# What portexec says.
SIGNAL = b"n"  # number and sender: it was sent this
STOP = b"s"  # number and sender: stop the tree; it was sent this
DRAIN = b"a"  # tell the command to end, which may take its time
KILL = b"k"  # stop the tree at once

# What the supervisor says.
STARTED = b"b"  # the command's pid
FAILED = b"f"  # status, message, hint: the command cannot be executed
LISTENING = b"i"  # port and address
SIGNALLED = b"w"  # number: the shim alone was sent this
ENDED = b"e"  # wait status of the command; whether it had been told to end; whether something is left that may serve

# The states of a command.
_STARTING = "starting"  # told to go
_RUNNING = "running"
_ENDED = "ended"
_LEFT = "left"  # it has ended, and what it has left behind lives on

_COMMAND_FIRST = 1.0  # seconds that a command has for its end before the rest of its tree is told; a shell waits for its child


class Job:
    """What a shim is to run, and how. Times are in seconds.

    `guards` is empty where nothing is to be admitted. `patience` is how long a command that was told to stop may take before
    KILL, None for as long as it takes; `kill_after` is the time that its tree has after it. `leaves_daemons`: what a command
    leaves behind when it ends by itself goes on. `has_stdin`: the command gets our standard input, else /dev/null. `kept` are
    descriptors of portexec whose other end is to see them closed only when nothing is left of the command.
    """

    __slots__ = ("guards", "has_stdin", "kept", "kill_after", "leaves_daemons", "patience", "plan", "quiet", "remap", "verbose")

    def __init__(
        self,
        plan: Plan,
        *,
        kill_after: float,
        patience: float | None,
        guards: Mapping[int, Guard],
        remap: Mapping[int, int],
        leaves_daemons: bool,
        has_stdin: bool,
        kept: set[int],
        quiet: bool,
        verbose: bool,
    ) -> None:
        self.plan = plan
        self.kill_after = kill_after
        self.patience = patience
        self.guards = guards
        self.remap = remap
        self.leaves_daemons = leaves_daemons
        self.has_stdin = has_stdin
        self.kept = kept
        self.quiet = quiet
        self.verbose = verbose

    def guard_descriptors(self) -> set[int]:
        """The descriptors of the guards that binds are admitted past."""
        return {guard.fileno() for guard in self.guards.values()}


class Supervisor:
    """The supervisor of one command, and the owner of its child and of our end of the link to portexec."""

    def __init__(self, child: Child, job: Job, link: Link, inbox: Inbox) -> None:
        self.child = child
        self.job = job
        self.link = link
        self.inbox = inbox
        self.front = os.getppid()
        self.diagnosis = _Report(job, link)
        self.witness = Witness(lambda number: link.say(SIGNALLED, number))
        self.state = _STARTING
        self.told = _Request()
        self.ended = Event()
        self.childless = Event()
        self.was_interrupted = False  # by Ctrl-C, which the command may have a use for

    async def run(self) -> None:
        """Let the command go, and return when nothing is left of it, nor of a daemon that has outlived it."""
        self.child.go()
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
                self.link.say(FAILED, *fields)
            elif self.state == _STARTING:
                self.link.say(STARTED, self.child.pid)
                if self.job.leaves_daemons:
                    # Whoever waits for the end of a pipe of the command's is not to wait for us.
                    kernel.keep_only({*self._descriptors(), STDERR})
            self.state = _RUNNING

    def _has_ended(self, wait_status: int) -> None:
        """Act upon the end of the command, after all that it said before."""
        self._take_start()
        if self.child.admission is not None:
            self.child.admission.serve()
        was_interrupted = self.was_interrupted and signals.has_died_of(wait_status, _signal.SIGINT)
        is_told = self.told.was_alive or self.told.to_drain or was_interrupted
        if not is_told and os.WIFEXITED(wait_status):
            self.diagnosis.ended(os.WEXITSTATUS(wait_status))
        is_left = self.job.leaves_daemons and not is_told and signals.has_children()
        self.state = _LEFT if is_left else _ENDED
        if is_left:
            self._let_go()
        self.link.say(ENDED, wait_status, "told" if is_told else "", "left" if is_left else "")
        if is_left:
            self.link.close()
        self.ended.set()

    def _let_go(self) -> None:
        """Keep nothing but what it takes to answer for the binds of a daemon: not the session, no directory, no output pipe."""
        os.setsid()
        os.chdir("/")
        kernel.keep_only(self._descriptors())
        if self.child.admission is not None:
            self.child.admission.observer = Diagnosis((), quiet=True, verbose=False)

    def _descriptors(self) -> set[int]:
        """All that we need from now on, but for standard error."""
        ours = {self.inbox.fileno(), self.link.fileno(), *self.job.guard_descriptors()}
        return ours if self.child.admission is None else {*ours, self.child.admission.notify_fd}

    # What we are told.

    def _take_signal(self, signal: signals.Received) -> None:
        if signal.number == _signal.SIGCHLD:
            self._reap()
        elif signal.from_terminal:
            self.was_interrupted = self.was_interrupted or (signal.number == _signal.SIGINT and self.state != _ENDED)
        elif signal.sender != self.front and self.state != _LEFT:
            self.witness.see(signal.number, signal.sender)

    def _reap(self) -> None:
        """Take the status of every child that ended or stopped: the command, and orphans that became ours."""
        for pid, status in list(signals.reap()):  # all, before it is asked whether anything is left
            if pid == self.child.pid and os.WIFSTOPPED(status):
                if not self.told.to_stop.is_set():
                    signals.stop_with(os.WSTOPSIG(status))
            elif pid == self.child.pid:
                self._has_ended(status)
        if not signals.has_children():
            self.childless.set()

    def _take_word(self, kind: bytes, fields: list[str]) -> None:
        if kind == SIGNAL:
            self._pass_on(int(fields[0]), int(fields[1]))
        elif kind == STOP:
            self._be_told(int(fields[0]), int(fields[1]))
        elif kind == DRAIN:
            self.told.to_drain = True
            self._send(_signal.SIGTERM)
        elif kind == KILL:
            self.told.at_once.set()
            self._be_told(_signal.SIGTERM, ALONE)
        elif kind == links.ENDED:
            self._be_told(_signal.SIGTERM, ALONE)

    def _be_told(self, number: int, sender: int) -> None:
        """Begin to stop the tree, once."""
        if self.told.to_stop.is_set():
            return
        self.told.begin()
        self.told.was_alive = not is_ending(self.child.pid)
        self._pass_on(number, sender, number if self.job.leaves_daemons else _signal.SIGTERM)

    def _pass_on(self, number: int, sender: int, sent: int | None = None) -> None:
        """Send the command what portexec was sent, or another signal for it, unless the whole group was sent it."""

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
            return True  # it has ended, and needs nothing any more

    def _send(self, number: int) -> None:
        if not self.ended.is_set():
            signals.send(self.child.pid, number)
            if self.told.to_stop.is_set() and self.child.pid in self.told.stopped:
                signals.send(self.child.pid, _signal.SIGCONT)  # Ctrl-Z has stopped it

    # The end.

    async def _stop(self) -> None:
        """The command first, then what was there at the request, once each; KILL when the time is over or we are told again.

        What is born later is not told: those are the helpers that a shell's trap cleans up with.
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
        processes = Processes()
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
        self.to_drain = False  # the command was told to end, and nothing else
        self.alive: set[int] = set()
        self.stopped: set[int] = set()  # by job control
        self.was_sent_to_all = False  # by whoever made the request

    def begin(self) -> None:
        """Note who is alive now. Once more does nothing."""
        if not self.to_stop.is_set():
            self.to_stop.set()
            processes = Processes()
            self.alive, self.stopped = processes.below(os.getpid()), processes.stopped


class _Report(Diagnosis):
    """Says on stderr what `Diagnosis` does, and to portexec where the command listens."""

    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job.guards, quiet=job.quiet, verbose=job.verbose)
        self.link = link

    def listening(self, port: int, host: str) -> None:
        """The command listens on a number of ours."""
        super().listening(port, host)
        self.link.say(LISTENING, port, host)


def _is_in_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return True
