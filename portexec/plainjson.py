"""JSON in one line, as `json` writes and reads it, by the core of that package.

The package around the core takes nearly as long to import as Python takes to start, mostly for regular expressions. That counts
where portexec is a host (`portexec.host`), has a name, is driven by a program, or writes JSON (`--json`, `--ready-fd`).
"""

from __future__ import annotations

try:
    import _json
except ImportError:  # some Pythons lack it
    _json = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"


class _Plain:
    """The settings for the core's reader: no hooks. See json.decoder.JSONDecoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float  # NaN and the infinities


def dumps(value: object) -> str:
    """A value as JSON, in ASCII. Raises TypeError for a value that JSON cannot have."""
    if _json is None:
        text: str = _by_package("dumps", value)
        return text
    write = _json.make_encoder(None, _refuse, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)
    return "".join(write(value, 0))


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is no JSON, and RecursionError where it is nested too deeply."""
    if _json is not None:
        try:
            stripped = (text if isinstance(text, str) else text.decode()).strip(_SPACE)
            value, end = _json.make_scanner(_Plain)(stripped, 0)  # type: ignore[arg-type]
            if end == len(stripped):
                return value
        except (StopIteration, ValueError, SystemError):  # SystemError: before Python 3.12, if `json` is not imported yet
            pass
    return _by_package("loads", text)  # which reads more, and raises with a reason


def _refuse(value: object) -> None:
    raise TypeError(f"{type(value).__name__} is no JSON")


def _by_package(function: str, argument: Any) -> Any:
    import json

    return getattr(json, function)(argument)
