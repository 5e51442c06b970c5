"""What can go wrong, and the exit statuses that say so.

    PortexecError                   an expected failure; status 125 unless it is said below
        UsageError                  what was asked for cannot be meant
            UnknownHandOff
            UnknownReady
            CommandNotAList
        ListenError                 a listener, or its number, cannot be had
        CannotExecute      126
        CommandNotFound    127
        NotReady           124
        Exited                      the command ended by itself
        NotRunning                  there is no server any more
        AlreadyEntered
    RefusedError                    inside portexec: this machine does not let us admit binds

The statuses are those of coreutils' `timeout` and `env`: 124 when the time ran out, 125 when the wrapper itself failed, 126
when the command was found but cannot be executed, 127 when it was not found.
"""

from __future__ import annotations

import errno
import os

STATUS_TIMEOUT = 124
STATUS_FAILURE = 125
STATUS_CANNOT_EXECUTE = 126
STATUS_NOT_FOUND = 127

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class PortexecError(Exception):
    """An expected failure: what went wrong, what to do next, and the status to exit with.

    `message` and `hint` are lower case without a full stop; the hint may be empty. `output` is the last of what the command
    wrote, where that is known: only the Python API keeps it. As text they are fit for a terminal, but for the output.
    """

    status = STATUS_FAILURE

    def __init__(self, message: str, hint: str = "", *, output: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.output = output

    def __str__(self) -> str:
        hint = f"hint: {self.hint}" if self.hint else ""
        parts = [escaped(self.message), escaped(hint), f"output:\n{self.output}" if self.output else ""]
        return "\n".join(part for part in parts if part)


class UsageError(PortexecError):
    """What was asked for cannot be meant: an option, a listen spec, a template, or an argument of the Python API.

    `about` is the option that the error is about, as `--ready`, or empty. `what` is the message without it.
    """

    def __init__(self, what: str, hint: str = "", *, about: str = "", output: str = "") -> None:
        super().__init__(f"{about} {what}" if about else what, hint, output=output)
        self.what = what
        self.about = about


class UnknownHandOff(UsageError):
    """There is no hand-off of this name."""


class UnknownReady(UsageError):
    """There is no such form of readiness."""


class ListenError(PortexecError):
    """A listener, or its number, cannot be had."""


class CannotExecute(PortexecError):
    """The command was found, but cannot be executed."""

    status = STATUS_CANNOT_EXECUTE


class CommandNotFound(PortexecError):
    """There is no such command."""

    status = STATUS_NOT_FOUND


class NotReady(PortexecError):
    """The command was not ready in time."""

    status = STATUS_TIMEOUT


class Exited(PortexecError):
    """The command ended by itself. `returncode` is its status, or minus the signal that killed it; None if unknown."""

    def __init__(self, message: str, hint: str = "", *, output: str = "", returncode: int | None = None) -> None:
        super().__init__(message, hint, output=output)
        self.returncode = returncode


class CommandNotAList(UsageError):
    """The command was given as one text, and not as a list of its words."""


class NotRunning(PortexecError):
    """The server was stopped, so there is nothing to be done with it."""


class AlreadyEntered(PortexecError):
    """What `serve` returned was used in a `with` before."""


class RefusedError(Exception):
    """This machine does not let us admit binds; the text says why."""


def escaped(text: str) -> str:
    """The text with its control characters, and bytes that are no text, spelled out as `\\x1b`."""
    return text if text.isprintable() else "".join(map(_escaped_character, text))


def _escaped_character(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    is_byte = 0xDC80 <= code <= 0xDCFF  # as `surrogateescape` has it, PEP 383
    return f"\\x{code - 0xDC00:02x}" if is_byte else character.encode("unicode_escape").decode()


def reason(error: OSError | MemoryError) -> str:
    """The system's own words for an error, without the number and the path that Python adds."""
    if isinstance(error, MemoryError):
        return "out of memory"
    return error.strerror or str(error)


def shortage(error: BaseException) -> str:
    """What the machine had not enough of, where that is what the error says; else nothing. It is nobody's mistake."""
    if isinstance(error, MemoryError):
        return reason(error)
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        return f"cannot go on: {reason(error)}"
    if isinstance(error, ImportError) and (error.path or "").endswith(".so"):
        return f"cannot go on: {error}"  # the dynamic loader's words: no descriptor for a part of Python, or no memory
    return ""


def how_it_ended(wait_status: int) -> str:
    """The end of a command in words, `exit status 3` or `killed by SIGKILL`; the status is one of waitpid(2)."""
    if not os.WIFSIGNALED(wait_status):
        return f"exit status {os.WEXITSTATUS(wait_status)}"
    import signal

    number = os.WTERMSIG(wait_status)
    return f"killed by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"


def of_status(status: int, message: str, hint: str) -> PortexecError:
    """The error that ends with this status, made again from what another process of ours told of it."""
    kinds = {kind.status: kind for kind in (CannotExecute, CommandNotFound)}
    return kinds.get(status, PortexecError)(message, hint)
