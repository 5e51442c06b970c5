"""Carries out a `Plan` in this process: place the descriptors, reset what Python changed, become the command.

Exec mode calls it in the process that the user started. For a supervised command the child calls it, as its last step.
Nothing is decided here, and nothing is imported that is not needed.
"""

from __future__ import annotations

import _signal  # `signal` wraps every number in an enumeration, which costs more than all that is done here
import errno
import fcntl
import os

from portexec.command import activation
from portexec.command.plan import Plan
from portexec.errors import MORE_DESCRIPTORS, CannotExecute, CommandNotFound, PortexecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping
    from typing import NoReturn

_DEFAULT_PATH = "/bin:/usr/bin"  # what execvp(3) takes when there is no PATH
_OUT_OF_THE_WAY = 64  # scripts use descriptors up to 9 by number, shells save theirs from 10 on
# Words that every shell knows and that are mostly no programs.
_SHELL_WORDS = (
    ". : [[ { alias bg builtin cd command declare eval exec exit export fg for function hash if jobs let local popd pushd read "
    "return set shift shopt source trap type ulimit umask unalias unset until wait while"
)
# Words that people write as a command, since other programs have such commands; here they are options.
OPTION_WORDS = ("check", "forget", "help", "list", "logs", "stop", "url", "version")
_JOBSERVER_OPTIONS = ("--jobserver-auth=", "--jobserver-fds=")
_JOBSERVER_VARIABLES = ("MAKEFLAGS", "MFLAGS", "CARGO_MAKEFLAGS")


def find_command(name: str, environment: Mapping[str, str], typed: str = "") -> str:
    """The file that execvp(3) would run for a command. Raises PortexecError with status 126 or 127 when there is none.

    `typed` is the name with its templates, as the user has typed it: a number in a hint would be wrong the next time.
    """
    typed = typed or name
    if "/" in name:
        _require_executable(name)
        return name
    forbidden = ""
    for directory in environment.get("PATH", _DEFAULT_PATH).split(":"):
        file = os.path.join(directory or ".", name)
        if os.path.isfile(file):
            if os.access(file, os.X_OK):
                return file
            forbidden = forbidden or file
    if forbidden and name:
        raise _cannot_execute(forbidden, "Permission denied", f"make it executable: chmod +x {forbidden}")
    hint = "is it installed, and on the PATH?"
    if " " in name:
        hint = f"write it as separate words: portexec -- {typed}"
    elif name in _SHELL_WORDS.split():
        hint = f"{name} is a word of the shell: portexec -- sh -c '{name} ...'"
    elif name in OPTION_WORDS:
        hint = f"did you mean portexec --{name}?"
    elif name.startswith("PORT=") and name[5:].isdecimal():
        hint = f"a number is asked for with -l: portexec -l {name[5:]} -- ..."
    elif "=" in name:
        hint = f"a variable is set with -e: portexec -e {typed} -- ..."
    elif not name:
        hint = "the first word is empty; is a variable unset?"
    raise CommandNotFound(f"command not found: {name or repr(name)}", hint)


def _require_executable(file: str) -> None:
    try:
        status = os.stat(file)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        hint = "is the path right?" if missing else ""
        raise (CommandNotFound if missing else CannotExecute)(f"cannot run {file}: {reason(error)}", hint) from error
    if os.path.isdir(file):
        raise _cannot_execute(file, "Is a directory", f"name a program in it: {os.path.join(file, 'NAME')}")
    if not os.path.isfile(file):
        raise _cannot_execute(file, "not a file", "")
    if not os.access(file, os.X_OK):
        runnable = status.st_mode & 0o111
        raise _cannot_execute(file, "Permission denied", "" if runnable else f"make it executable: chmod +x {file}")


def execute(plan: Plan) -> NoReturn:
    """Become the command. Does not return.

    Raises PortexecError with status 126 or 127 when the kernel refuses, and with 125 when descriptors run out.
    """
    environment = dict(plan.environment)
    errors = -1
    try:
        if plan.first_fd < activation.FIRST_FD:
            from portexec.kernel import STDERR  # which few commands take

            errors = duplicate(STDERR, activation.FIRST_FD, inheritable=False)
        for number, fd in plan.streams.items():
            os.dup2(fd, number)
        moved = place(plan.passed, plan.first_fd, plan.kept)
    except OSError as error:
        raise PortexecError(f"cannot place the descriptors: {reason(error)}", MORE_DESCRIPTORS) from error
    follow_jobserver(environment, moved)
    if plan.for_pid:
        environment = activation.pid_variables(os.getpid()) | environment
    _reset_signals()
    try:
        _exec(plan.file, plan.argv, environment)
    except OSError as error:
        if errors >= 0:
            os.dup2(errors, STDERR)
        raise _refused(plan.file, error) from error


def place(passed: tuple[int, ...], first_fd: int, kept: tuple[int, ...]) -> dict[int, int]:
    """Move the descriptors `passed` to `first_fd` and following, and let the command inherit them and those `kept`.

    Other files that are open there are moved out of the way; the return value has their old numbers and their new ones.
    Standard streams are replaced, not moved: a user that asks for descriptor 0 wants another standard input.
    """
    end = first_fd + len(passed)
    number_of = {fd: fd for fd in (*passed, *kept)}  # where each of ours is at the moment
    at = {fd: fd for fd in number_of}  # and which of ours is at a number
    moved: dict[int, int] = {}
    for target, fd in enumerate(passed, first_fd):
        source = number_of[fd]
        if source != target and target in at:
            _swap(source, target, end)
            number_of[at[target]], at[source] = source, at[target]
        elif source != target:
            if target >= activation.FIRST_FD and _is_inheritable(target):
                moved[target] = duplicate(target, end, inheritable=True)
            os.dup2(source, target)
            os.close(source)
            del at[source]
        number_of[fd], at[target] = target, fd
        os.set_inheritable(target, True)
    for fd in kept:
        _keep(number_of[fd])
    return moved


def _swap(one: int, other: int, end: int) -> None:
    """Exchange two descriptors of ours by way of one spare number, since the limits may allow no second one."""
    spare = duplicate(other, end, inheritable=False)
    os.dup2(one, other, inheritable=False)
    os.dup2(spare, one, inheritable=False)
    os.close(spare)


def _keep(fd: int) -> None:
    """Let the command inherit a descriptor, under a high number if the limits allow it."""
    if fd >= _OUT_OF_THE_WAY:
        os.set_inheritable(fd, True)
    else:
        duplicate(fd, fd + 1, inheritable=True)
        os.close(fd)


def duplicate(fd: int, lowest: int, *, inheritable: bool) -> int:
    """Duplicate a descriptor to a free high number; where the limits do not reach that far, to one from `lowest` on."""
    command = fcntl.F_DUPFD if inheritable else fcntl.F_DUPFD_CLOEXEC
    try:
        return fcntl.fcntl(fd, command, max(lowest, _OUT_OF_THE_WAY))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):
            raise
        return fcntl.fcntl(fd, command, lowest)


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def follow_jobserver(environment: dict[str, str], moved: Mapping[int, int]) -> None:
    """Tell make and its like where their jobserver's pipe is now: `--jobserver-auth=3,4` (GNU make manual, POSIX Jobserver)."""
    for variable in _JOBSERVER_VARIABLES if moved else ():
        words = environment.get(variable, "").split(" ")
        if words != [""]:
            environment[variable] = " ".join(_follow(word, moved) for word in words)


def forget_jobserver(environment: MutableMapping[str, str]) -> None:
    """Leave make's jobserver, whose pipe is closed: a make below has as many jobs as its own words say."""
    for variable in _JOBSERVER_VARIABLES:
        words = environment.get(variable, "").split(" ")
        if any(word.startswith(_JOBSERVER_OPTIONS) for word in words):
            left = (word for word in words if not word.startswith((*_JOBSERVER_OPTIONS, "-j")))
            environment[variable] = " ".join(left)


def _follow(word: str, moved: Mapping[int, int]) -> str:
    for option in _JOBSERVER_OPTIONS:
        numbers = word.removeprefix(option).split(",")
        if word.startswith(option) and len(numbers) == 2 and all(number.isdecimal() for number in numbers):
            return option + ",".join(str(moved.get(int(number), number)) for number in numbers)
    return word


def _reset_signals() -> None:
    """Stop ignoring the signals that Python ignores from its start; exec would keep that. What was set before is unknown."""
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def _exec(file: str, argv: list[str], environment: dict[str, str]) -> NoReturn:
    try:
        os.execve(file, argv, environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        # A script without `#!`: execvp(3) gives it to the shell, and so do env and every shell.
        os.execve("/bin/sh", ["/bin/sh", file, *argv[1:]], environment)


def _refused(file: str, error: OSError) -> PortexecError:
    if error.errno == errno.ENOENT and not os.path.exists(file):
        return CommandNotFound(f"cannot run {file}: {reason(error)}")
    if error.errno == errno.ENOENT:
        return missing_interpreter(file)
    return _cannot_execute(file, reason(error), "")


def missing_interpreter(file: str) -> CannotExecute:
    """The error for a file that exists, but that the kernel answers with ENOENT: its interpreter or loader is missing."""
    try:
        with open(file, "rb") as script:
            first = script.readline(256)
    except OSError:
        first = b""
    if not first.startswith(b"#!"):
        return _cannot_execute(file, "its dynamic loader is missing", "is it built for another system or C library?")
    interpreter = os.fsdecode((first[2:].split(maxsplit=1) or [b""])[0])
    if first.endswith(b"\r\n"):
        return _cannot_execute(file, "its first line has a Windows line end", f"convert it: sed -i 's/\\r$//' {file}")
    return _cannot_execute(
        file, f"its interpreter {interpreter} does not exist", "correct its first line, or install the interpreter"
    )


def _cannot_execute(file: str, why: str, hint: str) -> CannotExecute:
    return CannotExecute(f"cannot run {file}: {why}", hint)
