"""`--detach`: the run goes on in the background, and the caller goes on when it is ready.

    the caller's process: waits                  the process in the background: is the run's portexec
    forks ------------------------------------>  a session of its own, the log, nothing else that was open
       <------- the events of `control` -------  launches as ever, driven by the caller's process
    prints the addresses
    hears no signal any more -- "let go" ----->  goes on alone
    ends with 0

Until then the caller owns the run: when the caller's process ends, for whatever reason, the socket ends, and so does the run.
So a caller that ended with 0 has left a run behind, and a caller that a signal has ended has not.
"""

from __future__ import annotations

import _signal
import _socket
import os
import select
import time

from portexec import control, kernel
from portexec.command import activation, execute
from portexec.command.undo import Undo
from portexec.control import LET_GO
from portexec.errors import STATUS_FAILURE, PortexecError, UsageError, cannot, how_it_ended
from portexec.kernel import ENDING_SIGNALS, STDERR, STDIN, STDOUT
from portexec.lifetime.log import Log
from portexec.names import registry
from portexec.names.naming import for_browsers
from portexec.names.registry import Claim, absolute
from portexec.names.wait import AT_LAST, addresses, reporter, until_over
from portexec.plainjson import dumps, loads
from portexec.request import Request
from portexec.say import is_own, print_out, say, say_again, say_error, say_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_LOOK = 1.0  # seconds between two looks at the log
_AT_ONCE = 1 << 16  # bytes


def fork(request: Request, claim: Claim) -> Waiting | None:
    """Fork the process in the background. In the caller's process, returns what waits for the run. Raises PortexecError.

    In the process in the background, returns None. There `request.chosen` is changed to a run with this log that a program
    drives.
    """
    chosen = request.chosen
    try:
        if chosen.log is None:
            chosen.log = claim.make_log()
            claim.tell_log(chosen.log)
        log = Log(chosen.log, Undo())
        log.keep()
        ours, theirs = _socket.socketpair()
        pid = os.fork()
    except OSError as error:
        raise cannot("go to the background", error) from error
    if pid:
        theirs.close()
        claim.let_go()
        return Waiting(request, claim, ours, log)
    chosen.detach = chosen.reuse = False
    chosen.control_fd = str(theirs.detach())
    _leave(len(request.inherited), {int(chosen.control_fd), claim.lock, claim.front}, log)
    claim.pass_to_me()
    return None


def _leave(inherited: int, keep: set[int], log: Log) -> None:
    """Leave the caller's session, and let go of all that it has open but the sockets that an activator handed on.

    Standard input becomes a silent pipe, which ends with this process: some servers end when their standard input does.
    """
    os.setsid()
    reader, writer = os.pipe()
    for fd, stream in ((reader, STDIN), (log.fd, STDOUT), (log.fd, STDERR)):
        os.dup2(fd, stream)
    handed_on = range(activation.FIRST_FD, activation.FIRST_FD + inherited)
    kernel.keep_only({STDIN, STDOUT, STDERR, writer, *keep, *handed_on})
    if inherited:
        os.environ.update(activation.pid_variables(os.getpid()))
    execute.forget_jobserver(os.environ)


class Waiting:
    """The caller's process, until the run is ready or has ended."""

    def __init__(self, request: Request, claim: Claim, socket: _socket.socket, log: Log) -> None:
        self.name = request.name
        self._run = claim.entry
        self.project = claim.entry.project
        self.specs = request.specs
        self.socket = socket
        self._poll = select.poll()
        self._poll.register(socket.fileno(), select.POLLIN)
        self.log = log
        self.is_lazy = request.chosen.lazy
        self.is_json = request.chosen.json
        self.is_quiet = request.chosen.quiet
        self._kill_after = request.lifetime.kill_after
        self._heard = [number for number in ENDING_SIGNALS if _signal.getsignal(number) != _signal.SIG_IGN]
        self._rest = b""
        self._wait_status: int | None = None
        self._was_told = False  # somebody told the command to end
        self._error: PortexecError | None = None
        self._said: set[str] = set()  # the lines of the log that were said

    def finish(self) -> int:
        """Wait, and print the addresses. Returns an exit status. A signal that ends us ends the run, too."""
        try:
            self._hear(_interrupt)
            listeners = self._wait()
            if listeners is not None:
                print_out(self._told(listeners))
                self._hear(_signal.SIG_IGN)
        except _Interrupted as interrupted:
            self._end_by(interrupted.number)
        if listeners is None or not self._let_go():
            return self._fail()
        self._tell_person(listeners)
        return 0

    def _hear(self, handler: Callable[[int, object], object] | int) -> None:
        for number in self._heard:
            _signal.signal(number, handler)

    def _let_go(self) -> bool:
        """Let the run go on alone. False if it has ended: then the rest of its events is read, which tells how."""
        try:
            self.socket.send(dumps({"do": LET_GO}).encode() + b"\n", _socket.MSG_NOSIGNAL)
        except OSError:
            while self._wait() is not None:
                pass
            return False
        return True

    def _end_by(self, number: int) -> NoReturn:
        """End the run, and then ourselves by the signal. A second signal ends us at once."""
        self._hear(_signal.SIG_DFL)
        self.socket.shutdown(_socket.SHUT_WR)
        if not self._ends_within(self._kill_after + AT_LAST):
            say(f"error: {self.name} does not end; its log is {self.log.path}")
        kernel.die_by(number)

    def _ends_within(self, seconds: float) -> bool:
        """Wait until nothing of the run is left; whether that was so in time."""
        deadline = time.monotonic() + seconds
        while self._poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            if not self.socket.recv(_AT_ONCE):
                return self._is_free_within(max(0.0, deadline - time.monotonic()))
        return False

    def _is_free_within(self, seconds: float) -> bool:
        """Wait until the name is free; whether that was so in time. A process that ends may close its lock after the socket."""
        try:
            return until_over(self._run, seconds, lambda: None) is None
        except PortexecError:
            return True  # nobody can know

    def _wait(self) -> list[dict[str, object]] | None:
        """The listeners of the run when it is ready; None when nothing is left of it."""
        report = reporter(f"{self.name} to be ready; its log is {self.log.path}", is_quiet=self.is_quiet)
        look = time.monotonic() + _LOOK
        while True:
            if not self._poll.poll(1000 * max(0.0, look - time.monotonic())):
                look = time.monotonic() + _LOOK
                self._pass_on()
                report()
                continue
            data = self.socket.recv(_AT_ONCE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for event in map(loads, lines):
                if event["event"] == "bound":
                    self._tell_passed_over(event["listeners"])
                if event["event"] == ("bound" if self.is_lazy else "ready"):
                    return absolute(event["listeners"])
                self._take(event)
            if not data:
                self._is_free_within(AT_LAST)
                return None

    def _pass_on(self) -> None:
        """Say what the portexec in the background has written to the log, each line once."""
        new = [line for line in dict.fromkeys(self.log.new_lines()) if is_own(line) and line not in self._said]
        self._said.update(new)
        say_again(new)

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "ended":
            self._wait_status, self._was_told = event["status"], not event["by_itself"]
        elif event["event"] == "error":
            kind = control.kind_of(event)
            about = {"about": event["about"]} if issubclass(kind, UsageError) else {}
            self._error = kind(event["message"], event["hint"], **about)

    def _tell_passed_over(self, listeners: list[dict[str, Any]]) -> None:
        """Say who has a stable number that this run did not get."""
        if any(spec.stable for spec in self.specs):
            from portexec.binding import stable

            for line in stable.passed_over(self.specs, [listener.get("port", 0) for listener in listeners]):
                self._note(line)

    def _told(self, listeners: list[dict[str, object]]) -> str:
        """What is printed of the run that is ready."""
        entry = registry.find(self.name, self.project, os.environ) if self.is_json else None
        if entry is None:
            return addresses(listeners)
        from portexec.names import listing

        return listing.one_as_json(entry)

    def _tell_person(self, listeners: list[dict[str, object]]) -> None:
        """Say what only a person at a terminal wants to know."""
        if not self.is_quiet and os.isatty(STDERR):
            say(*for_browsers(self.name, listeners))

    def _note(self, text: str) -> None:
        if not self.is_quiet:
            say(f"note: {text}")

    def _fail(self) -> int:
        """Say why the run has ended. Returns the exit status for it, or ends by the signal that the command died of."""
        status = self._wait_status
        self._pass_on()
        error = self._error or PortexecError(self._why())
        say_error(error)
        lines = [line for line in self.log.last_lines() if line not in self._said]
        if lines:
            say_output(f"the last lines of {self.log.path}:", lines)
        if self._error is not None or status is None:
            return error.status
        if os.WIFSIGNALED(status):
            kernel.die_by(os.WTERMSIG(status))
        return os.WEXITSTATUS(status) or STATUS_FAILURE

    def _why(self) -> str:
        if self._wait_status is None:
            return f"{self.name} could not start: it was killed"
        if self._was_told:
            return f"{self.name} was stopped before it was ready"
        return f"the command ended before it was ready: {how_it_ended(self._wait_status)}"


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _interrupt(number: int, _: object) -> NoReturn:
    raise _Interrupted(number)
