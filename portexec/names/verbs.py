"""`--list`, `--url`, `--stop`, `--logs` and `--forget`: questions and requests about runs that are known.

All but `--list` take names instead of a command.
"""

from __future__ import annotations

import os

from portexec import project
from portexec.errors import PortexecError, UsageError
from portexec.names import registry, wait
from portexec.names.missing import ELSEWHERE, LISTED, Missing
from portexec.names.naming import Wanted, abbreviated, is_absolute, parse, short
from portexec.request import duration
from portexec.say import print_out, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.names.registry import Entry
    from portexec.options import Options

_LIST, _URL, _STOP, _LOGS, _FORGET = "--list", "--url", "--stop", "--logs", "--forget"
_ALLOWED = {
    _LIST: {"--json"},
    _URL: {"--ready-timeout"},
    _STOP: {"--all"},
    _LOGS: {"--follow"},
    _FORGET: {"--all"},
}
_OF_WHOLE = {
    _STOP: "stops all of it",
    _LOGS: "prints what all of it has written",
    _FORGET: "forgets it",
}


def run(chosen: Options) -> int:
    """Do what was asked. Returns an exit status. Raises PortexecError."""
    verb = _one_verb(chosen)
    is_needed = chosen.all or not all(map(is_absolute, chosen.names))
    here = project.directory_if_any(chosen.project, os.environ, is_needed=is_needed)
    wanted = [parse(text, here, verb) for text in chosen.names]
    for each in wanted if verb in _OF_WHOLE else ():
        _require_no_listener(each, verb)
    if verb == _LIST:
        from portexec.names import listing

        entries = [entry for entry in registry.entries(os.environ) if chosen.project is None or entry.project == here]
        print_out(listing.text(entries, here, as_json=chosen.json, only_names=chosen.quiet))
        return 0
    if verb == _URL:
        return _print_urls(chosen, wanted, here)
    if verb == _STOP:
        return _stop_all(here, is_quiet=chosen.quiet) if chosen.all else _stop(wanted, here, is_quiet=chosen.quiet)
    if verb == _FORGET:
        return _forget(chosen, wanted, here)
    from portexec.names import logs

    (one,) = wanted
    return logs.run(one, lambda: _look(one), here, follow=chosen.follow)


def _one_verb(chosen: Options) -> str:
    """The verb. Raises UsageError for an option or a word that does not belong to it, or one that is missing."""
    verb, *others = chosen.verbs()
    if others:
        raise UsageError(f"cannot go with {others[0]}", "write two commands", about=verb)
    if chosen.command:
        takes = "nothing after it" if verb == _LIST else "names"
        raise UsageError(f"takes {takes}, and no command", f"leave out: {' '.join(chosen.command)}", about=verb)
    for option in chosen.given():
        if option not in {verb, "--project", "--quiet", *_ALLOWED[verb]}:
            raise UsageError(f"means nothing with {verb}", "leave one of the two out", about=option)
    count = len(chosen.names)
    if verb == _LIST and count:
        raise UsageError("takes no names", "portexec --list shows all", about=verb)
    if verb == _LOGS and count != 1:
        raise UsageError("takes one name", LISTED, about=verb)
    if chosen.all and count:
        raise UsageError("takes names or --all", "--all is all of this project", about=verb)
    if not count and verb != _LIST and not chosen.all:
        raise UsageError("needs a name", LISTED, about=verb)
    return verb


def _require_no_listener(wanted: Wanted, verb: str) -> None:
    """Only an address can be that of one listener. Raises UsageError."""
    if wanted.listener:
        whole = wanted.text.removesuffix(f".{wanted.listener}")
        hint = f"`portexec {verb} {whole}` {_OF_WHOLE[verb]}"
        raise UsageError(f"takes whole servers, and {wanted.text} means a listener of {whole}", hint, about=verb)


def _look(wanted: Wanted) -> Entry | None:
    """What is known of the run that is meant."""
    return registry.meant(wanted, os.environ)


def _stop(wanted: list[Wanted], here: str, *, is_quiet: bool) -> int:
    from portexec.names import stop

    found = [(each, _look(each)) for each in wanted]
    if not is_quiet:
        for each, entry in found:
            if entry is None or not entry.is_alive:
                say(*Missing(each, entry, here).lines())
    return stop.run([entry for _, entry in found if entry is not None and entry.is_alive], here, is_quiet=is_quiet)


def _stop_all(here: str, *, is_quiet: bool) -> int:
    from portexec.names import stop

    running = [entry for entry in registry.entries(os.environ) if entry.is_alive]
    ours = [entry for entry in running if entry.project == here]
    if not ours and not is_quiet:
        say(f"note: nothing of the project {abbreviated(here)} runs")
        if running:
            say(f"hint: {ELSEWHERE}: portexec --list shows it; `portexec --stop --all --project DIR` stops all of one")
    return stop.run(ours, here, is_quiet=is_quiet)


def _forget(chosen: Options, wanted: list[Wanted], here: str) -> int:
    """Forget runs that have ended. Raises PortexecError for one that runs, before anything is forgotten."""
    if chosen.all:
        entries = [entry for entry in registry.entries(os.environ) if entry.project == here and not entry.is_alive]
        lines = [] if entries else [f"note: nothing of the project {abbreviated(here)} has ended"]
    else:
        found = [(each, _look(each)) for each in wanted]
        entries = [entry for _, entry in found if entry is not None]
        lines = [f"note: no run of the name {each.text} is known" for each, entry in found if entry is None]
    for entry in entries:
        if entry.is_alive:
            name = short(entry.name, entry.project, here)
            raise PortexecError(f"{name} runs, and is not forgotten", f"`portexec --stop {name}` stops it")
    _tell(chosen, *lines)
    for entry in entries:
        registry.forget(entry, os.environ)
        _tell(chosen, f"{short(entry.name, entry.project, here)} is forgotten")
    return 0


def _tell(chosen: Options, *lines: str) -> None:
    if not chosen.quiet:
        say(*lines)


def _print_urls(chosen: Options, wanted: list[Wanted], here: str) -> int:
    timeout = wait.DEFAULT if chosen.ready_timeout is None else duration(chosen.ready_timeout, "--ready-timeout")
    for each in wanted:
        entry = _await(each, here, timeout, is_quiet=chosen.quiet)
        print_out(f"{_listener(entry, each)['url']}\n")
    return 0


def _await(wanted: Wanted, here: str, timeout: float, *, is_quiet: bool) -> Entry:
    """The run that is meant, when it is ready. A pid means one run, and no later one of its name."""
    if wanted.pid:
        one = _look(wanted)
        if one is None or one.state == registry.STOPPING:
            raise Missing(wanted, one, here).error()
        return wait.until_ready(one.name, wait.last_of(one), timeout, run=one, is_quiet=is_quiet)
    return wait.until_ready(
        wanted.text,
        lambda: _look(wanted),
        timeout,
        missing=lambda last: Missing(wanted, last, here),
        is_quiet=is_quiet,
    )


def _listener(entry: Entry, wanted: Wanted) -> dict[str, str]:
    """The listener that is meant: the one that was named, or the first."""
    names = [listener["name"] for listener in entry.listeners]
    if wanted.listener and wanted.listener not in names:
        raise UsageError(f"{wanted.text}: {entry.name} has no listener {wanted.listener!r}", f"it has: {', '.join(names)}")
    return entry.listeners[names.index(wanted.listener) if wanted.listener else 0]
