"""The environment of the command: what we were given, env files, the injected numbers, `-e`. The later wins, but an env file
sets only what is not set already.
"""

from __future__ import annotations

import os

from portexec.errors import PortexecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping


def given() -> dict[str, str]:
    """The environment that this process was started with.

    In the C locale Python sets LC_CTYPE at its start (PEP 538). That is its own affair and not the command's: what was there
    before stands in /proc/self/environ.
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
    """Merge them, in this order. `without` are names that nobody means any more, in the environment and in files."""
    merged = {**from_files, **given}
    for name in without:
        merged.pop(name, None)
    return {**merged, **injected, **extra}


def read_env_files(paths: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """The variables of dotenv files, a later file over an earlier one.

    `${NAME}` and `${NAME:-default}` are looked up in `known`, then in what was read so far.
    Raises PortexecError with file and line for what cannot be read.
    """
    values: dict[str, str] = {}
    for path in paths:
        _read_env_file(path, known, values)
    return values


def _read_env_file(path: str, known: Mapping[str, str], values: dict[str, str]) -> None:
    # From the parser's own modules, since `dotenv_values` skips malformed lines and expands from os.environ only.
    from dotenv.parser import parse_stream
    from dotenv.variables import parse_variables

    try:
        file = open(path, encoding="utf-8-sig", errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    with file:
        try:
            bindings = list(parse_stream(file))
        except OSError as error:
            raise _unreadable(path, error) from error
    for binding in bindings:
        if binding.error or not _is_sound(binding.key, binding.value):
            text = binding.original.string
            line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
            raise PortexecError(
                f"malformed line in env file {path}:{line}", "write NAME=VALUE, with quotes around a value that has spaces"
            )
        if binding.key and binding.value is not None:
            scope = {**values, **known}
            values[binding.key] = "".join(atom.resolve(scope) for atom in parse_variables(binding.value))


def _is_sound(key: str | None, value: str | None) -> bool:
    """Whether a binding can be in an environment. A name alone is accepted, as shells do, and changes nothing."""
    if value is None:
        return key is None or key.isidentifier()
    return bool(key) and "=" not in str(key) and "\0" not in f"{key}{value}"


def _unreadable(path: str, error: Exception) -> PortexecError:
    return PortexecError(f"cannot read env file {path}: {reason(error) if isinstance(error, OSError) else error}")
