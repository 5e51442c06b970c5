"""The theft suite: what other processes get, of the same user and of another one, who want the number of a launch.

Who may take it is a table by hand-off, `MAY_TAKE`; a hand-off that joins it is tried like the others. The command is a real
one that starts slowly: it says `ready`, and does not serve before the test lets it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache

import pytest

from portexec.binding import guard as guards
from tests.support import DEADLINE, STRANGER, Running, child, read_line, run, running, tell, wait_for
from tests.support.binds import kernel_version
from tests.support.installed import has_ipv6, needs_ipv6
from tests.support.thieves import SAME_USER, Attempt, attempts, every_attempt, every_user, identity_of, thief

pytestmark = pytest.mark.once

NAMED = ("named", "first of two", "second of two")
# What the documentation says of each hand-off: who can take the number, before the command serves, from whoever asks for it.
MAY_TAKE: dict[str, Callable[[Attempt], bool]] = {
    "fd": lambda attempt: False,
    "guard": lambda attempt: False,
    "hold": lambda attempt: attempt["reuse_addr"] and attempt["way"] in NAMED,
}

# Which addresses a socket takes up: of IPv4, of IPv6; `*` is all of a family.
COVERS = {
    "127.0.0.1": ("127.0.0.1", ""),
    "127.0.0.2": ("127.0.0.2", ""),
    "0.0.0.0": ("*", ""),
    "::1": ("", "::1"),
    "[::1]": ("", "::1"),
    "[::]": ("", "*"),
    "[::] v6only": ("", "*"),
    "*": ("*", "*"),
    "[::] both": ("*", "*"),
    "::ffff:127.0.0.1": ("127.0.0.1", ""),
}
LISTEN = ("127.0.0.1", "[::1]", "0.0.0.0", "[::]", "*")
LAUNCHERS = ("itself", "without rights")  # who we are, with all rights of root if we are root, or an ordinary user
ATTEMPTS = 10_000  # of each thief that does nothing else
SPINS = 100_000_000  # turns that no spinning thief comes to before it is told to end, however slow the launches beside it are
NOT_HERE = ("EADDRNOTAVAIL", "EAFNOSUPPORT")


every_hand_off = pytest.mark.parametrize("hand_off", MAY_TAKE)
every_listen = pytest.mark.parametrize(
    "listen", [pytest.param(listen, marks=needs_ipv6 if ":" in listen else ()) for listen in LISTEN]
)


@pytest.fixture
def identity(user: str) -> list[str]:
    """The words that make a thief this user."""
    return identity_of(user)


@cache
def can_have(hand_off: str) -> bool:
    """Whether this machine has the hand-off at all: asked for by name it is never replaced by another one."""
    return run("--hand-off", hand_off, "--", "true").returncode == 0


@contextmanager
def starting(
    hand_off: str, listen: str = "127.0.0.1", *, launcher: str = "itself", command: str = ""
) -> Iterator[tuple[Running, int]]:
    """A command that is still starting, and the number it was given: late_server, or Python code in its place."""
    if hand_off == "guard" and not can_have(hand_off):
        pytest.skip("this machine cannot have the hand-off guard")
    program = [sys.executable, "-c", command] if command else child("late_server")
    words = ["--hand-off", hand_off, "--listen", f"{listen}:0", "--", *program, listen]
    prefix = child("without_rights") if launcher == "without rights" else ()
    with running(*words, prefix=prefix, stdin=subprocess.PIPE) as launch:
        number = int(launch.url().rpartition(":")[2])
        assert read_line(launch.process) == "ready"
        yield launch, number


def serve(launch: Running) -> int:
    """Let the command serve, wait until it does, and return its process id."""
    tell(launch.process, "serve")
    word, _, pid = read_line(launch.process).partition(" ")
    assert word == "serving"
    return int(pid)


def answer(listen: str, number: int) -> int:
    """Who answers a client: a process id."""
    host = "::1" if listen in {"[::1]", "[::]"} else "127.0.0.1"
    with socket.create_connection((host, number), timeout=DEADLINE) as connection:
        return int(connection.makefile().read())


def overlap(one: str, other: str) -> bool:
    """Whether two sockets on these addresses would both be asked for the same connection."""
    return any(a and b and (a == b or "*" in (a, b)) for a, b in zip(COVERS[one], COVERS[other], strict=True))


def possible(tried: list[Attempt]) -> list[Attempt]:
    """The attempts that this machine has the addresses for."""
    return [one for one in tried if has_ipv6() or ":" not in one["address"] or one["why"] not in NOT_HERE]


def wrong_outcomes(tried: list[Attempt], expected: Callable[[Attempt], bool]) -> list[Attempt]:
    """The attempts that got the number and should not have, or the other way round."""
    return [one for one in possible(tried) if one["got"] != expected(one)]


@every_user
@every_listen
@every_hand_off
def test_while_the_command_starts(hand_off: str, listen: str, identity: list[str]) -> None:
    with starting(hand_off, listen) as (launch, number):
        tried = every_attempt(identity, number)
        pid = serve(launch)
        served_by = answer(listen, number)
    assert wrong_outcomes(tried, MAY_TAKE[hand_off]) == []
    assert {one["why"] for one in tried if one["way"] == "named" and not one["got"]} <= {"EADDRINUSE", *NOT_HERE}
    assert served_by == pid


@every_user
@every_listen
@every_hand_off
def test_after_the_command_serves(hand_off: str, listen: str, identity: list[str]) -> None:
    """The same table, but that nobody gets in where the command's clients are.

    Whoever may take the number and sets SO_REUSEPORT as well can use the kernel's shortcut for two steps even then, which is
    why nothing is expected of them; nobody gets there without SO_REUSEADDR.
    """
    with starting(hand_off, listen) as (launch, number):
        pid = serve(launch)
        tried = every_attempt(identity, number)
        served_by = answer(listen, number)

    def may_take(attempt: Attempt) -> bool:
        return MAY_TAKE[hand_off](attempt) and not overlap(attempt["address"], listen)

    asked = [one for one in tried if not (MAY_TAKE[hand_off](one) and one["reuse_port"])]
    assert wrong_outcomes(asked, may_take) == []
    assert served_by == pid


@every_user
@every_listen
def test_a_launch_of_an_unprivileged_user(listen: str, identity: list[str]) -> None:
    """Root can hide its sockets better than others can; the thief is of the user who launched, or root."""
    launcher = "-" if os.geteuid() else str(STRANGER)
    with subprocess.Popen(
        [*child("holder"), launcher, listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            tried = every_attempt(identity, int(read_line(holder)))
        finally:
            holder.kill()
    assert wrong_outcomes(tried, MAY_TAKE["fd"]) == []


@every_user
@every_listen
@pytest.mark.parametrize("hand_off", ["fd", "guard"])
def test_a_launcher_without_rights(hand_off: str, listen: str, identity: list[str]) -> None:
    """The whole table, before the command serves and after, where the flip cannot hide its sockets' owner."""
    with starting(hand_off, listen, launcher="without rights") as (launch, number):
        before = every_attempt(identity, number)
        pid = serve(launch)
        after = every_attempt(identity, number)
        served_by = answer(listen, number)
    assert wrong_outcomes(before, MAY_TAKE[hand_off]) == []
    assert wrong_outcomes(after, MAY_TAKE[hand_off]) == []
    assert served_by == pid


# Binds, waits for a line, listens, waits for another one.
SLOW_TO_LISTEN = """
import os, socket, sys
host = sys.argv[1].strip("[]")
made = socket.socket(socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET)
if made.family == socket.AF_INET6:
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
made.bind(("::" if host == "*" else host, int(os.environ["PORT"])))
print("ready", flush=True)
sys.stdin.readline()
made.listen()
print("serving", os.getpid(), flush=True)
while True:
    connection, _ = made.accept()
    with connection:
        connection.sendall(str(os.getpid()).encode())
"""


@every_user
@every_listen
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_between_bind_and_listen(launcher: str, listen: str, user: str, identity: list[str]) -> None:
    """A command may take its time from one to the other. There is one binder who can come in between, and it is documented:
    no scrub can undo what the kernel caches of a socket on all addresses, and only root can hide it.
    """
    is_open = listen == "*" and user == SAME_USER and (launcher == "without rights" or os.geteuid() != 0)

    def is_documented(attempt: Attempt) -> bool:
        return is_open and attempt["reuse_port"] and attempt["got"]

    with starting("guard", listen, launcher=launcher, command=SLOW_TO_LISTEN) as (launch, number):
        tried = every_attempt(identity, number)
        pid = serve(launch)
        after = every_attempt(identity, number)
        served_by = answer(listen, number)
    assert [one for one in wrong_outcomes(tried, MAY_TAKE["guard"]) if not is_documented(one)] == []
    assert wrong_outcomes(after, MAY_TAKE["guard"]) == []
    assert served_by == pid


@needs_ipv6
def test_the_guest_between_bind_and_listen_is_named() -> None:
    """Never two servers on one number in silence: the command's listen fails, and portexec says who is in the way."""
    with starting("guard", "*", launcher="without rights", command=SLOW_TO_LISTEN) as (launch, number):
        # As little privileged as its victim, which otherwise could not look into its descriptors.
        with thief([], "keep", number, "127.0.0.1", "p", prefix=child("without_rights")) as guest:
            if not json.loads(read_line(guest))["got"]:
                pytest.skip("this kernel does not let the documented guest in")
            tell(launch.process, "serve")
            said = launch.line("is shared by another listener: pid ")
            launch.line("Address already in use")
            assert f"pid {guest.pid}," in said.string
        assert launch.process.wait(DEADLINE) != 0


@every_user
@pytest.mark.parametrize("options", ["a", "ap"])
@pytest.mark.parametrize(
    "address", [pytest.param(a, marks=needs_ipv6 if ":" in a else ()) for a in COVERS if a not in {"[::1]", "[::]", "*"}]
)
def test_the_binder_that_hold_lets_in(address: str, options: str, identity: list[str]) -> None:
    """Where it takes an address that the command wants, the command fails loudly; elsewhere it does not disturb."""
    with starting("hold") as (launch, number), thief(identity, "keep", number, address, options) as taker:
        assert json.loads(read_line(taker))["got"]
        if overlap(address, "127.0.0.1"):
            tell(launch.process, "serve")
            assert launch.process.wait(DEADLINE) != 0
            launch.line("Address already in use")
        else:
            pid = serve(launch)
            assert answer("127.0.0.1", number) == pid


@every_user
@every_hand_off
def test_the_same_number_for_udp_is_not_a_theft(hand_off: str, identity: list[str]) -> None:
    with starting(hand_off) as (launch, number):
        taken = attempts(identity, "udp", number)
        pid = serve(launch)
        assert taken["got"], taken
        assert answer("127.0.0.1", number) == pid


@every_user
def test_the_thief_can_steal_from_a_holder_of_one_address(identity: list[str]) -> None:
    """What the suite is worth: the same thief, sent to a number that is held the usual way, comes back with loot."""

    def is_robbed() -> bool:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            tried = every_attempt(identity, holder.getsockname()[1])
        elsewhere = [one for one in possible(tried) if not overlap(one["address"], "127.0.0.1")]
        assert {one["way"] for one in elsewhere if one["got"]} >= {"named", "first of two"}
        assert [one for one in elsewhere if one["way"] in ("named", "bind 0") and not one["got"]] == []
        return True

    # Another process, such as a thief of a test beside this one, may be given the same number at an address that is not held.
    assert wait_for(is_robbed)


@needs_ipv6
@every_user
def test_the_thief_can_steal_in_two_steps(identity: list[str]) -> None:
    """The shortcut in the kernel to which a holder of one address is open, and a guard is not."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        tried = every_attempt(identity, holder.getsockname()[1])
    is_robbed = any(one["got"] for one in tried if one["way"] == "second of two")
    if not is_robbed and kernel_version() > (6, 18):
        pytest.skip("this kernel has closed the shortcut")
    assert is_robbed


@every_user
def test_the_thief_can_connect_from_a_number_that_only_a_connection_has(identity: list[str]) -> None:
    """By this way alone: Linux 6.1 refuses it once others were tried, as it remembers a bind while the connection is there."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        tried = attempts(identity, "connect", client.getsockname()[1], "-,a")
    connected = [one for one in tried if one["address"] == "127.0.0.1"]
    if not connected:
        pytest.skip("needs IP_LOCAL_PORT_RANGE, Linux 6.3")
    assert any(one["got"] for one in connected)


# SO_REUSEPORT of the same user is the one binder that a flip cannot tell from ours, as documented, unless root flips.
SAME_USER_OPTIONS = "-,a" if os.geteuid() else "-,a,p,ap"


@pytest.mark.parametrize(
    ("user", "options"), [(SAME_USER, SAME_USER_OPTIONS), pytest.param("stranger", "-,a,p,ap", marks=pytest.mark.root)]
)
def test_thieves_who_name_the_number_all_the_time_never_get_between_flips(options: str, identity: list[str]) -> None:
    with ExitStack() as stack:
        guard = stack.enter_context(closing(guards.Guard(0)))
        number = guard.port
        thieves = [stack.enter_context(thief(identity, "hammer", number, ATTEMPTS, options)) for _ in range(2)]
        assert [read_line(one) for one in thieves] == ["ready"] * 2
        flips = 0
        while flips < 20 or any(one.poll() is None for one in thieves):
            flip_once(guard)
            flips += 1
        loot = [json.loads(read_line(one)) for one in thieves]
    assert [one["got"] for one in loot] == [[], []]
    assert all(one["tried"] >= ATTEMPTS for one in loot)


@every_user
def test_a_guard_that_gave_way_lets_nobody_in_by_what_they_have_left(identity: list[str]) -> None:
    """Who binds while a gate is open is in the kernel's cache then; with `[::]` there they could have every address later."""
    with closing(guards.Guard(0)) as guard:
        guard.give_way()
        assert hammer_once(identity, guard.port)
        guard.give_way_no_more()
        assert hammer_once(identity, guard.port) == []


def hammer_once(identity: list[str], number: int) -> list[Attempt]:
    """Name the number once with each address and both options; what that got."""
    with thief(identity, "hammer", number, 1, "ap") as asking:
        assert read_line(asking) == "ready"
        got: list[Attempt] = json.loads(read_line(asking))["got"]
        return got


def flip_once(guard: guards.Guard) -> None:
    """What a launch does with its number, for every kind of address; fails if a thief is in the way."""
    ipv6 = [(socket.AF_INET6, "::1"), (socket.AF_INET6, "::")] * has_ipv6()
    for family, host in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), *ipv6]:
        with socket.socket(family) as listener:
            with guards.Flip(guard, listener, host):
                listener.bind((host, guard.port))
            with guards.Flip(guard, listener, host):
                listener.listen()


# A server after the other on each address of its words, every second round with SO_REUSEADDR, until it is told to stop.
SERVE_AND_CLOSE = """
import json, os, select, socket, sys
port, addresses, failed, turn = int(os.environ["PORT"]), sys.argv[1].split(","), [], 0
print("ready", flush=True)
while turn < 300 or not select.select([0], [], [], 0)[0]:
    host, turn = addresses[turn % len(addresses)], turn + 1
    with socket.socket(socket.AF_INET6 if ":" in host or host == "*" else socket.AF_INET) as made:
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "*")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, turn // len(addresses) % 2)
        try:
            made.bind(("::" if host == "*" else host, port))
            made.listen()
        except OSError as error:
            failed.append([host, turn, str(error)])
print(json.dumps(failed), flush=True)
"""


@pytest.mark.parametrize(
    ("launcher", "user", "options"),
    [
        pytest.param("itself", "stranger", "-,a,p,ap", marks=pytest.mark.root),
        ("itself", SAME_USER, SAME_USER_OPTIONS),
        pytest.param("without rights", "stranger", "-,a,p,ap", marks=pytest.mark.root),
        ("without rights", SAME_USER, "-,a"),
    ],
)
def test_thieves_never_get_between_admitted_binds(launcher: str, options: str, identity: list[str]) -> None:
    """While servers come and go under the guard; scripts/bench_theft.py does it longer, and beside other ways."""
    addresses = ",".join(["127.0.0.1", "0.0.0.0"] + ["::1", "::", "*"] * has_ipv6())
    command = SERVE_AND_CLOSE.replace("sys.argv[1]", repr(addresses))
    with ExitStack() as stack:
        launch, number = stack.enter_context(starting("guard", launcher=launcher, command=command))
        thieves = [stack.enter_context(thief(identity, "hammer", number, ATTEMPTS, options)) for _ in range(2)]
        assert [read_line(one) for one in thieves] == ["ready"] * 2
        loot = [json.loads(read_line(one)) for one in thieves]
        tell(launch.process, "stop")
        failed = json.loads(read_line(launch.process))
    assert [one["got"] for one in loot] == [[], []]
    assert failed == []
    assert [line for line in launch.lines if "another listener" in line] == []


@pytest.mark.root  # two of the thieves are another user
def test_a_hundred_launches_among_spinning_thieves() -> None:
    """Thieves who take and drop numbers at random spoil no start, and get no number of a launch when they are told it."""
    identities = [identity_of(user) for user in (SAME_USER, "stranger")] * 2
    with ExitStack() as stack:
        thieves = [stack.enter_context(thief(identity, "spin", SPINS)) for identity in identities]
        assert [read_line(one) for one in thieves] == ["ready"] * 4
        for _ in range(10):
            with ExitStack() as batch:
                launches = [batch.enter_context(starting("fd")) for _ in range(10)]
                numbers = [number for _, number in launches]
                for one in thieves:
                    tell(one, json.dumps(numbers))
                loot = [attempt for one in thieves for attempt in json.loads(read_line(one)) if attempt["got"]]
                pids = [serve(launch) for launch, _ in launches]
                served_by = [answer("127.0.0.1", number) for number in numbers]
                assert loot == []
                assert served_by == pids
