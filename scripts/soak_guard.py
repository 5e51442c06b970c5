"""Plays random sequences of binds, listens, connections and ends below portexec, and probes the number after every step.

    soak_guard.py [--seconds 60] [--steps N] [--seed N] [--mptcp] [CAST]...

The casts are those of tests/support/guard_world.py. After every step another user and the same one try to have the number, on
seven addresses with every option. What the command got is compared with the same sequence in a process of its own, without
portexec. Needs root. Prints for each cast how many attempts there were by whom, what came of them, and where the command met
something else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.guard_world import CASTS, KINDS, SEQUENCES, Cast, house, staged
from tests.support.guard_world import Sequence as Played

LONGEST = 25  # steps of a sequence
SHOWN = 5  # sequences that are printed of each kind of finding


def play(cast: Cast, home: str, arguments: argparse.Namespace, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """Play until the time or the steps are over."""
    count: Counter[str] = Counter()
    findings: list[str] = []
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end and count["steps"] < arguments.steps:
        with staged(cast, home, with_mptcp=arguments.mptcp) as stage:
            for number in range(SEQUENCES):
                if time.monotonic() > end or count["steps"] >= arguments.steps:
                    break
                played = Played(stage, number % KINDS)
                for _ in range(chance.randint(3, LONGEST)):
                    played.step(chance)
                    count["steps"] += 1
                played.end()
                count["sequences"] += 1
                if played.explained:
                    count[played.explained] += 1
                for kind, text in played.findings:
                    count[kind] += 1
                    if count[kind] <= SHOWN:
                        findings.append(f"{kind}: {text}")
            count.update({f"attempts by {who}": number for who, number in stage.attempts.items()})
    return count, findings


def main() -> None:
    """Play every cast that was named, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each cast")
    parser.add_argument("--steps", type=int, default=10**9, help="for each cast")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--mptcp", action="store_true", help="probe with MPTCP sockets, too")
    parser.add_argument("casts", nargs="*", metavar="CAST")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    with house() as home:
        for name in arguments.casts or CASTS:
            count, findings = play(CASTS[name], home, arguments, random.Random(seed))
            print(json.dumps({"cast": name, **count}), flush=True)
            print("".join(f"    {finding}\n" for finding in findings), end="", flush=True)


if __name__ == "__main__":
    main()
