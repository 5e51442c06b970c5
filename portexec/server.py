"""`portexec.serve`: a server for the length of a `with` block, driven over the control descriptor of a portexec of its own.

Nothing of the machinery runs in the caller's process, which may have threads and a running event loop: it starts
`portexec --control-fd` as any program is started (subprocess), and talks to it. When the caller dies, however that happens,
the socket between them ends, and portexec stops the whole tree.

One thread for each server follows what portexec and the command say. The waiting calls wait for it; for asyncio and trio
they do so in a worker thread of anyio.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from portexec import errors
from portexec.errors import PortexecError, UsageError, reason

T = TypeVar("T")

OUTPUT_LIMIT = 1 << 16  # bytes of the command's output that are kept, the last ones

_GRACE = 30.0  # seconds that portexec itself may take beyond what it was allowed, before it is killed
# Not `-m`: that puts the current directory, which is the caller's to choose, in front of all modules.
_PROGRAM = "import sys; sys.path[:1] = []; sys.path.append({!r}); from portexec.cli import main; sys.exit(main())"


class Exited(PortexecError):
    """The command ended by itself. `returncode` is its status, or minus the signal that killed it; None if unknown."""

    def __init__(self, message: str, hint: str = "", *, output: str = "", returncode: int | None = None) -> None:
        super().__init__(message, hint, output=output)
        self.returncode = returncode


class CommandNotAList(UsageError):
    """The command was given as one text, and not as a list of its words."""


class NotRunning(PortexecError):
    """The server was stopped, so there is nothing to be done with it."""


class AlreadyEntered(PortexecError):
    """What `serve` returned was used in a `with` before."""


@dataclass(frozen=True)
class Listener:
    """Where a client finds one listener. `port` is 0 and `host` empty for a unix socket, whose `path` is set."""

    name: str
    url: str
    host: str = ""
    port: int = 0
    path: str = ""


class _View:
    """What both kinds of server tell. All of it is still there after the end."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    @property
    def listeners(self) -> dict[str, Listener]:
        """The listeners by name, in order; the first is `listener1` unless it was given a name."""
        return dict(self._run.listeners)

    @property
    def url(self) -> str:
        """The address of the first listener for a client, as `http://127.0.0.1:41507`; where the command really listens."""
        return self._run.first().url

    @property
    def host(self) -> str:
        """The host of the first listener, for a client; in brackets if it is an IPv6 address."""
        return self._run.first().host

    @property
    def port(self) -> int:
        """The number of the first listener; 0 for a unix socket."""
        return self._run.first().port

    @property
    def pid(self) -> int:
        """The process id of the command, not of portexec. It changes with a restart."""
        return self._run.pid

    @property
    def output(self) -> str:
        """The last `OUTPUT_LIMIT` bytes that the command wrote to stdout and stderr, and what portexec said of it."""
        return self._run.output()

    def died(self, patience: float = 0.0) -> Exited | None:
        """The error that says so if the command has ended by itself, and nobody has waited for that; else None.

        `patience`: seconds to wait for the news, which takes some milliseconds.
        """
        return self._run.died(patience)

    @property
    def returncode(self) -> int | None:
        """The status the command ended with, minus the signal that killed it; None while it runs."""
        return self._run.returncode


class Server(_View):
    """A running server, in plain code. Its methods may be called from any thread."""

    def wait(self) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`."""
        return self._run.wait()

    def stop(self) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. Once more does nothing."""
        self._run.stop()

    def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        self._run.restart()


class AsyncServer(_View):
    """A running server, in asyncio or trio."""

    async def wait(self) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`."""
        return await _in_thread(self._run.wait)

    async def stop(self) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. Once more does nothing."""
        await _shielded(self._run.stop)

    async def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        await _in_thread(self._run.restart)


class Serving:
    """A server that is to be: `with` gives a `Server`, `async with` an `AsyncServer`. To be entered once."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def __enter__(self) -> Server:
        try:
            self._run.start()
            self._run.wait_until_ready()
        except BaseException:
            self._run.stop()
            raise
        return Server(self._run)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._run.stop()

    async def __aenter__(self) -> AsyncServer:
        try:
            self._run.start()
            await _in_thread(self._run.wait_until_ready)
        except BaseException:
            await _shielded(self._run.stop)
            raise
        return AsyncServer(self._run)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await _shielded(self._run.stop)


def serve(
    command: Sequence[str | os.PathLike[str]],
    *,
    listen: str | Sequence[str] | Mapping[str, str] = (),
    hand_off: str = "auto",
    env: Mapping[str, str | None] | None = None,
    env_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    ready: str | None = None,
    ready_timeout: float = 60.0,
    cwd: str | os.PathLike[str] | None = None,
    kill_after: float = 5.0,
) -> Serving:
    """Run a server for the length of a `with` or `async with` block, which is entered when the server is ready.

    `command`: its words; templates (`{port}`, `{url}`, `{fd}`) are replaced. `listen`: listen specs, by name if it is a
    mapping; default `127.0.0.1:0`. `hand_off`: auto, fd, guard or hold. `env`: variables on top of ours, with templates; None
    removes one. `env_file`: dotenv files. `ready`: what counts as ready (listen, accept, http:PATH, notify, none); the default
    is exact for the hand-off. `ready_timeout`, `kill_after`: seconds. `cwd`: the command's working directory.

    The block owns the server: leaving it stops the whole tree. The command's standard input is empty, and it runs in a session
    of its own, so Ctrl-C reaches the caller only.

    Entering raises `CommandNotFound`, `CannotExecute`, `ListenError`, `UsageError` (`CommandNotAList`, `UnknownHandOff`,
    `UnknownReady`); `NotReady` when the time is over and
    `Exited` when the command ends first, both with the last `output`; `AlreadyEntered` the second time.
    """
    words = _words(command)
    options = [word for spec in _specs(listen) for word in ("--listen", spec)]
    options += ["--hand-off", hand_off, "--ready-timeout", f"{ready_timeout:f}s", "--kill-after", f"{kill_after:f}s"]
    options += ["--ready", ready] if ready is not None else []
    files = [env_file] if isinstance(env_file, (str, os.PathLike)) else env_file
    options += [word for file in files for word in ("--env-file", os.fspath(file))]
    ours = dict(os.environ)
    for name, value in (env or {}).items():
        if value is None:
            ours.pop(name, None)
        else:
            options += ["--env", f"{name}={value}"]
    return Serving(_Run([*options, "--", *words], ours, cwd, kill_after))


def _words(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(command, (str, bytes)):
        raise CommandNotAList(f"the command is one text, {command!r}", "write a list of its words: ['npm', 'start']")
    words = [os.fspath(word) if isinstance(word, (str, os.PathLike)) else word for word in command]
    for word in words:
        if not isinstance(word, str):
            raise UsageError(f"{word!r} in the command is no text", "every word is a text; write str(...) around it")
        if "\0" in word:
            raise UsageError(f"{word!r} in the command has a NUL character", "no command can be given one")
    if not words:
        raise UsageError("the command is empty", "write a list of its words: ['npm', 'start']")
    return words


def _specs(listen: str | Sequence[str] | Mapping[str, str]) -> list[str]:
    if isinstance(listen, Mapping):
        return [f"{name}={spec}" for name, spec in listen.items()]
    return [listen] if isinstance(listen, str) else list(listen)


class _Run:
    """A portexec of ours, what it has said, and the blocking calls. All state changes under `_changed`."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str | os.PathLike[str] | None,
        kill_after: float,
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.cwd = cwd
        self.kill_after = kill_after
        self.listeners: dict[str, Listener] = {}
        self.pid = 0
        self.returncode: int | None = None
        self._changed = threading.Condition()
        self._output = bytearray()
        self._times_ready = 0
        self._failure: PortexecError | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._was_entered = False
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
        """Start portexec, and the thread that follows it. Raises PortexecError."""
        if self._was_entered:
            raise AlreadyEntered("this server was started before", "call serve again for another one")
        self._was_entered = True
        self._control, theirs = socket.socketpair()
        out, in_ = os.pipe()
        _open_runs.add(self)
        try:
            self._process = self._popen(theirs.fileno(), in_)
        except (OSError, ValueError) as error:
            os.close(out)
            self._control.close()
            raise self._cannot_start(error) from error
        finally:
            theirs.close()
            os.close(in_)
        threading.Thread(target=self._follow, args=(self._control, out), name="portexec", daemon=True).start()

    def _popen(self, control: int, output: int) -> subprocess.Popen[bytes]:
        location = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(location), "--control-fd", str(control), *self.arguments],
            env=self.environment,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(control,),
            start_new_session=True,
        )

    def _cannot_start(self, error: OSError | ValueError) -> PortexecError:
        if isinstance(error, OSError) and self.cwd is not None and not os.path.isdir(self.cwd):
            return UsageError(f"cannot run in {os.fspath(self.cwd)}: {reason(error)}", "cwd has to be a directory that exists")
        return PortexecError(f"cannot start portexec: {reason(error) if isinstance(error, OSError) else error}")

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
        if self._process is None:
            return
        with self._changed:
            self._was_stopped = self._was_stopped or not self._is_over
            self._ask("stop")
            is_over = self._changed.wait_for(lambda: self._is_over, 2 * self.kill_after + _GRACE)
        if not is_over:
            self._process.kill()
            with self._changed:
                self._changed.wait_for(lambda: self._is_over)

    def restart(self) -> None:
        """Stop the tree, start the command again, and wait until it is ready."""
        with self._changed:
            if self._is_over or self._was_stopped:
                raise NotRunning(f"the server is not running any more: {self.how_it_ended()}", "start another one with serve")
            times = self._times_ready + 1
            self._is_end_expected = True
            self._ask("restart")
        self.wait_until_ready(times)
        self._is_end_expected = False

    def forget(self) -> None:
        """Close our end in a forked child, whose life is not to keep the server running."""
        if self._control is not None:
            self._control.close()

    def _ask(self, request: str) -> None:
        try:
            if self._control is not None:
                self._control.sendall(json.dumps({"do": request}).encode() + b"\n")
        except OSError:
            pass  # it has ended already

    def _follow(self, control: socket.socket, output: int) -> None:
        """The thread: take what portexec and the command say until both have ended."""
        lines = b""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(output, select.POLLIN)
        is_open = {control.fileno(): True, output: True}
        while any(is_open.values()):
            for fd, _ in poll.poll():
                data = _read(fd)
                if not data:
                    poll.unregister(fd)
                    is_open[fd] = False
                elif fd == output:
                    self._take_output(data)
                else:
                    *whole, lines = (lines + data).split(b"\n")
                    for line in whole:
                        self._take_event(json.loads(line))
        os.close(output)
        self._end(control)

    def _take_output(self, data: bytes) -> None:
        with self._changed:
            self._output += data
            del self._output[:-OUTPUT_LIMIT]

    def _take_event(self, event: dict[str, Any]) -> None:
        with self._changed:
            kind = event["event"]
            if kind in ("bound", "ready"):
                fields = [{name: value for name, value in each.items() if name != "fd"} for each in event["listeners"]]
                self.listeners = {each["name"]: Listener(**each) for each in fields}
            if kind in ("started", "ready"):
                self.pid = event["pid"]
            if kind == "ready":
                self.returncode = None
                self._times_ready += 1
            elif kind == "ended":
                self.returncode = os.waitstatus_to_exitcode(event["status"])
            elif kind == "error":
                self._failure = getattr(errors, event["kind"])(event["message"], event["hint"])
            self._changed.notify_all()

    def _end(self, control: socket.socket) -> None:
        assert self._process is not None  # noqa: S101  # this thread is started after it
        self._process.wait()
        _open_runs.discard(self)
        with self._changed:
            control.close()
            self._is_over = True
            self._changed.notify_all()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""  # the other end was killed with something unread


async def _in_thread(call: Callable[[], T]) -> T:
    """Make a blocking call in a worker thread that is left to itself when we are cancelled."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


async def _shielded(call: Callable[[], None]) -> None:
    """The same to its end, even if we are cancelled."""
    import anyio

    with anyio.CancelScope(shield=True):
        await _in_thread(call)


_open_runs: weakref.WeakSet[_Run] = weakref.WeakSet()


def _forget_all(runs: Iterable[_Run] = _open_runs) -> None:
    for run in list(runs):
        run.forget()


os.register_at_fork(after_in_child=_forget_all)
