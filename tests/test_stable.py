"""`stable`: the same number each time, computed from the project, the run and the listener."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import portexec
from portexec.binding.spec import parse_listen
from portexec.binding.stable import FEWEST, HIGHEST, HOW_MANY, LOWEST, candidates, highest_number, named_services, settled
from portexec.project import digest
from tests.support import run
from tests.support.names import detach, started

pytestmark = pytest.mark.usefixtures("registry", "stable_numbers")

SERVICES = "# a comment 10002/tcp\nndmp\t\t10000/tcp  # the name\nwebmin 10001/udp\nmalformed\nalso malformed/tcp\n"


def test_ten_thousand_projects_are_spread_evenly() -> None:
    """The numbers of a hundred equal parts of the range are as far from equal as those of dice are."""
    found = Counter(
        (candidates(digest(f"/home/somebody/project-{number}", "", "listener1"), HIGHEST, set())[0] - LOWEST) * 100 // 22768
        for number in range(10_000)
    )
    squares = sum((found[part] - 100) ** 2 / 100 for part in range(100))
    assert 60 < squares < 150, "chi-square with 99 degrees of freedom: 60 to 150 in all but one of 1,000 cases"


@pytest.mark.parametrize(
    ("what", "highest", "taken", "numbers"),
    [
        (0, 20000, set(), (10000, 10001, 10002, 10003)),
        (5, 20000, {10006}, (10005, 10007, 10008, 10009)),
        (79, 20000, set(), (10079, 10081, 10082, 10083)),
        (80, 20000, set(), (10081, 10082, 10083, 10084)),
        (10000, 20000, {20000}, (10000, 10001, 10002, 10003)),
        (9999, 20000, set(), (19999, 20000, 10000, 10001)),
        (10001 * 7 + 3, 20000, set(), (10003, 10004, 10005, 10006)),
    ],
)
def test_the_candidates(what: int, highest: int, taken: set[int], numbers: tuple[int, ...]) -> None:
    assert candidates(what, highest, taken) == numbers


def test_numbers_that_nobody_gets() -> None:
    taken = set(range(10500, 10600))
    every = {number for what in range(5000) for number in candidates(what, LOWEST + FEWEST, taken)}
    assert every == set(range(LOWEST, LOWEST + FEWEST + 1)) - taken - {10080}


@pytest.mark.parametrize(
    ("ephemeral", "highest"),
    [
        ((32768, 60999), 32767),
        ((49152, 65535), 49151),
        ((1024, 65535), 32767),
        ((10000, 60999), 32767),
        ((11023, 60999), 32767),
        ((11024, 60999), 11023),
        (None, 32767),
    ],
)
def test_the_ephemeral_range_is_left_out_if_it_leaves_enough(ephemeral: tuple[int, int] | None, highest: int) -> None:
    assert highest_number(ephemeral) == highest


def test_services() -> None:
    assert sorted(named_services(SERVICES)) == [10000, 10001]


@pytest.mark.parametrize(
    ("text", "address"), [("stable", "127.0.0.1"), ("*:stable", "*"), ("stable,0", "127.0.0.1"), ("8000,stable", "127.0.0.1")]
)
def test_the_spec(text: str, address: str) -> None:
    (spec,) = parse_listen([text])
    assert spec.address == address
    assert str(spec) == (text if ":" in text else f"{address}:{text}")
    assert list(spec.settled((5, 6)).numbers()) == [
        number for part in text.rpartition(":")[2].split(",") for number in ([5, 6] if part == "stable" else [int(part)])
    ]


def port(*words: str, **options: Any) -> int:
    result = run("-l", "stable", *words, "-q", "-H", "fd", "--", "printenv", "PORT", **options)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def candidates_here() -> list[int]:
    """The numbers of a listener without a name, of a run without a name of this project."""
    (spec,) = settled(parse_listen(["stable"]), None, os.environ)
    numbers = list(spec.numbers())
    assert len(numbers) == HOW_MANY
    return numbers


def test_the_same_each_time(tmp_path: Path) -> None:
    """For this project, wherever below it; another number for another project, run and listener."""
    (tmp_path / "other").mkdir()
    Path(".git").mkdir()
    Path("below").mkdir()
    assert port() == port() == port(cwd="below") == port("--project", ".")
    assert 10000 <= port() <= HIGHEST
    assert len({port(), port(cwd=tmp_path / "other"), port("--name", "web"), port("--name", "api")}) == 4
    shown = run("-l", "a=stable", "-l", "b=stable", "-q", "-H", "fd", "--", "sh", "-c", "echo $A_PORT $B_PORT").stdout.split()
    assert len(set(shown)) == 2


def test_two_servers_of_one_project_find_their_numbers_again() -> None:
    first = {name: started(name, "-l", "stable") for name in ("web", "api")}
    for name in first:
        run("--stop", name)
    assert {name: started(name, "-l", "stable") for name in ("api", "web")} == first


def test_when_it_is_taken() -> None:
    mine = port()
    with socket.create_server(("127.0.0.1", mine)):
        result = run("-l", "stable", "-H", "fd", "--", "printenv", "PORT")
        assert result.returncode == 0
        assert int(result.stdout) in candidates_here()[1:]
        note, announced = result.stderr.splitlines()
        owner = f"pid {os.getpid()}, "
        assert re.fullmatch(rf"portexec: note: the stable port, {mine}, is taken \({owner}.*\)", note)
        assert announced.endswith(f":{int(result.stdout)}")


def test_when_it_is_taken_from_one_in_the_background() -> None:
    """The line is for who has started it, and not for the log alone."""
    mine = port("--name", "web")
    with socket.create_server(("127.0.0.1", mine)):
        result = detach("web", "-l", "stable")
    assert result.returncode == 0
    assert result.stderr.startswith(f"portexec: note: the stable port, {mine}, is taken (pid {os.getpid()}, ")
    assert result.stderr.count("\n") == 1


def test_no_silent_fall_to_any() -> None:
    mine = port()
    sockets = []
    try:
        for number in candidates_here():
            try:
                sockets.append(socket.create_server(("127.0.0.1", number)))
            except OSError:
                pass
        result = run("-l", "stable", "-H", "fd", "--", "true")
        assert result.returncode == 125
        first, hint = result.stderr.splitlines()
        assert first.startswith(f"portexec: error: no free port for 127.0.0.1:stable: {mine}: Address already in use (pid ")
        assert hint == "portexec: hint: add `,0` for any other free port: 127.0.0.1:stable,0"
        assert run("-l", "stable,0", "-q", "-H", "fd", "--", "true").returncode == 0
    finally:
        for each in sockets:
            each.close()


def test_of_the_python_api() -> None:
    with portexec.listen("stable") as one:
        number = one.getsockname()[1]
    assert number == port()


def test_a_project_that_is_not_there() -> None:
    result = run("-l", "stable", "--project", "/no/such", "--", "true")
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        125,
        "portexec: error: --project '/no/such' is not a directory",
    )
