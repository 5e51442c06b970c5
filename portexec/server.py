"""`portexec.serve`: a server for the length of a `with` block, driven over the control descriptor of a portexec of its own.

Nothing of the machinery runs in the caller's process, which may have threads and a running event loop: it starts
`portexec --control-fd` as any program is started (subprocess), and talks to it. When the caller dies, however that happens,
the socket between them ends, and portexec stops the whole tree.

One thread for each server starts portexec and follows what it and the command say. The waiting calls wait for it; for asyncio
and trio they do so in a worker thread of anyio.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
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

from portexec import control, errors
from portexec.errors import PortexecError, UsageError, reason

T = TypeVar("T")

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
_LONGEST = 10**9  # seconds; no wait of Python's can be very much longer


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
        await _to_the_end(self._run.stop)

    async def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        await _in_thread(self._run.restart)


class Serving:
    """A server that is to be: `with` gives a `Server`, `async with` an `AsyncServer`. To be entered once."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._was_entered = False

    def _claim(self) -> None:
        if self._was_entered:
            raise AlreadyEntered("this server was started before", "call serve again for another one")
        self._was_entered = True

    def __enter__(self) -> Server:
        self._claim()
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
        self._claim()
        try:
            self._run.start()
            await _in_thread(self._run.wait_until_ready)
        except BaseException:
            await _to_the_end(self._run.stop)
            raise
        return AsyncServer(self._run)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await _to_the_end(self._run.stop)


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
    removes one. `env_file`: dotenv files, found from the caller's directory. `ready`: what counts as ready (listen, accept,
    http:PATH, notify, none); the default is exact for the hand-off. `ready_timeout`, `kill_after`: seconds. `cwd`: the
    command's working directory, in which a relative `unix:PATH` is.

    The block owns the server: leaving it stops the whole tree. The command's standard input is empty, and it runs in a session
    of its own, so Ctrl-C reaches the caller only.

    Raises `UsageError` (`CommandNotAList`) at once for an argument that cannot be meant. Entering raises `CommandNotFound`,
    `CannotExecute`, `ListenError`, `UsageError` (`UnknownHandOff`, `UnknownReady`); `NotReady` when the time is over and
    `Exited` when the command ends first, both with the last `output`; `AlreadyEntered` the second time.
    """
    options = [word for spec in _specs(listen) for word in ("--listen", spec)]
    options += ["--hand-off", _text("hand_off", hand_off)]
    options += ["--ready", _text("ready", ready)] if ready is not None else []
    options += ["--ready-timeout", _duration("ready_timeout", ready_timeout)]
    options += ["--kill-after", _duration("kill_after", kill_after)]
    files = [env_file] if isinstance(env_file, (str, os.PathLike)) else env_file
    options += [word for file in files for word in ("--env-file", os.path.abspath(_text("env_file", file)))]
    ours = dict(os.environ)
    for name, value in (env or {}).items():
        if value is None:
            ours.pop(name, None)
        else:
            options += ["--env", f"{_variable(name)}={_text('env', value)}"]
    place = None if cwd is None else _text("cwd", cwd)
    return Serving(_Run([*options, "--", *_words(command)], ours, place, kill_after))


def _words(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(command, (str, bytes, os.PathLike)):
        raise CommandNotAList(f"command={command!r} is no list", "write a list of its words: ['npm', 'start']")
    words = [_text("command", word) for word in command]
    if not words:
        raise UsageError("command=[] is empty", "write a list of its words: ['npm', 'start']")
    return words


def _specs(listen: str | Sequence[str] | Mapping[str, str]) -> list[str]:
    if isinstance(listen, Mapping):
        return [f"{_text('listen', name)}={_text('listen', spec)}" for name, spec in listen.items()]
    return [_text("listen", spec) for spec in ([listen] if isinstance(listen, (str, int)) else listen)]


def _text(argument: str, value: object) -> str:
    """What an argument, or one of its parts, is for portexec's command line. Raises UsageError when it cannot be there."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise UsageError(f"{argument}: {value!r} is no text", "write it in quotes, or str(...) around it")
    if "\0" in text:
        raise UsageError(f"{argument}: {value!r} has a NUL character", "no program can be given one; leave it out")
    return text


def _variable(name: str) -> str:
    if not name or "=" in _text("env", name):
        raise UsageError(f"env: {name!r} cannot be the name of a variable", "write it as {'NAME': 'value'}, without `=`")
    return name


def _duration(argument: str, seconds: float) -> str:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST:
        raise UsageError(f"{argument}={seconds!r} is no number of seconds", f"write one from 0 to {_LONGEST}")
    return f"{seconds:f}s"


def _in_python(text: str) -> str:
    """What portexec says of its options, said of the arguments that they were made from."""
    names = {name.replace("_", "-"): name for name in serve.__annotations__}
    return re.sub("--([a-z-]+)", lambda found: names.get(found[1], found[0]), text)


class _Run:
    """A portexec of ours, what it has said, and the blocking calls. All state changes under `_changed`."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        cwd: str | None,
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
        _runs.add(self)
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
                self._failure = getattr(errors, event["kind"])(_in_python(event["message"]), _in_python(event["hint"]))
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


async def _in_thread(call: Callable[[], T]) -> T:
    """Make a blocking call in a worker thread that is left to itself when we are cancelled."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


async def _to_the_end(call: Callable[[], None]) -> None:
    """Make a blocking call that may be repeated, and return when it has, however often we are cancelled meanwhile."""
    import anyio

    cancelled = None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                await _in_thread(call)
                break
            except anyio.get_cancelled_exc_class() as error:
                cancelled = error  # by asyncio's Task.cancel(), which knows no shield
    if cancelled is not None:
        raise cancelled


_runs: weakref.WeakSet[_Run] = weakref.WeakSet()


def _forget_all(runs: Iterable[_Run] = _runs) -> None:
    for run in list(runs):
        run.forget()


os.register_at_fork(after_in_child=_forget_all)
