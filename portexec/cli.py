"""The command line program: parse -> bind -> plan -> exec. The one place that prints errors and picks an exit status."""

from __future__ import annotations

import _signal
import os
import sys

from portexec import __version__, options
from portexec.command import execute, publish
from portexec.command import plan as handoff
from portexec.errors import STATUS_FAILURE, PortexecError, RefusedError, UsageError, reason
from portexec.launch import Launch, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TypeVar

    from portexec.parent.shim import Shim
    from portexec.parent.supervisor import Admitted
    from portexec.request import Supervision

    T = TypeVar("T", Admitted, Shim)

_STDOUT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run portexec with these words, by default the command line's. Returns an exit status, or becomes the command."""
    chosen = options.Options()
    try:
        chosen = options.parse(sys.argv[1:] if arguments is None else arguments)
        return _run(chosen)
    except PortexecError as error:
        _report(error, chosen)
        return error.status
    except KeyboardInterrupt:
        _die_by(_signal.SIGINT)
    except Exception:
        sys.excepthook(*sys.exc_info())
        publish.say("portexec: error: this is a bug in portexec; please report it with the lines above\n")
        return STATUS_FAILURE


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
    kill_after = options.kill_after(chosen)
    if any("unix:" in text for text in chosen.listen):
        _leave_no_socket_behind()
    launch = prepare(chosen)
    if chosen.dry_run:
        return _show_plan(launch, as_json=chosen.json)
    try:
        if launch.supervision is not None:
            return _stay(launch, launch.supervision, chosen)
        return _become_or_wait(launch, chosen, kill_after)
    except BaseException:
        launch.bound.remove_paths()
        raise


def _leave_no_socket_behind() -> None:
    """Have a signal that ends us first remove what we have made in the file system.

    That is for the time until a parent hears signals in its own way, or the command is executed; exec gives it the defaults.
    """
    from portexec.binding import unix

    def end(number: int, _: object) -> None:
        unix.remove_all()
        _die_by(number)

    for number in unix.ENDING_SIGNALS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, end)


def _stay(launch: Launch, asked: Supervision, chosen: options.Options) -> int:
    """Be the parent of a command that was given a lifetime."""
    from portexec.lifetime.stay import Stay
    from portexec.parent.supervisor import end_as

    stay = Stay(launch, asked, quiet=chosen.quiet, verbose=chosen.verbose)
    try:
        if _start(launch, stay.start) is None:
            _start(launch, stay.start)  # as `hold`
        outcome = stay.run(_publish(launch, chosen, publish.say_if_heard))
    except BaseException:
        stay.clean_up()
        raise
    if outcome.error is not None:
        _report(outcome.error, chosen, publish.say_if_heard)
    return end_as(outcome.wait_status)


def _become_or_wait(launch: Launch, chosen: options.Options, kill_after: float) -> int:
    """Become the command, or with hand-off `guard` wait for it."""
    supervised = _start(launch, lambda: _rehearse(launch)) if launch.choice.hand_off == handoff.GUARD else None
    try:
        published = _publish(launch, chosen, publish.say if supervised is None else publish.say_if_heard)
        try:
            if supervised is None:
                execute.execute(launch.plan)
            wait_status = _wait_for(supervised, chosen, launch, kill_after, published)
        except PortexecError:
            published.withdraw()
            raise
    except BaseException:
        if supervised is not None:
            supervised.cancel()
        raise
    from portexec.parent.supervisor import end_as

    return end_as(wait_status)


def _start(launch: Launch, start: Callable[[], T]) -> T | None:
    """Start a child. Where hand-off `guard` cannot be had and `auto` allows it, turn to `hold` and return None."""
    try:
        if launch.choice.hand_off == handoff.GUARD and not launch.choice.is_final:
            _require_no_danger(launch)
        started = start()
        if started.was_gated:
            launch.choice.why += "; gated, since pidfd_getfd(2) is denied"
        return started
    except OSError as error:
        launch.bound.close()
        raise PortexecError(f"cannot start the command: {reason(error)}") from error
    except RefusedError as refusal:
        if launch.choice.is_final:
            launch.bound.close()
            raise PortexecError(
                f"hand-off guard cannot be had here: {refusal}",
                "portexec --check shows what can; --hand-off hold needs nothing",
            ) from refusal
        launch.hold(f"hand-off guard cannot be had: {refusal}")
        return None


def _require_no_danger(launch: Launch) -> None:
    from portexec.admission import privileges

    if danger := privileges.lost_by(launch.plan.file):
        raise RefusedError(danger)


def _rehearse(launch: Launch) -> Admitted:
    from portexec.parent.admit import start

    return start(launch.plan, launch.bound.guards, launch.remap)


def _wait_for(
    supervised: Admitted, chosen: options.Options, launch: Launch, kill_after: float, published: publish.Published
) -> int:
    """Wait for a command that binds the number itself; returns its wait status. What was published holds for a daemon, too."""
    from portexec.parent import supervisor as run

    supervised.go()
    from portexec.admission.diagnosis import Diagnosis  # beside the command, which is on its way

    diagnosis = Diagnosis(launch.bound.guards, quiet=chosen.quiet, verbose=chosen.verbose)
    supervisor = run.Supervisor(supervised, diagnosis, kill_after, is_killed=chosen.kill_after is not None)
    wait_status = supervisor.run()
    if not supervisor.has_left_a_daemon:
        published.withdraw()
    return wait_status


def _show_plan(launch: Launch, *, as_json: bool) -> int:
    from portexec import explain

    try:
        return _print(explain.plan_json(launch) if as_json else explain.plan_text(launch))
    finally:
        launch.bound.close()


def _publish(launch: Launch, chosen: options.Options, say: Callable[[str], None]) -> publish.Published:
    """Tell whoever is to know: files first, since they can fail, then stderr."""
    listeners = launch.bound.listeners
    published = publish.publish_files(chosen.port_file, chosen.export, listeners[0].port, launch.variables)
    if chosen.verbose:
        from portexec import explain

        say(explain.verbose(launch))
    if chosen.control_fd is not None:
        return published  # the program was told
    if chosen.json and not chosen.quiet:
        say(publish.announcement_json(listeners, launch.choice.hand_off, launch.first_fd))
    elif not chosen.quiet:
        say(publish.announcement(listeners))
    return published


def _print(text: str) -> int:
    """Write to stdout, as C programs do: killed by SIGPIPE when nobody reads any more."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    data = os.fsencode(text)
    try:
        while data:
            data = data[os.write(_STDOUT, data) :]
    except OSError as error:
        raise PortexecError(f"cannot write to stdout: {reason(error)}") from error
    return 0


def _report(error: PortexecError, chosen: options.Options, say: Callable[[str], None] = publish.say) -> None:
    if chosen.control_fd is not None and chosen.control_fd.isdecimal():
        from portexec import control

        control.tell_error(int(chosen.control_fd), error)
        return
    lines = [f"portexec: error: {error.message}"] + [f"portexec: hint: {error.hint}"] * bool(error.hint)
    say("".join(line.replace("\n", "\\n") + "\n" for line in lines))


def _die_by(number: int) -> NoReturn:
    """End as the signal would have ended us, so that the shell that started us sees it."""
    _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
