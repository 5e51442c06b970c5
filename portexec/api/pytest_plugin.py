"""The pytest plugin: `portexec_server` starts servers for a test, `portexec_session_server` for the whole session.

Both are factories: call them with what `portexec.serve` takes, and get a `portexec.Server`. It belongs to the fixture that
started it, and so to the tests that use this fixture, and is stopped at the end of it; one that no fixture has started belongs
to the factory. With pytest-xdist every worker has its own.

A failing test shows what its servers wrote, as report sections; what they write until they are stopped follows when the test is
torn down. When a server died during the test, that is the failure: the client's connection error, which would only hide it,
becomes its cause. A test that means its server to end says so by `server.wait()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, NoReturn

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.api.serve import Server
    from portexec.errors import Exited

    Factory = Callable[..., Server]

_PATIENCE = 0.5  # seconds in which the death of what the command runs, as npm does, must have become its own
_CERTAINTY = 10.0  # seconds for the news of a death that has been seen

_SERVERS = pytest.StashKey["list[_Watched]"]()  # of the session: that have not been stopped; of a test: that it has had
_FIXTURES = pytest.StashKey["list[pytest.FixtureRequest]"]()  # that are being set up, the innermost last


class _Watched:
    """A server, the fixture that started it, and what has been told of it."""

    def __init__(self, server: Server, fixture: str) -> None:
        self.server = server
        self.fixture = fixture
        self.is_death_told = False
        self.shown: str | None = None  # of its output, in a report of this test
        self._death: Exited | None = None

    def death(self, patience: float = 0.0) -> Exited | None:
        """How it died by itself, if it did. The news may take some time to come."""
        from portexec.procfs import is_ending

        if self._death is None:
            self._death = self.server.died(_CERTAINTY if is_ending(self.server.pid) else patience)
            if self._death is not None:
                self._death.output = ""  # it has a section of its own
                self.server.stop()  # returns when all that it wrote has been read
        return self._death

    def title(self) -> str:
        """Of a section with its output."""
        returncode = self.server.returncode
        ended = "" if returncode is None else f", returncode {returncode}"
        return f"portexec: {self.server.url}, pid {self.server.pid}{ended}"


@pytest.fixture
def portexec_server(request: pytest.FixtureRequest) -> Factory:
    """A function that starts a server for this test: `portexec_server(["npm", "start"])` takes what `portexec.serve` takes."""
    return _factory(request)


@pytest.fixture(scope="session")
def portexec_session_server(request: pytest.FixtureRequest) -> Factory:
    """The same for fixtures of any scope: use it in one of your own, at whose end the server is stopped."""
    return _factory(request)


def _factory(request: pytest.FixtureRequest) -> Factory:
    from portexec.api.serve import serve

    running = request.session.stash[_SERVERS]
    fixtures = request.session.stash[_FIXTURES]

    def start(command: Any, **options: Any) -> Server:
        owner = [request, *fixtures][-1]
        watched = _Watched(serve(command, **options).__enter__(), owner.fixturename or "")

        def stop() -> None:
            watched.server.stop()
            running.remove(watched)

        owner.addfinalizer(stop)
        running.append(watched)
        return watched.server

    return start


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Know which fixture starts a server."""
    __tracebackhide__ = True  # of fixtures that fail, with us or without
    fixtures = request.session.stash[_FIXTURES]
    fixtures.append(request)
    try:
        return (yield)
    finally:
        fixtures.pop()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin with nothing."""
    session.stash[_SERVERS] = []
    session.stash[_FIXTURES] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin anew, also when a test is run again: what has died by now is no affair of this test."""
    item.stash[_SERVERS] = []
    for each in item.session.stash[_SERVERS]:
        each.is_death_told = each.death() is not None
        each.shown = None


@pytest.hookimpl(wrapper=True, trylast=True)  # what it makes of a report is what xfail is to judge
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Let a test fail of the server that died under it, and show in the report of a failure what the servers wrote."""
    report = yield
    watched = _servers_of(item)
    deaths = _news(watched, call.excinfo)
    if deaths and report.outcome != "skipped":
        call.excinfo = _as_failure(deaths[0], call.excinfo, item)
        report.outcome = "failed"
        report.longrepr = item.repr_failure(call.excinfo)
    sections = []
    if report.failed:
        sections = [_section(each) for each in watched]
    elif call.when == "teardown":
        sections = [_rest(each) for each in watched if each.shown is not None]
    report.sections += [(title, text) for title, text in sections if text]
    return report


def _servers_of(item: pytest.Item) -> list[_Watched]:
    """Those that the fixtures of the test have started, also those that they have stopped since we looked the last time."""
    # The request knows the fixtures that `getfixturevalue` added, too; only the item leads to it.
    names = getattr(getattr(item, "_request", None), "fixturenames", ())
    known = item.stash.setdefault(_SERVERS, [])
    known += [each for each in item.session.stash[_SERVERS] if each.fixture in names and each not in known]
    return known


def _news(watched: list[_Watched], failure: pytest.ExceptionInfo[BaseException] | None) -> list[Exited]:
    """The deaths that have not been told yet, and those that have been but may be what a test fails of all the same."""
    is_sign = _is_sign(failure)
    end = time.monotonic() + (_PATIENCE if is_sign else 0.0)  # for all together
    news = []
    for each in watched:
        if (is_sign or not each.is_death_told) and (death := each.death(end - time.monotonic())) is not None:
            each.is_death_told = True
            news.append(death)
    return news


def _is_sign(failure: pytest.ExceptionInfo[BaseException] | None) -> bool:
    """Whether it may be one of a death, be it of something below a command. What a test says itself is none."""
    return failure is not None and not failure.errisinstance((AssertionError, pytest.fail.Exception, pytest.skip.Exception))


def _section(watched: _Watched) -> tuple[str, str]:
    """What a server wrote, with its title."""
    watched.shown = watched.server.output
    return watched.title(), watched.shown


def _rest(watched: _Watched) -> tuple[str, str]:
    """What it wrote since. The terminal shows it with the failure because of the word in the title."""
    return f"{watched.title()}, teardown", watched.server.output.removeprefix(watched.shown or "")


def _as_failure(
    death: Exited, failure: pytest.ExceptionInfo[BaseException] | None, item: pytest.Item
) -> pytest.ExceptionInfo[BaseException]:
    """The death as a failure of the test, at the test's own line if there was a failure, which has the whole traceback."""
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
