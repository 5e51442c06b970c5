"""What can go wrong, and the exit statuses that say so.

The statuses are those of coreutils' `timeout` and `env`: 124 when the time ran out, 125 when the wrapper itself failed, 126
when the command was found but cannot be executed, 127 when it was not found.
"""

from __future__ import annotations

STATUS_TIMEOUT = 124
STATUS_FAILURE = 125
STATUS_CANNOT_EXECUTE = 126
STATUS_NOT_FOUND = 127


class PortexecError(Exception):
    """An expected failure: what went wrong, what to do next, and the status to exit with.

    `message` and `hint` are lower case without a full stop; the hint may be empty.
    """

    def __init__(self, message: str, hint: str = "", status: int = STATUS_FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status


class RefusedError(Exception):
    """This machine does not let us admit binds; the text says why."""


def reason(error: OSError) -> str:
    """The system's own words for an error, without the number and the path that Python adds."""
    return error.strerror or str(error)
