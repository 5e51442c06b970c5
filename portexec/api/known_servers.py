"""The servers that the pytest plugin knows, and the owner of each.

The owner is the fixture definition that is being set up when the server starts, or else the test that runs. It is a definition
and not a name, since two test files may each define a fixture `web`. A test has its own servers, and those of all definitions
that it uses. A server of a test that is over, or of no test, has no owner.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import pytest

    from portexec.api.driver import Driver
    from portexec.server_errors import Exited

    Owner = pytest.FixtureDef[Any] | pytest.Item | None

_CERTAINTY = 10.0  # seconds to wait for the news of a death that /proc has shown


class Watched:
    """A server, its owner, and what reports have shown of it."""

    def __init__(self, driver: Driver, owner: Owner) -> None:
        self.driver = driver
        self.owner = owner
        self.is_death_told = False
        self._shown = 0  # so much of its output was shown, or is from earlier tests
        self._death: Exited | None = None
        self._is_deaf = False  # nothing listened on one of its numbers when a test failed

    def death(self, patience: float = 0.0) -> Exited | None:
        """The error for its death, if it died by itself. `patience`: seconds to wait for the news."""
        from portexec.procfs import is_ending

        if self._death is None:
            is_dying = self.driver.pid and is_ending(self.driver.pid)
            self._death = self.driver.died(_CERTAINTY if is_dying else patience)
            if self._death is not None:
                self._death.output = ""  # it has a section of its own
                self.driver.settle()
        return None if self.driver.was_death_seen else self._death

    def seems_to_be_dying(self) -> bool:
        """Whether a process below the command is about to end, or nothing listens any more on one of its numbers.

        The latter is a sign once: a server that was deaf when an earlier test failed, and that still runs, is not dying of it.
        """
        from portexec.binding.tables import listening_inodes
        from portexec.procfs import is_any_ending

        if self.driver.is_over() or not self.driver.pid:
            return False
        numbers = [each.port for each in self.driver.listeners.values() if each.port and not each.url.startswith("udp:")]
        was_deaf = self._is_deaf
        self._is_deaf = self.driver.traits.is_to_listen and not all(map(listening_inodes, numbers))
        return (self._is_deaf and not was_deaf) or is_any_ending(self.driver.pid)

    def news(self, limit: int) -> str:
        """What it wrote since the last call, or since the test began."""
        mark, self._shown = self._shown, self.driver.written()
        return self.driver.lines_since(mark, limit)

    def begin_again(self, driver: Driver) -> None:
        """The server was started again. `driver` continues its output."""
        self.driver = driver
        self.is_death_told = False
        self._death = None
        self._is_deaf = False

    def begin(self) -> None:
        """Another test begins."""
        self._shown = self.driver.written()
        self.is_death_told = self.death() is not None


class KnownServers:
    """All servers of the process that run, and all servers of the current test.

    `is_live`: their output is copied to our standard output at once. `is_kept`: their output is in the reports.
    """

    def __init__(self, *, is_live: bool, is_kept: bool) -> None:
        self.is_kept = is_kept
        self._terminal = os.dup(1) if is_live else None  # a duplicate, since tests may replace standard output for a while
        self._watched: list[Watched] = []
        self._item: pytest.Item | None = None  # the test that runs
        self._set_up: list[tuple[pytest.FixtureDef[Any], pytest.FixtureRequest]] = []  # being set up now, the innermost last
        self._uses: dict[pytest.FixtureDef[Any], set[pytest.FixtureDef[Any]]] = {}  # which definition has used which others

    def close(self) -> None:
        """Forget all servers."""
        self._watched.clear()
        if self._terminal is not None:
            os.close(self._terminal)

    def take(self, driver: Driver) -> None:
        """A server starts. One that is started again keeps its owner."""
        for each in self._watched:
            if each.driver is driver.predecessor:
                each.begin_again(driver)
                return
        self._watched.append(Watched(driver, self._set_up[-1][0] if self._set_up else self._item))
        if self._terminal is not None:
            driver.sinks.append(_writer_of_lines(self._terminal))

    @contextmanager
    def setting_up(self, definition: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[None]:
        """A block in which a fixture is being set up. The servers that it started for an earlier parameter are forgotten."""
        self._watched = [each for each in self._watched if each.owner is not definition or not each.driver.was_left]
        if self._set_up:
            self._uses.setdefault(self._set_up[-1][0], set()).add(definition)
        self._set_up.append((definition, request))
        try:
            yield
        finally:
            self._set_up.pop()

    def being_set_up(self) -> pytest.FixtureRequest | None:
        """The request of the fixture that is being set up."""
        return self._set_up[-1][1] if self._set_up else None

    def begin(self, item: pytest.Item) -> None:
        """A test begins. Servers that are over are forgotten, except those of a fixture that may start them again."""
        self._item = item
        self._watched = [each for each in self._watched if not _is_history(each)]
        for each in self._watched:
            each.begin()

    def end(self) -> None:
        """The test is over. Servers that it started and left running have no owner any more."""
        for each in self._watched:
            if each.owner is self._item:
                each.owner = None
        self._item = None

    def of(self, item: pytest.Item) -> list[Watched]:
        """The servers of a test."""
        if not self._watched:
            return []
        used = self._definitions(item)
        return [each for each in self._watched if each.owner is item or each.owner in used]

    def of_nobody(self) -> list[Watched]:
        """The servers without an owner, which any test may use."""
        return [each for each in self._watched if each.owner is None]

    def _definitions(self, item: pytest.Item) -> set[Owner]:
        """The fixture definitions that a test uses, also those by `getfixturevalue`."""
        request: Any = getattr(item, "_request", None)  # pytest has no public way to it
        found: set[Owner] = set()
        if request is not None:
            found.update(request._fixture_defs.values())  # those used so far, some by `getfixturevalue`
            for name in request.fixturenames:
                found.update(_used_by_name(name, request._arg2fixturedefs.get(name, ())))
        rest = list(found)
        while rest:
            more = self._uses.get(rest.pop(), set()) - found  # type: ignore[arg-type]  # tests are no keys
            found |= more
            rest += more
        return found


def _writer_of_lines(fd: int) -> Callable[[bytes], None]:
    """A sink that copies the output of one server to a descriptor, line by line: lines of others may come in between."""
    from portexec.api.output import Lines

    lines = Lines()

    def take(data: bytes) -> None:
        text = lines.add(data)
        while text:
            text = text[os.write(fd, text) :]

    return take


def _is_history(watched: Watched) -> bool:
    return watched.driver.is_over() and (watched.driver.was_left or watched.owner is None)


def _used_by_name(name: str, definitions: Any) -> Iterator[pytest.FixtureDef[Any]]:
    """Of the definitions of this name, the last; and the one before it, if the last one overrides and uses it; and so on."""
    for definition in reversed(definitions):
        yield definition
        if name not in definition.argnames:
            return
