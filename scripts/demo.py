"""Two copies of one server, side by side, and neither chose a port: run by `make demo`.

Starts `portexec -- uvicorn ... --fd {fd}` twice, shows both announcements, asks each for a page, stops both.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
BESIDE = Path(sys.executable).parent


def main() -> int:
    """Run the demo. Returns 0 when both servers answered, each from its own port."""
    command = ["portexec", "--", "uvicorn", "demo_app:app", "--log-level", "warning", "--fd", "{fd}"]
    print("== starting the same server twice, without a port", flush=True)
    print(f"$ {shlex.join(command)} &    (twice)", flush=True)
    servers = [start(command) for _ in range(2)]
    try:
        urls = [announced(server) for server in servers]
        print("== asking both", flush=True)
        answers = [ask(f"{url}/hello") for url in urls]
    finally:
        print("== stopping both", flush=True)
        for server in servers:
            server.terminate()
        for server in servers:
            server.communicate()
    print("\n".join(f"pid {server.pid} has ended, status {server.returncode}" for server in servers))
    return 0 if len(set(urls)) == len(set(answers)) == len(servers) else 1


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start one server with the programs that are installed beside this Python."""
    path = f"{BESIDE}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = os.environ | {"PATH": path, "NO_COLOR": "1"}  # the first line is read, and not only shown
    return subprocess.Popen(
        [str(BESIDE / command[0]), *command[1:]], cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True
    )


def announced(server: subprocess.Popen[str]) -> str:
    """Read the announcement, which is the first line, and return the address in it."""
    assert server.stderr is not None
    line = server.stderr.readline().rstrip("\n")
    print(line, flush=True)
    return line.partition(" ")[2]


def ask(url: str) -> str:
    """GET a page and show it. The socket listens already: a request that is early waits in the backlog."""
    with urllib.request.urlopen(url, timeout=30) as response:
        body = str(response.read().decode()).rstrip()
    print(f"$ curl {url}\n{body}")
    return body


if __name__ == "__main__":
    sys.exit(main())
