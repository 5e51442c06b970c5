"""Completion by the shells themselves: what bash, zsh and fish offer at the end of a line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from portexec import completion
from portexec.command.plan import HAND_OFFS
from portexec.names import listing
from portexec.names.registry import ENDED, Entry
from portexec.request import READY_FORMS, RESTARTS
from tests.support import DEADLINE, ROOT, names, run
from tests.support.installed import BASH_COMPLETION, PATH, install_portexec, need, program
from tests.support.terminals import terminal_with

pytestmark = [pytest.mark.once, pytest.mark.recipes]

OFFER, SHOW = b"\x14", b"\x07"  # Ctrl-T puts all that is offered into the line, Ctrl-G shows the line
END = "----- that was the line"
EVAL_IN_ZSH = 'eval "$(portexec --completion zsh)"'

# `tool` is a command with a completion of its own.
RC = {
    "bash": rf"""
        PS1= PS2=
        source {BASH_COMPLETION}
        bind '"\C-t": insert-completions'
        shown() {{ printf '<%s>\n{END}\n' "$READLINE_LINE"; READLINE_LINE= READLINE_POINT=0; }}
        bind -x '"\C-g": shown'
        complete -W 'alpha beta -x' tool
        eval "$(portexec --completion bash)"
        echo '{END}'
        """,
    "zsh": rf"""
        PS1= PS2=
        unsetopt beep prompt_cr prompt_sp
        autoload -Uz compinit && compinit -u -D
        insert_all() {{ _main_complete; compstate[insert]=all compstate[list]= }}
        zle -C insert-all complete-word insert_all
        shown() {{ print -r -- "<$BUFFER>"; print -r -- '{END}'; BUFFER= }}
        zle -N shown
        bindkey '^T' insert-all
        bindkey '^G' shown
        _tool() {{ compadd -- alpha beta -x }}
        compdef _tool tool
        {EVAL_IN_ZSH}
        echo '{END}'
        """,
    "fish": f"""
        complete -c tool -f -a 'alpha beta -x'
        portexec --completion fish | source
        function insert-all
            for line in $argv
                complete --do-complete $line
                echo '{END}'
            end
        end
        """,
}

# A line, and the words that are offered at its end. `a file` and `folder` are in the working directory.
OFFERED: dict[str, set[str]] = {
    "portexec --sto": {"--stop"},
    "portexec -q --hand": {"--hand-off"},
    "portexec -H ": set(HAND_OFFS),
    "portexec --hand-off g": {"guard"},
    "portexec -qH ": set(HAND_OFFS),
    "portexec --hand-off=": set(HAND_OFFS),
    "portexec --ready ": set(READY_FORMS),
    "portexec -l a=127.0.0.1:0 --restart ": set(RESTARTS),
    "portexec --completion ": set(completion.SHELLS),
    "portexec --log not": {"notes.txt"},
    "portexec --env-file=not": {"notes.txt"},
    "portexec --project ": {"folder"},
    "portexec -l ": set(),
    "portexec --ready-timeout ": set(),
    "portexec too": {"tool-of-ours"},
    "portexec -- too": {"tool-of-ours"},
    "portexec -e A=b -- too": {"tool-of-ours"},
    "portexec --then too": {"tool-of-ours"},
    "portexec tool ": {"alpha", "beta", "-x"},
    "portexec -- tool al": {"alpha"},
    "portexec -qk 5s -l a=127.0.0.1:0 --listen=b=0 -e A=b tool be": {"beta"},
    "portexec --name web -- tool -": {"-x"},
    "portexec tool -- portexec --sto": set(),
    "portexec --stop ": {"web", "api"},
    "portexec --stop w": {"web"},
    "portexec --url web a": {"api"},
    "portexec --logs -f ": {"web", "api", "old"},
    "portexec --forget ": {"old"},
    "portexec --project folder --stop ": {"other"},
    "portexec --list ": set(),
}


@pytest.fixture
def place(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two servers and one that has ended, another project with one, and programs on the PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    install_portexec(programs)
    (programs / "tool-of-ours").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{PATH}")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")  # which the scripts must not take for names
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZDOTDIR", str(tmp_path))
    Path("notes.txt").touch()
    Path("folder").mkdir()
    for name in ("web", "api", "old"):
        names.started(name)
    assert run("--stop", "old").returncode == 0
    names.started("other", "--project", "folder")
    return tmp_path


Offered = dict[str, list[str]]


def at_the_prompt(*shell: str) -> Offered:
    """What a person at a shell is offered."""
    offered: Offered = {}
    with terminal_with(*shell) as terminal:
        terminal.find(END)
        for line in OFFERED:
            terminal.press(line.encode() + OFFER + SHOW)
            (found,) = terminal.find(rf"<([^\r\n]*)>\r?\n{END}")
            before = line.rpartition(" ")[0]
            offered[line] = [] if found[1] == line else shlex.split(found[1].removeprefix(before))
    return offered


def bash(rc: Path) -> Offered:
    return at_the_prompt(program("bash"), "--noprofile", "--rcfile", str(rc), "-i")


def zsh(rc: Path) -> Offered:
    rc.rename(rc.with_name(".zshrc"))
    return at_the_prompt(program("zsh"), "-d", "-i")


def zsh_from_a_wheel(rc: Path) -> Offered:
    """Zsh, which finds the completion by itself where it is installed."""
    functions = ROOT / "share" / "zsh" / "site-functions"
    rc.write_text(f"fpath=({functions} $fpath)\n{RC['zsh'].replace(EVAL_IN_ZSH, '')}")
    return zsh(rc)


def fish(rc: Path) -> Offered:
    """Fish says by itself what it would offer, with what it would say of it."""
    words = [program("fish"), "--no-config", "-c", f"source {shlex.quote(str(rc))}; insert-all $argv", *OFFERED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    parts = done.stdout.split(f"{END}\n")[:-1]
    return {line: [row.partition("\t")[0] for row in part.splitlines()] for line, part in zip(OFFERED, parts, strict=True)}


@pytest.mark.parametrize("shell", [bash, zsh, zsh_from_a_wheel, fish])
def test_what_is_offered(shell: Callable[[Path], Offered], place: Path) -> None:
    if shell is bash:
        need(["bash-completion"])
    rc = place / "rc"
    rc.write_text(RC.get(shell.__name__, ""))
    # Some shells offer the option with the value after `--option=`, and show that something is a directory.
    offered = {line: {word.strip("=/").rpartition("=")[2] for word in words} for line, words in shell(rc).items()}
    assert offered == OFFERED


def test_a_shell_without_completion_is_refused() -> None:
    done = run("--completion", "csh")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == ("portexec: error: --completion 'csh' is not a known shell\nportexec: hint: one of bash, zsh, fish\n")


@pytest.mark.parametrize("end", [{"is_stopped": True}, {"wait_status": 3 << 8}, {"wait_status": 9}, {"wait_status": None}])
def test_a_row_of_what_has_ended_is_known_as_one(end: dict[str, object]) -> None:
    """By the words with which `--list` says how a run ended."""
    texts = dict.fromkeys(("run", "name", "project", "directory", "log"), "")
    numbers = dict.fromkeys(("since", "pid", "pid_started", "command_pid", "kill_after", "wait_status"), 0)
    entry = Entry(**{**texts, **numbers, "state": ENDED, "command": [], "listeners": [], **end})
    assert re.match(completion.ROWS["ended"], listing.state(entry))
    assert not re.match(completion.ROWS["running"], listing.state(entry))
