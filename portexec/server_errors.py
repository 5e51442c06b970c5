"""The errors about servers that portexec looks after, and those that only the Python API tells apart: see errors.py."""

from __future__ import annotations

from portexec.errors import STATUS_TIMEOUT, PortexecError, UsageError


class UnknownHandOff(UsageError):
    """There is no hand-off of this name."""


class UnknownReady(UsageError):
    """There is no such form of readiness."""


class CommandNotAList(UsageError):
    """The command was given as one text, and not as a list of its words."""


class NotReady(PortexecError):
    """The command was not ready in time."""

    status = STATUS_TIMEOUT


class Exited(PortexecError):
    """The command ended by itself. `returncode` is its status, or minus the signal that killed it; None if unknown."""

    def __init__(self, message: str, hint: str = "", *, output: str = "", returncode: int | None = None) -> None:
        super().__init__(message, hint, output=output)
        self.returncode = returncode


class NotRunning(PortexecError):
    """There is no such server: it was stopped, has ended, or was never started."""


class StillRunning(PortexecError, TimeoutError):
    """The server has not ended in the time that the caller wanted to wait."""

    status = STATUS_TIMEOUT


class AlreadyEntered(PortexecError):
    """What `serve` returned was used in a `with` before."""


class Abandoned(PortexecError):
    """The program that drives the run has gone, or has asked for its end, before the run began."""
