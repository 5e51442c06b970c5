"""The host: one portexec for all servers of a process, started when it is needed, and what each server has of its own there."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import portexec
from portexec import control
from portexec.api.driver import Driver
from portexec.api.host import current
from tests.support import DEADLINE, get, wait_for
from tests.support.proc import children_of, descriptors_of, status_of
from tests.support.serving import LIGHT, ON_FD, ask, describe, descriptors, greeting, hook, marked, run_caller

SLEEP = ["sleep", "1000"]


def test_all_servers_have_one_host(mark: str) -> None:
    with portexec.serve(LIGHT):
        pass
    wait_for(lambda: all(thread.name != "portexec" for thread in threading.enumerate()))
    before, open_before = set(threading.enumerate()), len(descriptors())  # a thread of trio's may end at any time
    with ExitStack() as stack:
        servers = [stack.enter_context(portexec.serve(command)) for command in [LIGHT, ON_FD] * 5]
        assert len({hook(server) for server in servers}) == 1
        assert len({server.port for server in servers}) == 10
        assert len(children_of(hook(servers[0]))) == 10  # the shims
        assert [thread.name for thread in set(threading.enumerate()) - before] == ["portexec"]
        assert len(descriptors()) == open_before + 10
        assert [get(server.url) for server in servers] == [greeting(server) for server in servers]
    wait_for(lambda: set(threading.enumerate()) <= before)
    assert len(descriptors()) == open_before
    assert describe(marked(mark)) == []


def test_the_host_stays_and_keeps_nothing() -> None:
    with portexec.serve(LIGHT) as server:
        host = hook(server)
    before = descriptors_of(host)
    for command in (LIGHT, ON_FD, ["no-such-program"], ["sh", "-c", "exit 3"]):
        try:
            with portexec.serve(command) as server:
                assert hook(server) == host
        except portexec.PortexecError:
            pass
    with portexec.serve(SLEEP, ready="none") as server:
        assert hook(server) == host
    assert descriptors_of(host) == before
    assert children_of(host) == []


def test_each_server_has_surroundings_of_its_own(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    umask = os.umask(0o022)
    try:
        with portexec.serve(LIGHT, cwd=places[0], env={"A": "1"}) as one:
            os.umask(0o027)
            with portexec.serve(LIGHT, cwd=places[1], env={"A": "2"}) as two:
                assert hook(one) == hook(two)
                for _ in range(2):
                    assert [ask(server, "place") for server in (one, two)] == list(map(str, places))
                    assert [ask(server, "variable/A") for server in (one, two)] == ["1", "2"]
                    assert [status_of(server.pid)["Umask"] for server in (one, two)] == ["0022", "0027"]
                    assert len({os.getsid(server.pid) for server in (one, two)} | {os.getsid(hook(one)), os.getsid(0)}) == 4
                    two.restart()
                    one.restart()
                ask(one, "write/10")
                assert "written" not in two.output
    finally:
        os.umask(umask)


def test_soft_limits_are_those_of_the_time_of_the_call() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with portexec.serve(["sh", "-c", "ulimit -n; exec sleep 1000"], ready="none") as one:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 7, hard))
        try:
            with portexec.serve(["sh", "-c", "ulimit -n; exec sleep 1000"], ready="none") as two:
                wait_for(lambda: [server.output for server in (one, two)] == [f"{soft}\n", f"{soft - 7}\n"])
                assert hook(one) == hook(two)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


DIFFERENT = """
import os, resource, sys, portexec
def limit(pid=0):
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
def host(server):
    pid = server.pid
    while (parent := int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])) != os.getpid():
        pid = parent
    return pid
with portexec.serve(sys.argv[1:]) as one:
    resource.setrlimit(resource.RLIMIT_NOFILE, [limit() - 1] * 2)
    with portexec.serve(sys.argv[1:]) as two, portexec.serve(sys.argv[1:]) as three:
        print([limit(each.pid) - limit() for each in (one, two, three)])
        print(host(one) != host(two), host(two) == host(three))
        one.restart()
        print(limit(one.pid) - limit())
"""


def test_what_cannot_be_sent_takes_another_host() -> None:
    assert run_caller(DIFFERENT, *LIGHT).splitlines() == ["[1, 0, 0]", "True True", "1"]


def test_a_start_that_waits_for_somebody_keeps_no_other_server_waiting(tmp_path: Path, mark: str) -> None:
    pipe = tmp_path / "env"
    os.mkfifo(pipe)
    serving = portexec.serve(LIGHT, env_file=pipe)
    with portexec.serve(LIGHT) as other, ThreadPoolExecutor(1) as pool:
        starting = pool.submit(serving.__enter__)
        writer = os.open(pipe, os.O_WRONLY)  # returns when the host has it open, and now waits for what is written
        other.restart()
        assert get(other.url) == greeting(other)
        os.write(writer, b"WHO=me\n")
        os.close(writer)
        server = starting.result(DEADLINE)
        assert ask(server, "variable/WHO") == "me"
        assert hook(server) != hook(other)
        serving.__exit__(None, None, None)
    assert describe(marked(mark)) == []


def test_a_start_that_waits_for_somebody_can_be_given_up(tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portexec.api.driver._GRACE", 1e6)  # is for a host that has something to end
    pipe = tmp_path / "env"
    os.mkfifo(pipe)
    serving = portexec.serve(LIGHT, env_file=pipe, kill_after=0.1)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(serving.__enter__)
        writer = os.open(pipe, os.O_WRONLY)  # returns when the host has it open, and now waits for what is written
        serving.__exit__(None, None, None)
        with pytest.raises(portexec.NotRunning):
            starting.result(DEADLINE)
        os.close(writer)
    wait_for(lambda: not marked(mark))


@pytest.mark.parametrize(
    ("listen", "may_block"),
    [
        ("127.0.0.1:0", False),
        ("web=[::1]:8000-8009", False),
        ("*:0", False),
        ("stable,0", False),
        ("localhost:0", False),
        ("unix:some/name", False),
        ("node1:0", True),
        ("udp:node1.example.org:0", True),
        (["0", "web=node1:0"], True),
        ("-", False),
    ],
)
def test_which_servers_have_a_host_of_their_own(listen: Any, may_block: bool) -> None:
    """Those for which a name is looked up."""
    assert portexec.serve(LIGHT, listen=listen).driver.may_block() is may_block


def test_a_server_that_its_host_gives_up_is_the_end_of_no_other(mark: str) -> None:
    """The host has no descriptor left for a question to the second one, and stops it."""
    runs = threading.Event()
    waiting = portexec.serve(["sh", "-c", "echo runs; exec sleep 1000"], ready="http", output=lambda _: runs.set())
    with portexec.serve(LIGHT) as server, ThreadPoolExecutor(1) as pool:
        host = hook(server)
        soft, hard = resource.prlimit(host, resource.RLIMIT_NOFILE)
        free = min({*range(soft)} - {*map(int, descriptors_of(host))})  # the second one will have it
        starting = pool.submit(waiting.__enter__)
        assert runs.wait(DEADLINE)
        resource.prlimit(host, resource.RLIMIT_NOFILE, (free, hard))
        with pytest.raises(portexec.PortexecError, match="Too many open files"):
            starting.result(DEADLINE)
        resource.prlimit(host, resource.RLIMIT_NOFILE, (soft, hard))
        with portexec.serve(LIGHT) as third:
            assert get(third.url) == greeting(third)
        assert get(server.url) == greeting(server)
    assert describe(marked(mark)) == []


def test_a_failure_of_the_programs_own_thread_ends_its_servers_and_says_why(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would take news any more, so that everybody would wait for ever."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with portexec.serve(LIGHT) as server:
        monkeypatch.setattr(Driver, "take_event", fail)
        with pytest.raises(portexec.Exited, match=r"portexec itself has failed: (?s:.)*ZeroDivisionError"):
            portexec.serve(LIGHT).__enter__()
        monkeypatch.undo()
        with pytest.raises(portexec.Exited, match="ZeroDivisionError"):
            server.wait()
        with portexec.serve(LIGHT) as other:
            assert get(other.url) == greeting(other)
    assert describe(marked(mark)) == []


ABANDONING = """
import os, signal, sys
import portexec
from portexec.api import driver

def order_and_die(drivers, order=driver.host.serve):
    for each in drivers:
        order([each])
    os.kill(os.getpid(), signal.SIGKILL)

with portexec.serve(["sleep", "1000"], ready="none"):
    host = driver.host.current().process.pid
    print(host, flush=True)
    os.kill(host, signal.SIGSTOP)
    driver.host.serve = order_and_die
    portexec.serve_all({name: portexec.serve(["sleep", "1000"], ready="none") for name in ("a", "b", "c")}).__enter__()
"""


def test_orders_of_a_program_that_dies_come_to_nothing(mark: str) -> None:
    """The host finds all of them, and the end of the program, at once."""
    with subprocess.Popen([sys.executable, "-c", ABANDONING], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        host = int(program.stdout.readline())
        assert program.wait(DEADLINE) == -signal.SIGKILL
        os.kill(host, signal.SIGCONT)
        wait_for(lambda: not marked(mark))


def test_a_host_that_is_killed_is_the_end_of_its_servers_and_the_next_one_has_another(mark: str) -> None:
    with ThreadPoolExecutor(3) as pool, ExitStack() as stack:
        servers = [stack.enter_context(portexec.serve(command)) for command in (LIGHT, ON_FD, [*LIGHT, "ignore"])[:2]]
        waiting = [pool.submit(server.wait) for server in servers]
        starting = pool.submit(portexec.serve([*LIGHT, "silent"]).__enter__)
        wait_for(lambda: any("light.py silent" in line for line in describe(marked(mark))))
        host = hook(servers[0])
        os.kill(host, signal.SIGKILL)
        futures: list[Any] = [*waiting, starting]
        for each in futures:
            with pytest.raises(portexec.Exited, match="portexec itself was killed"):
                each.result(DEADLINE)
        with portexec.serve(LIGHT) as server:
            assert hook(server) != host
            assert get(server.url) == greeting(server)
        for dead in servers:
            dead.start()
            assert get(dead.url) == greeting(dead)
    wait_for(lambda: not marked(mark))


@pytest.mark.parametrize("start", ["first", "later"])
def test_what_a_server_of_a_killed_host_has_made_goes_with_it(start: str, mark: str, tmp_path: Path) -> None:
    with portexec.serve(ON_FD, listen="unix:app.sock", cwd=tmp_path) as server:
        if start == "later":
            server.restart()
        assert os.listdir(tmp_path) == ["app.sock"]
        os.kill(hook(server), signal.SIGKILL)
        with pytest.raises(portexec.Exited, match="portexec itself was killed"):
            server.wait()
    wait_for(lambda: not marked(mark))
    assert os.listdir(tmp_path) == []


def test_each_end_after_that_is_told_when_it_comes(mark: str) -> None:
    """Whatever takes its time keeps nobody else waiting for the news."""
    with portexec.serve([*LIGHT, "ignore"], kill_after=1000) as slow, portexec.serve(LIGHT) as server:
        os.kill(hook(server), signal.SIGKILL)
        with pytest.raises(portexec.Exited, match="portexec itself was killed"):
            server.wait()
        assert get(slow.url) == greeting(slow)
        os.kill(slow.pid, signal.SIGKILL)
        with pytest.raises(portexec.Exited, match="portexec itself was killed"):
            slow.wait()
    wait_for(lambda: not marked(mark))


def test_a_shim_that_hangs_keeps_no_other_server_waiting(mark: str) -> None:
    with portexec.serve(LIGHT) as other, portexec.serve(LIGHT) as server:
        shim = int(status_of(server.pid)["PPid"])
        os.kill(shim, signal.SIGSTOP)
        os.kill(server.pid, signal.SIGKILL)
        other.restart()
        with portexec.serve(LIGHT) as third:
            assert get(third.url) == greeting(third)
        os.kill(shim, signal.SIGCONT)
        assert server.wait() == -signal.SIGKILL
    assert describe(marked(mark)) == []


def test_an_idle_host_that_was_killed_is_replaced() -> None:
    with portexec.serve(LIGHT) as server:
        host = hook(server)
    os.kill(host, signal.SIGKILL)
    with portexec.serve(LIGHT) as server:
        assert hook(server) != host


def test_a_shim_that_is_killed_is_the_end_of_its_server_alone(mark: str) -> None:
    with portexec.serve(LIGHT) as other, portexec.serve(["sh", "-c", '"$@" & wait', "sh", *LIGHT], ready="listen") as server:
        os.kill(int(status_of(server.pid)["PPid"]), signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        assert get(other.url) == greeting(other)
        assert len(marked(mark)) == 2  # the other one and its shim
    assert describe(marked(mark)) == []


def test_a_shim_that_is_killed_before_the_command_runs_is_said(mark: str) -> None:
    with portexec.serve(ON_FD, lazy=True) as server:
        (shim,) = marked(mark)
        os.kill(shim, signal.SIGKILL)
        with pytest.raises(portexec.Exited, match="the process that was to start it was killed"):
            server.wait()


BY_A_PROCESS = """
import multiprocessing, sys, urllib.request, warnings, portexec
warnings.simplefilter("ignore")
def serve(command, answers):
    with portexec.serve(command) as server:
        answers.put(urllib.request.urlopen(server.url).read().decode() == f"hello from {server.pid}")
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with portexec.serve(sys.argv[2:]) as server:
        answers = context.SimpleQueue()
        processes = [context.Process(target=serve, args=(sys.argv[2:], answers)) for _ in range(3)]
        for process in processes:
            process.start()
        print([answers.get() for _ in processes])
        for process in processes:
            process.join()
        print(urllib.request.urlopen(server.url).read().decode() == f"hello from {server.pid}")
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_every_process_of_multiprocessing_has_a_host_of_its_own(method: str, mark: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BY_A_PROCESS)
    done = subprocess.run([sys.executable, script, method, *LIGHT], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("[True, True, True]\nTrue\n", "")
    wait_for(lambda: not marked(mark))


# What a host is told


@contextmanager
def hosted() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A host of the test's own, and our end of its socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    with ours, theirs:
        code = f"from portexec import host; host.main({theirs.fileno()}, None)"
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            try:
                yield process, ours
            finally:
                process.kill()


def test_nonsense_is_answered_or_left_out(tmp_path: Path) -> None:
    with hosted() as (process, ours), ours.makefile("rb") as lines, (tmp_path / "none").open("w+b") as file:
        events = map(json.loads, lines)
        ours.sendall(b'\n[]\n{"do": "serve"}\nx\n{"do": "dance", "id": -1}\n{"do": "stop", "id": 5}\n' + b"x" * 200_000 + b"\n")
        assert next(events) == {"event": "error", "id": 0} | control.error_fields(
            portexec.PortexecError("portexec does not understand the order")
        )
        assert next(events) == {"event": "gone", "id": 0}
        assert next(events) == {"event": "gone", "id": 5}
        before = descriptors_of(process.pid)
        for number, content in enumerate([b"", b"[" * 9000, b"{}", json.dumps({"id": 7}).encode()], start=7):
            file.truncate(0)
            file.seek(0)
            file.write(content)
            file.flush()
            socket.send_fds(ours, [json.dumps({"do": "serve", "id": number}).encode() + b"\n"], [file.fileno()] * 3)
            assert [next(events)["event"] for _ in range(2)] == ["error", "gone"]
        socket.send_fds(ours, [b'{"do": "stop", "id": 99}\n'], [file.fileno()] * 200)
        assert next(events) == {"event": "gone", "id": 99}
        wait_for(lambda: descriptors_of(process.pid) == before)
        ours.shutdown(socket.SHUT_WR)
        assert process.wait(DEADLINE) == 0


def test_a_host_whose_program_does_not_read_ends() -> None:
    with hosted() as (process, ours):
        poked = 0
        try:
            while poked < 100_000:
                ours.sendall(b'{"do": "stop", "id": 5}\n' * 100)
                poked += 100
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert poked < 100_000
        assert process.wait(DEADLINE) == 0


def test_a_host_that_takes_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portexec.api.host._PATIENCE", 0.1)
    with portexec.serve(LIGHT) as server:
        host = current()
        assert host is not None
        os.kill(host.process.pid, signal.SIGSTOP)
        while host.is_usable():
            server._driver._say("dance")
        with pytest.raises(portexec.Exited, match="portexec itself was killed"):
            server.wait()


def test_much_output_before_it_is_ready_is_not_kept() -> None:
    """Nor is it gathered for a function that is told each line: this is one line."""
    told = 0

    def count(text: str) -> None:
        nonlocal told
        told += len(text)

    script = 'head -c 100000000 /dev/zero | tr "\\0" x; exec "$@"'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with portexec.serve(["sh", "-c", script, "sh", *LIGHT], output=count) as server:
        assert get(server.url) == greeting(server)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000
    assert told > 100_000_000


def test_many_servers_at_once(mark: str) -> None:
    commands: list[Any] = [SLEEP] * 100
    with ExitStack() as stack:
        servers = [stack.enter_context(portexec.serve(command, ready="none")) for command in commands]
        assert len({server.port for server in servers}) == 100
        assert len({hook(server) for server in servers}) == 1
    assert describe(marked(mark)) == []
