"""Nobody gets the number, whatever the command does with its sockets; and what it gets is what it would get without us.

A state machine: one step after the other is made below portexec and bare, and after each one two other users' processes try to
have the number. What the steps and the players are is in guard_world.py; scripts/soak_guard.py plays for as long as one likes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests import guard_world
from tests.guard_world import CASTS, HOSTS, KINDS, SERVED, Sequence, Stage, staged

EXAMPLES = 60
STEPS = 25  # of one example at the most

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the players are several users")


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

        @precondition(lambda self: self.played.connections)
        @rule(which=st.integers(0, 5), side=st.integers(0, 1))
        def part(self, which: int, side: int) -> None:
            name = self.pick([*self.played.connections], which)
            self.played.part(name, self.pick(self.played.connections[name], side))

        @precondition(lambda self: self.played.can_drop)
        @rule()
        def drop(self) -> None:
            self.played.drop()

        @rule()
        def restart(self) -> None:
            self.played.restart()

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
    assert stage.attempts > 0
