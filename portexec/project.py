"""The project that a run belongs to: a directory. The same words in two git worktrees mean two things.

It is the first of these that is there: `--project`, $PORTEXEC_PROJECT, the nearest directory upwards with `.git`, the working
directory. The home directory is no project: many people keep their dotfiles in git. Only a `.git` of this user, of root, or of
the owner of the working directory counts: in /tmp everybody can make one. (git is as careful; safe.directory in
git-config(1).)
"""

from __future__ import annotations

import os

from portexec.errors import PortexecError, UsageError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping

VARIABLE = "PORTEXEC_PROJECT"

_FNV_START = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3
_64_BITS = (1 << 64) - 1


class NoWorkingDirectory(PortexecError):
    """The working directory has gone."""


def directory(given: str | None, environment: Mapping[str, str]) -> str:
    """The directory of the project, without symbolic links. Raises PortexecError where there is none."""
    if given is not None:
        return _existing(given, "--project")
    if environment.get(VARIABLE):
        return _existing(environment[VARIABLE], VARIABLE)
    here = working_directory()
    home = os.path.realpath(home_directory(environment) or "/")
    above, owners = here, {os.geteuid(), 0, _owner_of_working_directory()}
    while not (_is_in_git(above, owners) and above != home):
        parent = os.path.dirname(above)
        if parent == above:
            return here
        above = parent
    return above


def directory_if_any(given: str | None, environment: Mapping[str, str], *, is_needed: bool) -> str:
    """As `directory`; but empty where no project is needed, and the working directory has gone. Raises PortexecError."""
    try:
        return directory(given, environment)
    except NoWorkingDirectory:
        if is_needed:
            raise
        return ""


def _owner_of_working_directory() -> int:
    """The owner of the working directory; our own user where we may not look, as after `su` from root's home."""
    try:
        return os.stat(os.curdir).st_uid
    except PermissionError:
        return os.geteuid()


def _is_in_git(path: str, owners: Container[int]) -> bool:
    git = os.path.join(path, ".git")
    try:
        return os.path.exists(git) and os.lstat(git).st_uid in owners
    except OSError:
        return False


def home_directory(environment: Mapping[str, str]) -> str:
    """The home of this user, empty for none. $HOME is checked: cron may set none, and sudo may leave another user's."""
    home = environment.get("HOME", "")
    if not _is_ours(home):
        import pwd

        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:  # containers give processes user ids that nobody has
            return ""
    return home if _is_ours(home) else ""


def _is_ours(path: str) -> bool:
    try:
        return os.path.isabs(path) and os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def working_directory() -> str:
    """Where we are. Raises NoWorkingDirectory where that has gone."""
    try:
        return os.getcwd()
    except OSError as error:
        raise NoWorkingDirectory(
            f"the working directory cannot be found: {reason(error)}", "go to the project's directory"
        ) from error


def _existing(given: str, about: str) -> str:
    if not os.path.isdir(given):
        raise UsageError(f"{given!r} is not a directory", "name the directory of the project", about=about)
    return os.path.realpath(given)


def digest(*texts: str) -> int:
    """A number of 64 bits that is the same for the same texts, on every machine: FNV-1a, with its bits mixed at the end."""
    number = _FNV_START
    for byte in os.fsencode("\0".join(texts)):
        number = (number ^ byte) * _FNV_PRIME & _64_BITS
    number = (number ^ number >> 33) * 0xFF51AFD7ED558CCD & _64_BITS
    return number ^ number >> 33
