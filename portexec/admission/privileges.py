"""Programs that gain privileges when they are executed, and would not under no-new-privileges (prctl(2))."""

from __future__ import annotations

import os
import stat


def lost_by(file: str) -> str:
    """Why a program would lack privileges under hand-off `guard`, empty if it would not.

    The kernel lets root install a filter without no-new-privileges; for anybody else set-uid, set-gid and file capabilities
    have no effect below it.
    """
    if os.geteuid() == 0:
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
