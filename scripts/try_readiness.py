#!/usr/bin/env python3
"""Dev servers that look whether their number is free before they serve: is `--then` run when a client is served, every time?

Each is started many times as `portexec --then 'curl -sf {url}'`, and counted when the page that curl gets is the server's.
The packages come from npm, into a directory that is kept with --packages. Vite runs twice, in a mount namespace of its own,
which takes root: with an /etc/hosts where localhost is 127.0.0.1 alone, and with one where it is ::1 as well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench_common import PORTEXEC, environment, print_table

PACKAGES = ["detect-port", "get-port", "portfinder", "vite", "parcel"]
DEADLINE = 120.0
PAGE = "<!doctype html><title>served</title><p>served</p>\n"
SERVE = "require('http').createServer((q, r) => r.end('served')).listen(process.env.PORT, '127.0.0.1')"
LOOKS = {
    "detect-port": "import('detect-port').then(m => m.detect(+process.env.PORT))",
    "get-port": "import('get-port').then(m => m.default({ port: +process.env.PORT }))",
    "portfinder": "require('portfinder').getPortPromise({ port: +process.env.PORT })",
}
ONE_FAMILY = "127.0.0.1 localhost\n"
BOTH_FAMILIES = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10, help="of each (default %(default)s)")
    parser.add_argument("--packages", type=Path, help="where npm installs them, or has")
    parser.add_argument("--busy", action="store_true", help="keep all processors busy")
    parser.add_argument("subjects", nargs="*", help="whose names begin so (default: all)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        packages = chosen.packages or Path(directory)
        prepare(packages)
        with busy(os.cpu_count() if chosen.busy else 0):
            rows = [
                measure(name, prefix, words, packages, chosen.times)
                for name, (prefix, words) in subjects(Path(directory)).items()
                if not chosen.subjects or name.startswith(tuple(chosen.subjects))
            ]
    print_table(["", "times", "served", "seconds of one"], rows)


def prepare(packages: Path) -> None:
    if not (packages / "node_modules" / PACKAGES[-1]).exists():
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *PACKAGES], cwd=packages, check=True)
    (packages / "index.html").write_text(PAGE)


def subjects(directory: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What portexec is started by, and the words of the command, by name."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, look in LOOKS.items():
        for delay in (0, 500):
            found[f"{name}, serves {delay} ms later"] = (
                [],
                ["node", "-e", f"{look}.then(() => setTimeout(() => {SERVE}, {delay}))"],
            )
    for name, hosts in (("localhost is IPv4", ONE_FAMILY), ("localhost is both", BOTH_FAMILIES)):
        file = directory / name.replace(" ", "-")
        file.write_text(hosts)
        mount = ["unshare", "--mount", "sh", "-c", f'mount --bind {file} /etc/hosts && exec "$@"', "sh"]
        found[f"vite, {name}"] = (mount, ["node_modules/.bin/vite", "--port", "{port}", "--strictPort"])
    found["parcel"] = ([], ["node_modules/.bin/parcel", "index.html", "--no-cache", "--port", "{port}"])
    return found


def measure(name: str, prefix: Sequence[str], words: Sequence[str], packages: Path, times: int) -> list[str]:
    served, seconds = 0, []
    for _ in range(times):
        begin = time.monotonic()
        done = run(prefix, words, packages)
        seconds.append(time.monotonic() - begin)
        if "served" in done.stdout and done.returncode == 0:
            served += 1
        else:
            print(f"{name}: status {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}", file=sys.stderr)
    return [name, str(times), str(served), f"{median(seconds):.1f}"]


def run(prefix: Sequence[str], words: Sequence[str], packages: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, PORTEXEC, "-q", "--then", "curl -sf {url}", "--", *words],
        cwd=packages,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


@contextmanager
def busy(count: int | None) -> Iterator[None]:
    """So many processes that do nothing but compute, until the block ends."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count or 0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
