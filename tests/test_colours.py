"""Colours, where they are wanted: for the words `error` and `hint`, for addresses and names, and for nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import PORTEXEC, names, run
from tests.support.terminals import terminal_with

COLOUR = re.compile(r"\x1b\[[\d;]*m")
PAINTED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m")
ENDED = r"(?s)(.*)ended\r\n$"

# Variables, and whether there are colours: on a terminal, and elsewhere.
WANTED = [
    ({"TERM": "xterm"}, True, False),
    ({"TERM": "xterm-256color", "NO_COLOR": ""}, True, False),
    ({"TERM": "dumb"}, False, False),
    ({}, False, False),
    ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
    ({"TERM": "xterm", "FORCE_COLOR": "1"}, True, True),
    ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
    ({"FORCE_COLOR": ""}, False, False),
    ({"TERM": "xterm", "FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
]
wanted = pytest.mark.parametrize(("variables", "on_terminal", "elsewhere"), WANTED, ids=str)


@pytest.fixture
def surroundings(registry: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def on_a_terminal(*words: str) -> str:
    """All that portexec writes to a terminal."""
    shell = ["/bin/sh", "-c", '"$@"; echo ended', "sh"]
    with terminal_with(*shell, *PORTEXEC, *words) as terminal:
        (found,) = terminal.find(r"(?s)^(.*)ended\r\n")
        return found[1].replace("\r\n", "\n")


@wanted
def test_colours_are_where_they_are_wanted(
    variables: dict[str, str], on_terminal: bool, elsewhere: bool, surroundings: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        surroundings.setenv(name, value)
    assert bool(COLOUR.search(on_a_terminal("--lissten"))) == on_terminal
    assert bool(COLOUR.search(run("--lissten").stderr)) == elsewhere


@pytest.fixture
def coloured(surroundings: pytest.MonkeyPatch) -> None:
    surroundings.setenv("TERM", "xterm")


@pytest.mark.usefixtures("coloured")
def test_error_and_hint_have_colours() -> None:
    text = on_a_terminal("-l", "unix:/", "--socket-mode", "9", "true")
    assert COLOUR.sub("", text) == run("-l", "unix:/", "--socket-mode", "9", "true").stderr
    assert PAINTED.findall(text) == ["error", "hint"]


@pytest.mark.usefixtures("coloured")
def test_addresses_have_colours() -> None:
    text = on_a_terminal("-H", "fd", "-l", "web=0", "-l", "admin=unix:admin", "-l", "dns=udp:0", "--", "true")
    assert PAINTED.findall(text) == re.findall(r"(?:http|unix|udp):[^\s\x1b]+", text)
    assert [line.split(" ")[1] for line in text.splitlines()] == ["web", "admin", "dns"]


@pytest.mark.usefixtures("coloured")
def test_names_and_addresses_in_the_table_have_colours() -> None:
    urls = {name: names.started(name) for name in ("web", "api")}
    text = on_a_terminal("--list")
    local = {name: f"http://{name}.localhost:{url.rpartition(':')[2]}" for name, url in urls.items()}
    assert PAINTED.findall(text) == ["api", urls["api"], local["api"], "web", urls["web"], local["web"]]
    heads, *rows = COLOUR.sub("", text).splitlines()
    assert {row.index("http:") for row in rows} == {heads.index("ADDRESS")}


@pytest.mark.usefixtures("coloured")
def test_what_is_for_programs_has_none_even_by_force(surroundings: pytest.MonkeyPatch) -> None:
    surroundings.setenv("FORCE_COLOR", "1")
    started = names.detach("web")
    assert started.returncode == 0
    for words in (["--url", "web"], ["--list", "-q"], ["--list", "--json"], ["--help"], ["-n", "true"], ["--check"]):
        assert not COLOUR.search(on_a_terminal(*words)), words
    assert not COLOUR.search(started.stdout)
    assert not COLOUR.search(run("--json", "-H", "fd", "--", "true").stderr)


@pytest.mark.usefixtures("coloured")
def test_what_comes_from_elsewhere_cannot_bring_colours_of_its_own() -> None:
    text = on_a_terminal("-e", "\x1b[31mred", "true")
    assert PAINTED.findall(text) == ["error", "hint"]
    assert "\\x1b[31mred" in text
