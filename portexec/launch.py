"""From a request to a launch that is ready to go: bind, plan. Nobody else has been told anything yet."""

from __future__ import annotations

import os
import sys

from portexec.binding.listeners import Bound, Listener, bind_all
from portexec.command import activation, environment, execute, templates
from portexec.command.plan import (
    FD,
    HOLD,
    Choice,
    Plan,
    announced_names,
    descriptors,
    injected,
    template_values,
)
from portexec.errors import PortexecError, UsageError
from portexec.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portexec.command.undo import Undo

SHELL = "/bin/sh"


class Launch:
    """A plan with all that is bound for it, which it owns until the command has it. It does not change.

    `from_files` are the variables of the env files, `variables` the injected numbers; `first_fd` is the descriptor of the first
    listener, None if none is passed; `remap` goes from fixed numbers to ours.
    """

    __slots__ = ("bound", "choice", "first_fd", "from_files", "plan", "remap", "request", "variables")

    def __init__(
        self,
        request: Request,
        from_files: dict[str, str],
        choice: Choice,
        bound: Bound,
        plan: Plan,
        variables: dict[str, str],
        first_fd: int | None,
        remap: dict[int, int],
    ) -> None:
        self.request = request
        self.from_files = from_files
        self.choice = choice
        self.bound = bound
        self.plan = plan
        self.variables = variables
        self.first_fd = first_fd
        self.remap = remap

    def chosen(self, choice: Choice, plan: Plan | None = None) -> Launch:
        """The same launch with another choice, and with another plan if that changes, too."""
        return Launch(
            self.request,
            self.from_files,
            choice,
            self.bound,
            plan or self.plan,
            self.variables,
            self.first_fd,
            self.remap,
        )

    def held(self, why: str) -> Launch:
        """The launch with hand-off `hold`: the command inherits the guards, which from now on give way to SO_REUSEADDR."""
        self.bound.open_to_reusers()
        return self.chosen(Choice(HOLD, why), self.plan.keeping(self.bound.guard_descriptors()))

    def stays(self) -> bool:
        """Whether portexec is the parent of the command."""
        return self.request.lifetime.stays(self.choice.hand_off)

    def plan_shell(self, script: str, listeners: Sequence[Listener]) -> Plan:
        """A plan for the shell to run this script: with the templates and variables of these listeners, and no socket."""
        values = template_values(listeners, None)
        extra = {name: text for name, text in self.request.extra.items() if not templates.uses(text, "fd")}
        variables = _compose(self.request, self.from_files, self.variables, extra, values)
        return Plan(SHELL, ["sh", "-c", templates.expand(script, values)], variables)


def prepare(request: Request, undo: Undo) -> Launch:
    """Bind what was asked for and plan the command's start. Raises PortexecError, with nothing left bound.

    What is made in the file system is recorded in `undo`.
    """
    choice = request.choose()
    if sys.platform != "linux":
        _require_possible_elsewhere(request, choice)
    request.lifetime.require_possible(choice, [spec.kind for spec in request.specs])
    bound = bind_all(request.specs, listening=choice.hand_off == FD, backlog=request.backlog, undo=undo)
    try:
        return _plan(request, choice, bound)
    except BaseException:
        bound.close()
        raise


def _require_possible_elsewhere(request: Request, choice: Choice) -> None:
    if choice.hand_off != FD:
        raise UsageError(
            "only Linux has a hand-off for commands that bind the number themselves",
            "use a server that takes a descriptor, as {fd} in its words",
        )
    if given := request.chosen.lifetime():
        raise UsageError(
            "makes portexec stay as the parent, which it can on Linux only",
            "leave the options under Lifetime out",
            about=given[0],
        )


def _plan(request: Request, choice: Choice, bound: Bound) -> Launch:
    first_fd = request.first_fd if choice.hand_off == FD else None
    variables = injected(bound.listeners)
    values = template_values(bound.listeners, first_fd)
    names = announced_names(choice, request.inherited, bound.listeners, request.lowest_fd)
    from_files = environment.read_env_files(request.chosen.env_file, request.given | variables)
    complete = _compose(request, from_files, variables | activation.variables(names), request.extra, values)
    passed = descriptors(request.inherited, bound.listeners)
    _require_room(request.lowest_fd + len(passed))
    argv = [templates.expand(word, values) for word in request.command]
    plan = Plan(
        execute.find_command(argv[0], complete),
        argv,
        complete,
        passed=passed,
        first_fd=request.lowest_fd,
        kept=bound.guard_descriptors() if choice.hand_off == FD else (),  # `hold` adds its own below
        for_pid=bool(names) and not request.chosen.no_pid,
    )
    ports = {listener.name: listener.port for listener in bound.listeners}
    remap = {fixed: ports[name] for fixed, name in request.remap.items()}
    launch = Launch(request, from_files, choice, bound, plan, variables, first_fd, remap)
    if choice.hand_off == HOLD:
        launch = launch.held(choice.why)
    if request.lifetime.then:
        launch.plan_shell(request.lifetime.then, bound.listeners)  # refuses templates that it cannot have
    return launch


def _compose(
    request: Request,
    from_files: Mapping[str, str],
    variables: Mapping[str, str],
    extra: Mapping[str, str],
    values: Mapping[str, str],
) -> dict[str, str]:
    """The whole environment of a command, with these variables and, in what the user set, these templates."""
    expanded = {name: templates.expand(text, values) for name, text in extra.items()}
    return environment.compose(request.given, from_files, variables, expanded, without=activation.VARIABLES)


def _require_room(end: int) -> None:
    """Refuse descriptors that the limit does not allow, before anybody is told anything."""
    limit = os.sysconf("SC_OPEN_MAX")
    if end > limit > 0:
        raise PortexecError(f"descriptor {end - 1} is beyond the limit of {limit}", "raise it with `ulimit -n`")
