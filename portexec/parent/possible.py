"""Whether portexec can be the parent of a command here. We find out before anything is done, so that nothing ends half way.

A parent needs the C library (signalfd(2), prctl(2), seccomp(2)), orphans that become its own, and a /proc that shows its own
processes. Without one of them it could neither tell when all processes have ended nor stop them. When portexec becomes the
command, it needs none of them.
"""

from __future__ import annotations

import os

from portexec import kernel
from portexec.errors import UsageError, reason


def why_not() -> str:
    """Why it cannot; empty if it can. If it can, orphans below this process become its children from now on."""
    return kernel.why_no_calls() or _why_no_processes() or _why_no_orphans()


def refusal(option: str, why: str) -> UsageError:
    """The error of an option for which portexec would have to be a parent; `why` is that of `why_not`."""
    return UsageError(f"makes portexec stay as the parent, which it cannot here: {why}", "leave it out", about=option)


def _why_no_orphans() -> str:
    try:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        return f"this system does not give orphans to their grandparent (PR_SET_CHILD_SUBREAPER: {reason(error)})"
    return ""


def _why_no_processes() -> str:
    try:
        shown = os.readlink("/proc/self")
    except OSError as error:
        return f"/proc does not show processes ({reason(error)})"
    if shown != str(os.getpid()):
        return "/proc shows the processes of another PID namespace; mount one of its own, as `unshare --mount-proc` does"
    return ""
