"""Says what admission saw, once: where the command listens, and why it probably does not serve on its number."""

from __future__ import annotations

from portexec.admission.answer import Observer
from portexec.admission.elsewhere import is_inner, ways_from
from portexec.parent.loop import after
from portexec.say import say, some

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_OTHERS = 16
_PATIENCE = 2.0  # seconds that a command may listen elsewhere (a debugger, live reload) before it takes its own number


class Diagnosis(Observer):
    """Collects what happens and says what helps, on stderr."""

    def __init__(self, ports: Iterable[int], *, is_named: bool, quiet: bool, verbose: bool, inner: Iterable[int] = ()) -> None:
        self.ports = list(ports)
        self._is_named = is_named  # the command's words name a number of ours
        self.quiet = quiet
        self.verbose = verbose
        self._tried: dict[int, None] = {}  # the numbers that the command tried to have, in order; 0 for any
        self._serves = False  # on a number of ours
        self._knows = False  # it has listened on a number of ours, if only to see whether the number is free
        self._has_ring = False  # of io_uring, by which it may have tried to bind
        self._others: dict[int, bool] = {}  # other numbers on which it has listened, in order; whether it serves there
        self._inner = set(inner)  # numbers that are probably for programs of its own
        self.advised: set[str] = set()  # what people were told about that may help: "elsewhere", "never" or "background"
        self._said: set[object] = set()

    def tried(self, port: int) -> None:
        if len(self._tried) < _MAX_OTHERS:
            self._tried.setdefault(port)

    def listened(self, port: int, host: str) -> None:
        if port in self.ports:
            self._knows = True
        elif len(self._others) < _MAX_OTHERS:
            self._others.setdefault(port, False)
            if is_inner(port, host):
                self._inner.add(port)

    def listening(self, port: int, host: str) -> None:
        self._serves = True
        if self.verbose:
            shown = f"[{host}]" if ":" in host else host or "an address that could not be seen"
            self._say(("listening", port, host), f"the command listens on {shown}:{port}")

    def elsewhere(self, port: int) -> None:
        if port in self._others:
            self._others[port] = True
            after(_PATIENCE, self._tell_elsewhere)

    def opened_ring(self) -> None:
        self._has_ring = True

    def in_the_way(self, port: int, owner: str) -> None:
        self._say(
            ("in the way", owner),
            f"error: port {port} is shared by another listener: {owner}",
            "hint: the command's bind was refused; stop that process",
        )

    def not_clean(self, port: int) -> None:
        if self.verbose:
            self._say(
                ("not clean", port),
                f"note: while the command has all addresses of a family, its user's processes can share port {port} with",
                "note: SO_REUSEPORT; other users cannot",
            )

    def _tell_elsewhere(self) -> None:
        """Say that the command listens on another number than the one it was given: the first one on which it serves."""
        others = {port: serves for port, serves in self._others.items() if self._knows or port not in self._inner}
        if self._serves or self.quiet or not others:
            return
        other = max(others, key=others.__getitem__)  # of several that are equal, the first
        self._advise("elsewhere", f"note: the command listens on port {other}, not on {self._ports()}", *self._ways_from(other))

    def ended(self, status: int) -> None:
        """Say that a command which failed never took the number it was given, if it has to do with ports at all.

        It has if its words name the number, if it tried to bind one, or if it may have tried unseen, by io_uring.
        """
        if not self.ports or not status or self._knows or self.quiet:
            return
        if self._has_ring:
            from portexec.admission import rings

            self._has_ring = rings.can_bind()
        if not (self._is_named or self._tried or self._has_ring):
            return
        self._tell_elsewhere()
        if "elsewhere" not in self.advised:
            self._advise(
                "never",
                f"note: the command failed (status {status}) and never listened on port {self._ports()}",
                *self._ways_to_the_number(),
            )

    def _ways_to_the_number(self) -> list[str]:
        """A hint for a command that never listened on its number; none where it tried to."""
        if not self._tried and self._has_ring:
            return ["hint: the guard refuses a bind by io_uring, which portexec cannot see; --hand-off hold does not"]
        if not self._tried:
            return ["hint: see its output above; if another program binds for it, as docker's does, use --hand-off hold"]
        if any(port in self.ports for port in self._tried):
            return []
        return self._ways_from(next((port for port in self._tried if port), 0))

    def _ways_from(self, other: int) -> list[str]:
        ways = ways_from(other, is_named=self._is_named)
        return [f"hint: {ways}"] if ways else []

    def went_to_the_background(self) -> None:
        """Say what helps when a command has ended well, and the processes that it has started are about to be stopped."""
        if not self.quiet:
            self._advise(
                "background",
                "note: the command ended, so what it left running is stopped",
                "hint: a server that goes to the background has to stay in front: use its foreground mode",
            )

    def _ports(self) -> str:
        return some([*map(str, self.ports)])

    def _advise(self, about: str, *lines: str) -> None:
        """Say once in a run what may help."""
        if about not in self.advised:
            self.advised.add(about)
            say(*lines)

    def _say(self, key: object, *lines: str) -> None:
        if key not in self._said:
            self._said.add(key)
            say(*lines)
