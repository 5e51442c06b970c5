"""The command line: one table of options, from which both the parser and `--help` are made. Pure.

    portexec [OPTION]... [--] COMMAND [ARG]...

Options end at the first word that is none, or at `--`, as with env, nice and timeout. It is a parser of our own because the
standard one costs as much time to import as all that portexec does, and loses a `--` inside the command (argparse before
Python 3.13).
"""

from __future__ import annotations

from portexec.binding import spec
from portexec.command.plan import AUTO, HAND_OFFS
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LIFETIME = "Lifetime"
USAGE = "portexec [OPTION]... [--] COMMAND [ARG]..."


class Option:
    """One option. `metavar` is empty for a switch; a `repeatable` one collects its values, of another the last counts."""

    __slots__ = ("field", "help", "long", "metavar", "repeatable", "short")

    def __init__(self, short: str, long: str, metavar: str, help: str, *, repeatable: bool = False) -> None:
        self.short = short
        self.long = long
        self.metavar = metavar
        self.help = help
        self.repeatable = repeatable
        self.field = long[2:].replace("-", "_")


GROUPS: tuple[tuple[str, tuple[Option, ...]], ...] = (
    (
        "Listeners",
        (
            Option("-l", "--listen", "[NAME=]SPEC", f"what to listen on; default {spec.DEFAULT}", repeatable=True),
            Option("-b", "--backlog", "N", "how many connections may wait; default 0, the most"),
        ),
    ),
    (
        "Hand-off",
        (
            Option("-H", "--hand-off", "|".join(HAND_OFFS), "how the command gets the port; default auto"),
            Option("", "--remap", "PORT[=NAME]", "a bind to this fixed port gets the listener's instead", repeatable=True),
            Option("", "--first-fd", "N", "the first descriptor; default 3, 0 is standard input"),
            Option("", "--no-pid", "", "leave LISTEN_PID out, for readers behind make or uv run"),
        ),
    ),
    (
        "Environment",
        (
            Option("-e", "--env", "NAME=TEMPLATE", "set a variable of the command", repeatable=True),
            Option("", "--env-file", "FILE", "read variables, dotenv syntax; knows ${PORT}", repeatable=True),
        ),
    ),
    (
        "Publish",
        (
            Option("", "--port-file", "FILE", "write the first listener's number to FILE"),
            Option("", "--export", "FILE", "append PORT=NUMBER lines to FILE, such as $GITHUB_ENV"),
            Option("", "--json", "", "announce on stderr as one JSON line"),
            Option("-q", "--quiet", "", "announce nothing"),
            Option("-v", "--verbose", "", "say what was chosen and why"),
        ),
    ),
    (
        LIFETIME,
        (
            Option("", "--then", "COMMAND", "when ready, run this in a shell; stop when it ends"),
            Option("", "--ready", "FORM", "listen|accept|http[:PATH]|notify|none: what counts as ready"),
            Option("", "--ready-timeout", "DURATION", "give up with status 124; default 60s"),
            Option("", "--ready-fd", "N", "write one JSON line to descriptor N when ready"),
            Option("", "--restart", "no|on-failure|always", "start the command again, on the same socket"),
            Option("", "--lazy", "", "start the command at the first connection"),
            Option("", "--control-fd", "N", "be driven by a program: JSON lines over this socket"),
            Option("-k", "--kill-after", "DURATION", "TERM to KILL for what is left behind; default 5s"),
        ),
    ),
    (
        "Other",
        (
            Option("-n", "--dry-run", "", "print the plan and exit"),
            Option("", "--check", "", "tell what this machine can do, and exit"),
            Option("-h", "--help", "", "show this page and exit"),
            Option("-V", "--version", "", "show the version and exit"),
        ),
    ),
)

_HELP_HEAD = f"""\
Usage: {USAGE}
Bind a free port first, then run COMMAND with it: nobody can take the port in between.

  portexec -- uvicorn app:app --fd 3            serve on an inherited socket
  portexec -- npm start                         serve on $PORT
  portexec -l 3000,0 -- vite --port {{port}}      3000 if it is free, else any port
  portexec --then 'npm test' -- npm start       test the server, stop it, end as the tests did
"""

_HELP_TAIL = """
SPEC is ADDRESS, ADDRESS:PORTS, PORTS, unix:PATH or udp:[ADDRESS:]PORTS, where
  ADDRESS  127.0.0.1  [::1]  localhost  0.0.0.0  [::]  * (both families)  a host name
  PORTS    0 (any)  8000  3000,0  8000-8099     candidates, tried in this order

The command sees $PORT, and $API_PORT for a listener named api. In its words and in
-e, {port} {host} {url} {fd} stand for the first listener, {api.port} ... for api.

Hand-offs: fd gives the command listening sockets, at descriptor 3 and following and as
LISTEN_FDS. With guard it binds the number itself, and nobody else can. With hold it
binds it itself, and so could another that names it and sets SO_REUSEADDR. auto is fd
when the command names the descriptor ({fd}, --fd 3, fd://3), else guard, else hold.

Any option under Lifetime makes portexec stay as the parent. HUP to it, with --restart and
fd, starts the command anew beside the old one, which is stopped when the new is ready.

Exit status: the command's own, or that of --then; 124 if it was not ready in time, 125
if portexec itself failed, 126 if the command cannot be executed, 127 if it was not found.
"""


class Options:
    """What the user asked for, as text where it is yet to be parsed. One attribute for each option, and the command."""

    def __init__(self) -> None:
        self.listen: list[str] = []
        self.backlog: str = "0"
        self.hand_off: str = AUTO
        self.first_fd: str | None = None
        self.no_pid = False
        self.remap: list[str] = []
        self.env: list[str] = []
        self.env_file: list[str] = []
        self.port_file: str | None = None
        self.export: str | None = None
        self.json = False
        self.quiet = False
        self.verbose = False
        self.then: str | None = None
        self.ready: str | None = None
        self.ready_timeout: str | None = None
        self.ready_fd: str | None = None
        self.restart: str | None = None
        self.control_fd: str | None = None
        self.lazy = False
        self.kill_after: str | None = None
        self.dry_run = False
        self.check = False
        self.help = False
        self.version = False
        self.command: list[str] = []

    def lifetime(self) -> list[str]:
        """The options given that make portexec stay as the parent."""
        return [option.long for title, group in GROUPS for option in group if title == LIFETIME and self._is_given(option)]

    def _is_given(self, option: Option) -> bool:
        return getattr(self, option.field) not in (None, False)


def parse(words: Sequence[str]) -> Options:
    """Sort the words into options and command. Raises UsageError for a usage error."""
    options = Options()
    by_name = {name: option for _, group in GROUPS for option in group for name in (option.short, option.long) if name}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        for option, value in _read(word, by_name):
            if option.metavar and value is None and not rest:
                raise UsageError(f"option {word} needs a value", f"write {word} {option.metavar}")
            _store(options, option, rest.pop(0) if option.metavar and value is None else value)
    options.command = rest
    return options


def _read(word: str, by_name: dict[str, Option]) -> list[tuple[Option, str | None]]:
    """The options in one word: `--long`, `--long=VALUE`, or a cluster such as `-qn` or `-l8000`."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        option = _known(name, by_name)
        if equals and not option.metavar:
            raise UsageError(f"option {name} takes no value", f"write {name} alone")
        return [(option, value if equals else None)]
    if f"-{word}" in by_name:
        raise UsageError(f"unknown option {word}", f"did you mean -{word}?")
    found: list[tuple[Option, str | None]] = []
    for position, letter in enumerate(word[1:], 2):
        option = _known(f"-{letter}", by_name)
        if option.metavar:
            return [*found, (option, word[position:] or None)]
        found.append((option, None))
    return found


def _known(name: str, by_name: dict[str, Option]) -> Option:
    if name in by_name:
        return by_name[name]
    if name in ("-p", "--port"):
        raise UsageError(f"unknown option {name}", "the port is given with -l: -l 3000, or -l 3000,0 for any other if taken")
    import difflib

    close = difflib.get_close_matches(name, by_name, 1, 0.6)
    raise UsageError(f"unknown option {name}", f"did you mean {close[0]}?" if close else "portexec --help lists the options")


def _store(options: Options, option: Option, value: str | None) -> None:
    if not option.metavar:
        setattr(options, option.field, True)
    elif option.repeatable:
        getattr(options, option.field).append(value)
    else:
        setattr(options, option.field, value)


def help_text() -> str:
    """The page that `--help` shows."""
    lines = [_HELP_HEAD]
    for title, group in GROUPS:
        lines.append(f"\n{title}\n")
        for option in group:
            names = f"{option.short + ', ' if option.short else '    '}{option.long} {option.metavar}".rstrip()
            gap = "\n" + " " * 33 if len(names) > 29 else " " * (31 - len(names))
            lines.append(f"  {names}{gap}{option.help}\n")
    lines.append(_HELP_TAIL)
    return "".join(lines)
