"""The command line program: parse, dispatch; the one place that prints errors and picks an exit status."""

from __future__ import annotations

import _signal
import errno
import os
import sys

from portexec import __version__, options
from portexec.command.undo import Undo
from portexec.errors import STATUS_FAILURE, PortexecError, UsageError, reason, shortage
from portexec.kernel import ENDING_SIGNALS, STDERR, STDOUT
from portexec.launch import prepare
from portexec.request import Request
from portexec.start import start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from portexec.launch import Launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run portexec with these words, by default the command line's. Returns an exit status, or becomes the command."""
    chosen = options.Options()
    try:
        chosen = options.parse(sys.argv[1:] if arguments is None else arguments)
        return _run(chosen)
    except PortexecError as error:
        failure = error
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
    except KeyboardInterrupt:
        _die_by(_signal.SIGINT)
    except Exception as error:
        failure = PortexecError(shortage(error))
        if not failure.message:
            return _report_bug()
    # Outside of `except` nothing holds what the run had open: there are descriptors, and memory, for the words.
    _report(failure, chosen.control_fd)
    return failure.status


def _run(chosen: options.Options) -> int:
    if chosen.help:
        return _print(options.help_text())
    if chosen.version:
        return _print(f"portexec {__version__}\n")
    if chosen.check:
        from portexec import check

        return _print(check.report_json() if chosen.json else check.report_text())
    if not chosen.command:
        raise UsageError("no command to run", f"it comes last: {options.USAGE}")
    undo = Undo()
    if any("unix:" in text for text in chosen.listen):
        _undo_when_ended(undo)
    launch = None
    try:
        launch = prepare(Request(chosen), undo)
        if chosen.dry_run:
            return _show_plan(launch, as_json=chosen.json)
        return _end_as(start(launch))
    except BaseException as error:
        undo.run()
        if launch is not None:
            _give_back(launch)  # the modules that say what went wrong need a descriptor to be read
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise PortexecError(f"cannot open another file: {reason(error)}", "raise the limit with `ulimit -n`") from error
        raise


def _give_back(launch: Launch) -> None:
    try:
        launch.bound.close()
    except OSError:
        pass  # they were moved for the command already


def _undo_when_ended(undo: Undo) -> None:
    """Have a signal that ends us first remove what we have made in the file system.

    That is for the time until a parent hears signals in its own way, or the command is executed; exec gives it the defaults.
    """

    def end(number: int, _: object) -> None:
        undo.run()
        _die_by(number)

    for number in ENDING_SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, end)


def _end_as(wait_status: int) -> int:
    """End as the command did: by the same signal, or with the exit status that is returned."""
    if not os.WIFSIGNALED(wait_status):
        return os.WEXITSTATUS(wait_status)
    from portexec import kernel

    kernel.die_by(os.WTERMSIG(wait_status))
    return 128 + os.WTERMSIG(wait_status)


def _show_plan(launch: Launch, *, as_json: bool) -> int:
    from portexec import explain

    try:
        return _print(explain.plan_json(launch) if as_json else explain.plan_text(launch))
    finally:
        launch.bound.close()


def _print(text: str) -> int:
    """Write to stdout, as C programs do: killed by SIGPIPE when nobody reads any more."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    data = os.fsencode(text)
    try:
        while data:
            data = data[os.write(STDOUT, data) :]
    except OSError as error:
        raise PortexecError(f"cannot write to stdout: {reason(error)}") from error
    return 0


def _report(error: PortexecError, control_fd: str | None) -> None:
    try:
        _tell(error, control_fd)
    except (OSError, MemoryError) as why:  # there is not even what it takes to say it all
        os.write(STDERR, os.fsencode(f"portexec: error: {shortage(why) or reason(why)}\n"))


def _tell(error: PortexecError, control_fd: str | None) -> None:
    if control_fd is not None:
        from portexec import control

        fd = control.usable(control_fd)
        if fd is not None:
            control.tell_error(fd, error)
            return
    from portexec.say import say_error

    say_error(error)


def _report_bug() -> int:
    sys.excepthook(*sys.exc_info())
    from portexec.say import say_bug

    say_bug()
    return STATUS_FAILURE


def _die_by(number: int) -> NoReturn:
    """End as the signal would have ended us, so that the shell that started us sees it."""
    _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
