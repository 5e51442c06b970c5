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
admission.answer: admission.gates admission.own admission.seccomp binding.guard binding.tables kernel parent.loop
admission.diagnosis: admission.answer command.publish
admission.gates: admission.seccomp binding.guard binding.tables
admission.own: admission.seccomp binding.guard binding.tables
admission.privileges:
admission.seccomp: kernel
api.driver: control errors
api.listen: binding.listeners binding.spec errors
api.pytest_entry:
api.pytest_plugin: api.serve errors parent.tree
api.serve: api.driver errors
binding.guard:
binding.listeners: binding.guard binding.refusals binding.spec binding.unix errors
binding.refusals: binding.spec binding.tables errors
binding.spec: errors
binding.tables:
binding.unix: errors
check: admission.seccomp binding.guard binding.listeners binding.spec command.plan errors parent.admit
cli: __init__ admission.diagnosis admission.privileges binding.unix check command.execute command.plan command.publish control
    errors explain launch lifetime.stay options parent.admit parent.shim parent.supervisor request
command.activation:
command.environment: errors
command.execute: command.activation command.plan errors
command.plan: binding.listeners binding.spec command.activation command.templates errors
command.publish: binding.listeners errors
command.templates: binding.spec errors
control: errors
errors:
explain: command.activation command.publish launch
kernel:
launch: binding.listeners binding.spec command.activation command.environment command.execute command.plan command.templates
    errors options request
lifetime.events: command.publish control launch
lifetime.notify: binding.unix errors
lifetime.pool: command.plan lifetime.start parent.shim parent.signals parent.tree
lifetime.probe: binding.listeners binding.tables binding.unix
lifetime.progress: command.publish
lifetime.readiness: binding.listeners binding.tables lifetime.probe lifetime.start parent.tree request
lifetime.run: control errors launch lifetime.events lifetime.notify lifetime.pool lifetime.server lifetime.start parent.shim
    parent.signals parent.tree request
lifetime.server: command.plan errors launch lifetime.events lifetime.pool lifetime.progress lifetime.readiness lifetime.start
    parent.shim parent.signals request
lifetime.start: errors parent.shim parent.tree
lifetime.stay: admission.seccomp command.plan command.publish kernel launch lifetime.events lifetime.notify lifetime.pool
    lifetime.run parent.shim parent.signals parent.tree request
options: binding.spec command.plan errors
parent.admit: binding.guard command.plan parent.signals parent.spawn parent.supervisor
parent.child: admission.seccomp binding.guard command.execute command.plan errors kernel parent.signals
parent.loop:
parent.shim: admission.diagnosis binding.guard command.plan errors parent.admit parent.signals parent.spawn parent.supervisor
    parent.tree
parent.signals: kernel
parent.spawn: admission.seccomp command.execute command.plan kernel parent.child parent.signals parent.tree
parent.supervisor: admission.answer admission.diagnosis binding.guard errors parent.child parent.signals parent.spawn
    parent.tree
parent.tree: parent.signals
request: binding.spec command.plan errors options
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
