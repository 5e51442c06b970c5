"""Recipes of the documentation, run as they stand there.

A page is cut into sections, one for each heading. In a section, a block whose info string is `LANGUAGE recipe FILE` is a file,
and one with `sh recipe` are lines to type. A test that takes a section has to run all of its lines.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.installed import APPS, PATH
from tests.support.proc import processes_of
from tests.support.processes import ROOT, Running, session
from tests.support.waiting import DEADLINE

DOCS = ROOT / "docs"
STRICT = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c"]
_SECTION = re.compile(r"^#+ (.+)\n((?:(?!#+ )(?:```.*\n(?:.*\n)*?```\n|.*\n))*)", re.MULTILINE)
_BLOCK = re.compile(r"^```\w+ recipe(?: (\S+))?\n((?:.*\n)*?)```$", re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """The sections of a page that have recipes in them, by heading."""
    found = _SECTION.findall((DOCS / page).read_text())
    return {heading: text for heading, text in found if _BLOCK.search(text)}


def lines_of_the_readme() -> dict[str, str]:
    """The rows of "Which line is mine" in README: the line by what one runs."""
    table = (ROOT / "README.md").read_text().partition("| you run | your line |\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([^|]+) \| `(.+)` \|$", table, re.MULTILINE))


class Recipe:
    """One section: its files are laid in a folder, its lines are run there. `left` are those not yet run."""

    def __init__(self, page: str, heading: str, folder: Path) -> None:
        blocks = _BLOCK.findall(sections(page)[heading])
        self.folder = folder
        self.files: dict[str, str] = {name: text for name, text in blocks if name}
        self.left: list[str] = [text for name, text in blocks if not name]
        _lay_applications(folder)
        for name, text in self.files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            if text.startswith("#!"):
                file.chmod(0o755)
        programs = folder / ".bin"
        programs.mkdir()
        script = programs / "portexec"
        start = "from portexec.cli import main\nsys.exit(main())\n"
        script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n{start}")
        script.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{PATH}",
            "HOME": str(folder),
            "PORTEXEC_DIR": str(folder / ".registry"),
            "PORTEXEC_PROJECT": str(folder),
            "NO_COLOR": "1",
        }

    def find_first(self, *places: str | Path) -> None:
        """Have the programs in these folders found first, but for portexec."""
        mine, _, others = self.environment["PATH"].partition(os.pathsep)
        self.environment["PATH"] = os.pathsep.join([mine, *map(str, places), others])

    def take(self, beginning: str = "") -> str:
        """The next lines, which begin so."""
        lines = self.left.pop(0)
        assert lines.startswith(beginning), lines
        return lines

    def run(self, beginning: str = "", *, on: Sequence[str] = ()) -> str:
        """Run the next lines to their end, which is a good one; what they have written."""
        done = self.end_of(self.take(beginning), on=on)
        assert done.returncode == 0, done.stdout
        return str(done.stdout)

    def end_of(self, lines: str, *, on: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run lines to their end, below the words of `on`."""
        with self.started(lines, on=on) as process:
            output, _ = process.communicate(timeout=6 * DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def end(self) -> None:
        """Kill what a test that has failed left running, in whatever session."""
        for pid in processes_of(self.folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    @contextmanager
    def started(self, lines: str, *, on: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
        """Run lines in a session of their own, of which nothing is left afterwards; stdout has all that they write."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        words = [*on, *STRICT, lines]
        with session(words, within=6 * DEADLINE, cwd=self.folder, env=self.environment, **streams) as process:
            yield process

    @contextmanager
    def serving(self, beginning: str = "", *, on: Sequence[str] = ()) -> Iterator[Running]:
        """Run the next lines, which are one portexec, for as long as the block lasts; its stderr can be read line by line."""
        process = subprocess.Popen(
            [*on, *STRICT, f"exec {self.take(beginning)}"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started = Running(process)
        try:
            yield started
        finally:
            started.stop()


def written(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read what a process writes, up to a line with this in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no line like {pattern!r}: {''.join(lines)}")


def _lay_applications(folder: Path) -> None:
    """What the page says is there before each recipe."""
    for name, file in (("server.js", "server.js"), ("asgi.py", "app.py"), ("wsgi.py", "wsgi.py")):
        shutil.copy(APPS / name, folder / file)
    (folder / "package.json").write_text('{"scripts": {"start": "node server.js"}}')
