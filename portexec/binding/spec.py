"""Listen specs: from the text `api=127.0.0.1:3000,0` to a `ListenSpec`. Pure: nothing is resolved or bound here.

[NAME=]SPEC
SPEC       ADDRESS | ADDRESS:PORTS | PORTS | unix:PATH | unix:@ABSTRACT | udp:[ADDRESS:]PORTS
ADDRESS    127.0.0.1   [::1]   localhost   0.0.0.0   [::]   *        or any host name
PORTS      0   8000   3000,0   8000-8099   stable   8000,8001,9000-9010,0     candidates, tried in this order

`stable` stays as it is here: which numbers it stands for depends on the project (`binding.stable`).
"""

from __future__ import annotations

from portexec.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEFAULT = "127.0.0.1:0"
STABLE_WORD = "stable"
STABLE = (-1, -1)  # among the candidates, it stands for the stable numbers
FORMS = "a spec is ADDRESS, ADDRESS:PORTS, PORTS, unix:PATH or udp:[ADDRESS:]PORTS; see portexec --help"

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_DIGITS = frozenset("0123456789")
_MAX_PORT = 65535
_MAX_NAME = 255  # sd_listen_fds(3): the longest descriptor name
_MAX_PATH = 107  # unix(7): sun_path has 108 bytes, the last is a NUL


class ListenSpec:
    """What one `--listen` asks for.

    `kind` is "tcp", "udp" or "unix". `address` is a host without brackets, or for unix the path (`@` begins an abstract
    name). `candidates` are inclusive ranges of numbers to try in order; (0, 0) stands for any free one, and STABLE for the
    numbers `stable`. `named`: the name was given, and not made up from the position.
    """

    __slots__ = ("address", "candidates", "kind", "name", "named", "stable")

    def __init__(
        self,
        name: str,
        kind: str,
        address: str,
        candidates: tuple[tuple[int, int], ...] = (),
        named: bool = True,
        stable: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.address = address
        self.candidates = candidates
        self.named = named
        self.stable = stable

    def settled(self, stable: tuple[int, ...]) -> ListenSpec:
        """The same spec, with the numbers that `stable` stands for."""
        return ListenSpec(self.name, self.kind, self.address, self.candidates, self.named, stable)

    def numbers(self) -> Iterator[int]:
        """Yield the candidate numbers in the order in which they are to be tried."""
        for low, high in self.candidates:
            yield from self.stable if (low, high) == STABLE else range(low, high + 1)

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        ports = ",".join(map(_shown, self.candidates))
        return f"{'udp:' if self.kind == 'udp' else ''}{host}:{ports}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ListenSpec) and all(getattr(self, s) == getattr(other, s) for s in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ListenSpec({', '.join(f'{s}={getattr(self, s)!r}' for s in self.__slots__)})"


def _shown(candidates: tuple[int, int]) -> str:
    low, high = candidates
    if candidates == STABLE:
        return STABLE_WORD
    return str(low) if low == high else f"{low}-{high}"


def parse_listen(texts: Iterable[str]) -> list[ListenSpec]:
    """Parse the texts of all `--listen` options, in order.

    Raises UsageError for a malformed spec and for names that clash.
    """
    specs = [_parse_one(text, position) for position, text in enumerate(texts, 1)]
    _require_unique_names(specs)
    return specs


def is_name(text: str) -> bool:
    """Whether the text could be the name of a listener."""
    return bool(text) and _NAME_CHARACTERS.issuperset(text)


def _parse_one(text: str, position: int) -> ListenSpec:
    name, rest = _split_name(text)
    named = name is not None
    if name is None:
        name = f"listener{position}"
    elif not name:
        raise UsageError(f"empty listener name in {text!r}", "write NAME=SPEC, or the spec alone")
    elif not is_name(name) or len(name) > _MAX_NAME:
        raise UsageError(f"bad listener name {name!r}", f"names are up to {_MAX_NAME} letters, digits, `-` and `_`")
    if rest.startswith("unix:"):
        return ListenSpec(name, "unix", _parse_path(text, rest[5:]), (), named)
    kind = "udp" if rest.startswith("udp:") else "tcp"
    address, ports = _split_address(text, rest[4:] if kind == "udp" else rest)
    return ListenSpec(name, kind, address, _parse_ports(text, ports), named)


def _split_name(text: str) -> tuple[str | None, str]:
    """Split off `NAME=`. A path or an address before the `=` is no name: `unix:/run/a=b` has none."""
    name, equals, rest = text.partition("=")
    if not equals or any(c in name for c in ":/@["):
        return None, text
    return name, rest


def _parse_path(text: str, path: str) -> str:
    if path in ("", "@"):
        raise UsageError(f"no path in listen spec {text!r}", "write unix:PATH, or unix:@NAME for an abstract one")
    if "\0" in path:
        raise UsageError(f"a NUL character in listen spec {text!r}", FORMS)
    length = len(path.encode("utf-8", "surrogateescape"))
    if length > _MAX_PATH:
        raise UsageError(
            f"the path of {text!r} is {length} bytes long, and a unix socket takes at most {_MAX_PATH}",
            "use a shorter path, or one relative to the working directory",
        )
    return path


def _split_address(text: str, rest: str) -> tuple[str, str]:
    """Split `ADDRESS:PORTS`, where either part may be missing, into an address without brackets and the ports."""
    if rest.startswith("["):
        address, bracket, tail = rest[1:].partition("]")
        if not bracket or ":" not in address or (tail and not tail.startswith(":")):
            raise UsageError(f"malformed listen spec {text!r}", "an IPv6 address is written [::1]:PORTS")
        return _checked_host(text, address), tail[1:] if tail else "0"
    if "://" in rest:
        bare = rest.partition("://")[2].partition("/")[0]
        raise UsageError(f"malformed listen spec {text!r}", f"it is an address, not a URL: {bare}")
    if rest.count(":") > 1:
        address, _, port = rest.rpartition(":")
        both = f"[{address}]:{port}, or [{rest}]" if port.isdecimal() and not address.endswith(":") else f"[{rest}]"
        raise UsageError(f"malformed listen spec {text!r}", f"an IPv6 address goes in brackets: {both}")
    if rest.startswith(("/", "./")):
        raise UsageError(f"malformed listen spec {text!r}", f"a unix socket is written unix:{rest}")
    if ":" in rest:
        address, _, ports = rest.partition(":")
        if not address and ports[:1] in _DIGITS:
            raise UsageError(f"malformed listen spec {text!r}", f"write {ports} alone, or *:{ports} for every address")
        if address and ports and _DIGITS.issuperset(address + ports):
            hint = f"a range is {address}-{ports}; " if int(address) < int(ports) else ""
            hint += f"a command with a fixed port gets another by --remap {ports}"
            raise UsageError(f"{address} is no address in listen spec {text!r}", hint)
        return _checked_host(text, address), ports
    if rest.partition(",")[0] == STABLE_WORD:
        return "127.0.0.1", rest
    if rest[:1] in _DIGITS and "." not in rest and not any(c.isalpha() for c in rest.replace(STABLE_WORD, "")):
        return "127.0.0.1", rest
    return _checked_host(text, rest), "0"


def _checked_host(text: str, host: str) -> str:
    if not host or host[0] == "-" or any(c.isspace() or not c.isprintable() or c in "[]=,/@" for c in host):
        raise UsageError(f"malformed listen spec {text!r}", FORMS)
    return "127.0.0.1" if host == "localhost" else host


def _parse_ports(text: str, ports: str) -> tuple[tuple[int, int], ...]:
    return tuple(_parse_range(text, part) for part in ports.split(","))


def _parse_range(text: str, part: str) -> tuple[int, int]:
    if part == STABLE_WORD:
        return STABLE
    low_text, dash, high_text = part.partition("-")
    low = _parse_port(text, low_text)
    high = _parse_port(text, high_text) if dash else low
    if high < low:
        raise UsageError(f"reversed port range {part} in {text!r}", f"write {high}-{low}")
    if dash and low == 0:
        raise UsageError(f"port range {part} begins at 0 in {text!r}", "0 alone is any free port; 1 is the lowest")
    return low, high


def _parse_port(text: str, digits: str) -> int:
    if not digits or not _DIGITS.issuperset(digits):
        raise UsageError(
            f"malformed port {digits!r} in listen spec {text!r}",
            "ports are numbers, ranges and lists: 8000 or 8000-8099 or 3000,0; or stable",
        )
    if len(digits) > 9 or int(digits) > _MAX_PORT:
        raise UsageError(f"port {digits} in {text!r} is too high", f"the highest is {_MAX_PORT}")
    return int(digits)


def _require_unique_names(specs: list[ListenSpec]) -> None:
    """Refuse names that are equal, or that would share one environment variable."""
    seen: dict[str, str] = {}
    for spec in specs:
        variable = variable_of(spec.name)
        other = seen.setdefault(variable, spec.name)
        if other != spec.name:
            raise UsageError(f"the names {other!r} and {spec.name!r} would both be {variable}", "rename one of them")
    if len({spec.name for spec in specs}) != len(specs):
        names = [spec.name for spec in specs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"the listener name {twice!r} is used twice", "every listener has a name of its own")


def variable_of(name: str) -> str:
    """The environment variable that carries the number of the listener with this name."""
    return name.upper().replace("-", "_") + "_PORT"
