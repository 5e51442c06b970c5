"""README.md and docs/, run: every fenced block, as a reader would run it, beside the demo applications of tests/apps.

What the word after the three backticks means is in RUNNERS; a block without one fails.

    console         a transcript, in one bash. What follows `$ ` is typed, the other lines are what has to appear. Numbers of
                    four digits and more stand for any number, the same one throughout; `...` stands for anything.
    console varies  the same, but only the first word of each line counts: the rest is about the machine
    bash            a script that runs to its end
    bash serves     one server: it must answer on every address it announces
    bash checkout   a script that is run in the checkout, with this environment in place of a new one
    yaml            steps of GitHub Actions, run as they are there
    yaml gitlab     jobs of GitLab CI, run as its shell executor does: one bash for before_script and script, another afterwards
    procfile        run by honcho, as a Procfile
    python          a program
    python test     a test file, run by pytest
    ... recipe      a recipe, run by a test of its own: tests/test_recipes.py, tests/test_several_machines.py
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from portexec import options
from tests.support import DEADLINE, ROOT, Running, get, kill_group, wait_for
from tests.support.installed import APPS, PATH, install_portexec, need
from tests.support.processes import session
from tests.support.recipes import lines_of_the_readme

pytestmark = [pytest.mark.once, pytest.mark.recipes]

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
RECIPE = re.compile(r"\w+ recipe( \S+)?")
STRICT = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]
MARK = "----- that was all -----"
PATIENCE = 2 * DEADLINE
NUMBER = re.compile(r"(\d{4,})")
WAITING = re.compile(r"portexec: note: \d+ s: waiting for ")  # what a machine is told that has had no time for a while
NEEDED = {"curl": "curl", "node": "node", "npm": "npm node", "uvicorn": "uvicorn fastapi", "hypercorn": "hypercorn fastapi"}
NEEDED |= {"gunicorn": "gunicorn", "flask": "flask", "make": "make", "uv": "uv"}
# Options of other programs that the text mentions.
NOT_OURS = {"--fd", "--init", "--show-capture", "-s", "--strictPort", "-start_epmd"}


class Block(NamedTuple):
    """A fenced block: its page, the line it begins at, what it is, its text."""

    page: str
    line: int
    kind: str
    text: str


def blocks() -> Iterator[Block]:
    for page, text in PAGES.items():
        for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


BLOCKS = list(blocks())


@pytest.fixture
def folder(tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the demo applications, under the names that the pages use, and `portexec` on the PATH.

    Servers with a name are in a registry of the test's own.
    """
    monkeypatch.delenv("PYTHONPATH")
    place = Path(shutil.copytree(APPS, tmp_path / "apps"))
    (place / "asgi.py").rename(place / "app.py")
    (place / "package.json").write_text('{"scripts": {"start": "node server.js"}}')
    programs = tmp_path / "bin"
    programs.mkdir()
    install_portexec(programs)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{PATH}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # gunicorn's control socket, one for each test
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(place)
    return place


def ask(url: str) -> str:
    """What a server answers, on a unix socket, too."""
    if not url.startswith("unix:"):
        return get(url)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(url.removeprefix("unix:"))
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with connection.makefile() as answer:
            return answer.read()


class Terminal:
    """A bash, into which a transcript is typed line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.numbers: dict[str, str] = {}  # from those of the page to those of this run

    def type(self, command: str, count: int) -> list[str]:
        """Type a command, and return what appears until it is over and there are `count` lines."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        command = NUMBER.sub(lambda found: self.numbers.get(found[0], found[0]), command)
        self.process.stdin.write(f"{command}\nprintf '\\n%s\\n' '{MARK}'\n")
        self.process.stdin.flush()
        lines: list[str] = []
        is_over = False
        while not is_over or len(lines) < count:
            line = self.process.stdout.readline()
            assert line, f"no more output after {command!r}: {lines}"
            if line.rstrip("\n") == MARK:
                is_over = True
                if lines and not lines[-1]:
                    lines.pop()
            elif not WAITING.match(line):
                lines.append(line.rstrip("\n"))
        return lines

    def is_same(self, expected: str, line: str) -> bool:
        """Whether a line is the expected one, but for numbers, which have to be the same as before."""
        parts = [".*".join(map(re.escape, part.split("..."))) for part in NUMBER.split(expected)[::2]]
        found = re.fullmatch(r"(\d+)".join(parts), line)
        if not found:
            return False
        pairs = list(zip(NUMBER.findall(expected), found.groups(), strict=True))
        return all(self.numbers.setdefault(theirs, ours) == ours for theirs, ours in pairs)

    def check_distinct(self, transcript: str) -> None:
        """Addresses that are different on the page are so here, and processes that answer."""
        for before in (r"(?:http|udp)://127\.0\.0\.1:", "hello from "):
            theirs = set(re.findall(rf"{before}(\d{{4,}})", transcript))
            assert len({self.numbers[number] for number in theirs}) == len(theirs), self.numbers


def transcript(text: str) -> list[tuple[str, list[str]]]:
    """Commands, and the lines that each of them is to show."""
    steps: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        else:
            steps[-1][1].append(line)
    return steps


def run_transcript(block: Block, _: Path) -> None:
    """Type it all, and compare."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with session(["bash", "--noprofile", "--norc"], within=PATIENCE, **streams) as process:
        terminal = Terminal(process)
        for command, expected in transcript(block.text):
            lines = terminal.type(command, len(expected))
            if block.kind == "console varies":
                assert [line.split()[:1] for line in lines] == [line.split()[:1] for line in expected]
            else:
                same = [terminal.is_same(*pair) for pair in zip(expected, lines, strict=False)]
                assert all(same), (command, expected, lines)
                assert len(lines) == len(expected), (command, expected, lines)
        if block.kind == "console":
            terminal.check_distinct(block.text)


def run_script(block: Block, place: Path) -> None:
    """Run it to its end."""
    words = [*STRICT, "-c", block.text]
    with session(words, within=PATIENCE, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.wait(2 * DEADLINE) == 0, process.communicate()[0]


def run_server(block: Block, _: Path) -> None:
    """Start it, ask at every address, stop it."""
    assert block.text.count("portexec") == 1
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with session([*STRICT, "-c", block.text], within=PATIENCE, **streams) as process:
        started = Running(process)
        try:
            urls = [started.url() for _ in range(block.text.count(" -l ") or 1)]
            for url in urls:
                assert "hello" in wait_for(lambda url=url: ask(url))  # type: ignore[misc]
        finally:
            started.stop()


def run_in_checkout(block: Block, place: Path) -> None:
    """The Makefile's targets, with the packages that are installed here. Of `make test` what it collects is enough."""
    if not (Path(sys.prefix) / "bin" / "portexec").exists():
        pytest.skip("portexec is not installed beside this Python")
    environment = place / "venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "ready":  # that would be touched through the link
            (environment / entry.name).symlink_to(entry)
    (environment / "ready").touch()
    os.environ |= {"VENV": str(environment), "PYTEST": "--collect-only -q tests/test_spec.py"}
    run_script(block, ROOT)


def steps_of(text: str) -> Iterator[str]:
    """The scripts of a workflow's steps: the part of YAML that the pages need."""
    for found in re.finditer(r"^( +)run: (.*)\n((?:\1 +.*\n)*)", text, re.MULTILINE):
        yield "".join(line.strip() + "\n" for line in found[3].splitlines()) if found[2] == "|" else found[2]


def run_steps(block: Block, place: Path) -> None:
    """Run step after step as GitHub's runner does; what was left in the background lives on until the job is over."""
    temporary = place / "temp"
    temporary.mkdir()
    exported = place / "exported"
    exported.touch()
    os.environ |= {"RUNNER_TEMP": str(temporary), "GITHUB_ENV": str(exported)}
    steps = list(steps_of(block.text))
    assert len(steps) == block.text.count("run:")
    sessions: list[int] = []
    try:
        for number, step in enumerate(steps):
            (place / "step.sh").write_text(step)
            os.environ |= dict(line.split("=", 1) for line in exported.read_text().splitlines())
            with (place / f"log{number}").open("w") as file:
                process = subprocess.Popen(
                    [*STRICT, "step.sh"], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            sessions.append(process.pid)
            status, log = process.wait(DEADLINE), (place / f"log{number}").read_text()
            assert status == 0, (step, log)
            assert "curl" not in step or "hello from" in log, (step, log)
    finally:
        for session in sessions:
            kill_group(session)
    assert "testing at" not in steps[-1] or "testing at http://127.0.0.1:" in (place / f"log{len(steps) - 1}").read_text()


def run_procfile(block: Block, place: Path) -> None:
    """Every process of it answers, and honcho can stop them."""
    need(["honcho"])
    (place / "Procfile").write_text(block.text)
    process = subprocess.Popen(
        ["honcho", "start", "--no-colour"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    timer = threading.Timer(PATIENCE, process.terminate)  # honcho stops its processes, which have sessions of their own
    timer.start()
    try:
        urls: dict[str, str] = {}
        while len(urls) < len(block.text.splitlines()):
            line = process.stdout.readline()
            assert line, urls
            found = re.search(r"(\w+)\.1 +\| portexec: (http:\S+)", line)
            urls |= {found[1]: found[2]} if found else {}
        for url in urls.values():
            assert "hello" in wait_for(lambda url=url: ask(url))  # type: ignore[misc]
        assert (place / "web.port").read_text() == urls["web"].rpartition(":")[2] + "\n"
    finally:
        process.terminate()
        rest, errors = process.communicate(timeout=DEADLINE)
        timer.cancel()
    assert not errors
    wait_for(lambda: not (place / "web.port").exists())  # honcho kills a portexec that takes 5 s; then its shim removes it
    assert {name for name in urls if f"{name}.1 stopped" in rest} == set(urls)


def jobs_of(text: str) -> Iterator[dict[str, list[str]]]:
    """The lines of each list of scripts, job by job: the part of YAML that the pages need."""
    for job in re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]:
        lists = re.finditer(r"^  (\w*script):\n((?:    - .*\n)+)", job, re.MULTILINE)
        yield {found[1]: [line.removeprefix("    - ") for line in found[2].splitlines()] for found in lists}


def run_jobs(block: Block, place: Path) -> None:
    """Run job after job as GitLab's shell executor does, and see to it that the report can be read."""
    jobs = list(jobs_of(block.text))
    assert sum(len(lines) for job in jobs for lines in job.values()) == len(re.findall(r"^ +- ", block.text, re.MULTILINE))
    with ExitStack() as stack:  # what was left in the background lives on until the job is over
        for job in jobs:
            assert "hello from" in run_as_gitlab(stack, [*job.get("before_script", []), *job["script"]])
            run_as_gitlab(stack, job.get("after_script", []))
    for name in re.findall(r"dotenv: (\S+)", block.text):
        assert re.fullmatch(r"PORT=\d+\n", (place / name).read_text())


def run_as_gitlab(stack: ExitStack, lines: Sequence[str]) -> str:
    """Run a job's lines, and return its log, which is over when nobody has it open any more.

    As with GitLab Runner, the script comes by standard input, which `eval` in a pipeline keeps from the lines. But its shell is
    a login shell, which would forget our PATH.
    """
    script = "\n".join(f"echo {shlex.quote('$ ' + line)}\n{line}" for line in lines)
    whole = f"set -o pipefail; set -o errexit\nset +o noclobber\n: | eval {shlex.quote(script)}\nexit 0\n"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = stack.enter_context(session(["bash"], within=PATIENCE, **streams))
    log, _ = process.communicate(whole, timeout=DEADLINE)
    assert process.returncode == 0, log
    return log


def run_program(block: Block, place: Path) -> None:
    """Run it with this Python."""
    (place / "program.py").write_text(block.text)
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=2 * DEADLINE, env=with_root())
    assert (done.returncode, done.stderr) == (0, "")
    assert "http://127.0.0.1:" in done.stdout
    assert "urlopen" not in block.text or "hello from" in done.stdout


def run_tests(block: Block, place: Path) -> None:
    """Run it with the plugin, which an installed portexec brings along."""
    (place / "test_readme_block.py").write_text(block.text)
    few_plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]  # which would be most of what it costs
    words = [sys.executable, "-m", "pytest", "-q", *few_plugins, "test_readme_block.py"]
    words += [] if is_installed_package() else ["-p", "portexec.api.pytest_plugin"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * DEADLINE, env=with_root())
    assert done.returncode == 0, done.stdout
    assert f"{block.text.count('def test_')} passed" in done.stdout


def with_root() -> dict[str, str]:
    """The environment of a program that is to find portexec, installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


RUNNERS: dict[str, Callable[[Block, Path], None]] = {
    "console": run_transcript,
    "console varies": run_transcript,
    "bash": run_script,
    "bash serves": run_server,
    "bash checkout": run_in_checkout,
    "yaml": run_steps,
    "yaml gitlab": run_jobs,
    "python": run_program,
    "python test": run_tests,
    "procfile": run_procfile,
}


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if not RECIPE.fullmatch(block.kind)],
    ids=lambda block: f"{Path(block.page).stem}-line{block.line}",
)
def test_block(block: Block, folder: Path) -> None:
    assert block.kind in RUNNERS, "nobody knows how to run it"
    words = set(re.findall(r"[\w.-]+", block.text))
    need([name for word, names in NEEDED.items() if word in words for name in names.split()])
    if "pip install portexec" in block.text and not is_installed_package():
        pytest.skip("portexec is not installed here, and is not to be fetched")
    before = dict(os.environ)
    try:
        RUNNERS[block.kind](block, folder)
    finally:
        os.environ.clear()
        os.environ.update(before)


# What each row of "Which line is mine" needs that runs here as it stands. The others are run by scripts/try_recipes.sh.
LINES = {"FastAPI": "uvicorn fastapi", "Flask": "flask", "Django": "django", "Express": "npm node", "puma": "puma", "Go": "go"}
ELSEWHERE = {"FastAPI's command", "Vite", "Next.js", "Rails", "Spring Boot", "Docker"}


def test_every_line_of_the_readme_is_run_or_named() -> None:
    assert set(lines_of_the_readme()) == {*LINES, *ELSEWHERE}
    tried = (ROOT / "scripts" / "try_recipes.py").read_text()
    assert [name for name in ELSEWHERE if f'"{name}"' not in tried] == []


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_the_readme(name: str, folder: Path) -> None:
    need(LINES[name].split())
    if name == "Go":
        subprocess.run(["go", "build", "-o", "server", "server.go"], check=True)
    run_server(Block("README.md", 0, "bash serves", lines_of_the_readme()[name]), folder)


def is_installed_package() -> bool:
    """Whether pip finds portexec, so that asking for it installs nothing."""
    words = [sys.executable, "-m", "pip", "show", "--quiet", "portexec"]
    return subprocess.run(words, capture_output=True).returncode == 0


def test_every_fence_is_a_block() -> None:
    assert len(BLOCKS) > 20
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)


def test_every_table_is_one() -> None:
    """A row that stands apart from its table is no row: head, rule, and rows of as many cells."""
    tables = [table for text in PAGES.values() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) > 5
    for table in tables:
        head, rule, *rows = table.splitlines()
        assert re.fullmatch(r"\|(-+\|)+", rule), table
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in (head, rule, *rows)]
        assert len(set(cells)) == 1, table


def spans() -> list[str]:
    """What stands between single backticks outside of the blocks, with the table's escapes undone."""
    text = re.sub(r"^```.*?^```$", "", "\n".join(PAGES.values()), flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`]+)`", text)]


def known_options() -> set[str]:
    return {name for _, group in options.GROUPS for option in group for name in (option.short, option.long) if name}


def test_the_text_names_no_option_that_does_not_exist() -> None:
    named = {re.split(r"[ =]", span)[0] for span in spans() if span.startswith("-") and span.strip("-")}
    assert named - NOT_OURS <= known_options()


def test_the_table_of_options_is_complete() -> None:
    rows = [line for line in PAGES["docs/reference.md"].splitlines() if line.startswith("| `-")]
    assert {name for row in rows for name in re.findall(r"`(--?\w[\w-]*)", row.split(" | ")[0])} == known_options()


def test_every_command_line_has_options_that_exist() -> None:
    lines = [line for block in BLOCKS for line in block.text.replace("\\\n", "").splitlines()]
    lines += [span for span in spans() if re.match(r"(exec )?portexec ", span)]
    inner = re.compile(r"\$\(([^()]*)\)")  # a command whose output stands for words of another one
    lines += [found for line in lines for found in inner.findall(line)]
    lines = [inner.sub("WORD", line.removeprefix("$ ")) for line in lines]
    commands = [found[1] for line in lines for found in re.finditer(r"(?:^|[ \n])portexec (.*)", line)]
    assert len(commands) > 20
    for command in commands:
        try:
            words = shlex.split(command)
        except ValueError:  # the words end inside of a quotation that began before
            words = command.split()
        options.parse(words)


def test_the_layout_lists_every_module() -> None:
    """Those of the package itself; the others by the room that they are in."""
    package = ROOT / "portexec"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    table = PAGES["docs/development.md"].partition("| in `portexec/` | |")[2]
    rows = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == modules | rooms
