"""Hand-offs: which one a command gets and why, and what it is told of the listeners. Values in, values out."""

from __future__ import annotations

import pytest

from portexec.binding.listeners import Listener
from portexec.binding.spec import parse_listen
from portexec.command import plan
from portexec.command.plan import FD, GUARD, HOLD, Choice
from portexec.errors import PortexecError

ONE = ["0"]

# the texts of a command, and what in them names a descriptor from 3 on
SIGNS = [
    (["uvicorn", "app:app", "--fd", "3"], "--fd 3"),
    (["uvicorn", "app:app", "--fd=3"], "--fd=3"),
    (["hypercorn", "--bind", "fd://3", "app"], "fd://3"),
    (["gunicorn", "-bfd://3", "app"], "fd://3"),
    (["haproxy", "bind fd@3"], "fd@3"),
    (["cat", "/dev/fd/3"], "/dev/fd/3"),
    (["cat", "/proc/self/fd/3"], "/proc/self/fd/3"),
    (["sh", "-c", "exec uvicorn --fd 3 app:app"], "--fd 3"),
    (["sh", "-c", "serve 'fd://3'"], "fd://3"),
    (["sh", "-c", "serve --fd 30 --fd 3"], "--fd 3"),
    (["serve", "--fd=3,4"], "--fd=3"),
    (["x", "{fd}"], "{fd}"),
    (["x", "--fd={fd}"], "{fd}"),
    (["x", "{{fd}}"], "{fd}"),
    (["x", "{api.fd}"], "{fd}"),
    (["x", "a{fd}b{port}"], "{fd}"),
]


@pytest.mark.parametrize(("texts", "sign"), SIGNS)
def test_auto_is_fd_when_the_command_names_the_descriptor(texts: list[str], sign: str) -> None:
    choice = plan.choose("auto", parse_listen(ONE), texts, 3)
    assert described(choice) == (FD, f"the command names the descriptor ({sign})", True)


NO_SIGNS = [
    ["true"],
    ["serve", "--port", "{port}"],
    ["serve", "--fd", "30"],
    ["serve", "--fd=30"],
    ["serve", "--fd", "4"],
    ["serve", "--fd", "0"],
    ["serve", "--fd"],
    ["serve", "--fd", "x3"],
    ["serve", "fd://30"],
    ["serve", "fd://33"],
    ["serve", "fd@31"],
    ["cat", "/dev/fd/30"],
    ["cat", "/proc/self/fd/32"],
    ["cat", "/proc/1/fd/4"],
    ["serve", "3"],
    ["serve", "{ fd }"],
    ["serve", "{foo}"],
    ["serve", "--nofd", "3"],
]


@pytest.mark.parametrize("texts", NO_SIGNS)
def test_auto_is_not_fd_for_other_numbers_and_words(texts: list[str]) -> None:
    choice = plan.choose("auto", parse_listen(ONE), texts, 3)
    assert described(choice) == (GUARD, "the command names no descriptor", False)
    assert not choice.is_final


@pytest.mark.parametrize(
    ("count", "first_fd", "number", "is_ours"),
    [
        (1, 3, 3, True),
        (1, 3, 4, False),
        (2, 3, 4, True),
        (2, 3, 5, False),
        (1, 5, 3, False),
        (1, 5, 5, True),
        (1, 0, 0, True),
        (10, 3, 12, True),
        (10, 3, 1, False),
        (10, 3, 13, False),
    ],
)
def test_the_numbers_that_are_ours(count: int, first_fd: int, number: int, is_ours: bool) -> None:
    choice = plan.choose("auto", parse_listen(ONE * count), ["x", f"fd://{number}"], first_fd)
    assert (choice.hand_off == FD) is is_ours


# requested, specs, texts, options that need fd; hand-off, why, named
CHOICES = [
    ("fd", ONE, ["true"], [], (FD, "as asked for", False)),
    ("fd", ONE, ["x", "--fd", "3"], [], (FD, "as asked for", True)),
    ("fd", ["unix:/s"], ["x"], ["--no-pid"], (FD, "as asked for", False)),
    ("hold", ONE, ["true"], [], (HOLD, "as asked for", False)),
    ("hold", ONE, ["x", "--fd", "3"], [], (HOLD, "as asked for", False)),
    ("guard", ONE, ["x", "--fd", "3"], [], (GUARD, "as asked for", False)),
    ("auto", ["udp:53"], ["x"], [], (FD, "udp:127.0.0.1:53 can only be handed over as a descriptor", False)),
    ("auto", ["0", "unix:@s"], ["x"], [], (FD, "unix:@s can only be handed over as a descriptor", False)),
    ("auto", ["unix:@s"], ["x", "{fd}"], [], (FD, "the command names the descriptor ({fd})", True)),
    ("auto", ONE, ["true"], ["--first-fd", "--no-pid"], (FD, "--first-fd was given", False)),
]


@pytest.mark.parametrize(("requested", "specs", "texts", "fd_only", "expected"), CHOICES)
def test_choice(
    requested: str, specs: list[str], texts: list[str], fd_only: list[str], expected: tuple[str, str, bool]
) -> None:
    assert described(plan.choose(requested, parse_listen(specs), texts, 3, fd_only=fd_only)) == expected


LEAVE_ONE = "leave one of the two out"
LEAVE_OUT = "leave --hand-off out, or say --hand-off fd"


@pytest.mark.parametrize("requested", ["fd", "guard", "hold"])
def test_what_was_asked_for_is_final(requested: str) -> None:
    assert plan.choose(requested, parse_listen(ONE), ["true"], 3).is_final


def test_an_option_that_needs_the_guard_chooses_it() -> None:
    choice = plan.choose("auto", parse_listen(ONE), ["true"], 3, guard_only=["--remap"])
    assert described(choice) == (GUARD, "--remap was given", False)
    assert choice.is_final


@pytest.mark.parametrize(
    ("requested", "specs", "fd_only", "guard_only", "message", "hint"),
    [
        ("hold", ["unix:/s"], [], [], "hand-off hold is for TCP ports, and unix:/s is none", LEAVE_OUT),
        ("hold", ["0", "udp:0"], [], [], "hand-off hold is for TCP ports, and udp:127.0.0.1:0 is none", LEAVE_OUT),
        ("guard", ["unix:@s"], [], [], "hand-off guard is for TCP ports, and unix:@s is none", LEAVE_OUT),
        ("hold", ONE, ["--no-pid"], [], "--no-pid needs hand-off fd, and this is hold: as asked for", LEAVE_ONE),
        ("guard", ONE, ["--first-fd"], [], "--first-fd needs hand-off fd, and this is guard: as asked for", LEAVE_ONE),
        ("fd", ONE, [], ["--remap"], "--remap needs hand-off guard, and this is fd: as asked for", LEAVE_ONE),
        ("hold", ONE, [], ["--remap"], "--remap needs hand-off guard, and this is hold: as asked for", LEAVE_ONE),
        (
            "auto",
            ONE,
            ["--no-pid"],
            ["--remap"],
            "--remap needs hand-off guard, and this is fd: --no-pid was given",
            LEAVE_ONE,
        ),
    ],
)
def test_what_contradicts_itself(
    requested: str, specs: list[str], fd_only: list[str], guard_only: list[str], message: str, hint: str
) -> None:
    with pytest.raises(PortexecError) as caught:
        plan.choose(requested, parse_listen(specs), ["true"], 3, fd_only=fd_only, guard_only=guard_only)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("texts", "remap"),
    [
        ([], {}),
        (["8000"], {8000: "api"}),
        (["8000=web", "1"], {8000: "web", 1: "api"}),
        (["65535=api"], {65535: "api"}),
    ],
)
def test_remap(texts: list[str], remap: dict[int, str]) -> None:
    assert plan.parse_remap(texts, parse_listen(["api=0", "web=0"])) == remap


@pytest.mark.parametrize(
    ("texts", "message", "hint"),
    [
        ([""], "--remap '' names no port", "write --remap PORT or --remap PORT=NAME"),
        (["0"], "--remap '0' names no port", "write --remap PORT or --remap PORT=NAME"),
        (["65536"], "--remap '65536' names no port", "write --remap PORT or --remap PORT=NAME"),
        (["x=api"], "--remap 'x=api' names no port", "write --remap PORT or --remap PORT=NAME"),
        (["\u0661"], "--remap '\u0661' names no port", "write --remap PORT or --remap PORT=NAME"),
        (["80", "080"], "--remap has port 080 twice", "a port can become only one listener's"),
        (["80=db"], "--remap 80=db: there is no listener 'db'", "the listeners are: api, web"),
        (["80="], "--remap 80=: there is no listener ''", "the listeners are: api, web"),
    ],
)
def test_remap_refused(texts: list[str], message: str, hint: str) -> None:
    with pytest.raises(PortexecError) as caught:
        plan.parse_remap(texts, parse_listen(["api=0", "web=0"]))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def described(choice: Choice) -> tuple[str, str, bool]:
    return choice.hand_off, choice.why, choice.named


def tcp(name: str, port: int, *, named: bool = True, host: str = "127.0.0.1") -> Listener:
    return Listener(name, "tcp", host=host, port=port, named=named)


SOCK = Listener("sock", "unix", path="/s")

INJECTED: list[tuple[list[Listener], dict[str, str]]] = [
    ([tcp("listener1", 1, named=False)], {"PORT": "1"}),
    ([tcp("api", 1)], {"PORT": "1", "API_PORT": "1"}),
    ([tcp("api", 1), tcp("my-web", 2)], {"PORT": "1", "API_PORT": "1", "MY_WEB_PORT": "2"}),
    ([tcp("listener1", 1, named=False), tcp("listener2", 2, named=False)], {"PORT": "1", "LISTENER2_PORT": "2"}),
    ([tcp("listener1", 1, named=False), tcp("api", 2)], {"PORT": "1", "API_PORT": "2"}),
    ([SOCK], {}),
    ([SOCK, tcp("api", 2)], {"API_PORT": "2"}),
    ([tcp("api", 1), SOCK], {"PORT": "1", "API_PORT": "1"}),
    ([Listener("dns", "udp", host="127.0.0.1", port=53)], {"PORT": "53", "DNS_PORT": "53"}),
]


@pytest.mark.parametrize(("listeners", "variables"), INJECTED)
def test_injected_variables(listeners: list[Listener], variables: dict[str, str]) -> None:
    assert plan.injected(listeners) == variables


@pytest.mark.parametrize("first_fd", [None, 0, 3])
def test_template_values(first_fd: int | None) -> None:
    api = {"port": "1", "host": "127.0.0.1", "url": "http://127.0.0.1:1"}
    six = {"port": "2", "host": "[::1]", "url": "http://[::1]:2"}
    sock = {"url": "unix:/s"}
    if first_fd is not None:
        api["fd"], six["fd"], sock["fd"] = (str(first_fd + position) for position in range(3))
    expected = dict(api)
    for name, fields in (("api", api), ("six", six), ("sock", sock)):
        expected |= {f"{name}.{field}": value for field, value in fields.items()}
    assert plan.template_values([tcp("api", 1), tcp("six", 2, host="[::1]"), SOCK], first_fd) == expected


@pytest.mark.parametrize(
    ("hand_off", "named", "inherited", "lowest_fd", "names"),
    [
        (FD, False, [], 3, ["api", "sock"]),
        (FD, True, [], 3, []),
        (FD, False, ["old"], 3, ["old", "api", "sock"]),
        (FD, True, ["old"], 3, ["old"]),
        (HOLD, False, [], 3, []),
        (GUARD, False, [], 3, []),
        (GUARD, False, ["old"], 3, ["old"]),
        (HOLD, False, ["old"], 3, ["old"]),
        (FD, False, [], 0, []),
        (FD, False, ["old"], 4, []),
    ],
)
def test_names_for_socket_activation(
    hand_off: str, named: bool, inherited: list[str], lowest_fd: int, names: list[str]
) -> None:
    choice = Choice(hand_off, "", named=named)
    assert plan.announced_names(choice, inherited, [tcp("api", 1), SOCK], lowest_fd) == names
