"""The registry: which runs with a name there are, and how the last one of each name has ended. A directory, and no daemon.

    $XDG_STATE_HOME/portexec/BOOT/lock              held while a process claims a name, or removes what is old
    $XDG_STATE_HOME/portexec/BOOT/NAME.KEY.lock     held by a run: a byte by its portexec and its shims, one by portexec alone
    $XDG_STATE_HOME/portexec/BOOT/NAME.KEY.json     what is known of the run, replaced by rename
    $XDG_STATE_HOME/portexec/BOOT/NAME.KEY.log      what its command writes, where it runs in the background

BOOT is the boot id, as no run outlives a boot; the runs of earlier boots are known as ended. KEY stands for the project. The
registry is not in the runtime directory, which goes with the login session, and which cron, su and containers do not have.

A run lives as long as its lock is held (F_OFD_SETLK, fcntl(2)): the kernel releases the lock, however the processes end. To
find out whether a run lives, we ask the kernel (F_OFD_GETLK) and never take the lock, so that no look hinders a start. The
lock's file is never renamed, and is close-on-exec: a command does not have it. Where portexec was killed, its shims stop the
run, and its own byte of the lock is free. A pid would not tell that: the dead process may wait for its parent, or be in another
container.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys
import time

from portexec import procfs
from portexec.command import execute
from portexec.errors import PortexecError, cannot, escaped, is_shortage
from portexec.kernel import STDERR
from portexec.names.naming import short
from portexec.plainjson import dumps, loads
from portexec.project import digest, directory_if_any, home_directory, working_directory
from portexec.writable import require_makeable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from portexec.names.naming import Wanted

VARIABLE = "PORTEXEC_DIR"

# The states of a run.
STARTING = "starting"
READY = "ready"
STOPPING = "stopping"
ENDED = "ended"

_KEPT = 7 * 24 * 3600.0  # seconds that an ended run is remembered
_TIDIED = 3600.0  # seconds between two looks for what is old
_PATIENCE = 60.0  # seconds to wait for others that claim a name; each takes a millisecond
_SHORTEST_PAUSE = 0.001  # seconds between two attempts
_LONGEST_PAUSE = 0.05
_LONGER = 1.5
_SUFFIXES = ("log", "new", "json", "lock")  # of the files of a run; the lock goes last
_LOOKS = 10  # that a reader may need when runs begin and end meanwhile
_RUN, _FRONT = 0, 1  # bytes of a run's lock: held while anything of the run lives; held while its portexec lives
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


# What an entry consists of, other than its listeners and its wait status.
_KINDS = {
    str: ("run", "name", "project", "state", "directory", "log"),
    int: ("pid", "pid_started", "command_pid"),
    float: ("since", "kill_after"),
    list: ("command", "listeners"),
    bool: ("is_stopped", "was_ready"),
}
_MAX_WAIT_STATUS = 0xFFFF


class Entry:
    """What is known of one run. It does not change.

    `pid` is that of portexec, with `pid_started` as proc_pid_stat(5) has it, and `command_pid` that of the command, 0 before it
    runs. `since` is when the state began, in seconds since the epoch. `wait_status` is how the run ended, None where that is
    unknown. `is_stopped`: portexec was told to stop it. `was_ready`: it has served.
    `listeners` are described as in the announcement. `is_alive`: something of the run lives. `run` is unique to the run.
    """

    __slots__ = (
        "command",
        "command_pid",
        "directory",
        "is_alive",
        "is_stopped",
        "kill_after",
        "listeners",
        "log",
        "name",
        "pid",
        "pid_started",
        "project",
        "run",
        "since",
        "state",
        "wait_status",
        "was_ready",
    )

    def __init__(self, **fields: Any) -> None:
        """Raises KeyError where a field is missing."""
        self.is_alive: bool = fields.get("is_alive", False)
        self.is_stopped: bool = fields.get("is_stopped", False)
        self.was_ready: bool = fields.get("was_ready", False)
        self.run: str = fields["run"]
        self.name: str = fields["name"]
        self.project: str = fields["project"]
        self.state: str = fields["state"]
        self.since: float = fields["since"]
        self.pid: int = fields["pid"]
        self.pid_started: int = fields["pid_started"]
        self.command_pid: int = fields["command_pid"]
        self.command: list[str] = fields["command"]
        self.directory: str = fields["directory"]
        self.kill_after: float = fields["kill_after"]
        self.log: str = fields["log"]
        self.listeners: list[dict[str, Any]] = fields["listeners"]
        self.wait_status: int | None = fields["wait_status"]

    def fields(self) -> dict[str, Any]:
        """All of it by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def changed(self, **fields: Any) -> Entry:
        """The same entry with other values."""
        return Entry(**{**self.fields(), **fields})

    def is_same_run(self, other: Entry) -> bool:
        """Whether both entries are about the same run, and not about two runs of the same name."""
        return self.run == other.run

    def is_of(self, pid: int) -> bool:
        """Whether this pid is that of its portexec or of its command."""
        return self.is_alive and pid in (self.pid, self.command_pid)

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self.is_alive and self.state == READY


class NameTaken(PortexecError):
    """A run of this name is there already; `entry` is what is known of it."""

    def __init__(self, message: str, hint: str, entry: Entry) -> None:
        super().__init__(message, hint)
        self.entry = entry


class Claim:
    """A name that is ours as long as the descriptor `lock` is open here or in a shim. Keeps the entry of the run.

    `front` is the descriptor of the byte that portexec alone holds: no shim has it.
    """

    __slots__ = ("_path", "entry", "front", "lock")

    def __init__(self, path: str, lock: int, front: int, entry: Entry) -> None:
        """Raises OSError when the entry cannot be written."""
        self._path = path
        self.lock = lock
        self.front = front
        self.entry = entry
        _replace(path, entry)

    def make_log(self) -> str:
        """Make the file for what the command writes, and return its path. Raises OSError."""
        log = f"{self._path}.log"
        os.close(_open_private(log, os.O_WRONLY))
        return log

    def tell_starting(self, listeners: Sequence[Mapping[str, object]] | None = None) -> None:
        """A command is started, the first one or another. Raises OSError if it cannot be written, as all `tell_` methods do."""
        if self.entry.state != STOPPING:
            self._become(STARTING, command_pid=0, **({} if listeners is None else {"listeners": absolute(listeners)}))

    def tell_ready(self, command_pid: int, listeners: Sequence[Mapping[str, object]]) -> None:
        """The command serves, or is going to at the first connection."""
        if self.entry.state != STOPPING:
            self._become(READY, was_ready=True, command_pid=command_pid, listeners=absolute(listeners))

    def tell_stopping(self) -> None:
        """The run is to end."""
        self._become(STOPPING)

    def tell_ended(self, wait_status: int | None, *, is_stopped: bool = False) -> None:
        """The run has ended, with this wait status, None where no command has ended; whether portexec was told to stop it."""
        self._become(ENDED, wait_status=wait_status, is_stopped=is_stopped)

    def tell_log(self, path: str) -> None:
        """The command writes to this file."""
        self._write(self.entry.changed(log=path))

    def pass_to_me(self) -> None:
        """From now on this process is the run's portexec."""
        self._write(self.entry.changed(pid=os.getpid(), pid_started=procfs.started(os.getpid())))

    def _become(self, state: str, **fields: Any) -> None:
        since = self.entry.since if state == self.entry.state else time.time()
        self._write(self.entry.changed(state=state, since=since, **fields))

    def _write(self, entry: Entry) -> None:
        self.entry = entry
        try:
            _replace(self._path, entry)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _overwrite(self._path, entry)

    def let_go(self) -> None:
        """Close our copies of the lock."""
        os.close(self.lock)
        os.close(self.front)


def _replace(path: str, entry: Entry) -> None:
    """Write an entry by rename, so that readers find the old one or the new one. Raises OSError."""
    temporary = f"{path}.new"
    fd = _open_private(temporary, os.O_WRONLY | os.O_TRUNC)
    try:
        _write_at_once(fd, dumps(entry.fields()).encode())
    finally:
        os.close(fd)
    os.rename(temporary, f"{path}.json")


def _overwrite(path: str, entry: Entry) -> None:
    """Write an entry over the old one, which needs no room on the disk. Raises OSError."""
    fd = os.open(f"{path}.json", os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        data = dumps(entry.fields()).encode()
        _write_at_once(fd, data.ljust(os.fstat(fd).st_size))
    finally:
        os.close(fd)


def _write_at_once(fd: int, data: bytes) -> None:
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def absolute(listeners: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The listeners as others can reach them: the relative path of a unix socket is made absolute, from our directory."""
    return [_absolute_one({key: value for key, value in listener.items() if key != "fd"}) for listener in listeners]


def _absolute_one(listener: dict[str, object]) -> dict[str, object]:
    path = str(listener.get("path", "@"))
    if path.startswith(("/", "@")):
        return listener
    path = os.path.abspath(path)
    return {**listener, "path": path, "url": f"unix:{path}"}


def claim(entry: Entry, environment: Mapping[str, str]) -> Claim:
    """Begin a run with the name of this entry.

    Raises NameTaken, with the entry of the other run, if one of this name and project runs; PortexecError where there is no
    registry.
    """
    if sys.platform != "linux":
        raise PortexecError("runs with a name need Linux: other systems lack the locks")
    folder, fd = _locked_folder(environment)
    try:
        _remove_old(folder, fd)
        path = os.path.join(folder, _key(entry.name, entry.project))
        lock, front = _open_lock(path), _open_lock(path)
        try:
            other = find(entry.name, entry.project, environment)
            if other is not None and other.is_alive:
                raise _taken(other, environment)
            _remove(f"{path}.json")  # before the lock is held: the entry of an earlier run must not seem to be alive
            if not (_take(lock, _RUN, 1) and _take(front, _FRONT, 1)):
                raise _taken(_read(path) or entry, environment)
            _remove(f"{path}.log")
            return Claim(path, lock, front, _begun(entry))
        except BaseException:
            os.close(lock)
            os.close(front)
            raise
    except OSError as error:
        raise cannot(f"write to the registry {folder}", error, _HINT) from error
    finally:
        os.close(fd)


def foresee(entry: Entry, environment: Mapping[str, str]) -> None:
    """Raise what `claim` would raise, as far as that is known without making anything."""
    other = find(entry.name, entry.project, environment)
    if other is not None and other.is_alive:
        raise _taken(other, environment)
    failure: OSError | None = None
    for home in _homes(environment):
        try:
            require_makeable(os.path.join(_nearest(os.path.join(home, _boot_id())), "lock"))
        except OSError as error:
            failure = failure or error
        else:
            return
    raise _cannot_make(environment, failure)


def _begun(entry: Entry) -> Entry:
    """The entry of a run that begins now, with this process as its portexec."""
    return entry.changed(since=time.time(), pid=os.getpid(), pid_started=procfs.started(os.getpid()))


def _open_lock(path: str) -> int:
    """Open the lock of a run, under none of the numbers of standard streams, though some of those may be closed."""
    opened = _open_private(f"{path}.lock", os.O_RDWR)
    try:
        return execute.duplicate(opened, STDERR + 1, inheritable=False)
    finally:
        os.close(opened)


def _taken(other: Entry, environment: Mapping[str, str]) -> NameTaken:
    where = f": {other.listeners[0]['url']}" if other.listeners else ""
    name = name_here(other, environment)
    return NameTaken(
        f"{name} runs already, since {age(other)}{where}",
        f"`portexec --stop {name}` stops it, another --name starts one beside it; --detach --reuse takes the one that runs",
        other,
    )


def name_here(entry: Entry, environment: Mapping[str, str]) -> str:
    """The name of a run as the verbs take it in this directory. By `--project`, its project may be another one."""
    return short(entry.name, entry.project, directory_if_any(None, environment, is_needed=False))


def age(entry: Entry) -> str:
    """How long the run has been in its state, in words: `2 min`."""
    seconds = max(0.0, time.time() - entry.since)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= length):
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def entries(environment: Mapping[str, str]) -> list[Entry]:
    """All runs that are known, also those that have ended, ordered by name.

    Raises PortexecError where the directory is not safe, or cannot be read.
    """
    folders = _folders(environment)
    keys = {name.removesuffix(".json") for folder in folders for name in _names_in(folder) if name.endswith(".json")}
    found = (_find(key, folders) for key in sorted(keys))
    return [entry for entry in found if entry is not None]


def find(name: str, project: str, environment: Mapping[str, str]) -> Entry | None:
    """The run of this name, if it is known. Raises as `entries`."""
    return _find(_key(name, project), _folders(environment))


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []  # another process has removed it, since it was old
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str, error: OSError) -> PortexecError:
    return cannot(f"read the registry {folder}", error)


def meant(wanted: Wanted, environment: Mapping[str, str]) -> Entry | None:
    """What is known of the run that is meant. Its project may be written as the list shows it. Raises as `entries`."""
    if wanted.pid:
        return next((entry for entry in entries(environment) if entry.is_of(wanted.pid)), None)
    found = find(wanted.name, wanted.project, environment)
    if found is not None or "\\" not in wanted.project:
        return found
    of_name = (entry for entry in entries(environment) if entry.name == wanted.name)
    return next((entry for entry in of_name if escaped(entry.project) == wanted.project), None)


def _find(key: str, folders: Iterable[str]) -> Entry | None:
    """The run of a key that lives, or else the last one. Several homes can have one, if a home became read-only."""
    found = (_look(folder, key) for folder in folders)
    return max((entry for entry in found if entry is not None), key=lambda entry: (entry.is_alive, entry.since), default=None)


def _look(folder: str, key: str) -> Entry | None:
    """The entry of a key in one directory. A run that lives in another boot's directory is on a machine with the same home."""
    try:
        entry = _read(os.path.join(folder, key))
    except OSError as error:
        raise _unreadable(folder, error) from error
    is_elsewhere = entry is not None and entry.is_alive and os.path.basename(folder) != _boot_id()
    return None if is_elsewhere else entry


def _key(name: str, project: str) -> str:
    return f"{name}.{digest(project):016x}"


def _read(path: str) -> Entry | None:
    """The entry at a path without its suffix; None for a file that is no entry of ours. Raises OSError where we cannot look."""
    for _ in range(_LOOKS):
        is_alive = _is_held(f"{path}.lock")
        try:
            with open(f"{path}.json", "rb", opener=_open_at_once) as file:
                entry = Entry(**{**loads(file.read()), "is_alive": is_alive})
        except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):  # the last of [[[[...
            return None
        if not _is_sound(entry):
            return None
        if is_alive:
            is_to_end = entry.state == ENDED or not _is_held(f"{path}.lock", _FRONT, 1)
            return entry.changed(state=STOPPING) if is_to_end else entry
        if entry.state == ENDED:
            return entry
        if not _is_held(f"{path}.lock"):
            return entry.changed(state=ENDED, wait_status=None)  # it was killed, with its shims: nothing was left to write more
    return None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, and wait for nobody: somebody may have put a FIFO in its place."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_sound(entry: Entry) -> bool:
    """Whether the values are such as we write. The file may have been damaged."""
    of_kinds = all(isinstance(getattr(entry, name), kind) for kind, names in _KINDS.items() for name in names)
    return (
        of_kinds
        and 0.0 <= entry.since < float("inf")
        and all(isinstance(word, str) for word in entry.command)
        and all(map(_is_sound_listener, entry.listeners))
        and (entry.wait_status is None or (isinstance(entry.wait_status, int) and 0 <= entry.wait_status <= _MAX_WAIT_STATUS))
    )


def _is_sound_listener(listener: object) -> bool:
    if not isinstance(listener, dict) or ("host" in listener and "port" not in listener):
        return False
    return all(isinstance(listener.get(name), str) for name in ("name", "url"))


# Locks.


def _take(fd: int, start: int = 0, length: int = 0) -> bool:
    """Take the lock of an open file, or of some bytes of it. False if another process has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
    except (BlockingIOError, PermissionError):  # fcntl(2): EAGAIN or EACCES
        return False
    return True


def _is_held(path: str, start: int = 0, length: int = 0) -> bool:
    """Whether the lock of a file, or of some bytes of it, is held. Raises OSError where we cannot look."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


# The directory.

_HINT = f"{VARIABLE} names another directory"


def _locked_folder(environment: Mapping[str, str]) -> tuple[str, int]:
    """The directory of this boot, made if need be, and the descriptor that holds its lock."""
    failure: OSError | None = None
    for home in _homes(environment):
        folder = os.path.join(home, _boot_id())
        try:
            _make(home)
            _make(folder)
            return folder, _lock(folder)
        except OSError as error:
            failure = failure or error
            if error.errno not in _UNUSABLE:
                break
    raise _cannot_make(environment, failure)


def _cannot_make(environment: Mapping[str, str], failure: OSError | None) -> PortexecError:
    assert failure is not None  # noqa: S101  # there is one home at least
    return cannot(f"make the registry {_homes(environment)[0]}", failure, _HINT)


def _lock(folder: str) -> int:
    """The descriptor that holds the lock of a directory. Raises OSError, PortexecError."""
    fd = _open_private(os.path.join(folder, "lock"), os.O_RDWR)
    try:
        _wait_for(lambda: _take(fd), folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _wait_for(is_done: Callable[[], bool], folder: str) -> None:
    deadline, pause = time.monotonic() + _PATIENCE, _SHORTEST_PAUSE
    while not is_done():
        if time.monotonic() > deadline:
            raise PortexecError(f"another portexec keeps the registry {folder} locked", "is one of them stopped by Ctrl-Z?")
        time.sleep(pause)
        pause = min(_LONGER * pause, _LONGEST_PAUSE)


def _folders(environment: Mapping[str, str]) -> list[str]:
    """The directories that are there and safe: those of this boot, then those of boots before. Raises PortexecError."""
    boot = _boot_id()
    found, before = [], []
    for home in _safe_homes(environment):
        for name in _names_in(home):
            folder = os.path.join(home, name)
            if name == boot:
                _require_ours(folder)
                found.append(folder)
            elif _is_safe(folder) and os.access(folder, os.R_OK | os.X_OK):
                before.append(folder)
    return found + before


def _safe_homes(environment: Mapping[str, str]) -> Iterator[str]:
    """The homes that are there. Raises PortexecError where the one that would be used is not safe.

    The one in /tmp may be another user's. That is an error only for a user who needs it.
    """
    best, *others = _homes(environment)
    for home in (best, *others):
        if not os.path.lexists(home):
            continue
        try:
            _require_ours(home)
        except PortexecError:
            if home == best or not _can_be_made(best):
                raise
        else:
            yield home


def _can_be_made(path: str) -> bool:
    return os.access(_nearest(path), os.W_OK | os.X_OK)


def _nearest(path: str) -> str:
    """The path itself if it exists, or else the nearest directory above it that does."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _homes(environment: Mapping[str, str]) -> list[str]:
    """Where the registry may be, the best first; the one in /tmp is for users who can write nowhere else."""
    if given := environment.get(VARIABLE):
        return [os.path.normpath(given if os.path.isabs(given) else os.path.join(working_directory(), given))]
    state = _state_home(environment)
    in_tmp = f"/tmp/portexec-{os.geteuid()}"  # noqa: S108  # it is looked at before it is used
    return [os.path.join(state, "portexec"), in_tmp] if state else [in_tmp]


def _state_home(environment: Mapping[str, str]) -> str:
    """The directory for the state of programs, which may not exist yet; empty for none. Raises PortexecError if not ours."""
    given = environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(given):  # XDG Base Directory Specification: ignore other ones
        _require_not_theirs(given)
        return given
    home = home_directory(environment)
    return os.path.join(home, ".local", "state") if home else ""


def _require_not_theirs(path: str) -> None:
    try:
        is_theirs = os.stat(path).st_uid != os.geteuid()
    except OSError:
        return  # making it will fail, and tell
    if is_theirs:
        raise PortexecError(f"the directory {path}, as XDG_STATE_HOME says, belongs to another user", _HINT)


def _make(path: str) -> None:
    _make_private(path)
    _require_ours(path)


def _make_private(path: str) -> None:
    """Make a directory, and what is missing above it, for this user alone, whatever the umask. Raises OSError."""
    if os.path.lexists(path):
        return
    _make_private(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)
    except FileExistsError:
        pass  # another one of us was faster


def _open_private(path: str, flags: int) -> int:
    """Open a file, made if need be, for this user alone, whatever the umask. Raises OSError."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def _is_safe(path: str) -> bool:
    try:
        _require_ours(path)
    except (OSError, PortexecError):
        return False
    return True


def _require_ours(path: str) -> None:
    """Refuse a directory that another user has made or can look into, and a symbolic link. Raises PortexecError, OSError."""
    status = os.lstat(path)
    hint = f"remove it; {_HINT}" if status.st_uid == os.geteuid() else _HINT  # in /tmp nobody can remove another user's
    if stat.S_ISLNK(status.st_mode):
        raise PortexecError(f"the registry {path} is a symbolic link, which is not followed", hint)
    if not stat.S_ISDIR(status.st_mode):
        raise PortexecError(f"the registry {path} is not a directory", hint)
    if status.st_uid != os.geteuid():
        raise PortexecError(f"the registry {path} belongs to another user", _HINT)
    if status.st_mode & 0o077:
        raise PortexecError(f"the registry {path} is open to other users", f"make it yours alone: chmod 700 {path}")


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError as error:
        if is_shortage(error):
            raise
        return "boot"


def forget(entry: Entry, environment: Mapping[str, str]) -> None:
    """Remove what is known of a run that has ended, and its log if the registry has it. Raises PortexecError."""
    for folder in _folders(environment):
        path = os.path.join(folder, _key(entry.name, entry.project))
        if not os.path.lexists(f"{path}.json"):
            continue
        try:
            _forget(folder, path)
        except OSError as error:
            raise cannot(f"write to the registry {folder}", error, _HINT) from error


def _forget(folder: str, path: str) -> None:
    fd = _lock(folder)  # no run of this name begins meanwhile
    try:
        if not _is_held(f"{path}.lock"):
            _remove_run(path)
    finally:
        os.close(fd)


# What is old. Called with the directory locked.


def _remove_old(folder: str, lock: int) -> None:
    """Forget runs that ended long ago, in this boot and in those before. The lock's mtime is the time of the last look."""
    if os.fstat(lock).st_mtime > time.time() - _TIDIED and os.fstat(lock).st_size:
        return
    os.pwrite(lock, b"tidied\n", 0)
    home, boot = os.path.split(folder)
    before = time.time() - _KEPT
    for name in os.listdir(home):
        if name != boot:
            _remove_boot(os.path.join(home, name), before)
    _remove_from(folder, before)


def _remove_boot(place: str, before: float) -> None:
    """Forget an earlier boot. A directory that is not as we make it stays."""
    try:
        if _is_safe(place) and os.lstat(place).st_mtime < before:
            _remove_from(place, before)
            if os.listdir(place) == ["lock"]:
                _remove(os.path.join(place, "lock"))
                _attempt(os.rmdir, place)
    except OSError:
        pass


def _remove_from(folder: str, before: float) -> None:
    """Forget old runs, and old files of a start that was killed before it wrote its entry."""
    runs: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        key, _, suffix = name.rpartition(".")
        if key and suffix in _SUFFIXES:
            runs.setdefault(key, []).append(os.path.join(folder, name))
    for key, files in runs.items():
        path = os.path.join(folder, key)
        try:
            if max(os.lstat(file).st_mtime for file in files) < before and not _is_held(f"{path}.lock"):
                _remove_run(path)
        except OSError:
            pass  # a start does not fail because of that


def _remove_run(path: str) -> None:
    for suffix in _SUFFIXES:
        _remove(f"{path}.{suffix}")


def _remove(path: str) -> None:
    _attempt(os.unlink, path)


def _attempt(call: Callable[[str], None], path: str) -> None:
    try:
        call(path)
    except OSError:
        pass
