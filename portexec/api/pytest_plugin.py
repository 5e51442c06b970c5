"""The pytest plugin: `portexec_server` starts servers for a test, `portexec_server_any_scope` for a fixture of any scope.

Both are factories: call them with what `portexec.serve` takes, and get a `portexec.Server`. The server is stopped at the end of
the fixture that started it; a server that no fixture has started is stopped with the factory. `portexec_async_server` is
awaited. With pytest-xdist every worker has its own servers.

The plugin knows every server of the process, also that of a plain `with portexec.serve(...)`. A server belongs to the fixture
definition that started it, and so to all tests that use the definition; or else to the test that started it (`known_servers`).

A test's report has what its servers wrote since the test began, as captured output, phase by phase. When a server died during
the test, its death is the failure: the client's connection error, which would only hide the death, becomes its cause. A test
that expects its server to end says so by `server.wait()`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, NoReturn

import pytest

from portexec.api import watchers
from portexec.api.known_servers import KnownServers, Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.api.factories import AsyncServerFactory, ServerFactory
    from portexec.api.serve import AsyncServer, Server
    from portexec.server_errors import Exited

__tracebackhide__ = True  # our frames are hidden in the tracebacks of fixtures and tests

_PATIENCE = 0.5  # seconds in which a command, such as npm, must have ended after the death of the server that it runs
_SECTION = 1 << 14  # bytes of one server's output in one section; `Server.output` has more

_KNOWN = pytest.StashKey[KnownServers]()


# The fixtures.


@pytest.fixture
def portexec_server(request: pytest.FixtureRequest) -> ServerFactory:
    """A function that starts a server for this test: `portexec_server(["npm", "start"])` takes what `portexec.serve` takes."""
    return _factory(request)


@pytest.fixture(scope="session")
def portexec_server_any_scope(request: pytest.FixtureRequest) -> ServerFactory:
    """The same for fixtures of any scope: use it in a fixture of your own, at whose end the server is stopped."""
    return _factory(request)


@pytest.fixture(scope="session")
def portexec_session_server(request: pytest.FixtureRequest) -> ServerFactory:
    """The former name of `portexec_server_any_scope`."""
    return _factory(request)


@pytest.fixture
def portexec_async_server(request: pytest.FixtureRequest) -> AsyncServerFactory:
    """A coroutine function that starts a server for this test, in asyncio or trio: `await portexec_async_server([...])`."""
    return _async_factory(request)


@pytest.fixture(scope="session")
def portexec_async_server_any_scope(request: pytest.FixtureRequest) -> AsyncServerFactory:
    """The same for async fixtures of any scope: use it in a fixture of your own, at whose end the server is stopped."""
    return _async_factory(request)


def _factory(request: pytest.FixtureRequest) -> ServerFactory:
    from portexec.api.serve import serve

    known = request.config.stash[_KNOWN]
    life = _Life(request)

    def start(command: Any, **options: Any) -> Server:
        owner = known.being_set_up() or life.request()
        serving = serve(command, **options)
        server = serving.__enter__()
        owner.addfinalizer(lambda: serving.__exit__(None, None, None))
        return server

    return start


def _async_factory(request: pytest.FixtureRequest) -> AsyncServerFactory:
    from portexec.api.serve import serve

    known = request.config.stash[_KNOWN]
    life = _Life(request)

    async def start(command: Any, **options: Any) -> AsyncServer:
        owner = known.being_set_up() or life.request()
        serving = serve(command, **options)
        server = await serving.__aenter__()
        owner.addfinalizer(lambda: serving.__exit__(None, None, None))  # when no event loop runs
        return server

    return start


class _Life:
    """A factory's fixture, as long as it is not over. After that, pytest would let later tests fail of what is left to stop."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._is_over = False
        request.addfinalizer(self._end)

    def _end(self) -> None:
        self._is_over = True

    def request(self) -> pytest.FixtureRequest:
        """What the end of a server can be left to. Raises UsageError when the fixture is over."""
        if self._is_over:
            from portexec.errors import UsageError

            hint = "ask for the fixture where the server is started"
            raise UsageError(f"the fixture {self._request.fixturename} is over, with the test that it was made for", hint)
        return self._request


# What pytest tells.


def pytest_configure(config: pytest.Config) -> None:
    """Watch every server from now on. pytest calls this for a plugin that is loaded late, too."""
    # The live output of a worker of pytest-xdist is not seen.
    is_seen = not hasattr(config, "workerinput")
    capture = config.getoption("capture", "fd")
    known = KnownServers(is_live=is_seen and capture in ("no", "tee-sys"), is_kept=not is_seen or capture != "no")
    config.stash[_KNOWN] = known
    watchers.watch(known.take)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Watch no more servers."""
    known = config.stash[_KNOWN]
    watchers.unwatch(known.take)
    known.close()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Note which fixture is being set up, and so starts a server."""
    __tracebackhide__ = True
    with request.config.stash[_KNOWN].setting_up(fixturedef, request):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin anew, also when a test is run again: earlier output and deaths do not belong to this test."""
    item.config.stash[_KNOWN].begin(item)


@pytest.hookimpl(wrapper=True, trylast=True)  # innermost, so that xfail judges the report that we have changed
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Make the death of a server the failure of its test, and show in the report what the servers wrote."""
    report = yield
    known = item.config.stash[_KNOWN]
    watched = known.of(item)
    deaths = _news(watched, known.of_nobody(), call.excinfo)
    if deaths and report.outcome != "skipped":
        cause, call.excinfo = call.excinfo, _as_failure(deaths[0], call.excinfo, item)
        report.outcome = "failed"
        if cause is None or isinstance(item, pytest.Function):
            report.longrepr = item.repr_failure(call.excinfo)
        else:  # no Python function, but a doctest, whose own words show the line that failed
            report.longrepr = f"{report.longrepr}\nE   {call.excinfo.exconly()}"
    if known.is_kept:
        for title, text in _sections([*watched, *known.of_nobody()], call.excinfo):
            item.add_report_section(call.when, title, text)
            report.sections.append((f"Captured {title} {call.when}", text))
    if call.when == "teardown":
        known.end()
    return report


def _news(
    watched: list[Watched], of_nobody: list[Watched], failure: pytest.ExceptionInfo[BaseException] | None
) -> list[Exited]:
    """The deaths that have not been reported yet, and reported ones that may still be why a test fails.

    A server without an owner counts only if its death may be why a test fails.
    """
    is_sign = _is_sign(failure)
    end = time.monotonic() + (_PATIENCE if is_sign else 0.0)  # for all together
    news = []
    for each in [*watched, *(each for each in of_nobody if is_sign and not each.is_death_told)]:
        if is_sign or not each.is_death_told:
            patience = end - time.monotonic() if is_sign and each.seems_to_be_dying() else 0.0
            if (death := each.death(patience)) is not None:
                each.is_death_told = True
                news.append(death)
    return news


def _is_sign(failure: pytest.ExceptionInfo[BaseException] | None) -> bool:
    """Whether a failure may come from a death of a server, or of a process below one. A test's own assertions do not."""
    return failure is not None and not failure.errisinstance((AssertionError, pytest.fail.Exception, pytest.skip.Exception))


def _sections(watched: list[Watched], failure: pytest.ExceptionInfo[BaseException] | None) -> Iterator[tuple[str, str]]:
    """What the servers wrote in this phase, with titles. The error of a failed start has its output already."""
    told = list(_chain(failure.value)) if failure else []
    for each in watched:
        text = each.news(_SECTION)
        if text and each.driver.failure_told not in told:
            yield f"stdout of portexec: {each.driver.description()}", text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and the errors that caused it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _as_failure(
    death: Exited, failure: pytest.ExceptionInfo[BaseException] | None, item: pytest.Item
) -> pytest.ExceptionInfo[BaseException]:
    """The death as a failure of the test, at the test's own line if there was a failure, which has the whole traceback."""
    if failure is None:
        from portexec.api.driver import EXPECTED

        death.hint = EXPECTED  # the test has passed, and may well have killed the server
    try:
        _fail(death, failure.value if failure else None)
    except type(death):
        if failure:
            death.__traceback__ = _own_line(failure.tb, str(item.path))
        else:
            assert death.__traceback__ is not None  # noqa: S101  # it was raised
            death.__traceback__ = death.__traceback__.tb_next
    return pytest.ExceptionInfo.from_exception(death)


def _fail(death: Exited, cause: BaseException | None) -> NoReturn:
    __tracebackhide__ = False
    # The test itself did not fail: a server died during it.
    raise death from cause


def _own_line(traceback: TracebackType, path: str) -> TracebackType:
    """The first line of a traceback that is in this file, else the last one."""
    lines = list(_lines(traceback))
    own = next((line for line in lines if line.tb_frame.f_code.co_filename == path), lines[-1])
    return TracebackType(None, own.tb_frame, own.tb_lasti, own.tb_lineno)


def _lines(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
