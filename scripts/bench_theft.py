#!/usr/bin/env python3
"""Whether thieves get the number of a command that binds it itself: behind portexec's guard, and after close-then-bind.

The command binds its number, listens, and closes again, over and over and on every kind of address, while thieves name that
number without a pause, on every address, with the options that their row says. Root launches one half, an ordinary user the
other: who is not root runs the rows of an ordinary user and its own thieves only. Everybody notes the times of what they
got, on the clock that all processes share, and afterwards the times are laid over each other:

    failed starts    the command's bind or listen was refused, loudly
    guests           a thief listened on the number, for however short a time
    thefts           it did so while the command listened, too, and had not heard of it: two servers on one number in silence
    named            processes that portexec named on stderr as being in the way; it names each of them once

The way of the other tools is beside it: bind 0, close, and let the command bind that number a moment later. Its thieves are
told the number when it is chosen, as everybody is who reads the same port file.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench_common import PORTEXEC, environment, print_table

STRANGER = 65534  # nobody
WITHOUT_RIGHTS = Path(__file__).resolve().parent.parent / "tests" / "children" / "without_rights.py"
ADDRESSES = {
    "127.0.0.1": (socket.AF_INET, "127.0.0.1", None),
    "0.0.0.0": (socket.AF_INET, "0.0.0.0", None),
    "::1": (socket.AF_INET6, "::1", None),
    "[::] both": (socket.AF_INET6, "::", 0),
    "[::] v6only": (socket.AF_INET6, "::", 1),
}
WITHOUT_REUSEPORT = ("-", "a")
WITH_REUSEPORT = ("p", "ap")
SERVING = 0.0002  # seconds for which the command listens, so that thieves come by then, too
HOLDING = 0.005  # seconds for which a thief keeps what it got: the command comes by several times
PATIENCE = 0.02  # seconds for which a thief that could bind tries to listen
LIMIT = 900.0  # seconds after which a thief or a command ends in any case
ANNOUNCED = re.compile(r"^portexec: http://.*:(\d+)$")
IN_THE_WAY = "is shared by another listener"

Row = dict[str, Any]


class Page:
    """Memory that all processes share: the number to go for, and whether to stop."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    @property
    def number(self) -> int:
        return int(struct.unpack_from("=I", self._memory, 0)[0])

    @number.setter
    def number(self, value: int) -> None:
        struct.pack_into("=I", self._memory, 0, value)

    @property
    def is_over(self) -> bool:
        return self._memory[4] != 0

    def stop(self) -> None:
        self._memory[4] = 1


class Kind:
    """A kind of thief: whose process it is, and the options it sets; `known` says that one way in is known and documented."""

    def __init__(self, text: str, *, is_stranger: bool, options: Sequence[str], known: bool = False) -> None:
        self.text = text
        self.is_stranger = is_stranger
        self.options = options
        self.known = known


def kinds(is_root: bool) -> list[Kind]:
    every = (*WITHOUT_REUSEPORT, *WITH_REUSEPORT)
    return [
        Kind("another user, any options", is_stranger=True, options=every),
        Kind("same user, no SO_REUSEPORT", is_stranger=False, options=WITHOUT_REUSEPORT),
        Kind("same user, SO_REUSEPORT", is_stranger=False, options=WITH_REUSEPORT, known=not is_root),
    ]


def main() -> None:
    if sys.argv[1:2] == ["--thief"]:
        return steal(Page(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","), float(sys.argv[5]))
    if sys.argv[1:2] == ["--command"]:
        return bind_over_and_over(int(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--binds", type=int, default=20_000, help="admitted binds in each row (default %(default)s)")
    parser.add_argument("--thieves", type=int, default=2, help="processes in each row (default %(default)s)")
    parser.add_argument("--launches", type=int, default=500, help="of close-then-bind in each row (default %(default)s)")
    chosen = parser.parse_args()
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{chosen.thieves} thieves in each row, {os.cpu_count()} processors, load average {load} at the beginning")
    compare_guard(chosen.binds, chosen.thieves)
    compare_close_then_bind(chosen.launches, chosen.thieves)
    return None


def compare_guard(binds: int, thieves: int) -> None:
    print(f"\nportexec --hand-off guard: {binds} times bind, listen, close\n")
    rows = []
    for launcher, prefix in launchers().items():
        for kind in kinds(launcher == "root"):
            if may_run(kind):
                rows.append([f"{launcher}: {kind.text}", *guard_row(prefix, kind, binds, thieves)])
    header = ["launcher: thieves", "binds", "tries", "failed starts", "target", "guests", "target", "thefts", "target", "named"]
    header += ["seconds"]
    print_table(header, rows)
    print(
        "\nknown: a process of the same user that sets SO_REUSEPORT and comes within the microseconds of an admission can get\n"
        "in, unless root launches; the command's start is to fail then, and portexec to name the process. Since its thieves\n"
        "lose hardly a start, that row ends after a tenth of the turns."
    )


def launchers() -> dict[str, list[str]]:
    """Who launches, and the words before portexec that make it so."""
    if os.geteuid():
        return {"ordinary user": []}
    return {"root": [], "ordinary user": [sys.executable, str(WITHOUT_RIGHTS)]}


def may_run(kind: Kind) -> bool:
    if kind.is_stranger and os.geteuid():
        print(f"left out, since it takes root to become another user: {kind.text}\n")
        return False
    return True


def guard_row(prefix: Sequence[str], kind: Kind, binds: int, count: int) -> list[str]:
    begin = time.monotonic()
    with shared_page() as (page, path), tempfile.TemporaryFile("w+") as errors:
        turns = max(binds // 10, 100) if kind.known else binds + 1000
        words = [*prefix, PORTEXEC, "-H", "guard", "--", *myself("--command", binds, turns)]
        with started(words, stderr=errors) as launch:
            page.number = number_announced(launch, errors)
            with ExitStack() as stack:
                gang = [
                    stack.enter_context(thief(path, kind, HOLDING, () if kind.is_stranger else prefix)) for _ in range(count)
                ]
                tell(launch)
                command = json.loads(read_line(launch))
                page.stop()
                loot = [json.loads(read_line(one)) for one in gang]
        errors.seek(0)
        named = errors.read().count(IN_THE_WAY)
    guests = [got for one in loot for got in one["got"]]
    target = "known" if kind.known else "0"
    tries = sum(one["tries"] for one in loot)
    thefts = count_thefts(command["served"], guests)
    told = [len(command["served"]), tries, len(command["failed"]), target, len(guests), target, thefts, 0, named]
    return [*map(str, told), f"{time.monotonic() - begin:.0f}"]


def compare_close_then_bind(launches: int, thieves: int) -> None:
    print(f"\nclose-then-bind, the way of the other tools: {launches} launches on 127.0.0.1\n")
    rows = []
    for kind in kinds(os.geteuid() == 0):
        if not may_run(kind):
            continue
        for text, moment in (("at once", 0.0), ("after 1 ms", 0.001), ("after 20 ms", 0.02)):
            rows.append([f"{kind.text}, bound again {text}", *close_then_bind_row(kind, moment, launches, thieves)])
    print_table(["thieves", "launches", "failed starts", "guests", "thefts"], rows)


def close_then_bind_row(kind: Kind, moment: float, launches: int, count: int) -> list[str]:
    served: list[list[float]] = []
    failed: list[list[float]] = []
    with shared_page() as (page, path), ExitStack() as stack:
        gang = [stack.enter_context(thief(path, kind, 2 * moment + HOLDING)) for _ in range(count)]
        for _ in range(launches):
            page.number = choose_and_close()
            time.sleep(moment)
            bind_once("127.0.0.1", page.number, "a", served, failed)
            page.number = 0
        page.stop()
        loot = [json.loads(read_line(one)) for one in gang]
    guests = [got for one in loot for got in one["got"]]
    return [str(launches), str(len(failed)), str(len(guests)), str(count_thefts(served, guests))]


def choose_and_close() -> int:
    """What this script warns of."""
    with socket.socket() as chooser:
        chooser.bind(("127.0.0.1", 0))
        return int(chooser.getsockname()[1])


def count_thefts(served: list[list[float]], guests: list[list[float]]) -> int:
    """How many listeners of thieves were on a number while the command listened on it in peace.

    All are triples of number, begin and end. Those of the command follow one another.
    """
    return sum(any(guest[0] == own[0] and own[1] <= guest[2] for own in next_served(served, guest)) for guest in guests)


def next_served(served: list[list[float]], guest: list[float]) -> list[list[float]]:
    """The first time of the command that ends after the guest came, as a list, or none."""
    at = bisect_left(served, guest[1], key=lambda own: own[2])
    return served[at : at + 1]


def bind_over_and_over(binds: int, turns: int) -> None:
    """The command: as many servers one after the other, each on the next address, every second round with SO_REUSEADDR."""
    number = int(os.environ["PORT"])
    served: list[list[float]] = []
    failed: list[list[float]] = []
    end = time.monotonic() + LIMIT
    addresses = available_addresses()
    sys.stdin.readline()
    turn = 0
    while len(served) < binds and turn < turns and time.monotonic() < end:
        address = addresses[turn % len(addresses)]
        bind_once(address, number, "-a"[turn // len(addresses) % 2], served, failed)
        turn += 1
    print(json.dumps({"served": served, "failed": failed}), flush=True)
    sys.stdin.read()  # with the command the guard ends, which thieves may not see before they are stopped


def available_addresses() -> list[str]:
    """Those of ADDRESSES that this machine has."""
    found = []
    for address in ADDRESSES:
        try:
            with new_socket(address, "-") as probe:
                probe.bind((ADDRESSES[address][1], 0))
        except OSError:
            continue
        found.append(address)
    return found


def bind_once(address: str, number: int, options: str, served: list[list[float]], failed: list[list[float]]) -> None:
    """One server, from bind to close; its time goes to `served` or to `failed`."""
    begin = time.monotonic()
    with new_socket(address, options) as server:
        try:
            server.bind((ADDRESSES[address][1], number))
            server.listen()
        except OSError:
            failed.append([number, begin, time.monotonic()])
            return
        begin = time.monotonic()
        time.sleep(SERVING)
        served.append([number, begin, time.monotonic()])


def steal(page: Page, user: int, options: list[str], holding: float) -> None:
    """The thief: go for the number on the page until told to stop; print what was got, and how often it was tried."""
    if user != os.geteuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    end = time.monotonic() + LIMIT
    takers = [(address, some, new_socket(address, some)) for address in available_addresses() for some in options]
    got: list[list[float]] = []
    tries = 0
    print("ready", flush=True)
    while not page.is_over and time.monotonic() < end:
        number = page.number
        if not number:
            os.sched_yield()
            continue
        for index, (address, some, taker) in enumerate(takers):
            tries += 1
            try:
                taker.bind((ADDRESSES[address][1], number))
            except OSError:
                continue  # the socket is as it was, and good for the next try
            got += listen_and_hold(taker, number, page, holding)
            taker.close()
            takers[index] = (address, some, new_socket(address, some))
    print(json.dumps({"got": got, "tries": tries}), flush=True)


def listen_and_hold(taker: socket.socket, number: int, page: Page, holding: float) -> list[list[float]]:
    """What a thief makes of a number that it could bind: from when to when it listened, if it could."""
    begin = time.monotonic()
    while time.monotonic() < begin + PATIENCE and page.number == number and not page.is_over:
        before = time.monotonic()
        try:
            taker.listen()
        except OSError:
            continue
        while time.monotonic() < before + holding and page.number == number and not page.is_over:
            pass
        return [[number, before, time.monotonic()]]
    return []


def new_socket(address: str, options: str) -> socket.socket:
    family, _, v6only = ADDRESSES[address]
    made = socket.socket(family, socket.SOCK_STREAM)
    if v6only is not None:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, "a" in options)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, "p" in options)
    return made


@contextmanager
def shared_page() -> Iterator[tuple[Page, str]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        yield Page(file.name), file.name


@contextmanager
def thief(path: str, kind: Kind, holding: float, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    user = STRANGER if kind.is_stranger else os.geteuid()
    with started([*prefix, *myself("--thief", path, user, ",".join(kind.options), holding)]) as process:
        if read_line(process) != "ready":
            raise RuntimeError("a thief did not start")
        yield process


def myself(*words: object) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


@contextmanager
def started(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, for as long as the block lasts."""
    process = subprocess.Popen(
        words,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def number_announced(launch: subprocess.Popen[str], errors: Any) -> int:
    """The number in the announcement of a launch whose stderr goes to this file."""
    end = time.monotonic() + 20
    while time.monotonic() < end and launch.poll() is None:
        errors.seek(0)
        for line in errors:
            if found := ANNOUNCED.match(line):
                return int(found.group(1))
        time.sleep(0.01)
    errors.seek(0)
    raise RuntimeError(f"portexec did not start the command:\n{errors.read()}")


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


if __name__ == "__main__":
    main()
