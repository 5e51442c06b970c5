"""What admission saw, in words, once: where the command listens, and why it probably does not serve where it was to."""

from __future__ import annotations

from portexec.admission.answer import Observer
from portexec.parent.loop import after
from portexec.say import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_MAX_OTHERS = 16
_PATIENCE = 2.0  # seconds that a command may listen elsewhere (a debugger, live reload) before it takes its own number


class Diagnosis(Observer):
    """Collects what happens and says what helps, on stderr."""

    def __init__(self, ports: Iterable[int], *, quiet: bool, verbose: bool) -> None:
        self.ports = list(ports)
        self.quiet = quiet
        self.verbose = verbose
        self._serves = False  # on a number of ours
        self._knows = False  # a number of ours: it has listened there, if only to look whether it is free
        self._others: dict[int, bool] = {}  # other numbers on which it has listened, in order; whether it serves there
        self._said: set[object] = set()

    def listened(self, port: int) -> None:
        if port in self.ports:
            self._knows = True
        elif len(self._others) < _MAX_OTHERS:
            self._others.setdefault(port, False)

    def listening(self, port: int, host: str) -> None:
        self._serves = True
        if self.verbose:
            shown = f"[{host}]" if ":" in host else host or "an address that could not be seen"
            self._say(("listening", port, host), f"the command listens on {shown}:{port}")

    def elsewhere(self, port: int) -> None:
        if port in self._others:
            self._others[port] = True
            after(_PATIENCE, self._tell_elsewhere)

    def in_the_way(self, port: int, owner: str) -> None:
        self._say(
            ("in the way", owner),
            f"error: port {port} is shared by another listener: {owner}",
            "hint: the command's bind was refused; stop that process, which runs as the same user",
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
        if self._serves or self.quiet or not self._others:
            return
        other = max(self._others, key=self._others.__getitem__)  # of several that are equal, the first
        remap = "" if _is_ephemeral(other) else f", or take its own with --remap {other}"
        self._say(
            "elsewhere",
            f"note: the command listens on port {other}, not on {self._ports()}",
            f"hint: pass the number in its words as {{port}}{remap}",
        )

    def ended(self, status: int) -> None:
        """Say that a command which failed never took the number it was given."""
        if not self.ports or not status or self._knows or self.quiet:
            return
        self._tell_elsewhere()
        if "elsewhere" not in self._said:
            self._say(
                "never",
                f"note: the command failed (status {status}) and never listened on port {self._ports()}",
                "hint: if it should have: does it read $PORT? {port} passes the number, --remap 8000 replaces a",
                "hint: fixed one, and --hand-off hold is for servers elsewhere, such as docker's",
            )

    def _ports(self) -> str:
        return ", ".join(map(str, self.ports))

    def _say(self, key: object, *lines: str) -> None:
        if key not in self._said:
            self._said.add(key)
            say(*lines)


def _is_ephemeral(port: int) -> bool:
    """Whether the system chose the number, and will choose another one the next time."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            lowest, highest = map(int, file.read().split())
    except (OSError, ValueError):
        return False
    return lowest <= port <= highest
