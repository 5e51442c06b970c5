"""Programs that gain privileges when they are executed, which no-new-privileges prevents (prctl(2))."""

from __future__ import annotations

import os
import stat

from portexec import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_GAINS_RIGHTS = frozenset({"sudo", "doas", "su", "pkexec"})
_CAP_SYS_ADMIN = 1 << 21


def lost_by(file: str) -> str:
    """Why a program would lack privileges under hand-off `guard`, empty if it would not.

    The kernel lets a process with CAP_SYS_ADMIN install a filter without no-new-privileges; root may lack that capability, and
    others may have it. For anybody else, set-uid, set-gid and file capabilities have no effect below the filter. Where
    no-new-privileges is set already, nothing is lost.
    """
    right = _right_of(file)
    if not right or is_set() or may_do_without():
        return ""
    return f"no-new-privileges would take its rights from {file}, which {right}"


def _right_of(file: str) -> str:
    """What gives a program rights that its user lacks, in words that follow `which`; empty where nothing does."""
    try:
        if os.stat(file).st_mode & (stat.S_ISUID | stat.S_ISGID):
            return "is set-uid or set-gid"
        os.getxattr(file, "security.capability")
    except OSError:
        return ""
    return "has file capabilities"


def advice(words: Sequence[str]) -> str:
    """Advice about a command that calls sudo somewhere in its words; empty where sudo works, or is not in its words."""
    names = {word.rpartition("/")[2] for text in words for word in text.split()}
    used = sorted(names & _GAINS_RIGHTS)
    if not used or is_set() or may_do_without():
        return ""
    return f"{used[0]} has no effect below hand-off guard (no-new-privileges): use -H hold, or portexec below {used[0]}"


def is_set() -> bool:
    """Whether no-new-privileges is set for this process."""
    return _own_status("NoNewPrivs") == "1"


def may_do_without() -> bool:
    """Whether the kernel lets this process install a filter without no-new-privileges."""
    effective = _own_status("CapEff")
    return bool(int(effective, 16) & _CAP_SYS_ADMIN) if effective else os.geteuid() == 0


def _own_status(field: str) -> str:
    try:
        return procfs.status("self", field)
    except OSError:
        return ""
