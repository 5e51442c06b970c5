"""List the sentences of README.md and docs/ that are too long for a hurried reader: more than 35 words.

    python scripts/long_sentences.py [WORDS]

Prints FILE:LINE: COUNT SENTENCE, and fails when there is one. A sentence ends with a full stop, a question mark or an
exclamation mark. It also ends where its paragraph, list item or cell of a table ends.
Code between backticks is one word, and blocks of code do not count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 35
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PIECE = re.compile(r"^(?:#|\||[-*] |\d+\. |!\[|\s*$| {4,}\S)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, list items, headings and cells of tables, each with the line where it begins."""
    text = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    start, piece = 1, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if PIECE.match(line.lstrip() if piece else line) or not piece:
            yield from ((start, cell) for cell in re.split(r"(?<!\\)\|", piece) if cell.strip())
            start, piece = number, ""
        piece += f"{line.strip()} "


def sentences(text: str) -> Iterator[tuple[int, str]]:
    for line, piece in pieces(text):
        plain = re.sub(r"`[^`]*`", "CODE", piece)
        plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", plain)
        ends = re.split(r"(?<=[.?!])[)*]*\s+", plain)
        yield from ((line, sentence.strip()) for sentence in ends if sentence.strip())


def too_long(limit: int = LIMIT) -> Iterator[str]:
    """The offenders, as they are printed."""
    for page in pages():
        for line, sentence in sentences(page.read_text()):
            count = len(re.findall(r"\w[\w'.,/:-]*", sentence))
            if count > limit:
                yield f"{page.relative_to(ROOT)}:{line}: {count} {sentence}"


def main() -> int:
    found = list(too_long(int(sys.argv[1]) if sys.argv[1:] else LIMIT))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
