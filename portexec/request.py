"""What was asked of the parent: `--then`, readiness, restarts. From text to a `Supervision`."""

from __future__ import annotations

import fcntl
import os

from portexec import options
from portexec.command import plan as handoff
from portexec.errors import UnknownReady, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from portexec.binding.spec import ListenSpec

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

_DEFAULT_TIMEOUT = "60s"
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


class Supervision:
    """What portexec is to do as the parent. Times are in seconds.

    `ready` is None where nobody said what counts: then the hand-off decides. `ready_timeout` is None where nobody waits.
    `is_killed`: `kill_after` was asked for, and so it also ends the patience with a command that was told to stop.
    """

    __slots__ = ("control_fd", "is_killed", "is_lazy", "kill_after", "ready", "ready_fd", "ready_timeout", "restart", "then")

    def __init__(self, chosen: options.Options) -> None:
        """Raises UsageError for what cannot be meant."""
        self.then = _parse_then(chosen.then)
        self.ready = _parse_ready(chosen.ready)
        self.ready_timeout = self._parse_timeout(chosen)
        self.ready_fd = _parse_fd(chosen.ready_fd, "--ready-fd")
        self.control_fd = _parse_fd(chosen.control_fd, "--control-fd")
        self.restart = _parse_restart(chosen.restart)
        self.is_lazy = chosen.lazy
        self.kill_after = options.kill_after(chosen)
        self.is_killed = chosen.kill_after is not None

    def _parse_timeout(self, chosen: options.Options) -> float | None:
        is_waited_for = any(
            value is not None for value in (chosen.ready, chosen.ready_fd, chosen.control_fd, chosen.ready_timeout)
        ) or (chosen.then and not chosen.lazy)
        text = _DEFAULT_TIMEOUT if chosen.ready_timeout is None else chosen.ready_timeout
        return options.duration(text, "--ready-timeout") if is_waited_for else None

    def require_possible(self, choice: handoff.Choice, specs: Sequence[ListenSpec]) -> None:
        """Raise UsageError where this hand-off, or these listeners, cannot do what was asked."""
        form = self.ready.form if self.ready else ""
        if self.is_lazy and choice.hand_off != handoff.FD:
            raise UsageError(
                f"--lazy needs hand-off fd: with {choice.hand_off} ({choice.why}) nobody listens before the command runs",
                "name the descriptor in the command as {fd}, or say -H fd if it reads LISTEN_FDS",
            )
        if form == LISTEN and choice.hand_off == handoff.FD:
            raise UsageError(
                "--ready listen says nothing with hand-off fd: its sockets listen before the command runs",
                "--ready accept waits until the command takes connections",
            )
        if form in (LISTEN, ACCEPT) and all(spec.kind == "udp" for spec in specs):
            raise UsageError(
                f"--ready {form} needs a listener that takes connections, and UDP has none", "use --ready notify or none"
            )
        if form == HTTP and specs[0].kind == "udp":
            raise UsageError("--ready http asks the first listener, which is UDP", "list the TCP listener first")

    def ready_for(self, hand_off: str) -> Ready:
        """What counts as ready with this hand-off."""
        if self.ready is not None:
            return self.ready
        if self.ready_timeout is None and self.restart == NO:
            return Ready(NONE)
        return Ready(ACCEPT if hand_off == handoff.FD else LISTEN)


def _parse_then(text: str | None) -> str:
    if text is not None and text.strip() in ("", "--"):
        raise UsageError("--then has an empty command", "write what is to run when the server is ready: --then 'npm test'")
    return text or ""


def _parse_ready(text: str | None) -> Ready | None:
    if text is None:
        return None
    form, colon, argument = text.partition(":")
    if form not in READY_FORMS or (colon and form not in (HTTP, NOTIFY)):
        raise UnknownReady(f"--ready {text!r} is no known form", "one of listen, accept, http:PATH, notify, none")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise UsageError(f"--ready {text!r} has a character that no request may have", "encode it, as %20 for a space")
    if form == HTTP:
        return Ready(HTTP, argument if argument.startswith("/") else f"/{argument}")
    if colon and not argument.startswith(("/", "@")):
        raise UsageError(f"--ready {text!r} names no socket", "write an absolute path, or @ and an abstract name")
    return Ready(form, argument)


def _parse_fd(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    fd = options.number(text, option, 0, _MAX_FD)
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        raise UsageError(
            f"{option} {fd}: this descriptor is not open",
            f"open it in the shell: portexec {option} {fd} ... {fd}>FILE",
        ) from None
    if mode == os.O_RDONLY:
        raise UsageError(f"{option} {fd}: this descriptor is open for reading only", "open it for writing")
    return fd


def _parse_restart(text: str | None) -> str:
    if text is not None and text not in RESTARTS:
        raise UsageError(f"--restart {text!r} is not known", f"one of {', '.join(RESTARTS)}")
    return text or NO
