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

pytestmark = pytest.mark.once

CASES = Path(__file__).resolve().parent / "typing_cases"
RIGHT = CASES / "right.py"
WRONG = CASES / "wrong.py"
OLDEST = "3.10"

Errors = dict[int, str]  # by line


def run_mypy(file: Path) -> Errors:
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
    done = check([sys.executable, "-m", "mypy", *words, str(file)])
    found = re.findall(r"^.*?:(\d+): error: (.*)$", done, flags=re.MULTILINE)
    return {int(line): text for line, text in found}


def run_pyright(file: Path) -> Errors:
    """In the mode that the file asks for."""
    words = ["--pythonpath", sys.executable, "--pythonversion", OLDEST, "--outputjson", str(file)]
    need(["pyright"])
    report = json.loads(check(["pyright", *words]))
    found = [each for each in report["generalDiagnostics"] if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found}


def check(words: list[str]) -> str:
    """What a checker says; 1 is the status for what it has found."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


BOTH = pytest.mark.parametrize("run_checker", [run_mypy, run_pyright], ids=["mypy", "pyright"])


@BOTH
def test_right_uses_pass(run_checker: Callable[[Path], Errors]) -> None:
    assert run_checker(RIGHT) == {}


@BOTH
def test_wrong_uses_are_found(run_checker: Callable[[Path], Errors]) -> None:
    lines = WRONG.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = run_checker(WRONG)
    assert found.keys() == wrong, {number: lines[number - 1] for number in found.keys() ^ wrong}


def test_every_public_name_is_used() -> None:
    used = set(re.findall(r"portexec\.(\w+)", RIGHT.read_text()))
    assert used >= set(portexec.__all__)
