"""docs/several-machines.md, run: two machines in network namespaces, with real tools on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import DEADLINE, child, run, wait_for
from tests.support.hosts import hosts
from tests.support.installed import need, program
from tests.support.recipes import Recipe, sections, written

pytestmark = [pytest.mark.once, pytest.mark.root]

PAGE = "several-machines.md"
TESTED = {"A Dask cluster", "Registration in etcd", "torchrun's rendezvous"}  # the last by scripts/try_recipes.sh


def test_every_section_is_run() -> None:
    assert set(sections(PAGE)) == TESTED


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[list[str]]]:
    with hosts(tmp_path, "node1", "node2") as found:
        yield found


def test_an_address_that_leads_here(machines: list[list[str]]) -> None:
    """The other machine reaches the server at what it was told, and not without `--host`."""
    first, second = machines
    server = ["python3", "-m", "http.server", "{port}"]
    for told in ("node1", "10.77.0.1"):
        ask = f"{' '.join(second)} curl -sf {{url}} >/dev/null"
        done = run("-q", "-l", "*", "--host", told, "--then", ask, "--", *server, prefix=first)
        assert done.returncode == 0, done.stderr
    done = run("-q", "-l", "*", "--then", ask, "--", *server, prefix=first)
    assert done.returncode == 7, "curl cannot connect"


def test_dask(machines: list[list[str]], tmp_path: Path) -> None:
    need(["dask"])
    first, second = machines
    recipe = Recipe(PAGE, "A Dask cluster", tmp_path)
    recipe.find_first(Path(program("dask")).resolve().parent)  # with a python3 that has it
    with recipe.serving("portexec -l '*' -l dashboard='*' --host node1", on=first) as scheduler:
        scheduler.line("portexec: listener1 http://node1:")
        scheduler.line("Scheduler at:")
        with recipe.started(recipe.take(), on=second) as worker:
            written(worker, "Registered to:")
            assert recipe.run(on=second).endswith("6\n")
    assert not recipe.left
    assert not (tmp_path / "scheduler.env").exists()


def test_etcd(machines: list[list[str]], tmp_path: Path) -> None:
    need(["etcd", "etcdctl"])
    first, second = machines
    recipe = Recipe(PAGE, "Registration in etcd", tmp_path)
    start, look, etcd, where = recipe.left
    recipe.left = [etcd, where, start, look]
    try:
        recipe.run("portexec --detach --name etcd", on=first)
        recipe.environment["ETCDCTL_ENDPOINTS"] = recipe.run(on=first).strip()
        with recipe.serving("portexec", on=first) as server:
            told = server.url()
            assert told.startswith("http://node1:")
            wait_for(lambda: recipe.end_of(look, on=second).stdout == f"{told}\n")
            server.stop()
        assert recipe.run("etcdctl get", on=second) == ""
        recipe.left = [start.replace("python3 -m http.server {port}", " ".join([*child("light"), "host=0.0.0.0"]))]
        with recipe.serving("portexec", on=first) as server:
            told = server.url()
            wait_for(lambda: recipe.end_of(look, on=second).stdout == f"{told}\n")
            recipe.end_of(f"curl -s {told}/exit/3", on=second)
            server.line("^portexec: error: the server ended before the tests did: exit status 3$")
            assert server.process.wait(DEADLINE) == 125
        assert recipe.end_of(look, on=second).stdout == ""
    finally:
        recipe.end_of("portexec --stop etcd", on=first)
