"""Bad input, and starts that fail: which error it is, what it says, and that nothing is left."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest

import portexec
from tests.support import get
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    ON_FD,
    describe,
    descriptors,
    greeting,
    marked,
)
from tests.support.waiting import LIMITS

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
    "lazy": (LIGHT, {"lazy": True}, portexec.UsageError, "lazy needs hand-off fd", "or say hand_off fd"),
    "unreachable": (LIGHT, {"listen": "unix:x", "host": "web"}, portexec.UsageError, "host", "as with listen '"),
    "ready": (
        LIGHT,
        {"ready": "soon"},
        portexec.UnknownReady,
        "ready 'soon'",
        r"listen, accept, http, http:PATH.*; re\.compile",
    ),
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
    before = descriptors()
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
    assert descriptors().keys() == before.keys()


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
    for limit in LIMITS:
        with pytest.raises(portexec.NotReady) as caught:
            async with portexec.serve(["sh", "-c", "echo waiting; exec sleep 1000"], ready_timeout=limit):
                pass
        assert f"after {limit:g} s" in caught.value.message
        if caught.value.output:
            break
    assert caught.value.output == "waiting\n"
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
