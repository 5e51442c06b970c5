"""Why a listener cannot be made, in words: each candidate, the reason for each, and who has the number."""

from __future__ import annotations

import errno

from portexec import kernel
from portexec.binding.guard import Guard
from portexec.binding.spec import STABLE_WORD, ListenSpec, is_name
from portexec.errors import ListenError, reason

_MAX_REASONS = 4  # how many candidates an error describes one by one
_ALIKE = 0.8  # from this ratio on, one word is another with a slip in it


def cannot_listen(spec: ListenSpec | str, error: OSError) -> ListenError:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return exhausted(error)
    hints = {
        errno.EADDRNOTAVAIL: "this machine does not have that address; `ip address` shows those it has",
        errno.EAFNOSUPPORT: "this machine has no IPv6; use 127.0.0.1",
        errno.ENOENT: "the directory has to exist",
    }
    return ListenError(f"cannot listen on {spec}: {reason(error)}", hints.get(error.errno or 0, ""))


def cannot_resolve(spec: ListenSpec, why: str) -> ListenError:
    """The error for a word that is no address. It may be `stable` with a slip in it, or the name of a listener."""
    import difflib

    hint = "give an address of this machine, such as 127.0.0.1, [::1] or *"
    if difflib.get_close_matches(spec.address.lower(), [STABLE_WORD], 1, _ALIKE):
        hint = f"did you mean {STABLE_WORD}?"
    elif is_name(spec.address):
        rest = str(spec).replace(f"{spec.address}:", "", 1)
        hint = f"a name is written {spec.address}={rest}; an address is such as 127.0.0.1, [::1] or *"
    return ListenError(f"cannot resolve {spec.address!r}: {why}", hint)


def exhausted(error: OSError) -> ListenError:
    return ListenError(
        f"cannot open another socket: {reason(error)}",
        "raise the limit with `ulimit -n`; every listener takes two descriptors" if error.errno == errno.EMFILE else "",
    )


def none_free(spec: ListenSpec, failures: list[tuple[int, OSError]]) -> ListenError:
    """Say which candidates were tried and why each failed; the common one-candidate case in the usual words."""
    number, error = failures[0]
    if len(failures) == 1 and number:
        hint = f"`{number},0` takes any other free port instead"
        if error.errno == errno.EACCES:
            hint = "ports below net.ipv4.ip_unprivileged_port_start, mostly 1024, need root or CAP_NET_BIND_SERVICE"
        return ListenError(f"cannot listen on {spec}: {_why_not(number, error, spec)}", hint)
    told = [f"{number}: {_why_not(number, error, spec)}" for number, error in failures[:_MAX_REASONS]]
    more = len(failures) - len(told)
    tail = f"; and {more} more" if more else ""
    return ListenError(
        f"no free port for {spec}: {'; '.join(told)}{tail}",
        "" if (0, 0) in spec.candidates else f"add `,0` for any other free port: {spec},0",
    )


def _why_not(number: int, error: OSError, spec: ListenSpec) -> str:
    if not number and not _is_one_left():
        return f"none is left in the ephemeral range ({_ephemeral_range()})"
    if not number or error.errno != errno.EADDRINUSE or spec.kind != "tcp":
        return reason(error)
    from portexec.binding import tables

    owner = tables.who_has(number)
    return f"{reason(error)} ({owner})" if owner else reason(error)


def _is_one_left() -> bool:
    """Whether the kernel has a free number for a guard. If so, something else has failed."""
    try:
        Guard(0).close()
    except OSError:
        return False
    return True


def _ephemeral_range() -> str:
    return "-".join(map(str, kernel.ephemeral_range() or ())) or "of this system"
