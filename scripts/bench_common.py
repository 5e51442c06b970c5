"""What the benchmarks share: interleaved rounds, and a table. A benchmark prints; it never fails because something is slow."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
PORTEXEC = str(BIN / "portexec")


def environment() -> dict[str, str]:
    """What the measured processes get: this interpreter's programs first, and byte code caches, which users have."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LISTEN_", "PORT"))}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def interleaved(rounds: int, subjects: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measure each subject once per round, each round beginning with another one, so that a drift of the machine hits all."""
    names = list(subjects)
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(subjects[name]())
    return results


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their headings, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip(), flush=True)
