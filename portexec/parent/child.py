"""The child that becomes the command: the shim forks it, rehearses with it, and tells it to go.

    fork -> [install the filter -> hand over the notify fd -> (rehearse) ->] wait for the word -> execute the plan

What is in brackets belongs to hand-off `guard`. A rehearsal shows what admission can do on this machine. It is for the first
start below a portexec, and for later ones with other limits. The child tells its parent the outcome of each step by a message.
The link closes at exec: the end of the link is the news that the command runs.
"""

from __future__ import annotations

import _signal
import _socket
import errno
import os
import sys

from portexec import kernel
from portexec.admission import seccomp
from portexec.binding.guard import IP_FREEBIND
from portexec.command import execute
from portexec.command.plan import Plan
from portexec.errors import STATUS_FAILURE, PortexecError, RefusedError, of_status, reason, shortage
from portexec.parent.link import Link, error_of, fields_in, fields_of, pair
from portexec.parent.loop import first, readable
from portexec.parent.signals import Inbox, send
from portexec.procfs import credentials

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from portexec.admission.answer import Admission
    from portexec.binding.guard import Guard

# What the child says.
NOTIFY_FD = b"n"  # with the descriptor
REFUSED = b"r"  # errno and reason: the filter cannot be installed
REHEARSED = b"h"  # nothing, or the reason why the rehearsal failed
UNABLE = b"x"  # errno and reason: what is needed before the command cannot be had, as when descriptors run out
FAILED = b"f"  # status, message and hint: the command cannot be executed

# What the parent says.
GO = b"g"  # execute the command

_MAX_MESSAGE = 1 << 12


class Child:
    """A child that waits for the word to go, or that runs the command. `admission` answers its binds, where it has a filter.

    `rehearses`: it binds and listens before it waits for the word.
    """

    __slots__ = ("admission", "link", "pid", "rehearses")

    def __init__(self, pid: int, link: Link, *, rehearses: bool) -> None:
        self.pid = pid
        self.link = link
        self.rehearses = rehearses
        self.admission: Admission | None = None

    def go(self) -> None:
        """Let it execute the command."""
        self.link.say(GO)

    def signal(self, number: int) -> None:
        """Send it a signal for the command, which gets it after exec: until then all signals that we forward are blocked."""
        send(self.pid, number)

    def end(self) -> None:
        """End a child that has not executed the command, and wait for it."""
        try:
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                send(self.pid, _signal.SIGKILL)
                os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # it was waited for already
        self.link.close()
        if self.admission is not None:
            self.admission.close()


def fork_child(plan: Plan, inbox: Inbox, *, is_admitted: bool = False, rehearsal_port: int = 0) -> Child:
    """Fork the child for a plan. It waits for the word to go. Raises OSError when resources run out.

    `is_admitted`: the child installs the filter first, and the caller has to call `admit`. With a `rehearsal_port`, one of our
    numbers, the child then rehearses.
    """
    link, childs_end = pair(plan.first_fd + len(plan.passed))
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        link.close()
        childs_end.close()
        raise
    if pid == 0:
        _live(childs_end, link, plan, parent, inbox, is_admitted=is_admitted, rehearsal_port=rehearsal_port)
    childs_end.close()
    return Child(pid, link, rehearses=bool(rehearsal_port))


async def admit(child: Child, guards: Mapping[int, Guard], remap: Mapping[int, int]) -> None:
    """Answer the child's binds from now on. If the child rehearses, hear from it whether its bind and listen have worked.

    Raises, with the child ended, RefusedError where this machine does not let us admit binds, OSError where resources ran out.
    """
    from portexec.admission.answer import Admission, Observer  # which `Shim` has imported before the fork

    try:
        admission = child.admission = Admission(await _receive_notify_fd(child.link), guards, remap, Observer())
        if child.rehearses:
            await _answer_rehearsal(child, admission, is_remapped=bool(remap))
    except BaseException:
        child.end()
        raise


async def _answer_rehearsal(child: Child, admission: Admission, *, is_remapped: bool) -> None:
    await first(readable(child.link), admission.answer())
    admission.close_gates()
    kind, fields = child.link.receive()
    if kind == UNABLE:
        raise error_of(fields)
    if kind != REHEARSED or fields[0]:
        os.close(os.dup(child.link.fileno()))  # raises OSError where we had no descriptor left to answer with
        raise RefusedError(f"the rehearsal failed: {fields[0] or 'the child ended'}")
    if admission.was_gated and is_remapped:
        raise RefusedError("--remap needs pidfd_getfd(2), which is denied here")


def failure_of(fields: list[str]) -> PortexecError:
    """The error that the fields of FAILED describe."""
    return of_status(int(fields[0]), fields[1], fields[2])


def was_told_by_kernel(pid: int) -> bool:
    """Whether a command whose shim was killed was sent TERM by the kernel, as `_live` asks for.

    The kernel forgets the request when a program gets another user or group: PR_SET_PDEATHSIG(2const). In doubt it is False.
    """
    ours = credentials(os.getpid())
    return bool(ours) and credentials(pid) == ours


async def _receive_notify_fd(link: Link) -> int:
    await readable(link)
    message, ancillary, _, _ = link.socket.recvmsg(_MAX_MESSAGE, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    if message[:1] == NOTIFY_FD:
        if not ancillary:  # the kernel leaves out what we have no descriptor for; unix(7)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return int.from_bytes(ancillary[0][2][:4], sys.byteorder)
    refusal = error_of(fields_in(message)) if len(message) > 1 else OSError(0, "the child ended")
    raise refusal if message[:1] == UNABLE else RefusedError(_why_refused(refusal))


def _why_refused(refusal: OSError) -> str:
    meanings = {
        errno.EBUSY: "another supervisor has the notifications already: a portexec around this one, or a sandbox",
        errno.EINVAL: "this kernel, or the sandbox around it, has no seccomp notifications",
        errno.ENOSYS: "this kernel has no seccomp, or not for this machine",
        errno.EPERM: "seccomp is denied here, by a container's profile or a sandbox",
        errno.EACCES: "seccomp is denied here, by a container's profile or a sandbox",
    }
    return f"{meanings.get(refusal.errno or 0, 'the filter cannot be installed')} ({reason(refusal)})"


# The child's side.


def _live(
    link: Link, parents_end: Link, plan: Plan, parent: int, inbox: Inbox, *, is_admitted: bool, rehearsal_port: int
) -> NoReturn:
    """Run the chain to its end. Never returns into the caller's code, which is the parent's, nor raises into it.

    If the parent is killed, the kernel kills this child, or, after exec, sends the command TERM.
    """
    try:
        parents_end.close()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGKILL)
        if os.getppid() == parent and (not is_admitted or _install(link)):
            listener = _rehearse(link, rehearsal_port) if rehearsal_port else None
            if link.receive()[0] == GO:  # until then the listener stays open, since the parent looks for it
                if listener is not None:
                    listener.close()
                kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGTERM)
                inbox.restore()
                _execute(link, plan)
    except (OSError, MemoryError) as error:
        link.say(UNABLE, *fields_of(error))
    except Exception as error:
        from portexec.say import say_bug

        link.say(UNABLE, 0, say_bug(error))
    finally:
        os._exit(STATUS_FAILURE)


def _install(link: Link) -> bool:
    try:
        notify_fd = seccomp.install()
    except (OSError, MemoryError) as error:
        link.say(UNABLE if shortage(error) is not None else REFUSED, *fields_of(error))
        return False
    link.socket.sendmsg([NOTIFY_FD], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, notify_fd.to_bytes(4, sys.byteorder))])
    os.close(notify_fd)
    return True


def _rehearse(link: Link, port: int) -> _socket.socket:
    """Bind and listen on a number of ours, as the command will; the outcome tells what admission can do on this machine.

    Nobody uses the address, and no interface needs to have it. SO_REUSEADDR is for the case that the socket is gated.
    """
    socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        socket.setsockopt(_socket.IPPROTO_IP, IP_FREEBIND, 1)
        socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        address = ("127.{}.{}.{}".format(*os.urandom(3)), port)
        socket.bind(address)
        socket.listen(1)
        problem = "" if socket.getsockname() == address else "another address was bound"
    except (OSError, MemoryError) as error:
        if shortage(error) is not None:
            raise
        problem = reason(error)
    link.say(REHEARSED, problem)
    return socket


def _execute(link: Link, plan: Plan) -> None:
    try:
        execute.execute(plan)
    except PortexecError as error:
        link.say(FAILED, error.status, error.message, error.hint)
