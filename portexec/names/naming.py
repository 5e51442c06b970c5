"""Names of runs: which run a text means. The registry is not asked here.

web                 the run of this name, of this project
web.admin           the same, and its listener `admin`
/home/me/app:web    of another project; `--list` shows it as ~/app:web
4711                the run with this pid: that of portexec, or of the command
"""

from __future__ import annotations

import os

from portexec.binding.spec import is_name
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LONGEST = 64
_DIGITS = frozenset("0123456789")


class Wanted:
    """Which run is meant. `listener` is empty where none was named; `pid` is 0 for a run that is meant by its name."""

    __slots__ = ("listener", "name", "pid", "project", "text")

    def __init__(self, text: str, name: str, project: str, *, listener: str = "", pid: int = 0) -> None:
        self.text = text
        self.name = name
        self.project = project
        self.listener = listener
        self.pid = pid


def require_name(text: str, about: str = "--name") -> str:
    """The text, if it can be the name of a run. Raises UsageError otherwise."""
    rule = f"a name has up to {LONGEST} letters, digits, `-` and `_`, and begins with a letter or `_`"
    if not text:
        raise UsageError("is empty", rule, about=about)
    if not is_name(text) or text[0] in _DIGITS or text[0] == "-":
        raise UsageError(f"{text!r} is not a name", rule, about=about)
    if len(text) > LONGEST:
        raise UsageError(f"{text!r} is {len(text)} characters long", rule, about=about)
    return text


def parse(text: str, project: str, about: str) -> Wanted:
    """Which run a word of the command line means, seen from a project. Raises UsageError."""
    if text.isascii() and text.isdigit():
        return Wanted(text, "", "", pid=int(text) if len(text) < 10 else -1)
    elsewhere, colon, rest = text.rpartition(":")
    name, dot, listener = rest.partition(".")
    if dot and not is_name(listener):
        raise UsageError(f"{text!r} names no listener", "write NAME.LISTENER", about=about)
    project = os.path.realpath(os.path.expanduser(elsewhere)) if colon else project
    return Wanted(text, require_name(name, about), project, listener=listener)


def is_absolute(text: str) -> bool:
    """Whether such a word means the same run in every directory."""
    elsewhere, _, _ = text.rpartition(":")
    return (text.isascii() and text.isdigit()) or os.path.isabs(os.path.expanduser(elsewhere))


def shown(name: str, project: str, here: str) -> str:
    """The name of a run as it is to be written from this project."""
    return name if project == here else f"{project}:{name}"


def short(name: str, project: str, here: str) -> str:
    """The same for a person."""
    return abbreviated(shown(name, project, here))


def abbreviated(text: str) -> str:
    """A path, or what begins with one, with the home directory as `~`."""
    home = os.path.expanduser("~")
    return f"~{text[len(home) :]}" if len(home) > 1 and text.startswith(f"{home}/") else text


def for_browsers(name: str, listeners: Iterable[Mapping[str, object]]) -> list[str]:
    """A line for each listener that a browser on this machine can also reach by the name of the run."""
    urls = (local_url(name, listener) for listener in listeners)
    return [f"in a browser: {url}" for url in urls if url is not None]


def local_url(name: str, listener: Mapping[str, object]) -> str | None:
    """The address with a host name of its own, which keeps its cookies apart (RFC 6761: all of `.localhost` is this machine).

    None where a browser on this machine cannot use it, and where no host may have the name.
    """
    is_here = listener.get("host") in ("127.0.0.1", "[::1]") and str(listener["url"]).startswith("http:")
    return f"http://{name.lower()}.localhost:{listener['port']}" if is_here and "_" not in name else None
