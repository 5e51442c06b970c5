"""From a request to a launch that is ready to go: bind, plan. Nothing is published yet."""

from __future__ import annotations

import os
import sys

from portexec.binding.listeners import Bound, Listener, bind_all
from portexec.command import activation, execute
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
from portexec.errors import CloseOnError, CommandNotFound, PortexecError, UsageError
from portexec.request import HTTPS, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from portexec.command.undo import Undo

SHELL = "/bin/sh"


class Launch:
    """A plan, and all that is bound for it. It owns what is bound until the command gets it. It does not change.

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

    def advice_after_early_end(self) -> str:
        """What may help a server that ended before it was ready; empty for most."""
        return _quote_it(self.request) or self.how_to_take()

    def how_to_take(self) -> str:
        """A hint for a command that does not take the sockets it gets; empty where its words name them, or it gets none.

        It is for later: some commands find the sockets by LISTEN_FDS, so that we cannot know at the start.
        """
        if self.first_fd is None or self.choice.named:
            return ""
        can_bind = self.choice.is_final and all(spec.kind == "tcp" for spec in self.request.specs)
        other = "; leave --hand-off out if it binds the number itself" if can_bind else ""
        take = f"the command has to take descriptor {self.first_fd}, {{fd}} in its words"
        return f"with hand-off fd portexec listens, and {take}{other}"

    def hidden_number(self) -> str:
        """A note where a variable of the user's own hides a number of ours; empty for most."""
        for name, number in self.variables.items():
            value = self.plan.environment.get(name, number)
            is_other = value.isdecimal() and value not in self.variables.values() and int(value) not in self.remap
            if is_other and number != "0":  # 0 is the number of a unix socket
                return f"-e sets {name} to {value}, and portexec has {number}; -l {value} asks for {value}"
        return ""

    def plan_shell(self, script: str, listeners: Sequence[Listener]) -> Plan:
        """A plan for the shell to run this script, with the templates and variables of these listeners, but no socket."""
        from portexec.command import templates

        values = template_values(listeners, None)
        extra = {name: text for name, text in self.request.extra.items() if not templates.uses(text, "fd")}
        variables = _compose(self.request, self.from_files, self.variables, extra, values)
        return Plan(SHELL, ["sh", "-c", templates.expand(script, values)], variables)


def prepare(request: Request, undo: Undo) -> Launch:
    """Bind the listeners and plan the command's start. Raises PortexecError, with nothing left bound.

    What is made in the file system is recorded in `undo`.
    """
    return plan(request, *bind(request, undo), {})


def bind(request: Request, undo: Undo) -> tuple[Choice, Bound]:
    """The first half of `prepare`."""
    choice = request.choose()
    if sys.platform != "linux":
        _require_possible_elsewhere(request, choice)
    request.lifetime.require_possible(choice, [spec.kind for spec in request.specs])
    bound = bind_all(
        request.specs,
        listening=choice.hand_off == FD,
        backlog=request.backlog,
        socket_mode=request.socket_mode,
        undo=undo,
    )
    with CloseOnError(bound):
        if request.lifetime.is_first_over_tls():
            bound.listeners[0] = bound.listeners[0].changed(scheme=HTTPS)
        if request.host:
            from portexec.binding.known_as import known_as

            bound.listeners = known_as(bound.listeners, request.host)
    return choice, bound


def plan(request: Request, choice: Choice, bound: Bound, others: Mapping[str, str]) -> Launch:
    """The other half of `prepare`. `others` are values of further templates, which name other servers."""
    with CloseOnError(bound):
        return _plan(request, choice, bound, others)


def give_back(launch: Launch | None, undo: Undo) -> None:
    """Close what is bound, and undo what was made.

    In this order: undoing has to look at files, which takes a free descriptor. So does importing the modules for the message.
    """
    try:
        if launch is not None:
            launch.bound.close()
    except OSError:
        pass  # they were moved for the command already
    try:
        undo.run()
    except OSError:
        pass  # even now there is no descriptor


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


def _plan(request: Request, choice: Choice, bound: Bound, others: Mapping[str, str]) -> Launch:
    first_fd = request.first_fd if choice.hand_off == FD else None
    variables = injected(bound.listeners)
    values = {**others, **template_values(bound.listeners, first_fd)}
    names = announced_names(choice, request.inherited, bound.listeners, request.lowest_fd)
    from_files = _read_env_files(request, variables) if request.chosen.env_file else {}
    complete = _compose(request, from_files, variables | activation.variables(names), request.extra, values)
    passed = descriptors(request.inherited, bound.listeners)
    _require_room(request.lowest_fd + len(passed))
    argv = [_expand(word, values) for word in request.command]
    plan = Plan(
        _find_command(request, argv[0], complete),
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
        launch.plan_shell(request.lifetime.then, bound.listeners)  # raises UsageError for templates without a value
    return launch


def _find_command(request: Request, name: str, environment: Mapping[str, str]) -> str:
    try:
        return execute.find_command(name, environment, request.command[0])
    except CommandNotFound as error:
        raise CommandNotFound(error.message, _quote_it(request) or error.hint) from error


def _quote_it(request: Request) -> str:
    quoted = request.chosen.quotes_for_then()
    return quoted and f"if the words before -- belong to --then, quote them: --then {quoted}"


def _expand(text: str, values: Mapping[str, str]) -> str:
    """Replace the templates of a text. What that takes is imported only for a text that may have some."""
    if "{" not in text:
        return text
    from portexec.command import templates

    return templates.expand(text, values)


def _read_env_files(request: Request, variables: dict[str, str]) -> dict[str, str]:
    from portexec.command import env_files

    known = request.given | variables
    return env_files.read(request.chosen.env_file, known, is_quiet=request.chosen.quiet, driver=request.lifetime.control_fd)


def _compose(
    request: Request,
    from_files: Mapping[str, str],
    variables: Mapping[str, str],
    extra: Mapping[str, str],
    values: Mapping[str, str],
) -> dict[str, str]:
    """The whole environment of a command. The later wins: env files, what we were given, our variables, what the user set.

    In what the user set templates are replaced. What an activator has told us is stale, and is left out.
    """
    merged = {**from_files, **request.given}
    for name in activation.VARIABLES:
        merged.pop(name, None)
    return {**merged, **variables, **{name: _expand(text, values) for name, text in extra.items()}}


def _require_room(end: int) -> None:
    """Refuse descriptors that the limit does not allow, before anything is published."""
    limit = os.sysconf("SC_OPEN_MAX")
    if end > limit > 0:
        raise PortexecError(f"descriptor {end - 1} is beyond the limit of {limit}", "raise it with `ulimit -n`")
