"""A portexec of our own, driven over its control descriptor by one thread. The machinery of `server`.

Nothing of what portexec does happens in this process, which may have threads and a running event loop: it is started as any
program is (subprocess). The thread starts it and follows what it and the command say; the blocking calls wait for that.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from portexec import control, errors
from portexec.errors import Exited, NotRunning, PortexecError, UsageError, reason

OUTPUT_LIMIT = 1 << 16  # bytes of the command's output that are kept, the last ones

_GRACE = 30.0  # seconds that portexec itself may take beyond what it was allowed, before it is killed
# This very portexec, and what it needs from where the caller has it. With `-I` and `-S` the path begins as that of the standard
# library, so that no file of the caller's that is named like a module of it is in the way.
_PROGRAM = """\
import sys
sys.path.insert(0, {!r})
import portexec
sys.path[:1] = []
sys.path += {!r}
from portexec import cli, control
fd = {}
sys.exit(cli.main(["--control-fd", str(fd), *control.words(fd)]))
"""
_FIRST_FREE_FD = 3


@dataclass(frozen=True)
class Listener:
    """Where a client finds one listener. `port` is 0 and `host` empty for a unix socket, whose `path` is set."""

    name: str
    url: str
    host: str = ""
    port: int = 0
    path: str = ""


class Driver:
    """A portexec of ours, what it has said, and the blocking calls. All state changes under `_changed`.

    `arguments` are the words of its command line. `kill_after` is in seconds. `reword` makes its messages those of the caller,
    who knows nothing of options.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str | None,
        kill_after: float,
        reword: Callable[[str], str],
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.cwd = cwd
        self.kill_after = kill_after
        self.reword = reword
        self.listeners: dict[str, Listener] = {}
        self.pid = 0
        self.returncode: int | None = None
        self._changed = threading.Condition()
        self._restarting = threading.Lock()
        self._output = bytearray()
        self._times_ready = 0
        self._failure: PortexecError | None = None
        self._thread = threading.Thread(target=self._live, name="portexec", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._was_stopped = False
        self._is_end_expected = False  # somebody waits for it
        self._is_over = False

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
        try:
            self._thread.start()
        except RuntimeError as error:
            raise PortexecError(f"cannot start portexec: {error}") from error

    def _live(self) -> None:
        """The thread: start portexec, and take what it and the command say until both have ended."""
        try:
            with self._changed:
                self._control, theirs = socket.socketpair()
            with theirs, self._changed:
                if self._was_stopped:
                    return
                self._process = self._popen(theirs)
                self._say(self.arguments)  # not in the words of the process, which everybody can see
            with self._process as process:
                self._follow(self._control, process)
        except OSError as error:
            self._failure = self._cannot_start(error)
        finally:
            with self._changed:
                if self._control is not None:
                    self._control.close()
                self._is_over = True
                self._changed.notify_all()

    def _popen(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        places = [os.path.abspath(place) for place in sys.path if place]
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

    def _cannot_start(self, error: OSError) -> PortexecError:
        if self.cwd is not None and not os.path.isdir(self.cwd):
            return UsageError(f"cannot run in {self.cwd}: {reason(error)}", "cwd has to be a directory that exists")
        return PortexecError(f"cannot start portexec: {reason(error)}")

    def wait_until_ready(self, times: int = 1) -> None:
        """Wait until the command has been ready so many times. Raises what prevents it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._times_ready >= times)
            if self._times_ready < times:
                raise self._why_over()

    def _why_over(self) -> PortexecError:
        output = self._output.decode(errors="replace")
        if self._failure is not None:
            self._failure.output = output
            return self._failure
        if self._was_stopped:
            return NotRunning("the server was stopped before it was ready", "start another one with serve")
        return Exited(
            f"the command ended before it was ready: {self.how_it_ended()}", output=output, returncode=self.returncode
        )

    def how_it_ended(self) -> str:
        """In words, `exit status 3` or `killed by signal 9`."""
        if self.returncode is None:
            return "portexec itself was killed"
        return f"exit status {self.returncode}" if self.returncode >= 0 else f"killed by signal {-self.returncode}"

    def died(self, patience: float) -> Exited | None:
        """The error that says so if the command ended without having been told to, and without anybody expecting it."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.returncode is not None or self._is_over, patience):
                return None
            if self._was_stopped or self._is_end_expected or not self._times_ready:
                return None
            output = self._output.decode(errors="replace")
        return Exited(f"the server ended by itself: {self.how_it_ended()}", output=output, returncode=self.returncode)

    def wait(self) -> int:
        """Wait for the end of everything."""
        with self._changed:
            self._is_end_expected = True
            self._changed.wait_for(lambda: self._is_over)
        if self.returncode is None:
            raise Exited("portexec itself was killed", output=self.output())
        return self.returncode

    def stop(self) -> None:
        """Stop everything, unless that was done."""
        if self._thread.ident is None:
            return  # it could not be started
        with self._changed:
            self._was_stopped = self._was_stopped or not self._is_over
            self._say({"do": control.STOP})
            is_over = self._changed.wait_for(lambda: self._is_over, 2 * self.kill_after + _GRACE)
            if not is_over and self._process is not None:
                self._process.kill()
            self._changed.wait_for(lambda: self._is_over)

    def restart(self) -> None:
        """Stop the tree, start the command again, and wait until it is ready. One restart after the other."""
        with self._restarting:
            with self._changed:
                if self._is_over or self._was_stopped:
                    raise NotRunning("the server is not running any more", "start another one with serve")
                times = self._times_ready + 1
                self._is_end_expected = True
                self._say({"do": control.RESTART})
            self.wait_until_ready(times)
            self._is_end_expected = False

    def forget(self) -> None:
        """In a forked child: have no part in the server any more, which is the parent's, as are thread and locks."""
        self._changed = threading.Condition()
        self._restarting = threading.Lock()
        self._is_over = True
        if self._control is not None:
            self._control.close()

    def _say(self, what: object) -> None:
        try:
            if self._control is not None:
                self._control.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            pass  # it has ended already

    def _follow(self, ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101  # it is a pipe
        output = process.stdout.fileno()
        lines = b""
        poll = select.poll()
        # In this order: when the end of the command is told, all that it wrote is there already.
        is_open = [output, ours.fileno()]
        for fd in is_open:
            poll.register(fd, select.POLLIN)
        while is_open:
            for fd, _ in poll.poll():
                data = _read(fd)
                if not data:
                    poll.unregister(fd)
                    is_open.remove(fd)
                elif fd == output:
                    self._take_output(data)
                else:
                    *whole, lines = (lines + data).split(b"\n")
                    for line in whole:
                        self._take_event(json.loads(line))

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
                self.returncode = None
            elif kind == "ready":
                self._times_ready += 1
            elif kind == "ended":
                self.returncode = os.waitstatus_to_exitcode(event["status"])
            elif kind == "error":
                self._failure = getattr(errors, event["kind"])(self.reword(event["message"]), self.reword(event["hint"]))
            self._changed.notify_all()

    def _listener(self, told: dict[str, Any]) -> Listener:
        """As the caller can use it, whose directory may be another than the command's."""
        told.pop("fd", None)
        if self.cwd is not None and not told.get("path", "@").startswith("@"):
            told["path"] = os.path.join(self.cwd, told["path"])
            told["url"] = f"unix:{told['path']}"
        return Listener(**told)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""  # the other end was killed with something unread


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _forget_all(drivers: Iterable[Driver] = _drivers) -> None:
    for driver in list(drivers):
        driver.forget()


os.register_at_fork(after_in_child=_forget_all)
