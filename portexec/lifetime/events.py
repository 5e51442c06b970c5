"""What a run tells: people on stderr, programs at `--ready-fd` and `--control-fd`, and the registry."""

from __future__ import annotations

import os
import select
import time

from portexec.command.publish import announcement, described
from portexec.errors import reason
from portexec.kernel import STDERR
from portexec.parent.loop import sleep, writable
from portexec.say import moments, say, say_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portexec.binding.listeners import Listener
    from portexec.errors import PortexecError
    from portexec.launch import Launch
    from portexec.lifetime.program import Program
    from portexec.names.registry import Claim


class Reporter:
    """Tells each of these what it wants to hear. `claim` is the run's name, if it has one."""

    def __init__(self, launch: Launch, claim: Claim | None, program: Program | None) -> None:
        self.claim = claim
        self.program = program
        self._was_driven = program is not None
        self.hand_off = launch.choice.hand_off
        self.first_fd = launch.first_fd
        self.ready_fd = launch.request.lifetime.ready_fd
        self.is_quiet = launch.request.chosen.quiet
        self.is_verbose = launch.request.chosen.verbose
        self.is_json = launch.request.chosen.json
        self._as_json = None if self.ready_fd is None else _encoder()
        self._last: int | None = None  # how the current command ended, if it has
        self._said: set[str] = set()  # other addresses than those that were announced

    @property
    def has_announced(self) -> bool:
        """Whether people were told where the command will serve."""
        return not self.is_quiet and not self.is_json and not self._was_driven

    @property
    def is_driven(self) -> bool:
        """Whether a program follows the events, and tells its people itself what has become of the command."""
        return self.program is not None

    def announce_others(self, announced: Sequence[Listener], found: Sequence[Listener]) -> None:
        """Announce the listeners that serve on another host than the announced one, once each."""
        others = [now for before, now in zip(announced, found, strict=True) if now.told_host != before.told_host]
        new = [line for line in announcement(others, named=len(announced) > 1) if line not in self._said]
        self._said.update(new)
        say(*new)
        if new and (lost := [before for before, now in zip(announced, found, strict=True) if before.known_as != now.known_as]):
            self.note(f"{lost[0].known_as} does not lead there: the command listens where other machines cannot reach it")

    def error(self, error: PortexecError) -> None:
        """Something has failed, and the run goes on."""
        say_error(error)

    def note(self, text: str, hint: str = "") -> None:
        """Something that a person should know, and what may help."""
        if not self.is_quiet:
            say(f"note: {text}", *([f"hint: {hint}"] if hint else []))

    def detail(self, text: str) -> None:
        """Something for `-v`."""
        if self.is_verbose:
            say(text)

    async def show_progress(self, who: str, what: Callable[[], str], within: float | None) -> None:
        """Say from time to time what we wait for the command, or a new start of it, to do. Never returns.

        The wait is over `within` so many seconds. What would come later is not said, though we may come to run later.
        """
        began = time.monotonic()
        for moment in moments():
            await sleep(began + moment - time.monotonic())
            if not self.is_driven and (within is None or moment < within):
                self.note(f"{moment} s: waiting for {who} to {what()}")

    def tell(self, event: str, **fields: object) -> None:
        """An event for the program that drives the run."""
        if self.program is not None:
            self.program.tell(event, **fields)

    def let_go(self) -> None:
        """Tell the program that drives the run nothing more."""
        self.program = None

    def finish(self, wait_status: int, *, is_told: bool) -> None:
        """The run is over. If it was told to stop, the registry gets the end of the command instead of the end of the run."""
        if self.program is not None:
            self.program.finish()
        self._register(lambda claim: claim.tell_ended(self._last if is_told else wait_status, is_stopped=is_told))

    def tell_started(self, pid: int, *, is_asked_for: bool) -> None:
        """Tell that a command runs. `is_asked_for`: a program has asked for it, by a restart."""
        self._last = None
        self.tell("started", pid=pid, asked_for=is_asked_for)

    def tell_idle(self, *, is_asked_for: bool) -> None:
        """Tell that the next command waits for its first connection."""
        self.tell("idle", asked_for=is_asked_for)

    def tell_ready(self, pid: int, listeners: Sequence[Listener]) -> None:
        """Tell that the command is ready, and where it really listens."""
        told = described(listeners, self.first_fd)
        self._register(lambda claim: claim.tell_ready(pid, told))  # first: the program may look there as soon as it is told
        self.tell("ready", pid=pid, listeners=told)

    def tell_ended(self, wait_status: int, *, by_itself: bool, is_current: bool) -> None:
        """Tell that a command has ended. After the end of the current one, nothing serves until there is another."""
        self.tell("ended", status=wait_status, by_itself=by_itself)
        if is_current:
            self._last = wait_status
            self._register(lambda claim: claim.tell_starting())

    def tell_stopping(self) -> None:
        """Tell that the run is to end."""
        self._register(lambda claim: claim.tell_stopping())

    def _register(self, change: Callable[[Claim], None]) -> None:
        """Tell the registry. A full disk is no reason to stop a server."""
        if self.claim is not None:
            try:
                change(self.claim)
            except OSError as error:
                self.note(f"the registry cannot be told what became of {self.claim.entry.name}: {reason(error)}")

    async def announce_ready(self, command_pid: int, listeners: Sequence[Listener]) -> None:
        """One JSON line to the descriptor of `--ready-fd`, which is closed then. A slow reader keeps nobody else waiting."""
        fd, self.ready_fd = self.ready_fd, None
        if fd is None or self._as_json is None:
            return
        told = {
            "pid": os.getpid(),
            "command_pid": command_pid,
            "hand_off": self.hand_off,
            "listeners": described(listeners, self.first_fd),
        }
        try:
            await _write(fd, self._as_json(told).encode() + b"\n")
        except OSError:
            pass  # nobody wants to know any more
        if fd > STDERR:
            os.close(fd)


def _encoder() -> Callable[[object], str]:
    """Import it while the command starts: when the command is ready, a program waits for the line."""
    from portexec.plainjson import dumps

    return dumps


async def _write(fd: int, data: bytes) -> None:
    """Write when there is room. A pipe that can be written to takes PIPE_BUF bytes without blocking, pipe(7)."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(0):
            await writable(fd)
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]
