"""The option parser: every way to write an option, where options end, what is refused, and that `--help` tells all."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portexec import options, pages, request
from portexec.errors import PortexecError
from portexec.request import Request
from tests.support import run

DEFAULTS = vars(options.Options())
ALL = [option for _, group in options.GROUPS for option in group]

# words, what differs from the defaults
PARSED: list[tuple[list[str], dict[str, object]]] = [
    ([], {}),
    (["--"], {"is_marked": True}),
    (["true"], {"command": ["true"]}),
    (["--", "true"], {"is_marked": True, "command": ["true"]}),
    (["-q", "true"], {"quiet": True, "command": ["true"]}),
    (["-q", "--", "true"], {"quiet": True, "is_marked": True, "command": ["true"]}),
    (["true", "-q"], {"command": ["true", "-q"]}),
    (["sh", "-c", "x", "--", "y"], {"command": ["sh", "-c", "x", "--", "y"]}),
    (["--", "sh", "--", "y"], {"is_marked": True, "command": ["sh", "--", "y"]}),
    (["--", "--", "y"], {"is_marked": True, "command": ["--", "y"]}),
    (["--", "-q"], {"is_marked": True, "command": ["-q"]}),
    (["-"], {"command": ["-"]}),
    (["", "-q"], {"command": ["", "-q"]}),
    (["-l", "8000", "x"], {"listen": ["8000"], "command": ["x"]}),
    (["-l8000", "x"], {"listen": ["8000"], "command": ["x"]}),
    (["--listen", "8000"], {"listen": ["8000"]}),
    (["--listen=8000"], {"listen": ["8000"]}),
    (["--listen=api=0"], {"listen": ["api=0"]}),
    (["--listen="], {"listen": [""]}),
    (["--listen=--"], {"listen": ["--"]}),
    (["-l", "-q"], {"listen": ["-q"]}),
    (["-l", "a=0", "-l", "b=0", "--listen=c=0"], {"listen": ["a=0", "b=0", "c=0"]}),
    (["-qnv"], {"quiet": True, "dry_run": True, "verbose": True}),
    (["-qnl8000"], {"quiet": True, "dry_run": True, "listen": ["8000"]}),
    (["-qnl", "8000"], {"quiet": True, "dry_run": True, "listen": ["8000"]}),
    (["-l=8000"], {"listen": ["=8000"]}),
    (["-q", "-q"], {"quiet": True}),
    (["-b", "5", "--backlog=6"], {"backlog": "6"}),
    (["-H", "fd", "-Hhold"], {"hand_off": "hold"}),
    (["--hand-off", "fd"], {"hand_off": "fd"}),
    (["--first-fd", "0"], {"first_fd": "0"}),
    (["--no-pid"], {"no_pid": True}),
    (["--remap", "80", "--remap=81=api"], {"remap": ["80", "81=api"]}),
    (["-k", "1s", "--kill-after=2s"], {"kill_after": "2s"}),
    (["-e", "A=1", "-eB=2", "--env", "C=3"], {"env": ["A=1", "B=2", "C=3"]}),
    (["--env=A=b=c"], {"env": ["A=b=c"]}),
    (["--env-file", "a", "--env-file=b"], {"env_file": ["a", "b"]}),
    (["--port-file", "a", "--port-file", "b"], {"port_file": "b"}),
    (["--export", "f"], {"export": "f"}),
    (["--json", "-v", "--verbose"], {"json": True, "verbose": True}),
    (["--dry-run", "--help", "--version"], {"dry_run": True, "help": True, "version": True}),
    (["-hV"], {"usage": True, "version": True}),
    (["-e", "A=\udc80", "\udc81"], {"env": ["A=\udc80"], "command": ["\udc81"]}),
]


@pytest.mark.parametrize(("words", "changes"), PARSED)
def test_parsed(words: list[str], changes: dict[str, object]) -> None:
    before = list(words)
    assert vars(options.parse(words)) == DEFAULTS | changes
    assert words == before


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ("--then npm test -- npm start", "'npm test'"),
        ("--then=npm run e2e -- npm start", "'npm run e2e'"),
        ("--then ./tests npm run dev -- --port 8000", ""),
        ("--then tests -- npm run dev -- 8000", ""),
        ("--then npm -- npm start", ""),
        ("--then npm test --", ""),
        ("npm test -- npm start", ""),
    ],
)
def test_quotes_that_were_forgotten(words: str, quoted: str) -> None:
    assert options.parse(words.split()).quotes_for_then() == quoted


LISTS = "portexec --help lists the options"
DETACH = "--detach goes to the background: write --name NAME --detach"
FORCE = "no port is taken from another server; --stop NAME stops one, and -l 3000,0 takes any other port"
HUP = "HUP to portexec with --restart and {fd} starts the command anew; entr or watchexec can send it"

REFUSED = [
    (["--lissten", "0", "x"], "unknown option --lissten", "did you mean --listen?"),
    (["--lissten=0", "x"], "unknown option --lissten", "did you mean --listen?"),
    (["--dryrun"], "unknown option --dryrun", "did you mean --dry-run?"),
    (["--handoff", "fd"], "unknown option --handoff", "did you mean --hand-off?"),
    (["--portfile", "f"], "unknown option --portfile", "did you mean --port-file?"),
    (["--liste"], "unknown option --liste", "did you mean --listen?"),
    (["--lgo", "f"], "unknown option --lgo", "did you mean --log?"),
    (["--nmae", "web"], "unknown option --nmae", "did you mean --name?"),
    *(([word], f"unknown option {word}", "--list shows what runs") for word in ("--status", "--ps", "--ls")),
    (["--stop-all"], "unknown option --stop-all", "--stop --all stops all of this project"),
    (["--rm", "web"], "unknown option --rm", "--forget NAME takes what has ended off the list, with its log"),
    *(([word], f"unknown option {word}", DETACH) for word in ("-d", "--daemon", "--daemonize", "--background")),
    (["-qd"], "unknown option -d", DETACH),
    (["--kill"], "unknown option --kill", "--stop NAME stops it"),
    (["--force"], "unknown option --force", FORCE),
    (["--reload"], "unknown option --reload", HUP),
    (["--watch"], "unknown option --watch", HUP),
    (["--port=3000"], "unknown option --port", "the port is given with -l: -l 3000, or -l 3000,0 for any other if taken"),
    *(([word], f"unknown option {word}", LISTS) for word in ("--open", "--fnord", "--tail", "--show", "--test")),
    (["--zzz"], "unknown option --zzz", LISTS),
    (["-z"], "unknown option -z", LISTS),
    (["-qz"], "unknown option -z", LISTS),
    (["-\udc80"], "unknown option -\udc80", LISTS),
    (["---"], "unknown option ---", LISTS),
    (["--=x"], "unknown option --", LISTS),
    (["-l"], "option -l needs a value", "write -l [NAME=]SPEC"),
    (["--env-file"], "option --env-file needs a value", "write --env-file FILE"),
    (["-l", "--", "x"], "option -l needs a value", "write -l [NAME=]SPEC; is a variable unset?"),
    (["--then", "--", "x"], "option --then needs a value", "write --then COMMAND; is a variable unset?"),
    (["-qe"], "option -qe needs a value", "write -qe NAME=TEMPLATE"),
    (["--quiet=yes", "x"], "option --quiet takes no value", "write --quiet alone"),
    (["-q=1", "x"], "option -q takes no value", "write -q alone"),
    (["-nq=1", "x"], "option -q takes no value", "write -q alone"),
    (["--export", ""], "--export names no file", "its value is empty; is a variable unset?"),
    (["--port-file=", "x"], "--port-file names no file", "its value is empty; is a variable unset?"),
    (["--quiet=", "x"], "option --quiet takes no value", "write --quiet alone"),
    (["--list=a"], "option --list takes no value", "write --list alone"),
    (["--url=a"], "option --url takes no value", "write --url a"),
]


@pytest.mark.parametrize(("words", "message", "hint"), REFUSED)
def test_refused(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(PortexecError) as caught:
        options.parse(words)
    assert (caught.value.message, caught.value.hint, caught.value.status) == (message, hint, 125)


@pytest.mark.parametrize("option", ALL, ids=lambda option: str(option.long))
def test_every_option_has_an_attribute_and_stands_in_the_help(option: options.Option) -> None:
    assert option.field in DEFAULTS
    assert f"{option.long} {option.metavar}".rstrip() in pages.help_text()
    assert option.help in " ".join(pages.help_text().split())
    for name in filter(None, (option.short, option.long)):
        parsed = vars(options.parse([name, "value"]))
        assert parsed[option.field] == (True if not option.has_value else ["value"] if option.repeatable else "value")


def test_option_names_are_unique() -> None:
    names = [name for option in ALL for name in (option.short, option.long) if name]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_fits_a_terminal(option: str) -> None:
    done = run(option)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert max(len(line) for line in lines) <= 80
    assert not any(line != line.rstrip() for line in lines)
    assert done.stdout.endswith("\n")


def test_the_short_help_has_less_than_forty_lines_of_the_long_one() -> None:
    lines = pages.usage_text().splitlines()
    assert len(lines) < 40
    assert set(lines) - set(pages.help_text().splitlines()) == {"Options most used"}
    for option in ("--name", "--detach", "--list", "--url", "--stop", "--logs", "--help"):
        assert f" {option} " in pages.usage_text()


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("7", 7), ("007", 7), ("10", 10)])
def test_number(text: str, value: int) -> None:
    assert request.number(text, "--x", 0, 10) == value


@pytest.mark.parametrize("text", ["", "-1", "11", "1.0", " 1", "1 ", "+1", "1_0", "0x1", "\u0661", "9" * 5000])
def test_number_refused(text: str) -> None:
    with pytest.raises(PortexecError) as caught:
        request.number(text, "--x", 0, 10)
    assert caught.value.message == f"--x {text!r} is not a number from 0 to 10"


# How long an example takes is the machine's affair.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("text", "seconds"), [("5", 5), ("5s", 5), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("1.5", 1.5), ("0.5s", 0.5), ("0", 0)]
)
def test_duration(text: str, seconds: float) -> None:
    assert request.duration(text, "--x") == seconds


@pytest.mark.parametrize("text", ["", "s", "ms", ".", "-1", "1d", "5 s", "5S", "1e3", "inf", "nan", "1.2.3", "\u0661"])
def test_duration_refused(text: str) -> None:
    with pytest.raises(PortexecError) as caught:
        request.duration(text, "--x")
    assert (caught.value.message, caught.value.hint) == (
        f"--x {text!r} is no duration",
        "write a number and a unit: 500ms, 5s, 2m",
    )


arguments = st.binary(max_size=12).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
names = st.sampled_from([name for option in ALL for name in (option.short, option.long) if name])
words_near_options = st.one_of(
    names,
    names.map(lambda name: name[:-1]),
    st.tuples(names, arguments).map("".join),
    st.tuples(names, arguments).map("=".join),
    st.sampled_from(["--", "-", "", "true", "-qnv", "-nl"]),
    arguments,
)


@unhurried
@given(st.lists(words_near_options, max_size=8))
def test_any_words_are_options_and_a_command_or_a_portexec_error(words: list[str]) -> None:
    try:
        parsed = options.parse(words)
    except PortexecError:
        return
    assert parsed.command == words[len(words) - len(parsed.command) :]
    assert vars(parsed).keys() == DEFAULTS.keys()


@unhurried
@given(st.lists(arguments, max_size=6))
def test_after_two_dashes_every_word_is_the_commands(words: list[str]) -> None:
    assert options.parse(["-q", "--", *words]).command == words


values = st.one_of(
    arguments, st.sampled_from(["", "0", "3", "-1", "99999999999", "a=0", "A={fd}", "{web.port}", "unix:@s", "hold"])
)
settings_given = st.tuples(st.sampled_from(["-l", "-b", "-H", "-e", "--first-fd"]), values).map(list)


@unhurried
@given(st.lists(settings_given, max_size=5))
def test_any_values_are_a_request_or_a_portexec_error(given_options: list[list[str]]) -> None:
    words = [word for option in given_options for word in option]
    try:
        request = Request(options.parse([*words, "true", "{port}"]))
        choice = request.choose()
    except PortexecError:
        return
    assert choice.hand_off in ("fd", "hold", "guard")
    assert len(request.specs) == max(1, words[::2].count("-l"))
