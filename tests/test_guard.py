"""The hand-off `guard`, case by case: an unmodified program binds its number in every way, and nothing is different.

The cases are those in which replacing the command's socket, a thread id taken for a process id, or a handler that fails would
show. Refused system calls, older kernels' seccomp, signals, io_uring and 32-bit programs are in test_guard_faults, gates in
test_admission. Other kernels are tried by scripts/try_kernels.sh, with the same cases.
"""

from __future__ import annotations

import json

import pytest

from tests.support import child, run
from tests.support.binds import CASES, GATED_BEFORE_6_9, kernel_version

NEEDS_ROOT = {"drop_before_socket", "drop_after_socket", "other_network"}


def binder(case: str) -> list[str]:
    """The words that run the case. What is gated on this kernel sets SO_REUSEADDR, as most servers do."""
    return [*child("binder"), case, *(["reuse"] if case in GATED_BEFORE_6_9 and kernel_version() < (6, 9) else [])]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.root if case in NEEDS_ROOT else ()) for case in CASES])
def test_bind_is_as_ever(case: str) -> None:
    done = run("-q", "-H", "guard", "--", *binder(case))
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == CASES[case]


@pytest.mark.parametrize("case", sorted(CASES.keys() - NEEDS_ROOT))
def test_bind_is_as_ever_without_rights(case: str) -> None:
    """The same below no-new-privileges, and with a flip that cannot hide its sockets' owner."""
    done = run("-q", "-H", "guard", "--", *binder(case), prefix=child("without_rights"))
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == CASES[case]
