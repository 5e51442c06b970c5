"""`portexec.serve_all`: several servers that start at once, and know each other's numbers."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest

import portexec
from tests.support import get
from tests.support.serving import IN_ASYNC_CODE, LIGHT, ON_FD, ask, describe, greeting, hook, marked


def test_each_knows_the_others(mark: str) -> None:
    """One by number and one by descriptor, in words and in variables, in both directions."""
    api = portexec.serve(LIGHT, env={"OTHER": "{web.url} {web.host} {web.port}", "OWN": "{api.url} {url}"})
    web = portexec.serve([*ON_FD, "{api.port}"], env={"OTHER": "{api.url}"})
    with portexec.serve_all({"api": api, "web": web}) as servers:
        one, other = servers["api"], servers["web"]
        assert list(servers) == ["api", "web"]
        assert hook(one) == hook(other)
        assert ask(one, "variable/OTHER") == f"{other.url} {other.host} {other.port}"
        assert ask(one, "variable/OWN") == f"{one.url} {one.url}"
        assert ask(other, "variable/OTHER") == one.url
        assert Path(f"/proc/{other.pid}/cmdline").read_bytes().split(b"\0")[-2] == str(one.port).encode()
        other.restart()
        assert ask(other, "variable/OTHER") == one.url
        one.stop()
        one.start()
        assert ask(one, "variable/OTHER") == f"{other.url} {other.host} {other.port}"
        other.stop()
        other.start()
        assert ask(other, "variable/OTHER") == one.url
    assert describe(marked(mark)) == []


@IN_ASYNC_CODE
async def test_in_async_code(mark: str) -> None:
    web = portexec.serve(LIGHT, env={"OTHER": "{api.url}"})
    async with portexec.serve_all({"api": LIGHT, "web": web}) as servers:
        assert isinstance(servers["api"], portexec.AsyncServer)
        assert ask(servers["web"], "variable/OTHER") == servers["api"].url
        assert get(servers["api"].url) == greeting(servers["api"])
    assert describe(marked(mark)) == []
    with anyio.move_on_after(0.2) as scope:
        async with portexec.serve_all({"api": LIGHT, "web": [*LIGHT, "silent"]}):
            pass
    assert scope.cancelled_caught
    assert describe(marked(mark)) == []


def test_they_start_at_the_same_time(tmp_path: Path) -> None:
    """Each waits for the other one to have begun."""
    os.mkfifo(tmp_path / "fifo")
    script = 'if [ $1 = r ]; then read x < fifo; else echo x > fifo; fi; shift; exec "$@"'
    commands = {word: portexec.serve(["sh", "-c", script, "sh", word, *LIGHT], cwd=tmp_path) for word in "rw"}
    with portexec.serve_all(commands) as servers:
        assert [get(server.url) for server in servers.values()] == [greeting(server) for server in servers.values()]


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "options", "error"),
    [
        (["no-such-program"], {}, portexec.CommandNotFound),
        ([*LIGHT, "exit=3"], {"ready_timeout": 1000}, portexec.Exited),
        ([*LIGHT, "{nobody.url}"], {}, portexec.UsageError),
        (LIGHT, {"cwd": "/no-such-place"}, portexec.UsageError),
        (LIGHT, {"listen": "{taken}"}, portexec.ListenError),
    ],
)
def test_one_that_fails_is_the_end_of_all(
    wrong: Any, options: dict[str, Any], error: type[portexec.PortexecError], position: int, mark: str
) -> None:
    with portexec.listen() as taken:
        if "listen" in options:
            options = {"listen": str(taken.getsockname()[1])}
        servers: list[tuple[str, Any]] = [("a", [*LIGHT, "silent"])]
        servers.insert(position, ("b", portexec.serve(wrong, **options)))
        with pytest.raises(error) as caught, portexec.serve_all(dict(servers)):
            pass
    assert type(caught.value) is error
    assert re.match("b: (?!b: )", caught.value.message), caught.value.message
    assert describe(marked(mark)) == []


def test_the_death_of_one_is_no_matter_of_the_others() -> None:
    with portexec.serve_all({"a": LIGHT, "b": LIGHT}) as servers:
        os.kill(servers["a"].pid, signal.SIGKILL)
        assert servers["a"].wait() == -signal.SIGKILL
        assert get(servers["b"].url) == greeting(servers["b"])
        servers["b"].restart()


def test_what_cannot_be_meant() -> None:
    wrong: list[Any] = [[LIGHT], {"a": "npm start"}, {"a b": LIGHT}, {"": LIGHT}, {3: LIGHT}]
    for servers in wrong:
        with pytest.raises(portexec.UsageError):
            portexec.serve_all(servers)
    with portexec.serve_all({}) as none:
        assert none == {}
    serving = portexec.serve(LIGHT)
    with serving, pytest.raises(portexec.AlreadyEntered), portexec.serve_all({"a": serving}):
        pass
