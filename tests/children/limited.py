"""Run a command under a resource limit: `limited.py NOFILE 6 COMMAND [ARG]...`."""

from __future__ import annotations

import os
import resource
import sys


def main() -> None:
    name, value, *command = sys.argv[1:]
    number = int(value)
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (number, number))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the limit could cut off a file that outlives the test
    os.execv(command[0], command)


main()
