"""Signals of portexec's processes: which are read, which are forwarded, stopping and continuing with the command.

All signals that are forwarded are blocked, and read from a signalfd(2), which tells the sender. The terminal sends its signals
(Ctrl-C, Ctrl-Z, a new window size) to the whole process group, the command included, so they are not forwarded.
"""

from __future__ import annotations

import _signal
import os
from _struct import Struct  # what struct has it from

from portexec import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARDED = frozenset(
    {
        _signal.SIGHUP,
        _signal.SIGINT,
        _signal.SIGQUIT,
        _signal.SIGTERM,
        _signal.SIGUSR1,
        _signal.SIGUSR2,
        _signal.SIGWINCH,
        _signal.SIGCONT,
        _signal.SIGTSTP,
        _signal.SIGTTIN,
        _signal.SIGTTOU,
        _signal.SIGALRM,
        _signal.SIGVTALRM,
        _signal.SIGPROF,
        _signal.SIGIO,
        _signal.SIGPWR,
        _signal.SIGXCPU,
        _signal.SIGABRT,
        _signal.SIGSYS,
        *range(_signal.SIGRTMIN, _signal.SIGRTMAX + 1),
    }
)
STOP_REQUESTS = frozenset({_signal.SIGTERM, _signal.SIGINT})
_JOB_CONTROL_STOPS = frozenset({_signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU})

# Seconds in which a signal to a whole group reaches all of it. That is at once, but a process may have to wait for a processor
# to read it, or may end of it first. Many tools signal one process of a tree after the other; such copies were 13 ms apart on
# busy cores.
WHOLE_GROUP = 0.05
# Seconds in which one of portexec and a shim may tell the other too late of a signal that both were sent.
LATE_FRONT = 1.0
LATE_SHIM = 0.5

_INFO_SIZE = 128
_INFO = Struct("IiiI")  # the beginning of struct signalfd_siginfo: number, errno, code and the sender's pid
_SENT_BY_KERNEL = 0x80  # SI_KERNEL, sigaction(2)


class Received:
    """One signal. `from_terminal`: the kernel sent it, to the whole foreground group; else `sender` is a pid."""

    __slots__ = ("from_terminal", "number", "sender")

    def __init__(self, number: int, sender: int, *, from_terminal: bool) -> None:
        self.number = number
        self.sender = sender
        self.from_terminal = from_terminal


class Inbox:
    """The signals of this process, blocked and to be read. `fileno` is readable when some are there; `close` ends it.

    SIGCHLD is among them. It is not ignored while the inbox lives: if it were, the kernel would keep no status of children.
    """

    def __init__(self) -> None:
        numbers = {*FORWARDED, _signal.SIGCHLD}
        self.mask_before = _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)
        self.child_handler_before = _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        self._numbers = numbers
        self._fd = -1

    def fileno(self) -> int:
        """The descriptor, made at the first call. A fork that has closed it makes its own, and reads its own signals."""
        if self._fd < 0:
            self._fd = kernel.signalfd(self._numbers)
        return self._fd

    def read(self) -> list[Received]:
        """What has arrived, in the order of arrival."""
        received: list[Received] = []
        while True:
            try:
                data = os.read(self.fileno(), 16 * _INFO_SIZE)
            except BlockingIOError:
                return received
            for at in range(0, len(data), _INFO_SIZE):
                number, _, code, sender = _INFO.unpack_from(data, at)
                received.append(Received(number, sender, from_terminal=code == _SENT_BY_KERNEL))

    def restore(self) -> None:
        """Give signals their former mask and disposition. Called in the child, and where portexec becomes the command."""
        if self.child_handler_before is not None:
            _signal.signal(_signal.SIGCHLD, self.child_handler_before)
        for number in kernel.ENDING_SIGNALS:
            if callable(_signal.getsignal(number)):
                _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self.mask_before)

    def close(self) -> None:
        """Close the descriptor. `fileno` makes a new one when it is called again, as a fork does for its own signals."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_to_be_forwarded(signal: Received) -> bool:
    """Whether a signal is forwarded to the command.

    Signals of the terminal are not, except the hang-up when it goes away: that goes to the session leader alone.
    """
    if signal.number not in FORWARDED:
        return False
    is_hangup_of_leader = signal.number == _signal.SIGHUP and os.getsid(0) == os.getpid()
    return not signal.from_terminal or is_hangup_of_leader


def reap() -> Iterator[tuple[int, int]]:
    """Take the status of every child that ended or stopped, and of the orphans that became ours."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def has_children() -> bool:
    """Whether this process has any child that it has not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def has_died_of(wait_status: int, number: int) -> bool:
    """Whether a command was killed by this signal, or ended with the status that shells give for it."""
    if os.WIFSIGNALED(wait_status):
        return os.WTERMSIG(wait_status) == number
    return os.WIFEXITED(wait_status) and os.WEXITSTATUS(wait_status) == 128 + number


def is_ignored(number: int) -> bool:
    """Whether our caller had the signal ignored, as nohup(1) does with HUP, and shells with INT for jobs in the background."""
    return bool(_signal.getsignal(number) == _signal.SIG_IGN)


def send(pid: int, number: int) -> None:
    """Send a signal to a child of ours that has not been waited for, or to one that may have gone."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def is_to_stop_us(stop_signal: int) -> bool:
    """Whether to stop, too, when this signal has stopped the command, so that the shell sees the job stop.

    Without a terminal nobody would continue us, and the command's binds would wait for ever.
    """
    return stop_signal in _JOB_CONTROL_STOPS and has_terminal()


def stop() -> None:
    """Stop until we are continued. A CONT that has come before is lost: the caller looks first whether it is still to stop."""
    os.kill(os.getpid(), _signal.SIGSTOP)


def has_terminal() -> bool:
    """Whether this session has a terminal that has not been hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
