"""Draw the pictures of the documentation, as SVG: `make pictures` writes docs/pictures/.

    python scripts/draw_pictures.py [DIRECTORY]

    race.svg         how a number is lost, and how portexec keeps it
    hand-offs.svg    the three ways in which a command gets its port
    recording.svg    the terminal recording docs/pictures/recording.cast, which scripts/record_terminal.py makes

Each picture has the colours of light and of dark pages, and the reader's browser chooses. A test compares the committed files
with what this draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"

STYLE = """\
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 16px }
.small { font-size: 12px; fill: #59636e }
.inside { fill: #ffffff; font-weight: 600 }
.ours { fill: #1a7f37 } .command { fill: #0969da } .danger { fill: #cf222e } .other { fill: #6e7781 }
.box { fill: none; stroke: #818b98; stroke-width: 1.5 }
.arrow { fill: none; stroke: #1f2328; stroke-width: 1.5 } .tip { fill: #1f2328 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .small { fill: #9198a1 } .inside { fill: #ffffff }
.ours { fill: #238636 } .command { fill: #1f6feb } .danger { fill: #da3633 } .other { fill: #656c76 }
.arrow { stroke: #f0f6fc } .tip { fill: #f0f6fc }
}"""

RECORDING_STYLE = """\
text { font: 14px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #1f2328 }
rect { fill: #f6f8fa; stroke: #d1d9e0 } .typed { font-weight: 600 } .ours { fill: #1a7f37 }
g { animation-name: hide }
@keyframes hide { from, to { opacity: 0 } }
@media (prefers-reduced-motion: reduce) { g { animation: none } }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } rect { fill: #151b23; stroke: #3d444d } .ours { fill: #3fb950 }
}"""


def picture(width: int, height: int, title: str, style: str, *parts: str) -> str:
    """A whole file. The title is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>\n{style}\n</style>", *parts, "</svg>", ""])


def text(x: float, y: float, words: str, kind: str = "", *, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:g}" y="{y:g}"{anchor}{f" class={kind!r}" if kind else ""}>{escape(words)}</text>'.replace("'", '"')


def bar(x: float, y: float, width: float, kind: str, words: str) -> str:
    """A stretch of time, with words inside."""
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="30" rx="4" class="{kind}"/>'
    return shape + text(x + width / 2, y + 20, words, "inside", middle=True)


def box(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="box"/>'


def arrow(x: float, y: float, to_y: float) -> str:
    """An arrow downwards."""
    return (
        f'<path d="M{x:g} {y:g}V{to_y - 6:g}" class="arrow"/>'
        f'<path d="M{x - 5:g} {to_y - 8:g}L{x:g} {to_y:g}L{x + 5:g} {to_y - 8:g}z" class="tip"/>'
    )


def race() -> str:
    """Two lines of time, one below the other: who has the number."""
    return picture(
        760,
        232,
        "The usual way leaves the number to nobody between close and bind; portexec holds it from the beginning to the end",
        STYLE,
        text(10, 24, "The usual way: bind to port 0, read the number, close, start the server", "title"),
        bar(10, 38, 160, "ours", "the script has it"),
        bar(174, 38, 250, "danger", "nobody has it"),
        bar(428, 38, 322, "command", "the server has it, if it was first"),
        text(174, 86, "↑ close", "small"),
        text(428, 86, "↑ bind", "small"),
        text(236, 86, "anybody can take it now", "small"),
        text(10, 134, "portexec: bind first, and never let go", "title"),
        bar(10, 148, 740, "ours", "portexec's guard holds the number"),
        bar(428, 184, 322, "command", "the server serves on it"),
        text(10, 204, "a stranger who asks for it is refused, at every moment", "small"),
        text(428, 228, "↑ the hand-off", "small"),
    )


# name, who is above, what the arrow says, what the command does, two lines below
KEEPS, BINDS = "portexec guards it", "binds the number itself"
HAND_OFFS = (
    ("fd", "portexec listens", "the socket itself", "serves on descriptor 3", "early clients wait", "uvicorn --fd {fd}"),
    ("guard", KEEPS, "$PORT, a permit", BINDS, "nobody else can", "npm start, any program"),
    ("hold", KEEPS, "$PORT", BINDS, "others who ask could, too", "when guard is not possible"),
)


def hand_offs() -> str:
    """Three columns, one for each hand-off."""
    parts: list[str] = []
    for number, (name, above, says, below, then, example) in enumerate(HAND_OFFS):
        left, middle = 10 + 250 * number, 10 + 250 * number + 120
        parts += [
            box(left, 8, 240, 262),
            text(middle, 34, name, "title", middle=True),
            bar(left + 12, 48, 216, "ours", above),
            arrow(middle, 82, 132),
            text(middle + 10, 110, says, "small"),
            bar(left + 12, 136, 216, "command", below),
            text(middle, 198, then, middle=True),
            text(middle, 240, example, "small", middle=True),
        ]
    return picture(760, 280, "The three hand-offs: fd, guard and hold", STYLE, *parts)


def lines_of(cast: str) -> Iterator[tuple[float, str, bool]]:
    """The lines of a recording (asciicast v2): when each was complete, what it says, whether a person typed it."""
    _, *events = map(json.loads, cast.splitlines())
    line = ""
    for time, kind, data in events:
        assert kind == "o"
        for piece in data.replace("\r\n", "\n").splitlines(keepends=True):
            line += piece
            if line.endswith("\n"):
                yield time, line[:-1], line.startswith("$ ")
                line = ""
    assert not line, line


def recording(cast: str) -> str:
    """The lines of a recording, each hidden until it came, once. Where nothing can move, all of them are seen."""
    width, height = json.loads(cast.partition("\n")[0])["width"], 21
    lines = list(lines_of(cast))
    parts = []
    for row, (time, words, is_typed) in enumerate(lines):
        kind = "typed" if is_typed else "ours" if words.startswith("portexec:") else ""
        parts.append(f'<g style="animation-duration:{time:.2f}s">{text(16, 30 + height * row, words, kind)}</g>')
    size = 32 + round(8.45 * width), 24 + height * len(lines)
    return picture(
        *size, "A terminal: two servers, tests with --then, a server in the background", RECORDING_STYLE,
        f'<rect x="0.5" y="0.5" width="{size[0] - 1}" height="{size[1] - 1}" rx="8"/>', *parts,
    )  # fmt: skip


def pictures() -> dict[str, str]:
    """All of them, by file name."""
    cast = (PICTURES / "recording.cast").read_text()
    return {"race.svg": race(), "hand-offs.svg": hand_offs(), "recording.svg": recording(cast)}


def main() -> None:
    """Write all files."""
    directory = Path(sys.argv[1]) if sys.argv[1:] else PICTURES
    for name, drawn in pictures().items():
        (directory / name).write_text(drawn)


if __name__ == "__main__":
    main()
