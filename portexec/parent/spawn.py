"""The fork. It comes as early as it can: what only the parent needs is imported after it, while the child goes on."""

from __future__ import annotations

import _signal
import _socket
import os

from portexec import kernel
from portexec.admission import seccomp
from portexec.command import execute
from portexec.command.plan import Plan
from portexec.parent import child, signals, tree


class Child:
    """A child that waits for the word to go: its pid, and the parent's end of the socket to it.

    `others` are the children that this process had before, from the time before it was portexec.
    """

    def __init__(self, pid: int, control: _socket.socket, others: set[int]) -> None:
        self.pid = pid
        self.control = control
        self.others = others

    def end(self) -> None:
        """End the child, unless it has ended."""
        try:
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                signals.send(self.pid, _signal.SIGKILL)
                os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # it was waited for already
        self.control.close()


def spawn(plan: Plan, rehearsal_port: int | None, inbox: signals.Inbox) -> Child:
    """Fork the child that will become the command, and become the subreaper of all that it leaves behind.

    With a number of ours it installs the filter and rehearses. Raises OSError when resources run out.
    """
    others = tree.children()
    control, childs_control = socket_pair(plan.first_fd + len(plan.passed))
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        control.close()
        child.main(childs_control, plan, rehearsal_port, parent, inbox)
    childs_control.close()
    kernel.prctl(seccomp.PR_SET_CHILD_SUBREAPER, 1)
    return Child(pid, control, others)


def take_back(inbox: signals.Inbox) -> None:
    """Make this process again what it was before it became a parent."""
    inbox.restore()
    inbox.close()
    kernel.prctl(seccomp.PR_SET_CHILD_SUBREAPER, 0)


def socket_pair(lowest: int) -> list[_socket.socket]:
    """A connected pair that keeps messages apart, under numbers from `lowest` on: where no descriptor is to be placed."""
    return [_move_up(end, lowest) for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)]


def _move_up(socket: _socket.socket, lowest: int) -> _socket.socket:
    fd = execute.duplicate(socket.fileno(), lowest, inheritable=False)
    socket.close()
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
