"""The environment of the command: env files, the environment that we were given, the injected numbers, `-e`. The later wins."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping


def given() -> dict[str, str]:
    """The environment that this process was started with.

    In the C locale Python sets LC_CTYPE at its start (PEP 538), which the command must not see. The value before that is in
    /proc/self/environ.
    """
    environment = {name: value for name, value in os.environ.items() if name}
    if environment.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        _restore(environment, "LC_CTYPE")
    return environment


def _restore(environment: MutableMapping[str, str], name: str) -> None:
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return
    prefix = os.fsencode(name) + b"="
    values = [entry[len(prefix) :] for entry in entries if entry.startswith(prefix)]
    if values:
        environment[name] = os.fsdecode(values[0])
    else:
        del environment[name]


def compose(
    given: Mapping[str, str],
    from_files: Mapping[str, str],
    injected: Mapping[str, str],
    extra: Mapping[str, str],
    *,
    without: Iterable[str],
) -> dict[str, str]:
    """Merge them: `extra` wins over `injected`, that over `given`, and that over `from_files`.

    `without` are names whose values are stale. They are dropped from `given` and `from_files`.
    """
    merged = {**from_files, **given}
    for name in without:
        merged.pop(name, None)
    return {**merged, **injected, **extra}
