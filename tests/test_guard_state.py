"""Nobody gets the number, whatever the command does with its sockets; and what it gets is what it would get without us.

A state machine: one step after the other is made below portexec and bare, and after each one two other users' processes try to
have the number. What the steps and the players are is in guard_world.py; scripts/soak_guard.py plays for as long as one likes.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.support import DEADLINE, guard_world
from tests.support.guard_world import (
    ASKED,
    CASTS,
    DROPPED,
    FAILED,
    HOSTS,
    KINDS,
    RELOADED,
    SERVED,
    STRANGER,
    Actor,
    Sequence,
    Stage,
    as_user,
    python_for,
    staged,
)

EXAMPLES = int(os.environ.get("PORTEXEC_EXAMPLES") or 60)
STEPS = 25  # of one example at the most

pytestmark = [pytest.mark.once, pytest.mark.root]  # the players are several users

MAKE_DUAL, MAKE_4, MAKE_6 = ("make", 1, "46", 1, 0, 0), ("make", 2, "4", 1, 0, 0), ("make", 3, "6", 1, 0, 0)
SERVE_DUAL = (MAKE_DUAL, ("bind", 1, "::"), ("listen", 1))
# What servers do that lost the number once, or were refused theirs.
ONCE_WRONG: dict[str, list[Any]] = {
    "looks whether it is free": [*SERVE_DUAL[:2], ("close", 1), MAKE_4, ("bind", 2, "127.0.0.1"), ("listen", 2)],
    "restarts with old connections": [*SERVE_DUAL, ("meet", 9, "127.0.0.1"), ("part", 9, 1), ("restart",)] * 4,
    "is restarted with old connections": [
        step
        for way in (ASKED, FAILED, ASKED, FAILED)
        for step in (*SERVE_DUAL, ("meet", 9, "127.0.0.1"), ("meet", 8, "::1"), ("part", 9, 1), ("restart", way))
    ],
    "fails while another process has the socket": [
        *SERVE_DUAL,
        ("meet", 9, "::1"),
        ("hand_on", 1),
        MAKE_4,
        ("restart", FAILED),
        *SERVE_DUAL,
    ],
    "closes with open connections": [*SERVE_DUAL, ("meet", 9, "::1"), ("close", 1), *SERVE_DUAL, ("close", 1), *SERVE_DUAL],
    "shuts down and makes another": [
        *SERVE_DUAL,
        ("shut", 1),
        MAKE_4,
        ("bind", 2, "0.0.0.0"),
        ("listen", 1),
        ("restart",),
        *SERVE_DUAL,
    ],
    "is multipath": [("make", 1, "46", 1, 0, 1), *SERVE_DUAL[1:], ("close", 1), ("restart",), *SERVE_DUAL, ("close", 1)],
    "has a socket for each family": [MAKE_4, ("bind", 2, "0.0.0.0"), ("listen", 2), MAKE_6, ("bind", 3, "::"), ("listen", 3)],
    "hands one of two on": [
        MAKE_4,
        ("bind", 2, "0.0.0.0"),
        ("listen", 2),
        ("hand_on", 2),
        MAKE_6,
        ("bind", 3, "::"),
        ("listen", 3),
    ],
    "hands one on that is merely bound, and then a bind fails": [
        ("make", 2, "4", 0, 0, 0),
        ("bind", 2, "0.0.0.0"),
        ("hand_on", 2),
        MAKE_DUAL,
        ("bind", 1, "::ffff:127.0.0.1"),
        ("make", 3, "6", 0, 1, 0),
        ("bind", 3, "::"),
        ("close", 3),
    ],
    "shares by itself": [
        ("make", 1, "46", 0, 1, 0),
        *SERVE_DUAL[1:],
        ("make", 4, "46", 0, 1, 0),
        ("bind", 4, "::"),
        ("listen", 4),
    ],
    "shares, and another does not": [
        ("make", 1, "46", 1, 1, 0),
        ("bind", 1, "::"),
        ("hand_on", 1),
        MAKE_4,
        ("bind", 2, "0.0.0.0"),
    ],
    "was elsewhere before": [
        MAKE_4,
        ("listen", 2),
        ("shut", 2),
        ("bind", 2, "0.0.0.0"),
        ("listen", 2),
        ("bind", 2, "127.0.0.1"),
    ],
}
GUARDED = [name for name, cast in CASTS.items() if cast.hand_off == "guard"]


@pytest.fixture(scope="module")
def house() -> Iterator[str]:
    with guard_world.house() as home:
        yield home


def machine_for(stage: Stage) -> type[RuleBasedStateMachine]:
    """The state machine that plays on this stage."""

    class Machine(RuleBasedStateMachine):
        played: Sequence

        def pick(self, names: list[int], number: int) -> int:
            return names[number % len(names)]

        @property
        def mine(self) -> list[int]:
            return [name for name in self.played.families if name not in self.played.handed_on]

        @initialize(kind=st.integers(0, KINDS - 1))
        def begin(self, kind: int) -> None:
            self.played = Sequence(stage, kind)

        @precondition(lambda self: len(self.played.families) < guard_world.MANY)
        @rule(family=st.sampled_from([*HOSTS]), reuse=st.integers(0, 3), is_mptcp=st.sampled_from([0, 0, 0, 1]))
        def make(self, family: str, reuse: int, is_mptcp: int) -> None:
            self.played.make(family, reuse & 1, reuse >> 1, is_mptcp=is_mptcp)

        @precondition(lambda self: self.mine)
        @rule(which=st.integers(0, 5), host=st.integers(0, 5))
        def bind(self, which: int, host: int) -> None:
            name = self.pick(self.mine, which)
            hosts = HOSTS[self.played.families[name]]
            self.played.do("bind", name, hosts[host % len(hosts)])

        @precondition(lambda self: self.mine)
        @rule(which=st.integers(0, 5))
        def listen(self, which: int) -> None:
            self.played.do("listen", self.pick(self.mine, which))

        @precondition(lambda self: self.mine)
        @rule(which=st.integers(0, 5))
        def shut_down(self, which: int) -> None:
            self.played.do("shut", self.pick(self.mine, which))

        @precondition(lambda self: self.mine)
        @rule(which=st.integers(0, 5))
        def hand_on(self, which: int) -> None:
            self.played.hand_on(self.pick(self.mine, which))

        @precondition(lambda self: self.played.families)
        @rule(which=st.integers(0, 5))
        def close(self, which: int) -> None:
            self.played.close(self.pick([*self.played.families], which))

        @rule(host=st.sampled_from(SERVED))
        def meet(self, host: str) -> None:
            self.played.meet(host)

        @rule(which=st.integers(0, 5), side=st.integers(0, 1))
        def part(self, which: int, side: int) -> None:
            if not self.played.connections:
                return  # no precondition: whether there are any is up to the kernel, and a replay has to be able to differ
            name = self.pick([*self.played.connections], which)
            self.played.part(name, self.pick(self.played.connections[name], side))

        @precondition(lambda self: self.played.can_drop)
        @rule()
        def drop(self) -> None:
            self.played.drop()

        @rule(way=st.sampled_from([RELOADED] * 3 + [*stage.cast.ways]))
        def restart(self, way: str) -> None:
            self.played.restart(way)

        @invariant()
        def nothing_is_found(self) -> None:
            assert self.played.findings == []

        def teardown(self) -> None:
            if hasattr(self, "played"):
                self.played.end()

    return Machine


@pytest.mark.parametrize("name", CASTS)
def test_nobody_gets_the_number(name: str, house: str) -> None:
    with staged(CASTS[name], house) as stage:
        run_state_machine_as_test(
            machine_for(stage),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert stage.attempts.total() > 0


@pytest.mark.parametrize("name", GUARDED)
def test_what_was_wrong_once(name: str, house: str) -> None:
    found = {}
    with staged(CASTS[name], house) as stage:
        for what, steps in ONCE_WRONG.items():
            played = Sequence(stage, 0)
            for step in steps:
                played.do(*step)
            played.end()
            found[what] = played.findings
    assert not any(found.values()), found


@pytest.mark.parametrize("host", ["*", "127.0.0.1"])
def test_the_guard_is_inherited_beside_old_connections(host: str, house: str) -> None:
    """Hand-off `fd`, begun while a connection of an earlier server is in TIME_WAIT, which keeps the number meanwhile."""
    port = leave_a_connection()
    python = python_for(DROPPED, house)
    words = [python, "-m", "portexec", "-q", "-H", "fd", "-l", f"{host}:{port}", "--", python]
    puppet = Actor(
        [*words, f"{house}/tests/children/puppet.py", "--inherited", "{fd}", "{port}"], cwd=house, **as_user(DROPPED)
    )
    probers = [Actor([python, f"{house}/tests/children/prober.py", str(user), "-,a,p,ap"]) for user in (STRANGER, DROPPED)]
    try:
        assert puppet.hear()[1] == [port]
        assert [prober.ask(port)[1] for prober in probers] == [[], []]
        puppet.ask("begin", 0)
        assert puppet.ask("shut", 0) == "ok"
        assert [prober.ask(port)[1] for prober in probers] == [[], []]
        puppet.ask("end")
    finally:
        for each in (puppet, *probers):
            each.close()


def test_without_ipv6_the_number_is_washed(house: str) -> None:
    """No scrub replaces 0.0.0.0 there. It is said with -v, and nobody profits when the command's socket has gone."""
    python = python_for(DROPPED, house)
    refuse = [python, f"{house}/tests/children/refuse.py", json.dumps([["socket", errno.EAFNOSUPPORT, 0, 8]])]
    words = [
        *refuse,
        python,
        "-m",
        "portexec",
        "-v",
        "-H",
        "guard",
        "--",
        python,
        f"{house}/tests/children/puppet.py",
        "{port}",
    ]
    puppet = Actor(words, cwd=house, stderr=subprocess.PIPE, **as_user(DROPPED))
    probers = [Actor([python, f"{house}/tests/children/prober.py", str(user), "-,a,p,ap"]) for user in (STRANGER, DROPPED)]

    def got(prober: Actor) -> list[object]:
        return [what for what in prober.ask(port)[1] if "." in what[0]]  # whoever is not refused IPv6 has that all the same

    try:
        _, [port] = puppet.hear()
        steps = [("begin", 0), ("make", 1, "4", 0, 0, 0), ("bind", 1, "0.0.0.0"), ("listen", 1)]
        assert [puppet.ask(*step) for step in steps][-1][0] == "ok"
        assert got(probers[0]) == []
        puppet.ask("close", 1)
        assert [puppet.ask(*step) for step in [("make", 2, "4", 0, 0, 0), ("bind", 2, "127.0.0.1")]][-1][0] == "ok"
        assert [got(prober) for prober in probers] == [[], []]
        puppet.ask("end")
    finally:
        _, said = puppet.process.communicate(timeout=DEADLINE)
        for each in probers:
            each.close()
    assert said.count("other users cannot") == 1


def leave_a_connection() -> int:
    """A number of which nothing is left but a connection in TIME_WAIT."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()) as client:
            server.accept()[0].close()
            client.recv(1)
        return int(server.getsockname()[1])


@pytest.mark.parametrize("name", GUARDED)
def test_the_number_stays_while_the_command_is_down(name: str, house: str) -> None:
    """It serves both families, ends with connections in TIME_WAIT, and comes back, four times."""
    cast = CASTS[name]
    python = python_for(cast.user, house)
    become = ["--as", str(cast.command)] if cast.command != cast.user else []
    words = [python, "-m", "portexec", "-q", "-H", "guard", "--restart", "always", "--", python]
    actor = Actor([*words, f"{house}/tests/children/puppet.py", *become, "{port}"], cwd=house, **as_user(cast.user))
    probers = {
        who: Actor([python, f"{house}/tests/children/prober.py", str(user), "-,a,p,ap"])
        for who, user in (("stranger", STRANGER), ("same", cast.command))
    }
    try:
        for _ in range(4):
            _, [port] = actor.hear()
            steps = [("begin", 0), ("make", 1, "46", 1, 0, 0), ("bind", 1, "::"), ("listen", 1), ("meet", 2, "127.0.0.1")]
            assert [actor.ask(*step) for step in steps][-1] == "ok"
            actor.ask("part", 2, 1)
            actor.ask("end")
            actor.say("exit", 1)
            assert {who: prober.ask(port)[1] for who, prober in probers.items()} == {"stranger": [], "same": []}
    finally:
        actor.process.terminate()
        for each in (actor, *probers.values()):
            each.close()


@pytest.mark.parametrize("host", ["*", "127.0.0.1"])
def test_the_number_stays_while_the_command_waits_for_a_connection(host: str, house: str) -> None:
    """It is started by one, serves, ends with the connection still open, and is started by the next one."""
    python = python_for(DROPPED, house)
    words = [python, "-m", "portexec", "-H", "fd", "--lazy", "--restart", "always", "-l", f"{host}:0", "--", python]
    puppet = Actor(
        [*words, f"{house}/tests/children/puppet.py", "--inherited", "{fd}", "{port}"],
        cwd=house,
        stderr=subprocess.PIPE,
        **as_user(DROPPED),
    )
    probers = [Actor([python, f"{house}/tests/children/prober.py", str(user), "-,a,p,ap"]) for user in (STRANGER, DROPPED)]
    try:
        assert puppet.process.stderr is not None
        port = int(puppet.process.stderr.readline().rstrip("/\n").rpartition(":")[2])
        for _ in range(3):
            assert [prober.ask(port)[1] for prober in probers] == [[], []]
            with socket.create_connection(("127.0.0.1", port)):
                assert puppet.hear()[1] == [port]
                assert [puppet.ask(*step) for step in (("begin", 0), ("take", 1, 0))] == ["ok", "ok"]
                assert [prober.ask(port)[1] for prober in probers] == [[], []]
                puppet.ask("end")
                puppet.say("exit", 0)
    finally:
        puppet.process.terminate()
        for each in (puppet, *probers):
            each.close()
