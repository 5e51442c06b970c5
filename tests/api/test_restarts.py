"""`Server.restart`: the number stays, and whatever comes in between, what runs afterwards is the new server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

import portexec
from tests.support import DEADLINE, get, read_line, status_of, wait_for
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    SAYS_FIRST,
    TOGETHER,
    describe,
    greeting,
    marked,
    tell,
)
from tests.support.thieves import thief
from tests.support.waiting import LIMITS


@TOGETHER
def test_a_restart_keeps_the_number_and_the_output(hand_off: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off) as server:
        number, pids = server.port, [server.pid]
        assert get(server.url) == greeting(server)  # so it has said that it serves
        for _ in range(2):
            server.restart()
            assert (server.port, server.returncode, server.died()) == (number, None, None)
            assert get(server.url) == greeting(server)
            pids.append(server.pid)
        assert len(set(pids)) == 3
        wait_for(lambda: server.output == "".join(f"serving {pid}\n" for pid in pids))


# With which options a thief has no right to it, as documented for each hand-off.
OPTIONS = {"fd": "-,a,p,ap", "guard": "-,a", "hold": "-,p"}


@TOGETHER
def test_nobody_gets_the_number_during_restarts(hand_off: str) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(portexec.serve(LIGHT, hand_off=hand_off))
        taker = stack.enter_context(thief([], "hammer", server.port, 3_000, OPTIONS[hand_off]))
        assert read_line(taker) == "ready"
        restarts = 0
        while restarts < 2 or taker.poll() is None:
            server.restart()
            restarts += 1
        loot = json.loads(read_line(taker))
    assert loot["got"] == []
    assert loot["tried"] >= 3_000


def test_a_restart_that_fails(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "broken"
    with portexec.serve([*LIGHT, f"if={file}:exit=3"]) as server:
        file.touch()
        with pytest.raises(portexec.Exited) as caught:
            server.restart()
        assert caught.value.returncode == 3
        assert "before it was ready: exit status 3" in caught.value.message
        assert describe(marked(mark)) == []
        with pytest.raises(portexec.NotRunning):
            server.restart()


def test_a_restart_that_comes_too_late() -> None:
    """The error is at the line of the caller. In the block the server can be started again, and after it no more."""
    with portexec.serve(LIGHT) as server:
        server.stop()
        with pytest.raises(portexec.NotRunning) as in_the_block:
            server.restart()
    with pytest.raises(portexec.NotRunning) as after_it:
        server.restart()
    assert ["start()" in each.value.hint for each in (in_the_block, after_it)] == [True, False]
    assert str(in_the_block.traceback[-1].path).endswith("driver.py")


def test_a_restart_that_is_never_ready(tmp_path: Path, mark: str) -> None:
    for limit in LIMITS:
        file = tmp_path / f"{limit}"
        with suppress(portexec.NotReady), portexec.serve([*LIGHT, f"if={file}:silent"], ready_timeout=limit) as server:
            file.touch()
            with pytest.raises(portexec.NotReady) as caught:
                server.restart()
            assert describe(marked(mark)) == []
            if "waiting " in caught.value.output:
                break
    else:
        pytest.fail("its output is not told")


# Ready at once the first time; the second time when it is told to end; the third time never.
READY_TOO_LATE = """
if mkdir first 2>/dev/null; then echo is ready; exec sleep 1000; fi
if mkdir second 2>/dev/null; then trap 'echo is ready; exit' TERM; echo waits; while :; do sleep 0.01; done; fi
exec sleep 1000
"""


def test_a_restart_waits_for_the_start_that_it_asked_for(tmp_path: Path) -> None:
    """An automatic one is under way, and says that it is ready when it is stopped for the restart."""
    words = ["sh", "-c", READY_TOO_LATE]
    with portexec.serve(words, cwd=tmp_path, restart="always", ready=re.compile("is ready")) as server:
        server._driver.traits = replace(server._driver.traits, ready_timeout=0.5)  # not for the first start, which is in time
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: "waits" in server.output)
        with pytest.raises(portexec.NotReady):
            server.restart()


ENDS_AT_THE_SECOND_TERM = 'trap "trap - TERM; echo told" TERM; "$@" & while :; do sleep 1000 & wait; done'


@pytest.mark.once
def test_a_shim_that_is_killed_during_a_restart_is_the_end(mark: str) -> None:
    """Another start would run beside what is left of this one."""
    words = ["sh", "-c", ENDS_AT_THE_SECOND_TERM, "sh", *LIGHT]
    with ThreadPoolExecutor(1) as pool, portexec.serve(words, ready="listen", kill_after=1000) as server:
        restarting = pool.submit(server.restart)
        wait_for(lambda: "told" in server.output)
        os.kill(int(status_of(server.pid)["PPid"]), signal.SIGKILL)
        with pytest.raises(portexec.NotRunning, match="killed by SIGKILL"):
            restarting.result(DEADLINE)
    assert describe(marked(mark)) == []


def test_restarts_by_several_threads() -> None:
    with ThreadPoolExecutor(3) as pool, portexec.serve(LIGHT) as server:
        number = server.port
        for restarting in [pool.submit(server.restart) for _ in range(3)]:
            restarting.result(DEADLINE)
        assert get(server.url) == greeting(server)
        assert server.port == number


@contextmanager
def signal_during_a_restart(server: portexec.Server, handler: Callable[[], None]) -> Iterator[list[str]]:
    """Call a handler in this thread when the old server has ended. The list is not empty any more when it has returned."""
    pid, called = server.pid, list[str]()

    def handle(*_: object) -> None:
        try:
            handler()
        finally:
            called.append("called")

    def send() -> None:
        wait_for(lambda: server.returncode is not None or server.pid != pid)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    usual = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield called
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, usual)


def is_last_of(starts: int, server: portexec.Server) -> bool:
    """Whether it runs for the last time of so many, and not for one before."""
    pid = server.pid
    wait_for(lambda: server.output.count("\n") == starts)
    return server.output.endswith(f"serving {pid}\n")


def test_a_restart_after_an_interrupted_one() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with portexec.serve(SAYS_FIRST) as server:
        with signal_during_a_restart(server, interrupt) as called, contextlib.suppress(KeyboardInterrupt):
            server.restart()
            wait_for(lambda: called)  # it was that quick
        assert called
        server.restart()
        assert is_last_of(3, server)
        assert get(server.url) == greeting(server)


def test_a_restart_by_a_signal_handler_during_one() -> None:
    with portexec.serve(SAYS_FIRST) as server:
        with signal_during_a_restart(server, server.restart) as called:
            server.restart()
            wait_for(lambda: called)
        assert is_last_of(3, server)
        assert get(server.url) == greeting(server)


async def begin_a_restart(server: portexec.AsyncServer) -> None:
    """Ask for a restart, and give up waiting for it when the old server has ended."""
    pid = server.pid
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.restart)
        await anyio.to_thread.run_sync(wait_for, lambda: server.returncode is not None or server.pid != pid)
        tasks.cancel_scope.cancel()


@IN_ASYNC_CODE
async def test_a_restart_after_a_cancelled_one() -> None:
    """When it returns, the server is the new one, whatever became of the first request; which does not hide a death either."""
    async with portexec.serve(LIGHT) as server:
        await begin_a_restart(server)
        await server.restart()
        assert get(server.url) == greeting(server)
        tell(server, "exit/7")
        assert await anyio.to_thread.run_sync(server.died, DEADLINE) is not None


ENDS_WHEN_TOLD = 'if [ -e pipe ]; then read line < pipe; exit 5; fi; exec "$@"'


@IN_ASYNC_CODE
async def test_a_death_after_a_restart_that_was_given_up(tmp_path: Path) -> None:
    """Nobody waits for the new start, which ends before it is ready."""
    pipe = tmp_path / "pipe"
    async with portexec.serve(["sh", "-c", ENDS_WHEN_TOLD, "sh", *LIGHT], cwd=tmp_path) as server:
        os.mkfifo(pipe)
        await begin_a_restart(server)
        await anyio.to_thread.run_sync(pipe.write_text, "\n")  # only now: else the restart may fail before it is given up
        death = await anyio.to_thread.run_sync(server.died, DEADLINE)
        assert death is not None
        assert death.returncode == 5


def test_stop_during_a_restart(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "slow"
    with ThreadPoolExecutor(1) as pool, portexec.serve([*LIGHT, f"if={file}:silent"]) as server:
        file.touch()
        restarting = pool.submit(server.restart)
        wait_for(lambda: "waiting" in server.output and server.returncode is None)  # it runs again
        server.stop()
        assert describe(marked(mark)) == []
        with pytest.raises(portexec.NotRunning):
            restarting.result(DEADLINE)
