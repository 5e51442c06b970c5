"""From what the user asked for to a launch that is ready to go: parse, bind, plan. Nobody else has been told anything yet."""

from __future__ import annotations

import os

from portexec import activation, environment, execute, handoff, options, sockets, spec, templates
from portexec.errors import PortexecError

_MAX_BACKLOG = 2**31 - 1
_MAX_FD = 2**20


class Request:
    """What was asked for, checked and parsed, before anything is bound.

    `lowest_fd` is the first descriptor of all that are passed; `first_fd` that of the first listener, which comes after the
    sockets that another activator handed to us (`inherited`, by name).
    """

    __slots__ = ("backlog", "chosen", "extra", "given", "inherited", "lowest_fd", "remap", "specs")

    def __init__(self, chosen: options.Options) -> None:
        self.chosen = chosen
        self.given = environment.given()
        self.inherited = activation.inherited(self.given)
        self.specs = spec.parse_listen(chosen.listen or [spec.DEFAULT])
        self.backlog = options.number(chosen.backlog, "--backlog", 0, _MAX_BACKLOG)
        self.lowest_fd = self._lowest_fd()
        self.remap = handoff.parse_remap(chosen.remap, self.specs)
        self.extra = dict(_split_assignment(text) for text in chosen.env)

    def _lowest_fd(self) -> int:
        if self.chosen.first_fd is None:
            return activation.FIRST_FD
        return options.number(self.chosen.first_fd, "--first-fd", 0, _MAX_FD)

    @property
    def first_fd(self) -> int:
        return self.lowest_fd + len(self.inherited)

    def choose(self) -> handoff.Choice:
        """The hand-off for this request. Raises PortexecError when it cannot be had."""
        fd_only = ["--first-fd"] if self.chosen.first_fd is not None else []
        fd_only += ["--no-pid"] if self.chosen.no_pid else []
        guard_only = ["--remap"] if self.remap else []
        texts = [*self.chosen.command, *self.extra.values()]
        return handoff.choose(self.chosen.hand_off, self.specs, texts, self.first_fd, fd_only=fd_only, guard_only=guard_only)


class Launch:
    """A plan with all that is bound for it, which it owns until the command has it.

    `variables` are the injected numbers; `first_fd` is the descriptor of the first listener, None if none is passed; `remap`
    goes from fixed numbers to ours.
    """

    __slots__ = ("bound", "choice", "first_fd", "plan", "remap", "variables")

    def __init__(
        self,
        choice: handoff.Choice,
        bound: sockets.Bound,
        plan: handoff.Plan,
        variables: dict[str, str],
        first_fd: int | None,
        remap: dict[int, int],
    ) -> None:
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


def prepare(chosen: options.Options) -> Launch:
    """Bind what was asked for and plan the command's start. Raises PortexecError, with nothing left bound."""
    request = Request(chosen)
    choice = request.choose()
    if choice.hand_off != handoff.FD and not sockets.LINUX:
        raise PortexecError(
            "only Linux has a hand-off for commands that bind the number themselves",
            "use a server that takes a descriptor, as {fd} in its words",
        )
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
    complete = environment.compose(
        request.given,
        environment.read_env_files(request.chosen.env_file, request.given | variables),
        variables | activation.variables(names),
        {name: templates.expand(text, values) for name, text in request.extra.items()},
        without=activation.VARIABLES,
    )
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
    launch = Launch(choice, bound, plan, variables, first_fd, remap)
    if choice.hand_off == handoff.HOLD:
        launch.hold(choice.why)
    return launch


def _require_room(end: int) -> None:
    """Refuse descriptors that the limit does not allow, before anybody is told anything."""
    limit = os.sysconf("SC_OPEN_MAX")
    if end > limit > 0:
        raise PortexecError(f"descriptor {end - 1} is beyond the limit of {limit}", "raise it with `ulimit -n`")


def _split_assignment(text: str) -> tuple[str, str]:
    name, equals, template = text.partition("=")
    if not equals or not name:
        raise PortexecError(f"--env {text!r} sets nothing", "write --env NAME=VALUE, where VALUE may have templates: {port}")
    return name, template
