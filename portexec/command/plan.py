"""Hand-offs: which one a command gets, and the `Plan` that says how it is run. Values in, values out.

fd      the command serves on an inherited, listening descriptor
guard   the command binds the number itself, and its bind(2) is admitted past the guard
hold    the command binds the number itself; the guard lets a binder with SO_REUSEADDR pass
auto    fd when the command names the descriptor, else guard where this machine can, else hold
"""

from __future__ import annotations

from portexec.binding.listeners import Listener
from portexec.binding.spec import ListenSpec, variable_of
from portexec.command import activation
from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

AUTO = "auto"
FD = "fd"
GUARD = "guard"
HOLD = "hold"
HAND_OFFS = (AUTO, FD, GUARD, HOLD)

_SURELY_OURS = ("--then", "--ready", "--ready-timeout", "--ready-fd")  # options that hardly any other program has
# These start programs by Node's spawn, which passes the standard streams on and nothing else.
_CLOSES_DESCRIPTORS = frozenset({"npm", "npx", "yarn", "pnpm", "pnpx", "bunx", "nodemon"})

# How commands name a descriptor in their words: uvicorn, hypercorn and gunicorn, haproxy, and the kernel's own paths.
_DESCRIPTOR_FORMS = ("--fd {}", "--fd={}", "fd://{}", "fd@{}", "/dev/fd/{}", "/proc/self/fd/{}")


class Choice:
    """A hand-off and the reason why it was chosen, for `-v`.

    `named`: the words of the command name the descriptor. `is_final`: the user asked for this hand-off, and no other will do.
    """

    __slots__ = ("hand_off", "is_final", "named", "why")

    def __init__(self, hand_off: str, why: str, *, named: bool = False, is_final: bool = False) -> None:
        self.hand_off = hand_off
        self.why = why
        self.named = named
        self.is_final = is_final

    def noting(self, more: str) -> Choice:
        """The same choice, with one more thing to say of it."""
        return Choice(self.hand_off, f"{self.why}; {more}", named=self.named, is_final=self.is_final)


class Plan:
    """How a command is run: everything that `execute` needs, and nothing that it has to decide.

    `file` is what is executed, with `argv` and `environment`. The descriptors `passed` go to `first_fd` and following; the
    descriptors `kept`, the guards, are inherited under whatever number. `for_pid` asks for LISTEN_PID, which only the
    process that executes the command can know. `streams` are standard streams that the command gets instead of ours: their
    number, and the descriptor that it becomes.
    """

    __slots__ = ("argv", "environment", "file", "first_fd", "for_pid", "kept", "passed", "streams")

    def __init__(
        self,
        file: str,
        argv: list[str],
        environment: dict[str, str],
        *,
        passed: tuple[int, ...] = (),
        first_fd: int = activation.FIRST_FD,
        kept: tuple[int, ...] = (),
        for_pid: bool = False,
        streams: Mapping[int, int] | None = None,
    ) -> None:
        self.file = file
        self.argv = argv
        self.environment = environment
        self.passed = passed
        self.first_fd = first_fd
        self.kept = kept
        self.for_pid = for_pid
        self.streams = streams or {}

    def keeping(self, kept: tuple[int, ...]) -> Plan:
        """The same plan with other descriptors that are kept."""
        return self._changed(kept=kept)

    def passing(self, descriptors: Mapping[int, int]) -> Plan:
        """The same plan with other descriptors that are passed, by those that they replace."""
        return self._changed(passed=tuple(descriptors.get(fd, fd) for fd in self.passed))

    def with_variable(self, name: str, value: str) -> Plan:
        """The same plan with one more variable in the environment of the command."""
        return self._changed(environment={**self.environment, name: value})

    def with_streams(self, streams: Mapping[int, int]) -> Plan:
        """The same plan with these standard streams."""
        return self._changed(streams=streams)

    def _changed(self, **changes: Any) -> Plan:
        return Plan(**{name: getattr(self, name) for name in self.__slots__} | changes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and all(getattr(self, s) == getattr(other, s) for s in self.__slots__)

    __hash__ = None  # type: ignore[assignment]


def choose(
    requested: str,
    specs: Sequence[ListenSpec],
    texts: Iterable[str],
    first_fd: int,
    *,
    fd_only: Sequence[str] = (),
    guard_only: Sequence[str] = (),
) -> Choice:
    """Choose the hand-off for a command; whether this machine can do it is found out later.

    `texts` are the command's words and the templates of `-e`. `first_fd` is the number of the first listener's descriptor.
    `fd_only` and `guard_only` are given options that mean something with that hand-off only.
    Raises UsageError when the options contradict each other.
    """
    if requested not in HAND_OFFS:
        from portexec.server_errors import UnknownHandOff

        raise UnknownHandOff(f"unknown hand-off {requested!r}", f"it is one of {', '.join(HAND_OFFS)}")
    sign = _descriptor_sign(texts, range(first_fd, first_fd + len(specs)))
    numberless = next((spec for spec in specs if spec.kind != "tcp"), None)
    hand_off, why = requested, "as asked for"
    if requested == AUTO:
        hand_off, why = _choose_automatically(sign, numberless, fd_only, guard_only)
    if hand_off != FD and numberless is not None:
        raise UsageError(
            f"hand-off {hand_off} is for TCP ports, and {numberless} is none", "leave --hand-off out, or say --hand-off fd"
        )
    for only, options in ((FD, fd_only), (GUARD, guard_only)):
        if options and hand_off != only:
            raise UsageError(
                f"needs hand-off {only}, and this is {hand_off}: {why}", "leave one of the two out", about=options[0]
            )
    is_final = requested != AUTO or bool(guard_only)
    return Choice(hand_off, why, named=hand_off == FD and bool(sign), is_final=is_final)


def _choose_automatically(
    sign: str, numberless: ListenSpec | None, fd_only: Sequence[str], guard_only: Sequence[str]
) -> tuple[str, str]:
    if sign:
        return FD, f"the command names the descriptor ({sign})"
    if numberless is not None:
        return FD, f"{numberless} can only be handed over as a descriptor"
    if fd_only:
        return FD, f"{fd_only[0]} was given"
    return GUARD, f"{guard_only[0]} was given" if guard_only else "the command names no descriptor"


def parse_remap(texts: Iterable[str], specs: Sequence[ListenSpec]) -> dict[int, str]:
    """From fixed numbers to names of listeners, by default the first. Raises UsageError for a malformed option."""
    remap: dict[int, str] = {}
    for text in texts:
        digits, equals, name = text.partition("=")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 6 and 0 < int(digits) < 65536):
            raise UsageError(f"{text!r} names no port", "write --remap PORT or --remap PORT=NAME", about="--remap")
        if int(digits) in remap:
            raise UsageError(f"has port {digits} twice", "a port can become only one listener's", about="--remap")
        names = [spec.name for spec in specs]
        if equals and name not in names:
            raise UsageError(
                f"{text}: there is no listener {name!r}", f"the listeners are: {', '.join(names)}", about="--remap"
            )
        remap[int(digits)] = name if equals else names[0]
    return remap


def _descriptor_sign(texts: Iterable[str], numbers: Iterable[int]) -> str:
    """The first place where a command names one of these descriptors, or a `{fd}` template; empty if there is none."""
    texts = list(texts)
    if any("{" in text for text in texts):
        from portexec.command import templates

        if any(templates.uses(text, "fd") for text in texts):
            return "{fd}"
    words = " ".join(texts)
    if "fd" not in words:
        return ""
    signs = (form.format(number) for number in numbers for form in _DESCRIPTOR_FORMS)
    return next((sign for sign in signs if _stands_in(words, sign)), "")


def _stands_in(words: str, sign: str) -> bool:
    """Whether the sign occurs, and not merely as the beginning of a longer number."""
    at = words.find(sign)
    while at >= 0:
        end = at + len(sign)
        if not words[end : end + 1].isdigit():
            return True
        at = words.find(sign, end)
    return False


def advice(hand_off: str, argv: Sequence[str]) -> str:
    """Advice about a command that probably does not work with this hand-off; empty for most."""
    name = argv[0].rpartition("/")[2]
    if hand_off == FD and name in _CLOSES_DESCRIPTORS:
        return f"{name} does not pass descriptors on to what it starts; give the server its number: {{port}}, or $PORT"
    return ""


def misplaced(argv: Sequence[str]) -> str:
    """Advice about an option of ours among the words of a command; empty for most."""
    word = next((word for word in argv[1:] if word.partition("=")[0] in _SURELY_OURS), "")
    if not word or any("portexec" in each for each in argv):
        return ""
    return f"{word} comes after the command, which gets it; options of portexec come before the command"


def injected(listeners: Sequence[Listener]) -> dict[str, str]:
    """The variables that carry the numbers: PORT for the first listener, NAME_PORT for the others and for given names."""
    return {variable: str(listener.port) for variable, listener in _with_variables(listeners)}


def exported(listeners: Sequence[Listener]) -> dict[str, str]:
    """What others are told in an export file: the numbers, and HOST beside PORT where a host was given.

    The command itself is not told the host: many servers bind to what a variable HOST names.
    """
    told = _with_variables(listeners)
    hosts = {f"{name.removesuffix('PORT')}HOST": listener.known_as for name, listener in told if listener.known_as}
    return injected(listeners) | hosts


def _with_variables(listeners: Sequence[Listener]) -> list[tuple[str, Listener]]:
    found = []
    for listener in listeners:
        first = listener is listeners[0]
        if listener.port and first:
            found.append(("PORT", listener))
        if listener.port and (listener.named or not first):
            found.append((variable_of(listener.name), listener))
    return found


def template_values(listeners: Sequence[Listener], first_fd: int | None) -> dict[str, str]:
    """What the templates stand for; without `first_fd` there are no descriptors to name."""
    values: dict[str, str] = {}
    for position, listener in enumerate(listeners):
        fields = {"url": listener.url}
        if listener.port:
            fields |= {"port": str(listener.port), "host": listener.told_host}
        if first_fd is not None:
            fields["fd"] = str(first_fd + position)
        for field, value in fields.items():
            values[f"{listener.name}.{field}"] = value
            if position == 0:
                values[field] = value
    return values


def announced_names(choice: Choice, inherited: Sequence[str], listeners: Sequence[Listener], lowest_fd: int) -> list[str]:
    """The names of the sockets that the command is to find by socket activation.

    These are the sockets that were handed to us, and ours, unless the command's words name their descriptors: some commands
    would count them twice (gunicorn `-b fd://3`). The protocol knows descriptors from 3 on only.
    """
    if lowest_fd != activation.FIRST_FD:
        return []
    ours = choice.hand_off == FD and not choice.named
    return [*inherited, *(listener.name for listener in listeners if ours)]


def descriptors(inherited: Sequence[str], listeners: Sequence[Listener]) -> tuple[int, ...]:
    """The present descriptors of the sockets that are to be passed on: those handed to us, then those of the listeners."""
    sockets = [listener.socket.fileno() for listener in listeners if listener.socket is not None]
    return (*range(activation.FIRST_FD, activation.FIRST_FD + len(inherited)), *sockets)
