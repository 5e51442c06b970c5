"""The loop: in which order things happen, and that nothing is left of any outcome.

Here are the orders, one by one; test_loop_schedules.py has programs that nobody thought of. Nothing depends on how fast the
machine is: times are 0, an hour, or lie in the past.
"""

from __future__ import annotations

import fcntl
import gc
import inspect
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeVar

import pytest

from portexec.kernel import raise_descriptor_limit
from portexec.parent import loop
from portexec.parent.loop import Event, after, first, isolated, readable, sleep, spawn, writable
from tests.support import DEADLINE, status_of, wait_for

T = TypeVar("T")
Coro = Coroutine[Any, Any, Any]
Pipe = tuple[int, int]

HOUR = 3600.0


class Boom(Exception):
    """What the tests raise."""


@pytest.fixture(autouse=True, params=[loop._SHORTEST_POLL, 2 * HOUR], ids=["polls", "dozes"])
def shortest_poll(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order is the same where the loop waits by select(2) first, as it does for less than a millisecond."""
    monkeypatch.setattr(loop, "_SHORTEST_POLL", request.param)


@pytest.fixture
def log() -> list[object]:
    """What has happened, in this order."""
    return []


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """The ends of a pipe, to read from and to write to. A test may close them."""
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop. Whatever its outcome, nothing may be left running or registered."""
    used: list[Any] = []

    async def watched() -> T:
        used.append(loop._current())
        return await coroutine

    outer = loop._running
    try:
        return loop.run(watched())
    finally:
        [left] = used
        assert loop._running is outer
        assert (left.tasks, left.watched, left.poll.poll(0)) == ({}, {}, [])
        assert [timer for timer in left.timers if timer[2].task is not None] == []


async def end(log: list[object], name: object, rounds: int = 0) -> object:
    """End after so many rounds, and say so."""
    for _ in range(rounds):
        await sleep(0)
    log.append(name)
    return name


async def tell_end(log: list[object], name: str, coroutine: Coro) -> None:
    """Wait for a coroutine, and say whether it ended or was closed."""
    try:
        await coroutine
        log.append(f"{name} ended")
    except GeneratorExit:
        log.append(f"{name} closed")
        raise


async def boom(rounds: int = 0) -> None:
    for _ in range(rounds):
        await sleep(0)
    raise Boom


async def wait_forever() -> None:
    await Event().wait()


def fill(end: int) -> None:
    """Write to a pipe until nothing more fits."""
    try:
        while True:
            os.write(end, bytes(1 << 16))
    except BlockingIOError:
        pass


# What the words of the next table stand for. The pipe has something in it.
WORDS: dict[str, Callable[[Pipe], Coro]] = {
    "now": lambda _: end([], "now"),
    "1 round": lambda _: sleep(0),
    "2 rounds": lambda _: end([], "later", 2),
    "readable": lambda pipe: readable(pipe[0]),
    "writable": lambda pipe: writable(pipe[1]),
    "never": lambda _: wait_forever(),
    "an hour": lambda _: sleep(HOUR),
    "first of now": lambda _: first(end([], "now")),
    "first of 1 round": lambda _: first(wait_forever(), sleep(0)),
    "first within 0": lambda _: first(wait_forever(), within=0),
}

# What `first` is given, within how many seconds, and the position of the one that it says has ended.
WINNERS: list[tuple[str, float | None, int | None]] = [
    ("now", None, 0),
    ("now, now", None, 0),
    ("never, now", None, 1),
    ("an hour, now, now", None, 1),
    ("1 round, now", None, 1),
    ("2 rounds, 1 round", None, 1),
    ("1 round, 1 round", None, 0),
    ("never, 1 round, 1 round", None, 1),
    # A descriptor and a time in one round: what is found first does not count.
    ("readable, 1 round", None, 0),
    ("1 round, readable", None, 0),
    ("readable, writable", None, 0),
    ("writable, readable", None, 0),
    ("2 rounds, readable", None, 1),
    # The time is over in the round after the one in which it began. Who ends in that round counts.
    ("now", 0, 0),
    ("never", 0, None),
    ("1 round", 0, 0),
    ("readable", 0, 0),
    ("never, writable", 0, 1),
    ("2 rounds", 0, None),
    ("2 rounds, an hour, never", 0, None),
    ("now", -HOUR, 0),
    ("1 round", -HOUR, 0),
    ("never", -HOUR, None),
    ("never, readable", HOUR, 1),
    # One inside of another is decided first, and may still end in the round of the outer one.
    ("first of now, now", None, 0),
    ("now, first of now", None, 0),
    ("first of 1 round, 1 round", None, 0),
    ("first within 0, 1 round", None, 0),
    ("first within 0", 0, 0),
    ("first within 0, first of 1 round", 0, 0),
    ("first of 1 round, now", None, 1),
    # Times beyond what poll(2) takes.
    ("never, readable", 1e10, 1),
    ("never, readable", 1e300, 1),
    ("never, readable", math.inf, 1),
    ("", 0, None),
]


@pytest.mark.parametrize(("words", "within", "winner"), WINNERS)
def test_who_is_first(words: str, within: float | None, winner: int | None, pipe: Pipe, log: list[object]) -> None:
    names = words.split(", ") if words else []
    os.write(pipe[1], b"x")

    async def main() -> None:
        coroutines = [tell_end(log, str(position), WORDS[name](pipe)) for position, name in enumerate(names)]
        log.append(await first(*coroutines, within=within))

    run(main())
    assert log[-1] == winner
    assert {str(line).partition(" ")[0] for line in log[:-1]} == set(map(str, range(len(names)))), "all are over before"
    ended = [position for position in range(len(names)) if f"{position} ended" in log]
    assert winner == (ended[0] if ended else None)


# What a task can wait for when it is closed. The pipe is empty, and that of the second end full.
WAITS: dict[str, Callable[[Pipe, Pipe], Coro]] = {
    "sleep": lambda _, __: sleep(HOUR),
    "readable": lambda empty, _: readable(empty[0]),
    "writable": lambda _, full: writable(full[1]),
    "event": lambda _, __: wait_forever(),
    "first": lambda empty, _: first(wait_forever(), readable(empty[0])),
    "first within": lambda empty, _: first(readable(empty[0]), within=HOUR),
    "first of nothing": lambda _, __: first(),
    "nested": lambda empty, full: first(first(readable(empty[0]), first(writable(full[1]), within=HOUR)), sleep(HOUR)),
}


async def close_by_another(coroutine: Coro) -> None:
    assert await first(coroutine, sleep(0)) == 1


async def close_by_time(coroutine: Coro) -> None:
    assert await first(coroutine, within=0) is None


async def close_with_owner(coroutine: Coro) -> None:
    assert await first(first(coroutine, within=HOUR), sleep(0)) == 1


async def close_at_end_of_run(coroutine: Coro) -> None:
    spawn(coroutine)
    await sleep(0)


async def close_by_failure(coroutine: Coro) -> None:
    spawn(coroutine)
    await boom(1)


async def close_by_failure_beside(coroutine: Coro) -> None:
    await first(coroutine, boom(1))


CLOSERS = [
    close_by_another,
    close_by_time,
    close_with_owner,
    close_at_end_of_run,
    close_by_failure,
    close_by_failure_beside,
]


@pytest.mark.parametrize("close", CLOSERS)
@pytest.mark.parametrize("wait", WAITS)
def test_close_what_waits(
    wait: str, close: Callable[[Coro], Coro], pipe: Pipe, log: list[object], request: pytest.FixtureRequest
) -> None:
    full = os.pipe2(os.O_NONBLOCK)
    try:
        fill(full[1])
        coroutine = tell_end(log, "it", WAITS[wait](pipe, full))
        try:
            run(close(coroutine))
        except Boom:
            log.append("failed")
        assert log == ["it closed", "failed"] if "failure" in close.__name__ else log == ["it closed"]
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    finally:
        for descriptor in full:
            os.close(descriptor)


def test_the_innermost_is_closed_first(log: list[object]) -> None:
    async def owner(name: str, *inner: Coro) -> None:
        await tell_end(log, name, first(*inner))

    async def main() -> None:
        leaves = [tell_end(log, name, wait_forever()) for name in "abc"]
        await first(owner("outer", leaves[0], owner("inner", *leaves[1:])), sleep(0))

    run(main())
    assert log == ["a closed", "b closed", "c closed", "inner closed", "outer closed"]


def test_neighbours_are_closed_in_the_order_in_which_they_are_written(log: list[object]) -> None:
    async def main() -> None:
        await first(*(tell_end(log, name, wait_forever()) for name in "abc"), sleep(0))

    run(main())
    assert log == ["a closed", "b closed", "c closed"]


def test_at_the_end_of_a_run_the_latest_is_closed_first(log: list[object]) -> None:
    async def main() -> None:
        for name in "abc":
            spawn(tell_end(log, name, first(tell_end(log, f"in {name}", wait_forever()))))
        await sleep(0)

    run(main())
    assert log == ["in c closed", "in b closed", "in a closed", "c closed", "b closed", "a closed"]


def test_who_is_woken_while_a_neighbour_is_closed_is_closed_all_the_same(log: list[object]) -> None:
    event = Event()

    async def wake_others() -> None:
        try:
            await wait_forever()
        finally:
            event.set()

    async def main() -> None:
        log.append(await first(sleep(0), wake_others(), tell_end(log, "woken", event.wait())))
        await sleep(0)

    run(main())
    assert log == ["woken closed", 0]


def test_an_owner_is_closed_in_the_round_in_which_its_own_is_decided(log: list[object]) -> None:
    async def inner() -> None:
        log.append(await first(sleep(0), wait_forever()))
        await tell_end(log, "afterwards", wait_forever())

    async def main() -> None:
        log.append(await first(tell_end(log, "owner", inner()), sleep(0)))

    run(main())
    assert log == [0, "afterwards closed", "owner closed", 1]


def test_an_inner_one_that_goes_on_may_still_win(log: list[object]) -> None:
    async def go_on() -> None:
        await first(sleep(0))
        await first(end(log, "at once"))
        log.append("gone on")

    async def main() -> None:
        log.append(await first(go_on(), sleep(0), within=0))

    run(main())
    assert log == ["at once", "gone on", 0]


def test_an_owner_sees_what_was_done_by_those_that_were_closed(log: list[object]) -> None:
    async def main() -> None:
        event = Event()

        async def set_at_the_end() -> None:
            try:
                await wait_forever()
            finally:
                event.set()

        spawn(tell_end(log, "waiting", event.wait()))
        await first(set_at_the_end(), within=0)
        log.append("owner")

    run(main())
    assert log == ["waiting ended", "owner"]


# Exceptions.


async def fail_in_a_call() -> None:
    def fail() -> None:
        raise Boom

    after(0, fail)
    await wait_forever()


async def fail_beside(coroutine: Coro) -> None:
    spawn(coroutine)
    await wait_forever()


async def fail_deep_inside(rounds: int) -> None:
    async def spawn_and_wait() -> None:
        spawn(first(wait_forever(), fail_beside(first(boom(rounds), within=HOUR))))
        await wait_forever()

    await first(spawn_and_wait(), sleep(HOUR))


FAILURES: dict[str, Callable[[], Coro]] = {
    "main": boom,
    "main, later": lambda: boom(2),
    "one of several": lambda: first(wait_forever(), boom(), sleep(0)),
    "one of several, later": lambda: first(wait_forever(), boom(2), sleep(HOUR), within=HOUR),
    "spawned": lambda: fail_beside(boom()),
    "spawned, later": lambda: fail_beside(boom(2)),
    "called": fail_in_a_call,
    "deep inside": lambda: fail_deep_inside(0),
    "deep inside, later": lambda: fail_deep_inside(3),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_anywhere_ends_the_run(failure: str, log: list[object]) -> None:
    async def main() -> None:
        spawn(tell_end(log, "bystander", wait_forever()))
        await sleep(0)
        await tell_end(log, "main", FAILURES[failure]())

    with pytest.raises(Boom):
        run(main())
    assert "bystander closed" in log
    assert "main ended" not in log
    assert ("main closed" in log) == (not failure.startswith("main")), "only who awaits it sees the exception itself"


def test_who_awaits_a_failure_may_catch_it(log: list[object]) -> None:
    async def careful() -> None:
        with pytest.raises(Boom):
            await boom(1)
        log.append("caught")

    async def main() -> None:
        spawn(careful())
        await first(careful(), wait_forever())

    run(main())
    assert log == ["caught", "caught"]


def test_an_exception_of_one_is_not_an_exception_of_its_first(log: list[object]) -> None:
    async def main() -> None:
        try:
            await first(boom(1), wait_forever())
        except Boom:
            log.append("caught")

    with pytest.raises(Boom):
        run(main())
    assert log == []


def test_the_first_of_two_failures_is_raised() -> None:
    async def fail(number: int) -> None:
        await sleep(0)
        raise Boom(number)

    async def main() -> None:
        await first(wait_forever(), fail(1), fail(2))

    with pytest.raises(Boom, match="1"):
        run(main())


def test_a_failure_in_the_round_in_which_the_main_one_ends_is_raised() -> None:
    async def main() -> None:
        spawn(boom(1))
        await sleep(0)

    with pytest.raises(Boom):
        run(main())


def test_what_is_woken_as_the_last_thing_goes_on_to_where_it_waits_next(log: list[object]) -> None:
    async def work(event: Event) -> None:
        await tell_end(log, "first half", event.wait())
        await tell_end(log, "second half", sleep(0))

    async def main() -> None:
        event = Event()
        spawn(work(event))
        await sleep(0)
        event.set()
        log.append("main")

    run(main())
    assert log == ["main", "first half ended", "second half closed"]


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_program_ends_the_run(ending: type[BaseException], log: list[object]) -> None:
    async def fail() -> None:
        raise ending

    async def main() -> None:
        spawn(fail())
        await tell_end(log, "main", wait_forever())

    with pytest.raises(ending):
        run(main())
    assert log == ["main closed"]


# USR1, since INT may be ignored: it is where the tests run in the background.
INTERRUPTED = """
import signal
from portexec.parent.loop import readable, run

async def main():
    try:
        print("ready", flush=True)
        await readable(0)
    finally:
        print("closed", flush=True)

def fail(number, frame):
    raise InterruptedError

signal.signal(signal.SIGUSR1, fail)
try:
    run(main())
except InterruptedError:
    print("interrupted", flush=True)
"""


def test_a_signal_handler_that_raises_while_the_loop_waits_ends_the_run() -> None:
    words = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_for(lambda: status_of(process.pid)["State"].startswith("S"))
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=DEADLINE)[0] == "closed\ninterrupted\n"


def test_after_a_failure_the_next_run_knows_nothing_of_it(log: list[object]) -> None:
    event = Event()

    async def fail() -> None:
        spawn(tell_end(log, "of the first", event.wait()))
        await boom(1)

    async def main() -> None:
        event.set()
        await sleep(0)

    with pytest.raises(Boom):
        run(fail())
    assert log == ["of the first closed"]
    run(main())
    assert log == ["of the first closed"]


# What may happen while a task is closed.


async def do_at_the_end(act: Callable[[], object]) -> None:
    try:
        await wait_forever()
    finally:
        act()


@pytest.mark.parametrize("close", CLOSERS[:4])
def test_a_finally_may_raise(close: Callable[[Coro], Coro], log: list[object]) -> None:
    async def main() -> None:
        spawn(tell_end(log, "bystander", wait_forever()))
        await close(do_at_the_end(lambda: 1 // 0))

    with pytest.raises(ZeroDivisionError):
        run(main())
    assert log == ["bystander closed"]


def test_who_is_around_a_finally_that_raises_is_closed_too(log: list[object]) -> None:
    async def main() -> None:
        inner = tell_end(log, "inner", first(do_at_the_end(lambda: 1 // 0), tell_end(log, "beside", wait_forever())))
        await tell_end(log, "main", first(tell_end(log, "outer", first(inner)), sleep(0)))

    with pytest.raises(ZeroDivisionError):  # whose traceback holds all coroutines, so that none is closed by going away
        run(main())
    assert log == ["beside closed", "inner closed", "outer closed", "main closed"]


def test_the_first_failure_of_those_that_are_closed_at_the_end_is_raised() -> None:
    def fail(name: str) -> None:
        raise Boom(name)

    async def main() -> None:
        spawn(do_at_the_end(lambda: fail("closed last")))
        spawn(do_at_the_end(lambda: fail("closed first")))
        await sleep(0)

    with pytest.raises(Boom, match="closed first"):
        run(main())


def test_what_a_finally_raises_does_not_hide_why_the_run_failed(log: list[object]) -> None:
    async def main() -> None:
        spawn(do_at_the_end(lambda: 1 // 0))
        spawn(tell_end(log, "bystander", wait_forever()))
        await boom(1)

    with pytest.raises(Boom):
        run(main())
    assert log == ["bystander closed"]


@pytest.mark.parametrize("close", CLOSERS[:3])
def test_a_finally_may_spawn(close: Callable[[Coro], Coro], log: list[object]) -> None:
    async def main() -> None:
        await close(do_at_the_end(lambda: spawn(end(log, "spawned", 1))))
        await end(log, "main", 2)

    run(main())
    assert log == ["spawned", "main"]


@pytest.mark.parametrize("close", CLOSERS[3:])
def test_what_is_spawned_when_all_is_over_is_never_started(close: Callable[[Coro], Coro], log: list[object]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run(close(do_at_the_end(lambda: spawn(end(log, "spawned")))))
        except Boom:
            pass
        gc.collect()
    assert (log, told) == ([], [])


def test_a_coroutine_that_a_failure_left_no_time_to_start_is_closed(log: list[object]) -> None:
    async def main() -> None:
        await first(boom(), end(log, "never"))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(Boom):
            run(main())
        gc.collect()
    assert (log, told) == ([], [])


@pytest.mark.parametrize("close", CLOSERS[:4])
@pytest.mark.parametrize("wait", [lambda: sleep(0), wait_forever, first, lambda: readable(0)])
def test_a_finally_may_not_await(close: Callable[[Coro], Coro], wait: Callable[[], Coro], log: list[object]) -> None:
    async def linger() -> None:
        try:
            await wait_forever()
        finally:
            await wait()

    async def main() -> None:
        spawn(tell_end(log, "bystander", wait_forever()))
        await close(linger())

    with pytest.raises(RuntimeError, match=r"^task .*linger awaits while it is closed"):
        run(main())
    assert log == ["bystander closed"]


def test_a_runtime_error_of_a_finally_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    async def main() -> None:
        await first(do_at_the_end(fail), within=0)

    with pytest.raises(RuntimeError, match=r"^something else$"):
        run(main())


# Tasks.


def test_the_result_of_a_task() -> None:
    async def main() -> list[object]:
        tasks = [spawn(end([], "at once")), spawn(end([], "later", 1)), spawn(end([], "too late", 3))]
        found: list[object] = [(task.is_over, task.result) for task in tasks]
        await sleep(0)
        await sleep(0)
        return [*found, *((task.is_over, task.result) for task in tasks)]

    before, after_two_rounds = [(False, None)] * 3, [(True, "at once"), (True, "later"), (False, None)]
    assert run(main()) == [*before, *after_two_rounds]


def test_a_task_that_is_closed_is_over_without_a_result() -> None:
    async def main() -> loop.Task:
        return spawn(end([], "too late", 1))

    task = run(main())
    assert (task.is_over, task.result) == (True, None)


def test_what_is_spawned_starts_in_order_after_what_runs(log: list[object]) -> None:
    async def outer(name: str) -> None:
        spawn(end(log, f"inside of {name}"))
        log.append(name)

    async def main() -> None:
        spawn(outer("a"))
        spawn(outer("b"))
        log.append("main")
        await sleep(0)

    run(main())
    assert log == ["main", "a", "b", "inside of a", "inside of b"]


def test_a_task_outlives_the_one_that_spawned_it(log: list[object]) -> None:
    async def outer() -> None:
        spawn(end(log, "inside", 2))

    async def main() -> None:
        await first(outer())
        await end(log, "main", 3)

    run(main())
    assert log == ["inside", "main"]


def test_nothing_can_happen_any_more() -> None:
    async def stuck() -> None:
        await wait_forever()

    async def main() -> None:
        await first(sleep(HOUR), sleep(0))  # the hour is not waited for any more
        await first(stuck(), stuck())

    with pytest.raises(RuntimeError, match=r"^nothing can happen any more: task .*watched, task .*stuck, task .*stuck$"):
        run(main())


def test_to_wait_for_none_of_none_is_to_wait_forever() -> None:
    with pytest.raises(RuntimeError, match="nothing can happen any more"):
        run(first())


# Events.


def test_who_waits_for_an_event_is_woken_in_the_order_of_waiting(log: list[object]) -> None:
    async def wait(name: str, event: Event, rounds: int) -> None:
        await end([], "", rounds)
        await event.wait()
        log.append(name)

    async def main() -> None:
        event = Event()
        for name, rounds in {"c": 2, "a": 0, "b": 1, "d": 2}.items():
            spawn(wait(name, event, rounds))
        await end([], "", 3)
        event.set()
        log.append("set")
        await sleep(0)

    run(main())
    assert log == ["set", "a", "b", "c", "d"]


def test_an_event_happens_once(log: list[object]) -> None:
    async def main() -> None:
        event = Event()
        assert not event.is_set()
        event.set()
        event.set()
        assert event.is_set()
        spawn(end(log, "another"))
        await event.wait()
        log.append("nothing was in between")

    run(main())
    assert log == ["nothing was in between", "another"]


def test_an_event_may_happen_where_no_loop_runs() -> None:
    event = Event()
    event.set()
    assert event.is_set()
    assert run(first(event.wait())) == 0


def test_an_event_forgets_who_was_closed() -> None:
    event = Event()

    async def main() -> None:
        for _ in range(3):
            await first(event.wait(), event.wait(), within=0)

    run(main())
    assert not event.waiting


# Times.


def test_a_sleep_is_never_too_short() -> None:
    async def main() -> None:
        for seconds in (0.0, 0.0001, 0.001, 0.0101):
            begin = time.monotonic()
            await sleep(seconds)
            assert time.monotonic() >= begin + seconds
            assert await first(sleep(HOUR), within=seconds) is None
            assert time.monotonic() >= begin + 2 * seconds

    run(main())


def test_a_poll_that_ends_too_early_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LONGEST_POLL", 0.001)
    test_a_sleep_is_never_too_short()


def test_calls_come_in_order_of_time_and_then_of_call(log: list[object]) -> None:
    async def main() -> None:
        for name, hours in {"c": 1, "a": 3, "d": 0, "b": 2}.items():
            after(-HOUR * hours, lambda name=name: log.append(name))  # type: ignore[misc]
        for number in range(3):
            after(-math.inf, lambda number=number: log.append(number))  # type: ignore[misc]  # all at one time
        await sleep(0)

    run(main())
    assert log == [0, 1, 2, *"abcd"]


def test_the_time_of_a_call_begins_when_it_is_asked_for(log: list[object]) -> None:
    async def main() -> None:
        after(0.001, lambda: log.append("asked for before"))
        begin = time.monotonic()
        while time.monotonic() < begin + 0.002:
            pass  # as in a fork, which takes some time
        after(0, lambda: log.append("asked for afterwards"))
        await sleep(0)

    run(main())
    assert log == ["asked for before", "asked for afterwards"]


def test_thousands_of_timers_in_order_of_time(log: list[object]) -> None:
    count = 5003  # a prime, so that all multiples of another number are different below it
    hours = [1 + number * 1009 % count for number in range(count)]

    async def main() -> None:
        for one in hours:
            after(-HOUR * one, lambda one=one: log.append(one))  # type: ignore[misc]
            after(HOUR * one, lambda: log.append("too early"))
        await sleep(0)

    run(main())
    assert log == sorted(hours, reverse=True)


def test_timers_that_nobody_waits_for_do_not_pile_up() -> None:
    async def main() -> int:
        for _ in range(10_000):
            await first(end([], ""), within=HOUR)
        return len(loop._current().timers)

    assert run(main()) < 1_000


def test_descriptors_come_before_times(pipe: Pipe, log: list[object]) -> None:
    os.write(pipe[1], b"x")

    async def main() -> None:
        spawn(tell_end(log, "long due", sleep(-HOUR)))
        spawn(tell_end(log, "sleep", sleep(0)))
        spawn(tell_end(log, "readable", readable(pipe[0])))
        spawn(tell_end(log, "writable", writable(pipe[1])))
        await end([], "", 2)

    run(main())
    assert log == ["readable ended", "writable ended", "long due ended", "sleep ended"]


def test_all_that_follows_from_one_poll_happens_before_the_next(pipe: Pipe, log: list[object]) -> None:
    async def follow(count: int) -> None:
        event = Event()
        if count:
            spawn(follow(count - 1))
            await first(event.wait(), end(log, count))
        else:
            os.write(pipe[1], b"x")

    async def main() -> None:
        spawn(tell_end(log, "readable", readable(pipe[0])))
        spawn(follow(3))
        await sleep(0)
        log.append("slept")

    run(main())
    assert log == [3, 2, 1, "readable ended", "slept"]


# Descriptors.


def test_one_reads_and_another_writes_on_one_descriptor(log: list[object]) -> None:
    async def main() -> None:
        spawn(tell_end(log, "readable", readable(near)))
        assert await writable(near) == select.POLLOUT
        await end(log, "writable", 1)
        far.send(b"x")
        await end([], "", 1)
        log.append("slept")
        assert await first(readable(near), writable(near), readable(near)) == 0

    near, far = socket.socketpair()
    with near, far:
        run(main())
    assert log == ["writable", "readable ended", "slept"]


def test_all_who_wait_for_a_descriptor_are_woken_in_order(pipe: Pipe, log: list[object]) -> None:
    async def main() -> None:
        for name in "abc":
            spawn(tell_end(log, name, readable(pipe[0])))
        await first(readable(pipe[0]), within=0)
        os.write(pipe[1], b"x")
        await sleep(0)

    run(main())
    assert log == ["a ended", "b ended", "c ended"]


def test_news_end_a_wait_that_has_a_time_limit(pipe: Pipe) -> None:
    async def main() -> int | None:
        with subprocess.Popen(["true"], stdout=pipe[1]):
            os.close(pipe[1])
            return await first(writable(full[1]), readable(pipe[0]), within=HOUR)

    full = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fill(full[1])
    assert run(main()) == 1
    for fd in full:
        os.close(fd)


def test_a_descriptor_beyond_those_of_select(pipe: Pipe) -> None:
    async def main() -> None:
        assert await first(readable(high), within=0.0001) is None
        os.write(pipe[1], b"x")
        assert await first(readable(high), within=HOUR) == 0

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptor_limit()
    high = fcntl.fcntl(pipe[0], fcntl.F_DUPFD_CLOEXEC, 1024)
    try:
        run(main())
    finally:
        os.close(high)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_the_other_end_has_gone(pipe: Pipe) -> None:
    os.close(pipe[1])

    async def main() -> int:
        return await readable(pipe[0])

    assert run(main()) == select.POLLHUP


def test_nobody_reads_any_more(pipe: Pipe) -> None:
    fill(pipe[1])
    os.close(pipe[0])

    async def main() -> int:
        return await writable(pipe[1])

    assert run(main()) & select.POLLERR


def test_a_descriptor_is_closed_by_another_task(pipe: Pipe, log: list[object]) -> None:
    async def wait(descriptor: int) -> None:
        assert await readable(descriptor) == select.POLLNVAL
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(descriptor, 1)
        log.append("told")

    async def main() -> None:
        spawn(wait(pipe[0]))
        await sleep(0)
        os.close(pipe[0])
        await sleep(0)
        log.append("slept")

    run(main())
    assert log == ["told", "slept"]


@pytest.mark.parametrize("wait", [readable, writable])
def test_a_socket_that_was_closed_before(wait: Callable[[socket.socket], Coro]) -> None:
    near, far = socket.socketpair()
    near.close()
    with far, pytest.raises(OSError, match="Bad file descriptor"):
        run(first(wait(near), within=0))


def test_a_number_that_becomes_another_file(pipe: Pipe) -> None:
    async def main() -> int:
        await first(readable(pipe[0]), within=0)
        with open("/dev/zero", "rb") as zero:
            os.dup2(zero.fileno(), pipe[0])
        return await readable(pipe[0])

    assert run(main()) == select.POLLIN


# More than one loop.


def test_a_run_inside_of_a_run(log: list[object]) -> None:
    async def inner() -> str:
        spawn(tell_end(log, "inner", wait_forever()))
        await end(log, "inner main", 2)
        return "result"

    async def main() -> None:
        spawn(end(log, "outer", 1))
        await sleep(0)
        log.append(run(inner()))
        await sleep(0)
        log.append("outer main")

    run(main())
    assert log == ["inner main", "inner closed", "result", "outer", "outer main"]


def test_a_run_inside_of_a_run_fails(log: list[object]) -> None:
    async def main() -> None:
        spawn(end(log, "outer", 1))
        with pytest.raises(Boom):
            run(boom(2))
        await sleep(0)
        await sleep(0)

    run(main())
    assert log == ["outer"]


def test_an_event_of_the_outer_run_wakes_in_the_outer_run(log: list[object]) -> None:
    async def inner(event: Event) -> None:
        event.set()
        await end(log, "inner", 2)

    async def main() -> None:
        event = Event()
        spawn(tell_end(log, "outer", event.wait()))
        await sleep(0)
        run(inner(event))
        await sleep(0)

    run(main())
    assert log == ["inner", "outer ended"]


FORK = """
import os
from portexec.parent.loop import Event, readable, run, sleep, spawn

async def of_the_child(writer):
    event.set()
    spawn(sleep(3600))
    await sleep(0)
    os.write(writer, b"child\\n")

async def bystander():
    try:
        await event.wait()
    finally:
        print("bystander of", "the child" if os.getpid() != parent else "the parent")

async def main():
    reader, writer = os.pipe()
    spawn(bystander())
    await sleep(0)
    pid = os.fork()
    if pid == 0:
        run(of_the_child(writer))
        os._exit(7)
    os.close(writer)  # so that a child that says nothing ends the wait, too
    await readable(reader)
    print(os.read(reader, 100), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

parent, event = os.getpid(), Event()
run(main())
"""


def test_a_forked_child_has_a_loop_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert (done.stdout, done.stderr) == ("b'child\\n' 7\nbystander of the parent\n", "")


# A part of a run


class Around:
    """What is around the steps of a part: it says in which."""

    def __init__(self, name: str, log: list[object]) -> None:
        self.name = name
        self.log = log
        self.is_inside = False

    def __enter__(self) -> None:
        assert not self.is_inside
        self.is_inside = True

    def __exit__(self, *_: object) -> None:
        self.is_inside = False


def test_a_part_ends_with_its_main_coroutine_and_closes_what_it_has_spawned(log: list[object]) -> None:
    around = Around("part", log)

    async def linger() -> None:
        try:
            await sleep(HOUR)
        finally:
            log.append(("closed", around.is_inside))

    async def main() -> str:
        spawn(linger())
        after(HOUR, lambda: log.append("never"))
        await first(sleep(0), linger())
        log.append(("goes on", around.is_inside))
        return "over"

    async def outer() -> None:
        log.append(await isolated(main(), around))
        log.append(("outside", around.is_inside))
        await sleep(0)

    run(outer())
    assert log == [("closed", True), ("goes on", True), ("closed", True), "over", ("outside", False)]


class Foreign:
    """Something to await that is of another loop."""

    def __await__(self) -> Generator[object, None, None]:
        yield object()


@pytest.mark.parametrize("where", ["main", "spawned", "first", "after", "foreign"])
def test_a_failure_ends_the_part_and_no_other(where: str, log: list[object]) -> None:
    def fail() -> None:
        raise Boom

    async def boom() -> None:
        await sleep(0)
        fail()

    async def main() -> None:
        if where == "spawned":
            spawn(boom())
        elif where == "first":
            await first(boom(), sleep(HOUR))
        elif where == "after":
            after(0, fail)
        elif where == "foreign":
            await Foreign()
        else:
            await boom()
        await sleep(HOUR)

    async def other(go_on: Event) -> str:
        await go_on.wait()
        return "the other goes on"

    async def beside(go_on: Event) -> None:
        log.append(await isolated(other(go_on), Around("other", log)))

    async def outer() -> None:
        go_on = Event()
        task = spawn(beside(go_on))
        with pytest.raises(AttributeError if where == "foreign" else Boom):
            await isolated(main(), Around("part", log))
        go_on.set()
        while not task.is_over:
            await sleep(0)

    run(outer())
    assert log == ["the other goes on"]


@pytest.mark.parametrize("where", ["loser", "inner first", "spawned", "inner part"])
def test_a_failure_of_a_close_ends_the_part_and_no_other(where: str, log: list[object]) -> None:
    """What a `finally` raises counts as what a task raises; all others of the part are closed all the same."""

    async def fail_at_the_end() -> None:
        try:
            await sleep(HOUR)
        finally:
            raise Boom

    async def linger() -> None:
        try:
            await sleep(HOUR)
        finally:
            log.append("closed")

    async def main() -> None:
        spawn(linger())
        await sleep(0)
        if where == "loser":
            await first(sleep(0), linger(), fail_at_the_end(), linger())
        elif where == "inner first":
            await first(sleep(0), first(linger(), fail_at_the_end(), linger()))
        elif where == "inner part":
            spawn(isolated(first(linger(), fail_at_the_end(), linger()), Around("inner", log)))
            await sleep(0)
        else:
            for task in linger(), fail_at_the_end(), linger():
                spawn(task)
            await sleep(0)
        log.append("goes on")

    async def outer() -> None:
        await sleep(0)
        with pytest.raises(Boom):
            await isolated(main(), Around("part", log))
        log.append("outer")
        await sleep(0)

    run(outer())
    goes_on = where in {"spawned", "inner part"}  # the part ends anyhow, and closes those then
    assert log == ["goes on"] * goes_on + ["closed"] * 3 + ["outer"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_is_around_may_fail_at_any_step(step: int, log: list[object]) -> None:
    class Failing(Around):
        steps = 0

        def __enter__(self) -> None:
            self.steps += 1
            if self.steps == step:
                raise Boom

    async def main() -> None:
        try:
            await sleep(0)
            await sleep(0)
        finally:
            log.append("closed")

    async def outer() -> None:
        with pytest.raises(Boom):
            await isolated(main(), Failing("part", log))
        assert log == ["closed"] * (step > 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a coroutine that is never awaited would write
        run(outer())


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_failure_while_a_part_is_closed_from_outside(is_apart: bool, log: list[object]) -> None:
    async def fail_at_the_end() -> None:
        try:
            await sleep(HOUR)
        finally:
            raise Boom

    async def outer() -> None:
        part = isolated(fail_at_the_end(), Around("part", log))
        await first(sleep(0), isolated(part, Around("around it", log)) if is_apart else part)
        log.append("never")

    with pytest.raises(Boom):
        run(outer())
    assert log == []


def test_a_part_is_closed_with_who_waits_for_it(log: list[object]) -> None:
    async def spawned() -> None:
        try:
            await sleep(HOUR)
        finally:
            log.append("spawned")

    async def main() -> None:
        spawn(spawned())
        try:
            await sleep(HOUR)
        finally:
            log.append("main")

    async def outer() -> None:
        assert await first(isolated(main(), Around("part", log)), within=0) is None
        log.append("outer")

    run(outer())
    assert log == ["spawned", "main", "outer"]
