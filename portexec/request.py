"""What was asked for, as values: all text becomes values here, once. Nothing is bound, started or written.

An error names the option that it is about, so that the Python API can name its argument instead.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys

from portexec.binding.listeners import MAX_BACKLOG
from portexec.binding.spec import DEFAULT, STABLE, ListenSpec, parse_listen
from portexec.command import activation
from portexec.command.plan import FD, GUARD, Choice, choose, parse_remap
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from portexec.options import Options

# What counts as ready.
LISTEN = "listen"  # the command listens: its listen(2) was admitted, or the kernel's list has a listener
ACCEPT = "accept"  # the command has accepted a connection of ours
HTTP = "http"  # a GET was answered: with a status under 500, where a path was given with 2xx or 3xx
HTTPS = "https"  # the same over TLS
NOTIFY = "notify"  # the command said so itself, sd_notify(3)
NONE = "none"  # at once
READY_FORMS = (LISTEN, ACCEPT, HTTP, HTTPS, NOTIFY, NONE)
WEB_FORMS = (HTTP, HTTPS)

NO = "no"
ON_FAILURE = "on-failure"
ALWAYS = "always"
RESTARTS = (NO, ON_FAILURE, ALWAYS)

_KNOWN_FORMS = "one of listen, accept, http, http:PATH, https, https:PATH, notify, none"
_INSTEAD = {
    "--then": "run the tests after it, then `portexec --stop NAME`; or leave --detach out",
    "--ready-fd": "it ends when the command is ready, and prints the address",
    "--control-fd": "leave one of the two out",
}
_KILL_AFTER = "5s"
_READY_TIMEOUT = "60s"
_MAX_FD = 2**20
_MAX_MODE = 0o777


class Ready:
    """What counts as ready: one of the forms, for `http` and `https` with a path, for `notify` with the name of its socket, or
    empty.
    """

    __slots__ = ("argument", "form")

    def __init__(self, form: str, argument: str = "") -> None:
        self.form = form
        self.argument = argument

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ready) and (self.form, self.argument) == (other.form, other.argument)

    __hash__ = None  # type: ignore[assignment]


class Lifetime:
    """What portexec is to do as the parent. Times are in seconds.

    `is_asked_for`: an option other than --kill-after was given that makes portexec stay. `ready` is None without --ready: then
    the hand-off decides. `ready_timeout` is None where nothing waits for readiness. `kill_after` is the time from TERM to KILL
    for processes that a command leaves running. `patience` is that time for the command itself, None for no limit.
    """

    __slots__ = (
        "control_fd",
        "is_asked_for",
        "is_lazy",
        "is_named",
        "kill_after",
        "log",
        "patience",
        "ready",
        "ready_fd",
        "ready_timeout",
        "restart",
        "then",
    )

    def __init__(self, chosen: Options) -> None:
        """Raises UsageError."""
        given = chosen.lifetime()
        self.is_asked_for = given not in ([], ["--kill-after"])
        self.is_named = chosen.name is not None
        self.then = _parse_then(chosen.then)
        self.ready = _parse_ready(chosen.ready)
        self.ready_timeout = _parse_timeout(chosen)
        self.ready_fd = _parse_fd(chosen.ready_fd, "--ready-fd")
        self.control_fd = _parse_control_fd(chosen.control_fd)
        self.restart = _parse_restart(chosen.restart)
        self.is_lazy = chosen.lazy
        self.log = _parse_log(chosen.log)
        self.kill_after = duration(_KILL_AFTER if chosen.kill_after is None else chosen.kill_after, "--kill-after")
        self.patience = self.kill_after if given else None

    def require_possible(self, choice: Choice, kinds: list[str]) -> None:
        """Raise UsageError where this hand-off, or listeners of these kinds, cannot do what was asked."""
        form = self.ready.form if self.ready else ""
        if self.is_lazy and choice.hand_off != FD:
            raise UsageError(
                f"needs hand-off fd: with {choice.hand_off} ({choice.why}) nobody listens before the command runs",
                "name the descriptor in the command as {fd}, or say -H fd if it reads LISTEN_FDS",
                about="--lazy",
            )
        if form == LISTEN and choice.hand_off == FD:
            raise UsageError(
                "listen says nothing with hand-off fd: its sockets listen before the command runs",
                "--ready accept waits until the command takes connections",
                about="--ready",
            )
        if form in (LISTEN, ACCEPT) and set(kinds) == {"udp"}:
            raise UsageError(
                f"{form} needs a listener that takes connections, and UDP has none",
                "use --ready notify or none",
                about="--ready",
            )
        if form in WEB_FORMS and kinds[0] == "udp":
            raise UsageError(f"{form} asks the first listener, which is UDP", "list the TCP listener first", about="--ready")
        if form in WEB_FORMS and not any(finder.find_spec("h11", None) for finder in sys.meta_path):
            raise UsageError(f"{form} needs the package h11, which is not there", "install h11", about="--ready")

    def is_first_over_tls(self) -> bool:
        """Whether the first listener is known to speak TLS: `--ready https` asks it so."""
        return self.ready is not None and self.ready.form == HTTPS

    def ready_for(self, hand_off: str) -> Ready:
        """What counts as ready with this hand-off."""
        if self.ready is not None:
            return self.ready
        if self.ready_timeout is None and self.restart == NO and not self.is_named:
            return Ready(NONE)  # nothing waits for readiness
        return Ready(ACCEPT if hand_off == FD else LISTEN)

    def is_asked_for_with(self, hand_off: str) -> bool:
        """Whether the run has a lifetime with this hand-off, so that nothing outlives it.

        Otherwise portexec merely waits for the command, as with plain `guard`. With `guard`, --kill-after alone makes no
        lifetime.
        """
        return self.is_asked_for or (hand_off != GUARD and self.patience is not None)

    def stays(self, hand_off: str) -> bool:
        """Whether portexec is the parent of the command, with this hand-off."""
        return hand_off == GUARD or self.is_asked_for_with(hand_off)


class Request:
    """All that was asked for, before anything is bound.

    `lowest_fd` is the lowest of the descriptors that are passed. `first_fd` is the first listener's, which comes after the
    sockets that another activator handed to us (`inherited`, by name). `extra` are the templates of -e, by variable. `name` is
    that of the run, empty for none. `host` is the value of --host, empty for none.
    """

    __slots__ = (
        "backlog",
        "chosen",
        "command",
        "extra",
        "given",
        "host",
        "inherited",
        "lifetime",
        "lowest_fd",
        "name",
        "remap",
        "socket_mode",
        "specs",
    )

    def __init__(self, chosen: Options, given: dict[str, str] | None = None) -> None:
        """`given` is an environment instead of this process's own. Raises UsageError."""
        self.chosen = chosen
        self.command = chosen.command
        self.given = _own_environment() if given is None else given
        self.inherited = activation.inherited(self.given)
        self.name = _parse_name(chosen)
        self.specs = self._specs()
        self.host = _parse_host(chosen.host)
        self.backlog = number(chosen.backlog, "--backlog", 0, MAX_BACKLOG)
        self.socket_mode = _parse_mode(chosen.socket_mode, self.specs)
        fd = chosen.first_fd
        self.lowest_fd = activation.FIRST_FD if fd is None else number(fd, "--first-fd", 0, _MAX_FD)
        self.remap = parse_remap(chosen.remap, self.specs)
        self.extra = dict(_split_assignment(text) for text in chosen.env)
        self.lifetime = Lifetime(chosen)

    def _specs(self) -> list[ListenSpec]:
        specs = parse_listen(self.chosen.listen or [DEFAULT])
        if not any(STABLE in spec.candidates for spec in specs):
            return specs
        from portexec.binding import stable

        return stable.settled(specs, self.chosen.project, self.given, self.name)

    @property
    def first_fd(self) -> int:
        """The descriptor of the first listener, where descriptors are passed."""
        return self.lowest_fd + len(self.inherited)

    def choose(self) -> Choice:
        """The hand-off for this request. Raises UsageError when it cannot be had."""
        fd_only = ["--first-fd"] if self.chosen.first_fd is not None else []
        fd_only += ["--no-pid"] if self.chosen.no_pid else []
        guard_only = ["--remap"] if self.remap else []
        return choose(self.chosen.hand_off, self.specs, self._texts(), self.first_fd, fd_only=fd_only, guard_only=guard_only)

    def names_port(self) -> bool:
        """Whether words or variables of the command have a number of ours, or take the place of one."""
        from portexec.command import templates

        return bool(self.remap) or any(templates.uses(text, field) for text in self._texts() for field in templates.FIELDS)

    def _texts(self) -> list[str]:
        """All that may have templates."""
        return [*self.command, *self.extra.values()]


def _own_environment() -> dict[str, str]:
    """The environment that this process was started with.

    In the C locale Python sets LC_CTYPE at its start (PEP 538), which the command must not see. The value before that is in
    /proc/self/environ.
    """
    environment = {name: value for name, value in os.environ.items() if name}
    if environment.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        _restore(environment, "LC_CTYPE")
    return environment


def _restore(environment: MutableMapping[str, str], name: str) -> None:
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return
    prefix = os.fsencode(name) + b"="
    values = [entry[len(prefix) :] for entry in entries if entry.startswith(prefix)]
    if values:
        environment[name] = os.fsdecode(values[0])
    else:
        del environment[name]


def number(text: str, option: str, lowest: int, highest: int) -> int:
    """The value of a numeric option. Raises UsageError when it is none or out of range."""
    if text.isascii() and text.isdigit() and len(text) < 12 and lowest <= int(text) <= highest:
        return int(text)
    raise UsageError(
        f"{text!r} is not a number from {lowest} to {highest}", f"write a number, or leave {option} out", about=option
    )


def duration(text: str, option: str) -> float:
    """The seconds in `5s`, `500ms`, `2m`, `1.5` (seconds). Raises UsageError when it is not a duration."""
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        amount = text.removesuffix(unit)
        if text.endswith(unit) and amount.isascii() and amount.replace(".", "", 1).isdigit():
            return float(amount) * seconds
    raise UsageError(f"{text!r} is no duration", "write a number and a unit: 500ms, 5s, 2m", about=option)


def _parse_host(text: str | None) -> str:
    if text is None:
        return ""
    from portexec.binding.known_as import require_host

    return require_host(text)


def _parse_mode(text: str | None, specs: Sequence[ListenSpec]) -> int | None:
    """An octal mode, as chmod(1) takes it. To connect to a unix socket takes the right to write to it, unix(7)."""
    if text is None:
        return None
    if not (text and len(text) <= 4 and set(text) <= set("01234567") and int(text, 8) <= _MAX_MODE):
        raise UsageError(
            f"{text!r} is no mode", "write an octal number, such as 660 for owner and group", about="--socket-mode"
        )
    if not int(text, 8) & stat.S_IWUSR:
        raise UsageError(
            f"{text} does not let the owner connect, which takes the right to write",
            "write 600 for the owner alone, 660 for the group too",
            about="--socket-mode",
        )
    if not any(spec.kind == "unix" and not spec.address.startswith("@") for spec in specs):
        raise UsageError("is for unix sockets with a path", "add one with -l unix:PATH", about="--socket-mode")
    return int(text, 8)


def _parse_timeout(chosen: Options) -> float | None:
    is_waited_for = any(
        value is not None for value in (chosen.ready, chosen.ready_fd, chosen.control_fd, chosen.ready_timeout)
    ) or (chosen.then and not chosen.lazy)
    text = _READY_TIMEOUT if chosen.ready_timeout is None else chosen.ready_timeout
    return duration(text, "--ready-timeout") if is_waited_for else None


def require_companions(chosen: Options) -> None:
    """Raise UsageError for an option that means nothing without another option, which was not given."""
    is_named = chosen.name is not None
    for given, option, needed, is_there in (
        (chosen.detach, "--detach", "--name NAME", is_named),
        (chosen.reuse, "--reuse", "--detach" if is_named else "--detach --name NAME", chosen.detach),
        (chosen.all, "--all", "--stop", False),
        (chosen.follow, "--follow", "--logs NAME", False),
    ):
        if given and not is_there:
            raise UsageError(f"needs {needed}", f"write {needed} {option}", about=option)


def _parse_name(chosen: Options) -> str:
    require_companions(chosen)
    for option, value in (("--then", chosen.then), ("--ready-fd", chosen.ready_fd), ("--control-fd", chosen.control_fd)):
        if chosen.detach and value is not None:
            raise UsageError(f"cannot go with {option}", _INSTEAD[option], about="--detach")
    if chosen.name is None:
        return ""
    from portexec.names.naming import require_name

    return require_name(chosen.name)


def _parse_then(text: str | None) -> str:
    if text is not None and not text.strip():
        raise UsageError(
            "has an empty command", "write what is to run when the server is ready: --then 'npm test'", about="--then"
        )
    return text or ""


def _parse_ready(text: str | None) -> Ready | None:
    if text is None:
        return None
    form, colon, argument = text.partition(":")
    if form not in READY_FORMS or (colon and form not in (*WEB_FORMS, NOTIFY)):
        from portexec.server_errors import UnknownReady

        hint = f"write http:{text}" if text.startswith("/") else _KNOWN_FORMS
        raise UnknownReady(f"{text!r} is no known form", hint, about="--ready")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise UsageError(f"{text!r} has a character that no request may have", "encode it, as %20 for a space", about="--ready")
    if colon and not argument and form in WEB_FORMS:
        raise UsageError(f"{text!r} has no path", f"write {form} alone, or {form}:/", about="--ready")
    if form in WEB_FORMS:
        return Ready(form, _parse_path(text, form, argument))
    if colon and not argument.startswith(("/", "@")):
        raise UsageError(f"{text!r} names no socket", "write an absolute path, or @ and an abstract name", about="--ready")
    return Ready(form, argument)


def _parse_path(text: str, form: str, argument: str) -> str:
    """The path of `http:PATH`, which begins with a slash; empty where there is none."""
    if not argument or (argument.startswith("/") and not argument.startswith("//")):
        return argument
    before, _, rest = argument.partition("/")
    if rest.startswith("/") and (not before or before.endswith(":")):
        why, path = "is a URL, and takes a path alone", rest[1:].partition("/")[2]
    elif ":" in before or before.replace(".", "").isdigit() or before == "localhost":
        why, path = "has an address, and takes a path alone", rest
    else:
        why, path = "has a path that does not begin with a slash", argument
    raise UsageError(f"{text!r} {why}", f"write {form}:/{path}", about="--ready")


def _parse_fd(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    fd = number(text, option, 0, _MAX_FD)
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        raise UsageError(
            f"{fd}: this descriptor is not open",
            f"open it in the shell: portexec {option} {fd} ... {fd}>FILE",
            about=option,
        ) from None
    if mode == os.O_RDONLY:
        raise UsageError(f"{fd}: this descriptor is open for reading only", "open it for writing", about=option)
    return fd


def _parse_control_fd(text: str | None) -> int | None:
    if text is None:
        return None
    from portexec import control

    fd = number(text, "--control-fd", 0, _MAX_FD)
    if why := control.why_not(fd):
        raise UsageError(f"{fd}: {why}", "give it one end of a socketpair(2)", about="--control-fd")
    return fd


def _parse_log(text: str | None) -> str | None:
    if text == "-":
        raise UsageError(
            "takes a file, and - is none",
            "leave it out: the command writes to portexec's own stdout and stderr; ./- is a file of that name",
            about="--log",
        )
    return text


def _parse_restart(text: str | None) -> str:
    if text is not None and text not in RESTARTS:
        raise UsageError(f"{text!r} is not known", f"one of {', '.join(RESTARTS)}", about="--restart")
    return text or NO


def _split_assignment(text: str) -> tuple[str, str]:
    name, equals, template = text.partition("=")
    if not equals or not name:
        raise UsageError(
            f"{text!r} sets nothing", "write --env NAME=VALUE, where VALUE may have templates: {port}", about="--env"
        )
    if name[0].isdigit() or any(map(str.isspace, name)):
        raise UsageError(
            f"{name!r} is no name of a variable", "a name has no spaces, and its first character is no digit", about="--env"
        )
    return name, template
