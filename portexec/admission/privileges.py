"""Programs that gain privileges when they are executed, and would not under no-new-privileges (prctl(2))."""

from __future__ import annotations

import os
import stat

_CAP_SYS_ADMIN = 1 << 21


def lost_by(file: str) -> str:
    """Why a program would lack privileges under hand-off `guard`, empty if it would not.

    The kernel lets CAP_SYS_ADMIN install a filter without no-new-privileges, which root may lack and others may have; for
    anybody else set-uid, set-gid and file capabilities have no effect below it. Where it is set already, nothing is lost.
    """
    if is_set() or may_do_without():
        return ""
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return ""
    if mode & (stat.S_ISUID | stat.S_ISGID):
        return f"no-new-privileges would take its rights from {file}, which is set-uid or set-gid"
    try:
        os.getxattr(file, "security.capability")
    except OSError:
        return ""
    return f"no-new-privileges would take its rights from {file}, which has file capabilities"


def is_set() -> bool:
    """Whether no-new-privileges is set for this process."""
    return _status("NoNewPrivs") == "1"


def may_do_without() -> bool:
    """Whether the kernel lets this process install a filter without no-new-privileges."""
    effective = _status("CapEff")
    return bool(int(effective, 16) & _CAP_SYS_ADMIN) if effective else os.geteuid() == 0


def _status(field: str) -> str:
    """A field of /proc/self/status, proc_pid_status(5); empty where nobody tells."""
    try:
        with open("/proc/self/status") as status:
            return next((line.partition(":")[2].strip() for line in status if line.startswith(f"{field}:")), "")
    except OSError:
        return ""
