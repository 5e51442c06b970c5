"""`--list`: what runs and what has ended, as a table for a terminal, as JSON, or as names alone. Pure, but for the time, the
terminal and the home directory.
"""

from __future__ import annotations

import os
import shlex

from portexec.errors import escaped, how_it_ended
from portexec.kernel import STDOUT
from portexec.names.naming import local_url, short, shown
from portexec.names.registry import ENDED, Entry, age
from portexec.plainjson import dumps
from portexec.say import ADDRESS, NAME, coloured, has_colours

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    _Row = tuple[str, ...]

_HEAD = ("NAME", "STATE", "PID", "ADDRESS", "IN A BROWSER", "COMMAND")
_PID, _LOCAL, _COMMAND = 2, 4, 5
_LEFT_OUT = ((), (_COMMAND,), (_LOCAL,), (_LOCAL, _COMMAND), (_PID, _LOCAL, _COMMAND))  # columns; the first choice that fits
_GAP = "  "
_CUT = "..."
_PLAIN = ("", "", "", "", "")
_COLOURED = (NAME, "", "", ADDRESS, ADDRESS)
_LEAST = 12  # characters: the narrowest column for commands


def text(entries: Sequence[Entry], here: str, *, as_json: bool, only_names: bool) -> str:
    """The list: first what runs, then what has ended, and in both this project first. `only_names`: of what runs."""
    ordered = sorted(entries, key=lambda entry: (not entry.is_alive, entry.project != here, entry.project, entry.name))
    if as_json:
        return dumps([described(entry, here) for entry in ordered]) + "\n"
    if only_names:
        return "".join(f"{escaped(shown(entry.name, entry.project, here))}\n" for entry in ordered if entry.is_alive)
    return table(ordered, here, _width(), _COLOURED if has_colours(STDOUT) else _PLAIN)


def one_as_json(entry: Entry) -> str:
    """A run as one line of JSON, as it is in the list of its own project."""
    return dumps(described(entry, entry.project)) + "\n"


def described(entry: Entry, here: str) -> dict[str, object]:
    """An entry for a program. `name` can be given to the other options."""
    status, signal = entry.wait_status, None
    if status is not None:
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        status = os.WEXITSTATUS(status) if signal is None else None
    listeners = [{**each, "local_url": local_url(entry.name, each)} for each in entry.listeners]
    return {
        "name": shown(entry.name, entry.project, here),
        "project": entry.project,
        "state": entry.state,
        "since": entry.since,
        "exit_status": status,
        "signal": signal,
        "stopped": entry.is_stopped,
        "listeners": listeners,
        "pid": entry.pid if entry.is_alive else None,
        "command_pid": (entry.command_pid or None) if entry.is_alive else None,
        "command": entry.command,
        "directory": entry.directory,
        "log": entry.log or None,
    }


def table(entries: Sequence[Entry], here: str, width: int | None, colours: Sequence[str] = _PLAIN) -> str:
    """The rows, one for each listener. In a narrow terminal columns are left out, and commands are cut.

    Where not even the fewest columns fit, the cells of a row stand below each other.
    """
    rows = [_HEAD, *(row for entry in entries for row in _rows(entry, here))]
    rows = _without(rows, [column for column in (_PID, _LOCAL) if not any(row[column] for row in rows[1:])])
    narrower = (_without(rows, left_out) for left_out in _LEFT_OUT)
    fitting = next((each for each in narrower if width is None or _least_width(each) <= width), None)
    if fitting is None:
        return "".join(_below_each_other(row, colours) for row in _without(rows[1:], _LEFT_OUT[-1]))
    widths = _widths(fitting)
    head, *others = fitting
    return _line(head, widths, width, _PLAIN) + "".join(_line(row, widths, width, colours) for row in others)


def _without(rows: Sequence[_Row], columns: Sequence[int]) -> list[_Row]:
    return [tuple("" if column in columns else cell for column, cell in enumerate(row)) for row in rows]


def _widths(rows: Sequence[_Row]) -> list[int]:
    return [max(map(_columns, cells)) for cells in zip(*rows, strict=True)]


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes: the letters of East Asia take two each, and accents none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _cut(text: str, columns: int) -> str:
    """The text, or what fits of it and a mark that there is more."""
    if _columns(text) <= columns:
        return text
    while text and _columns(text) + len(_CUT) > columns:
        text = text[:-1]
    return text + _CUT


def _least_width(rows: Sequence[_Row]) -> int:
    """The columns that the table needs. A column without text needs none."""
    *others, command = _widths(rows)
    needed = [width for width in (*others, min(command, _LEAST)) if width]
    return sum(needed) + len(_GAP) * (len(needed) - 1)


def _line(row: _Row, widths: Sequence[int], width: int | None, colours: Sequence[str]) -> str:
    *others, command = row
    before = sum(length + len(_GAP) for length in widths[:_COMMAND] if length)
    if width is not None and command:
        command = _cut(command, width - before)
    cells = [
        coloured(cell, colour) + " " * (length - _columns(cell))
        for cell, length, colour in zip(others, widths, colours, strict=False)
        if length
    ]
    return _GAP.join([*cells, command]).rstrip() + "\n"


def _below_each_other(row: _Row, colours: Sequence[str]) -> str:
    name, *others = (coloured(cell, colour) for cell, colour in zip(row, colours, strict=False))
    return "".join(f"{line}\n" for line in (name, *(f"{_GAP}{cell}" for cell in others if cell)))


def _rows(entry: Entry, here: str) -> list[_Row]:
    name, command = escaped(short(entry.name, entry.project, here)), escaped(in_words(entry.command))
    pid = str(entry.pid) if entry.is_alive else ""
    if not entry.is_alive or not entry.listeners:
        return [(name, state(entry), pid, "", "", command)]
    first, *others = entry.listeners
    rows: list[_Row] = [(name, state(entry), pid, *_addresses(entry, first), command)]
    return rows + [(f"{name}.{each['name']}", "", "", *_addresses(entry, each), "") for each in others]


def in_words(command: Sequence[str]) -> str:
    """A command as one would write it in a shell. Templates stay as they are: to a shell, `{port}` is a word as others are."""
    return " ".join(word if _is_plain(word) else shlex.quote(word) for word in command)


def _is_plain(word: str) -> bool:
    bare = word.replace("{", "").replace("}", "")
    return bool(word) and "," not in word and bare == (bare and shlex.quote(bare))  # {a,b} are two words to some shells


def _addresses(entry: Entry, listener: dict[str, Any]) -> tuple[str, str]:
    return escaped(listener["url"]), local_url(entry.name, listener) or ""


def state(entry: Entry) -> str:
    """The state in words: `ready, 2 min`, `ended 3, 2 min ago`, `stopped, 2 min ago`."""
    if entry.state != ENDED:
        return f"{entry.state}, {age(entry)}"
    if entry.is_stopped:
        return f"stopped{'' if entry.was_ready else ' before it was ready'}, {age(entry)} ago"
    status = entry.wait_status
    if status is None:
        return "portexec was killed"
    how = f"ended {os.WEXITSTATUS(status)}" if os.WIFEXITED(status) else how_it_ended(status)
    return f"{how}, {age(entry)} ago"


def _width() -> int | None:
    """The width of the terminal in columns; None where stdout is no terminal, and nothing needs to be cut."""
    try:
        return os.get_terminal_size(STDOUT).columns or None
    except OSError:
        return None
