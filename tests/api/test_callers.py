"""Programs that call portexec and are killed, fork, close their streams or run out of something."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import portexec
from portexec.api.host import current
from tests.support import DEADLINE, STRANGER, get, read_line, status_of, wait_for
from tests.support.guard_world import house, python_for
from tests.support.installed import need
from tests.support.serving import (
    LIGHT,
    WAIT_FOR_EVER,
    caller,
    describe,
    greeting,
    hook,
    marked,
    run_caller,
)

HOLD = """
import sys, portexec
with portexec.serve(sys.argv[1:]) as server:
    print("ready", server.pid, flush=True)
    sys.stdin.read()
"""
HOLD_IN_ASYNC_CODE = """
import anyio, sys, portexec
async def main():
    async with portexec.serve(sys.argv[1:]) as server:
        print("ready", server.pid, flush=True)
        await anyio.sleep_forever()
anyio.run(main, backend={backend!r})
"""


@pytest.mark.parametrize("kind", ["plain", "asyncio", "trio"])
def test_a_caller_that_is_killed_leaves_nothing(kind: str, mark: str) -> None:
    code = HOLD if kind == "plain" else HOLD_IN_ASYNC_CODE.format(backend=kind)
    with caller(code, *LIGHT) as calling:
        assert read_line(calling).startswith("ready")
        assert len(marked(mark)) >= 4
        calling.kill()
        wait_for(lambda: not marked(mark))


def test_a_caller_that_is_killed_while_the_server_starts(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "started"
    with caller(WAIT_FOR_EVER, "sh", "-c", f"touch {file}; exec sleep 1000") as calling:
        wait_for(file.exists)
        calling.kill()
        wait_for(lambda: not marked(mark))


def test_a_caller_that_forgets_the_server(mark: str) -> None:
    """Entered and never left, and nobody holds it any more: the end of the program is the end of the server."""
    code = "import sys, portexec; print(portexec.serve(sys.argv[1:]).__enter__().port)"
    assert int(run_caller(code, *LIGHT))
    wait_for(lambda: not marked(mark))


@pytest.mark.parametrize(("hand_off", "ignores"), [("fd", False), ("guard", True)])
def test_a_portexec_that_is_killed_is_an_error_and_leaves_nothing(hand_off: str, ignores: bool, mark: str) -> None:
    with portexec.serve([*LIGHT, *["ignore"] * ignores], hand_off=hand_off, kill_after=0.2) as server:
        os.kill(hook(server), signal.SIGKILL)
        death = server.died(DEADLINE)
        assert death is not None
        assert "portexec itself was killed" in death.message
        with pytest.raises(portexec.Exited, match="portexec itself was killed"):
            server.wait()
        wait_for(lambda: not marked(mark))
        with pytest.raises(portexec.NotRunning):
            server.restart()


def test_a_portexec_and_its_shim_that_are_killed_at_once(mark: str) -> None:
    """What is left runs on, and has the output open. Nobody waits for that."""
    with portexec.serve(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"], ready="none") as server:
        shim, ours = int(status_of(server.pid)["PPid"]), hook(server)
        wait_for(lambda: sum("sleep" in line for line in describe(marked(mark))) == 3)  # two of them, and the shim
        for number in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(shim, number)
            os.kill(ours, number)
        death = server.died(DEADLINE)
        assert death is not None
        assert "portexec itself was killed" in death.message
    left = marked(mark)
    assert left
    for pid in left:
        with suppress(ProcessLookupError):  # the kernel has told the command to end, since its shim has
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not marked(mark))


def test_a_stranger_who_has_the_output_open_keeps_nobody() -> None:
    with portexec.serve(LIGHT) as server, open(f"/proc/{server.pid}/fd/1", "w") as output:
        stranger = subprocess.Popen(["sleep", "1000"], stdout=output, env={})
    try:
        assert server.returncode is not None
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_portexec_that_is_killed_while_the_server_starts(mark: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(portexec.serve([*LIGHT, "silent"]).__enter__)
        wait_for(lambda: any("light.py silent" in line for line in describe(marked(mark))))
        host = current()
        assert host is not None
        os.kill(host.process.pid, signal.SIGKILL)
        with pytest.raises(portexec.Exited):
            entering.result(DEADLINE)
    wait_for(lambda: not marked(mark))


@pytest.mark.parametrize(("program", "how"), [("true", "status 0"), ("false", "status 1")])
def test_a_portexec_that_ends_without_a_word(program: str, how: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has read any of its words, which are more than a socket holds."""
    monkeypatch.setattr(sys, "executable", f"/bin/{program}")
    with pytest.raises(portexec.Exited, match=f"portexec ended with {how} .*/bin/{program}"):
        portexec.serve([*LIGHT, *["x" * 100_000] * 10]).__enter__()
    assert describe(marked(mark)) == []


@pytest.mark.parametrize("python", [None, "", "/no/such"])
def test_a_caller_without_a_python(python: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(portexec.PortexecError, match=f"cannot start portexec with {python}: "):
        portexec.serve(LIGHT).__enter__()


FORK = """
import multiprocessing, os, sys, time, warnings, portexec
warnings.simplefilter("ignore")
def sleep():
    print("ready", flush=True)
    time.sleep(1000)
with portexec.serve(sys.argv[1:]) as server:
    multiprocessing.get_context("fork").Process(target=sleep).start()
    sys.stdin.read()
"""


def test_a_caller_that_forks_and_is_killed(mark: str) -> None:
    """The child of a fork has copies of all that is open. It is not to keep the server alive."""
    with caller(FORK, *LIGHT) as calling:
        assert read_line(calling) == "ready"
        children = Path(f"/proc/{calling.pid}/task/{calling.pid}/children").read_text().split()
        forked = {int(pid) for pid in children if "portexec import host" not in describe({int(pid)})[0]}
        assert len(forked) == 1
        calling.kill()
        wait_for(lambda: marked(mark) == forked)
        os.kill(forked.pop(), signal.SIGKILL)
        wait_for(lambda: not marked(mark))


FORK_MEANWHILE = """
import os, signal, subprocess, sys, threading, warnings, portexec
warnings.simplefilter("ignore")
pids = []
def fork():
    pids.append(os.fork())
    if not pids[0]:
        signal.pause()
forking = threading.Thread(target=fork, daemon=True)
class Popen(subprocess.Popen):
    def _execute_child(self, *args, **kwargs):  # the pipes are there, the process is not
        forking.start()
        state = f"/proc/self/task/{forking.native_id}/stat"
        while forking.is_alive() and open(state).read().rpartition(")")[2].split()[0] != "S":
            pass
        super()._execute_child(*args, **kwargs)
subprocess.Popen = Popen
with portexec.serve(sys.argv[1:]) as server:
    print(server.port, flush=True)
forking.join()
os.kill(pids[0], signal.SIGKILL)
"""


def test_a_fork_by_another_thread_while_the_server_starts(mark: str) -> None:
    """The child lives on with copies of all that is open then. Neither the start nor the stop waits for its end."""
    assert int(run_caller(FORK_MEANWHILE, *LIGHT))
    wait_for(lambda: not marked(mark))


FORK_AND_LEAVE = """
import os, sys, urllib.request, warnings, portexec
warnings.simplefilter("ignore")
with portexec.serve(sys.argv[1:]) as server:
    pid = os.fork()
    if pid == 0:
        {leave}
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(urllib.request.urlopen(server.url).read().decode() == f"hello from {{server.pid}}")
"""


WAIT = """try:
            server.wait()
        except portexec.NotRunning as error:
            os._exit(5 if "forked" in error.message and server.died() is None else 6)"""


@pytest.mark.parametrize("leave", ["sys.exit(5)", "server.stop(); os._exit(5)", WAIT])
def test_a_forked_child_does_not_own_the_server(leave: str) -> None:
    """Nor does it wait for it."""
    assert run_caller(FORK_AND_LEAVE.format(leave=leave), *LIGHT).split() == ["5", "True"]


FORK_AND_ENTER = """
import os, sys, portexec
serving = portexec.serve(sys.argv[1:])
if os.fork() == 0:
    with serving as server:
        os.kill(server.pid, 0)
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        os._exit(5)
    os._exit(6)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_what_was_made_before_a_fork_is_entered_in_the_child() -> None:
    assert run_caller(FORK_AND_ENTER, *LIGHT) == "5\n"


COLLECTED = """
import gc, sys, portexec
def block():
    with portexec.serve(sys.argv[1:], ready="none", kill_after=0.1) as server:
        yield server
gc.disable()
blocks = block()
server = next(blocks)
cycle = [blocks]
cycle.append(cycle)
del blocks, cycle
gc.set_threshold(1)
gc.enable()  # the thread of the server's, which gets its output, comes first
server.wait()
print("over")
"""


def test_a_block_that_is_collected_in_the_servers_own_thread() -> None:
    assert run_caller(COLLECTED, "sh", "-c", "while :; do echo x; sleep 0.01; done") == "over\n"


def test_an_async_block_whose_event_loop_has_gone(mark: str) -> None:
    async def block() -> AsyncIterator[portexec.AsyncServer]:
        async with portexec.serve(LIGHT) as server:
            yield server

    blocks = block()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(anext(blocks))
    assert get(server.url) == greeting(server)
    loop.close()
    del blocks
    gc.collect()
    wait_for(lambda: not marked(mark))


ABANDONED = """
import asyncio, os, sys, portexec
os.dup2(1, 2)
async def serve():
    async with portexec.serve(sys.argv[1:]):
        started.set_result(None)
        await asyncio.sleep(1000)
loop = asyncio.new_event_loop()
started = loop.create_future()
task = loop.create_task(serve())
loop.run_until_complete(started)
"""


def test_a_task_that_is_left_at_the_end_of_the_interpreter(mark: str) -> None:
    """Nothing can be imported there any more."""
    assert "Error" not in run_caller(ABANDONED, *LIGHT)
    wait_for(lambda: not marked(mark))


CLOSED = """
import os, sys
keep = os.dup(1)
os.dup2(keep, 60)
os.closerange({lowest}, 50)
import portexec
with portexec.serve(sys.argv[1:], listen=["a=0", "b=0"]) as server:
    os.write(60, f"{{server.port}}".encode())
"""


@pytest.mark.parametrize("lowest", [0, 1])
def test_a_caller_that_has_closed_its_standard_streams(lowest: int, mark: str) -> None:
    """A daemon has few descriptors, or none, so that ours get low numbers; both hand-offs have to live with that."""
    for command in ([*LIGHT, "fd={a.fd}", "fd={b.fd}"], [*LIGHT, "port={a.port}", "port={b.port}"]):
        assert int(run_caller(CLOSED.format(lowest=lowest), *command))
        wait_for(lambda: not marked(mark))


NO_THREAD = """
import sys, threading, portexec
threading.stack_size(1 << 46)
try:
    with portexec.serve(sys.argv[1:], kill_after=0.1):
        print("?")
except Exception as error:
    print(type(error).__name__)
"""


def test_where_no_thread_can_be_started(mark: str) -> None:
    """It says so, with nothing left, and does not wait for the news that nobody brings."""
    assert run_caller(NO_THREAD, *LIGHT).strip() in ("PortexecError", "RuntimeError")
    wait_for(lambda: not marked(mark))


NO_DESCRIPTORS = """
import os, resource, sys
from portexec import PortexecError, serve
lowest = os.dup(0)
os.close(lowest)
most = resource.getrlimit(resource.RLIMIT_NOFILE)
for room in range(7):
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, most[1]))
    try:
        with serve(sys.argv[1:], kill_after=0.1):
            print("served")
    except PortexecError as error:
        print(error.message)
    resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert os.dup(0) == lowest, room
    os.close(lowest)
"""


def test_where_descriptors_are_short(mark: str) -> None:
    said = run_caller(NO_DESCRIPTORS, *LIGHT).splitlines()
    assert len(said) == 7
    assert all(line == "served" or "Too many open files" in line or "limit" in line for line in said)
    assert "Too many open files" in said[0]
    wait_for(lambda: not marked(mark))


NO_DESCRIPTORS_IN_ASYNC_CODE = """
import anyio, os, resource, sys, portexec
async def main():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with portexec.serve(sys.argv[1:]) as server:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, most[1]))
        pid = server.pid
        await server.restart()
        print(server.pid != pid)
        try:
            await server.wait(0.01)
        except portexec.StillRunning:
            print("runs")
    print(server.returncode)
    resource.setrlimit(resource.RLIMIT_NOFILE, most)
anyio.run(main, backend={backend!r})
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_where_there_are_no_more_descriptors_in_async_code(backend: str, mark: str) -> None:
    """No loop can be woken then, and every call waits all the same."""
    need([backend])
    assert run_caller(NO_DESCRIPTORS_IN_ASYNC_CODE.format(backend=backend), *LIGHT).split() == ["True", "runs", "-15"]
    wait_for(lambda: not marked(mark))


BECOMES_NOBODY = """
import os, sys, urllib.request, portexec
def look(server):
    answers = urllib.request.urlopen(server.url).read().decode() == f"hello from {{server.pid}}"
    print(answers, os.stat(f"/proc/{{server.pid}}").st_uid)
with portexec.serve(sys.argv[1:]) as one:
    os.setgroups([])
    os.setresgid({user}, {user}, {user})
    os.setresuid({user}, {user}, {user})
    with portexec.serve(sys.argv[1:]) as two:
        one.restart()
        two.restart()
        look(one)
        look(two)
print(one.returncode)
"""


@pytest.mark.root
def test_a_caller_that_drops_its_user(mark: str) -> None:
    """Its next server has the new user, and the one before is its own all the same."""
    with house() as home:
        words = [python_for(STRANGER, home), "-c", BECOMES_NOBODY.format(user=STRANGER)]
        light = [words[0], "-S", f"{home}/tests/children/light.py"]
        done = subprocess.run([*words, *light], cwd=home, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout.splitlines(), done.stderr) == (["True 0", f"True {STRANGER}", "-15"], "")
    wait_for(lambda: not marked(mark))


def test_at_the_end_of_the_interpreter(mark: str) -> None:
    code = """
import atexit, sys, portexec
@atexit.register
def late():
    try:
        with portexec.serve(sys.argv[1:], kill_after=0.1) as server:
            print(server.port, flush=True)
    except (portexec.PortexecError, RuntimeError) as error:
        print(error, flush=True)
"""
    assert run_caller(code, *LIGHT)
    wait_for(lambda: not marked(mark))  # the host ends when the caller has


LEFT_OPEN = {
    "by a generator": """
import contextlib, sys, portexec
@contextlib.contextmanager
def site():
    with portexec.serve(sys.argv[1:]) as server:
        yield server
manager = site()
print(manager.__enter__().port, flush=True)
""",
    "by an object": """
import sys, portexec
class Site:
    def __init__(self):
        self.server = portexec.serve(sys.argv[1:]).__enter__()
    def __del__(self):
        self.server.stop()
site = Site()
print(site.server.port, flush=True)
""",
}


@pytest.mark.parametrize("code", LEFT_OPEN.values(), ids=LEFT_OPEN)
def test_left_open_until_the_interpreter_ends(code: str, mark: str) -> None:
    """It is stopped when no thread runs any more, so nobody can wait for the end."""
    assert int(run_caller(code, *LIGHT))
    wait_for(lambda: not marked(mark))
