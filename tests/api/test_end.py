"""How a server ends: by itself, by `stop`, with somebody who waits for it."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import anyio.to_thread
import pytest

import portexec
from tests.support import DEADLINE, get, wait_for
from tests.support.network import can_bind, is_given_back
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    describe,
    descriptors,
    greeting,
    marked,
    run_caller,
    tell,
)


@pytest.mark.parametrize(("hand_off", "path", "status"), [("fd", "exit/0", 0), ("guard", "exit/7", 7), ("hold", "kill/9", -9)])
def test_it_ends_by_itself(hand_off: str, path: str, status: int, mark: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off) as server:
        tell(server, path)
        assert server.wait() == status
        assert server.returncode == status
        assert describe(marked(mark)) == []
        assert server.died() is None  # it was waited for
        with pytest.raises(portexec.NotRunning):
            server.restart()


def test_use_after_stop() -> None:
    with ThreadPoolExecutor(1) as pool, portexec.serve(LIGHT) as server:
        waiting = pool.submit(server.wait)
        assert not can_bind(server.port)
        server.stop()
        assert is_given_back(server.port)
        assert waiting.result(DEADLINE) == server.wait() == -signal.SIGTERM
        with pytest.raises(portexec.NotRunning) as caught:
            server.restart()
        assert "serve" in caught.value.hint


@IN_ASYNC_CODE
async def test_waiting_for_a_server_that_is_stopped_in_async_code() -> None:
    got = []

    async def wait(server: portexec.AsyncServer) -> None:
        got.append(await server.wait())

    async with portexec.serve(LIGHT) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(wait, server)
        await anyio.wait_all_tasks_blocked()
        await server.stop()
    assert got == [-signal.SIGTERM]


@IN_ASYNC_CODE
async def test_a_wait_can_be_cancelled() -> None:
    async with portexec.serve(LIGHT) as server:
        with anyio.move_on_after(0) as scope:
            await server.wait()
        assert scope.cancelled_caught
        assert get(server.url) == greeting(server)


@IN_ASYNC_CODE
async def test_waits_that_are_given_up_leave_nothing() -> None:
    """No thread, no descriptor, and not the impression that somebody expects the end."""
    async with portexec.serve(LIGHT) as server:
        before = (set(threading.enumerate()), descriptors().keys())
        for _ in range(20):
            with anyio.move_on_after(0):
                await server.wait()
        assert set(threading.enumerate()) <= before[0]
        assert descriptors().keys() == before[1]
        tell(server, "exit/7")
        assert server.died(DEADLINE) is not None


def test_a_wait_that_is_pending_keeps_no_program_from_ending(mark: str) -> None:
    code = """
import asyncio, sys, portexec
async def main():
    server = await portexec.serve(sys.argv[1:]).__aenter__()
    asyncio.create_task(server.wait())
    await asyncio.sleep(0)
asyncio.run(main())
"""
    run_caller(code, *LIGHT)
    wait_for(lambda: not marked(mark))


def test_a_restart_does_not_disturb_who_waits() -> None:
    with ThreadPoolExecutor(1) as pool, portexec.serve(LIGHT) as server:
        waiting = pool.submit(server.wait)
        server.restart()
        tell(server, "exit/7")
        assert waiting.result(DEADLINE) == 7
        assert server.died(DEADLINE) is None


def test_stop_may_be_called_by_many_at_once(mark: str) -> None:
    with ThreadPoolExecutor(5) as pool, portexec.serve([*LIGHT, "ignore"], kill_after=0.2) as server:
        for stopping in [pool.submit(server.stop) for _ in range(5)]:
            stopping.result(DEADLINE)
        assert describe(marked(mark)) == []
        assert server.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kill_after", [0, 10**9])
def test_every_kill_after_can_be_had(kill_after: float, mark: str) -> None:
    with portexec.serve(LIGHT, kill_after=kill_after) as server:
        assert get(server.url) == greeting(server)
    assert describe(marked(mark)) == []


def test_the_whole_tree_is_stopped(mark: str) -> None:
    script = 'setsid sleep 1000 & (trap "" TERM; sleep 1000 & wait; sleep 1000) & exec "$@"'
    with portexec.serve(["sh", "-c", script, "sh", *LIGHT], kill_after=0.2) as server:
        assert get(server.url) == greeting(server)
        wait_for(lambda: len(marked(mark)) >= 5)  # the server answers, but the shell before it may not have gone on
    assert describe(marked(mark)) == []


TRAPS = """
trap 'echo got INT; exit 5' INT
trap 'echo got TERM; exit 6' TERM
"$@" &
while :; do wait; done
"""


@pytest.mark.parametrize("restart", ["no", "always"])
def test_a_stop_by_another_signal(restart: str, mark: str) -> None:
    with portexec.serve(["sh", "-c", TRAPS, "sh", *LIGHT], restart=restart, kill_after=DEADLINE) as server:
        server.stop(signal=signal.SIGINT)
        assert describe(marked(mark)) == []
        assert (server.returncode, server.died()) == (5, None)
        assert "got INT\n" in server.output


def test_a_block_that_ends_by_another_signal(mark: str) -> None:
    with portexec.serve(["sh", "-c", TRAPS, "sh", *LIGHT], stop_signal=signal.SIGINT, kill_after=DEADLINE) as server:
        pass
    assert (server.returncode, server.died()) == (5, None)
    assert describe(marked(mark)) == []


@IN_ASYNC_CODE
async def test_a_stop_with_a_time_limit(mark: str) -> None:
    async with portexec.serve([*LIGHT, "ignore"], kill_after=10**9) as server:
        await server.stop(timeout=0.1)
        assert server.returncode == -signal.SIGKILL
        assert describe(marked(mark)) == []


def test_a_signal_that_is_none() -> None:
    with pytest.raises(portexec.UsageError, match="stop_signal=0 is no signal"):
        portexec.serve(LIGHT, stop_signal=0)
    with portexec.serve(LIGHT) as server, pytest.raises(portexec.UsageError):
        server.stop(signal=65)
