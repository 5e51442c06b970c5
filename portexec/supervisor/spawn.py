"""The fork. It comes as early as it can: what only the parent needs is imported after it, while the child goes on."""

from __future__ import annotations

import _signal
import _socket
import os

from portexec import execute
from portexec.handoff import Plan
from portexec.supervisor import child, libc, seccomp, signals


class Child:
    """A child that waits for the word to go: its pid, the parent's end of the socket to it, and our signals."""

    def __init__(self, pid: int, control: _socket.socket, inbox: signals.Inbox) -> None:
        self.pid = pid
        self.control = control
        self.inbox = inbox

    def take_back(self) -> None:
        """End the child, unless it has ended, and make this process again what it was before."""
        signals.send(self.pid, _signal.SIGKILL)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # it was waited for already
        self.control.close()
        self.inbox.restore()
        self.inbox.close()
        libc.prctl(seccomp.PR_SET_CHILD_SUBREAPER, 0)


def spawn(plan: Plan, rehearsal_port: int) -> Child:
    """Fork the child that will become the command. Raises OSError when resources run out."""
    lowest = plan.first_fd + len(plan.passed)
    control, childs_control = (_move_up(end, lowest) for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET))
    inbox = signals.Inbox()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        inbox.restore()
        raise
    if pid == 0:
        control.close()
        child.main(childs_control, plan, rehearsal_port, parent, inbox)
    childs_control.close()
    return Child(pid, control, inbox)


def _move_up(socket: _socket.socket, lowest: int) -> _socket.socket:
    """The same socket under a number where no descriptor of the plan is to be placed."""
    fd = execute.duplicate(socket.fileno(), lowest, inheritable=False)
    socket.close()
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
