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
__init__: api.driver api.factories api.listen api.named api.serve errors server_errors
__main__: cli
admission.answer: admission.gates admission.own admission.seccomp admission.settle binding.guard binding.tables kernel
    parent.loop procfs
admission.diagnosis: admission.answer admission.elsewhere admission.rings parent.loop say
admission.elsewhere: kernel
admission.gates: admission.seccomp binding.guard binding.tables procfs
admission.own: admission.gates admission.seccomp binding.guard binding.tables
admission.privileges: procfs
admission.rings:
admission.seccomp: kernel procfs
admission.settle: binding.tables kernel parent.loop procfs
api.driver: api.host api.output api.watchers control errors procfs server_errors
api.factories: api.driver api.serve
api.host: control errors plainjson procfs
api.known_servers: api.driver api.output binding.tables procfs server_errors
api.listen: binding.listeners binding.spec binding.stable errors
api.named: api.driver errors names.missing names.naming names.registry names.stop names.wait project server_errors
api.output:
api.pytest_entry:
api.pytest_plugin: api.driver api.factories api.known_servers api.serve api.watchers errors server_errors
api.serve: api.driver api.output binding.spec errors server_errors
api.watchers:
become: admission.privileges binding.stable command.execute command.plan command.publish explain kernel launch
    lifetime.program names.naming say
binding.guard: binding.tables errors
binding.known_as: binding.listeners errors
binding.listeners: binding.guard binding.refusals binding.spec binding.unix command.undo errors
binding.refusals: binding.guard binding.spec binding.tables errors kernel
binding.spec: errors
binding.stable: binding.spec binding.tables kernel project
binding.succession: binding.guard binding.listeners errors kernel
binding.tables: errors
binding.unix: command.undo errors kernel
check: admission.privileges admission.seccomp binding.guard binding.listeners binding.spec command.plan errors kernel
    parent.child parent.loop parent.possible parent.signals plainjson
cli: __init__ become check command.undo completion control errors explain foresee kernel launch names.begin names.registry
    names.verbs options pages request say start
command.activation:
command.env_files: command.fifo command.malformed errors
command.execute: command.activation command.plan errors kernel
command.fifo: say server_errors
command.malformed:
command.plan: binding.listeners binding.spec command.activation command.templates errors server_errors
command.publish: binding.listeners command.undo errors kernel plainjson
command.templates: binding.spec errors
command.undo: errors
completion: command.plan errors names.registry options request
control: errors plainjson server_errors
errors:
explain: binding.guard command.activation command.plan command.publish errors launch project request
foresee: command.execute command.plan command.publish errors launch lifetime.log lifetime.notify request start writable
host: binding.listeners command.plan command.undo control errors kernel launch options parent.family parent.loop
    parent.naming parent.possible parent.signals parent.supervisor request say start surroundings
kernel:
launch: binding.known_as binding.listeners command.activation command.env_files command.execute command.plan
    command.templates command.undo errors request
lifetime.backoff: request
lifetime.events: binding.listeners command.publish errors kernel launch lifetime.program names.registry parent.loop plainjson
    say
lifetime.get: lifetime.probe
lifetime.log: command.execute command.publish command.undo errors kernel
lifetime.notify: binding.unix command.undo errors procfs
lifetime.probe: binding.listeners binding.tables binding.unix parent.loop
lifetime.program: control errors kernel parent.loop
lifetime.readiness: admission.settle binding.listeners binding.tables lifetime.get lifetime.probe lifetime.start
    lifetime.waits parent.loop procfs request
lifetime.replacement: binding.succession binding.tables errors lifetime.events lifetime.start parent.loop procfs
lifetime.run: command.plan control errors launch lifetime.events lifetime.notify lifetime.program lifetime.server
    lifetime.start parent.child parent.family parent.loop parent.protocol parent.shim parent.signals parent.tree procfs
    request
lifetime.server: binding.succession command.plan errors launch lifetime.backoff lifetime.events lifetime.readiness
    lifetime.replacement lifetime.start lifetime.unready parent.loop procfs request server_errors
lifetime.start: binding.succession errors parent.child parent.link parent.loop parent.protocol parent.shim parent.signals
    procfs
lifetime.unready: admission.elsewhere binding.listeners binding.tables lifetime.get lifetime.readiness request say
lifetime.waits: kernel procfs
names.begin: errors foresee kernel names.detach names.listing names.registry names.wait parent.possible project request say
    server_errors
names.detach: binding.stable command.activation command.execute command.undo control errors kernel lifetime.log names.listing
    names.naming names.registry names.wait plainjson request say
names.listing: errors kernel names.naming names.registry plainjson say
names.logs: errors names.missing names.naming names.registry names.wait say
names.missing: names.listing names.naming names.registry server_errors
names.naming: binding.spec errors
names.registry: command.execute errors kernel names.naming plainjson procfs project writable
names.stop: errors names.naming names.registry names.wait procfs say
names.verbs: errors names.listing names.logs names.missing names.naming names.registry names.stop names.wait options project
    request say
names.wait: errors names.missing names.registry say server_errors
options: binding.spec command.plan errors
pages: options
parent.child: admission.answer admission.seccomp binding.guard command.execute command.plan errors kernel parent.link
    parent.loop parent.signals procfs say
parent.family: parent.shim parent.signals
parent.link: command.execute errors
parent.loop:
parent.naming: procfs
parent.possible: errors kernel
parent.protocol: binding.guard command.plan
parent.shim: admission.answer command.undo errors kernel parent.child parent.link parent.loop parent.naming parent.protocol
    parent.signals parent.supervisor procfs say
parent.signals: kernel
parent.supervisor: admission.diagnosis admission.elsewhere errors kernel parent.child parent.link parent.loop parent.protocol
    parent.signals parent.tree parent.witness procfs
parent.tree: parent.loop parent.signals procfs
parent.witness: parent.loop parent.protocol parent.signals
plainjson:
procfs:
project: errors
request: binding.known_as binding.listeners binding.spec binding.stable command.activation command.plan command.templates
    control errors names.naming options server_errors
say: errors kernel
server_errors: errors
start: admission.privileges become command.execute command.plan command.publish errors kernel launch lifetime.events
    lifetime.log lifetime.notify lifetime.program lifetime.run lifetime.start names.registry parent.family parent.loop
    parent.naming parent.possible parent.protocol parent.shim parent.signals procfs request say
surroundings: kernel
writable:
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
def test_only_the_async_face_of_the_api_imports_anyio(path: Path) -> None:
    """portexec's own processes run on parent/loop.py."""
    imported = {name.partition(".")[0] for name in imported_by(path)}
    assert not imported & {"anyio", "asyncio", "trio"} or name_of(path) == "api.serve"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_env_files_import_dotenv(path: Path) -> None:
    assert "dotenv" not in {name.partition(".")[0] for name in imported_by(path)} or name_of(path) == "command.env_files"


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
    ["--json", "-H", "fd", "--", "true"],
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


def test_little_is_imported_by_a_host() -> None:
    """Each first server of a program waits for it."""
    script = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import portexec.host; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=support.DEADLINE)
    assert "portexec.host" in done.stdout.split(), done.stderr
    assert sorted(FORBIDDEN_ON_THE_EXEC_PATH & set(done.stdout.split())) == []


def test_what_is_imported_is_seen() -> None:
    """That the tests above could fail: a plan as JSON needs json, which imports re."""
    assert {"json", "re"} <= modules_on_the_way("-n", "--json", "-H", "fd", "--", "true")


TESTS = Path(__file__).parent
TEST_MODULES = sorted(path for pattern in ("test_*.py", "conftest.py") for path in TESTS.rglob(pattern))


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_test_modules_share_by_way_of_support(path: Path) -> None:
    """No test module imports another, so that each can be read, moved and run alone."""
    ours = {name for name in imported_by(path) if name.partition(".")[0] == "tests"}
    shared = ("tests.support", "tests.children")  # helpers, and what the small programs say of themselves
    assert {name for name in ours if name != "tests" and not name.startswith(shared)} == set()
