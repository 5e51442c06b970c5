"""A command that listens on another number than the one it was given: which numbers count, and how it gets the given one."""

from __future__ import annotations

from portexec import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_INSPECT = ("--inspect", "--inspect-brk", "--inspect-wait")
_INSPECTORS = range(9229, 9240)  # V8's first, and one more for each worker


def is_inner(port: int, host: str) -> bool:
    """Whether a listener is probably for the command itself: varnishd's for its child, a test's chromedriver, an inspector.

    Such a listener is on the loopback interface. The system chose its number, or V8's inspector has it (`node --inspect`).
    """
    return (host == "::1" or host.startswith("127.")) and (_is_ephemeral(port) or port in _INSPECTORS)


def inspected(words: Iterable[str]) -> set[int]:
    """The numbers that the words of a command give to the inspector of V8: `--inspect=9337`, `--inspect-brk=0.0.0.0:9229`."""
    given = (value for option, _, value in (word.partition("=") for word in words) if option in _INSPECT)
    return {int(port) for port in (value.rpartition(":")[2] for value in given) if port.isdecimal()}


def likeliest(found: Mapping[int, str]) -> list[int]:
    """Of the numbers on which a command listens, each with an address, those that are most probably its server's.

    Where there is no other, a number that is probably for the command itself will do. An inspector's is the last choice.
    """
    served = [port for port, host in found.items() if not is_inner(port, host)]
    return sorted(served or [port for port in found if port not in _INSPECTORS] or found)


def ways_from(other: int, *, is_named: bool, can_remap: bool = True, listener: str = "") -> str:
    """For a hint: how a command that takes the number `other` (0: any) gets the given one. Empty where there is no way.

    `is_named`: its words or variables have the given number. `can_remap`: its binds are seen, so they can be changed.
    `listener` is the name of the listener whose number the command should take, empty for the first.
    """
    ways = [] if is_named else [f"pass the number in its words as {{{listener and f'{listener}.'}port}}"]
    if can_remap and other and other not in _INSPECTORS and not _is_ephemeral(other):
        ways.append(f"replace its own with --remap {other}{listener and f'={listener}'}")
    return ", or ".join(ways)


def _is_ephemeral(port: int) -> bool:
    """Whether the system chose the number, and will choose another one the next time."""
    known = kernel.ephemeral_range()
    return known is not None and known[0] <= port <= known[1]
