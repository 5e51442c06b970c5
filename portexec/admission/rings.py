"""io_uring, a second way into the kernel, which no filter sees: whether a bind may have gone that way."""

from __future__ import annotations

import os

_FIRST = (6, 11)  # the first Linux with IORING_OP_BIND
_NOBODY = "2"  # may have a ring


def can_bind() -> bool:
    """Whether this kernel lets a ring bind, as far as it tells."""
    try:
        major, minor = map(int, os.uname().release.split(".")[:2])
    except ValueError:
        return True
    return (major, minor) >= _FIRST and _setting() != _NOBODY


def _setting() -> str:
    """The sysctl kernel.io_uring_disabled; empty where there is none."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled") as file:
            return file.read().strip()
    except OSError:
        return ""
