"""Become the command: publish, announce, execute. The hand-offs `fd` and `hold` do no more.

The files and the announcement are the same where portexec stays as the parent, see `start.py`.
"""

from __future__ import annotations

import os

from portexec.command import execute
from portexec.command.plan import GUARD, advice, exported, misplaced

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from portexec.launch import Launch
    from portexec.lifetime.program import Program


def become(launch: Launch) -> NoReturn:
    """Publish, announce, and execute the command of a launch. Raises PortexecError."""
    publish_files(launch)
    announce(launch, None)
    execute.execute(launch.plan)


def publish_files(launch: Launch) -> None:
    """Write the files that tell others the number. Raises PortexecError."""
    chosen = launch.request.chosen
    if chosen.port_file is not None or chosen.export is not None:
        from portexec.command import publish

        listeners = launch.bound.listeners
        publish.publish_files(chosen.port_file, chosen.export, listeners[0].port, exported(listeners), launch.bound.undo)


def announce(launch: Launch, program: Program | None) -> None:
    """Tell people on stderr, or the program that drives the run."""
    if launch.request.chosen.quiet and not launch.request.chosen.verbose and program is None:
        return
    from portexec.command import publish
    from portexec.say import say, say_json

    chosen, listeners = launch.request.chosen, launch.bound.listeners
    if any(spec.stable for spec in launch.request.specs) and not chosen.quiet:
        from portexec.binding import stable

        ports = [listener.port for listener in listeners]
        say(*(f"note: {line}" for line in stable.passed_over(launch.request.specs, ports)))
    if chosen.verbose:
        from portexec import explain

        say(*explain.verbose(launch))
    if program is not None:
        described = publish.described(listeners, launch.first_fd)
        program.tell("bound", hand_off=launch.choice.hand_off, listeners=described)
    elif chosen.json and not chosen.quiet:
        say_json(publish.announcement_json(listeners, launch.choice.hand_off, launch.first_fd))
    elif not chosen.quiet:
        say(*publish.announcement(listeners, named=len(listeners) > 1))
        _announce_for_browsers(launch)
    if not chosen.quiet and program is None and (text := _advice(launch)):
        say(f"note: {text}")


def _announce_for_browsers(launch: Launch) -> None:
    """Tell a person at a terminal the addresses that have the name of the run."""
    if not launch.request.name:
        return
    from portexec.kernel import STDERR

    if os.isatty(STDERR):
        from portexec.command.publish import described
        from portexec.names.naming import for_browsers
        from portexec.say import say

        say(*for_browsers(launch.request.name, described(launch.bound.listeners, None)))


def _advice(launch: Launch) -> str:
    """Advice for a person before the command starts; empty for most commands."""
    words = launch.plan.argv
    if text := launch.hidden_number() or misplaced(words):
        return text
    if launch.choice.hand_off == GUARD:
        from portexec.admission import privileges

        return privileges.advice(words)
    return advice(launch.choice.hand_off, words)
