"""What was asked for, as values: all text becomes values here, once. Nothing is bound, started or written.

An error names the option that it is about, so that the Python API can name its argument instead.
"""

from __future__ import annotations

import fcntl
import os

from portexec.binding.listeners import MAX_BACKLOG
from portexec.binding.spec import DEFAULT, parse_listen
from portexec.command import activation, environment
from portexec.command.plan import FD, GUARD, Choice, choose, parse_remap
from portexec.errors import UnknownReady, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.options import Options

# What counts as ready.
LISTEN = "listen"  # the command listens: its listen(2) was admitted, or the kernel's list has a listener
ACCEPT = "accept"  # the command has accepted a connection of ours
HTTP = "http"  # a GET was answered with a status under 500
NOTIFY = "notify"  # the command said so itself, sd_notify(3)
NONE = "none"  # at once
READY_FORMS = (LISTEN, ACCEPT, HTTP, NOTIFY, NONE)

NO = "no"
ON_FAILURE = "on-failure"
ALWAYS = "always"
RESTARTS = (NO, ON_FAILURE, ALWAYS)

_KILL_AFTER = "5s"
_READY_TIMEOUT = "60s"
_MAX_FD = 2**20


class Ready:
    """What counts as ready: one of the forms, for `http` with a path, for `notify` with the name of its socket, or empty."""

    __slots__ = ("argument", "form")

    def __init__(self, form: str, argument: str = "") -> None:
        self.form = form
        self.argument = argument

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ready) and (self.form, self.argument) == (other.form, other.argument)

    __hash__ = None  # type: ignore[assignment]


class Lifetime:
    """What portexec is to do as the parent. Times are in seconds.

    `is_asked_for`: an option was given that makes portexec stay, other than --kill-after. `ready` is None where nobody said
    what counts: then the hand-off decides. `ready_timeout` is None where nobody waits. `kill_after` is the time from TERM to
    KILL for what a command leaves running, and `patience` the time that the command itself has, None for all it takes.
    """

    __slots__ = (
        "control_fd",
        "is_asked_for",
        "is_lazy",
        "kill_after",
        "patience",
        "ready",
        "ready_fd",
        "ready_timeout",
        "restart",
        "then",
    )

    def __init__(self, chosen: Options) -> None:
        """Raises UsageError for what cannot be meant."""
        given = chosen.lifetime()
        self.is_asked_for = given not in ([], ["--kill-after"])
        self.then = _parse_then(chosen.then)
        self.ready = _parse_ready(chosen.ready)
        self.ready_timeout = _parse_timeout(chosen)
        self.ready_fd = _parse_fd(chosen.ready_fd, "--ready-fd")
        self.control_fd = _parse_control_fd(chosen.control_fd)
        self.restart = _parse_restart(chosen.restart)
        self.is_lazy = chosen.lazy
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
        if form == HTTP and kinds[0] == "udp":
            raise UsageError("http asks the first listener, which is UDP", "list the TCP listener first", about="--ready")

    def ready_for(self, hand_off: str) -> Ready:
        """What counts as ready with this hand-off."""
        if self.ready is not None:
            return self.ready
        if self.ready_timeout is None and self.restart == NO:
            return Ready(NONE)
        return Ready(ACCEPT if hand_off == FD else LISTEN)

    def is_asked_for_with(self, hand_off: str) -> bool:
        """Whether there is a lifetime with this hand-off, so that nothing outlives the run.

        Else portexec merely waits for the command, as with plain `guard`; there --kill-after alone makes no lifetime.
        """
        return self.is_asked_for or (hand_off != GUARD and self.patience is not None)

    def stays(self, hand_off: str) -> bool:
        """Whether portexec is the parent of the command, with this hand-off."""
        return hand_off == GUARD or self.is_asked_for_with(hand_off)


class Request:
    """All that was asked for, before anything is bound.

    `lowest_fd` is the first descriptor of all that are passed; `first_fd` that of the first listener, which comes after the
    sockets that another activator handed to us (`inherited`, by name). `extra` are the templates of -e, by variable.
    """

    __slots__ = (
        "backlog",
        "chosen",
        "command",
        "extra",
        "given",
        "inherited",
        "lifetime",
        "lowest_fd",
        "remap",
        "specs",
    )

    def __init__(self, chosen: Options) -> None:
        """Raises UsageError for what cannot be meant."""
        self.chosen = chosen
        self.command = chosen.command
        self.given = environment.given()
        self.inherited = activation.inherited(self.given)
        self.specs = parse_listen(chosen.listen or [DEFAULT])
        self.backlog = number(chosen.backlog, "--backlog", 0, MAX_BACKLOG)
        fd = chosen.first_fd
        self.lowest_fd = activation.FIRST_FD if fd is None else number(fd, "--first-fd", 0, _MAX_FD)
        self.remap = parse_remap(chosen.remap, self.specs)
        self.extra = dict(_split_assignment(text) for text in chosen.env)
        self.lifetime = Lifetime(chosen)

    @property
    def first_fd(self) -> int:
        """The descriptor of the first listener, where descriptors are passed."""
        return self.lowest_fd + len(self.inherited)

    def choose(self) -> Choice:
        """The hand-off for this request. Raises UsageError when it cannot be had."""
        fd_only = ["--first-fd"] if self.chosen.first_fd is not None else []
        fd_only += ["--no-pid"] if self.chosen.no_pid else []
        guard_only = ["--remap"] if self.remap else []
        texts = [*self.command, *self.extra.values()]
        return choose(self.chosen.hand_off, self.specs, texts, self.first_fd, fd_only=fd_only, guard_only=guard_only)


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


def _parse_timeout(chosen: Options) -> float | None:
    is_waited_for = any(
        value is not None for value in (chosen.ready, chosen.ready_fd, chosen.control_fd, chosen.ready_timeout)
    ) or (chosen.then and not chosen.lazy)
    text = _READY_TIMEOUT if chosen.ready_timeout is None else chosen.ready_timeout
    return duration(text, "--ready-timeout") if is_waited_for else None


def _parse_then(text: str | None) -> str:
    if text is not None and text.strip() in ("", "--"):
        raise UsageError(
            "has an empty command", "write what is to run when the server is ready: --then 'npm test'", about="--then"
        )
    return text or ""


def _parse_ready(text: str | None) -> Ready | None:
    if text is None:
        return None
    form, colon, argument = text.partition(":")
    if form not in READY_FORMS or (colon and form not in (HTTP, NOTIFY)):
        raise UnknownReady(f"{text!r} is no known form", "one of listen, accept, http:PATH, notify, none", about="--ready")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise UsageError(f"{text!r} has a character that no request may have", "encode it, as %20 for a space", about="--ready")
    if form == HTTP:
        return Ready(HTTP, argument if argument.startswith("/") else f"/{argument}")
    if colon and not argument.startswith(("/", "@")):
        raise UsageError(f"{text!r} names no socket", "write an absolute path, or @ and an abstract name", about="--ready")
    return Ready(form, argument)


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
    return name, template
