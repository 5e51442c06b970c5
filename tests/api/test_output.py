"""What is kept of a command's output, the lines of it since a mark, and the lines as they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portexec.api.output import LIMIT, Lines, Output


def output_of(*pieces: bytes) -> Output:
    output = Output()
    for piece in pieces:
        output.add(piece)
    return output


@pytest.mark.parametrize(
    ("pieces", "mark", "limit", "shown"),
    [
        ([], 0, 100, ""),
        ([b"one\n"], 0, 100, "one\n"),
        ([b"one\n"], 4, 100, ""),
        ([b"one\n", b"two\n"], 4, 100, "two\n"),
        ([b"one\ntw", b"o\n"], 6, 100, "two\n"),
        ([b"one\ntw"], 6, 100, ""),
        ([b"one\n", b"two"], 4, 100, "two"),
        ([b"one\ntwo\nthree\n"], 0, 7, "[portexec: 8 bytes left out]\nthree\n"),
        ([b"one\n" + b"x" * 20], 0, 7, "[portexec: 17 bytes left out]\nxxxxxxx"),
        ([b"x" * 20 + b"\n"], 0, 7, "[portexec: 14 bytes left out]\nxxxxxx\n"),
        ([b"old\n" * LIMIT, b"new\n"], 4 * LIMIT, 100, "new\n"),
    ],
)
def test_lines_since_a_mark(pieces: list[bytes], mark: int, limit: int, shown: str) -> None:
    assert output_of(*pieces).lines_since(mark, limit) == shown


def test_a_mark_may_be_older_than_all_that_is_kept() -> None:
    output = output_of(b"old\n", b"x" * 9 + b"\n", b"longer\n" * LIMIT)
    head, _, rest = output.lines_since(4).partition("\n")
    assert rest == "longer\n" * (LIMIT // 7)
    assert head == f"[portexec: {10 + 7 * LIMIT - len(rest)} bytes left out]"


def test_a_line_of_our_own_begins_a_line() -> None:
    output = output_of(b"one\ntw")
    output.add_line(b"ours")
    output.add_line(b"ours")
    output.add(b"o\n")
    assert output.text() == "one\ntw\nours\nours\no\n"


@given(st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b"def"])), st.integers(0, 40), st.integers(1, 40))
def test_what_is_shown_is_an_end_of_all(pieces: list[bytes], mark: int, limit: int) -> None:
    output, everything = output_of(*pieces), b"".join(pieces).decode()
    shown = output.lines_since(mark, limit)
    head, _, rest = shown.partition("\n")
    text = rest if "left out" in head else shown
    assert everything.endswith(text)
    assert len(text) <= limit or text == shown
    if mark < len(everything) and "left out" not in head:
        assert everything.rpartition(text)[0][-1:] in ("", "\n")
        assert len(text) >= len(everything) - mark


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        ([b"one\ntw", b"o\n", b"thr", b"ee", b""], [b"one\n", b"two\n", b"", b"", b"three"]),
        ([b"x" * LIMIT, b"y", b"z\n", b""], [b"", b"x" * LIMIT + b"y", b"z\n", b""]),
        ([b"one\n" + b"x" * (LIMIT + 1), b"\n"], [b"one\n" + b"x" * (LIMIT + 1), b"\n"]),
    ],
)
def test_lines_as_they_come(pieces: list[bytes], passed: list[bytes]) -> None:
    """One that is too long comes in parts."""
    lines = Lines()
    assert [lines.add(piece) for piece in pieces] == passed
