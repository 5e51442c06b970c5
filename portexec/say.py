"""Every line of portexec's own, to stderr: written in one piece, and without characters that could control a terminal.

Answers to questions (`--list`, `--help`) go to stdout. Without memory, cli.py writes its last words itself.

Text from elsewhere (names of processes and files, arguments) can have control characters. They are shown as `\\x1b` or `\\n`,
so that a file name cannot control another user's terminal, or fake a second line.

Colours are for the words `error` and `hint`, for addresses, and for the names in a table. No meaning depends on them.
"""

from __future__ import annotations

import _signal
import os
import sys

from portexec.errors import PortexecError, escaped, reason
from portexec.kernel import STDERR, STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PATIENCE = 1000  # milliseconds
# Colours, as parameters of SGR; console_codes(4).
ERROR = "1;31"
HINT = "1;36"
ADDRESS = "36"
NAME = "1"

_PREFIX = "portexec: "
_MOMENTS = (5, 15, 30, 60)  # seconds after which a person is told what we wait for; then each minute
_SHOWN = 5  # of many names or numbers, so many are shown
_PIPE_BUF = 512  # bytes that a writable pipe takes without blocking on every system; pipe(7)
_ADDRESSES = ("http://", "https://", "udp://", "unix:")  # beginnings of addresses
_BUG = "error: this is a bug in portexec; please report it with the lines above"


def say(*lines: str) -> None:
    """Write these lines, each after `portexec: `, in one piece. A stderr that is closed or full is no error.

    We wait for room for a second at most, since a parent has to hear signals. After that the lines are dropped.
    """
    shown: Sequence[str] = [escaped(line) for line in lines]
    if has_colours(STDERR):
        shown = [_coloured(line) for line in shown]
    _write("".join(f"{_PREFIX}{line}\n" for line in shown))


def some(words: Sequence[str]) -> str:
    """These words, separated by commas. Of many words, the first ones, and how many others there are."""
    shown = ", ".join(words[:_SHOWN])
    return f"{shown} and {len(words) - _SHOWN} more" if len(words) > _SHOWN else shown


def say_error(error: PortexecError) -> None:
    """Write an error, and its hint."""
    say(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []))


def say_output(title: str, lines: Sequence[str]) -> None:
    """Write a title of ours, and below it lines that another program wrote."""
    shown = "".join("\t".join(map(escaped, line.split("\t"))) + "\n" for line in lines)
    _write(f"{_PREFIX}{escaped(title)}\n{shown}")


def say_again(lines: Sequence[str]) -> None:
    """Write lines that another portexec has written to a log."""
    say(*(line.removeprefix(_PREFIX) for line in lines))


def is_own(line: str) -> bool:
    """Whether this line is an error, a note or a hint of a portexec."""
    return line.startswith(tuple(f"{_PREFIX}{kind}: " for kind in ("error", "note", "hint")))


def say_bug(error: BaseException) -> str:
    """Write the traceback of an unexpected error, and what to do. Returns the reason for those who only hear of a failure."""
    sys.excepthook(type(error), error, error.__traceback__)
    say(_BUG)
    return "this is a bug in portexec, see the output"


def say_json(line: str) -> None:
    """Write a line of JSON, which has its control characters escaped already."""
    _write(line)


def moments() -> Iterator[int]:
    """The seconds after which a person is told what we wait for."""
    yield from _MOMENTS
    passed = _MOMENTS[-1]
    while True:
        passed += _MOMENTS[-1]
        yield passed


def print_out(text: str | bytes) -> None:
    """Write to stdout, as C programs do: SIGPIPE kills us when nobody reads any more. Raises PortexecError."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    data = os.fsencode(text)
    try:
        while data:
            data = data[os.write(STDOUT, data) :]
    except OSError as error:
        raise PortexecError(f"cannot write to stdout: {reason(error)}") from error


def has_colours(fd: int) -> bool:
    """Whether text for this descriptor may have colours: if it is a terminal with colours; no-color.org and force-color.org."""
    environment = os.environ
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or (environment.get("TERM", "dumb") != "dumb" and os.isatty(fd))


def coloured(text: str, colour: str) -> str:
    """The text in a colour; as it is where there is no colour, or no text."""
    return f"\x1b[{colour}m{text}\x1b[0m" if text and colour else text


def _coloured(line: str) -> str:
    kind, colon, rest = line.partition(": ")
    if colon and kind == "hint":
        return f"{coloured(kind, HINT)}{colon}{rest}"  # an address in a hint is only an example
    words = [coloured(word, ADDRESS) if word.startswith(_ADDRESSES) else word for word in line.split(" ")]
    if colon and kind == "error":
        words[0] = f"{coloured(kind, ERROR)}:"
    return " ".join(words)


def _write(text: str) -> None:
    data = os.fsencode(text)
    try:
        while data and _has_room():
            data = data[os.write(STDERR, data[:_PIPE_BUF]) :]
    except OSError:
        pass


def _has_room() -> bool:
    """Wait until stderr takes a piece. Without a free descriptor `select` cannot be loaded: then we try to write."""
    try:
        import select
    except ImportError:
        return True
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    return bool(poll.poll(_PATIENCE))
