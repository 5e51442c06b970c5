"""Run a command with the rights of an ordinary user: root without its capabilities, or whoever it is.

Not another user, since that one may not be able to read the Python that runs the tests.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while os.geteuid() == 0 and libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        # exec gives root what is left in the bounding set, which is nothing then; see capabilities(7).
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            sys.exit(f"cannot drop capability {capability}: {os.strerror(ctypes.get_errno())}")
        capability += 1
    os.execv(sys.argv[1], sys.argv[1:])


main()
