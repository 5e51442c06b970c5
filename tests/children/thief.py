"""Tries to take one TCP number from whoever holds it, by every way a process has, and prints as JSON what came of it.

    thief.py all NUMBER OPTIONS...          every way with these OPTIONS, and then with the next; prints a list of attempts
    thief.py connect NUMBER OPTIONS         of these ways, only to connect from it
    thief.py udp NUMBER                     the same number for UDP, which is no theft
    thief.py keep NUMBER ADDRESS OPTIONS    takes it, prints the attempt, and keeps it until stdin ends
    thief.py hammer NUMBER COUNT OPTIONS    prints `ready`, names the number COUNT times with all addresses and with the
                                            OPTIONS given, prints the attempts that got it and how many there were
    thief.py spin COUNT                     prints `ready`, takes and drops numbers at random, COUNT at the most; for each line
                                            of numbers on stdin, prints the attempts at them, as `all` does

An attempt is {"way", "address", "reuse_addr", "reuse_port", "got", "why"}; "why" is the name of the error that refused it.
OPTIONS are letters: `a` for SO_REUSEADDR, `p` for SO_REUSEPORT, `-` for none; but for `keep` there may be several of them,
separated by commas.
`--as UID` before all that makes the process that user's, once Python runs: another user may not be able to start the
Python of a virtual environment.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import sys
from _collections_abc import Callable, Iterator

import quick_json as json  # type: ignore[import-not-found]
import quick_socket as socket  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Attempt = dict[str, object]

ADDRESSES = {
    "127.0.0.1": (socket.AF_INET, "127.0.0.1", None),
    "127.0.0.2": (socket.AF_INET, "127.0.0.2", None),
    "0.0.0.0": (socket.AF_INET, "0.0.0.0", None),
    "::1": (socket.AF_INET6, "::1", None),
    "[::] both": (socket.AF_INET6, "::", 0),
    "[::] v6only": (socket.AF_INET6, "::", 1),
    "::ffff:127.0.0.1": (socket.AF_INET6, "::ffff:127.0.0.1", 0),
}
BOTH_FAMILIES = "[::] both"
OPTIONS = ["-", "a", "p", "ap"]
IP_BIND_ADDRESS_NO_PORT = 24  # ip(7)
IP_LOCAL_PORT_RANGE = 51  # ip(7), Linux 6.3
MANY = 250  # numbers that are taken at once, well below the usual limit of 1024 descriptors


def main() -> None:
    """Do what the words of the command line say."""
    words = sys.argv[1:]
    if words[0] == "--as":
        become(int(words[1]))
        words = words[2:]
    way, *words = words
    if way == "all":
        say([found for allowed in words[1:] for found in every_way(int(words[0]), allowed.split(","))])
    elif way == "connect":
        say(list(connect_from_its_range(int(words[0]), words[1].split(","))))
    elif way == "udp":
        say(bind_udp(int(words[0])))
    elif way == "keep":
        keep(int(words[0]), words[1], words[2])
    elif way == "hammer":
        hammer(int(words[0]), int(words[1]), words[2].split(","))
    else:
        spin(int(words[0]))


def become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def every_way(number: int, allowed: list[str]) -> Iterator[Attempt]:
    yield from name_it(number, allowed)
    yield from name_it_in_two_steps(number, allowed)
    yield from bind_zero_in_its_range(number, allowed)
    yield from connect_from_its_range(number, allowed)
    yield from bind_zero_many_times(number, allowed)
    yield from connect_many_times(number, allowed)
    yield from name_it(number, allowed)  # again, with all that the earlier attempts left behind in the kernel


def name_it(number: int, allowed: list[str]) -> Iterator[Attempt]:
    for address in ADDRESSES:
        for options in allowed:
            with new_socket(address, options) as taker:
                yield attempt("named", address, options, bind_and_listen(taker, address, number))


def name_it_in_two_steps(number: int, allowed: list[str]) -> Iterator[Attempt]:
    """Bind an address that does not conflict with the holder's, so that the kernel caches it, then both families.

    The second socket may pass the kernel's check by way of that cache, sk_reuseport_match() in its inet_connection_sock.c.
    """
    for address in ADDRESSES:
        for options in (some for some in allowed if "p" in some):
            with new_socket(address, options) as first, new_socket(BOTH_FAMILIES, options) as second:
                why = error_of(first.bind, (ADDRESSES[address][1], number))
                yield attempt("first of two", address, options, why)
                yield attempt("second of two", BOTH_FAMILIES, options, bind_and_listen(second, BOTH_FAMILIES, number))


def bind_zero_in_its_range(number: int, allowed: list[str]) -> Iterator[Attempt]:
    """Let the kernel choose, where there is nothing to choose but this number."""
    for address in ADDRESSES:
        for options in allowed:
            with new_socket(address, options) as taker:
                if not narrow(taker, number):
                    return
                why = bind_and_listen(taker, address, 0)
                yield attempt("bind 0", address, options, why or ("" if number_of(taker) == number else "ANOTHER"))


def connect_from_its_range(number: int, allowed: list[str]) -> Iterator[Attempt]:
    """Connect where this number is the only one to connect from: to a server of ours, and to the number itself."""
    for host in ("127.0.0.1", "::1"):
        with server(host) as own:
            for target in (number_of(own), number):
                for options in allowed:
                    with new_socket(host, options) as client:
                        client.settimeout(5)
                        if not narrow(client, number):
                            return
                        client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                        why = error_of(client.connect, (host, target))
                        yield attempt("connect", host, options, why)


def bind_zero_many_times(number: int, allowed: list[str]) -> Iterator[Attempt]:
    """Take many numbers at once, as the kernel gives them."""
    for address in ADDRESSES:
        for options in allowed:
            takers = [new_socket(address, options) for _ in range(MANY // 5)]
            failures = [bind_and_listen(taker, address, 0) for taker in takers]
            got = any(number_of(taker) == number for taker in takers)
            yield attempt("many bind 0", address, options, "" if got else max(failures) or "ANOTHER")
            for taker in takers:
                taker.close()


def connect_many_times(number: int, allowed: list[str]) -> Iterator[Attempt]:
    """Open many connections at once, which take their own ends' numbers as the kernel gives them."""
    with server("127.0.0.1") as own:
        for options in allowed:
            clients = [new_socket("127.0.0.1", options) for _ in range(MANY)]
            failures = [error_of(client.connect, own.getsockname()) for client in clients]
            got = any(number_of(client) == number for client in clients)
            yield attempt("many connect", "127.0.0.1", options, "" if got else max(failures) or "ANOTHER")
            for client in clients:
                client.close()


def bind_udp(number: int) -> Attempt:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taker:
        return attempt("udp", "0.0.0.0", "-", error_of(taker.bind, ("0.0.0.0", number)))


def keep(number: int, address: str, options: str) -> None:
    with new_socket(address, options) as taker:
        say(attempt("named", address, options, bind_and_listen(taker, address, number)))
        sys.stdin.read()


def hammer(number: int, count: int, allowed: list[str]) -> None:
    print("ready", flush=True)
    got = []
    done = 0
    while done < count:
        for address in ADDRESSES:
            for options in allowed:
                done += 1
                with new_socket(address, options) as taker:
                    why = bind_and_listen(taker, address, number)
                    if not why:
                        got.append(attempt("named", address, options, why))
    say({"tried": done, "got": got})


def spin(count: int) -> None:
    print("ready", flush=True)
    lowest, highest = (int(word) for word in open("/proc/sys/net/ipv4/ip_local_port_range").read().split())
    for _ in range(count):
        if select.select([0], [], [], 0)[0]:
            line = sys.stdin.buffer.raw.readline()  # type: ignore[union-attr]  # unbuffered, so that select knows all
            if not line:
                return
            say([found for number in json.loads(line) for found in name_it(number, OPTIONS)])
        address, options = choose([*ADDRESSES]), choose(OPTIONS)
        with new_socket(address, options) as taker:
            bind_and_listen(taker, address, choose((0, choose(range(lowest, highest + 1)))))
    raise RuntimeError(f"nobody ended stdin in {count} turns")


def choose(things: Any) -> Any:
    """One of them at random; without `random`, which takes long to import, and which another user may not be able to read."""
    return things[int.from_bytes(os.urandom(4), "big") % len(things)]


def server(host: str) -> socket.socket:
    """A server of our own to connect to; where its family is missing, connecting to it fails like everything else."""
    own = new_socket(host, "-")
    bind_and_listen(own, host, 0)
    return own


def new_socket(address: str, options: str) -> socket.socket:
    family, _, v6only = ADDRESSES[address]
    made = socket.socket(family, socket.SOCK_STREAM)
    if v6only is not None:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, "a" in options)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, "p" in options)
    return made


def bind_and_listen(taker: socket.socket, address: str, number: int) -> str:
    return error_of(taker.bind, (ADDRESSES[address][1], number)) or error_of(taker.listen, 4096)


def narrow(taker: socket.socket, number: int) -> bool:
    """Leave the kernel only this number to choose from; false where it knows no such option, be it that it does not say so."""
    wanted = struct.pack("I", number << 16 | number)
    try:
        taker.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, wanted)
        return bool(taker.getsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, len(wanted)) == wanted)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return False


def number_of(taker: socket.socket) -> int:
    return int(taker.getsockname()[1])


def error_of(call: Callable[..., object], argument: object) -> str:
    try:
        call(argument)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def attempt(way: str, address: str, options: str, why: str) -> Attempt:
    return {
        "way": way,
        "address": address,
        "reuse_addr": "a" in options,
        "reuse_port": "p" in options,
        "got": not why,
        "why": why,
    }


if __name__ == "__main__":
    main()
