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
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

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

# The modules that each module may import, and no others.
ALLOWED = {
    "__init__": {"driver", "errors", "guarded", "server"},  # lazily
    "__main__": {"cli"},
    "errors": set(),
    "activation": set(),
    "tcp_table": set(),
    "spec": {"errors"},
    "environment": {"errors"},
    "templates": {"errors", "spec"},
    "unix_sockets": {"errors"},
    "privileges": set(),
    "sockets": {"errors", "spec", "tcp_table", "unix_sockets"},
    "publish": {"errors", "sockets"},
    "handoff": {"activation", "errors", "sockets", "spec", "templates"},
    "options": {"errors", "handoff", "spec"},
    "execute": {"activation", "errors", "handoff"},
    "launch": {
        "activation",
        "environment",
        "errors",
        "execute",
        "handoff",
        "options",
        "sockets",
        "spec",
        "supervision",
        "templates",
    },
    "supervision": {"errors", "handoff", "options", "spec"},
    "control": {"errors"},
    "guarded": {"errors", "sockets", "spec"},
    "driver": {"control", "errors"},
    "server": {"driver", "errors"},
    "pytest_entry": set(),
    "pytest_plugin": {"errors", "server", "supervisor.tree"},
    "explain": {"activation", "launch", "publish"},
    "supervisor": {"handoff", "sockets", "supervisor.run", "supervisor.signals", "supervisor.spawn"},
    "supervisor.libc": set(),
    "supervisor.seccomp": {"supervisor.libc"},
    "supervisor.signals": {"supervisor.libc"},
    "supervisor.admission": {"sockets", "supervisor.seccomp", "tcp_table", "supervisor.libc"},
    "supervisor.child": {
        "errors",
        "execute",
        "handoff",
        "sockets",
        "supervisor.seccomp",
        "supervisor.signals",
        "supervisor.libc",
    },
    "supervisor.diagnosis": {"publish", "supervisor.admission"},
    "supervisor.spawn": {
        "execute",
        "handoff",
        "supervisor.child",
        "supervisor.seccomp",
        "supervisor.signals",
        "supervisor.libc",
        "supervisor.tree",
    },
    "supervisor.run": {
        "errors",
        "sockets",
        "supervisor.admission",
        "supervisor.child",
        "supervisor.diagnosis",
        "supervisor.signals",
        "supervisor.spawn",
        "supervisor.tree",
    },
    "supervisor.tree": {"supervisor.signals"},
    "supervisor.shim": {
        "errors",
        "handoff",
        "sockets",
        "supervisor",
        "supervisor.diagnosis",
        "supervisor.run",
        "supervisor.signals",
        "supervisor.spawn",
        "supervisor.tree",
    },
    "supervisor.generation": {"errors", "supervisor.shim", "supervisor.tree"},
    "supervisor.pool": {"handoff", "supervisor.generation", "supervisor.shim", "supervisor.signals", "supervisor.tree"},
    "supervisor.progress": {"publish"},
    "supervisor.reporter": {"control", "launch", "publish"},
    "supervisor.notify": {"errors", "unix_sockets"},
    "supervisor.probe": {"sockets", "tcp_table", "unix_sockets"},
    "supervisor.readiness": {
        "sockets",
        "supervision",
        "supervisor.generation",
        "supervisor.probe",
        "supervisor.tree",
        "tcp_table",
    },
    "supervisor.succession": {
        "errors",
        "handoff",
        "launch",
        "supervision",
        "supervisor.generation",
        "supervisor.pool",
        "supervisor.progress",
        "supervisor.readiness",
        "supervisor.reporter",
        "supervisor.shim",
        "supervisor.signals",
    },
    "supervisor.lifetime": {
        "control",
        "errors",
        "launch",
        "supervision",
        "supervisor.generation",
        "supervisor.notify",
        "supervisor.pool",
        "supervisor.reporter",
        "supervisor.shim",
        "supervisor.signals",
        "supervisor.succession",
        "supervisor.tree",
    },
    "supervisor.stay": {
        "handoff",
        "launch",
        "publish",
        "supervision",
        "supervisor.libc",
        "supervisor.lifetime",
        "supervisor.notify",
        "supervisor.pool",
        "supervisor.reporter",
        "supervisor.seccomp",
        "supervisor.shim",
        "supervisor.signals",
        "supervisor.tree",
    },
    "check": {"errors", "handoff", "sockets", "spec", "supervisor", "supervisor.seccomp"},
    "cli": {
        "__init__",
        "check",
        "control",
        "errors",
        "execute",
        "explain",
        "handoff",
        "launch",
        "options",
        "privileges",
        "publish",
        "supervision",
        "supervisor",
        "supervisor.diagnosis",
        "supervisor.run",
        "supervisor.shim",
        "supervisor.stay",
        "unix_sockets",
    },
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
    found = {name for name in imported if name in ours - {"supervisor"}}
    # `from portexec import __version__` names no module, so it is the package's own.
    own = {"__version__": "__init__", "supervisor.start": "supervisor", "supervisor.admit": "supervisor"}
    return found | {package for name, package in own.items() if name in imported}


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
    assert not imported & {"anyio", "asyncio"} or name_of(path).startswith("supervisor") or name_of(path) == "server"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_environment_imports_dotenv(path: Path) -> None:
    assert "dotenv" not in {name.partition(".")[0] for name in imported_by(path)} or name_of(path) == "environment"


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
    assert {"portexec.cli", "portexec.execute", "_socket"} <= imported
    assert not any(name.startswith("portexec.supervisor") for name in imported)
    assert sorted(FORBIDDEN_ON_THE_EXEC_PATH & {name.partition(".")[0] for name in imported}) == []


@pytest.mark.parametrize("option", ["--port-file", "--export"])
def test_little_is_imported_to_publish_a_file(option: str, tmp_path: Path) -> None:
    imported = modules_on_the_way(option, str(tmp_path / "p"), "-H", "fd", "--", "true")
    assert sorted(FORBIDDEN_ON_THE_EXEC_PATH & {name.partition(".")[0] for name in imported}) == []


def test_what_is_imported_is_seen() -> None:
    """That the tests above could fail: a plan as JSON needs json, which imports re."""
    assert {"json", "re"} <= modules_on_the_way("-n", "--json", "-H", "fd", "--", "true")
