"""A portexec of our own, driven over its control descriptor by one thread. The machinery of `server`.

Nothing of what portexec does happens in this process, which may have threads and a running event loop: it is started as any
program is (subprocess). The thread starts it and follows what it and the command say; the calls wait for that.

Plain code and event loops wait in different ways, so each call that waits is a coroutine and is given the way, an `Until`. With
one that blocks, as `block_until` does, it never suspends.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from portexec import control, errors
from portexec.errors import Exited, NotRunning, PortexecError, UsageError, reason

OUTPUT_LIMIT = 1 << 16  # bytes of the command's output that are kept, the last ones

_GRACE = 30.0  # seconds that portexec itself may take beyond what it was allowed, before it is killed
# This very portexec, and what it needs from where the caller has it. With `-I` and `-S` the path begins as that of the standard
# library, so that no file of the caller's that is named like a module of it is in the way. A caller may ignore or block the
# signals that end a server, to take them in its own way; the server is not to inherit that.
_PROGRAM = """\
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
sys.path.insert(0, {!r})
import portexec
sys.path[:1] = []
sys.path += {!r}
from portexec import cli, control
fd = {}
words = control.words(fd)
sys.exit(cli.main(["--control-fd", str(fd), *words]) if words else 0)
"""
_FIRST_FREE_FD = 3
_AT_ONCE = 1 << 16  # bytes

# Held while a portexec is started, and by whoever forks: a child must not have copies of its ends of the socket and the pipe,
# whose closing is the news of its end. By an RLock, since what the garbage collector calls may fork, too.
_starting = threading.RLock()


@dataclass(frozen=True)
class Listener:
    """Where a client finds one listener. `port` is 0 and `host` empty for a unix socket, whose `path` is set."""

    name: str
    url: str
    host: str = ""
    port: int = 0
    path: str = ""


class Changed(threading.Condition):
    """A condition that an event loop can wait for, too: there is a descriptor that gets readable whenever it is notified."""

    def __init__(self) -> None:
        super().__init__()
        self._bells: set[int] = set()

    def notify_all(self) -> None:
        """Wake all who wait, in threads and in event loops."""
        super().notify_all()
        for bell in self._bells:
            os.eventfd_write(bell, 1)

    @contextmanager
    def bell(self) -> Iterator[int]:
        """An eventfd(2) of our own."""
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with self:
                self._bells.add(bell)
            yield bell
        finally:
            with self:
                self._bells.discard(bell)
            os.close(bell)


class Until(Protocol):
    """Wait until the condition, asked with `changed` held, gives something true, and return that; 0 if it takes longer."""

    def __call__(self, changed: Changed, condition: Callable[[], int], patience: float | None = None) -> Awaitable[int]:
        """`patience` is in seconds, None for ever."""


async def block_until(changed: Changed, condition: Callable[[], int], patience: float | None = None) -> int:
    """An `Until` that blocks the thread."""
    with changed:
        return changed.wait_for(condition, patience)


class Driver:
    """A portexec of ours, what it has said, and the calls. All state changes under `_changed`.

    `arguments` are the words of its command line. `kill_after` is in seconds. `arguments_of` has the caller's arguments by the
    options that they were made from: the caller knows nothing of options.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str | None,
        kill_after: float,
        arguments_of: Mapping[str, str],
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.cwd = cwd
        self.kill_after = kill_after
        self.arguments_of = arguments_of
        self.listeners: dict[str, Listener] = {}
        self.pid = 0
        self.wait_status: int | None = None  # of the command, as waitpid(2) gives it, once it has ended
        self._changed = Changed()
        self._output = bytearray()
        self._times_asked = 1  # to be ready: by the start, and by every restart
        self._times_ready = 0
        self._waiting = 0  # how many wait for what may be the end
        self._is_end_known = False  # somebody was told of it
        self._has_ended_by_itself = False  # the command, as the last event told
        self._failure: PortexecError | None = None
        self._thread: threading.Thread | None = None  # made when it is needed: a fork in between would take it for ended
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._was_stopped = False
        self._is_over = False
        self._is_the_parents = False  # we are a forked child

    @property
    def returncode(self) -> int | None:
        """The status of the command, or minus the signal that killed it; None while it runs."""
        return None if self.wait_status is None else os.waitstatus_to_exitcode(self.wait_status)

    def first(self) -> Listener:
        """The first listener."""
        return next(iter(self.listeners.values()))

    def output(self) -> str:
        """What was written last."""
        with self._changed:
            return self._output.decode(errors="replace")

    def start(self) -> None:
        """Start the thread that does the rest. Raises PortexecError."""
        _drivers.add(self)
        self._thread = threading.Thread(target=self._live, name="portexec", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise PortexecError(f"cannot start portexec: {error}") from error

    def _live(self) -> None:
        """The thread: start portexec, and take what it and the command say until both have ended."""
        try:
            with _starting:
                self._control, theirs = socket.socketpair()
                with theirs:
                    for end in (self._control, theirs):
                        end.settimeout(None)  # which the caller may have changed for all, by socket.setdefaulttimeout
                    if self._was_stopped:  # looked at when there is something to hang up
                        return
                    self._process = self._popen(theirs)
            with self._process as process:
                self._say(self.arguments)  # not in the words of the process, which everybody can see
                self._follow(self._control, process)
        except (OSError, TypeError, ValueError) as error:
            self._failure = self._cannot_start(error)
        finally:
            with self._changed:
                if self._control is not None:
                    self._control.close()
                self._is_over = True
                self._changed.notify_all()

    def _popen(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        # Python itself passes over what else may be there.
        places = [os.path.abspath(place) for place in sys.path if place and isinstance(place, str) and "\0" not in place]
        # Where the caller has closed its standard streams, the socket can be one of those that Popen makes anew.
        fd = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM.format(home, places, fd)],
                env=self.environment,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(fd,),
                start_new_session=True,
            )
        finally:
            os.close(fd)

    def _cannot_start(self, error: Exception) -> PortexecError:
        why = reason(error) if isinstance(error, OSError) else str(error)
        if self.cwd is not None and getattr(error, "filename", None) == self.cwd:
            return UsageError(f"cannot run in {self.cwd}: {why}", "cwd has to be a directory that exists and may be entered")
        return PortexecError(f"cannot start portexec with {sys.executable}: {why}")

    async def ready(self, until: Until, times: int = 1) -> None:
        """Wait until the command has been ready so many times. Raises what prevents it."""
        await until(self._changed, lambda: self._is_over or self._times_ready >= times)
        if self._times_ready < times:
            raise self._why_over()

    def _why_over(self) -> PortexecError:
        output = self.output()
        if self._failure is not None:
            self._failure.output = output
            return self._failure
        if self._was_stopped:
            return NotRunning("the server was stopped before it was ready", "start another one with serve")
        return Exited(
            f"the command ended before it was ready: {self.how_it_ended()}", output=output, returncode=self.returncode
        )

    def how_it_ended(self) -> str:
        """In words, of the command, or of portexec where nobody knows."""
        if self._failure is not None:
            return self._failure.message
        if self.wait_status is not None:
            return errors.how_it_ended(self.wait_status)
        status = self._process.returncode if self._process else 0
        if status < 0:
            return "portexec itself was killed"
        return f"portexec ended with status {status} and without a word, run by {sys.executable}"

    def died(self, patience: float) -> Exited | None:
        """The error that says so if the server ended though we had not told it to, and nobody waits for that or was told."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended_by_itself or self._is_over, patience)
            is_stopped = self._was_stopped or not self._is_over
            if self._waiting or self._is_end_known or (is_stopped and not self._has_ended_by_itself):
                return None
            return Exited(
                f"the server ended by itself: {self.how_it_ended()}", output=self.output(), returncode=self.returncode
            )

    async def wait(self, until: Until) -> int:
        """Wait for the end of everything."""
        with self._awaiting_news():
            await until(self._changed, lambda: self._is_over)
            self._is_end_known = True
        if self._is_the_parents:
            raise self._not_running()
        if self.returncode is None:
            raise Exited(self.how_it_ended(), output=self.output())
        return self.returncode

    @contextmanager
    def _awaiting_news(self) -> Iterator[None]:
        """For as long as somebody waits who will be told of the end."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    async def stop(self, until: Until) -> None:
        """Stop everything, unless that was done."""
        self.hang_up()
        if sys.is_finalizing():
            return  # the thread is frozen
        if self._thread is None or not self._thread.is_alive():
            return  # it is over, could not be started, or is not yet and will see that it is to do nothing
        if self._thread is threading.current_thread():
            return  # the garbage collector, which may run anywhere, ends a `with` that nobody is in any more
        if not await until(self._changed, lambda: self._is_over, 2 * self.kill_after + _GRACE) and self._process is not None:
            self._process.kill()
            await until(self._changed, lambda: self._is_over)

    def hang_up(self) -> None:
        """Have everything stopped, and do not wait for it."""
        if sys.is_finalizing():
            self._hang_up()  # a frozen thread may have the lock
            return
        with self._changed:
            self._hang_up()

    def _hang_up(self) -> None:
        """Let portexec see the end of the socket, at which it stops everything; before it has got all its words, too."""
        self._was_stopped = self._was_stopped or not self._is_over
        try:
            if self._control is not None:
                self._control.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has ended already

    async def restart(self, until: Until) -> None:
        """Stop the tree, start the command again, and wait until it is ready. One restart after the other."""
        times = await until(self._changed, self._ask_for_restart)
        with self._awaiting_news():
            try:
                await self.ready(until, times)
            except PortexecError:
                self._is_end_known = True
                raise

    def _ask_for_restart(self) -> int:
        """Which time of being ready it will be; 0 while another one is under way."""
        if self._is_over or self._was_stopped:
            raise self._not_running()
        if self._times_ready < self._times_asked:
            return 0
        self._times_asked += 1  # first: while it is said, a signal handler of the caller's may raise something
        self._say({"do": control.RESTART})
        return self._times_asked

    def _not_running(self) -> NotRunning:
        if self._is_the_parents:
            return NotRunning("the server belongs to the process that this one was forked from", "start another one with serve")
        return NotRunning("the server is not running any more", "start another one with serve")

    def forget(self) -> None:
        """In a forked child: have no part in the server any more, which is the parent's, as are thread and lock."""
        self._changed = Changed()
        self._was_stopped = self._is_over = self._is_the_parents = True
        if self._control is not None:
            self._control.close()

    def _say(self, what: object) -> None:
        try:
            if self._control is not None:
                self._control.sendall(json.dumps(what).encode() + b"\n", socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has ended already

    def _follow(self, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Take what comes, to the end of the socket: nothing of the command is left then. Others may have its output open."""
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        output = process.stdout.fileno()
        lines = b""
        poll = select.poll()
        # In this order: when the end of the command is told, all that it wrote is there already.
        for fd in (output, ours.fileno()):
            poll.register(fd, select.POLLIN)
        is_open = True
        while is_open:
            for fd, _ in poll.poll():
                data = _read(fd)
                if not data:
                    poll.unregister(fd)
                    is_open = fd == output and is_open
                elif fd == output:
                    self._take_output(data)
                else:
                    *whole, lines = (lines + data).split(b"\n")
                    for line in whole:
                        self._take_event(json.loads(line))
        for _ in range(0, fcntl.fcntl(output, fcntl.F_GETPIPE_SZ), _AT_ONCE):  # so much may be in the pipe
            if poll.poll(0):
                self._take_output(_read(output))

    def _take_output(self, data: bytes) -> None:
        with self._changed:
            self._output += data
            del self._output[:-OUTPUT_LIMIT]

    def _take_event(self, event: dict[str, Any]) -> None:
        with self._changed:
            kind = event["event"]
            if kind in ("bound", "ready"):
                self.listeners = {each["name"]: self._listener(each) for each in event["listeners"]}
            if kind == "started":
                self.pid = event["pid"]
                self.wait_status = None
                self._has_ended_by_itself = False
            elif kind == "ready":
                self._times_ready += 1
            elif kind == "ended":
                self.wait_status = event["status"]
                self._has_ended_by_itself = event["by_itself"]
            elif kind == "error":
                self._failure = self._error(event)
            self._changed.notify_all()

    def _error(self, event: dict[str, Any]) -> PortexecError:
        """The error that was told, in the words of the caller."""
        about = self.arguments_of.get(event["about"], event["about"])
        hint = event["hint"]
        for option, argument in self.arguments_of.items():
            hint = hint.replace(option, argument)
        error: PortexecError = getattr(errors, event["kind"])(
            f"{about} {event['message']}" if about else event["message"], hint
        )
        return error

    def _listener(self, told: dict[str, Any]) -> Listener:
        """As the caller can use it, whose directory may be another than the command's."""
        told.pop("fd", None)
        if self.cwd is not None and not told.get("path", "@").startswith("@"):
            told["path"] = os.path.join(self.cwd, told["path"])
            told["url"] = f"unix:{told['path']}"
        return Listener(**told)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _AT_ONCE)
    except OSError:
        return b""  # the other end was killed with something unread


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _begin_as_child() -> None:
    _starting.release()
    for driver in list(_drivers):
        driver.forget()


os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_begin_as_child)
