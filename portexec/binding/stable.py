"""The candidates of `stable`: the same numbers each time for the same project, run and listener, and other ones for others.

They are computed, and nothing is probed. They are below the ephemeral range, where the kernel gives a number only to who asks
for it. Left out are 10080, which browsers refuse, and what /etc/services names.
"""

from __future__ import annotations

from portexec import kernel, project
from portexec.binding.spec import STABLE, ListenSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


HOW_MANY = 4  # the number itself, and neighbours for when it is taken
LOWEST = 10000
FEWEST = 1024  # numbers; where the ephemeral range leaves less, it is not respected
HIGHEST = 32767

_REFUSED_BY_BROWSERS = 10080  # fetch.spec.whatwg.org, port blocking; the others are lower
_SERVICES = "/etc/services"


def settled(
    specs: Sequence[ListenSpec], given_project: str | None, environment: Mapping[str, str], run: str = ""
) -> list[ListenSpec]:
    """The specs with the numbers that `stable` stands for. `run` is the name of the run. Raises PortexecError."""
    if not any(STABLE in spec.candidates for spec in specs):
        return list(specs)
    place = project.directory(given_project, environment)
    highest, taken = highest_number(kernel.ephemeral_range()), set(named_services(_read(_SERVICES)))
    return [
        spec.settled(candidates(project.digest(place, run, spec.name), highest, taken)) if STABLE in spec.candidates else spec
        for spec in specs
    ]


def candidates(digest: int, highest: int, taken: set[int]) -> tuple[int, ...]:
    """The numbers of a digest, in the order in which they are tried: it and the next ones."""
    count = highest - LOWEST + 1
    numbers = (LOWEST + (digest + step) % count for step in range(count))
    allowed = (number for number in numbers if number != _REFUSED_BY_BROWSERS and number not in taken)
    return tuple(number for number, _ in zip(allowed, range(HOW_MANY), strict=False))


def highest_number(ephemeral_range: tuple[int, int] | None) -> int:
    """The highest number that may be used, beside those that the kernel chooses by itself."""
    below = HIGHEST if ephemeral_range is None else ephemeral_range[0] - 1
    return below if below - LOWEST + 1 >= FEWEST else HIGHEST


def named_services(text: str) -> Iterator[int]:
    """The numbers that the text of /etc/services names."""
    for line in text.splitlines():
        fields = line.partition("#")[0].split()
        number = fields[1].partition("/")[0] if len(fields) > 1 else ""
        if number.isascii() and number.isdigit():
            yield int(number)


def passed_over(specs: Sequence[ListenSpec], ports: Sequence[int]) -> list[str]:
    """A line for each listener that got another number than its first stable one, with who has that number."""
    from portexec.binding import tables

    lines = []
    for spec, port in zip(specs, ports, strict=True):
        numbers = list(spec.numbers())
        if spec.stable and spec.stable[0] in numbers[: numbers.index(port) if port in numbers else None]:
            who = tables.who_has(spec.stable[0])
            whose = f" of {spec.name}" if spec.named else ""
            lines.append(f"the stable port{whose}, {spec.stable[0]}, is taken{f' ({who})' if who else ''}")
    return lines


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
