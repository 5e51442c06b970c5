"""A server that has ended: it can be waited for, is not restarted, and can be started again."""

from __future__ import annotations

import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
import pytest

import portexec
from portexec.api import watchers
from tests.support import DEADLINE, get, wait_for
from tests.support.proc import words_of
from tests.support.serving import IN_ASYNC_CODE, LIGHT, SAYS_FIRST, describe, greeting, marked, tell


def kill(pid: int) -> None:
    """Kill it, and wait until the kernel tells that it is about to end, which it does not in the first microseconds."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not words_of(pid))


@pytest.mark.parametrize("number", range(5))
def test_a_restart_after_a_death_has_one_outcome(number: int) -> None:
    """At once, when nobody can know of the death yet, and later."""
    with portexec.serve(LIGHT) as server:
        kill(server.pid)
        if number % 2:
            wait_for(lambda: server.returncode is not None)
        with pytest.raises(portexec.NotRunning, match="killed by SIGKILL") as caught:
            server.restart()
        assert "start()" in caught.value.hint
        assert server.died() is not None


def test_a_server_that_died_can_be_started_again(mark: str) -> None:
    with portexec.serve(LIGHT) as server:
        pids = [server.pid]
        assert get(server.url) == greeting(server)  # so it has said that it serves
        for _ in range(2):
            kill(server.pid)
            server.start()
            pids.append(server.pid)
            assert get(server.url) == greeting(server)
            assert (server.returncode, server.died()) == (None, None)
        assert len(set(pids)) == 3
        assert server.output == "".join(f"serving {pid}\n" for pid in pids)
        server.start()  # it runs
        assert server.pid == pids[-1]
        server.stop()
        server.start()
        assert get(server.url) == greeting(server)
        server.restart()
        assert get(server.url) == greeting(server)
    assert describe(marked(mark)) == []
    with pytest.raises(portexec.NotRunning, match="block"):
        server.start()


def test_several_threads_start_it_again_once(mark: str) -> None:
    with ThreadPoolExecutor(4) as pool, portexec.serve(SAYS_FIRST) as server:
        server.stop()
        for starting in [pool.submit(server.start) for _ in range(4)]:
            starting.result(DEADLINE)
        wait_for(lambda: server.output.count("serving") == 2)
        assert get(server.url) == greeting(server)


def test_a_stop_just_before_the_host_is_told_to_start_it_again(mark: str) -> None:
    """Whoever called start() had a server that nobody could stop, and the next start() waited for ever."""
    with portexec.serve(LIGHT) as server:
        server.stop()

        def stop(driver: object) -> None:
            server.stop()

        watchers.watch(stop)
        try:
            with pytest.raises(portexec.NotRunning, match="stopped before it was ready"):
                server.start()
        finally:
            watchers.unwatch(stop)
        assert describe(marked(mark)) == []
        server.start()
        assert get(server.url) == greeting(server)


class StopsIt:
    """A file that a server reads. It has the server stopped when the start looks at the file, as another thread may."""

    def __init__(self) -> None:
        self.server: portexec.Server | None = None

    def fileno(self) -> int:
        server, self.server = self.server, None
        if server is not None:
            server._driver.hang_up()
        return 0


def test_a_stop_while_the_host_is_told_to_start_it_again(mark: str) -> None:
    """The host heard of the stop first. It said that there is no such server, and started it then."""
    file = StopsIt()
    silent = portexec.serve(["sleep", "1000"], ready="none", stdin=file)
    with silent as server, portexec.serve(LIGHT) as other:
        server.stop()
        before = marked(mark)
        file.server = server
        with suppress(portexec.NotRunning):  # it may have been ready first
            server.start()
        with suppress(portexec.PortexecError):
            server.wait(DEADLINE)
        with portexec.serve(LIGHT):  # the host has heard of all by now
            pass
        assert marked(mark) == before
        server.start()
        assert get(other.url) == greeting(other)


def test_a_start_that_fails_can_be_tried_again(tmp_path: str) -> None:
    file = f"{tmp_path}/broken"
    with portexec.serve([*LIGHT, f"if={file}:exit=3"]) as server:
        server.stop()
        with open(file, "w"), pytest.raises(portexec.Exited):
            server.start()
        os.unlink(file)
        server.start()
        assert get(server.url) == greeting(server)


@IN_ASYNC_CODE
async def test_a_server_can_be_started_again_in_async_code(mark: str) -> None:
    async with portexec.serve(LIGHT) as server:
        kill(server.pid)
        with pytest.raises(portexec.NotRunning):
            await server.restart()
        await server.start()
        assert get(server.url) == greeting(server)
        with anyio.move_on_after(0), pytest.raises(portexec.StillRunning):
            await server.wait(timeout=0)
    assert describe(marked(mark)) == []


def test_a_forked_child_cannot_start_it() -> None:
    with portexec.serve(LIGHT) as server:
        child = os.fork()
        if child == 0:
            try:
                server.start()
            except portexec.NotRunning:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("timeout", [math.nan, -1, "3"])
def test_a_time_limit_that_is_none(timeout: Any) -> None:
    with portexec.serve(LIGHT) as server:
        for call in (server.wait, server.stop):
            with pytest.raises(portexec.UsageError, match="is no number of seconds"):
                call(timeout=timeout)


def test_a_wait_has_a_time_limit() -> None:
    with portexec.serve(LIGHT) as server:
        with pytest.raises(portexec.StillRunning) as caught:
            server.wait(timeout=0.01)
        assert isinstance(caught.value, TimeoutError)
        assert str(caught.value) == "the server still runs after 0.01 s\nhint: stop ends it"
        threading.Thread(target=tell, args=(server, "exit/7")).start()
        assert server.wait(timeout=DEADLINE) == 7
