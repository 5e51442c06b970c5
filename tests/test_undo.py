"""The undo list, and the last words of who is killed in the middle of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from portexec.command.undo import Undo
from portexec.parent import link as links

CONTENT = b"5000\n"


def recorded(path: Path) -> Undo:
    """A list with one file, which is there."""
    path.write_bytes(CONTENT)
    undo = Undo()
    undo.record_file(str(path), CONTENT)
    return undo


def copy(undo: Undo) -> Undo:
    """What another process was told."""
    other = Undo()
    other.entries = [list(entry) for entry in undo.entries]
    return other


def aside(undo: Undo) -> Path:
    """The name of the file while it is removed."""
    return Path(undo.entries[0][-1])


def test_a_file_is_removed_of_which_another_was_killed_in_the_middle(tmp_path: Path) -> None:
    undo = recorded(tmp_path / "port")
    (tmp_path / "port").rename(aside(undo))
    copy(undo).run()
    assert os.listdir(tmp_path) == []


def test_what_was_added_meanwhile_comes_back_though_another_was_killed(tmp_path: Path) -> None:
    undo = recorded(tmp_path / "export")
    (tmp_path / "export").rename(aside(undo))
    with aside(undo).open("ab") as file:
        file.write(b"OTHER=1\n")
    other = copy(undo)
    undo.run()
    assert (tmp_path / "export").read_bytes() == CONTENT + b"OTHER=1\n"
    os.link(tmp_path / "export", aside(other))  # killed when the file was back already
    other.run()
    assert os.listdir(tmp_path) == ["export"]
    assert (tmp_path / "export").read_bytes() == CONTENT + b"OTHER=1\n"


def test_a_file_that_took_its_place_meanwhile_stays(tmp_path: Path) -> None:
    """And so does what is aside: there may be lines of others in it."""
    undo = recorded(tmp_path / "export")
    (tmp_path / "export").rename(aside(undo))
    aside(undo).write_bytes(b"MORE=1\n")
    (tmp_path / "export").write_bytes(b"NEW=1\n")
    name = aside(undo)
    undo.run()
    assert (tmp_path / "export").read_bytes() == b"NEW=1\n"
    assert name.read_bytes() == b"MORE=1\n"


class Heir:
    """Who is told of the list, and keeps a copy."""

    def __init__(self) -> None:
        self.copy = Undo()

    def record(self, entry: Sequence[str]) -> None:
        self.copy.entries.append(list(entry))

    def forget(self, entry: Sequence[str]) -> None:
        self.copy.entries.remove(list(entry))


def test_the_heir_knows_what_is_about_to_be_made(tmp_path: Path) -> None:
    """What was there before it was named the heir, too; and nothing is wrong when the rest is never made."""
    undo, heir = recorded(tmp_path / "port"), Heir()
    undo.leave_to(heir)
    undo.record_temporary(str(tmp_path / "temporary"))
    undo.record_file(str(tmp_path / "export"), b"")
    undo.forget(undo.record_file(str(tmp_path / "forgotten"), CONTENT))
    assert heir.copy.entries == undo.entries
    (tmp_path / "forgotten").write_bytes(CONTENT)
    heir.copy.run()
    assert os.listdir(tmp_path) == ["forgotten"]
    for name in ("temporary", "export"):
        (tmp_path / name).write_bytes(b"")
    undo.run()
    assert os.listdir(tmp_path) == ["forgotten"]


def test_with_no_descriptor_left_the_list_stays(tmp_path: Path) -> None:
    undo = recorded(tmp_path / "port")
    undo.record_temporary(str(tmp_path / "temporary"))
    (tmp_path / "temporary").write_bytes(b"")
    highest = os.dup(0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            undo.run()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.listdir(tmp_path) == ["port"]
    undo.run()
    assert os.listdir(tmp_path) == []


def test_the_last_words_are_heard_of_who_ends_without_having_read_all() -> None:
    one, other = links.pair(3)
    one.say(b"g", "unread")
    other.say(b"x", "why")
    other.close()
    assert one.receive() == (b"x", ["why"])
    assert one.receive()[0] == links.ENDED
    one.close()
