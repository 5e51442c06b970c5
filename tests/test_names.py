"""Servers with a name: found, waited for, listed and stopped; and what becomes of them when something is killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

import portexec
from portexec import options, project, say
from portexec.cli import main
from portexec.command.execute import OPTION_WORDS
from portexec.names import listing, naming, stop, wait
from portexec.names import registry as registries
from portexec.names.registry import ENDED, READY, STARTING, STOPPING, Entry
from portexec.project import digest
from tests.support import DEADLINE, PORTEXEC, Running, get, is_gone, run, running, wait_for
from tests.support.names import LIGHT, ON_FD, VARIABLE, detach, entry_of, has_ended, listed, started
from tests.support.proc import state
from tests.support.processes import without_waiting
from tests.support.terminals import terminal_with

pytestmark = pytest.mark.usefixtures("registry")


@contextmanager
def named(name: str, *words: str, command: Sequence[str] = tuple(LIGHT)) -> Iterator[Running]:
    """A run with a name, in the foreground, that is ready."""
    with running("--name", name, "-k", "1m", *words, "--", *command) as process:
        wait_for(lambda: entry_of(name).is_ready)
        yield process


def url_of(*names: str) -> list[str]:
    result = run("--url", "-q", *names)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


# Found


def test_found_by_its_name() -> None:
    with named("web") as process:
        (url,) = url_of("web")
        assert url == process.url()
        assert get(url).startswith("hello from ")


def test_the_entry(registry: Path) -> None:
    with named("web") as process:
        entry = listed()["web"]
        assert entry["state"] == READY
        assert entry["pid"] == process.process.pid
        assert get(entry["listeners"][0]["url"]).split() == ["hello", "from", str(entry["command_pid"])]
        assert entry["listeners"][0]["local_url"] == f"http://web.localhost:{entry['listeners'][0]['port']}"
        assert entry["command"] == LIGHT
        assert entry["project"] == entry["directory"] == str(Path.cwd())
        assert (entry["exit_status"], entry["signal"], entry["log"]) == (None, None, None)
    modes = {stat.st_mode & 0o7777 for stat in map(Path.lstat, registry.rglob("*"))}
    assert modes == {0o700, 0o600}


@pytest.mark.parametrize("hand_off", ["fd", "guard", "hold"])
def test_with_every_hand_off(hand_off: str) -> None:
    command = ON_FD if hand_off == "fd" else LIGHT
    with running("--name", "web", "-H", hand_off, "--", *command):
        (url,) = url_of("web")
        assert get(url).startswith("hello from ")
        assert run("--stop", "web").returncode == 0


def test_several_listeners() -> None:
    words = ["--name", "web", "-l", "site=0", "-l", "admin=0", "-l", "unix:sock", "-H", "fd"]
    with running(*words, "--", *LIGHT) as process:
        site, admin, sock = process.url(), process.url(), process.url()
        assert url_of("web") == [site]
        assert url_of("web.admin", "web.site", "web.listener3") == [admin, site, f"unix:{Path.cwd()}/sock"]
        assert sock == "unix:sock"
        result = run("--url", "web.other")
        assert result.returncode == 125
        assert "web has no listener 'other'" in result.stderr
        rows = run("--list").stdout.splitlines()
        assert [row.split()[0] for row in rows] == ["NAME", "web", "web.admin", "web.listener3"]


def test_a_name_belongs_to_a_project(tmp_path: Path) -> None:
    """The same words in two git worktrees name two servers; below a worktree it is the same one."""
    one, other = tmp_path / "one", tmp_path / "other"
    subprocess.run(["git", "init", "-q", str(one)], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=one, check=True)
    subprocess.run(["git", "worktree", "add", "-q", str(other)], cwd=one, check=True)
    (one / "below").mkdir()
    urls = {place: started("web", cwd=place) for place in (one, other)}
    assert len(set(urls.values())) == 2
    for place in (one, other, one / "below"):
        mine = one if place == one / "below" else place
        assert run("--url", "web", cwd=place).stdout.split() == [urls[mine]]
        theirs = other if mine == one else one
        assert run("--list", "-q", cwd=place).stdout.split() == ["web", f"{theirs}:web"]
    assert run("--url", f"{other}:web", cwd=one).stdout.split() == [urls[other]]
    assert run("--stop", "web", cwd=one).returncode == 0
    assert listed(cwd=other)["web"]["state"] == READY
    assert run("--url", "web", "--project", str(other)).stdout.split() == [urls[other]]
    environment = os.environ | {"PORTEXEC_PROJECT": str(other)}
    assert run("--stop", "--all", env=environment).stderr == "portexec: web has ended\n"


def test_git_in_the_home_directory_makes_no_project(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    environment = os.environ | {"HOME": str(tmp_path)}
    with running("--name", "web", "--", *LIGHT, env=environment):
        wait_for(lambda: listed(env=environment).get("web", {}).get("project") == str(tmp_path / "project"))


@pytest.mark.root
def test_git_of_a_stranger_makes_no_project(tmp_path: Path) -> None:
    """In /tmp everybody can make one. That of the owner of where we are does: root works in others' checkouts."""
    here = str(tmp_path / "project")
    git = tmp_path / ".git"
    git.mkdir()
    assert project.directory(None, os.environ) == str(tmp_path)
    os.chown(git, 65534, 65534)
    assert project.directory(None, os.environ) == here
    git.rename(tmp_path / "git")
    git.symlink_to("/")
    os.lchown(git, 65534, 65534)
    assert project.directory(None, os.environ) == here
    os.chown(here, 65534, 65534)
    assert project.directory(None, os.environ) == str(tmp_path)


@pytest.mark.root
def test_git_in_a_home_directory_that_no_variable_names(tmp_path: Path) -> None:
    """As from cron: the user's entry in the password database names it."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "passwd").write_text(f"root:x:0:0::{tmp_path}:/bin/sh\n")
    script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"'
    code = "from portexec import project; print(project.directory(None, {}))"
    words = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path / "passwd"), sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE)
    if "mount" in result.stderr or "unshare" in result.stderr:
        pytest.skip(result.stderr)
    assert result.stdout == f"{tmp_path}/project\n"


SHUT = """
import os, sys
from portexec import project
os.chmod(".", 0)
if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
print(project.directory(None, {}))
"""


@pytest.mark.once
def test_a_working_directory_where_one_may_not_look(tmp_path: Path) -> None:
    """As after su in root's home."""
    place = tmp_path / "shut"
    place.mkdir()
    result = subprocess.run([sys.executable, "-c", SHUT], cwd=place, capture_output=True, text=True, timeout=DEADLINE)
    assert (result.stdout, result.stderr) == (f"{place}\n", "")


def test_a_project_that_has_gone(tmp_path: Path) -> None:
    """Its server can be stopped by the name that the list shows."""
    gone = tmp_path / "gone"
    gone.mkdir()
    started("web", cwd=gone)
    gone.rmdir()
    result = run("--list", "--project", str(gone))
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        125,
        f"portexec: error: --project '{gone}' is not a directory",
    )
    shown = run("--list", "-q").stdout.strip()
    assert shown == f"{gone}:web"
    assert run("--stop", shown).stderr == f"portexec: {gone}:web has ended\n"


def test_a_working_directory_that_has_gone(tmp_path: Path) -> None:
    """What means the same from everywhere goes on to work."""
    url = started("web")
    for words in ("--detach --name web -- true", "--name web --project / -- true", "--url web", "--url x:web", "--stop --all"):
        result = run_where_nothing_is(words)
        assert result.returncode == 125
        first, hint = result.stderr.splitlines()
        assert first == "portexec: error: the working directory cannot be found: No such file or directory"
        assert hint == "portexec: hint: go to the project's directory"
    name = f"{Path.cwd()}:web"
    assert run_where_nothing_is("--list -q").stdout == f"{name}\n"
    assert run_where_nothing_is(f"--url {name} {entry_of('web').pid}").stdout == f"{url}\n" * 2
    assert run_where_nothing_is(f"--stop {name}").stderr == f"portexec: {name} has ended\n"


def run_where_nothing_is(words: str) -> subprocess.CompletedProcess[str]:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    words_of_script = ["sh", "-c", script, "sh", *PORTEXEC, *words.split()]
    return subprocess.run(words_of_script, capture_output=True, text=True, timeout=DEADLINE)


def test_by_a_pid() -> None:
    started("web")
    entry = entry_of("web")
    assert url_of(str(entry.pid)) == url_of(str(entry.command_pid)) == url_of("web")
    assert run("--stop", str(entry.command_pid)).returncode == 0
    assert has_ended("web")


def test_a_name_that_runs_already() -> None:
    url = started("web")
    result = run("--name", "web", "--", "true")
    assert result.returncode == 125
    first, hint = result.stderr.splitlines()
    assert re.fullmatch(rf"portexec: error: web runs already, since \d+ s: {url}", first)
    assert hint.startswith("portexec: hint: `portexec --stop web` stops it")
    assert get(url).startswith("hello from ")


def test_a_failed_start_leaves_the_name(tmp_path: Path) -> None:
    assert run("--name", "web", "--", "no-such-command").returncode == 127
    assert listed()["web"]["exit_status"] == 127
    started("web")


# Waited for


def test_url_waits_for_one_that_is_yet_to_come() -> None:
    with subprocess.Popen([*PORTEXEC, "--url", "web"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stderr is not None
        assert asking.stderr.readline() == "portexec: note: web does not run (nothing runs); waiting for it to start\n"
        url = started("web")
        output, errors = asking.communicate(timeout=DEADLINE)
        assert (output, without_waiting(errors)) == (url + "\n", "")
        assert asking.returncode == 0


def test_url_of_what_never_runs() -> None:
    started("api")
    result = run("--url", "-q", "--ready-timeout", "50ms", "web")
    assert (result.returncode, result.stdout) == (124, "")
    assert result.stderr.splitlines() == [
        "portexec: error: web does not run after 0.05 s (what runs: api)",
        "portexec: hint: `portexec --detach --name web -- COMMAND` starts web",
    ]


def test_what_is_known_of_one_that_does_not_run(tmp_path: Path) -> None:
    """How it ended, a name that is like it, and what runs, for every verb."""
    detach("crash", command=["sh", "-c", "exit 3"])
    started("web")
    started("only", "--project", str(tmp_path))
    running, why = "(what runs: web)", "`portexec --logs crash` shows what it wrote"
    start = "`portexec --detach --name {0} -- COMMAND` starts {0}"
    for name, how, clue in (
        ("crash", r": ended 3, \d+ s ago", why),
        ("wbe", "", "did you mean web?"),
        ("only", "", f"did you mean {tmp_path}:only?"),
        ("xyz", "", ""),
    ):
        hints = [f"portexec: hint: {clue}"] if clue else []
        note, *rest = run("--stop", name).stderr.splitlines()
        assert re.fullmatch(rf"portexec: note: {name} does not run{how} {re.escape(running)}", note)
        assert rest == hints
        result = run("--url", "--ready-timeout", "10ms", name)
        note, *rest, error, hint = result.stderr.splitlines()
        again = " again" if name == "crash" else ""
        assert re.fullmatch(
            rf"portexec: note: {name} does not run{how} {re.escape(running)}; waiting for it to start{again}", note
        )
        assert rest == hints
        assert re.fullmatch(rf"portexec: error: {name} does not run after 0.01 s{how} {re.escape(running)}", error)
        between = "" if not clue else " " if clue.endswith("?") else "; "
        assert (result.returncode, hint) == (124, f"portexec: hint: {clue}{between}{start.format(name)}")
    assert "did you mean crash?" in run("--logs", "crsh").stderr
    assert "did you mean" not in run("--stop", "crsh").stderr, "it does not run, either"


@pytest.mark.once
@pytest.mark.parametrize("other", ["", "api"])
def test_one_that_is_stopping_is_none_that_runs(other: str) -> None:
    """It is not named among those that do, nor is there something to read of its end."""
    if other:
        started(other)
    claim = registries.claim(entry("web", project=str(Path.cwd()), log="/log"), os.environ)
    claim.tell_stopping()
    what = f"(what runs: {other})" if other else "(nothing else runs)"
    result = run("--url", "--ready-timeout", "0s", "web")
    assert (result.returncode, result.stdout) == (124, "")
    assert result.stderr.splitlines() == [
        f"portexec: note: web is stopping {what}; waiting for it to start again",
        f"portexec: error: web is stopping, and does not run again after 0 s {what}",
        "portexec: hint: `portexec --detach --name web -- COMMAND` starts web",
    ]
    result = run("--url", str(os.getpid()))
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        125,
        f"portexec: error: {os.getpid()} is stopping {what}",
    )
    claim.let_go()


@pytest.mark.once
def test_a_pid_means_one_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Another run of its name has another pid."""
    claim = registries.claim(entry("web", project=str(Path.cwd()), state=STARTING), os.environ)

    def end() -> None:
        claim.tell_ended(3 << 8)
        claim.let_go()

    instead_of_pauses(monkeypatch, end)
    assert main(["--url", str(os.getpid())]) == 125
    assert capfd.readouterr() == ("", "portexec: error: web ended before it was ready: exit status 3\n")


@pytest.mark.once
def test_names_in_messages_can_be_given_back(tmp_path: Path) -> None:
    """Also those of another project, by `--project`."""
    project = ["--project", str(tmp_path)]
    started("web", *project)
    name = f"{tmp_path}:web"
    for words in ([], ["--reuse"]):
        result = detach("web", *project, *words, command=["true"])
        assert result.stderr.startswith(f"portexec: error: {name} runs already")
        assert f"hint: `portexec --stop {name}` stops it" in result.stderr
    assert run("--stop", name).stderr == f"portexec: {name} has ended\n"


def test_nothing_of_this_project_runs(tmp_path: Path) -> None:
    note = f"portexec: note: nothing of the project {Path.cwd()} runs\n"
    assert run("--stop", "--all").stderr == note
    assert run("--stop", "--all", "-q").stderr == ""
    started("web", "--project", str(tmp_path))
    hint = "portexec --list shows it; `portexec --stop --all --project DIR` stops all of one"
    assert run("--stop", "--all").stderr == f"{note}portexec: hint: what runs is in other projects: {hint}\n"
    assert "(what runs is in other projects: see portexec --list)" in run("--stop", "api").stderr
    hint = f"`portexec --detach --project {tmp_path} --name api -- COMMAND` starts api"
    result = run("--url", "-q", "--ready-timeout", "0", f"{tmp_path}:api")
    assert result.stderr.splitlines()[1] == f"portexec: hint: {hint}"
    assert f"(what runs: {tmp_path}:web)" in result.stderr


def test_a_pid_that_nobody_has_is_not_waited_for() -> None:
    result = run("--url", "1")
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        125,
        "portexec: error: no server with a name has the pid 1",
    )
    assert run("--stop", "1").stderr == "portexec: note: no server with a name has the pid 1\n"


def test_a_listener_is_no_whole_server() -> None:
    started("web", "-l", "a=0", "-l", "b=0", "-H", "fd")
    for verb in ("--stop", "--logs"):
        result = run(verb, "web.b")
        assert (result.returncode, result.stderr.splitlines()[0]) == (
            125,
            f"portexec: error: {verb} takes whole servers, and web.b means a listener of web",
        )
    assert entry_of("web").is_ready


def test_url_of_what_ends_before_it_is_ready() -> None:
    with running("--name", "web", "--log", "log", "--", *LIGHT, "silent") as process:
        wait_for(lambda: "waiting" in Path("log").read_text())

        def look() -> Entry:
            found = entry_of("web")
            if process.process.poll() is None:
                process.process.terminate()
            return found

        with pytest.raises(portexec.PortexecError) as caught:
            wait.until_ready("web", look, DEADLINE)
        assert caught.value.message == "web was stopped before it was ready"
        assert caught.value.hint == "`portexec --logs web` shows what it wrote"


@pytest.mark.once
def test_who_waits_is_told_for_what(registry: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """For `--url`, `--stop` and a second start alike, and for `--detach`: after 5 s, 15 s and so on; here at once."""
    assert list(islice(say.moments(), 6)) == [5, 15, 30, 60, 120, 180]
    monkeypatch.setattr(say, "_MOMENTS", (0, 2 * DEADLINE))
    told = "portexec: note: 0 s: waiting for web to {}\n"
    for is_quiet in (False, True):
        claim = registries.claim(entry("web", state=STARTING), os.environ)
        run = claim.entry
        instead_of_pauses(monkeypatch, partial(claim.tell_ready, 0, []))
        assert wait.until_ready("web", wait.last_of(run), DEADLINE, run=run, is_quiet=is_quiet).is_ready
        assert capfd.readouterr().err == ("" if is_quiet else told.format("be ready"))
        instead_of_pauses(monkeypatch, claim.let_go)
        assert wait.until_over(run, DEADLINE, wait.reporter("web to end", is_quiet=is_quiet)) is None
        assert capfd.readouterr().err == ("" if is_quiet else told.format("end"))


def instead_of_pauses(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have this happen between two looks. So there are two looks, however slow the machine is."""
    monkeypatch.setattr(wait, "pauses", lambda: act)


# States


def test_a_restart_keeps_the_entry() -> None:
    with named("web", "--restart", "always") as process:
        before = entry_of("web")
        get_nothing(f"{before.listeners[0]['url']}/exit/3")
        wait_for(lambda: entry_of("web").is_ready and entry_of("web").command_pid != before.command_pid)
        after = entry_of("web")
        assert after.is_same_run(before)
        assert after.listeners == before.listeners
        assert process.stop() in (0, -signal.SIGTERM)
    assert entry_of("web").state == ENDED


def test_a_replacement_keeps_the_entry() -> None:
    with running("--name", "web", "--restart", "on-failure", "--", *ON_FD) as process:
        wait_for(lambda: entry_of("web").is_ready)
        before = entry_of("web")
        process.process.send_signal(signal.SIGHUP)
        wait_for(lambda: entry_of("web").command_pid != before.command_pid)
        after = entry_of("web")
        assert after.is_same_run(before)
        assert after.since == before.since


def get_nothing(url: str) -> None:
    """Ask a server that ends of it."""
    try:
        get(url)
    except OSError:
        pass


def test_a_lazy_one_is_ready_at_once() -> None:
    with running("--name", "web", "--lazy", "--", *ON_FD):
        (url,) = url_of("web")
        assert entry_of("web").command_pid == 0
        assert get(url).startswith("hello from ")


def test_starting_until_it_is_ready() -> None:
    with running("--name", "web", "--log", "log", "--", *LIGHT, "silent"):
        wait_for(lambda: "waiting" in Path("log").read_text())
        assert listed()["web"]["state"] == STARTING
        assert re.search(r"^web +starting, \d+ s +\d+ +http://", run("--list").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("end", "shown", "status", "number"),
    [
        ("exit/3", "ended 3, 0 s ago", 3, None),
        ("exit/0", "ended 0, 0 s ago", 0, None),
        ("kill/9", "killed by SIGKILL", None, 9),
    ],
)
def test_how_it_ended(end: str, shown: str, status: int | None, number: int | None) -> None:
    with named("web") as process:
        get_nothing(f"{process.url()}/{end}")
        process.process.wait(DEADLINE)
    entry = listed()["web"]
    assert (entry["state"], entry["exit_status"], entry["signal"], entry["pid"]) == (ENDED, status, number, None)
    assert not entry["stopped"]
    assert shown.partition(",")[0] in run("--list").stdout


# Stopped


@pytest.mark.parametrize("how", ["--stop", "INT", "TERM"])
def test_a_run_that_was_stopped(how: str) -> None:
    """It is one deliberate act. How the command ended of that is in the JSON."""
    with named("web") as process:
        if how == "--stop":
            run("--stop", "web")
        else:
            process.process.send_signal(signal.Signals[f"SIG{how}"])
        process.process.wait(DEADLINE)
    known = listed()["web"]
    assert (known["state"], known["stopped"], known["exit_status"]) == (ENDED, True, None)
    assert known["signal"] in (signal.SIGINT, signal.SIGTERM)
    assert re.search(r"^web +stopped, \d+ s ago ", run("--list").stdout, re.MULTILINE)


def test_stop() -> None:
    with named("web") as process:
        command = entry_of("web").command_pid
        result = run("--stop", "web")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "portexec: web has ended\n")
        assert is_gone(command)
        assert process.process.wait(DEADLINE) == -signal.SIGTERM
    result = run("--stop", "web", "never")
    web, never = result.stderr.splitlines()
    assert web.startswith("portexec: note: web does not run: ")
    assert (result.returncode, never) == (0, "portexec: note: never does not run (nothing runs)")
    assert run("--stop", "-q", "web").stderr == ""


def test_stop_all_is_all_of_this_project(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    started("web", cwd=elsewhere)
    for name in ("web", "api"):
        started(name)
    result = run("--stop", "--all")
    assert sorted(result.stderr.splitlines()) == ["portexec: api has ended", "portexec: web has ended"]
    assert entry_of("web", elsewhere).is_ready
    assert run("--stop", "--all").stderr.startswith("portexec: note: nothing of the project ")


def test_stop_of_one_that_ignores_term() -> None:
    started("web", "-k", "100ms", command=[*LIGHT, "ignore"])
    command = entry_of("web").command_pid
    assert run("--stop", "web").returncode == 0
    assert is_gone(command)


def test_stop_of_one_that_is_stopping() -> None:
    """A second request would be one to kill it. This process takes the part of the run's portexec."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        claim = registries.claim(entry("web"), os.environ)
        stop.ask(claim.entry)
        assert received == [signal.SIGTERM]
        claim.tell_stopping()
        stop.ask(claim.entry.changed(state=READY))
        assert received == [signal.SIGTERM]
        claim.let_go()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stop_of_one_that_ctrl_z_has_stopped() -> None:
    started("web")
    pid = entry_of("web").pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state(pid) == "T")
    assert run("--stop", "web").stderr == "portexec: web has ended\n"


def test_a_stranger_with_the_same_pid_is_not_told() -> None:
    """As after the end of a run, or from another container."""
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        started("web")
        assert not stop.tell(entry_of("web").changed(pid=stranger.pid))
        assert entry_of("web").is_ready
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.once
def test_one_in_another_container_cannot_be_stopped_from_here(registry: Path) -> None:
    """Nobody waits for that, and the others are stopped all the same. Its pid means another process here, or none."""
    started("api")
    claim = registries.claim(entry("web", project=str(Path.cwd())), os.environ)
    (known,) = registry.glob("*/web.*.json")
    known.write_text(json.dumps(claim.entry.changed(pid=1).fields()))
    result = run("--stop", "web", "api")
    assert (result.returncode, result.stderr.splitlines()) == (
        125,
        [
            "portexec: error: web cannot be told to end from here",
            "portexec: hint: it runs in another container; stop it there",
            "portexec: api has ended",
        ],
    )
    claim.let_go()


# Killed


@pytest.mark.parametrize("who", ["front", "shim", "both"])
def test_killed(who: str) -> None:
    """Nothing is left; the entry and the log are."""
    started("web", "-k", "1s")
    entry = entry_of("web")
    shim = int(Path(f"/proc/{entry.command_pid}/stat").read_text().rpartition(")")[2].split()[1])
    pids = {"front": [entry.pid], "shim": [shim], "both": [entry.pid, shim]}[who]
    if who == "both":  # at once: the shim would end by itself after the front
        os.kill(shim, signal.SIGSTOP)
        wait_for(lambda: state(shim) == "T")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: has_ended("web"))
    wait_for(lambda: is_gone(entry.command_pid))
    known = listed()["web"]
    assert known["state"] == ENDED
    assert (known["exit_status"], known["signal"]) == ((None, signal.SIGKILL) if who == "shim" else (None, None))
    assert ("portexec was killed" in run("--list").stdout) == (who != "shim")
    assert run("--logs", "web").stdout.startswith("serving ")
    started("web")


def test_a_name_is_taken_for_as_long_as_anything_lives() -> None:
    """Of a portexec that was killed the shim is left, which needs its time with a command that ignores TERM."""
    started("web", "-k", "1s", command=[*LIGHT, "ignore"])
    entry = entry_of("web")
    os.kill(entry.pid, signal.SIGKILL)
    wait_for(lambda: has_ended("web"))
    assert is_gone(entry.command_pid)


def test_a_run_whose_portexec_was_killed_is_stopping() -> None:
    """Its shim stops it, whatever the entry says. Nobody has waited for the portexec, which is there as a zombie."""
    with named("web", "-k", "1m", command=[*LIGHT, "ignore"]) as process:
        process.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.process.pid, os.WEXITED | os.WNOWAIT)
        entry = entry_of("web")
        assert (entry.state, entry.is_alive, entry.is_ready) == (STOPPING, True, False)
        assert listed()["web"]["state"] == STOPPING
        os.kill(entry.command_pid, signal.SIGKILL)


# Listed


def entry(name: str, **fields: object) -> Entry:
    usual: dict[str, object] = {
        "run": name,
        "name": name,
        "project": "/p",
        "state": READY,
        "since": 0.0,
        "pid": 2,
        "pid_started": 1,
        "command_pid": 3,
        "command": ["npm", "start"],
        "directory": "/p",
        "kill_after": 5.0,
        "log": "",
        "listeners": [{"name": "listener1", "url": "http://127.0.0.1:5000", "host": "127.0.0.1", "port": 5000}],
        "wait_status": None,
        "is_alive": True,
    }
    return Entry(**{**usual, **fields})


def test_the_list_begins_with_what_runs_in_this_project() -> None:
    """The names alone are of what runs: they are for `portexec --stop $(portexec --list -q)`."""
    found = [
        entry("z", project="/other"),
        entry("b"),
        entry("a", is_alive=False, state=ENDED, wait_status=0),
        entry("c"),
    ]
    assert listing.text(found, "/p", as_json=False, only_names=True).split() == ["b", "c", "/other:z"]
    found.append(entry("y", project="/other", is_alive=False, state=ENDED, wait_status=0))
    rows = listing.text(found, "/p", as_json=False, only_names=False).splitlines()
    assert [row.split()[0] for row in rows] == ["NAME", "b", "c", "/other:z", "a", "/other:y"]


def test_the_list_of_one_project(tmp_path: Path) -> None:
    started("web")
    started("api", "--project", str(tmp_path))
    assert set(listed()) == {"web", f"{tmp_path}:api"}
    assert run("--list", "-q", "--project", str(tmp_path)).stdout == "api\n"
    assert run("--list", "-q", "--project", ".").stdout == "web\n"


def test_commands_are_shown_as_one_writes_them() -> None:
    words = ["vite", "--port", "{port}", "http://{host}:{api.port}", "a b", "{a,b}", "", "it's"]
    shown = listing.in_words(words)
    assert shown == """vite --port {port} http://{host}:{api.port} 'a b' '{a,b}' '' 'it'"'"'s'"""
    assert shlex.split(shown) == words


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (None, ["NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER", "COMMAND"]),
        (200, ["NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER", "COMMAND"]),
        (92, ["NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER", "COMMAND"]),
        (91, ["NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER"]),
        (78, ["NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER"]),
        (77, ["NAME", "STATE", "PID", "ADDRESS", "COMMAND"]),
        (65, ["NAME", "STATE", "PID", "ADDRESS", "COMMAND"]),
        (64, ["NAME", "STATE", "PID", "ADDRESS"]),
        (51, ["NAME", "STATE", "PID", "ADDRESS"]),
        (50, ["NAME", "STATE", "ADDRESS"]),
        (46, ["NAME", "STATE", "ADDRESS"]),
        (45, ["web"]),
        (23, ["web"]),
    ],
)
def test_the_table_fits_the_terminal(width: int | None, columns: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First the command is left out, then the address for browsers, then both, at last the pid, and then the columns."""
    monkeypatch.setattr(listing, "age", lambda _: "0 s")  # not 10 s, which is wider
    found = [entry("web", command=["x" * 300]), entry("other", listeners=[])]
    found += [entry("long", state=ENDED, is_alive=False, wait_status=0, command=["y"])]
    lines = listing.table(found, "/p", width).splitlines()
    assert re.split("  +", lines[0]) == columns
    assert width is None or max(map(len, lines)) <= width
    assert ("x" * 300 in lines[-1] + lines[1] + lines[2]) == (width is None)


@pytest.mark.once
def test_letters_of_two_columns_are_counted_as_two() -> None:
    """And accents that are characters of their own as none."""
    found = [
        entry("web", project="/\u65e5\u672c", command=["\u8a9e" * 60]),
        entry("web", project="/cafe\u0301", command=["a" * 100]),
    ]
    head, *rows = listing.table(found, "/p", 100).splitlines()
    assert head.index("STATE") == len("/xxxx:web  ")
    assert rows[0].index("ready") == head.index("STATE") - 2
    assert rows[1].index("ready") == head.index("STATE") + 1
    assert all(row.endswith("...") for row in rows)
    assert len(rows[0]) + 2 + rows[0].count("\u8a9e") in (99, 100)
    assert len(rows[1]) - 1 == 100


def test_a_project_in_the_home_directory_is_shown_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table shows can be given back, in quotes, too."""
    monkeypatch.setenv("HOME", "/home/me")
    found = [entry("web", project=project) for project in ("/home/me/app", "/home/menu/app", "/home/me")]
    names = [line.split()[0] for line in listing.table(found, "/p", None).splitlines()[1:]]
    assert names == ["~/app:web", "/home/menu/app:web", "/home/me:web"]
    assert [naming.parse(name, "/p", "--url").project for name in names] == [each.project for each in found]


def test_names_and_commands_play_no_tricks() -> None:
    found = [entry("web", project="/a\n\x1b[2J", command=["\x1b]0;x\x07", "\udc80"])]
    assert listing.table(found, "/p", None).replace("\n", "").isprintable()


def test_a_directory_with_control_characters(tmp_path: Path) -> None:
    """It plays no tricks, and the name that is shown can be given back."""
    place = tmp_path / "a\x1b[31m\nb\u202e"
    place.mkdir()
    url = started("web", cwd=place)
    shown = f"{tmp_path}/a\\x1b[31m\\nb\\u202e:web"
    assert run("--list", "-q").stdout == f"{shown}\n"
    assert url_of(shown, f"{shown}.listener1", f"{place}:web") == [url] * 3
    assert portexec.find(shown).url == url
    assert run("--stop", shown).returncode == 0


def test_the_list_on_a_terminal() -> None:
    started("web", command=[*LIGHT, "x" * 300])
    words = shlex.join([*PORTEXEC, "--list"])
    shown = on_terminal(f"stty cols 100; {words}")
    assert max(map(len, shown.splitlines())) == 100
    assert "..." in shown


def test_a_person_is_told_the_address_for_browsers() -> None:
    """It keeps the cookies of this server apart from those of others. A program is told the usual one alone."""
    words = shlex.join([*PORTEXEC, "--detach", "--name", "web", "-l", "a=0", "-l", "b=0", "-l", "unix:sock", "-H", "fd", "--"])
    shown = on_terminal(f"{words} {shlex.join(LIGHT)}").splitlines()
    ports = [each["port"] for each in listed()["web"]["listeners"][:2]]
    assert shown[3:] == [f"portexec: in a browser: http://web.localhost:{port}" for port in ports]
    words = shlex.join([*PORTEXEC, "--name", "api", "--ready", "none", "-H", "fd", "--", "printenv", "PORT"])
    announced, other, port = on_terminal(words).splitlines()
    assert announced == f"portexec: http://127.0.0.1:{port}"
    assert other == f"portexec: in a browser: http://api.localhost:{port}"
    assert on_terminal(words.replace(" --name ", " -q --name ")).isdecimal()


def on_terminal(words: str) -> str:
    """What a line of shell shows on a terminal."""
    with terminal_with("/bin/sh", "-c", words) as terminal:
        return without_waiting(terminal.rest().replace("\r\n", "\n")).strip()


# Logs


def test_logs_of_one_in_the_background() -> None:
    url = started("web")
    get(f"{url}/write/5")
    assert re.fullmatch(r"serving \d+\nxxxxxwritten\n", run("--logs", "web").stdout)
    with subprocess.Popen([*PORTEXEC, "--logs", "web", "-f"], stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stdout.readline().startswith("serving ")
        get(f"{url}/write/7")
        assert [following.stdout.readline() for _ in range(2)] == ["xxxxxwritten\n", "xxxxxxxwritten\n"]
        run("--stop", "web")
        following.communicate(timeout=DEADLINE)
        assert following.returncode == 0
    assert run("--logs", "web").stdout.startswith("serving "), "kept when it has ended"


def test_a_new_start_has_a_new_log() -> None:
    for _ in range(2):
        started("web")
        run("--stop", "web")
    assert run("--logs", "web").stdout.count("serving") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("never", "portexec: error: no run of the name never is known"),
        ("web", "portexec: error: web keeps no log: it writes to the terminal or file that it was started with"),
    ],
)
def test_logs_that_are_not_there(name: str, message: str) -> None:
    run("--name", "web", "--", "true")
    result = run("--logs", name)
    assert (result.returncode, result.stdout, result.stderr.splitlines()[0]) == (1, "", message)


def test_logs_that_go_through_a_fifo() -> None:
    """What is in there is for its reader."""
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    started("web", "--log", "fifo")
    result = run("--logs", "web")
    assert (result.returncode, result.stdout) == (1, "")
    message = f"the log {Path.cwd()}/fifo is no regular file, and cannot be read again"
    assert result.stderr.splitlines()[0] == f"portexec: error: {message}"
    assert os.read(reader, 1000).startswith(b"serving ")
    os.close(reader)


# Forgotten


def test_forget(registry: Path) -> None:
    for name in ("web", "api", "old"):
        started(name)
    run("--stop", "api", "old")
    result = run("--forget", "api", "web")
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        125,
        "portexec: error: web runs, and is not forgotten",
    )
    assert set(listed()) == {"web", "api", "old"}
    result = run("--forget", "api", "never")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.splitlines() == ["portexec: note: no run of the name never is known", "portexec: api is forgotten"]
    assert run("--forget", "--all").stderr == "portexec: old is forgotten\n"
    assert run("--forget", "--all").stderr == f"portexec: note: nothing of the project {Path.cwd()} has ended\n"
    assert set(listed()) == {"web"}
    (folder,) = registry.iterdir()
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"lock", "web"}
    run("--stop", "web")
    assert run("--forget", "-q", "web").stderr == ""
    started("web")


# The directory


def claim_in(environment: dict[str, str]) -> Path:
    """Run something with a name there; where the registry is."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | environment
    result = run("-q", "--name", "web", "--", "true", env=environment)
    assert result.returncode == 0, result.stderr
    assert set(listed(env=environment)) == {"web"}
    return Path(next(iter(registries._folders(environment))))


def test_the_directory_is_in_the_home(tmp_path: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": ""}
    assert claim_in(home) == tmp_path / ".local" / "state" / "portexec" / boot
    for place in (tmp_path / "xdg", tmp_path / "not" / "yet"):
        assert claim_in(home | {"XDG_STATE_HOME": str(place)}) == place / "portexec" / boot
    assert claim_in(home | {"XDG_STATE_HOME": "relative"}) == tmp_path / ".local" / "state" / "portexec" / boot


@pytest.mark.parametrize("umask", [0, 0o777])
def test_what_is_made_is_for_the_user_alone(umask: int, tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path / "state" / "home")}
    before = os.umask(umask)
    try:
        for name in ("web", "api"):
            claim = registries.claim(entry(name), environment)
            claim.make_log()
            claim.let_go()
    finally:
        os.umask(before)
    made = [*tmp_path.glob("state/**/*"), tmp_path / "state"]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700, 0o600}
    assert {each.name for each in registries.entries(environment)} >= {"web", "api"}


@pytest.mark.root
def test_a_state_home_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(portexec.PortexecError, match="as XDG_STATE_HOME says, belongs to another user"):
        registries.claim(entry("web"), {"XDG_STATE_HOME": str(tmp_path)})
    assert not list(tmp_path.glob("portexec"))


@pytest.mark.parametrize("what", ["link", "file", "open"])
def test_a_directory_that_is_not_safe(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "bad"
    if what == "link":
        (tmp_path / "elsewhere").mkdir(0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif what == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777)
    monkeypatch.setenv(VARIABLE, str(place))
    for words in (["--name", "web", "--", "touch", "started"], ["--detach", "--name", "web", "--", "touch", "started"]):
        result = run(*words)
        assert result.returncode == 125
        first, hint = result.stderr.splitlines()
        assert first.startswith(f"portexec: error: the registry {place} is ")
        assert hint.startswith("portexec: hint: ")
        assert not Path("started").exists()
    assert what == "link" or not list(tmp_path.glob("elsewhere/*"))


@pytest.mark.root
def test_a_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "theirs"))
    for words in (["--name", "web", "--", "true"], ["--list"], ["--stop", "web"]):
        result = run(*words)
        assert result.returncode == 125
        assert result.stderr.startswith(f"portexec: error: the registry {tmp_path}/theirs belongs to another user\n")


def test_a_lock_that_cannot_be_written(registry: Path) -> None:
    """As on a disk that was mounted read-only meanwhile. The run lives."""
    url = started("web")
    (lock,) = registry.glob("*/web.*.lock")
    lock.chmod(0o400)
    assert url_of("web") == [url]
    assert listed()["web"]["state"] == READY


def test_a_lock_that_nobody_can_ask(registry: Path) -> None:
    """A run of which nobody knows whether it lives is not taken for one that has ended."""
    started("web")
    (lock,) = registry.glob("*/web.*.lock")
    lock.rename(lock.with_name("lock-of-web"))
    lock.symlink_to("lock-of-web")
    try:
        for words in (["--list"], ["--url", "web"], ["--stop", "web"], ["--detach", "--name", "web", "--", *LIGHT]):
            result = run(*words)
            assert result.returncode == 125
            assert result.stderr.startswith("portexec: error: cannot ")
            assert result.stderr.splitlines()[0].endswith(f"the registry {lock.parent}: Too many levels of symbolic links")
    finally:
        lock.unlink()
        lock.with_name("lock-of-web").rename(lock)


def test_what_is_no_entry_is_passed_over(registry: Path) -> None:
    started("web")
    (folder,) = registry.iterdir()
    fields = entry_of("web").fields()
    wrong: list[dict[str, object]] = [
        {"since": "now"},
        {"wait_status": 1 << 70},
        {"command": [1]},
        {"listeners": [1]},
        {"listeners": [{}]},
        {"name": None},
    ]
    texts = ["", "[]", '{"name": 1}', "\0", "[" * 100000, *(json.dumps({**fields, **each}) for each in wrong)]
    for number, text in enumerate(texts):
        (folder / f"bad{number}.json").write_text(text)
    (folder / "f.json").mkdir()
    os.mkfifo(folder / "fifo.json")  # nobody writes to it, and nobody waits for that
    assert set(listed()) == {"web"}
    assert run("--list").stdout.count("\n") == 2


def test_what_ended_long_ago_is_forgotten(registry: Path) -> None:
    for name in ("old", "new"):
        started(name)
        run("--stop", name)
    started("running")
    (folder,) = registry.iterdir()
    other_boot = registry / "other-boot"
    other_boot.mkdir(0o700)
    for name in ("lock", "x.1.json", "x.1.lock", "x.1.log"):
        (other_boot / name).write_text("")
    for name in ("y.1.lock", "y.1.new", "z.1.lock"):
        (folder / name).write_text("")
    strange = [registry / "file", registry / "closed"]
    strange[0].write_text("")
    strange[1].mkdir(0o000)
    old = [*folder.glob("[oryz]*.*"), *other_boot.iterdir(), other_boot, *strange]
    for path in [folder / "lock", *old]:
        os.utime(path, (0, 0))
    started("one-more")
    assert set(listed()) == {"new", "one-more", "running"}
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"lock", "new", "one-more", "running"}
    assert set(registry.iterdir()) == {folder, *strange}


def test_after_a_boot(registry: Path) -> None:
    """What has ended is known. What lives in another boot's directory does so on another machine that has the same home."""
    for name in ("ended", "elsewhere"):
        started(name)
    run("--stop", "ended")
    (folder,) = registry.iterdir()
    before = folder.rename(registry / "boot-before")
    (told,) = before.glob("ended.*.json")
    told.write_text(told.read_text().replace(folder.name, before.name))  # where the log is
    assert {name: entry["state"] for name, entry in listed().items()} == {"ended": ENDED}
    assert run("--logs", "ended").stdout.startswith("serving ")
    started("ended")
    assert listed()["ended"]["state"] == READY
    run("--stop", "ended")
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    before.rename(folder)


@pytest.mark.root
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run with a name begins; one that runs goes on."""
    place = tmp_path / "small"
    place.mkdir(0o700)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "x", str(place)], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        pytest.skip("cannot mount")
    try:
        monkeypatch.setenv(VARIABLE, str(place))
        with running("--name", "api", "--", *LIGHT) as process:
            wait_for(lambda: entry_of("api").is_ready)
            fill(place / "fill")
            result = run("--name", "web", "--", "touch", "started")
            assert result.returncode == 125
            assert "No space left on device" in result.stderr
            assert not Path("started").exists()
            assert get(process.url()).startswith("hello from ")
            assert process.stop() == -signal.SIGTERM
        assert (entry_of("api").state, entry_of("api").wait_status) == (ENDED, signal.SIGTERM)
    finally:
        subprocess.run(["umount", str(place)], check=False)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_one_user_one_registry_without_a_home(tmp_path: Path) -> None:
    """From cron, in a container: no HOME, or one of somebody else. It is the user's own."""
    import pwd

    home = pwd.getpwuid(os.geteuid()).pw_dir
    expected = registries._homes({"HOME": home})[0]
    assert registries._homes({}) == registries._homes({"HOME": home})
    assert registries._homes({"HOME": "/no/such"})[0] == expected
    assert registries._homes({"HOME": "/proc/1/root/nowhere"})[0] == expected


# Bad input

VERBS = [option.long for _, group in options.GROUPS for option in group if option.verb]
REFUSED = [
    (["--name", "", "x"], "--name is empty"),
    (["--name", "a b", "x"], "--name 'a b' is not a name"),
    (["--name", "a.b", "x"], "--name 'a.b' is not a name"),
    (["--name", "a/b", "x"], "--name 'a/b' is not a name"),
    (["--name", "../a", "x"], "--name '../a' is not a name"),
    (["--name", "é", "x"], "--name 'é' is not a name"),
    (["--name", "1a", "x"], "--name '1a' is not a name"),
    (["--name", "-a", "x"], "--name '-a' is not a name"),
    (["--name", "a" * 65, "x"], f"--name '{'a' * 65}' is 65 characters long"),
    (["--name", "a", "--name", "b", "x"], "option --name is given twice"),
    (["--detach", "x"], "--detach needs --name NAME"),
    (["--reuse", "--name", "a", "x"], "--reuse needs --detach"),
    (["--reuse", "x"], "--reuse needs --detach --name NAME"),
    (["--all", "x"], "--all needs --stop"),
    (["--all"], "--all needs --stop"),
    (["--follow", "x"], "--follow needs --logs NAME"),
    (["-f"], "--follow needs --logs NAME"),
    (["--detach", "--name", "a", "--then", "y", "x"], "--detach cannot go with --then"),
    (["--detach", "--name", "a", "--ready-fd", "1", "x"], "--detach cannot go with --ready-fd"),
    (["--name", "a"], "no command to run"),
    (["--name", "a", "--project", "/no/such", "x"], "--project '/no/such' is not a directory"),
    (["--url"], "--url needs a name"),
    (["--stop"], "--stop needs a name"),
    (["--logs"], "--logs takes one name"),
    (["--logs", "a", "b"], "--logs takes one name"),
    (["--list", "a"], "--list takes no names"),
    (["--url", "a", "--", "npm", "start"], "--url takes names, and no command"),
    (["--list", "--", "npm"], "--list takes nothing after it, and no command"),
    (["--url", "--stop", "a"], "--url cannot go with --stop"),
    (["--url", "a b"], "--url 'a b' is not a name"),
    (["--url", "a."], "--url 'a.' names no listener"),
    (["--url", ""], "--url is empty"),
    (["--url", "-l", "0", "a"], "--listen means nothing with --url"),
    (["--list", "--all"], "--all means nothing with --list"),
    (["--stop", "--all", "a"], "--stop takes names or --all"),
    (["--forget", "--all", "a"], "--forget takes names or --all"),
    (["--forget", "a.b"], "--forget takes whole servers, and a.b means a listener of a"),
    (["--url=a"], "option --url takes no value"),
    (["--url", "--ready-timeout", "soon", "a"], "--ready-timeout 'soon' is no duration"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refused(words: list[str], message: str, registry: Path) -> None:
    result = run(*words)
    first, hint = result.stderr.splitlines()
    assert (result.returncode, result.stdout, first) == (125, "", f"portexec: error: {message}")
    assert hint.startswith("portexec: hint: ")
    assert not registry.exists()


def test_options_may_follow_names() -> None:
    started("web")
    run("--stop", "web", "-q")
    assert has_ended("web")
    assert run("--logs", "web", "--follow").returncode == 0


def test_a_dry_run_claims_nothing(registry: Path) -> None:
    named = f"name web, of the project {Path.cwd()}"
    detached = "detach goes to the background when ready, and prints the address"
    for words, expected in (
        (["--name", "web"], [named]),
        (["--detach", "--name", "web"], [named, detached]),
        (["--detach", "--reuse", "--name", "web"], [named, detached, "reuse if the same runs already, takes that"]),
    ):
        result = run("-n", *words, "--", "true")
        rows = [" ".join(row.split()) for row in result.stdout.splitlines()]
        assert [row for row in rows if row.startswith(("name", "detach", "reuse"))] == expected
        planned = json.loads(run("-n", "--json", *words, "--", "true").stdout)
        assert (planned["name"], planned["project"], planned["detach"]) == ("web", str(Path.cwd()), "--detach" in words)
    assert not registry.exists()


@pytest.mark.once
@pytest.mark.usefixtures("stable_numbers")
def test_a_dry_run_knows_who_has_the_name() -> None:
    """It says so before it says that the number is in use, as the run does."""
    url = started("web", "-l", "stable")
    again = ["--name", "web", "-l", url.rpartition(":")[2], "--detach"]
    message = "portexec: error: web runs already, "
    for words, command in ((again, LIGHT), ([*again, "--reuse"], ["true"])):
        result = run("-n", *words, "--", *command)
        assert (result.returncode, result.stdout, result.stderr[: len(message)]) == (125, "", message)
    result = run("-n", *again, "--reuse", "--", *LIGHT)
    assert (result.returncode, result.stdout) == (0, f"reuse     web, which runs already: {url}\n")
    result = run("-n", "--json", *again, "--reuse", "--", *LIGHT)
    assert json.loads(result.stdout) == listed()["web"]


def test_an_option_that_is_written_as_a_command() -> None:
    """As git and docker have them."""
    assert {f"--{word}" for word in OPTION_WORDS} == {*VERBS, "--check", "--help", "--version"}
    for word in ("list", "help"):
        result = run(word)
        assert result.returncode == 127
        assert result.stderr.splitlines()[1] == f"portexec: hint: did you mean portexec --{word}?"


def test_the_digest_is_the_same_everywhere() -> None:
    """Else a name, and a stable number, would be lost with an update."""
    assert [digest("a", "b"), digest("a\0b"), digest("ab")] == [2543301596804117519, 2543301596804117519, 6290588194905056836]


def test_json_of_an_empty_list() -> None:
    assert json.loads(run("--list", "--json").stdout) == []
    assert run("--list").stdout == "NAME  STATE  ADDRESS  COMMAND\n"


@pytest.fixture
def in_reach() -> Iterator[Path]:
    """A directory in which others can have a home. Not the one of pytest: each pytest that begins shuts it to them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.mark.root
def test_a_stranger_in_tmp_is_in_nobodys_way(in_reach: Path) -> None:
    """Unless that is the only place where a registry can be."""
    homeless = 61234  # a user without a home of their own
    place, home = Path(f"/tmp/portexec-{homeless}"), in_reach / "home"
    home.mkdir()
    os.chown(home, homeless, homeless)
    place.mkdir(0o700)
    try:
        os.chown(place, 65534, 65534)
        assert as_user(homeless, {"HOME": str(home)}) == ["", "web"]
        assert as_user(homeless, {}) == [f"the registry {place} belongs to another user"] * 2
        home.chmod(0o500)
        assert (
            as_user(homeless, {"HOME": str(home), "XDG_STATE_HOME": str(home / "x")})
            == [f"the registry {place} belongs to another user"] * 2
        )
        place.rmdir()
        place.symlink_to(home)
        assert as_user(homeless, {}) == [f"the registry {place} is a symbolic link, which is not followed"] * 2
        place.unlink()
        assert as_user(homeless, {}) == ["", "web"]
        assert place.stat().st_uid == homeless
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)


@pytest.mark.root
def test_a_run_is_listed_once_though_it_has_been_in_two_registries(in_reach: Path) -> None:
    """One of its runs was started where the home could not be written to."""
    homeless = 61235
    home = in_reach / "home"
    home.mkdir()
    os.chown(home, homeless, homeless)
    try:
        assert as_user(homeless, {}) == as_user(homeless, {"HOME": str(home)}) == ["", "web"]
        (in_tmp,) = Path(f"/tmp/portexec-{homeless}").iterdir()
        (in_home,) = (home / ".local" / "state" / "portexec").iterdir()
        assert [path.name for path in in_tmp.glob("web.*")] == [path.name for path in in_home.glob("web.*")]
    finally:
        subprocess.run(["rm", "-rf", f"/tmp/portexec-{homeless}"], check=True)


AS_USER = """
import json, os, pwd, sys
from portexec.errors import PortexecError
from portexec.names import registry
user, environment, fields = json.loads(sys.argv[1])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)

def begin():
    registry.claim(registry.Entry(**fields), environment)
    return ""

def names():
    return " ".join(each.name for each in registry.entries(environment))

def said(attempt):
    try:
        return attempt()
    except PortexecError as error:
        return error.message

print(json.dumps([said(begin), said(names)]))
"""


def as_user(user: int, environment: dict[str, str]) -> list[str]:
    """What this user is told who begins a run with a name, and the names of all, or what they are told who want to know."""
    asked = json.dumps([user, environment, entry("web").fields()])
    done = subprocess.run([sys.executable, "-c", AS_USER, asked], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    told: list[str] = json.loads(done.stdout)
    return told
