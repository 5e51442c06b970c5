"""Arguments of `portexec.serve` beside those that only name an option, and what a server says of itself."""

from __future__ import annotations

import io
import os
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import portexec
from portexec.binding.tables import listening_inodes
from tests.support import DEADLINE, child, get, wait_for
from tests.support.installed import needs_ipv6
from tests.support.serving import IN_ASYNC_CODE, LIGHT, ON_FD, ask, describe, greeting, marked, tell

SAYS = 'echo "$0 is loading"; printf "up and "; echo running; exec "$@"'


def saying(*words: str) -> list[str]:
    return ["sh", "-c", SAYS, *words]


def test_ready_by_a_line() -> None:
    """Whichever restart it is."""
    with portexec.serve(saying("it", *LIGHT), ready=re.compile(r"^up and running$")) as server:
        assert server.output.startswith("it is loading\nup and running\n")
        pid = server.pid
        server.restart()
        assert server.pid != pid
        assert server.output.count("up and running\n") == 2
        assert server.port > 0


def test_the_line_of_a_restart_that_comes_before_the_news_of_the_end(tmp_path: Path) -> None:
    """The program's own thread was slow: it finds the output of the new start together with the end of the old one."""
    script = "echo up and running; : >$$; read line; echo $line; sleep 1000"
    is_held, goes_on = threading.Event(), threading.Event()

    def hold(text: str) -> None:
        if "hold" in text:
            is_held.set()
            assert goes_on.wait(DEADLINE)

    reader, writer = os.pipe()
    words = ["sh", "-c", script]
    with (
        portexec.serve(words, ready=re.compile("up and running"), output=hold, stdin=reader, cwd=tmp_path) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        os.write(writer, b"hold\n")
        assert is_held.wait(DEADLINE)
        restart = pool.submit(server.restart)
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        goes_on.set()
        restart.result(DEADLINE)
        assert server.output.count("up and running\n") == 2
    os.close(reader)
    os.close(writer)


@IN_ASYNC_CODE
async def test_not_ready_by_a_line(mark: str) -> None:
    with pytest.raises(portexec.NotReady) as caught:
        async with portexec.serve(saying("it", *LIGHT), ready=re.compile("walking"), ready_timeout=0.5):
            pass
    assert "wrote no line with 'walking'" in caught.value.message
    assert describe(marked(mark)) == []


def test_it_ends_before_it_writes_the_line() -> None:
    with pytest.raises(portexec.Exited, match="exit status 3"), portexec.serve(["sh", "-c", "exit 3"], ready=re.compile("x")):
        pass


def test_much_output_before_the_line() -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo ready; exec sleep 1000"
    with portexec.serve(["sh", "-c", script], ready=re.compile("^ready$")) as server:
        assert server.output.endswith("x\nready\n")


def test_the_output_is_told_line_by_line() -> None:
    lines: list[str] = []
    with portexec.serve(saying("it", *LIGHT), output=lines.append) as server:
        ask(server, "write/100000")
        expected = server.output
    assert "".join(lines).endswith(expected[1000:])
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)


def test_the_output_goes_to_a_file(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        portexec.serve(["sh", "-c", 'printf "no end" >&2; exec "$@"', "sh", *LIGHT], output=log) as server,
    ):
        wait_for(lambda: (tmp_path / "log").read_text() == f"no endserving {server.pid}\n")


@pytest.mark.parametrize("failure", [OSError("the disk is full"), pytest.fail.Exception("no")])
def test_a_function_that_fails_is_not_called_again(failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as the failure of a thread: on stderr, and by pytest as a warning."""
    calls, told = list[str](), list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fail(line: str) -> None:
        calls.append(line)
        raise failure

    with portexec.serve(LIGHT, output=fail) as server:
        ask(server, "write/100")
        assert get(server.url) == greeting(server)
        wait_for(lambda: f"portexec: note: no more is written to `output`, which raised {failure!r}\n" in server.output)
    assert len(calls) == 1
    assert [(each.exc_type, each.exc_value) for each in told] == [(type(failure), failure)]


def wait_for_another(server: portexec.Server) -> None:
    with portexec.serve(LIGHT):
        pass


@pytest.mark.parametrize("wait", [portexec.Server.wait, portexec.Server.restart, wait_for_another])
def test_a_function_that_waits_for_a_server_is_told_that_it_cannot(
    wait: Callable[[portexec.Server], object], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ever: the thread that called it is the one that would have heard the news. Nothing is begun, either."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    running: list[portexec.Server] = []

    def wait_in_vain(line: str) -> None:
        if running:
            wait(running[0])

    with portexec.serve(LIGHT) as other, portexec.serve(LIGHT, output=wait_in_vain) as server:
        before = marked(mark)
        running.append(other)
        ask(server, "write/100")
        wait_for(lambda: "UsageError('a function that is told the output cannot wait for a server')" in server.output)
        assert get(other.url) == greeting(other)
        assert marked(mark) == before


def test_nothing_is_inherited_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    with portexec.serve(LIGHT, inherit_env=False, env={"A": "{port}", "INHERITED": None}) as server:
        assert ask(server, "variable/A") == str(server.port)
        with open(f"/proc/{server.pid}/environ") as file:
            assert "INHERITED" not in file.read()


def test_a_fixed_number_is_remapped() -> None:
    with portexec.serve([*LIGHT, "port=8000"], remap=8000) as server:
        assert server.port != 8000
        assert get(server.url) == greeting(server)
    with pytest.raises(portexec.UsageError, match="remap"), portexec.serve(LIGHT, remap="x"):
        pass


def test_it_is_restarted_when_it_ends() -> None:
    with portexec.serve(LIGHT, restart="always") as server:
        pid, port = server.pid, server.port
        tell(server, "exit/3")
        wait_for(lambda: server.output.count("serving") == 2 and server.pid != pid)
        wait_for(lambda: listening_inodes(server.port))
        assert get(server.url) == greeting(server)
        assert server.port == port
        assert server.died() is None
        pid = server.pid
        server.restart()
        assert server.pid != pid
        assert get(server.url) == greeting(server)
    assert server.died() is None
    with (
        pytest.raises(portexec.UsageError, match="restart 'sometimes' is not known"),
        portexec.serve(LIGHT, restart="sometimes"),
    ):
        pass


@needs_ipv6
def test_an_address_for_sockets() -> None:
    with portexec.serve([*child("obeying"), "host=::1"], hand_off="guard", listen="[::1]:0", scheme="https") as server:
        assert server.address == ("::1", server.port)
        assert server.url == f"https://[::1]:{server.port}"
        with socket.create_connection(server.address, timeout=DEADLINE):
            pass


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    serving = portexec.serve(["/bin/sleep", "1000"], ready="none")
    assert repr(serving) == "<portexec.Serving (sleep 1000)>"
    with serving as server:
        assert repr(server) == f"<portexec.Server {server.url} (sleep 1000, pid {server.pid})>"
    assert repr(server) == f"<portexec.Server {server.url} (sleep 1000, pid {server.pid}, returncode -15)>"
    with portexec.serve(ON_FD, listen="unix:app.sock", cwd=tmp_path) as server:
        assert (server.path, server.address) == (f"{tmp_path}/app.sock", ("", 0))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("output", 3), ("output", io.BytesIO()), ("ready", re.compile(b"x")), ("scheme", 3), ("restart", None)],
)
def test_what_cannot_be_meant(argument: str, value: Any) -> None:
    with pytest.raises(portexec.UsageError, match=argument):
        portexec.serve(LIGHT, **{argument: value})


def test_help_begins_with_an_example() -> None:
    text = portexec.serve.__doc__ or ""
    assert text.split("\n\n")[1].lstrip().startswith("with portexec.serve([")
    names = [name for name in portexec.serve.__annotations__ if name != "return"]
    assert [name for name in names if f"`{name}`" not in text] == []
