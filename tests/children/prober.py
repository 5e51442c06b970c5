"""Tries to have a number in every way that a process of this user has: `prober.py UID OPTIONS [mptcp]`.

For each number on stdin, one a line, it names the number with seven addresses and each of the OPTIONS (see thief.py), binds,
and listens where it is bound. It prints a JSON list of what it got, and how often it tried.
"""

from __future__ import annotations

import os
import sys

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]
from thief import ADDRESSES, become  # type: ignore[import-not-found]

MPTCP = 262


def attempt(number, address, options, protocol):
    family, host, v6only = ADDRESSES[address]
    with socket.socket(family, socket.SOCK_STREAM, protocol) as made:
        if v6only is not None:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, "a" in options)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, "p" in options)
        try:
            made.bind((host, number))
        except OSError:
            return ""
        try:
            made.listen()
        except OSError:
            return "bound"
        return "listens"


def main():
    user, allowed, *more = sys.argv[1:]
    if int(user) != os.geteuid():
        become(int(user))
    ways = [(a, o, p) for a in ADDRESSES for o in allowed.split(",") for p in ((0, MPTCP) if more else (0,))]
    for line in sys.stdin:
        got = [[*way, what] for way in ways if (what := attempt(int(line), *way))]
        print(json.dumps([len(ways), got]), flush=True)


main()
