"""Where portexec cannot be a parent: `fd` and `hold` work, `auto` falls back to hold, and the rest is refused in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import support
from tests.support.installed import need, program
from tests.support.processes import refusing, running
from tests.support.thieves import every_attempt

NO_SUBREAPER = ["prctl", errno.EINVAL, 0, 32]  # 36, and what has that bit, too
NO_FLIP = ["setsockopt", 0, 2, socket.SO_REUSEPORT, "equal"]  # no effect, as on a kernel that does not heed it any more
NO_PROC = 'mount -t tmpfs none /proc && exec "$@"'
OTHER_NAMESPACE = ["unshare", "--pid", "--fork"]
NOTHING = [*OTHER_NAMESPACE, "--mount", "sh", "-c", NO_PROC, "sh"]

# what is missing, and how it is said
MISSING = {
    "ctypes": "this Python cannot call the C library (hidden)",
    "subreaper": "this system does not give orphans to their grandparent (PR_SET_CHILD_SUBREAPER: Invalid argument)",
    "gvisor": "this system does not give orphans to their grandparent (PR_SET_CHILD_SUBREAPER: Invalid argument)",
    "other namespace": "/proc shows the processes of another PID namespace",
    "no proc": "/proc does not show processes (No such file or directory)",
}
HERE = [
    pytest.param(name, marks=[pytest.mark.root, pytest.mark.once] if name in ("other namespace", "no proc") else [])
    for name in MISSING
]


@contextmanager
def without(what: str, place: Path) -> Iterator[list[str]]:
    """The words that take it away from a command."""
    (place / "_ctypes.py").write_text("raise ImportError('hidden')\n")
    words = {
        "ctypes": ["env", f"PYTHONPATH={place}"],
        "subreaper": refusing(NO_SUBREAPER),
        "gvisor": refusing(NO_SUBREAPER, NO_FLIP),
        "other namespace": OTHER_NAMESPACE,
        "no proc": NOTHING,
    }[what]
    need(["unshare"])
    probe = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=support.DEADLINE)
    if probe.returncode:
        pytest.skip(f"cannot be had here: {probe.stderr.strip()}")
    yield words


@pytest.mark.parametrize("what", HERE)
@pytest.mark.parametrize("hand_off", ["fd", "hold"])
def test_what_needs_no_parent_works(what: str, hand_off: str, tmp_path: Path) -> None:
    files = ["--port-file", str(tmp_path / "p"), "--export", str(tmp_path / "e")]
    with without(what, tmp_path) as prefix:
        done = support.run("-H", hand_off, *files, "--", "sh", "-c", "echo $PORT", prefix=prefix)
    number = done.stdout.strip()
    assert (done.returncode, done.stderr) == (0, f"portexec: http://127.0.0.1:{number}\n")
    assert (tmp_path / "p").read_text() == f"{number}\n"


@pytest.mark.parametrize("what", HERE)
def test_auto_is_hold_with_the_reason(what: str, tmp_path: Path) -> None:
    with without(what, tmp_path) as prefix:
        done = support.run("-v", "--", *support.child("listening"), prefix=prefix)
    assert done.stderr.startswith(f"portexec: hand-off hold: hand-off guard cannot be had: {MISSING[what]}")
    assert done.returncode == 0


@pytest.mark.parametrize("what", HERE)
@pytest.mark.parametrize("hand_off", ["fd", "hold", "auto"])
@pytest.mark.parametrize("option", ["--then=true", "--restart=always", "--kill-after=1s", "--ready=none"])
def test_what_needs_a_parent_is_refused_by_name(what: str, hand_off: str, option: str, tmp_path: Path) -> None:
    name = option.partition("=")[0]
    with without(what, tmp_path) as prefix:
        words = ["--port-file", str(tmp_path / "p"), "-H", hand_off, option]
        done = support.run(*words, "--", "touch", str(tmp_path / "started"), prefix=prefix)
    first, hint = done.stderr.splitlines()
    assert first.startswith(f"portexec: error: {name} makes portexec stay as the parent, which it cannot here: {MISSING[what]}")
    assert (done.returncode, hint) == (125, "portexec: hint: leave it out")
    assert {"p", "started"}.isdisjoint(os.listdir(tmp_path))


@pytest.mark.parametrize("what", HERE)
def test_the_background_is_refused_before_a_name_is_claimed(what: str, tmp_path: Path, registry: Path) -> None:
    with without(what, tmp_path) as prefix:
        done = support.run("--name", "web", "--detach", "--", "touch", str(tmp_path / "started"), prefix=prefix)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(
        f"portexec: error: --detach makes portexec stay as the parent, which it cannot here: {MISSING[what]}"
    )
    assert not registry.exists()
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("what", HERE)
@pytest.mark.parametrize("words", [["-H", "guard"], ["--remap", "80"]])
def test_guard_is_refused(what: str, words: list[str], tmp_path: Path) -> None:
    with without(what, tmp_path) as prefix:
        done = support.run(*words, "--", "touch", str(tmp_path / "started"), prefix=prefix)
    assert done.returncode == 125
    assert done.stderr.startswith(f"portexec: error: hand-off guard cannot be had here: {MISSING[what]}")
    assert {"p", "started"}.isdisjoint(os.listdir(tmp_path))


@pytest.mark.parametrize("what", HERE)
def test_check_says_what_is_missing(what: str, tmp_path: Path) -> None:
    with without(what, tmp_path) as prefix:
        done = support.run("--check", "--json", prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    for name in ("hand_off_guard", "lifetime"):
        assert found[name].startswith(f"not available: {MISSING[what]}")
    assert found["auto"].endswith("else hold")


SERVE = """
import portexec, sys
try: portexec.serve([sys.executable]).__enter__()
except Exception as error: print(error)
"""


def refused_by_serve(*words: str) -> str:
    """What `serve` says, in a Python of these words."""
    done = subprocess.run(
        [*words, "-c", SERVE],
        env=os.environ | {"PYTHONPATH": str(support.ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=support.DEADLINE,
    )
    return done.stdout.partition("\n")[0]


@pytest.mark.parametrize("what", [row for row in HERE if row.values != ("ctypes",)])
def test_serve_says_what_is_missing(what: str, tmp_path: Path) -> None:
    with without(what, tmp_path) as prefix:
        said = refused_by_serve(*prefix, sys.executable)
    assert said.startswith(f"portexec cannot be the parent of a command here: {MISSING[what]}")


def test_serve_says_that_the_c_library_is_missing(tmp_path: Path) -> None:
    """A host imports nothing from where a test could hide the module, so this is a Python that has none."""
    import _ctypes

    if not hasattr(_ctypes, "__file__"):
        pytest.skip("this Python has it built in")
    python = tmp_path / "bin" / f"python3.{sys.version_info[1]}"
    library = tmp_path / "lib" / python.name
    compiled = library / "lib-dynload"
    compiled.mkdir(parents=True)
    python.parent.mkdir()
    shutil.copy(os.path.realpath(sys.executable), python)
    for file in Path(os.__file__).parent.iterdir():
        if file.name != compiled.name:
            (library / file.name).symlink_to(file)
    for file in Path(_ctypes.__file__).parent.iterdir():
        if not file.name.startswith("_ctypes."):
            (compiled / file.name).symlink_to(file)
    said = refused_by_serve(str(python))
    assert said.startswith("portexec cannot be the parent of a command here: this Python cannot call the C library (")


# A kernel that fixes what a socket shares when the socket is bound, as gVisor does

WEAKLY = "weakly: a program that sets SO_REUSEADDR can take the number where the command does not listen"


@pytest.mark.parametrize("listen", ["0", "*:0", "[::1]:0"])
def test_a_guard_without_flips_is_weak(listen: str) -> None:
    words = ["-v", "-l", listen, "-H", "fd", "--", *support.child("light")]
    with running(*words, prefix=refusing(NO_FLIP)) as started:
        port = int(started.line(rf"guarding port (\d+) {WEAKLY}$").group(1))
        assert support.read_line(started.process).startswith("serving ")
        attempts = every_attempt([], port)
        assert [attempt for attempt in attempts if attempt["got"] and not attempt["reuse_addr"]] == []
        host = "::1" if ":" in listen else "127.0.0.1"
        assert [attempt for attempt in attempts if attempt["got"] and attempt["address"] == host] == []


def test_the_reason_is_the_true_one() -> None:
    """A number that another one has, and what was not found out."""
    with running("-H", "hold", "--", *support.child("light"), prefix=refusing(NO_FLIP)) as started:
        port = started.url().rpartition(":")[2]
        assert support.read_line(started.process).startswith("serving ")
        done = support.run("-l", port, "--", "true", prefix=refusing(NO_FLIP))
        assert done.stderr.startswith(f"portexec: error: cannot listen on 127.0.0.1:{port}: Address already in use (")


def test_check_says_that_a_guard_is_weak() -> None:
    done = support.run("--check", "--json", prefix=refusing(NO_FLIP))
    assert json.loads(done.stdout)["hand_off_fd"] == f"available, {WEAKLY}"


# A Python that was built for older systems


def test_a_python_without_pidfd_open(tmp_path: Path) -> None:
    """As uv's own Pythons were for years: the guard works, and is not gated."""
    (tmp_path / "sitecustomize.py").write_text("import os\nassert os.pidfd_open\ndel os.pidfd_open\n")
    prefix = ["env", f"PYTHONPATH={tmp_path}"]
    done = support.run("--check", "--json", prefix=prefix)
    assert json.loads(done.stdout)["hand_off_guard"] == "available: a bind is made on the command's own socket"
    done = support.run("-q", "-H", "guard", "--", *support.child("binder"), "in_thread", prefix=prefix)
    assert done.stdout == '["ok", "ok", true, "ok"]\n'


# No-new-privileges

SET = "set already by whoever started portexec: hand-off guard takes nothing more"


def privileges_found(prefix: list[str]) -> str:
    done = support.run("--check", "--json", prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    return str(json.loads(done.stdout)["no_new_privileges"])


def test_no_new_privileges_that_is_set_already() -> None:
    assert privileges_found([program("setpriv"), "--no-new-privs"]) == SET


@pytest.mark.root
def test_no_new_privileges_of_root() -> None:
    if support.status_of("self")["NoNewPrivs"] != "0":
        pytest.skip("it is set for all tests")
    assert privileges_found([]) == "not needed with CAP_SYS_ADMIN"
    found = privileges_found(support.child("without_rights"))
    assert found.startswith("root lacks CAP_SYS_ADMIN here; needed by hand-off guard: ")


@pytest.mark.root
def test_a_set_user_id_program_of_root_without_its_rights(tmp_path: Path) -> None:
    """`guard` would take its rights away: auto chooses hold. Not where they are gone already."""
    no_new_privileges = [program("setpriv"), "--no-new-privs"]
    set_uid = tmp_path / "program"
    set_uid.write_bytes(Path("/bin/true").resolve().read_bytes())
    set_uid.chmod(0o4755)
    why = f"hand-off guard cannot be had: no-new-privileges would take its rights from {set_uid}, which is set-uid or set-gid"
    done = support.run("-v", "--", str(set_uid), prefix=support.child("without_rights"))
    assert done.stderr.startswith(f"portexec: hand-off hold: {why}\n")
    done = support.run("-v", "--", str(set_uid), prefix=[*support.child("without_rights"), *no_new_privileges])
    assert done.stderr.startswith("portexec: hand-off guard: ")
