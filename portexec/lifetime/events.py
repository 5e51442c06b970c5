"""What a run says to whoever looks on: people on stderr, and programs at `--ready-fd` and `--control-fd`."""

from __future__ import annotations

import os
import select

from portexec.command import publish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.launch import Launch

_STDERR = 2


class Reporter:
    """Says what is to be said, and what nobody wants to hear does not."""

    def __init__(
        self, launch: Launch, *, ready_fd: int | None, control_fd: int | None, is_quiet: bool, is_verbose: bool
    ) -> None:
        self.launch = launch
        self.ready_fd = ready_fd
        self.control_fd = control_fd
        self.is_quiet = is_quiet
        self.is_verbose = is_verbose

    def error(self, text: str) -> None:
        """Something has failed, and the run goes on."""
        publish.say_if_heard(f"portexec: error: {text}\n")

    def note(self, text: str) -> None:
        """Something that a person should know."""
        if not self.is_quiet:
            publish.say_if_heard(f"portexec: note: {text}\n")

    def detail(self, text: str) -> None:
        """Something for `-v`."""
        if self.is_verbose:
            publish.say_if_heard(f"portexec: {text}\n")

    def tell(self, event: str, **fields: object) -> None:
        """An event for the program at the control descriptor."""
        if self.control_fd is not None:
            from portexec import control

            control.tell(self.control_fd, event, **fields)

    def tell_bound(self) -> None:
        """What was bound, for that program, before the command starts."""
        self.tell("bound", hand_off=self.launch.choice.hand_off, listeners=self._listeners())

    def tell_ready(self, pid: int) -> None:
        """That the command is ready, and where it really listens."""
        self.tell("ready", pid=pid, listeners=self._listeners())

    async def announce_ready(self, command_pid: int) -> None:
        """One JSON line to the descriptor of `--ready-fd`, which is closed then. A slow reader keeps nobody else waiting."""
        fd, self.ready_fd = self.ready_fd, None
        if fd is None:
            return
        import json

        told = {
            "pid": os.getpid(),
            "command_pid": command_pid,
            "hand_off": self.launch.choice.hand_off,
            "listeners": self._listeners(),
        }
        try:
            await _write(fd, json.dumps(told).encode() + b"\n")
        except OSError:
            pass  # nobody wants to know any more
        if fd > _STDERR:
            os.close(fd)

    def _listeners(self) -> list[dict[str, str | int]]:
        return publish.described(self.launch.bound.listeners, self.launch.first_fd)


async def _write(fd: int, data: bytes) -> None:
    """Write when there is room. A pipe that can be written to takes PIPE_BUF bytes without blocking, pipe(7)."""
    import anyio

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(0):
            await anyio.wait_writable(fd)
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]
