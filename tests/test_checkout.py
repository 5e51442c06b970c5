"""The checkout itself: what its Makefile and its test suite promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE, ROOT
from tests.support.installed import FEW_PLUGINS, program

pytestmark = pytest.mark.once


def test_make_help_names_every_target() -> None:
    done = subprocess.run([program("make"), "help"], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  make (\S+) +\S", done.stdout, re.MULTILINE) == targets.split()


@pytest.mark.parametrize(
    ("reasons", "in_ci", "status"),
    [
        (["needs root", "this kernel has no such thing"], "1", 0),
        (["not installed: mermaids", "needs root"], "1", 1),
        (["not installed: mermaids"], "", 0),
    ],
    ids=str,
)
def test_a_skip_for_an_unknown_reason_fails_where_all_should_be_there(
    reasons: list[str], in_ci: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_sessionstart\n")
    skips = (f"def test_{number}() -> None:\n    pytest.skip({reason!r})\n" for number, reason in enumerate(reasons))
    (tmp_path / "test_it.py").write_text("import pytest\n" + "".join(skips))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PORTEXEC_CI": in_ci, "PYTEST_ADDOPTS": FEW_PLUGINS}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:portexec", "-p", "no:xdist"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=2 * DEADLINE, env=environment)
    assert (done.returncode, f"{len(reasons)} skipped" in done.stdout) == (status, True), done.stdout
    assert (f"test_0: {reasons[0]}" in done.stdout) == bool(status)
    assert "test_1: " not in done.stdout
