"""A run with a name begins: claim the name, then run the command here, or in the background (`detach`)."""

from __future__ import annotations

import os

from portexec import project
from portexec.errors import STATUS_FAILURE, PortexecError, cannot
from portexec.kernel import STDERR
from portexec.names import registry, wait
from portexec.names.registry import STOPPING, Claim, Entry, NameTaken
from portexec.parent import possible
from portexec.request import Request
from portexec.say import print_out, say
from portexec.server_errors import Abandoned

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def run(request: Request, launch: Callable[[Request, Claim | None], int]) -> int:
    """Claim the name of a request and have it launched. Returns an exit status. Raises PortexecError."""
    if request.chosen.detach:
        if not request.chosen.dry_run:
            _open_standard_streams()
        _require_background()
    wanted = _entry(request)
    if request.chosen.dry_run:
        other = _foresee(request, wanted)
        return launch(request, None) if other is None else _show_reuse(request, other)
    claim = _claim(request, wanted)
    if claim is None:
        return 0
    try:
        if not request.chosen.detach:
            return launch(request, claim)
        from portexec.names import detach

        waiting = detach.fork(request, claim)
        if waiting is None:  # this is the process in the background, which the caller's process drives
            return launch(Request(request.chosen), claim)
    except BaseException as error:
        _tell_ended(claim, error)
        raise
    return waiting.finish()


def _open_standard_streams() -> None:
    """Open /dev/null for standard streams that the caller has closed, so that no other file gets their numbers.

    Not even a file of a library: libffi 3.8 keeps one open from the first call into the C library on. Raises PortexecError.
    """
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            os.set_inheritable(fd, True)
    except OSError as error:
        raise cannot(f"go to the background: {os.devnull}", error) from error
    os.close(fd)


def _require_background() -> None:
    """Raise PortexecError where a run cannot go to the background."""
    if why := possible.why_not():
        raise possible.refusal("--detach", why)
    if os.getpid() == 1:
        raise PortexecError(
            "cannot go to the background as the first process of a container: all of it ends with that process",
            "leave out --detach, so that portexec stays; or start it from a shell that stays",
        )


def _foresee(request: Request, wanted: Entry) -> Entry | None:
    """The run that would be reused, if any. Raises PortexecError as the run would. Nothing is claimed."""
    try:
        registry.foresee(wanted, os.environ)
    except NameTaken as taken:
        if taken.entry.state == STOPPING:
            return None
        if not request.chosen.reuse:
            raise
        _require_same(wanted, taken.entry)
        return taken.entry
    if request.chosen.detach and request.chosen.log is not None:
        from portexec import foresee

        foresee.log(request.chosen.log)  # the run opens its log before anything is bound
    return None


def _claim(request: Request, wanted: Entry) -> Claim | None:
    """Claim the name. None where the run that has it is reused, and its address was printed. Raises PortexecError."""
    while True:
        try:
            return registry.claim(wanted, os.environ)
        except NameTaken as taken:
            if taken.entry.state == STOPPING:
                _wait_for_end(request, taken.entry)
            elif request.chosen.reuse:
                _reuse(request, wanted, taken.entry)
                return None
            else:
                raise


def _wait_for_end(request: Request, other: Entry) -> None:
    """Wait until a run that is stopping has given up its name. Raises PortexecError where that takes too long."""
    name = registry.name_here(other, os.environ)
    if not request.chosen.quiet:
        say(f"note: {name} is stopping; waiting for its end")
    patience = other.kill_after + wait.AT_LAST
    report = wait.reporter(f"{name} to end", is_quiet=request.chosen.quiet)
    if wait.until_over(other, patience, report) is not None:
        raise PortexecError(
            f"{name} is stopping, and has not ended after {patience:g} s",
            f"`portexec --stop {name}` kills what is left",
        )


def _tell_ended(claim: Claim, error: BaseException) -> None:
    """Tell the registry that the run has failed."""
    status = error.status if isinstance(error, PortexecError) else STATUS_FAILURE
    try:
        claim.tell_ended(status << 8, is_stopped=isinstance(error, Abandoned))
    except OSError:
        pass  # the lock, which is free then, tells that the run is over


def _entry(request: Request) -> Entry:
    directory = project.working_directory()
    log = request.chosen.log
    return Entry(
        run=os.urandom(8).hex(),
        name=request.name,
        project=project.directory(request.chosen.project, request.given),
        state=registry.STARTING,
        since=0.0,
        pid=0,
        pid_started=0,
        command_pid=0,
        command=request.command,
        directory=directory,
        kill_after=request.lifetime.kill_after,
        log="" if log is None else os.path.join(directory, log),
        listeners=[],
        wait_status=None,
    )


def _reuse(request: Request, wanted: Entry, other: Entry) -> None:
    """Reuse the run that is there, if it is the same, and print its addresses. Raises PortexecError."""
    name = registry.name_here(other, os.environ)
    _require_same(wanted, other)
    if not other.is_ready:
        timeout = wait.DEFAULT if request.lifetime.ready_timeout is None else request.lifetime.ready_timeout
        other = wait.until_ready(name, wait.last_of(other), timeout, run=other, is_quiet=request.chosen.quiet)
    if request.chosen.json:
        from portexec.names.listing import one_as_json

        print_out(one_as_json(other))
    else:
        print_out(wait.addresses(other.listeners))


def _require_same(wanted: Entry, other: Entry) -> None:
    if (wanted.command, wanted.directory) != (other.command, other.directory):
        from portexec.names.listing import in_words

        name = registry.name_here(other, os.environ)
        raise PortexecError(
            f"{name} runs already, and is not the same: `{in_words(other.command)}` in {other.directory}",
            f"`portexec --stop {name}` stops it, another --name starts one beside it",
        )


def _show_reuse(request: Request, other: Entry) -> int:
    """Print the plan of a dry run that would reuse this run. Returns an exit status."""
    if request.chosen.json:
        from portexec.names.listing import one_as_json

        print_out(one_as_json(other))
    else:
        name = registry.name_here(other, os.environ)
        print_out(
            "".join(f"reuse     {name}, which runs already: {url}" for url in wait.addresses(other.listeners).splitlines(True))
        )
    return 0
