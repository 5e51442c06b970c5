"""`portexec.serve`: a server for the length of a `with` block, run by the host that the servers of this process share.

The calls wait for news of its `driver`: plain code blocks, a task of asyncio or trio is suspended. When the caller dies,
however that happens, portexec stops the whole tree.
"""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from signal import NSIG
from subprocess import DEVNULL
from types import TracebackType
from typing import Any, Protocol, TypeVar

from portexec.api.driver import (
    Changed,
    Driver,
    HasFileno,
    Listener,
    Traits,
    Until,
    block_until,
    number_of,
    start,
    together,
)
from portexec.api.output import Lines
from portexec.binding.spec import is_name, parse_listen
from portexec.errors import UsageError, reason
from portexec.server_errors import AlreadyEntered, CommandNotAList, Exited, NotRunning

__tracebackhide__ = True  # in pytest's tracebacks: what counts there is the line that called us

T = TypeVar("T")

_LONGEST = 10**9  # seconds; Python's waits have an upper limit not far above
_LOOK_AGAIN = 0.01  # seconds between two looks in an event loop, where no descriptor is left to wake it


class SupportsWrite(Protocol):
    """A text file, as far as `output` needs one."""

    def write(self, text: str, /) -> object:
        """Take a line."""


class _View:
    """What both kinds of server can be asked, also after the end."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    @property
    def _driver(self) -> Driver:
        return self._serving.driver

    def __repr__(self) -> str:
        return f"<portexec.{type(self).__name__} {self._driver.description()}>"

    @property
    def listeners(self) -> dict[str, Listener]:
        """The listeners by name, in order; the first is `listener1` unless it was given a name."""
        return dict(self._driver.listeners)

    @property
    def url(self) -> str:
        """The address of the first listener for a client, as `http://127.0.0.1:41507`; where the command really listens."""
        return self._driver.first().url

    @property
    def host(self) -> str:
        """The host of the first listener, for a client; in brackets if it is an IPv6 address."""
        return self._driver.first().host

    @property
    def port(self) -> int:
        """The number of the first listener; 0 for a unix socket."""
        return self._driver.first().port

    @property
    def address(self) -> tuple[str, int]:
        """Host, without brackets, and number of the first listener: for `socket.create_connection(server.address)`."""
        return self.host.strip("[]"), self.port

    @property
    def path(self) -> str:
        """The path of the first listener if it is a unix socket, else empty."""
        return self._driver.first().path

    @property
    def pid(self) -> int:
        """The process id of the command, not of portexec. It changes with a restart."""
        return self._driver.pid

    @property
    def output(self) -> str:
        """The last 64 KiB that the command wrote to stdout and stderr, with what portexec itself said."""
        return self._driver.output()

    def died(self, patience: float = 0.0) -> Exited | None:
        """The error for a command that has ended by itself, if no call was told of that or waits for it; else None.

        `patience`: seconds to wait for the news, which takes some milliseconds. The pytest plugin does not make a test fail
        because of a death that was seen in this way.
        """
        death = self._driver.died(patience)
        self._driver.was_death_seen = self._driver.was_death_seen or death is not None
        return death

    @property
    def returncode(self) -> int | None:
        """The status the command ended with, minus the signal that killed it; None while it runs."""
        return self._driver.returncode


class Server(_View):
    """A running server, in plain code. Its methods may be called from any thread."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`.

        Raises `StillRunning`, which is a `TimeoutError`, after `timeout` seconds.
        """
        return _block(lambda until: self._driver.wait(until, _limit(timeout)))

    def stop(self, signal: int | None = None, timeout: float | None = None) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. A second call does nothing.

        With a `signal`, the command alone is sent that first; the rest of the tree is told when the command has ended. The
        command has `timeout` seconds for its end, by default `kill_after`, before KILL.
        """
        _block(lambda until: self._driver.stop(until, _signal("signal", signal), _limit(timeout)))

    def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end or a death, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        self._serving._require_block()
        _block(self._driver.restart)

    def start(self) -> None:
        """Start the server again after its end, as often as you like; while it runs, nothing happens.

        Its number is a new one, unless `listen` names it. Raises what entering the block does; `NotRunning` after the block.
        """
        self._serving._start_again()


class AsyncServer(_View):
    """A running server, in asyncio or trio."""

    async def wait(self, timeout: float | None = None) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`.

        Raises `StillRunning`, which is a `TimeoutError`, after `timeout` seconds.
        """
        return await self._driver.wait(_suspend_until, _limit(timeout))

    async def stop(self, signal: int | None = None, timeout: float | None = None) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. A second call does nothing.

        With a `signal`, the command alone is sent that first; the rest of the tree is told when the command has ended. The
        command has `timeout` seconds for its end, by default `kill_after`, before KILL.
        """
        await _stop_to_the_end(self._driver, _signal("signal", signal), _limit(timeout))

    async def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end or a death, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        self._serving._require_block()
        await self._driver.restart(_suspend_until)

    async def start(self) -> None:
        """Start the server again after its end, as often as you like; while it runs, nothing happens.

        Its number is a new one, unless `listen` names it. Raises what entering the block does; `NotRunning` after the block.
        """
        await self._serving._start_again_in_loop()


class Serving:
    """A server that is not started yet: `with` gives a `Server`, `async with` an `AsyncServer`. It can be entered once."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._was_entered = False
        self._was_left = False
        self._starting = threading.Lock()

    def __repr__(self) -> str:
        return f"<portexec.Serving {self.driver.description()}>"

    def _claim(self) -> None:
        if self._was_entered:
            raise AlreadyEntered("this server was started before", "call serve again for another one")
        self._was_entered = True

    def __enter__(self) -> Server:
        self._claim()
        return self._start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._was_left = True
        _block(self.driver.stop)

    async def __aenter__(self) -> AsyncServer:
        self._claim()
        return await self._start_in_loop()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._was_left = True
        await _stop_to_the_end(self.driver)

    def _start(self) -> Server:
        try:
            start(self.driver)
            _block(self.driver.ready)
            return Server(self)
        except BaseException:
            _block(self.driver.stop)
            raise

    async def _start_in_loop(self) -> AsyncServer:
        try:
            start(self.driver)
            await self.driver.ready(_suspend_until)
            return AsyncServer(self)
        except BaseException:
            await _stop_to_the_end(self.driver)
            raise

    def _start_again(self) -> None:
        ended = self.driver
        if _block(ended.has_ended) and self._replace(ended):
            self._start()

    async def _start_again_in_loop(self) -> None:
        ended = self.driver
        if await ended.has_ended(_suspend_until) and self._replace(ended):
            await self._start_in_loop()

    def _require_block(self) -> None:
        if self._was_left:
            raise NotRunning("the block that owned this server is over", "start another one with serve")

    def _replace(self, ended: Driver) -> bool:
        """Make another driver for another start. False if another thread has done so."""
        with self._starting:
            self._require_block()
            is_first = self.driver is ended
            if is_first:
                self.driver = ended.again()
        return is_first


class ServingAll:
    """Servers that are not started yet: `with` gives a `Server` for each name, `async with` an `AsyncServer`."""

    def __init__(self, servings: dict[str, Serving]) -> None:
        self._servings = servings
        together({name: serving.driver for name, serving in servings.items()})

    def __repr__(self) -> str:
        return f"<portexec.ServingAll {', '.join(self._servings)}>"

    def _drivers(self) -> list[Driver]:
        return [serving.driver for serving in self._servings.values()]

    def _start(self) -> None:
        start(*self._drivers())

    def _let_go(self) -> None:
        """Have all stopped at once, except those with a `stop_signal`, which are stopped one after the other."""
        for serving in self._servings.values():
            serving._was_left = True
            if serving.driver.traits.stop_signal is None:
                serving.driver.hang_up()

    def __enter__(self) -> dict[str, Server]:
        for serving in self._servings.values():
            serving._claim()
        try:
            self._start()
            for driver in self._drivers():
                _block(partial(driver.ready, beside=self._drivers()))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return {name: Server(serving) for name, serving in self._servings.items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._let_go()
        for driver in self._drivers():
            _block(driver.stop)

    async def __aenter__(self) -> dict[str, AsyncServer]:
        for serving in self._servings.values():
            serving._claim()
        try:
            self._start()
            for driver in self._drivers():
                await driver.ready(_suspend_until, beside=self._drivers())
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return {name: AsyncServer(serving) for name, serving in self._servings.items()}

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._let_go()
        cancelled = None
        for driver in self._drivers():
            try:
                await _stop_to_the_end(driver)
            except BaseException as cancellation:  # the others have to be stopped, too
                cancelled = cancellation
        if cancelled is not None:
            raise cancelled


def serve_all(servers: Mapping[str, Sequence[str | os.PathLike[str]] | Serving]) -> ServingAll:
    """Run several servers for the length of one `with` block. They start at the same time, and know of each other.

        with portexec.serve_all({
            "api": ["uvicorn", "api:app", "--fd", "{fd}"],
            "web": portexec.serve(["npm", "start"], env={"API_URL": "{api.url}"}),
        }) as servers:
            print(servers["web"].url)

    Each is a command, or what `serve` gives where it has options. Words and `env` of each may have `{NAME.url}`, `{NAME.port}`
    and `{NAME.host}` of the first listener of any of them: all numbers are bound before the first command runs.

    The block begins when all are ready. When one of them fails, all are stopped, and its error is raised. At the end of the
    block all are stopped at once. A server that is started again later gets the numbers that the others have then.

    Errors: those of `serve`. `UsageError` where a name cannot stand in a template.
    """
    if not isinstance(servers, Mapping):
        raise UsageError(f"servers={servers!r} is no mapping", "write it as {'api': [...], 'web': [...]}")
    for name in servers:
        if not isinstance(name, str) or not is_name(name):
            raise UsageError(f"{name!r} cannot be the name of a server", "use letters, digits, - and _, as in {'api': [...]}")
    return ServingAll({name: each if isinstance(each, Serving) else serve(each) for name, each in servers.items()})


def serve(
    command: Sequence[str | os.PathLike[str]],
    *,
    listen: str | Sequence[str] | Mapping[str, str] | None = None,
    host: str | None = None,
    hand_off: str = "auto",
    remap: int | str | Sequence[int | str] | None = None,
    env: Mapping[str, str | None] | None = None,
    env_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    inherit_env: bool = True,
    ready: str | re.Pattern[str] | None = None,
    ready_timeout: float = 60.0,
    restart: str = "no",
    lazy: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    stdin: int | HasFileno | None = None,
    output: Callable[[str], object] | SupportsWrite | None = None,
    scheme: str = "http",
    stop_signal: int | None = None,
    kill_after: float = 5.0,
) -> Serving:
    """Run a server for the length of a `with` block, which begins when the server is ready and ends when nothing is left of it.

        with portexec.serve(["uvicorn", "app:app", "--port", "{port}"]) as server:
            print(httpx.get(server.url))

    In asyncio and trio it is `async with`. All times are in seconds.

    What runs:
    `command`      its words, a list; `{port}`, `{url}`, `{fd}` and other templates are replaced
    `cwd`          its working directory, in which a relative `unix:PATH` is
    `env`          variables on top of ours, with templates; None leaves out one of ours
    `env_file`     dotenv files, found from the caller's directory
    `inherit_env`  False: the command gets none of our variables, not even PATH
    `stdin`        a file, a descriptor or `subprocess.DEVNULL` to read from; the default is open and silent
    `restart`      no, on-failure or always: what follows when the command ends by itself
    `lazy`         True: the block begins at once, and the command at the first connection; needs the hand-off fd

    Where it listens:
    `listen`       listen specs, by name if it is a mapping; default `127.0.0.1:0`
    `host`         the name or address of this machine for clients on others, as the browser in a container: in `server.url`,
                   `server.host` and templates. Default: the address that it listens on
    `hand_off`     auto, fd, guard or hold
    `remap`        fixed numbers: a bind to one of them gets the listener's instead
    `scheme`       of `server.url`, where it is not http and `ready` does not say so

    When it is ready:
    `ready`          listen, accept, http:PATH, https:PATH, notify, none; the default is exact. A compiled pattern: when
                     the command has written a line in which it is found
    `ready_timeout`  how long that may take

    `output`      is told each line that the command writes, with its end: a function, or a text file such as `sys.stderr`.
                  One thread calls those of all servers. So a function has to return soon, and must not wait for a server.
                  If it raises, it is told no more, and the exception is reported as a thread's (`threading.excepthook`)
    `stop_signal` is sent to the command at the end of the block, instead of TERM
    `kill_after`  how long the tree has for its end after TERM, before KILL

    Ownership: the block owns the server; leaving it stops the whole tree. So does the death of this process. The command runs
    in a session of its own, so Ctrl-C reaches the caller only.

    Errors: `UsageError` (`CommandNotAList`) comes at once, for an argument that cannot be meant. Entering the block raises
    `CommandNotFound`, `CannotExecute`, `ListenError`, `UsageError` (`UnknownHandOff`, `UnknownReady`), `NotReady` when the time
    is over, `Exited` when the command ends first. The last two have the last `output`. `AlreadyEntered` comes the second time.
    """
    pattern = ready if isinstance(ready, re.Pattern) else None
    if pattern is not None and not isinstance(pattern.pattern, str):
        raise UsageError(f"ready={ready!r} is a pattern of bytes", "compile it from text: re.compile('...')")
    form = "none" if pattern is not None else ready
    specs = _specs(listen)
    options = [word for spec in specs for word in ("--listen", spec)]
    options += ["--host", _text("host", host)] if host is not None else []
    options += ["--hand-off", _text("hand_off", hand_off)]
    options += [word for number in _numbers(remap) for word in ("--remap", number)]
    options += ["--ready", _text("ready", form)] if form is not None else []
    options += ["--ready-timeout", _duration("ready_timeout", ready_timeout)]
    options += ["--restart", _text("restart", restart)] if restart != "no" else []
    options += ["--kill-after", _duration("kill_after", kill_after)]
    env_files = [_absolute("env_file", file) for file in _texts("env_file", env_file)]
    options += [word for file in env_files for word in ("--env-file", file)]
    options += ["--lazy"] if lazy else []
    ours = dict(os.environ) if inherit_env else {}
    for name, value in _variables(env):
        if value is None:
            ours.pop(name, None)
        else:
            options += ["--env", f"{name}={_text('env', value)}"]
    place = None if cwd is None else _text("cwd", cwd)
    words = _words(command)
    driver = Driver([*options, "--", *words], ours, place, kill_after, _arguments_of_options(), words)
    driver.traits = Traits(
        scheme=_text("scheme", scheme),
        is_to_listen=form != "none",
        is_restarted=restart != "no",
        pattern=pattern,
        ready_timeout=ready_timeout,
        stop_signal=_signal("stop_signal", stop_signal),
        is_lazy=lazy,
        stdin=_file(stdin),
        is_looked_up=_is_looked_up(specs),
        env_files=tuple(env_files),
    )
    if output is not None:
        driver.sinks.append(_sink(output))
    return Serving(driver)


def _file(stdin: int | HasFileno | None) -> int | HasFileno | None:
    """What the command is to read from, if it is open. It is duplicated when the server starts."""
    try:
        if stdin is not None and stdin != DEVNULL:
            os.fstat(number_of(stdin))
    except (AttributeError, TypeError, OSError, ValueError) as error:
        hint = "write an open file or descriptor, such as one end of os.pipe(), or subprocess.DEVNULL"
        raise UsageError(f"stdin={stdin!r} is no open file", hint) from error
    return stdin


def _sink(output: Callable[[str], object] | SupportsWrite) -> Callable[[bytes], None]:
    """A sink that takes the output piece by piece, and passes it on line by line."""
    if isinstance(output, (io.RawIOBase, io.BufferedIOBase)):
        raise UsageError(f"output={output!r} is a file of bytes", "open it as text")
    write = output if callable(output) else getattr(output, "write", None)
    if write is None:
        raise UsageError(f"output={output!r} is neither a function nor a file", "write sys.stderr, a file, or a function")
    flush = getattr(output, "flush", lambda: None)
    lines = Lines()

    def take(data: bytes) -> None:
        for line in lines.add(data).splitlines(keepends=True):
            write(line.decode(errors="replace"))
        flush()

    return take


def _arguments_of_options() -> dict[str, str]:
    """The arguments of `serve`, by the options that they become. Longer names first: they may begin with a shorter one."""
    names = sorted(serve.__annotations__, key=len, reverse=True)
    short = {"say -H ": "say hand_off ", "with -l ": "with listen "}  # as they stand in hints
    return {f"--{name.replace('_', '-')}": name for name in names} | short


def _words(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(command, (str, bytes, os.PathLike)) or not isinstance(command, Sequence):
        raise CommandNotAList(f"command={command!r} is no list", "write a list of its words: ['npm', 'start']")
    words = _texts("command", command)
    if not words:
        raise UsageError("command=[] is empty", "write a list of its words: ['npm', 'start']")
    return words


def _specs(listen: str | Sequence[str] | Mapping[str, str] | None) -> list[str]:
    if isinstance(listen, Mapping):
        return [f"{_text('listen', name)}={_text('listen', spec)}" for name, spec in listen.items()]
    return _texts("listen", listen)


def _is_looked_up(specs: Sequence[str]) -> bool:
    """Whether DNS may have to resolve an address: it is a host name other than localhost."""
    try:
        parsed = parse_listen(specs)
    except UsageError:
        return False  # portexec itself reports it
    return not all(spec.kind == "unix" or spec.address in ("*", "localhost") or _is_address(spec.address) for spec in parsed)


def _is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False


def _variables(env: Mapping[str, str | None] | None) -> Iterable[tuple[str, str | None]]:
    if env is None:
        return
    if not isinstance(env, Mapping):
        raise UsageError(f"env={env!r} is no mapping", "write it as {'NAME': 'value'}")
    for name, value in env.items():
        if not name or "=" in _text("env", name):
            raise UsageError(f"env: {name!r} cannot be the name of a variable", "write it as {'NAME': 'value'}, without `=`")
        yield name, value


def _numbers(remap: int | str | Sequence[int | str] | None) -> list[str]:
    several = [remap] if isinstance(remap, (int, str)) else remap or []
    return [_text("remap", str(each) if isinstance(each, int) else each) for each in several]


def _texts(argument: str, value: object) -> list[str]:
    """The texts of an argument that is one value or several; none for None."""
    if value is None:
        return []
    several = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    return [_text(argument, each) for each in several]


def _text(argument: str, value: object) -> str:
    """An argument, or one of its parts, as text for portexec's command line. Raises UsageError where that is impossible."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise UsageError(f"{argument}: {value!r} is no text", "write it in quotes, or str(...) around it")
    if "\0" in text:
        raise UsageError(f"{argument}: {value!r} has a NUL character", "no program can be given one; leave it out")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{argument}: {value!r} cannot be encoded: {error.reason}", "no program can be given it") from error
    return text


def _absolute(argument: str, path: str) -> str:
    """The absolute path of a file, from the caller's directory."""
    if not path:
        raise UsageError(f"{argument}: the path is empty", "write the name of a file, or leave it out")
    try:
        return os.path.abspath(path)
    except OSError as error:
        why = reason(error)
        raise UsageError(
            f"{argument}: {path} is relative to a directory that is gone: {why}", "write the whole path"
        ) from error


def _signal(argument: str, number: int | None) -> int | None:
    if number is not None and (not isinstance(number, int) or not 0 < number < NSIG):
        raise UsageError(f"{argument}={number!r} is no signal", "write it as signal.SIGINT")
    return number


def _duration(argument: str, seconds: float) -> str:
    _require_time(argument, seconds)
    return f"{seconds:f}s"


def _limit(seconds: float | None) -> float | None:
    if seconds is not None:
        _require_time("timeout", seconds)
    return seconds


def _require_time(argument: str, seconds: float) -> None:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST:  # NaN is not
        raise UsageError(f"{argument}={seconds!r} is no number of seconds", f"write one from 0 to {_LONGEST}")


def _block(call: Callable[[Until], Coroutine[Any, Any, T]]) -> T:
    """Make a call of the driver that blocks and so never suspends."""
    try:
        call(block_until).send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it has suspended")


async def _suspend_until(changed: Changed, condition: Callable[[], int], patience: float | None = None) -> int:
    """An `Until` that suspends the task."""
    import anyio

    with changed.bell() as bell, anyio.move_on_after(patience):
        while True:
            with changed:
                if result := condition():
                    return result
            if bell is None:
                await anyio.sleep(_LOOK_AGAIN)
                continue
            await anyio.wait_readable(bell)
            os.eventfd_read(bell)
    return 0


async def _stop_to_the_end(driver: Driver, signal: int | None = None, timeout: float | None = None) -> None:
    """Stop it, and return only when nothing is left, however often we are cancelled meanwhile."""
    if sys.is_finalizing():
        driver.hang_up()
        return  # nothing can be imported any more, nor waited for
    import anyio

    if (signal or driver.traits.stop_signal or timeout) is None:
        driver.hang_up()
    try:
        shield = anyio.CancelScope(shield=True)
    except RuntimeError:
        driver.hang_up()
        return  # no event loop runs any more: the garbage collector ends an `async with` block that was abandoned
    cancelled = None
    with shield:
        while True:
            try:
                await driver.stop(_suspend_until, signal, timeout)
                break
            except anyio.get_cancelled_exc_class() as error:
                driver.hang_up()
                cancelled = error  # asyncio's Task.cancel() ignores the shield
    if cancelled is not None:
        raise cancelled
