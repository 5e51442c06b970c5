"""The scripts that are no part of CI can be started: what they import is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE
from tests.support.processes import ROOT

WITH_OPTIONS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "import argparse" in path.read_text())

pytestmark = pytest.mark.once


@pytest.mark.parametrize("script", WITH_OPTIONS, ids=lambda path: path.stem)
def test_a_script_says_what_it_does(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
