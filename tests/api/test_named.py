"""`portexec.running` and `portexec.find`: servers with a name, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import portexec
from tests.support import get, is_gone, run
from tests.support.names import started

pytestmark = pytest.mark.usefixtures("registry")


def test_find() -> None:
    url = started("web")
    server = portexec.find("web")
    assert (server.name, server.state, server.project) == ("web", "ready", str(Path.cwd()))
    assert server.url == url == server.listeners["listener1"].url
    assert get(server.url) == f"hello from {server.pid}"
    assert server.log is not None
    assert Path(server.log).read_text() == f"serving {server.pid}\n"
    assert portexec.find(str(server.pid)).url == portexec.find(f"{Path.cwd()}:web").url == url


def test_stop() -> None:
    started("web")
    server = portexec.find("web")
    server.stop()
    assert is_gone(server.pid)
    server.stop()
    with pytest.raises(portexec.NotRunning, match="web does not run"):
        portexec.find("web")


def test_what_was_found_before_is_not_the_next_one() -> None:
    started("web")
    server = portexec.find("web")
    run("--stop", "web")
    started("web")
    server.stop()
    assert portexec.find("web").state == "ready"


def test_running(tmp_path: Path) -> None:
    assert portexec.running() == []
    (tmp_path / "other").mkdir()
    started("web")
    started("api")
    started("web", cwd=tmp_path / "other")
    run("--name", "gone", "-q", "--", "true")
    found = [(server.project, server.name) for server in portexec.running()]
    assert found == [(str(tmp_path / "other"), "web"), (str(Path.cwd()), "api"), (str(Path.cwd()), "web")]


def test_what_is_no_name() -> None:
    with pytest.raises(portexec.UsageError, match="'a b' is not a name"):
        portexec.find("a b")
    with pytest.raises(portexec.UsageError, match=r"'web\.b' means a listener of web\nhint: write find\('web'\)\.listeners"):
        portexec.find("web.b")
    with pytest.raises(portexec.NotRunning, match="no server with a name has the pid 1"):
        portexec.find("1")
