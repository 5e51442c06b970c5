"""The pytest plugin: `portexec_server` starts servers for a test, `portexec_session_server` for the whole session.

Both are factories: call them with what `portexec.serve` takes, and get a `portexec.Server`, which is stopped at the end of the
test or of the session. With pytest-xdist every worker has its own.

A failing test shows what its servers wrote, as report sections. When a server died during the test, that is the failure: the
client's connection error, which would only hide it, becomes its cause.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.server import Exited, Server

    Factory = Callable[..., Server]

_PATIENCE = 0.5  # seconds in which the news of a death must have come
_SERVERS = pytest.StashKey["list[Server]"]()


@pytest.fixture
def portexec_server(request: pytest.FixtureRequest) -> Generator[Factory, None, None]:
    """A function that starts a server for this test: `portexec_server(["npm", "start"])` takes what `portexec.serve` takes."""
    yield from _factory(request.node)


@pytest.fixture(scope="session")
def portexec_session_server(request: pytest.FixtureRequest) -> Generator[Factory, None, None]:
    """The same for the session: use it in a session fixture of your own, which returns the server."""
    yield from _factory(request.session)


def _factory(owner: pytest.Item | pytest.Session) -> Generator[Factory, None, None]:
    from portexec.server import serve

    servers = owner.stash.setdefault(_SERVERS, [])
    with ExitStack() as stack:

        def start(command: Any, **options: Any) -> Server:
            server = stack.enter_context(serve(command, **options))
            servers.append(server)
            return server

        yield start


def _servers_of(item: pytest.Item) -> list[Server]:
    """Those of the test, and those of the session that it asked for, directly or by another fixture."""
    own = item.stash.get(_SERVERS, [])
    asks_for_session = "portexec_session_server" in getattr(item, "fixturenames", ())
    return [*own, *item.session.stash.get(_SERVERS, [])] if asks_for_session else own


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let a test fail of the server that died under it."""
    __tracebackhide__ = True
    dead_before = [server for server in _servers_of(item) if server.died() is not None]
    try:
        result = yield
    except Exception as failure:
        # A wrong answer is no sign of a death; anything else may be its first sign.
        death = _death(item, dead_before, 0.0 if isinstance(failure, AssertionError) else _PATIENCE)
        if death is None:
            raise
        raise death.with_traceback(failure.__traceback__) from failure
    death = _death(item, dead_before, 0.0)
    if death is not None:
        raise death
    return result


def _death(item: pytest.Item, dead_before: list[Server], patience: float) -> Exited | None:
    """The death of a server during this test."""
    for server in _servers_of(item):
        if server not in dead_before and (death := server.died(patience)) is not None:
            death.output = ""  # it has a section of its own
            return death
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Add what the servers wrote to the report of a failure."""
    report = yield
    if report.failed:
        for server in _servers_of(item):
            report.sections.append((f"portexec: {server.url}, pid {server.pid}", server.output))
    return report
