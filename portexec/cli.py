"""The command line program: parse -> bind -> plan -> exec. The one place that prints errors and picks an exit status."""

from __future__ import annotations

import _signal
import os
import sys

from portexec import __version__, execute, handoff, options, publish
from portexec.errors import STATUS_FAILURE, PortexecError, RefusedError, reason
from portexec.launch import Launch, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from portexec.supervisor.run import Supervised

_STDOUT = 1
_KILL_AFTER = "5s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run portexec with these words, by default the command line's. Returns an exit status, or becomes the command."""
    try:
        return _run(options.parse(sys.argv[1:] if arguments is None else arguments))
    except PortexecError as error:
        _print_error(error)
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
        raise PortexecError("no command to run", f"it comes last: {options.USAGE}")
    kill_after = options.duration(chosen.kill_after or _KILL_AFTER, "--kill-after")
    launch = prepare(chosen)
    if chosen.dry_run:
        return _show_plan(launch, as_json=chosen.json)
    supervised = _rehearse(launch) if launch.choice.hand_off == handoff.GUARD else None
    try:
        _publish(launch, chosen)
        try:
            if supervised is not None:
                return _supervise(supervised, chosen, launch, kill_after)
            execute.execute(launch.plan)
        except PortexecError:
            publish.withdraw(chosen.port_file, launch.bound.listeners[0].port)
            raise
    except BaseException:
        launch.bound.remove_paths()
        if supervised is not None:
            supervised.cancel()
        raise


def _rehearse(launch: Launch) -> Supervised | None:
    """Start the child of hand-off `guard`, or where that cannot be had and `auto` allows it, turn to `hold`."""
    from portexec import privileges
    from portexec.supervisor import start

    try:
        if not launch.choice.is_final and (danger := privileges.lost_by(launch.plan.file)):
            raise RefusedError(danger)
        supervised = start(launch.plan, launch.bound.guards, launch.remap)
        if supervised.admission.was_gated:
            launch.choice.why += "; gated, since pidfd_getfd(2) is denied"
        return supervised
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


def _supervise(supervised: Supervised, chosen: options.Options, launch: Launch, kill_after: float) -> int:
    from portexec.supervisor import run

    supervised.go()
    from portexec.supervisor.diagnosis import Diagnosis  # beside the command, which is on its way

    diagnosis = Diagnosis(launch.bound.guards, quiet=chosen.quiet, verbose=chosen.verbose)
    return run.end_as(run.Supervisor(supervised, diagnosis, kill_after, is_killed=chosen.kill_after is not None).run())


def _show_plan(launch: Launch, *, as_json: bool) -> int:
    from portexec import explain

    try:
        return _print(explain.plan_json(launch) if as_json else explain.plan_text(launch))
    finally:
        launch.bound.close()


def _publish(launch: Launch, chosen: options.Options) -> None:
    """Tell whoever is to know: files first, since they can fail, then stderr."""
    listeners = launch.bound.listeners
    publish.publish_files(chosen.port_file, chosen.export, listeners[0].port, launch.variables)
    if chosen.verbose:
        from portexec import explain

        publish.say(explain.verbose(launch))
    if chosen.quiet:
        return
    if chosen.json:
        publish.say(publish.announcement_json(listeners, launch.choice.hand_off, launch.first_fd))
    else:
        publish.say(publish.announcement(listeners))


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


def _print_error(error: PortexecError) -> None:
    lines = [f"portexec: error: {error.message}"] + [f"portexec: hint: {error.hint}"] * bool(error.hint)
    publish.say("".join(line.replace("\n", "\\n") + "\n" for line in lines))


def _die_by(number: int) -> NoReturn:
    """End as the signal would have ended us, so that the shell that started us sees it."""
    _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)
