"""The command line: one table of options, and the parser that is made from it. Pure.

    portexec [OPTION]... [--] COMMAND [ARG]...

Options end at the first word that is no option, or at `--`, as with env, nice and timeout. The parser is our own for two
reasons. Importing argparse takes as long as all that portexec does. And before Python 3.13 argparse loses a `--` inside the
command.
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


_ONE_SCRIPT = "write both in one: --then 'npm run lint && npm test'"
_ONE_NAME = "write --name once"


class Option:
    """One option. `metavar` is empty for a switch. A `repeatable` option collects its values; of others the last value counts.

    `field` is the attribute of `Options`. `common` options stand in `-h`. `single` is the hint for an option that may not be
    given twice, empty for others.
    A `verb` is a switch that stands in the place of a command, and takes the words after it as names.
    """

    __slots__ = ("common", "field", "help", "long", "metavar", "repeatable", "short", "single", "verb")

    def __init__(
        self,
        short: str,
        long: str,
        metavar: str,
        help: str,
        *,
        repeatable: bool = False,
        common: bool = False,
        field: str = "",
        single: str = "",
        verb: bool = False,
    ) -> None:
        self.short = short
        self.long = long
        self.metavar = metavar
        self.help = help
        self.repeatable = repeatable
        self.common = common
        self.single = single
        self.verb = verb
        self.field = field or long[2:].replace("-", "_")

    @property
    def has_value(self) -> bool:
        """Whether it takes a value."""
        return bool(self.metavar) and not self.verb


GROUPS: tuple[tuple[str, tuple[Option, ...]], ...] = (
    (
        "Listeners",
        (
            Option("-l", "--listen", "[NAME=]SPEC", f"what to listen on; default {spec.DEFAULT}", repeatable=True, common=True),
            Option("-b", "--backlog", "N", "how many connections may wait; default: the most"),
            Option("", "--host", "NAME", "what other machines are told, in {host} and {url}"),
            Option("", "--socket-mode", "MODE", "who may use unix sockets, as 660; default by umask"),
        ),
    ),
    (
        "Hand-off",
        (
            Option("-H", "--hand-off", "|".join(HAND_OFFS), "how the command gets the port; default auto", common=True),
            Option("", "--remap", "PORT[=NAME]", "a bind to this port gets the listener's instead", repeatable=True),
            Option("", "--first-fd", "N", "the first descriptor; default 3, 0 is stdin"),
            Option("", "--no-pid", "", "leave LISTEN_PID out, behind make or uv run"),
        ),
    ),
    (
        "Environment",
        (
            Option("-e", "--env", "NAME=TEMPLATE", "set a variable of the command", repeatable=True, common=True),
            Option("", "--env-file", "FILE", "read variables, dotenv syntax; knows ${PORT}", repeatable=True, common=True),
        ),
    ),
    (
        "Publish",
        (
            Option("", "--port-file", "FILE", "write the first listener's number to FILE", common=True),
            Option("", "--export", "FILE", "append PORT=NUMBER lines, as to $GITHUB_ENV"),
            Option("", "--json", "", "announce on stderr as one JSON line"),
            Option("-q", "--quiet", "", "announce nothing", common=True),
            Option("-v", "--verbose", "", "say what was chosen and why"),
        ),
    ),
    (
        LIFETIME,
        (
            Option("", "--then", "COMMAND", "when ready, run this in a shell, then stop", common=True, single=_ONE_SCRIPT),
            Option("", "--ready", "FORM", "listen|accept|http[s][:PATH]|notify|none", common=True),
            Option("", "--ready-timeout", "DURATION", "give up with status 124; default 60s"),
            Option("", "--ready-fd", "N", "write one JSON line to descriptor N when ready"),
            Option("", "--restart", "no|on-failure|always", "start the command again, on the same socket", common=True),
            Option("", "--lazy", "", "start the command at the first connection"),
            Option("", "--log", "FILE", "the command's output; its end is shown on failure", common=True),
            Option("", "--control-fd", "N", "be driven by a program: JSON lines on this socket"),
            Option("-k", "--kill-after", "DURATION", "from TERM to KILL of what is left; default 5s"),
        ),
    ),
    (
        "Servers with a name",
        (
            Option("", "--name", "NAME", "run it under this name, for --url, --stop, --logs", common=True, single=_ONE_NAME),
            Option("", "--detach", "", "with --name: go to the background when ready, and print the address", common=True),
            Option("", "--reuse", "", "with --detach: if the same server runs already, use that"),
            Option("", "--project", "DIR", "the project of the names; default: the nearest directory upwards with .git"),
            Option("", "--list", "", "show what runs and what ended", verb=True, common=True),
            Option("", "--url", "NAME...", "wait until the server is ready, print its address", verb=True, common=True),
            Option("", "--stop", "NAME...|--all", "stop it, wait until nothing is left", verb=True, common=True),
            Option("", "--all", "", "with --stop and --forget: all of this project"),
            Option("", "--logs", "NAME", "print what it has written", verb=True, common=True),
            Option("-f", "--follow", "", "with --logs: go on until it ends"),
            Option("", "--forget", "NAME...|--all", "take what ended off the list, with its log", verb=True),
        ),
    ),
    (
        "Other",
        (
            Option("-n", "--dry-run", "", "print the plan and exit", common=True),
            Option("", "--check", "", "tell what this machine can do, and exit"),
            Option("", "--completion", "bash|zsh|fish", "print the completion for a shell, and exit"),
            Option("-h", "", "", "show the options most used and exit", field="usage"),
            Option("", "--help", "", "show all options and exit", common=True),
            Option("-V", "--version", "", "show the version and exit"),
        ),
    ),
)

# Options of other tools, and hints what to write here instead.
_ELSEWHERE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("-p", "--port"), "the port is given with -l: -l 3000, or -l 3000,0 for any other if taken"),
    (("--status", "--ps", "--ls"), "--list shows what runs"),
    (("-d", "--daemon", "--daemonize", "--background"), "--detach goes to the background: write --name NAME --detach"),
    (("--kill",), "--stop NAME stops it"),
    (("--stop-all", "--kill-all"), "--stop --all stops all of this project"),
    (("--rm", "--remove", "--delete", "--prune"), "--forget NAME takes what has ended off the list, with its log"),
    (("--force",), "no port is taken from another server; --stop NAME stops one, and -l 3000,0 takes any other port"),
    (("--reload", "--watch"), "HUP to portexec with --restart and {fd} starts the command anew; entr or watchexec can send it"),
)
_ALIKE = 0.8  # from this ratio on, one option is another with a slip in it


class Options:
    """What the user asked for; values are text that is yet to be parsed. One attribute for each option, and the command."""

    def __init__(self) -> None:
        self.listen: list[str] = []
        self.backlog: str = "0"
        self.host: str | None = None
        self.socket_mode: str | None = None
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
        self.log: str | None = None
        self.control_fd: str | None = None
        self.lazy = False
        self.kill_after: str | None = None
        self.name: str | None = None
        self.detach = False
        self.reuse = False
        self.project: str | None = None
        self.list = False
        self.url = False
        self.stop = False
        self.all = False
        self.logs = False
        self.follow = False
        self.forget = False
        self.dry_run = False
        self.check = False
        self.completion: str | None = None
        self.usage = False
        self.help = False
        self.version = False
        self.is_marked = False  # the command comes after `--`
        self.command: list[str] = []
        self.names: list[str] = []  # of a verb

    def lifetime(self) -> list[str]:
        """The options given that make portexec stay as the parent."""
        given = [option.long for title, group in GROUPS for option in group if title == LIFETIME and self._is_given(option)]
        return given if self.name is None else [*given, "--name"]

    def verbs(self) -> list[str]:
        """The options given that stand in the place of a command."""
        return [option.long for _, group in GROUPS for option in group if option.verb and self._is_given(option)]

    def given(self) -> list[str]:
        """All options given, but for those that repeat their default."""
        usual = Options()
        options = (option for _, group in GROUPS for option in group)
        return [option.long for option in options if getattr(self, option.field) != getattr(usual, option.field)]

    def quotes_for_then(self) -> str:
        """The value of --then in quotes, where they were probably forgotten: `--then npm test -- npm start`. Else empty.

        In that case the second word began the command, and the intended command comes after a `--`. This is a guess: the
        command may have a `--` of its own.
        """
        words = self.command
        if self.is_marked or not self.then or len(self.then.split()) != 1 or "--" not in words[1:-1]:
            return ""
        end = words.index("--", 1)
        if words[end + 1].startswith("-"):
            return ""
        from shlex import join, quote

        return quote(join([self.then, *words[:end]]))

    def _is_given(self, option: Option) -> bool:
        return getattr(self, option.field) not in (None, False)


def parse(words: Sequence[str]) -> Options:
    """Sort the words into options and command. Raises UsageError."""
    options = Options()
    by_name = {name: option for _, group in GROUPS for option in group for name in (option.short, option.long) if name}
    rest = list(words)
    has_verb = False
    script = ""  # the value of --then, if the option before was that
    while rest:
        word = rest[0]
        if not word.startswith("-") or word == "-":
            if not has_verb:
                break
            options.names.append(rest.pop(0))
            continue
        del rest[0]
        if word == "--":
            options.is_marked = True
            break
        for option, value in _read(word, by_name, script):
            script = ""
            if option.has_value and value is None and rest[:1] in ([], ["--"]):
                unset = "; is a variable unset?" if rest else ""
                raise UsageError(f"option {word} needs a value", f"write {word} {option.metavar}{unset}")
            _store(options, option, rest.pop(0) if option.has_value and value is None else value)
            script = options.then or "" if option.field == "then" else ""
            has_verb = has_verb or option.verb
    options.command = rest
    return options


def _read(word: str, by_name: dict[str, Option], script: str) -> list[tuple[Option, str | None]]:
    """The options in one word: `--long`, `--long=VALUE`, or a cluster such as `-qn` or `-l8000`.

    `script` is the value of a --then just before it: an unknown option may belong to that value.
    """
    likely = f"if {word} belongs to --then, quote it: --then '{script} {word} ...'" if script and " " not in script else ""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        option = _known(name, by_name, likely)
        if equals and not option.has_value:
            hint = f"write {name} {value}" if option.metavar else f"write {name} alone"
            raise UsageError(f"option {name} takes no value", hint)
        return [(option, value if equals else None)]
    if f"-{word}" in by_name:
        raise UsageError(f"unknown option {word}", f"did you mean -{word}?")
    found: list[tuple[Option, str | None]] = []
    for position, letter in enumerate(word[1:], 2):
        if letter == "=" and found:
            raise UsageError(f"option -{word[position - 2]} takes no value", f"write -{word[position - 2]} alone")
        option = _known(f"-{letter}", by_name, likely)
        if option.has_value:
            return [*found, (option, word[position:] or None)]
        found.append((option, None))
    return found


def _known(name: str, by_name: dict[str, Option], likely: str) -> Option:
    """The option of a name. `likely` is a hint for an unknown one, which comes before all other hints."""
    if name in by_name:
        return by_name[name]
    hint = likely or next((hint for names, hint in _ELSEWHERE if name in names), "")
    if not hint:
        import difflib

        close = difflib.get_close_matches(name, by_name, 1, _ALIKE)
        hint = f"did you mean {close[0]}?" if close else "portexec --help lists the options"
    raise UsageError(f"unknown option {name}", hint)


def _store(options: Options, option: Option, value: str | None) -> None:
    if option.metavar == "FILE" and not value:
        raise UsageError("names no file", "its value is empty; is a variable unset?", about=option.long)
    if option.single and getattr(options, option.field) is not None:
        raise UsageError(f"option {option.long} is given twice", option.single)
    if not option.has_value:
        setattr(options, option.field, True)
    elif option.repeatable:
        getattr(options, option.field).append(value)
    else:
        setattr(options, option.field, value)
