"""`portexec.serve`: a server for the length of a `with` block, run by a portexec of its own.

The calls wait for what its `driver` hears: plain code blocks, a task of asyncio or trio is suspended. When the caller dies,
however that happens, portexec stops the whole tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from portexec.api.driver import Changed, Driver, Listener, Until, block_until
from portexec.errors import AlreadyEntered, CommandNotAList, Exited, UsageError, reason

T = TypeVar("T")

_LONGEST = 10**9  # seconds; no wait of Python's can be very much longer


class _View:
    """What both kinds of server tell. All of it is still there after the end."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

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
    def pid(self) -> int:
        """The process id of the command, not of portexec. It changes with a restart."""
        return self._driver.pid

    @property
    def output(self) -> str:
        """The last 64 KiB that the command wrote to stdout and stderr, and what portexec said of it."""
        return self._driver.output()

    def died(self, patience: float = 0.0) -> Exited | None:
        """The error that says so if the command has ended by itself, and nobody has waited for that; else None.

        `patience`: seconds to wait for the news, which takes some milliseconds.
        """
        return self._driver.died(patience)

    @property
    def returncode(self) -> int | None:
        """The status the command ended with, minus the signal that killed it; None while it runs."""
        return self._driver.returncode


class Server(_View):
    """A running server, in plain code. Its methods may be called from any thread."""

    def wait(self) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`."""
        return _block(self._driver.wait)

    def stop(self) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. Once more does nothing."""
        _block(self._driver.stop)

    def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        _block(self._driver.restart)


class AsyncServer(_View):
    """A running server, in asyncio or trio."""

    async def wait(self) -> int:
        """Wait until the command has ended by itself or was stopped, and return its `returncode`."""
        return await self._driver.wait(_suspend_until)

    async def stop(self) -> None:
        """Stop the whole tree: TERM, and KILL after `kill_after`. Returns when nothing is left. Once more does nothing."""
        await _stop_to_the_end(self._driver)

    async def restart(self) -> None:
        """Stop the whole tree and start the command again on the same number, which stays guarded; wait until it is ready.

        Raises `NotRunning` after the end, `Exited` and `NotReady` as the start does; then nothing is left running.
        """
        await self._driver.restart(_suspend_until)


class Serving:
    """A server that is to be: `with` gives a `Server`, `async with` an `AsyncServer`. To be entered once."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._was_entered = False

    def _claim(self) -> None:
        if self._was_entered:
            raise AlreadyEntered("this server was started before", "call serve again for another one")
        self._was_entered = True

    def __enter__(self) -> Server:
        self._claim()
        try:
            self._driver.start()
            _block(self._driver.ready)
            return Server(self._driver)
        except BaseException:
            _block(self._driver.stop)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        _block(self._driver.stop)

    async def __aenter__(self) -> AsyncServer:
        self._claim()
        try:
            self._driver.start()
            await self._driver.ready(_suspend_until)
            return AsyncServer(self._driver)
        except BaseException:
            await _stop_to_the_end(self._driver)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await _stop_to_the_end(self._driver)


def serve(
    command: Sequence[str | os.PathLike[str]],
    *,
    listen: str | Sequence[str] | Mapping[str, str] | None = None,
    hand_off: str = "auto",
    env: Mapping[str, str | None] | None = None,
    env_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    ready: str | None = None,
    ready_timeout: float = 60.0,
    cwd: str | os.PathLike[str] | None = None,
    kill_after: float = 5.0,
) -> Serving:
    """Run a server for the length of a `with` or `async with` block, which is entered when the server is ready.

    `command`: its words; templates (`{port}`, `{url}`, `{fd}`) are replaced. `listen`: listen specs, by name if it is a
    mapping; default `127.0.0.1:0`. `hand_off`: auto, fd, guard or hold. `env`: variables on top of ours, with templates; None
    leaves out one of ours. `env_file`: dotenv files, found from the caller's directory. `ready`: what counts as ready (listen,
    accept, http:PATH, notify, none); the default is exact for the hand-off. `ready_timeout`, `kill_after`: seconds. `cwd`:
    the command's working directory, in which a relative `unix:PATH` is.

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
    options += [word for file in _texts("env_file", env_file) for word in ("--env-file", _absolute("env_file", file))]
    ours = dict(os.environ)
    for name, value in _variables(env):
        if value is None:
            ours.pop(name, None)
        else:
            options += ["--env", f"{name}={_text('env', value)}"]
    place = None if cwd is None else _text("cwd", cwd)
    return Serving(Driver([*options, "--", *_words(command)], ours, place, kill_after, _arguments_of_options()))


def _arguments_of_options() -> dict[str, str]:
    """The arguments of `serve`, by the options that they become. Longer names first, which may begin with a shorter one."""
    names = sorted(serve.__annotations__, key=len, reverse=True)
    return {f"--{name.replace('_', '-')}": name for name in names}


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


def _variables(env: Mapping[str, str | None] | None) -> Iterable[tuple[str, str | None]]:
    if env is None:
        return
    if not isinstance(env, Mapping):
        raise UsageError(f"env={env!r} is no mapping", "write it as {'NAME': 'value'}")
    for name, value in env.items():
        if not name or "=" in _text("env", name):
            raise UsageError(f"env: {name!r} cannot be the name of a variable", "write it as {'NAME': 'value'}, without `=`")
        yield name, value


def _texts(argument: str, value: object) -> list[str]:
    """What `_text` makes of an argument that is one or several; None is none."""
    if value is None:
        return []
    several = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    return [_text(argument, each) for each in several]


def _text(argument: str, value: object) -> str:
    """What an argument, or one of its parts, is for portexec's command line. Raises UsageError when it cannot be there."""
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
    """The path, of a file that is found from the caller's directory."""
    if not path:
        raise UsageError(f"{argument}: the path is empty", "write the name of a file, or leave it out")
    try:
        return os.path.abspath(path)
    except OSError as error:
        why = reason(error)
        raise UsageError(
            f"{argument}: {path} is relative to a directory that is gone: {why}", "write the whole path"
        ) from error


def _duration(argument: str, seconds: float) -> str:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST:
        raise UsageError(f"{argument}={seconds!r} is no number of seconds", f"write one from 0 to {_LONGEST}")
    return f"{seconds:f}s"


def _block(call: Callable[[Until], Coroutine[Any, Any, T]]) -> T:
    """Make a call of the driver that blocks and never suspends."""
    try:
        call(block_until).send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it has suspended")


async def _suspend_until(changed: Changed, condition: Callable[[], int], patience: float | None = None) -> int:
    """An `Until` of the driver's that suspends the task."""
    import anyio

    with changed.bell() as bell, anyio.move_on_after(patience):
        while True:
            with changed:
                if result := condition():
                    return result
            await anyio.wait_readable(bell)
            os.eventfd_read(bell)
    return 0


async def _stop_to_the_end(driver: Driver) -> None:
    """Stop it, and return when nothing is left, however often we are cancelled meanwhile."""
    import anyio

    driver.hang_up()
    try:
        shield = anyio.CancelScope(shield=True)
    except RuntimeError:
        return  # no event loop runs any more: the garbage collector ends an `async with` that nobody is in
    cancelled = None
    with shield:
        while True:
            try:
                await driver.stop(_suspend_until)
                break
            except anyio.get_cancelled_exc_class() as error:
                cancelled = error  # by asyncio's Task.cancel(), which knows no shield
    if cancelled is not None:
        raise cancelled
