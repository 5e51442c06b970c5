"""Programs that hypothesis makes up, on the loop and on a virtual one: both have to tell the same story.

The virtual loop is the specification in its plainest form. It has no clock and no descriptors, so it knows in advance what
happens in which order, who is closed when, and how the run ends.

Nothing depends on how fast the machine is: a time is 0 or an hour, and no hour is ever waited for.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from hypothesis import event as tell
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portexec.parent import loop
from portexec.parent.loop import Event, first, readable, sleep, spawn, writable

Coro = Coroutine[Any, Any, Any]

HOUR = 3600.0


class Boom(Exception):
    """What a program raises."""


NUMBERS = 2  # of events, and of pipes
Outcome = tuple[str, object]


class World(ABC):
    """What a program can do: tasks, events and pipes. `story` is what happened."""

    def __init__(self) -> None:
        self.story: list[object] = []
        self.bodies: list[Coro] = []

    def perform(self, body: Body, name: str) -> Coro:
        """A coroutine that does what the body says, and tells of it."""
        self.bodies.append(perform(self, body, name))
        return self.bodies[-1]

    @abstractmethod
    def run(self, coroutine: Coro) -> object:
        """Run a coroutine and all that it spawns to the end."""

    @abstractmethod
    def spawn(self, coroutine: Coro) -> object:
        """Run another one beside it."""

    @abstractmethod
    async def first(self, *coroutines: Coro, within: float | None) -> int | None:
        """Which of these has ended."""

    @abstractmethod
    async def pause(self, number: int) -> None:
        """Sleep for 0 seconds. The number means nothing."""

    @abstractmethod
    async def wait(self, event: int) -> None:
        """Wait for an event."""

    @abstractmethod
    async def readable(self, pipe: int) -> None:
        """Wait until a pipe can be read."""

    @abstractmethod
    async def writable(self, pipe: int) -> None:
        """Wait until a pipe can be written to, or is found to be closed."""

    @abstractmethod
    def set(self, event: int) -> None:
        """Set an event."""

    @abstractmethod
    def read(self, pipe: int) -> bytes | None:
        """One byte, none at the end, or None if there is nothing."""

    @abstractmethod
    def write(self, pipe: int) -> None:
        """Write a byte, unless that end was closed."""

    @abstractmethod
    def hang_up(self, pipe: int) -> None:
        """Close the end to write to, maybe while somebody waits for it."""


# Programs. The names of steps are those of the methods above, of which these take a number.
AT_ONCE = ["set", "read", "write", "hang_up"]
LATER = ["pause", "wait", "readable", "writable"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a body. `number` is that of an event or a pipe."""

    what: str
    number: int = 0
    bodies: tuple[Body, ...] = ()
    within: float | None = None


Body = tuple[Step, ...]


async def perform(world: World, body: Body, name: str) -> str:
    """Do what a body says, and tell after each step what it gave."""
    for position, step in enumerate(body):
        here = f"{name}.{position}"
        if step.what in AT_ONCE:
            found = getattr(world, step.what)(step.number)
        elif step.what in LATER:
            found = await getattr(world, step.what)(step.number)
        else:
            found = await COMPOUND[step.what](world, here, step, *step.bodies)
        world.story.append((here, found))
    return name


async def fail(_: World, here: str, __: Step) -> None:
    raise Boom(here)


async def spawn_body(world: World, here: str, _: Step, body: Body) -> None:
    world.spawn(world.perform(body, f"{here}:spawned"))


async def first_of_bodies(world: World, here: str, step: Step, *bodies: Body) -> int | None:
    coroutines = [world.perform(body, f"{here}:{index}") for index, body in enumerate(bodies)]
    return await world.first(*coroutines, within=step.within)


async def catch(world: World, here: str, _: Step, body: Body) -> str:
    try:
        return await perform(world, body, f"{here}:try")
    except Boom as error:
        return f"caught that of {error}"


async def do_finally(world: World, here: str, _: Step, body: Body, last: Body) -> str:
    try:
        return await perform(world, body, f"{here}:try")
    finally:
        world.story.append(f"{here} finally")
        await perform(world, last, f"{here}:finally")


COMPOUND: dict[str, Callable[..., Coro]] = {
    "raise": fail,
    "spawn": spawn_body,
    "first": first_of_bodies,
    "catch": catch,
    "finally": do_finally,
}


class Real(World):
    """The loop itself, and pipes of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.events = [Event() for _ in range(NUMBERS)]
        self.pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(NUMBERS)]
        self.hung_up: set[int] = set()

    def close(self) -> None:
        for number, (reader, writer) in enumerate(self.pipes):
            os.close(reader)
            if number not in self.hung_up:
                os.close(writer)

    def run(self, coroutine: Coro) -> object:
        async def main() -> object:
            self.loop = loop._current()
            return await coroutine

        return loop.run(main())

    def spawn(self, coroutine: Coro) -> object:
        return spawn(coroutine)

    async def pause(self, number: int) -> None:
        await sleep(0)

    async def first(self, *coroutines: Coro, within: float | None) -> int | None:
        return await first(*coroutines, within=within)

    async def wait(self, event: int) -> None:
        await self.events[event].wait()

    def set(self, event: int) -> None:
        self.events[event].set()

    async def readable(self, pipe: int) -> None:
        await readable(self.pipes[pipe][0])

    async def writable(self, pipe: int) -> None:
        await writable(self.pipes[pipe][1])

    def read(self, pipe: int) -> bytes | None:
        try:
            return os.read(self.pipes[pipe][0], 1)
        except BlockingIOError:
            return None

    def write(self, pipe: int) -> None:
        if pipe not in self.hung_up:
            os.write(self.pipes[pipe][1], b"x")

    def hang_up(self, pipe: int) -> None:
        if pipe not in self.hung_up:
            self.hung_up.add(pipe)
            os.close(self.pipes[pipe][1])


class WouldWaitError(Exception):
    """Only an hour, or a pipe of which nobody knows, could go on."""


@types.coroutine
def ask(what: str, *words: Any) -> Generator[Any, Any, Any]:
    return (yield (what, *words))


@dataclasses.dataclass(eq=False)
class VirtualTask:
    coroutine: Coro
    is_over: bool = False


class Virtual(World):
    """What the loop has to do, in its plainest form, without a clock and without descriptors.

    `waits` has the tasks that wait and what for, in the order in which they began to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[VirtualTask] = []
        self.queue: list[tuple[VirtualTask, object]] = []
        self.waits: dict[VirtualTask, tuple[Any, ...]] = {}
        self.late: set[VirtualTask] = set()
        self.descriptors: list[tuple[str, int]] = []  # in the order in which they were first waited for
        self.is_set = [False] * NUMBERS
        self.bytes = [0] * NUMBERS
        self.hung_up = [False] * NUMBERS

    async def pause(self, number: int) -> None:
        await ask("pause")

    async def first(self, *coroutines: Coro, within: float | None) -> int | None:
        winner: int | None = await ask("first", coroutines, within)
        return winner

    async def wait(self, event: int) -> None:
        if not self.is_set[event]:
            await ask("wait", event)

    def set(self, event: int) -> None:
        self.is_set[event] = True
        self.wake(lambda task: self.waits[task] == ("wait", event))

    async def readable(self, pipe: int) -> None:
        await ask("readable", pipe)

    async def writable(self, pipe: int) -> None:
        await ask("writable", pipe)

    def read(self, pipe: int) -> bytes | None:
        if self.bytes[pipe]:
            self.bytes[pipe] -= 1
            return b"x"
        return b"" if self.hung_up[pipe] else None

    def write(self, pipe: int) -> None:
        if not self.hung_up[pipe]:
            self.bytes[pipe] += 1

    def hang_up(self, pipe: int) -> None:
        self.hung_up[pipe] = True

    def spawn(self, coroutine: Coro) -> VirtualTask:
        task = VirtualTask(coroutine)
        self.tasks.append(task)
        self.queue.append((task, None))
        return task

    def run(self, coroutine: Coro) -> object:
        main = self.spawn(coroutine)
        result: object = None
        failure: BaseException | None = None
        try:
            while not main.is_over:
                result = self.settle(main)
                if not main.is_over:
                    self.look()
        except BaseException as error:
            failure = error
        while self.tasks:
            try:
                self.close(self.tasks[-1])
            except Boom as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return result

    def settle(self, main: VirtualTask) -> object:
        """Let all go on that can; then decide one `first`, of those that began last; and so on until nothing moves."""
        result: object = None
        while True:
            if self.queue:
                task, value = self.queue.pop(0)
                if not task.is_over:
                    ended = self.step(task, value)
                    result = ended if task is main else result
            elif decided := [task for task in self.waits if self.is_decided(task)]:
                self.decide(decided[-1])
            else:
                return result

    def step(self, task: VirtualTask, value: object) -> object:
        try:
            self.begin_wait(task, task.coroutine.send(value))
        except StopIteration as end:
            self.forget(task)
            return end.value
        except BaseException:
            self.forget(task)
            raise
        return None

    def begin_wait(self, task: VirtualTask, asked: tuple[Any, ...]) -> None:
        if asked[0] == "first":
            asked = ("first", [VirtualTask(coroutine) for coroutine in asked[1]], asked[2])
            self.tasks += asked[1]
            self.queue += [(child, None) for child in asked[1]]
        self.waits[task] = asked
        if asked[0] in ("readable", "writable") and asked not in self.descriptors:
            self.descriptors.append(asked)

    def end_wait(self, task: VirtualTask) -> None:
        self.late.discard(task)
        asked = self.waits.pop(task, None)
        if asked in self.descriptors and asked not in self.waits.values():
            self.descriptors.remove(asked)

    def forget(self, task: VirtualTask) -> None:
        task.is_over = True
        self.tasks.remove(task)

    def is_decided(self, task: VirtualTask) -> bool:
        what, *words = self.waits[task]
        return what == "first" and (task in self.late or any(child.is_over for child in words[0]))

    def decide(self, task: VirtualTask) -> None:
        children = self.waits[task][1]
        over = [child.is_over for child in children]
        for child in children:
            self.close(child)
        self.end_wait(task)
        self.queue.append((task, over.index(True) if any(over) else None))

    def close(self, task: VirtualTask) -> None:
        if task.is_over:
            return
        what, *words = self.waits.get(task, ("",))
        for child in words[0] if what == "first" else ():
            self.close(child)
        self.end_wait(task)
        self.forget(task)
        task.coroutine.close()

    def wake(self, is_meant: Callable[[VirtualTask], bool]) -> None:
        for task in [task for task in self.waits if is_meant(task)]:
            self.end_wait(task)
            self.queue.append((task, None))

    def look(self) -> None:
        """What poll(2) does: descriptors first, then the times that are over, which are those of 0 seconds."""
        ready = [one for one in self.descriptors if one[0] == "writable" or self.bytes[one[1]] or self.hung_up[one[1]]]
        due = [task for task, asked in self.waits.items() if asked == ("pause",) or (asked[0], asked[-1]) == ("first", 0.0)]
        if not ready and not due:
            can_wait = bool(self.descriptors) or any((asked[0], asked[-1]) == ("first", HOUR) for asked in self.waits.values())
            raise WouldWaitError if can_wait else RuntimeError("nothing can happen any more")
        for descriptor in ready:
            self.wake(lambda task: self.waits[task] == descriptor)  # noqa: B023  # it is called at once
        for task in due:
            if self.waits[task] == ("pause",):
                self.wake(lambda one: one is task)  # noqa: B023
            else:
                self.late.add(task)


def outcome_of(world: World, program: Body) -> Outcome:
    """How a run of it ended: what was returned or raised."""
    try:
        return "returned", world.run(world.perform(program, ""))
    except (Boom, RuntimeError) as error:
        return type(error).__name__, str(error).partition(":")[0]


numbers = st.integers(0, NUMBERS - 1)
at_once = st.builds(Step, st.sampled_from([*AT_ONCE * 2, "raise"]), numbers)
later = st.builds(Step, st.sampled_from(LATER), numbers)


def bodies(steps: st.SearchStrategy[Step], most: int = 4) -> st.SearchStrategy[Body]:
    return st.lists(steps, max_size=most).map(tuple)


def larger(steps: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    inner = bodies(steps)
    several = st.lists(inner, max_size=3).map(tuple)
    spawning = inner.map(lambda body: Step("spawn", bodies=(body,)))
    return st.one_of(
        st.builds(lambda some, within: Step("first", bodies=some, within=within), several, st.sampled_from([None, 0.0, HOUR])),
        spawning,
        inner.map(lambda body: Step("catch", bodies=(body,))),
        st.builds(lambda *both: Step("finally", bodies=both), inner, bodies(at_once | spawning, 2)),
    )


PROGRAMS = bodies(st.recursive(at_once | later, larger, max_leaves=24), 6)
STOP = Step("spawn", bodies=((*[Step("pause")] * 20, Step("raise")),))


LOUD_END = Step("finally", bodies=((Step("pause"),), (Step("raise"),)))
OWNER_OF_ONE = Step("first", bodies=((), (Step("first", bodies=((LOUD_END,),)),)))


@settings(max_examples=400, deadline=None)
@given(program=PROGRAMS)
@example(program=(OWNER_OF_ONE,))  # of which one was not closed
def test_the_loop_does_what_the_virtual_one_does(program: Body) -> None:
    expected = Virtual()
    try:
        outcome = outcome_of(expected, program)
    except WouldWaitError:
        program = (STOP, *program)  # which ends it after some rounds, of which none is waited for
        expected = Virtual()
        outcome = outcome_of(expected, program)
    tell(outcome[0])
    real = Real()
    try:
        assert (outcome_of(real, program), real.story) == (outcome, expected.story)
    finally:
        real.close()
    assert {inspect.getcoroutinestate(body) for body in real.bodies} == {inspect.CORO_CLOSED}
    assert not any(event.waiting for event in real.events)
    assert (real.loop.tasks, real.loop.watched) == ({}, {})
