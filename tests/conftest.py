"""What holds for every test: its surroundings, who may run it, and that a failure is named when it happens."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import names

# Continuous integration judges a change, so it tries the same examples each time. By hand each run tries others, to find more.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("PORTEXEC_CI"):
    hypothesis.settings.load_profile("ci")

collect_ignore = ["suites"]  # which tests/test_suites.py runs

PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}  # Python ignores them for itself, and not for what it starts


@pytest.fixture(scope="session", autouse=True)
def _usual_signals() -> Iterator[None]:
    """Start every command with no signal ignored, though `nohup` ignores HUP, and `&` in a script INT and QUIT."""
    ignored = [one for one in signal.valid_signals() - PYTHONS_OWN if signal.getsignal(one) == signal.SIG_IGN]
    for one in ignored:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    yield
    for one in ignored:
        signal.signal(one, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def _whole_lines() -> Iterator[None]:
    """Have Python write a line at once. With $PYTHONUNBUFFERED its end comes by itself, after what others have written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        yield


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every command with none of the variables that are under test, and without colours."""
    listen = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
    made = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # by `make test`
    for name in ("PORT", *listen, *made, "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry of the test's own, and a project of its own as the working directory. What is left running is killed."""
    place, project = tmp_path / "registry", tmp_path / "project"
    project.mkdir()
    monkeypatch.setenv(names.VARIABLE, str(place))
    monkeypatch.delenv("PORTEXEC_PROJECT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(project)
    yield place
    monkeypatch.setenv(names.VARIABLE, str(place))
    names.kill_all()


@pytest.fixture
def stable_numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test beside this one has a stable number meanwhile: two projects may have the same one, or neighbours."""
    with open(tmp_path_factory.getbasetemp().parent / "stable-numbers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while thousands of tests are found, which all stay: it takes a fifth of that time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what only root can do for everybody else."""
    if os.geteuid():
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


class Skips:
    """With PORTEXEC_CI set, a test that is skipped for another reason than these is a failure: something is not installed."""

    ALLOWED = (
        "needs root",
        "root may write everywhere",
        "nothing is forbidden to root",
        "Python itself does not start",  # at the tightest limits of memory
        "this kernel ",  # lacks something, or has closed a way in
    )

    def __init__(self) -> None:
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(self.ALLOWED):
                self.others.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.others and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.others:
            terminalreporter.section("skipped, which continuous integration does not allow", red=True)
            for each in self.others:
                terminalreporter.write_line(each)


class FailuresAtOnce:
    """Names a failure when it happens. pytest itself does at the end, which may be minutes later."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.write(f"\n{'FAILED' if report.when == 'call' else 'ERROR'} {report.nodeid}\n", red=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    if terminal is not None:  # the workers of pytest-xdist have none
        plugins.register(FailuresAtOnce(terminal))
        if os.environ.get("PORTEXEC_CI"):
            plugins.register(Skips())
