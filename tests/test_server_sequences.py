"""Sequences of starts, stops, restarts, deaths and forks in any order, in plain code, asyncio and trio: nothing is left of any.

Two servers at a time, each on one kind of listener, so that a sequence is about what was done before to the same one as well
as about its neighbour.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import portexec
from tests.support import get, wait_for
from tests.support.installed import need
from tests.support.proc import status_of
from tests.support.serving import LIGHT, ON_FD, describe, descriptors, greeting, hook, marked, marking

Serving = Callable[[], portexec.Serving]
STEPS = ["start", "stop", "restart", "kill", "behead", "get", "leave", "fail", "hurry", "fork"]
SEQUENCES = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1)), min_size=2, max_size=6)
BACKENDS = ["plain", "asyncio", "trio"]


class Slot:
    """The place of one server: how it is served, the block that was entered, and what should be true of it."""

    def __init__(self, make: Callable[..., portexec.Serving], is_plain: bool) -> None:
        self.make = make
        self.is_plain = is_plain
        self.block: portexec.Serving | None = None
        self.server: Any = None
        self.is_running = False

    async def call(self, name: str) -> Any:
        """Call a method of the server, which in async code is to be awaited."""
        result = getattr(self.server, name)()
        return result if self.is_plain else await result

    async def start(self, **options: Any) -> None:
        if self.block is not None:
            return
        block = self.make(**options)
        self.server = block.__enter__() if self.is_plain else await block.__aenter__()
        self.block, self.is_running = block, True
        await self.get()

    async def fail(self) -> None:
        if self.block is None:
            with pytest.raises(portexec.Exited, match="exit status 3"):
                await self.start(word="exit=3")

    async def hurry(self) -> None:
        """Start it, and lose patience at some moment."""
        if self.is_plain:
            return
        with anyio.move_on_after(0.1):
            await self.start()

    async def stop(self) -> None:
        if self.block is not None:
            await self.call("stop")
            self.is_running = False

    async def restart(self) -> None:
        if self.is_running:
            url, pid = self.server.url, self.server.pid
            await self.call("restart")
            assert self.server.url == url
            assert self.server.pid != pid
            await self.get()
        elif self.block is not None:
            with pytest.raises(portexec.NotRunning):
                await self.call("restart")

    async def kill(self) -> None:
        if self.is_running:
            os.kill(self.server.pid, signal.SIGKILL)
            self.is_running = False
            assert await self.call("wait") == -signal.SIGKILL

    async def behead(self) -> None:
        """Kill the portexec that runs it."""
        if self.is_running:
            os.kill(hook(self.server), signal.SIGKILL)
            self.is_running = False
            with pytest.raises(portexec.Exited):
                await self.call("wait")

    async def fork(self) -> None:
        """The child of a fork has no part in the server, and leaves it alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, where there are threads
            pid = os.fork()
        if pid == 0:
            os._exit(self.look_as_child())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        await self.get()

    def look_as_child(self) -> int:
        """0 if all is as it should be."""
        try:
            if self.server is not None and self.is_plain:
                self.server.stop()
                self.server.wait()
        except portexec.NotRunning:
            pass
        except BaseException:
            return 1
        return 0 if self.server is None or self.server.died() is None else 2

    async def get(self) -> None:
        if self.is_running and self.server.port:
            assert get(self.server.url) == greeting(self.server)

    async def leave(self) -> None:
        """Leave the block, after which another one can be entered."""
        if self.block is not None:
            block, self.block, self.is_running = self.block, None, False
            if self.is_plain:
                block.__exit__(None, None, None)
            else:
                await block.__aexit__(None, None, None)


async def carry_out(sequence: list[tuple[str, int]], slots: list[Slot]) -> None:
    try:
        for step, number in sequence:
            action: Callable[[], Awaitable[None]] = getattr(slots[number], step)
            await action()
    finally:
        for slot in slots:
            await slot.leave()


def run(backend: str, coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what never waits by itself, or what needs a loop."""
    if backend != "plain":
        anyio.run(coroutine, backend=backend)
        return
    try:
        coroutine().send(None)
    except StopIteration:
        return
    raise AssertionError("plain code has awaited something")


@contextmanager
def nothing_is_left() -> Iterator[Path]:
    """Fail if the block leaves a process, a thread, a descriptor, or a file in the directory that it gets."""
    before, threads = descriptors(), threading.active_count()
    with marking() as mark:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            left = [entry.name for entry in Path(name).iterdir()]
            wait_for(lambda: not marked(mark))  # of a portexec that was killed there is something for a moment
            wait_for(lambda: threading.active_count() <= threads)
        assert left == []
        assert descriptors() == before


def slots_in(place: Path, is_plain: bool) -> list[Slot]:
    def by_number(word: str = "") -> portexec.Serving:
        return portexec.serve([*LIGHT, *[word] * bool(word)], hand_off="guard", kill_after=1)

    def on_a_path(word: str = "") -> portexec.Serving:
        return portexec.serve([*ON_FD, *[word] * bool(word)], listen=f"unix:{place}/s", kill_after=1)

    return [Slot(by_number, is_plain), Slot(on_a_path, is_plain)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@example(sequence=[("start", 0), ("start", 1), ("restart", 0), ("kill", 1), ("restart", 1), ("leave", 1), ("start", 1)])
@example(sequence=[("start", 1), ("behead", 1), ("restart", 1), ("leave", 1), ("start", 1), ("stop", 1)])
@example(sequence=[("start", 0), ("fork", 0), ("restart", 0), ("start", 1), ("kill", 1), ("fork", 1)])
@example(sequence=[("hurry", 0), ("fail", 1), ("start", 1), ("restart", 1), ("stop", 0), ("restart", 0)])
@given(sequence=SEQUENCES)
def test_nothing_is_left_of_any_sequence(backend: str, sequence: list[tuple[str, int]]) -> None:
    need([] if backend == "plain" else [backend])
    with nothing_is_left() as place:
        slots = slots_in(place, backend == "plain")
        run(backend, lambda: carry_out(sequence, slots))


def test_what_is_left_is_seen() -> None:
    """That the test above could fail: for a process, a descriptor and a file."""
    with pytest.raises(AssertionError, match="left"), nothing_is_left() as place:
        (place / "left").touch()
    with pytest.raises(AssertionError), nothing_is_left():
        reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with marking() as mark:
        with portexec.serve(ON_FD) as server:
            assert {server.pid, int(status_of(server.pid)["PPid"])} <= marked(mark)  # the shim, too
            assert any("light.py" in line for line in describe(marked(mark)))
        assert marked(mark) == set()
