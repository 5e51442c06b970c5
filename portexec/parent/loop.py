"""The loop: coroutines on one poll(2), for the processes of portexec. One thread, no futures.

    run(coroutine)                  run it to its end, with all that it spawns, and return what it returns
    spawn(coroutine)                run another one beside it, until the run ends
    after(seconds, call)            call a function later
    await sleep(seconds)
    await readable(fd)              until the descriptor can be read, or its other end has gone; also writable(fd)
    await event.wait()              until somebody calls event.set()
    await first(a(), b(), within=3) run them until one has ended, and close the others
    await isolated(a(), around)     run one to its end, with all that it spawns, as `run` does, inside of another run

How it behaves:

- A *round* is one poll(2) and all that follows from what it found: descriptors first, then the timers that are due.
- Several coroutines of one `first` may end in one round. Then the one that is written first counts, and a coroutine that has
  ended counts before the time that is over. So the order of simultaneous events stands in the program text.
- To cancel is to close a coroutine: Python raises GeneratorExit where it waits, and its `finally` runs. The loop closes only
  between the steps of tasks, never from inside one, and the innermost first. A `finally` may not await: nobody would wait for
  it. So what has to be waited for at the end must not be in a `finally`.
- An exception in any task ends the run, or the `isolated` part that the task belongs to. So does an exception in a `finally` of
  a task that is closed. All other tasks of the run or part are closed, and `run` or `isolated` raises the first exception. An
  expected exception is to be caught inside the coroutine that `spawn` or `first` is given; a plain `await f()` raises as ever.
- A task that another task starts belongs to the same part as that one.
- A descriptor that is closed while somebody waits for it wakes that task, whose next call fails with EBADF. Close the task
  first, since the number may soon be another file's.
"""

from __future__ import annotations

import errno
import os
import select
import time
from _heapq import heapify, heappop, heappush  # what heapq has them from

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
    from typing import Any, Protocol, TypeVar

    T = TypeVar("T")

    class Around(Protocol):
        """A context manager that can be entered again and again."""

        def __enter__(self) -> object:
            """A step of a task begins."""

        def __exit__(self, *_: object) -> None:
            """The step is over."""

    class HasFileno(Protocol):
        """A socket or a file."""

        def fileno(self) -> int:
            """Its descriptor."""


_LONGEST_POLL = 3600.0  # seconds; poll(2) takes an int of milliseconds, which ends after 24 days
_SHORTEST_POLL = 0.001  # seconds
_FEW = 64  # up to so many timers, those that no task waits for any more stay in the heap until their time has come


class Task:
    """A coroutine that the loop runs. `is_over`: it has ended or was closed; `result` is what it returned."""

    __slots__ = ("coroutine", "group", "is_over", "part", "result", "wait")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], group: _Group | None = None) -> None:
        self.coroutine = coroutine
        self.group = group  # the `first` that it belongs to
        self.part: _Part | None = None  # the `isolated` that it belongs to
        self.is_over = False
        self.result: Any = None
        self.wait: _Wait | None = None  # what it waits for at the moment

    def __repr__(self) -> str:
        return f"task {getattr(self.coroutine, '__qualname__', self.coroutine)}"


class _Wait:
    """What one task waits for: a descriptor, a moment, an event, the first of several coroutines, or a part of the run."""

    __slots__ = ("deadline", "event", "fd", "group", "mask", "part", "task")

    def __init__(
        self,
        *,
        fd: int = -1,
        mask: int = 0,
        deadline: float | None = None,
        event: Event | None = None,
        group: _Group | None = None,
        part: _Part | None = None,
    ) -> None:
        self.fd = fd
        self.mask = mask
        self.deadline = deadline
        self.event = event
        self.group = group
        self.part = part
        self.task: Task | None = None  # None again when it is over

    def __await__(self) -> Generator[_Wait, Any, Any]:
        return (yield self)


class _Group:
    """The coroutines of one `first`, and the task that waits for it."""

    __slots__ = ("number", "tasks", "wait")

    def __init__(self, coroutines: tuple[Coroutine[Any, Any, Any], ...]) -> None:
        self.tasks = [Task(coroutine, self) for coroutine in coroutines]
        self.number = 0  # a group inside another one has a higher number
        self.wait: _Wait | None = None


class _Part:
    """A part of a run: one coroutine, all that it has spawned, and what is around each of their steps."""

    __slots__ = ("around", "failure", "main", "number", "tasks", "wait")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], around: Around) -> None:
        self.around = around
        self.main = Task(coroutine)
        self.failure: Exception | None = None
        self.number = 0  # a part inside another one has a higher number
        self.tasks: dict[Task, None] = {}
        self.wait: _Wait | None = None


class Event:
    """Something that happens once. Those that wait are woken in the order in which they came."""

    __slots__ = ("_is_set", "waiting")

    def __init__(self) -> None:
        self._is_set = False
        self.waiting: dict[_Wait, _Loop] = {}  # a fork's own loop does not run the tasks of the parent's

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set

    def set(self) -> None:
        """Wake all tasks that wait. A second call does nothing."""
        self._is_set = True
        waiting, self.waiting = self.waiting, {}
        for wait, its_loop in waiting.items():
            its_loop.wake(wait)

    async def wait(self) -> None:
        """Return when it has happened, at once if it has."""
        if not self._is_set:
            await _Wait(event=self)


async def sleep(seconds: float) -> None:
    """Return after so many seconds; with 0, after the loop has looked at all descriptors once."""
    await _Wait(deadline=time.monotonic() + seconds)


async def readable(file: int | HasFileno) -> int:
    """Return when the descriptor can be read without blocking; what poll(2) found, perhaps POLLHUP alone."""
    found: int = await _Wait(fd=_number(file), mask=select.POLLIN)
    return found


async def writable(file: int | HasFileno) -> int:
    """Return when something can be written to the descriptor; what poll(2) found."""
    found: int = await _Wait(fd=_number(file), mask=select.POLLOUT)
    return found


async def first(*coroutines: Coroutine[Any, Any, Any], within: float | None = None) -> int | None:
    """Run these until one of them has ended, and close the others. Returns the position of the one that ended.

    `within`: seconds after which all are closed; then the answer is None.
    """
    deadline = None if within is None else time.monotonic() + within
    winner: int | None = await _Wait(deadline=deadline, group=_Group(coroutines))
    return winner


async def isolated(coroutine: Coroutine[Any, Any, T], around: Around) -> T:
    """Run a coroutine and what it spawns to its end, as a part of this run. Raises what any of them raises.

    Afterwards nothing of the part is running. When the main coroutine has ended, no `first` of the part is decided any
    more. `around` is entered before each step of the part's tasks, and left after it.
    """
    part = _Part(coroutine, around)
    await _Wait(part=part)
    if part.failure is not None:
        raise part.failure
    result: T = part.main.result
    return result


def spawn(coroutine: Coroutine[Any, Any, Any]) -> Task:
    """Run a coroutine beside the others, until it ends, or the run or the part of it that the caller belongs to."""
    loop = _current()
    return loop.start(Task(coroutine), loop.part)


def after(seconds: float, call: Callable[[], object]) -> Task:
    """Call a function in so many seconds, unless the run ends before."""

    deadline = time.monotonic() + seconds  # from now on, not from when the task comes to run

    async def wait_and_call() -> None:
        await _Wait(deadline=deadline)
        call()

    return spawn(wait_and_call())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine and what it spawns to its end. Raises what any of them raises. Nothing is left running in both cases."""
    global _running  # noqa: PLW0603  # there is one at a time
    outer, loop = _running, _Loop()
    _running = loop
    try:
        result: T = loop.run(coroutine)
        return result
    finally:
        _running = outer


class _Loop:
    def __init__(self) -> None:
        self.tasks: dict[Task, None] = {}  # in the order of their start; a dict, since a set has none
        self.ready: list[tuple[Task, Any]] = []
        self.watched: dict[int, list[_Wait]] = {}
        self.timers: list[tuple[float, int, _Wait]] = []
        self.ending: dict[_Group, None] = {}  # groups of which a coroutine has ended, or the time is over
        self.ending_parts: dict[_Part, None] = {}
        self.part: _Part | None = None  # of the task that makes a step
        self.poll = select.poll()
        self.count = 0

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        main = self.start(Task(coroutine), None)
        try:
            while not main.is_over:
                self.finish_round()
                if not main.is_over:
                    self.wait_for_news()
        except BaseException:
            self.close(_latest(self.tasks))
            raise
        failure = self.close(_latest(self.tasks))
        if failure is not None:
            raise failure
        return main.result

    def start(self, task: Task, part: _Part | None) -> Task:
        self.tasks[task] = None
        task.part = part
        if part is not None:
            part.tasks[task] = None
        self.ready.append((task, None))
        return task

    def finish_round(self) -> None:
        """Run all tasks that can go on; then end the parts that are over, and decide one `first` after the other.

        All parts come before any `first`. Of two parts, or of two of `first`, the inner one comes before the one around it.
        """
        while self.ready or self.ending_parts or self.ending:
            batch, self.ready = self.ready, []
            for task, value in batch:
                if not task.is_over:
                    self.step(task, value)
            if not self.ready and self.ending_parts:
                self.end_part(max(self.ending_parts, key=lambda part: part.number))
            elif not self.ready and self.ending:
                self.decide(max(self.ending, key=lambda group: group.number))

    def step(self, task: Task, value: Any) -> None:
        try:
            self.begin_wait(task, self.within(task.part, lambda: task.coroutine.send(value)))
        except StopIteration as end:
            task.is_over, task.result = True, end.value
            self.forget(task)
            if task.group is not None:
                self.ending[task.group] = None
            if task.part is not None and task is task.part.main:
                self.ending_parts[task.part] = None
        except Exception as error:
            self.close_one(task)  # it may not be over: `around` has failed, or what it waits for
            self.fail(task.part, error)

    def fail(self, part: _Part | None, error: BaseException) -> None:
        """End a part of the run for an exception in a task of it; without a part, raise it, which ends the run."""
        if part is None or not isinstance(error, Exception):
            raise error
        part.failure = part.failure or error
        self.ending_parts[part] = None

    def within(self, part: _Part | None, act: Callable[[], Any]) -> Any:
        """Make a step of a task of this part, or close it, inside of the part's `around`."""
        if part is None:
            return act()
        outer, self.part = self.part, part
        try:
            with part.around:
                return act()
        finally:
            self.part = outer

    def forget(self, task: Task) -> None:
        self.tasks.pop(task, None)
        if task.part is not None:
            task.part.tasks.pop(task, None)

    def begin_wait(self, task: Task, wait: _Wait) -> None:
        wait.task, task.wait = task, wait  # in this order: what is no wait of ours fails here
        self.count += 1
        if wait.fd >= 0:
            self.watched.setdefault(wait.fd, []).append(wait)
            self.watch(wait.fd)
        if wait.deadline is not None:
            heappush(self.timers, (wait.deadline, self.count, wait))
            if len(self.timers) > 2 * len(self.tasks) + _FEW:
                self.timers = [timer for timer in self.timers if timer[2].task is not None]
                heapify(self.timers)
        if wait.event is not None:
            wait.event.waiting[wait] = self
        if wait.group is not None:
            wait.group.number, wait.group.wait = self.count, wait
            for child in wait.group.tasks:
                self.start(child, task.part)
        if wait.part is not None:
            wait.part.number, wait.part.wait = self.count, wait
            self.start(wait.part.main, wait.part)

    def wake(self, wait: _Wait, value: Any = None) -> None:
        if wait.task is not None:
            self.ready.append((wait.task, value))
            self.end_wait(wait)

    def end_wait(self, wait: _Wait) -> None:
        if wait.task is not None:
            wait.task.wait = None
            wait.task = None
        if wait.fd >= 0:
            self.watched[wait.fd].remove(wait)
            self.watch(wait.fd)
        if wait.event is not None:
            wait.event.waiting.pop(wait, None)

    def watch(self, fd: int) -> None:
        """Have poll(2) look for what tasks wait for on this descriptor."""
        waits = self.watched[fd]
        if waits:
            self.poll.register(fd, sum({wait.mask for wait in waits}))
        else:
            self.poll.unregister(fd)
            del self.watched[fd]

    def decide(self, group: _Group) -> None:
        """Close what has not ended of a `first`, and tell the task that waits for it which one has."""
        del self.ending[group]
        wait = group.wait
        if wait is None or wait.task is None:
            return
        winner = next((position for position, task in enumerate(group.tasks) if task.is_over), None)
        failure = self.close(group.tasks)
        if failure is None:
            self.wake(wait, winner)
        else:
            self.fail(wait.task.part, failure)

    def end_part(self, part: _Part) -> None:
        """Close the tasks that are left of a part, and wake the task that waits for the part."""
        failure = self.close(_latest(part.tasks))
        if failure is not None:
            self.fail(part, failure)
        del self.ending_parts[part]
        if part.wait is not None:
            self.wake(part.wait)

    def close(self, tasks: Iterable[Task]) -> BaseException | None:
        """Close these tasks, all of them. Returns the first failure of a close."""
        return _first([self.close_one(task) for task in tasks])

    def close_one(self, task: Task) -> BaseException | None:
        """Close a task, and before it those of the `first`, or of the part, that it waits for. Returns the first failure."""
        if task.is_over:
            return None
        task.is_over = True
        self.forget(task)
        wait = task.wait
        inner: Iterable[Task] = ()
        if wait is not None and wait.group is not None:
            inner = wait.group.tasks
        elif wait is not None and wait.part is not None:
            inner = _latest(wait.part.tasks)
            self.ending_parts.pop(wait.part, None)
        return _first(
            [
                _failure_of(lambda: None if wait is None else self.end_wait(wait)),
                self.close(inner),
                _failure_of(lambda: self.close_coroutine(task)),
            ]
        )

    def close_coroutine(self, task: Task) -> None:
        try:
            try:
                self.within(task.part, task.coroutine.close)
            finally:
                task.coroutine.close()  # where `around` has failed; a second call does nothing
        except RuntimeError as error:
            if "ignored GeneratorExit" not in str(error):
                raise
            raise RuntimeError(f"{task!r} awaits while it is closed; what is in its `finally` may not") from error

    def wait_for_news(self) -> None:
        """One poll(2): wake those whose descriptor has news, and then those whose time has come."""
        while self.timers and self.timers[0][2].task is None:
            heappop(self.timers)  # no task waits for this one any more
        if not self.timers and not self.watched:
            raise RuntimeError(f"nothing can happen any more: {', '.join(map(repr, self.tasks))}")
        seconds = _LONGEST_POLL
        if self.timers:
            seconds = min(seconds, max(0.0, self.timers[0][0] - time.monotonic()))
        if 0 < seconds < _SHORTEST_POLL:
            seconds = self.doze(seconds)
        for fd, found in self.poll.poll(1000 * seconds):
            for wait in list(self.watched.get(fd, ())):
                if found & (wait.mask | ~(select.POLLIN | select.POLLOUT)):
                    self.wake(wait, found)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            wait = heappop(self.timers)[2]
            if wait.group is not None and wait.task is not None:
                self.ending[wait.group] = None
            else:
                self.wake(wait)

    def doze(self, seconds: float) -> float:
        """Wait for news for less than poll(2) can. Returns the seconds that are left, for poll(2).

        All are left where select(2) cannot look at a descriptor: one that was closed, or one beyond the first 1024.
        """
        readers, writers = (
            [fd for fd, waits in self.watched.items() if any(wait.mask & kind for wait in waits)]
            for kind in (select.POLLIN, select.POLLOUT)
        )
        try:
            select.select(readers, writers, (), seconds)
        except (OSError, ValueError):
            return seconds
        return 0.0


_running: _Loop | None = None


def _current() -> _Loop:
    assert _running is not None, "no loop runs"  # noqa: S101  # a mistake of ours and nobody else's
    return _running


def _latest(tasks: dict[Task, None]) -> Iterator[Task]:
    """The latest task, as long as there is one."""
    while tasks:
        yield next(reversed(tasks))


def _first(failures: Iterable[BaseException | None]) -> BaseException | None:
    return next(filter(None, failures), None)


def _failure_of(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def _number(file: int | HasFileno) -> int:
    descriptor = file if isinstance(file, int) else file.fileno()
    if descriptor < 0:  # poll(2) would ignore it, and the task wait forever
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return descriptor
