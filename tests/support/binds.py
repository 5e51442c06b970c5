"""What comes of each case of tests/children/binder.py on any Linux."""

from __future__ import annotations

import os


def kernel_version() -> tuple[int, ...]:
    """The first two numbers of the kernel's release."""
    return tuple(int(word) for word in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])


OK = "ok"
# Before Linux 5.19 the first bind may have been interrupted, and comes again: so a second one to the same address succeeds.
SECOND_BIND = "EINVAL" if kernel_version() >= (5, 19) else OK
CASES: dict[str, object] = {
    "plain": [OK, OK, True, OK],
    "in_thread": [OK, OK, True, OK],
    "after_leader_exit": [OK, OK, True, OK],
    "unshared_table": [OK, OK, True, OK],
    "epoll_before": [OK, OK, 1],
    "dup_before": [OK, OK, True],
    "options_kept": [OK, OK, True, True],
    "both_families": [OK, OK, OK, OK, OK, OK],
    "dual_then_v4": [OK, OK, "EADDRINUSE"],
    "same_twice": [OK, OK, "EADDRINUSE", OK],
    "workers": [OK, OK, OK, OK, "EADDRINUSE", 1, 1],
    "mptcp": [OK, OK, 262, OK],
    "udp": [OK, "x"],
    "other_families": [OK, OK, OK],
    "any_number": [True, False],
    "mapped": [OK, OK, OK],
    "missing_address": ["EADDRNOTAVAIL"],
    "rebind": [OK, SECOND_BIND, "EINVAL"],
    "bind_then_connect": [OK, OK, True],
    "listen_unbound": [OK, True],
    "listen_twice": [OK, OK, OK, OK],
    "fork_between": [OK, 0, OK],
    "orphan": [OK, OK, True, OK],
    "again": [[OK, OK]] * 3,
    "shutdown_listen": [OK, OK, OK, True, OK],
    "stuck_worker": [OK, OK, "EADDRINUSE"],
    "drop_before_socket": [OK, OK, True, OK],
    "drop_after_socket": [OK, OK, OK],
    "other_network": [OK, OK, True],
    "not_dumpable": [OK, OK, OK],
    "short_address": ["EINVAL", "EINVAL", "EINVAL", "EFAULT", "EINVAL"],
    "unspecified_family": [0, OK, True, OK],
    "no_descriptor": ["EBADF", "EBADF", "ENOTSOCK", "ENOTSOCK", "EBADF", "EBADF"],
}

# The guard gives way to SO_REUSEADDR only: a pidfd is that of a process before Linux 6.9, not of a thread.
GATED_BEFORE_6_9 = {"after_leader_exit", "unshared_table"}
