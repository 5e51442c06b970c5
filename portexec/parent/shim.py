"""The shim: a small process between portexec and one command, and the command's parent. Each start of a command has its own.

    portexec (policy: may be killed) -> shim (mechanism; subreaper) -> the command and all that it starts

When portexec dies, however that happens, the link between them ends, and the shim stops the tree and undoes what the run has
made. When the shim dies, its orphans become portexec's. So nothing is left running as long as not both are killed at once.
A daemon that outlives its command under plain `guard` keeps its shim, which answers for its binds and has let go of all else.
"""

from __future__ import annotations

import os
import sys

from portexec import kernel
from portexec.command.undo import Undo
from portexec.errors import STATUS_FAILURE, RefusedError, reason
from portexec.kernel import STDERR, STDIN
from portexec.parent import link as links
from portexec.parent import loop
from portexec.parent.child import Child, fork_child, rehearse
from portexec.parent.link import Link
from portexec.parent.supervisor import Job, Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from portexec.parent.signals import Inbox

# What portexec says, before what `supervisor` hears.
PREPARE = b"p"  # fork the child that is to execute the command
UNDO = b"u"  # an entry of the undo list
GO = b"g"  # execute the command
LEAVE = b"l"  # end; nothing runs, and nothing is to be undone

# What the shim says.
PREPARED = b"d"  # why binds have to be gated, or nothing: the child waits for the word
REFUSED = b"r"  # why: this machine does not let us admit binds
EXHAUSTED = b"x"  # why: no child could be started
GONE = b"o"  # nothing of the command is left; it waits for LEAVE


class Shim:
    """Our end: the shim's pid and the link to it. `why_gated`: why a bind had to be, in the rehearsal."""

    __slots__ = ("link", "pid", "why_gated")

    def __init__(self, job: Job, inbox: Inbox) -> None:
        """Fork a shim for the job, which waits for the word. Raises OSError when resources run out."""
        self.why_gated = ""
        self.link, shims_end = links.pair(job.plan.first_fd + len(job.plan.passed))
        try:
            self.pid = os.fork()
        except OSError:
            self.link.close()
            shims_end.close()
            raise
        if self.pid == 0:
            _live(shims_end, job, inbox)
        shims_end.close()

    def prepare(self) -> None:
        """Have it fork the child that is to execute the command, and wait until that is ready to.

        Raises RefusedError where binds cannot be admitted, OSError where no child could be started; the shim is gone then.
        """
        self.link.say(PREPARE)
        try:
            self.take_prepared(*self.link.receive())
        except BaseException:
            self.leave()
            raise

    def take_prepared(self, kind: bytes, fields: list[str]) -> None:
        """Take its answer to PREPARE. Raises as `prepare`."""
        if kind == REFUSED:
            raise RefusedError(fields[0])
        if kind != PREPARED:
            raise OSError(0, fields[0] or "the process that was to start it was killed")
        self.why_gated = fields[0]

    def share(self, undo: Undo) -> None:
        """Give it the undo list, for the case that portexec is killed."""
        for entry in undo.entries:
            self.link.say(UNDO, *entry)

    def leave(self) -> None:
        """End a shim that runs nothing, and wait for it. Who says so undoes what was made."""
        self.link.say(LEAVE)
        self.link.close()
        self.wait()

    def wait(self) -> None:
        """Wait until the process has gone, unless it was waited for."""
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def _live(link: Link, job: Job, inbox: Inbox) -> NoReturn:
    """The shim's life. Never returns into the caller's code, which is portexec's."""
    try:
        inbox.close()
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        _close_ours({link.fileno(), *job.guard_descriptors(), *job.plan.passed, *job.plan.kept, *job.kept})
        if not job.has_stdin:
            _replace_stdin()
        _run(link, job, inbox)
        os._exit(0)
    except (OSError, MemoryError) as error:
        link.say(EXHAUSTED, reason(error))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(STATUS_FAILURE)


def _run(link: Link, job: Job, inbox: Inbox) -> None:
    """From word to word. The end of the link is the end of portexec."""
    undo = Undo()
    word = _hear(link, undo)
    child = _prepare(link, job, inbox) if word == PREPARE else None
    if child is not None:
        word = _hear(link, undo)
        if word == GO:
            loop.run(Supervisor(child, job, link, inbox).run())
        else:
            child.end()
        link.say(GONE)
        word = _hear(link, undo)
    while word not in (LEAVE, links.ENDED):
        word = _hear(link, undo)  # what comes too late
    if word == links.ENDED:
        undo.run()


def _hear(link: Link, undo: Undo) -> bytes:
    """The next word but UNDO, which is done."""
    while True:
        kind, fields = link.receive()
        if kind != UNDO:
            return kind
        undo.entries.append(fields)


def _prepare(link: Link, job: Job, inbox: Inbox) -> Child | None:
    inbox.read()  # signals from when there was nobody to get them
    try:
        if job.guards:
            child = fork_child(job.plan, inbox, next(iter(job.guards)))
            loop.run(rehearse(child, job.guards, job.remap))
        else:
            child = fork_child(job.plan, inbox)
    except RefusedError as refusal:
        link.say(REFUSED, refusal)
        return None
    except (OSError, MemoryError) as error:
        link.say(EXHAUSTED, reason(error))
        return None
    os.chdir("/")  # the child has the command's directory, and nobody else keeps it busy
    link.say(PREPARED, "" if child.admission is None else child.admission.why_gated)
    return child


def _replace_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, STDIN)
    if null == STDIN:
        os.set_inheritable(STDIN, True)  # it was closed
    else:
        os.close(null)


def _close_ours(keep: set[int]) -> None:
    """Close what portexec has open for itself; what the command is to inherit, the user's own, stays."""
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
