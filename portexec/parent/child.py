"""The child's side of a supervised start: everything between fork and exec.

    [install the filter -> hand over the notify fd -> rehearse ->] wait for the word -> execute the plan

What is in brackets belongs to hand-off `guard`. Each step's outcome goes to the parent as a message. The socket closes at
exec: its end is the news that the command runs.
"""

from __future__ import annotations

import _signal
import _socket
import os
import sys

from portexec import kernel
from portexec.admission import seccomp
from portexec.binding.guard import IP_FREEBIND
from portexec.command import execute
from portexec.command.plan import Plan
from portexec.errors import STATUS_FAILURE, PortexecError, reason
from portexec.parent.signals import Inbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# What parent and child say to each other, over a SOCK_SEQPACKET pair: the first bytes of messages.
NOTIFY_FD = b"n"  # child: with the descriptor
REFUSED = b"r"  # child: errno and reason; the filter cannot be installed
REHEARSED = b"h"  # child: 1, or the reason why not
GO = b"g"  # parent: execute the command
FAILED = b"f"  # child: status, message and hint; the command cannot be executed

SEPARATOR = "\0"


def main(control: _socket.socket, plan: Plan, rehearsal_port: int | None, parent: int, inbox: Inbox) -> NoReturn:
    """Run the chain to its end. Never returns into the caller's code, which is the parent's.

    Should the parent be killed, the kernel kills us, and sends the command TERM.
    """
    try:
        kernel.prctl(seccomp.PR_SET_PDEATHSIG, _signal.SIGKILL)
        if os.getppid() == parent and (rehearsal_port is None or _install(control)):
            listener = None if rehearsal_port is None else _rehearse(control, rehearsal_port)
            if control.recv(1) == GO:  # until then the listener has to be there: it is looked for
                if listener is not None:
                    listener.close()
                kernel.prctl(seccomp.PR_SET_PDEATHSIG, _signal.SIGTERM)
                inbox.restore()
                _execute(control, plan)
    finally:
        os._exit(STATUS_FAILURE)


def _install(control: _socket.socket) -> bool:
    try:
        notify_fd = seccomp.install()
    except OSError as error:
        control.send(REFUSED + f"{error.errno}{SEPARATOR}{reason(error)}".encode())
        return False
    control.sendmsg([NOTIFY_FD], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, notify_fd.to_bytes(4, sys.byteorder))])
    os.close(notify_fd)
    return True


def _rehearse(control: _socket.socket, port: int) -> _socket.socket:
    """Bind and listen on a number of ours, as the command will; the outcome tells what admission can do on this machine.

    The address is one that nobody uses, and need not exist. SO_REUSEADDR is for the gated form.
    """
    socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        socket.setsockopt(_socket.IPPROTO_IP, IP_FREEBIND, 1)
        socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        address = ("127.{}.{}.{}".format(*os.urandom(3)), port)
        socket.bind(address)
        socket.listen(1)
        outcome = "1" if socket.getsockname() == address else "another address was bound"
    except OSError as error:
        outcome = reason(error)
    control.send(REHEARSED + outcome.encode())
    return socket


def _execute(control: _socket.socket, plan: Plan) -> None:
    try:
        execute.execute(plan)
    except PortexecError as error:
        message = SEPARATOR.join([str(error.status), error.message, error.hint])
        control.send(FAILED + os.fsencode(message))
