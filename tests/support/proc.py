"""Read /proc: what a process is, what it has open, who its children are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp
_RECEIVE = {"x86_64": "45", "aarch64": "207"}  # recvfrom(2)
_POLL = {"x86_64": ("7", "219"), "aarch64": ("73", "128")}  # poll(2), and restart_syscall(2), which goes on with it, by machine


def descriptors_of(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what each of them is."""
    directory = Path(f"/proc/{pid}/fd")
    found = {}
    for entry in directory.iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            continue
    return found


def status_of(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def state(pid: int) -> str:
    """The letter of its state, as in ps(1)."""
    return status_of(pid)["State"][0]


def is_gone(pid: int) -> bool:
    """Whether it has ended, waited for or not."""
    try:
        return state(pid) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _call(pid: int) -> str:
    """The number of the system call that it sleeps in, or was stopped in; another word while it runs."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0]


def is_polling(pid: int) -> bool:
    """Whether it waits for whatever comes next, as a loop does, or was stopped there. Taken for granted on rare machines."""
    calls = _POLL.get(os.uname().machine)
    return calls is None or _call(pid) in calls


def is_at_rest(pid: int) -> bool:
    """Whether a process of portexec has nothing left to do: it sleeps until something comes.

    The letter S alone does not tell. Who is in waitpid(2) has it, too, also while it takes the status of a child.
    """
    return state(pid) == "S" and (is_polling(pid) or _call(pid) == _RECEIVE.get(os.uname().machine))


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to the process that has not reached it yet."""
    return bool(int(status_of(pid)["ShdPnd"], 16) >> (number - 1) & 1)


def is_caught(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for a signal."""
    return bool(int(status_of(pid)["SigCgt"], 16) >> (number - 1) & 1)


def children_of(pid: int) -> list[int]:
    """The children of its first thread."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def name_of(pid: int) -> str:
    """Its short name, by which killall(1) and pkill(1) find it."""
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def words_of(pid: int) -> str:
    """Its command line; empty when the process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def processes_with(variable: str) -> set[int]:
    """The living processes that have this `NAME=VALUE` in the environment they were started with, but for this one."""
    wanted = variable.encode()
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):  # hundreds, many times: paths as objects take twice as long
        try:
            with open(f"/proc/{name}/environ", "rb", buffering=0) as file:
                if wanted in file.read().split(b"\0"):
                    found.add(int(name))
        except OSError:  # ended, or not ours to look at
            continue
    return found - {os.getpid()}


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is the program's name in parentheses, in which anything may stand.
            state, _parent, _group, its_session = status.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(status.parent.name))
    return found


def is_session_gone(session: int) -> bool:
    """Whether nothing of the session runs any more; says what does, if it is asked for the last time."""
    left = {pid: words_of(pid) for pid in members(session)}
    assert not left, f"left running: {left}"
    return True


def listening_numbers(session: int) -> set[int]:
    """The TCP numbers on which the processes of a session listen."""
    theirs = {link for pid in members(session) for link in _links(pid)}
    rows = [row.split() for table in ("tcp", "tcp6") for row in _table_rows(table)]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in theirs}


def _links(pid: int) -> list[str]:
    """What the descriptors of a process are; none if it is gone."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.append(os.readlink(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _table_rows(table: str) -> list[str]:
    """The sockets in one of the kernel's tables; there is none where there is no IPv6."""
    try:
        return Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    except FileNotFoundError:
        return []


def processes_of(folder: Path) -> list[int]:
    """The living processes that were started in this folder or with it as their home.

    Not those of a session: the browser makes its own. Most of its processes overwrite their environment, but stay where they
    are; what leaves for another directory still has the environment.
    """
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if belongs_to(process, folder)]


def belongs_to(process: Path, folder: Path) -> bool:
    """Whether a process, by its directory in /proc, works in the folder or has it as its home."""
    try:
        at_home = f"HOME={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
        return at_home or os.readlink(process / "cwd") == str(folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # one that has ended has neither
