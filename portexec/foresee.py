"""The errors by which a run would fail before it starts anything: for `--dry-run`, with the run's own texts and order.

Nothing is left behind. A notify socket is bound and removed, as the listeners are; the rest is only looked at. So a full disk,
a FIFO that nobody reads, and a kernel without `guard` are not found.
"""

from __future__ import annotations

import os

from portexec.command import publish
from portexec.command.execute import missing_interpreter
from portexec.command.plan import GUARD
from portexec.errors import RefusedError
from portexec.request import NOTIFY
from portexec.start import as_possible, require_no_danger
from portexec.writable import require_makeable, require_openable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from portexec.launch import Launch


def start(launch: Launch) -> Launch:
    """The launch as the run would have it. Raises the PortexecError by which the run would fail."""
    if launch.stays():
        launch = as_possible(launch)
    if launch.stays():
        _notify_socket(launch)
        if launch.request.lifetime.log is not None:
            log(launch.request.lifetime.log)
        launch = _without_danger(launch)
    chosen = launch.request.chosen
    if chosen.port_file is not None:
        port_file(chosen.port_file, launch.bound.listeners[0].port)
    if chosen.export is not None:
        export(chosen.export)
    if not _has_interpreter(launch.plan.file):
        raise missing_interpreter(launch.plan.file)
    return launch


def _notify_socket(launch: Launch) -> None:
    ready = launch.request.lifetime.ready
    if ready is not None and ready.form == NOTIFY:
        from portexec.lifetime.notify import NotifySocket

        NotifySocket(ready.argument, launch.bound.undo).socket.close()


def _without_danger(launch: Launch) -> Launch:
    if launch.choice.hand_off != GUARD or launch.choice.is_final:
        return launch
    try:
        require_no_danger(launch)
    except RefusedError as refusal:
        return launch.held(f"hand-off guard cannot be had: {refusal}")
    return launch


def _has_interpreter(file: str) -> bool:
    """Whether the program exists that a script names in its first line, which is read as execve(2) does."""
    try:
        with open(file, "rb") as script:
            first = script.readline(256)
    except OSError:
        return True  # a file may be executable and not readable
    words = first.removeprefix(b"#!").removesuffix(b"\n").replace(b"\t", b" ").split(b" ")
    return not first.startswith(b"#!") or os.path.exists(next((word for word in words if word), b"/"))


def log(path: str) -> None:
    """Raise the PortexecError of a `Log` at this path."""
    from portexec.lifetime.log import cannot_open, require_our_own

    directory, base = os.path.split(path)
    try:
        is_open = bool(base) and publish.is_open_to_strangers(os.stat(directory or "."))
        require_openable(path, os.W_OK, follows=not is_open)
        if is_open and os.path.lexists(path):
            require_our_own(os.lstat(path))
    except OSError as error:
        raise cannot_open(path, error) from error


def port_file(path: str, port: int) -> None:
    """Raise the PortexecError of writing this number to a port file."""
    publish.require_number(port)
    try:
        publish.require_replaceable(path)
        require_makeable(path)
    except OSError as error:
        raise publish.cannot_write("port file", path, error) from error


def export(path: str) -> None:
    """Raise the PortexecError of appending to an export file."""
    try:
        require_openable(path, os.R_OK | os.W_OK, follows=False)
        if os.path.lexists(path):
            publish.require_appendable(path, os.lstat(path))
    except OSError as error:
        raise publish.cannot_write("export file", path, error) from error
