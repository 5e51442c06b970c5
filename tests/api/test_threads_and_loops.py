"""Servers among exceptions, interrupts, threads, running loops and cancelled tasks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import portexec
from tests.support import DEADLINE, get, read_line, wait_for
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    WAIT_FOR_EVER,
    caller,
    describe,
    descriptors,
    greeting,
    marked,
)

# Exceptions, threads and loops


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_stops_the_server(kind: type[BaseException], mark: str) -> None:
    with pytest.raises(kind, match="ours"), portexec.serve(LIGHT) as server:
        raise kind("ours")
    assert describe(marked(mark)) == []
    assert server.returncode == -signal.SIGTERM


def test_ctrl_c_while_it_starts(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "started"
    command = ["sh", "-c", f"touch {file}; exec sleep 1000"]
    with caller(WAIT_FOR_EVER, *command) as calling:
        wait_for(file.exists)
        calling.send_signal(signal.SIGINT)
        assert read_line(calling) == "interrupted"
        assert calling.wait(DEADLINE) == 0
        wait_for(lambda: not marked(mark))  # its host ends when it has


def test_interrupted_while_the_thread_starts(mark: str) -> None:
    """So that it starts afterwards, and has to see that it is to do nothing."""
    wait = threading.Event.wait

    def interrupt(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(event, timeout)

    serving = portexec.serve(LIGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            serving.__enter__()
    wait_for(lambda: not has_thread())
    assert describe(marked(mark)) == []


def test_interrupted_when_it_is_ready(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("portexec.api.serve.Server", interrupt)
    with pytest.raises(KeyboardInterrupt):
        portexec.serve(LIGHT).__enter__()
    assert describe(marked(mark)) == []


def test_many_servers_from_threads(mark: str) -> None:
    numbers: set[int] = set()
    together = threading.Barrier(12, timeout=DEADLINE)

    def serve(hand_off: str) -> int:
        with portexec.serve(LIGHT, hand_off=hand_off) as server:
            together.wait()  # all of them run now
            assert get(server.url) == greeting(server)
            numbers.add(server.port)
            together.wait()
            return server.returncode or 0

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(serve, ["fd", "guard"] * 6)) == [0] * 12
    assert len(numbers) == 12
    assert describe(marked(mark)) == []


@IN_ASYNC_CODE
async def test_inside_an_application_with_threads_and_a_running_loop(tmp_path: Path) -> None:
    """The loop goes on while servers start and stop, and plain servers may be used from threads beside it.

    The server goes on with its start when a task of the loop tells it to.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = ["sh", "-c", f'read line < {pipe}; exec "$@"', "sh", *LIGHT]
    told = 0
    over = anyio.Event()

    async def tell() -> None:
        nonlocal told
        while not over.is_set():
            with contextlib.suppress(OSError):  # no server waits, or it does not any more
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                with open(writer, "w") as file:
                    file.write("go on\n")
                told += 1
            await anyio.sleep(0.001)

    def plain() -> None:
        with portexec.serve(LIGHT) as server:
            assert get(server.url) == greeting(server)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tell)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(plain)
        async with portexec.serve(waiting) as server:
            assert told > 0
            told = 0
            await server.restart()
            assert told > 0
            assert get(server.url) == greeting(server)
        over.set()


def test_no_thread_is_left() -> None:
    wait_for(lambda: not has_thread())  # of the server of another test
    with portexec.serve(LIGHT):
        assert has_thread()
    wait_for(lambda: not has_thread())


def has_thread() -> bool:
    return any(thread.name == "portexec" for thread in threading.enumerate())


# Cancellation


@IN_ASYNC_CODE
async def test_cancelled_while_it_starts(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "started"
    before = descriptors().keys()
    reached = []
    async with anyio.create_task_group() as tasks:

        async def serve() -> None:
            async with portexec.serve(["sh", "-c", f"touch {file}; exec sleep 1000"]):
                reached.append("the block")

        tasks.start_soon(serve)
        await anyio.to_thread.run_sync(wait_for, file.exists)
        tasks.cancel_scope.cancel()
    assert reached == []
    assert describe(marked(mark)) == []
    assert descriptors().keys() == before


@IN_ASYNC_CODE
async def test_cancelled_in_the_block(mark: str) -> None:
    with anyio.CancelScope() as scope:
        async with portexec.serve([*LIGHT, "ignore"], kill_after=0.1):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert describe(marked(mark)) == []


def test_asyncio_cancels_a_task_in_its_own_way(mark: str) -> None:
    """Task.cancel() knows no shield. However often it is called, the task ends when the server has."""

    async def serve(inside: asyncio.Event, leaving: asyncio.Event) -> None:
        async with portexec.serve([*LIGHT, "ignore"], kill_after=0.3):
            inside.set()
            try:
                await asyncio.Event().wait()
            finally:
                leaving.set()

    async def main() -> list[str]:
        inside, leaving = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(serve(inside, leaving))
        await inside.wait()
        task.cancel()
        await leaving.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return describe(marked(mark))

    assert asyncio.run(main()) == []
