"""Env files: variables of the command in dotenv syntax."""

from __future__ import annotations

import os
import stat
import sys

from portexec.errors import PortexecError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dotenv.parser import Binding

_MOST = 8 << 20  # bytes; Linux gives no command more than 6 MiB of words and variables, execve(2)
_DOLLAR = "\ud800"  # stands for `\$`; no file has it: bytes that are no text become other surrogates, PEP 383


def read(
    paths: Iterable[str], known: Mapping[str, str], *, is_quiet: bool = False, driver: int | None = None
) -> dict[str, str]:
    """The variables of dotenv files, a later file over an earlier one.

    We wait for the writer of a FIFO, until the descriptor `driver` is closed at its other end, and say so unless `is_quiet`.

    `${NAME}` and `${NAME:-default}` are looked up in `known`, then in what was read so far. As in sh and docker compose, they
    stay as they are in single quotes, and after a backslash, which is removed.
    Raises PortexecError with file and line for what cannot be read.
    """
    values: dict[str, str] = {}
    for path in paths:
        try:
            data = _content(path, is_quiet=is_quiet, driver=driver)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if len(data) == _MOST:
            raise PortexecError(f"env file {path} is too large", f"all that a command gets is shorter than {_MOST >> 20} MiB")
        _parse(path, data, known, values)
    return values


def _content(path: str, *, is_quiet: bool, driver: int | None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if sys.platform == "linux" else 0))
    try:
        if not os.get_blocking(fd) and stat.S_ISFIFO(os.fstat(fd).st_mode):
            from portexec.command import fifo

            return fifo.content(fd, f"env file {path}, which is a FIFO", _MOST, is_quiet=is_quiet, driver=driver)
        os.set_blocking(fd, True)
        with open(fd, "rb", closefd=False) as file:
            return file.read(_MOST)
    finally:
        os.close(fd)


def _parse(path: str, data: bytes, known: Mapping[str, str], values: dict[str, str]) -> None:
    # From the parser's own modules, since `dotenv_values` skips malformed lines and expands from os.environ only.
    import io

    from dotenv.parser import parse_stream

    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", errors="surrogateescape").read()
    for binding in parse_stream(io.StringIO(_without_escaped_dollars(text))):
        if binding.error or not _is_sound(binding.key, binding.value):
            raise _malformed(path, binding)
        if binding.key and binding.value is not None:
            values[binding.key] = _expanded(binding, {**values, **known})


def _without_escaped_dollars(text: str) -> str:
    r"""The text with each `\$` marked, since the parser does not know `\$`. An escaped backslash escapes no dollar."""
    import re

    return re.sub(r"\\(.)", lambda found: _DOLLAR if found[1] == "$" else found[0], text, flags=re.DOTALL)


def _expanded(binding: Binding, scope: Mapping[str, str]) -> str:
    from dotenv.variables import parse_variables

    value = binding.value or ""
    if binding.original.string.partition("=")[2].lstrip().startswith("'"):
        return value.replace(_DOLLAR, "\\$")
    return "".join(atom.resolve(scope) for atom in parse_variables(value)).replace(_DOLLAR, "$")


def _is_sound(key: str | None, value: str | None) -> bool:
    """Whether a binding can be in an environment. A name alone is accepted, as shells do, and changes nothing."""
    if value is None:
        return key is None or (key.isidentifier() and key != "export")
    return bool(key) and "=" not in str(key) and "\0" not in f"{key}{value}"


def _malformed(path: str, binding: Binding) -> PortexecError:
    from portexec.command.malformed import fault

    text = binding.original.string
    at, what, hint = fault(text.replace(_DOLLAR, "\\$"))
    line = binding.original.line + text[:at].count("\n")
    return PortexecError(f"malformed line in env file {path}:{line}: {what}", hint)


def _unreadable(path: str, error: Exception) -> PortexecError:
    hint = ""
    if isinstance(error, FileNotFoundError):
        hint = "the file has to exist; leave --env-file out where there is none"
    elif isinstance(error, IsADirectoryError):
        hint = f"name a file in it: {os.path.join(path, '.env')}"
    return PortexecError(f"cannot read env file {path}: {reason(error) if isinstance(error, OSError) else error}", hint)
