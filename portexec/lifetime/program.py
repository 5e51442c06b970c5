"""The program that drives a run over a control descriptor (`control`), as the run sees it."""

from __future__ import annotations

import os

from portexec import control
from portexec.kernel import STDERR
from portexec.parent.loop import readable, spawn, writable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from portexec.errors import PortexecError

    class Program(Protocol):
        """A program that drives a run. `kept` are the descriptors whose end tells it that nothing is left of the command."""

        kept: set[int]

        def tell(self, event: str, **fields: object) -> None:
            """Tell it an event. It may be slow to read."""

        def tell_error(self, error: PortexecError) -> bool:
            """Tell it an error, and give it a moment to read. False if it has gone."""

        def tell_end(self) -> None:
            """Called in a shim whose run's process was killed: tell it that nothing is left of the command."""

        async def asked(self) -> list[control.Request]:
            """What it asks for next."""

        def finish(self) -> None:
            """The run is over. A program that is slow gets a last chance to read."""


class ProgramOfItsOwn:
    """The program at the other end of a descriptor that is for this run alone."""

    def __init__(self, fd: int) -> None:
        self.kept = {fd}
        self._fd = fd
        self._events = control.Events(fd)
        self._requests = control.Requests(fd)
        self._is_behind = False
        if fd > STDERR:
            os.set_inheritable(fd, False)  # it is for us, not for the command

    def tell(self, event: str, **fields: object) -> None:
        """Tell it an event. It may be slow to read."""
        if not self._events.tell(event, **fields) and not self._is_behind:
            self._is_behind = True
            spawn(self._catch_up())

    async def _catch_up(self) -> None:
        while not self._events.flush():
            await writable(self._fd)
        self._is_behind = False

    def tell_error(self, error: PortexecError) -> bool:
        """Tell it an error, and give it a moment to read. False if it has gone."""
        if not control.is_heard(self._fd):
            return False
        control.tell_error(self._fd, error)
        return True

    def tell_end(self) -> None:
        """The end of the descriptor tells it."""

    async def asked(self) -> list[control.Request]:
        """What it asks for next."""
        await readable(self._fd)
        requests = self._requests.receive()
        self._requests.drop_descriptors()
        return requests

    def finish(self) -> None:
        """The run is over. A program that is slow gets a last chance to read."""
        self._events.finish()
