"""The public API as mypy and pyright see it: right uses pass their strictest checks, and wrong ones are found.

pyright is a Node program: `npm install --global pyright`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import portexec
from tests.support import DEADLINE, ROOT
from tests.support.installed import need

pytestmark = [pytest.mark.once, pytest.mark.recipes]

CASES = Path(__file__).resolve().parent / "typing_cases"
RIGHT = CASES / "right.py"
WRONG = CASES / "wrong.py"
OLDEST = "3.10"

Errors = dict[str, dict[int, str]]  # by the name of the file, by line


def run_mypy(*files: Path) -> Errors:
    """With --strict, and nothing of our own configuration."""
    words = [
        "--strict",
        "--config-file=",
        "--cache-dir=/dev/null",
        f"--python-version={OLDEST}",
        "--no-error-summary",
        "--hide-error-context",
    ]
    need(["mypy"])
    done = check([sys.executable, "-m", "mypy", *words, *map(str, files)])
    found: Errors = {file.name: {} for file in files}
    for name, line, text in re.findall(r"^(?:.*/)?(.*?):(\d+): error: (.*)$", done, flags=re.MULTILINE):
        found[name][int(line)] = text
    return found


def run_pyright(*files: Path) -> Errors:
    """In the mode that the file asks for."""
    words = ["--pythonpath", sys.executable, "--pythonversion", OLDEST, "--outputjson", *map(str, files)]
    need(["pyright"])
    report = json.loads(check(["pyright", *words]))
    found: Errors = {file.name: {} for file in files}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            found[Path(each["file"]).name][each["range"]["start"]["line"] + 1] = each["message"]
    return found


def check(words: list[str]) -> str:
    """What a checker says; 1 is the status for what it has found."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("run_checker", [run_mypy, run_pyright], ids=["mypy", "pyright"])
def test_right_uses_pass_and_wrong_ones_are_found(run_checker: Callable[..., Errors]) -> None:
    """In one run: most of what it costs is to read the library's types."""
    lines = WRONG.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = run_checker(RIGHT, WRONG)
    assert found[RIGHT.name] == {}
    assert found[WRONG.name].keys() == wrong, {number: lines[number - 1] for number in found[WRONG.name].keys() ^ wrong}


def test_every_public_name_is_used() -> None:
    used = set(re.findall(r"portexec\.(\w+)", RIGHT.read_text()))
    assert used >= set(portexec.__all__)
