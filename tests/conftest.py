"""What holds for every test: its surroundings, who may run it, and that a failure is named when it happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

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


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every command with none of the variables that are under test."""
    listen = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
    for name in ("PORT", *listen, "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # `make test` sets the last three
        monkeypatch.delenv(name, raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what only root can do for everybody else."""
    if os.geteuid():
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


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
