"""`--check`: what this machine can do, and what it cannot and why. It is tried out, and nothing is left behind."""

from __future__ import annotations

import os
import sys

from portexec.binding.guard import WEAKLY, can_hide, has_ipv6, knows_flips
from portexec.binding.listeners import LINUX, Bound, bind_all
from portexec.binding.spec import DEFAULT, parse_listen
from portexec.command.plan import GUARD, HOLD, Plan
from portexec.errors import RefusedError, cannot, reason

_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_PROXIED = "available: a bind is made on the command's own socket"
_CLOSEFROM = "with fd and hold, a command that closes unknown descriptors drops the guard; options under Lifetime keep it"
_IO_URING = "a bind by it passes no filter, so the guard refuses it: use hold"
_GATED = "available, gated: {}; no --remap"


def findings() -> dict[str, str]:
    """The findings by their names, in the order in which they are shown."""
    guard, why_no_parent = _guard(), _why_no_parent()
    usable = guard.startswith("available")
    return {
        "system": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}, Python {sys.version.split()[0]}",
        "ipv6": "yes" if has_ipv6() else "no: guards are for IPv4 alone",
        "seccomp": _seccomp(),
        "yama": _yama(),
        "no-new-privileges": _no_new_privileges(),
        "hand-off fd": _fd(),
        "hand-off guard": guard,
        "hand-off hold": "available" if LINUX else "not available: it needs SO_REUSEADDR as Linux has it",
        "same user": _same_user(),
        "closefrom": _CLOSEFROM,
        "io_uring": _IO_URING,
        "lifetime": f"not available: {why_no_parent}" if why_no_parent else "available",
        "auto": f"fd when the command names the descriptor, else {GUARD if usable else HOLD}",
    }


def report_text() -> str:
    """The findings for a person."""
    return "".join(f"{name:<19}{text}\n" for name, text in findings().items())


def report_json() -> str:
    """The findings for a program: one JSON line, names with underscores."""
    from portexec.plainjson import dumps

    return dumps({name.replace(" ", "_").replace("-", "_"): text for name, text in findings().items()}) + "\n"


def _why_no_parent() -> str:
    if not LINUX:
        return "only on Linux can portexec stay as the parent"
    from portexec.parent import possible

    return possible.why_not()


def _seccomp() -> str:
    if not LINUX:
        return "no: this is not Linux"
    from portexec import kernel

    why = kernel.why_no_calls()
    return f"not known: {why}" if why else _user_notification()


def _user_notification() -> str:
    from portexec.admission import seccomp

    if not seccomp.is_known_machine():
        return f"no: the system call numbers of {os.uname().machine} are not known to portexec"
    try:
        if not seccomp.has_flags(seccomp.FLAG_NEW_LISTENER):
            return "no user notification: the kernel is older than 5.0, or a sandbox stands in for it"
        if not seccomp.has_flags(seccomp.FLAG_NEW_LISTENER | seccomp.FLAG_WAIT_KILLABLE_RECV):
            return "user notification; not wait-killable (Linux 5.19), so that a signal may interrupt a bind"
    except OSError as error:
        return f"refused: {reason(error)}"
    return "user notification, wait-killable"


def _yama() -> str:
    try:
        with open(_YAMA) as file:
            scope = file.read().strip()
    except OSError:
        return "not there"
    meanings = {
        "0": "no restriction",
        "1": "a parent may look into its descendants, which is enough",
        "2": "only CAP_SYS_PTRACE may look into a process: without it the guard is gated",
        "3": "nobody may look into a process: the guard is gated",
    }
    return f"ptrace_scope {scope}: {meanings.get(scope, 'unknown')}"


def _no_new_privileges() -> str:
    from portexec.admission import privileges

    if privileges.is_set():
        return "set already by whoever started portexec: hand-off guard takes nothing more"
    if privileges.may_do_without():
        return "not needed with CAP_SYS_ADMIN"
    root = "root lacks CAP_SYS_ADMIN here; " if os.geteuid() == 0 else ""
    return (
        f"{root}needed by hand-off guard: below it sudo, su and other set-uid programs gain nothing;"
        " auto then prefers hold for them"
    )


def _same_user() -> str:
    """What a process of the command's user can do below hand-off guard, and another user's cannot."""
    when = "during each bind or listen of the command"
    if os.geteuid() == 0 and can_hide():
        when += " on a socket that shares by itself or is MPTCP"
    return f"with guard, can bind the number with SO_REUSEPORT {when}"


def _fd() -> str:
    return "available" if not LINUX or knows_flips() else f"available, {WEAKLY}"


def _guard() -> str:
    """Rehearse for real: a guard, a child, a filter, and a bind that is admitted."""
    if not LINUX:
        return "not available: it needs Linux' seccomp"
    if why := _why_no_parent():
        return f"not available: {why}"
    bound = bind_all(parse_listen([DEFAULT]), listening=False)
    try:
        why_gated = _rehearse(bound)
        return _GATED.format(why_gated) if why_gated else _PROXIED
    except RefusedError as refusal:
        return f"not available: {refusal}"
    except OSError as error:
        raise cannot("rehearse", error) from error
    finally:
        bound.close()


def _rehearse(bound: Bound) -> str:
    """Fork a child, rehearse with it, and end it. Returns why its bind was gated, if it was. Raises RefusedError, OSError."""
    from portexec.parent import loop
    from portexec.parent.child import admit, fork_child
    from portexec.parent.signals import Inbox

    inbox = Inbox()
    try:
        port = next(iter(bound.guards))
        child = fork_child(Plan(sys.executable, [sys.executable], {}), inbox, is_admitted=True, rehearsal_port=port)
        loop.run(admit(child, bound.guards, {}))
        child.end()
    finally:
        inbox.restore()
        inbox.close()
    return "" if child.admission is None else child.admission.why_gated
