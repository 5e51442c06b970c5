"""What can go wrong, and the exit statuses that say so.

    PortexecError                   an expected failure; status 125 unless it is said below
        UsageError                  an option or argument makes no sense
            UnknownHandOff       *
            UnknownReady         *
            CommandNotAList      *
        ListenError                 a listener, or its number, cannot be had
        CannotExecute      126
        CommandNotFound    127
        NotReady           124   *
        Exited                   *  the command ended by itself
        NotRunning               *  there is no server any more
        StillRunning       124   *  a wait for its end took too long; a TimeoutError, too
        AlreadyEntered           *
        Abandoned                *  inside portexec: the program that drives the run has gone before it began
    RefusedError                    inside portexec: this machine does not let us admit binds

Those with a star are in server_errors.py. No command needs them on the way to exec, where making these classes would take a
fiftieth of the time.

The statuses are those of coreutils' `timeout` and `env`: 124 when the time ran out, 125 when the wrapper itself failed, 126
when the command was found but cannot be executed, 127 when it was not found.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Closable(Protocol):
        """A socket, or an owner of sockets."""

        def close(self) -> None:
            """Give it back."""


STATUS_TIMEOUT = 124
STATUS_FAILURE = 125
STATUS_CANNOT_EXECUTE = 126
STATUS_NOT_FOUND = 127

# Memory in reserve. When memory runs out we clear this list, to have some for the message and for undoing.
spare: list[bytes] = []

MORE_DESCRIPTORS = "raise the limit with `ulimit -n`"
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# The second is the limit for what a user has sent to other processes, and they have not taken yet; unix(7).
_LIMITS_OF_DESCRIPTORS = (errno.EMFILE, errno.ETOOMANYREFS)


class PortexecError(Exception):
    """An expected failure: what went wrong, what to do next, and the status to exit with.

    `message` and `hint` are lower case without a full stop; the hint may be empty. `output` is the last of what the command
    wrote, where that is known: only the Python API keeps it. str() escapes control characters, but not in the output.
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
    """An option, a listen spec, a template, or an argument of the Python API makes no sense.

    `about` is the option that the error is about, as `--ready`, or empty. `what` is the message without it.
    """

    def __init__(self, what: str, hint: str = "", *, about: str = "", output: str = "") -> None:
        super().__init__(f"{about} {what}" if about else what, hint, output=output)
        self.what = what
        self.about = about


class ListenError(PortexecError):
    """A listener, or its number, cannot be had."""


class CannotExecute(PortexecError):
    """The command was found, but cannot be executed."""

    status = STATUS_CANNOT_EXECUTE


class CommandNotFound(PortexecError):
    """There is no such command."""

    status = STATUS_NOT_FOUND


class RefusedError(Exception):
    """This machine does not let us admit binds; the text says why."""


class CloseOnError:
    """A `with` block that closes something if the block fails, and so cannot hand it on.

    contextlib has the like, and takes longer to import than all that happens before a command is executed.
    """

    __slots__ = ("_closable",)

    def __init__(self, closable: Closable) -> None:
        self._closable = closable

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._closable.close()


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


def cannot(do: str, error: OSError | MemoryError, hint: str = "") -> PortexecError:
    """The error for something that cannot be done, with the system's reason. `hint` is for reasons other than a limit."""
    is_limit = isinstance(error, OSError) and error.errno in _LIMITS_OF_DESCRIPTORS
    return PortexecError(f"cannot {do}: {reason(error)}", MORE_DESCRIPTORS if is_limit else hint)


def is_shortage(error: OSError) -> bool:
    """Whether there were not enough descriptors or memory for a call, which says nothing about what was asked."""
    return error.errno in _SHORTAGES


def shortage(error: BaseException) -> PortexecError | None:
    """The error to report where the machine, or a limit, has not enough of something. None for any other error."""
    if isinstance(error, MemoryError):
        return PortexecError(reason(error))
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return PortexecError(f"cannot open another file: {reason(error)}", MORE_DESCRIPTORS)
    if isinstance(error, OSError) and is_shortage(error):
        return PortexecError(f"cannot go on: {reason(error)}")
    if isinstance(error, ImportError) and (error.path or "").endswith(".so"):
        return PortexecError(f"cannot go on: {error}")  # the dynamic loader's words, about a part of Python
    if isinstance(error, SystemError):
        return PortexecError(f"Python itself has failed, as it may when it is out of memory: {error}")
    return None


def how_it_ended(wait_status: int) -> str:
    """The end of a command in words, `exit status 3` or `killed by SIGKILL`; the status is one of waitpid(2)."""
    if not os.WIFSIGNALED(wait_status):
        return f"exit status {os.WEXITSTATUS(wait_status)}"
    import signal

    number = os.WTERMSIG(wait_status)
    return f"killed by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"


def of_status(status: int, message: str, hint: str) -> PortexecError:
    """The error of a status, made again from the text that another process of ours has sent."""
    kinds = {kind.status: kind for kind in (CannotExecute, CommandNotFound)}
    return kinds.get(status, PortexecError)(message, hint)
