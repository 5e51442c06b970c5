"""Write `share/`, which a wheel brings along: portexec(1) and the completions. Run by `make share`.

    python scripts/make_share.py [DIRECTORY]

All of it comes from portexec/options.py, portexec/pages.py and portexec/completion.py. The manual says of an option what
docs/reference.md says, and has some sections of its own here. The files are committed, so that a wheel can be built without
portexec; a test compares them with what this writes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from portexec import __version__, completion, options, pages  # noqa: E402  # of this checkout

DESCRIPTION = """\
portexec binds a free port and keeps it bound. Then it runs COMMAND, which gets the port by one of
three hand-offs. At no moment can another process take the port.

The options end at the first word that is no option, or at --, as with env(1) and timeout(1).

With the hand-offs fd and hold, no option under Lifetime and no --name, portexec becomes the
command by execve(2). Otherwise portexec stays as the parent: it forwards signals, stops all that
the command has started when it is told to stop, and ends as the command ended.

The address is announced on stderr. While a command runs, portexec writes nothing to stdout.
"""

ENVIRONMENT = {
    "PORT": "For the command: the number of the first listener. A listener with the name api has API_PORT.",
    "LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES": "With hand-off fd, for the command, as sd_listen_fds(3) has them. Sockets that "
    "portexec itself was given in this way are passed on, before its own.",
    "PORTEXEC_PROJECT": "The project, where --project is not given.",
    "PORTEXEC_DIR, XDG_STATE_HOME": "Where the servers with a name are remembered.",
    "NO_COLOR, FORCE_COLOR, TERM": "The words error and hint, addresses, and the names in tables have colours on a terminal, "
    "unless NO_COLOR is set or TERM is dumb. With FORCE_COLOR they have them anywhere.",
}

FILES = {
    "~/.local/state/portexec/": "What is known of servers with a name, and the logs of those that run in the background.",
}

SEE_ALSO = "env(1), timeout(1), systemd-socket-activate(1), sd_listen_fds(3), socket(7), seccomp_unotify(2)"


def documented() -> dict[str, str]:
    """What docs/reference.md says of each option, by the first cell of its row: with its backticks, without its links."""
    rows = re.findall(r"^\| (`-.*?)(?<!\\) \| (.*) \|$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    return {names.replace("\\|", "|"): re.sub(r", see \[.*?\)", "", text).replace("\\|", "|") for names, text in rows}


def manual() -> str:
    """portexec(1), as man(7) has it."""
    said = documented()
    parts = [
        f'.\\" Made by scripts/make_share.py.\n.TH PORTEXEC 1 "" "portexec {__version__}" "User Commands"\n.ad l\n.nh',
        section("name", "portexec \\- bind a free port first, then run a command with it"),
        section("synopsis", synopsis()),
        section("description", *paragraphs(DESCRIPTION)),
        section("options", *(line for title, group in options.GROUPS for line in option_group(title, group, said))),
        section("listen specs", *paragraphs(pages.SPECS)),
        section("what the command sees", *paragraphs(pages.SEEN)),
        section("hand-offs", *paragraphs(pages.HAND_OFF.partition(": ")[2])),
        section("lifetime", *paragraphs(pages.STAYING)),
        section("exit status", *paragraphs(capitalized(pages.EXIT_STATUS.partition(": ")[2]))),
        section("environment", *(tagged(bold(name), escaped(text)) for name, text in ENVIRONMENT.items())),
        section("files", *(tagged(italic(name), escaped(text)) for name, text in FILES.items())),
        section("examples", *paragraphs(pages.EXAMPLES)),
        section("see also", escaped(SEE_ALSO)),
    ]
    return "\n".join(parts) + "\n"


def section(title: str, *parts: str) -> str:
    return "\n".join([f".SH {title.upper()}", *parts])


def synopsis() -> str:
    program, *words = options.USAGE.split()
    return " ".join([bold(program), *(italic(word) if word.strip("[].").isupper() else escaped(word) for word in words)])


def option_group(title: str, group: tuple[options.Option, ...], said: dict[str, str]) -> Iterator[str]:
    yield f".SS {title}"
    for option in group:
        names = [name for name in (option.short, option.long) if name]
        *others, last = names
        row = ", ".join(f"`{word}`" for word in (*others, f"{last} {option.metavar}".rstrip()))
        tag = ", ".join(map(bold, names))
        yield tagged(f"{tag} {italic(option.metavar)}" if option.metavar else tag, marked(said[row]))


def marked(text: str) -> str:
    """A text of the documentation: what has backticks becomes bold."""
    parts = text.split("`")
    return "".join(bold(part) if position % 2 else escaped(part) for position, part in enumerate(parts))


def paragraphs(text: str) -> Iterator[str]:
    """A text of `--help`. Lines that are indented have a tag, two spaces, and what it means."""
    for paragraph in text.split("\n\n"):
        plain = " ".join(line for line in paragraph.splitlines() if not line.startswith("  "))
        if plain:
            yield f".PP\n{escaped(plain)}"
        for tag, meaning in rows(paragraph):
            yield tagged(bold(tag), escaped(meaning))


def rows(paragraph: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"^  (\S.*?)  +(.*(?:\n {10,}.*)*)", paragraph, re.MULTILINE):
        yield found[1], re.sub(r"\n +", " ", found[2])


def tagged(tag: str, text: str) -> str:
    return f".TP\n{tag}\n{text}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def bold(text: str) -> str:
    return f"\\fB{escaped(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escaped(text)}\\fR"


def escaped(text: str) -> str:
    """The text as roff takes it: nothing in it is a command, and a hyphen stays what can be typed."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    return f"\\&{text}" if text.startswith((".", "'")) else text


FILES_OF_SHARE = {
    "share/bash-completion/completions/portexec": completion.script("bash"),
    "share/zsh/site-functions/_portexec": completion.script("zsh"),
    "share/fish/vendor_completions.d/portexec.fish": completion.script("fish"),
    "share/man/man1/portexec.1": manual(),
}


def main() -> None:
    """Write all files."""
    directory = Path(sys.argv[1]) if sys.argv[1:] else ROOT
    for name, text in FILES_OF_SHARE.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
