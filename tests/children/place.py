"""Run a command with an open descriptor under another number: `place.py FROM TO COMMAND [ARG]...`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    source, target = map(int, sys.argv[1:3])
    if source != target:
        os.dup2(source, target, inheritable=True)
        os.close(source)
    os.execv(sys.argv[3], sys.argv[3:])


main()
