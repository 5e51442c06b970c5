"""A run that is meant and does not run, or is stopping: what is known of it, and what helps, in words."""

from __future__ import annotations

import os

from portexec.names import registry
from portexec.names.listing import state
from portexec.names.naming import short
from portexec.server_errors import NotRunning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from portexec.names.naming import Wanted
    from portexec.names.registry import Entry

_ALIKE = 0.6  # how much of a name has to be the same
LISTED = "portexec --list shows the known names"
ELSEWHERE = "what runs is in other projects"


class Missing:
    """A run that is meant and does not run. `last` is what is known of it, None where there was none of this name.

    To a caller that wants to use it, a run that is stopping is missing, too.
    """

    __slots__ = ("_here", "_known", "_last", "_project", "_wanted")

    def __init__(self, wanted: Wanted, last: Entry | None, here: str) -> None:
        """Raises PortexecError where the registry is not safe."""
        self._wanted = wanted
        self._last = last
        self._here = here
        self._project = wanted.project or here
        self._known = registry.entries(os.environ)

    def text(self, after: str = "") -> str:
        """That it does not run, how it ended, and what runs instead."""
        if self._wanted.pid and self._last is None:
            return f"no server with a name has the pid {self._wanted.text}"  # some other process may have this pid
        if self._is_stopping:
            how = f" is stopping, and does not run again{after}" if after else " is stopping"
        else:
            how = f" does not run{after}{'' if self._last is None else f': {state(self._last)}'}"
        return f"{self._wanted.text}{how} ({self._what_runs()})"

    def clue(self, *, ended: bool = False) -> str:
        """The name that is perhaps meant, or where to read what the run wrote, or empty. `ended`: ended runs count, too."""
        if self._last is None:
            near = self._near([entry for entry in self._known if ended or entry.is_alive])
            return f"did you mean {near}?" if near else ""
        is_clear = self._is_stopping or self._last.is_stopped or not self._last.log
        return "" if is_clear else f"`portexec --logs {self._shown(self._last)}` shows what it wrote"

    def lines(self, more: str = "") -> list[str]:
        """A note, and the clue if there is one."""
        clue = self.clue()
        return [f"note: {self.text()}{more}", *([f"hint: {clue}"] if clue else [])]

    def hint(self) -> str:
        """The clue, and how to start it."""
        project = "" if self._project == self._here else f"--project {self._project} "
        start = f"`portexec --detach {project}--name {self._wanted.name} -- COMMAND` starts {self._wanted.name}"
        clue = self.clue()
        return f"{clue}{' ' if clue.endswith('?') else '; '}{start}" if clue else start

    def error(self) -> NotRunning:
        """The error for a caller that does not wait for the run. For a pid no start is proposed: it cannot come again."""
        return NotRunning(self.text(), LISTED if self._wanted.pid else self.hint())

    @property
    def _is_stopping(self) -> bool:
        return self._last is not None and self._last.is_alive

    def _what_runs(self) -> str:
        running = [entry for entry in self._known if entry.is_alive and not self._is_last(entry)]
        names = [self._shown(entry) for entry in running if entry.project == self._project]
        if names:
            return f"what runs: {', '.join(sorted(names))}"
        if running:
            return f"{ELSEWHERE}: see portexec --list"
        return "nothing else runs" if self._is_stopping else "nothing runs"

    def _is_last(self, entry: Entry) -> bool:
        return self._last is not None and entry.is_same_run(self._last)

    def _near(self, entries: Iterable[Entry]) -> str:
        """A run of the same project with a similar name, or else the last run of another project with the same name."""
        import difflib

        ours = {entry.name: entry for entry in entries if entry.project == self._project}
        close = difflib.get_close_matches(self._wanted.name, ours, 1, _ALIKE)
        if close:
            return self._shown(ours[close[0]])
        others = [entry for entry in entries if entry.name == self._wanted.name]
        return self._shown(max(others, key=lambda entry: entry.since)) if others else ""

    def _shown(self, entry: Entry) -> str:
        return short(entry.name, entry.project, self._here)
