"""The command line program: parse, dispatch, report the error that ends it, and choose the exit status."""

from __future__ import annotations

import _signal
import os
import sys

# Bytes of address space, more than a run needs. Python does not survive every shortage: one in the middle of an import can
# leave a Python that crashes later, or never ends. So we ask for all of it at once, and fail early. No page of it is used.
_NEEDED = 16 << 20
_OUT_OF_MEMORY = b"portexec: error: out of memory\n"  # made now, since to make it later may take memory that is not there
_STDERR = 2  # here, too, since there may be no memory to import kernel.py with

try:
    from portexec.errors import STATUS_FAILURE, PortexecError, UsageError, reason, shortage, spare

    spare.append(bytes(2 << 20))  # Python takes 1 MiB at once
    bytes(_NEEDED)
    from portexec import __version__, options
    from portexec.become import become
    from portexec.command.undo import Undo
    from portexec.launch import give_back, prepare
    from portexec.request import Request, require_companions
except MemoryError:
    os.write(_STDERR, _OUT_OF_MEMORY)
    os._exit(125)
except (OSError, ImportError) as error:
    # There is no descriptor to load it all, or no memory for the dynamic loader.
    if isinstance(error, ImportError) and not (error.path or "").endswith(".so"):
        raise
    os.write(_STDERR, f"portexec: error: cannot be loaded: {error}\n".encode())
    raise SystemExit(125) from None
except KeyboardInterrupt:  # Ctrl-C, before `main` could catch it
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    os.kill(os.getpid(), _signal.SIGINT)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from portexec.launch import Launch
    from portexec.names.registry import Claim


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
        from portexec.kernel import die_by

        die_by(_signal.SIGINT)
    except Exception as error:
        spare.clear()
        if isinstance(error, MemoryError) and chosen.control_fd is None:
            _end_without_memory()  # Python may be broken by now, so nothing more is imported to report it
        short = shortage(error)
        if short is None:
            return _report_bug(error)
        failure = short
    # Outside of `except` nothing keeps alive what the run had open: there are descriptors, and memory, for the message.
    _report(failure, chosen.control_fd)
    return failure.status


def _run(chosen: options.Options) -> int:
    if answer := _answer(chosen):
        return _print(answer)
    if chosen.verbs():
        from portexec.names import verbs

        return verbs.run(chosen)
    if not chosen.command:
        require_companions(chosen)
        raise UsageError("no command to run", f"it comes last: {options.USAGE}; see portexec --help")
    request = Request(chosen)
    if chosen.name is None:
        return _launch(request)
    from portexec.names import begin

    return begin.run(request, _launch)


def _answer(chosen: options.Options) -> str:
    """The page that was asked for; empty where no page was."""
    if chosen.usage or chosen.help:
        from portexec import pages

        return pages.usage_text() if chosen.usage else pages.help_text()
    if chosen.version:
        return f"portexec {__version__}\n"
    if chosen.check:
        from portexec import check

        return check.report_json() if chosen.json else check.report_text()
    if chosen.completion is not None:
        from portexec import completion

        return completion.script(chosen.completion)
    return ""


def _launch(request: Request, claim: Claim | None = None) -> int:
    """Bind, and run the command. Ends as the command did, or becomes it; returns an exit status after a dry run."""
    chosen = request.chosen
    undo = Undo()
    if chosen.dry_run or any(spec.kind == "unix" for spec in request.specs):
        _undo_when_ended(undo)
    launch = None
    try:
        launch = prepare(request, undo)
        if chosen.dry_run:
            return _show_plan(launch, undo, as_json=chosen.json)
        if not launch.stays():
            become(launch)
        from portexec.start import start  # to become the command takes none of it

        _end_as(start(launch, claim))
    except BaseException:
        spare.clear()
        give_back(launch, undo)
        raise


def _undo_when_ended(undo: Undo) -> None:
    """When a signal ends us, remove first what we have made in the file system.

    These handlers serve until portexec as a parent reads signals in its own way, or until exec, which resets them.
    """
    from portexec.kernel import ENDING_SIGNALS, die_by

    def end(number: int, _: object) -> None:
        undo.run()
        die_by(number)

    for number in ENDING_SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, end)


def _end_as(wait_status: int) -> NoReturn:
    """End as the command did: by the same signal, or with its exit status.

    Python is not shut down first. There is nothing left to flush, and a shutdown takes a third of the time of a start.
    """
    if not os.WIFSIGNALED(wait_status):
        os._exit(os.WEXITSTATUS(wait_status))
    from portexec.kernel import die_by

    die_by(os.WTERMSIG(wait_status))


def _show_plan(launch: Launch, undo: Undo, *, as_json: bool) -> int:
    from portexec import explain, foresee

    launch = foresee.start(launch)
    plan = explain.plan_json(launch) if as_json else explain.plan_text(launch)
    give_back(launch, undo)
    return _print(plan)


def _print(text: str) -> int:
    from portexec.say import print_out

    print_out(text)
    return 0


def _report(error: PortexecError, control_fd: str | None) -> None:
    try:
        _tell(error, control_fd)
    except (OSError, MemoryError) as why:  # there is not enough left for the whole message
        os.write(_STDERR, os.fsencode(f"portexec: error: {reason(why)}\n"))


def _tell(error: PortexecError, control_fd: str | None) -> None:
    if control_fd is not None:
        from portexec import control

        fd = control.usable(control_fd)
        if fd is not None:
            control.tell_error(fd, error)
            return
    from portexec.say import say_error

    say_error(error)


def _end_without_memory() -> NoReturn:
    os.write(_STDERR, _OUT_OF_MEMORY)
    os._exit(STATUS_FAILURE)


def _report_bug(error: Exception) -> int:
    from portexec.say import say_bug

    say_bug(error)
    return STATUS_FAILURE
