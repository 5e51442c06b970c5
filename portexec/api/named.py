"""Servers with a name, from Python: those that run, and one of them by its name."""

from __future__ import annotations

import os

from portexec import project
from portexec.api.driver import Listener
from portexec.errors import UsageError
from portexec.names import naming, registry, stop, wait
from portexec.names.missing import Missing
from portexec.names.registry import Entry
from portexec.server_errors import NotRunning


class NamedServer:
    """A server with a name, as it was when it was found. `state` is `starting`, `ready` or `stopping`."""

    def __init__(self, entry: Entry) -> None:
        """Made by `running` and `find`."""
        self._entry = entry

    def __repr__(self) -> str:
        return f"<portexec.NamedServer {self.name} {self.state}>"

    @property
    def name(self) -> str:
        """Its name in its project."""
        return self._entry.name

    @property
    def project(self) -> str:
        """The directory of its project."""
        return self._entry.project

    @property
    def state(self) -> str:
        """What it was doing when it was found."""
        return self._entry.state

    @property
    def pid(self) -> int:
        """The pid of its command, 0 when that does not run yet."""
        return self._entry.command_pid

    @property
    def command(self) -> list[str]:
        """The words of its command, before templates are replaced."""
        return list(self._entry.command)

    @property
    def listeners(self) -> dict[str, Listener]:
        """Its listeners by name."""
        return {each["name"]: Listener(**each) for each in self._entry.listeners}

    @property
    def url(self) -> str:
        """The address of its first listener. Raises NotRunning when it has none yet."""
        if not self._entry.listeners:
            raise NotRunning(f"{self.name} has no address yet", f"`portexec --url {self.name}` waits for it")
        url: str = self._entry.listeners[0]["url"]
        return url

    @property
    def log(self) -> str | None:
        """The file that its command writes to, if it keeps one."""
        return self._entry.log or None

    def stop(self) -> None:
        """Stop it, and wait until nothing is left. A second call does nothing. Raises PortexecError if it does not end."""
        stop.ask(self._entry)
        stop.wait(self._entry, wait.reporter(f"{self.name} to end", is_quiet=True))


def running() -> list[NamedServer]:
    """The servers with a name that run, of all projects of this user."""
    found = [entry for entry in registry.entries(os.environ) if entry.is_alive]
    return [NamedServer(entry) for entry in sorted(found, key=lambda entry: (entry.project, entry.name))]


def find(name: str) -> NamedServer:
    """The server of this name, of the project of the working directory; `DIR:NAME` is a server of another project.

    Raises `NotRunning` when it does not run.
    """
    here = project.directory_if_any(None, os.environ, is_needed=not naming.is_absolute(name))
    wanted = naming.parse(name, here, "name")
    if wanted.listener:
        whole = name.removesuffix(f".{wanted.listener}")
        raise UsageError(
            f"{name!r} means a listener of {whole}", f"write find({whole!r}).listeners[{wanted.listener!r}]", about="name"
        )
    entry = registry.meant(wanted, os.environ)
    if entry is None or not entry.is_alive:
        raise Missing(wanted, entry, here).error()
    return NamedServer(entry)
