"""Everything that needs a parent: admission of the command's binds, signals, waiting. Nothing here is on the exec path."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.binding.guard import Guard
    from portexec.command.plan import Plan
    from portexec.parent.signals import Inbox
    from portexec.parent.supervisor import Admitted


def start(plan: Plan, guards: Mapping[int, Guard], remap: Mapping[int, int]) -> Admitted:
    """Make this process, which has one thread, the parent of a child for the plan, and rehearse admission with it.

    The child then waits for `Supervised.go`. Raises RefusedError, with nothing left of the attempt, where this machine does
    not let us; OSError when resources run out.
    """
    from portexec.parent import signals, spawn

    inbox = signals.Inbox()
    try:
        return admit(plan, guards, remap, inbox)
    except BaseException:
        spawn.take_back(inbox)
        raise


def admit(plan: Plan, guards: Mapping[int, Guard], remap: Mapping[int, int], inbox: Inbox) -> Admitted:
    """The same in a process whose signals are in an inbox already."""
    from portexec.parent.spawn import spawn

    child = spawn(plan, next(iter(guards)), inbox)
    try:
        from portexec.parent.supervisor import rehearse  # while the child is busy

        return rehearse(child, inbox, guards, remap)
    except BaseException:
        child.end()
        raise
