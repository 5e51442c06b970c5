"""Everything that needs a parent: admission of the command's binds, signals, waiting. Nothing here is on the exec path."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.handoff import Plan
    from portexec.sockets import Guard
    from portexec.supervisor.run import Supervised


def start(plan: Plan, guards: Mapping[int, Guard], remap: Mapping[int, int]) -> Supervised:
    """Start a child for the plan and rehearse admission with it; it then waits for `Supervised.go`.

    To be called in a process with one thread. Raises RefusedError, with nothing left of the attempt, where this machine does
    not let us; OSError when resources run out.
    """
    from portexec.supervisor.spawn import spawn

    child = spawn(plan, next(iter(guards)))
    try:
        from portexec.supervisor.run import rehearse  # while the child is busy

        return rehearse(child, guards, remap)
    except BaseException:
        child.take_back()
        raise
