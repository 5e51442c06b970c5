"""Real test suites, as users write them, with the frameworks, plugins and ways of pytest that they use: tests/suites."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import DEADLINE, ROOT, wait_for
from tests.support.installed import APPS, PATH, need
from tests.support.serving import LIGHT, marked, marking

pytestmark = [pytest.mark.once, pytest.mark.recipes]

SUITES = ROOT / "tests" / "suites"

Run = Callable[..., str]


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Run]:
    """Runs a suite with this Python, in a folder of the suite's own; what it has written. Nothing is left of it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PATH": PATH, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "APPS": str(APPS), "LIGHT": json.dumps(LIGHT)}

    def run(suite: str, *words: str, status: int = 0, **variables: str) -> str:
        if not (tmp_path / suite).exists():
            shutil.copytree(SUITES / suite, tmp_path / suite)
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path / suite,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=6 * DEADLINE,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    with marking() as mark:
        environment["PORTEXEC_TEST_MARK"] = mark
        yield run
        wait_for(lambda: not marked(mark))


PYTEST = ["-m", "pytest", "-q", "-p", "portexec.api.pytest_plugin"]


def test_web(python: Run) -> None:
    """FastAPI, Flask, Django and Node, redis; with httpx in plain code, in pytest-asyncio, and in anyio on both loops."""
    need(["httpx", "pytest_asyncio", "trio", "uvicorn", "fastapi", "flask", "django", "gunicorn", "node", "redis-server"])
    assert "17 passed" in python("web", *PYTEST)


def test_browser(python: Run) -> None:
    need(["selenium", "chromedriver", "chromium", "node"])
    assert "2 passed" in python("browser", *PYTEST)


ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins are named, which saves the time for all others
DOCTESTS = ["--doctest-glob=*.txt"]


@pytest.mark.parametrize("distribution", ["load", "loadscope", "loadfile"])
def test_workers(distribution: str, python: Run) -> None:
    """Fixtures of every scope, unittest, and a doctest."""
    need(["xdist"])
    assert "21 passed" in python("light", *PYTEST, *DOCTESTS, "-p", "xdist", "-n", "4", "--dist", distribution, **ALONE)


def test_reruns_and_last_failures(python: Run) -> None:
    """A test that is run again has servers of its own; and nothing is blamed on what died before."""
    need(["pytest_rerunfailures"])
    done = python("again", *PYTEST, "-p", "pytest_rerunfailures", "--reruns", "1", status=1, **ALONE)
    assert "1 failed, 3 passed, 2 rerun" in done
    assert "Exited" not in done
    done = python("again", *PYTEST, "--last-failed", "-x", status=1, **ALONE)
    assert "1 failed" in done
    assert "passed" not in done
    assert done.count("x" * 99) == 2  # what was written for this test
    assert "1 passed" in python("again", *PYTEST, "--last-failed", GOOD="1", **ALONE)


def test_notebook(python: Run) -> None:
    """In a kernel, whose loop runs in the thread of the cells."""
    need(["nbclient", "ipykernel"])
    done = python(".", str(SUITES / "notebook.py"))
    assert "plain True\nasync True\nkept True\nTrue True\n" in done
