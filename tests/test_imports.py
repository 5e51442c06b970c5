"""Who may import whom, and how little is imported on the way from the start to exec."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import portexec
from tests import support

PACKAGE = Path(portexec.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent == PACKAGE or path.name != "__init__.py")
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

# Each costs more than all that is done on the exec path, or belongs to the supervisor.
FORBIDDEN_ON_THE_EXEC_PATH = {
    "anyio",
    "argparse",
    "asyncio",
    "contextlib",
    "dataclasses",
    "difflib",
    "dotenv",
    "enum",
    "json",
    "logging",
    "pathlib",
    "re",
    "shlex",
    "signal",
    "socket",
    "subprocess",
    "typing",
}

# The modules that each module may import, and no others. `binding.guard` is portexec/binding/guard.py.
TABLE = """
__init__: api.driver api.listen api.serve errors
__main__: cli
admission.answer: admission.gates admission.own admission.seccomp admission.settle binding.guard binding.tables kernel
    parent.loop
admission.diagnosis: admission.answer parent.loop say
admission.gates: admission.seccomp binding.guard binding.tables
admission.own: admission.seccomp binding.guard binding.tables
admission.privileges:
admission.seccomp: kernel
admission.settle: binding.tables parent.loop
api.driver: control errors
api.listen: binding.listeners binding.spec errors
api.pytest_entry:
api.pytest_plugin: api.serve errors procfs
api.serve: api.driver errors
binding.guard:
binding.listeners: binding.guard binding.refusals binding.spec binding.unix command.undo errors
binding.refusals: binding.spec binding.tables errors
binding.spec: errors
binding.tables:
binding.unix: command.undo errors kernel
check: admission.privileges admission.seccomp binding.guard binding.listeners binding.spec command.plan errors kernel
    parent.child parent.loop parent.possible parent.signals
cli: __init__ check command.undo control errors explain kernel launch options request say start
command.activation:
command.environment: errors
command.execute: command.activation command.plan errors
command.plan: binding.listeners binding.spec command.activation command.templates errors
command.publish: binding.listeners command.undo errors kernel
command.templates: binding.spec errors
command.undo:
control: errors
errors:
explain: command.activation command.publish errors launch
kernel:
launch: binding.listeners command.activation command.environment command.execute command.plan command.templates command.undo
    errors request
lifetime.backoff: request
lifetime.events: binding.listeners command.publish control kernel launch parent.loop say
lifetime.notify: binding.unix command.undo errors
lifetime.probe: binding.listeners binding.tables binding.unix parent.loop
lifetime.readiness: binding.listeners binding.tables lifetime.probe lifetime.start parent.loop procfs request
lifetime.replacement: errors lifetime.events lifetime.start parent.loop procfs
lifetime.run: command.plan control errors launch lifetime.events lifetime.notify lifetime.server lifetime.start parent.loop
    parent.shim parent.signals parent.tree parent.witness request
lifetime.server: command.plan errors launch lifetime.backoff lifetime.events lifetime.readiness lifetime.replacement
    lifetime.start parent.loop procfs request
lifetime.start: errors parent.child parent.link parent.loop parent.shim parent.signals parent.supervisor parent.witness
options: binding.spec command.plan errors
parent.child: admission.answer admission.seccomp binding.guard command.execute command.plan errors kernel parent.link
    parent.loop parent.signals
parent.link: command.execute
parent.loop:
parent.possible: errors kernel
parent.shim: command.undo errors kernel parent.child parent.link parent.loop parent.signals parent.supervisor
parent.signals: kernel
parent.supervisor: admission.diagnosis binding.guard command.plan kernel parent.child parent.link parent.loop parent.signals
    parent.tree parent.witness procfs
parent.tree: parent.loop parent.signals procfs
parent.witness: kernel parent.loop
procfs:
request: binding.listeners binding.spec command.activation command.environment command.plan control errors options
say: errors kernel
start: admission.privileges command.execute command.plan command.publish control errors explain kernel launch lifetime.events
    lifetime.notify lifetime.run lifetime.start parent.loop parent.possible parent.shim parent.signals parent.supervisor
    procfs request say
"""
ALLOWED = {
    words[0].rstrip(":"): set(words[1:]) for words in (row.split() for row in TABLE.replace("\n    ", " ").strip().splitlines())
}


def name_of(path: Path) -> str:
    """`cli`, `supervisor.run`, and for a package's own file the name of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def imported_by(path: Path) -> Iterator[str]:
    """The full names of all that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def our_modules_imported_by(path: Path) -> set[str]:
    ours = {name_of(module) for module in MODULES}
    imported = {name.removeprefix("portexec.") for name in imported_by(path) if name.startswith("portexec.")}
    # `from portexec import __version__` names no module, so it is the package's own.
    return {name for name in imported if name in ours} | ({"__init__"} if "__version__" in imported else set())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_folder_and_nothing_else(room: str) -> None:
    assert (PACKAGE / room / "__init__.py").read_text() == ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert our_modules_imported_by(path) <= ALLOWED[name_of(path)]


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, imports in ALLOWED.items() if name not in done and imports <= done}
        assert ready, f"a circle among {sorted(ALLOWED.keys() - done)}"
        done |= ready


def test_the_table_has_no_edge_that_nobody_needs() -> None:
    used = {name_of(path): our_modules_imported_by(path) for path in MODULES}
    assert {name: imports for name, imports in ALLOWED.items() if imports != used.get(name)} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nobody_imports_the_command_line(path: Path) -> None:
    assert name_of(path) == "__main__" or "cli" not in our_modules_imported_by(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_supervisor_and_the_api_import_anyio(path: Path) -> None:
    imported = {name.partition(".")[0] for name in imported_by(path)}
    assert not imported & {"anyio", "asyncio"} or name_of(path).startswith("lifetime.") or name_of(path) == "api.serve"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_environment_imports_dotenv(path: Path) -> None:
    assert "dotenv" not in {name.partition(".")[0] for name in imported_by(path)} or name_of(path) == "command.environment"


def modules_on_the_way(*words: str) -> set[str]:
    """What Python imports for portexec with these words, up to exec.

    Without `site`, whose own imports differ from one installation to the next, and without `runpy`.
    """
    program = "import sys; from portexec.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", program, *words],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=support.DEADLINE,
    )
    assert result.returncode == 0
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


EXEC_PATHS = [
    ["-q", "-H", "fd", "--", "true"],
    ["-H", "hold", "--", "true"],
    ["-H", "fd", "-l", "a=0", "-l", "b=0", "-e", "X={a.url}", "--", "true"],
    ["-l", "*:0", "--", "true", "{fd}"],
    ["-H", "hold", "-l", "localhost", "--", "true", "{port}"],
    ["-v", "--", "true", "{fd}"],
]


@pytest.mark.parametrize("words", EXEC_PATHS, ids=" ".join)
def test_little_is_imported_on_the_exec_path(words: list[str]) -> None:
    imported = modules_on_the_way(*words)
    assert {"portexec.cli", "portexec.command.execute", "_socket"} <= imported
    assert not any(name.startswith(("portexec.admission", "portexec.parent", "portexec.lifetime")) for name in imported)
    assert sorted(FORBIDDEN_ON_THE_EXEC_PATH & {name.partition(".")[0] for name in imported}) == []


@pytest.mark.parametrize("option", ["--port-file", "--export"])
def test_little_is_imported_to_publish_a_file(option: str, tmp_path: Path) -> None:
    imported = modules_on_the_way(option, str(tmp_path / "p"), "-H", "fd", "--", "true")
    assert sorted(FORBIDDEN_ON_THE_EXEC_PATH & {name.partition(".")[0] for name in imported}) == []


def test_what_is_imported_is_seen() -> None:
    """That the tests above could fail: a plan as JSON needs json, which imports re."""
    assert {"json", "re"} <= modules_on_the_way("-n", "--json", "-H", "fd", "--", "true")


TESTS = Path(__file__).parent
TEST_MODULES = sorted(path for pattern in ("test_*.py", "conftest.py") for path in TESTS.rglob(pattern))


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_test_modules_share_by_way_of_support(path: Path) -> None:
    """No test module imports another, so that each can be read, moved and run alone."""
    ours = {name for name in imported_by(path) if name.partition(".")[0] == "tests"}
    assert {name for name in ours if name != "tests" and not name.startswith("tests.support")} == set()
