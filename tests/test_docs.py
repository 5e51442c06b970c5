"""The documentation as a text: how long it is, where its links lead, who prints its figures, who draws its pictures."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE, ROOT
from tests.support.installed import need

pytestmark = pytest.mark.once

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ROOT / "scripts"
PICTURES = ROOT / "docs" / "pictures"


def script(name: str) -> dict[str, Any]:
    """What is defined in a script."""
    return runpy.run_path(str(SCRIPTS / name))


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_240


def test_no_sentence_is_long() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "long_sentences.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_long_sentence_is_found_wherever_it_stands() -> None:
    sentences = script("long_sentences.py")["sentences"]
    words = " ".join(["word"] * 36)
    text = f"Short. {words}\n{words}.\n\n- One\n  more.\n- {words}\n\n| a `b | c`. Two. | {words} |\n\n```\n{words}\n```\n"
    counts = [(line, len(sentence.split())) for line, sentence in sentences(text)]
    assert counts == [(1, 1), (1, 72), (4, 3), (6, 37), (8, 2), (8, 1), (8, 1), (8, 36)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_blocks(page)):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), target
        assert not heading or heading in anchors(other), target


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in PAGES[1:]}


def test_every_figure_has_its_script() -> None:
    table = re.findall(r"^\| (`[^|]+) \|.*\|$", (ROOT / "docs" / "figures.md").read_text(), re.MULTILINE)
    assert len(table) > 5
    rows = re.findall(r"^\| (?!script|--)(.*?) \|", (ROOT / "docs" / "figures.md").read_text(), re.MULTILINE)
    assert rows == table
    for row in rows:
        name = row.strip("`").split()[0]
        assert (ROOT / name).is_file(), row
        assert "print" in (ROOT / name).read_text(), row


def test_figures_of_the_readme_have_their_script() -> None:
    section = (ROOT / "README.md").read_text().partition("## Figures")[2].partition("\n## ")[0]
    figures = (ROOT / "docs" / "figures.md").read_text()
    numbers = re.findall(r"\b\d+\.\d+\b", section)
    assert numbers
    assert [number for number in numbers if number not in figures] == []


def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPTS / "draw_pictures.py"), str(tmp_path)], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in PICTURES.glob("*.svg")}


def test_the_recording_is_one_that_the_script_makes() -> None:
    """A new one, of the programs that are here, has the same lines as the committed one, but for numbers and times."""
    need(["portexec", "uvicorn", "curl"])
    words = [sys.executable, str(SCRIPTS / "record_terminal.py")]
    made = subprocess.run(words, capture_output=True, text=True, timeout=3 * DEADLINE)
    assert made.returncode == 0, made.stderr
    assert shown(made.stdout) == shown((PICTURES / "recording.cast").read_text())


def shown(cast: str) -> list[str]:
    """The lines of a recording, in which numbers do not count, nor how wide a table is."""
    head, *events = map(json.loads, cast.splitlines())
    assert head["version"] == 2
    assert [time for time, *_ in events] == sorted(time for time, *_ in events)
    lines = "".join(data for _, _, data in events).split("\r\n")
    return sorted(re.sub(r" +", " ", re.sub(r"\d+", "N", line)) for line in lines if " s: waiting for " not in line)
