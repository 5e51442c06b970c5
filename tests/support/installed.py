"""What is on this machine, and what a test needs of it.

A test whose programs are not installed is skipped. With PORTEXEC_CI set, when all of them should be, it fails instead.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.processes import ROOT

APPS = ROOT / "tests" / "apps"
# Console scripts of the environment that the tests run in come first, as in a shell where it is activated.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
# Options of a pytest within a test: without the plugins that are half of what it costs to start.
FEW_PLUGINS = " ".join(f"-p no:{name}" for name in ("hypothesispytest", "timeout", "anyio", "asyncio", "rerunfailures"))
BASH_COMPLETION = "/usr/share/bash-completion/bash_completion"
# Some are installed with another program and only show when that is asked.
PROBES = {"webrick": "ruby -e 'require \"webrick\"'", "bash-completion": f"test -e {BASH_COMPLETION}"}


def need(names: Iterable[str]) -> None:
    """Skip the test unless all of these are installed; where they should be, fail."""
    missing = [name for name in names if not is_installed(name)]
    if missing == ["ipv6"]:
        pytest.skip("the loopback interface has no IPv6 address")
    if missing:
        lack(*missing)


def lack(*missing: str) -> NoReturn:
    """Skip the test, since this is not installed; where it should be, fail."""
    (pytest.fail if os.environ.get("PORTEXEC_CI") else pytest.skip)(f"not installed: {', '.join(missing)}")


def install_portexec(place: Path) -> Path:
    """Make a `portexec` in this directory that runs this checkout, installed or not."""
    script = place / "portexec"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom portexec.cli import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return script


def program(name: str) -> str:
    """The path of a program that the test needs."""
    return shutil.which(name, path=PATH) or lack(name)


def is_installed(name: str) -> bool:
    """Whether there is a program, or a Python module, of this name."""
    if name == "ipv6":
        return has_ipv6()
    if name in PROBES:
        command, *words = shlex.split(PROBES[name])
        return bool(shutil.which(command)) and not subprocess.run([command, *words], capture_output=True).returncode
    return bool(shutil.which(name, path=PATH) or importlib.util.find_spec(name))


def has_ipv6() -> bool:
    """Whether the loopback interface has its IPv6 address."""
    try:
        return "00000000000000000000000000000001" in Path("/proc/net/if_inet6").read_text()
    except FileNotFoundError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="the loopback interface has no IPv6 address")
