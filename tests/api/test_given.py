"""What the command is given: variables, files, words, a directory; and of the caller's own settings, nothing."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import portexec
from tests.support import DEADLINE, get, wait_for
from tests.support.serving import (
    IN_ASYNC_CODE,
    LIGHT,
    ON_FD,
    PACKAGE_HOME,
    ask,
    greeting,
    hook,
    marked,
    run_caller,
)


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "kept")
    monkeypatch.setenv("GONE", "not kept")
    monkeypatch.setenv("PORT", "1")
    env = {"GONE": None, "BASE": "http://x:{port}/{other}", "WITH": "a=b c", "EMPTY": ""}
    before = dict(os.environ)
    with portexec.serve(LIGHT, env=env) as server:
        assert dict(os.environ) == before
        expected = {"OURS": "kept", "GONE": "unset", "BASE": f"http://x:{server.port}/{{other}}", "WITH": "a=b c", "EMPTY": ""}
        assert {name: ask(server, f"variable/{name}") for name in expected} == expected
        assert ask(server, "variable/PORT") == str(server.port)


def test_files_and_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cwd` is the command's directory. The files that the caller names are found from the caller's."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "one.env").write_text("URL=http://${PORT}/\nGIVEN=file\nOVER=file\n")
    (tmp_path / "two.env").write_text("TWO=2\n")
    monkeypatch.setenv("GIVEN", "environment")
    monkeypatch.chdir(tmp_path)
    files: list[str | Path] = ["one.env", tmp_path / "two.env"]
    with portexec.serve(LIGHT, env_file=files, env={"OVER": "env"}, cwd=Path("elsewhere")) as server:
        expected = {"URL": f"http://{server.port}/", "GIVEN": "environment", "OVER": "env", "TWO": "2"}
        assert {name: ask(server, f"variable/{name}") for name in expected} == expected
        assert ask(server, "place") == str(place)


def test_an_env_file_beside_a_caller_whose_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    with pytest.raises(portexec.UsageError, match=r"env_file: one\.env is relative to a directory that is gone"):
        portexec.serve(LIGHT, env_file="one.env")


SHOW = """
import sys
sys.path.insert(0, {home!r})
import portexec
with portexec.serve(sys.argv[1:], {options}) as server:
    print(server.port)
"""


def test_files_that_are_named_like_modules_are_not_taken_for_them(tmp_path: Path) -> None:
    """Neither in the command's directory nor in the caller's, nor beside its script, which does not import them itself."""
    for name in ("logging.py", "ssl.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit(f'{__file__} was imported')\n")
    script = tmp_path / "script.py"
    script.write_text(SHOW.format(home=PACKAGE_HOME, options=f"cwd={str(tmp_path)!r}"))
    assert int(subprocess.check_output([sys.executable, script, *LIGHT], cwd=tmp_path, timeout=DEADLINE))


def test_the_portexec_that_was_imported_is_the_one_that_runs(tmp_path: Path) -> None:
    """And not another one that is installed as well."""
    (tmp_path / "portexec").mkdir()
    for name in ("__init__", "cli"):
        (tmp_path / "portexec" / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    code = SHOW.format(home=PACKAGE_HOME, options="")
    assert int(run_caller(code, *LIGHT, env=os.environ | {"PYTHONPATH": str(tmp_path)}))


def test_a_variable_is_seen_by_nobody_but_the_command(mark: str) -> None:
    """Others may read the words of every process, and the environment of none."""
    with portexec.serve(LIGHT, env={"TOKEN": "kept secret"}) as server:
        assert ask(server, "variable/TOKEN") == "kept secret"
        processes = {hook(server), *marked(mark)}
        assert len(processes) >= 3  # portexec, the shim, the command
        assert not any(b"kept secret" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes)


def test_pythons_own_variables_do_not_disturb() -> None:
    code = SHOW.format(home=PACKAGE_HOME, options="")
    variables = {"PYTHONWARNINGS": "error", "PYTHONINSPECT": "1", "PYTHONOPTIMIZE": "2", "LC_ALL": "C"}
    assert int(run_caller(code, *LIGHT, env=os.environ | variables))


def test_how_a_caller_takes_its_signals_is_its_own_affair() -> None:
    """Its server ends by TERM all the same."""
    code = """
import signal, sys, portexec
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
with portexec.serve(sys.argv[1:], kill_after=1000) as server:
    pass
print(server.returncode)
"""
    assert int(run_caller(code, *LIGHT)) == -signal.SIGTERM


def test_what_else_a_caller_may_have_set() -> None:
    """A time limit for all its sockets, and what is no place in the path of its modules."""
    code = """
import socket, sys, portexec
serving = portexec.serve([*sys.argv[1:], *["x" * 100_000] * 5])
socket.setdefaulttimeout(1e-6)
sys.path += [5, None, b"/x", "/\\0"]
with serving as server:
    print(server.port)
"""
    assert int(run_caller(code, *LIGHT))


def test_many_words() -> None:
    with portexec.serve([*LIGHT, *["x" * 100_000] * 10]) as server:
        assert get(server.url) == greeting(server)


def test_modules_are_found_where_the_caller_finds_them(tmp_path: Path) -> None:
    """Also where only PYTHONPATH says where they are, as for a Python without a virtual environment of its own."""
    for name in ("anyio", "dotenv", "idna", "sniffio", "exceptiongroup", "typing_extensions"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
            (tmp_path / source.name).symlink_to(source)
    code = SHOW.format(home=PACKAGE_HOME, options="ready='none', env={'PYTHONPATH': None}")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-s", "-c", code, "sleep", "1000"],
        env=given | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_may_have_paths_and_strange_characters(tmp_path: Path) -> None:
    script = tmp_path / "ä ö\n{x}.sh"
    script.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    script.chmod(0o755)
    with portexec.serve([script, "", "a b", "--", "-q", "{{x}}", "\udcff"], ready="none") as server:
        assert server.wait() == 0
        assert server.output.startswith("|a b|--|-q|{{x}}|")


def test_the_session_is_its_own() -> None:
    with portexec.serve(["sh", "-c", "ps -o sid= -p $$ 2>/dev/null || cut -d' ' -f6 /proc/$$/stat"], ready="none") as server:
        assert server.wait() == 0
        assert int(server.output) != os.getsid(0)


def test_standard_input_is_what_was_given(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with portexec.serve(["sh", "-c", "read line; echo got $line; exec cat"], ready="none", stdin=reader) as server:
        os.close(reader)
        os.write(writer, b"one\ntwo\n")
        wait_for(lambda: server.output == "got one\ntwo\n")
        os.close(writer)
        assert server.wait() == 0
    (tmp_path / "file").write_text("content")
    with (tmp_path / "file").open() as file, portexec.serve(["cat"], ready="none", stdin=file) as server:
        assert (server.wait(), server.output) == (0, "content")
    with (tmp_path / "file").open() as file:
        serving = portexec.serve(["cat"], ready="none", stdin=file)
    with pytest.raises(portexec.UsageError, match="stdin is closed"), serving:
        pass
    with portexec.serve(["cat"], ready="none", stdin=subprocess.DEVNULL) as server:
        assert (server.wait(), server.output) == (0, "")


@pytest.mark.parametrize("stdin", [b"text", True, 999_999, subprocess.PIPE])
def test_standard_input_that_is_none(stdin: Any) -> None:
    with pytest.raises(portexec.UsageError, match="is no open file"):
        portexec.serve(LIGHT, stdin=stdin)


@IN_ASYNC_CODE
async def test_a_lazy_server_starts_at_the_first_connection(mark: str) -> None:
    async with portexec.serve(ON_FD, lazy=True) as server:
        assert (server.pid, server.output, server.returncode) == (0, "", None)
        answers = []
        for _ in range(2):
            answers.append(get(server.url))
            wait_for(lambda: answers[-1] == greeting(server))  # the caller hears of the start later than the client
            await server.restart()
        assert len(set(answers)) == 2
        await server.restart()
        await server.restart()
    assert marked(mark) == set()


def test_what_cannot_be_lazy() -> None:
    with pytest.raises(portexec.UsageError, match="lazy needs hand-off fd"), portexec.serve(LIGHT, lazy=True):
        pass
