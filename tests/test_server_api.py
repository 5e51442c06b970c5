"""The Python API: `portexec.serve` in plain code, in asyncio and in trio, and what the package shows.

The servers are tests/children/light.py. Every process of a test carries a mark in its environment, by which it is found in
/proc; nothing that carries it may be left when a test ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import portexec
from portexec.api import driver
from tests.support import DEADLINE, child, descriptors_of, get, status_of, wait_for
from tests.test_servers import is_installed, need
from tests.test_theft import read_line, thief
from tests.test_then import deadline

MARK = "PORTEXEC_TEST_MARK"
LIGHT = child("light")
ON_FD = [*LIGHT, "fd={fd}"]
PACKAGE_HOME = str(Path(portexec.__file__).parent.parent)
HAND_OFFS = ["fd", "guard", "hold"]
TOGETHER = pytest.mark.parametrize("hand_off", HAND_OFFS)
IN_ASYNC_CODE = pytest.mark.anyio
IPV6 = pytest.mark.skipif(not is_installed("ipv6"), reason="needs IPv6 on the loopback interface")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """What `pytest.mark.anyio` runs a coroutine on."""
    need([request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark all that a test starts, end the test if it hangs, and fail it if any of that is left."""
    text = uuid.uuid4().hex
    monkeypatch.setenv(MARK, text)
    try:
        with deadline():
            yield text
        left = describe(marked(text))
    finally:
        for pid in marked(text):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert left == []


def marked(text: str) -> set[int]:
    """The living processes that have the mark, but for this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARK}={text}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def describe(pids: set[int]) -> list[str]:
    """What these processes are, for a message."""
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            found.append(f"{pid} {status_of(pid)['State']} {words}")
    return found


def marked_words(pid: int) -> bytes:
    """The words of a process; none when it has ended, waited for or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def hook(process: portexec.Server | portexec.AsyncServer) -> int:
    """The pid of the portexec of a server: the one whose parent we are."""
    pid = process.pid
    while (parent := int(status_of(pid)["PPid"])) != os.getpid():
        pid = parent
    return pid


def greeting(server: portexec.Server | portexec.AsyncServer) -> str:
    """What it answers to everybody."""
    return f"hello from {server.pid}"


def ask(server: portexec.Server | portexec.AsyncServer, path: str) -> str:
    """What it answers to a GET on this path."""
    return get(f"{server.url}/{path}")


def tell(server: portexec.Server | portexec.AsyncServer, path: str) -> None:
    """A GET that is not answered, since the server ends."""
    with socket.create_connection((server.host, server.port), timeout=DEADLINE) as connection:
        connection.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while connection.recv(10000):
                pass


def can_bind(number: int) -> bool:
    """Whether anybody can have this number now. Connections that have ended are not in the way of who sets SO_REUSEADDR."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


@contextmanager
def caller(code: str, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program that calls portexec, with these words."""
    options.setdefault("env", os.environ | {"PYTHONPATH": PACKAGE_HOME})
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def run_caller(code: str, *words: str, **options: Any) -> str:
    """Run one to its end, and what it printed."""
    options.setdefault("env", os.environ | {"PYTHONPATH": PACKAGE_HOME})
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


# What a server tells.


@TOGETHER
def test_in_plain_code(hand_off: str, mark: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off) as server:
        assert isinstance(server, portexec.Server)
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert (server.host, server.returncode, server.died()) == ("127.0.0.1", None, None)
        assert server.listeners == {"listener1": portexec.Listener("listener1", server.url, "127.0.0.1", server.port)}
        assert get(server.url) == greeting(server)
        wait_for(lambda: server.output == f"serving {server.pid}\n")
    assert describe(marked(mark)) == []
    assert server.returncode == -signal.SIGTERM
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server.died() is None


@IN_ASYNC_CODE
async def test_in_async_code(mark: str) -> None:
    async with portexec.serve(LIGHT) as server:
        assert isinstance(server, portexec.AsyncServer)
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert get(server.url) == greeting(server)
        assert list(server.listeners) == ["listener1"]
        before = (server.port, server.pid)
        await server.restart()
        assert server.port == before[0]
        assert server.pid != before[1]
        assert get(server.url) == greeting(server)
        await server.stop()
        assert describe(marked(mark)) == []
        await server.stop()
        assert await server.wait() == server.returncode == -signal.SIGTERM
        with pytest.raises(portexec.NotRunning):
            await server.restart()


def test_nothing_happens_before_it_is_entered(mark: str) -> None:
    before = descriptors_of()
    portexec.serve(LIGHT)
    assert describe(marked(mark)) == []
    assert descriptors_of() == before


@pytest.mark.parametrize("listen", [{"web": "0", "the-admin": "127.0.0.1:0"}, ["web=0", "the-admin=127.0.0.1:0"]])
def test_several_listeners_have_names(listen: Any) -> None:
    command = [*LIGHT, "port={web.port}", "port={the-admin.port}"]
    with portexec.serve(command, listen=listen) as server:
        assert list(server.listeners) == ["web", "the-admin"]
        web, admin = server.listeners.values()
        assert (server.url, server.port) == (web.url, web.port)
        assert web.port != admin.port
        assert [get(each.url) for each in (web, admin)] == [greeting(server)] * 2
        assert ask(server, "variable/THE_ADMIN_PORT") == str(admin.port)
        server.listeners.clear()  # of a copy
        assert list(server.listeners) == ["web", "the-admin"]


@IPV6
def test_the_address_is_where_it_really_listens() -> None:
    with portexec.serve([*child("obeying"), "host=::1"], hand_off="guard", listen="127.0.0.1:0") as server:
        assert (server.url, server.listeners["listener1"].host) == (f"http://[::1]:{server.port}", "[::1]")


def ask_unix(address: str) -> str:
    """What is answered on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return client.makefile().read().rpartition("\n")[2]


def test_a_unix_listener(tmp_path: Path) -> None:
    """Its path is the command's, which a client finds from the caller's directory, too; and it survives a restart."""
    with portexec.serve(ON_FD, listen="unix:app.sock", cwd=tmp_path) as server:
        path = f"{tmp_path}/app.sock"
        assert (server.port, server.host, server.url) == (0, "", f"unix:{path}")
        assert server.listeners["listener1"].path == path
        assert ask_unix(path) == greeting(server)
        server.restart()
        assert ask_unix(path) == greeting(server)
    assert list(tmp_path.iterdir()) == []


def test_an_abstract_unix_listener(mark: str, tmp_path: Path) -> None:
    with portexec.serve(ON_FD, listen=f"unix:@portexec-{mark}", cwd=tmp_path) as server:
        assert server.url == f"unix:@portexec-{mark}"
        assert ask_unix(f"\0portexec-{mark}") == greeting(server)


def test_a_udp_listener() -> None:
    with portexec.serve(ON_FD, listen="udp:0", ready="none") as server:
        assert server.url == f"udp://127.0.0.1:{server.port}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE)
            client.sendto(b"?", (server.host, server.port))
            assert client.recv(100).decode() == greeting(server)


# The output.


def test_the_output_is_bounded_and_never_in_the_way() -> None:
    with portexec.serve(LIGHT) as server:
        assert ask(server, "write/1000000") == greeting(server)
        wait_for(lambda: server.output.endswith("written\n"))
        assert len(server.output.encode()) == driver.OUTPUT_LIMIT
        assert server.output == (("x" * 99 + "\n") * 700 + "written\n")[-driver.OUTPUT_LIMIT :]
    assert server.output.endswith("written\n")


def test_a_death_that_nobody_waits_for_is_told_with_the_last_words() -> None:
    with portexec.serve(LIGHT) as server:
        assert server.died() is None
        tell(server, "burst/1000000")
        death = server.died(patience=DEADLINE)
        assert death is not None
        assert (death.returncode, death.output) == (7, server.output)
        assert "exit status 7" in death.message
        assert death.output.splitlines()[-1] == "written"


def test_a_death_just_before_the_stop_is_told_after_it() -> None:
    for _ in range(10):
        with portexec.serve(LIGHT) as server:
            os.kill(server.pid, signal.SIGKILL)
            wait_for(lambda pid=server.pid: not marked_words(pid))  # type: ignore[misc]
        death = server.died()
        assert death is not None
        assert death.returncode == -signal.SIGKILL
    with portexec.serve(LIGHT) as server:
        pass
    assert server.died() is None


LEFT_BY_MAIN = """
import ctypes, signal, threading
threading.Thread(target=signal.pause).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_server_whose_main_thread_has_ended_is_alive() -> None:
    with portexec.serve([sys.executable, "-c", LEFT_BY_MAIN], ready="none") as server:
        wait_for(lambda pid=server.pid: status_of(pid)["State"].startswith("Z"))
        assert server.died() is None
    assert server.returncode == -signal.SIGTERM
    assert server.died() is None


def test_a_server_that_was_stopped_by_somebody_else_has_died() -> None:
    with portexec.serve(LIGHT) as server:
        os.kill(hook(server), signal.SIGTERM)
        death = server.died(DEADLINE)
        assert death is not None
        assert death.returncode == -signal.SIGTERM


# How it ends.


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
        assert can_bind(server.port)
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
        before = (threading.active_count(), descriptors_of().keys())
        for _ in range(20):
            with anyio.move_on_after(0):
                await server.wait()
        assert (threading.active_count(), descriptors_of().keys()) == before
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
        assert len(marked(mark)) >= 5
    assert describe(marked(mark)) == []


# Restarts.


@TOGETHER
def test_a_restart_keeps_the_number_and_the_output(hand_off: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off) as server:
        number, pids = server.port, [server.pid]
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


def test_a_restart_that_is_never_ready(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "slow"
    with portexec.serve([*LIGHT, f"if={file}:silent"], ready_timeout=2) as server:
        file.touch()
        with pytest.raises(portexec.NotReady) as caught:
            server.restart()
        assert "waiting " in caught.value.output
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

    with portexec.serve(LIGHT) as server:
        with signal_during_a_restart(server, interrupt) as called, contextlib.suppress(KeyboardInterrupt):
            server.restart()
            wait_for(lambda: called)  # it was that quick
        assert called
        server.restart()
        assert is_last_of(3, server)
        assert get(server.url) == greeting(server)


def test_a_restart_by_a_signal_handler_during_one() -> None:
    with portexec.serve(LIGHT) as server:
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


@IN_ASYNC_CODE
async def test_a_death_after_a_restart_that_was_given_up(tmp_path: Path) -> None:
    """Nobody waits for the new start, which ends before it is ready."""
    file = tmp_path / "exits"
    async with portexec.serve([*LIGHT, f"if={file}:exit=5"]) as server:
        file.touch()
        await begin_a_restart(server)
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


# What it is given.


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "kept")
    monkeypatch.setenv("GONE", "not kept")
    monkeypatch.setenv("PORT", "1")
    env = {"GONE": None, "BASE": "http://x:{port}/{other}", "WITH": "a=b c", "EMPTY": ""}
    before = dict(os.environ)
    with portexec.serve(LIGHT, env=env) as server:
        assert dict(os.environ) == before
        expected = {"OURS": "kept", "GONE": "unset", "BASE": f"http://x:{server.port}/{{other}}", "WITH": "a=b c", "EMPTY": ""}
        assert {name: ask(server, f"variable/{name}") for name in expected} == expected
        assert ask(server, "variable/PORT") == str(server.port)


def test_files_and_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cwd` is the command's directory. The files that the caller names are found from the caller's."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "one.env").write_text("URL=http://${PORT}/\nGIVEN=file\nOVER=file\n")
    (tmp_path / "two.env").write_text("TWO=2\n")
    monkeypatch.setenv("GIVEN", "environment")
    monkeypatch.chdir(tmp_path)
    files = ["one.env", tmp_path / "two.env"]
    with portexec.serve(LIGHT, env_file=files, env={"OVER": "env"}, cwd=Path("elsewhere")) as server:
        expected = {"URL": f"http://{server.port}/", "GIVEN": "environment", "OVER": "env", "TWO": "2"}
        assert {name: ask(server, f"variable/{name}") for name in expected} == expected
        assert ask(server, "place") == str(place)


def test_an_env_file_beside_a_caller_whose_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    with pytest.raises(portexec.UsageError, match=r"env_file: one\.env is relative to a directory that is gone"):
        portexec.serve(LIGHT, env_file="one.env")


SHOW = """
import sys
sys.path.insert(0, {home!r})
import portexec
with portexec.serve(sys.argv[1:], {options}) as server:
    print(server.port)
"""


def test_files_that_are_named_like_modules_are_not_taken_for_them(tmp_path: Path) -> None:
    """Neither in the command's directory nor in the caller's, nor beside its script, which does not import them itself."""
    for name in ("logging.py", "ssl.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit(f'{__file__} was imported')\n")
    script = tmp_path / "script.py"
    script.write_text(SHOW.format(home=PACKAGE_HOME, options=f"cwd={str(tmp_path)!r}"))
    assert int(subprocess.check_output([sys.executable, script, *LIGHT], cwd=tmp_path, timeout=DEADLINE))


def test_the_portexec_that_was_imported_is_the_one_that_runs(tmp_path: Path) -> None:
    """And not another one that is installed as well."""
    (tmp_path / "portexec").mkdir()
    for name in ("__init__", "cli"):
        (tmp_path / "portexec" / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    code = SHOW.format(home=PACKAGE_HOME, options="")
    assert int(run_caller(code, *LIGHT, env=os.environ | {"PYTHONPATH": str(tmp_path)}))


def test_a_variable_is_seen_by_nobody_but_the_command(mark: str) -> None:
    """Others may read the words of every process, and the environment of none."""
    with portexec.serve(LIGHT, env={"TOKEN": "kept secret"}) as server:
        assert ask(server, "variable/TOKEN") == "kept secret"
        processes = marked(mark)
        assert len(processes) >= 3  # portexec, the shim, the command
        assert not any(b"kept secret" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes)


def test_pythons_own_variables_do_not_disturb() -> None:
    code = SHOW.format(home=PACKAGE_HOME, options="")
    variables = {"PYTHONWARNINGS": "error", "PYTHONINSPECT": "1", "PYTHONOPTIMIZE": "2", "LC_ALL": "C"}
    assert int(run_caller(code, *LIGHT, env=os.environ | variables))


def test_how_a_caller_takes_its_signals_is_its_own_affair() -> None:
    """Its server ends by TERM all the same."""
    code = """
import signal, sys, portexec
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
with portexec.serve(sys.argv[1:], kill_after=2) as server:
    pass
print(server.returncode)
"""
    assert int(run_caller(code, *LIGHT)) == -signal.SIGTERM


def test_what_else_a_caller_may_have_set() -> None:
    """A time limit for all its sockets, and what is no place in the path of its modules."""
    code = """
import socket, sys, portexec
serving = portexec.serve([*sys.argv[1:], *["x" * 100_000] * 5])
socket.setdefaulttimeout(1e-6)
sys.path += [5, None, b"/x", "/\\0"]
with serving as server:
    print(server.port)
"""
    assert int(run_caller(code, *LIGHT))


def test_many_words() -> None:
    with portexec.serve([*LIGHT, *["x" * 100_000] * 10]) as server:
        assert get(server.url) == greeting(server)


def test_modules_are_found_where_the_caller_finds_them(tmp_path: Path) -> None:
    """Also where only PYTHONPATH says where they are, as for a Python without a virtual environment of its own."""
    for name in ("anyio", "dotenv", "idna", "sniffio", "exceptiongroup", "typing_extensions"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
            (tmp_path / source.name).symlink_to(source)
    code = SHOW.format(home=PACKAGE_HOME, options="ready='none', env={'PYTHONPATH': None}")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-s", "-c", code, "sleep", "1000"],
        env=given | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_may_have_paths_and_strange_characters(tmp_path: Path) -> None:
    script = tmp_path / "ä ö\n{x}.sh"
    script.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    script.chmod(0o755)
    with portexec.serve([script, "", "a b", "--", "-q", "{{x}}", "\udcff"], ready="none") as server:
        assert server.wait() == 0
        assert server.output.startswith("|a b|--|-q|{{x}}|")


def test_standard_input_is_empty_and_the_session_is_its_own() -> None:
    with portexec.serve(
        ["sh", "-c", "cat; ps -o sid= -p $$ 2>/dev/null || cut -d' ' -f6 /proc/$$/stat"], ready="none"
    ) as server:
        assert server.wait() == 0
        assert int(server.output) != os.getsid(0)


# Readiness.


@pytest.mark.parametrize(("hand_off", "ready"), [("fd", "accept"), ("guard", "http:/status/404"), ("hold", "listen")])
def test_forms_of_readiness(hand_off: str, ready: str) -> None:
    with portexec.serve(LIGHT, hand_off=hand_off, ready=ready) as server:
        assert get(server.url) == greeting(server)


# Bad input.

LIST = r"write a list of its words: \['npm', 'start'\]"
QUOTES = "in quotes"
# Command, arguments, error, and what has to be in its message and its hint.
BAD: dict[str, tuple[Any, dict[str, Any], type[portexec.PortexecError], str, str]] = {
    "text": ("npm start", {}, portexec.CommandNotAList, "command='npm start'", LIST),
    "nothing": (None, {}, portexec.CommandNotAList, "command=None", LIST),
    "object": (object(), {}, portexec.CommandNotAList, "command=<object", LIST),
    "surrogate": (["\ud800"], {}, portexec.UsageError, "command: .* cannot be encoded", ""),
    "path": (Path("npm"), {}, portexec.CommandNotAList, "npm", LIST),
    "set": ({"npm", "start"}, {}, portexec.CommandNotAList, "command={", LIST),
    "mapping": ({"npm": "start"}, {}, portexec.CommandNotAList, "command={", LIST),
    "empty": ([], {}, portexec.UsageError, "empty", LIST),
    "number": (["nice", 5], {}, portexec.UsageError, "command: 5 is no text", r"str\("),
    "nul": (["a\0b"], {}, portexec.UsageError, "NUL", "leave it out"),
    "hand-off": (LIGHT, {"hand_off": "give"}, portexec.UnknownHandOff, "'give'", "auto, fd, guard, hold"),
    "no hand-off": (LIGHT, {"hand_off": None}, portexec.UsageError, "hand_off: None", QUOTES),
    "ready": (LIGHT, {"ready": "soon"}, portexec.UnknownReady, "ready 'soon'", "listen, accept, http:PATH"),
    "ready with fd": (ON_FD, {"ready": "listen"}, portexec.UsageError, "ready listen", "ready accept"),
    "timeout": (LIGHT, {"ready_timeout": -1}, portexec.UsageError, "ready_timeout=-1", "from 0 to"),
    "timeout text": (LIGHT, {"ready_timeout": "60s"}, portexec.UsageError, "ready_timeout='60s'", "from 0 to"),
    "endless": (LIGHT, {"kill_after": float("inf")}, portexec.UsageError, "kill_after=inf", "from 0 to"),
    "spec": (LIGHT, {"listen": "127.0.0.1:http"}, portexec.UsageError, "'http'", "8000-8099"),
    "number spec": (LIGHT, {"listen": 8000}, portexec.UsageError, "listen: 8000", QUOTES),
    "number in list": (LIGHT, {"listen": [0]}, portexec.UsageError, "listen: 0", QUOTES),
    "no name": (LIGHT, {"listen": {"": "0"}}, portexec.UsageError, "empty listener name", "NAME=SPEC"),
    "float spec": (LIGHT, {"listen": 0.5}, portexec.UsageError, "listen: 0.5 is no text", QUOTES),
    "bytes spec": (LIGHT, {"listen": b"0"}, portexec.UsageError, "listen: b'0' is no text", QUOTES),
    "variables in a list": (LIGHT, {"env": ["A=b"]}, portexec.UsageError, "env=", "'NAME': 'value'"),
    "no variables": (LIGHT, {"env": ""}, portexec.UsageError, "env=''", "'NAME': 'value'"),
    "variable": (LIGHT, {"env": {"A=B": "x"}}, portexec.UsageError, "env: 'A=B'", "'NAME': 'value'"),
    "no variable": (LIGHT, {"env": {"": "x"}}, portexec.UsageError, "env: ''", "'NAME': 'value'"),
    "number variable": (LIGHT, {"env": {"A": 1}}, portexec.UsageError, "env: 1", QUOTES),
    "template": ([*LIGHT, "{web.port}"], {}, portexec.UsageError, "web", "listeners are"),
    "env file": (LIGHT, {"env_file": "/no/such"}, portexec.PortexecError, "/no/such: No such file", ""),
    "empty file": (LIGHT, {"env_file": ""}, portexec.UsageError, "env_file: the path is empty", "leave it out"),
    "number file": (LIGHT, {"env_file": 3}, portexec.UsageError, "env_file: 3 is no text", QUOTES),
    "cwd": (LIGHT, {"cwd": "/no/such"}, portexec.UsageError, "/no/such: No such file", "exists"),
    "cwd file": (LIGHT, {"cwd": "/etc/passwd"}, portexec.UsageError, "/etc/passwd: Not a dir", "directory"),
    "cwd surrogate": (LIGHT, {"cwd": "\ud800"}, portexec.UsageError, "cwd: .* cannot be encoded", ""),
    "cwd longest": (LIGHT, {"cwd": "x" * 5000}, portexec.UsageError, "cannot run in x+: File name too long", "directory"),
    "cwd number": (LIGHT, {"cwd": 3}, portexec.UsageError, "cwd: 3", QUOTES),
    "not found": (["no-such-program"], {}, portexec.CommandNotFound, "no-such-program", "installed"),
    "option": (["--env-file"], {}, portexec.CommandNotFound, "not found: --env-file", "installed"),
    "option in a path": (LIGHT, {"env_file": "/no/--env-file"}, portexec.PortexecError, "/no/--env-file: No such", ""),
    "not executable": (["/etc/passwd"], {}, portexec.CannotExecute, "Permission denied", "chmod"),
}
OPTION = re.compile("--(listen|hand-off|env|ready|kill-after) ")  # who writes Python has none of them to change


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, mark: str) -> None:
    """Told when `serve` is called or when it is entered, and then nothing is left, no descriptor either."""
    command, arguments, kind, message, hint = BAD[case]
    before = descriptors_of()
    with pytest.raises(kind) as caught, portexec.serve(command, **arguments):
        pass
    assert type(caught.value) is kind
    assert isinstance(caught.value, portexec.PortexecError)
    assert caught.match(f"(?s).*{message}")
    assert not hint or re.search(hint, caught.value.hint)
    assert not OPTION.search(str(caught.value))
    assert describe(marked(mark)) == []
    del caught
    gc.collect()  # warns of what was not closed, which is an error
    assert descriptors_of().keys() == before.keys()


def test_nothing_stands_for_the_default() -> None:
    with portexec.serve(LIGHT, listen=None, env=None, env_file=None, cwd=None, ready=None) as server:
        assert get(server.url) == greeting(server)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_working_directory_that_may_not_be_entered(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        with pytest.raises(portexec.UsageError, match=f"cannot run in {tmp_path}: Permission denied"):
            portexec.serve(LIGHT, cwd=tmp_path).__enter__()
    finally:
        tmp_path.chmod(0o700)


@IN_ASYNC_CODE
async def test_bad_input_in_async_code() -> None:
    with pytest.raises(portexec.CommandNotFound):
        async with portexec.serve(["no-such-program"]):
            pass


@pytest.mark.parametrize(
    ("hand_off", "end", "status"), [("fd", "exit 3", 3), ("guard", "exit 0", 0), ("hold", "kill -9 $$", -9)]
)
def test_a_server_that_exits_at_once(hand_off: str, end: str, status: int, mark: str) -> None:
    with pytest.raises(portexec.Exited) as caught, portexec.serve(["sh", "-c", f"echo why; {end}"], hand_off=hand_off):
        pass
    assert caught.value.returncode == status
    assert caught.value.output.startswith("why\n")
    assert "before it was ready" in caught.value.message
    assert "why" in str(caught.value)
    assert describe(marked(mark)) == []


@IN_ASYNC_CODE
async def test_a_server_that_is_never_ready(mark: str) -> None:
    with pytest.raises(portexec.NotReady) as caught:
        async with portexec.serve(["sh", "-c", "echo waiting; exec sleep 1000"], ready_timeout=0.5):
            pass
    assert caught.value.output == "waiting\n"
    assert "0.5 s" in caught.value.message
    assert caught.value.hint == "ready_timeout gives it more time, ready says what to wait for"
    assert describe(marked(mark)) == []


def test_a_number_that_is_taken() -> None:
    with portexec.serve(LIGHT) as owner:
        with pytest.raises(portexec.ListenError) as caught, portexec.serve(LIGHT, listen=str(owner.port)):
            pass
        assert f"127.0.0.1:{owner.port}: Address already in use (pid {owner.pid}" in caught.value.message
        assert f"{owner.port},0" in caught.value.hint


def test_entering_twice() -> None:
    serving = portexec.serve(LIGHT)
    with serving as server:
        with pytest.raises(portexec.AlreadyEntered) as caught, serving:
            pass
        assert "serve" in caught.value.hint
        assert get(server.url) == greeting(server)  # it is left alone
    with pytest.raises(portexec.AlreadyEntered), serving:
        pass


@IN_ASYNC_CODE
async def test_entering_twice_in_async_code() -> None:
    serving = portexec.serve(LIGHT)
    async with serving as server:
        with pytest.raises(portexec.AlreadyEntered):
            async with serving:
                pass
        assert get(server.url) == greeting(server)


# Exceptions, threads and loops.


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_stops_the_server(kind: type[BaseException], mark: str) -> None:
    with pytest.raises(kind, match="ours"), portexec.serve(LIGHT) as server:
        raise kind("ours")
    assert describe(marked(mark)) == []
    assert server.returncode == -signal.SIGTERM


WAIT_FOR_EVER = """
import sys, portexec
try:
    with portexec.serve(sys.argv[1:]):
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_while_it_starts(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "started"
    command = ["sh", "-c", f"touch {file}; exec sleep 1000"]
    with caller(WAIT_FOR_EVER, *command) as calling:
        wait_for(file.exists)
        calling.send_signal(signal.SIGINT)
        assert read_line(calling) == "interrupted"
        assert calling.wait(DEADLINE) == 0
        assert describe(marked(mark)) == []


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
    wait_for(lambda: not any(thread.name == "portexec" for thread in threading.enumerate()))
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
async def test_inside_an_application_with_threads_and_a_running_loop() -> None:
    """The loop goes on while servers start and stop, and plain servers may be used from threads beside it."""
    turns = 0
    over = anyio.Event()

    async def turn() -> None:
        nonlocal turns
        while not over.is_set():
            turns += 1
            await anyio.sleep(0.001)

    def plain() -> None:
        with portexec.serve(LIGHT) as server:
            assert get(server.url) == greeting(server)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turn)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(plain)
        before = turns
        async with portexec.serve(LIGHT) as server:
            assert turns > before
            before = turns
            await server.restart()
            assert turns > before
        over.set()


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with portexec.serve(LIGHT):
        assert threading.active_count() == before + 1
    wait_for(lambda: threading.active_count() == before)


# Cancellation.


@IN_ASYNC_CODE
async def test_cancelled_while_it_starts(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "started"
    before = descriptors_of().keys()
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
    assert descriptors_of().keys() == before


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


# Deaths of others.

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
        wait_for(lambda: sum("sleep" in line for line in describe(marked(mark))) == 4)  # two of them, the shim and portexec
        for number in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(shim, number)
            os.kill(ours, number)
        death = server.died(DEADLINE)
        assert death is not None
        assert "portexec itself was killed" in death.message
    left = marked(mark)
    assert left
    for pid in left:
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
        pids = [pid for pid in marked(mark) if int(status_of(pid)["PPid"]) == os.getpid()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
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
        forked = {int(pid) for pid in children if "--control-fd" not in describe({int(pid)})[0]}
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
class Popen(subprocess.Popen):
    def _execute_child(self, *args, **kwargs):  # the pipes are there, the process is not
        self.forking = threading.Thread(target=fork, daemon=True)
        self.forking.start()
        state = f"/proc/self/task/{self.forking.native_id}/stat"
        while self.forking.is_alive() and open(state).read().rpartition(")")[2].split()[0] != "S":
            pass
        super()._execute_child(*args, **kwargs)
subprocess.Popen = Popen
with portexec.serve(sys.argv[1:]) as server:
    print(server.port, flush=True)
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
        assert describe(marked(mark)) == []


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
    assert describe(marked(mark)) == []


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
    assert describe(marked(mark)) == []


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
    assert describe(marked(mark)) == []


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


# The package.


def test_importing_it_costs_next_to_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", "import portexec; portexec.__version__; dir(portexec)"],
        env={"PYTHONPATH": PACKAGE_HOME},
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "portexec" in imported
    before = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", ""], env={}, stderr=subprocess.PIPE, text=True, timeout=DEADLINE
    )
    usual = {line.rpartition("|")[2].strip() for line in before.stderr.splitlines() if line.startswith("import time:")}
    assert imported - usual == {"portexec", "__future__"}


def test_serve_and_listen_import_nothing_of_the_loop() -> None:
    code = "import sys, portexec; portexec.serve(['true']); portexec.listen().close(); print(*sys.modules)"
    assert not {"anyio", "asyncio", "trio"} & set(run_caller(code).split())


def test_all_is_what_can_be_had() -> None:
    assert sorted(portexec.__all__) == portexec.__all__
    for name in portexec.__all__:
        assert getattr(portexec, name) is not None
    names: dict[str, object] = {}
    exec("from portexec import *", names)
    assert set(names) - {"__builtins__"} == set(portexec.__all__)
    assert dir(portexec) == portexec.__all__
    with pytest.raises(AttributeError, match="nothing_like_that"):
        portexec.nothing_like_that  # noqa: B018  # the access is the test


def test_every_public_thing_says_what_it_is() -> None:
    for name in portexec.__all__:
        thing = getattr(portexec, name)
        if isinstance(thing, str):
            continue
        assert thing.__doc__, name
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{member}"


def test_every_error_is_one_of_ours() -> None:
    public = [getattr(portexec, name) for name in portexec.__all__]
    kinds = [thing for thing in public if isinstance(thing, type) and issubclass(thing, BaseException)]
    assert len(kinds) >= 10
    assert all(issubclass(kind, portexec.PortexecError) for kind in kinds)
