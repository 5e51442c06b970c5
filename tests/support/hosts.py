"""Machines of a test's own: network namespaces with an address and a name each, on one wire. Only root can make them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.installed import need
from tests.support.waiting import DEADLINE

NETWORK = "10.77.0"
_HOLD = 'hostname "$1" && mount --bind "$0" /etc/hosts && ip link set lo up && echo ready && exec cat'


@contextmanager
def hosts(folder: Path, *names: str) -> Iterator[list[list[str]]]:
    """Machines with these names, 10.77.0.1 and following; yields the words that run a command on each, in this folder."""
    need(["unshare", "nsenter", "ip"])
    table = folder / "hosts"
    addresses = {name: f"{NETWORK}.{position}" for position, name in enumerate(names, 1)}
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()))
    with ExitStack() as stack:
        holders = {name: stack.enter_context(_holder(table, name)) for name in names}
        switch = holders[names[0]]
        _on(switch, "ip link add wire type bridge")
        _on(switch, "ip link set wire up")
        for position, (name, pid) in enumerate(holders.items()):
            _on(switch, f"ip link add plug{position} type veth peer name eth0 netns {pid}")
            _on(switch, f"ip link set plug{position} up master wire")
            _on(pid, f"ip addr add {addresses[name]}/24 dev eth0")
            _on(pid, "ip link set eth0 up")
        yield [["nsenter", "-t", str(pid), "-n", "-m", "-u", "env", "-C", str(folder)] for pid in holders.values()]


@contextmanager
def _holder(table: Path, name: str) -> Iterator[int]:
    """A process that keeps its namespaces while its input is open; its pid."""
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", _HOLD, str(table), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.communicate(timeout=DEADLINE)


def _on(pid: int, command: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", *command.split()], check=True, timeout=DEADLINE)
