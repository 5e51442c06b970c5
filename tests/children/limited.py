"""Run a command under a resource limit: `limited.py NOFILE 6 COMMAND [ARG]...`.

The command's memory is laid out the same way each time, so that it runs into the limit at the same place. Where the kernel
does not grant that, as in some containers, the place changes a little from run to run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h


def main() -> None:
    name, value, *command = sys.argv[1:]
    number = int(value)
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the limit could cut off a file that outlives the test
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (number, number))
    os.execv(command[0], command)


main()
