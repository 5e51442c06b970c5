"""One start of a command, as portexec sees it: what the shim reports of it, as events that can be waited for."""

from __future__ import annotations

import _signal
import time

import anyio

from portexec.errors import PortexecError, of_status
from portexec.supervisor import shim as words
from portexec.supervisor.shim import Shim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Generation:
    """A start of a command below a shim, which has been told to prepare it.

    `failure` is set when it could not be executed. A lazy one is not told to go as soon as it is prepared. `began` is the time
    of the start, time.monotonic().
    """

    def __init__(self, shim: Shim, *, is_lazy: bool = False, began: float | None = None) -> None:
        self.shim = shim
        self.began = time.monotonic() if began is None else began
        self.is_lazy = is_lazy
        self.wait_status = 0
        self.failure: PortexecError | None = None
        self.status_text = ""  # what it said by STATUS=
        self.ready_since: float | None = None
        self.started = anyio.Event()  # executed
        self.ready = anyio.Event()
        self.ended = anyio.Event()  # the command itself
        self.gone = anyio.Event()  # all that it started, too
        self.said_ready = anyio.Event()  # by READY=1
        self.hosts: dict[int, list[str]] = {}  # where it listens, as far as admission saw
        self._heard = anyio.Event()
        self._pid = 0
        self._main_pid = 0  # what it said by MAINPID=, which may come before we hear that it runs

    @property
    def pid(self) -> int:
        """The pid of the process that counts: what the command said by MAINPID=, or its own; 0 until it runs."""
        return self._main_pid or self._pid

    async def listen(self) -> None:
        """Follow what the shim says, to the end of this start."""
        while not self.gone.is_set():
            await anyio.wait_readable(self.shim.control)
            self._take(*self.shim.receive())

    async def hears_more(self) -> None:
        """Wait until the command listens somewhere else, too, as far as admission sees."""
        await self._heard.wait()

    def take_notification(self, fields: Mapping[str, str]) -> None:
        """Take what the command said to its service manager, sd_notify(3)."""
        self.status_text = fields.get("STATUS", self.status_text)
        if fields.get("MAINPID", "").isdecimal():
            self._main_pid = int(fields["MAINPID"])
        if fields.get("READY") == "1":
            self.said_ready.set()

    def _take(self, kind: bytes, fields: list[str]) -> None:
        if kind == words.PREPARED:
            if not self.is_lazy:
                self.shim.tell(words.GO)
        elif kind == words.STARTED:
            self._pid = int(fields[0])
            self.started.set()
        elif kind == words.LISTENING:
            self.hosts.setdefault(int(fields[0]), []).append(fields[1])
            heard, self._heard = self._heard, anyio.Event()
            heard.set()
        elif kind == words.FAILED:
            self.failure = of_status(int(fields[0]), fields[1], fields[2])
        elif kind == words.ENDED:
            self.wait_status = int(fields[0])
            self.ended.set()
        elif kind == words.GONE:
            self.ended.set()
            self.gone.set()
        else:
            self._take_last(kind, fields)

    def _take_last(self, kind: bytes, fields: list[str]) -> None:
        """The shim has ended: it could not prepare another start, or was killed."""
        if kind in (words.REFUSED, words.EXHAUSTED):
            self.failure = PortexecError(f"cannot start the command: {fields[0]}")
        elif not self.ended.is_set():
            self.wait_status = _signal.SIGKILL
        self.ended.set()
        self.gone.set()
