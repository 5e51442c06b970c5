"""The shim: a small process between a portexec that stays and one command, and the command's parent.

    portexec (lifetime, may be killed) -> shim (subreaper) -> the command and all that it starts

It waits for the command as `run` does, reports what happens, stops the whole tree when it is told to, and starts the command
again. When portexec dies, however that happens, the socket between them ends and the shim stops the tree all the same; when
the shim dies, its orphans become portexec's. So nothing is left running as long as not both are killed at once.

The socket keeps messages apart: a byte that says what it is, then fields with `SEPARATOR` between them.
"""

from __future__ import annotations

import _socket
import os
import select
import sys

from portexec.admission.diagnosis import Diagnosis
from portexec.errors import STATUS_FAILURE, PortexecError, RefusedError, reason
from portexec.parent import signals, tree
from portexec.parent.admit import admit
from portexec.parent.spawn import socket_pair, spawn
from portexec.parent.supervisor import Supervised, Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from portexec.binding.guard import Guard
    from portexec.command.plan import Plan

# What portexec says to the shim.
PREPARE = b"p"  # fork the child that is to execute the command; nothing of an earlier one is left
GO = b"g"  # execute the command
STOP = b"s"  # TERM to the whole tree, KILL later
KILL = b"k"  # KILL to the whole tree
LEAVE = b"l"  # end; nothing is running

# What the shim says.
PREPARED = b"d"  # whether anything was gated: the child waits for the word
REFUSED = b"r"  # why: this machine does not let us admit binds
EXHAUSTED = b"x"  # why: no child could be started
STARTED = b"b"  # the command's pid
FAILED = b"f"  # status, message, hint: the command cannot be executed
LISTENING = b"i"  # port and address
ENDED = b"e"  # wait status of the command, and whether it had been told to end
GONE = b"o"  # nothing of it is left

SEPARATOR = "\0"
_MAX_MESSAGE = 1 << 16
_STDIN = 0
_STDERR = 2


class Job:
    """What a shim is to run, and how.

    `guards` is empty where nothing is to be admitted. `has_stdin`: the command gets our standard input, else /dev/null. `kept`
    are descriptors of portexec's that whoever is at their other end is to see closed only when nothing is left of the command.
    `farewell` is called in the shim when portexec was killed and the tree has been stopped.
    """

    __slots__ = ("farewell", "guards", "has_stdin", "is_killed", "kept", "kill_after", "plan", "quiet", "remap", "verbose")

    def __init__(
        self,
        plan: Plan,
        kill_after: float,
        *,
        guards: Mapping[int, Guard],
        remap: Mapping[int, int],
        is_killed: bool,
        has_stdin: bool,
        kept: set[int],
        quiet: bool,
        verbose: bool,
        farewell: Callable[[], None],
    ) -> None:
        self.plan = plan
        self.kill_after = kill_after
        self.guards = guards
        self.remap = remap
        self.is_killed = is_killed
        self.has_stdin = has_stdin
        self.kept = kept
        self.quiet = quiet
        self.verbose = verbose
        self.farewell = farewell


class Shim:
    """Our end: the shim's pid and the socket to it. `was_gated`: something had to be, in its rehearsal."""

    def __init__(self, job: Job, inbox: signals.Inbox) -> None:
        """Fork a shim for the job, which waits for the word. Raises OSError when resources run out."""
        self.was_gated = False
        self.is_gone = False
        self.control, shims_end = socket_pair(job.plan.first_fd + len(job.plan.passed))
        try:
            self.pid = os.fork()
        except OSError:
            self.control.close()
            shims_end.close()
            raise
        if self.pid == 0:
            _main(shims_end, job, inbox)
        shims_end.close()

    def tell(self, word: bytes) -> None:
        """Say one of the words above. One that has gone hears nothing."""
        if not self.is_gone:
            try:
                self.control.send(word)
            except (BrokenPipeError, ConnectionResetError):
                pass

    def receive(self) -> tuple[bytes, list[str]]:
        """The next message: its kind, and its fields. An empty kind is the news that the shim has gone."""
        try:
            message = self.control.recv(_MAX_MESSAGE)
        except ConnectionResetError:
            message = b""
        if not message:
            self.is_gone = True
            self.control.close()
        return message[:1], os.fsdecode(message[1:]).split(SEPARATOR)

    def require_prepared(self) -> None:
        """Wait until the child is ready to execute the command.

        Raises RefusedError where binds cannot be admitted, OSError where no child could be started.
        """
        kind, fields = self.receive()
        if kind == REFUSED:
            raise RefusedError(fields[0])
        if kind != PREPARED:
            raise OSError(0, fields[0] or "the process that was to start it was killed")
        self.was_gated = bool(fields[0])

    def leave(self) -> None:
        """End a shim that runs nothing, and wait for it."""
        self.tell(LEAVE)
        self.control.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def _main(control: _socket.socket, job: Job, inbox: signals.Inbox) -> NoReturn:
    """The shim's life. Never returns into the caller's code, which is portexec's."""
    try:
        inbox.close()
        try:
            _close_ours({control.fileno(), *_descriptors(job)})
        except OSError as error:
            control.send(EXHAUSTED + os.fsencode(f"/proc cannot be read: {reason(error)}"))
            os._exit(STATUS_FAILURE)
        if not job.has_stdin:
            _replace_stdin()
        _Process(control, job, inbox).run()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(STATUS_FAILURE)


def _replace_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _STDIN)
    if null == _STDIN:
        os.set_inheritable(_STDIN, True)  # it was closed
    else:
        os.close(null)


def _descriptors(job: Job) -> set[int]:
    guards = {guard.fileno() for guard in job.guards.values()}
    return {*guards, *job.plan.passed, *job.plan.kept, *job.kept}


def _close_ours(keep: set[int]) -> None:
    """Close what portexec has open for itself; what the command is to inherit, the user's own, stays."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd not in keep and fd > _STDERR and not os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            pass  # the listing's own descriptor


class _Process:
    """What the shim is while it runs: one start of the command after the other."""

    def __init__(self, control: _socket.socket, job: Job, inbox: signals.Inbox) -> None:
        self.control = control
        self.job = job
        self.inbox = inbox
        self.diagnosis = _Report(self)

    def run(self) -> None:
        """Start the command as often as portexec says."""
        word = self._hear(PREPARE)
        while word == PREPARE and (supervised := self._prepare()):
            word = self._hear(GO, STOP, KILL)
            if word == GO:
                word = self._look_after(supervised)
            else:
                supervised.end()
            if word and word != LEAVE:
                self.say(GONE)
                word = self._hear(PREPARE)
        if not word:
            self.job.farewell()

    def _hear(self, *expected: bytes) -> bytes:
        """Wait for one of these words, or the end; another comes too late, as STOP does for what has just ended by itself."""
        while (word := self.next_word()) and word not in (*expected, LEAVE):
            pass
        return word

    def next_word(self) -> bytes:
        """Wait for what portexec says next; nothing when it has gone."""
        try:
            return self.control.recv(_MAX_MESSAGE)
        except ConnectionResetError:
            return b""

    def say(self, kind: bytes, *fields: object) -> None:
        """Send a message. Nobody has to be there any more."""
        try:
            self.control.send(kind + os.fsencode(SEPARATOR.join(map(str, fields))))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _prepare(self) -> Supervised | None:
        job = self.job
        self.inbox.read()  # signals from when there was nobody to get them
        try:
            if job.guards:
                supervised: Supervised = admit(job.plan, job.guards, job.remap, self.inbox)
            else:
                supervised = Supervised(spawn(job.plan, None, self.inbox), self.inbox)
        except RefusedError as refusal:
            self.say(REFUSED, refusal)
            return None
        except OSError as error:
            self.say(EXHAUSTED, reason(error))
            return None
        self.say(PREPARED, "gated" if supervised.was_gated else "")
        return supervised

    def _look_after(self, supervised: Supervised) -> bytes:
        """From the word to go until nothing is left. Returns it, or nothing when portexec has gone meanwhile."""
        supervised.go()
        attendant = _Attendant(supervised, self)
        try:
            attendant.wait_for_start()
            attendant.wait_for_end()
        except PortexecError:
            pass  # portexec was told
        attendant.stop_tree()
        supervised.release()
        return b"" if attendant.is_orphaned else GO


class _Report(Diagnosis):
    """Says on stderr what `Diagnosis` does, and to portexec where the command listens."""

    def __init__(self, process: _Process) -> None:
        super().__init__(process.job.guards, quiet=process.job.quiet, verbose=process.job.verbose)
        self.process = process

    def listening(self, port: int, host: str) -> None:
        super().listening(port, host)
        self.process.say(LISTENING, port, host)

    def ended(self, status: int) -> None:
        if self.ports:
            super().ended(status)


class _Attendant(Supervisor):
    """A supervisor that also listens to portexec."""

    def __init__(self, supervised: Supervised, process: _Process) -> None:
        super().__init__(supervised, process.diagnosis, process.job.kill_after, is_killed=process.job.is_killed)
        self.process = process
        self.is_orphaned = False  # portexec has gone
        self._has_reported_start = False
        self._has_reported_end = False
        self._was_told = False  # to end, before it was about to
        self.poll.register(process.control, select.POLLIN)

    def attend(self, ready: Mapping[int, int]) -> None:
        super().attend(ready)
        self._report()
        if self.process.control.fileno() in ready:
            self._hear()

    def _report(self) -> None:
        """Say that the command was started and that it has ended, in this order, though one poll(2) may find both."""
        if self.supervised.has_started and not self._has_reported_start:
            self._has_reported_start = True
            self._report_start()
        if self.has_ended and self._has_reported_start and not self._has_reported_end:
            self._has_reported_end = True
            self.process.say(ENDED, self.wait_status, "told" if self._was_told or self.stop_requests else "")

    def _report_start(self) -> None:
        failure = self.supervised.failure
        if failure is None:
            self.process.say(STARTED, self.supervised.pid)
        else:
            self.process.say(FAILED, failure.status, failure.message, failure.hint)

    def _hear(self) -> None:
        word = self.process.next_word()
        if not word:
            self.poll.unregister(self.process.control)
            self.is_orphaned = True
        self.is_told_to_stop = True
        self._was_told = self._was_told or not tree.is_ending(self.supervised.pid)
        self.is_hurried = self.is_hurried or word == KILL
