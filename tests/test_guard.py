"""The hand-off `guard`, case by case: an unmodified program binds its number in every way, and nothing is different.

The cases are those in which replacing the command's socket, a thread id taken for a process id, or a handler that fails would
show. Refused system calls, older kernels' seccomp, signals, io_uring and 32-bit programs are in test_guard_faults. Not cases
anywhere, since they need another kernel: Yama 2 and 3, pidfds before Linux 6.9.
"""

from __future__ import annotations

import json

import pytest

from tests.support import child, run

OK = "ok"
CASES = {
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
    "rebind": [OK, "EINVAL", "EINVAL"],
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
NEEDS_ROOT = {"drop_before_socket", "drop_after_socket", "other_network"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.root if case in NEEDS_ROOT else ()) for case in CASES])
def test_bind_is_as_ever(case: str) -> None:
    done = run("-q", "-H", "guard", "--", *child("binder"), case)
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == CASES[case]


@pytest.mark.parametrize("case", sorted(CASES.keys() - NEEDS_ROOT))
def test_bind_is_as_ever_without_rights(case: str) -> None:
    """The same below no-new-privileges, and with a flip that cannot hide its sockets' owner."""
    done = run("-q", "-H", "guard", "--", *child("binder"), case, prefix=child("without_rights"))
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == CASES[case]
