"""From what the user asked for to a launch that is ready to go: parse, bind, plan. Nobody else has been told anything yet."""

from __future__ import annotations

import os

from portexec import options
from portexec.binding import listeners as sockets
from portexec.binding import spec
from portexec.command import activation, environment, execute, templates
from portexec.command import plan as handoff
from portexec.errors import PortexecError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from portexec.request import Supervision

SHELL = "/bin/sh"
_MAX_FD = 2**20


class Request:
    """What was asked for, checked and parsed, before anything is bound.

    `lowest_fd` is the first descriptor of all that are passed; `first_fd` that of the first listener, which comes after the
    sockets that another activator handed to us (`inherited`, by name).
    """

    __slots__ = ("backlog", "chosen", "extra", "given", "inherited", "lowest_fd", "remap", "specs", "supervision")

    def __init__(self, chosen: options.Options) -> None:
        self.chosen = chosen
        self.given = environment.given()
        self.inherited = activation.inherited(self.given)
        self.specs = spec.parse_listen(chosen.listen or [spec.DEFAULT])
        self.backlog = options.number(chosen.backlog, "--backlog", 0, sockets.MAX_BACKLOG)
        self.lowest_fd = self._lowest_fd()
        self.remap = handoff.parse_remap(chosen.remap, self.specs)
        self.extra = dict(_split_assignment(text) for text in chosen.env)
        self.supervision = self._supervision()

    def _lowest_fd(self) -> int:
        if self.chosen.first_fd is None:
            return activation.FIRST_FD
        return options.number(self.chosen.first_fd, "--first-fd", 0, _MAX_FD)

    def _supervision(self) -> Supervision | None:
        if not self.chosen.lifetime():
            return None
        from portexec.request import Supervision

        return Supervision(self.chosen)

    @property
    def first_fd(self) -> int:
        return self.lowest_fd + len(self.inherited)

    def environment(
        self, from_files: Mapping[str, str], injected: Mapping[str, str], extra: Mapping[str, str], values: Mapping[str, str]
    ) -> dict[str, str]:
        """The whole environment of a command, with these variables and, in what the user set, these templates."""
        extra = {name: templates.expand(text, values) for name, text in extra.items()}
        return environment.compose(self.given, from_files, injected, extra, without=activation.VARIABLES)

    def choose(self) -> handoff.Choice:
        """The hand-off for this request. Raises PortexecError when it cannot be had."""
        fd_only = ["--first-fd"] if self.chosen.first_fd is not None else []
        fd_only += ["--no-pid"] if self.chosen.no_pid else []
        guard_only = ["--remap"] if self.remap else []
        texts = [*self.chosen.command, *self.extra.values()]
        return handoff.choose(self.chosen.hand_off, self.specs, texts, self.first_fd, fd_only=fd_only, guard_only=guard_only)


class Launch:
    """A plan with all that is bound for it, which it owns until the command has it.

    `from_files` are the variables of the env files, `variables` the injected numbers; `first_fd` is the descriptor of the first
    listener, None if none is passed; `remap` goes from fixed numbers to ours.
    """

    __slots__ = ("bound", "choice", "first_fd", "from_files", "plan", "remap", "request", "variables")

    def __init__(
        self,
        request: Request,
        from_files: dict[str, str],
        choice: handoff.Choice,
        bound: sockets.Bound,
        plan: handoff.Plan,
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

    def hold(self, why: str) -> None:
        """Make it a launch with hand-off `hold`, in which the command inherits guards that give way to SO_REUSEADDR."""
        self.choice = handoff.Choice(handoff.HOLD, why)
        self.plan.kept = self.bound.guard_descriptors()
        self.bound.open_to_reusers()

    @property
    def supervision(self) -> Supervision | None:
        """What was asked of the parent; None where none has to stay, or the one of `guard` alone will do."""
        if self.choice.hand_off == handoff.GUARD and self.request.chosen.lifetime() == ["--kill-after"]:
            return None
        return self.request.supervision

    def plan_shell(self, script: str) -> handoff.Plan:
        """A plan for the shell to run this script, which has the templates and the environment but no listener."""
        values = handoff.template_values(self.bound.listeners, None)
        extra = {name: text for name, text in self.request.extra.items() if not templates.uses(text, "fd")}
        environment = self.request.environment(self.from_files, self.variables, extra, values)
        return handoff.Plan(SHELL, ["sh", "-c", templates.expand(script, values)], environment)


def prepare(chosen: options.Options) -> Launch:
    """Bind what was asked for and plan the command's start. Raises PortexecError, with nothing left bound."""
    request = Request(chosen)
    choice = request.choose()
    if choice.hand_off != handoff.FD and not sockets.LINUX:
        raise UsageError(
            "only Linux has a hand-off for commands that bind the number themselves",
            "use a server that takes a descriptor, as {fd} in its words",
        )
    if request.supervision is not None and not sockets.LINUX:
        raise UsageError(
            f"{chosen.lifetime()[0]} makes portexec stay as the parent, which it can on Linux only",
            "leave the options under Lifetime out",
        )
    if request.supervision is not None:
        request.supervision.require_possible(choice, request.specs)
    listening = choice.hand_off == handoff.FD
    bound = sockets.bind_all(request.specs, listening=listening, backlog=request.backlog)
    try:
        return _plan(request, choice, bound)
    except BaseException:
        bound.close()
        raise


def _plan(request: Request, choice: handoff.Choice, bound: sockets.Bound) -> Launch:
    first_fd = request.first_fd if choice.hand_off == handoff.FD else None
    variables = handoff.injected(bound.listeners)
    values = handoff.template_values(bound.listeners, first_fd)
    names = handoff.announced_names(choice, request.inherited, bound.listeners, request.lowest_fd)
    from_files = environment.read_env_files(request.chosen.env_file, request.given | variables)
    complete = request.environment(from_files, variables | activation.variables(names), request.extra, values)
    passed = handoff.descriptors(request.inherited, bound.listeners)
    _require_room(request.lowest_fd + len(passed))
    argv = [templates.expand(word, values) for word in request.chosen.command]
    plan = handoff.Plan(
        execute.find_command(argv[0], complete),
        argv,
        complete,
        passed=passed,
        first_fd=request.lowest_fd,
        kept=bound.guard_descriptors() if choice.hand_off == handoff.FD else (),  # `hold` adds its own below
        for_pid=bool(names) and not request.chosen.no_pid,
    )
    ports = {listener.name: listener.port for listener in bound.listeners}
    remap = {fixed: ports[name] for fixed, name in request.remap.items()}
    launch = Launch(request, from_files, choice, bound, plan, variables, first_fd, remap)
    if choice.hand_off == handoff.HOLD:
        launch.hold(choice.why)
    if request.supervision is not None and request.supervision.then:
        launch.plan_shell(request.supervision.then)  # refuses templates that it cannot have
    return launch


def _require_room(end: int) -> None:
    """Refuse descriptors that the limit does not allow, before anybody is told anything."""
    limit = os.sysconf("SC_OPEN_MAX")
    if end > limit > 0:
        raise PortexecError(f"descriptor {end - 1} is beyond the limit of {limit}", "raise it with `ulimit -n`")


def _split_assignment(text: str) -> tuple[str, str]:
    name, equals, template = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--env {text!r} sets nothing", "write --env NAME=VALUE, where VALUE may have templates: {port}")
    return name, template
