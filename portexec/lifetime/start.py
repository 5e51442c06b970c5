"""One start of a command, as portexec sees it: what the shim reports of it, as events that can be waited for."""

from __future__ import annotations

import _signal
import re
import time

import anyio

from portexec.errors import PortexecError, of_status
from portexec.parent import shim as words
from portexec.parent import tree
from portexec.parent.shim import Shim

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


_PID = re.compile("[0-9]{1,10}")


class Generation:
    """A start of a command by a shim that runs nothing at the moment.

    `failure` is set when it could not be executed. `began` is the time of the start, time.monotonic(); None as long as the shim
    was told nothing.
    """

    def __init__(self, shim: Shim, began: float | None = None) -> None:
        self.shim = shim
        self.began = began
        self.wait_status = 0
        self.was_told = False  # to end, before it did
        self._is_stopped = False  # we have told it
        self.failure: PortexecError | None = None
        self.status_text = ""  # what it said by STATUS=
        self.ready_since: float | None = None
        self.ended_at = 0.0  # time.monotonic(), as is that above
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

    def begin(self) -> None:
        """Have the shim start the command."""
        self.began = time.monotonic()
        self.shim.tell(words.PREPARE)

    def stop(self, word: bytes = words.STOP) -> None:
        """Stop its tree, with STOP or KILL. A shim that Ctrl-Z has stopped has to go on for that."""
        if self.began is None:
            self._end()
            self.gone.set()
        elif not self.shim.is_gone:
            self._is_stopped = True
            self.shim.tell(word)
            tree.continue_if_stopped(self.shim.pid)

    def is_running(self) -> bool:
        """Whether the command runs, or is about to: somebody is there to get signals."""
        return self.began is not None and not self.ended.is_set()

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
        self.status_text = "".join(filter(str.isprintable, fields.get("STATUS", self.status_text)))
        if _PID.fullmatch(fields.get("MAINPID", "")):
            self._main_pid = int(fields["MAINPID"])
        if fields.get("READY") == "1":
            self.said_ready.set()

    def _take(self, kind: bytes, fields: list[str]) -> None:
        if kind == words.PREPARED:
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
            self.wait_status, self.was_told = int(fields[0]), bool(fields[1])
            self._end()
        elif kind == words.GONE:
            self._end()
            self.gone.set()
        else:
            self._take_last(kind, fields)

    def _take_last(self, kind: bytes, fields: list[str]) -> None:
        """The shim has ended: it could not prepare another start, or was killed."""
        if kind in (words.REFUSED, words.EXHAUSTED):
            self.failure = PortexecError(f"cannot start the command: {fields[0]}")
        elif not self.ended.is_set():
            self.wait_status, self.was_told = _signal.SIGKILL, self._is_stopped
        self._end()
        self.gone.set()

    def _end(self) -> None:
        if not self.ended.is_set():
            self.ended_at = time.monotonic()
            self.ended.set()
