"""A server: what is known of it, and the calls that wait for it. The machinery of `serve`.

Plain code and event loops wait in different ways. So each call that waits is a coroutine, and gets the way to wait, an `Until`.
With `block_until`, which blocks, the coroutine never suspends. The thread of the `host` tells what happens.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import subprocess
import sys
import termios
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Protocol

from portexec import control, errors
from portexec.api import host, watchers
from portexec.api.output import Output
from portexec.errors import PortexecError, UsageError, reason
from portexec.procfs import is_ending
from portexec.server_errors import Exited, NotReady, NotRunning, StillRunning, UnknownReady

if TYPE_CHECKING:
    from portexec.api.host import Host

__tracebackhide__ = True  # in pytest's tracebacks: what counts there is the line that called us

_GRACE = 30.0  # seconds beyond the time that portexec was given; then it is killed
_AT_ONCE = 1 << 16  # bytes
_CATCHING_UP = 1.0  # seconds for our own thread to read what the command has written
_OURS = "portexec: "  # the beginning of portexec's lines among those of the command
EXPECTED = "a test that expects its server to end calls server.wait()"
_LONGEST_NAME = 40  # characters of a command in a description


@dataclass(frozen=True)
class Listener:
    """Where a client finds one listener. `port` is 0 and `host` empty for a unix socket, whose `path` is set."""

    name: str
    url: str
    host: str = ""
    port: int = 0
    path: str = ""


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Its descriptor."""


def number_of(file: int | HasFileno) -> int:
    """The descriptor of a file, or the number that it was given as. Raises OSError, ValueError, AttributeError or TypeError."""
    if isinstance(file, bool):
        raise TypeError("this is no number")
    return file if isinstance(file, int) else file.fileno()


@dataclass(frozen=True)
class Traits:
    """What we have to know of a server besides the words for portexec. `is_to_listen`: it listens when it is ready.

    `pattern`: it is ready when it has written a line in which this is found. `stdin` is what the command reads, or
    `subprocess.DEVNULL`; None for a silent pipe. `is_looked_up`: it listens on a host name that DNS may have to resolve.
    """

    scheme: str = "http"
    is_to_listen: bool = True
    is_restarted: bool = False
    pattern: re.Pattern[str] | None = None
    ready_timeout: float = 0.0
    stop_signal: int | None = None
    is_lazy: bool = False
    stdin: int | HasFileno | None = None
    is_looked_up: bool = False
    env_files: tuple[str, ...] = ()

    def may_block(self) -> bool:
        """Whether the preparation of the start may take long, since an address is looked up, or a pipe is read."""
        return self.is_looked_up or any(os.path.exists(file) and not os.path.isfile(file) for file in self.env_files)


class Changed(threading.Condition):
    """A condition for which an event loop can wait, too: `bell` gives a descriptor that each `notify_all` makes readable."""

    def __init__(self) -> None:
        super().__init__()
        self._bells: set[int] = set()

    def notify_all(self) -> None:
        """Wake all who wait, in threads and in event loops."""
        super().notify_all()
        for bell in self._bells:
            os.eventfd_write(bell, 1)

    def notify_threads(self) -> None:
        """Wake the threads that wait, but no event loop: each line of output would wake it."""
        super().notify_all()

    @contextmanager
    def bell(self) -> Iterator[int | None]:
        """An eventfd(2) for one waiter; None where there are no more descriptors."""
        try:
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            yield None
            return
        try:
            with self:
                self._bells.add(bell)
            yield bell
        finally:
            with self:
                self._bells.discard(bell)
            os.close(bell)


class Until(Protocol):
    """Wait until the condition, called with `changed` held, returns something true, and return that; 0 if time runs out."""

    def __call__(self, changed: Changed, condition: Callable[[], int], patience: float | None = None) -> Awaitable[int]:
        """`patience` is in seconds, None for ever."""


async def block_until(changed: Changed, condition: Callable[[], int], patience: float | None = None) -> int:
    """An `Until` that blocks the thread."""
    with changed:
        return changed.wait_for(condition, patience)


class Driver:
    """A server, what the host has told of it, and the calls. All state changes under `_changed`.

    `arguments` are the words of portexec's command line, and `command` is the last part of them. `kill_after` is in seconds.
    `arguments_of` has the names of the caller's arguments by the options made from them, for errors: the caller knows no
    options. The host's thread calls `sinks` with each piece of the output.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str | None,
        kill_after: float,
        arguments_of: Mapping[str, str],
        command: list[str],
    ) -> None:
        self.arguments = arguments
        self.command = command
        self.environment = environment
        self.cwd = cwd
        self.kill_after = kill_after
        self.arguments_of = arguments_of
        self.listeners: dict[str, Listener] = {}
        self.pid = 0
        self.wait_status: int | None = None  # of the command, as waitpid(2) gives it, once it has ended
        self._changed = Changed()
        self.sinks: list[Callable[[bytes], object]] = []
        self.predecessor: Driver | None = None  # the driver of the same server before it was started again
        self.failure_told: PortexecError | None = None  # the error of the start, with the output, that the caller got
        self.traits = Traits()
        self.name = ""  # among the servers that it is started with
        self.companions: dict[str, Driver] = {}  # these servers by their names, itself among them
        self.was_death_seen = False  # a caller has asked for it, and got it
        self.was_left = False  # its block or fixture is over: nobody uses it any more
        self._output = Output()
        self.output_fd: int | None = None  # where the host's thread reads it
        self._restarts_asked = 0
        self._restarts = 0  # the restarts that have begun
        self._ready_after = -1  # the number of restarts after which it was ready last; -1 before the first time
        self._searched = 0  # so much of the output was searched for the line by which it is ready
        self._read_before = self._read_now = 0  # so much of the output was read at the last look for events, and at this one
        self._is_line_found = False
        self._waiting = 0  # how many callers wait, and will be told of the end
        self._is_end_known = False  # a caller was told of the end
        self._has_ended_by_itself = False  # the command, by the last event
        self._failure: PortexecError | None = None
        self._host: Host | None = None  # that serves it, or is about to be told
        self.is_ordered = False  # the host was told to serve it
        self._id = 0  # the number that the server has there
        self._was_stopped = False
        self._is_over = False
        self._is_the_parents = False  # we are a forked child, and the server is our parent's

    def stdin(self) -> int | None:
        """A new descriptor of what the command reads; None for a silent pipe. Raises UsageError, OSError."""
        file = self.traits.stdin
        if file == subprocess.DEVNULL:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return None if file is None else fcntl.fcntl(number_of(file), fcntl.F_DUPFD_CLOEXEC, 3)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.EBADF:
                raise
            raise UsageError("stdin is closed", "leave it open until the server has been started") from error

    @property
    def returncode(self) -> int | None:
        """The status of the command, or minus the signal that killed it; None while it runs."""
        return None if self.wait_status is None else os.waitstatus_to_exitcode(self.wait_status)

    def first(self) -> Listener:
        """The first listener."""
        return next(iter(self.listeners.values()))

    def again(self) -> Driver:
        """Another driver for the same server, after the end of this one. It continues the output."""
        if self._is_the_parents:
            raise self._not_running()
        names = (self.arguments, self.environment, self.cwd, self.kill_after, self.arguments_of, self.command)
        driver = Driver(*names)
        driver.traits, driver.sinks = self.traits, self.sinks
        driver._output = self._output
        driver._searched = self._output.written
        driver.predecessor, self.predecessor = self, None
        driver.name, driver.companions = self.name, self.companions
        if self.name:
            self.companions[self.name] = driver
        return driver

    def may_block(self) -> bool:
        """Whether its start may keep the host busy for long."""
        return self.traits.may_block()

    async def has_ended(self, until: Until) -> bool:
        """Whether it is over. If it is about to end, this waits for the end."""
        self._require_other_thread()
        await until(self._changed, lambda: self._is_over or not (self._was_stopped or self._is_dying()))
        return self._is_over

    def _require_other_thread(self) -> None:
        if self._host is not None:
            self._host.require_other_thread()

    def _is_dying(self) -> bool:
        return self._has_ended_by_itself or (self.pid > 0 and self.wait_status is None and is_ending(self.pid))

    def is_over(self) -> bool:
        """Whether nothing is left of it."""
        return self._is_over

    def description(self) -> str:
        """What runs where, in a few words: `http://127.0.0.1:41507 (npm start, pid 4711)`. Absolute paths become file names."""
        words = shlex.join(os.path.basename(word) or word if os.path.isabs(word) else word for word in self.command)
        details = [words if len(words) <= _LONGEST_NAME else f"{words[:_LONGEST_NAME]}..."]
        details += [f"pid {self.pid}"] if self.pid else []
        details += [] if self.returncode is None else [f"returncode {self.returncode}"]
        where = f"{self.first().url} " if self.listeners else ""
        return errors.escaped(f"{where}({', '.join(details)})")

    def output(self) -> str:
        """The last part of what the command wrote."""
        self._catch_up()
        with self._changed:
            return self._output.text()

    def written(self) -> int:
        """How many bytes were written until now."""
        self._catch_up()
        return self._output.written

    def lines_since(self, mark: int, limit: int) -> str:
        """What was written since the mark, as `Output.lines_since`."""
        self._catch_up()
        with self._changed:
            return self._output.lines_since(mark, limit)

    def _catch_up(self) -> None:
        """Wait until the thread has read what is in the pipe now. Not for long: a slow sink may keep the thread busy."""
        if sys.is_finalizing() or self._host is None or self._host.is_own_thread():
            return
        with self._changed:
            if self.output_fd is None or not (waiting := _waiting_in(self.output_fd)):
                return
            goal = self._output.written + waiting
            self._changed.wait_for(lambda: self.output_fd is None or self._output.written >= goal, _CATCHING_UP)

    def others(self) -> dict[str, str]:
        """Templates of its companions, of those whose addresses are known."""
        listeners = {name: driver.first() for name, driver in self.companions.items() if driver.listeners}
        urls = {f"{name}.url": listener.url for name, listener in listeners.items()}
        ports = {f"{name}.port": str(listener.port) for name, listener in listeners.items() if listener.port}
        return urls | ports | {f"{name}.host": listener.host for name, listener in listeners.items() if listener.host}

    def was_begun(self) -> bool:
        """Whether a host was told of it."""
        return self._host is not None

    def begin(self, host: Host, number: int, output: int) -> None:
        """A host is about to be told to serve it, under this number. From now on this owns `output`, our end of the pipe.

        Raises NotRunning if somebody has stopped it meanwhile.
        """
        with self._changed:
            self._host, self._id = host, number
            self.output_fd = output
            if self._was_stopped:
                raise self._stopped_early()

    def pass_on_stop(self) -> None:
        """Tell the host of a request to stop it that came before the host was told to serve it."""
        with self._changed:
            if self._was_stopped:
                self._say(control.STOP)

    def end(self) -> None:
        """Nothing is left of it. Called when all of its output was taken."""
        self.close_output()
        self._tell_sinks(b"")
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def close_output(self) -> None:
        """No more output will come."""
        with self._changed:
            fd, self.output_fd = self.output_fd, None
            self._changed.notify_threads()
        if fd is not None:
            os.close(fd)

    async def ready(self, until: Until, restarts: int = 0, beside: Sequence[Driver] = ()) -> None:
        """Wait until the command has been ready after so many restarts. Raises the reason if it will not be.

        `beside` are the servers that it is started with. The end of one of them is a reason, too.
        """
        self._require_other_thread()
        everybody = [self, *beside]
        patience = None
        if self.traits.pattern is not None and not self.traits.is_lazy:
            patience = self.traits.ready_timeout
            await until(self._changed, lambda: _lost(everybody) is not None or self.pid > 0)
        await until(self._changed, lambda: _lost(everybody) is not None or self._ready_after >= restarts, patience)
        lost = _lost(everybody)
        if self._ready_after < restarts or (beside and lost is not None):
            failed = lost or self
            failed._is_end_known = True
            failed.failure_told = failed._why_over() if failed._is_over else failed._why_not_ready()
            failed.name_in(failed.failure_told)
            raise failed.failure_told

    def name_in(self, error: PortexecError) -> None:
        """Put the name of the server, where it is one of several, before the message of an error that may be told again."""
        if self.name and not error.message.startswith(f"{self.name}: "):
            error.message = f"{self.name}: {error.message}"

    def _why_not_ready(self) -> NotReady:
        pattern = self.traits.pattern.pattern if self.traits.pattern is not None else ""
        message = f"the command was not ready after {self.traits.ready_timeout:g} s: it wrote no line with {pattern!r}"
        return NotReady(message, "ready_timeout gives it more time", output=self.output())

    def _why_over(self) -> PortexecError:
        output = self.output()
        if self._failure is not None:
            self._failure.output = output
            return self._failure
        if self._was_stopped:
            return self._stopped_early()
        return Exited(
            f"the command ended before it was ready: {self.how_it_ended()}", output=output, returncode=self.returncode
        )

    def _stopped_early(self) -> NotRunning:
        return NotRunning("the server was stopped before it was ready", "start another one with serve")

    def how_it_ended(self) -> str:
        """In words, how the command ended, or, where that is unknown, portexec."""
        if self._failure is not None:
            return self._failure.message
        if self.wait_status is not None:
            return errors.how_it_ended(self.wait_status)
        status = (self._host.process.poll() if self._host else 0) or 0
        if status < 0:
            return "portexec itself was killed"
        if self._host is not None and self._host.failure:
            return f"portexec itself has failed: {self._host.failure}"
        return f"portexec ended with status {status} and without a word, run by {sys.executable}"

    def died(self, patience: float) -> Exited | None:
        """The error for a server that ended though we had not told it to; None if it did not, or if a caller knows or waits."""
        with self._changed:
            self._changed.wait_for(self._has_died, patience)
            is_stopped = self._was_stopped or not self._is_over
            if self._waiting or self._is_end_known or (is_stopped and not self._has_died(by_itself=True)):
                return None
            hint = EXPECTED if self.returncode == 0 else ""
            message = f"the server ended by itself: {self.how_it_ended()}; it was {self.description()}"
            return Exited(message, hint, output=self.output(), returncode=self.returncode)

    def _has_died(self, *, by_itself: bool = False) -> bool:
        """Whether it has ended for good. `by_itself`: whether the last event says that it has ended by itself."""
        if self.traits.is_restarted:
            return self._is_over and not (by_itself and self._was_stopped)
        return self._has_ended_by_itself or (self._is_over and not by_itself)

    def settle(self) -> None:
        """Wait until nothing is left of a server that has died, and all of its output was read."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, 2 * self.kill_after + _GRACE)

    async def wait(self, until: Until, timeout: float | None = None) -> int:
        """Wait until nothing is left of the server. Returns the `returncode`."""
        self._require_other_thread()
        with self._awaiting_news():
            if not await until(self._changed, lambda: self._is_over, timeout):
                raise StillRunning(f"the server still runs after {timeout:g} s", "stop ends it")
            self._is_end_known = True
        if self._is_the_parents:
            raise self._not_running()
        if self.returncode is None:
            raise Exited(self.how_it_ended(), output=self.output())
        return self.returncode

    @contextmanager
    def _awaiting_news(self) -> Iterator[None]:
        """A block in which a caller waits, who will be told of the end."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    async def stop(self, until: Until, signal: int | None = None, timeout: float | None = None) -> None:
        """Stop everything, unless that was done."""
        self.was_left = True
        is_asked_for = (signal or self.traits.stop_signal) is not None or timeout is not None
        # The thread is frozen when the interpreter ends. We may also be in the thread itself: the garbage collector, which runs
        # anywhere, may end a `with` block that was abandoned.
        server = self._host
        can_wait = server is not None and not self._is_over and not server.is_own_thread() and not sys.is_finalizing()
        if is_asked_for and can_wait:
            await self._ask_to_end(until, signal or self.traits.stop_signal, timeout)
        self.hang_up()
        if not can_wait or server is None:
            return
        is_deaf = server.may_block and not self.listeners  # the host may be busy; then nothing was started yet
        patience = self.kill_after if is_deaf else 2 * self.kill_after + _GRACE
        if not await until(self._changed, lambda: self._is_over, patience):
            server.kill()
            await until(self._changed, lambda: self._is_over)

    async def _ask_to_end(self, until: Until, signal: int | None, timeout: float | None) -> None:
        """Send the command a signal, and KILL the tree if that does not end the command in time."""
        with self._changed:
            self._is_end_known = self._is_end_known or not self._is_dying()
        # Not to be started again, even if we are so slow that the host has the time for that before it hears of the stop.
        self._say(control.SIGNAL, number=int(signal or SIGTERM), last=True)
        patience = self.kill_after if timeout is None else timeout
        if not await until(self._changed, lambda: self._is_over or self.wait_status is not None, patience):
            self._say(control.KILL)

    def hang_up(self) -> None:
        """Have everything stopped, without waiting."""
        if sys.is_finalizing():
            self._hang_up()  # without the lock, which a frozen thread may hold
            return
        with self._changed:
            self._hang_up()

    def _hang_up(self) -> None:
        """Ask the host to stop everything."""
        self._was_stopped = self._was_stopped or not self._is_over
        if not self._is_over:
            self._say(control.STOP)

    async def restart(self, until: Until) -> None:
        """Stop the tree, start the command again, and wait until it is ready. One restart after the other."""
        self._require_other_thread()
        number = await until(self._changed, self._ask_for_restart)
        if number < 0:
            raise self._not_running()
        with self._awaiting_news():
            await until(self._changed, lambda: self._is_over or self._restarts >= number)
            if self._restarts < number and self._failure is None:
                raise self._not_running()  # it died before it was asked to restart
            try:
                await self.ready(until, number)
            except NotReady:
                await self.stop(until)
                raise

    def _ask_for_restart(self) -> int:
        """Ask for a restart, and return its number; 0 while another restart, or a death, is under way, -1 if it is over."""
        if self._is_over or self._was_stopped:
            return -1
        if self._ready_after < self._restarts_asked or self._is_dying():
            return 0
        # Count first: a signal handler of the caller's may raise something while we talk to the host.
        self._restarts_asked += 1
        self._say(control.RESTART)
        return self._restarts_asked

    def _not_running(self) -> NotRunning:
        if self._is_the_parents:
            return NotRunning("the server belongs to the process that this one was forked from", "start another one with serve")
        how = "" if self.wait_status is None else f": {errors.how_it_ended(self.wait_status)}"
        return NotRunning(f"the server is not running any more{how}", "start it again with start(), or another one with serve")

    def forget(self) -> None:
        """In a forked child: let go of the server. It is the parent's, and so are the thread and the lock."""
        self._changed = Changed()
        fd, self.output_fd = self.output_fd, None
        if fd is not None:
            os.close(fd)
        if self._host is not None:
            self._was_stopped = self._is_over = self._is_the_parents = True

    def _say(self, what: str, **fields: object) -> None:
        if self._host is not None and self.is_ordered:
            self._host.say({"do": what, "id": self._id, **fields})

    def drain(self) -> None:
        """Take what is in the pipe now, at most as much as a pipe holds: other processes may go on writing."""
        left = 0 if self.output_fd is None else fcntl.fcntl(self.output_fd, fcntl.F_GETPIPE_SZ)
        while left > 0 and self.output_fd is not None and _waiting_in(self.output_fd):
            left -= len(self.take_output())

    def look_for_events(self) -> None:
        """All events that the host has told by now are about to be taken."""
        self._read_before, self._read_now = self._read_now, self._output.written

    def take_output(self) -> bytes:
        """Take a piece of the output. With the lock held, each piece is either in the pipe or in the output."""
        with self._changed:
            if self.output_fd is None:
                return b""
            data = _read(self.output_fd)
            self._output.add(data)
            self._search()
            self._changed.notify_threads()
        if data:
            self._tell_sinks(data)
        return data

    def _tell_sinks(self, data: bytes) -> None:
        """Give each sink a piece of the output. An empty piece is the end."""
        for sink in list(self.sinks):
            try:
                sink(data)
            except BaseException as error:  # the caller's code, which may call pytest.fail or sys.exit; the server goes on
                self.sinks.remove(sink)
                self._output.add_line(f"{_OURS}note: no more is written to `output`, which raised {error!r}".encode())
                # As any thread's failure: a traceback on stderr, a warning in pytest.
                threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))

    def _search(self) -> None:
        """Look for the line by which it is ready, in all whole lines that have come since the last look."""
        runs = self.pid and self.wait_status is None  # by the events so far
        if self.traits.pattern is None or self._is_line_found or not runs:
            return
        text, self._searched = self._output.whole_lines_since(self._searched)
        lines = [line for line in text.splitlines() if not line.startswith(_OURS)]
        if any(map(self.traits.pattern.search, lines)):
            self._is_line_found = True
            self._ready_after = self._restarts
            self._changed.notify_all()

    def take_event(self, event: dict[str, Any]) -> None:
        """Take an event that the host tells of this server."""
        with self._changed:
            kind = event["event"]
            if kind in ("bound", "ready"):
                self.listeners = {each["name"]: self._listener(each) for each in event["listeners"]}
            if kind == "bound" and self.traits.is_lazy:
                self._ready_after = 0
            elif kind == "idle":
                self._restarts += event["asked_for"]
                self._ready_after = self._restarts
            elif kind == "started":
                self.pid = event["pid"]
                self.wait_status = None
                self._restarts += event["asked_for"]
                self._search()
                self._has_ended_by_itself = False
            elif kind == "ready" and self.traits.pattern is None:
                self._ready_after = self._restarts
            elif kind == "ended":
                self.wait_status = event["status"]
                # What had come by then is of this command: what was read at the last look, when the event was not there yet,
                # and what was in the pipe. The next command may have written since, if we were slow.
                self._searched = max(self._searched, min(self._output.written, self._read_before + event["unread"]))
                self._is_line_found = False
                self._has_ended_by_itself = event["by_itself"]
            elif kind == "error":
                self._failure = self._error(event)
            self._changed.notify_all()

    def _error(self, event: dict[str, Any]) -> PortexecError:
        """The error that was told, with the caller's arguments in place of options."""
        about = self.arguments_of.get(event["about"], event["about"])
        hint = event["hint"]
        if event["kind"] == UnknownReady.__name__:
            hint += "; re.compile('...') waits for a line of the output"
        for option, argument in self.arguments_of.items():
            hint = hint.replace(option, argument)
        return control.kind_of(event)(f"{about} {event['message']}" if about else event["message"], hint)

    def _listener(self, told: dict[str, Any]) -> Listener:
        """The listener as the caller can use it: the caller's directory may be another than the command's."""
        told.pop("fd", None)
        if self.cwd is not None and not told.get("path", "@").startswith("@"):
            told["path"] = os.path.join(self.cwd, told["path"])
            told["url"] = f"unix:{told['path']}"
        if told["url"].startswith("http://"):
            told["url"] = self.traits.scheme + told["url"].removeprefix("http")
        return Listener(**told)


def start(*drivers: Driver) -> None:
    """Have these started together: all are bound before any command runs. Raises PortexecError."""
    for driver in drivers:
        _drivers.add(driver)
        watchers.tell(driver)
    try:
        host.serve(drivers)
    except PortexecError:
        _give_up(drivers)
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        _give_up(drivers)
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise PortexecError(f"cannot start portexec with {sys.executable}: {why}") from error


def _give_up(drivers: Sequence[Driver]) -> None:
    """End the drivers of which no host was told."""
    for driver in drivers:
        if not driver.was_begun():
            driver.end()


def together(drivers: Mapping[str, Driver]) -> None:
    """Prepare these drivers, none of which was started, to be started together, under these names."""
    companions, changed = dict(drivers), Changed()
    for name, driver in drivers.items():
        driver.name, driver.companions = name, companions
        driver._changed = changed


def _lost(drivers: Sequence[Driver]) -> Driver | None:
    """A driver that is over, preferably one of which we know why; None if there is none."""
    over = [driver for driver in drivers if driver._is_over]
    known = [driver for driver in over if driver._failure is not None or driver.wait_status is not None]
    return next(iter(known + over), None)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _AT_ONCE)
    except OSError:
        return b""


def _waiting_in(pipe: int) -> int:
    """How many bytes wait in a pipe: ioctl_pipe(2)."""
    answer = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _begin_as_child() -> None:
    for driver in list(_drivers):
        driver.forget()


os.register_at_fork(after_in_child=_begin_as_child)
