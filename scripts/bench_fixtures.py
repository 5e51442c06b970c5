"""One test of one server, with a fixture of three kinds (scripts/compare): by hand, with pytest-xprocess, with portexec.

Counts lines, and lets happen what a fixture is to withstand. The fixtures are run as they are; what goes wrong is arranged by
compare/bin/uvicorn, first in PATH, and by another application in place of the demo's. Needs `pip install pytest-xprocess`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from bench_common import environment
from bench_pytest import MARK, marked, wait_until

import portexec

HERE = Path(__file__).resolve().parent
FIXTURES = {"subprocess": "with_subprocess.py", "pytest-xprocess": "with_xprocess.py", "portexec": "with_portexec.py"}
ROUNDS = 5
PATIENCE = 15.0  # seconds in which a server of a killed pytest has to be gone; a busy one may take 5

HEALTHY = (HERE / "demo_app.py").read_text()
OTHER = "import os, signal\nfrom fastapi import FastAPI\napp = FastAPI()\n@app.get('/hello')\ndef hello():\n    "
DYING = OTHER + "print('out of memory', flush=True); os._exit(3)"
HANGING = OTHER + "open(os.environ['PLACE'] + '/asked', 'w').close(); signal.pause()"


class Thief(BaseHTTPRequestHandler):
    """Somebody else's server."""

    answers = 0

    def do_GET(self) -> None:
        """Say hello, too."""
        Thief.answers += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from somebody else")

    def log_message(self, format: str, *args: object) -> None:
        """Not a word."""


class Arranged:
    """A folder in which to run one fixture, and what is to happen there."""

    def __init__(self, file: str, place: Path, app: str, is_thief: bool) -> None:
        self.file, self.place = f"{HERE}/compare/{file}", place
        (place / "demo_app.py").write_text(app)
        listener = portexec.listen(f"unix:{place}/socket")
        threading.Thread(target=self._before_the_bind, args=[listener, is_thief], daemon=True).start()
        with portexec.listen() as free:  # for the one that wants to be told a number
            self.number = str(free.getsockname()[1])

    def _before_the_bind(self, listener: portexec.GuardedSocket, is_thief: bool) -> None:
        while True:
            with listener.accept()[0] as connection:
                number = int(connection.recv(10))
                with suppress(OSError):  # the number is not to be had
                    if is_thief:
                        threading.Thread(target=HTTPServer(("127.0.0.1", number), Thief).serve_forever, daemon=True).start()

    def start(self) -> subprocess.Popen[str]:
        """Start pytest."""
        base = environment()
        path = f"{HERE}/compare/bin:{base['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--rootdir={self.place}", "-c/dev/null", self.file],
            cwd=self.place,
            env=base | {"PATH": path, MARK: str(self.place), "PLACE": str(self.place), "FIXED_PORT": self.number},
            stdout=subprocess.PIPE,
            text=True,
        )


@contextmanager
def arranged(file: str, app: str = HEALTHY, is_thief: bool = False) -> Iterator[Arranged]:
    """Something arranged, and nothing left of it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Arranged(file, Path(folder), app, is_thief)
        try:
            yield made
        finally:
            for pid in marked(folder):
                os.kill(pid, signal.SIGKILL)


def verdict(output: str) -> str:
    """`passed`, or the error that pytest says last."""
    errors = re.findall(r"^E   (\S.*)$", output, flags=re.MULTILINE)
    return "passed" if "1 passed" in output and not errors else " ".join(errors[-1].split())


def stolen(file: str) -> str:
    """Somebody else asks for the number when the server has been told it and has not bound it."""
    Thief.answers = 0
    with arranged(file, is_thief=True) as run:
        result = verdict(run.start().communicate()[0])
    return result + (", answered by somebody else" if Thief.answers else "")


def parallel(file: str) -> str:
    """Two at once in one folder, as two workers of pytest-xdist are; a few times, since they have to meet."""
    results = []
    for _ in range(ROUNDS):
        with arranged(file) as run:
            results += [verdict(process.communicate()[0]) for process in [run.start(), run.start()]]
    failures = sorted({result.partition(":")[0] for result in results} - {"passed"})
    return f"{results.count('passed')} of {len(results)} passed{''.join(f', {name}' for name in failures)}"


def died(file: str) -> str:
    """The server dies of the request, with some last words."""
    with arranged(file, DYING) as run:
        output = run.start().communicate()[0]
    return verdict(output) + (", with its last words" if "out of memory" in output else ", without its last words")


def killed(file: str) -> str:
    """KILL to pytest while it waits for an answer: what is left of its server, as /proc tells it."""
    with arranged(file, HANGING) as run, run.start() as process:
        wait_until((run.place / "asked").exists)
        process.kill()
        process.wait()
        seconds = wait_until(lambda: not marked(str(run.place)), PATIENCE)
        return f"left running: {len(marked(str(run.place)))}" if seconds is None else f"nothing left after {seconds:.1f} s"


def count_lines(file: str) -> str:
    """Those of the fixture and the test: no empty ones, no docstring, no imports."""
    lines = (HERE / "compare" / file).read_text().splitlines()
    return str(sum(bool(line) and not line.startswith(('"""', "#", "import ", "from ")) for line in lines))


def main() -> None:
    """Print a line for each fixture and each thing that happens."""
    for name, file in FIXTURES.items():
        is_there = name != "pytest-xprocess" or importlib.util.find_spec("xprocess")
        for act in (count_lines, stolen, parallel, died, killed) if is_there else (count_lines,):
            print(f"{name:17}{act.__name__:13}{act(file)}", flush=True)


if __name__ == "__main__":
    main()
