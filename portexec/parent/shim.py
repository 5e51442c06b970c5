"""The shim: a small process between portexec and one command, and the command's parent. Each start of a command has its own.

    portexec (policy: may be killed) -> shim (mechanism; subreaper) -> the command and all that it starts

When portexec dies, however that happens, the link between them ends, and the kernel continues a shim that was stopped. Then the
shim stops the tree and undoes what the run has made. When the shim dies, its orphans become portexec's. So nothing is left
running unless both are killed at once. A daemon that outlives its command under plain `guard` keeps its shim. The shim answers
the daemon's binds, and has closed all that it does not need for that.
"""

from __future__ import annotations

import _signal
import gc
import os

from portexec import kernel
from portexec.command.undo import Undo
from portexec.errors import STATUS_FAILURE, RefusedError, reason, shortage, spare
from portexec.kernel import STDERR
from portexec.parent import link as links
from portexec.parent import loop, protocol
from portexec.parent.child import Child, admit, fork_child
from portexec.parent.link import Link, error_of, fields_of
from portexec.parent.loop import Event
from portexec.parent.naming import name_shim
from portexec.parent.signals import send
from portexec.procfs import is_ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NoReturn

    from portexec.parent.protocol import Job
    from portexec.parent.signals import Inbox


_FEW_DESCRIPTORS = 1024  # the limit that Linux begins with

shims: dict[int, Shim] = {}  # the shims of this process by their pids, until they were waited for


class Shim:
    """A shim as portexec sees it: its pid and the link to it. `why_gated`: why the bind of the rehearsal had to be gated.

    `advised` is that of the job; what the shim tells is added. `has_gone`: the process has ended, and was waited for.
    """

    __slots__ = ("advised", "has_gone", "link", "pid", "why_gated")

    def __init__(self, job: Job, inbox: Inbox) -> None:
        """Fork a shim for the job. It waits for the word to prepare. Raises OSError when resources run out."""
        self.why_gated = ""
        self.has_gone = Event()
        self.advised = job.advised
        if job.guards:
            import portexec.admission.answer  # noqa: F401  # before the fork: for later shims, too, and portexec itself
        self.link, shims_end = links.pair(job.plan.first_fd + len(job.plan.passed))
        front = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            self.link.close()
            shims_end.close()
            raise
        if self.pid == 0:
            _live(shims_end, job, inbox, front)
        shims[self.pid] = self
        shims_end.close()

    def ask_to_prepare(self) -> None:
        """Have it fork the child that is to execute the command."""
        self.link.say(protocol.PREPARE)

    def ask_to_go(self, early: Iterable[int] = ()) -> None:
        """Have the child execute the command, as soon as it is prepared, with these signals pending if it has them blocked."""
        self.link.say(protocol.GO, *early)

    def wait_until_prepared(self) -> None:
        """Wait until the child is ready to execute the command.

        Raises RefusedError where binds cannot be admitted, OSError where no child could be started. The shim ends then.
        """
        try:
            kind, fields = self.link.receive()
            if kind == protocol.REFUSED:
                raise RefusedError(fields[0])
            if kind != protocol.PREPARED:
                raise error_of(fields) if kind == protocol.UNABLE else OSError(0, protocol.KILLED_EARLY)
            self.why_gated = fields[0]
        except BaseException:
            self.leave()
            raise

    def record(self, entry: Sequence[str]) -> None:
        """There is one more entry on the undo list, of which the shim is the heir."""
        self.link.say(protocol.UNDO, *entry)

    def forget(self, entry: Sequence[str]) -> None:
        """There is one entry less on the undo list."""
        self.link.say(protocol.KEEP, *entry)

    def leave(self) -> None:
        """Let a shim end that runs nothing. The caller undoes what was made, or leaves it to another shim."""
        self._let_end(protocol.LEAVE)

    def undo(self) -> None:
        """Let a shim that runs nothing undo what was made, and end."""
        self._let_end(protocol.QUIT)

    def wait(self) -> None:
        """Wait until the process has ended, unless it was waited for. This blocks the whole loop."""
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
        self.take_end()

    def take_end(self) -> None:
        """The process was waited for."""
        shims.pop(self.pid, None)
        self.has_gone.set()

    def _let_end(self, word: bytes) -> None:
        self.link.say(word)
        self.link.close()
        if self.pid in shims:
            send(self.pid, _signal.SIGCONT)  # Ctrl-Z may have stopped it


def _live(link: Link, job: Job, inbox: Inbox, front: int) -> NoReturn:
    """The shim's life. Never returns into the caller's code, which is portexec's."""
    try:
        inbox.close()
        if job.is_apart:
            os.setsid()
        name_shim(job.plan.argv)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGCONT)  # a shim that was stopped hears of portexec's end, too
        plan = job.plan
        _close_ours({link.fileno(), *job.guard_descriptors(), *plan.passed, *plan.kept, *plan.streams.values(), *job.kept})
        job.limit()
        _run(link, job, inbox, front)
        os._exit(0)
    except (OSError, MemoryError) as error:
        spare.clear()
        link.say(protocol.UNABLE, *fields_of(error))
    except Exception as error:
        spare.clear()
        short = shortage(error)
        if short is None:
            from portexec.say import say_bug

            link.say(protocol.UNABLE, 0, say_bug(error))
        else:
            link.say(protocol.UNABLE, 0, short.message)
    finally:
        os._exit(STATUS_FAILURE)


def _run(link: Link, job: Job, inbox: Inbox, front: int) -> None:
    """Do what portexec says, word by word. The end of the link means that portexec has died, or has given up this run."""
    undo = Undo()
    word, _ = _hear(link, undo)
    child = _prepare(link, job, inbox) if word == protocol.PREPARE else None
    if child is not None:
        word, early = _hear(link, undo)
        if word == protocol.GO and not link.is_at_end():  # no command begins whose portexec has died
            for number in map(int, filter(None, early)):
                child.signal(number)
            child.go()
            os.sched_yield()  # the command first: what we import now can wait
            _supervise(child, job, link, inbox, undo)
        else:
            child.end()
        link.say(protocol.GONE)
    while word not in (protocol.LEAVE, protocol.QUIT, links.ENDED):
        word, _ = _hear(link, undo)  # the last word, perhaps after some that come too late
    if word != protocol.LEAVE:
        undo.run()
    if word == links.ENDED and (os.getppid() != front or is_ending(front)):
        job.tell_end()


def _supervise(child: Child, job: Job, link: Link, inbox: Inbox, undo: Undo) -> None:
    """Supervise the command. The modules that this needs are imported while the command starts."""
    from portexec.parent.supervisor import Supervisor

    gc.enable()
    loop.run(Supervisor(child, job, link, inbox, lambda kind, fields: _note(undo, kind, fields)).run())


def _hear(link: Link, undo: Undo) -> tuple[bytes, list[str]]:
    """The next word, with its fields, that is not about the undo list."""
    while True:
        kind, fields = link.receive()
        if not _note(undo, kind, fields):
            return kind, fields


def _note(undo: Undo, kind: bytes, fields: list[str]) -> bool:
    """Note what a word says of the undo list. False for another word."""
    if kind == protocol.UNDO:
        undo.entries.append(fields)
    elif kind == protocol.KEEP:
        undo.entries.remove(fields)
    else:
        return False
    return True


def _prepare(link: Link, job: Job, inbox: Inbox) -> Child | None:
    inbox.read()  # drop signals from before there was a command
    try:
        if job.guards:
            port = 0 if job.is_rehearsed else next(iter(job.guards))
            child = fork_child(job.plan, inbox, is_admitted=True, rehearsal_port=port)
            if 0 < os.sysconf("SC_OPEN_MAX") < _FEW_DESCRIPTORS:
                kernel.raise_descriptor_limit()  # the command may raise its own, and bind by many threads at once
            loop.run(admit(child, job.guards, job.remap))
        else:
            child = fork_child(job.plan, inbox)
    except RefusedError as refusal:
        link.say(protocol.REFUSED, refusal)
        return None
    except (OSError, MemoryError) as error:
        link.say(protocol.UNABLE, *fields_of(error))
        return None
    os.chdir("/")  # the child has the command's directory; the shim must not keep it busy
    link.say(protocol.PREPARED, "" if child.admission is None else child.admission.why_gated)
    return child


def _close_ours(keep: set[int]) -> None:
    """Close what portexec has open for itself. The user's own descriptors, which the command inherits, stay open."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        raise OSError(error.errno, f"/proc cannot be read: {reason(error)}") from error
    for fd in map(int, names):
        try:
            if fd not in keep and fd > STDERR and not os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            pass  # the listing's own descriptor
