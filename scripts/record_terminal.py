"""Record a terminal: a real bash in a pty, in which portexec runs. Prints an asciicast, version 2.

    python scripts/record_terminal.py >docs/pictures/recording.cast

The programs are those beside this Python, and portexec runs from this checkout. scripts/draw_pictures.py makes an SVG of it.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

APP = Path(__file__).resolve().parent / "demo_app.py"
PROMPT = "$ "
PAUSE = 1.2  # seconds in which somebody reads, before the next line is typed
WIDTH, HEIGHT = 112, 20
SERVER = "uvicorn app:app --fd {fd}"
LINES = (
    f"portexec --detach --name one -- {SERVER}",
    f"portexec --detach --name two -- {SERVER}",
    "curl $(portexec --url one) $(portexec --url two)",
    "portexec --list",
    f"portexec -q --then 'curl -s {{url}}; exit 7' -- {SERVER} --log-level error; echo status $?",
    "portexec --stop --all",
)


def main() -> None:
    """Print the header and all events."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(APP, Path(place) / "app.py")
        environment = {
            "HOME": place,
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "PORTEXEC_DIR": f"{place}/registry",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "PS1": PROMPT,
            "PYTHONPATH": str(APP.parent.parent),
            "TERM": "dumb",
        }
        try:
            events = list(recorded(place, environment))
        finally:
            stop = [sys.executable, "-m", "portexec", "--stop", "--all", "--quiet"]
            subprocess.run(stop, cwd=place, env=environment, capture_output=True)
    print(json.dumps({"version": 2, "width": WIDTH, "height": HEIGHT, "env": {"SHELL": "bash", "TERM": "dumb"}}))
    for event in events:
        print(json.dumps(event))


def recorded(place: str, environment: dict[str, str]) -> Iterator[tuple[float, str, str]]:
    """Type each line at the prompt, and tell what appears, and when. The last prompt is left out."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(place)
        os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], environment)
    start = time.monotonic()
    shown = read_prompt(terminal)
    for line in LINES:
        time.sleep(PAUSE)
        yield round(time.monotonic() - start, 3), "o", shown[-len(PROMPT) :]
        os.write(terminal, f"{line}\n".encode())
        shown = ""
        while not shown.endswith(f"\n{PROMPT}"):
            piece = read(terminal)
            shown += piece
            said = piece.removesuffix(PROMPT) if shown.endswith(f"\n{PROMPT}") else piece
            if said:
                yield round(time.monotonic() - start, 3), "o", said
    os.write(terminal, b"exit\n")
    os.waitpid(pid, 0)
    os.close(terminal)


def read_prompt(terminal: int) -> str:
    """What appears, up to the first prompt."""
    shown = ""
    while not shown.endswith(PROMPT):
        shown += read(terminal)
    return shown


def read(terminal: int) -> str:
    """What appears next. A terminal that is closed is an OSError."""
    return os.read(terminal, 65536).decode()


if __name__ == "__main__":
    main()
