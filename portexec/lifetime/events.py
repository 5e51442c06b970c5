"""What a run says to whoever looks on: people on stderr, and programs at `--ready-fd` and `--control-fd`."""

from __future__ import annotations

import os
import select
import time

from portexec.command.publish import announcement, described
from portexec.kernel import STDERR
from portexec.parent.loop import sleep, spawn, writable
from portexec.say import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from portexec.binding.listeners import Listener
    from portexec.control import Events
    from portexec.launch import Launch

_PROGRESS = (5, 15, 30, 60)  # seconds after which a person who waits is told for what; then each minute


class Reporter:
    """Says what is to be said, and what nobody wants to hear does not."""

    def __init__(self, launch: Launch) -> None:
        self.hand_off = launch.choice.hand_off
        self.first_fd = launch.first_fd
        self.ready_fd = launch.request.lifetime.ready_fd
        self._control_fd = launch.request.lifetime.control_fd
        self._events = None if self._control_fd is None else _events(self._control_fd)
        self._is_behind = False
        self.is_quiet = launch.request.chosen.quiet
        self.is_verbose = launch.request.chosen.verbose
        self.is_json = launch.request.chosen.json
        self._said: set[str] = set()  # other addresses than those that were announced

    @property
    def has_announced(self) -> bool:
        """Whether people were told where the command will serve."""
        return not self.is_quiet and not self.is_json and self._control_fd is None

    def announce_others(self, announced: Sequence[Listener], found: Sequence[Listener]) -> None:
        """Announce the listeners that serve elsewhere than it was announced, once each."""
        others = [now for before, now in zip(announced, found, strict=True) if now.host != before.host]
        new = [line for line in announcement(others, named=len(announced) > 1) if line not in self._said]
        self._said.update(new)
        say(*new)

    def error(self, text: str) -> None:
        """Something has failed, and the run goes on."""
        say(f"error: {text}")

    def note(self, text: str) -> None:
        """Something that a person should know."""
        if not self.is_quiet:
            say(f"note: {text}")

    def detail(self, text: str) -> None:
        """Something for `-v`."""
        if self.is_verbose:
            say(text)

    async def show_progress(self, what: Callable[[], str]) -> None:
        """Tell from time to time what the command is waited for to do. Never returns."""
        began, passed = time.monotonic(), 0
        while True:
            passed = next((moment for moment in _PROGRESS if moment > passed), passed + _PROGRESS[-1])
            await sleep(began + passed - time.monotonic())
            self.note(f"{passed} s: waiting for the command to {what()}")

    def tell(self, event: str, **fields: object) -> None:
        """An event for the program at the control descriptor, which may be slow to read."""
        if self._events is not None and not self._events.tell(event, **fields) and not self._is_behind:
            self._is_behind = True
            spawn(self._catch_up(self._events))

    async def _catch_up(self, events: Events) -> None:
        while not events.flush():
            assert self._control_fd is not None  # noqa: S101  # they are for it
            await writable(self._control_fd)
        self._is_behind = False

    def finish(self) -> None:
        """The run is over. Who is slow gets a last chance to read the events."""
        if self._events is not None:
            self._events.finish()

    def tell_bound(self, listeners: Sequence[Listener]) -> None:
        """What was bound, for that program, before the command starts."""
        self.tell("bound", hand_off=self.hand_off, listeners=described(listeners, self.first_fd))

    def tell_ready(self, pid: int, listeners: Sequence[Listener]) -> None:
        """That the command is ready, and where it really listens."""
        self.tell("ready", pid=pid, listeners=described(listeners, self.first_fd))

    async def announce_ready(self, command_pid: int, listeners: Sequence[Listener]) -> None:
        """One JSON line to the descriptor of `--ready-fd`, which is closed then. A slow reader keeps nobody else waiting."""
        fd, self.ready_fd = self.ready_fd, None
        if fd is None:
            return
        import json

        told = {
            "pid": os.getpid(),
            "command_pid": command_pid,
            "hand_off": self.hand_off,
            "listeners": described(listeners, self.first_fd),
        }
        try:
            await _write(fd, json.dumps(told).encode() + b"\n")
        except OSError:
            pass  # nobody wants to know any more
        if fd > STDERR:
            os.close(fd)


def _events(fd: int) -> Events:
    from portexec import control

    return control.Events(fd)


async def _write(fd: int, data: bytes) -> None:
    """Write when there is room. A pipe that can be written to takes PIPE_BUF bytes without blocking, pipe(7)."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(0):
            await writable(fd)
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]
