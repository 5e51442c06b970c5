"""The parent: rehearse with the child, wait for the command, stop its tree, end as it ended.

No event loop and no threads: one poll(2) on the signals and on the command's notifications. That keeps the parent small for
as long as the command lives.
"""

from __future__ import annotations

import _signal
import _socket
import errno
import os
import select
import sys
import time

from portexec.admission.answer import Admission, Observer
from portexec.binding.guard import Guard
from portexec.errors import PortexecError, RefusedError, of_status
from portexec.parent import child as messages
from portexec.parent import signals, tree
from portexec.parent.spawn import Child, take_back

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from portexec.admission.diagnosis import Diagnosis

_MAX_MESSAGE = 1 << 16
_STDERR = 2
_LONGEST_POLL = 3600.0  # seconds


class Supervised:
    """A child that is ready to execute the command, or does.

    `has_started`: the command runs, or has ended; or `failure` says why it could not be executed.
    """

    was_gated = False  # whether anything had to be gated so far

    def __init__(self, child: Child, inbox: signals.Inbox) -> None:
        self.pid = child.pid
        self.inbox = inbox
        self.others = child.others
        self.has_started = False
        self.failure: PortexecError | None = None
        self._child = child

    def go(self) -> None:
        """Let the child execute the command. What comes of it, `attend` finds out."""
        try:
            self._child.control.send(messages.GO)
        except BrokenPipeError:
            pass  # somebody killed it: its status tells

    def end(self) -> None:
        """End the child, unless it has ended, and give back what only it needed."""
        self._child.end()
        self.release()

    def cancel(self) -> None:
        """The same, and make this process again what it was."""
        self.end()
        take_back(self.inbox)

    def release(self) -> None:
        """Give back what only this child needed. Nothing of it runs any more."""
        self._child.control.close()

    def observe(self, observer: Observer) -> None:
        """Tell this one from now on what admission sees."""

    def descriptors(self) -> set[int]:
        """All that the parent needs from now on."""
        return {self.inbox.fileno()}

    def register(self, poll: select.poll) -> None:
        """Have this wait for what `attend` is to deal with, too."""
        poll.register(self._child.control, select.POLLIN)

    def attend(self, ready: Mapping[int, int], poll: select.poll) -> None:
        """Deal with what the poll found, and with what is due."""
        if not self.has_started and self._child.control.fileno() in ready:
            poll.unregister(self._child.control)
            self._take_start()

    def _take_start(self) -> None:
        message = self._child.control.recv(_MAX_MESSAGE)
        self._child.control.close()
        self.has_started = True
        if message[:1] == messages.FAILED:
            status, text, hint = os.fsdecode(message[1:]).split(messages.SEPARATOR)
            self.failure = of_status(int(status), text, hint)

    def patience(self) -> float | None:
        """Seconds until `attend` is due even if nothing happens, None for never."""
        return None

    def has_filtered_tasks(self) -> bool:
        """Whether anything below the filter still runs."""
        return False


class Admitted(Supervised):
    """One whose binds are admitted."""

    def __init__(self, child: Child, inbox: signals.Inbox, admission: Admission) -> None:
        super().__init__(child, inbox)
        self.admission = admission
        self.notifications = select.poll()
        self.notifications.register(admission.notify_fd, select.POLLIN)

    @property
    def was_gated(self) -> bool:  # type: ignore[override]
        return self.admission.was_gated

    def release(self) -> None:
        super().release()
        os.close(self.admission.notify_fd)

    def observe(self, observer: Observer) -> None:
        self.admission.observer = observer

    def descriptors(self) -> set[int]:
        return super().descriptors() | self.admission.descriptors()

    def register(self, poll: select.poll) -> None:
        super().register(poll)
        poll.register(self.admission.notify_fd, select.POLLIN)

    def attend(self, ready: Mapping[int, int], poll: select.poll) -> None:
        super().attend(ready, poll)
        found = ready.get(self.admission.notify_fd, 0)
        if found & select.POLLIN:
            self.serve()
        elif found:
            poll.unregister(self.admission.notify_fd)  # the last filtered task is gone
        self.admission.look_at_gates()

    def patience(self) -> float | None:
        return self.admission.patience()

    def has_filtered_tasks(self) -> bool:
        return not any(event & select.POLLHUP for _, event in self.notifications.poll(0))

    def serve(self) -> None:
        """Answer all calls that wait."""
        self.admission.serve()

    def answer_to_the_end(self) -> None:
        """Answer until nothing is left that could ask."""
        self.observe(Observer())
        while self.has_filtered_tasks():
            self.notifications.poll(_milliseconds(self.patience()))
            self.serve()
            self.admission.look_at_gates()


def rehearse(child: Child, inbox: signals.Inbox, guards: Mapping[int, Guard], remap: Mapping[int, int]) -> Admitted:
    """Serve the child's bind and listen on a number of ours, and hear from it whether they worked. Raises RefusedError."""
    notify_fd = _receive_notify_fd(child.control)
    try:
        supervised = Admitted(child, inbox, Admission(notify_fd, guards, remap, Observer()))
        outcome = _serve_rehearsal(supervised, child.control)
        if outcome != "1":
            raise RefusedError(f"the rehearsal failed: {outcome or 'the child ended'}")
        if supervised.was_gated and remap:
            raise RefusedError("--remap needs pidfd_getfd(2), which is denied here")
    except BaseException:
        os.close(notify_fd)
        raise
    return supervised


def _serve_rehearsal(supervised: Admitted, control: _socket.socket) -> str:
    admission = supervised.admission
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(admission.notify_fd, select.POLLIN)
    while True:
        ready = dict(poll.poll(_milliseconds(admission.patience())))
        if ready.get(admission.notify_fd, 0) & select.POLLIN:
            supervised.serve()
        admission.look_at_gates()
        if ready.get(control.fileno()):
            admission.close_gates()
            return control.recv(_MAX_MESSAGE).removeprefix(messages.REHEARSED).decode(errors="replace")


def _receive_notify_fd(control: _socket.socket) -> int:
    message, ancillary, _, _ = control.recvmsg(_MAX_MESSAGE, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    if message[:1] == messages.NOTIFY_FD and ancillary:
        return int.from_bytes(ancillary[0][2][:4], sys.byteorder)
    code, _, why = message[1:].decode().partition(messages.SEPARATOR)
    raise RefusedError(_why_refused(int(code or 0), why))


def _why_refused(code: int, why: str) -> str:
    meanings = {
        errno.EBUSY: "another supervisor has the notifications already: a portexec around this one, or a sandbox",
        errno.EINVAL: "this kernel, or the sandbox around it, has no seccomp notifications",
        errno.ENOSYS: "this kernel has no seccomp, or not for this machine",
        errno.EPERM: "seccomp is denied here, by a container's profile or a sandbox",
        errno.EACCES: "seccomp is denied here, by a container's profile or a sandbox",
    }
    return f"{meanings.get(code, 'the filter cannot be installed')} ({why})"


class Supervisor:
    """Looks after a command that was told to go, to its end.

    `kill_after` is the time in seconds from TERM to KILL for what the command leaves running. `is_killed`: the command itself
    gets KILL as well, that long after it was told to stop; otherwise it has all the time it takes.
    """

    def __init__(self, supervised: Supervised, diagnosis: Diagnosis, kill_after: float, *, is_killed: bool) -> None:
        self.supervised = supervised
        self.diagnosis = diagnosis
        self.kill_after = kill_after
        self.is_killed = is_killed
        self.stop_requests: list[float] = []  # when they came
        self.is_told_to_stop = False  # with its whole tree, by somebody who does not wait for the command to end
        self.is_hurried = False  # and at once
        self.was_interrupted = False  # by Ctrl-C, which the command may have a use for
        self.has_ended = False
        self.has_left_a_daemon = False  # something runs on, and may serve
        self.wait_status = 0  # of waitpid(2), once it has ended
        self.poll = select.poll()
        self.poll.register(supervised.inbox, select.POLLIN)
        supervised.observe(diagnosis)
        supervised.register(self.poll)

    def run(self) -> int:
        """Wait for the command's end and return its wait status. Raises PortexecError if it could not be executed."""
        self.wait_for_start()
        if self.supervised.has_started:
            _keep_only({*self.supervised.descriptors(), _STDERR})
        self.wait_for_end()
        if self.stop_requests or self._died_of_ctrl_c():
            self.stop_tree()
        else:
            self._leave_an_answerer()
        return self.wait_status

    def wait_for_start(self) -> None:
        """Wait until the command runs, or it is time to stop its tree. Raises PortexecError if it cannot be executed."""
        self._wait_until(lambda: self.supervised.has_started)
        if self.supervised.failure is not None:
            raise self.supervised.failure

    def wait_for_end(self) -> None:
        """Wait until the command has ended, or it is time to stop its tree."""
        self._wait_until(lambda: self.has_ended)
        is_stopped = self.stop_requests or self.is_told_to_stop or self._died_of_ctrl_c()
        if not is_stopped and os.WIFEXITED(self.wait_status):
            self.diagnosis.ended(os.WEXITSTATUS(self.wait_status))

    def is_overdue(self) -> bool:
        """Whether the command was told to stop, and its time is over."""
        return self.is_killed and bool(self.stop_requests) and time.monotonic() > self.stop_requests[0] + self.kill_after

    def stop_tree(self) -> None:
        """TERM to all that is left running, KILL to what is left after the given time or a second request."""
        requests = len(self.stop_requests)
        stop = tree.Stop(0 if self.is_overdue() else self.kill_after, spare=self.supervised.others)
        while stop.step() or not self.has_ended:
            self._wait(stop.pause())
            if self.is_hurried or len(self.stop_requests) > requests:
                stop.hurry()
        self._reap()

    def attend(self, ready: Mapping[int, int]) -> None:
        """Deal with what poll(2) found."""
        self.supervised.attend(ready, self.poll)
        if self.diagnosis.patience() == 0:
            self.diagnosis.lose_patience()
        if self.supervised.inbox.fileno() in ready:
            for signal in self.supervised.inbox.read():
                self._handle(signal)

    def _died_of_ctrl_c(self) -> bool:
        return self.was_interrupted and self.has_ended and signals.has_died_of(self.wait_status, _signal.SIGINT)

    def _wait_until(self, is_reached: Callable[[], bool]) -> None:
        while not (is_reached() or self.is_told_to_stop or self.is_overdue()):
            self._wait(self.kill_after if self.is_killed and self.stop_requests else None)

    def _wait(self, longest: float | None = None) -> None:
        """Wait for whatever comes first, and deal with it."""
        limits = (self.supervised.patience(), self.diagnosis.patience(), longest)
        shortest = min((limit for limit in limits if limit is not None), default=None)
        self.attend(dict(self.poll.poll(_milliseconds(shortest))))

    def _handle(self, signal: signals.Received) -> None:
        if signal.number == _signal.SIGCHLD:
            self._reap()
            return
        if signal.number == _signal.SIGINT and signal.from_terminal and not self.has_ended:
            self.was_interrupted = True
        elif signal.number in signals.STOP_REQUESTS and not signals.is_ignored(signal.number):
            self.stop_requests.append(time.monotonic())
        if not self.has_ended and signals.is_to_be_forwarded(signal):
            signals.send(self.supervised.pid, signal.number)

    def _reap(self) -> None:
        """Take the status of every child that ended or stopped: the command, and orphans that became ours."""
        for pid, status in signals.reap():
            self.supervised.others.discard(pid)  # another process may get its number
            if pid == self.supervised.pid and os.WIFSTOPPED(status):
                if not (self.stop_requests or self.is_told_to_stop):
                    signals.stop_with(os.WSTOPSIG(status))
            elif pid == self.supervised.pid:
                self.has_ended, self.wait_status = True, status

    def _leave_an_answerer(self) -> None:
        """Leave a process behind that answers what the command left running, until the last of it is gone.

        Without it their binds would fail with ENOSYS. It keeps the guard, and nothing else of ours or of the user's.
        """
        supervised = self.supervised
        if not isinstance(supervised, Admitted) or not supervised.has_filtered_tasks():
            return
        self.has_left_a_daemon = True
        try:
            if os.fork():
                return
        except OSError:
            return
        try:
            os.setsid()
            _keep_only(supervised.admission.descriptors())
            os.chdir("/")
            supervised.answer_to_the_end()
        finally:
            os._exit(0)


def _keep_only(keep: set[int]) -> None:
    """Close all other descriptors: whoever waits for the end of a pipe of the command's is not to wait for us.

    The standard streams become /dev/null rather than free numbers.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} | {0, 1, _STDERR}:
        if fd in keep or fd == null:
            continue
        if fd <= _STDERR:
            os.dup2(null, fd, inheritable=False)
        else:
            try:
                os.close(fd)
            except OSError:
                pass  # the listing's own descriptor
    if null > _STDERR:
        os.close(null)


def _milliseconds(seconds: float | None) -> float | None:
    """What poll(2) takes for a time, None for ever. An hour is enough at once: it takes no more than an int."""
    return None if seconds is None else 1000 * min(seconds, _LONGEST_POLL)


def end_as(wait_status: int) -> int:
    """End as the command ended: by the same signal, or with the status that this returns."""
    if os.WIFSIGNALED(wait_status):
        signals.die_by(os.WTERMSIG(wait_status))
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)
