"""The manual and the completions that a wheel brings along, and the documentation, say of each option what the program says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portexec import completion, options
from tests.support import DEADLINE, ROOT
from tests.support.installed import program

MANUAL = ROOT / "share" / "man" / "man1" / "portexec.1"
ALL = [option for _, group in options.GROUPS for option in group]


def files_below(place: Path) -> dict[str, str]:
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}


def test_share_is_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_share.py", tmp_path], check=True, timeout=DEADLINE)
    assert files_below(ROOT / "share") == files_below(tmp_path / "share"), "run `make share`"


@pytest.mark.parametrize("option", ALL, ids=lambda option: str(option.long or option.short))
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_option_stands_in_every_completion(shell: str, option: options.Option) -> None:
    script = completion.script(shell)
    long, short = {"fish": (f"-l {option.long[2:]} ", f"-s {option.short[1:]} ")}.get(shell, (option.long, option.short))
    assert not option.long or long in script
    assert not option.short or short in script


@pytest.fixture(scope="module")
def page() -> str:
    """The manual on a terminal that is wide enough to break no line, without the overstrikes of bold letters."""
    words = [program("man"), "--warnings", "-E", "UTF-8", "-l", str(MANUAL)]
    environment = os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "500", "MAN_KEEP_FORMATTING": "", "MANROFFOPT": "-c"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_manual_has_no_mistake_for_man() -> None:
    words = [program("man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(MANUAL)]
    environment = os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ALL, ids=lambda option: str(option.long or option.short))
def test_the_manual_says_what_the_help_says(option: options.Option, page: str) -> None:
    names = ", ".join(name for name in (option.short, option.long) if name)
    assert re.search(rf"^ +{re.escape(f'{names} {option.metavar}'.rstrip())}\s+{re.escape(option.help)}", page, re.MULTILINE)


def documented() -> list[tuple[str, str]]:
    """The rows of the table of options in the documentation, as the text that a reader sees."""
    rows = re.findall(r"^\| (`-.*?)(?<!\\) \| (.*) \|$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    return [(plain(names), plain(text)) for names, text in rows]


def plain(markdown: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown.replace("\\|", "|").replace("`", ""))


def test_the_documentation_has_every_option_in_the_order_of_the_help() -> None:
    names = [", ".join(name for name in (option.short, option.long) if name) for option in ALL]
    assert [row[0] for row in documented()] == [
        f"{name} {option.metavar}".rstrip() for name, option in zip(names, ALL, strict=True)
    ]


def test_the_documentation_says_what_the_help_says_before_it_says_more() -> None:
    for (names, text), option in zip(documented(), ALL, strict=True):
        assert re.match(re.escape(option.help) + r"($|[.,;:] )", text), names
